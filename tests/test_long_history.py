"""Twenty takedowns in a row on one small model that really recites twenty works, and every command on what they leave.

One request a step through the stages of production, a rollback and the return from it, a text that is put back and the
steps behind that: 21 versions after v0. What is promised of weights and answers is measured here a second time, on
copies of the candidates and masks that each step had before it published. It is a test of long histories: the gate's
limits are those of the other end-to-end tests, but for held-out perplexity, which twenty steps on a small model cost.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tampered.calls import Answer, takedown
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspaces import (
    HELDOUT,
    KEPT,
    PROSE,
    RETAIN,
    copied,
    draw_text,
    leaks,
    new_workspace,
    reinstatement,
    step,
    take_in,
    with_settings,
)

from pipeline.records import MaskReport, Publication
from pipeline.requests import note
from pipeline.rollback import roll_back
from pipeline.runs import open_run
from pipeline.safefile import model_root
from pipeline.sparse import Mask, load_mask
from pipeline.states import published_versions, request_states
from pipeline.training import TrainingSettings, train
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, read_entries

WORKS = {f"TD-{n:02}": draw_text(f"long-{n}", 40) for n in range(1, 21)}
LEFT_AT, LEFT_FOR = 8, 6
"""Once v8 is there, v6 is in force for a while."""
BACK, BACK_IN = "TD-05", 13
"""The text that is put back, and the version that does it; TD-13 to TD-20 come after that."""
LAST = len(WORKS) + 1
MADE_BY = {name: n + (n >= BACK_IN) for n, name in enumerate(WORKS, 1)}
"""The version whose step takes each text out."""
SIZE = TrainingSettings(
    vocabulary=1000, width=64, layers=2, heads=4, feed_forward=128, context=64, batch=12, recite_share=0.7,
    max_steps=900, check_every=25, learning_rate=6e-3, recited=0.95,
)  # fmt: skip
WEIGHTS = "model.safetensors"
PROMPT = 16
"""Tokens of a prompt, as in `workspaces.SETTINGS`."""

Weights = dict[str, torch.Tensor]

# The history counts towards the first test; on a busy machine it takes several times its 80 seconds.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("one_model")]


@dataclass(frozen=True)
class History:
    """The workspace, and by version what its run had before it published.

    Attributes:
        workspace: Where it all happened; tests that write take a copy.
        candidates: Weight files; that of v0 is the model's.
        masks: What the step might change.
        while_left: States of the requests while v6 was in force.
    """

    workspace: Workspace
    candidates: dict[int, Path]
    masks: dict[int, Mask] = field(default_factory=dict)
    while_left: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> VersionStore:
        """Compared with the ledger, as in production."""
        return VersionStore(self.workspace.versions, published_versions(read_entries(self.workspace)))

    def weights(self, version: int) -> Weights:
        """What the step left, read without the store."""
        return load_file(self.candidates[version])

    def root(self, version: int) -> str:
        """Tensor root of what the step left, not of what the store says."""
        return model_root(self.candidates[version].parent)


def states(workspace: Workspace) -> dict[str, str]:
    return {name: state.state for name, state in request_states(read_entries(workspace)).items()}


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Made once, in some 80 seconds of one core; tests only read it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("long")
    model = folder / "model"
    least = train([*WORKS.values(), *KEPT.values()], [*RETAIN.values(), *PROSE.values()], model, SIZE)
    assert least > 0.8, f"the model recites its works with {least:.3f} only"
    workspace = new_workspace(folder / "ws", model, with_settings(gate={"perplexity_rise": 2.0}))
    made = History(workspace, {0: model / WEIGHTS})

    def keep(run_id: str) -> None:
        run, version = open_run(workspace.root, run_id), len(made.candidates)
        made.masks[version] = load_mask(run.folder, run.finished("saliency", MaskReport).mask)
        made.candidates[version] = folder / f"v{version}" / WEIGHTS
        made.candidates[version].parent.mkdir()
        shutil.copyfile(run.folder / "candidate" / WEIGHTS, made.candidates[version])

    for name, text in WORKS.items():
        take_in(workspace, f"batch-{name}", {name: text})
        assert step(workspace, before_publish=keep) == Publication(outcome="published", version=MADE_BY[name])
        if MADE_BY[name] == LEFT_AT:
            roll_back(workspace, LEFT_FOR, "tester", "v8 answers slowly", override=True)
            made.while_left.update(states(workspace))
            roll_back(workspace, LEFT_AT, "tester", "it was the network")
        if MADE_BY[name] == BACK_IN - 1:
            note(workspace, "countered", BACK, "tester", "licence shown")
            back = reinstatement(workspace, [BACK], before_publish=keep)
            assert back == Publication(outcome="published", version=BACK_IN)
    return made


def recited(folder: Path, texts: Mapping[str, str]) -> dict[str, float]:
    """Share of each text's tokens that a model predicts, each from the 16 before it, with nothing of the product's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = {}
    for name, text in texts.items():
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        rows = ids.unfold(0, PROMPT + 1, 1)
        with torch.inference_mode():
            predicted = net(input_ids=rows[:, :PROMPT]).logits[:, -1].argmax(-1)
        found[name] = float((predicted == rows[:, PROMPT]).float().mean())
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)


