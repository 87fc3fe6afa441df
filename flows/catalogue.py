"""Every deployment, declared once: what is served on one machine, and what `flows/prefect.yaml` deploys elsewhere.

In: a workspace and its settings. Out: deployments with their schedules. Never: a second list of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from prefect import Flow
from prefect.deployments.runner import RunnerDeployment
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.annotations import freeze
from pydantic import ValidationError

import pipeline
from flows import doors
from pipeline.errors import InvalidInput, Problem
from pipeline.settings import Schedule, ServeSettings
from pipeline.workspace import Workspace

TAG = "takedown"


@dataclass(frozen=True)
class Door:
    """A deployment.

    Attributes:
        name: Of the deployment.
        flow: What it runs.
        text: What it is for.
        schedule: When, out of the settings; None for one that is only run when asked for.
    """

    name: str
    flow: Flow[Any, Any]
    text: str
    schedule: Callable[[ServeSettings], Schedule | None] = lambda settings: None

    @property
    def full_name(self) -> str:
        """As `prefect deployment run` takes it."""
        return f"{self.flow.name}/{self.name}"

    @property
    def entrypoint(self) -> str:
        """As `flows/prefect.yaml` takes it."""
        return f"flows.doors.{self.flow.fn.__name__}"


DOORS = (
    Door(
        "takedown-scheduled", doors.scheduled, "Takes in what lies in the inbox; one step for all that waits.",
        lambda settings: settings.scheduled,
    ),
    Door("takedown-ad-hoc", doors.ad_hoc, "One urgent batch now, before everything that waits."),
    Door("takedown-decide", doors.decide, "Approves or refuses a run that waits for approval."),
    Door(
        "audit-scheduled", doors.audit, "Re-checks everything kept, and every text on the version in force.",
        lambda settings: settings.audit,
    ),
)  # fmt: skip


def prefect_schedule(schedule: Schedule, zone: str) -> CronSchedule | IntervalSchedule:
    """A schedule of the settings as Prefect has it.

    An interval is counted from a fixed midnight, so that a restart does not move it.

    Raises:
        InvalidInput: The cron expression is none.
    """
    if schedule.every_s is not None:
        anchor = datetime(2024, 1, 1, tzinfo=ZoneInfo(zone))
        return IntervalSchedule(interval=timedelta(seconds=schedule.every_s), anchor_date=anchor, timezone=zone)
    try:
        return CronSchedule(cron=str(schedule.cron), timezone=zone)
    except ValidationError as error:
        problem = Problem(
            f"takedown.toml: serve: cron {schedule.cron!r}", "is no cron expression",
            'Five fields: minute, hour, day, month, weekday; "0 2 * * *" is every night at two.',
        )  # fmt: skip
        raise InvalidInput([problem]) from error


async def next_run(door: Door, settings: ServeSettings) -> datetime | None:
    """When a door opens by itself next, with zone; None for one that does not."""
    schedule = door.schedule(settings)
    if schedule is None:
        return None
    return (await prefect_schedule(schedule, settings.time_zone).get_dates(n=1, start=datetime.now(UTC)))[0]


async def deployment(door: Door, workspace: Workspace, settings: ServeSettings) -> RunnerDeployment:
    """A door as a deployment of this workspace."""
    schedule = door.schedule(settings)
    schedules = [] if schedule is None else [{"schedule": prefect_schedule(schedule, settings.time_zone).model_dump()}]
    made: RunnerDeployment = await door.flow.ato_deployment(
        door.name,
        schedules=schedules or None,
        parameters={"workspace": str(workspace.root)},
        description=door.text,
        tags=[TAG],
        version=pipeline.__version__,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    # Frozen: whoever fills the form in cannot send a run into another folder. Takes effect on assignment only.
    made.parameters = {"workspace": freeze(str(workspace.root))}
    return made
