"""Models: what is accepted, how it is loaded, and which of its weights may change.

In: a folder with safetensors weights, a config and a tokenizer. Out: a causal language model and its target
weights. Never: pickle, remote code, or a weight that was silently initialised at random.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from pipeline.errors import Problem, UnsupportedModel
from pipeline.safefile import read_header

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""What is supported, with its safetensors code."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "LICENSE*"]
CONVERT = (
    "Convert it once, on a machine you can afford to lose, with "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR), which writes safetensors."
)


def find_model(source: str) -> Path:
    """Folder of a model given by folder or hub id; a hub id is downloaded, safetensors and text files only.

    Raises:
        UnsupportedModel: Neither a folder nor a reachable hub id.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises many unrelated types
        raise UnsupportedModel(
            f"{source}: is no folder, and could not be fetched as a hub id ({type(error).__name__}). "
            "Give the path of a folder that save_pretrained wrote."
        ) from error


def check_folder(folder: Path) -> None:
    """Refuse a model folder that this product cannot or must not load, before anything is read from it.

    Raises:
        UnsupportedModel: With every reason.
    """
    problems: list[Problem] = []
    config: Any = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(Problem(f"{folder}/config.json", "is missing", "Give a folder that save_pretrained wrote."))
    except (ValueError, RecursionError) as error:
        problems.append(Problem(f"{folder}/config.json", f"is not JSON ({error})", "Restore the file."))
    if not isinstance(config, dict):
        problems.append(Problem(f"{folder}/config.json", "is not a JSON object", "Restore the file."))
        config = {}
    if "auto_map" in config:
        problems.append(
            Problem(
                f"{folder}/config.json: auto_map",
                "asks for code from the model folder, which is never run",
                "Use an architecture that transformers ships.",
            )
        )
    if "quantization_config" in config:
        problems.append(
            Problem(
                f"{folder}/config.json: quantization_config",
                "weights are quantised and cannot be edited exactly",
                "Give the float32 or bfloat16 original.",
            )
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        found = f"holds pickled weights ({', '.join(pickles)}), which can run code when read" if pickles else (
            "has no *.safetensors file")  # fmt: skip
        problems.append(Problem(str(folder), found, CONVERT))
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        problems.append(Problem(str(folder), "has no tokenizer", "Save the model's tokenizer into the same folder."))
    if problems:
        raise UnsupportedModel("\n".join(str(p) for p in problems))


def pick_device(name: str) -> torch.device:
    """The device of the settings; ``auto`` takes CUDA when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def load_model(folder: Path, device: str = "auto") -> nn.Module:
    """Load a causal language model for inference, in the dtype it is stored in.

    Returns:
        The model in eval mode, all ``requires_grad`` off.

    Raises:
        UnsupportedModel: See `check_folder`; or weights are missing, unexpected, of another shape or dtype.
    """
    check_folder(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True,  # refused below, with their names
        )  # fmt: skip
    except Exception as error:  # transformers, safetensors and the hub client raise many unrelated types
        raise UnsupportedModel(f"{folder}: transformers cannot load it as a causal language model: {error}") from error
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise UnsupportedModel(
            f"{folder}: weights and config disagree ({listed}). A weight that is not in the files would be "
            "random; give the complete folder."
        )
    dtypes = {p.dtype for p in model.parameters()}
    if not dtypes <= set(DTYPES):
        raise UnsupportedModel(
            f"{folder}: has weights of {', '.join(sorted(str(d) for d in dtypes - set(DTYPES)))}; "
            "float32 and bfloat16 are supported. Convert with model.to(torch.bfloat16).save_pretrained(NEW_DIR)."
        )
    _check_stored_dtype(folder, model)
    model.requires_grad_(False)
    loaded: nn.Module = model.to(pick_device(device)).eval()
    return loaded


def _check_stored_dtype(folder: Path, model: Any) -> None:
    """Refuse weights that loading has cast: what is measured must be what is stored, merged and published."""
    stored = {t.name: t.dtype for path in folder.glob("*.safetensors") for t in read_header(path).tensors}
    cast = set()
    for name, weight in target_weights(model).items():
        found = stored.get(name, stored.get(name.removeprefix(f"{model.base_model_prefix}.")))
        if found is not None and found != DTYPES[weight.dtype]:
            cast.add(f"{found} in the files, {DTYPES[weight.dtype]} by the config ({name})")
    if cast:
        raise UnsupportedModel(
            f"{folder}: files and config disagree on the dtype: {min(cast)}. Set dtype in config.json to what the "
            "files hold, or save the model again."
        )


@lru_cache(maxsize=1)
def shared_model(folder: Path, device: str) -> nn.Module:
    """Like `load_model`, but the last one stays loaded: the stages of a run need not read the parent again.

    Whoever changes weights puts them back (see `pipeline.sparse.SalientWeights`).
    """
    return load_model(folder, device)


@lru_cache(maxsize=1)
def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        UnsupportedModel: It cannot be loaded without running code from the folder.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise UnsupportedModel(f"{folder}: the tokenizer cannot be loaded: {error}. Restore its files.") from error


def check_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for, or that cannot spell a plain sentence.

    Raises:
        UnsupportedModel: With the two sizes.
    """
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise UnsupportedModel(
            f"The tokenizer has ids up to {largest}, the model embeds {rows}. It belongs to another model; "
            "put the right tokenizer into the folder."
        )
    sample = "The quick brown fox jumps over the lazy dog."
    if not tokenizer(sample, add_special_tokens=False)["input_ids"]:
        raise UnsupportedModel(
            "The tokenizer turns a plain sentence into no tokens; put the right one into the folder."
        )


def target_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that a takedown may change: every linear map, but not embeddings or the output head.

    Embeddings and head are left out because they are shared by all texts (and with each other where tied).

    Returns:
        Parameter name → weight, 2-D, in the model's order.

    Raises:
        UnsupportedModel: The model has none.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = {id(m.weight) for m in (model.get_input_embeddings(), head) if m is not None}  # type: ignore[operator]
    found: dict[str, nn.Parameter] = {
        f"{name}.weight": module.get_parameter("weight")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in tied
    }
    stacked = [name for name, weight in model.named_parameters() if weight.ndim > 2]
    if stacked:
        # Mixture-of-experts layers: leaving them out would silently unlearn with the attention alone.
        raise UnsupportedModel(
            f"{type(model).__name__}: has stacked weights ({', '.join(stacked[:3])} …), as mixtures of experts do; "
            "they are not supported yet. Nothing was changed."
        )
    if not found:
        raise UnsupportedModel(f"{type(model).__name__}: has no linear weights that could be changed.")
    return found


def software() -> dict[str, str]:
    """Versions of what computes, recorded with every version."""
    import peft

    import pipeline

    return {
        "takedown-pipeline": pipeline.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def file_names(parameters: Mapping[str, object], stored: Mapping[str, object], prefix: str) -> dict[str, str]:
    """Map parameter names to tensor names in the files.

    A checkpoint saved from the bare body of a model lacks the body's prefix (``transformer.`` in GPT-2).

    Args:
        parameters: Parameter names of the loaded model.
        stored: Tensor names in the files.
        prefix: ``model.base_model_prefix``.

    Raises:
        UnsupportedModel: With every parameter that has no tensor.
    """
    mapping, missing = {}, []
    for name in parameters:
        bare = name.removeprefix(f"{prefix}.")
        if name in stored:
            mapping[name] = name
        elif bare in stored:
            mapping[name] = bare
        else:
            missing.append(name)
    if missing:
        raise UnsupportedModel(
            f"The files hold no tensor for {', '.join(missing)}. transformers converts these while loading; "
            "save the model once with save_pretrained and start from that folder."
        )
    return mapping
