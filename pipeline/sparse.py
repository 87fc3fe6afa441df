"""Masks, task vectors and the salient coordinates of a model: sparse by construction.

A mask is one bool per target weight. Everything that changes weights goes through `SalientWeights`, which holds
float32 values for the coordinates inside the mask and nothing else, so that a weight outside the mask cannot move:
no gradient masking, no decay or momentum to undo.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import NumericalFailure, StoreDamaged
from pipeline.files import digest_file, fsync_folder
from pipeline.records import FileRef

Vector = dict[str, torch.Tensor]
"""Tensor name → float32 values (S,) at the salient coordinates of that tensor, in row-major order."""

Mask = dict[str, torch.Tensor]
"""Tensor name → bool tensor of the weight's shape."""


def apply_displacement(
    flat: torch.Tensor, index: torch.Tensor, origin: torch.Tensor, displacement: torch.Tensor
) -> None:
    """flat[index] = round(origin + displacement), in place; the one arithmetic of calibration and merge.

    Args:
        flat: (N,) weight, float32 or bfloat16.
        index: (S,) int64 coordinates.
        origin: (S,) float32 values of the parent.
        displacement: (S,) float32.
    """
    flat[index] = (origin + displacement).to(flat.dtype)


class SalientWeights:
    """The salient coordinates of a model, and the way to displace them. Restores the parent on exit, bit for bit.

    Memory: 12 bytes for each salient coordinate, nothing for the others.

    Args:
        weights: Target weights by name.
        mask: Which coordinates may move; names and shapes as in ``weights``.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], mask: Mask) -> None:
        if {n: tuple(w.shape) for n, w in weights.items()} != {n: tuple(m.shape) for n, m in mask.items()}:
            raise StoreDamaged("The mask does not belong to this model: names or shapes differ. Run the step again.")
        self.weights = dict(weights)
        self.index = {n: m.flatten().nonzero().squeeze(1).to(weights[n].device) for n, m in mask.items()}
        self.origin = {n: self._flat(n)[i].float().clone() for n, i in self.index.items()}

    def _flat(self, name: str) -> torch.Tensor:
        # detach() shares storage; view() would fail on a weight that is not contiguous instead of copying it.
        return self.weights[name].detach().view(-1)

    def zeros(self) -> Vector:
        """A vector of zeros."""
        return {n: torch.zeros_like(o) for n, o in self.origin.items()}

    def displace(self, vector: Vector, scale: float = 1.0) -> None:
        """Set the model to parent + scale · vector, rounded once to its dtype."""
        for name, index in self.index.items():
            # A vector that was read from a file is in the machine's memory, the parent perhaps in a GPU's.
            moved = (vector[name] * scale).to(self.origin[name].device)
            apply_displacement(self._flat(name), index, self.origin[name], moved)

    def restore(self) -> None:
        """Set the model back to the parent."""
        for name, index in self.index.items():
            self._flat(name)[index] = self.origin[name].to(self.weights[name].dtype)

    def moved(self) -> int:
        """Number of weights that differ from the parent's as the model stands."""
        return sum(
            int((self._flat(name)[index] != self.origin[name].to(self.weights[name].dtype)).sum())
            for name, index in self.index.items()
        )

    def gather(self, name: str, dense: torch.Tensor) -> torch.Tensor:
        """The salient entries of a dense tensor, float32 (S,)."""
        return dense.reshape(-1)[self.index[name]].float()

    def __enter__(self) -> SalientWeights:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.restore()


class GradientCollector:
    """While open, every backward adds the weights' salient gradients to ``sums`` and frees the dense gradient.

    Only one dense gradient exists at a time, whatever the size of the model.
    """

    def __init__(self, salient: SalientWeights) -> None:
        self.salient = salient
        self.sums = salient.zeros()

    def _collect(self, name: str, weight: torch.Tensor) -> None:
        if weight.grad is not None:
            self.sums[name] += self.salient.gather(name, weight.grad)
            weight.grad = None

    def __enter__(self) -> GradientCollector:
        self._handles = []
        for name, weight in self.salient.weights.items():
            weight.requires_grad_(True)
            hook = weight.register_post_accumulate_grad_hook(partial(self._collect, name))  # type: ignore[no-untyped-call]
            self._handles.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for weight in self.salient.weights.values():
            weight.requires_grad_(False)
            weight.grad = None

    def take(self) -> Vector:
        """The sums so far; starts again from zero.

        Raises:
            NumericalFailure: A gradient is not finite.
        """
        for name, value in self.sums.items():
            if not bool(torch.isfinite(value).all()):
                raise NumericalFailure(f"{name}: the gradient is not finite. Lower unlearn.learning_rate.")
        taken, self.sums = self.sums, self.salient.zeros()
        return taken


def norm(vector: Vector) -> float:
    """Euclidean norm, summed in float64."""
    return float(sum(v.double().square().sum() for v in vector.values()) ** 0.5)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> FileRef:
    """Write tensors durably: fresh path, fsync, rename."""
    temporary = path.with_name(f".tmp-{path.name}")
    save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, temporary, metadata)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)
    return FileRef(path=path.name, digest=digest_file(path))


def checked(folder: Path, ref: FileRef) -> Path:
    """Path of a file of the run whose bytes still match their digest.

    Raises:
        StoreDamaged: They do not.
    """
    path = folder / ref.path
    if not path.is_file() or digest_file(path) != ref.digest:
        raise StoreDamaged(f"{path}: is missing or was changed since it was written. Run the step again.")
    return path


def _pack(bits: torch.Tensor) -> torch.Tensor:
    """Pack a flat bool tensor into bytes, first bit highest, padded with zeros."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return (padded * weights).sum(1, dtype=torch.uint8)


def _unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Inverse of `_pack`."""
    shifts = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.uint8)
    return ((packed.unsqueeze(1) >> shifts) & 1).bool().view(-1)[:count]


def save_mask(path: Path, mask: Mask) -> FileRef:
    """Write a mask: one bit per weight."""
    shapes = json.dumps({n: list(m.shape) for n, m in mask.items()}, sort_keys=True)
    return save_tensors(path, {n: _pack(m.flatten().cpu()) for n, m in mask.items()}, {"shapes": shapes})


def load_mask(folder: Path, ref: FileRef) -> Mask:
    """Read a mask; the inverse of `save_mask`."""
    with safe_open(checked(folder, ref), framework="pt") as file:
        shapes: dict[str, list[int]] = json.loads(file.metadata()["shapes"])
        return {n: _unpack(file.get_tensor(n), int(torch.tensor(s).prod())).view(*s) for n, s in shapes.items()}


def save_vector(path: Path, vector: Vector) -> FileRef:
    """Write a task vector.

    Raises:
        NumericalFailure: An entry is not finite.
    """
    for name, value in vector.items():
        if not bool(torch.isfinite(value).all()):
            raise NumericalFailure(f"{name}: the task vector is not finite. Lower unlearn.learning_rate.")
    return save_tensors(path, vector)


def load_vector(folder: Path, ref: FileRef) -> Vector:
    """Read a task vector; the inverse of `save_vector`."""
    with safe_open(checked(folder, ref), framework="pt") as file:
        return {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
