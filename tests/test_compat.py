"""Every store that an earlier release wrote stays readable, says what it said, and can be written to."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from compat.make import HERE, statement
from histories import make_step
from tampered.calls import Answer, takedown
from workspaces import draw_text, write_batch

from pipeline import verify_bundle
from pipeline.files import digest_file
from pipeline.history import lineage_view
from pipeline.report import render
from pipeline.storecheck import Depth
from pipeline.verify import verify
from pipeline.workspace import Workspace, open_workspace

STORES = sorted(path.stem for path in HERE.glob("store-*.json"))


class Kept:
    """A copy of a kept store, with what it must say.

    Args:
        name: Its name.
        folder: An empty folder for the copy, ``store/``.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.says: dict[str, Any] = json.loads((HERE / f"{name}.json").read_bytes())
        shutil.copytree(HERE / name, folder / "store")
        (folder / "kept").write_text(self.says["kept"])

    @property
    def workspace(self) -> Workspace:
        return open_workspace(self.folder / "store")

    def call(self, command: str) -> Answer:
        """A call of the command line beside the copy."""
        return takedown("-w", "store", *shlex.split(command), folder=self.folder)


@pytest.fixture(params=STORES)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    return Kept(request.param, tmp_path)


def test_there_is_a_store_and_it_lies_as_a_clone_brings_it() -> None:
    """No temporary files of a process, no empty folders, no file that the tests could have left."""
    assert STORES
    for name in STORES:
        paths = list((HERE / name).rglob("*"))
        assert not [p.name for p in paths if p.name.endswith(("-wal", "-shm", "-journal", ".lock")) or ".tmp" in p.name]
        assert all(any(p.iterdir()) for p in paths if p.is_dir())
        assert sum(p.stat().st_size for p in paths if p.is_file()) < 300_000


@pytest.mark.parametrize("depth", Depth)
def test_it_holds_at_every_depth_and_against_an_old_checkpoint(kept: Kept, depth: Depth) -> None:
    assert verify(kept.workspace, depth, [kept.folder / "kept"]) == []


def test_it_says_what_it_said(kept: Kept) -> None:
    """States, versions, log, and the digest of every file that it restores to."""
    said = statement(kept.workspace)
    expected = {key: value for key, value in kept.says.items() if key not in ("release", "kept")}
    assert {key: value for key, value in said.items() if key != "release"} == expected


def test_the_command_line_reads_it(kept: Kept) -> None:
    for command in ("status", "log", "versions", "verify --deep --checkpoint kept", "status --json", "log --json"):
        answer = kept.call(command)
        assert answer.code == 0, (command, answer)
    for number, version in kept.says["versions"].items():
        assert version["root"] in kept.call(f"show v{number}").text
        answer = kept.call(f"checkout v{number} out-{number}")
        if int(number) in kept.says["purged"]:
            assert answer.code == 2 and "its weights were purged" in answer.text
        else:
            found = {path.name: digest_file(path) for path in (kept.folder / f"out-{number}").iterdir()}
            assert answer.code == 0 and found == version["files"]
    for name, request in kept.says["requests"].items():
        answer = kept.call(f"first-version {name}")
        if request["excluded_now"]:
            root = kept.says["versions"][str(request["version"])]["root"]
            assert (answer.code, answer.text) == (0, f"v{request['version']} {root}")
        else:
            assert answer.code == 1 and answer.text.startswith("None:")


def test_its_report_can_be_made(kept: Kept) -> None:
    page = render(lineage_view(kept.workspace, verify(kept.workspace)))
    assert page.startswith("<!") and len(page) > 10_000
    for number, version in kept.says["versions"].items():
        assert f"v{number}" in page and version["root"][12:24] in page
    assert all(name in page for name in kept.says["requests"])


def test_a_certificate_of_it_holds(kept: Kept) -> None:
    (name, *_) = (n for n, request in kept.says["requests"].items() if request["state"] == "verified")
    assert kept.call(f"certificate {name} --out certificate").code == 0
    model = kept.folder / "model"
    number = kept.says["requests"][name]["version"]
    assert kept.call(f"checkout v{number} model").code == 0
    lines = verify_bundle.check_bundle(kept.folder / "certificate", model=model, checkpoints=[kept.folder / "kept"])
    assert {line.verdict for line in lines} == {"ok", "note"}


def test_it_can_be_written_to(kept: Kept) -> None:
    """A batch and a version more; everything that was said before is said still, but for the end of the log."""
    write_batch(kept.folder, "batch", {"TD-99": draw_text("TD-99", 30)})
    assert kept.call("submit batch.json --actor tester").code == 0
    number = make_step(kept.workspace, "TD-100")
    assert number == 1 + max(map(int, kept.says["versions"]))
    assert verify(kept.workspace, Depth.DEEP, [kept.folder / "kept"]) == []
    said = statement(kept.workspace)
    assert said["versions"].items() >= kept.says["versions"].items()
    assert said["requests"].items() >= kept.says["requests"].items()
    assert said["current"] == number and said["requests"]["TD-100"]["state"] == "verified"
    assert kept.call("verify --deep --checkpoint kept").code == 0
    assert kept.call(f"rollback v{kept.says['current']} --override --reason tested --actor tester").code == 0


@pytest.mark.skipif(
    not hasattr(os, "fork") or os.geteuid() != 0, reason="only root can become somebody who may not write"
)
def test_it_can_be_read_where_nothing_can_be_written(kept: Kept) -> None:
    """On a read-only disk SQLite can make no files beside the database; keys and vault are somebody else's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        copy = Path(folder) / "store"
        shutil.copytree(HERE / kept.name, copy)
        for path in (Path(folder), copy, *copy.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        child = os.fork()
        if child == 0:
            code = 2  # an exception must not run the other tests a second time
            try:
                os.setuid(65534)
                code = 0 if not verify(open_workspace(copy), Depth.DEEP) else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for path in (Path(folder), copy, *copy.rglob("*")):
            path.chmod(0o755)
