"""What the benchmark measures on: a model, the same model after a step, a long history. Run as a process of its own.

In: ``python -m benchmarks.making NAME ARGUMENT…``. Out: files, and one line of JSON. Never: a time that is reported.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from histories import array_model, changed_copy, entries_of, make_step, start_history
from workspaces import draw_text

from pipeline.ledger import Ledger
from pipeline.lineage import model_signer
from pipeline.records import Event, TakedownRequest
from pipeline.safefile import read_header
from pipeline.seals import renew
from pipeline.settings import Settings
from pipeline.vault import open_vault
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

TENSORS, COLUMNS = 12, 1024
ARRIVED = datetime(2026, 11, 23, 9, tzinfo=UTC)
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


def load(folder: str, versions: str, batches: str, size: str) -> dict[str, int]:
    """A workspace with a long history and a long queue: so many versions of one request each, then batches that wait.

    Versions, texts, entries and signatures are real and written by the code that writes them in production, in its
    transactions; but the events of a step name no evidence, since nothing was measured. Planning 1,000 steps, each of
    which measures every earlier one, would take hours.

    Returns:
        ``entries`` of the ledger, and its ``bytes``.
    """
    root = Path(folder)
    workspace = start_history(root, array_model(root.with_name(f"{root.name}-model")))
    with Ledger.open(workspace.ledger) as ledger:
        _history(workspace, ledger, int(versions))
        for number in range(1, int(batches) + 1):
            ledger.append(*_received(workspace, f"batch-{number}", [f"Q{number}-{i}" for i in range(int(size))]))
    renew(workspace.root)
    return {"entries": len(entries_of(workspace)), "bytes": workspace.ledger.stat().st_size}


def _received(workspace: Workspace, batch_id: str, names: Sequence[str]) -> list[Event]:
    """Put the texts of a batch into the vault; returns the events that acknowledge it."""
    vault, found = open_vault(workspace), []
    for name in names:
        request = TakedownRequest(
            request_id=name, title=f"Work {name}", rights_holder="A. Holder", basis="copyright", batch_id=batch_id,
            received_at=ARRIVED, text=draw_text(name, 30),
        )  # fmt: skip
        vault.put(request)
        data: dict[str, object] = {
            "batch_id": batch_id, "received_at": ARRIVED.isoformat(), "commitment": vault.commitment(request.text),
            "record": vault.record_commitment(request),
        }  # fmt: skip
        found.append(Event(kind="received", actor="load", request_id=name, data=data))
    return found


def _history(workspace: Workspace, ledger: Ledger, versions: int) -> None:
    """Publish versions one after the other, each with the three transactions of a step."""
    store, folder, limits = VersionStore(workspace.versions), workspace.runs / "0", Settings().gate
    store.restore(0, folder)
    score = {"exact_memorisation": 0.16, "extraction_strength": 0.0, "nll": 3.8}
    measured = {"before": score | {"exact_memorisation": 1.0}, "after": score, "level": {"mean": 0.16}, "limit": 0.21}
    for number in range(1, versions + 1):
        name, run_id, parent = f"R{number}", f"run-{number:012x}", folder
        folder = workspace.runs / str(number)
        changed_copy(parent, folder, 0.05, seed=number)
        published = store.publish(
            folder, version=number, parent=store.manifest(number - 1), created_at=datetime.now(UTC), run_id=run_id,
            requests=(name,), settings={}, report={"memorised": {name: [[0, 16, 32]]}}, software={},
            parent_folder=parent, sign=model_signer(workspace.keys),
        )  # fmt: skip
        shutil.rmtree(parent)
        ledger.append(*_received(workspace, f"past-{number}", [name]))
        plan: dict[str, object] = {"requests": 1, "limits": limits.model_dump(mode="json")}
        ledger.append(Event(kind="planned", actor="load", run_id=run_id, version=number - 1, data=plan))
        ledger.append(
            Event(kind="accepted", actor="load", run_id=run_id, version=number - 1, data={"reasons": []}),
            Event(kind="published", actor="load", run_id=run_id, version=number, data=published.facts()),
            Event(kind="applied", actor="load", run_id=run_id, request_id=name, version=number, data={"passages": 1}),
            Event(kind="verified", actor="load", run_id=run_id, request_id=name, version=number, data=measured),
        )
    shutil.rmtree(folder)


MAKERS: dict[str, Callable[..., object]] = {
    "model": model, "copied": copied, "step": step, "history": history, "load": load
}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(MAKERS[sys.argv[1]](*sys.argv[2:])))
