"""The ways to keep versions that are compared, each call in a process of its own, so that its memory can be seen.

In: ``python -m benchmarks.jobs VARIANT VERB ARGUMENT…``. Out: one line of JSON: seconds of the call alone, without
imports and preparation, and the most memory that the process had. Never: a write that is not brought to the disk before
the time is taken.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import zstandard

from pipeline.files import canonical_json, digest_bytes, seal, write_new
from pipeline.footer import entry_bytes, read_footer
from pipeline.safefile import read_header
from pipeline.storecheck import Depth
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import open_workspace

WEIGHTS = "model.safetensors"
Job = Callable[[], object]
"""What is timed; made by a function that does what is not."""


def _write_synced(target: Path, pieces: list[bytes]) -> None:
    with target.open("xb") as stream:
        stream.writelines(pieces)
        seal(stream, 0o644)


# --- this product's store -----------------------------------------------------------------------------------


def _publish(store: str, models: str, version: str, keyframe_every: int) -> Job:
    versions, number = VersionStore(Path(store)), int(version)
    parent = versions.manifest(number - 1) if number else None
    return lambda: versions.publish(
        Path(models) / version, version=number, parent=parent, created_at=datetime.now(UTC), run_id=None, requests=(),
        settings={}, report={}, software={}, keyframe_every=keyframe_every,
        parent_folder=Path(models) / str(number - 1) if number else None,
    )  # fmt: skip


def publish_deltas(store: str, models: str, version: str) -> Job:
    """Publish a version as a delta, with every check that production makes; no keyframe but the first."""
    return _publish(store, models, version, keyframe_every=1 << 30)


def publish_whole(store: str, models: str, version: str) -> Job:
    """The same store and the same checks, every version whole."""
    return _publish(store, models, version, keyframe_every=1)


def restore(store: str, target: str, version: str) -> Job:
    """Restore from this product's store."""
    return lambda: VersionStore(Path(store)).restore(int(version), Path(target))


# --- whole tensors by digest --------------------------------------------------------------------------------


def publish_tensors(store: str, models: str, version: str) -> Job:
    """Every tensor an object by digest, kept once; written, synced and read back like everything in the store."""
    folder, path = Path(store), Path(models) / version / WEIGHTS
    folder.mkdir(exist_ok=True)

    def job() -> None:
        header = read_header(path)
        names = list[str]()
        with path.open("rb") as stream:
            head = stream.read(header.data_start)
            for tensor in header.tensors:
                data = stream.read(tensor.end - tensor.start)
                names.append(digest_bytes(data))
                if not (folder / names[-1]).exists():
                    write_new(folder / names[-1], data)
        write_new(folder / f"{version}.header", head)
        write_new(folder / f"{version}.json", canonical_json(names))

    return job


def restore_tensors(store: str, target: str, version: str) -> Job:
    """Put the tensors together, each hashed."""
    folder = Path(store)

    def job() -> None:
        pieces = [(folder / f"{version}.header").read_bytes()]
        for name in json.loads((folder / f"{version}.json").read_bytes()):
            pieces.append((folder / name).read_bytes())
            if digest_bytes(pieces[-1]) != name:
                raise ValueError(f"{name}: changed")
        Path(target).mkdir()
        _write_synced(Path(target) / WEIGHTS, pieces)

    return job


# --- zstd against the previous file -------------------------------------------------------------------------


def _dictionary(data: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(data, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def publish_zstd(store: str, models: str, version: str) -> Job:
    """Compress with the version before as dictionary, long matches on, level 3; the first version is kept as it is."""
    folder, number = Path(store), int(version)
    folder.mkdir(exist_ok=True)

    def job() -> None:
        new = (Path(models) / version / WEIGHTS).read_bytes()
        if number:
            old = (Path(models) / str(number - 1) / WEIGHTS).read_bytes()
            window = max(10, min(31, (len(old) + len(new)).bit_length()))
            settings = zstandard.ZstdCompressionParameters.from_level(
                3, source_size=len(new), dict_size=len(old), window_log=window, enable_ldm=True
            )
            new = zstandard.ZstdCompressor(dict_data=_dictionary(old), compression_params=settings).compress(new)
        write_new(folder / version, new)

    return job


def restore_zstd(store: str, target: str, version: str) -> Job:
    """Decompress one version after the other, up to the one that is wanted."""

    def job() -> None:
        data = (Path(store) / "0").read_bytes()
        for number in range(1, int(version) + 1):
            reader = zstandard.ZstdDecompressor(dict_data=_dictionary(data), max_window_size=1 << 31)
            data = reader.decompress((Path(store) / str(number)).read_bytes())
        Path(target).mkdir()
        _write_synced(Path(target) / WEIGHTS, [data])

    return job


# --- the floor ----------------------------------------------------------------------------------------------


def _copy(source: Path, target: Path) -> Job:
    def job() -> None:
        shutil.copyfile(source, target)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())

    return job


def publish_copy(store: str, models: str, version: str) -> Job:
    """copyfile and fsync: nothing is hashed, nothing checked."""
    Path(store).mkdir(exist_ok=True)
    return _copy(Path(models) / version / WEIGHTS, Path(store) / version)


def restore_copy(store: str, target: str, version: str) -> Job:
    """The same back."""
    Path(target).mkdir()
    return _copy(Path(store) / version, Path(target) / WEIGHTS)


# --- other measurements -------------------------------------------------------------------------------------


def quick_check(workspace: str) -> Job:
    """What ``takedown verify --quick`` does, without start-up; anything found ends the benchmark."""

    def job() -> None:
        if breaks := verify(open_workspace(Path(workspace)), Depth.QUICK):
            raise ValueError(str(breaks[0]))

    return job


def steps(workspace: str) -> Job:
    """What the deltas of an existing workspace take: one record per weight file that is kept as a delta."""

    def job() -> list[dict[str, object]]:
        store = VersionStore(open_workspace(Path(workspace)).versions)
        found = list[dict[str, object]]()
        for number in store.numbers():
            for file in store.manifest(number).files:
                for base in store.objects.bases(file.digest):
                    path = store.objects.delta_path(file.digest, base)
                    tensors = read_footer(path).tensors
                    found.append(
                        {
                            "version": number,
                            "file": file.path,
                            "whole": file.size,
                            "bytes": path.stat().st_size,
                            "changed": sum(t.changed for t in tensors),
                            "changed_bytes": sum(t.changed * entry_bytes(t.dtype) for t in tensors),
                            "entries": sum(t.entries for t in tensors),
                        }
                    )
        return found

    return job


class Variant(NamedTuple):
    """A way to keep versions.

    Attributes:
        publish: (store, models, version) → job.
        restore: (store, target folder, version) → job.
    """

    publish: Callable[[str, str, str], Job]
    restore: Callable[[str, str, str], Job]


VARIANTS = {
    "deltas": Variant(publish_deltas, restore),
    "whole": Variant(publish_whole, restore),
    "tensors": Variant(publish_tensors, restore_tensors),
    "zstd": Variant(publish_zstd, restore_zstd),
    "copy": Variant(publish_copy, restore_copy),
}
OTHERS: dict[str, Callable[[str], Job]] = {"quick-check": quick_check, "steps": steps}


def main(name: str, *arguments: str) -> None:
    """Prepare a job, run it, print what it took and, of the other measurements, what it found."""
    verb, *rest = arguments
    job = getattr(VARIANTS[name], verb)(*rest) if name in VARIANTS else OTHERS[name](verb)
    os.sync()
    start = time.perf_counter()
    result = job()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "result": result if name in OTHERS else None}))


if __name__ == "__main__":
    main(*sys.argv[1:])