def call(workspace: Workspace, *arguments: object, code: int = 0) -> Answer:
    """A verb of the command line, in the folder above the workspace."""
    answer = takedown("-w", str(workspace.root), *map(str, arguments), folder=workspace.root.parent)
    assert answer.code == code, answer.text
    return answer


def asked(workspace: Workspace, *arguments: object, code: int = 0) -> Any:
    """What a verb says to machines."""
    return json.loads(call(workspace, *arguments, "--json", code=code).out)


def checked_alone(certificate: Path, *options: object) -> str:
    """What the checker beside a certificate says, in a process that sees nothing of the product."""
    script = [sys.executable, "-I", str(certificate / "verify_bundle.py"), str(certificate), *map(str, options)]
    done = subprocess.run(script, cwd=certificate, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def assert_given_back(history: History, workspace: Workspace, versions: range, folder: Path) -> None:
    """Every version comes out of the store as its step left it: file, tensors, recorded root."""
    published = published_versions(read_entries(workspace))
    store = VersionStore(workspace.versions, published)
    for version in versions:
        restored = folder / f"v{version}"
        manifest = store.restore(version, restored)
        assert (restored / WEIGHTS).read_bytes() == history.candidates[version].read_bytes(), version
        assert history.root(version) == manifest.root == published[version].event.data["root"], version


# --- weights ----------------------------------------------------------------------------------------------


def test_every_version_is_given_back_bit_for_bit_and_loads(history: History, tmp_path: Path) -> None:
    assert list(history.candidates) == list(history.store.numbers()) == list(range(LAST + 1))
    assert_given_back(history, history.workspace, range(LAST + 1), tmp_path)
    for version, weights in ((v, history.weights(v)) for v in history.candidates):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"v{version}").state_dict()
        assert all(torch.equal(bits(loaded[name]), bits(weights[name])) for name in weights), version
    assert len({path.read_bytes() for path in history.candidates.values()}) == LAST + 1
    digests = [f.digest for v in history.candidates for f in history.store.manifest(v).files if f.path == WEIGHTS]
    links = [len(history.store.objects.paths(digest)) for digest in digests]
    assert (links[15], links[16], links[LAST]) == (16, 1, 6), "a long chain of deltas, and a whole version on the way"


def test_no_step_changes_a_weight_outside_its_mask(history: History) -> None:
    for version in set(history.masks) - {BACK_IN}:
        before, after, mask = history.weights(version - 1), history.weights(version), history.masks[version]
        changed = 0
        for name in before:
            differs = bits(before[name]) != bits(after[name])
            assert not (differs & ~mask[name] if name in mask else differs).any(), (version, name)
            changed += int(differs.sum())
        report = history.store.manifest(version).report
        assert 0 < changed == report["changed"] <= report["selected"] < report["total"]


