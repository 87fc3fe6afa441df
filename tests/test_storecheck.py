"""Checks of stored versions: what each depth finds, every byte, every kind of damage, and nothing read twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import StoreDamaged
from pipeline.files import digest_bytes, digest_file
from pipeline.footer import read_footer
from pipeline.objects import StoredDelta
from pipeline.records import Break, VersionManifest
from pipeline.storecheck import Depth, StoreCheck
from pipeline.versions import VersionStore, manifest_bytes, parse_table, table_bytes

AT = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)


class Stored(NamedTuple):
    """A store with what the ledger would say of its deltas."""

    store: VersionStore
    deltas: dict[str, StoredDelta]

    def check(self, version: int, depth: Depth = Depth.FULL) -> list[Break]:
        found = StoreCheck(self.store, self.deltas, depth).version(version)
        assert all(b.where and b.found and b.means for b in found)
        return found

    def whole(self, version: int, name: str) -> Path:
        files = self.store.manifest(version).files
        return self.store.objects.object_path(next(f.digest for f in files if f.path == name))

    def delta(self, version: int) -> Path:
        """The delta that a version's weights are kept as."""
        digest = next(f.digest for f in self.store.manifest(version).files if f.path == "model.safetensors")
        return self.store.objects.paths(digest)[-1]


