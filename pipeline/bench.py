"""The workbench of a fit: parent, salient coordinates, passages and anchor together, and the measuring of strengths.

In: a run whose mask is known. Out: points of the curve α → (forget, utility), and calibrated vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.anchor import NO_ANCHOR, build_anchor, load_anchor
from pipeline.calibrate import find_strength
from pipeline.context import (
    earlier_spans,
    flatten,
    forget_spans,
    passages_at,
    reference,
    reference_passages,
    reinstated_spans,
    scores_of,
    start_model,
    trained_spans,
)
from pipeline.evaluate import spread
from pipeline.fit import Fit, Trace
from pipeline.metrics import PassageScore, exact_memorisation, mean_nll, score_passages
from pipeline.models import target_weights
from pipeline.passages import Passage, pad_id
from pipeline.progress import Counter
from pipeline.records import (
    Calibration,
    CurvePoint,
    DedupeReport,
    MaskReport,
    Step,
    VectorReport,
)
from pipeline.references import read_texts
from pipeline.runs import Run
from pipeline.sparse import SalientWeights, Vector, load_mask, norm, save_vector
from pipeline.vault import open_vault


class Bench:
    """What the step starts from with its salient coordinates, and everything a fit or a calibration needs."""

    def __init__(self, run: Run, stage: str, iterations: int) -> None:
        self.run, self.settings = run, run.settings
        self.model, self.tokenizer = start_model(run)
        self.mask = load_mask(run.folder, run.finished("saliency", MaskReport).mask)
        vault = open_vault(run.workspace)
        self.forget = passages_at(self.tokenizer, vault, forget_spans(run))
        self.earlier = passages_at(self.tokenizer, vault, earlier_spans(run))
        trained = [p for name in trained_spans(run) for p in self.forget[name]]
        found = reference(str(run.workspace.root), run.run_id)
        self.level = found.level
        self.anchor = NO_ANCHOR
        if found.anchor is not None:
            excluded = {e.document.removeprefix("retain/")
                        for e in run.finished("dedupe", DedupeReport).retain_excluded}  # fmt: skip
            self.anchor = load_anchor(run.workspace.root / found.folder, found.anchor).without(excluded)
        back = flatten(passages_at(self.tokenizer, vault, reinstated_spans(run)))
        tokens = self.settings.runtime.batch_tokens
        self.put_back = build_anchor(
            self.model, [Passage(p.span, p.ids, 1) for p in back], self.settings.unlearn.anchor_top_k,
            pad_id(self.tokenizer), tokens,
        )  # fmt: skip
        self.salient = SalientWeights(target_weights(self.model), self.mask)
        count = Counter(stage, iterations)
        self.fit = Fit(
            self.model, self.salient, trained, self.anchor, self.settings.unlearn, pad_id(self.tokenizer),
            tokens, self.settings.runtime.seed, lambda iteration, loss: count.add(note=f"loss {loss:.3f}"),
            self.put_back,
        )  # fmt: skip
        self._utility: list[Passage] | None = None

    @property
    def target(self) -> float:
        return self.level.mean + self.settings.calibrate.margin

    def measure(self, alpha: float, vector: Vector, with_earlier: bool) -> CurvePoint:
        """One point of the curve of θ_p - α·vector."""
        self.salient.displace(vector, -alpha)
        utility = self.utility_passages()
        return CurvePoint(
            alpha=alpha,
            forget=self.worst(self.forget),
            earlier=self.worst(self.earlier) if with_earlier and self.earlier else None,
            utility_nll=mean_nll(self.scored(utility)) if utility else None,
        )

    def scored(self, passages: Sequence[Passage]) -> list[PassageScore]:
        """Scores on the model as it stands."""
        return score_passages(self.model, passages, self.fit.pad_id, self.fit.max_tokens)

    def worst(self, passages: Mapping[str, Sequence[Passage]]) -> float:
        """Largest exact memorisation of a request, on the model as it stands."""
        scores = scores_of(self.model, self.tokenizer, passages, self.settings)
        return max(map(exact_memorisation, scores.values()), default=0.0)

    def remaining(self) -> list[Passage]:
        """Passages of the requests, of this and of earlier steps, above the target on the model as it stands."""
        texts = {**self.forget, **self.earlier}
        scores = scores_of(self.model, self.tokenizer, texts, self.settings)
        return flatten({name: p for name, p in texts.items() if exact_memorisation(scores[name]) > self.target})

    def utility_passages(self) -> list[Passage]:
        """What the strength must spare: held-out and retain passages, and those put back, in equal parts.

        Held-out text alone would not notice that a text the model knows by heart, and is to keep, is lost.
        """
        if self._utility is None:
            held = reference_passages(
                self.tokenizer, read_texts(self.run.workspace, "heldout"), "heldout", self.settings
            )
            count = self.settings.unlearn.anchor_passages
            self._utility = [
                passage
                for found in (flatten(held), self.anchor.passages, self.put_back.passages)
                for passage in spread(found, count)
            ]
        return self._utility

    def calibrated(
        self, vector: Vector, trace: Trace, name: str, max_alpha: float, max_rise: float | None, final: bool
    ) -> Step:
        """Find the strength of a vector, and keep both; a final strength must hold for earlier requests, too."""
        limits = self.settings.calibrate
        ref = save_vector(self.run.folder / f"{name}.safetensors", vector)
        with self.salient:
            found = find_strength(
                lambda alpha: self.measure(alpha, vector, final), self.target, max_alpha, limits.bisections,
                max_rise, fixed=limits.fixed_alpha if name == "vector" else None,
            )  # fmt: skip
        return Step(
            vector=VectorReport(vector=ref, norm=norm(vector), losses=tuple(trace.losses), tokens=trace.tokens),
            calibration=Calibration(
                vector=ref,
                alpha=found.point.alpha,
                target=self.target,
                reached=found.reached,
                bounded_by_utility=found.bounded_by_utility,
                curve=found.curve,
            ),
        )


def has_repair(bench: Bench) -> bool:
    """Whether a repair can follow: it is on, and there is retain text to mend towards."""
    unlearn = bench.settings.unlearn
    return bool(unlearn.repair_iterations and unlearn.anchor_weight and bench.anchor.passages)
