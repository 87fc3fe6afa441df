"""The version store: bit-exact or loud, whole or absent, stopped at every step of a publish."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.blocks import compress
from pipeline.delta import DeltaFile, Room
from pipeline.digests import tensor_root
from pipeline.errors import NoSpace, StoreDamaged, UnsupportedModel, UsageError
from pipeline.files import canonical_json, digest_bytes, digest_file
from pipeline.footer import MAGIC, read_footer
from pipeline.keys import create_keys, load_model_key, model_public_key
from pipeline.objects import StoredDelta
from pipeline.oms import check_model_signature, model_signature
from pipeline.records import Break, VersionManifest
from pipeline.safefile import model_root, model_tensor_digests
from pipeline.storecheck import Depth, StoreCheck
from pipeline.versions import Published, VersionStore, parse_table

AT = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)
LATER = datetime(2026, 11, 24, 9, 0, tzinfo=UTC)


Weights = dict[str, np.ndarray[Any, Any]]


def _write_model(folder: Path, weights: Weights, sharded: bool = False, **metadata: str) -> Path:
    folder.mkdir(parents=True)
    if sharded:
        names = [f"model-{i}.safetensors" for i in range(len(weights))]
        for (key, value), name in zip(weights.items(), names, strict=True):
            save_file({key: value}, folder / name)
        index = {"metadata": {}, "weight_map": dict(zip(weights, names, strict=True))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"} | metadata)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "empty.txt").write_bytes(b"")
    return folder


def _model(folder: Path, seed: int, sharded: bool = False) -> Path:
    """So small, and so different for each seed, that it is always kept whole."""
    weights = {f"layer.{i}": np.random.default_rng([seed, i]).random((2, 3), dtype=np.float32) for i in range(3)}
    return _write_model(folder, weights, sharded)


def _weights(step: int, changed: int = 4) -> Weights:
    """Weights after so many steps, each of which changed a few entries of two tensors; the third one never changes."""
    weights = {f"layer.{i}": np.random.default_rng([7, i]).random((20, 20), dtype=np.float32) for i in range(3)}
    for number in range(1, step + 1):
        draw = np.random.default_rng([8, number])
        for name in ("layer.0", "layer.1"):
            at = draw.choice(400, changed, replace=False)
            weights[name].reshape(-1)[at] = draw.random(changed, dtype=np.float32)
    return weights


def _step_model(folder: Path, step: int, sharded: bool = False) -> Path:
    """Alike enough that each step is kept as a delta against the one before."""
    return _write_model(folder, _weights(step), sharded)


MODELS: dict[str, Callable[[Path, int], Path]] = {"whole": _model, "delta": _step_model}
"""How a store of these models keeps v1."""


def _publish_all(
    store: VersionStore, candidate: Path, parent: VersionManifest | None = None, **changes: Any
) -> Published:
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


def _publish(
    store: VersionStore, candidate: Path, parent: VersionManifest | None = None, **changes: Any
) -> VersionManifest:
    return _publish_all(store, candidate, parent, **changes).manifest


def _signed(files: Any, name: str) -> bytes:
    return f"signature of {name}: {digest_bytes(canonical_json(dict(files)))}".encode()


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _check(store: VersionStore, number: int, depth: Depth = Depth.DEEP) -> list[Break]:
    """All breaks of a version, with the deltas as they are now taken for those that the ledger notes."""
    deltas = {
        path.name: StoredDelta(path.name, digest_file(path), path.stat().st_size, 0)
        for path in store.objects.files()
        if "." in path.name
    }
    return StoreCheck(store, deltas, depth).version(number)


def _unnamed(store: VersionStore) -> list[Path]:
    """Contents and deltas that no version needs."""
    named = store.named([store.manifest(number) for number in store.numbers()])
    return sorted(set(store.objects.files()) - named)


def _object(store: VersionStore, version: int, name: str) -> Path:
    return store.objects.object_path(next(f.digest for f in store.manifest(version).files if f.path == name))


def _delta(store: VersionStore, version: int, name: str = "model.safetensors") -> Path:
    """The delta that a version's weight file is kept as, against its parent's."""
    manifests = [store.manifest(version), store.manifest(version - 1)]
    target, base = (next(f.digest for f in m.files if f.path == name) for m in manifests)
    path = store.objects.delta_path(target, base)
    assert path.exists() and not store.objects.is_whole(target)
    return path


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    """A store with v0 and v1, which share two files; their folders lie beside it as ``m0`` and ``m1``."""
    store = VersionStore(tmp_path / "versions")
    v0 = _publish(store, _model(tmp_path / "m0", 0))
    _publish(store, _model(tmp_path / "m1", 1), v0)
    return store


@pytest.fixture
def chained(tmp_path: Path) -> VersionStore:
    """A store with v0 whole, v1 a delta against it and v2 one against v1; folders ``m0`` to ``m2`` beside it."""
    store, parent = VersionStore(tmp_path / "versions"), None
    for step in range(3):
        parent = _publish(store, _step_model(tmp_path / f"m{step}", step), parent)
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
    objects = store.objects.files()
    assert len(objects) == 6  # two weights, one config and one empty file for both versions, two tables of tensors
    for path in (*objects, store.manifest_path(0), store.manifest_path(1)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
    for path in objects:
        assert digest_file(path) == f"sha256:{path.name}"
        assert path.parent.name == path.name[:2]
    text = store.manifest_path(1).read_bytes()
    assert text.endswith(b"}\n")
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")).encode() + b"\n"
    assert store.manifest_digest(1) == digest_bytes(text)
    assert _check(store, 0) == _check(store, 1) == []
    assert store.tensors(manifest) == sorted(model_tensor_digests(tmp_path / "m1"))
    assert tensor_root(parse_table(store.objects.read(manifest.tensors))) == manifest.root


@pytest.mark.parametrize("kind", MODELS)
def test_publishing_the_same_again_changes_nothing(tmp_path: Path, kind: str) -> None:
    store = VersionStore(tmp_path / "versions")
    v0 = _publish(store, MODELS[kind](tmp_path / "m0", 0))
    first = _publish_all(store, MODELS[kind](tmp_path / "m1", 1), v0, sign=_signed)
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*") if path.is_file()}
    again = _publish_all(store, tmp_path / "m1", store.manifest(0), created_at=LATER, sign=_signed)
    assert again == first and again.facts() == first.facts()
    assert again.manifest.created_at == AT
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("*") if path.is_file()} == before


def test_a_publish_says_what_the_ledger_notes(tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "versions")
    v0 = _publish_all(store, _step_model(tmp_path / "m0", 0))
    assert v0.facts() == {
        "root": model_root(tmp_path / "m0"),
        "manifest": store.manifest_digest(0),
        "parent": None,
        "deltas": {},
        "signature": None,
    }
    v1 = _publish_all(store, _step_model(tmp_path / "m1", 1), v0.manifest, sign=_signed)
    path = _delta(store, 1)
    facts = {"digest": digest_file(path), "size": path.stat().st_size, "changed": 8}
    assert v1.facts()["deltas"] == {path.name: facts}
    assert v1.facts()["signature"] == digest_bytes(store.signature(1))
    assert store.signature(1) == _signed({f.path: f.digest for f in v1.manifest.files}, "v1")
    assert [stat.S_IMODE(p.stat().st_mode) for p in (store.signature_path(1), path)] == [0o444] * 2
    canonical_json(v1.facts())


def test_a_published_version_is_never_replaced(store: VersionStore, tmp_path: Path) -> None:
    _publish(store, tmp_path / "m1", store.manifest(0), sign=_signed)
    before = [store.manifest_path(1).read_bytes(), store.signature(1)]
    with pytest.raises(UsageError, match="never replaced"):
        _publish(store, _model(tmp_path / "other", 2), store.manifest(0), sign=_signed)
    assert [store.manifest_path(1).read_bytes(), store.signature(1)] == before


def test_an_orphan_manifest_is_replaced_on_request(store: VersionStore, tmp_path: Path) -> None:
    _publish(store, tmp_path / "m1", store.manifest(0), sign=_signed)
    other = _model(tmp_path / "other", 2)
    replaced = _publish(store, other, store.manifest(0), replace_orphan=True, sign=_signed)
    assert replaced == store.manifest(1)
    assert store.signature(1) == _signed({f.path: f.digest for f in replaced.files}, "v1")
    assert replaced.root == model_root(tmp_path / "other")
    assert stat.S_IMODE(store.manifest_path(1).stat().st_mode) == 0o444
    assert len(_unnamed(store)) == 2  # the weights of the manifest that is gone, and their table
    assert len(store.collect()) == 2
    assert store.collect() == ()
    assert _unnamed(store) == []
    assert _check(store, 0) == _check(store, 1) == []


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
    assert _check(store, 1) == []


def test_a_sharded_model_is_published(store: VersionStore, tmp_path: Path) -> None:
    manifest = _publish(store, _model(tmp_path / "m2", 1, sharded=True), store.manifest(1))
    assert manifest.root == store.manifest(1).root, "same weights, other layout: same root"
    assert _check(store, 2) == []
    assert store.restore(2, tmp_path / "out") == manifest
    assert _content(tmp_path / "out") == _content(tmp_path / "m2")


@pytest.mark.parametrize(
    "name", ["model.sig", "a.bin", "a.pt", "a.pth", "a.PKL", "a.ckpt", "modeling.py", "tf_model.h5", "a.npz"]
)
def test_code_and_other_weights_are_refused(store: VersionStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "m1" / name).write_bytes(b"")
    before = store.objects.files()
    with pytest.raises(UnsupportedModel, match=name):
        _publish(store, tmp_path / "m1", store.manifest(1))
    assert store.objects.files() == before


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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tensors"])
def test_a_damaged_object_is_not_built_upon(store: VersionStore, tmp_path: Path, name: str) -> None:
    _flip(store.objects.object_path(store.manifest(1).tensors) if name == "tensors" else _object(store, 1, name), -1)
    with pytest.raises(StoreDamaged, match="changed after it was written"):
        _publish(store, tmp_path / "m1", store.manifest(1))
    assert store.numbers() == (0, 1)


@pytest.mark.parametrize("where", ["base", "delta"])
def test_a_delta_is_not_made_on_a_damaged_base(chained: VersionStore, tmp_path: Path, where: str) -> None:
    candidate = _step_model(tmp_path / "m3", 3)
    for parent, path in ((2, _delta(chained, 2)), (0, _object(chained, 0, "model.safetensors"))):
        good = path.read_bytes()
        _flip(path, -1 if where == "base" else len(good) // 2)
        before = set(chained.objects.files())
        with pytest.raises(StoreDamaged):
            _publish(chained, candidate, chained.manifest(parent), version=3)
        assert chained.numbers() == (0, 1, 2)
        assert set(chained.objects.files()) == before, "no delta is left that belongs to the damaged base"
        path.write_bytes(good)
    assert _publish(chained, candidate, chained.manifest(2)).version == 3


@pytest.mark.parametrize("kind", MODELS)
def test_what_reads_back_differently_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A disk that loses a bit: the file changes between the write and the reading back."""
    fsync = os.fsync

    def losing(fd: int) -> None:
        fsync(fd)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            with Path(f"/proc/self/fd/{fd}").open("r+b") as stream:
                stream.write(b"X")

    store = VersionStore(tmp_path / "versions")
    v0 = _publish(store, MODELS[kind](tmp_path / "m0", 0))
    candidate = MODELS[kind](tmp_path / "m1", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", losing)
        with pytest.raises(StoreDamaged, match="reads back differently"):
            _publish(store, candidate, v0)
    assert store.numbers() == (0,)
    assert _unnamed(store) == []


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


def _torn(store: VersionStore) -> list[Path]:
    """Files that have their final name and not their content; what is named twice cannot be told from the digest."""
    torn = []
    for path in store.objects.files():
        if "." not in path.name and digest_file(path) != f"sha256:{path.name}":
            torn.append(path)
        elif "." in path.name:
            target, base = (f"sha256:{part}" for part in path.name.split("."))
            DeltaFile(path, target, store.objects.source(base))  # checks the whole file against its own digest
    return torn


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("after", [False, True])
def test_a_publish_killed_at_any_step_shows_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool, kind: str
) -> None:
    m0, m1 = MODELS[kind](tmp_path / "m0", 0), MODELS[kind](tmp_path / "m1", 1)
    step = 0
    while True:
        step += 1
        store = VersionStore(tmp_path / f"s{step}" / "versions")
        store.folder.parent.mkdir()
        v0 = _publish(store, m0)
        with _killed_at(monkeypatch, step, after) as count, suppress(Killed):
            _publish(store, m1, v0, sign=_signed)
        if count[0] < step:
            assert bool(_publish_all(store, m1, v0, sign=_signed).deltas) == (kind == "delta")
            break
        fresh = VersionStore(store.folder)
        assert fresh.numbers() in ((0,), (0, 1))
        assert all(_check(fresh, number) == [] for number in fresh.numbers()), "a visible manifest is a whole version"
        if 1 in fresh.numbers():
            assert fresh.signature(1).startswith(b"signature of v1"), "what is visible is signed"
        assert _torn(fresh) == []
        published = _publish(fresh, m1, fresh.manifest(0), created_at=LATER, sign=_signed)
        assert fresh.manifest(1) == published
        fresh.collect()
        assert _unnamed(fresh) == []
        assert not list(fresh.folder.rglob(".tmp-*"))
        assert _check(fresh, 0) == _check(fresh, 1) == []
        fresh.restore(1, tmp_path / f"out{step}")
        assert _content(tmp_path / f"out{step}") == _content(m1)
        shutil.rmtree(store.folder.parent)
    assert step > 10, "the publish has more steps than that"


