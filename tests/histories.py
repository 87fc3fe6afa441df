"""Histories without a language model: real stores, ledgers, vaults and runs around small arrays of random weights.

Everything is made by the code that makes it in production, from the records that the stages would have left; only the
stages themselves, which need a model that recites something, are replaced. A step takes some 50 ms.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from workspaces import draw_text, take_in

from pipeline.files import digest_file, explained_space, write_json
from pipeline.ledger import Ledger
from pipeline.records import (
    Calibration,
    Comparison,
    DedupeDecision,
    DedupeReport,
    Evaluation,
    Evidence,
    FileRef,
    LedgerEntry,
    MaskReport,
    MergeReport,
    NeverSeenLevel,
    PassageSpan,
    Record,
    ScreenedRequest,
    ScreenReport,
    Step,
    TextScore,
    VectorReport,
    Verdict,
)
from pipeline.runs import Run, open_run, plan_run
from pipeline.safefile import model_root
from pipeline.states import current_version, excluded
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, open_workspace, writing

LEVEL = NeverSeenLevel(mean=0.16, std=0.05, passages=40, source="held-out")
NOWHERE = FileRef(path="none", digest="sha256:" + "0" * 64)


def array_model(
    folder: Path, seed: int = 0, tensors: int = 3, shape: tuple[int, ...] = (16, 8), bfloat16: bool = False
) -> Path:
    """A model folder of random weights; bfloat16 is written as such, though numpy has no name for it."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng([seed, 0])
    weights = {f"layer.{i}.weight": draw.normal(0, 0.02, shape).astype(np.float32) for i in range(tensors)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if bfloat16:
        as_bfloat16(folder / "model.safetensors", weights)
    (folder / "config.json").write_text('{"model_type": "arrays"}')
    return folder


def as_bfloat16(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Write weights cut to their upper 16 bits, with the dtype code of bfloat16."""
    save_file({n: (w.view("<u4") >> 16).astype("<u2").view("<i2") for n, w in weights.items()}, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"I16"', b'"BF16"').rstrip()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def changed_copy(source: Path, target: Path, share: float, seed: int) -> int:
    """Copy a model folder with a share of each tensor's entries moved by a tenth of their spread.

    Returns:
        The number of entries whose bits differ.
    """
    shutil.copytree(source, target)
    draw, count = np.random.default_rng([seed, 1]), 0
    for path in sorted(target.glob("*.safetensors")):
        path.chmod(0o644)
        with safe_open(path, "np") as file:
            kinds = {n: file.get_slice(n).get_dtype() for n in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:start]))
        for name, kind in kinds.items():
            begin, end = header[name]["data_offsets"]
            width = "<u2" if kind == "BF16" else "<u4"
            bits = np.frombuffer(data, width, count=(end - begin) // int(width[2]), offset=start + begin)
            moved = draw.random(bits.size) < share
            new = bits.copy()
            new[moved] ^= draw.integers(1, 8, int(moved.sum())).astype(width)
            count += int((new != bits).sum())
            data[start + begin : start + end] = new.tobytes()
        path.write_bytes(bytes(data))
    return count


def start_history(root: Path, model: Path) -> Workspace:
    """A workspace whose v0 is a folder of arrays."""
    from pipeline.lineage import _fill

    root.mkdir(parents=True)
    _fill(Workspace(root), model, {}, "tester")
    return open_workspace(root)


def entries_of(workspace: Workspace) -> tuple[LedgerEntry, ...]:
    """All ledger entries."""
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        return ledger.entries()


def _score(em: float) -> TextScore:
    return TextScore(exact_memorisation=em, extraction_strength=0.0, rouge_1=em, rouge_l=em, longest_run=2, nll=4 - em)


def _compare(name: str, role: str, before: float, after: float) -> Comparison:
    return Comparison.model_validate({"name": name, "role": role, "before": _score(before), "after": _score(after)})


def prepare_step(
    workspace: Workspace,
    requests: Sequence[str],
    share: float = 0.05,
    accepted: bool = True,
    submit: bool = True,
    evidence: Sequence[Evidence] = (),
) -> str:
    """Take requests in and leave a run that has everything but its publish; the caller holds no lock.

    Args:
        workspace: Where.
        requests: Their ids.
        share: Of the weights that the step changes.
        accepted: Whether the gate accepts.
        submit: Whether the requests are still to be taken in.
        evidence: What deduplication found of each.

    Returns:
        The run's id.
    """
    if submit:
        take_in(workspace, f"batch-{requests[0]}", {name: draw_text(name, 30) for name in requests})
    with writing(workspace):
        plan = plan_run(workspace, list(requests), "tester")
        assert plan is not None
        run = open_run(workspace.root, plan.run_id)
        parent = run.folder / f"v{plan.parent}"  # as `pipeline.context.model_folder` leaves it
        if not parent.exists():
            VersionStore(workspace.versions).restore(plan.parent, parent)
        parent.with_suffix(".restored").touch()
        standing = excluded(entries_of(workspace), plan.parent).items()
        earlier = [n for n, state in standing if n not in requests and not state.erased]
        after = LEVEL.mean + (0.01 if accepted else 0.5)
        _leave_records(
            run,
            parent,
            share,
            requests,
            (
                *(_compare(n, "this", 1.0, after) for n in requests),
                *(_compare(n, "earlier", 0.15, 0.15) for n in earlier),
            ),
            () if accepted else (f"{requests[0]} (this): too high.",),
            evidence,
        )
    return plan.run_id


def _leave_records(
    run: Run,
    start: Path,
    share: float,
    worked_on: Sequence[str],
    measured: Sequence[Comparison],
    broken: Sequence[str],
    evidence: Sequence[Evidence] = (),
) -> None:
    """Leave the candidate of a run, and what its stages from ``dedupe`` to ``gate`` record.

    Args:
        run: The run.
        start: What its candidate is made from.
        share: Share of the entries that change.
        worked_on: Requests of which the start recites something.
        measured: Requests, before and after.
        broken: Limits that the gate finds broken; none where it accepts.
        evidence: What deduplication found of each request.
    """
    candidate = run.folder / "candidate"
    with explained_space(candidate):  # as merging does
        shutil.rmtree(candidate, ignore_errors=True)  # what a run that was stopped left there
        changed = changed_copy(start, candidate, share, seed=run.plan.parent + 1)
    total = sum(w.size for p in candidate.glob("*.safetensors") for w in _arrays(p))
    step = Step(
        vector=VectorReport(vector=NOWHERE, norm=1.0, losses=(2.0, 1.0), tokens=1000),
        calibration=Calibration(
            vector=NOWHERE, alpha=0.5, target=0.18, reached=not broken, bounded_by_utility=False, curve=()
        ),
    )
    records: dict[str, Record] = {
        "dedupe": DedupeReport(
            decisions=tuple(
                DedupeDecision(
                    request_id=n,
                    verdict="fresh",
                    covered=0.0,
                    evidence=tuple(evidence),
                    uncounted=0.25 * bool(evidence),
                )
                for n in run.plan.requests
            ),
            retain_excluded=(),
        ),
        "screen": ScreenReport(
            level=LEVEL,
            memorised_above=0.31,
            requests=tuple(
                ScreenedRequest(
                    request_id=n,
                    passages=1,
                    memorised=(PassageSpan(request_id=n, prompt_start=0, start=16, end=32),) if n in worked_on else (),
                    exact_memorisation=1.0 if n in worked_on else 0.15,
                    longest_extraction=0.9 if n in worked_on else 0.0,
                )
                for n in run.plan.requests
            ),
        ),
        "saliency": MaskReport(
            mask=NOWHERE, mean=0.1, std=0.1, k=1.0, threshold=0.2, selected=changed, total=total, per_tensor={}
        ),
        "unlearn": step,
        "repair": step,
        "merge": MergeReport(
            files=tuple(FileRef(path=p.name, digest=digest_file(p)) for p in sorted(candidate.iterdir())),
            root=model_root(candidate),
            selected=changed,
            changed=changed,
            changed_tensors=(),
        ),
        "evaluate": Evaluation(
            level=LEVEL,
            comparisons=(
                *measured,
                _compare("kept/a.txt", "kept", 0.98, 0.97),
                _compare("heldout/b.txt", "held-out", 0.16, 0.16),
            ),
        ),
        "gate": Verdict(accepted=not broken, reasons=tuple(broken)),
    }
    for name, record in records.items():
        write_json(run.folder / f"{name}.json", {"key": "made", "record": record.model_dump(mode="json")})


def reinstate(workspace: Workspace, *requests: str, again: Sequence[str] = (), accepted: bool = True) -> int:
    """Put texts back in a version of their own, as production does; stopped anywhere, the same call continues.

    Args:
        workspace: Where; the caller holds no lock.
        requests: Countered or withdrawn requests whose text a version in force excludes.
        again: Requests that come back with them, and are worked on once more.
        accepted: What the gate is to say.

    Returns:
        The current version.
    """
    from pipeline.answers import publish as answer

    run_id = prepare_reinstatement(workspace, *requests, again=again, accepted=accepted)
    with writing(workspace):
        answer(str(workspace.root), run_id, "tester", "licence shown")
    return current_version(entries_of(workspace))


def prepare_reinstatement(
    workspace: Workspace, *requests: str, again: Sequence[str] = (), accepted: bool = True
) -> str:
    """All of `reinstate` but its publish; returns the run's id."""
    from pipeline.reinstate import plan_reinstatement
    from pipeline.stages import leave_out_stage
    from pipeline.states import decisions

    with writing(workspace):
        plan = plan_reinstatement(workspace, requests, "tester", "licence shown")
        assert plan is not None and plan.left_out
        run = open_run(workspace.root, plan.run_id)
        leave_out_stage(str(workspace.root), plan.run_id)
        if plan.run_id not in decisions(entries_of(workspace)):
            _leave_records(
                run,
                run.folder / "start",
                0.05,
                again,
                (
                    *(_compare(n, "reinstated", 0.15, 0.9 if accepted else 0.2) for n in plan.reinstates),
                    *(_compare(n, "earlier", 0.15, 0.16) for n in plan.requests),
                ),
                () if accepted else (f"{requests[0]} (reinstated): did not come back.",),
            )
    return plan.run_id


def publish(workspace: Workspace, run_id: str) -> None:
    """Publish a prepared step as production does."""
    from pipeline.answers import publish as answer

    with writing(workspace):
        answer(str(workspace.root), run_id, "tester")


def make_step(workspace: Workspace, *requests: str, share: float = 0.05, accepted: bool = True) -> int:
    """One step; returns the current version."""
    publish(workspace, prepare_step(workspace, requests, share, accepted))
    return current_version(entries_of(workspace))


def _arrays(path: Path) -> list[np.ndarray]:
    try:
        return list(load_file(path).values())
    except (AttributeError, KeyError, ValueError, TypeError):  # a dtype that numpy has no name for
        with safe_open(path, "np") as file:
            return [np.empty(file.get_slice(n).get_shape(), np.uint16) for n in file.keys()]  # noqa: SIM118
