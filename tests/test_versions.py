"""The version store: bit-exact or loud, whole or absent, stopped at every step of a publish."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import NoSpace, StoreDamaged, UnsupportedModel, UsageError
from pipeline.files import digest_bytes, digest_file
from pipeline.records import VersionManifest
from pipeline.safefile import model_root
from pipeline.versions import VersionStore

AT = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)
LATER = datetime(2026, 11, 24, 9, 0, tzinfo=UTC)


def _model(folder: Path, seed: int, sharded: bool = False) -> Path:
    folder.mkdir(parents=True)
    weights = {f"layer.{i}": np.random.default_rng([seed, i]).random((2, 3), dtype=np.float32) for i in range(3)}
    if sharded:
        names = [f"model-{i}.safetensors" for i in range(3)]
        for (key, value), name in zip(weights.items(), names, strict=True):
            save_file({key: value}, folder / name)
        index = {"metadata": {}, "weight_map": dict(zip(weights, names, strict=True))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "empty.txt").write_bytes(b"")
    return folder


def _publish(store: VersionStore, candidate: Path, parent: VersionManifest | None = None, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "version": parent.version + 1 if parent else 0,
        "parent": parent,
        "created_at": AT,
        "run_id": "run-1" if parent else None,
        "requests": ("TD-1",) if parent else (),
        "settings": {"gate": {"kept_share": 0.85}} if parent else {},
        "report": {"alpha": 1.25, "changed": 3},
        "software": {"takedown-pipeline": "0"},
    }
    return store.publish(candidate, **{**fields, **changes})


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    """A store with v0 and v1, which share two files; their folders lie beside it as ``m0`` and ``m1``."""
    store = VersionStore(tmp_path / "versions")
    v0 = _publish(store, _model(tmp_path / "m0", 0))
    _publish(store, _model(tmp_path / "m1", 1), v0)
    return store


# --- publish ----------------------------------------------------------------------------------------------


def test_a_publish_stores_objects_by_digest_and_a_manifest(store: VersionStore, tmp_path: Path) -> None:
    manifest = store.manifest(1)
    assert store.numbers() == (0, 1)
    assert (manifest.parent, manifest.parent_root) == (0, store.manifest(0).root)
    assert manifest.root == model_root(tmp_path / "m1")
    assert {f.path: (f.digest, f.size) for f in manifest.files} == {
        name: (digest_bytes(data), len(data)) for name, data in _content(tmp_path / "m1").items()
    }
    objects = store.object_files()
    assert len(objects) == 4  # two weights, one config and one empty file for both versions
    for path in (*objects, store.manifest_path(0), store.manifest_path(1)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
    for path in objects:
        assert digest_file(path) == f"sha256:{path.name}"
        assert path.parent.name == path.name[:2]
    text = store.manifest_path(1).read_bytes()
    assert text.endswith(b"}\n")
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")).encode() + b"\n"
    assert store.manifest_digest(1) == digest_bytes(text)
    assert store.check(0) == store.check(1) == []


def test_publishing_the_same_again_changes_nothing(store: VersionStore, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")}
    again = _publish(store, tmp_path / "m1", store.manifest(0), created_at=LATER)
    assert again == store.manifest(1)
    assert again.created_at == AT
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")} == before


def test_a_published_version_is_never_replaced(store: VersionStore, tmp_path: Path) -> None:
    before = store.manifest_path(1).read_bytes()
    with pytest.raises(UsageError, match="never replaced"):
        _publish(store, _model(tmp_path / "other", 2), store.manifest(0))
    assert store.manifest_path(1).read_bytes() == before


def test_an_orphan_manifest_is_replaced_on_request(store: VersionStore, tmp_path: Path) -> None:
    replaced = _publish(store, _model(tmp_path / "other", 2), store.manifest(0), replace_orphan=True)
    assert replaced == store.manifest(1)
    assert replaced.root == model_root(tmp_path / "other")
    assert stat.S_IMODE(store.manifest_path(1).stat().st_mode) == 0o444
    assert len(store.unreferenced()) == 1  # the weights of the manifest that is gone
    assert store.collect() != ()
    assert store.unreferenced() == ()
    assert store.check(0) == store.check(1) == []


def test_a_version_with_successors_is_no_orphan(store: VersionStore, tmp_path: Path) -> None:
    _publish(store, tmp_path / "m1", store.manifest(1))
    before = store.manifest_path(1).read_bytes()
    with pytest.raises(UsageError, match="never replaced"):
        _publish(store, _model(tmp_path / "other", 2), store.manifest(0), replace_orphan=True)
    assert store.manifest_path(1).read_bytes() == before


def test_an_unreadable_orphan_is_replaced_on_request_only(store: VersionStore, tmp_path: Path) -> None:
    path = store.manifest_path(1)
    path.chmod(0o644)
    path.write_bytes(b"{")
    with pytest.raises(StoreDamaged):
        _publish(store, tmp_path / "m1", store.manifest(0))
    _publish(store, tmp_path / "m1", store.manifest(0), replace_orphan=True)
    assert store.check(1) == []


def test_a_sharded_model_is_published(store: VersionStore, tmp_path: Path) -> None:
    manifest = _publish(store, _model(tmp_path / "m2", 1, sharded=True), store.manifest(1))
    assert manifest.root == store.manifest(1).root, "same weights, other layout: same root"
    assert store.check(2) == []
    assert store.restore(2, tmp_path / "out") == manifest
    assert _content(tmp_path / "out") == _content(tmp_path / "m2")


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.PKL", "a.ckpt", "modeling.py", "tf_model.h5", "a.npz"])
def test_code_and_other_weights_are_refused(store: VersionStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "m1" / name).write_bytes(b"")
    before = store.object_files()
    with pytest.raises(UnsupportedModel, match=name):
        _publish(store, tmp_path / "m1", store.manifest(1))
    assert store.object_files() == before


def _link(folder: Path) -> None:
    (folder / "vocab.txt").symlink_to("/etc/passwd")


def _subfolder(folder: Path) -> None:
    (folder / "onnx").mkdir()


def _stray(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _odd_name(folder: Path) -> None:
    (folder / "a\\b").write_bytes(b"")


@pytest.mark.parametrize("spoil", [_link, _subfolder, _stray, _no_weights, _odd_name, shutil.rmtree])
def test_folders_that_are_no_plain_model_are_refused(
    store: VersionStore, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(tmp_path / "m1")
    with pytest.raises(UnsupportedModel, match="m1"):
        _publish(store, tmp_path / "m1", store.manifest(1))


def test_broken_weights_are_refused(store: VersionStore, tmp_path: Path) -> None:
    with (tmp_path / "m1" / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(StoreDamaged, match=r"model\.safetensors"):
        _publish(store, tmp_path / "m1", store.manifest(1))
    assert store.numbers() == (0, 1)


def test_wrong_calls(store: VersionStore, tmp_path: Path) -> None:
    v1 = store.manifest(1)
    for changes in (
        {"version": 1},
        {"version": 0},
        {"report": {"loss": float("nan")}},
        {"created_at": datetime(2026, 1, 1)},
    ):
        with pytest.raises(ValueError):
            _publish(store, tmp_path / "m1", v1, **changes)
    with pytest.raises(ValueError):
        _publish(store, tmp_path / "m1", None, version=2)
    with pytest.raises(StoreDamaged, match="v1"):
        _publish(store, tmp_path / "m1", v1.model_copy(update={"root": store.manifest(0).root}))


def test_a_damaged_object_is_not_built_upon(store: VersionStore, tmp_path: Path) -> None:
    digest = next(f.digest for f in store.manifest(1).files if f.path == "config.json")
    _flip(store.object_path(digest), 0)
    with pytest.raises(StoreDamaged, match="changed after it was written"):
        _publish(store, tmp_path / "m1", store.manifest(1))
    assert store.numbers() == (0, 1)


def test_what_reads_back_differently_is_not_published(
    store: VersionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses a bit: the file changes between the write and the reading back."""
    fsync = os.fsync

    def losing(fd: int) -> None:
        fsync(fd)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            with Path(f"/proc/self/fd/{fd}").open("r+b") as stream:
                stream.write(b"X")

    candidate = _model(tmp_path / "m2", 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", losing)
        with pytest.raises(StoreDamaged, match="reads back differently"):
            _publish(store, candidate, store.manifest(1))
    assert store.numbers() == (0, 1)
    assert store.unreferenced() == ()


# --- stopped at every step --------------------------------------------------------------------------------

CALLS = ("fsync", "link", "replace", "rename", "unlink", "fchmod", "mkdir", "rmdir")


class Killed(BaseException):
    """The process is gone: nothing runs any more, not even cleaning up."""


@contextmanager
def _killed_at(monkeypatch: pytest.MonkeyPatch, step: int, after: bool) -> Iterator[list[int]]:
    """Let the process die at the step-th file operation, before or after it takes effect; yields the count."""
    count = [0]

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] > step or (count[0] == step and not after):
                raise Killed
            result = real(*args, **kwargs)
            if count[0] == step:
                raise Killed
            return result

        patch.setattr(os, name, call)

    with monkeypatch.context() as patch:
        for name in CALLS:
            wrap(name)
        yield count