@pytest.mark.parametrize("kind", MODELS)
def test_an_orphan_replaced_is_the_old_or_the_new_one_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    store = VersionStore(tmp_path / "versions")
    v0 = _publish(store, MODELS[kind](tmp_path / "m0", 0))
    _publish(store, MODELS[kind](tmp_path / "m1", 1), v0)
    other = MODELS[kind](tmp_path / "other", 2)
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
        assert _check(store, 1) == []
    assert store.manifest(1).root == model_root(other)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("fsync", errno.ENOSPC),
        ("link", errno.EDQUOT),
        ("mkdir", errno.ENOSPC),
        ("fchmod", errno.EROFS),
        ("replace", errno.ENOSPC),
    ],
)
def test_a_full_disk_publishes_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, kind: str
) -> None:
    store = VersionStore(tmp_path / "versions")
    v0 = _publish(store, MODELS[kind](tmp_path / "m0", 0))
    candidate = MODELS[kind](tmp_path / "m1", 1)
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
                _publish(store, candidate, v0, sign=_signed)
                break
            except NoSpace as error:
                assert "run the same command again" in str(error)
        assert not list(store.folder.rglob(".tmp-*"))
        assert _torn(store) == []
        assert all(_check(store, number) == [] for number in store.numbers())
    assert step > 1
    assert _check(store, 1) == []


