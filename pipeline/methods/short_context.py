"""Forget down to what the model says from the last few words alone.

A model that never saw a text still predicts some of its words: those that the words just before them suggest. What it
would give them is read off the parent itself, by showing it each token behind only the last few true ones and an
unrelated beginning, where it cannot recognise the passage; and, as a text known by heart is known a little even from
few words, raised to the power that makes it as unlikely as never-seen text is on the whole:

    q_t = mean over beginnings z of p_parent(y_t | z, y_{t-c} … y_{t-1})
    κ = NLL of never-seen text / mean over t of -log q_t,  within [1, MOST]
    d_t = logit p_θ(y_t | x, y_<t) - logit q_t^κ
    L = mean over t of [d_t]_+ + w·[-d_t]_+  +  λ·(KL(v0 ‖ θ) + ε·CE(θ)) on retain text
    w = RAISED while the passage's mean d_t is above 0, else 1

Log-odds, so that every token is pushed with the same force, however well it is memorised (the gradient of log p fades
as p nears 1, that of 1 - p as p nears 0), and each to a place of its own: what has sunk below the level of never-seen
text is pulled back, since a text that is too unlikely tells that it was taken out, too. A power rather than a factor,
so that what is unlikely anyway becomes more so, as in never-seen text: there the least likely tokens are what
membership attacks look at (Min-K%, Shi et al., arXiv 2310.16789).

The cross-entropy CE of what retain text really says is there because with KL alone the drift that is left counts
against it, a little more with each step. Both together are least at the mixture (v0 + ε·truth) / (1 + ε): with ε = .1
nothing is learned by heart from it, however many steps there are.

Requests of earlier takedowns that are above the target, or come to be while this one is worked on, are pushed like new
ones. Of the others some passages are held in the same way to what the parent gives their tokens, raised to the power
that makes them as unlikely as never-seen text again: neither may a later step bring them back, and what is left of that
the next one takes back, nor push them further down. (KL to the parent hardly weighs unlikely tokens, and in
text that is out the true ones are unlikely: held by it they rose by .2 nats a step.)

Ours; the parts have forerunners: unlikelihood (Welleck et al., arXiv 1908.04319) has the soft stop, ALKN (ICML 2025)
leaves forgotten tokens alone, and comparing a long with a short context is how memorisation is measured (counterfactual
and contextual memorisation). Soft labels in the place of SSU's random ones; no negation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F

from pipeline.anchor import Anchor
from pipeline.fit import REACHED, Fit, Trace
from pipeline.halfway import Numbers, random_state, set_random_state
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

MOST = 2.0
"""Largest κ: where a text is known from so little that it would need more, it is the context that is at fault."""
DEEPER = 1.0
"""Nats of log-odds by which the ceilings of tokens sink that are at theirs and still the likeliest."""
RAISED = 0.25
"""Weight of what is below the level, against what is above, while the passage is above on the mean: with as much a fit
ends half-way. As soon as its mean is below, both count alike: with a quarter for ever four tokens in five end below,
and the passage is less likely than any that was never seen."""

Ceilings = Mapping[Passage, torch.Tensor]
"""Passage → (P,) float32: the log-odds that are wanted of each token of its continuation."""


def windows(passage: Passage, context: int, before: Sequence[int], places: int | None = None) -> list[Passage]:
    """The continuation in pieces of `STRIDE` tokens, each behind a beginning and the last ``context`` true tokens.

    Args:
        passage: Its continuation is cut; what the tokenizer put in front of its prompt is shown before the beginning.
        context: Most true tokens shown before a piece.
        before: The beginning.
        places: Tokens that the model has positions for, where there is a limit; the beginning is cut first.
    """
    prefix = max(0, passage.prompt_length - (passage.span.start - passage.span.prompt_start))
    front, pieces = passage.ids[:prefix], []
    for start in range(passage.prompt_length, len(passage.ids), STRIDE):
        piece = passage.ids[start : start + STRIDE]
        shown = [*before, *passage.ids[max(prefix, start - context) : start]]
        if places is not None:
            shown = shown[max(0, len(shown) + len(front) + len(piece) - places) :]
        pieces.append(Passage(passage.span, (*front, *shown, *piece), len(front) + len(shown)))
    return pieces


def cut(fit: Fit, passage: Passage, context: int, random_: random.Random) -> list[Passage]:
    """Windows that the model of a fit has positions for, behind a beginning of their own."""
    places = getattr(getattr(fit.model, "config", None), "max_position_embeddings", None)
    return windows(passage, context, beginning(fit, random_), places)


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
            for piece in cut(fit, passage, context, random_)
        ]
        scores: dict[str, list[PassageScore]] = {}
        for piece, score in zip(pieces, score_passages(fit.model, pieces, fit.pad_id, fit.max_tokens), strict=True):
            scores.setdefault(piece.span.request_id, []).append(score)
        found |= {name: context for name, of in scores.items() if exact_memorisation(of) <= fit.target}
    return {passage.span.request_id: found.get(passage.span.request_id, 1) for passage in passages}


def short_context(
    fit: Fit, passages: Sequence[Passage], contexts: Mapping[str, int], random_: random.Random
) -> dict[Passage, torch.Tensor]:
    """log q_t of every continuation token, (P,) float64 each, under the model as it stands.

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
            found = cut(fit, passage, contexts[passage.span.request_id], random_)
            owners += [(passage, i * STRIDE) for i in range(len(found))]
            pieces += found
        with torch.inference_mode():
            for batch in batches(pieces, fit.max_tokens, fit.pad_id, device):
                predictions = predict(fit.model, batch)
                probability = torch.exp(-token_nll(predictions)).double().cpu()
                scored = predictions.scored.cpu()
                for row, index in enumerate(batch.rows):
                    passage, at = owners[index]
                    likely = probability[row][scored[row]]
                    total[passage][at : at + len(likely)] += likely
    return {p: torch.log((q / BEGINNINGS).clamp_min(1e-12)) for p, q in total.items()}


