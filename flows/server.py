"""A Prefect server of our own: on loopback, in a process that ends with the one that started it, however that ends.

In: a workspace and a port. Out: an API address that answers. Never: a server that outlives its parent: the child reads
a pipe that only the parent holds open, and stops at its end, which the kernel brings about also after kill -9.

Run as ``python -m flows.server PORT`` this module is that child; with ``embedded`` behind the port it serves no page
and no schedule, for a single command. (Prefect can embed a server by itself, but that one outlives a killed command.)
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flows.environment import address_file, prefect_home, prepare, server_answers
from pipeline.errors import Interrupted, UsageError
from pipeline.files import remove, write_json

HOST = "127.0.0.1"
START_S = 180.0
"""Longest start; 30 s are usual for a fresh database on two busy cores."""
STOP_S = 20.0
"""Longest stop before the process is killed."""


@contextmanager
def own_server(workspace: Path, port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a Prefect server for as long as the context is open.

    Args:
        workspace: Its database and log are in the workspace's ``prefect/``.
        port: On 127.0.0.1.

    Yields:
        The API address, and the server's process.

    Raises:
        UsageError: The port is taken.
        Interrupted: The server does not start; says where its log is.
    """
    home = prefect_home(workspace)
    home.mkdir(mode=0o700, exist_ok=True)
    _require_free(port)
    api_url = f"http://{HOST}:{port}/api"
    log = home / "server.log"
    if log.exists():
        log.replace(home / "server.log.1")
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_UI_API_URL": api_url}
    environment.pop("PREFECT_API_URL", None)
    process = _begin(port, log, environment)
    try:
        _wait_until_healthy(process, api_url, log)
        write_json(address_file(workspace), {"api_url": api_url, "pid": process.pid})
        yield api_url, process
    finally:
        remove(address_file(workspace))
        _stop(process)


def some_server(workspace: Path) -> str:
    """Set the environment as `prepare` does; where no server answers, start one that ends with this process.

    Returns:
        The API address, which answers.

    Raises:
        Interrupted: The server does not start; says where its log is.
    """
    if (found := prepare(workspace)) is not None:
        return found
    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    log, api_url = home / "embedded.log", f"http://{HOST}:{port}/api"
    environment = os.environ | {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}
    process = _begin(port, log, environment, "embedded")
    atexit.register(_stop, process)
    _wait_until_healthy(process, api_url, log)
    os.environ["PREFECT_API_URL"] = api_url
    return api_url


def _begin(port: int, log: Path, environment: Mapping[str, str], *more: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(port), *more],
            stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is for the parent alone, which ends the runs first
        )  # fmt: skip


def _require_free(port: int) -> None:
    """A server of a parent that was just killed needs a moment to end."""
    until = time.monotonic() + STOP_S
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
                return
            except OSError as error:
                if time.monotonic() >= until:
                    raise UsageError(
                        f"Port {port} of {HOST} is taken ({error.strerror}). Choose another one in takedown.toml "
                        "([serve] port = …), or name the server that runs there in $PREFECT_API_URL."
                    ) from None
        time.sleep(0.2)


def _wait_until_healthy(process: subprocess.Popen[bytes], api_url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while not server_answers(api_url):
        if process.poll() is not None or time.monotonic() >= until:
            raise Interrupted(f"Prefect's server does not start; {log} says why. Nothing was changed.")
        time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.argv[2:] == ["embedded"]:
        import uvicorn

        made_by, port = "prefect.server.api.server:create_app", int(sys.argv[1])
        uvicorn.run(made_by, factory=True, host=HOST, port=port, log_level="error", lifespan="on")
        sys.exit()
    sys.argv = ["prefect", "server", "start", "--host", HOST, "--port", sys.argv[1]]
    from prefect.cli import app

    app()
