"""Metrics of memorisation (METHODS section 4): pure functions, then one forward pass that feeds them.

One prompt template, greedy, no answer in the prompt, the same for every method and every model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from pipeline.losses import predict, token_nll
from pipeline.passages import Passage, batches

WORST_NLL = 1e4
"""Stands for a negative log-likelihood that is not finite, in nats."""


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


def generate(model: nn.Module, tokenizer: Any, passages: Sequence[Passage], max_tokens: int) -> list[str]:
    """Continue each prompt greedily for as many tokens as its true continuation has.

    Returns:
        The generated text of each passage, special tokens removed.
    """
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    # Greedy for every model: a repetition penalty or suppressed tokens that its folder ships would make it another
    # decoding. generate() fills whatever is not passed from the model's own configuration.
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)  # type: ignore[union-attr]
    try:
        return _continue(model, tokenizer, passages, max_tokens, pad, device)
    finally:
        model.generation_config = own


def _continue(
    model: nn.Module, tokenizer: Any, passages: Sequence[Passage], max_tokens: int, pad: int, device: torch.device
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
                max_new_tokens=longest, pad_token_id=pad,
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


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def rouge(truth: str, generated: str) -> tuple[float, float]:
    """ROUGE-1 and ROUGE-L F1 by the rouge-score package, without stemming."""
    scores = _scorer().score(truth, generated)
    return float(scores["rouge1"].fmeasure), float(scores["rougeL"].fmeasure)