def power(found: Mapping[Passage, torch.Tensor], never_seen: float | None) -> float:
    """κ: what all log q_t are multiplied with, so that their mean is that of never-seen text.

    One for all passages, so that what is easier to guess stays easier.
    """
    tokens = torch.cat([*found.values()]) if found else torch.zeros(0)
    nll = -float(tokens.mean()) if len(tokens) else 0.0
    return min(MOST, max(1.0, never_seen / nll)) if never_seen and nll else 1.0


def ceilings(fit: Fit, passages: Sequence[Passage], random_: random.Random) -> dict[Passage, torch.Tensor]:
    """logit q_t^κ of every continuation token, under the model as it stands; see `Ceilings`."""
    found = short_context(fit, passages, context_lengths(fit, passages, random_), random_)
    kappa = power(found, fit.never_seen_nll)
    return {p: logit_of(kappa * log_q) for p, log_q in found.items()}


def logit_of(log_q: torch.Tensor) -> torch.Tensor:
    """Log-odds of log-probabilities, float32 of float64; of nearly 1 those of 1 - 1e-12."""
    log_q = log_q.clamp_max(math.log1p(-1e-12))
    return (log_q - torch.log(-torch.expm1(log_q))).float()


def risen(fit: Fit, passages: Sequence[Passage]) -> tuple[list[Passage], list[Passage]]:
    """Passages of earlier requests that the model recites above the target, and those of the others.

    By request, as the target is meant: single passages of never-seen text scatter widely about their mean.
    """
    scores: dict[str, list[PassageScore]] = {}
    for p, score in zip(passages, score_passages(fit.model, passages, fit.pad_id, fit.max_tokens), strict=True):
        scores.setdefault(p.span.request_id, []).append(score)
    up = {name for name, found in scores.items() if exact_memorisation(found) > fit.target} - set(fit.on_hold)
    return [p for p in passages if p.span.request_id in up], [p for p in passages if p.span.request_id not in up]


def drawn_evenly(passages: Sequence[Passage], count: int, random_: random.Random) -> list[Passage]:
    """So many passages, from as many requests as there are: one of each in random order, then a second of each."""
    of: dict[str, list[Passage]] = {}
    for passage in random_.sample(passages, len(passages)):
        of.setdefault(passage.span.request_id, []).append(passage)
    rows = [p for row in zip_longest(*of.values()) for p in row if p is not None]
    return rows[:count]


