"""What a step will need, from shapes alone: memory stage by stage, and room on disk. Pure functions.

In: names, dtypes and shapes of a model's tensors (from safetensors headers, no weight is loaded) and settings. Out:
bytes. Never: a file, a measurement, torch.

Memory is what a process needs beside what its libraries took when they were imported. The terms, with T entries of
weights that may change, S of them salient, L in the largest, B tokens in a batch, V tokens in the vocabulary:

* the model, once: its bytes; the mask: T; positions and origin of the salient coordinates: 12·S
* saliency: float32 gradients, 4·T, and one dense gradient at a time, L; the mask's statistics, 25·L
* the fit: vector, two moments of Adam, two sums of gradients, 20·S; the repair: 36·S; with LoRA in the place of the
  fit's: the weights W + m⊙(BA) that the backward pass keeps, T, and 16 bytes for each entry of the factors
* v0's predictions on retain text, and on what it recites itself: passages · tokens · top-k · 8, twice that while
  they are made
* activations that the backward pass keeps: B · (`KEPT` · Σ(rows + columns) of the weights + `WRITTEN_OUT` · inner width
  of each block that is not gated); without a backward pass, of one block
* logits: `CE`, `KL` or `SCORED` float32 copies of B · V

The number of copies was counted in the code and holds against measurement (`python -m tests.benchmarks.memory`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.records import Record
from pipeline.settings import Settings, UnlearnSettings

KEPT = 1.7
"""Activations that the backward pass keeps, per input and output of a weight: both, and what norms, rotations and the
attention between them keep."""
WRITTEN_OUT = 4.0
"""Further ones of the inner width of a block whose two inner weights have a non-linearity between them that may be
written out in single operations, as GPT-2's; in a gated block, with three, it is one operation."""
CE, KL, SCORED = 5.0, 10.0, 3.0
"""Float32 copies of a batch's logits: cross-entropy and its gradient; the bucketed KL and its; scoring without one."""
HALF = 1.5
"""More copies where the model computes in 16 bits: its own logits and their gradient, and the float32 copy of them."""
RECITED_SHARE = 1 / 16
"""Distinct passages that v0 recites, of the openings that it is let go on from; 1 in 32 were measured."""
SPARE_SHARE, SPARE_BYTES = 0.05, 32 << 20
"""On top: what allocators hold back, and what is too small to count."""

PROGRAM_BYTES = 700 << 20
"""What a process of this product takes once torch, transformers, peft and Prefect are imported (535 MB), and what they
load with the first model."""

WIDTHS = {"F32": 4, "BF16": 2, "F64": 8, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}
"""Bytes of an entry; other dtypes are refused by `pipeline.models`, or lie in no model."""

_IN_A_BLOCK = re.compile(r"\.[0-9]+\.")


class Shape(NamedTuple):
    """A tensor as a header has it: its name, its safetensors dtype code, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelSize:
    """What the shapes of a model's tensors say.

    Attributes:
        nbytes: Of all tensors.
        targets: Entries of the weights that a takedown may change: 2-D ones in a numbered block, which embeddings and
            the head are not.
        largest: Entries of the largest of those.
        widest: Bytes of the largest tensor of all.
        width: Bytes of an entry of those weights.
        sides: Σ(rows + columns) of those weights.
        activations: Numbers that the backward pass keeps for each token.
        block_activations: Those of the largest block.
        vocabulary: Rows of the largest tensor outside of a block.
    """

    nbytes: int
    targets: int
    largest: int
    widest: int
    width: int
    sides: int
    activations: float
    block_activations: float
    vocabulary: int


class StageNeed(Record):
    """What a stage needs.

    Attributes:
        stage: Its name.
        memory_bytes: Beside what the libraries take.
    """

    stage: str
    memory_bytes: int


class StepNeed(Record):
    """What a step needs.

    Attributes:
        stages: In order; those that need weights to change are run only where they do.
        disk_bytes: Room for the run's folder and the new version at their largest, together.
    """

    stages: tuple[StageNeed, ...]
    disk_bytes: int

    def after(self, *finished: str) -> StepNeed:
        """What is left when some stages are finished; those before them are not run again."""
        done = max((i for i, s in enumerate(self.stages) if s.stage in finished), default=-1)
        return self.model_copy(update={"stages": self.stages[done + 1 :]})

    @property
    def peak(self) -> StageNeed:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda s: s.memory_bytes)


def model_size(tensors: Iterable[Shape]) -> ModelSize:
    """Add up the shapes of a model's tensors."""
    nbytes = targets = largest = widest = vocabulary = 0
    width, blocks = 4, dict[str, list[tuple[int, ...]]]()
    for name, dtype, shape in tensors:
        entries, each = math.prod(shape), WIDTHS.get(dtype, 8)
        nbytes, widest = nbytes + entries * each, max(widest, entries * each)
        if len(shape) != 2:
            continue
        if block := _IN_A_BLOCK.search(f".{name}"):
            targets, largest, width = targets + entries, max(largest, entries), each
            blocks.setdefault(block.group(), []).append(shape)
        else:
            vocabulary = max(vocabulary, shape[0])
    kept = [_kept(shapes) for shapes in blocks.values()]
    sides = sum(map(sum, (shape for shapes in blocks.values() for shape in shapes)))
    return ModelSize(nbytes, targets, largest, widest, width, sides, sum(kept), max(kept, default=0.0), vocabulary)


def _kept(shapes: Sequence[tuple[int, ...]]) -> float:
    """Activations of a block that the backward pass keeps for each token, from the shapes of its weights."""
    inner = max(map(max, shapes))
    gated = sum(inner in shape for shape in shapes) > 2
    return KEPT * sum(map(sum, shapes)) + (0.0 if gated else WRITTEN_OUT * inner)


