"""`takedown serve`: scheduled runs, urgent requests and audits on one machine, until somebody stops it.

Exit 0 stopped by Ctrl-C or SIGTERM · 2 wrong use · 3 served already, or Prefect's server ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import typer

from flows.environment import prefect_home, prepare, server_answers
from flows.terminal import opened, say
from pipeline.errors import Interrupted, UsageError, WorkspaceBusy
from pipeline.patience import only_one
from pipeline.settings import ServeSettings
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.runner import Runner

verbs = typer.Typer(rich_markup_mode=None)

SERVED = {
    "PREFECT_RUNNER_POLL_FREQUENCY": "2",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10",
    # Begin and end of every run in the terminal, and in the run's page.
    "PREFECT_LOGGING_LEVEL": "INFO",
}
AT_A_TIME = 4
"""Most runs at a time, each a process with torch: a step, an urgent one that waits for it, an audit, one to spare."""


@verbs.command()
def serve(context: typer.Context) -> None:
    """Serve scheduled runs, urgent requests and audits until Ctrl-C; starts a Prefect server where none is configured.

    When is set in takedown.toml under [serve]. The server that $PREFECT_API_URL names is used; else one is run on
    127.0.0.1, with its page for people and its database in the workspace, and ends with this command.

    Example: takedown -w ws serve
    """
    workspace = opened(context)
    settings = workspace.settings().serve
    for name, value in SERVED.items():
        os.environ.setdefault(name, value)
    configured = os.environ.get("PREFECT_API_URL", "")
    if configured and not server_answers(configured):
        raise UsageError(f"{configured}: no Prefect server answers there. Start it, or unset PREFECT_API_URL.")
    with only_one(prefect_home(workspace.root) / "serve.lock") as first:
        if not first:
            raise WorkspaceBusy(f"{workspace.root}: is served already. Stop the other `takedown serve` first.")
        if configured:
            prepare(workspace.root)
            asyncio.run(_serve(workspace, settings, None))
            return
        from flows.server import own_server

        say("Starting Prefect's server …")
        prepare(workspace.root)
        with own_server(workspace.root, settings.port) as (api_url, server):
            os.environ["PREFECT_API_URL"] = api_url
            asyncio.run(_serve(workspace, settings, server))
            if server.poll() is not None:
                raise Interrupted(f"Prefect's server ended; {prefect_home(workspace.root) / 'server.log'} says why.")


async def _serve(workspace: Workspace, settings: ServeSettings, server: subprocess.Popen[bytes] | None) -> None:
    """Declare the deployments and run what they ask for, until a signal or the server's end."""
    from prefect.runner import Runner

    from flows.liveness import drop_missed, reconcile

    # Schedules go on when this stops, so that a restart changes nothing; what is missed meanwhile is made up for once.
    runner = Runner(name="takedown", limit=AT_A_TIME, pause_on_shutdown=False)
    served = await _declare(runner, workspace, settings)
    dead = await asyncio.to_thread(reconcile, workspace.root)
    missed = await asyncio.to_thread(drop_missed, workspace.root, served)
    for count, what in ((dead, "runs had died; Prefect knows now."), (missed, "missed runs are made up for by one.")):
        if count:
            say(f"{count} {what}")
    running = asyncio.create_task(runner.start())
    while not runner.started and not running.done():
        await asyncio.sleep(0.1)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, runner.handle_sigterm)
    await _announce(settings)
    ended = asyncio.create_task(_end_of(server))
    await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        runner.handle_sigterm()
    ended.cancel()
    await running


async def _declare(runner: Runner, workspace: Workspace, settings: ServeSettings) -> list[UUID]:
    """Bring the deployments of the catalogue to the server; returns their ids.

    Raises:
        UsageError: The server has one of them for another workspace.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from flows.catalogue import DOORS, deployment

    served = []
    async with get_client() as client:
        for door in DOORS:
            try:
                known = (await client.read_deployment_by_name(door.full_name)).parameters.get("workspace")
            except ObjectNotFound:
                known = None
            if known not in (None, str(workspace.root)):
                raise UsageError(
                    f"{door.full_name}: this Prefect server has it for {known} already. Use another server, or delete "
                    "the deployment there."
                )
    for door in DOORS:
        served.append(await runner.aadd_deployment(await deployment(door, workspace, settings)))
    return served


async def _announce(settings: ServeSettings) -> None:
    from prefect.settings import PREFECT_UI_URL

    from flows.catalogue import DOORS, next_run

    say(f"Serving at {PREFECT_UI_URL.value()}")
    for door in DOORS:
        at = await next_run(door, settings)
        say(f"  {door.full_name:<36} {f'next {at:%Y-%m-%d %H:%M:%S %Z}' if at else 'when asked for'}")
    say("Ctrl-C stops it.")


async def _end_of(server: subprocess.Popen[bytes] | None) -> None:
    """Return when the server has ended; never for one that is not ours."""
    while server is None or server.poll() is None:
        await asyncio.sleep(1)
