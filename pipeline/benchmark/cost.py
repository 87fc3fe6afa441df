"""What a piece of work costs: wall time, tokens through the model, peak memory of this process.

Peak memory is the kernel's (VmHWM of ``/proc/self/status``, set back where the kernel allows it), so that it holds what
every allocator took; on a GPU that of torch's allocator there.
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from pipeline.benchmark.records import Cost

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> tuple[int, int]:
    """Resident bytes now, and the most since the last reset."""
    try:
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    except (OSError, KeyError):  # no /proc, as on macOS: only the peak of the whole process is known
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return most, most


class Meter:
    """Measures what happens inside ``with``: afterwards `cost` has it.

    Args:
        model: Whose forward passes are counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self._tokens = 0
        self.cost = Cost(seconds=0.0, tokens=0, peak_bytes=0, rise_bytes=0)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            self._tokens += ids.numel()

    def _memory(self) -> tuple[int, int]:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        return resident()

    def __enter__(self) -> Meter:
        self._hook = self._model.register_forward_pre_hook(self._count, with_kwargs=True)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with suppress(OSError):
                CLEAR.write_text("5")
        self._held = self._memory()[0]
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        seconds = time.monotonic() - self._started
        self._hook.remove()
        peak = self._memory()[1]
        self.cost = Cost(
            seconds=seconds, tokens=self._tokens, peak_bytes=peak, rise_bytes=max(0, peak - self._held)
        )  # fmt: skip
