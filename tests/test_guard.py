"""The guard: hashes against the formula, the filter's rate, what is forbidden, generations with and without."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from histories import array_model, entries_of, make_step, start_history
from hypothesis import given
from hypothesis import strategies as st
from tampered.calls import call_in as call
from workspaces import HELDOUT, KEPT, WORKS, copied, draw_text, leaks, take_in

from pipeline import bloom, guard_export
from pipeline import guard as guard_module
from pipeline.bloom import PRIME, Bloom, run_hash, run_hashes
from pipeline.erase import erase
from pipeline.errors import StoreDamaged, UsageError
from pipeline.files import write_atomic
from pipeline.guard import BITS, PARAMETERS, Guard, Spelling, letters, reach
from pipeline.guard_export import export_guard, guarded_ranges
from pipeline.models import load_model, load_tokenizer
from pipeline.workspace import Workspace

BASE = 0x123456789ABCDEF
N = 40

# --- hashes and filter ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, PRIME - 1), min_size=1, max_size=20), st.integers(0, PRIME - 1))
def test_products_are_those_of_whole_numbers(values: list[int], factor: int) -> None:
    found = bloom.times(np.asarray(values, np.uint64), factor)
    assert found.tolist() == [value * factor % PRIME for value in values]


def test_products_at_the_edges() -> None:
    edges = [0, 1, (1 << 29) - 1, (1 << 32) - 1, 1 << 32, 1 << 60, PRIME - 1]
    for factor in edges:
        assert bloom.times(np.asarray(edges, np.uint64), factor).tolist() == [e * factor % PRIME for e in edges]
    assert bloom.fold(np.asarray([PRIME, 2**64 - 1], np.uint64)).tolist() == [0, (2**64 - 1) % PRIME]


@given(st.lists(st.integers(0, 1 << 21), max_size=70), st.integers(1, 70))
def test_hashes_of_runs_are_those_of_each_run_by_itself(symbols: list[int], length: int) -> None:
    expected = [run_hash(symbols[i : i + length], BASE) for i in range(len(symbols) - length + 1)]
    assert run_hashes(np.asarray(symbols, np.uint64), length, BASE).tolist() == expected


@pytest.mark.parametrize(("members", "fpr"), [(20, 1e-4), (100, 1e-4), (400, 1e-5)])
def test_a_small_filter_errs_at_its_rate_too(members: int, fpr: float) -> None:
    """One notice is some hundred runs; places that go round in a few of its bits would err several times as often."""
    draw, asked, wrong = np.random.default_rng(members), 0, 0
    for _ in range(20):
        first, second = (int(salt) for salt in draw.integers(0, 2**63, 2))
        made = Bloom.empty(members, fpr, (first, second))
        put_in = draw.integers(0, PRIME, members).astype(np.uint64)
        made.add(put_in)
        assert made.holds(put_in).all()
        others = draw.integers(0, PRIME, 200_000).astype(np.uint64)  # of 2⁶¹: none of them is a member
        asked, wrong = asked + len(others), wrong + int(made.holds(others).sum())
    # How full 20 small filters are scatters, too: by up to a third at the smallest.
    assert wrong < 1.35 * fpr * asked + 5 * (fpr * asked) ** 0.5


@pytest.mark.parametrize("fpr", [0.05, 1e-3])
def test_filter_forgets_nothing_and_errs_at_its_rate(fpr: float) -> None:
    """Tolerance: 200,000 questions of a filter at capacity, five standard deviations; seeds are fixed."""
    draw = np.random.default_rng(5)
    members, others = np.split(draw.integers(0, PRIME, 220_000, dtype=np.uint64), [20_000])
    made = Bloom.empty(len(members), fpr, (11, 12))
    made.add(members)
    assert made.holds(members).all()
    count = int(made.holds(others).sum())
    assert abs(count - fpr * len(others)) < 5 * (fpr * len(others)) ** 0.5 + 0.1 * fpr * len(others)
    other = Bloom.empty(len(members), fpr, (13, 12))
    other.add(members)
    assert (other.bits != made.bits).any(), "other salts, other bits"


# --- letters ----------------------------------------------------------------------------------------------


@given(st.text(), st.text())
def test_letters_of_two_texts_are_those_of_both(first: str, second: str) -> None:
    assert letters(first + second).tolist() == letters(first).tolist() + letters(second).tolist()


def test_letters_know_no_case_accent_space_or_punctuation() -> None:
    plain = letters("thecafestrasse42").tolist()
    for variant in (
        "The Café, Straße 42!",
        "THE\nCAFE\u0301 STRASSE—42",
        "ｔｈｅ cafe “strasse” ⁴2",
        "t-h-e ca fé straSSe:42",
    ):
        assert letters(variant).tolist() == plain, variant
    assert letters("").tolist() == letters("— …\ud800").tolist() == []


# --- what is forbidden ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def spelling(tokenizer: Any) -> Spelling:
    return Spelling.of_letters(tokenizer)


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard.build_texts([WORKS["one"]], N, 1e-9, seed=1)


def runs(text: str, n: int) -> set[tuple[int, ...]]:
    found = letters(text).tolist()
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def test_forbidden_are_exactly_the_tokens_that_complete_a_run(tokenizer: Any, spelling: Spelling, guard: Guard) -> None:
    """Against each token tried by itself, at every place of the text, on its tokens and on others that spell it."""
    known, asked = runs(WORKS["one"], N), 0
    other = WORKS["one"].upper().replace(" ", "\n")
    for text in (WORKS["one"], other, WORKS["two"]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for end in range(0, len(ids), 7):
            context = letters(tokenizer.decode(ids[:end])).tolist()[-N:]
            assert spelling.behind(ids[:end], N) == context
            expected = [
                token
                for token in range(len(tokenizer))
                if (own := letters(tokenizer.decode([token])).tolist())
                and token not in tokenizer.all_special_ids
                and tuple((context + own)[-N:]) in known
            ]
            assert guard.forbidden(context, spelling).tolist() == expected
            asked += len(expected)
    assert asked > 10


def test_short_contexts_and_texts_forbid_nothing(spelling: Spelling, guard: Guard) -> None:
    assert guard.forbidden([], spelling).size == 0 and not guard.begun([ord("a")])
    empty = Guard.build_texts(["", "too short"], N, 0.1, seed=1)
    assert empty.runs == 0 and empty.found(letters(WORKS["one"])) == []


def test_last_letters_of_a_text_are_guarded_whatever_the_token(guard: Guard, spelling: Spelling) -> None:
    """The end of a text has no run behind it whose beginning could be looked up."""
    end = letters(WORKS["one"]).tolist()
    for last in range(1, reach(N, "letters") + 1):
        assert guard.begun(end[:-last]), last


@pytest.mark.parametrize(("n", "fpr"), [(1, 0.1), (8, 0.0), (8, 1.0)])
def test_parameters_out_of_range(n: int, fpr: float) -> None:
    with pytest.raises(UsageError):
        Guard.build([[1, 2, 3]], n, fpr)


# --- generations ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generate(model: Path, tokenizer: Any) -> Any:
    """``generate(texts, processor=None, words=8, tokens=90)``: greedy continuations of the texts' first words."""
    torch.set_num_threads(1)
    loaded: Any = load_model(model, "cpu")

    def continued(texts: Sequence[str], processor: Any = None, words: int = 8, tokens: int = 60) -> list[list[int]]:
        prompts = [tokenizer(" ".join(text.split()[:words]), add_special_tokens=False)["input_ids"] for text in texts]
        longest = max(map(len, prompts))
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        made = loaded.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad,
            logits_processor=[processor] if processor else None,
        )  # fmt: skip
        return [row[longest - len(p) :] for row, p in zip(made.tolist(), prompts, strict=True)]

    return continued


