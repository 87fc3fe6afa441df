"""The gate: a pure function from measurements and limits to a verdict with every reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline.records import Comparison, Evaluation, TextScore, Verdict
from pipeline.settings import GateSettings

ROUNDING = 1e-9
"""Slack for sums of float64; a limit met exactly is met."""


def above_limit(evaluation: Evaluation, item: Comparison, limits: GateSettings) -> bool:
    """Whether a candidate reproduces a text that is to be out more than the limits allow."""
    return item.after.exact_memorisation > evaluation.level.mean + limits.forget_tolerance + ROUNDING


def decide(
    evaluation: Evaluation,
    original: Mapping[str, TextScore],
    limits: GateSettings,
    erased: Sequence[str] = (),
    idle: bool = False,
) -> Verdict:
    """Decide whether a candidate may become the current version.

    Args:
        evaluation: What was measured on parent and candidate.
        original: Scores of v0 on the kept and held-out texts, by name: losses are counted from the untouched
            model, so that many small ones cannot add up unseen. And scores of texts to be put back, from before they
            were taken out.
        limits: The limits, fixed before the run.
        erased: Earlier requests whose text is gone.
        idle: Whether the step was to forget something, and left every weight as it was.

    Returns:
        Accepted only if no limit is broken; otherwise one sentence for each.
    """
    reasons = []
    if idle:
        reasons.append(
            "The step left every weight as it was: what it was to take out is called memorised and is below the target "
            "at once. Lower calibrate.margin or raise screen.sigma."
        )
    ceiling = evaluation.level.mean + limits.forget_tolerance
    for item in evaluation.of("this", "earlier", "repeat", "folded"):
        if above_limit(evaluation, item, limits):
            reasons.append(
                f"{item.name} ({item.role}): exact memorisation {item.after.exact_memorisation:.3f} is above "
                f"{ceiling:.3f} "
                f"(never-seen level {evaluation.level.mean:.3f} + {limits.forget_tolerance})."
            )
    for item in evaluation.of("reinstated"):
        found, level = item.after.exact_memorisation, evaluation.level.mean
        earlier = original.get(item.name)
        # What has no measurement of its own, such as a repeat, must at least be above the limit of what is out.
        floor = level + limits.reinstated_share * (earlier.exact_memorisation - level) if earlier else ceiling
        if found < floor - ROUNDING:
            reasons.append(
                f"{item.name} (reinstated): exact memorisation {found:.3f} is below {floor:.3f}, so the text did not "
                "come back. Another request that stands may hold the same text."
            )
    kept = evaluation.of("kept")
    if kept:
        before = sum(original[k.name].exact_memorisation for k in kept) / len(kept)
        after = sum(k.after.exact_memorisation for k in kept) / len(kept)
        if after < limits.kept_share * before - ROUNDING:
            reasons.append(
                f"Kept works: exact memorisation {after:.3f} is below {limits.kept_share:.0%} of v0's {before:.3f}."
            )
    held = evaluation.of("held-out")
    if held:
        rise = sum(h.after.nll - original[h.name].nll for h in held) / len(held)
        growth = math.exp(min(rise, 50.0))  # bounded: a wrecked model must be refused, not overflow
        if growth > 1 + limits.perplexity_rise + ROUNDING:
            reasons.append(
                f"Held-out text: perplexity rose by {growth - 1:.1%} over v0, more than {limits.perplexity_rise:.0%}."
            )
    if not evaluation.of("this", "repeat", "folded", "reinstated"):
        reasons.append("Nothing was unlearned or put back: no request of this step is in the evaluation.")
    measured = {comparison.name for comparison in evaluation.comparisons}
    unchecked = [
        f"{name} (earlier): its text was erased, so nobody can measure whether it is still out."
        for name in erased
        if name not in measured
    ]
    if not kept:
        unchecked.append(
            "Works to be kept: none were given at init (--kept), or all have been taken down; no loss was measured."
        )
    if not held:
        unchecked.append("Held-out text: none was given at init (--heldout), so damage to other text was not measured.")
    return Verdict(accepted=not reasons, reasons=tuple(reasons), unchecked=tuple(unchecked))