def salient_share(settings: Settings) -> float:
    """Share of the weights to expect in the mask.

    Above mean + k·std of |gradient| lies most where gradients are normally distributed; those of language models have
    heavier tails, and fewer lie there (7 % instead of 16 % at k = 1 in the demo).
    """
    unlearn = settings.unlearn
    if not unlearn.masked:
        return 1.0
    if unlearn.saliency_fraction is not None:
        return unlearn.saliency_fraction
    mean = math.sqrt(2 / math.pi)
    at = mean + unlearn.saliency_k * math.sqrt(1 - mean * mean)
    return math.erfc(at / math.sqrt(2)) if at > 0 else 1.0


def step_need(
    model: ModelSize,
    settings: Settings,
    selected: int | None = None,
    restores: int = 1,
    processes: int = 0,
    retained: int | None = None,
) -> StepNeed:
    """Memory and room for a step.

    Args:
        model: What it starts from.
        settings: The resolved settings.
        selected: Entries of the mask, where it is known.
        restores: Model folders that are written beside the candidate: a parent that is not kept whole, and so cannot be
            linked; a reinstatement's start.
        processes: Worker processes on this machine that screen, each with libraries and a model of its own.
        retained: Passages that retain text has at most; left out, as many as the settings take.
    """
    salient = selected if selected is not None else round(model.targets * salient_share(settings))
    predictions = _predictions(model, settings, retained)
    terms = _terms(model, settings, salient, predictions)
    memory = {stage: _with_spare(model.nbytes + more) for stage, more in terms.items()}
    memory["screening"] += processes * (PROGRAM_BYTES + memory["screening"])
    return StepNeed(
        stages=tuple(StageNeed(stage=stage, memory_bytes=nbytes) for stage, nbytes in memory.items()),
        disk_bytes=_disk(model, salient, restores, predictions),
    )


def _with_spare(nbytes: float) -> int:
    return round(nbytes * (1 + SPARE_SHARE)) + SPARE_BYTES


def _terms(model: ModelSize, settings: Settings, salient: int, predictions: int) -> dict[str, float]:
    """Bytes of each stage beside the model."""
    unlearn, passages = settings.unlearn, settings.passages
    length = passages.prompt_tokens + passages.continuation_tokens
    most = max(settings.runtime.batch_tokens, length)

    def tokens(count: int) -> int:
        """Tokens in a batch of so many passages, at most."""
        return min(most, count * length)

    # From the first scored token on; retain text is scored from its second on.
    share = (length - min(passages.first_prompt_tokens, length - 1)) / length

    def logits(batch: float, copies: float) -> float:
        return batch * model.vocabulary * 4 * (copies + HALF * (model.width < 4))

    def trained(batch: int, copies: float, part: float) -> float:
        return batch * model.activations * model.width + logits(batch * part, copies)

    fitted = tokens(unlearn.passages_per_iteration * unlearn.random_labels_per_prompt)
    if unlearn.method == "short-context":
        fitted = max(fitted, tokens(unlearn.replay_passages))
    pushed, held = tokens(unlearn.passages_per_iteration), tokens(_held(unlearn)) * bool(unlearn.anchor_weight)
    anchor = 8 * predictions
    scored = most * model.block_activations * model.width + logits(most * share, SCORED)
    dense = model.largest * model.width
    kept = model.targets + 12.0 * salient + anchor
    backward = max(trained(fitted, CE, share), trained(held, KL, 1.0))
    if unlearn.parameterisation == "full":
        fit = 20.0 * salient + dense
    else:
        fit = float(model.targets * model.width + 12 * model.largest + 16 * unlearn.lora_rank * model.sides)
    # Several threads score at the same time.
    together = settings.runtime.workers if settings.runtime.runner == "threads" else 1
    return {
        "reference": scored + 2 * anchor,
        "screening": scored * together,
        "saliency": 4.0 * model.targets
        + max(trained(most, CE, share) + dense, model.targets + 25.0 * model.largest) * unlearn.masked
        + model.targets * (not unlearn.masked),
        "unlearn": kept + max(fit + backward, 8.0 * salient + scored),
        "repair": kept + max(36.0 * salient + dense + max(trained(pushed, KL, share), trained(held, KL, 1.0)), scored),
        "merge": model.targets + 4.0 * salient + 20.0 * model.largest,
        "evaluate": scored,
        "publish": 8.0 * model.widest,
    }


def _disk(model: ModelSize, salient: int, restores: int, predictions: int) -> int:
    """Folders of models, the candidate, the version while its file is written, mask, vectors, v0's predictions; before
    there is a candidate, two notes of how far a fit has come.

    Where the store keeps a delta it is less; whether it will is known only then.
    """
    made = max(2 * model.nbytes, 24 * salient)
    return model.nbytes * restores + made + model.targets // 8 + 8 * salient + 8 * predictions + (16 << 20)


def _held(unlearn: UnlearnSettings) -> int:
    """Passages that an iteration is held to, at most; ``short-context`` draws from three pools."""
    drawn = unlearn.anchor_passages
    return unlearn.recited_passages + 2 * drawn if unlearn.method == "short-context" else drawn


def _predictions(model: ModelSize, settings: Settings, retained: int | None) -> int:
    """Tokens that v0's predictions are kept of, with each passage, position and place in the top k."""
    unlearn, passages = settings.unlearn, settings.passages
    pool = unlearn.anchor_pool if retained is None else min(unlearn.anchor_pool, retained)
    count = pool + math.ceil(unlearn.recited_openings * RECITED_SHARE)
    return count * (passages.prompt_tokens + passages.continuation_tokens) * min(unlearn.anchor_top_k, model.vocabulary)
