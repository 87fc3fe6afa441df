"""Where requests and versions stand: every transition that is allowed, every one that is not, and what versions say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import NotAWorkspace, StoreDamaged
from pipeline.records import Event, LedgerEntry
from pipeline.states import (
    RequestState,
    ancestry,
    current_version,
    excluded,
    follow,
    known_batches,
    let_go_and_out,
    published_versions,
    purged_versions,
    put_back,
    request_states,
    stays_out,
    turn,
    unfinished_purge,
)

AT = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)

DECIDED = ("repeat", "folded", "empty", "not-memorised", "applied", "refused")
LATER = ("verified", "regressed", "countered", "withdrawn", "reinstated", "reopened")
OPEN = {*DECIDED, "countered", "withdrawn"}

LEGAL: dict[str, set[str]] = {
    "waiting": OPEN,
    "refused": OPEN | {"verified", "reinstated"},
    "regressed": OPEN | {"verified", "reinstated"},
    "applied": {"verified", "regressed", "countered", "withdrawn"},
    "folded": {"verified", "regressed", "countered", "withdrawn"},
    "verified": {"regressed", "countered", "withdrawn"},
    "repeat": {"regressed", "countered", "withdrawn", "applied", "folded"},
    "empty": {"withdrawn"},
    "not-memorised": {"withdrawn", "applied", "folded", "reopened"},
    "countered": {"regressed", "withdrawn", "reinstated"},
    "withdrawn": {"reinstated"},
    "reinstated": {"countered", "withdrawn"},
}
"""State → events that may follow, written down a second time, from the other side than `pipeline.states.NEXT`."""

PATHS: dict[str, tuple[str, ...]] = {
    "waiting": (),
    **{kind: (kind,) for kind in DECIDED},
    "verified": ("applied", "verified"),
    "regressed": ("applied", "regressed"),
    "countered": ("applied", "countered"),
    "withdrawn": ("withdrawn",),
    "reinstated": ("withdrawn", "reinstated"),
}
"""State → events that lead to it."""

TO_DO = {"waiting", "refused", "regressed"}


def _received(request_id: str = "TD-1", batch_id: str = "b1", **data: Any) -> Event:
    fields = {"batch_id": batch_id, "received_at": "2026-11-20T08:00:00Z", "commitment": f"c-{request_id}"}
    return Event(kind="received", actor="test", request_id=request_id, data=fields | data)


def _event(kind: str, **fields: Any) -> Event:
    return Event(kind=kind, actor="test", **fields)


def _of(kind: str, request_id: str = "TD-1", version: int | None = 1, run_id: str = "r") -> Event:
    return _event(kind, request_id=request_id, version=version, run_id=run_id)


def _published(version: int, parent: int | None) -> Event:
    return _event("published" if version else "initialised", version=version, data={"parent": parent})


def _entries(*events: Event) -> tuple[LedgerEntry, ...]:
    return tuple(
        LedgerEntry(seq=i, at=AT + timedelta(days=i), event=event, previous="", digest="")
        for i, event in enumerate(events, 1)
    )


def _state(*kinds: str) -> RequestState:
    """The state of a request that was received, and then what is given."""
    return request_states(_entries(_received(), *(_of(kind) for kind in kinds)))["TD-1"]


# --- transitions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "event"), product(LEGAL, (*DECIDED, *LATER)))
def test_every_transition_is_allowed_or_refused_as_written_down(state: str, event: str) -> None:
    entries = _entries(_received(), *(_of(kind) for kind in (*PATHS[state], event)))
    assert request_states(entries[:-1])["TD-1"].state == state
    states, faults = follow(entries)
    if event in LEGAL[state]:
        assert faults == []
        led_to = ("waiting", None) if event == "reopened" else (event, entries[-1].at)
        assert (states["TD-1"].state, states["TD-1"].decided_at) == led_to
    else:
        assert faults == [(entries[-1], f"request 'TD-1' is {event}, but was {state} before")]
        assert states == request_states(entries[:-1]), "what cannot be changes nothing"
        with pytest.raises(StoreDamaged, match=f"ledger entry {len(entries)}: .* but was {state} before"):
            request_states(entries)


@pytest.mark.parametrize("state", LEGAL)
def test_a_hold_keeps_any_state_and_stops_the_work_on_it(state: str) -> None:
    free, held, released = (_state(*PATHS[state], *more) for more in ((), ("hold",), ("hold", "released")))
    assert (free.state, held.state, released.state) == (state, state, state)
    assert (free.on_hold, held.on_hold, released.on_hold) == (False, True, False)
    assert free.to_do == released.to_do == (state in TO_DO)
    assert not held.to_do
    assert held == free.model_copy(update={"on_hold": True}), "nothing else moves"


@pytest.mark.parametrize("state", LEGAL)
def test_a_refused_reinstatement_changes_no_state_and_needs_one_to_reinstate_from(state: str) -> None:
    entries = _entries(_received(), *(_of(kind) for kind in (*PATHS[state], "not-reinstated")))
    states, faults = follow(entries)
    assert states == request_states(entries[:-1])
    assert (faults == []) == (state in ("countered", "withdrawn"))


def test_a_hold_outlasts_what_happens_to_the_request() -> None:
    assert _state("hold", "applied", "verified", "regressed").on_hold
    assert not _state("hold", "applied", "verified", "regressed").to_do


@pytest.mark.parametrize("kind", DECIDED)
def test_a_decision_moves_a_request_out_of_waiting(kind: str) -> None:
    events = (_received("TD-1"), _received("TD-2", "b2"), _of(kind, version=3))
    states = request_states(_entries(*events))
    assert list(states) == ["TD-1", "TD-2"]
    one, two = states["TD-1"], states["TD-2"]
    assert (one.state, one.version, one.run_id, one.decided_at) == (kind, 3, "r", AT + timedelta(days=3))
    assert (one.batch_id, one.commitment, one.decision) == ("b1", "c-TD-1", kind)
    assert one.received_at == datetime(2026, 11, 20, 8, tzinfo=UTC)
    assert (two.state, two.batch_id, two.decided_at, two.version) == ("waiting", "b2", None, None)
    assert two.decision is None


def test_a_refused_request_can_be_applied_later() -> None:
    events = [_received(), _of("refused", run_id="r1"), _of("applied", version=2, run_id="r2")]
    assert request_states(_entries(*events[:2]))["TD-1"].state == "refused"
    state = request_states(_entries(*events))["TD-1"]
    assert (state.state, state.version, state.run_id) == ("applied", 2, "r2")


def test_a_measurement_keeps_the_decision_that_it_confirms() -> None:
    events = [_received(), _of("folded", version=2, run_id="r1"), _of("verified", version=9, run_id="r9")]
    state = request_states(_entries(*events))["TD-1"]
    assert (state.state, state.decision, state.version, state.run_id) == ("verified", "folded", 2, "r1")


def test_events_of_runs_and_versions_are_not_requests() -> None:
    assert request_states(_entries(_event("published", version=1), _event("refused", run_id="r"))) == {}
    assert follow(_entries(_event("planned", run_id="r"), _event("rolled-back", version=0))) == ({}, [])


@pytest.mark.parametrize("kind", (*DECIDED, *LATER, "hold", "released"))
def test_nothing_happens_to_a_request_before_it_is_received(kind: str) -> None:
    with pytest.raises(StoreDamaged, match=f"request 'TD-1' is {kind}, but no earlier entry received it"):
        request_states(_entries(_of(kind), _received()))


@pytest.mark.parametrize("kind", ["published", "planned", "", "waiting", "Applied"])
def test_an_event_that_is_none_of_a_request_is_not_skipped_over(kind: str) -> None:
    with pytest.raises(StoreDamaged, match="is no event of a request"):
        request_states(_entries(_received(), _of(kind)))


@pytest.mark.parametrize(
    "data", [{}, {"batch_id": "b"}, {"batch_id": 1, "received_at": "2026-11-20T08:00:00Z"},
             {"batch_id": "b", "received_at": "soon"}, {"batch_id": "b", "received_at": "2026-11-20", "commitment": 7}],
)  # fmt: skip
def test_a_receipt_needs_its_fields(data: dict[str, Any]) -> None:
    with pytest.raises(StoreDamaged, match="needs data"):
        request_states(_entries(_event("received", request_id="TD-1", data=data)))


def test_a_second_receipt_changes_nothing() -> None:
    first = request_states(_entries(_received(), _of("applied")))
    assert request_states(_entries(_received(), _of("applied"), _received(commitment="other"))) == first


def test_all_faults_are_told_and_the_rest_is_followed() -> None:
    entries = _entries(
        _of("applied", "TD-9"), _received("TD-1"), _of("verified"), _of("applied"), _of("applied"), _of("withdrawn")
    )
    states, faults = follow(entries)
    assert [entry.seq for entry, _ in faults] == [1, 3, 5]
    assert {name: state.state for name, state in states.items()} == {"TD-1": "withdrawn"}


@given(st.lists(st.sampled_from([*DECIDED, *LATER, "hold", "released"]), max_size=12))
def test_any_history_ends_where_its_legal_events_lead(kinds: list[str]) -> None:
    state, held = "waiting", False
    for kind in kinds:
        if kind in ("hold", "released"):
            held = kind == "hold"
        elif kind in LEGAL[state]:
            state = "waiting" if kind == "reopened" else kind
    states, faults = follow(_entries(_received(), *(_of(kind) for kind in kinds)))
    assert (states["TD-1"].state, states["TD-1"].on_hold) == (state, held)
    legal = len(kinds) - len(faults)
    assert legal == len([k for k in kinds if k in ("hold", "released")]) + _steps(kinds)


def _steps(kinds: list[str]) -> int:
    state, steps = "waiting", 0
    for kind in kinds:
        if kind in LEGAL[state]:
            state, steps = kind, steps + 1
    return steps


# --- versions ---------------------------------------------------------------------------------------------

LINEAGE = (_published(0, None), _published(1, 0), _published(2, 1), _published(3, 1), _published(4, 3))
"""v0 - v1 - v2, and v3 - v4 from v1."""


def test_current_version_is_the_latest_one_put_in_force() -> None:
    entries = _entries(
        _event("initialised", version=0),
        _event("published", version=1),
        _event("applied", version=7),
        _event("refused", version=5),
        _event("rolled-back", version=0),
        _event("planned", version=8),
        _event("published", version=2),
    )
    assert [current_version(entries[:n]) for n in range(1, 8)] == [0, 1, 1, 1, 0, 0, 2]
    with pytest.raises(NotAWorkspace, match="did not finish"):
        current_version(())
    with pytest.raises(NotAWorkspace, match="did not finish"):
        current_version(_entries(_event("published")))


def test_published_versions_are_those_acknowledged_in_order_of_their_numbers() -> None:
    entries = _entries(LINEAGE[0], LINEAGE[2], LINEAGE[1], _event("rolled-back", version=9), _event("published"))
    assert {version: entry.seq for version, entry in published_versions(entries).items()} == {0: 1, 1: 3, 2: 2}
    assert list(published_versions(entries)) == [0, 1, 2]


def test_purged_versions_are_those_whose_purge_was_begun() -> None:
    """Until it is ended nobody can say which of their weights are still there."""
    entries = _entries(
        *LINEAGE,
        _event("purging", data={"versions": [0]}),
        _event("purged", data={"versions": [0]}),
        _event("purging", data={"versions": [0, 2]}),
    )
    assert {version: entry.seq for version, entry in purged_versions(entries).items()} == {0: 6, 2: 8}
    assert [e.seq if (e := unfinished_purge(entries[:n])) else None for n in range(5, 9)] == [None, 6, None, 8]


@pytest.mark.parametrize("listed", [None, 7, "01", {"0": 1}, [[0]], [None], [{}], ["0"], [0.5]])
def test_a_purge_that_lists_no_versions_purges_none(listed: object) -> None:
    assert purged_versions(_entries(_event("purged", data={"versions": listed}))) == {}
    assert purged_versions(_entries(_event("purged"))) == {}


@pytest.mark.parametrize(("version", "expected"), [(0, (0,)), (2, (0, 1, 2)), (4, (0, 1, 3, 4)), (9, (9,))])
def test_ancestry_follows_the_parents(version: int, expected: tuple[int, ...]) -> None:
    assert ancestry(published_versions(_entries(*LINEAGE)), version) == expected


@pytest.mark.parametrize("parent", [2, 3, "1", None, [1], 1.0])
def test_ancestry_ends_where_the_parent_makes_no_sense(parent: Any) -> None:
    """Versions only grow, so that nothing written there can make a loop."""
    entries = _entries(LINEAGE[0], LINEAGE[1], _event("published", version=2, data={"parent": parent}))
    assert ancestry(published_versions(entries), 2) == (2,)


def test_ancestry_is_not_bounded_by_recursion() -> None:
    entries = _entries(*(_published(n, n - 1 if n else None) for n in range(5000)))
    assert ancestry(published_versions(entries), 4999) == tuple(range(5000))


# --- what a version excludes ------------------------------------------------------------------------------

TAKEN = [
    *LINEAGE[:2], _received("A"), _of("applied", "A", 1), _received("B"), _of("folded", "B", 1),
    _of("verified", "A", 1),
    LINEAGE[2], _received("C"), _of("applied", "C", 2), _received("D"), _of("repeat", "D", 1),
    _received("E"), _of("not-memorised", "E", 1), _received("F"), _of("refused", "F", 1), _received("G"),
    _received("H"), _of("empty", "H", 1),
]  # fmt: skip
"""A and B out in v1 and verified; C in v2; D a repeat at v1; E, F, G and H out of nothing."""


def test_a_version_excludes_what_it_or_an_ancestor_took_out() -> None:
    entries = _entries(*TAKEN)
    assert set(excluded(entries, 0)) == set()
    assert set(excluded(entries, 1)) == {"A", "B", "D"}
    assert set(excluded(entries, 2)) == {"A", "B", "C", "D"}
    assert excluded(entries, 2)["A"] == request_states(entries)["A"]


def test_a_version_of_another_line_excludes_what_its_own_ancestors_took_out() -> None:
    entries = _entries(*TAKEN, _event("rolled-back", version=1), LINEAGE[3])
    assert set(excluded(entries, 3)) == {"A", "B", "D"}


@pytest.mark.parametrize(("kind", "stays"), [("countered", True), ("withdrawn", False), ("regressed", False)])
def test_what_a_later_event_makes_of_an_exclusion(kind: str, stays: bool) -> None:
    entries = _entries(*TAKEN, _of(kind, "A", None))
    assert ("A" in excluded(entries, 2)) == stays
    assert request_states(entries)["A"].version == 1, "the first version that excluded it stays on record"


def test_a_withdrawn_text_that_was_out_stays_out_until_it_is_reinstated() -> None:
    events = [*TAKEN, _of("withdrawn", "A", None)]
    for more, expected in (([], {"A"}), ([_of("reinstated", "A", 2)], set())):
        entries = _entries(*events, *more)
        assert let_go_and_out(entries, request_states(entries)) == expected
    waiting = _entries(*LINEAGE[:2], _received("A"), _of("withdrawn", "A", None))
    assert let_go_and_out(waiting, request_states(waiting)) == set()


def test_a_reinstated_text_is_excluded_no_more() -> None:
    assert "A" not in excluded(_entries(*TAKEN, _of("countered", "A", None), _of("reinstated", "A", None)), 2)


@pytest.mark.parametrize("before", [(), ("refused",), ("applied", "regressed"), ("applied", "verified", "regressed")])
def test_a_counter_notice_does_not_take_out_what_was_in(before: tuple[str, ...]) -> None:
    """Waiting, refused or regressed, the text is in the model; to call it excluded would make copies of it repeats."""
    events = [*LINEAGE[:2], _received("A"), *(_of(kind, "A", 1) for kind in (*before, "countered"))]
    assert request_states(_entries(*events))["A"].state == "countered"
    assert excluded(_entries(*events), 1) == {}


def test_a_request_worked_on_again_is_excluded_by_every_version_that_took_it_out() -> None:
    back = (_event("rolled-back", version=0), _of("regressed", "A", 0), _of("applied", "A", 3), _published(3, 0))
    entries = _entries(*LINEAGE[:2], _received("A"), _of("applied", "A", 1), *back)
    assert {n: s.version for n, s in excluded(entries, 3).items()} == {"A": 3}
    assert {n: s.version for n, s in excluded(entries, 1).items()} == {"A": 1}
    assert set(excluded(entries, 0)) == set()


def test_a_rollback_brings_back_what_only_the_current_version_excludes() -> None:
    entries = _entries(*TAKEN)
    assert turn(entries, 2).brought_back == ()
    assert turn(entries, 1).brought_back == ("C",)
    assert turn(entries, 0).brought_back == ("A", "B", "C", "D")
    withdrawn = _entries(*TAKEN, _of("withdrawn", "A", None))
    assert turn(withdrawn, 0).brought_back == ("B", "C", "D")


def test_going_forward_again_brings_nothing_back() -> None:
    back = [_event("rolled-back", version=1), _of("regressed", "C", 1)]
    assert turn(_entries(*TAKEN, *back), 2).brought_back == ()


PUT_BACK = (*TAKEN, _of("countered", "A", None), _published(3, 2), _of("reinstated", "A", 3))


def test_a_version_that_puts_a_text_back_and_those_made_from_it_do_not_exclude_it() -> None:
    entries = _entries(*PUT_BACK, _published(4, 3), _published(5, 2), _of("countered", "A", None))
    assert put_back(entries, 3) == put_back(entries, 4) == {"A": 3}
    assert put_back(entries, 2) == put_back(entries, 5) == {}
    assert set(excluded(entries, 4)) == {"B", "C", "D"}
    assert set(excluded(entries, 5)) == {"A", "B", "C", "D"}, "made from the version before, and on record as out again"
    assert request_states(_entries(*PUT_BACK))["A"].reinstated_in == 3


def test_a_rollback_past_a_reinstatement_takes_the_text_out_again() -> None:
    entries = _entries(*PUT_BACK)
    assert turn(entries, 2).taken_again == turn(entries, 1).taken_again == {"A": "countered"}
    assert turn(entries, 0).taken_again == turn(entries, 3).taken_again == {}, (
        "v0 was made with the text, v3 holds it again"
    )
    withdrawn = _entries(*TAKEN, _of("withdrawn", "A", None), _published(3, 2), _of("reinstated", "A", 3))
    assert turn(withdrawn, 2).taken_again == {"A": "withdrawn"}


def test_going_forward_to_a_reinstatement_brings_nothing_back_against_anyones_will() -> None:
    back = [_event("rolled-back", version=2), _of("countered", "A", None)]
    entries = _entries(*PUT_BACK, *back)
    assert set(excluded(entries, 2)) == {"A", "B", "C", "D"}
    assert turn(entries, 3).brought_back == ()


def test_what_was_never_taken_out_is_reinstated_without_a_version() -> None:
    entries = _entries(*LINEAGE[:2], _received("A"), _of("withdrawn", "A", None), _of("reinstated", "A", None))
    assert request_states(entries)["A"].reinstated_in is None
    assert put_back(entries, 1) == turn(entries, 1).taken_again == turn(entries, 0).taken_again == {}


def test_a_later_take_out_counts_more_than_an_earlier_put_back() -> None:
    """v2 put A back; rolled back to v0, A was taken out anew in v3."""
    story = (
        *LINEAGE[:2], _received("A"), _of("applied", "A", 1), _of("countered", "A", None), _published(2, 1),
        _of("reinstated", "A", 2), _event("rolled-back", version=1), _of("countered", "A", None),
        _event("rolled-back", version=0), _event("regressed", request_id="A", version=0, data={"cause": "rollback"}),
        _of("applied", "A", 3), _published(3, 0),
    )  # fmt: skip
    entries = _entries(*story)
    assert set(excluded(entries, 3)) == {"A"}
    assert turn(entries, 2).brought_back == ("A",) and turn(entries, 2).put_back == {}
    assert turn(entries, 1).brought_back == ()
    # Refused on v0 and rolled forward instead: what v2 puts back is put back, and a step from there takes it out.
    refused = _entries(*story[:-2], _of("refused", "A", 0))
    assert turn(refused, 2).put_back == {"A": 2} and turn(refused, 1).out_again == ("A",)
    after = _entries(*story[:-2], _event("rolled-back", version=2), _of("applied", "A", 4), _published(4, 2))
    assert set(excluded(after, 4)) == {"A"} and put_back(after, 4) == {}


def test_an_answer_given_on_a_version_that_is_left_is_open_again() -> None:
    events = (*LINEAGE[:2], _received("L"), _of("not-memorised", "L", 1))
    assert turn(_entries(*events), 0).reopened == ("L",)
    assert turn(_entries(*events), 1).reopened == ()
    state = request_states(_entries(*events, _of("reopened", "L", None)))["L"]
    assert (state.state, state.decision, state.version, state.to_do) == ("waiting", None, None, True)


def test_what_a_reinstatement_must_look_at() -> None:
    events = (*TAKEN, _received("L"), _of("not-memorised", "L", 2), _received("N"), _of("not-memorised", "N", 0))
    assert stays_out(_entries(*events), [2], ["C"]) == ("A", "B", "D", "L"), "E was answered before that step"
    assert stays_out(_entries(*events), [1], ["A"]) == ("B", "C", "D", "E", "L"), "N was answered before any"


# --- batches ----------------------------------------------------------------------------------------------


def test_known_batches() -> None:
    assert known_batches(_entries(_received("a"), _received("b", "b2"), _event("published"))) == {"b1", "b2"}
