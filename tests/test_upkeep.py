"""Rollback, repack and purge: versions stay what they are, removed text stays out, what is destroyed is gone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from histories import array_model, entries_of, make_step, prepare_step, publish, reinstate, start_history

from pipeline.certificate import write_certificate
from pipeline.context import earlier_spans
from pipeline.errors import Refused, StoreDamaged, UsageError, WorkspaceBusy
from pipeline.files import canonical_json
from pipeline.ledger import Ledger
from pipeline.records import Event
from pipeline.requests import Kind, note
from pipeline.rollback import roll_back
from pipeline.runs import open_run
from pipeline.states import current_version, excluded, request_states
from pipeline.storecheck import Depth
from pipeline.upkeep import purge, repack
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, open_workspace, writing


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v0 to v4, one request each: A in v1 … D in v4."""
    folder = tmp_path_factory.mktemp("upkeep")
    workspace = start_history(folder / "ws", array_model(folder / "model", shape=(32, 32)))
    for name in "ABCD":
        make_step(workspace, name)
    return workspace.root


@pytest.fixture
def workspace(made: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(made, tmp_path / "ws")
    return open_workspace(tmp_path / "ws")


def restored(workspace: Workspace, folder: Path) -> dict[int, dict[str, bytes]]:
    """The files of every version that can still be restored."""
    store, found = VersionStore(workspace.versions), {}
    for number in store.numbers():
        try:
            store.restore(number, folder / f"{number}")
        except StoreDamaged:
            continue
        found[number] = {p.name: p.read_bytes() for p in (folder / f"{number}").iterdir()}
    shutil.rmtree(folder)
    return found


def state_of(workspace: Workspace) -> dict[str, str]:
    return {name: state.state for name, state in request_states(entries_of(workspace)).items()}


# --- rollback ---------------------------------------------------------------------------------------------


def test_rollback_is_refused_where_removed_text_would_come_back(workspace: Workspace) -> None:
    before = entries_of(workspace)
    with pytest.raises(Refused, match=r"v2.*C, D.*--override"):
        roll_back(workspace, 2, "ann", "v4 is slow")
    assert entries_of(workspace) == before


def test_a_refusal_names_what_would_come_back_and_what_would_go_out_again(workspace: Workspace) -> None:
    note(workspace, "countered", "B", "ann", "licence shown")
    assert reinstate(workspace, "B") == 5
    make_step(workspace, "E")
    before = entries_of(workspace)
    with pytest.raises(Refused) as caught:
        roll_back(workspace, 4, "ann", "v6 is slow")
    assert str(caught.value) == (
        "v4: still holds what was taken out for E; does not hold what was put back for B. Nothing was changed; to do "
        "it nevertheless, on record, add --override."
    )
    assert entries_of(workspace) == before
    done = roll_back(workspace, 4, "ann", "v6 is slow", override=True)
    assert (done.brought_back, done.taken_again) == (("E",), ("B",))
    assert verify(workspace, Depth.DEEP) == []


def test_override_is_on_record_and_the_requests_wait_again(workspace: Workspace) -> None:
    done = roll_back(workspace, 2, "ann", "v4 is slow", override=True)
    assert (done.left, done.version, done.brought_back) == (4, 2, ("C", "D"))
    entries = entries_of(workspace)
    assert current_version(entries) == 2
    assert state_of(workspace) == {"A": "verified", "B": "verified", "C": "regressed", "D": "regressed"}
    event = next(e.event for e in entries if e.event.kind == "rolled-back")
    assert (event.actor, event.version, event.data["reason"], event.data["override"]) == ("ann", 2, "v4 is slow", True)
    assert verify(workspace, Depth.DEEP) == []


def test_after_a_rollback_the_line_goes_on_from_there(workspace: Workspace) -> None:
    roll_back(workspace, 2, "ann", "trial", override=True)
    run_id = prepare_step(workspace, ["C", "D"], submit=False)
    run = open_run(workspace.root, run_id)
    assert run.plan.parent == 2
    assert set(earlier_spans(run)) == {"A", "B"}, "what the rolled-back versions excluded is not re-checked as out"
    publish(workspace, run_id)
    manifest = VersionStore(workspace.versions).manifest(5)
    assert (manifest.parent, set(manifest.requests)) == (2, {"C", "D"})
    assert set(excluded(entries_of(workspace), 5)) == {"A", "B", "C", "D"}
    assert verify(workspace, Depth.DEEP) == []
    # To v4, on the other branch: it excludes C and D, too.
    assert roll_back(workspace, 4, "ann", "back to the other branch").brought_back == ()
    assert set(excluded(entries_of(workspace), 4)) == {"A", "B", "C", "D"}
    assert verify(workspace) == []


def test_rolling_forward_again_restores_what_was_measured(workspace: Workspace) -> None:
    measured = [e.event.data["after"] for e in entries_of(workspace) if e.event.kind == "verified"][-2:]
    roll_back(workspace, 2, "ann", "trial", override=True)
    done = roll_back(workspace, 4, "ann", "back again")
    assert (done.brought_back, done.out_again) == ((), ("C", "D"))
    assert set(state_of(workspace).values()) == {"verified"}
    entries = entries_of(workspace)
    assert set(excluded(entries, 4)) == {"A", "B", "C", "D"}
    again = [e.event for e in entries if e.event.kind == "verified"][-2:]
    assert [(event.request_id, event.data["after"]) for event in again] == [("C", measured[0]), ("D", measured[1])]
    certificate = write_certificate(workspace, "C", workspace.root.parent / "certificate")
    assert certificate.request.request_id == "C"
    assert roll_back(workspace, 3, "ann", "D again", override=True).brought_back == ("D",)
    assert verify(workspace, Depth.DEEP) == []


def test_withdrawn_text_may_come_back(workspace: Workspace) -> None:
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(Event(kind="withdrawn", actor="ann", request_id="D"))
    assert roll_back(workspace, 3, "ann", "D was withdrawn").brought_back == ()
    assert state_of(workspace)["D"] == "withdrawn"


def test_rollbacks_that_make_no_sense(workspace: Workspace) -> None:
    for version, reason, found in ((4, "x", "already"), (9, "x", "never published"), (3, "  ", "needs a reason")):
        with pytest.raises(UsageError, match=found):
            roll_back(workspace, version, "ann", reason)
    with writing(workspace), pytest.raises(WorkspaceBusy):
        roll_back(workspace, 3, "ann", "x", override=True)


def test_a_version_that_cannot_be_made_again_does_not_become_current(workspace: Workspace) -> None:
    store = VersionStore(workspace.versions)
    digest = next(f.digest for f in store.manifest(3).files if f.path == "model.safetensors")
    for path in store.objects.paths(digest)[-1:]:
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    before = entries_of(workspace)
    with pytest.raises(StoreDamaged):
        roll_back(workspace, 3, "ann", "x", override=True)
    assert entries_of(workspace) == before


# --- repack -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [1, 2, 3, 100])
def test_repack_changes_no_version(workspace: Workspace, tmp_path: Path, spacing: int) -> None:
    store = VersionStore(workspace.versions)
    manifests = {n: store.manifest_path(n).read_bytes() for n in store.numbers()}
    before = restored(workspace, tmp_path / "before")
    done = repack(workspace, spacing, "ann")
    assert restored(workspace, tmp_path / "after") == before
    assert {n: store.manifest_path(n).read_bytes() for n in store.numbers()} == manifests
    whole = [n for n in store.numbers() if store.objects.is_whole(store.manifest(n).files[-1].digest)]
    assert whole == [n for n in range(5) if n % spacing == 0]
    assert done.bytes_after == sum(p.stat().st_size for p in store.objects.files())
    assert verify(workspace, Depth.DEEP) == []
    again = repack(workspace, spacing, "ann")
    assert (again.made_deltas, again.made_whole) == (0, 0)


def test_repack_there_and_back_saves_what_it_cost(workspace: Workspace) -> None:
    first = repack(workspace, 1, "ann")
    assert first.made_whole == 4
    assert first.bytes_after > 2 * first.bytes_before
    second = repack(workspace, 32, "ann")
    assert (second.made_deltas, second.bytes_after) == (4, first.bytes_before)
    event = [e.event for e in entries_of(workspace) if e.event.kind == "repacked"][-1]
    assert len(event.data["deltas"]) == 4  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        repack(workspace, 0, "ann")


def test_repack_of_a_damaged_store_removes_nothing(workspace: Workspace) -> None:
    repack(workspace, 1, "ann")
    store = VersionStore(workspace.versions)
    path = store.objects.object_path(next(f.digest for f in store.manifest(2).files if "safetensors" in f.path))
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = set(store.objects.files())
    with pytest.raises(StoreDamaged):
        repack(workspace, 32, "ann")
    assert before <= set(store.objects.files())


# --- purge ------------------------------------------------------------------------------------------------


def test_purge_destroys_weights_and_keeps_the_proof(workspace: Workspace, tmp_path: Path) -> None:
    store = VersionStore(workspace.versions)
    before = restored(workspace, tmp_path / "before")
    first = before[0]["model.safetensors"]
    done = purge(workspace, 3, "ann", "retention policy")
    assert done.versions == (0, 1, 2)
    assert restored(workspace, tmp_path / "after") == {n: before[n] for n in (3, 4)}
    assert store.numbers() == (0, 1, 2, 3, 4), "the manifests stay"
    assert store.tensors(store.manifest(0)), "and so do the tables, which prove single tensors"
    assert verify(workspace, Depth.DEEP) == []
    # Nothing that is left holds a run of v0's weights that v3 does not hold anyway.
    rest = b"".join(p.read_bytes() for p in store.objects.files())
    kept = before[3]["model.safetensors"]
    pieces = [first[i : i + 64] for i in range(1024, len(first) - 64, 64)]
    gone = [piece for piece in pieces if piece not in kept]
    assert len(gone) > 10
    assert not any(piece in rest for piece in gone)
    event = [e.event for e in entries_of(workspace) if e.event.kind == "purged"][-1]
    assert (event.data["versions"], event.data["reason"]) == ([0, 1, 2], "retention policy")
    assert event.data["files"] == done.files


def test_the_line_goes_on_after_a_purge(workspace: Workspace) -> None:
    purge(workspace, 4, "ann", "retention")
    assert make_step(workspace, "E") == 5
    assert verify(workspace, Depth.DEEP) == []
    with pytest.raises(UsageError, match="purged"):
        roll_back(workspace, 2, "ann", "x", override=True)
    assert purge(workspace, 5, "ann", "retention").versions == (4,)
    assert verify(workspace, Depth.DEEP) == []


def test_purges_that_are_refused(workspace: Workspace) -> None:
    files = VersionStore(workspace.versions).objects.files()
    for version, reason, found in (
        (5, "x", "never published"),
        (0, "x", "no version before it"),
        (3, " ", "needs a reason"),
    ):
        with pytest.raises(UsageError, match=found):
            purge(workspace, version, "ann", reason)
    roll_back(workspace, 2, "ann", "x", override=True)
    with pytest.raises(UsageError, match="current version v2"):
        purge(workspace, 3, "ann", "x")
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(Event(kind="hold", actor="ann", request_id="A"))
    with pytest.raises(Refused, match="legal hold: A"):
        purge(workspace, 1, "ann", "x")
    assert VersionStore(workspace.versions).objects.files() == files
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(Event(kind="released", actor="ann", request_id="A"))
    assert purge(workspace, 1, "ann", "x").versions == (0,)


def test_weights_of_a_purged_version_that_are_still_there_are_found(workspace: Workspace, tmp_path: Path) -> None:
    store = VersionStore(workspace.versions)
    digest = next(f.digest for f in store.manifest(0).files if "safetensors" in f.path)
    copy = tmp_path / "kept"
    shutil.copyfile(store.objects.object_path(digest), copy)
    purge(workspace, 2, "ann", "x")
    target = store.objects.object_path(digest)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(copy, target)
    assert [b.found for b in verify(workspace)] == ["belongs to a purged version"]


def test_purge_also_clears_restored_copies_in_unfinished_runs(workspace: Workspace) -> None:
    prepare_step(workspace, ["E"])
    (run,) = workspace.runs.iterdir()
    os.link(VersionStore(workspace.versions).objects.files()[0], run / "v0.restored")
    (run / "v0").mkdir()
    purge(workspace, 4, "ann", "x")
    assert not list(workspace.runs.iterdir())
    publish(workspace, prepare_step(workspace, ["E"], submit=False))  # begun anew
    assert current_version(entries_of(workspace)) == 5
    assert verify(workspace, Depth.DEEP) == []


# --- what a rollback and a repack must not be fooled by ---------------------------------------------------


def test_what_regressed_by_itself_is_not_verified_by_a_rollback(workspace: Workspace) -> None:
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(Event(kind="regressed", actor="t", request_id="A", version=4))
    assert roll_back(workspace, 3, "ann", "trial", override=True).out_again == ()
    assert state_of(workspace)["A"] == "regressed"


def test_repack_of_two_versions_with_the_same_weights_keeps_one_whole(tmp_path: Path) -> None:
    """A version that went back to earlier weights: each could be made from the other, and neither read."""
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "m", shape=(32, 32)))
    make_step(workspace, "A")
    run_id = prepare_step(workspace, ["B"])
    folder = workspace.runs / run_id
    shutil.rmtree(folder / "candidate")
    VersionStore(workspace.versions).restore(0, folder / "candidate")
    merged = json.loads((folder / "merge.json").read_text())
    manifest = VersionStore(workspace.versions).manifest(0)
    merged["record"]["root"] = manifest.root
    merged["record"]["files"] = [{"path": f.path, "digest": f.digest} for f in manifest.files]
    (folder / "merge.json").write_text(json.dumps(merged))
    publish(workspace, run_id)
    assert VersionStore(workspace.versions).manifest(2).root == VersionStore(workspace.versions).manifest(0).root
    before = restored(workspace, tmp_path / "before")
    assert len(before) == 3
    for spacing in (32, 2, 1, 32):
        repack(workspace, spacing, "ann")
        assert restored(workspace, tmp_path / "after") == before
        assert verify(workspace, Depth.DEEP) == []


