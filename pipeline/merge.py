"""Merge: θ = θ_p - α·τ in float32, rounded once, written tensor by tensor into a copy of the parent's files.

In: the parent's folder, a mask, a task vector, α. Out: a candidate folder with the parent's headers, tokenizer and
config, whose bytes differ only inside the mask. Never: two models in memory, or a tensor skipped with a warning.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import Problem, StoreDamaged
from pipeline.files import digest_file, explained_space, fsync_folder
from pipeline.footer import entry_bytes
from pipeline.records import FileRef, MergeReport
from pipeline.safefile import TensorInfo, model_root, read_header
from pipeline.sparse import Mask, Vector, apply_displacement

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def displaced(weight: torch.Tensor, mask: torch.Tensor, vector: torch.Tensor, alpha: float) -> tuple[torch.Tensor, int]:
    """One tensor of the merge.

    Args:
        weight: Parent's values, float32 or bfloat16; not changed.
        mask: bool, same shape.
        vector: (S,) float32, one value for each True of the mask.
        alpha: Strength.

    Returns:
        The new tensor, and the number of entries whose bits differ.
    """
    index = mask.flatten().nonzero().squeeze(1)
    new = weight.clone()
    flat = new.view(-1)
    apply_displacement(flat, index, flat[index].float(), vector * -alpha)
    bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
    return new, int((new.view(bits) != weight.view(bits)).sum())


def mismatches(
    tensors: Mapping[str, TensorInfo], mask: Mask, vector: Vector, names: Mapping[str, str]
) -> list[Problem]:
    """Every way in which mask, vector and files do not fit each other."""
    problems = []
    for key in sorted(mask.keys() ^ vector.keys()):
        problems.append(Problem(key, "is in only one of mask and vector", "Run the step again."))
    for key in sorted(mask.keys() & vector.keys()):
        info = tensors.get(names.get(key, key))
        if info is None:
            problems.append(Problem(key, "is in no file of the parent", "Run the step again from this parent."))
            continue
        if tuple(mask[key].shape) != info.shape:
            problems.append(
                Problem(key, f"mask has shape {tuple(mask[key].shape)}, the file {info.shape}", "Run the step again.")
            )
        if info.dtype not in DTYPES:
            problems.append(Problem(key, f"is {info.dtype} in the file, expected F32 or BF16", "Convert the model."))
        if vector[key].dtype != torch.float32 or vector[key].numel() != int(mask[key].sum()):
            problems.append(
                Problem(
                    key,
                    f"vector has {vector[key].numel()} values of {vector[key].dtype} for "
                    f"{int(mask[key].sum())} salient entries",
                    "Run the step again.",
                )
            )
    return problems


def differing_entries(first: Path, second: Path) -> dict[str, int]:
    """Entries whose bits differ between two model folders with the same tensors, by tensor; only those with any."""
    places = {t.name: (path, read_header(path).data_start, t) for path in second.glob("*.safetensors")
              for t in read_header(path).tensors}  # fmt: skip
    found = {}
    for path in sorted(first.glob("*.safetensors")):
        header = read_header(path)
        for info in header.tensors:
            other, start, twin = places[info.name]
            width = entry_bytes(info.dtype)
            pair = [
                np.fromfile(p, f"V{width}", (info.end - info.start) // width, offset=offset)
                for p, offset in ((path, header.data_start + info.start), (other, start + twin.start))
            ]
            if count := int(np.count_nonzero(pair[0] != pair[1])):
                found[info.name] = count
    return found


def merge(
    parent: Path,
    candidate: Path,
    mask: Mask,
    vector: Vector,
    alpha: float,
    names: Mapping[str, str],
    progress: Callable[[str], None] = lambda name: None,
) -> MergeReport:
    """Write the candidate.

    Args:
        parent: Model folder of the parent; only read.
        candidate: Folder to make; what an interrupted merge left there is removed first.
        mask: Salient coordinates by parameter name.
        vector: Task vector by parameter name.
        alpha: Strength.
        names: Parameter name → tensor name in the files.
        progress: Called after each tensor.

    Raises:
        StoreDamaged: Mask, vector and files do not fit; every difference is named and nothing is written.
        NoSpace: The disk is full or read-only.
    """
    headers = {path: read_header(path) for path in sorted(parent.glob("*.safetensors"))}
    where = {t.name: (path, t) for path, header in headers.items() for t in header.tensors}
    problems = mismatches({n: t for n, (_, t) in where.items()}, mask, vector, names)
    if problems:
        raise StoreDamaged("The update does not fit the parent:\n" + "\n".join(map(str, problems)))
    changed: dict[str, int] = {}
    with explained_space(candidate):
        shutil.rmtree(candidate, ignore_errors=True)
        candidate.mkdir(parents=True)
        for path in sorted(p for p in parent.iterdir() if p.is_file()):
            copy = candidate / path.name
            shutil.copyfile(path, copy)  # copyfile: the parent's read-only mode is not taken over
            with copy.open("r+b") as stream:
                for key in (k for k in sorted(mask) if where[names.get(k, k)][0] == path):
                    info = where[names.get(key, key)][1]
                    start = headers[path].data_start + info.start
                    stream.seek(start)
                    raw = np.frombuffer(stream.read(info.end - info.start), dtype=np.uint8).copy()
                    weight = torch.from_numpy(raw).view(DTYPES[info.dtype]).view(info.shape)
                    new, changed[key] = displaced(weight, mask[key].cpu(), vector[key].cpu(), alpha)
                    stream.seek(start)
                    stream.write(new.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                    progress(key)
                stream.flush()
                os.fsync(stream.fileno())
        fsync_folder(candidate)
    return MergeReport(
        files=tuple(FileRef(path=p.name, digest=digest_file(p)) for p in sorted(candidate.iterdir())),
        root=model_root(candidate),
        selected=sum(int(m.sum()) for m in mask.values()),
        changed=sum(changed.values()),
        changed_tensors=tuple(sorted(k for k, n in changed.items() if n)),
    )