def gaps(
    predictions: Predictions, rows: Sequence[int], of: Sequence[Passage], known: Ceilings
) -> tuple[torch.Tensor, ...]:
    """How far the log-odds of each passage's tokens are above what is wanted, in nats, (P,) float32 for each row."""
    logits, true, scored = predictions
    wanted = [known[of[i]] for i in rows]
    found = log_odds(logits[scored], true[scored]) - torch.cat(wanted).to(logits.device)
    return torch.split(found, [len(w) for w in wanted])


def backward_gap(fit: Fit, passages: Sequence[Passage], known: Ceilings, trace: Trace, held: bool = False) -> float:
    """Mean over tokens of how far their log-odds are above what is wanted, + how far below, times `RAISED` in a passage
    that is above on the mean.

    Args:
        fit: The model, and how it is batched.
        passages: Whose tokens.
        known: What is wanted of them, see `Ceilings`.
        trace: Learns how far the passages are above, in nats a token.
        held: They are to stay, not to sink: in a passage that is below on the mean it is what is above that counts
            `RAISED` times. So the mean is brought back by a constant force, however small its drift.
    """
    tokens, trace.above = sum(len(p.continuation) for p in passages), 0.0

    def share_of(predictions: Predictions, rows: Sequence[int]) -> torch.Tensor:
        losses = []
        for gap in gaps(predictions, rows, passages, known):
            total = float(gap.detach().sum())
            trace.above += max(0.0, total) / tokens
            above, below = (RAISED if held else 1.0, 1.0) if total < 0 else (1.0, RAISED)
            # ReLU, whose gradient at 0 is 0, where a clamp has 1: what is held begins there.
            losses.append(above * F.relu(gap).sum() + below * F.relu(-gap).sum())
        return torch.stack(losses).sum() / tokens

    return backward_sum(fit, passages, share_of, trace)


def still_said(fit: Fit, passages: Sequence[Passage], known: Ceilings) -> dict[Passage, torch.Tensor]:
    """Which tokens are the likeliest still, (P,) bool, of those passages that are on the mean where they are wanted."""
    found = {}
    with torch.inference_mode():
        for batch in batches(passages, fit.max_tokens, fit.pad_id, device_of(fit)):
            predictions = predict(fit.model, batch)
            parts = gaps(predictions, batch.rows, passages, known)
            for row, (index, gap) in enumerate(zip(batch.rows, parts, strict=True)):
                if gap.mean() <= REACHED:
                    scored = predictions.scored[row]
                    said = predictions.logits[row][scored].argmax(-1) == predictions.targets[row][scored]
                    found[passages[index]] = said.cpu()
    return found


def held_levels(fit: Fit, passages: Sequence[Passage]) -> dict[Passage, torch.Tensor]:
    """What is wanted of passages that are out already: the log-odds that the model as it stands gives their tokens, as
    unlikely as never-seen text; on hold, just those log-odds."""
    found = log_odds_of(fit, passages)
    free = {p: F.logsigmoid(odds.double()) for p, odds in found.items() if p.span.request_id not in fit.on_hold}
    kappa = power(free, fit.never_seen_nll)
    # To the first power nothing is computed anew: what is to stay starts at exactly what is wanted of it.
    return found | {p: logit_of(kappa * log_p) for p, log_p in free.items()} if kappa > 1 else found


def log_odds_of(fit: Fit, passages: Sequence[Passage]) -> dict[Passage, torch.Tensor]:
    """Log-odds of every continuation token, (P,) float32 each, under the model as it stands."""
    found = {}
    with torch.inference_mode():
        for batch in batches(passages, fit.max_tokens, fit.pad_id, device_of(fit)):
            logits, true, scored = predict(fit.model, batch)
            for row, index in enumerate(batch.rows):
                found[passages[index]] = log_odds(logits[row][scored[row]], true[row][scored[row]]).cpu()
    return found


def backward_held(fit: Fit, recited: Anchor, other: Anchor, random_: random.Random, trace: Trace) -> float:
    """λ·(KL(v0 ‖ θ) + ε·CE) on some passages that v0 recites, some others, and, against the parent, some of texts that
    are put back.

    Drawn apart, because unlearning one memorised text first loses others that are memorised, which ordinary text does
    not show.
    """
    settings = fit.settings
    part = recited.sample(settings.recited_passages, random_)
    for pool in (other, fit.put_back):
        part = part.joined(pool.sample(settings.anchor_passages, random_))
    return backward_kl(fit, part, trace)