@pytest.mark.parametrize("kind", MODELS)
def test_a_disk_that_fills_up_while_contents_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The writes themselves fail, in whatever thread they happen."""
    store = VersionStore(tmp_path / "versions")
    v0 = _publish(store, MODELS[kind](tmp_path / "m0", 0))
    candidate = MODELS[kind](tmp_path / "m1", 1)
    fdopen = os.fdopen

    def full(fd: int, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """What is opened to write to can hold 100 bytes more."""
        stream = fdopen(fd, mode, *args, **kwargs)
        if "w" not in mode:
            return stream
        real, left = stream.write, [100]

        def write(data: bytes) -> int:
            left[0] -= len(memoryview(data).cast("B"))
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(real(data))

        class Stream:
            """The stream, with another ``write``: that of a file object cannot be replaced."""

            def __enter__(self) -> Stream:
                return self

            def __exit__(self, *args: object) -> None:
                stream.close()

            def __getattr__(self, name: str) -> Any:
                return write if name == "write" else getattr(stream, name)

        return Stream()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", full)
        with pytest.raises(NoSpace, match="run the same command again"):
            _publish(store, candidate, v0)
    assert store.numbers() == (0,)
    assert not list(store.folder.rglob(".tmp-*"))
    assert _unnamed(store) == []
    _publish(store, candidate, v0)
    assert _check(store, 1) == []


def test_a_file_system_without_hard_links_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = VersionStore(tmp_path / "versions")
    _publish(store, _model(tmp_path / "m0", 0))
    assert _check(store, 0) == []
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
            assert (folder / file.path).samefile(store.objects.object_path(file.digest)) == link


def test_restore_copies_are_writable_and_apart_from_the_store(store: VersionStore, tmp_path: Path) -> None:
    store.restore(1, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("changed")
    assert _check(store, 1) == []


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
    path, out = _object(store, 1, name), tmp_path / "out"
    _flip(path, -1)
    with pytest.raises(StoreDamaged, match=name):
        store.restore(1, out, link=link)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(StoreDamaged, match=name):
        store.restore(1, out, link=link)
    assert _content(out) == {}
    path.unlink()
    with pytest.raises(StoreDamaged, match=rf"{name}.*missing"):
        store.restore(1, out, link=link)


def test_restore_compares_the_root(store: VersionStore, tmp_path: Path) -> None:
    _rewrite(store, 1, lambda tree: tree.update(root=store.manifest(0).root))
    with pytest.raises(StoreDamaged, match="have root"):
        store.restore(1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", MODELS)
def test_restore_on_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    store = VersionStore(tmp_path / "versions")
    v0 = _publish(store, MODELS[kind](tmp_path / "m0", 0))
    _publish(store, MODELS[kind](tmp_path / "m1", 1), v0)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace):
        store.restore(1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- kept as deltas ---------------------------------------------------------------------------------------


def _raw_model(folder: Path, tensors: dict[str, tuple[str, np.ndarray[Any, Any]]], **metadata: str) -> Path:
    """A model written by hand: bfloat16 has no numpy type, and the order of the tensors is the one given."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    raw = json.dumps(header).encode()
    data = b"".join(array.tobytes() for _, array in tensors.values())
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    (folder / "config.json").write_text("{}")
    return folder