def longest_run(text: str, source: str) -> int:
    """Most letters in a row of a text that stand in the source."""
    found, whole = ("".join(map(chr, letters(t).tolist())) for t in (text, source))
    best = 0
    for start in range(len(found)):
        while start + best < len(found) and found[start : start + best + 1] in whole:
            best += 1
    return best


def test_what_a_model_recites_is_not_written_and_the_rest_is_as_before(
    generate: Any, tokenizer: Any, spelling: Spelling, guard: Guard
) -> None:
    """In one batch, padded on the left: a guarded work, two that are recited but not guarded, and a text never seen.

    A small model drifts from one text into another; where that writes nothing guarded, nothing changes.
    """
    texts = [WORKS["one"], WORKS["two"], KEPT["kept-a"], next(iter(HELDOUT.values()))]
    free = generate(texts)
    assert longest_run(tokenizer.decode(free[0]), WORKS["one"]) > 2 * N
    held = generate(texts, guard.processor(spelling))
    widest = int(spelling.lengths.max())
    assert longest_run(tokenizer.decode(held[0]), WORKS["one"]) < N + widest
    assert guarded_ranges(guard, tokenizer.decode(held[0])) == [], "nor is any whole run there"
    unguarded = [i for i in range(1, 4) if not guarded_ranges(guard, f"{texts[i]} {tokenizer.decode(free[i])}")]
    assert len(unguarded) >= 2 and all(held[i] == free[i] for i in unguarded)
    assert generate(texts, guard.processor(spelling)) == held
    alone = generate(texts[:1], guard.processor(spelling))
    assert longest_run(tokenizer.decode(alone[0]), WORKS["one"]) < N + widest