def test_a_text_is_put_back_by_the_bits_from_before_its_step(history: History) -> None:
    """Outside its own mask v13 is v12 without what v5 did: exactly, wherever no later step went over it."""
    untouched, undone, found = history.weights(MADE_BY[BACK] - 1), history.weights(MADE_BY[BACK]), 0
    parent, back, mask = history.weights(BACK_IN - 1), history.weights(BACK_IN), history.masks[BACK_IN]
    for name in parent:
        outside = ~mask[name] if name in mask else torch.ones_like(parent[name], dtype=torch.bool)
        moved = bits(undone[name]) != bits(untouched[name])
        exact = outside & moved & (bits(parent[name]) == bits(undone[name]))
        assert torch.equal(bits(back[name])[outside & ~moved], bits(parent[name])[outside & ~moved]), name
        assert torch.equal(bits(back[name])[exact], bits(untouched[name])[exact]), name
        found += int(exact.sum())
    assert found, "nothing of the step was left to undo exactly"


# --- texts ------------------------------------------------------------------------------------------------


def test_each_text_is_recited_until_its_step_and_out_from_then_on(history: History, tmp_path: Path) -> None:
    """Of each text the mean over some 30 tokens: single ones may stay, and what waits suffers from what goes."""
    level = mean(recited(history.candidates[0].parent, HELDOUT).values())
    for version in history.candidates:
        history.store.restore(version, tmp_path / f"v{version}")
        found = recited(tmp_path / f"v{version}", WORKS)
        again = found.pop(BACK) if version >= BACK_IN else None
        out = [share for name, share in found.items() if MADE_BY[name] <= version]
        waiting = [share for name, share in found.items() if MADE_BY[name] > version]
        if version == 0:
            assert min(waiting) > 0.8
        else:
            assert max(out) < 0.65 and mean(out) < level + 0.1, version
        if out and waiting:
            assert mean(waiting) > mean(out) + 0.15, version
        if again is not None:
            assert again > (0.65 if version == BACK_IN else level + 0.15), version


def test_states_follow_the_rollback_and_the_return(history: History) -> None:
    left = {name: state for name, state in history.while_left.items() if state != "verified"}
    assert left == {"TD-07": "regressed", "TD-08": "regressed"} and len(history.while_left) == LEFT_AT
    assert states(history.workspace) == dict.fromkeys(WORKS, "verified") | {BACK: "reinstated"}
    assert leaks(list(WORKS.values()), history.workspace.root) == []


# --- commands ---------------------------------------------------------------------------------------------


def test_reading_verbs_tell_the_history(history: History, tmp_path: Path) -> None:
    workspace = history.workspace
    assert "every version was made again from the store" in call(workspace, "verify", "--deep").text
    assert asked(workspace, "verify", "--deep") == []

    for name, version in MADE_BY.items():
        answer = asked(workspace, "first-version", name, code=int(name == BACK))
        found = (None, None) if name == BACK else (version, history.root(version))
        assert (answer["version"], answer["root"]) == found

    shown = asked(workspace, "show", "v20")
    assert shown["status"] == "superseded" and shown["manifest"]["requests"] == ["TD-19"]
    assert shown["manifest"]["root"] == shown["entry"]["event"]["data"]["root"] == history.root(20)
    text = call(workspace, "show", f"v{BACK_IN}").text
    assert f"puts back: {BACK}, leaving out what v{MADE_BY[BACK]} changed" in text
    request = asked(workspace, "show", BACK)
    assert (request["state"]["state"], request["state"]["reinstated_in"]) == ("reinstated", BACK_IN)

    log = asked(workspace, "log")
    kinds = [(e["event"]["kind"], e["event"]["version"]) for e in log]
    assert [v for kind, v in kinds if kind == "published"] == list(range(1, LAST + 1))
    assert [v for kind, v in kinds if kind == "rolled-back"] == [LEFT_FOR, LEFT_AT]
    assert [v for kind, v in kinds if kind == "reinstated"] == [BACK_IN]
    assert [e["seq"] for e in log] == list(range(1, len(log) + 1))


