"""Merge: an independent computation gives the same bits, and all other bytes are the parent's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, BuildModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Model

from pipeline.errors import StoreDamaged
from pipeline.files import digest_file
from pipeline.merge import displaced, merge
from pipeline.models import file_names, load_model, target_weights
from pipeline.passages import Passage
from pipeline.safefile import model_root, read_header
from pipeline.sparse import Mask, SalientWeights, Vector

ALPHA = 1.7


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def update(model: torch.nn.Module, seed: int = 0) -> tuple[Mask, Vector]:
    """A mask over about a fifth of each target, one tensor left out whole; steps from tiny to huge."""
    generator = torch.Generator().manual_seed(seed)
    mask = {n: torch.rand(w.shape, generator=generator) < 0.2 for n, w in target_weights(model).items()}
    mask[list(mask)[1]].fill_(False)
    vector = {}
    for name, m in mask.items():
        size = 10.0 ** torch.empty(int(m.sum())).uniform_(-9, 1, generator=generator)
        vector[name] = torch.randn(int(m.sum()), generator=generator) * size
    return mask, vector


def names_of(folder: Path, model: Any, mask: Mask) -> dict[str, str]:
    return file_names(mask, tensors(folder), model.base_model_prefix)


def to_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bits of float32 values rounded to a dtype; bfloat16 to nearest even, written out."""
    raw = values.astype(np.float32).view(np.uint32)
    if dtype == torch.float32:
        return raw
    kept = raw >> 16
    rest = raw & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (kept % 2 == 1))
    result: np.ndarray = (kept + up).astype(np.uint16)
    return result


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    flat = tensor.contiguous().flatten()
    if tensor.dtype == torch.float32:
        return flat.numpy().view(np.uint32)
    return flat.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "sharded"), [("float32", False), ("bfloat16", True), ("bfloat16", False)])
def test_candidate_is_the_formula_bit_for_bit(
    architecture: str, dtype: str, sharded: bool, build: BuildModel, tmp_path: Path, passages: Sequence[Passage]
) -> None:
    parent, candidate = build(architecture, dtype, sharded), tmp_path / "candidate"
    model = load_model(parent, "cpu")
    mask, vector = update(model)
    names = names_of(parent, model, mask)
    before = {p.name: digest_file(p) for p in parent.iterdir()}
    done: list[str] = []
    report = merge(parent, candidate, mask, vector, ALPHA, names, done.append)
    assert {p.name: digest_file(p) for p in parent.iterdir()} == before  # the parent is only read
    assert sorted(done) == sorted(mask)

    old, new = tensors(parent), tensors(candidate)
    assert old.keys() == new.keys()
    changed, changed_tensors = 0, []
    for name, stored in names.items():
        expected = bits_of(old[stored]).copy()
        where = mask[name].flatten().numpy()
        origin = old[stored].float().flatten().numpy()[where]
        moved = origin + vector[name].numpy() * np.float32(-ALPHA)
        expected[where] = to_bits(moved, old[stored].dtype)
        assert np.array_equal(bits_of(new[stored]), expected)
        differ = int((bits_of(new[stored]) != bits_of(old[stored])).sum())
        changed += differ
        changed_tensors += [name] * bool(differ)
    for stored in old.keys() - set(names.values()):
        assert np.array_equal(bits_of(old[stored]), bits_of(new[stored]))
    assert 0 < changed < report.selected == sum(int(m.sum()) for m in mask.values())  # tiny steps are rounded away
    assert report.changed == changed and report.changed_tensors == tuple(sorted(changed_tensors))
    assert list(mask)[1] not in report.changed_tensors

    # Every byte that is no target weight: other files, headers with their metadata, other tensors.
    assert sorted(p.name for p in candidate.iterdir()) == sorted(p.name for p in parent.iterdir())
    for path in parent.iterdir():
        mine, theirs = path.read_bytes(), (candidate / path.name).read_bytes()
        if path.suffix != ".safetensors":
            assert mine == theirs
            continue
        header = read_header(path)
        masked = bytearray(len(mine))
        for info in header.tensors:
            if info.name in names.values():
                start = header.data_start
                masked[start + info.start : start + info.end] = b"\1" * (info.end - info.start)
        assert len(mine) == len(theirs)
        assert all(a == b for a, b, m in zip(mine, theirs, masked, strict=True) if not m)
    assert {(f.path, f.digest) for f in report.files} == {(p.name, digest_file(p)) for p in candidate.iterdir()}
    assert report.root == model_root(candidate) != model_root(parent)

    # What from_pretrained makes of the candidate is what calibration measured in memory: exactly.
    batch = {"input_ids": torch.tensor([p.ids for p in passages[2:5]])}
    with torch.no_grad(), SalientWeights(target_weights(model), mask) as salient:
        salient.displace(vector, -ALPHA)
        measured = model(**batch).logits
        published = AutoModelForCausalLM.from_pretrained(candidate, dtype="auto").eval()
        assert torch.equal(published(**batch).logits, measured)


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=12),
    step=st.floats(-(2.0**100), 2.0**100, width=32),
    alpha=st.floats(0, 64, width=32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bits=st.integers(0, 2**12 - 1),
)
def test_displaced_rounds_once(values: list[float], step: float, alpha: float, dtype: torch.dtype, bits: int) -> None:
    weight = torch.tensor(values).to(dtype).view(1, -1)
    mask = torch.tensor([[bool(bits >> i & 1) for i in range(len(values))]])
    vector = torch.full((int(mask.sum()),), step)
    kept = weight.clone()
    new, changed = displaced(weight, mask, vector, alpha)
    assert np.array_equal(bits_of(weight), bits_of(kept))  # the input is not touched
    expected, where = bits_of(kept).copy(), mask.flatten().numpy()
    with np.errstate(over="ignore"):
        moved = kept.float().flatten().numpy()[where] + vector.numpy() * np.float32(-alpha)
    expected[where] = to_bits(moved, dtype)
    assert np.array_equal(bits_of(new), expected)
    assert changed == int((expected != bits_of(kept)).sum())


