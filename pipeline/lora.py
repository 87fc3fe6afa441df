"""The ``lora`` parameterisation: W + m⊙(s·BA), with the mask in the forward pass and in the merge.

In: a `Fit` and a loss. Out: the same kind of displacement as `pipeline.unlearn.fit_full`. peft builds the factors; the
mask is ours, because a mask on the factors is dense once they are multiplied (the fault of the published code).
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.fit import Backward, Descent, Fit, Trace, record, schedule
from pipeline.sparse import Mask, Vector
from pipeline.unlearn import BETAS

ADAPTER = "default"


class MaskedLora(LoraLinear):  # type: ignore[misc]
    """peft's LoRA layer with a mask on the product of its factors; serves nn.Linear and GPT-2's Conv1D."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)  # Conv1D keeps its weight transposed
        self.mask = torch.tensor(False)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """m ⊙ (s·BA) in float32, in the layout of the base weight."""
        delta: torch.Tensor = self.lora_B[adapter].weight.float() @ self.lora_A[adapter].weight.float()
        if self.fan_in_fan_out:
            delta = delta.T
        scale: float = self.scaling[adapter]
        return delta * scale * self.mask

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x · (W + m⊙(s·BA)) + b."""
        base = self.get_base_layer()
        weight = base.weight + self.get_delta_weight(ADAPTER).to(base.weight.dtype)
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, base.bias)


def fit_lora(fit: Fit, mask: Mask, backward: Backward) -> tuple[Vector, Trace]:
    """Fit m ⊙ (s·BA) by descending a method's loss over the factors.

    Returns:
        The displacement at the salient coordinates, and the trace. The model is as before, without adapters.

    Raises:
        NumericalFailure: The loss is not finite.
    """
    settings = fit.settings
    layers = {name.removesuffix(".weight"): m for name, m in mask.items()}
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=0.0, target_modules=list(layers),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    config._register_custom_module({nn.Linear: MaskedLora, Conv1D: MaskedLora})
    torch.manual_seed(fit.seed)  # peft draws A from the global generator
    adapted = get_peft_model(fit.model, config, autocast_adapter_dtype=False)
    trace, random_ = Trace(), random.Random(f"{fit.seed} fit")
    try:
        adapters = dict(_masked_layers(adapted))
        for name, module in adapters.items():
            module.mask = layers[name].to(module.get_base_layer().weight.device)
            module.lora_A.float()  # factors in float32: bfloat16 loses the small steps of a fit
            module.lora_B.float()
        factors = [
            p for module in adapters.values() for p in (*module.lora_A.parameters(), *module.lora_B.parameters())
        ]
        optimiser = torch.optim.AdamW(
            factors, lr=settings.lora_learning_rate, betas=BETAS, weight_decay=settings.weight_decay
        )
        named = {str(i): factor for i, factor in enumerate(factors)}
        whole = Descent(optimiser, named, random_, trace, backward)
        done, _ = whole.take_up(fit.halfway)
        for passages, share in schedule(fit, trace, done):
            for group in optimiser.param_groups:
                group["lr"] = settings.lora_learning_rate * share
            record(fit, backward(passages, random_, trace), trace)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            whole.note(fit.halfway, len(trace.losses))
        with torch.no_grad():
            vector = {
                f"{name}.weight": fit.salient.gather(f"{name}.weight", module.get_delta_weight(ADAPTER))
                for name, module in adapters.items()
            }
    finally:
        adapted.unload()
        fit.model.requires_grad_(False)
    return vector, trace


def _masked_layers(adapted: nn.Module) -> list[tuple[str, Any]]:
    """The adapted layers under their names in the plain model."""
    return [
        (name.removeprefix("base_model.model."), module)
        for name, module in adapted.named_modules()
        if isinstance(module, MaskedLora)
    ]
