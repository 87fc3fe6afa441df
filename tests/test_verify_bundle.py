"""The program that checks a certificate: alone, against every change, and against an issuer who signs what is false."""

from __future__ import annotations

import ast
import base64
import copy
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from histories import array_model, prepare_step, publish, start_history
from hypothesis import example, given, settings
from hypothesis import strategies as st
from workspaces import copied, draw_text, take_in

from pipeline import merkle, verify_bundle
from pipeline.certificate import write_certificate
from pipeline.chain import GENESIS, leaf_data
from pipeline.files import canonical_json
from pipeline.keys import load_log_key
from pipeline.ledger import Ledger
from pipeline.notes import Checkpoint, checkpoint_text, parse_vkey, sign_note, vkey
from pipeline.oms import check_model_signature
from pipeline.records import Event, TakedownRequest
from pipeline.vault import Vault
from pipeline.verify_bundle import Line, check_bundle, check_files
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

PROGRAM = Path(verify_bundle.__file__)
UNPROVEN = ("title", "rights_holder", "issued_at", "passages")
"""What stands in a certificate on the issuer's word alone."""

Files = dict[str, bytes]
Tree = dict[str, Any]


class Case(NamedTuple):
    """A lineage with v1 (one, two), v2 (three), v3 (four), and the bundle of ``one``."""

    workspace: Workspace
    bundle: Path
    files: Files
    leaves: list[bytes]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    workspace = start_history(folder / "workspace", array_model(folder / "model"))
    for names in (["one", "two"], ["three"], ["four"]):
        publish(workspace, prepare_step(workspace, names))
    bundle = folder / "bundle"
    write_certificate(workspace, "one", bundle)
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        leaves = ledger.leaves()
    return Case(workspace, bundle, read(bundle), leaves)


