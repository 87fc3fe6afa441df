"""Deadlines from the ledger's entries, and `takedown status` and `show` with them; the time is given everywhere."""

from __future__ import annotations

import json
import random
import string
import tempfile
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from histories import array_model, start_history
from hypothesis import given
from hypothesis import strategies as st
from tampered.calls import Answer, call_in
from workspaces import draw_text, leaks, take_in

import flows.deadlines
from pipeline.clocks import present, standing
from pipeline.errors import InvalidInput
from pipeline.ledger import Ledger
from pipeline.records import Event, LedgerEntry
from pipeline.settings import Settings, read_settings
from pipeline.workspace import Workspace, read_entries

MONDAY = datetime(2026, 3, 2, 9, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)

ANSWER = {"states": ["waiting", "refused", "regressed"], "within": "48 hours"}


def settings(holidays: tuple[str, ...] = (), **clocks: dict[str, Any]) -> Settings:
    return Settings.model_validate({"deadlines": {"clocks": clocks, "holidays": holidays}})


def history(*events: tuple[str, timedelta], name: str = "TD-1", **received: object) -> list[LedgerEntry]:
    """Entries of one request, each so long after Monday; it was received when it was taken in."""
    entries = []
    for kind, after in events:
        at = MONDAY + after
        data: dict[str, object] = {}
        if kind == "received":
            data = {"batch_id": "b", "received_at": at.isoformat(), "commitment": "c"} | received
        event = Event(kind=kind, actor="a", request_id=name, data=data)
        entries.append(LedgerEntry(seq=len(entries) + 1, at=at, event=event, previous="", digest=""))
    return entries


def due(entries: list[LedgerEntry], chosen: Settings, now: datetime = MONDAY) -> list[tuple[str, timedelta, bool]]:
    """Clock, its end after Monday, and whether it is over."""
    return [(d.clock, d.due - MONDAY, d.overdue) for d in standing(entries, chosen, now).deadlines]


# --- when a clock starts and stops ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "left"),
    [
        ([("received", 0)], 48),
        ([("received", 0), ("refused", 5)], 48),  # still to be done, since it came in
        ([("received", 0), ("hold", 1), ("released", 40)], 48),  # a hold stops no clock but its own
        ([("received", 0), ("applied", 5), ("verified", 5)], None),
        ([("received", 0), ("applied", 5), ("verified", 5), ("regressed", 9)], 57),  # it came back: from then on
        ([("received", 0), ("not-memorised", 5)], None),
        ([("received", 0), ("not-memorised", 5), ("reopened", 10)], 58),
        ([("received", 0), ("withdrawn", 5)], None),
        ([("received", 0), ("received", 20)], 48),
        ([("received", 0), ("erasing", 5)], None),
        ([("received", 0), ("nonsense", 5)], 48),
        ([("nonsense", 0)], None),
    ],
)
def test_a_clock_runs_while_a_request_is_in_its_states(events: list[tuple[str, int]], left: int | None) -> None:
    entries = history(*((kind, after * HOUR) for kind, after in events))
    assert due(entries, settings(answer=ANSWER)) == ([("answer", left * HOUR, False)] if left else [])


def test_holds_and_counter_notices_have_clocks_of_their_own() -> None:
    chosen = settings(
        hold={"states": ["on-hold"], "within": "72 hours"}, notice={"states": ["countered"], "within": "24 hours"}
    )
    entries = history(("received", 0 * HOUR), ("applied", HOUR), ("countered", 2 * HOUR), ("hold", 3 * HOUR))
    now = MONDAY + 26 * HOUR
    assert due(entries, chosen, now) == [("notice", 26 * HOUR, True), ("hold", 75 * HOUR, False)]
    assert due([*entries, *history(("reinstated", 4 * HOUR))], chosen, now) == [("hold", 75 * HOUR, False)]
    assert due([*entries, *history(("released", 4 * HOUR))], chosen, now) == [("notice", 26 * HOUR, True)]


def test_a_clock_may_be_for_one_basis_and_an_unknown_basis_has_every_clock() -> None:
    chosen = settings(gdpr=ANSWER | {"basis": ["privacy"]}, all=ANSWER | {"within": "1 hour"})
    for basis, names in (("privacy", ["all", "gdpr"]), ("copyright", ["all"]), (None, ["all", "gdpr"])):
        data = {} if basis is None else {"basis": basis}
        assert [clock for clock, _, _ in due(history(("received", 0 * HOUR), **data), chosen)] == names