@pytest.mark.parametrize("after", [False, True])
def test_a_publish_killed_at_any_step_shows_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    m0, m1 = _model(tmp_path / "m0", 0), _model(tmp_path / "m1", 1)
    step = 0
    while True:
        step += 1
        store = VersionStore(tmp_path / f"s{step}" / "versions")
        store.folder.parent.mkdir()
        v0 = _publish(store, m0)
        with _killed_at(monkeypatch, step, after) as count, suppress(Killed):
            _publish(store, m1, v0)
        if count[0] < step:
            break
        fresh = VersionStore(store.folder)
        assert fresh.numbers() in ((0,), (0, 1))
        assert all(fresh.check(number) == [] for number in fresh.numbers()), "a visible manifest is a whole version"
        assert all(digest_file(path) == f"sha256:{path.name}" for path in fresh.object_files()), "no torn object"
        published = _publish(fresh, m1, fresh.manifest(0), created_at=LATER)
        assert fresh.manifest(1) == published
        fresh.collect()
        assert fresh.unreferenced() == ()
        assert not list(fresh.folder.rglob(".tmp-*"))
        assert fresh.check(0) == fresh.check(1) == []
        assert fresh.restore(1, tmp_path / f"out{step}").root == published.root
        shutil.rmtree(store.folder.parent)
    assert step > 10, "the publish has more steps than that"