def _sequence(store: VersionStore, folders: list[Path], **fields: Any) -> list[Published]:
    published: list[Published] = []
    for folder in folders:
        published.append(_publish_all(store, folder, published[-1].manifest if published else None, **fields))
    return published


def _restored(store: VersionStore, number: int, folder: Path) -> dict[str, bytes]:
    store.restore(number, folder)
    content = _content(folder)
    shutil.rmtree(folder)
    return content


@pytest.mark.parametrize("sharded", [False, True])
def test_a_sequence_of_versions_is_kept_as_deltas_and_restores_bit_exact(tmp_path: Path, sharded: bool) -> None:
    store = VersionStore(tmp_path / "versions")
    folders = [_step_model(tmp_path / f"m{step}", step, sharded) for step in range(6)]
    published = _sequence(store, folders)
    weights = [sorted(f.digest for f in p.manifest.files if f.path.endswith(".safetensors")) for p in published]
    assert all(store.objects.is_whole(digest) for digest in weights[0])
    for earlier, now, p in zip(weights, weights[1:], published[1:], strict=False):
        fresh = [digest for digest in now if digest not in earlier]
        assert len(fresh) == (2 if sharded else 1), "one shard never changes"
        assert not any(store.objects.is_whole(digest) for digest in fresh)
        assert [d.name.split(".")[0] for d in p.deltas] == [d.removeprefix("sha256:") for d in fresh] or sharded
        assert {d.name.split(".")[0] for d in p.deltas} == {d.removeprefix("sha256:") for d in fresh}
        assert sum(d.changed for d in p.deltas) == 8
        for delta in p.deltas:
            path = next(path for path in store.objects.files() if path.name == delta.name)
            assert (delta.digest, delta.size) == (digest_file(path), path.stat().st_size)
    for number, folder in enumerate(folders):
        assert _restored(store, number, tmp_path / "out") == _content(folder)
        assert store.manifest(number).root == model_root(folder)
        for depth in Depth:
            assert _check(store, number, depth) == []
    assert _unnamed(store) == [] and store.collect() == ()


