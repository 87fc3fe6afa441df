"""Contents by digest: whole or through deltas, the same bytes or a loud error, and names that prove nothing."""

from __future__ import annotations

import os
import stat
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pipeline import objects as objects_module
from pipeline.delta import rebuild
from pipeline.errors import StoreDamaged
from pipeline.files import digest_bytes, digest_file
from pipeline.objects import EagerStream, HashedStream, ObjectStore, StoredDelta, hexadecimal
from pipeline.safefile import tensor_digests

NOTHING = "sha256:" + "0" * 64


def _header(path: Path) -> str:
    """Digest of a weight file's header, cut off by hand."""
    data = path.read_bytes()
    return digest_bytes(data[: 8 + int.from_bytes(data[:8], "little")])


def _weights(folder: Path, step: int, entries: int = 3000) -> tuple[Path, str]:
    """A weight file after so many steps, each of which changed ten entries; and its digest."""
    values = np.random.default_rng(5).random(entries, dtype=np.float32)
    for number in range(1, step + 1):
        draw = np.random.default_rng([6, number])
        values[draw.choice(entries, 10, replace=False)] = draw.random(10, dtype=np.float32)
    path = folder / f"{step}.safetensors"
    save_file({"w": values, "b": np.ones(3, np.float32)}, path, metadata={"format": "pt"})
    return path, digest_file(path)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(tmp_path / "versions")


@pytest.fixture
def line(store: ObjectStore, tmp_path: Path) -> list[tuple[Path, str]]:
    """Four contents: the first kept whole, each of the others as a delta against the one before."""
    files = [_weights(tmp_path, step) for step in range(4)]
    store.put(*files[0])
    for (_, base), (path, digest) in pairwise(files):
        assert store.put_delta(path, digest, base) is not None
    return files


def _flip(path: Path, at: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "digest",
    ["", "sha256:", "sha256:" + "0" * 63, "sha256:" + "0" * 65, "sha256:" + "A" * 64, "md5:" + "0" * 64, "0" * 64,
     "sha256:../../../etc/passwd", "sha256:" + "/" * 64, "sha256:" + "0" * 64 + "\n", "sha256:" + "٠" * 64],
)  # fmt: skip
def test_what_is_no_digest_never_becomes_a_path(store: ObjectStore, digest: str) -> None:
    calls = (
        hexadecimal, store.object_path, store.bases, store.is_whole, store.chain, store.paths, store.read, store.source,
        lambda d: store.delta_path(d, NOTHING), lambda d: store.delta_path(NOTHING, d),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(StoreDamaged, match="is not a SHA-256 digest"):
            call(digest)


def test_contents_lie_under_their_digest(store: ObjectStore, line: list[tuple[Path, str]]) -> None:
    digests = [digest.removeprefix("sha256:") for _, digest in line]
    assert [str(path.relative_to(store.folder)) for path in store.files()] == sorted(
        [f"objects/{digests[0][:2]}/{digests[0]}"]
        + [f"deltas/{target[:2]}/{target}.{base}" for base, target in pairwise(digests)]
    )
    assert [stat.S_IMODE(path.stat().st_mode) for path in store.files()] == [0o444] * 4
    assert [store.is_whole(digest) for _, digest in line] == [True, False, False, False]
    assert [store.bases(digest) for _, digest in line] == [(), *((digest,) for _, digest in line[:-1])]
    for number, (_, digest) in enumerate(line):
        assert store.chain(digest) == tuple(d for _, d in line[: number + 1])
        assert len(store.paths(digest)) == number + 1
    assert store.paths(NOTHING) == () and store.chain(NOTHING) is None
    assert store.label(store.object_path(line[0][1])) == f"versions/objects/{digests[0][:2]}/{digests[0]}"


def test_an_empty_store_has_nothing(store: ObjectStore) -> None:
    assert store.files() == () == tuple(store.temporary_files()) == store.bases(NOTHING)
    with pytest.raises(StoreDamaged, match="missing, and no deltas lead to it"):
        store.source(NOTHING)
    with pytest.raises(StoreDamaged, match="is missing"):
        store.read(NOTHING)


def test_a_loop_of_forged_names_ends(store: ObjectStore) -> None:
    a, b, c = (f"sha256:{letter * 64}" for letter in "abc")
    for target, base in ((a, b), (b, c), (c, a), (a, a), (b, a)):
        path = store.delta_path(target, base)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert store.bases(a) == (a, b)
    assert [store.chain(digest) for digest in (a, b, c)] == [None] * 3


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5))), st.sets(st.integers(0, 5)))
def test_the_chain_is_a_shortest_way_whatever_names_are_there(
    tmp_path_factory: pytest.TempPathFactory, edges: set[tuple[int, int]], whole: set[int]
) -> None:
    store = ObjectStore(tmp_path_factory.mktemp("names"))
    names = [f"sha256:{number:x}" + "e" * 63 for number in range(6)]
    for number in whole:
        path = store.object_path(names[number])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    for target, base in edges:
        path = store.delta_path(names[target], names[base])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    far = dict.fromkeys(whole, 0)
    for _ in names:  # Bellman and Ford, each edge of length 1
        for target, base in edges:
            if base in far:
                far[target] = min(far.get(target, 9), far[base] + 1)
    for number, name in enumerate(names):
        chain = store.chain(name)
        assert (len(chain) - 1 if chain else None) == far.get(number)
        if chain:
            assert store.is_whole(chain[0]) and chain[-1] == name
            assert all((names.index(t), names.index(b)) in edges for b, t in pairwise(chain))


