"""Nobody's text or contact leaves the vault: not into Prefect, the store, the logs or the terminal, whatever fails.

A canary stands in a text that goes through every stage, and in its contact. Each stage fails once with everything
computed, once with an exception that quotes the text; what is left is searched byte for byte.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import workspaces
from histories import array_model, entries_of, prepare_step, start_history
from prefects import Prefect, latest_run, stored_by_prefect
from workspaces import UNSEEN, WORKS, new_workspace, plain_record, take_in

from pipeline.discreet import discreet, quotes
from pipeline.errors import UsageError, Withheld
from pipeline.ledger import Ledger
from pipeline.records import Verdict
from pipeline.runlog import log_file, read_events
from pipeline.runs import Run, open_run
from pipeline.states import request_states
from pipeline.vault import Vault
from pipeline.verify import verify
from pipeline.workspace import Workspace, writing

CANARY = "Quorvantish zemblefrot quiddled the hyxomorphic brandelwick"
CONTACT = "wexlaphant.canary@nowhere.invalid, +44 20 7946 0958, 12 Mumblethrop Row"
SECRETS = [CANARY, CONTACT, *CANARY.split()[:2], "hyxomorphic", "wexlaphant", "7946 0958", "Mumblethrop"]


@pytest.fixture
def fresh(tmp_path: Path, model: Path) -> Workspace:
    """A workspace at v0."""
    return new_workspace(tmp_path / "fresh", model)


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    """One request, without a model."""
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model"))
    take_in(workspace, "batch", {"A": f"Once upon a time. {CANARY}, and that was all."}, contact=CONTACT)
    return Vault(workspace.vault)


# --- what counts as a quotation ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told",
    [CANARY, f"KeyError: {CANARY.upper()!r}", "zemblefrot, quiddled\\nthe  hyxomorphic", "call 12 Mumblethrop Row",
     "no such user: wexlaphant.canary@nowhere.invalid."],
)  # fmt: skip
def test_an_error_that_quotes_a_request_is_held_back(vault: Vault, told: str) -> None:
    def fail() -> None:
        try:
            raise KeyError(told)
        except KeyError as error:
            raise RuntimeError("a harmless message") from error

    with pytest.raises(Withheld, match=r"screen: stopped by RuntimeError at test_canary.py:\d+\. ") as caught:
        discreet(vault, "screen", fail)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), OSError(28, "No space left on device"),
     UsageError(f"our own errors are checked where they are made: {CANARY}"), KeyboardInterrupt()],
)  # fmt: skip
def test_any_other_error_comes_through_as_it_is(vault: Vault, error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        discreet(vault, "screen", fail)
    assert caught.value is error


def test_each_request_is_decrypted_once(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    count, real = len(vault.ids()), Vault._read
    noting = mock.Mock(side_effect=lambda path: real(vault, path))
    monkeypatch.setattr(Vault, "_read", noting)
    assert not quotes(ValueError("x"), vault) and noting.call_count == count > 0


def test_where_the_vault_cannot_be_asked_the_message_is_held_back(vault: Vault, tmp_path: Path) -> None:
    assert not quotes(ValueError("x"), vault)
    (tmp_path / "ws" / "keys" / "vault.key").unlink()
    assert quotes(ValueError("x"), Vault(tmp_path / "ws" / "vault"))


def test_a_stage_holds_back_what_quotes_a_request_and_writes_nothing(tmp_path: Path) -> None:
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model"))
    take_in(workspace, "batch", {"A": f"Once upon a time. {CANARY}, and that was all."}, contact=CONTACT)
    run_id = prepare_step(workspace, ["A"], submit=False)
    run = open_run(workspace.root, run_id)
    for message in (CANARY, CONTACT):

        def fail(told: str = message) -> Verdict:
            raise ValueError(told)

        with pytest.raises(Withheld) as caught:
            run.stage("new", Verdict, (), fail)
        told = "".join(traceback.format_exception(caught.value))
        assert "new: stopped by ValueError at test_canary.py" in told and not any(secret in told for secret in SECRETS)
    assert not (run.folder / "new.json").exists()
    assert workspaces.leaks(SECRETS, workspace.root, workspace.vault) == []


# --- in Prefect -------------------------------------------------------------------------------------------

STAGE_NAMES = ["dedupe", "screen", "saliency", "unlearn", "repair", "merge", "evaluate", "gate"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_canary_stays_in_the_vault_whatever_stage_fails(
    prefect: Prefect, fresh: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # The canary stands in the middle of a work that the model recites, so that it passes through every stage.
    words = WORKS["one"].split()
    text = " ".join([*words[:60], CANARY + ".", *words[60:]])
    take_in(fresh, "batch", {"A": text, "C": f"{UNSEEN} {CANARY}."}, contact=CONTACT)
    assert CANARY in Vault(fresh.vault).get("A").text and Vault(fresh.vault).get("C").contact == CONTACT
    output = b""
    plain = Run.stage

    def looked_for() -> list[str]:
        nonlocal output
        captured = capfd.readouterr()
        output += captured.out.encode() + captured.err.encode()
        return workspaces.leaks(SECRETS, fresh.root, output, fresh.vault, *stored_by_prefect(prefect))

    def failing_in(stage: str, message: str) -> Callable[..., Any]:
        def run_stage(self: Run, name: str, record: Any, inputs: Any, compute: Callable[[], Any]) -> Any:
            def broken() -> Any:
                found = compute()  # fails with everything computed, and nothing written
                if name == stage:
                    raise RuntimeError(message)
                return found

            return plain(self, name, record, inputs, broken)

        return run_stage

    for failing in STAGE_NAMES:
        for message, shown in ((f"{text} {CONTACT}", "stopped by RuntimeError"), (f"{failing} broke",) * 2):
            with monkeypatch.context() as patch:
                patch.setattr(Run, "stage", failing_in(failing, message))
                state = prefect.flow(str(fresh.root), return_state=True)
            assert state.is_failed() and shown in str(state.message)
        with writing(fresh):  # the lock is free again
            pass
        run, tasks = latest_run(failing)
        assert run.state_name == "Failed"
        assert tasks[-1] == (failing, "Failed")
        # The log of the run is below the workspace's folder, and so among what is searched.
        log = log_file(fresh, str(entries_of(fresh)[-1].event.run_id))
        assert log is not None
        stopped = [e for e in read_events(log) if e["event"] == "stage-failed"][-1]
        assert (stopped["stage"], stopped["type"]) == (failing, "RuntimeError")
        assert str(stopped["where"]).startswith("test_canary.py:")
        assert looked_for() == [], failing
    # The search does reach what Prefect stores: the harmless message is found.
    assert workspaces.leaks([f"{STAGE_NAMES[0]} broke"], fresh.root, *stored_by_prefect(prefect))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", full)
        assert prefect.flow(str(fresh.root), return_state=True).is_failed()
    assert looked_for() == [], "publish"
    assert {s.state for s in request_states(entries_of(fresh)).values()} == {"waiting"}

    # The next run takes up what is finished, and completes.
    computed: list[str] = []

    def noting(self: Run, name: str, record: Any, inputs: Any, compute: Callable[[], Any]) -> Any:
        return plain(self, name, record, inputs, lambda: computed.append(name) or compute())

    with monkeypatch.context() as patch:
        patch.setattr(Run, "stage", noting)
        assert prefect.flow(str(fresh.root)).version == 1
    assert computed == []
    assert latest_run("leave_artifacts")[0].state_name == "Completed"
    assert [e.event.kind for e in entries_of(fresh)].count("published") == 1
    assert verify(fresh) == []
    assert looked_for() == [], "success"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_error_deep_inside_does_not_carry_a_text_to_prefect(
    prefect: Prefect, fresh: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    """Damaged vault records: their parsers' exceptions would quote what they parsed."""
    take_in(fresh, "batch", {"A": f"{WORKS['one']} {CANARY}."}, contact=CONTACT)
    (path,) = fresh.vault.glob("*.json")
    good, plain = path.read_bytes(), plain_record(fresh.vault, Vault(fresh.vault).get("A")).read_bytes()
    for bad in (
        good[:-40],
        plain[:-40],
        plain.replace(b'"basis"', b'"bases"'),
        plain.replace(b"copyright", b"copywrong"),
    ):
        path.write_bytes(bad)
        state = prefect.flow(str(fresh.root), return_state=True)
        assert state.is_failed() and "is not what was written there" in str(state.message)
        captured = capfd.readouterr()
        output = captured.out.encode() + captured.err.encode()
        assert workspaces.leaks(SECRETS, fresh.root, output, *stored_by_prefect(prefect)) == []
