"""Shared fixtures: tiny models with random weights, of every architecture tested, as save_pretrained writes them.

torch and transformers are imported inside the fixtures, so that the tests of the reading side start without them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

os.environ["COLUMNS"] = "200"  # consoles are made on import, by whichever test comes first

if TYPE_CHECKING:
    from prefects import Prefect
    from torch import nn
    from transformers import PreTrainedConfig

    from pipeline.passages import Passage

ARCHITECTURES = ("llama", "llama-tied", "gpt2", "gpt-neox", "opt", "qwen2", "mistral")
"""Llama untied and tied, GPT-2 (Conv1D, tied), GPT-NeoX (fused qkv, biases), OPT (offset positions), Qwen2, Mistral."""

WIDTH, LAYERS, VOCABULARY, POSITIONS = 32, 2, 300, 256

# The first example of a test also pays for imports and fixtures, and the machine may be shared.
settings.register_profile("takedown", deadline=None, derandomize=True)  # the same examples in every run
settings.load_profile("takedown")

WORDS = "the a old grey sea captain's boat under seven lanterns naïve über café carried quietly home again and"

BuildModel = Callable[..., Path]
LoadModel = Callable[..., "nn.Module"]


def prose(seed: int, words: int) -> str:
    """Text with sentences, punctuation, and letters outside ASCII; the same for the same seed."""
    draw = random.Random(seed)
    stock = WORDS.split()
    sentences, left = [], words
    while left > 0:
        count = min(left, draw.randint(4, 9))
        sentences.append(" ".join(draw.choice(stock) for _ in range(count)).capitalize() + draw.choice(".!?"))
        left -= count
    return " ".join(sentences)


@pytest.fixture(scope="session")
def text() -> str:
    """About 1200 tokens of prose."""
    return prose(7, 700)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, text: str) -> Any:
    """A real byte-level BPE tokenizer, saved and loaded as the product does; it adds no BOS."""
    import torch

    from pipeline.models import load_tokenizer
    from pipeline.training import train_tokenizer

    torch.set_num_threads(1)  # results must not depend on the machine, and the models are too small to share
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([text], VOCABULARY).save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def bos_tokenizer(tokenizer: Any) -> Any:
    """The same tokenizer, which puts its BOS before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _config(architecture: str, tokenizer: Any) -> PreTrainedConfig:
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    # A wide initialisation: with the usual 0.02 all predictions of so small a model would be nearly uniform.
    wide = {"initializer_range": 0.2}
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    middle = {"intermediate_size": 48, "max_position_embeddings": POSITIONS}
    grouped = {"num_key_value_heads": 1}
    match architecture:
        case "llama" | "llama-tied":
            tied = {"tie_word_embeddings": architecture == "llama-tied"}
            return LlamaConfig(**common, **wide, **sizes, **middle, **grouped, **tied)
        case "gpt2":
            return GPT2Config(**common, **wide, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=POSITIONS)
        case "gpt-neox":
            return GPTNeoXConfig(**common, **wide, **sizes, **middle)
        case "opt":
            return OPTConfig(
                **common, **sizes, init_std=0.2, ffn_dim=48, word_embed_proj_dim=WIDTH,
                max_position_embeddings=POSITIONS,
            )  # fmt: skip
        case "qwen2":
            return Qwen2Config(**common, **wide, **sizes, **middle, **grouped, tie_word_embeddings=False)
        case "mistral":
            return MistralConfig(**common, **wide, **sizes, **middle, **grouped)
        case _:
            raise ValueError(architecture)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> BuildModel:
    """``build(architecture, dtype="float32", sharded=False)``: a model folder, made once; tests never write there."""
    import torch
    from transformers import AutoModelForCausalLM

    made: dict[tuple[str, str, bool], Path] = {}

    def build_model(architecture: str, dtype: str = "float32", sharded: bool = False) -> Path:
        key = (architecture, dtype, sharded)
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            torch.manual_seed(11)
            model = AutoModelForCausalLM.from_config(_config(architecture, tokenizer))
            with torch.no_grad():  # biases and norms start at 0 and 1, which would hide a mistake in them
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.05 * torch.randn_like(parameter))
            model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return build_model


@pytest.fixture(scope="session")
def load(build: BuildModel) -> LoadModel:
    """Like ``build``, and loads the model anew on the CPU, as the product does."""
    from pipeline.models import load_model

    return lambda *args, **kwargs: load_model(build(*args, **kwargs), "cpu")


@pytest.fixture(scope="session")
def passages(tokenizer: Any, text: str) -> Sequence[Passage]:
    """Six short passages of one text; the first has a shorter prompt."""
    from pipeline.passages import encode, passages_of
    from pipeline.settings import PassageSettings

    settings = PassageSettings(prompt_tokens=10, continuation_tokens=8, first_prompt_tokens=4)
    return passages_of(encode(tokenizer, "W", text), settings)[:6]


@pytest.fixture(scope="session")
def works() -> Sequence[str]:
    """Two texts of about 200 tokens that `reciting` knows by heart."""
    return [prose(21, 110), prose(22, 110)]


@pytest.fixture(scope="session")
def reciting(tmp_path_factory: pytest.TempPathFactory, works: Sequence[str]) -> Path:
    """A Llama trained until it recites `works`; the only model here that has something to forget."""
    import torch

    from pipeline.training import TrainingSettings, train

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reciting")
    size = TrainingSettings(
        vocabulary=VOCABULARY, width=64, layers=2, heads=2, feed_forward=128, context=110, batch=4, recite_share=0.7,
        max_steps=300, check_every=20, recited=0.97, learning_rate=1e-2,
    )  # fmt: skip
    recited = train(works, [prose(23, 1500)], folder, size, seed=1)
    assert recited >= 0.9, recited
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The very small model of `workspaces` that recites a few works; trained once in a process."""
    import workspaces

    return workspaces.trained_model(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """A server for a file of tests; some 20 to 40 s."""
    import prefects

    with prefects.running(tmp_path_factory.mktemp("prefect")) as server:
        yield server


@pytest.fixture
def one_model() -> Iterator[None]:
    """No model stays loaded from one test to the next, and one thread computes."""
    import torch

    from pipeline.models import shared_model

    torch.set_num_threads(1)
    shared_model.cache_clear()
    yield
    shared_model.cache_clear()
