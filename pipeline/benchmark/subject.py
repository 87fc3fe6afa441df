"""The subject of a job: a model with everything the benchmark asks of it, encoded for its tokenizer.

In: a job. Out: passages by step and group, the never-seen level, what is memorised, the anchor. Never: a text that
stays out of memory longer than it is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from pipeline.anchor import NO_ANCHOR, Anchor, build_anchor
from pipeline.benchmark.records import Inputs, Job, Screened, ScreenedText
from pipeline.benchmark.texts import BenchText, BenchTexts, read_texts, usable_retain
from pipeline.errors import EvidenceError, UsageError
from pipeline.evaluate import memorised_above, never_seen_level, scores_by_text, spread
from pipeline.metrics import exact_memorisation, score_passages
from pipeline.models import check_tokenizer, load_model, load_tokenizer, target_weights
from pipeline.passages import Passage, encode, pad_id, passages_of, prompt_prefix
from pipeline.recited import anchor_passages
from pipeline.records import FileRef, PassageSpan
from pipeline.settings import PassageSettings, Settings
from pipeline.sparse import checked


@dataclass(frozen=True)
class Subject:
    """A model and its passages.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        settings: Of the job.
        steps: Step → request → passages; those that the untouched model reproduces, once that is known.
        groups: ``kept``, ``heldout``, ``unseen`` → passages.
        retain: What a method may hold the model to.
        works: The texts of all steps.
    """

    model: nn.Module
    tokenizer: Any
    settings: Settings
    steps: Mapping[str, Mapping[str, Sequence[Passage]]]
    groups: Mapping[str, Sequence[Passage]]
    retain: Mapping[str, str]
    works: Sequence[str]

    @property
    def pad(self) -> int:
        return pad_id(self.tokenizer)

    @property
    def max_tokens(self) -> int:
        return self.settings.runtime.batch_tokens

    @property
    def bos(self) -> int:
        """Number of tokens in front of every prompt that are no text."""
        return len(prompt_prefix(self.tokenizer))

    def of_step(self, step: str) -> list[Passage]:
        """The passages of all requests of a step."""
        return [passage for passages in self.steps[step].values() for passage in passages]

    def anchor(self) -> Anchor:
        """What the model as it stands says of the retain text; built at v0, before any step."""
        unlearn = self.settings.unlearn
        passages = anchor_passages(self.model, self.tokenizer, self.retain, self.settings)
        if not passages:
            return NO_ANCHOR
        return build_anchor(self.model, passages, unlearn.anchor_top_k, self.pad, self.max_tokens)

    def memorised(self, screened: Screened) -> Subject:
        """The subject with the passages that the untouched model reproduces."""
        steps = {
            step: {name: [found[i] for i in screened.requests[step][name].memorised] for name, found in texts.items()}
            for step, texts in self.steps.items()
        }
        return replace(self, steps=steps)


def load_subject(job: Job) -> Subject:
    """Load the model of a job and encode its texts.

    Raises:
        UsageError: The texts have changed since the benchmark was started.
        UnsupportedModel, InvalidInput: See `load_model` and `read_texts`.
    """
    texts = _checked_texts(job.inputs, job.inputs_digest)
    folder, settings = Path(job.model), job.settings
    model, tokenizer = load_model(folder, settings.runtime.device), load_tokenizer(folder)
    check_tokenizer(model, tokenizer)

    def cut(name: str, item: BenchText) -> list[Passage]:
        return passages_in(tokenizer, name, item, settings.passages, texts.passage_tokens)

    most = settings.evaluate.reference_passages
    groups = {}
    for group, found in texts.groups().items():
        if group == "retain" or not found:
            continue
        each = max(1, most // len(found))
        passages = [passage for name, item in found.items() for passage in spread(cut(f"{group}/{name}", item), each)]
        groups[group] = spread(passages, most)
    steps = {
        step: {name: [p for item in items for p in cut(f"{step}/{name}", item)] for name, items in requests.items()}
        for step, requests in texts.steps.items()
    }
    return Subject(model, tokenizer, settings, steps, groups, usable_retain(texts, settings.dedupe), texts.works())


def _checked_texts(inputs: Inputs, digest: str) -> BenchTexts:
    texts = read_texts(inputs)
    if texts.digest() != digest:
        raise UsageError(f"{inputs.texts}: changed while the benchmark ran. Start it again.")
    return texts


def passages_in(
    tokenizer: Any, name: str, item: BenchText, settings: PassageSettings, most: int | None = None
) -> list[Passage]:
    """The passages of a text; of a whole passage one, cut off after ``most`` tokens and prompted by its first half."""
    encoded = encode(tokenizer, name, item.text)
    if not item.whole:
        return passages_of(encoded, settings)
    ids = encoded.ids[:most]
    length = len(ids)
    if length < 2:
        return []
    span = PassageSpan(request_id=name, prompt_start=0, start=length // 2, end=length)
    return [Passage(span, encoded.prefix + ids, len(encoded.prefix) + length // 2)]


def screen(subject: Subject) -> Screened:
    """Find what the untouched model reproduces, relative to never-seen text."""
    settings = subject.settings
    never = subject.groups.get("unseen") or subject.groups.get("heldout") or []
    scores = score_passages(subject.model, never, subject.pad, subject.max_tokens)
    level = never_seen_level(scores, [], settings.screen)
    above = memorised_above(level, settings.screen)
    requests = {}
    for step, texts in subject.steps.items():
        found = scores_by_text(subject.model, texts, subject.pad, subject.max_tokens)
        requests[step] = {
            name: ScreenedText(
                passages=len(scores),
                memorised=tuple(i for i, s in enumerate(scores) if s.hits > above * s.tokens),
                exact_memorisation=exact_memorisation(scores),
            )
            for name, scores in found.items()
        }
    return Screened(level=level, memorised_above=above, requests=requests)


def put_weights(model: nn.Module, folder: Path, ref: FileRef) -> None:
    """Put kept target weights into a model, one tensor at a time.

    Raises:
        StoreDamaged: They are not what was written.
    """
    with safe_open(checked(folder, ref), framework="pt") as file:
        for name, weight in target_weights(model).items():
            weight.data.copy_(file.get_tensor(name))


def refuse_unmemorised(screened: Screened) -> None:
    """Refuse a benchmark one of whose steps has nothing to forget.

    Raises:
        EvidenceError: With the measurement of every such step.
    """
    nothing = [
        f"{step}: {name} has {found.passages} passages, exact memorisation {found.exact_memorisation:.3f}, "
        f"none above {screened.memorised_above:.3f}"
        for step, texts in screened.requests.items()
        if not any(found.memorised for found in texts.values())
        for name, found in texts.items()
    ]
    if nothing:
        raise EvidenceError(
            "The model does not reproduce these texts, so nothing can be said about forgetting them "
            f"(never-seen text has {screened.level.mean:.3f}). Take them out of the sequence, or train the model on "
            "them first:\n" + "\n".join(nothing)
        )
