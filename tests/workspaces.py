"""A very small model that really recites a few short works, and workspaces around it, for the end-to-end tests.

Everything is drawn from seeds: works, prose and held-out text come from one generator, so that never-seen text is of
the same kind as what is taken down. Expensive results (the model, a published workspace) are made once per session
and copied; tests never write into the originals.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.records import Publication, TakedownRequest
    from pipeline.runs import Plan
    from pipeline.workspace import Workspace

STOCK = {
    "noun": """lantern harbour miller orchard violin glacier ferry compass widow baker clock ladder meadow falcon ledger
        candle bridge quarry sailor mirror garden thimble anchor chapel beacon saddle barrel needle tailor pigeon cellar
        kettle trumpet wagon scarf hedge river puppet locket mason""",
    "adjective": """amber brittle crooked distant eager faded gentle hollow idle jagged keen lonely mossy narrow older
        patient quiet rusty silver tangled upright velvet weary yellow zealous copper drowsy frozen golden humble""",
    "verb": """carried mended followed painted counted buried forgot traded polished weighed guarded borrowed watched
        measured opened answered hid burned lifted praised repaired sold tied washed wound named copied drew""",
    "place": "beneath behind beside beyond across inside near under above past around before",
    "time": "yesterday tonight slowly twice afterwards never seldom gladly again once later softly",
}
"""Rich enough that no sentence can be guessed: what the model then gets right, it has memorised."""

FRAMES = (
    "the {adjective} {noun} {verb} a {noun} {place} the {noun}",
    "a {noun} {verb} the {adjective} {noun} {time}",
    "{place} the {noun} a {adjective} {noun} {verb} {time}",
    "{time} the {noun} {verb} {adjective} {noun} and {noun}",
)


def draw_text(name: str, words: int) -> str:
    """Prose that is the same for the same name: sentences of words drawn at random."""
    draw = random.Random(name)
    sentences: list[str] = []
    while sum(len(s.split()) for s in sentences) < words:
        frame, slots = draw.choice(FRAMES), {kind: stock.split() for kind, stock in STOCK.items()}
        parts = [draw.choice(slots[w[1:-1]]) if w.startswith("{") else w for w in frame.split()]
        sentences.append(" ".join(parts).capitalize() + ".")
    return " ".join(sentences)


WORKS = {name: draw_text(name, 70) for name in ("one", "two", "three")}
"""Works that the model recites and that get taken down."""
KEPT = {name: draw_text(name, 70) for name in ("kept-a", "kept-b")}
"""Works that it recites and must keep."""
RETAIN = {f"retain-{i}": draw_text(f"retain-{i}", 90) for i in range(8)}
"""Seen in training, but not often enough to be recited."""
PROSE = {f"prose-{i}": draw_text(f"prose-{i}", 200) for i in range(40)}
"""Only ever trained on."""
HELDOUT = {f"heldout-{i}": draw_text(f"heldout-{i}", 90) for i in range(5)}
"""Never seen."""
UNSEEN = draw_text("unseen", 70)
"""Never seen, and asked to be taken down nevertheless."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "intake": {"settle_s": 0.0},
    "passages": {"prompt_tokens": 16, "continuation_tokens": 16, "first_prompt_tokens": 8},
    "unlearn": {
        "method": "ssu",
        "saliency_k": 1.0,
        "random_label_weight": 0.1,
        "anchor_weight": 8.0,
        "iterations": 10,
        "learning_rate": 1e-3,
        "repair_iterations": 60,
        "repair_min_iterations": 8,
        "repair_learning_rate": 2e-3,
        "anchor_passages": 8,
        "anchor_top_k": 32,
    },
    "screen": {"sigma": 3.0},
    "calibrate": {"margin": 0.02},
    "evaluate": {"generate_passages": 1},
    "gate": {"forget_tolerance": 0.05, "reinstated_share": 0.5, "kept_share": 0.3, "perplexity_rise": 1.0},
    "runtime": {"device": "cpu"},
}
"""For a model of this size: short passages, large steps, and a gate that is strict on forgetting only.

What the outcomes below depend on is written out, so that other defaults do not change them.
"""


