"""Leaving steps out: against exact fractions, against versions that are known, and on damaged stores."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from histories import array_model, entries_of, prepare_step, publish, start_history
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pipeline.diff import numbers
from pipeline.errors import NumericalFailure, StoreDamaged
from pipeline.records import VersionManifest
from pipeline.safefile import model_root
from pipeline.states import published_versions
from pipeline.undo import bits_of, combine, leave_out, left_out_of, recipe
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

WIDTH = {"F32": "<u4", "BF16": "<u2", "F16": "<u2", "F64": "<u8"}


def manifest(version: int, parent: int | None, left_out: Sequence[int] = ()) -> VersionManifest:
    fields = {"left_out": list(left_out)} if left_out else {}
    return VersionManifest.model_validate({
        "version": version, "root": "", "parent": parent, "parent_root": None, "created_at": "2026-11-24T00:00:00Z",
        "run_id": None, "requests": (), "files": (), "tensors": "", "settings": {}, "report": fields, "software": {},
    })  # fmt: skip


def bits(dtype: str, *values: float) -> np.ndarray:
    return bits_of(np.array(values, np.float64), dtype)


# --- the recipe -------------------------------------------------------------------------------------------


def test_a_step_is_its_version_minus_its_parent() -> None:
    chain = [manifest(0, None), *(manifest(v, v - 1) for v in range(1, 6))]
    assert recipe(chain.__getitem__, 5, [2]) == {1: 1, 2: -1, 5: 1}
    assert recipe(chain.__getitem__, 5, [4, 2]) == {1: 1, 2: -1, 3: 1, 4: -1, 5: 1}
    assert recipe(chain.__getitem__, 5, []) == {5: 1}


def test_neighbouring_steps_cancel() -> None:
    chain = [manifest(0, None), *(manifest(v, v - 1) for v in range(1, 6))]
    assert recipe(chain.__getitem__, 5, [5]) == {4: 1}, "the last step left out is its parent"
    assert recipe(chain.__getitem__, 5, [5, 4, 3]) == {2: 1}
    assert recipe(chain.__getitem__, 5, [3, 2]) == {1: 1, 3: -1, 5: 1}
    assert recipe(chain.__getitem__, 5, [5, 4, 3, 2, 1]) == {0: 1}, "without any step it is the untouched model"


def test_what_a_step_left_out_itself_stays_left_out() -> None:
    chain = [manifest(0, None), manifest(1, 0), manifest(2, 1), manifest(3, 2, [1])]
    assert recipe(chain.__getitem__, 3, [3]) == {0: 1, 1: -1, 2: 1}, "v2 without the step of v1"
    assert recipe(chain.__getitem__, 3, [3, 2]) == {0: 1}


@given(st.data())
def test_the_terms_of_any_history_add_up_to_one_model(data: st.DataObject) -> None:
    chain = [manifest(0, None)]
    for version in range(1, data.draw(st.integers(2, 9))):
        parent = data.draw(st.integers(0, version - 1))
        line = [v for v in range(1, parent + 1) if v in path_of(chain, parent)]
        chain.append(
            manifest(
                version,
                parent,
                sorted(data.draw(st.sets(st.sampled_from(line)) if line else st.just(set())), reverse=True),
            )
        )
    last = len(chain) - 1
    steps = sorted(data.draw(st.sets(st.sampled_from(path_of(chain, last)[1:]), min_size=1)), reverse=True)
    terms = recipe(chain.__getitem__, last, steps)
    assert sum(terms.values()) == 1
    assert all(terms.values())
    # The same with numbers in the place of models, each step's vector taken from its definition.
    value = {v: Fraction(3) ** v + 7 * v for v in range(len(chain))}

    def start(parent: int, left: Sequence[int]) -> Fraction:
        return value[parent] - sum(
            (value[s] - start(chain[s].parent or 0, left_out_of(chain[s])) for s in left), Fraction()
        )

    assert sum(times * value[v] for v, times in terms.items()) == start(last, steps)


def path_of(chain: Sequence[VersionManifest], version: int) -> list[int]:
    path = [version]
    while (parent := chain[path[-1]].parent) is not None:
        path.append(parent)
    return path[::-1]


def test_v0_is_no_step() -> None:
    chain = [manifest(0, None), manifest(1, 0)]
    with pytest.raises(StoreDamaged, match="v0: was made by no step"):
        recipe(chain.__getitem__, 1, [0])


# --- entries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_an_entry_that_no_later_step_moved_gets_its_old_bits(dtype: str) -> None:
    before, after = bits(dtype, 0.1, -0.0, 0.3, 7.0), bits(dtype, 0.2, 0.5, 0.3, -1e-4)
    found, exact = combine([after, before], [after], dtype)
    assert found.tobytes() == before.tobytes(), "minus zero included"
    assert exact.all()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_an_entry_that_the_step_did_not_move_keeps_its_bits(dtype: str) -> None:
    same, now = bits(dtype, 0.1, -0.0, 3.0), bits(dtype, 0.7, -0.0, -0.0)
    found, exact = combine([now, same], [same], dtype)
    assert found.tobytes() == now.tobytes()
    assert exact.all()


def test_bits_that_are_no_numbers_pass_where_they_cancel() -> None:
    odd = np.array([0x7FC00001, 0xFF800000, 0x80000000], "<u4")
    found, exact = combine([odd, bits("F32", 1, 2, 3)], [bits("F32", 1, 2, 3)], "F32")
    assert found.tobytes() == odd.tobytes() and exact.all()
    with pytest.raises(NumericalFailure, match="cannot hold"):
        combine([odd, bits("F32", 1, 2, 3)], [bits("F32", 4, 5, 6)], "F32")


FINITE = st.floats(-4, 4, width=32)


@given(st.lists(st.tuples(FINITE, FINITE, FINITE), min_size=1, max_size=30), st.sampled_from(["F32", "BF16", "F16"]))
@example([(1.0, 1.0, 1.0)], "F32")
def test_everything_else_is_the_exact_sum_rounded_once(rows: list[tuple[float, float, float]], dtype: str) -> None:
    now, after, before = (bits(dtype, *column) for column in zip(*rows, strict=True))
    found, exact = combine([now, before], [after], dtype)
    values = [numbers(b, dtype) for b in (now, after, before, found)]
    for n, a, b, result, same, i in zip(*values, exact, range(len(rows)), strict=True):
        wanted = Fraction(n) - Fraction(a) + Fraction(b)
        if same:
            assert Fraction(result) == wanted
        else:
            code = int(found[i])
            neighbours = numbers(np.array([c for c in (code - 1, code + 1) if c >= 0], found.dtype), dtype)
            assert neighbours is not None
            near = [abs(Fraction(v) - wanted) for v in neighbours if np.isfinite(v)]
            # Both neighbours among all numbers of the dtype are further away, or as far; what is lost in float64 aside.
            assert abs(Fraction(result) - wanted) <= min(near) + Fraction(1, 2**50)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # signalling NaNs
@given(st.integers(0, 2**32 - 1))
def test_bits_survive_the_way_to_numbers_and_back(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for dtype, width in WIDTH.items():
        raw = draw.integers(0, 2 ** (8 * int(width[2])), 50, np.uint64).astype(width)
        values = numbers(raw, dtype)
        assert values is not None
        finite = np.isfinite(values)
        assert np.array_equal(bits_of(values[finite], dtype), raw[finite])


def test_integers_that_differ_are_refused() -> None:
    one, two = np.array([1], "<u4"), np.array([2], "<u4")
    with pytest.raises(StoreDamaged, match="dtype I32 differ"):
        combine([one, one], [two], "I32")
    assert combine([one, two], [two], "I32")[0] == one


# --- stores -----------------------------------------------------------------------------------------------


def history(root: Path, bfloat16: bool = False) -> Workspace:
    """v1, v2 and v3 on top of each other; every step moves a twentieth of the weights, some of them again."""
    workspace = start_history(root / "ws", array_model(root / "model", tensors=4, shape=(40, 30), bfloat16=bfloat16))
    for name in ("A", "B", "C"):
        publish(workspace, prepare_step(workspace, [name], share=0.2))
    return workspace


def store_of(workspace: Workspace) -> VersionStore:
    return VersionStore(workspace.versions, published_versions(entries_of(workspace)))


def weights(store: VersionStore, version: int, folder: Path) -> dict[str, np.ndarray]:
    store.restore(version, folder / f"v{version}")
    return load_file(folder / f"v{version}" / "model.safetensors")


def test_leaving_a_step_out_by_hand(tmp_path: Path) -> None:
    store = store_of(history(tmp_path))
    v0, v1, v3 = (weights(store, v, tmp_path) for v in (0, 1, 3))
    done = leave_out(store, 3, [1], tmp_path / "v3", tmp_path / "out")
    found, differs = load_file(tmp_path / "out" / "model.safetensors"), 0
    for name in v3:
        untouched = v0[name] == v1[name]
        assert np.array_equal(found[name][untouched], v3[name][untouched])
        alone = ~untouched & (v1[name] == v3[name])
        assert alone.any() and (~untouched & ~alone).any(), "the case is worth testing"
        assert np.array_equal(found[name][alone], v0[name][alone])
        wanted = (v3[name].astype(np.float64) - v1[name] + v0[name]).astype(np.float32)
        np.testing.assert_array_equal(found[name], wanted)
        differs += int((found[name] != v3[name]).sum())
    assert (done.versions, done.changed, done.root) == ((1,), differs, model_root(tmp_path / "out"))
    assert 0 < done.exact < done.changed
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "v3" / "config.json").read_bytes()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_leaving_out_everything_gives_the_untouched_model(tmp_path: Path, bfloat16: bool) -> None:
    store = store_of(history(tmp_path, bfloat16))
    store.restore(3, tmp_path / "v3")
    done = leave_out(store, 3, [3, 2, 1], tmp_path / "v3", tmp_path / "out")
    assert done.root == store.manifest(0).root
    assert done.exact == done.changed
    assert leave_out(store, 3, [3, 2], tmp_path / "v3", tmp_path / "out").root == store.manifest(1).root, "made again"


def test_a_damaged_version_stops_it(tmp_path: Path) -> None:
    store = store_of(history(tmp_path))
    store.restore(3, tmp_path / "v3")
    path = store.objects.paths(store.manifest(0).files[-1].digest)[0]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(StoreDamaged):
        leave_out(store, 3, [1], tmp_path / "v3", tmp_path / "out")


def test_versions_of_another_shape_are_refused(tmp_path: Path) -> None:
    store = store_of(history(tmp_path))
    store.restore(3, tmp_path / "v3")
    other = store_of(start_history(tmp_path / "other", array_model(tmp_path / "wide", tensors=2)))
    shutil.copytree(other.objects.objects, store.objects.objects, dirs_exist_ok=True)
    fields = {name: getattr(other.manifest(0), name) for name in ("files", "tensors", "root")}
    forged = store.manifest(0).model_copy(update=fields)
    known = store.manifest
    store.manifest = lambda version: forged if version == 0 else known(version)  # type: ignore[method-assign]
    with pytest.raises(StoreDamaged, match="v0: has other tensors than v3"):
        leave_out(store, 3, [1], tmp_path / "v3", tmp_path / "out")
