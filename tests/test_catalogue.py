"""The catalogue of deployments: one list for one machine and for work pools, schedules that a restart does not move."""

from __future__ import annotations

import asyncio
import importlib
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from flows.catalogue import DOORS, next_run, prefect_schedule
from flows.doors import Decision, Urgent, ended
from pipeline.dropfolder import Delivery, Rejected
from pipeline.errors import InvalidInput
from pipeline.records import Publication
from pipeline.settings import Schedule, ServeSettings, Settings, read_settings

ROOT = Path(__file__).resolve().parent.parent


def test_prefect_yaml_declares_the_same_doors() -> None:
    declared = {d["name"]: d for d in yaml.safe_load((ROOT / "flows" / "prefect.yaml").read_text())["deployments"]}
    assert list(declared) == [door.name for door in DOORS]
    for door in DOORS:
        found = declared[door.name]
        assert (found["entrypoint"], found["description"]) == (door.entrypoint, door.text)
        assert found["parameters"] == {"workspace": "{{ $TAKEDOWN_WORKSPACE }}"}
        schedule = door.schedule(ServeSettings())
        crons = [(s["cron"], s["timezone"]) for s in found.get("schedules", [])]
        assert crons == ([] if schedule is None else [(schedule.cron, "UTC")])
        module, _, function = door.entrypoint.rpartition(".")
        assert getattr(importlib.import_module(module), function) is door.flow


@pytest.mark.parametrize("schedule", [Schedule(cron="30 1 * * *"), Schedule(every_s=86400)])
def test_schedule_is_read_in_its_time_zone_and_does_not_move(schedule: Schedule) -> None:
    first, second = (prefect_schedule(schedule, "Europe/Berlin") for _ in range(2))
    assert first == second
    start = datetime(2026, 7, 1, 12, tzinfo=UTC)
    (at,) = asyncio.run(first.get_dates(n=1, start=start))
    assert at.astimezone(UTC).hour == (23 if schedule.cron else 22)  # 01:30 and midnight in Berlin's summer
    assert asyncio.run(first.get_dates(n=1, start=start)) == [at]


def test_next_run_is_told_where_there_is_a_schedule() -> None:
    settings = ServeSettings(time_zone="Asia/Tokyo")
    found = {door.name: asyncio.run(next_run(door, settings)) for door in DOORS}
    assert found["takedown-ad-hoc"] is None and found["takedown-decide"] is None
    at = found["takedown-scheduled"]
    assert at is not None and at > datetime.now(UTC) and (at.hour, str(at.tzinfo)) == (2, "Asia/Tokyo")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("scheduled = {cron = '1', every_s = 1}", "either cron or every_s"),
        ("scheduled = {}", "either cron or every_s"),
        ("time_zone = 'Mars/Olympus'", "no time zone known here"),
        ("time_zone = '../etc'", "no time zone known here"),
        ("port = 0", "greater than or equal to 1"),
        ("nightly = true", "Extra inputs"),
    ],
)
def test_mistakes_in_the_settings_are_told(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "takedown.toml"
    path.write_text(f"[serve]\n{line}\n")
    with pytest.raises(InvalidInput, match=told):
        read_settings(path)


def test_cron_that_is_none_is_told() -> None:
    with pytest.raises(InvalidInput, match="is no cron expression"):
        prefect_schedule(Schedule(cron="every night"), "UTC")


def test_when_and_by_what_something_runs_is_no_part_of_a_run_s_identity() -> None:
    other = Settings.model_validate(
        {"serve": {"port": 5000}, "runtime": {"runner": "ray", "workers": 8}, "intake": {"settle_s": 9}}
    )
    assert other.model_dump(mode="json") == Settings().model_dump(mode="json")


@pytest.mark.parametrize(
    "given", [{}, {"batch": "b", "requests": ["A"]}, {"batch": "b", "text": "…"}, {"batch": "b" * 65}]
)
def test_urgent_names_a_batch_or_requests_and_no_text(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"either a batch id|Extra inputs|at most 64"):
        Urgent.model_validate(given)
    assert Urgent(batch="b").actor == "legal"


@pytest.mark.parametrize("run", ["", "run-1", "../run-0123456789ab", "run-0123456789ab/.."])
def test_decision_names_a_run(run: str) -> None:
    with pytest.raises(ValueError, match="run"):
        Decision(run=run, decision="approve", actor="counsel")


@pytest.mark.parametrize(
    ("publication", "delivery", "told"),
    [
        (None, Delivery(), ("NothingWaits", False, "Nothing waits.")),
        (
            Publication(outcome="published", run_id="run-1", version=3),
            Delivery(arriving=("a.json", "b.json")),
            ("Published", False, "run-1: published, v3. Still being written: inbox/a.json, inbox/b.json."),
        ),
        (
            None,
            Delivery(rejected=(Rejected("c.json", ()),), arriving=("a.json",)),
            (
                "SetAside", True,
                "Nothing waits. Still being written: inbox/a.json. Set aside: inbox/rejected/c.json.",
            ),
        ),
        (
            Publication(outcome="refused", run_id="run-1", version=None),
            Delivery(rejected=(Rejected("c.json", ()),)),
            ("Refused", True, "run-1: refused, no new version. Set aside: inbox/rejected/c.json."),
        ),
    ],
)  # fmt: skip
def test_final_state_tells_of_every_file_that_was_not_taken_in(
    publication: Publication | None, delivery: Delivery, told: tuple[str, bool, str]
) -> None:
    state = ended(publication, delivery)
    assert (state.name, state.is_failed(), state.message) == told
