"""What the benchmark measures on: a model, the same model after a step, a long history. Run as a process of its own.

In: ``python -m benchmarks.making NAME ARGUMENT…``. Out: files, and one line of JSON. Never: a time that is reported.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from histories import array_model, make_step, start_history

from pipeline.safefile import read_header

TENSORS, COLUMNS = 12, 1024
WIDTHS = {"F32": 4, "BF16": 2}
"""Dtypes whose tensors a step changes; others stay as they are."""


def model(folder: str, megabytes: str, dtype: str) -> None:
    """Random-normal weights, std 0.02, in 12 tensors."""
    rows = max(1, round(float(megabytes) * 1e6 / (WIDTHS[dtype] * TENSORS * COLUMNS)))
    array_model(Path(folder), tensors=TENSORS, shape=(rows, COLUMNS), bfloat16=dtype == "BF16")


def copied(source: str, folder: str) -> None:
    """The weights and the settings of a real model in one file."""
    Path(folder).mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(Path(source) / name, Path(folder) / name)


def _values(bits: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.float32]:
    return (bits.astype("<u4") << 16 if dtype == "BF16" else bits).view("<f4")


def _bits(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    """The bits of finite values; bfloat16 rounds to the nearest, ties to even."""
    bits = values.view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2") if dtype == "BF16" else bits


def step(parent: str, folder: str, density: str, seed: str) -> dict[str, int]:
    """The model after a step: a share of the entries at random positions moved by a tenth of their tensor's spread.

    Returns:
        ``changed`` entries and ``changed_bytes``, ``entries``, and ``whole_bytes``, the size of the file.
    """
    shutil.copytree(parent, folder)
    path, draw = Path(folder) / "model.safetensors", np.random.default_rng(int(seed))
    header = read_header(path)
    found = {"changed": 0, "changed_bytes": 0, "entries": 0, "whole_bytes": path.stat().st_size}
    with path.open("r+b") as stream:
        for tensor in header.tensors:
            if tensor.dtype not in WIDTHS:
                continue
            width = WIDTHS[tensor.dtype]
            stream.seek(header.data_start + tensor.start)
            old = np.frombuffer(stream.read(tensor.end - tensor.start), f"<u{width}")
            where = np.flatnonzero(draw.random(old.size, np.float32) < float(density))
            values = _values(old, tensor.dtype)
            noise = draw.standard_normal(where.size, np.float32) * np.float32(0.1) * values.std()
            new = old.copy()
            new[where] = _bits(values[where] + noise, tensor.dtype)
            stream.seek(header.data_start + tensor.start)
            stream.write(new.tobytes())
            changed = int(np.count_nonzero(new != old))
            found["changed"] += changed
            found["changed_bytes"] += changed * width
            found["entries"] += old.size
    return found


def history(folder: str, versions: str) -> None:
    """A workspace with a model of arrays and so many versions, each of one request."""
    base = Path(folder).parent / f"{Path(folder).name}-model"
    workspace = start_history(Path(folder), array_model(base))
    for number in range(1, int(versions) + 1):
        make_step(workspace, f"R{number}")


MAKERS: dict[str, Callable[..., object]] = {"model": model, "copied": copied, "step": step, "history": history}

if __name__ == "__main__":
    print(json.dumps(MAKERS[sys.argv[1]](*sys.argv[2:])))