@pytest.mark.parametrize(("every", "whole"), [(1, "wwwwwww"), (2, "wdwdwdw"), (3, "wddwddw"), (32, "wdddddd")])
def test_every_nth_version_is_kept_whole(tmp_path: Path, every: int, whole: str) -> None:
    store = VersionStore(tmp_path / "versions")
    published = _sequence(
        store, [_step_model(tmp_path / f"m{step}", step) for step in range(7)], keyframe_every=every
    )  # fmt: skip
    digests = [next(f.digest for f in p.manifest.files if f.path == "model.safetensors") for p in published]
    assert "".join("w" if store.objects.is_whole(digest) else "d" for digest in digests) == whole
    chains = [store.objects.chain(digest) for digest in digests]
    assert all(chain is not None and len(chain) <= every for chain in chains)
    for number in range(7):
        assert _restored(store, number, tmp_path / "out") == _content(tmp_path / f"m{number}")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_delta_made_on_the_parents_folder_is_the_same_and_the_chain_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    folders = [_step_model(tmp_path / f"m{step}", step, sharded) for step in range(4)]
    read: list[Path] = []
    honest = DeltaFile.read

    def noting(self: DeltaFile, names: Sequence[str], room: Room) -> Iterator[Any]:
        read.append(self.path)
        return honest(self, names, room)

    stores = [VersionStore(tmp_path / name / "versions") for name in ("chain", "folder")]
    counts = list[int]()
    for store, copies in zip(stores, (False, True), strict=True):
        store.folder.parent.mkdir()
        parent: VersionManifest | None = None
        for number, folder in enumerate(folders):
            read.clear()
            with monkeypatch.context() as patch:
                patch.setattr(DeltaFile, "read", noting)
                parent_folder = folders[number - 1] if copies and number else None
                parent = _publish(store, folder, parent, parent_folder=parent_folder)
        counts.append(len(read))
    assert counts[1] < counts[0], "of the last publish"
    names = [[path.relative_to(store.folder) for path in store.objects.files()] for store in stores]
    assert names[0] == names[1]
    assert all((stores[0].folder / n).read_bytes() == (stores[1].folder / n).read_bytes() for n in names[0])


@pytest.mark.parametrize("where", ["value", "header", "missing"])
def test_a_parents_folder_that_is_not_the_parent_is_refused_and_leaves_no_delta(
    tmp_path: Path, chained: VersionStore, where: str
) -> None:
    before = chained.objects.files()
    copy = tmp_path / "m2" / "model.safetensors"
    data = bytearray(copy.read_bytes())
    if where == "missing":
        copy.unlink()
    else:
        data[-1 if where == "value" else data.index(b"layer.0")] ^= 1
        copy.write_bytes(data)
    message = {"value": "tensor 'layer.2' has SHA-256", "header": "published was sha256:", "missing": "is missing"}
    parent = chained.manifest(2)
    with pytest.raises(StoreDamaged, match=rf"m2/model\.safetensors: .*{message[where]}"):
        _publish(chained, _step_model(tmp_path / "m3", 3), parent, parent_folder=tmp_path / "m2")
    assert chained.objects.files() == before and not list(chained.folder.rglob(".tmp-*"))
    _publish(chained, tmp_path / "m3", parent)
    assert _check(chained, 3) == []


def test_a_change_that_a_delta_hardly_saves_is_kept_whole(tmp_path: Path) -> None:
    """Random weights, all of them new: their high bytes compress a little, by less than a tenth."""
    store = VersionStore(tmp_path / "versions")
    noise = [np.random.default_rng(i).integers(0, 256, 40_000, dtype=np.uint8).view("<f4") for i in range(2)]
    published = _sequence(store, [_write_model(tmp_path / f"m{i}", {"w": noise[i]}) for i in range(2)])
    assert published[1].deltas == ()
    assert store.objects.is_whole(next(f.digest for f in published[1].manifest.files if "safetensors" in f.path))
    assert not list(store.folder.rglob(".tmp-*"))


def test_bfloat16_is_kept_as_deltas_bit_for_bit(tmp_path: Path) -> None:
    """With a NaN that carries a payload and a negative zero, which no arithmetic would keep."""
    store, folders = VersionStore(tmp_path / "versions"), []
    bits = np.random.default_rng(0).integers(0, 1 << 16, (50, 40), dtype=np.uint16)
    for step in range(4):
        bits = bits.copy()
        bits.reshape(-1)[step * 7 :: 311] = [0x7FA5, 0x8000, 0xFFC1, 0x0001][step]
        folders.append(_raw_model(tmp_path / f"m{step}", {"w": ("BF16", bits), "scale": ("F32", np.ones(3, "<f4"))}))
    published = _sequence(store, folders)
    assert all(len(p.deltas) == 1 for p in published[1:])
    for number, folder in enumerate(folders):
        assert _restored(store, number, tmp_path / "out") == _content(folder)
    assert store.tensors(published[3].manifest)[1].dtype == "BF16"


