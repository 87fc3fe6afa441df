"""Prefect's surroundings: its own folder in the workspace, telemetry off, its log kept out of the terminal.

In: a workspace. Out: environment variables, set before Prefect is first imported; after that they change nothing.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from pipeline.errors import Interrupted

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # Its newer pages ask a service for statistics for its configuration, whatever is set; the older ones ask nobody.
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    # The command prints its own message for every failure; the run's state in Prefect keeps the traceback.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    # A page of text for each event that no server takes.
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    "TOKENIZERS_PARALLELISM": "false",
}


def server_answers(api_url: str, timeout_s: float = 3.0) -> bool:
    """Whether a Prefect server is healthy at an API address."""
    try:
        with urllib.request.urlopen(f"{api_url.rstrip('/')}/health", timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError, HTTPException):  # the last: a port that is none, or something else listens there
        return False


def prefect_home(workspace: Path) -> Path:
    """Prefect's folder in a workspace; may be deleted at any time when nothing runs, without loss of evidence."""
    return workspace / "prefect"


def address_file(workspace: Path) -> Path:
    """Where `takedown serve` notes the API address of the server that it runs."""
    return prefect_home(workspace) / "server.json"


def served_at(workspace: Path) -> str:
    """The API address that `takedown serve` noted; empty where there is none. Whether it answers is another matter."""
    try:
        return str(json.loads(address_file(workspace).read_bytes())["api_url"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def prepare(workspace: Path) -> str | None:
    """Set the environment for runs of this workspace.

    A server named by ``PREFECT_API_URL`` is used when it answers, else the one that `takedown serve` runs for this
    workspace. What the user has set is left alone.

    Returns:
        The server's API address; None where none answers, see `flows.server.some_server`.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_HOME", str(prefect_home(workspace)))
    for api_url in (os.environ.get("PREFECT_API_URL", ""), served_at(workspace)):
        if api_url and server_answers(api_url):
            os.environ["PREFECT_API_URL"] = api_url
            return api_url
    os.environ.pop("PREFECT_API_URL", None)
    return None


@contextmanager
def server_needed() -> Iterator[None]:
    """Tell in one sentence that Prefect's server went away; it was asked for minutes then.

    Within a flow, too: Prefect keeps what a flow raises, and the request of an httpx error has the API key in it.

    Raises:
        Interrupted: It cannot be reached.
    """
    from httpx import HTTPError, HTTPStatusError

    try:
        yield
    except HTTPError as error:
        answered = error.response.status_code if isinstance(error, HTTPStatusError) else None
        what = f"answers with an error ({answered})" if answered else f"cannot be reached ({type(error).__name__})"
        gone = Interrupted(
            f"Prefect's server {what}. What was finished is kept; the same command continues, with a server of its own "
            "where none is there."
        )
        try:
            raise gone
        except Interrupted:
            gone.__context__ = None  # `from None` hides it from people only; where Dask is loaded it is pickled, too
            raise
