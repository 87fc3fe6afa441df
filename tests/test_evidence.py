"""Evidence: a run's records kept for good, found again by digest, and shown one by one without the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StoreDamaged
from pipeline.evidence import (
    RECORDS,
    all_evidence,
    check_leaf,
    check_leaves,
    checks_root,
    evidence_of,
    find_check,
    keep,
    recall,
)
from pipeline.files import canonical_json, digest_bytes
from pipeline.merkle import inclusion_proof, leaf_hash, verify_inclusion
from pipeline.objects import ObjectStore
from pipeline.records import (
    Comparison,
    DedupeReport,
    Evaluation,
    Event,
    LedgerEntry,
    NeverSeenLevel,
    TextScore,
    Verdict,
)
from pipeline.runs import Plan, Run
from pipeline.settings import Settings
from pipeline.states import DECIDED, decisions
from pipeline.workspace import Workspace

AT = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)
VERDICT = Verdict(accepted=False, reasons=("too much is left",), unchecked=("held-out text",))


def _score(value: float) -> TextScore:
    return TextScore(
        exact_memorisation=value, extraction_strength=0.0, rouge_1=None, rouge_l=None, longest_run=None, nll=1.0
    )


def _evaluation(count: int = 7) -> Evaluation:
    """One text as it was taken down in this step, the others earlier; the first is there in both roles."""
    comparisons = [
        Comparison(name=f"TD-{i}", role="this" if i == 3 else "earlier", before=_score(i / 10), after=_score(i / 20))
        for i in range(count)
    ]
    kept = Comparison(name="TD-0", role="kept", before=_score(1.0), after=_score(0.9))
    level = NeverSeenLevel(mean=0.3, std=0.05, passages=9, source="held-out")
    return Evaluation(level=level, comparisons=(*comparisons, kept))


def _entries(*events: Event) -> tuple[LedgerEntry, ...]:
    return tuple(LedgerEntry(seq=i, at=AT, event=e, previous="", digest="") for i, e in enumerate(events, 1))


def _event(kind: str, **fields: Any) -> Event:
    return Event(kind=kind, actor="t", **fields)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of which some stages are done."""
    workspace = Workspace(tmp_path)
    plan = Plan(
        parent=0, parent_root="r", since=1, requests=("TD-1",), commitments=("c",), references="d",
        settings=Settings(), code="0",
    )  # fmt: skip
    run = Run(workspace, plan.run_id, plan)
    run.folder.mkdir(parents=True)
    (run.folder / "plan.json").write_bytes(canonical_json(plan.model_dump(mode="json")) + b"\n")
    run.stage("dedupe", DedupeReport, (), lambda: DedupeReport(decisions=(), retain_excluded=()))
    run.stage("evaluate", Evaluation, (), _evaluation)
    run.stage("gate", Verdict, (), lambda: VERDICT)
    return run


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return ObjectStore(tmp_path / "versions")


def _decided(run: Run, objects: ObjectStore) -> LedgerEntry:
    data: dict[str, object] = {"evidence": keep(run.folder, objects)}
    return _entries(_event("refused", run_id=run.run_id, data=data))[0]


# --- keep and recall --------------------------------------------------------------------------------------


def test_every_record_that_is_there_is_kept_byte_for_byte(run: Run, objects: ObjectStore) -> None:
    (run.folder / "mask.safetensors").write_bytes(b"a tensor")
    (run.folder / "notes.json").write_bytes(b"{}")
    kept = keep(run.folder, objects)
    assert list(kept) == [name for name in RECORDS if name in ("plan", "dedupe", "evaluate", "gate")]
    for name, digest in kept.items():
        assert objects.read(digest) == (run.folder / f"{name}.json").read_bytes()
    assert len(objects.files()) == 4, "no tensor, and nothing that is no record"
    assert keep(run.folder, objects) == kept and len(objects.files()) == 4


def test_records_come_back_as_they_were(run: Run, objects: ObjectStore) -> None:
    entry = _decided(run, objects)
    assert recall(objects, entry, "plan", Plan) == run.plan
    assert recall(objects, entry, "gate", Verdict) == VERDICT
    assert recall(objects, entry, "evaluate", Evaluation) == _evaluation()
    assert recall(objects, entry, "screen", Verdict) is None, "there was none"


def test_records_outlive_the_run_folder(run: Run, objects: ObjectStore) -> None:
    entry = _decided(run, objects)
    for path in run.folder.iterdir():
        path.unlink()
    run.folder.rmdir()
    assert recall(objects, entry, "gate", Verdict) == VERDICT


def _missing(path: Path) -> None:
    path.unlink()


def _changed(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"too much", b"too much "))


@pytest.mark.parametrize("damage", [_missing, _changed])
def test_a_record_that_was_damaged_is_not_shown(run: Run, objects: ObjectStore, damage: Callable[[Path], None]) -> None:
    entry = _decided(run, objects)
    digest = evidence_of(entry)["gate"]
    damage(objects.object_path(digest))
    with pytest.raises(StoreDamaged, match=digest.removeprefix("sha256:")):
        recall(objects, entry, "gate", Verdict)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"7", b'"x"', b"{}", b'{"accepted":true}', b'{"key":"x","record":{"accepted":1}}',
     b'{"key":"x","record":null}', b"[" * 100_000, b"\xff", b'{"key":"x","record":{}, "more":1}'],
)  # fmt: skip
def test_what_is_no_such_record_is_told(objects: ObjectStore, content: bytes) -> None:
    """An entry may name anything; whoever signed it is told which entry it is."""
    digest = objects.put_bytes(content)
    (entry,) = _entries(_event("accepted", run_id="r", data={"evidence": {"gate": digest}}))
    with pytest.raises(StoreDamaged, match="ledger entry 1: its evidence 'gate' is not a Verdict"):
        recall(objects, entry, "gate", Verdict)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../../etc/passwd", "md5:00", "sha256:" + "g" * 64])