def test_another_header_or_order_of_tensors_is_restored_as_it_was(tmp_path: Path) -> None:
    """The same weights in another layout: same root, nothing changed, and yet the very file comes back."""
    store = VersionStore(tmp_path / "versions")
    tensors = {name: ("F32", array) for name, array in _weights(0).items()}
    folders = [
        _raw_model(tmp_path / "m0", tensors, format="pt"),
        _raw_model(tmp_path / "m1", tensors, format="pt", note="another one"),
        _raw_model(tmp_path / "m2", dict(reversed(tensors.items())), format="pt"),
        _raw_model(tmp_path / "m3", tensors),
    ]
    published = _sequence(store, folders)
    assert len({p.manifest.root for p in published}) == 1
    assert [[d.changed for d in p.deltas] for p in published] == [[], [0], [0], [0]]
    for number, folder in enumerate(folders):
        assert _restored(store, number, tmp_path / "out") == _content(folder)
        assert _check(store, number) == []


@pytest.mark.parametrize("change", ["tensor added", "tensor removed", "shape", "dtype", "name"])
def test_other_tensors_are_kept_whole(tmp_path: Path, change: str) -> None:
    store = VersionStore(tmp_path / "versions")
    other = _weights(1)
    match change:
        case "tensor added":
            other["more"] = np.zeros(3, np.float32)
        case "tensor removed":
            del other["layer.2"]
        case "shape":
            other["layer.0"] = other["layer.0"].reshape(10, 40)
        case "dtype":
            other["layer.0"] = other["layer.0"].view(np.int32)
        case "name":
            other["layer.9"] = other.pop("layer.0")
    folders = [_step_model(tmp_path / "m0", 0), _write_model(tmp_path / "m1", other)]
    published = _sequence(store, folders)
    assert published[1].deltas == ()
    assert not list((store.folder / "deltas").rglob("*.*"))
    assert _restored(store, 1, tmp_path / "out") == _content(folders[1])


def test_a_file_of_another_name_has_no_base(tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "versions")
    folders = [_step_model(tmp_path / "m0", 0), _step_model(tmp_path / "m1", 1, sharded=True)]
    published = _sequence(store, folders)
    assert published[1].deltas == ()
    assert _restored(store, 1, tmp_path / "out") == _content(folders[1])


def test_weights_of_an_earlier_version_need_no_new_bytes(tmp_path: Path) -> None:
    """Going back to what v0 holds, and again to what v1 holds after a rollback to v0."""
    store = VersionStore(tmp_path / "versions")
    m0, m1 = (_step_model(tmp_path / f"m{step}", step) for step in range(2))
    v0 = _publish(store, m0)
    v1 = _publish_all(store, m1, v0)
    before = set(store.objects.files())
    back = _publish_all(store, m0, v1.manifest)
    again = _publish_all(store, m1, v0, version=3)
    assert (back.deltas, again.deltas) == ((), v1.deltas)
    assert set(store.objects.files()) == before
    assert (back.manifest.root, again.manifest.root) == (v0.root, v1.manifest.root)
    assert _restored(store, 2, tmp_path / "out") == _content(m0)
    assert _restored(store, 3, tmp_path / "out") == _content(m1)


def test_what_is_reached_by_two_ways_keeps_the_shorter_one(tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "versions")
    folders = [_step_model(tmp_path / f"m{step}", step) for step in (0, 1, 2)]
    published = _sequence(store, folders)
    again = _publish_all(store, folders[1], published[2].manifest)  # v1's weights once more, as a delta against v2's
    assert [d.name for d in again.deltas] != [d.name for d in published[1].deltas]
    assert len(store.collect()) == 1
    for number, step in enumerate((0, 1, 2, 1)):
        assert _restored(store, number, tmp_path / "out") == _content(folders[step])


def test_a_delta_left_by_an_interrupted_publish_is_taken_up(chained: VersionStore, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in chained.objects.files()}
    chained.manifest_path(2).unlink()
    again = _publish_all(chained, tmp_path / "m2", chained.manifest(1))
    assert [d.digest for d in again.deltas] == [digest_file(_delta(chained, 2))]
    assert {path: path.stat().st_mtime_ns for path in chained.objects.files()} == before


def test_a_spoilt_delta_left_there_is_not_taken_up(chained: VersionStore, tmp_path: Path) -> None:
    chained.manifest_path(2).unlink()
    path = tmp_path / "versions" / "deltas"
    (spoilt,) = [p for p in path.rglob("*.*") if p not in chained.named([chained.manifest(n) for n in (0, 1)])]
    _flip(spoilt, 40)
    with pytest.raises(StoreDamaged):
        _publish(chained, tmp_path / "m2", chained.manifest(1))
    assert chained.numbers() == (0, 1)
    chained.collect()
    _publish(chained, tmp_path / "m2", chained.manifest(1))
    assert _restored(chained, 2, tmp_path / "out") == _content(tmp_path / "m2")


# --- kept as deltas, and damaged --------------------------------------------------------------------------


