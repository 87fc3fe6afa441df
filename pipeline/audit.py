"""What an audit finds, as one record: breaks of the store, and texts measured again on the version in force.

In: findings. Out: a report in ``reports/``. Never: a change of what is audited.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from pipeline.clocks import Deadline
from pipeline.display import plural
from pipeline.files import make_folder, write_json
from pipeline.recheck import Rechecked
from pipeline.records import Break, Record
from pipeline.workspace import Workspace

NAMED = 20
"""Overdue requests that the sentence names; the report has all."""


class Audit(Record):
    """An audit.

    Attributes:
        at: When it ended.
        version: The version that was in force when it began, and was measured.
        breaks: What does not hold, as `pipeline.verify` names it.
        rechecked: Every text that this version excludes and that has passages to measure.
        overdue: Deadlines that have passed, the oldest first. That something is late says nothing about what is kept.
    """

    at: datetime
    version: int
    breaks: tuple[Break, ...]
    rechecked: tuple[Rechecked, ...]
    overdue: tuple[Deadline, ...] = ()

    @property
    def above(self) -> tuple[Rechecked, ...]:
        """Texts that are above their limit."""
        return tuple(r for r in self.rechecked if not r.within)

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not self.breaks and not self.above

    def sentence(self) -> str:
        """What was found, in one line."""
        texts = f"{len(self.rechecked)} texts measured again on v{self.version}"
        late = f" {plural(len(self.overdue), 'deadline')} overdue: {self._named()}." if self.overdue else ""
        if self.sound:
            return f"Everything holds; {texts}, none above its limit.{late}"
        return f"{len(self.breaks)} breaks; {texts}, {len(self.above)} above their limits.{late}"

    def _named(self) -> str:
        names = [f"{d.request_id} ({d.clock})" for d in self.overdue[:NAMED]]
        return ", ".join([*names, "…"] if len(self.overdue) > NAMED else names)


def keep_audit(workspace: Workspace, audit: Audit) -> Path:
    """Write the report; returns where it is."""
    make_folder(workspace.reports)
    path = workspace.reports / f"audit-{audit.at:%Y%m%dT%H%M%SZ}.json"
    write_json(path, audit.model_dump(mode="json"))
    return path
