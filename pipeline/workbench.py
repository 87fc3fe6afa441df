"""The workbench of a step: parent, texts and anchor together; select the weights, fit, measure strengths, repair.

In: a model, the passages of a step, a never-seen level. Out: a mask, then task vectors with their strengths, in memory.
Never: a run, a store or a file; a takedown run and the benchmark use the same bench.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from torch import nn

from pipeline.anchor import NO_ANCHOR, Anchor
from pipeline.calibrate import Strength, find_strength, retained_mix
from pipeline.errors import UsageError
from pipeline.evaluate import scores_by_text, spread
from pipeline.fit import Fit, Trace
from pipeline.halfway import NOTHING_NOTED, Halfway
from pipeline.methods import METHODS, task_vector
from pipeline.methods.ssu import mismatched
from pipeline.metrics import exact_memorisation, mean_nll, score_passages
from pipeline.models import target_weights
from pipeline.passages import Passage
from pipeline.progress import Counter
from pipeline.records import CurvePoint, NeverSeenLevel
from pipeline.saliency import (
    Saliency,
    WeightedPassages,
    accumulate_gradients,
    everything,
    select,
    select_fraction,
)
from pipeline.settings import Settings
from pipeline.sparse import Mask, SalientWeights, Vector
from pipeline.unlearn import repair

UWC_PASSAGES = 128
"""Retain passages, spread evenly, whose extraction strength UWC's control keeps."""


@dataclass(frozen=True)
class StepTexts:
    """The passages of a step.

    Attributes:
        forget: By request, what this step is held to.
        trained: What the fit works on.
        earlier: By request, what earlier steps took out and must stay out.
        anchor: Retain passages with v0's predictions.
        put_back: Passages of reinstated texts with the predictions of the model that the step starts from.
        held_out: Never-seen passages that strengths are measured on beside retain text.
        on_hold: Requests of ``earlier`` under legal hold: measured and kept as they are, never worked on.
    """

    forget: Mapping[str, Sequence[Passage]]
    trained: Sequence[Passage]
    earlier: Mapping[str, Sequence[Passage]]
    anchor: Anchor = NO_ANCHOR
    put_back: Anchor = NO_ANCHOR
    held_out: Sequence[Passage] = ()
    on_hold: Collection[str] = ()


@dataclass(frozen=True)
class Fitted:
    """A task vector τ, how it was found, and the strength α of its negation: the candidate is θ_p - α·τ."""

    vector: Vector
    trace: Trace
    strength: Strength


def select_weights(model: nn.Module, trained: Sequence[Passage], settings: Settings, pad_id: int) -> Saliency:
    """|∇ L_SSU| in one pass and the settings' rule on it; for a method that is not SSU's family, of L_fgt alone."""
    unlearn, weights = settings.unlearn, target_weights(model)
    if not unlearn.masked:
        return everything(weights)
    terms = [WeightedPassages(trained, 1.0)]
    if unlearn.random_label_weight:
        drawn = random.Random(f"{settings.runtime.seed} saliency")
        pairs = mismatched(trained, unlearn.random_labels_per_prompt, drawn)
        terms.append(WeightedPassages(pairs, unlearn.random_label_weight))
    count = Counter("saliency", sum(len(t.passages) for t in terms))
    gradients = accumulate_gradients(model, weights, terms, pad_id, settings.runtime.batch_tokens, count.add)
    if unlearn.saliency_fraction is not None:
        return select_fraction(gradients, unlearn.saliency_fraction)
    return select(gradients, unlearn.saliency_k)


