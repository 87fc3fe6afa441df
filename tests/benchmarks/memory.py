"""Memory that a step is estimated to need against the peak that it is measured to need, stage by stage.

Models of random weights, since memory does not depend on what they say; every case in a process of its own, because a
peak cannot be told from what an earlier case left. Peaks as `pipeline.benchmark.cost` has them.

    python -m tests.benchmarks.memory [--small]
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES = (
    "llama full",
    "llama lora",
    "gpt2 full",
    "gpt2 lora",
    "llama-bf16 full",
    "llama unmasked",
    "llama short-context",
)
SIZES = {"small": (256, 4, 4000, 2048), "large": (512, 6, 8000, 2048)}
"""Width, layers, vocabulary, tokens in a batch."""
COUNT = 18
"""Passages of 128 tokens of each kind: more than a batch."""


def build(folder: Path, kind: str, width: int, layers: int, vocabulary: int) -> None:
    """A model folder of random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=4, n_positions=256)
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
                        intermediate_size=3 * width, max_position_embeddings=256)
        )  # fmt: skip
    model = model.to(torch.bfloat16) if kind.endswith("bf16") else model
    model.save_pretrained(folder)


def measured(case: str, size: str) -> dict[str, tuple[int, int]]:
    """Estimated and measured bytes by stage."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.anchor import build_anchor
    from pipeline.benchmark.cost import Meter, resident
    from pipeline.estimate import Shape, model_size, step_need
    from pipeline.metrics import score_passages
    from pipeline.passages import Passage
    from pipeline.records import NeverSeenLevel, PassageSpan
    from pipeline.safefile import read_header
    from pipeline.settings import Settings
    from pipeline.workbench import StepTexts, Workbench, select_weights

    kind, how = case.split()
    width, layers, vocabulary, batch_tokens = SIZES[size]
    everything = how in ("unmasked", "short-context")
    settings = Settings.model_validate({
        "unlearn": {"method": "short-context" if how == "short-context" else "ssu", "recited_openings": 0,
                    "parameterisation": "lora" if how == "lora" else "full", "masked": not everything,
                    "iterations": 1, "repair_iterations": 1, "repair_min_iterations": 1,
                    "anchor_pool": COUNT, "anchor_passages": COUNT, "passages_per_iteration": COUNT},
        "calibrate": {"fixed_alpha": 1.0},
        "runtime": {"device": "cpu", "batch_tokens": batch_tokens, "workers": 1},
    })  # fmt: skip
    draw = random.Random(1)

    def passages(count: int, prompt: int) -> list[Passage]:
        return [
            Passage(PassageSpan(request_id=f"{prompt}-{i}", prompt_start=0, start=64, end=128),
                    tuple(draw.randrange(vocabulary) for _ in range(128)), prompt)
            for i in range(count)
        ]  # fmt: skip

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), kind, width, layers, vocabulary)
        shapes = [Shape(t.name, t.dtype, t.shape) for p in Path(folder).glob("*.safetensors")
                  for t in read_header(p).tensors]  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").requires_grad_(False).eval()
    held = resident()[0] - model_size(shapes).nbytes
    forget = passages(COUNT, 16)

    def peak(meter: Meter) -> int:
        return meter.cost.peak_bytes - held

    found: dict[str, int] = {}
    with Meter(model) as meter:
        score_passages(model, forget, 0, batch_tokens)
        anchor = build_anchor(model, passages(COUNT, 1), settings.unlearn.anchor_top_k, 0, batch_tokens)
    found["reference"] = peak(meter)
    with Meter(model) as meter:
        mask = select_weights(model, forget, settings, 0).mask
    if not everything:
        found["saliency"] = peak(meter)
    level = NeverSeenLevel(mean=0.0, std=0.1, passages=1, source="held-out")
    texts = StepTexts({"a": forget}, forget, {}, anchor)
    with Meter(model) as meter:
        bench = Workbench(model, mask, texts, level, settings, 0)
        fitted = bench.fitted()
    found["unlearn"] = peak(meter)
    with Meter(model) as meter:
        bench.repaired(fitted.vector, 1.0)
    found["repair"] = peak(meter)
    selected = sum(int(m.sum()) for m in mask.values())
    need = step_need(model_size(shapes), settings, selected)
    return {s.stage: (s.memory_bytes, found[s.stage]) for s in need.stages if s.stage in found}


def table(size: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Every case, each in a fresh process."""
    found = {}
    for case in CASES:
        command = [sys.executable, "-m", "tests.benchmarks.memory", "--case", case, size]
        found[case] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    if "--case" in sys.argv:
        print(json.dumps(measured(*sys.argv[-2:])))
        return
    print(f"{'case':<18}{'stage':<12}{'estimate MB':>12}{'measured MB':>12}{'ratio':>8}")
    for case, stages in table("small" if "--small" in sys.argv else "large").items():
        for stage, (estimate, peak) in stages.items():
            print(f"{case:<18}{stage:<12}{estimate / 1e6:>12.0f}{peak / 1e6:>12.0f}{estimate / peak:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