def _model(folder: Path, step: int, entries: int) -> Path:
    folder.mkdir(parents=True)
    values = np.random.default_rng(1).random(entries, dtype=np.float32)
    for number in range(1, step + 1):
        draw = np.random.default_rng([2, number])
        values[draw.choice(entries, 5, replace=False)] = draw.random(5, dtype=np.float32)
    save_file({"w": values, "b": np.ones(2, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


def _stored(folder: Path, versions: int, entries: int = 600, keyframe_every: int = 32) -> Stored:
    store, deltas, parent = VersionStore(folder / "versions"), dict[str, StoredDelta](), None
    for version in range(versions):
        published = store.publish(
            _model(folder / f"m{version}", version, entries),
            version=version,
            parent=parent,
            created_at=AT,
            run_id=None,
            requests=(),
            settings={},
            report={},
            software={},
            keyframe_every=keyframe_every,
        )
        parent = published.manifest
        deltas |= {d.name: d for d in published.deltas}
    return Stored(store, deltas)


def _as_it_is(path: Path) -> StoredDelta:
    """What a ledger would say that was exchanged together with a delta."""
    return StoredDelta(path.name, digest_file(path), path.stat().st_size, 0)


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """v0 whole, v1 and v2 deltas, one behind the other; all share ``config.json``."""
    stored = _stored(tmp_path, 3)
    assert len(stored.deltas) == 2
    return stored


def _flip(path: Path, at: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


# --- sound ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", Depth)
@pytest.mark.parametrize("keyframe_every", [1, 2, 32])
def test_a_sound_store_has_no_breaks_and_is_not_written_to(tmp_path: Path, depth: Depth, keyframe_every: int) -> None:
    stored = _stored(tmp_path, 4, keyframe_every=keyframe_every)
    before = {path: path.stat().st_mtime_ns for path in stored.store.folder.rglob("*")}
    check = StoreCheck(stored.store, stored.deltas, depth)
    assert [check.version(number) for number in range(4)] == [[]] * 4
    assert {path: path.stat().st_mtime_ns for path in stored.store.folder.rglob("*")} == before


def _bytes_read(call: Callable[[], object]) -> int:
    """What the process reads from files meanwhile, as the kernel counts it."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count()
    call()
    return count() - before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's counters")
def test_every_file_is_read_once_however_many_versions_share_it(tmp_path: Path) -> None:
    """Five versions on one base of 4 MB: at full depth its bytes are read once, and at quick depth not at all."""
    stored = _stored(tmp_path, 5, entries=1_000_000)

    def check(depth: Depth) -> None:
        checks = StoreCheck(stored.store, stored.deltas, depth)
        assert [checks.version(number) for number in range(5)] == [[]] * 5

    base = stored.whole(0, "model.safetensors").stat().st_size
    assert base > 4_000_000
    assert base < _bytes_read(lambda: check(Depth.FULL)) < 1.1 * base
    assert _bytes_read(lambda: check(Depth.QUICK)) < 100_000


# --- what each depth finds --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_flipped_byte_of_an_object_is_found_and_named(tmp_path: Path, name: str) -> None:
    stored = _stored(tmp_path, 2, entries=100, keyframe_every=1)
    path = stored.whole(1, name)
    for at in range(path.stat().st_size):
        _flip(path, at)
        (found,) = stored.check(1)
        assert name in found.where
        assert path.name in found.where
        assert "changed after" in found.found
        _flip(path, at)
    assert stored.check(1) == []


def test_every_flipped_byte_of_a_table_of_tensors_is_found_and_named(stored: Stored) -> None:
    path = stored.store.objects.object_path(stored.store.manifest(1).tensors)
    for at in range(path.stat().st_size):
        _flip(path, at)
        (found,) = stored.check(1)
        assert "v1: table of tensors" in found.where and path.name in found.where
        _flip(path, at)


@pytest.mark.slow
def test_every_flipped_byte_of_a_delta_is_found_in_all_versions_that_need_it(stored: Stored) -> None:
    path = stored.delta(1)
    for at in range(path.stat().st_size):
        _flip(path, at)
        assert stored.check(0) == []
        for version in (1, 2):
            (found,) = stored.check(version)
            assert path.name in found.where and "changed after" in found.found
        _flip(path, at)
    assert stored.check(2) == []


def test_damage_of_the_base_is_found_in_all_versions_that_need_it(stored: Stored) -> None:
    path = stored.whole(0, "model.safetensors")
    _flip(path, -1)
    check = StoreCheck(stored.store, stored.deltas)
    for version in range(3):
        (found,) = check.version(version)
        assert path.name in found.where and f"(v{version}: model.safetensors)" in found.where
        assert f"v{version} cannot be restored" in found.means


def test_a_delta_that_the_ledger_does_not_name_is_found(stored: Stored) -> None:
    path = stored.delta(2)
    unnamed = Stored(stored.store, {name: noted for name, noted in stored.deltas.items() if name != path.name})
    assert [b.found for b in unnamed.check(2)] == ["no ledger entry names it"]
    assert unnamed.check(1) == []
    assert [b.found for b in unnamed.check(2, Depth.QUICK)] == ["no ledger entry names it"]


def test_a_delta_exchanged_together_with_the_ledger_is_found(stored: Stored) -> None:
    """A sound delta of the right name in the wrong place: the ledger was made to name it."""
    one, two = stored.delta(1), stored.delta(2)
    two.chmod(0o644)
    two.write_bytes(one.read_bytes())
    forged = Stored(stored.store, {**stored.deltas, two.name: _as_it_is(two)})
    (found,) = forged.check(2)
    assert found.where == "v2" and "leads to" in found.found
    assert "not the model that was published" in found.means


def test_a_base_exchanged_under_its_name_is_found_by_its_digest(stored: Stored, tmp_path: Path) -> None:
    path = stored.whole(0, "model.safetensors")
    path.chmod(0o644)
    path.write_bytes((_model(tmp_path / "other", 9, 600) / "model.safetensors").read_bytes())
    assert [len(stored.check(version)) for version in range(3)] == [1, 1, 1]


def test_quick_looks_at_presence_and_size_only(stored: Stored) -> None:
    path = stored.whole(1, "config.json")
    _flip(path, 0)
    assert stored.check(1, Depth.QUICK) == []
    with path.open("ab") as stream:
        stream.write(b" ")
    (found,) = stored.check(1, Depth.QUICK)
    assert "bytes, the manifest says" in found.found
    path.unlink()
    assert [b.found for b in stored.check(1, Depth.QUICK)] == ["is missing"]
    stored.delta(1).unlink()
    assert [b.found for b in stored.check(2, Depth.QUICK)] == ["is missing", "is missing"]


def test_deep_makes_the_version_again(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """What full depth takes from digests, deep depth finds in the bytes."""
    made: list[int] = []
    again = VersionStore.check_restores

    def noting(self: VersionStore, manifest: VersionManifest) -> None:
        made.append(manifest.version)
        again(self, manifest)

    monkeypatch.setattr(VersionStore, "check_restores", noting)
    for depth, expected in ((Depth.QUICK, []), (Depth.FULL, []), (Depth.DEEP, [2])):
        assert stored.check(2, depth) == []
        assert made == expected

    def broken(self: VersionStore, manifest: VersionManifest) -> None:
        raise StoreDamaged("it is another one")

    monkeypatch.setattr(VersionStore, "check_restores", broken)
    assert [b.found for b in stored.check(2, Depth.DEEP)] == ["it is another one"]


# --- manifests that say something else --------------------------------------------------------------------


def _forged(stored: Stored, version: int, **changes: object) -> None:
    path = stored.store.manifest_path(version)
    path.chmod(0o644)
    path.write_bytes(manifest_bytes(stored.store.manifest(version).model_copy(update=changes)))


def test_a_manifest_with_another_root_is_found(stored: Stored) -> None:
    _forged(stored, 2, root=stored.store.manifest(1).root)
    (found,) = stored.check(2)
    assert "table of tensors has root" in found.found


@pytest.mark.parametrize("version", [0, 2])
def test_a_manifest_with_another_root_and_its_table_is_found(stored: Stored, version: int) -> None:
    """Whole or through deltas: the root is compared with the weights, not with a list of them."""
    other = stored.store.manifest(1)
    _forged(stored, version, root=other.root, tensors=other.tensors)
    (found,) = stored.check(version)
    assert found.found.startswith("weights have root ") and found.found.endswith(f"says {other.root}")


@pytest.mark.parametrize("version", [0, 2])
@pytest.mark.parametrize("size", [0, 7, 1 << 60])
def test_a_manifest_with_another_size_is_found(stored: Stored, version: int, size: int) -> None:
    """Also of a file that is not there as such, but made by deltas."""
    manifest = stored.store.manifest(version)
    files = [f.model_copy(update={"size": size}) if "safetensors" in f.path else f for f in manifest.files]
    _forged(stored, version, files=tuple(files))
    (found,) = stored.check(version)
    assert f"the manifest says {size}" in found.found


def test_a_table_that_is_not_in_its_form_is_found(stored: Stored) -> None:
    table = stored.store.objects.read(stored.store.manifest(2).tensors)
    assert table_bytes(parse_table(table)) == table
    spaced = json.dumps(json.loads(table)).encode()
    for data in (b"", b"[]", b"null", b"[[]]", b"[1]", b"{}", b"[" * 100_000, b"\xff", spaced, table + b"\n"):
        with pytest.raises(StoreDamaged):
            parse_table(data)
        _forged(stored, 2, tensors=stored.store.objects.put_bytes(data))
        (found,) = stored.check(2)
        assert found.where == "v2"


def test_a_manifest_that_is_missing_or_none_is_one_break(stored: Stored) -> None:
    path = stored.store.manifest_path(1)
    path.chmod(0o644)
    path.write_bytes(b"{}")
    (found,) = stored.check(1)
    assert found.where == "v1" and "is not a manifest" in found.found
    path.unlink()
    (found,) = stored.check(1)
    assert "is missing" in found.found and "Nobody can say what v1 is" in found.means


# --- files that are none ----------------------------------------------------------------------------------


def test_missing_longer_and_linked_objects_are_found(stored: Stored, tmp_path: Path) -> None:
    path = stored.whole(1, "config.json")
    data = path.read_bytes()
    path.unlink()
    assert [b.found for b in stored.check(1)] == ["is missing"]
    assert [b.found for b in stored.check(0)] == ["is missing"], "it is shared"
    path.mkdir()
    assert [b.found for b in stored.check(1)] == ["is not a regular file"]
    path.rmdir()
    (tmp_path / "elsewhere").write_bytes(data)
    path.symlink_to(tmp_path / "elsewhere")
    assert [b.found for b in stored.check(1)] == ["is not a regular file"]
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    assert [b.found for b in stored.check(1)] == ["is not a regular file"]
    path.unlink()
    os.mkfifo(path)
    assert [b.found for b in stored.check(1)] == ["is not a regular file"]
    path.unlink()
    path.write_bytes(data + b" ")
    assert "changed after" in stored.check(1)[0].found


@pytest.mark.parametrize("depth", Depth)
def test_missing_and_linked_deltas_are_found(stored: Stored, tmp_path: Path, depth: Depth) -> None:
    path = stored.delta(1)
    data = path.read_bytes()
    path.unlink()
    for version in (1, 2):
        assert [b.found for b in stored.check(version, depth)] == ["is missing"]
    path.mkdir()
    assert [b.found for b in stored.check(1, depth)] == ["is not a regular file"]
    path.rmdir()
    (tmp_path / "elsewhere").write_bytes(data)
    path.symlink_to(tmp_path / "elsewhere")
    assert [b.found for b in stored.check(1, depth)] == ["is not a regular file"]
    path.unlink()
    os.mkfifo(path)
    assert [b.found for b in stored.check(1, depth)] == ["is not a regular file"]


@pytest.mark.parametrize("where", ["objects", "deltas"])
def test_a_store_without_its_folders_is_all_breaks(stored: Stored, tmp_path: Path, where: str) -> None:
    (stored.store.folder / where).rename(tmp_path / "away")
    (stored.store.folder / where).write_bytes(b"no folder")
    for version in (1, 2):
        found = stored.check(version)
        assert found and all(b.found == "is missing" for b in found)


def test_a_delta_that_is_no_delta_is_found(stored: Stored) -> None:
    """With a ledger that names it."""
    path = stored.delta(2)
    path.chmod(0o644)
    for data in (b"", b"takedown-delta-1\n", b"x" * 5000):
        path.write_bytes(data)
        (found,) = Stored(stored.store, {**stored.deltas, path.name: _as_it_is(path)}).check(2)
        assert path.name in found.found


def test_a_delta_made_on_another_tensor_than_the_base_has_is_found(stored: Stored) -> None:
    """Sound in itself and named by the ledger: only the digest of the tensor in the base tells."""
    path = stored.delta(1)
    data = bytearray(path.read_bytes())
    pre = next(t.pre for t in read_footer(path).tensors if t.changed).encode()
    at = data.index(pre)
    data[at] = ord("0") if data[at] != ord("0") else ord("1")
    data[-32:] = bytes.fromhex(digest_bytes(bytes(data[:-32])).removeprefix("sha256:"))
    path.chmod(0o644)
    path.write_bytes(data)
    (found,) = Stored(stored.store, {**stored.deltas, path.name: _as_it_is(path)}).check(1)
    assert "was made on another tensor 'w'" in found.found


# --- evidence ---------------------------------------------------------------------------------------------


def test_evidence_is_checked_like_any_content(stored: Stored) -> None:
    digest = stored.store.objects.put_bytes(b"record")
    check = StoreCheck(stored.store, {})
    assert check.evidence("ledger entry 7", "gate", digest) == []
    (found,) = check.evidence("ledger entry 7", "gate", "sha256:" + "0" * 64)
    assert "(ledger entry 7: evidence 'gate')" in found.where and found.found == "is missing"
    (found,) = check.evidence("ledger entry 7", "gate", "sha256:../../etc")
    assert "is not a SHA-256 digest" in found.found
    _flip(stored.store.objects.object_path(digest), 0)
    (found,) = StoreCheck(stored.store, {}).evidence("ledger entry 7", "gate", digest)
    assert "changed after" in found.found