@pytest.mark.parametrize(
    "name", ["x", "0" * 64, f"{'0' * 64}.{'1' * 63}", f"{'0' * 64}.{'1' * 64}.", "1" * 64 + "." + "1" * 64]
)
def test_foreign_names_are_no_bases(store: ObjectStore, name: str) -> None:
    folder = store.deltas / "00"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"")
    assert store.bases(NOTHING) == ()
    assert store.files() == (folder / name,), "but they are seen"


@pytest.mark.parametrize("where", ["deltas", "deltas/00", "objects", "objects/00"])
def test_a_file_where_a_folder_should_be_hides_what_would_be_there(store: ObjectStore, where: str) -> None:
    path = store.folder / where
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert store.chain(NOTHING) is None and store.paths(NOTHING) == ()
    with pytest.raises(StoreDamaged):
        store.source(NOTHING)
    with pytest.raises(StoreDamaged):
        store.read(NOTHING)


def test_temporary_files_are_none_of_the_contents(store: ObjectStore, line: list[tuple[Path, str]]) -> None:
    before = store.files()
    left = [folder / ".tmp-x" for folder in (store.folder, store.objects, store.deltas, *{p.parent for p in before})]
    for path in left:
        path.write_bytes(b"")
    assert store.files() == before
    assert sorted(store.temporary_files()) == sorted(left)
    store.drop(left)
    assert list(store.temporary_files()) == []
    store.drop(left)  # gone already: fine


# --- write ------------------------------------------------------------------------------------------------


def test_put_keeps_the_very_bytes(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"some bytes")
    store.put(path, digest_bytes(b"some bytes"))
    before = store.object_path(digest_bytes(b"some bytes")).stat().st_mtime_ns
    store.put(path, digest_bytes(b"some bytes"))
    assert store.put_bytes(b"some bytes") == digest_bytes(b"some bytes")
    assert store.object_path(digest_bytes(b"some bytes")).stat().st_mtime_ns == before
    assert store.read(digest_bytes(b"some bytes")) == b"some bytes"
    assert store.put_bytes(b"") == digest_bytes(b"") and store.read(digest_bytes(b"")) == b""