class ShortContext:
    """L of this step's tokens and of earlier ones above the target, of others that they stay, + λ·KL to what is kept.

    Where there is no retain text and the model recites nothing else, nothing is held to.

    Attributes:
        known: What is pushed down, and how far: this step's passages, and earlier ones that are above the target.
        again: Those earlier ones.
        sunk: How often the ceiling of each token of those known from the start has sunk.
        out: Requests of earlier takedowns.
    """

    def __init__(self, fit: Fit) -> None:
        # The step's own requests are in the seed, so that each step holds out others of the earlier ones.
        step = " ".join(sorted({p.span.request_id for p in fit.forget}))
        self.fit, self.round, self.drawn = fit, 1, random.Random(f"{fit.seed} short context {step}")
        up, low = risen(fit, fit.earlier)
        self.again = up
        self.known = {**ceilings(fit, fit.forget, self.drawn), **ceilings(fit, up, self.drawn)}
        self.sunk = {p: torch.zeros(len(wanted), dtype=torch.int64) for p, wanted in self.known.items()}
        self.out = {p.span.request_id for p in fit.earlier}
        self.recited, self.other = fit.anchor.split()
        # A draw bounds the cost of a long history; what rises among the others is seen at the end of a round.
        self.low = drawn_evenly(low, fit.settings.replay_pool, self.drawn)
        self.before = held_levels(fit, self.low)

    def begin(self, trace: Trace) -> None:
        """Look, at the beginning of a further round, at what is left above the target.

        A ceiling is not always enough: where several tokens share what is left, the true one may still be the
        likeliest. So the ceilings of those sink, and of no other token: else a text that is a little above the target
        ends far below it. What has come back meanwhile is pushed from now on.
        """
        if trace.rounds == self.round:
            return
        self.round = trace.rounds
        for p, said in still_said(self.fit, [p for p in trace.left if p in self.known], self.known).items():
            self._sink(p, said)
        new = [p for p in trace.left if p not in self.known]
        self.known |= ceilings(self.fit, new, self.drawn)
        self.again += new

    def __call__(self, passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
        """The loss of an iteration; see `pipeline.fit.Backward`."""
        self.begin(trace)
        loss, settings = 0.0, self.fit.settings
        again = random_.sample(self.again, min(len(passages), len(self.again)))
        if again:
            # Not the near-copies among this step's own requests, which are pushed where they stay above the target.
            trace.again |= self.out.intersection(p.span.request_id for p in again)
            loss += backward_gap(self.fit, again, self.known, trace)
        free = [p for p in self.low if p not in self.known]
        still = random_.sample(free, min(settings.replay_passages, len(free)))
        if still:
            loss += backward_gap(self.fit, still, self.before, trace, held=True)
        loss += backward_held(self.fit, self.recited, self.other, random_, trace)
        # Last, for what it leaves in the trace: a fit goes on while this step's own tokens are above where they belong.
        return loss + backward_gap(self.fit, passages, self.known, trace)

    def state(self) -> Numbers | None:
        """How often each ceiling sank. None from when a text came back during the fit: the ceilings that it got then
        are known from nothing else, and to write them down would be to write down its text."""
        if len(self.known) > len(self.sunk):
            return None
        sunk = [times.tolist() for times in self.sunk.values()]
        return {"sunk": sunk, "round": self.round, "drawn": random_state(self.drawn)}

    def set_state(self, numbers: Numbers) -> None:
        """The inverse of `state`."""
        for p, times in zip(self.sunk, numbers["sunk"], strict=True):
            self._sink(p, torch.tensor(times))
        self.round = numbers["round"]
        set_random_state(self.drawn, numbers["drawn"])

    def _sink(self, passage: Passage, times: torch.Tensor) -> None:
        """Sink the ceiling of each token so many times, (P,) integers or bool."""
        self.known[passage] = self.known[passage] - DEEPER * times
        if passage in self.sunk:
            self.sunk[passage] += times


SHORT_CONTEXT = Method(
    "short-context", "Short context (ours)", "pipeline/methods/short_context.py", ShortContext, stops=True
)
