"""What differs between two versions, against numbers computed from the restored files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from histories import array_model, entries_of, make_step, reinstate, start_history
from safetensors.numpy import load_file

from pipeline.diff import diff, differences, numbers
from pipeline.requests import note
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "bfloat16"])
def history(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, bool]:
    folder = tmp_path_factory.mktemp("diff")
    workspace = start_history(folder / "ws", array_model(folder / "m", shape=(40, 10), bfloat16=request.param))
    make_step(workspace, "A")
    make_step(workspace, "B")
    return workspace, request.param


def _values(path: Path, bfloat16: bool) -> dict[str, np.ndarray]:
    """All tensors as float64, read by hand."""
    if not bfloat16:
        return {n: v.astype(np.float64).ravel() for n, v in load_file(path).items()}
    path.chmod(0o644)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"BF16"', b'"U16" '))
    raw = load_file(path)
    return {n: (v.astype(np.uint32) << 16).view(np.float32).astype(np.float64).ravel() for n, v in raw.items()}


def test_counts_and_norms_are_those_of_the_weights(history: tuple[Workspace, bool], tmp_path: Path) -> None:
    workspace, bfloat16 = history
    store = VersionStore(workspace.versions)
    found = diff(store, store.manifest(0), store.manifest(2), entries_of(workspace))
    weights = []
    for number in (0, 2):
        store.restore(number, tmp_path / f"{number}")
        weights.append(_values(tmp_path / f"{number}" / "model.safetensors", bfloat16))
    assert {t.name for t in found.tensors} == {n for n in weights[0] if (weights[0][n] != weights[1][n]).any()}
    for tensor in found.tensors:
        step = weights[1][tensor.name] - weights[0][tensor.name]
        assert tensor.changed == np.count_nonzero(step)
        assert tensor.norm == pytest.approx(np.linalg.norm(step), rel=1e-12)
        assert tensor.relative == pytest.approx(np.linalg.norm(step) / np.linalg.norm(weights[0][tensor.name]))
        assert tensor.largest == np.abs(step).max()
    assert found.changed == sum(t.changed for t in found.tensors) > 0
    assert found.entries == 3 * 400
    assert (found.requests, found.back) == (("A", "B"), ()), "of every step on the way, not of the last one only"
    assert found.report["changed"] == (None, store.manifest(2).report["changed"])


def test_a_version_does_not_differ_from_itself(history: tuple[Workspace, bool]) -> None:
    store = VersionStore(history[0].versions)
    found = diff(store, store.manifest(1), store.manifest(1), entries_of(history[0]))
    assert found.same_weights
    assert (found.tensors, found.settings, found.report, found.files) == ((), {}, {}, ())
    assert (found.requests, found.back) == ((), ())


def test_a_text_that_was_put_back_is_out_of_the_first_only(tmp_path: Path) -> None:
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "m"))
    make_step(workspace, "A")
    make_step(workspace, "B")
    note(workspace, "countered", "A", "tester", "licence shown")
    assert reinstate(workspace, "A") == 3
    make_step(workspace, "C")
    store, entries = VersionStore(workspace.versions), entries_of(workspace)

    def between(first: int, second: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        found = diff(store, store.manifest(first), store.manifest(second), entries)
        return found.requests, found.back

    assert between(2, 4) == (("C",), ("A",))
    assert between(4, 1) == (("A",), ("B", "C"))
    assert between(0, 4) == (("B", "C"), ())


def test_bit_changes_that_are_no_change_of_value_count() -> None:
    """-0.0 and 0.0 are equal as numbers and differ in their bits."""
    zero, minus = np.array([0.0], "<f4").view("<u4"), np.array([-0.0], "<f4").view("<u4")
    assert zero != minus
    assert numbers(zero, "F32") == numbers(minus, "F32")
    assert numbers(zero, "I32") is None
    assert numbers(np.array([0x3F80], "<u2"), "BF16") == 1.0
    assert numbers(np.array([0x3C00], "<u2"), "F16") == 1.0


def test_differences_of_trees() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": None}) == {
        "a.c": (2, 4),
        "d": (3, None),
    }