def test_memfree_over_tokens_writes_no_run_of_tokens(generate: Any, tokenizer: Any) -> None:
    n = 10
    ids = tokenizer(WORKS["one"], add_special_tokens=False)["input_ids"]
    made = Guard.build([ids], n, 1e-9, seed=1)
    processor = made.processor(Spelling.of_tokens(len(tokenizer)))
    free, held = generate([WORKS["one"], WORKS["two"]]), generate([WORKS["one"], WORKS["two"]], processor)
    known = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}

    def recited(tokens: list[int]) -> int:
        return sum(tuple(tokens[i : i + n]) in known for i in range(len(tokens) - n + 1))

    assert recited(free[0]) > 20 and recited(held[0]) == 0
    assert held[1] == free[1]


def test_scores_are_changed_in_a_copy_and_only_where_forbidden(
    spelling: Spelling, guard: Guard, tokenizer: Any
) -> None:
    ids = tokenizer(WORKS["one"], add_special_tokens=False)["input_ids"][:60]
    scores = torch.randn(2, len(tokenizer), generator=torch.Generator().manual_seed(1))
    before = scores.clone()
    rows = torch.tensor([ids, ids[::-1]])
    found = guard.processor(spelling)(rows, scores)
    assert torch.equal(scores, before) and torch.equal(found[1], before[1])
    forbidden = guard.forbidden(spelling.behind(ids, N), spelling)
    assert len(forbidden) and torch.isneginf(found[0]).nonzero().flatten().tolist() == forbidden.tolist()
    with pytest.raises(UsageError, match="over letters, the spelling over tokens"):
        guard.processor(Spelling.of_tokens(7))


def test_characters_in_pieces_are_read_together() -> None:
    """A tokenizer of bytes: no piece has letters, and behind them the context is right nevertheless."""

    class Bytes:
        all_special_ids = (0,)

        def __len__(self) -> int:
            return 256

        def decode(self, tokens: list[int]) -> str:
            return bytes(tokens).decode(errors="replace")

    text = "Łódź i żółć, ça và 日本"
    spelled = Spelling.of_letters(Bytes())
    assert spelled.behind(list(text.encode()), 99) == letters(text).tolist()
    assert spelled.behind(list(text.encode()), 3) == letters(text).tolist()[-3:]
    assert max(spelled.tokens) < 128 and spelled.lengths.max() == 1


# --- files ------------------------------------------------------------------------------------------------


def saved(guard: Guard, folder: Path) -> Path:
    folder.mkdir()
    for name, data in guard.files().items():
        write_atomic(folder / name, data)
    return folder


def test_a_guard_comes_back_as_it_was_and_a_damaged_one_does_not(guard: Guard, tmp_path: Path) -> None:
    folder = saved(guard, tmp_path / "guard")
    back = Guard.load(folder)
    assert back.files() == guard.files() and back.found(letters(WORKS["one"])) == guard.found(letters(WORKS["one"]))
    good = {name: (folder / name).read_bytes() for name in (PARAMETERS, BITS)}
    tree = json.loads(good[PARAMETERS])
    for change in ({"format": "takedown-guard-1"}, {"bits": "sha256:0"}, {"size": 8}, {"n": 1}, {"probes": 0},
                   {"level": "words"}, {"salts": [1]}, {"base": None}):  # fmt: skip
        (folder / PARAMETERS).write_text(json.dumps(tree | change))
        with pytest.raises(StoreDamaged, match="Export it again"):
            Guard.load(folder)
    (folder / PARAMETERS).write_bytes(good[PARAMETERS])
    for data in (b"", good[BITS][:-1], good[BITS][:-1] + b"\x01"):
        (folder / BITS).write_bytes(data)
        with pytest.raises(StoreDamaged):
            Guard.load(folder)
    (folder / BITS).unlink()
    with pytest.raises(StoreDamaged):
        Guard.load(folder)