@pytest.fixture(scope="module")
def models(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders v0 to v3 as they are checked out."""
    folder = tmp_path_factory.mktemp("models")
    for version in range(4):
        VersionStore(case.workspace.versions).restore(version, folder / f"v{version}", sign=True)
    return folder


@pytest.fixture(scope="module")
def others(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Certificates of the other requests."""
    folder = tmp_path_factory.mktemp("others")
    for name in ("two", "three"):
        write_certificate(case.workspace, name, folder / name)
    return {name: read(folder / name) for name in ("two", "three")}


def read(bundle: Path) -> Files:
    return {name: (bundle / name).read_bytes() for name in verify_bundle.FILES}


def receive_with_record(workspace: Workspace, name: str) -> str:
    """Take a request in whose event commits to all of its record; returns that commitment."""
    vault = Vault(workspace.vault)
    request = TakedownRequest(
        request_id=name, title=f"The {name} book", rights_holder="Holder", basis="copyright",
        contact=f"{name}@holder.example", batch_id=f"batch-{name}", received_at=datetime(2026, 11, 23, tzinfo=UTC),
        text=draw_text(name, 30),
    )  # fmt: skip
    vault.put(request)
    committed = vault.record_commitment(request)
    data = {"batch_id": request.batch_id, "received_at": request.received_at.isoformat(),
            "commitment": vault.commitment(request.text), "record": committed}  # fmt: skip
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(Event(kind="received", actor="tester", request_id=name, data=data))
    return committed


def failures(files: Files, **options: Any) -> list[str]:
    return [line.text for line in check_files(files, **options) if line.verdict == "FAILED"]


def tree_of(files: Files) -> Tree:
    return dict(json.loads(files["certificate.json"]))


def with_tree(files: Files, tree: Tree) -> Files:
    return {**files, "certificate.json": canonical_json(tree) + b"\n"}


def edited(files: Files, edit: Callable[[Tree], object]) -> Files:
    tree = tree_of(files)
    edit(tree)
    return with_tree(files, tree)


def certified(tree: Tree) -> Tree:
    """A certificate without what it does not prove."""
    tree = copy.deepcopy(tree)
    for part in (tree, tree["request"]):
        for name in UNPROVEN:
            part.pop(name, None)
    for check in tree["checks"]:
        del check["size"]  # only tells left from right; the root binds the measurement
    return tree


# --- alone ------------------------------------------------------------------------------------------------


def run(*arguments: object, cwd: Path, program: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The program as its receiver runs it: isolated, in a folder without this package."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-I", program or cwd / "verify_bundle.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def received(case: Case, tmp_path: Path) -> Path:
    """A bundle as somebody received it."""
    return Path(shutil.copytree(case.bundle, tmp_path / "received"))


def test_program_runs_alone(received: Path, case: Case) -> None:
    result = run(".", "--log-key", case.files["log.pub"].decode().strip(), cwd=received)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines[:-1]] == ["ok"] * 7 + ["note"] * 3
    assert lines[-1] == "Every check passed."
    assert "certificate.html is for people and was not checked" in result.stdout
    assert "limit: 0.2100 was on record before the run" in result.stdout


def test_program_needs_nothing_of_this_package(received: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['pipeline'] = None; sys.argv = ['verify_bundle.py', '.'];"
        "runpy.run_path('verify_bundle.py', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=received, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    modules = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module))
    assert {m.split(".")[0] for m in modules} - {*sys.stdlib_module_names, "cryptography"} == set()


def test_key_that_came_with_the_bundle_proves_little_and_that_is_said(received: Path) -> None:
    result = run(".", cwd=received)
    assert result.returncode == 0
    assert "shows only that the bundle agrees with itself" in result.stdout


def test_failed_check_is_exit_1(received: Path) -> None:
    path = received / "certificate.json"
    path.write_bytes(path.read_bytes().replace(b'"limit":0.21', b'"limit":0.91'))
    result = run(".", cwd=received)
    assert result.returncode == 1 and "FAILED" in result.stdout
    assert result.stdout.splitlines()[-1] == "The certificate does NOT hold."


@pytest.mark.parametrize("name", verify_bundle.FILES)
def test_missing_file_is_exit_2(received: Path, name: str) -> None:
    (received / name).unlink()
    result = run(".", cwd=received)
    assert (result.returncode, result.stdout) == (2, "") and name in result.stderr


def test_wrong_use_is_exit_2(received: Path) -> None:
    for arguments in ((), ("nowhere",), (".", "--log-key", "nowhere"), (".", "--checkpoint", "nowhere"), (".", "--x")):
        result = run(*arguments, cwd=received)
        assert result.returncode == 2 and result.stderr and "Traceback" not in result.stderr, arguments


def test_what_is_no_small_file_is_not_read(received: Path) -> None:
    (received / "checkpoint").unlink()
    os.mkfifo(received / "checkpoint")
    assert run(".", cwd=received).returncode == 2
    (received / "checkpoint").unlink()
    with (received / "checkpoint").open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: reading it would need the memory
    result = run(".", cwd=received)
    assert result.returncode == 2 and "has more than 1048576 bytes" in result.stderr


def test_title_cannot_steer_the_terminal(received: Path) -> None:
    tree = tree_of(read(received))
    tree["request"]["title"] = "\x1b[2Jok everything\n" + "x" * 500
    (received / "certificate.json").write_bytes(canonical_json(tree) + b"\n")
    result = run(".", cwd=received)
    assert result.returncode == 0 and "\x1b" not in result.stdout and "x" * 201 not in result.stdout
    assert len(result.stdout.splitlines()) == 12  # as with any other title


# --- every change -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_changed_byte_of_the_certificate_is_refused_or_changes_nothing_certified(
    others: dict[str, Files],
) -> None:
    files = others["three"]
    data, accepted = files["certificate.json"], 0
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        flipped = {**files, "certificate.json": bytes(changed)}
        if not failures(flipped):
            accepted += 1
            assert certified(tree_of(flipped)) == certified(tree_of(files)), place
    assert accepted < 60  # the digits and letters of title, rights holder, time of issue and passages


@settings(max_examples=300)
@given(st.data())
def test_any_changed_byte_of_the_certificate(case: Case, data: st.DataObject) -> None:
    content = bytearray(case.files["certificate.json"])
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    files = {**case.files, "certificate.json": bytes(content)}
    if not failures(files):
        assert certified(tree_of(files)) == certified(tree_of(case.files))


@pytest.mark.parametrize("name", ["checkpoint", "log.pub", "model.pub", "model.sig"])
def test_every_changed_byte_of_the_other_files_is_refused(case: Case, name: str) -> None:
    for place in range(len(case.files[name])):
        changed = bytearray(case.files[name])
        changed[place] ^= 1
        assert failures({**case.files, name: bytes(changed)}), place
    for data in (b"", case.files[name][:-1], case.files[name] + b"\n", b"\xff" * 100):
        if name != "log.pub" or data != case.files[name][:-1]:  # without its newline it is the same key
            assert failures({**case.files, name: data}), data


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\n", b"{}\n", b"[]\n", b"null\n", b"[" * 200_000 + b"\n", b'{"a":' * 100_000 + b"\n", b"\xff\n",
        b'{"format":"takedown-certificate-1"}\n', b'{"format":"takedown-certificate-2"}\n', b"1" * 10_000 + b"\n",
        b'{"a":NaN}\n', b'{"a":1e999}\n', b'{"a":1,"a":1}\n',
    ],
)  # fmt: skip
def test_what_is_no_certificate_is_refused(case: Case, data: bytes) -> None:
    assert failures({**case.files, "certificate.json": data})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**400) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5) | st.sampled_from(["one", "two", "verified", "sha256:" + "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a document."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def put(tree: Any, path: Sequence[Any], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


@settings(max_examples=500)
@given(st.data())
def test_any_value_in_any_place_is_refused_or_changes_nothing_certified(case: Case, data: st.DataObject) -> None:
    tree = tree_of(case.files)
    place = data.draw(st.sampled_from(list(places(tree))[1:]))
    put(tree, place, data.draw(JSON))
    files = with_tree(case.files, tree)
    if not failures(files):
        assert certified(tree) == certified(tree_of(case.files)), place


def swap_proofs(tree: Tree) -> None:
    one, two = tree["log"]["entries"][3:5]
    one["proof"], two["proof"] = two["proof"], one["proof"]


def swap_entries(tree: Tree) -> None:
    entries = tree["log"]["entries"]
    entries[3], entries[4] = entries[4], entries[3]


def edit_after(tree: Tree) -> None:
    tree["measured"]["after"]["exact_memorisation"] = 0.01


def edit_limit(tree: Tree) -> None:
    tree["measured"]["limit"] = 0.9


def edit_tolerance(tree: Tree) -> None:
    tree["plan"]["limits"]["forget_tolerance"] = 0.5


def edit_later(tree: Tree) -> None:
    tree["later"][0]["measured"]["exact_memorisation"] = 0.0


def edit_leaf(tree: Tree) -> None:
    item = next(i for i in tree["log"]["entries"] if '"kind":"verified"' in i["leaf"])
    item["leaf"] = item["leaf"].replace('"exact_memorisation":0.17', '"exact_memorisation":0.07')
    edit_after(tree)


def edit_check(tree: Tree) -> None:
    tree["checks"][1]["comparison"]["after"]["exact_memorisation"] = 0.0
    edit_later(tree)


def cut_statement(tree: Tree) -> None:
    del tree["statement"][3]


def drop_check(tree: Tree) -> None:
    del tree["checks"][1]


def drop_version(tree: Tree) -> None:
    tree["log"]["entries"] = [i for i in tree["log"]["entries"] if '"kind":"published"' not in i["leaf"]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (swap_proofs, "is not in the log that the checkpoint signs"),
        (swap_entries, "is not in the order of the log"),
        (edit_after, r"measured\.after\.exact_memorisation says 0\.01, the log 0\.17"),
        (edit_limit, r"measured\.limit says 0\.9"),
        (edit_tolerance, r"plan\.limits\.forget_tolerance says 0\.5, the log 0\.05"),
        (edit_later, r"later says"),
        (edit_leaf, "is not in the log that the checkpoint signs"),
        (edit_check, "not among those that its gate decided on"),
        (cut_statement, "statement says"),
        (drop_check, "a version has none"),
        (drop_version, "published by none of its entries"),
        (lambda t: t["version"].update(version=2), r"version\.version says 2, the log 1"),
        (lambda t: t["version"].update(root="root-sha256:" + "0" * 64), r"version\.root"),
        (lambda t: t["version"].update(published_by="somebody"), r"version\.published_by"),
        (lambda t: t["gate"].update(accepted_by="somebody"), r"gate\.accepted_by"),
        (lambda t: t["gate"].update(unchecked=["x"]), r"gate\.unchecked"),
        (lambda t: t.update(decided_at="2020-01-01T00:00:00.000000Z"), "decided_at"),
        (lambda t: t.update(state="not-memorised"), "the state not-memorised"),
        (lambda t: t.update(outcome="repeat"), "outcome|state"),
        (lambda t: t.update(current=1), "current says 1"),
        (lambda t: t.update(extra=1), "extra does not belong there"),
        (lambda t: t.pop("gate"), "gate is missing"),
        (lambda t: t["request"].update(commitment="hmac-sha256:" + "0" * 64), r"request\.commitment"),
        (lambda t: t["request"].update(request_id="two"), "request_id two"),
        (lambda t: t.update(passages=[[3, 2, 1]]), "ranges of tokens"),
        (lambda t: t.update(passages=[[True, True, True]]), "ranges of tokens"),
        (lambda t: t.update(issued_at="2026-13-01T00:00:00.000000Z"), "issued_at is no time"),
        (lambda t: t["checks"][0].update(index=True), "of the wrong kind"),
        (lambda t: t["log"].update(vkey="x"), "is not the key in certificate.json"),
    ],
)
def test_change_is_named(case: Case, edit: Callable[[Tree], object], message: str) -> None:
    found = failures(edited(case.files, edit))
    assert found
    assert any(re.search(message, text) for text in found), found


# --- mixed up ---------------------------------------------------------------------------------------------


def test_files_of_another_certificate_do_not_fit(case: Case, others: dict[str, Files]) -> None:
    assert failures({**case.files, "model.sig": others["three"]["model.sig"]}) == [
        "model.sig: is not the signature that was published with the version: it was exchanged."
    ]
    for name in ("two", "three"):
        assert failures(others[name]) == []


def test_entry_of_another_request_does_not_fit(case: Case, others: dict[str, Files]) -> None:
    foreign = next(i for i in tree_of(others["two"])["log"]["entries"] if '"kind":"verified"' in i["leaf"])

    def exchange(tree: Tree) -> None:
        entries = tree["log"]["entries"]
        tree["log"]["entries"] = [foreign if '"kind":"verified"' in i["leaf"] else i for i in entries]

    def add(tree: Tree) -> None:
        entries = [*tree["log"]["entries"], foreign]
        tree["log"]["entries"] = sorted(entries, key=lambda i: json.loads(i["leaf"])["seq"])

    assert "0 answers" in failures(edited(case.files, exchange))[0]
    assert "has no part in this certificate" in failures(edited(case.files, add))[0]


def test_measurement_of_another_request_does_not_fit(case: Case, others: dict[str, Files]) -> None:
    foreign = tree_of(others["two"])["checks"][0]
    found = failures(edited(case.files, lambda tree: tree["checks"].__setitem__(0, foreign)))
    assert found == ["measurements: that of v1 is about another text."]


def test_another_lineage_does_not_fit(case: Case, tmp_path: Path) -> None:
    workspace = start_history(tmp_path / "other", array_model(tmp_path / "model"))
    publish(workspace, prepare_step(workspace, ["one"]))
    write_certificate(workspace, "one", tmp_path / "out")
    other = read(tmp_path / "out")
    assert failures(other) == []
    for name in verify_bundle.FILES:
        assert failures({**case.files, name: other[name]}), name
    given = case.files["log.pub"].decode().strip()
    assert "is not the key that you gave" in failures(other, log_key=given)[0]
    assert failures(case.files, log_key=given) == []
    assert failures(case.files, log_key="nonsense") and failures(case.files, log_key=given + "A")


# --- an issuer who signs what is false --------------------------------------------------------------------


def relogged(
    case: Case, change: Callable[[list[Tree]], object], key: Ed25519PrivateKey | None = None, name: str = "one"
) -> Files:
    """The bundle that a dishonest holder of the log's key makes from changed entries: every proof of it holds.

    Args:
        case: The honest one.
        change: Changes the log's leaves, each as ``{"at", "event", "previous", "seq"}``, in place.
        key: Another log key to sign with, which the first entry then names.
        name: The request.
    """
    trees = [json.loads(leaf) for leaf in case.leaves]
    origin, signer = parse_vkey(case.files["log.pub"].decode().strip()).name, key or load_log_key(case.workspace.keys)
    line = vkey(origin, signer.public_key())
    trees[0]["event"]["data"]["keys"]["log"] = line
    change(trees)
    leaves, previous = [], GENESIS
    for seq, tree in enumerate(trees, 1):
        leaves.append(leaf_data(seq, tree["at"], canonical_json(tree["event"]).decode(), previous))
        previous = f"sha256:{verify_bundle.sha256(leaves[-1]).hex()}"
    hashes = [merkle.leaf_hash(leaf) for leaf in leaves]
    note = sign_note(checkpoint_text(Checkpoint(origin, len(leaves), merkle.root_of_hashes(hashes))), origin, signer)
    document = tree_of(case.files)
    used = [json.loads(item["leaf"])["seq"] for item in document["log"]["entries"]]
    document["log"] = {
        "checkpoint": note,
        "vkey": line,
        "entries": [
            {
                "leaf": leaves[seq - 1].decode(),
                "proof": [base64.b64encode(h).decode() for h in merkle.inclusion_proof(hashes, seq - 1)],
            }
            for seq in used
        ],
    }
    files = {**case.files, "checkpoint": note.encode(), "log.pub": f"{line}\n".encode()}
    try:  # a clever issuer also writes the values that follow
        read_back = verify_bundle.Document(canonical_json(document) + b"\n")
        document = verify_bundle.derive(read_back, verify_bundle.tell(read_back))
    except verify_bundle.Refused:
        pass
    return with_tree(files, document)


def events(trees: list[Tree], kind: str, number: int = 0) -> Tree:
    """The event of the n-th leaf of a kind, of the request ``one`` where it is about a request."""
    found: list[Tree] = [
        t["event"] for t in trees if t["event"]["kind"] == kind and t["event"]["request_id"] in (None, "one")
    ]
    return found[number]


def test_honest_relogging_holds(case: Case) -> None:
    assert failures(relogged(case, lambda trees: None)) == []


def test_forged_key_agrees_with_itself_and_not_with_the_key_that_is_known(case: Case) -> None:
    forged = relogged(case, lambda trees: events(trees, "published")["data"], Ed25519PrivateKey.generate())
    assert failures(forged) == []
    assert "is not the key that you gave" in failures(forged, log_key=case.files["log.pub"].decode().strip())[0]


def test_key_that_the_first_entry_does_not_name_is_refused(case: Case) -> None:
    named = case.files["log.pub"].decode().strip()
    forged = relogged(
        case, lambda trees: events(trees, "initialised")["data"]["keys"].update(log=named), Ed25519PrivateKey.generate()
    )
    assert "is not the key that the first entry of the log names" in failures(forged)[0]


def move_plan(trees: list[Tree]) -> None:
    """Write the plan down after the result."""
    plan = next(i for i, t in enumerate(trees) if t["event"]["kind"] == "planned")
    gate = next(i for i, t in enumerate(trees) if t["event"]["kind"] == "accepted")
    trees[plan]["event"], trees[gate]["event"] = trees[gate]["event"], trees[plan]["event"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: events(t, "verified")["data"].update(limit=0.5), "is not the level"),
        (lambda t: events(t, "planned")["data"]["limits"].update(forget_tolerance=0.5), "is not the level"),
        (lambda t: events(t, "verified")["data"]["after"].update(exact_memorisation=0.3), "above the limit"),
        (lambda t: events(t, "verified")["data"]["after"].update(exact_memorisation=0.1), "decided on another one"),
        (lambda t: events(t, "accepted")["data"].update(checks="root-sha256:" + "0" * 64), "not among those"),
        (lambda t: events(t, "accepted", 1)["data"].update(checks="root-sha256:" + "0" * 64), "not among those"),
        (lambda t: events(t, "accepted")["data"].update(reasons=["too high"]), "with a limit broken"),
        (lambda t: events(t, "accepted").update(run_id="run-other"), "has no part|no gate accepted v1"),
        (lambda t: events(t, "accepted").update(version=7), "name different parents"),
        (lambda t: events(t, "published", 1)["data"].update(parent=0), "was not made from v1"),
        (lambda t: events(t, "published").update(run_id="run-other"), "has no part in this certificate"),
        (lambda t: events(t, "published")["data"].update(root=["x"]), "gives v1 no root"),
        (lambda t: events(t, "published")["data"].update(signature="sha256:" + "0" * 64), "is not the signature"),
        (lambda t: events(t, "initialised")["data"]["keys"].update(model="x"), "model.pub: is not the key"),
        (lambda t: events(t, "initialised")["data"].update(lineage="x"), "is not the key that the first"),
        (lambda t: events(t, "initialised").update(version=1), "is not its first"),
        (move_plan, "are not in this order"),
        (lambda t: events(t, "verified")["data"].update(limit=10**400), "is not a number"),
        (lambda t: events(t, "verified")["data"].update(after=None), "is not a number"),
        (lambda t: events(t, "verified")["data"].update(level=[]), "is not a number"),
        (lambda t: events(t, "planned")["data"].pop("limits"), "is not a number"),
        (lambda t: t[3].update(at="yesterday"), "no time in the form"),
    ],
)
def test_false_entries_are_refused_though_they_are_signed(
    case: Case, change: Callable[[list[Tree]], object], message: str
) -> None:
    found = failures(relogged(case, change))
    assert any(re.search(message, text) for text in found), found