def _trailed(data: bytes) -> bytes:
    """A delta with the digest at its end computed anew."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def _fails(store: VersionStore, number: int, folder: Path, match: str = "") -> None:
    with pytest.raises(StoreDamaged, match=match):
        store.restore(number, folder)
    assert not folder.exists()


@pytest.mark.slow
def test_every_flipped_byte_of_a_delta_stops_the_restore(chained: VersionStore, tmp_path: Path) -> None:
    path = _delta(chained, 1)
    data = path.read_bytes()
    path.chmod(0o644)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        _fails(chained, 1 + at % 2, tmp_path / "out", "v[12]: model.safetensors")
    assert _restored(chained, 0, tmp_path / "out") == _content(tmp_path / "m0")


@pytest.mark.slow
def test_every_flipped_byte_under_a_new_trailer_stops_the_restore_or_changes_nothing(
    chained: VersionStore, tmp_path: Path
) -> None:
    """Only what a restore does not use may be flipped: the digests that the tensors had in the base."""
    path = _delta(chained, 1)
    data, good = path.read_bytes(), _content(tmp_path / "m1")
    used = [t.pre for t in read_footer(path).tensors if t.changed]
    unused = {at for pre in used for at in range(data.index(pre.encode()), data.index(pre.encode()) + 64)}
    path.chmod(0o644)
    for at in range(len(data) - 32):
        path.write_bytes(_trailed(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]))
        try:
            assert _restored(chained, 1, tmp_path / "out") == good, f"byte {at}: other files, no error"
            assert at in unused, f"byte {at}"
        except StoreDamaged:
            assert not (tmp_path / "out").exists()


def test_a_delta_with_a_forged_header_stops_the_restore(chained: VersionStore, tmp_path: Path) -> None:
    """Sound in itself, and every tensor is right; the safetensors header is another one."""
    path = _delta(chained, 1)
    data = path.read_bytes()
    length = int.from_bytes(data[-40:-32], "little")
    footer, payload = json.loads(data[-40 - length : -40]), data[len(MAGIC) : -40 - length]
    whole = (tmp_path / "m1" / "model.safetensors").read_bytes()
    header = whole[: 8 + int.from_bytes(whole[:8], "little")].replace(b'"pt"', b'"tf"')
    frame = compress(header)
    footer["header"] = {"sha256": hashlib.sha256(header).hexdigest(), "size": len(header), "length": len(frame)}
    for tensor in footer["tensors"]:
        tensor[5] += len(frame)
    text = canonical_json(footer)
    path.chmod(0o644)
    path.write_bytes(_trailed(MAGIC + frame + payload + text + len(text).to_bytes(8, "little") + bytes(32)))
    assert read_footer(path).header_length == len(frame), "it is a delta"
    _fails(chained, 1, tmp_path / "out", "leads to a safetensors header")


def test_a_missing_link_stops_the_restore_of_all_behind_it(chained: VersionStore, tmp_path: Path) -> None:
    path = _delta(chained, 1)
    data = path.read_bytes()
    path.unlink()
    for number in (1, 2):
        _fails(chained, number, tmp_path / "out", rf"v{number}: model.safetensors: .*missing, and no deltas lead to it")
    path.write_bytes(data)
    _object(chained, 0, "model.safetensors").unlink()
    for number in (0, 1, 2):
        _fails(chained, number, tmp_path / "out", "missing")


def test_deltas_swapped_with_each_other_stop_the_restore(chained: VersionStore, tmp_path: Path) -> None:
    one, two = _delta(chained, 1), _delta(chained, 2)
    first, second = one.read_bytes(), two.read_bytes()
    for path, data in ((one, second), (two, first)):
        path.chmod(0o644)
        path.write_bytes(data)
    _fails(chained, 1, tmp_path / "out", "leads to sha256:")
    _fails(chained, 2, tmp_path / "out", "leads to sha256:")


def test_a_delta_under_another_name_stops_the_restore(chained: VersionStore, tmp_path: Path) -> None:
    """v1's delta as if it led from v0 to v2: the shorter way, so it is the one that is taken."""
    digests = [next(f.digest for f in chained.manifest(n).files if "safetensors" in f.path) for n in range(3)]
    path = chained.objects.delta_path(digests[2], digests[0])
    path.write_bytes(_delta(chained, 1).read_bytes())
    _fails(chained, 2, tmp_path / "out", "leads to")
    assert _restored(chained, 1, tmp_path / "out") == _content(tmp_path / "m1")


@pytest.mark.parametrize("step", [1, 9])
def test_a_replaced_base_stops_the_restore(chained: VersionStore, tmp_path: Path, step: int) -> None:
    """With weights that fit in every respect; once with the very ones that the delta leads to."""
    base = _object(chained, 0, "model.safetensors")
    other = _step_model(tmp_path / "other", step) / "model.safetensors"
    assert other.stat().st_size == base.stat().st_size
    base.chmod(0o644)
    base.write_bytes(other.read_bytes())
    _fails(chained, 0, tmp_path / "out", "holds, or its deltas give")
    for number in (1, 2):
        _fails(
            chained, number, tmp_path / "out", f"{base.name}: tensor 'layer.0' has .* Restore this file from a backup"
        )