def test_days_are_those_of_the_time_zone() -> None:
    chosen = settings(holidays=("2026-03-03",), answer=ANSWER | {"within": "1 business day"})
    tokyo = chosen.model_copy(update={"serve": chosen.serve.model_copy(update={"time_zone": "Asia/Tokyo"})})
    entries = history(("received", 7 * HOUR))  # 16:00Z on Monday is Tuesday, the holiday, in Tokyo
    midnight = MONDAY - 9 * HOUR
    assert due(entries, chosen) == [("answer", midnight + 3 * DAY - MONDAY, False)]
    assert due(entries, tokyo) == [("answer", midnight + 3 * DAY - 9 * HOUR - MONDAY, False)]


def test_a_batch_cannot_postpone_its_own_deadline() -> None:
    early, late = (history(("received", 0 * HOUR), received_at=(MONDAY + by).isoformat()) for by in (-DAY, 300 * DAY))
    assert due(early, settings(answer=ANSWER)) == [("answer", DAY, False)]
    assert due(late, settings(answer=ANSWER)) == [("answer", 2 * DAY, False)]
    assert standing(early, Settings(), MONDAY).postdated == ()
    found = standing(late, Settings(), MONDAY)
    assert found.postdated == ("TD-1",) and found.oldest is not None and found.oldest.age_s == 0


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59-05:00", "2026-03-02T09:00:00"])
def test_no_date_of_a_batch_stops_the_others_from_being_seen(at: str) -> None:
    found = standing(history(("received", 0 * HOUR), received_at=at), settings(answer=ANSWER), MONDAY)
    assert len(found.deadlines) == 1 and found.oldest is not None


def test_the_oldest_is_what_has_waited_longest_and_can_be_worked_on() -> None:
    entries = [
        *history(("received", 0 * HOUR), ("hold", HOUR), name="held"),
        *history(("received", HOUR), ("applied", 2 * HOUR), ("regressed", 9 * HOUR), name="back"),
        *history(("received", 3 * HOUR), ("hold", 4 * HOUR), ("released", 5 * HOUR), name="free"),
        *history(("received", 4 * HOUR), name="young"),
    ]
    found = standing(entries, Settings(), MONDAY + 10 * HOUR).oldest
    assert found is not None and (found.request_id, found.age_s) == ("free", 7 * 3600)
    assert standing(entries[:2], Settings(), MONDAY).oldest is None
    together = [*history(("received", HOUR), name="Q10"), *history(("received", HOUR), name="Q1")]
    first = standing(together, Settings(), MONDAY + 2 * HOUR).oldest
    assert first is not None and first.request_id == "Q10", (
        "of what came at the same time the first, as status lists it"
    )


# --- a clock that was set back ----------------------------------------------------------------------------


def test_a_machine_whose_clock_was_set_back_hides_nothing() -> None:
    entries = history(("received", 0 * HOUR)) + history(("received", 60 * HOUR), name="TD-2")
    entries += history(("received", -9000 * DAY), name="TD-3")  # taken in while the clock was wrong
    now = present(entries, MONDAY - 9000 * DAY)
    assert (now.at, now.behind) == (MONDAY + 60 * HOUR, 9000 * DAY + 60 * HOUR)
    found = {d.request_id: d.overdue for d in standing(entries, settings(answer=ANSWER), now.at).deadlines}
    assert found == {"TD-1": True, "TD-2": False, "TD-3": True}
    right = present(entries, MONDAY + 61 * HOUR)
    assert (right.at, right.behind) == (MONDAY + 61 * HOUR, timedelta(0))
    assert present([], MONDAY).at == MONDAY


@given(st.integers(0, 2**32), st.integers(0, 200))
def test_deadlines_come_in_order_whatever_order_time_took(seed: int, hours: int) -> None:
    draw = random.Random(seed)
    entries = [
        entry
        for n in range(draw.randrange(12))
        for entry in history(("received", draw.randrange(-99, 99) * HOUR), name=f"TD-{n}")
    ]
    chosen = settings(a=ANSWER, b=ANSWER | {"within": "2 business days"})
    now = present(entries, MONDAY + hours * HOUR).at
    found = standing(entries, chosen, now).deadlines
    assert len(found) == 2 * len(entries)
    assert all(one.due <= two.due and one.overdue >= two.overdue for one, two in pairwise(found))
    assert all(d.overdue == (d.due <= now) for d in found)


# --- settings ---------------------------------------------------------------------------------------------


