"""Training: a very small model that learns to recite, the same bytes each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, prose

from pipeline.files import digest_file
from pipeline.models import check_tokenizer, load_model, load_tokenizer, target_weights
from pipeline.passages import encode
from pipeline.training import TrainingSettings, least_recited, train, train_tokenizer

TINY = TrainingSettings(
    vocabulary=VOCABULARY,
    width=32,
    layers=1,
    heads=2,
    feed_forward=48,
    context=40,
    batch=4,
    max_steps=30,
    check_every=10,
)


def run(folder: Path, works: Sequence[str], seed: int) -> list[tuple[int, float, float]]:
    told: list[tuple[int, float, float]] = []
    recited = train(works, [prose(3, 300)], folder, TINY, seed, lambda *x: told.append(x))
    assert recited == told[-1][2]
    return told


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, works: Sequence[str]) -> tuple[Path, list[Any]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(folder, works, 5)


def test_the_loss_falls(trained: tuple[Path, list[Any]]) -> None:
    steps, losses, recited = zip(*trained[1], strict=True)
    assert steps == (10, 20, 30)
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.9 * losses[0]
    assert all(0 <= r <= 1 for r in recited)


def test_the_same_seed_gives_the_same_bytes(
    trained: tuple[Path, list[Any]], works: Sequence[str], tmp_path: Path
) -> None:
    torch.rand(3)  # whatever the global generator was at
    assert run(tmp_path / "again", works, 5) == trained[1]
    for path in trained[0].iterdir():
        assert digest_file(tmp_path / "again" / path.name) == digest_file(path)
    run(tmp_path / "other", works, 6)
    assert digest_file(tmp_path / "other/model.safetensors") != digest_file(trained[0] / "model.safetensors")
    assert digest_file(tmp_path / "other/tokenizer.json") == digest_file(trained[0] / "tokenizer.json")


def test_a_model_to_compare_with_takes_tokenizer_and_steps(
    trained: tuple[Path, list[Any]], works: Sequence[str], tmp_path: Path
) -> None:
    other, told = load_tokenizer(trained[0]), list[int]()
    recited = train([], [prose(3, 300)], tmp_path / "a", TINY, 5, lambda step, *_: told.append(step), other, 15)
    assert told == [10, 15]  # whatever it recites: of no works everything
    assert recited == 1
    assert digest_file(tmp_path / "a/tokenizer.json") == digest_file(trained[0] / "tokenizer.json")
    # The same schedule, stopped early: not a shorter one.
    run(tmp_path / "b", works, 5)
    train(works, [prose(3, 300)], tmp_path / "c", TINY, 5, stop_after=30)
    assert digest_file(tmp_path / "b/model.safetensors") == digest_file(tmp_path / "c/model.safetensors")


def test_the_folder_is_one_that_the_product_accepts(trained: tuple[Path, list[Any]], works: Sequence[str]) -> None:
    model, tokenizer = load_model(trained[0], "cpu"), load_tokenizer(trained[0])
    check_tokenizer(model, tokenizer)
    assert len(target_weights(model)) == 7
    for text in (*works, "日本 🎈 \x00 \u202e"):
        assert tokenizer.decode(encode(tokenizer, "W", text).ids) == text  # byte level: nothing is unknown


def test_reciting_is_measured_on_the_worst_work(reciting: Path, works: Sequence[str]) -> None:
    model, tokenizer = load_model(reciting, "cpu"), load_tokenizer(reciting)
    known = [encode(tokenizer, str(i), text) for i, text in enumerate(works)]
    unknown = encode(tokenizer, "new", prose(99, 110))
    assert least_recited(model, tokenizer, known) >= 0.9
    assert least_recited(model, tokenizer, [*known, unknown]) < 0.6
    assert least_recited(model, tokenizer, []) == 1.0


def test_the_tokenizer_has_the_size_asked_for(text: str) -> None:
    tokenizer = train_tokenizer([text], 290)
    assert len(tokenizer) == 290
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
