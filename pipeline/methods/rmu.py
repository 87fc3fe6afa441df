"""RMU: steer the hidden states of the text to a random direction, keep those of retain text.

Li et al. (arXiv 2403.03218, eq. 1 and 2): mean over tokens of ‖h_l(f) - c·u‖² + α·‖h_l(r) - h_l^parent(r)‖², u uniform
in [0, 1)^d and normalised, drawn once, h_l the output of one block.

Deviations: l and c are relative, a share of the depth and a multiple of the parent's mean hidden norm there (as Dang et
al., arXiv 2408.06223, scale it), since the published numbers fit one model each; both terms are divided by c², so that
losses of different models compare. All target weights up to block l may move, not only three of its matrices.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.fit import Backward, Fit, Trace
from pipeline.methods.method import Method
from pipeline.methods.retain import EVERY, chosen
from pipeline.passages import Passage, TokenBatch, batches
from pipeline.terms import device_of, some


def steered_block(blocks: int, depth: float) -> int:
    """How many blocks lie below the steered hidden state: a share of all, at least one, never all where avoidable.

    The last hidden state is the one that models normalise before they return it.
    """
    return max(1, min(round(blocks * depth), blocks - 1))


def hidden(model: nn.Module, batch: TokenBatch, blocks: int) -> torch.Tensor:
    """(B, L, d), the hidden states after so many blocks."""
    out = model(
        input_ids=batch.ids,
        attention_mask=batch.attention,
        output_hidden_states=True,
        logits_to_keep=1,
        use_cache=False,
    )
    states: torch.Tensor = out.hidden_states[blocks]
    return states


def squared_distance(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of ‖h - wanted‖², a scalar in float32; (T, d) each."""
    return (states.float() - wanted).square().sum()


def control_vector(size: int, norm: float, seed: int) -> torch.Tensor:
    """c·u: (d,) float32, uniform and not negative, of length ``norm``."""
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return drawn * (norm / float(drawn.norm()))


def parent_states(fit: Fit, passages: Sequence[Passage], blocks: int) -> list[torch.Tensor]:
    """The hidden states of each passage, (L, d) float32 on the CPU, of the model as it stands."""
    found = [torch.empty(0)] * len(passages)
    with torch.inference_mode():
        for batch in batches(passages, fit.max_tokens, fit.pad_id, device_of(fit)):
            states = hidden(fit.model, batch, blocks)
            for row, index in enumerate(batch.rows):
                found[index] = states[row][batch.attention[row].bool()].float().cpu()
    return found


def prepare(fit: Fit) -> Backward:
    """Steering of the forget text, and α · distance of retain text from the parent's hidden states."""
    settings = fit.settings
    blocks = steered_block(int(fit.model.config.num_hidden_layers), settings.method_settings.rmu_depth)  # type: ignore[union-attr,arg-type]
    pool = chosen(fit, EVERY)
    held = [*pool, *fit.put_back.passages]
    kept = dict(zip(held, parent_states(fit, held, blocks), strict=True))
    text = torch.cat(parent_states(fit, fit.forget, blocks))
    length = settings.method_settings.rmu_steering * float(text.norm(dim=-1).double().mean())
    control = control_vector(text.shape[-1], length, fit.seed)
    steered = {p: control.expand(len(p.ids), -1) for p in fit.forget}

    def distance(
        passages: Sequence[Passage], wanted: Mapping[Passage, torch.Tensor], weight: float, trace: Trace
    ) -> float:
        """Backpropagate weight · mean over tokens of the squared distance to what is wanted, in units of c²."""
        tokens, total = sum(len(p.ids) for p in passages), 0.0
        for batch in batches(passages, fit.max_tokens, fit.pad_id, device_of(fit)):
            states = hidden(fit.model, batch, blocks)[batch.attention.bool()]
            goal = torch.cat([wanted[passages[i]] for i in batch.rows]).to(states.device)
            loss = squared_distance(states, goal) * (weight / (tokens * length**2))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            trace.tokens += batch.ids.numel()
        return total

    def backward(passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
        loss = distance(passages, steered, 1.0, trace)
        retained = some(fit, pool, random_) if settings.anchor_weight else ()
        return loss + (distance(retained, kept, settings.anchor_weight, trace) if retained else 0.0)

    return backward


RMU = Method("rmu", "RMU", "Li et al. 2403.03218, eq. 1 and 2", prepare)