def test_same_seed_same_file_and_none_never(guard: Guard) -> None:
    again = Guard.build_texts([WORKS["one"]], N, 1e-9, seed=1)
    assert again.files() == guard.files()
    assert Guard.build_texts([WORKS["one"]], N, 1e-9).files()[BITS] != guard.files()[BITS]


def test_a_server_needs_nothing_else_of_the_product() -> None:
    root = Path(bloom.__file__).parent
    for name, allowed in (("guard", {"pipeline.bloom", "pipeline.errors"}), ("bloom", set()), ("errors", set())):
        tree = ast.parse((root / f"{name}.py").read_text())
        own = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {module for module in own if str(module).startswith("pipeline")} == allowed


# --- the verbs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 without TD-1; TD-2 waits, TD-3 is withdrawn, TD-4 is too short."""
    folder = tmp_path_factory.mktemp("guard")
    workspace = start_history(folder / "ws", array_model(folder / "model"))
    make_step(workspace, "TD-1")
    take_in(workspace, "b", {"TD-2": draw_text("TD-2", 30), "TD-3": draw_text("TD-3", 30), "TD-4": "Only this."})
    from pipeline.requests import note

    note(workspace, "withdrawn", "TD-3", "tester", "sent twice")
    return workspace.root


@pytest.fixture
def ws(made: Path, tmp_path: Path) -> Workspace:
    return copied(made, tmp_path / "ws")


def test_export_holds_what_waits_and_what_was_taken_out(ws: Workspace) -> None:
    # So that no other text is taken for one by chance: at the default one of its 130 runs is, once in 80 exports.
    answer = call(ws, "guard", "export", "--out", "g", "--fpr", "1e-9", "--json")
    said = json.loads(answer.out)
    assert answer.code == 0 and (said["requests"], said["short"], said["erased"]) == (3, ["TD-4"], [])
    folder = ws.root.parent / "g"
    assert {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()} == {PARAMETERS: 0o600, BITS: 0o600}
    texts = {name: draw_text(name, 30) for name in ("TD-1", "TD-2", "TD-3")}
    assert leaks([*texts.values(), texts["TD-1"][:40]], folder, answer.err.encode(), answer.out.encode()) == []
    guard = Guard.load(folder)
    assert [bool(guard.found(letters(texts[name]))) for name in texts] == [True, True, False]
    assert guard.runs == said["runs"] == sum(len(runs(texts[name], 40)) for name in ("TD-1", "TD-2"))

    (ws.root.parent / "answer.txt").write_text(f"He said: {texts['TD-1'].upper()}\nAnd no more.")
    answer = call(ws, "guard", "check", "answer.txt", "--dir", "g")
    assert answer.code == 1 and "Blocked, of 40 letters or more: 1 by characters: 9-" in answer.text
    assert texts["TD-1"][:20].upper() not in answer.text
    found = json.loads(call(ws, "guard", "check", "answer.txt", "--dir", "g", "--json").out)
    assert found["ranges"] == [[9, 9 + len(texts["TD-1"].rstrip("."))]]
    (ws.root.parent / "answer.txt").write_text(texts["TD-3"])
    assert call(ws, "guard", "check", "answer.txt", "--dir", "g").code == 0
    (ws.root.parent / "answer.txt").write_bytes(b"\xff")
    assert call(ws, "guard", "check", "answer.txt", "--dir", "g").code == 2
    assert call(ws, "guard", "check", "g/guard.json", "--dir", ".").code == 1
    assert call(ws, "guard", "export", "--out", "ws/vault/g").code == 2


def test_an_export_reads_the_letters_of_each_text_once(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    read = mock.Mock(side_effect=letters)
    for module in (guard_module, guard_export):
        monkeypatch.setattr(module, "letters", read)
    made = export_guard(ws, entries_of(ws), ws.root.parent / "g")
    assert read.call_count == made.requests == 3 and made.short == ("TD-4",)


def test_what_was_erased_is_not_guarded_and_said(ws: Workspace) -> None:
    erase(ws, "TD-1", "tester", "asked for")
    answer = call(ws, "guard", "export", "--out", "g", "--letters", "30", "--fpr", "1e-9")
    assert answer.code == 0 and "Erased, so not guarded: TD-1." in answer.text and "TD-4" in answer.text
    assert Guard.load(ws.root.parent / "g").found(letters(draw_text("TD-1", 30))) == []
    assert export_guard(ws, entries_of(ws), ws.root.parent / "g", 30, 1e-9).erased == ("TD-1",)
