"""Metrics of memorisation (METHODS section 4): pure functions, then one forward pass that feeds them.

One prompt template, greedy, no answer in the prompt, the same for every method and every model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from pipeline.losses import predict, token_nll
from pipeline.passages import Passage, batches, pad_id

WORST_NLL = 1e4
"""Stands for a negative log-likelihood that is not finite, in nats."""

ACS_WORDS = 3
"""Shortest common run that counts for the accumulated one, in words, as in CoTaEval."""


@dataclass(frozen=True)
class PassageScore:
    """Teacher-forced scores of one passage.

    Attributes:
        hits: Continuation positions whose argmax is the true token.
        tokens: Continuation positions.
        extraction: Extraction strength.
        nll: Summed negative log-likelihood of the continuation, in nats.
    """

    hits: int
    tokens: int
    extraction: float
    nll: float


@dataclass(frozen=True)
class TokenScores:
    """Teacher-forced scores of the T continuation tokens of one passage; every metric of a forward pass follows.

    Attributes:
        hits: (T,) bool, the argmax is the true token.
        logprobs: (T,) float32, log p(z_t | z_<t) in nats.
        standardised: (T,) float32, (log p(z_t) - μ_t) / σ_t with mean and standard deviation of log p over the
            vocabulary under p (Min-K%++, Zhang et al. 2404.02936, eq. 3).
    """

    hits: torch.Tensor
    logprobs: torch.Tensor
    standardised: torch.Tensor


def exact_memorisation(scores: Sequence[PassageScore]) -> float:
    """EM: share of all continuation positions whose teacher-forced argmax is the true token."""
    return sum(s.hits for s in scores) / max(1, sum(s.tokens for s in scores))


def mean_nll(scores: Sequence[PassageScore]) -> float:
    """Mean token negative log-likelihood over all continuations, in nats."""
    return sum(s.nll for s in scores) / max(1, sum(s.tokens for s in scores))


def extraction_strength(hits: Sequence[bool]) -> float:
    """ES = 1 - k/L, k the shortest prefix after which every argmax to the end is right; 0 if none (k = L)."""
    right = 0
    for hit in reversed(hits):
        if not hit:
            break
        right += 1
    return right / len(hits) if hits else 0.0


def score_passages(model: nn.Module, passages: Sequence[Passage], pad_id: int, max_tokens: int) -> list[PassageScore]:
    """Score passages with one forward pass each.

    Returns:
        One score per passage, in the order given.
    """
    device = next(model.parameters()).device
    scores: list[PassageScore | None] = [None] * len(passages)
    with torch.inference_mode():
        for batch in batches(passages, max_tokens, pad_id, device):
            predictions = predict(model, batch)
            right = (predictions.logits.argmax(-1) == predictions.targets).cpu()
            # A model broken by too strong an update predicts nothing; its score is bad, not undefined.
            nll = token_nll(predictions).nan_to_num(nan=WORST_NLL, posinf=WORST_NLL).cpu()
            scored = predictions.scored.cpu()
            for row, index in enumerate(batch.rows):
                hits = right[row][scored[row]].tolist()
                total = float(nll[row][scored[row]].double().sum())
                scores[index] = PassageScore(sum(hits), len(hits), extraction_strength(hits), total)
    return [s for s in scores if s is not None]


def score_tokens(model: nn.Module, passages: Sequence[Passage], pad_id: int, max_tokens: int) -> list[TokenScores]:
    """Score every continuation token with one forward pass a passage.

    The float32 copy of the logits exists for one passage at a time, (T, V).

    Returns:
        One record per passage, in the order given, on the CPU.
    """
    device = next(model.parameters()).device
    scores: dict[int, TokenScores] = {}
    with torch.inference_mode():
        for batch in batches(passages, max_tokens, pad_id, device):
            predictions = predict(model, batch)
            for row, index in enumerate(batch.rows):
                scored = predictions.scored[row]
                scores[index] = _token_scores(predictions.logits[row][scored], predictions.targets[row][scored])
    return [scores[index] for index in range(len(passages))]


def _token_scores(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Scores of T tokens from their (T, V) logits and (T,) targets."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    p = log_p.exp()
    true = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    mean = -torch.special.entr(p).sum(-1)
    square = (p * log_p.square()).nan_to_num(nan=0.0).sum(-1)  # 0 · ∞ where a token is impossible
    # A token predicted with certainty has no spread, and lies on the mean.
    spread = (square - mean.square()).clamp_min(1e-12).sqrt()
    return TokenScores(
        hits=(logits.argmax(-1) == targets).cpu(),
        logprobs=true.nan_to_num(nan=-WORST_NLL, neginf=-WORST_NLL).cpu(),
        standardised=((true - mean) / spread).nan_to_num(nan=-WORST_NLL, neginf=-WORST_NLL).cpu(),
    )


def passage_score(tokens: TokenScores) -> PassageScore:
    """The summary of a passage that `score_passages` gives."""
    hits = tokens.hits.tolist()
    return PassageScore(sum(hits), len(hits), extraction_strength(hits), -float(tokens.logprobs.double().sum()))


def extractable(log_probability: float, queries: int, chance: float) -> bool:
    """(n, p)-discoverable extraction (Hayes et al. 2410.19482; p_z of Cooper et al. 2505.12546).

    Whether sampling n times at temperature 1 from the whole distribution emits the continuation at least once with
    probability p or more: 1 - (1 - p_z)^n ≥ p, p_z = Π p(z_t | z_<t).

    Args:
        log_probability: log p_z, in nats.
        queries: n.
        chance: p, below 1.
    """
    p_z = math.exp(min(0.0, log_probability))
    return p_z >= 1.0 or queries * math.log1p(-p_z) <= math.log1p(-chance)


def generate(
    model: nn.Module, tokenizer: Any, passages: Sequence[Passage], max_tokens: int, processors: Sequence[Any] = ()
) -> list[str]:
    """Continue each prompt greedily for as many tokens as its true continuation has.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        passages: Prompts with their continuations.
        max_tokens: Most tokens in a forward pass.
        processors: Logits processors, for what guards a model while it writes; none for the model itself.

    Returns:
        The generated text of each passage, special tokens removed.
    """
    device = next(model.parameters()).device
    with plain_decoding(model):
        return _continue(model, tokenizer, passages, max_tokens, pad_id(tokenizer), device, processors)


@contextmanager
def plain_decoding(model: nn.Module) -> Iterator[None]:
    """The same decoding for every model: a repetition penalty or suppressed tokens that its folder ships would make it
    another one, and generate() fills whatever is not passed from the model's own configuration."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)  # type: ignore[union-attr]
    try:
        yield
    finally:
        model.generation_config = own