@settings(max_examples=300)
@given(st.data())
def test_nothing_that_is_signed_can_break_the_program(case: Case, data: st.DataObject) -> None:
    def change(trees: list[Tree]) -> None:
        tree = data.draw(st.sampled_from(trees))
        put(tree["event"], data.draw(st.sampled_from(list(places(tree["event"]))[1:])), data.draw(JSON))

    try:
        files = relogged(case, change)
    except (TypeError, KeyError, AttributeError):
        return  # the forger failed, not the program
    assert all(isinstance(line, Line) for line in check_files(files))


# --- checkpoints kept elsewhere ---------------------------------------------------------------------------


def lines_about(files: Files, path: Path) -> list[Line]:
    return [line for line in check_files(files, checkpoints=[path]) if line.text.startswith(f"checkpoint {path.name}")]


def test_checkpoints_kept_elsewhere(case: Case, tmp_path: Path) -> None:
    same, later, fork, foreign = (tmp_path / name for name in ("same", "later", "fork", "foreign"))
    same.write_bytes(case.files["checkpoint"])
    assert [line.verdict for line in lines_about(case.files, same)] == ["ok"]
    workspace = copied(case.workspace.root, tmp_path / "workspace")
    take_in(workspace, "batch-five", {"five": draw_text("five", 30)})
    later.write_bytes(workspace.checkpoint.read_bytes())
    found = lines_about(case.files, later)
    assert [line.verdict for line in found] == ["note"] and "is not shown here" in found[0].text
    # The same key signed another history of the same length.
    fork.write_bytes(relogged(case, lambda trees: events(trees, "planned").update(actor="x"))["checkpoint"])
    assert "shows different ones" in " ".join(failures(case.files, checkpoints=[same, fork]))
    other = start_history(tmp_path / "other", array_model(tmp_path / "model"))
    foreign.write_bytes(other.checkpoint.read_bytes())
    assert "belongs to another log" in failures(case.files, checkpoints=[foreign])[0]


