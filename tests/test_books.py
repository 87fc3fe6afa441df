"""The script that cuts retain text for a benchmark out of whole books."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import books


def test_a_book_loses_its_end_and_what_is_only_measured(tmp_path: Path) -> None:
    words = [f"w{i:03}" for i in range(200)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("\n".join(words))
    lines = [
        {"split": "keep_measured", "text": " ".join(words[10:20])},
        {"split": "keep_retain", "text": " ".join(words[30:40])},
        {"split": "heldout", "text": " ".join(words[165:169])},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    books.main([str(tmp_path / name) for name in ("in", "p.jsonl", "out")])
    assert (tmp_path / "out" / "a.txt").read_text().split() == [*words[:10], *words[20:165], *words[169:170]]