def _continue(
    model: nn.Module,
    tokenizer: Any,
    passages: Sequence[Passage],
    max_tokens: int,
    pad: int,
    device: torch.device,
    processors: Sequence[Any],
) -> list[str]:
    texts = [""] * len(passages)
    order = sorted(range(len(passages)), key=lambda i: -len(passages[i].ids))
    while order:
        count = max(1, max_tokens // len(passages[order[0]].ids))
        rows, order = order[:count], order[count:]
        width = max(passages[i].prompt_length for i in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.int64)
        attention = torch.zeros_like(ids)
        for row, index in enumerate(rows):
            prompt = passages[index].ids[: passages[index].prompt_length]
            ids[row, width - len(prompt) :] = torch.tensor(prompt)  # generation needs padding on the left
            attention[row, width - len(prompt) :] = 1
        longest = max(len(passages[i].continuation) for i in rows)
        with torch.inference_mode():
            out = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=attention.to(device), do_sample=False, num_beams=1,
                max_new_tokens=longest, pad_token_id=pad, logits_processor=LogitsProcessorList(processors),
            )  # fmt: skip
        for row, index in enumerate(rows):
            new = out[row, width : width + len(passages[index].continuation)].tolist()
            texts[index] = tokenizer.decode(new, skip_special_tokens=True)
    return texts


def normalised_words(text: str) -> list[str]:
    """Lower-case words without punctuation, as CoTaEval compares them."""
    return re.findall(r"\w+", text.casefold())


def longest_common_run(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest contiguous run of words that both hold; O(len²), meant for passages."""
    best, previous = 0, [0] * (len(second) + 1)
    for a in first:
        current = [0] * (len(second) + 1)
        for j, b in enumerate(second, 1):
            if a == b:
                current[j] = previous[j - 1] + 1
                best = max(best, current[j])
        previous = current
    return best


def accumulated_common_runs(first: Sequence[str], second: Sequence[str]) -> int:
    """ACS: words in common runs of at least `ACS_WORDS`, none counted twice, in the order of both texts.

    Runs are found as difflib does: the longest one, then the longest on either side of it.
    """
    blocks = SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks if block.size >= ACS_WORDS)


def repetition(words: Sequence[str], n: int = 4) -> float:
    """Share of n-grams that repeat an earlier one (seq-rep-n, Welleck et al. 1908.04319, eq. 12); 0 is fluent."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (forget, keep) points no other one beats: none forgets at least as well and keeps more, or the reverse.

    Args:
        points: What is still reproduced of the texts taken down, and of those to be kept.

    Returns:
        Their indices, by rising first value.
    """

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] <= a[0] and b[1] >= a[1] and b != a for b in points)

    return sorted((i for i, point in enumerate(points) if not beaten(point)), key=lambda i: points[i])


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def rouge(truth: str, generated: str) -> tuple[float, float]:
    """ROUGE-1 and ROUGE-L F1 by the rouge-score package, without stemming."""
    scores = _scorer().score(truth, generated)
    return float(scores["rouge1"].fmeasure), float(scores["rougeL"].fmeasure)