def test_what_is_no_digest_is_no_path(objects: ObjectStore, digest: str) -> None:
    (entry,) = _entries(_event("accepted", run_id="r", data={"evidence": {"gate": digest}}))
    with pytest.raises(StoreDamaged, match="is not a SHA-256 digest"):
        recall(objects, entry, "gate", Verdict)


# --- entries ----------------------------------------------------------------------------------------------


def test_runs_are_decided_by_events_without_a_request() -> None:
    entries = _entries(
        _event("planned", run_id="r1"),
        _event("accepted", run_id="r1", data={"evidence": {"plan": "d1", "gate": "d2"}}),
        _event("applied", run_id="r1", request_id="TD-1"),
        _event("refused", run_id="r2", request_id="TD-2", data={"evidence": {"plan": "no"}}),
        _event("refused", run_id="r2", data={"evidence": {"plan": "d3"}}),
        _event("answered", run_id="r3", data={"evidence": {}}),
        _event("accepted", data={"evidence": {"plan": "no run"}}),
        _event("published", run_id="r4", data={"evidence": {"plan": "no"}}),
    )
    assert {run_id: entry.seq for run_id, entry in decisions(entries).items()} == {"r1": 2, "r2": 5, "r3": 6}
    assert list(decisions(entries)) == ["r1", "r2", "r3"]
    assert all_evidence(entries) == ["d1", "d2", "d3"]
    assert {entry.event.kind for entry in decisions(entries).values()} == set(DECIDED)


@pytest.mark.parametrize("found", [None, 7, "x", [], ["plan"], [["plan", "d"]]])
def test_an_entry_without_evidence_has_none(found: object) -> None:
    (entry,) = _entries(_event("accepted", run_id="r", data={"evidence": found}))
    assert evidence_of(entry) == {}
    assert all_evidence([entry]) == []


# --- what was measured ------------------------------------------------------------------------------------


def _tree(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word for word: independent of `pipeline.merkle`."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + _tree(leaves[:split]) + _tree(leaves[split:])).digest()


def test_a_leaf_is_the_canonical_json_of_one_comparison() -> None:
    comparison = _evaluation().comparisons[3]
    leaf = check_leaf(comparison)
    assert leaf == json.dumps(json.loads(leaf), sort_keys=True, separators=(",", ":")).encode()
    assert Comparison.model_validate_json(leaf) == comparison
    assert {"name", "role", "before", "after"} == json.loads(leaf).keys()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 6, 7, 8])
def test_the_root_is_the_tree_over_all_comparisons(count: int) -> None:
    evaluation = _evaluation(count)
    leaves = check_leaves(evaluation)
    assert len(leaves) == len(evaluation.comparisons) == count + 1
    assert checks_root(evaluation) == f"root-sha256:{_tree(leaves).hex()}"


def test_the_root_depends_on_every_comparison_and_their_order() -> None:
    evaluation = _evaluation()
    roots = {checks_root(evaluation)}
    for place, comparison in enumerate(evaluation.comparisons):
        other = comparison.model_copy(update={"after": _score(0.123)})
        changed = (*evaluation.comparisons[:place], other, *evaluation.comparisons[place + 1 :])
        roots.add(checks_root(evaluation.model_copy(update={"comparisons": changed})))
    roots.add(checks_root(evaluation.model_copy(update={"comparisons": evaluation.comparisons[::-1]})))
    roots.add(checks_root(evaluation.model_copy(update={"comparisons": evaluation.comparisons[:-1]})))
    assert len(roots) == 1 + len(evaluation.comparisons) + 2


def test_one_text_is_shown_without_the_others() -> None:
    evaluation = _evaluation()
    root = bytes.fromhex(checks_root(evaluation).removeprefix("root-sha256:"))
    hashes = [leaf_hash(leaf) for leaf in check_leaves(evaluation)]
    place = find_check(evaluation, "TD-3", ("this",))
    assert place == 3
    leaf, proof = check_leaf(evaluation.comparisons[place]), inclusion_proof(hashes, place)
    assert verify_inclusion(leaf_hash(leaf), place, len(hashes), proof, root)
    assert all(len(sibling) == 32 for sibling in proof), "hashes only"
    better = leaf.replace(b'"exact_memorisation":0.15', b'"exact_memorisation":0.05')
    assert better != leaf and not verify_inclusion(leaf_hash(better), place, len(hashes), proof, root)


def test_a_comparison_is_found_by_name_and_role() -> None:
    evaluation = _evaluation()
    assert find_check(evaluation, "TD-0", ("earlier",)) == 0
    assert find_check(evaluation, "TD-0", ("kept",)) == 7
    assert find_check(evaluation, "TD-0", ("kept", "earlier")) == 0, "the first of them"
    assert find_check(evaluation, "TD-0", ("this",)) is None
    assert find_check(evaluation, "TD-9", ("this", "earlier")) is None
    assert find_check(evaluation, "TD-0", ()) is None


def test_the_digest_of_evidence_is_that_of_the_file(run: Run, objects: ObjectStore) -> None:
    for name, digest in keep(run.folder, objects).items():
        assert digest == digest_bytes((run.folder / f"{name}.json").read_bytes())