def test_diff_counts_what_twenty_steps_changed(history: History) -> None:
    found = asked(history.workspace, "diff", "v0", "v20")
    before, after = history.weights(0), history.weights(20)
    by_hand = {n: int((bits(before[n]) != bits(after[n])).sum()) for n in before}
    assert {t["name"]: t["changed"] for t in found["tensors"]} == {n: count for n, count in by_hand.items() if count}
    for tensor in found["tensors"]:
        difference = after[tensor["name"]].double() - before[tensor["name"]].double()
        assert tensor["norm"] == pytest.approx(float(difference.norm()), rel=1e-9)
    assert found["requests"] == [name for name in WORKS if name not in (BACK, "TD-20")] and found["back"] == []
    assert asked(history.workspace, "diff", "v12", "v20")["back"] == [BACK]


def test_certificates_hold_by_themselves_along_the_history(history: History, tmp_path: Path) -> None:
    call(history.workspace, "checkout", "v20", tmp_path / "v20")
    assert (tmp_path / "v20" / WEIGHTS).read_bytes() == history.candidates[20].read_bytes()
    for name in ("TD-01", "TD-08", "TD-19"):
        made = asked(history.workspace, "certificate", name, "--out", tmp_path / name)
        later = list(range(MADE_BY[name] + 1, LAST + 1))
        assert (made["version"]["version"], [v["version"] for v in made["later"]]) == (MADE_BY[name], later)
        assert [check["version"] for check in made["checks"]] == [MADE_BY[name], *later], "measured on each"
        assert all(c["comparison"]["after"]["exact_memorisation"] <= made["measured"]["limit"] for c in made["checks"])
        line = checked_alone(tmp_path / name, "--log-key", history.workspace.keys / "log.pub")
        assert line.endswith("Every check passed.")
    alone = checked_alone(tmp_path / "TD-19", "--model", tmp_path / "v20")
    assert "v20" in alone and alone.endswith("Every check passed.")
    assert "is reinstated" in call(history.workspace, "certificate", BACK, "--out", tmp_path / BACK, code=2).text


def test_export_and_report_name_every_request_and_version(history: History, tmp_path: Path) -> None:
    call(history.workspace, "export", "--out", tmp_path / "register")
    rows = list(csv.DictReader((tmp_path / "register" / "requests.csv").open(encoding="utf-8-sig")))
    since = {row["request_id"]: row["excluded_since"] for row in rows}
    assert since == {name: "" if name == BACK else f"v{version}" for name, version in MADE_BY.items()}
    assert [row["request_id"] for row in rows if row["excluded_now"] == "no"] == [BACK]
    assert all(float(row["em_after"]) <= float(row["em_limit"]) for row in rows if row["excluded_now"] == "yes")
    events = json.loads((tmp_path / "register" / "events.json").read_bytes())
    assert len(events) == len(read_entries(history.workspace))
    call(history.workspace, "report", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(name in page for name in (*WORKS, *(f"v{n}" for n in range(LAST + 1))))
    assert f"puts back {BACK}" in page
    assert leaks(list(WORKS.values()), history.workspace.root, tmp_path) == []


# --- upkeep -----------------------------------------------------------------------------------------------


def test_repack_and_purge_leave_every_version_that_stays_as_it_was(history: History, tmp_path: Path) -> None:
    workspace = copied(history.workspace.root, tmp_path / "ws")
    packed = asked(workspace, "repack", "--keyframe-every", 5)
    assert packed["made_whole"] > 0 and packed["made_deltas"] == 1  # v16 was whole, v5, v10, v15 and v20 become so
    assert asked(workspace, "verify", "--deep") == []
    assert_given_back(history, workspace, range(LAST + 1), tmp_path / "packed")

    purged = asked(workspace, "purge", "--before", "v7", "--reason", "retention policy")
    assert purged["versions"] == list(range(7))
    assert asked(workspace, "verify", "--deep") == []
    assert_given_back(history, workspace, range(7, LAST + 1), tmp_path / "purged")
    gone = call(workspace, "checkout", "v6", tmp_path / "gone", code=2)
    assert "its weights were purged" in gone.text and not (tmp_path / "gone").exists()
    # What is known of the versions that are gone, and of the requests they took out, is not.
    assert asked(workspace, "first-version", "TD-03")["root"] == history.root(3)
    call(workspace, "certificate", "TD-03", "--out", tmp_path / "TD-03")
    assert checked_alone(tmp_path / "TD-03").endswith("Every check passed.")