class Workbench:
    """What the step starts from with its salient coordinates, and everything a fit or a calibration needs.

    Args:
        model: What the step starts from; its weights are displaced and put back.
        mask: Which coordinates may change.
        texts: The passages of the step.
        level: Exact memorisation of never-seen text.
        settings: The resolved settings.
        pad_id: Padding id.
        progress: As in `Fit`.
        halfway: As in `Fit`.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask,
        texts: StepTexts,
        level: NeverSeenLevel,
        settings: Settings,
        pad_id: int,
        progress: Callable[[int, int, float], None] = lambda iteration, of, loss: None,
        halfway: Halfway = NOTHING_NOTED,
    ) -> None:
        out = [p for found in (texts.forget, texts.earlier) for passages in found.values() for p in passages]
        texts = replace(texts, anchor=texts.anchor.apart_from(out))
        self.model, self.mask, self.texts, self.settings = model, mask, texts, settings
        self.salient = SalientWeights(target_weights(model), mask)
        self.target = level.mean + settings.calibrate.margin
        # What is worked on again is among both: what is pushed down must not be held where it is by the same fit.
        trained = set(texts.trained)
        self.fit = Fit(
            model, self.salient, texts.trained, texts.anchor, settings.unlearn, pad_id,
            settings.runtime.batch_tokens, settings.runtime.seed, progress, texts.put_back, self.target,
            [p for found in texts.earlier.values() for p in found if p not in trained], self.remaining,
            texts.on_hold, level.nll, halfway,
        )  # fmt: skip
        # What the strength must spare, in equal parts. Held-out text alone would not notice that a text the model
        # knows by heart, and is to keep, is lost.
        self.utility = [
            passage
            for found in (texts.held_out, texts.anchor.passages, texts.put_back.passages)
            for passage in spread(found, settings.unlearn.anchor_passages)
        ]

    @property
    def has_repair(self) -> bool:
        """Whether a repair can follow: it is on, UWC has not set the strength, and there is retain text."""
        unlearn = self.settings.unlearn
        wanted = unlearn.repair_iterations and unlearn.anchor_weight and self.settings.calibrate.control == "target"
        return bool(wanted and self.texts.anchor.passages)

    def worst(self, passages: Mapping[str, Sequence[Passage]]) -> float:
        """Largest exact memorisation of a request, on the model as it stands."""
        scores = scores_by_text(self.model, passages, self.fit.pad_id, self.fit.max_tokens)
        return max(map(exact_memorisation, scores.values()), default=0.0)

    def remaining(self) -> list[Passage]:
        """Passages of the requests, of this and of earlier steps, above the target on the model as it stands; without
        earlier ones on hold."""
        earlier = {name: found for name, found in self.texts.earlier.items() if name not in self.texts.on_hold}
        texts = {**self.texts.forget, **earlier}
        scores = scores_by_text(self.model, texts, self.fit.pad_id, self.fit.max_tokens)
        return [p for name, found in texts.items() if exact_memorisation(scores[name]) > self.target for p in found]

    def measure(self, alpha: float, vector: Vector, with_earlier: bool) -> CurvePoint:
        """One point of the curve of θ_p - α·vector."""
        self.salient.displace(vector, -alpha)
        scores = score_passages(self.model, self.utility, self.fit.pad_id, self.fit.max_tokens)
        return CurvePoint(
            alpha=alpha,
            forget=self.worst(self.texts.forget),
            earlier=self.worst(self.texts.earlier) if with_earlier and self.texts.earlier else None,
            utility_nll=mean_nll(scores) if scores else None,
        )

    def fitted(self) -> Fitted:
        """Fit the task vector by the method of the settings, and find the strength of its negation."""
        limits = self.settings
        vector, trace = task_vector(self.fit, self.mask)
        # Without a repair to follow, negation alone must reach the target; past the gate's limit it would be refused.
        max_rise = limits.calibrate.max_utility_rise if self.has_repair else math.log1p(limits.gate.perplexity_rise)
        # Past 1 a negated vector may still forget; a model that was unlearned directly is only mixed with its parent.
        most = limits.calibrate.max_alpha if METHODS[limits.unlearn.method].negated else 1.0
        if limits.calibrate.control == "uwc":
            return Fitted(vector, trace, self._mixed(vector))
        final, stops = not self.has_repair, METHODS[limits.unlearn.method].stops
        found = self._strength(vector, most, max_rise, final, limits.calibrate.fixed_alpha, stops)
        return Fitted(vector, trace, found)

    def repaired(self, vector: Vector, alpha: float) -> Fitted:
        """Mend what negation broke, then find the smallest share of the whole displacement that still forgets."""
        start = {name: -alpha * value for name, value in vector.items()}
        displacement, trace = repair(self.fit, start, self.remaining)
        # A task vector, to be negated like any other: θ_p - α·(-d).
        mended = {name: -value for name, value in displacement.items()}
        return Fitted(mended, trace, self._strength(mended, 1.0, None, True))

    def _mixed(self, vector: Vector) -> Strength:
        """UWC's strength, with what it forgets measured where it ends."""
        retain = spread(self.texts.anchor.passages, UWC_PASSAGES)
        if not retain:
            raise UsageError(
                "calibrate.control = uwc: needs retain text, and there is none. Put texts into reference/retain, or "
                "leave the setting out."
            )

        def extraction(share: float) -> float:
            self.salient.displace(vector, -share)
            return fmean(s.extraction for s in score_passages(self.model, retain, self.fit.pad_id, self.fit.max_tokens))

        with self.salient:
            points = tuple(self.measure(share, vector, True) for share in sorted({0.0, retained_mix(extraction)}))
        return Strength(points[-1], points[-1].forgets(self.target), False, points)

    def _strength(
        self,
        vector: Vector,
        max_alpha: float,
        max_rise: float | None,
        final: bool,
        fixed: float | None = None,
        whole: bool = False,
    ) -> Strength:
        """Find the strength of a vector; a final one must hold for earlier requests, too."""
        with self.salient:
            return find_strength(
                lambda alpha: self.measure(alpha, vector, final), self.target, max_alpha,
                self.settings.calibrate.bisections, max_rise, fixed=fixed, whole=whole,
            )  # fmt: skip
