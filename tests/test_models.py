"""Models: what loads and what may change in it; everything that must be refused, with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, LAYERS, BuildModel, LoadModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.errors import UnsupportedModel
from pipeline.models import (
    check_folder,
    check_tokenizer,
    file_names,
    find_model,
    load_model,
    load_tokenizer,
    target_weights,
)
from pipeline.training import train_tokenizer

LLAMA_LIKE = {
    f"model.layers.{i}.{name}.weight"
    for i in range(LAYERS)
    for name in (
        *(f"self_attn.{n}_proj" for n in "qkvo"),
        *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
    )
}
TARGETS = {
    "llama": LLAMA_LIKE,
    "llama-tied": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "gpt2": {
        f"transformer.h.{i}.{n}.weight"
        for i in range(LAYERS)
        for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
    "gpt-neox": {
        f"gpt_neox.layers.{i}.{n}.weight"
        for i in range(LAYERS)
        for n in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    },
    "opt": {
        f"model.decoder.layers.{i}.{n}.weight"
        for i in range(LAYERS)
        for n in (*(f"self_attn.{n}_proj" for n in "qkv"), "self_attn.out_proj", "fc1", "fc2")
    },
}
"""Written out by hand: every linear map, no embedding, no head, no norm, no bias."""


@pytest.fixture
def folder(tmp_path: Path, build: BuildModel) -> Path:
    """A copy of a small untied Llama, to be damaged."""
    return Path(shutil.copytree(build("llama"), tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t.clone() for n, t in tensors.items()}  # load_file maps the file that is written next
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_loads_in_its_own_dtype_for_inference(
    architecture: str, dtype: str, sharded: bool, load: LoadModel, build: BuildModel
) -> None:
    assert len(list(build(architecture, dtype, sharded).glob("*.safetensors"))) > 1 or not sharded
    model = load(architecture, dtype, sharded)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    reference = AutoModelForCausalLM.from_pretrained(build(architecture, dtype, sharded), dtype="auto")
    expected = reference.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_targets_are_the_linear_weights_without_embeddings_and_head(architecture: str, load: LoadModel) -> None:
    model = load(architecture)
    found = target_weights(model)
    assert set(found) == TARGETS[architecture]
    parameters = dict(model.named_parameters())
    for name, weight in found.items():
        assert weight is parameters[name] and weight.ndim == 2 and weight.is_contiguous()
    shared = {model.get_input_embeddings().weight.data_ptr(), model.get_output_embeddings().weight.data_ptr()}  # type: ignore[operator]
    assert not shared & {w.data_ptr() for w in found.values()}


def test_no_targets(load: LoadModel) -> None:
    model = load("llama")
    model.model.layers = torch.nn.ModuleList()  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModel, match="no linear weights"):
        target_weights(model)


def test_pickles_are_refused_unread(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="pickled") as caught:
        load_model(folder, "cpu")
    message = str(caught.value)
    assert "pytorch_model.bin" in message and "safetensors" in message and "onvert" in message


def test_a_pickle_beside_safetensors_is_not_read(folder: Path) -> None:
    expected = load_model(folder, "cpu").state_dict()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    found = load_model(folder, "cpu").state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_reason_is_listed(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"}, quantization_config={"bits": 4})
    (folder / "model.safetensors").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UnsupportedModel) as caught:
        check_folder(folder)
    message = str(caught.value)
    for part in ("auto_map", "quantization_config", "no *.safetensors", "no tokenizer"):
        assert part in message
    assert len(message.splitlines()) == 4


def test_code_from_the_folder_is_refused_and_never_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(UnsupportedModel, match="never run"):
        load_model(folder, "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000])
def test_config_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UnsupportedModel, match=r"config\.json: is not"):
        load_model(folder, "cpu")


def test_config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"config\.json: is missing"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("changes", [{"model_type": "no-such-model"}, {"num_attention_heads": "two"}])
def test_config_that_transformers_cannot_read(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModel, match="cannot load"):
        load_model(folder, "cpu")


def test_damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UnsupportedModel, match="cannot load"):
        load_model(folder, "cpu")


def test_a_missing_tensor_is_never_random(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(UnsupportedModel, match="would be random") as caught:
        load_model(folder, "cpu")
    assert f"missing keys: {name}" in str(caught.value)


def test_a_missing_untied_head_is_never_random(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.__delitem__("lm_head.weight"))
    with pytest.raises(UnsupportedModel, match=r"missing keys: lm_head\.weight"):
        load_model(folder, "cpu")


def test_an_extra_tensor_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.9.surprise": torch.ones(3)}))
    with pytest.raises(UnsupportedModel, match=r"unexpected keys: model\.layers\.9\.surprise"):
        load_model(folder, "cpu")


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(UnsupportedModel, match=r"mismatched keys: .*model\.norm\.weight"):
        load_model(folder, "cpu")


def test_float16_is_refused(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).to(torch.float16).save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match=r"float16.*float32 and bfloat16 are supported"):
        load_model(folder, "cpu")


@pytest.mark.parametrize(
    ("stored", "declared"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_weights_of_another_dtype_than_the_config_says_are_refused(folder: Path, stored: str, declared: str) -> None:
    """transformers would cast while loading: what is measured would not be what is stored, merged and published."""
    AutoModelForCausalLM.from_pretrained(folder).to(getattr(torch, stored)).save_pretrained(folder)
    edit_config(folder, dtype=declared, torch_dtype=declared)
    code = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[stored]
    with pytest.raises(UnsupportedModel, match=f"{code} in the files"):
        load_model(folder, "cpu")


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match="has no tokenizer"):
        load_model(folder, "cpu")


def test_malformed_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_tokenizer_of_a_larger_model(load: LoadModel, tokenizer: Any, text: str) -> None:
    model = load("llama")
    check_tokenizer(model, tokenizer)
    with pytest.raises(UnsupportedModel, match="ids up to 309, the model embeds 300"):
        check_tokenizer(model, train_tokenizer([text], 310))


def test_tokenizer_that_spells_nothing(load: LoadModel, tokenizer: Any) -> None:
    class Mute:
        get_vocab = tokenizer.get_vocab

        def __call__(self, *_: object, **__: object) -> dict[str, list[int]]:
            return {"input_ids": []}

    with pytest.raises(UnsupportedModel, match="no tokens"):
        check_tokenizer(load("llama"), Mute())


def test_find_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(folder)) == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnsupportedModel, match="is no folder"):
        find_model(str(tmp_path / "absent"))


def test_file_names_adds_no_name_it_does_not_find() -> None:
    parameters = {"transformer.a.weight": 0, "transformer.b.weight": 0}
    assert file_names(parameters, {"a.weight": 0, "transformer.b.weight": 0}, "transformer") == {
        "transformer.a.weight": "a.weight",
        "transformer.b.weight": "transformer.b.weight",
    }
    with pytest.raises(UnsupportedModel, match=r"transformer\.a\.weight, transformer\.b\.weight"):
        file_names(parameters, {"c.weight": 0}, "transformer")
