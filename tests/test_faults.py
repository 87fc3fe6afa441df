"""Stopped at every call, on a disk that loses, tears or refuses writes: what was acknowledged is there, and no more.

Each operation is repeated from the same start with the power cut at its first, second, … last change of the disk. What
is left then opens, mends itself with the next writing command, verifies, and shows either the state before or the state
after; the state after, if the operation had returned.
"""

from __future__ import annotations

import ast
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from histories import array_model, entries_of, make_step, prepare_step, publish, reinstate, start_history
from powerloss import Loss, Power, PowerCut
from workspaces import plain_record, write_batch

from pipeline.erase import erase
from pipeline.errors import NoSpace, TakedownError
from pipeline.evidence import all_evidence
from pipeline.ledger import Ledger
from pipeline.records import Event
from pipeline.rekey import rekey
from pipeline.requests import note
from pipeline.rollback import roll_back
from pipeline.states import current_version, purged_versions, request_states
from pipeline.storecheck import Depth
from pipeline.submit import submit
from pipeline.upkeep import purge, repack
from pipeline.vault import Vault
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, open_workspace, writing

LAYER = "files.py"
PIPELINE = Path(__file__).parent.parent / "pipeline"

Operation = Callable[[Workspace], object]


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: the disk is simulated, and thousands of real fsyncs take minutes."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("faults")
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two published versions, a rolled-back third, a prepared but unpublished step, and a batch beside it.

    A, of the first version, is countered, and lies in the vault as releases before encryption wrote it.
    """
    folder = tmp_path_factory.mktemp("faults")
    workspace = start_history(folder / "ws", array_model(folder / "model"))
    make_step(workspace, "A")
    make_step(workspace, "B")
    make_step(workspace, "C")
    roll_back(workspace, 2, "tester", "C was too much", override=True)
    note(workspace, "countered", "A", "tester", "licence shown")
    prepare_step(workspace, ["D"])
    plain_record(workspace.vault, Vault(workspace.vault).get("A"))
    write_batch(folder, "batch-E", {"E": "a text of its own that nobody else has"})
    return workspace.root


def _publish(workspace: Workspace) -> None:
    (run,) = workspace.runs.iterdir()
    publish(workspace, run.name)


OPERATIONS: dict[str, Operation] = {
    "publish": _publish,
    "rollback": lambda ws: roll_back(ws, 1, "tester", "trial", override=True),
    "purge": lambda ws: purge(ws, 2, "tester", "retention"),
    "repack whole": lambda ws: repack(ws, 1, "tester"),
    "erase": lambda ws: erase(ws, "B", "tester", "asked for"),
    "rekey": lambda ws: rekey(ws, "tester"),
    "submit": lambda ws: submit(ws, ws.root.parent / "batch-E.json", "tester"),
    "reinstate": lambda ws: reinstate(ws, "A", again=["B"]),
}
DONE = {
    "purge": "no version before it",
    "erase": "erased already",
    "reinstate": "was put back in v4 already",
}
"""Operations that are repeated though they took effect, to end what they left; what is said where nothing is left."""


def _shown(workspace: Workspace) -> tuple[object, ...]:
    """What a user sees of a workspace: the version in force, every request, every version, what is kept whole."""
    entries = entries_of(workspace)
    store = VersionStore(workspace.versions)
    gone = purged_versions(e for e in entries if e.event.kind != "purging")  # a purge that was begun shows as a break
    numbers = [n for n in store.numbers() if any(e.event.version == n for e in entries)]
    files = tuple((n, store.manifest(n).root, store.manifest(n).files, n in gone) for n in numbers)
    states = tuple((n, s.state, s.version) for n, s in request_states(entries).items())
    kinds = tuple(
        e.event.kind for e in entries if e.event.kind not in ("purging", "erasing", "planned")
    )  # what is begun only
    return current_version(entries), states, files, kinds


def _recover(workspace: Workspace) -> None:
    """What the next writing command does first."""
    with writing(workspace), Ledger.open(workspace.ledger) as ledger:
        VersionStore(workspace.versions).collect(all_evidence(ledger.entries()))


def _breaks(workspace: Workspace) -> list[str]:
    """Breaks, but for those that say what an interrupted command left and how to end it."""
    interrupted = (
        "a purge was begun and not ended",
        "its erasure was begun and not ended",
        "not acknowledged: no ledger entry names it",
        "is in the vault, but",
    )
    return [
        f"{b.where}: {b.found}"
        for b in verify(workspace, Depth.DEEP)
        if not any(b.found.startswith(words) for words in interrupted)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("name", OPERATIONS)
def test_power_cut_at_every_call(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, loss: Loss
) -> None:
    """Right after each call; right before a call is right after the one in front of it."""
    operation = OPERATIONS[name]
    shutil.copytree(start.parent, tmp_path / "done")
    done = open_workspace(tmp_path / "done" / "ws")
    states = [_shown(done)]
    operation(done)
    states.append(_shown(done))
    step, returned = 0, False
    while not returned:
        step += 1
        folder = tmp_path / f"{step}"
        shutil.copytree(start.parent, folder)
        workspace = open_workspace(folder / "ws")
        power = Power(workspace.root, step)
        try:
            with power.on(monkeypatch):
                operation(workspace)
            returned = True
        except PowerCut:
            pass
        (tmp_path / "left").mkdir()
        shutil.copyfile(folder / "batch-E.json", tmp_path / "left" / "batch-E.json")
        left = Workspace(power.left_behind(tmp_path / "left" / "ws", loss))
        found = _shown(left)
        assert found in states, f"stopped at call {step}: neither before nor after"
        if returned:
            assert found == states[1], "it had returned"
        _recover(left)
        assert _shown(left) == found
        assert _breaks(left) == [], f"stopped at call {step}"
        if found == states[0] or name in DONE:
            try:
                operation(left)  # the same command ends what was begun
            except TakedownError as error:
                assert found == states[1] and DONE[name] in str(error), error
            assert _shown(left)[:3] == states[1][:3]
            assert verify(left, Depth.DEEP) == []
        if name == "erase":
            assert not Vault(left.vault).holds("B")
        if name in ("rekey", "submit") and _shown(left) != states[0]:
            assert not [p.name for p in left.vault.glob("*.json") if b"sealed" not in p.read_bytes()]
            assert not Vault(left.vault).rotating()
        shutil.rmtree(folder)
        shutil.rmtree(left.root.parent)
    assert step > 4, "there are more calls than that"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"),
    [
        (name, code)
        for name in OPERATIONS
        for code in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
        if name != "reinstate" or code == errno.ENOSPC  # it has as many calls as all others together
    ],
)
def test_disk_that_refuses_at_every_call(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    step, returned = 0, False
    while not returned:
        step += 1
        folder = tmp_path / f"{step}"
        shutil.copytree(start.parent, folder)
        workspace = open_workspace(folder / "ws")
        before = _shown(workspace)
        power = Power(workspace.root, step, fault=lambda call: OSError(code, os.strerror(code)))
        try:
            with power.on(monkeypatch):
                OPERATIONS[name](workspace)
            returned = power.calls < step
        except NoSpace as error:
            assert "again" in str(error) or "the next writing command" in str(error)
        left = open_workspace(folder / "ws")
        if not returned:
            _recover(left)
            assert _breaks(left) == [], f"refused at call {step}"
            if _shown(left) == before:
                OPERATIONS[name](left)
                assert verify(left, Depth.DEEP) == []
        shutil.rmtree(folder)
    assert step > 4


# --- the layer --------------------------------------------------------------------------------------------

DISK_CALLS = {
    "fsync", "link", "replace", "rename", "unlink", "fchmod", "mkdir", "rmdir", "write_bytes", "write_text", "touch",
    "symlink_to", "hardlink_to", "makedirs", "remove", "truncate", "rmtree",
}  # fmt: skip
KEPT_FOR_GOOD = ("ledger", "objects", "versions", "keys", "vault", "masters", "rekey", "evidence", "rollback",
                 "delta", "blocks", "states", "seals")  # fmt: skip
"""Modules whose files must survive a power cut; the others write scratch, or files for people."""
ELSEWHERE = {
    ("versions", "mkdir"): "the folder that a version is restored into",
    ("versions", "rmdir"): "the same, after a failure",
    ("vault", "mkdir"): "the vault's own folder, made with the workspace in one rename",
}


@pytest.mark.parametrize("name", KEPT_FOR_GOOD)
def test_everything_that_lasts_goes_through_the_layer(name: str) -> None:
    """No other call that changes the disk, so that the tests above stop at every one."""
    tree = ast.parse((PIPELINE / f"{name}.py").read_text())
    found = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in DISK_CALLS
        and not (isinstance(node.func.value, ast.Constant) or _is_text(node))
    }
    assert {call for call in found if (name, call) not in ELSEWHERE} == set()


def _is_text(node: ast.Call) -> bool:
    """`replace` of a string has two arguments, of a path one."""
    return isinstance(node.func, ast.Attribute) and node.func.attr == "replace" and len(node.args) == 2


def test_power_loses_what_was_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: a write without fsync, a name without fsync of its folder, and both done well."""
    from pipeline.files import fsync_folder, write_atomic

    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "old").write_bytes(b"old")
    power = Power(root, 1000)
    with power.on(monkeypatch):
        write_atomic(root / "sub" / "good", b"good" * 10)
        fd = os.open(root / "bytes-lost", os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"12345678")
        fsync_folder(root)
        os.close(fd)
        fd = os.open(root / "sub" / "name-lost", os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"12345678")
        os.fsync(fd)
        os.close(fd)
        os.unlink(root / "old")  # noqa: PTH108
    lost = power.left_behind(tmp_path / "lost", Loss.UNSYNCED)
    torn = power.left_behind(tmp_path / "torn", Loss.TORN)
    kept = power.left_behind(tmp_path / "kept", Loss.NOTHING)

    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert content(lost) == {"sub/good": b"good" * 10, "bytes-lost": b"", "old": b"old"}
    assert content(torn) == {"sub/good": b"good" * 10, "bytes-lost": b"1234", "sub/name-lost": b"12345678"}
    assert content(kept) == {"sub/good": b"good" * 10, "bytes-lost": b"12345678", "sub/name-lost": b"12345678"}


def test_append_is_acknowledged_only_with_its_checkpoint(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(start.parent, tmp_path / "x")
    workspace = open_workspace(tmp_path / "x" / "ws")
    power = Power(workspace.root, 1, before=True)
    with power.on(monkeypatch), pytest.raises(PowerCut), Ledger.open(workspace.ledger) as ledger:
        ledger.append(Event(kind="hold", actor="t", request_id="A"))
    assert request_states(entries_of(workspace))["A"].on_hold, "SQLite had committed it"
    assert any("not the newest checkpoint" in b.found for b in verify(workspace))
    _recover(workspace)
    assert verify(workspace) == []
