"""``takedown bench`` as its user meets it: what it writes and prints, and what it says of a wrong call."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarking import EVIL, canned, write_inputs

from flows import cli
from pipeline.methods import METHODS


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Calls the verb as the console script does; gives the exit code and what was printed."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["takedown", "bench", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capfd.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No benchmark runs; what was asked for is noted, and made-up results come back."""
    from pipeline.benchmark import runner

    seen: list[Any] = []

    def run(benchmark: Any) -> Any:
        seen.append(benchmark)
        benchmark.out.mkdir(exist_ok=True)
        return canned()

    monkeypatch.setattr(runner, "run_benchmark", run)
    return seen


def test_what_is_asked_for_and_what_is_written(bench: Any, asked: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = bench(
        tmp_path / "model", tmp_path / "steps", "--kept", tmp_path / "kept", "--methods", "ssu, ga", "--seeds", "3,4",
        "--tasks", "mmlu", "--out", out,
    )  # fmt: skip
    assert code == 0
    benchmark = asked[0]
    assert (benchmark.methods, benchmark.seeds, benchmark.tasks) == (("ssu", "ga"), (3, 4), ("mmlu",))
    assert benchmark.inputs.kept == str(tmp_path / "kept") and benchmark.inputs.unseen is None
    assert json.loads((out / "results.json").read_text()) == canned().model_dump(mode="json")
    assert (out / "results.csv").read_text().startswith("method,seed,step,source,")
    assert f'row">{METHODS["ga"].title}' in (out / "report.html").read_text()
    assert "SSU" in printed and "broke down in step 2" in printed and "report.html" in printed


def test_json(bench: Any, asked: list[Any], tmp_path: Path) -> None:
    code, printed, _ = bench("model", "steps", "--out", tmp_path / "out", "--json")
    assert code == 0 and json.loads(printed)["model"] == f"model {EVIL}"
    assert asked[0].seeds == (0, 1, 2) and asked[0].methods == ("short-context",)


def test_help_is_the_manual(bench: Any) -> None:
    code, printed, _ = bench("--help")
    words = " ".join(printed.split())
    assert code == 0 and "Example: takedown bench ./model ./steps" in words and "keep_measured" in words


def test_wrong_calls(bench: Any, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in")
    code, _, told = bench("model", inputs.texts, "--seeds", "0,x,-1", "--out", tmp_path / "out")
    assert code == 2 and "x, -1" in told
    code, _, told = bench("model", inputs.texts, "--methods", "magic,vanilla", "--out", tmp_path / "out")
    assert code == 2 and "magic" in told and "unlikelihood-kl" in told and "--methods vanilla" in told
    code, _, told = bench(tmp_path / "none", inputs.texts, "--out", tmp_path / "out")
    assert code == 2 and "none" in told and "Traceback" not in told
