"""Forget down to what the model says from the last few words alone.

A model that never saw a text still predicts some of its words: those that the words just before them suggest. What it
would give them is read off the parent itself, by showing it each token behind only the last few true ones and an
unrelated beginning, where it cannot recognise the passage:

    q_t = mean over beginnings z of p_parent(y_t | z, y_{t-c} … y_{t-1})
    L = mean over t of [ logit p_θ(y_t | x, y_<t) - logit q_t ]_+  +  λ·KL(v0 ‖ θ) on retain text

The hinge on log-odds pushes every token with the same force, however well it is memorised (the gradient of log p fades
as p nears 1, that of 1 - p as p nears 0), and lets go of it at the level of never-seen text: a stop per token, so that
nothing is forgotten below that level and the leftover trace of having been trained on fades with it. Of the passages of
earlier takedowns, those that have risen are pushed like new ones, and some others are held, by the same KL, to what the
parent says of them: neither may a later step bring them back, nor push them below never-seen text, where their absence
would tell that they were there.

Ours; the parts have forerunners: unlikelihood (Welleck et al., arXiv 1908.04319) has the soft stop, ALKN (ICML 2025)
leaves forgotten tokens alone, and comparing a long with a short context is how memorisation is measured (counterfactual
and contextual memorisation). Soft labels in the place of SSU's random ones; no negation.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from pipeline.anchor import Anchor, build_anchor
from pipeline.fit import Backward, Fit, Trace
from pipeline.losses import Predictions, log_odds, predict, token_nll
from pipeline.methods.method import Method
from pipeline.metrics import PassageScore, exact_memorisation, score_passages
from pipeline.passages import Passage, batches
from pipeline.terms import backward_kl, backward_sum, device_of

BEGINNING = 16
"""Tokens of unrelated text before the window: enough to be in the middle of a text, too few to matter more."""
BEGINNINGS = 4
"""Unrelated beginnings that each token is seen behind; their mean smooths what one of them happens to suggest."""
STRIDE = 4
"""Tokens scored in one window: the first with c true tokens before it, the last with 3 more, at a quarter of the
cost of a window for each."""

DEEPER = 1.0
"""Nats of log-odds by which a ceiling sinks."""

Ceilings = Mapping[Passage, torch.Tensor]
"""Passage → (P,) float32 log-odds of each token of its continuation."""


def windows(passage: Passage, context: int, before: Sequence[int]) -> list[Passage]:
    """The continuation in pieces of `STRIDE` tokens, each behind a beginning and the last ``context`` true tokens."""
    pieces = []
    for start in range(passage.prompt_length, len(passage.ids), STRIDE):
        shown = passage.ids[max(0, start - context) : start]
        ids = (*before, *shown, *passage.ids[start : start + STRIDE])
        pieces.append(Passage(passage.span, ids, len(before) + len(shown)))
    return pieces


def beginning(fit: Fit, random_: random.Random) -> Sequence[int]:
    """A piece of retain text, drawn anew at each call; nothing where there is none."""
    pool = [p.ids for p in fit.anchor.passages if len(p.ids) > BEGINNING]
    if not pool:
        return ()
    other = random_.choice(pool)
    start = random_.randrange(len(other) - BEGINNING)
    return other[start : start + BEGINNING]


def context_lengths(fit: Fit, passages: Sequence[Passage], random_: random.Random) -> dict[str, int]:
    """By request the longest context, up to the settings', from which the model recites no more of it than the target;
    at least 1.

    A short text in a small vocabulary is recognised from fewer tokens than a novel.
    """
    found: dict[str, int] = {}
    for context in range(fit.settings.context_tokens, 1, -1):
        pieces = [
            piece
            for passage in passages
            if passage.span.request_id not in found
            for piece in windows(passage, context, beginning(fit, random_))
        ]
        scores: dict[str, list[PassageScore]] = {}
        for piece, score in zip(pieces, score_passages(fit.model, pieces, fit.pad_id, fit.max_tokens), strict=True):
            scores.setdefault(piece.span.request_id, []).append(score)
        found |= {name: context for name, of in scores.items() if exact_memorisation(of) <= fit.target}
    return {passage.span.request_id: found.get(passage.span.request_id, 1) for passage in passages}


def ceilings(
    fit: Fit, passages: Sequence[Passage], contexts: Mapping[str, int], random_: random.Random
) -> dict[Passage, torch.Tensor]:
    """logit q_t of every continuation token, under the model as it stands.

    Args:
        fit: The model, and retain text that beginnings are drawn from.
        passages: Whose tokens.
        contexts: By request, true tokens before the first of a window.
        random_: Draws the beginnings.
    """
    device, total = device_of(fit), {p: torch.zeros(len(p.continuation), dtype=torch.float64) for p in passages}
    for _ in range(BEGINNINGS):
        pieces, owners = [], []
        for passage in total:
            cut = windows(passage, contexts[passage.span.request_id], beginning(fit, random_))
            owners += [(passage, i * STRIDE) for i in range(len(cut))]
            pieces += cut
        with torch.inference_mode():
            for batch in batches(pieces, fit.max_tokens, fit.pad_id, device):
                predictions = predict(fit.model, batch)
                probability = torch.exp(-token_nll(predictions)).double().cpu()
                scored = predictions.scored.cpu()
                for row, index in enumerate(batch.rows):
                    passage, at = owners[index]
                    found = probability[row][scored[row]]
                    total[passage][at : at + len(found)] += found
    return {p: torch.logit(q / BEGINNINGS, eps=1e-12).float() for p, q in total.items()}


def risen(fit: Fit, passages: Sequence[Passage]) -> tuple[list[Passage], list[Passage]]:
    """Passages of earlier takedowns that the parent recites above the target, and the others."""
    scores = score_passages(fit.model, passages, fit.pad_id, fit.max_tokens)
    up = {p for p, score in zip(passages, scores, strict=True) if exact_memorisation([score]) > fit.target}
    return [p for p in passages if p in up], [p for p in passages if p not in up]


def backward_excess(fit: Fit, passages: Sequence[Passage], known: Ceilings, trace: Trace) -> float:
    """Mean over tokens of how far their log-odds are above their ceiling.

    A ceiling is not always enough: where several tokens share what is left, the true one may still be the likeliest. It
    sinks with each round at the end of which the request was above the target.
    """
    tokens = sum(len(p.continuation) for p in passages)

    def share_of(predictions: Predictions, rows: Sequence[int]) -> torch.Tensor:
        logits, true, scored = predictions
        ceiling = torch.cat([known[passages[i]] - DEEPER * trace.left[passages[i]] for i in rows]).to(logits.device)
        return (log_odds(logits[scored], true[scored]) - ceiling).clamp_min(0).sum() / tokens

    return backward_sum(fit, passages, share_of, trace)


def backward_held(fit: Fit, recited: Anchor, other: Anchor, out: Anchor, random_: random.Random, trace: Trace) -> float:
    """λ · KL(v0 ‖ θ) on some passages that v0 recites, some others, and, against the parent, some that are out already
    and some of texts that are put back.

    Drawn apart, because unlearning one memorised text first loses others that are memorised, which ordinary text does
    not show.
    """
    settings = fit.settings
    part = recited.sample(settings.recited_passages, random_)
    for pool in (other, out, fit.put_back):
        part = part.joined(pool.sample(settings.anchor_passages, random_))
    return backward_kl(fit, part, trace)


def prepare(fit: Fit) -> Backward:
    """Mean excess of this step's tokens, and of earlier ones that have risen, + λ·KL to what is to stay as it is.

    Where there is no retain text and the model recites nothing else, nothing is held to.
    """
    drawn = random.Random(f"{fit.seed} short context")
    settings = fit.settings
    # A draw bounds the cost of a long history; what rises among the others is seen by the evaluation and the gate.
    replayed = drawn.sample(fit.earlier, min(settings.replay_pool, len(fit.earlier)))
    up, low = risen(fit, replayed)
    pushed = [*fit.forget, *up]
    known = ceilings(fit, pushed, context_lengths(fit, pushed, drawn), drawn)
    recited, other = fit.anchor.split()
    out = build_anchor(fit.model, low, settings.anchor_top_k, fit.pad_id, fit.max_tokens)

    def backward(passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
        loss = backward_excess(fit, passages, known, trace)
        again = random_.sample(up, min(len(passages), len(up)))
        if again:
            loss += backward_excess(fit, again, known, trace)
        return loss + backward_held(fit, recited, other, out, random_, trace)

    return backward


SHORT_CONTEXT = Method("short-context", "Short context (ours)", "pipeline/methods/short_context.py", prepare)