GOOD = """
[serve]
time_zone = "Europe/Berlin"
[deadlines]
holidays = [2026-12-25, 2027-01-01]
[deadlines.clocks.answer]
states = ["waiting", "refused", "regressed"]
within = "14 business days"
basis = ["copyright"]
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("14 business days", "14 fortnights", ["deadlines.clocks.answer.within", "is no period"]),
        ("14 business days", "0 days", ["deadlines.clocks.answer.within", "is not between"]),
        ("within =", "after =", ["clocks.answer.within: Field required", "clocks.answer.after: Extra inputs"]),
        ('"waiting"', '"Waiting"', ["deadlines.clocks.answer.states.0"]),
        ('["waiting", "refused", "regressed"]', "[]", ["deadlines.clocks.answer.states"]),
        ('"copyright"', '"law"', ["deadlines.clocks.answer.basis.0"]),
        ("2026-12-25", '"soon"', ["deadlines.holidays.0"]),
        ("2026-12-25", "2026-12-25T10:00:00", ["deadlines.holidays.0"]),
        ("clocks.answer", "clocks.'An swer'", ["clocks.An swer"]),
        ("[deadlines]\n", "[deadlines]\nzone = 1\n", ["deadlines.zone: Extra inputs"]),
    ],
)
def test_mistakes_are_told(tmp_path: Path, old: str, new: str, told: list[str]) -> None:
    path = tmp_path / "takedown.toml"
    path.write_text(GOOD)
    assert read_settings(path).deadlines.clocks["answer"].period.count == 14
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(InvalidInput) as error:
        read_settings(path)
    assert all(words in str(error.value) for words in told), str(error.value)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "takedown.toml"
    path.write_text(GOOD.replace("14 business", "x").replace('"refused"', '"y"').replace("2027-01-01", "7"))
    with pytest.raises(InvalidInput) as error:
        read_settings(path)
    assert len(error.value.problems) == 3


@given(st.integers(0, len(GOOD)), st.integers(0, 20), st.text(st.sampled_from(string.printable + "\0é٣"), max_size=8))
def test_a_file_with_any_mistake_is_read_or_refused(start: int, cut: int, put: str) -> None:
    """Whatever is still read gives a deadline; anything else is told as a problem of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "takedown.toml"
        path.write_text(GOOD[:start] + put + GOOD[start + cut :])
        try:
            found = read_settings(path)
        except InvalidInput as error:
            assert error.problems and all(p.where.startswith(str(path)) for p in error.problems)
            return
    for one in standing(history(("received", 0 * HOUR)), found, MONDAY).deadlines:
        assert one.due > MONDAY and not one.overdue


def test_deadlines_are_no_part_of_a_run_s_identity() -> None:
    assert settings(answer=ANSWER).model_dump(mode="json") == Settings().model_dump(mode="json")


# --- the command line -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three that wait: TD-2 since Monday, TD-1 since Wednesday, TD-3 taken in on Friday and dated a year later."""
    folder = tmp_path_factory.mktemp("clocks")
    workspace = start_history(folder / "store", array_model(folder / "model"))
    with Ledger.open(workspace.ledger) as ledger:
        for name, after, by in (("TD-2", 0, 0), ("TD-1", 2, 0), ("TD-3", 4, 365)):
            data: dict[str, object] = {
                "batch_id": "b", "commitment": "c", "received_at": (MONDAY + (after + by) * DAY).isoformat(),
            }  # fmt: skip
            ledger.append(Event(kind="received", actor="a", request_id=name, data=data), at=MONDAY + after * DAY)
    return workspace


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[datetime]:
    """The machine's clock stands at Friday noon; the first entry of a store is written now, long after that."""

    class Machine(datetime):
        at = MONDAY + 4 * DAY + 3 * HOUR

        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return cls.at

    monkeypatch.setattr(flows.deadlines, "datetime", Machine)
    monkeypatch.setattr(flows.deadlines, "present", lambda entries, at: present(entries[1:], at))
    return Machine


def status(store: Workspace, text: str, *words: str) -> Answer:
    store.settings_file.write_text(text)
    return call_in(store, "status", *words)


SET = "[deadlines.clocks.answer]\nstates = ['waiting']\nwithin = '72 hours'\n"