def test_an_orphan_replaced_is_the_old_or_the_new_one_at_any_step(
    store: VersionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _model(tmp_path / "other", 2)
    roots = {store.manifest(1).root, model_root(other)}
    step, killed = 0, True
    while killed:
        step += 1
        with _killed_at(monkeypatch, step, after=True):
            try:
                _publish(store, other, store.manifest(0), replace_orphan=True)
                killed = False
            except Killed:
                pass
        assert store.manifest(1).root in roots
        assert store.check(1) == []
    assert store.manifest(1).root == model_root(other)


@pytest.mark.parametrize(
    ("call", "code"),
    [("fsync", errno.ENOSPC), ("link", errno.EDQUOT), ("mkdir", errno.ENOSPC), ("fchmod", errno.EROFS)],
)
def test_a_full_disk_publishes_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    store = VersionStore(tmp_path / "versions")
    v0 = _publish(store, _model(tmp_path / "m0", 0))
    candidate = _model(tmp_path / "m1", 1)
    real = getattr(os, call)
    for step in range(1, 100):
        count = 0

        def full(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:  # noqa: B023
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                _publish(store, candidate, v0)
                break
            except NoSpace as error:
                assert "run the same command again" in str(error)
        assert not list(store.folder.rglob(".tmp-*"))
        assert all(store.check(number) == [] for number in store.numbers())
    assert step > 1
    assert store.check(1) == []


def test_a_file_system_without_hard_links_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = VersionStore(tmp_path / "versions")
    _publish(store, _model(tmp_path / "m0", 0))
    assert store.check(0) == []
    store.restore(0, tmp_path / "out", link=True)
    assert _content(tmp_path / "out") == _content(tmp_path / "m0")
    assert not list(store.folder.rglob(".tmp-*"))


# --- restore ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [False, True])
def test_restore_gives_exactly_the_published_files(store: VersionStore, tmp_path: Path, link: bool) -> None:
    for number in store.numbers():
        folder = tmp_path / f"deep/out{number}"
        assert store.restore(number, folder, link=link) == store.manifest(number)
        assert _content(folder) == _content(tmp_path / f"m{number}")
        for file in store.manifest(number).files:
            assert (folder / file.path).samefile(store.object_path(file.digest)) == link


def test_restore_copies_are_writable_and_apart_from_the_store(store: VersionStore, tmp_path: Path) -> None:
    store.restore(1, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("changed")
    assert store.check(1) == []


def test_restore_needs_a_fresh_folder(store: VersionStore, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        store.restore(1, tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        store.restore(1, tmp_path / "out" / "mine")
    assert _content(tmp_path / "out") == {"mine": b"x"}


def _flip(path: Path, at: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_restore_of_a_damaged_object_fails_loudly_and_leaves_nothing(
    store: VersionStore, tmp_path: Path, name: str, link: bool
) -> None:
    digest = next(f.digest for f in store.manifest(1).files if f.path == name)
    out = tmp_path / "out"
    _flip(store.object_path(digest), -1)
    with pytest.raises(StoreDamaged, match=name):
        store.restore(1, out, link=link)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(StoreDamaged, match=name):
        store.restore(1, out, link=link)
    assert _content(out) == {}
    store.object_path(digest).unlink()
    with pytest.raises(StoreDamaged, match=rf"{name}.*missing"):
        store.restore(1, out, link=link)


def test_restore_compares_the_root(store: VersionStore, tmp_path: Path) -> None:
    _rewrite(store, 1, lambda tree: tree.update(root=store.manifest(0).root))
    with pytest.raises(StoreDamaged, match="have root"):
        store.restore(1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_restore_on_a_full_disk_leaves_nothing(
    store: VersionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace):
        store.restore(1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- damage -----------------------------------------------------------------------------------------------


def _rewrite(store: VersionStore, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest but keep the form that is written."""
    path = store.manifest_path(number)
    tree = json.loads(path.read_bytes())
    change(tree)
    path.chmod(0o644)
    path.write_bytes(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode() + b"\n")


MANIFEST_BREAKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "field missing": (lambda t: t.pop("root"), "root"),
    "field unknown": (lambda t: t.update(extra=1), "extra"),
    "another version": (lambda t: t.update(version=7), "manifest of v7"),
    "path upwards": (lambda t: t["files"][0].update(path="../evil"), "outside the model folder"),
    "absolute path": (lambda t: t["files"][0].update(path="/tmp/evil"), "outside the model folder"),
    "subfolder": (lambda t: t["files"][0].update(path="a/b"), "outside the model folder"),
    "name twice": (lambda t: t["files"][0].update(path=t["files"][1]["path"]), "form"),
    "digest that is a path": (lambda t: t["files"][0].update(digest="sha256:../../../etc/passwd"), "not a digest"),
    "digest of another kind": (lambda t: t["files"][0].update(digest="md5:00"), "not a digest"),
    "root of another kind": (lambda t: t.update(root="x"), "not a digest"),
    "size": (lambda t: t["files"][0].update(size=1), "bytes, the manifest says 1"),
    "root": (lambda t: t.update(root="root-sha256:" + "0" * 64), "weights have root"),
    "no weights": (lambda t: t.update(files=[f for f in t["files"] if "safetensors" not in f["path"]]), "no model"),
}


@pytest.mark.parametrize("name", MANIFEST_BREAKS)
def test_a_changed_manifest_is_found(store: VersionStore, tmp_path: Path, name: str) -> None:
    change, expected = MANIFEST_BREAKS[name]
    _rewrite(store, 1, change)
    found = store.check(1)
    assert [expected in b.found for b in found] == [True], found
    if name != "size":
        with pytest.raises((StoreDamaged, UnsupportedModel)):
            store.restore(1, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"[" * 100_000, b"\xff", b"null", b"9" * 5000])
def test_a_manifest_that_is_none_is_found(store: VersionStore, content: bytes) -> None:
    path = store.manifest_path(1)
    path.chmod(0o644)
    path.write_bytes(content)
    assert len(store.check(1)) == 1
    with pytest.raises(StoreDamaged, match=path.name):
        store.manifest(1)
    with pytest.raises(StoreDamaged):  # nobody knows what it names, so nothing is garbage
        store.collect()
    assert len(store.object_files()) == 4


def test_a_missing_manifest_is_found(store: VersionStore) -> None:
    assert "is missing" in store.check(9)[0].found
    with pytest.raises(StoreDamaged):
        store.manifest_digest(9)


def test_every_flipped_byte_of_a_manifest_is_found(store: VersionStore) -> None:
    """By the manifest's own checks or, where it still reads as one, by the digest that the ledger keeps."""
    path = store.manifest_path(1)
    path.chmod(0o644)
    data, digest = path.read_bytes(), store.manifest_digest(1)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        store.check(1)  # never raises
        assert store.manifest_digest(1) != digest


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_flipped_byte_of_an_object_is_found_and_named(store: VersionStore, name: str) -> None:
    digest = next(f.digest for f in store.manifest(1).files if f.path == name)
    path = store.object_path(digest)
    for at in range(path.stat().st_size):
        _flip(path, at)
        (found,) = store.check(1)
        assert name in found.where
        assert path.name in found.where
        _flip(path, at)
    assert store.check(1) == []


def test_missing_longer_and_linked_objects_are_found(store: VersionStore, tmp_path: Path) -> None:
    file = next(f for f in store.manifest(1).files if f.path == "config.json")
    path = store.object_path(file.digest)
    data = path.read_bytes()
    path.unlink()
    assert [b.found for b in store.check(1)] == ["is missing"]
    assert [b.found for b in store.check(0)] == ["is missing"], "it is shared"
    path.mkdir()
    assert [b.found for b in store.check(1)] == ["is not a regular file"]
    path.rmdir()
    (tmp_path / "elsewhere").write_bytes(data)
    path.symlink_to(tmp_path / "elsewhere")
    assert [b.found for b in store.check(1)] == ["is not a regular file"]
    path.unlink()
    path.write_bytes(data + b" ")
    assert "changed after" in store.check(1)[0].found


def test_a_store_that_does_not_exist_yet_is_empty(tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "absent")
    assert store.numbers() == store.object_files() == store.unreferenced() == store.collect() == ()