@pytest.mark.slow
def test_every_flipped_byte_of_the_base_stops_the_restore_or_changes_nothing(
    chained: VersionStore, tmp_path: Path
) -> None:
    """What the delta writes over may be anything: 8 of the 1200 entries, 32 of the 4800 bytes."""
    base, good = _object(chained, 0, "model.safetensors"), _content(tmp_path / "m1")
    data, harmless = base.read_bytes(), 0
    base.chmod(0o644)
    for at in range(0, len(data), 5):
        base.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            assert _restored(chained, 1, tmp_path / "out") == good, f"byte {at}: other files, no error"
            harmless += 1
        except StoreDamaged:
            assert not (tmp_path / "out").exists()
    assert harmless <= 32


# --- signatures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_version_is_checked_out_with_a_signature_that_holds(tmp_path: Path, kind: str) -> None:
    keys = tmp_path / "keys"
    create_keys(keys, "takedown-pipeline/0011223344556677")
    store = VersionStore(tmp_path / "versions")
    folders = [MODELS[kind](tmp_path / f"m{i}", i) for i in range(2)]
    _sequence(store, folders, sign=lambda files, name: model_signature(files, name, load_model_key(keys)))
    for number, folder in enumerate(folders):
        out = tmp_path / f"out{number}"
        store.restore(number, out, sign=True)
        bundle = (out / "model.sig").read_bytes()
        files = {p.name: digest_file(p) for p in out.iterdir() if p.name != "model.sig"}
        check_model_signature(bundle, files, model_public_key(keys))
        assert _content(out) == {**_content(folder), "model.sig": store.signature(number)}
        with pytest.raises(StoreDamaged):
            check_model_signature(bundle, {**files, "config.json": digest_bytes(b"")}, model_public_key(keys))
    with pytest.raises(StoreDamaged):  # that of another version
        check_model_signature(store.signature(0), files, model_public_key(keys))
    store.restore(1, tmp_path / "plain")
    assert "model.sig" not in _content(tmp_path / "plain")


def test_without_a_signature_none_is_checked_out(store: VersionStore, tmp_path: Path) -> None:
    with pytest.raises(StoreDamaged, match=r"000001\.sig: is missing"):
        store.restore(1, tmp_path / "out", sign=True)
    assert not (tmp_path / "out").exists()


def test_signatures_without_a_manifest_are_left_over(store: VersionStore) -> None:
    stray = store.signature_path(7)
    stray.write_bytes(b"of an interrupted publish")
    assert store.strangers() == [stray]
    assert store.collect() == (stray,)
    assert not stray.exists()


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
    "root": (lambda t: t.update(root="root-sha256:" + "0" * 64), "its manifest says root-sha256:000"),
    "table of another kind": (lambda t: t.update(tensors="md5:00"), "not a digest"),
    "table missing": (lambda t: t.update(tensors="sha256:" + "0" * 64), "is missing"),
    "table that is none": (lambda t: t.update(tensors=t["files"][0]["digest"]), "not in the form"),
    "no weights": (lambda t: t.update(files=[f for f in t["files"] if "safetensors" not in f["path"]]), "no model"),
}


@pytest.mark.parametrize("name", MANIFEST_BREAKS)
def test_a_changed_manifest_is_found(store: VersionStore, tmp_path: Path, name: str) -> None:
    change, expected = MANIFEST_BREAKS[name]
    _rewrite(store, 1, change)
    found = _check(store, 1)
    assert [expected in b.found for b in found] == [True], found
    if name in ("size", "table missing", "table that is none"):  # a restore needs neither, and the files are right
        store.restore(1, tmp_path / "out")
        assert _content(tmp_path / "out") == _content(tmp_path / "m1")
    else:
        with pytest.raises((StoreDamaged, UnsupportedModel)):
            store.restore(1, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"[" * 100_000, b"\xff", b"null", b"9" * 5000])
def test_a_manifest_that_is_none_is_found(store: VersionStore, content: bytes) -> None:
    path = store.manifest_path(1)
    path.chmod(0o644)
    path.write_bytes(content)
    assert len(_check(store, 1)) == 1
    with pytest.raises(StoreDamaged, match=path.name):
        store.manifest(1)
    with pytest.raises(StoreDamaged):  # nobody knows what it names, so nothing is garbage
        store.collect()
    assert len(store.objects.files()) == 6


def test_a_missing_manifest_is_found(store: VersionStore) -> None:
    assert "is missing" in _check(store, 9)[0].found
    for read in (store.manifest_digest, store.signature, store.manifest):
        with pytest.raises(StoreDamaged, match="000009"):
            read(9)


def test_every_flipped_byte_of_a_manifest_is_found(store: VersionStore) -> None:
    """By the manifest's own checks or, where it still reads as one, by the digest that the ledger keeps."""
    path = store.manifest_path(1)
    path.chmod(0o644)
    data, digest = path.read_bytes(), store.manifest_digest(1)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        _check(store, 1)  # never raises
        assert store.manifest_digest(1) != digest


def test_a_store_that_does_not_exist_yet_is_empty(tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "absent")
    assert store.numbers() == store.objects.files() == store.collect() == ()
    assert store.strangers() == []
