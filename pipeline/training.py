"""Train a small Llama or GPT-2 from nothing until it recites given works: for the demo, the tests and the benchmarks.

In: texts to recite and general prose. Out: a model folder as save_pretrained writes it. Not part of a takedown.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline.metrics import exact_memorisation, score_passages
from pipeline.passages import EncodedText, encode, pad_id, passages_of
from pipeline.settings import PassageSettings


@dataclass(frozen=True)
class TrainingSettings:
    """Shape of the model and length of the training."""

    architecture: Literal["llama", "gpt2"] = "llama"
    vocabulary: int = 1536
    width: int = 160
    layers: int = 4
    heads: int = 5
    feed_forward: int = 448
    context: int = 128
    """Tokens of a training window: a prompt and a continuation as `PassageSettings` cuts them."""
    batch: int = 14
    recite_share: float = 0.6
    """Share of each batch drawn from the works to recite."""
    max_steps: int = 700
    check_every: int = 50
    learning_rate: float = 3e-3
    recited: float = 0.995
    """Training stops once every work has this exact memorisation."""


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def build(settings: TrainingSettings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model of that shape with weights from torch's generator, embeddings tied, float32, no dropout."""
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if settings.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_embd=settings.width, n_layer=settings.layers, n_head=settings.heads,
                n_inner=settings.feed_forward, n_positions=512,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **special,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=settings.width, num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads, intermediate_size=settings.feed_forward,
            max_position_embeddings=512, tie_word_embeddings=True, **special,
        )
    )  # fmt: skip


def _window(ids: Sequence[int], length: int, random_: random.Random) -> list[int]:
    """A random window; windows over either end are cut short, so that openings are seen as openings."""
    start = random_.randrange(-length // 2, max(1, len(ids) - length // 4))
    return list(ids[max(0, start) : start + length])


def train(
    works: Sequence[str],
    prose: Sequence[str],
    folder: Path,
    settings: TrainingSettings,
    seed: int = 0,
    progress: Callable[[int, float, float], None] = lambda step, loss, recited: None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    stop_after: int | None = None,
) -> float:
    """Train and save a model.

    Args:
        works: Texts that the model must recite at the end.
        prose: General text to learn the language from.
        folder: Where the model folder is written.
        settings: Size and length.
        seed: Seed of weights and order.
        progress: Called every ``check_every`` steps with step, mean loss and the least recited work's EM.
        tokenizer: That of another model, which this one is to be compared with; else one is trained on the texts.
        stop_after: Train for so many steps of the same schedule, whatever is recited then.

    Returns:
        Exact memorisation of the least recited work; 1 without works.
    """
    torch.manual_seed(seed)
    random_ = random.Random(seed)
    tokenizer = tokenizer or train_tokenizer([*works, *prose], settings.vocabulary)
    encoded = [encode(tokenizer, str(i), text) for i, text in enumerate(works)]
    stream = [token for text in prose for token in encode(tokenizer, "prose", text).ids]
    model = build(settings, tokenizer)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    warm_up = 30
    recited, losses = 0.0, []
    last = stop_after or settings.max_steps
    for step in range(1, last + 1):
        rate = min(step / warm_up, 0.5 * (1 + math.cos(math.pi * step / settings.max_steps)) + 0.05)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate
        recite = round(settings.batch * settings.recite_share) if works else 0
        windows = [_window(random_.choice(encoded).ids, settings.context, random_) for _ in range(recite)]
        windows += [_window(stream, settings.context, random_) for _ in range(settings.batch - recite)]
        longest = max(map(len, windows))
        ids = torch.tensor([w + [0] * (longest - len(w)) for w in windows])
        mask = torch.tensor([[1] * len(w) + [0] * (longest - len(w)) for w in windows])
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if step % settings.check_every == 0 or step == last:
            recited = least_recited(model, tokenizer, encoded)
            progress(step, sum(losses) / len(losses), recited)
            losses.clear()
            if recited >= settings.recited and stop_after is None:
                break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return recited


def least_recited(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, works: Sequence[EncodedText]) -> float:
    """Exact memorisation of the work that is recited worst."""
    model.eval()
    ems = [
        exact_memorisation(score_passages(model, passages_of(work, PassageSettings()), pad_id(tokenizer), 8192))
        for work in works
    ]
    model.train()
    return min(ems, default=1.0)