def test_put_refuses_a_source_that_changed_and_an_object_that_did(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"some bytes")
    with pytest.raises(StoreDamaged, match="changed while it was stored"):
        store.put(path, NOTHING)
    assert store.files() == () and list(store.temporary_files()) == []
    digest = store.put_bytes(b"some bytes")
    _flip(store.object_path(digest), 3)
    for call in (lambda: store.put(path, digest), lambda: store.put_bytes(b"some bytes"), lambda: store.read(digest)):
        with pytest.raises(StoreDamaged, match="changed after it was written"):
            call()


def test_a_delta_is_told_as_the_ledger_notes_it(store: ObjectStore, tmp_path: Path) -> None:
    (zero, base), (one, digest) = (_weights(tmp_path, step) for step in range(2))
    store.put(zero, base)
    stored = store.put_delta(one, digest, base)
    path = store.delta_path(digest, base)
    assert stored == StoredDelta(path.name, digest_file(path), path.stat().st_size, 10)
    assert store.stored_delta(path) == stored
    assert store.put_delta(one, digest, base) == stored, "again, it is there"
    assert store.files() == (path, store.object_path(base))


def test_a_delta_is_kept_when_it_saves_a_tenth(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (zero, base), (one, digest) = (_weights(tmp_path, step) for step in range(2))
    store.put(zero, base)
    stored = store.put_delta(one, digest, base)
    assert stored is not None
    share = stored.size / one.stat().st_size
    store.drop([store.delta_path(digest, base)])
    assert objects_module.WORTHWHILE == 0.9
    monkeypatch.setattr(objects_module, "WORTHWHILE", share * 0.999)
    assert store.put_delta(one, digest, base) is None
    assert store.files() == (store.object_path(base),) and list(store.temporary_files()) == []
    monkeypatch.setattr(objects_module, "WORTHWHILE", share * 1.001)
    assert store.put_delta(one, digest, base) == stored


def test_other_tensors_have_no_delta(store: ObjectStore, tmp_path: Path) -> None:
    zero, base = _weights(tmp_path, 0)
    store.put(zero, base)
    other = tmp_path / "other.safetensors"
    save_file({"w": np.zeros(3000, np.float32)}, other)
    assert store.put_delta(other, digest_file(other), base) is None
    assert store.files() == (store.object_path(base),)


def test_a_delta_on_a_base_that_is_not_there(store: ObjectStore, tmp_path: Path) -> None:
    path, digest = _weights(tmp_path, 1)
    with pytest.raises(StoreDamaged, match="missing, and no deltas lead to it"):
        store.put_delta(path, digest, NOTHING)


def test_a_content_made_whole_is_the_same_and_its_delta_stays(store: ObjectStore, line: list[tuple[Path, str]]) -> None:
    before = set(store.files())
    path, digest = line[2]
    store.make_whole(digest)
    assert set(store.files()) - before == {store.object_path(digest)}
    assert before <= set(store.files())
    assert store.object_path(digest).read_bytes() == path.read_bytes()
    assert store.chain(digest) == (digest,)
    assert store.chain(line[3][1]) == (digest, line[3][1]), "what comes after it is nearer now"
    store.make_whole(digest)  # again: nothing to do


def test_a_content_is_not_made_whole_from_a_damaged_delta(store: ObjectStore, line: list[tuple[Path, str]]) -> None:
    _flip(store.delta_path(line[1][1], line[0][1]), 60)
    before = store.files()
    with pytest.raises(StoreDamaged):
        store.make_whole(line[2][1])
    assert store.files() == before and list(store.temporary_files()) == []


# --- read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [False, True])
def test_weights_are_written_out_with_the_digests_of_their_tensors(
    store: ObjectStore, line: list[tuple[Path, str]], tmp_path: Path, link: bool
) -> None:
    for number, (path, digest) in enumerate(line):
        out = tmp_path / f"out{number}"
        assert store.write_weights(digest, _header(path), out, link) == tensor_digests(path)
        assert out.read_bytes() == path.read_bytes()
        linked = link and store.is_whole(digest)
        assert out.samefile(store.object_path(digest)) if linked else stat.S_IMODE(out.stat().st_mode) == 0o644


@pytest.mark.parametrize("link", [False, True])
def test_other_contents_are_written_out(store: ObjectStore, tmp_path: Path, link: bool) -> None:
    digest = store.put_bytes(b"config")
    store.write_out(digest, tmp_path / "out", link)
    assert (tmp_path / "out").read_bytes() == b"config"
    assert (tmp_path / "out").samefile(store.object_path(digest)) == link
    _flip(store.object_path(digest), 0)
    with pytest.raises(StoreDamaged, match="changed after it was published"):
        store.write_out(digest, tmp_path / "out2", link)
    store.object_path(digest).unlink()
    with pytest.raises(StoreDamaged, match="is missing"):
        store.write_out(digest, tmp_path / "out3", link)


@pytest.mark.parametrize("advice", [True, False])
def test_an_eager_stream_writes_everything_and_tells_the_system_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advice: bool
) -> None:
    asked: list[tuple[int, int]] = []
    if advice:
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, count, how: asked.append((at, count)), raising=False)
    else:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    data = np.random.default_rng(1).bytes((5 << 19) + 7)
    with (tmp_path / "out").open("xb", buffering=0) as stream:
        eager, left = EagerStream(stream), memoryview(data)
        assert eager.write(left[:0]) == 0
        while len(left):
            left = left[eager.write(left) :]
    assert (tmp_path / "out").read_bytes() == data
    sizes = [0, 1 << 20, 1 << 20, (1 << 19) + 7]
    assert asked == ([(sum(sizes[:n]), size) for n, size in enumerate(sizes)] if advice else [])