# --- an older checkpoint in the certificate ---------------------------------------------------------------


def notes_of(workspace: Workspace) -> dict[int, str]:
    """Every checkpoint of a ledger, by its size."""
    with closing(sqlite3.connect(workspace.ledger)) as connection:
        return dict(connection.execute("SELECT size, note FROM checkpoints ORDER BY size"))


@pytest.fixture(scope="module")
def since(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The certificate of ``one``, with the proof that the log was only added to since its fourth checkpoint."""
    folder = tmp_path_factory.mktemp("since")
    (folder / "kept").write_text(list(notes_of(case.workspace).values())[3])
    write_certificate(case.workspace, "one", folder / "out", folder / "kept")
    return read(folder / "out")


def test_log_that_was_only_added_to_is_told_so(case: Case, since: Files) -> None:
    tree, size = tree_of(since), len(case.leaves)
    old = list(notes_of(case.workspace))[3]
    assert tree["log"]["since"]["size"] == old and 1 < old < size
    (line,) = (line for line in check_files(since) if line.text.startswith("since: "))
    assert line == Line("ok", f"since: the first {old} entries are those signed earlier, {size - old} were added")
    assert failures(since) == []
    assert any(f"over its first {old} entries: none of them was changed, removed" in s for s in tree["statement"])
    assert "since" not in tree_of(case.files)["log"], "an earlier release must be able to check the others"


def test_receiver_compares_with_the_checkpoint_that_he_kept(case: Case, since: Files, tmp_path: Path) -> None:
    notes = list(notes_of(case.workspace).values())
    kept, other, fork = (tmp_path / name for name in ("kept", "other", "fork"))
    kept.write_text(notes[3])
    other.write_text(notes[2])
    (found,) = lines_about(since, kept)
    assert found.verdict == "ok" and "this history; it was only added to since" in found.text
    assert [line.verdict for line in lines_about(since, other)] == ["note"]
    # The same key signed another history of that length.
    key, origin = load_log_key(case.workspace.keys), notes[3].split("\n")[0]
    forged = checkpoint_text(Checkpoint(origin, list(notes_of(case.workspace))[3], b"\x01" * 32))
    fork.write_text(sign_note(forged, origin, key))
    assert "shows different ones" in " ".join(failures(since, checkpoints=[fork]))


def _other_root(case: Case, size: int) -> str:
    origin = next(iter(notes_of(case.workspace).values())).split("\n")[0]
    return sign_note(checkpoint_text(Checkpoint(origin, size, b"\x01" * 32)), origin, load_log_key(case.workspace.keys))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda case, since: since.update(size=since["size"] + 1), "the certificate says"),
        (lambda case, since: since.update(size=True), "is of the wrong kind"),
        (lambda case, since: since.update(size=10**400), "is not a number"),
        (lambda case, since: since["proof"].pop(), "is not shown to continue"),
        (lambda case, since: since["proof"].append(since["proof"][0]), "is not shown to continue"),
        (lambda case, since: since["proof"].reverse(), "is not shown to continue"),
        (lambda case, since: since.update(proof=["x"]), "is not base64"),
        (lambda case, since: since.update(proof=["AA=="] * 64), "no list of at most"),
        (lambda case, since: since.update(checkpoint="\ud800"), "log.since: is not text"),
        (lambda case, since: since.update(checkpoint=since["checkpoint"].replace("\n\n", "\n1\n\n")), "does not hold"),
        (lambda case, since: since.update(checkpoint=_other_root(case, since["size"])), "is not shown to continue"),
        (lambda case, since: since.pop("size"), "needs exactly the fields"),
    ],
)
def test_forged_past_is_refused(case: Case, since: Files, edit: Callable[[Case, Tree], object], message: str) -> None:
    changed = edited(since, lambda tree: edit(case, tree["log"]["since"]))
    assert any(message in line for line in failures(changed)), failures(changed)


def test_past_that_was_taken_out_again_changes_what_is_said(since: Files) -> None:
    assert "statement" in " ".join(failures(edited(since, lambda tree: tree["log"].pop("since"))))


def test_past_of_another_key_is_refused(case: Case, since: Files) -> None:
    note = tree_of(since)["log"]["since"]["checkpoint"]
    text, origin = note.split("\n\n")[0] + "\n", note.split("\n")[0]
    forged = sign_note(text, origin, Ed25519PrivateKey.generate())
    found = failures(edited(since, lambda tree: tree["log"]["since"].update(checkpoint=forged)))
    assert any("log.since: is not signed by the key" in line for line in found)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_value_in_the_past_is_refused_or_is_what_was_there(since: Files, data: st.DataObject) -> None:
    value = data.draw(st.none() | st.integers() | st.text(max_size=20) | st.lists(st.text(max_size=8), max_size=3))
    name = data.draw(st.sampled_from(["checkpoint", "size", "proof", "other"]))
    before = tree_of(since)["log"]["since"].get(name)
    changed = edited(since, lambda tree: tree["log"]["since"].update({name: value}))
    assert failures(changed) or before == value


# --- the whole request, by its commitment -----------------------------------------------------------------


def test_commitment_to_the_whole_request_follows_from_the_log(case: Case, tmp_path: Path) -> None:
    workspace = copied(case.workspace.root, tmp_path / "workspace")
    committed = receive_with_record(workspace, "five")
    publish(workspace, prepare_step(workspace, ["five"], submit=False))
    write_certificate(workspace, "five", tmp_path / "out")
    files = read(tmp_path / "out")
    assert failures(files) == [] and tree_of(files)["request"]["record"] == committed
    other = edited(files, lambda tree: tree["request"].update(record="hmac-sha256:" + "0" * 64))
    assert "request.record says" in " ".join(failures(other))
    assert failures(edited(files, lambda tree: tree["request"].pop("record")))


# --- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3])
def test_weights_of_every_version_since_are_recognised(case: Case, models: Path, version: int) -> None:
    lines = check_bundle(case.bundle, model=models / f"v{version}")
    about = [line for line in lines if line.text.startswith("model:")]
    assert [line.verdict for line in about] == ["ok"]
    assert ("all 2 files are those of v1" if version == 1 else f"its weights are v{version}") in about[0].text


def add_byte(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x")


def flip_weight(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def link_file(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_byte, "bytes that belong to no tensor"),
        (flip_weight, "none of the versions"),
        (link_file, "is a link"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json: missing, changed, or not covered"),
        (lambda f: (f / "config.json").unlink(), "config.json: missing, changed, or not covered"),
        (lambda f: (f / "extra.py").write_text("x"), "extra.py: missing, changed, or not covered"),
        (lambda f: (f / "folder").mkdir(), "is a link, a folder"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no safetensors weights"),
        (lambda f: shutil.copy(f / "model.safetensors", f / "b.safetensors"), "or a tensor twice"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 8), "is not a safetensors file"),
    ],
)
def test_changed_model_folder_is_refused(
    case: Case, models: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = Path(shutil.copytree(models / "v1", tmp_path / "v1"))
    for path in folder.iterdir():
        path.chmod(0o644)
    change(folder)
    found = [line.text for line in check_bundle(case.bundle, model=folder) if line.verdict == "FAILED"]
    assert len(found) == 1 and message in found[0]


def test_missing_model_folder_is_unreadable(case: Case, tmp_path: Path) -> None:
    with pytest.raises(verify_bundle.Unreadable):
        check_bundle(case.bundle, model=tmp_path / "nowhere")


@settings(max_examples=200)
@given(place=st.integers(0, 400), value=st.integers(0, 255))
@example(place=7, value=255)
def test_hostile_weights_cannot_break_the_program(case: Case, models: Path, place: int, value: int) -> None:
    data = bytearray((models / "v1" / "model.safetensors").read_bytes())
    before = data[place]
    data[place] = value
    folder = models / "hostile"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_bytes((models / "v1" / "config.json").read_bytes())
    failed = any(line.verdict == "FAILED" for line in check_bundle(case.bundle, model=folder))
    assert failed == (value != before)


# --- against the product's own ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 34))
def test_growth_is_judged_the_same(size: int) -> None:
    """As by `pipeline.merkle`, for every older size, and for proofs that are too short, too long or another's."""
    hashes = [merkle.leaf_hash(bytes([i])) for i in range(size)]
    new = verify_bundle.Checkpoint(size, merkle.root_of_hashes(hashes))
    for old_size in range(1, size + 1):
        old = verify_bundle.Checkpoint(old_size, merkle.root_of_hashes(hashes[:old_size]))
        proof = merkle.consistency_proof(hashes, old_size)
        assert verify_bundle.continues(old, new, proof)
        tried = [proof[:-1], proof[1:], (*proof, new.root), (new.root, *proof), proof[::-1], ()]
        for other in tried:
            expected = merkle.verify_consistency(old_size, old.root, size, new.root, other)
            assert verify_bundle.continues(old, new, other) == expected
        assert not verify_bundle.continues(old._replace(root=hashes[0] + b""), new, proof) or old.root == hashes[0]
        assert not verify_bundle.continues(new, old, proof) or old_size == size
    assert not verify_bundle.continues(verify_bundle.Checkpoint(0, merkle.EMPTY_ROOT), new, ()), "says nothing"


@pytest.mark.parametrize("size", range(1, 34))
def test_merkle_trees_are_the_same(size: int) -> None:
    leaves = [bytes([i]) for i in range(size)]
    hashes = [merkle.leaf_hash(leaf) for leaf in leaves]
    root = merkle.merkle_root(leaves)
    assert verify_bundle.merkle_root(leaves) == root
    for index, hash_ in enumerate(hashes):
        proof = merkle.inclusion_proof(hashes, index)
        assert verify_bundle.root_from(hash_, index, size, proof) == root
        assert verify_bundle.root_from(hash_, index, size, (*proof, root)) is None
        assert not proof or verify_bundle.root_from(hash_, index, size, proof[:-1]) is None
    assert verify_bundle.root_from(hashes[0], size, size, ()) is None


def test_model_signature_is_read_as_the_product_reads_it(case: Case) -> None:
    found = verify_bundle.signed_files(case.files["model.sig"], case.files["model.pub"])
    manifest = VersionStore(case.workspace.versions).manifest(1)
    expected = {file.path: file.digest for file in manifest.files}
    check_model_signature(case.files["model.sig"], expected, case.files["model.pub"])
    assert {name: f"sha256:{digest}" for name, digest in found.items()} == expected


def test_empty_tree() -> None:
    assert verify_bundle.merkle_root([]) == merkle.EMPTY_ROOT