def test_status_shows_counts_age_and_deadlines_with_the_overdue_first(
    store: Workspace, machine: type[datetime]
) -> None:
    found = status(store, SET)
    assert found.code == 0 and not found.err
    assert "Current version: v0 3 requests: 3 waiting By their batches received after they were taken in" in found.text
    rows = [line.split() for line in found.out.splitlines() if " answer " in line]
    assert [row[0] for row in rows] == ["TD-2", "TD-1", "TD-3"]
    assert " ".join(rows[0]) == "TD-2 waiting answer 2026-03-05 09:00Z overdue by 1 d 3 h"
    assert " ".join(rows[1]) == "TD-1 waiting answer 2026-03-07 09:00Z 21 h 0 min left"
    assert "1 deadline overdue." in found.out and "3 to be worked on. The oldest, TD-2, waits for 4 d 3 h." in found.out
    shown = json.loads(status(store, SET, "--json").out)
    assert [(d["request_id"], d["due"], d["overdue"]) for d in shown["deadlines"]] == [
        ("TD-2", "2026-03-05T09:00:00Z", True), ("TD-1", "2026-03-07T09:00:00Z", False),
        ("TD-3", "2026-03-09T09:00:00Z", False),
    ]  # fmt: skip
    assert (shown["counts"], shown["queue"]) == ({"waiting": 3}, ["TD-2", "TD-1", "TD-3"])
    assert shown["oldest_waiting"] == {"request_id": "TD-2", "since": "2026-03-02T09:00:00Z", "age_s": 99 * 3600}
    assert (shown["at"], shown["postdated"]) == ("2026-03-06T12:00:00+00:00", ["TD-3"])
    assert "answer: due 2026-03-05 09:00Z, overdue by 1 d 3 h" in call_in(store, "show", "TD-2").out
    (one,) = json.loads(call_in(store, "show", "TD-2", "--json").out)["deadlines"]
    assert one == shown["deadlines"][0]


def test_exit_codes_for_monitoring(store: Workspace, machine: type[datetime]) -> None:
    for more in ([], ["--json"]):
        assert status(store, SET, *more).code == 0
        late = status(store, SET, "--fail-overdue", *more)
        assert late.code == 1 and late.out == status(store, SET, *more).out
        assert status(store, SET.replace("72", "900"), "--fail-overdue", *more).code == 0
    nothing = status(store, "", "--fail-overdue")
    assert nothing.code == 2 and "sets no deadline" in nothing.err and not nothing.out


def test_settings_with_a_mistake_hide_no_request_and_pass_no_check(store: Workspace, machine: type[datetime]) -> None:
    broken = SET.replace("hours", "hour glasses") + "[gate]\nkept_share = 7\n"
    found = status(store, broken)
    assert found.code == 0 and "TD-2" in found.out and "Deadlines" not in found.out
    assert "no deadlines are shown" in found.err and "is no period" in found.err and "kept_share" in found.err
    assert json.loads(status(store, broken, "--json").out)["deadlines"] == []
    assert "is no period" in call_in(store, "show", "TD-2").err
    failed = status(store, broken, "--fail-overdue")
    assert failed.code == 2 and "is no period" in failed.err and "kept_share" in failed.err and not failed.out


def test_a_clock_that_is_behind_is_told_and_hides_nothing(store: Workspace, machine: type[datetime]) -> None:
    machine.at = MONDAY - 400 * DAY  # type: ignore[attr-defined]
    found = status(store, SET, "--fail-overdue")
    assert found.code == 1 and "TD-2 waiting answer 2026-03-05 09:00Z overdue by 1 d 0 h" in found.text
    assert "the clock of this machine is 404 d 0 h behind ledger entry 4;" in found.err


def test_a_long_list_is_cut_and_says_so(
    store: Workspace, machine: type[datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("flows.deadlines", "flows.standing"):
        monkeypatch.setattr(f"{module}.SHOWN", 2)
    found = status(store, SET.replace("72", "1"))
    assert found.out.count("and 1 more; --json has all.") == 2 and "3 deadlines overdue." in found.out
    assert len(json.loads(status(store, SET, "--json").out)["deadlines"]) == 3


def test_the_basis_of_a_request_that_is_taken_in_is_known_and_nothing_else_of_it(tmp_path: Path) -> None:
    workspace = start_history(tmp_path / "store", array_model(tmp_path / "model"))
    text = draw_text("secret", 40)
    take_in(workspace, "b", {"P": text}, basis="privacy", title="A Secret Title", contact="someone@example.org")
    take_in(workspace, "c", {"C": draw_text("other", 40)})
    workspace.settings_file.write_text(SET + "basis = ['privacy']\n")
    found, shown = call_in(workspace, "status"), call_in(workspace, "status", "--json")
    assert [d["request_id"] for d in json.loads(shown.out)["deadlines"]] == ["P"]
    assert [e.event.data.get("basis") for e in read_entries(workspace)[1:]] == ["privacy", "copyright"]
    secrets = ["A Secret Title", "someone@example.org", "A. Holder", text.split(".")[0]]
    assert leaks(secrets, workspace.root, (found.out + shown.out).encode()) == []
