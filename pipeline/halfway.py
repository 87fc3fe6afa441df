"""Where a long descent stands, noted now and then, so that a killed process goes on from there with the same bytes.

In: tensors and numbers of a descent. Out: the same again, for the same work. Never: a text, a token, a span or what the
model says of single tokens, from which a text could be put together again; a note that is half-written, of other work
or of other bytes than were noted; a descent that fails because it could not be noted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from pipeline.errors import NoSpace, StoreDamaged
from pipeline.files import digest_json, read_json, remove, write_json
from pipeline.records import FileRef, Record
from pipeline.sparse import checked, save_tensors

Tensors = Mapping[str, torch.Tensor]
Numbers = Mapping[str, Any]
"""What JSON can hold: floats keep every bit."""


class Note(Record):
    """What is on the disk.

    Attributes:
        key: Digest of what the descent works on; a note of other work is none.
        tensors: File of the tensors.
        numbers: Everything else.
        digest: Of all that.
    """

    key: str
    tensors: FileRef
    numbers: dict[str, Any]
    digest: str = ""

    def whole(self) -> str:
        """What ``digest`` must be."""
        return digest_json(self.model_dump(mode="json", exclude={"digest"}))


@dataclass(eq=False)
class Halfway:
    """The notes of one descent.

    Attributes:
        folder: Folder of the run; None where nothing is noted.
        name: Of the stage.
        key: Digest of what the descent works on.
        every_s: Seconds from one note to the next.
        tell: Called with what happened and its facts: ``taken-up`` with the iterations that a note spares,
            ``not-noted`` with the type of the error.
    """

    folder: Path | None = None
    name: str = ""
    key: str = ""
    every_s: float = 0.0
    tell: Callable[..., None] = lambda event, **facts: None
    last: float = field(default_factory=time.monotonic)

    def note(self, iteration: int, state: Callable[[], tuple[Tensors, Numbers] | None]) -> None:
        """Note where the descent stands after so many iterations, where the last note is old enough and it can be."""
        if self.folder is None or time.monotonic() - self.last < self.every_s or (made := state()) is None:
            return
        tensors, numbers = made
        self.last = time.monotonic()
        try:
            ref = save_tensors(self.folder / f"{self.name}-{iteration}.safetensors", tensors)
            note = Note(key=self.key, tensors=ref, numbers={**numbers, "iteration": iteration})
            written = note.model_copy(update={"digest": note.whole()})
            write_json(self.folder / f"{self.name}-halfway.json", written.model_dump(mode="json"))
        except (OSError, SafetensorError, NoSpace) as error:
            self.tell("not-noted", type=type(error).__name__)
            return
        self._remove(but=ref.path)

    def take_up(self) -> tuple[int, dict[str, torch.Tensor], Numbers] | None:
        """Iterations done, tensors and numbers of the newest note; None where there is none, or it cannot be used: then
        the descent begins anew, which only takes time."""
        if self.folder is None:
            return None
        path = self.folder / f"{self.name}-halfway.json"
        try:
            note = Note.model_validate(read_json(path)) if path.is_file() else None
            if note is None or note.key != self.key or note.digest != note.whole():
                return None
            with safe_open(checked(self.folder, note.tensors), framework="pt") as file:
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            iteration = int(note.numbers["iteration"])
        except (StoreDamaged, ValidationError, KeyError, TypeError, ValueError):
            return None
        return iteration, tensors, note.numbers

    def clear(self) -> None:
        """Remove the notes: the stage is finished."""
        if self.folder is not None:
            remove(self.folder / f"{self.name}-halfway.json")
            self._remove()

    def _remove(self, but: str = "") -> None:
        folder = self.folder or Path()
        for pattern in (f"{self.name}-*.safetensors", f".tmp-{self.name}-*.safetensors"):
            for path in folder.glob(pattern):
                if path.name != but:
                    remove(path)


NOTHING_NOTED = Halfway()


def adam_state(optimiser: torch.optim.Optimizer, parameters: Tensors) -> dict[str, torch.Tensor]:
    """Values, both moments and the step counts of Adam, by name."""
    found = {f"value.{n}": p.detach() for n, p in parameters.items()}
    for name, parameter in parameters.items():
        found |= {f"{key}.{name}": value for key, value in optimiser.state[parameter].items()}
    return found


def set_adam_state(optimiser: torch.optim.Optimizer, parameters: Tensors, state: Tensors) -> None:
    """The inverse of `adam_state`: values are written into the parameters."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[f"value.{name}"])
            if f"step.{name}" in state:  # else it has never had a gradient
                moments = {k: state[f"{k}.{name}"].to(parameter.device) for k in ("exp_avg", "exp_avg_sq")}
                optimiser.state[parameter] = {"step": state[f"step.{name}"], **moments}


def random_state(random_: random.Random) -> list[Any]:
    """State of a generator as JSON can hold it."""
    version, words, gauss = random_.getstate()
    return [version, list(words), gauss]


def set_random_state(random_: random.Random, state: list[Any]) -> None:
    """The inverse of `random_state`."""
    version, words, gauss = state
    random_.setstate((version, tuple(words), gauss))
