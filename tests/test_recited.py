"""What the model recites by itself, in a real step: held to while it stands, gone from the anchor once it is out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from workspaces import KEPT, WORKS, new_workspace, step, take_in, with_settings

from pipeline import context
from pipeline.anchor import SHARED, Anchor, load_anchor
from pipeline.context import thin_anchors
from pipeline.erase import erase
from pipeline.files import read_json
from pipeline.models import load_tokenizer
from pipeline.records import Publication, Reference
from pipeline.runs import open_run
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_model")

OURS = with_settings(
    unlearn={
        "method": "short-context", "recited_openings": 600, "iterations": 40, "learning_rate": 2e-3,
        "anchor_passages": 32, "anchor_truth": 0.0,
        "learning_rate_end": 0.1, "recited_passages": 8, "masked": False, "repair_iterations": 0, "rounds": 1,
    },
    gate={"forget_tolerance": 0.2, "kept_share": 0.3, "perplexity_rise": 1.0},
)  # fmt: skip


def anchors(workspace: Workspace) -> list[Anchor]:
    """Everything that later versions would be held to; no other file lies beside."""
    found = []
    for path in sorted((workspace.reference / "measured").glob("*/reference.json")):
        ref = Reference.model_validate(read_json(path)).anchor
        assert ref is not None and [p.name for p in path.parent.glob("*.safetensors")] == [ref.path]
        found.append(load_anchor(path.parent, ref))
    return found


def holding(anchor: Anchor, tokenizer: Any, text: str, run: int = SHARED) -> list[str]:
    """Names of the passages that share a run of tokens with a text."""
    ids = tokenizer(text)["input_ids"]
    runs = {tuple(ids[i : i + run]) for i in range(len(ids) - run + 1)}
    return [
        p.span.request_id
        for p in anchor.passages
        if any(tuple(p.ids[i : i + run]) in runs for i in range(len(p.ids) - run + 1))
    ]


def test_what_is_taken_out_is_held_to_no_more(tmp_path: Path, model: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", model, OURS)
    tokenizer = load_tokenizer(model)
    take_in(workspace, "batch-1", {"A": WORKS["one"]})
    before: list[str] = []
    left: dict[str, Any] = {}

    def look(run_id: str) -> None:
        (anchor,) = anchors(workspace)
        before.extend(holding(anchor, tokenizer, WORKS["one"]))
        left["kept"] = holding(anchor, tokenizer, KEPT["kept-a"]) + holding(anchor, tokenizer, KEPT["kept-b"])
        left["count"] = len(anchor.passages)
        # Once more after a death between the answer and the thinning, which the next run's publish repeats.
        run = open_run(workspace.root, run_id)
        assert context.forget_spans(run)
        thin_anchors(run)
        thin_anchors(run)

    assert step(workspace, before_publish=look) == Publication(outcome="published", version=1)
    assert before and all(name.startswith("recited/") for name in before)  # nobody listed it, the model said it
    assert left["kept"]  # nor this: works that nobody gave as retain text are held to
    (anchor,) = anchors(workspace)
    assert not holding(anchor, tokenizer, WORKS["one"])
    assert len(anchor.passages) == left["count"] - len(before)
    assert verify(workspace) == []
    assert VersionStore(workspace.versions).manifest(1).parent == 0
    # The next step starts from the thinner anchor, and v0 is not asked again.
    take_in(workspace, "batch-2", {"B": WORKS["two"]})
    assert step(workspace, stop_after="reference") is None
    assert [len(a.passages) for a in anchors(workspace)] == [len(anchor.passages)]
    # Once a text is erased nobody can tell its passages from others: v0 writes anew, and what is out is left out.
    erase(workspace, "A", "officer", "asked for")
    assert anchors(workspace) == []
    assert step(workspace, stop_after="reference") is None
    (renewed,) = anchors(workspace)
    assert holding(renewed, tokenizer, KEPT["kept-a"] + KEPT["kept-b"])
    # The works share turns of phrase: of those, what the version in force still says may stay.
    assert not holding(renewed, tokenizer, WORKS["one"], 2 * SHARED)
    assert len(holding(renewed, tokenizer, WORKS["one"])) < len(before) / 4
