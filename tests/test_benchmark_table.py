"""The README's table is read off the benchmark's results, of one folder or of several."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarking import canned
from benchmarks import table

from pipeline.benchmark.records import Results


def written(folder: Path, results: Results) -> str:
    folder.mkdir()
    (folder / "results.json").write_text(results.model_dump_json())
    return str(folder)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    table.main([*arguments])
    lines = [line.strip().strip("|").split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    return {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines}


def test_rows_are_means_over_seeds_at_the_last_common_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, written(tmp_path / "b", canned()), "--methods", "vanilla,ssu,ga")
    assert found[""] == ["Vanilla, step 2", "SSU, anchored and repaired, step 2, seeds 0, 1", "GA, step 1, seeds 0, 1"]
    # Seeds 0 and 1 have .2 and .3: mean .25, sample deviation .1 / √2.
    assert found["EM of this step"] == ["1.000", ".250 ± .071", ".100 ± .000"]
    assert found["held-out NLL, nats over the untouched model's"][1] == "+.100 ± .000"
    assert found["– 4 bits"] == ["", ".350 ± .071", ""]
    # Steps 1 and 2 take 1 and 2 s with seed 0, 2 and 3 s with seed 1: means 1.5 and 2.5.
    assert found["seconds of a step"][1] == "2 ± 1"
    assert found["share of the target weights that a step changes"][1] == ".20 ± .00"
    assert float(found["PrivLeak against the retrained model"][1].split()[0]) != 0


def test_seeds_that_were_run_apart_give_the_same_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = canned()
    alone = [
        both.model_copy(
            update={
                "rows": tuple(r for r in both.rows if r.seed == seed or r.method in ("vanilla", "retrained")),
                "recovered": tuple(r for r in both.recovered if r.seed == seed),
            }
        )
        for seed in (0, 1)
    ]
    folders = [written(tmp_path / str(i), part) for i, part in enumerate(alone)]
    assert printed(capsys, *folders) == printed(capsys, written(tmp_path / "both", both))


@pytest.mark.parametrize("name", ["model_root", "inputs_digest", "steps", "settings"])
def test_what_cannot_be_compared_is_refused(tmp_path: Path, name: str) -> None:
    first = canned()
    ssu = first.settings["ssu"]
    longer = ssu.model_copy(update={"unlearn": ssu.unlearn.model_copy(update={"iterations": 3})})
    other = {
        "model_root": "root-sha256:zz", "inputs_digest": "sha256:zz", "steps": tuple(reversed(first.steps)),
        "settings": first.settings | {"ssu": longer},
    }[name]  # fmt: skip
    folders = [written(tmp_path / "a", first), written(tmp_path / "b", first.model_copy(update={name: other}))]
    with pytest.raises(SystemExit, match="not comparable"):
        table.main(folders)