def test_a_hashed_stream_hashes_what_was_taken() -> None:
    class Half:
        def write(self, data: bytes) -> int:
            return len(data) // 2

    hashed = HashedStream(Half())  # type: ignore[arg-type]
    assert hashed.write(b"abcd") == 2
    assert hashed.digest == digest_bytes(b"ab")


def test_nothing_is_written_over(store: ObjectStore, line: list[tuple[Path, str]], tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    digest = store.put_bytes(b"config")
    for link in (False, True):
        with pytest.raises(FileExistsError):
            store.write_out(digest, tmp_path / "mine", link)
        with pytest.raises(FileExistsError):
            store.write_weights(line[1][1], _header(line[1][0]), tmp_path / "mine", link)
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_every_flipped_byte_of_a_whole_weight_file_is_found_when_it_is_written_out(
    store: ObjectStore, tmp_path: Path
) -> None:
    path, digest = _weights(tmp_path, 0, 40)
    header = _header(path)
    store.put(path, digest)
    target = store.object_path(digest)
    for at in range(target.stat().st_size):
        for link in (False, True):
            _flip(target, at)
            with pytest.raises(StoreDamaged):
                store.write_weights(digest, header, tmp_path / "out", link)
            (tmp_path / "out").unlink(missing_ok=True)
            _flip(target, at)
    store.write_weights(digest, header, tmp_path / "out")


def test_a_source_reads_through_the_chain(store: ObjectStore, line: list[tuple[Path, str]]) -> None:
    for path, digest in line:
        source = store.source(digest)
        assert source.digest == digest
        assert rebuild(source, None) == tensor_digests(path)


def test_an_object_that_cannot_be_opened_is_told(store: ObjectStore) -> None:
    digest = store.put_bytes(b"x")
    path = store.object_path(digest)
    path.unlink()
    path.mkdir()
    assert not store.is_whole(digest)
    with pytest.raises(StoreDamaged, match="not a regular file"):
        store.read(digest)
    path.rmdir()
    os.mkfifo(path)
    assert not store.is_whole(digest)