def toml(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Settings as takedown.toml; JSON's scalars are TOML's."""
    return "\n".join(
        line
        for section, values in settings.items()
        for line in (f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()))
    )


def with_settings(**sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`SETTINGS` with some keys changed."""
    return {name: {**SETTINGS.get(name, {}), **sections.get(name, {})} for name in {**SETTINGS, **sections}}


_made: dict[str, Path] = {}


def trained_model(folder: Path) -> Path:
    """The model folder; trained below ``folder`` on the first call of the process, in some 5 seconds."""
    if "model" not in _made:
        import torch

        from pipeline.training import TrainingSettings, train

        torch.set_num_threads(1)  # results must not depend on the machine, and the model is too small to share
        settings = TrainingSettings(
            vocabulary=1000, width=48, layers=2, heads=4, feed_forward=96, context=96, batch=8, recite_share=0.6,
            max_steps=500, check_every=25, learning_rate=6e-3, recited=0.95,
        )  # fmt: skip
        made = folder / "model"
        recited = train([*WORKS.values(), *KEPT.values()], [*RETAIN.values(), *PROSE.values()], made, settings)
        assert recited > 0.9, f"the model recites its works with {recited:.3f} only"
        _made["model"] = made
    return _made["model"]


def write_texts(folder: Path, texts: Mapping[str, str]) -> Path:
    """A folder of ``*.txt`` files."""
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def new_workspace(
    root: Path, model: Path, settings: Mapping[str, Mapping[str, Any]] = SETTINGS, references: bool = True
) -> Workspace:
    """A workspace at v0, with or without reference texts."""
    from pipeline.lineage import start_lineage

    texts = {"retain": RETAIN, "kept": KEPT, "heldout": HELDOUT} if references else {}
    folders = {kind: write_texts(root.with_name(f"{root.name}-{kind}"), found) for kind, found in texts.items()}
    workspace = start_lineage(root, str(model), folders, "tester")
    workspace.settings_file.write_text(toml(settings))
    return workspace


def near_copy(text: str) -> str:
    """The text with one word in its middle exchanged."""
    words = text.split()
    words[len(words) // 2] = "quietly"
    return " ".join(words)


def write_batch(folder: Path, batch_id: str, texts: Mapping[str, str], **fields: str) -> Path:
    """A batch file; ``texts`` by request id, ``fields`` are the same for every request."""
    path = folder / f"{batch_id}.json"
    requests = [
        {"request_id": name, "title": f"Work {name}", "rights_holder": "A. Holder", "basis": "copyright", "text": text}
        for name, text in texts.items()
    ]
    tree = {"batch_id": batch_id, "received_at": "2026-11-23T09:00:00Z", "requests": [r | fields for r in requests]}
    path.write_text(json.dumps(tree))
    return path


def take_in(workspace: Workspace, batch_id: str, texts: Mapping[str, str], **fields: str) -> None:
    """Submit a batch and remove its file."""
    from pipeline.submit import submit

    path = write_batch(workspace.root.parent, batch_id, texts, **fields)
    submit(workspace, path, "tester")
    path.unlink()


def plain_record(vault: Path, request: TakedownRequest) -> Path:
    """A record as releases before encryption wrote it, and without its key."""
    from pipeline.files import canonical_json, digest_bytes, digest_json

    path = vault / f"{digest_bytes(request.request_id.encode()).removeprefix('sha256:')}.json"
    value = request.model_dump(mode="json")
    path.write_bytes(canonical_json({"digest": digest_json(value), "request": value}) + b"\n")
    path.with_suffix(".key").unlink(missing_ok=True)
    return path


STAGES = (
    "reference",
    "dedupe_stage",
    "screen",
    "saliency",
    "unlearn",
    "repair_stage",
    "merge_stage",
    "evaluate",
    "gate",
)
TRAINING = ("saliency", "unlearn", "repair_stage")
DECIDING = ("merge_stage", "evaluate", "gate")
"""The functions of `pipeline.stages` in front of ``publish``, in the order of `flows.takedown`."""


def step(
    workspace: Workspace,
    requests: Sequence[str] | None = None,
    stop_after: str | None = None,
    before_publish: Callable[[str], object] = lambda run_id: None,
) -> Publication | None:
    """What `flows.takedown` does, without Prefect.

    Args:
        workspace: Where.
        requests: As the flow takes them.
        stop_after: Stage to stop after, as a process would that died there.
        before_publish: Called with the run id once everything is computed.
    """
    from pipeline.runs import plan_run
    from pipeline.workspace import writing

    with writing(workspace):
        plan = plan_run(workspace, requests)
        return _carried_out(workspace, plan, STAGES, stop_after, before_publish) if plan else None


def reinstatement(
    workspace: Workspace,
    requests: Sequence[str],
    stop_after: str | None = None,
    before_publish: Callable[[str], object] = lambda run_id: None,
) -> Publication | None:
    """What `flows.takedown.reinstate` does, without Prefect; see `step`."""
    from pipeline.reinstate import plan_reinstatement
    from pipeline.workspace import writing

    with writing(workspace):
        plan = plan_reinstatement(workspace, requests, "tester", "licence shown")
        stages = ("reference", "leave_out_stage", *STAGES[1:])
        return _carried_out(workspace, plan, stages, stop_after, before_publish) if plan else None


def _carried_out(
    workspace: Workspace,
    plan: Plan,
    names: Sequence[str],
    stop_after: str | None,
    before_publish: Callable[[str], object],
) -> Publication | None:
    from pipeline import answers, context, stages

    root = str(workspace.root)
    for name in names:
        if name in TRAINING and not stages.needs_training(root, plan.run_id):
            continue
        if name in DECIDING and not stages.needs_version(root, plan.run_id):
            break
        getattr(context if name == "reference" else stages, name)(root, plan.run_id)
        if name == stop_after:
            return None
    before_publish(plan.run_id)
    # The run's id depends on the vault's key; without it two workspaces can be compared.
    return answers.publish(root, plan.run_id, "tester", "licence shown").model_copy(update={"run_id": ""})


def published(folder: Path) -> Path:
    """A workspace with v1 (request A), of which copies are made; built on the first call of the process."""
    if "published" not in _made:
        workspace = new_workspace(folder / "published", trained_model(folder))
        take_in(workspace, "batch-1", {"A": WORKS["one"], "B": near_copy(WORKS["one"]), "C": UNSEEN})
        outcome = step(workspace)
        assert outcome is not None and outcome.outcome == "published", outcome
        _made["published"] = workspace.root
    return _made["published"]


def copied(source: Path, target: Path) -> Workspace:
    """A copy of a workspace to write into."""
    from pipeline.workspace import open_workspace

    shutil.copytree(source, target)
    return open_workspace(target)


def leaks(secrets: Sequence[str], root: Path, *more: bytes | Path) -> list[str]:
    """Where a secret stands in a workspace outside its vault, in other folders, or in output.

    Looked for as UTF-8 and UTF-16, and inside Base64 at each of its three offsets.
    """
    needles = {form for secret in secrets for form in _forms(secret)}
    files = [(str(p), p.read_bytes()) for p in _files(root) if root / "vault" not in p.parents]
    for item in more:
        if isinstance(item, bytes):
            files.append(("output", item))
        else:
            files += [(str(p), p.read_bytes()) for p in _files(item)]
    assert len(files) > 3, "there is hardly anything to look at"
    return [f"{where}: {needle!r}" for where, data in files for needle in needles if needle in data]


def _files(root: Path) -> list[Path]:
    return [p for p in sorted(root.rglob("*")) if p.is_file() and not p.is_symlink()]


def _forms(secret: str) -> list[bytes]:
    raw = secret.encode()
    # Characters at either end of a Base64 form also depend on the neighbours; they are left out.
    encoded = [base64.b64encode(b"\0" * shift + raw)[4 if shift else 0 : -4] for shift in range(3)]
    return [raw, secret.encode("utf-16-le"), *encoded]
