"""Tell people of a run that ended badly: one POST to `serve.webhook`, as a state hook of each door.

In: a run and its final state. Out: ids and names of states, as JSON. Never: the message of a state, for that of an
exception may quote anything; a title, a contact, a text; a run that fails because nobody could be told.
"""

from __future__ import annotations

import json
import re
import urllib.request
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn
from urllib.parse import urlsplit

from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging.loggers import PrefectLogAdapter, flow_run_logger

from pipeline.clocks import overdue
from pipeline.display import plain, plural
from pipeline.errors import TakedownError
from pipeline.resources import lock_holder
from pipeline.runlog import log_file, read_events
from pipeline.runs import unfinished_runs
from pipeline.settings import LOOPBACK
from pipeline.workspace import Workspace, open_workspace, read_entries

LONGEST_S = 10.0
"""How long a run waits for the receiver, whatever that does."""
NAMED = 100
"""Deadlines that are named; ``overdue_count`` counts all."""

STEPPING = ("scheduled", "ad-hoc")
"""Flows that carry out a step, so that a run that was begun and not ended is theirs."""

RUN = re.compile(r"\brun-[0-9a-f]{12}\b")


def tell(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Post what became of a run, where the settings say to whom; what goes wrong with that is in the run's log.

    Prefect calls this with these names, in the process of the run, or in that of `takedown serve` for one that died.
    """
    tell_of(flow.name, flow_run, state, flow_run_logger(flow_run, flow))


def tell_of(flow: str, flow_run: FlowRun, state: State[Any], log: PrefectLogAdapter) -> None:
    """The same, of a run of the flow of that name whose process is gone; see `flows.liveness.reconcile`."""
    try:
        workspace = open_workspace(Path(str(flow_run.parameters.get("workspace"))))
        url = workspace.settings().serve.webhook
        if url is None:
            return
        failure = post(url, message(workspace, flow, flow_run, state))
    except (TakedownError, OSError) as error:
        failure = plain(str(error), 2000)
    if failure:
        log.error("Nobody was told by the webhook: %s", failure)


def message(workspace: Workspace, flow: str, flow_run: FlowRun, state: State[Any]) -> dict[str, object]:
    """What is sent: ids and names only. ``text`` is what chat programs show of it.

    Raises:
        TakedownError: See `pipeline.clocks.overdue`.
    """
    run = RUN.search(state.message or "")
    crashed = state.is_crashed() and flow in STEPPING
    name = run.group() if run else left_behind(workspace, flow_run.start_time) if crashed else None
    late = overdue(workspace, datetime.now(UTC)) if state.name == "Overdue" else ()
    named = f" ({name})" if name else f" ({plural(len(late), 'deadline')})" if late else ""
    return {
        "text": f"takedown, {workspace.root.name}: {flow} ended as {state.name}{named}.",
        "workspace": workspace.root.name,
        "flow": flow,
        "flow_run": str(flow_run.id),
        "state": state.name,
        "run": name,
        "overdue": [{"request": d.request_id, "clock": d.clock, "due": d.due.isoformat()} for d in late[:NAMED]],
        "overdue_count": len(late),
    }


def left_behind(workspace: Workspace, since: datetime | None) -> str | None:
    """The run that was at work when a process died without a word; None where that is not certain.

    Not while somebody works, whose run it may be, nor one that nothing is heard of since the process began.
    """
    found = unfinished_runs(workspace, read_entries(workspace))
    if len(found) != 1 or since is None or lock_holder(workspace.root / ".lock") is not False:
        return None
    path = log_file(workspace, found[0])
    times = [datetime.fromisoformat(str(e["at"])) for e in read_events(path) if "at" in e] if path else []
    return found[0] if times and max(times) >= since else None


def post(url: str, body: dict[str, object], longest_s: float = LONGEST_S) -> str | None:
    """Send JSON once; no redirect is followed.

    Returns:
        Why it did not arrive, without the address, which may be a secret; None where it did.
    """
    failures: list[str | None] = []
    # A thread, because looking a name up knows no time limit, and one of a socket begins anew with every byte.
    sender = Thread(target=lambda: failures.append(_sent(url, body, longest_s)), daemon=True)
    sender.start()
    sender.join(longest_s)
    host = plain(str(urlsplit(url).hostname))
    failure = failures[0] if failures else f"no answer within {longest_s:g} s"
    return failure and f"{host}: {failure}"


def _sent(url: str, body: dict[str, object], timeout_s: float) -> str | None:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if urlsplit(url).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s):
            return None
    except (OSError, HTTPException, ValueError) as error:
        return plain(str(error) or type(error).__name__, 200)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the settings name the address."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> NoReturn:
        raise OSError(f"sends on to another address ({code}); name that one")