def test_strength_zero_changes_nothing(build: BuildModel, tmp_path: Path) -> None:
    parent = build("qwen2", "bfloat16", True)
    model = load_model(parent, "cpu")
    mask, vector = update(model)
    report = merge(parent, tmp_path / "c", mask, vector, 0.0, names_of(parent, model, mask))
    assert report.changed == 0 and report.changed_tensors == ()
    assert report.root == model_root(parent)


def test_metadata_and_odd_headers_are_kept(build: BuildModel, tmp_path: Path) -> None:
    parent = Path(shutil.copytree(build("llama"), tmp_path / "parent"))
    kept = {n: t.clone() for n, t in tensors(parent).items()}
    save_file(kept, parent / "model.safetensors", {"format": "pt", "note": "ours", "ß": "\n"})
    (parent / "README.md").write_text("a card")
    for path in parent.iterdir():
        path.chmod(0o444)  # as published versions are
    model = load_model(parent, "cpu")
    mask, vector = update(model)
    merge(parent, tmp_path / "c", mask, vector, ALPHA, names_of(parent, model, mask))
    (ours, theirs) = (read_header(f / "model.safetensors") for f in (parent, tmp_path / "c"))
    assert ours == theirs and theirs.metadata["note"] == "ours"
    head = ours.data_start
    assert (parent / "model.safetensors").read_bytes()[:head] == (tmp_path / "c/model.safetensors").read_bytes()[:head]
    assert (tmp_path / "c/README.md").read_text() == "a card"


def test_a_checkpoint_of_the_bare_body(build: BuildModel, tmp_path: Path) -> None:
    """GPT-2 as published: saved from the body, so that the files lack the prefix ``transformer.``."""
    parent = tmp_path / "parent"
    GPT2Model.from_pretrained(build("gpt2")).save_pretrained(parent)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(build("gpt2") / name, parent)
    stored = tensors(parent)
    assert "h.0.attn.c_attn.weight" in stored
    model = load_model(parent, "cpu")
    mask, vector = update(model)
    names = names_of(parent, model, mask)
    assert all(name == f"transformer.{inside}" for name, inside in names.items())
    report = merge(parent, tmp_path / "c", mask, vector, ALPHA, names)
    assert report.changed > 0
    after = tensors(tmp_path / "c")
    for name, inside in names.items():
        assert torch.equal(after[inside] != stored[inside], (after[inside] != stored[inside]) & mask[name])
    with SalientWeights(target_weights(model), mask) as salient:
        salient.displace(vector, -ALPHA)
        published = load_model(tmp_path / "c", "cpu").state_dict()
        assert all(torch.equal(t, published[n]) for n, t in model.state_dict().items())


def test_every_difference_is_named_and_nothing_written(build: BuildModel, tmp_path: Path) -> None:
    parent = Path(shutil.copytree(build("llama"), tmp_path / "parent"))
    weights = {n: t.clone() for n, t in tensors(parent).items()}
    target = [n for n in weights if "mlp" in n or "self_attn" in n]
    model = load_model(parent, "cpu")
    mask, vector = update(model)
    lost, unmasked, shaped, long, doubled, half, ghost = (n for n in target[:7])
    save_file(weights | {half: weights[half].half()}, parent / "model.safetensors")
    names = {n: n for n in mask} | {lost: "no.such.tensor"}
    del mask[unmasked]
    mask[shaped] = mask[shaped].T.contiguous()[:, 1:]
    vector[shaped] = torch.zeros(int(mask[shaped].sum()))
    vector[long] = torch.zeros(vector[long].numel() + 1)
    vector[doubled] = vector[doubled].double()
    mask["other.weight"], vector["other.weight"] = torch.ones(2, 2, dtype=torch.bool), torch.ones(4)
    del vector[ghost]
    candidate = tmp_path / "c"
    with pytest.raises(StoreDamaged) as caught:
        merge(parent, candidate, mask, vector, 1.0, names)
    lines = str(caught.value).splitlines()[1:]
    for name, word in (
        (unmasked, "only one of mask and vector"), (ghost, "only one of mask and vector"),
        (lost, "in no file"), ("other.weight", "in no file"), (shaped, "mask has shape"),
        (long, "values of"), (doubled, "float64"), (half, "F16"),
    ):  # fmt: skip
        assert any(line.startswith(name) and word in line for line in lines), (name, word)
    assert len(lines) == 8
    assert not candidate.exists()


def test_what_an_interrupted_merge_left_is_replaced(build: BuildModel, tmp_path: Path) -> None:
    parent = build("mistral")
    model = load_model(parent, "cpu")
    mask, vector = update(model)
    names = names_of(parent, model, mask)
    fresh = merge(parent, tmp_path / "a", mask, vector, ALPHA, names)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "b" / "left.safetensors").write_bytes(b"over")
    again = merge(parent, tmp_path / "b", mask, vector, ALPHA, names)
    assert again == fresh and again.model_dump_json() == fresh.model_dump_json()


def test_the_shard_index_still_fits(build: BuildModel, tmp_path: Path) -> None:
    parent = build("gpt-neox", "float32", True)
    model = load_model(parent, "cpu")
    mask, vector = update(model)
    merge(parent, tmp_path / "c", mask, vector, ALPHA, names_of(parent, model, mask))
    index = json.loads((tmp_path / "c/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for name, file in index.items():
        assert name in {t.name for t in read_header(tmp_path / "c" / file).tensors}
