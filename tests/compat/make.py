"""Keep a store of this release, so that every later one is tested on it.

    PYTHONPATH=tests python -m compat.make

Writes ``store-N`` and ``store-N-purged`` beside this file, and for each a ``.json`` with what it must say, N being the
next number. Never overwrites: a store that is kept is what an old release wrote, and stays as it is.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from histories import LEVEL, array_model, entries_of, make_step, prepare_step, publish, reinstate, start_history
from tampered.scene import make_again, settle
from workspaces import draw_text, take_in

import pipeline
from pipeline.files import digest_file, write_json
from pipeline.ledger import Ledger
from pipeline.records import DedupeDecision, DedupeReport, ScreenedRequest, ScreenReport
from pipeline.requests import note
from pipeline.rollback import roll_back
from pipeline.runs import open_run, plan_run
from pipeline.states import current_version, excluded, published_versions, purged_versions, request_states
from pipeline.upkeep import purge
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, writing

HERE = Path(__file__).parent


def answer_not_memorised(workspace: Workspace, request_id: str) -> None:
    """A run that needs no training: the model never knew the text."""
    take_in(workspace, f"batch-{request_id}", {request_id: draw_text(request_id, 30)})
    with writing(workspace):
        plan = plan_run(workspace, [request_id], "tester")
        assert plan is not None
        screened = ScreenedRequest(
            request_id=request_id, passages=1, memorised=(), exact_memorisation=0.15, longest_extraction=0.0
        )
        records = {
            "dedupe": DedupeReport(
                decisions=(DedupeDecision(request_id=request_id, verdict="fresh", covered=0.0),), retain_excluded=()
            ),
            "screen": ScreenReport(level=LEVEL, memorised_above=0.31, requests=(screened,)),
        }
        for name, record in records.items():
            path = open_run(workspace.root, plan.run_id).folder / f"{name}.json"
            write_json(path, {"key": "made", "record": record.model_dump(mode="json")})
    publish(workspace, plan.run_id)


def make_history(workspace: Workspace) -> None:
    """Everything that a history can hold but a purge: seven versions on two branches, and a request in every position.

    The last version puts TD-4 back, after the gate refused to put back TD-1.
    """
    make_step(workspace, "TD-1")
    make_step(workspace, "TD-2", "TD-3")
    make_step(workspace, "TD-4")
    make_step(workspace, "TD-5", accepted=False)
    roll_back(workspace, 1, "tester", "v2 and v3 answer slowly", override=True)
    publish(workspace, prepare_step(workspace, ["TD-2", "TD-3"], 0.06, submit=False))
    make_again(workspace, "TD-4", share=0.07)
    answer_not_memorised(workspace, "TD-6")
    for name in ("TD-7", "TD-8", "TD-9"):
        take_in(workspace, f"batch-{name}", {name: draw_text(name, 30)})
    note(workspace, "withdrawn", "TD-8", "tester", "sent twice")
    note(workspace, "countered", "TD-1", "tester", "licensed")
    reinstate(workspace, "TD-1", again=["TD-4"], accepted=False)
    note(workspace, "countered", "TD-4", "tester", "public domain")
    reinstate(workspace, "TD-4", again=["TD-2"])
    note(workspace, "hold", "TD-9", "tester", "litigation")


def purge_history(workspace: Workspace) -> None:
    """End the hold, purge all but the newest branch, and lose the index, which the next run builds again."""
    note(workspace, "released", "TD-9", "tester", "settled")
    purge(workspace, 4, "tester", "retention of a year")
    (workspace.index / "index.db").unlink()
    with writing(workspace):  # the seal says that there is none
        pass


def statement(workspace: Workspace) -> dict[str, Any]:
    """What a store says, in values that no later release may change."""
    entries, store = entries_of(workspace), VersionStore(workspace.versions)
    versions = {}
    for number in published_versions(entries):
        files = dict[str, str]()
        if number not in purged_versions(entries):
            with tempfile.TemporaryDirectory() as folder:
                store.restore(number, Path(folder) / "model", sign=True)
                files = {path.name: digest_file(path) for path in sorted((Path(folder) / "model").iterdir())}
        versions[str(number)] = {"root": store.manifest(number).root, "files": files}
    current = current_version(entries)
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        checkpoint = ledger.checkpoint()
    return {
        "release": pipeline.__version__,
        "entries": len(entries),
        "head": entries[-1].digest,
        "checkpoint": checkpoint,
        "current": current,
        "versions": versions,
        "purged": sorted(purged_versions(entries)),
        "requests": {
            name: {
                "state": state.state,
                "decision": state.decision,
                "on_hold": state.on_hold,
                "version": state.version,
                "excluded_now": name in excluded(entries, current),
            }
            for name, state in request_states(entries).items()
        },
    }


def keep(workspace: Workspace, name: str, kept: str) -> None:
    """Put a workspace beside this file as a clone would bring it: plain files, no empty folders, nothing transient.

    Args:
        workspace: Which.
        name: Under which name.
        kept: A checkpoint of it that was kept when it was younger.
    """
    said = statement(workspace) | {"kept": kept}
    settle(workspace)
    for path in sorted(workspace.root.rglob("*")):
        if path.is_file():
            target = HERE / name / path.relative_to(workspace.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    (HERE / f"{name}.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """Run from the command line."""
    number = 1 + max((int(path.stem.split("-")[1]) for path in HERE.glob("store-*.json")), default=0)
    with tempfile.TemporaryDirectory() as folder:
        workspace = start_history(Path(folder) / "store", array_model(Path(folder) / "model"))
        with Ledger.open(workspace.ledger, read_only=True) as ledger:
            kept = str(ledger.checkpoint())
        make_history(workspace)
        keep(workspace, f"store-{number}", kept)
        purge_history(workspace)
        keep(workspace, f"store-{number}-purged", kept)
    print(f"Wrote store-{number} and store-{number}-purged to {HERE}. Commit them; never make them again.")


if __name__ == "__main__":
    sys.exit(main())