def test_a_step_does_not_clean_up_after_a_lost_manifest(workspace: Workspace, tmp_path: Path) -> None:
    store = VersionStore(workspace.versions)
    roll_back(workspace, 3, "ann", "trial", override=True)
    kept = tmp_path / "kept"
    shutil.copyfile(store.manifest_path(4), kept)
    store.manifest_path(4).unlink()
    with pytest.raises(StoreDamaged, match=r"000004\.json: is missing"):
        make_step(workspace, "E")
    shutil.copyfile(kept, store.manifest_path(4))
    store.check_restores(store.manifest(4))


def test_a_manifest_that_was_exchanged_is_not_made_current_nor_started_from(workspace: Workspace) -> None:
    store = VersionStore(workspace.versions)
    manifest = json.loads(store.manifest_path(3).read_bytes())
    manifest["report"]["alpha"] = 7.0
    store.manifest_path(3).chmod(0o644)
    store.manifest_path(3).write_bytes(canonical_json(manifest) + b"\n")
    with pytest.raises(StoreDamaged, match="ledger entry"):
        roll_back(workspace, 3, "ann", "x", override=True)


@pytest.mark.parametrize("kind", ["hold", "released", "withdrawn", "countered"])
def test_requests_are_held_released_withdrawn_and_countered(workspace: Workspace, kind: Kind) -> None:
    if kind == "released":
        note(workspace, "hold", "A", "ann", "order")
    state = note(workspace, kind, "A", "ann", "as by letter")
    assert state.on_hold == (kind == "hold")
    assert state.state == ("verified" if kind in ("hold", "released") else kind)
    event = entries_of(workspace)[-1].event
    assert (event.kind, event.actor, event.data) == (kind, "ann", {"reason": "as by letter"})
    with pytest.raises(UsageError):
        note(workspace, kind, "A", "ann", "twice")
    with pytest.raises(UsageError, match="no such request"):
        note(workspace, kind, "Z", "ann", "x")
    with pytest.raises(UsageError, match="reason"):
        note(workspace, kind, "B", "ann", " ")
    assert verify(workspace) == []


def test_a_workspace_without_its_empty_folders_goes_on(workspace: Workspace) -> None:
    """As a copy by git leaves it."""
    for folder in (workspace.runs, workspace.inbox, workspace.reports):
        shutil.rmtree(folder)
    assert verify(workspace, Depth.DEEP) == []
    assert purge(workspace, 1, "ann", "retention").versions == (0,)
    assert make_step(workspace, "E") == 5
    assert verify(workspace, Depth.DEEP) == []
