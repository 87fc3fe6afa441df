"""The report page: what it says follows from its records, and nothing in them can break out of it."""

from __future__ import annotations

import html
import math
import re
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import closing
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import workspaces
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import StoreDamaged
from pipeline.evidence import all_evidence, evidence_of
from pipeline.files import digest_file
from pipeline.history import lineage_view
from pipeline.ledger import Ledger
from pipeline.records import (
    Break,
    Calibration,
    Comparison,
    CurvePoint,
    DedupeDecision,
    DedupeReport,
    Evaluation,
    Event,
    Evidence,
    FileRef,
    MaskReport,
    NeverSeenLevel,
    PassageSpan,
    RetainExclusion,
    ScreenedRequest,
    ScreenReport,
    StoredFile,
    TextScore,
    VectorReport,
    Verdict,
)
from pipeline.report import render
from pipeline.report_facts import (
    ancestry,
    excluded_requests,
    forget_limits,
    measured_requests,
    measured_scores,
    rechecks,
    summarise,
    trend,
)
from pipeline.report_views import (
    EventView,
    LineageView,
    LogView,
    LostStep,
    PlannedView,
    RequestView,
    StepView,
    StorageView,
    VersionView,
)
from pipeline.report_words import event_note, perplexity, share, size
from pipeline.rollback import roll_back
from pipeline.settings import GateSettings
from pipeline.states import decisions
from pipeline.storecheck import Depth
from pipeline.upkeep import purge, repack
from pipeline.vault import Vault
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, read_entries

T0 = datetime(2026, 11, 2, 1, 30, tzinfo=UTC)
LEVEL = NeverSeenLevel(mean=0.164, std=0.041, passages=96, source="held-out")
LIMIT = 0.164 + 0.05
HOSTILE = (
    "<script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "Tom & Jerry &amp; <b>",
    "</title></svg><img src=x onerror=alert(1)>",
    "{{ 7*7 }}{% for x in y %}",
    "nul\x00 bell\x07 escape\x1b[31m",
    "\u202egnp.exe",
)
VOID = {"meta", "br", "link", "img", "input", "hr"}


def score(em: float, nll: float, generated: bool = True) -> TextScore:
    """A score that hangs together: the more is memorised, the longer the runs."""
    return TextScore(
        exact_memorisation=em,
        extraction_strength=max(0.0, em - 0.2),
        rouge_1=min(1.0, em + 0.08) if generated else None,
        rouge_l=min(1.0, em + 0.03) if generated else None,
        longest_run=round(40 * em**2) if generated else None,
        nll=nll,
    )


def compared(name: str, role: str, before: float, after: float, nll: tuple[float, float] | None = None) -> Comparison:
    first, then = nll or ((0.05 if before > 0.5 else 4.41), 4.4)
    return Comparison.model_validate(
        {"name": name, "role": role, "before": score(before, first), "after": score(after, then)}
    )


def curve(alpha: float) -> Calibration:
    """A search that doubles past ``alpha`` and bisects back to it."""
    alphas = sorted({0.0, 1.0, *(alpha * (1 + s / 2**k) for k in range(1, 7) for s in (-1, 1)), alpha, 2 * alpha, 64.0})
    return Calibration(
        vector=FileRef(path="vector.safetensors", digest="sha256:" + "7e" * 32),
        alpha=alpha,
        target=0.184,
        reached=True,
        bounded_by_utility=False,
        curve=tuple(
            CurvePoint(
                alpha=a,
                forget=0.05 + 0.93 / (1 + (a / alpha) ** 2 * 5.9),
                earlier=0.17 + 0.02 * math.exp(-a),
                utility_nll=4.35 + 0.02 * math.log1p(a / alpha) ** 2,
            )
            for a in alphas
        ),
    )


def step(
    number: int,
    parent: int,
    version: int | None,
    comparisons: tuple[Comparison, ...],
    decisions: tuple[DedupeDecision, ...],
    reasons: tuple[str, ...] = (),
    alpha: float = 3.4375,
) -> StepView:
    held = compared("the-ambassadors.txt", "held-out", 0.16, 0.16, (4.351, 4.352 + 0.003 * number))
    kept = tuple(compared(f"{n}.txt", "kept", 1.0, 0.99 - 0.01 * number, (0.04, 0.09)) for n in ("emma", "middlemarch"))
    names = [d.request_id for d in decisions if d.verdict == "fresh"]
    return StepView(
        run_id=f"2026110{number}T013000Z-9f3{number}",
        at=T0 + timedelta(days=number, minutes=11),
        version=version,
        parent=parent,
        dedupe=DedupeReport(
            decisions=decisions,
            retain_excluded=(
                RetainExclusion(
                    document="retain/anthology.txt", request_id=names[0], jaccard=0.31, containment=0.35, contained=0.8
                ),
            )
            if number == 1
            else (),
        ),
        screen=ScreenReport(
            level=LEVEL,
            memorised_above=0.287,
            requests=tuple(
                ScreenedRequest(
                    request_id=name,
                    passages=46 + i,
                    memorised=tuple(
                        PassageSpan(request_id=name, prompt_start=64 * j, start=64 * j + 64, end=64 * j + 128)
                        for j in range(0 if "8" in name else 44)
                    ),
                    exact_memorisation=0.19 if "8" in name else 0.96,
                    longest_extraction=0.02 if "8" in name else 1.0,
                )
                for i, name in enumerate(names)
            ),
        ),
        mask=MaskReport(
            mask=FileRef(path="mask.safetensors", digest="sha256:" + "3c" * 32),
            mean=2.1e-5, std=4.4e-5, k=1.0, threshold=6.5e-5, selected=151_233, total=2_097_152,
            per_tensor={f"layers.{i}.q_proj": (0 if i == 3 else 40) for i in range(4)},
        ),
        vectors=(
            VectorReport(
                vector=FileRef(path="vector.safetensors", digest="sha256:" + "7e" * 32),
                norm=0.7213, losses=(5.02, 4.1, 2.7, 1.31), tokens=1_204_224,
                rounds=2, again=("TD-<0>",),
            ),
        ),
        calibrations=(curve(alpha),),
        evaluation=Evaluation(level=LEVEL, comparisons=(*comparisons, *kept, held)),
        verdict=Verdict(accepted=not reasons, reasons=reasons),
        limits=GateSettings(),
    )  # fmt: skip


def fresh(name: str, *evidence: Evidence) -> DedupeDecision:
    return DedupeDecision(request_id=name, verdict="fresh", covered=0.02, evidence=evidence)


def version(number: int, parent: int | None, requests: tuple[str, ...], current: bool = False) -> VersionView:
    first = parent is None
    return VersionView(
        version=number,
        parent=parent,
        root="root-sha256:" + f"{number:x}{number + 7:x}" * 32,
        created_at=T0 + timedelta(days=number, minutes=12),
        published_by="j.doe",
        run_id=None if first else f"run-{number}",
        requests=requests,
        selected=None if first else 151_233,
        changed=None if first else 150_871,
        total=None if first else 2_097_152,
        alpha=None if first else 3.4375,
        status="current" if current else "superseded",
    )


def stored(number: int, kind: str = "delta") -> StorageView:
    added = {"whole": 16_060_522_496, "delta": 203_482_113, "purged": 41_233}.get(kind)
    return StorageView.model_validate({"version": number, "kind": kind, "added": added, "whole": 16_060_000_000})


def event(seq: int, kind: str, name: str | None = None, version: int | None = None, note: str = "") -> EventView:
    at = T0 + timedelta(days=seq // 4, minutes=11)
    return EventView(
        seq=seq, at=at, kind=kind, actor="j.doe", request_id=name, version=version, run_id=None, note=note
    )  # fmt: skip


CHECKPOINT = (
    "takedown-pipeline/0a1b2c3d4e5f6071\n46\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "— takedown-pipeline/0a1b2c3d4e5f6071 "
    "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE\n"
)
LOG_KEY = "takedown-pipeline/0a1b2c3d4e5f6071+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
LOG = LogView(entries=46, checkpoint=CHECKPOINT, log_key=LOG_KEY, model_key="sha256:" + "5d" * 32)
FILES = (
    StoredFile(path="config.json", digest="sha256:" + "c1" * 32, size=733),
    StoredFile(path="model.safetensors", digest="sha256:" + "e9" * 32, size=16_059_999_267),
)


def request(
    number: int, title: str, state: str, at: int | None, em: tuple[float, float] | None = None, note: str = ""
) -> RequestView:
    name, first = f"TD-{number}", (number + 1) // 2
    answers = {"verified": "applied", "waiting": None}
    decision = answers.get(state, state)
    events = [event(4 * first, "received", name, note=f"batch 2026-11-batch-{first}")]
    if decision is not None:
        events.append(event(4 * first + 2, decision, name, at, "44 of 46 passages memorised"))
    if state == "verified" and em:
        note_ = f"exact memorisation {em[0]:.3f} → {em[1]:.3f}; limit 0.214"
        events.append(event(4 * first + 3, "verified", name, at, note_))
    return RequestView(
        request_id=name,
        title=title,
        rights_holder="Estate of the author",
        batch_id=f"2026-11-batch-{first}",
        received_at=T0 + timedelta(days=first),
        state=state,
        decision=decision,
        decided_at=None if decision is None else T0 + timedelta(days=first, minutes=11),
        version=at,
        run_id=None if decision is None else f"run-{first}",
        planned=None
        if decision is None
        else PlannedView(seq=4 * first + 1, at=T0 + timedelta(days=first), actor="scheduled", limits=GateSettings()),
        before=score(em[0], 0.06) if em else None,
        after=score(em[1], 4.4) if em else None,
        limit=LIMIT if em and state != "not-memorised" else None,
        note=note,
        events=tuple(events),
    )


def lineage(**changes: object) -> LineageView:
    """Five versions with a refusal, a repeat, a near-copy, a text never memorised, and v3 rolled back."""
    slight = Evidence(request_id="TD-1", jaccard=0.03, containment=0.05, contained=0.06)
    repeat = Evidence(request_id="TD-1", jaccard=0.71, containment=0.97, contained=0.73, ranges=((12, 3407),))
    folded = Evidence(request_id="TD-5", jaccard=0.88, containment=0.95, contained=0.92,
                      ranges=tuple((at, at + 9) for at in range(0, 50, 10)))  # fmt: skip
    steps = (
        step(1, 0, 1, (compared("TD-1", "this", 0.992, 0.181), compared("TD-2", "this", 0.967, 0.201)),
             (fresh("TD-1"), fresh("TD-2", slight))),
        step(2, 1, 2, (compared("TD-3", "this", 0.981, 0.160), compared("TD-4", "repeat", 0.184, 0.171),
                       compared("TD-1", "earlier", 0.181, 0.176), compared("TD-2", "earlier", 0.201, 0.188)),
             (fresh("TD-3"), DedupeDecision(request_id="TD-4", verdict="repeat", covered=0.97, evidence=(repeat,),
                                           uncounted=0.125))),
        step(3, 2, 3, (compared("TD-7", "this", 0.94, 0.205), compared("TD-1", "earlier", 0.176, 0.19),
                       compared("TD-2", "earlier", 0.188, 0.193), compared("TD-3", "earlier", 0.16, 0.18)),
             (fresh("TD-7"),)),
        step(4, 2, None, (compared("TD-5", "this", 0.97, 0.19), compared("TD-1", "earlier", 0.176, 0.262)),
             (fresh("TD-5"),), reasons=("TD-1 (earlier): exact memorisation 0.262 is above 0.214.",), alpha=21.5),
        step(5, 2, 4, (compared("TD-5", "this", 0.97, 0.199), compared("TD-6", "folded", 0.93, 0.187),
                       compared("TD-8", "not-memorised", 0.19, 0.186), compared("TD-1", "earlier", 0.176, 0.179),
                       compared("TD-2", "earlier", 0.188, 0.2), compared("TD-3", "earlier", 0.16, 0.164),
                       compared("TD-4", "earlier", 0.171, 0.17)),
             (fresh("TD-5"), fresh("TD-8"),
              DedupeDecision(request_id="TD-6", verdict="folded", covered=0.0, evidence=(folded,))), alpha=0.7031),
    )  # fmt: skip
    requests = (
        request(1, "The Lighthouse at Penmarron", "verified", 1, (0.992, 0.181)),
        request(2, "Letters to a Gardener, in three volumes, with an introduction", "verified", 1, (0.967, 0.201)),
        request(3, "Ночь над рекой", "verified", 2, (0.981, 0.160)),
        request(4, "The Lighthouse at Penmarron (school edition)", "repeat", 1, (0.184, 0.171), "covered by TD-1"),
        request(5, "A Winter Ledger", "verified", 4, (0.97, 0.199)),
        request(6, "A Winter Ledger, abridged", "folded", 4, (0.93, 0.187), "with TD-5"),
        request(7, "Salt & Iron", "verified", 3, (0.94, 0.205), "notice countered; v3 was rolled back"),
        request(8, "Unpublished Sketches", "not-memorised", None, (0.19, 0.186)),
        request(9, "灯台の手紙", "waiting", None),
    )
    view = LineageView(
        workspace="acme-8b",
        generated_at=T0 + timedelta(days=21, hours=12),
        current=4,
        software={"takedown-pipeline": "0.1.0", "torch": "2.13.0", "transformers": "5.20.1"},
        versions=(
            version(0, None, ()), version(1, 0, ("TD-1", "TD-2")), version(2, 1, ("TD-3",)),
            version(3, 2, ("TD-7",)).model_copy(update={"status": "rolled back"}),
            version(4, 2, ("TD-5", "TD-6"), current=True),
        ),
        storage=(stored(0, "whole"), *(stored(n) for n in (1, 2, 3, 4))),
        files=FILES,
        requests=requests,
        steps=steps,
        lost=(),
        chronicle=(event(17, "rolled-back", None, 2, "from v3; brings back TD-7, on an override; reason: mistake"),),
        log=LOG,
        breaks=(),
    )  # fmt: skip
    return view.model_copy(update=changes)


def empty() -> LineageView:
    """A workspace right after ``takedown init``."""
    return lineage(current=0, versions=(version(0, None, (), current=True),), storage=(stored(0, "whole"),),
                   requests=(), steps=(), chronicle=(), breaks=None)  # fmt: skip


def large(versions: int, requests: int) -> LineageView:
    """A long lineage: each version takes requests out and re-checks all earlier ones; each seventh is rolled back."""
    made, steps, parents = [version(0, None, ())], [], {}
    per = math.ceil(requests / (versions - 1))
    current = max(n for n in range(1, versions) if n % 7 != 6)
    out: list[str] = []
    parent = 0
    for n in range(1, versions):
        first = (n - 1) * per + 1
        names = tuple(f"TD-{i}" for i in range(first, min(first + per, requests + 1)))
        comparisons = (
            *(compared(name, "this", 0.97, 0.15 + i % 5 / 100) for i, name in enumerate(names)),
            *(compared(name, "earlier", 0.17, 0.16 + (i + n) % 6 / 100) for i, name in enumerate(out)),
        )
        steps.append(step(n, parent, n, comparisons, tuple(fresh(name) for name in names)))
        gone = n % 7 == 6
        status = "rolled back" if gone else "current" if n == current else "superseded"
        made.append(version(n, parent, names).model_copy(update={"status": status}))
        parents |= dict.fromkeys(names, n)
        if not gone:
            parent, out = n, [*out, *names]
    views = tuple(
        request(i, f"Work number {i}", "regressed" if parents.get(f"TD-{i}", 0) % 7 == 6 else "verified",
                parents.get(f"TD-{i}"), (0.97, 0.16))
        for i in range(1, requests + 1)
    )  # fmt: skip
    views = tuple(r.model_copy(update={"version": None}) if r.state == "regressed" else r for r in views)
    kinds = ["whole", *("whole" if n % 9 == 0 else "delta" for n in range(1, versions))]
    return lineage(
        current=current,
        versions=tuple(made),
        storage=tuple(stored(n, kind) for n, kind in enumerate(kinds)),
        requests=views,
        steps=tuple(steps),
    )


OPTIONAL = {"td": ("td", "th"), "th": ("td", "th"), "tr": ("td", "th", "tr"), "tbody": ("td", "th", "tr")}
"""Elements whose end tag HTML does not ask for, by the tag that ends them: where it begins, or, of a group, ends."""


class Page(HTMLParser):
    """Checks that tags nest, but for the end tags of cells and rows, and collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert self.stack == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "tbody":
            self.leave(tag)
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def leave(self, tag: str) -> None:
        """End what a tag ends without saying so."""
        while self.stack[-1:] and self.stack[-1] in OPTIONAL.get(tag, ()):
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag == "tbody":
            self.leave(tag)
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.stack:
            return
        self.words.append(data)
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()

    def row(self, first: str, *others: str) -> list[str]:
        """The only table row that begins with ``first`` and holds the others."""
        found = [r for r in self.rows if r and r[0] == first and all(o in r for o in others)]
        assert len(found) == 1, found
        return found[0]


def fact(view: LineageView, label: str) -> tuple[str, str]:
    item = next(f for f in summarise(view) if f.label == label)
    return item.mark, " ".join(item.sentences)


# --- the page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [lineage(), empty()], ids=["full", "empty"])
def test_page_is_well_formed_and_needs_nothing_from_outside(view: LineageView) -> None:
    page = render(view)
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>")
    assert "http" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "").replace("http-equiv", "")
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page and "@import" not in page
    targets = {a["id"] for _, a in parsed.tags if "id" in a}
    assert len(targets) == sum("id" in a for _, a in parsed.tags)
    linked = {(a.get("href") or "#")[1:] for _, a in parsed.tags if "href" in a}
    assert linked and linked | {a["aria-labelledby"] for _, a in parsed.tags if "aria-labelledby" in a} <= targets


def test_page_says_what_it_certifies_and_how_to_check_it() -> None:
    text = Page(render(lineage())).text
    assert "a process and a measurement, never absence" in text
    for command in ("verify", "checkout v4 DIR", "show v4 --json"):
        assert f"takedown -w WORKSPACE {command}" in text
    assert "sha256sum" in text
    for item in lineage().versions:
        assert item.root in text


def test_equal_views_give_equal_pages() -> None:
    assert render(lineage()) == render(LineageView.model_validate_json(lineage().model_dump_json()))


@pytest.mark.parametrize("hostile", HOSTILE)
def test_untrusted_text_is_shown_and_never_interpreted(hostile: str) -> None:
    view = lineage()
    replaced = {"title": hostile, "rights_holder": hostile, "note": hostile, "batch_id": hostile}
    named = [r.model_copy(update=replaced) for r in view.requests]
    harmless = Page(render(view))
    found = Break(where=hostile, found=hostile, means=hostile)
    changed = view.model_copy(update={"workspace": hostile, "requests": tuple(named), "breaks": (found,)})
    page = render(changed)
    parsed = Page(page)
    shown = re.sub(r"\s+", " ", re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", hostile))
    assert parsed.text.count(shown) >= 4 * len(named) + 4
    # The alert adds elements that a view without breaks lacks; nothing else may appear.
    assert {tag for tag, _ in parsed.tags} <= {tag for tag, _ in harmless.tags}
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", page)
    assert "49{%" not in page


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_request_ids_stay_inside_the_figures(hostile: str) -> None:
    view = lineage()

    def named(name: str) -> str:
        return hostile if name == "TD-1" else name

    steps = []
    for item in view.steps:
        assert item.evaluation is not None
        renamed = tuple(c.model_copy(update={"name": named(c.name)}) for c in item.evaluation.comparisons)
        steps.append(item.model_copy(update={"evaluation": Evaluation(level=LEVEL, comparisons=renamed)}))
    requests = tuple(r.model_copy(update={"request_id": named(r.request_id)}) for r in view.requests)
    page = render(view.model_copy(update={"requests": requests, "steps": tuple(steps)}))
    assert {tag for tag, _ in Page(page).tags} <= {tag for tag, _ in Page(render(view)).tags}
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)


def test_tables_hold_the_values() -> None:
    parsed = Page(render(lineage()))
    assert parsed.row("TD-5", "0.970", "0.199", "v4")[-3:] == ["0.970", "0.199", "0.199"]
    assert parsed.row("v4", "◉ current", "150,871")[5:] == ["3.438", "150,871", "151,233", "2,097,152", "j.doe"]
    assert parsed.row("v3", "□ rolled back", "150,871")[1] == "v2"
    # nll 4.352 + 0.003·5 = 4.367 in the last step
    assert parsed.row("the-ambassadors.txt", "78.8")[-2:] == [f"{math.exp(4.351):.1f}", f"{math.exp(4.367):.1f}"]
    # EM, ES, ROUGE-L, run, each before and after
    assert parsed.row("TD-3", "0.981", "0.781")[1:9] == [
        "0.981",
        "0.160",
        "0.781",
        "0.000",
        "1.000",
        "0.190",
        "38",
        "1",
    ]
    assert parsed.row("TD-4", "repeat", "TD-1")[1:] == [
        "repeat", "0.970", "0.125", "TD-1", "0.710", "0.970", "0.730", "12–3407",
    ]  # fmt: skip
    assert parsed.row("TD-6", "folded", "TD-5")[-1] == "0–9, 10–19, 20–29 and 2 more"
    assert parsed.row("TD-2", "fresh", "TD-1")[-1] == "–", "records of the first release have no places"
    assert parsed.row("retain/anthology.txt")[1:] == ["TD-1", "0.310", "0.350", "0.800", "0.000", "–"]
    assert parsed.row("TD-8", "0")[1:] == ["47", "0", "0.190", "0.020"]
    assert "151,233 of 2,097,152 entries (7.21 %) in 3 tensors" in parsed.text
    assert "3 tensors" in parsed.text and "loss 5.02 → 1.31" in parsed.text


def test_what_was_not_generated_is_a_dash() -> None:
    bare = Comparison(name="TD-1", role="this", before=score(0.9, 0.1, False), after=score(0.1, 4.0, False))
    view = lineage()
    only = view.steps[0].model_copy(update={"evaluation": Evaluation(level=LEVEL, comparisons=(bare,))})
    assert Page(render(view.model_copy(update={"steps": (only,)}))).row("TD-1", "0.900", "54.6")[5:9] == ["–"] * 4


def test_refusal_and_run_without_candidate_are_told() -> None:
    view = lineage()
    idle = view.steps[1].model_copy(
        update={"run_id": "idle", "version": None, "evaluation": None, "verdict": None, "mask": None, "vectors": (),
                "calibrations": ()}
    )  # fmt: skip
    text = Page(render(view.model_copy(update={"steps": (*view.steps, idle)}))).text
    assert "TD-1 (earlier): exact memorisation 0.262 is above 0.214." in text
    assert "Refused; v2 stayed in force." in text
    assert "so no candidate was made" in text
    assert text.index("idle") < text.index("Refused")


def test_breaks_stand_at_the_head() -> None:
    found = Break(where="versions/objects/ab", found="digest differs", means="v2 cannot be restored")
    text = Page(render(lineage(breaks=(found,)))).text
    assert text.index("v2 cannot be restored") < text.index("Summary ✓")
    assert fact(lineage(breaks=(found,)), "Stored evidence")[0] == "bad"
    assert fact(lineage(breaks=None), "Stored evidence")[0] == "open"
    assert fact(lineage(), "Stored evidence")[0] == "good"


# --- what follows from the records ------------------------------------------------------------------------


def test_ancestry_leaves_out_what_was_rolled_back() -> None:
    assert ancestry(lineage(), 4) == (0, 1, 2, 4)
    assert ancestry(lineage(), 3) == (0, 1, 2, 3)
    circular = lineage(versions=(version(1, 2, ()), version(2, 1, ())))
    assert set(ancestry(circular, 2)) == {1, 2}


def test_excluded_requests_follow_the_parents() -> None:
    out = excluded_requests(lineage())
    assert out[0] == frozenset()
    assert out[3] == {"TD-1", "TD-2", "TD-3", "TD-4", "TD-7"}
    assert out[4] == {"TD-1", "TD-2", "TD-3", "TD-4", "TD-5", "TD-6"}


def test_not_memorised_is_not_excluded_whatever_version_it_names() -> None:
    view = lineage()
    named = tuple(r.model_copy(update={"version": 4}) if r.request_id == "TD-8" else r for r in view.requests)
    assert "TD-8" not in excluded_requests(view.model_copy(update={"requests": named}))[4]


def test_scores_come_from_the_published_candidate_and_never_from_a_refused_one() -> None:
    scores = measured_scores(lineage())
    assert scores["TD-1", 0].exact_memorisation == 0.992
    assert scores["TD-1", 2].exact_memorisation == 0.176
    assert scores["TD-5", 2].exact_memorisation == 0.97
    assert scores["TD-1", 4].exact_memorisation == 0.179
    assert ("TD-7", 4) not in scores
    assert all(score.exact_memorisation != 0.262 for score in scores.values())


def test_limits_are_those_of_the_step() -> None:
    view = lineage()
    looser = view.steps[4].model_copy(update={"limits": GateSettings(forget_tolerance=0.1)})
    limits = forget_limits(view.model_copy(update={"steps": (*view.steps[:4], looser)}))
    assert limits == pytest.approx({0: LIMIT, 1: LIMIT, 2: LIMIT, 3: LIMIT, 4: 0.264})


def test_summary_of_a_lineage_in_order() -> None:
    assert fact(lineage(), "Current version") == (
        "good",
        "v4, made from v2, published 2026-11-06 01:42 UTC by j.doe. Not part of its history: v3.",
    )
    mark, words = fact(lineage(), "Forgetting")
    assert mark == "good"
    assert "All 6 requests taken out of v4 are at or below the limit of 0.214" in words
    assert "0.200 (TD-2)" in words and "1 of 6 is at or below the never-seen level itself" in words
    mark, words = fact(lineage(), "Requests")
    assert mark == "bad" and "6 taken out of v4" in words and "1 taken out of a version that v4 was not made" in words
    assert "9 on file" in words
    mark, words = fact(lineage(), "Everything else")
    assert mark == "good" and "mean exact memorisation 0.940, in v0 1.000" in words
    assert "perplexity 78.8, in v0 77.6 (+1.6%)" in words


def test_summary_names_what_came_back() -> None:
    view = lineage()
    worse = view.steps[4].model_copy(
        update={"evaluation": Evaluation(level=LEVEL, comparisons=(
            compared("TD-5", "this", 0.97, 0.19), compared("TD-1", "earlier", 0.17, LIMIT + 1e-6),
            compared("TD-2", "earlier", 0.17, LIMIT)))}
    )  # fmt: skip
    changed = view.model_copy(update={"steps": (*view.steps[:4], worse)})
    mark, words = fact(changed, "Forgetting")
    assert mark == "bad"
    assert "1 of 6 requests taken out of v4 is above the limit" in words and "TD-1 (0.214)" in words
    # TD-4 is a repeat: no version was made to forget a passage of its own, so none is measured on it.
    assert "Not measured on v4: TD-3, TD-6." in words and "no memorised passage of their own: TD-4." in words
    assert "▲ 0.214" in Page(render(changed)).row("TD-1", "The Lighthouse at Penmarron Estate of the author")


def test_summary_says_when_the_level_was_assumed() -> None:
    view = lineage()
    assumed = NeverSeenLevel(mean=0.35, std=0.05, passages=0, source="assumed")
    last = view.steps[4]
    assert last.evaluation is not None
    guessed = last.model_copy(update={"evaluation": last.evaluation.model_copy(update={"level": assumed})})
    mark, words = fact(view.model_copy(update={"steps": (*view.steps[:4], guessed)}), "Forgetting")
    assert mark == "open" and "assumed" in words


def test_summary_of_an_untouched_workspace() -> None:
    assert [f.mark for f in summarise(empty())] == ["good", "open", "open", "open", "open"]
    assert fact(empty(), "Requests")[1] == "None has been received."


def test_missing_manifest_or_measurement_is_not_passed_over() -> None:
    assert fact(lineage(current=9), "Current version")[0] == "bad"
    assert fact(lineage(steps=()), "Forgetting")[0] == "bad"
    Page(render(lineage(current=9)))
    Page(render(lineage(steps=())))


def test_request_that_came_back_is_named() -> None:
    view = lineage()
    back = tuple(
        r.model_copy(update={"state": "regressed", "version": None}) if r.request_id == "TD-7" else r
        for r in view.requests
    )
    mark, words = fact(view.model_copy(update={"requests": back}), "Requests")
    assert mark == "bad" and "1 came back, still to be done" in words and "Came back: TD-7." in words
    page = Page(render(view.model_copy(update={"requests": back})))
    assert "▲ came back, still to be done" in " ".join(page.row("TD-7", "Salt & Iron Estate of the author"))


def only(view: LineageView, **changes: object) -> LineageView:
    """The view without TD-7 and TD-9, with TD-1 changed."""
    kept = (r for r in view.requests if r.request_id not in ("TD-7", "TD-9"))
    return view.model_copy(
        update={"requests": tuple(r.model_copy(update=changes) if r.request_id == "TD-1" else r for r in kept)}
    )


@pytest.mark.parametrize(
    ("changes", "mark", "said"),
    [
        ({}, "good", "6 taken out of v4; 1 not memorised"),
        ({"on_hold": True}, "good", "On legal hold: TD-1."),
        ({"state": "countered"}, "good", "1 taken out of v4, though countered; 5 taken out of v4"),
        ({"state": "countered", "version": None}, "good", "1 countered by a counter-notice; 5 taken out of v4"),
        ({"state": "refused", "version": None}, "open", "1 refused by the gate, still to be done"),
        ({"state": "withdrawn", "decided_at": T0}, "good", "1 withdrawn by the sender"),
        ({"state": "regressed", "version": None}, "bad", "Came back: TD-1."),
    ],
    ids=["verified", "hold", "countered", "countered early", "refused", "withdrawn", "regressed"],
)
def test_summary_of_requests_follows_their_states(changes: dict[str, object], mark: str, said: str) -> None:
    found, words = fact(only(lineage(), **changes), "Requests")
    assert found == mark and said in words


def test_released_request_binds_no_version_that_was_published_later() -> None:
    released = T0 + timedelta(days=2, hours=5)  # after v2, before v3
    view = only(lineage(), state="reinstated", version=None, decided_at=released)
    out = excluded_requests(view)
    assert "TD-1" in out[1] and "TD-1" in out[2] and "TD-1" not in out[3] and "TD-1" not in out[4]
    assert [c.meant for c in rechecks(view)["TD-1"]] == [False, True, True, False, False]


def test_rechecks_have_every_version_that_was_or_should_have_been_measured() -> None:
    found = rechecks(lineage())
    told = [(c.version.version, c.score and c.score.exact_memorisation, c.meant, c.over) for c in found["TD-1"]]
    assert told == [
        (0, 0.992, False, False), (1, 0.181, True, False), (2, 0.176, True, False), (3, 0.19, True, False),
        (4, 0.179, True, False),
    ]  # fmt: skip
    assert [c.version.version for c in found["TD-5"]] == [2, 4] and found["TD-9"] == ()
    # Nothing is known of v3 without its step, though it is meant to exclude TD-1; TD-4 is never measured by itself.
    view = lineage()
    less = rechecks(view.model_copy(update={"steps": (*view.steps[:2], *view.steps[3:])}))
    assert [(c.version.version, c.score is None) for c in less["TD-1"]][3] == (3, True)
    assert all(c.score is not None for c in less["TD-4"])
    assert measured_requests(view) == {"TD-1", "TD-2", "TD-3", "TD-5", "TD-6", "TD-7"}


def test_what_is_above_its_limit_is_alarmed_in_the_section_of_the_request() -> None:
    view = lineage()
    worse = view.steps[4].model_copy(
        update={"evaluation": Evaluation(level=LEVEL, comparisons=(compared("TD-1", "earlier", 0.17, 0.4),))}
    )
    changed = view.model_copy(update={"steps": (*view.steps[:4], worse)})
    assert rechecks(changed)["TD-1"][-1].over
    page = Page(render(changed))
    assert page.row("v4 ◉", "0.400")[-1] == "▲ above the limit although taken out"
    assert [r for r in page.rows if r[-1] == "▲ not measured"]  # the others, on v4


def test_curves_follow_the_line_that_is_in_force() -> None:
    found = trend(lineage())
    assert found is not None and found.versions == (0, 1, 2, 4)
    assert found.forget == (None, 0.201, 0.188, 0.2)
    assert found.kept == pytest.approx((1.0, 0.98, 0.97, 0.94))
    assert found.held == pytest.approx((4.351, 4.355, 4.358, 4.367))
    assert found.limit == pytest.approx(LIMIT) and trend(empty()) is None
    assert Page(render(lineage())).row("v2", "0.188", "4.3580")[1:] == ["0.188", "0.214", "0.970", "4.3580"]


# --- the parts of the page --------------------------------------------------------------------------------


def articles(page: str, kind: str = "request") -> list[str]:
    return re.findall(rf'<article class="{kind}".*?</article>', page, re.DOTALL)


def test_every_request_has_a_section_that_the_register_links_to() -> None:
    view = only(lineage(), on_hold=True)
    page = render(view)
    sections = articles(page)
    assert len(sections) == len(view.requests)
    for number, (item, section) in enumerate(zip(view.requests, sections, strict=True), 1):
        assert f'<a href="#request-{number}"><bdi class="untrusted">{item.request_id}<' in page
        assert section.startswith(f'<article class="request" id="request-{number}"')
        said = Page(section)
        assert item.request_id in said.text and item.title.replace("  ", " ") in said.text
        for e in item.events:
            assert said.row(str(e.seq))[-1] == (e.note or "–")
        assert item.planned is not None and f"ledger entry {item.planned.seq}, " in said.text
        assert ("■ on legal hold" in said.text) == (item.request_id == "TD-1")
    first = Page(sections[0])
    assert first.row("Exact memorisation")[1:] == ["0.992", "0.181", "0.214"]
    assert first.row("Longest common run, in words")[1:3] == ["39", "1"]
    assert "EM ≤ never-seen level + 0.05" in first.text and "v1 first, and so by v4" in first.text


def test_request_whose_version_was_left_says_so() -> None:
    section = Page(articles(render(lineage()))[6])
    assert "▲ v4, which is in force, was not made from it" in section.text


@pytest.mark.parametrize(("view", "is_open"), [(lineage(), True), (large(14, 26), False)], ids=["few", "many"])
def test_many_requests_are_closed_on_screen_and_open_in_print(view: LineageView, is_open: bool) -> None:
    page = render(view)
    for section in (*articles(page), *articles(page, "step")):
        assert ("<details open>" in section) == is_open
    style = page[page.index("<style>") : page.index("</style>")]
    screen, print_ = style.split("@media print {")
    assert "details::details-content { content-visibility: visible" in print_
    assert "article:target > details::details-content { content-visibility: visible" in screen
    assert "article.request + article.request { break-before: page; }" in print_ and "size: A4" in print_


def test_long_lineage_stays_small_enough_to_use() -> None:
    view = large(40, 500)
    page = render(view)
    assert len(articles(page)) == 500
    assert len(page.encode()) < 4_000_000
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ET.fromstring(svg)
        # What a printed A4 page holds; wider ones would be scaled until nobody can read them.
        assert float(root.attrib["height"]) < 1000 and float(root.attrib["width"]) < 850


def test_every_measurement_stands_in_one_block_of_the_matrix() -> None:
    view = large(30, 60)
    page = render(view)
    blocks = [ET.fromstring(s) for s in re.findall(r"<svg[^>]*><title>Persistence.*?</svg>", page, re.DOTALL)]
    svg = "{http://www.w3.org/2000/svg}"
    cells = [e for root in blocks for e in root.iter(f"{svg}text") if re.fullmatch(r"▲?\d\.\d{3}", e.text or "")]
    inside = [e for e in cells if e.get("fill") != "#57606a"]  # not those of the line of limits
    assert len(blocks) > 3 and len(inside) == len(measured_scores(view))


def test_step_lists_the_earlier_requests_that_it_remembers_best() -> None:
    view = large(14, 40)
    last = max(view.steps, key=lambda s: len(s.evaluation.of("earlier")) if s.evaluation else 0)
    assert last.evaluation is not None
    earlier = sorted((c.after.exact_memorisation for c in last.evaluation.of("earlier")), reverse=True)
    (section,) = (s for s in articles(render(view), "step") if f'run <bdi class="mono">{last.run_id}<' in s)
    assert f"Taken out earlier: the 25 of {len(earlier)} that it knows best" in Page(section).text
    rows = re.findall(r"Taken out earlier.*?</tbody>", section, re.DOTALL)[0]
    assert rows.count("<tr>") == 25 and f"{earlier[24]:.3f}" in rows


def test_chronicle_tells_what_was_done_to_history() -> None:
    assert Page(render(lineage())).row("17", "rolled back")[2:] == [
        "rolled back", "–", "v2", "j.doe", "from v3; brings back TD-7, on an override; reason: mistake",
    ]  # fmt: skip
    assert "No version was rolled back or purged" in Page(render(empty())).text


def test_storage_is_summed_and_purged_or_missing_versions_are_told() -> None:
    text = Page(render(lineage())).text
    assert "5 versions in 16.9 GB; whole copies would take 80.3 GB, so the store holds 21 % of that." in text
    kinds = (stored(0, "purged"), stored(1, "purged"), stored(2, "whole"), stored(3, "missing"), stored(4))
    text = Page(render(lineage(storage=kinds))).text
    assert "2 versions in 16.3 GB" in text and "Of 2 purged versions only the proof is kept." in text
    assert "▲ Something that 1 version needs is missing." in text


def test_commands_bear_the_numbers_of_the_lineage() -> None:
    page = render(lineage())
    found = [html.unescape(c) for c in re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL)]
    assert found == [
        "takedown -w WORKSPACE verify --deep",
        CHECKPOINT,
        "takedown -w WORKSPACE verify --checkpoint FILE",
        LOG_KEY,
        "takedown -w WORKSPACE checkout v4 DIR\n"
        "model_signing verify key DIR --signature DIR/model.sig --public_key WORKSPACE/keys/model.pub",
        "sha256sum WORKSPACE/keys/model.pub\n" + "5d" * 32,
        "takedown -w WORKSPACE show v4 --json\ncd DIR && sha256sum *",
        "takedown -w WORKSPACE certificate TD-1 --out DIR\npython DIR/verify_bundle.py DIR",
    ]
    parsed = Page(page)
    assert parsed.row("model.safetensors")[1:] == ["16,059,999,267", "e9" * 32]
    assert "That a claim was justified, or that this is enough before the law." in parsed.text


def test_request_in_a_command_is_a_word_of_the_shell() -> None:
    view = only(lineage(), request_id="$(touch x); TD'1", version=1)
    found = html.unescape(render(view))
    assert "certificate '$(touch x); TD'\"'\"'1' --out DIR" in found
    assert "certificate REQUEST --out DIR" in render(empty())


def test_page_says_when_checkpoint_and_keys_cannot_be_read() -> None:
    page = Page(render(lineage(log=LogView(entries=46, checkpoint=None, log_key=None, model_key=None))))
    assert "▲ The newest checkpoint cannot be read or does not hold" in page.text
    assert "verify --checkpoint FILE" in page.text and CHECKPOINT.split("\n")[2] not in page.text


def test_lost_runs_are_shown_as_damaged() -> None:
    view = lineage()
    gone = LostStep(run_id="run-4", at=T0, outcome="accepted", version=4, found="evidence 'evaluate' is damaged")
    changed = view.model_copy(update={"steps": view.steps[:4], "lost": (gone,)})
    page = Page(render(changed))
    assert page.row("run-4")[1:] == ["2026-11-02 01:30 UTC", "accepted, v4", "evidence 'evaluate' is damaged"]
    assert "▲ Records damaged: run-4." in page.text
    assert fact(changed, "Stored evidence") == (
        "bad",
        "Re-checked for this page: ledger, checkpoints, versions, weights and signatures match. "
        "The records of 1 run cannot be read: run-4.",
    )
    assert fact(changed, "Forgetting") == ("bad", "No measurement of v4 can be read.")
    assert fact(changed, "Everything else") == ("bad", "No measurement of v4 can be read.")


def test_version_without_manifest_is_marked() -> None:
    view = lineage()
    page = Page(render(view.model_copy(update={"storage": view.storage[1:]})))
    assert page.row("v0", "untouched model")[3] == "● superseded ▲ manifest not readable"


# --- for every reader -------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [lineage(), empty(), large(14, 26)], ids=["full", "empty", "large"])
def test_page_can_be_read_without_seeing_it(view: LineageView) -> None:
    page = render(view)
    parsed = Page(page)
    assert ("html", {"lang": "en"}) in parsed.tags
    body = [tag for tag, _ in parsed.tags]
    skip = next(a for tag, a in parsed.tags if tag == "a")
    assert skip == {"class": "skip", "href": "#summary"} and body.count("main") == body.count("h1") == 1
    levels = [int(tag[1]) for tag in body if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(then <= now + 1 for now, then in pairwise(levels))
    for table in re.findall(r"<table.*?</table>", page, re.DOTALL):
        assert re.match(r"<table[^>]*>\s*<caption[^>]*>[^<]+</caption>", table)
        assert all("scope=" in head for head in re.findall(r"<th[^>e][^>]*>", table))
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ET.fromstring(svg)
        assert root.get("role") == "img" and len(root[0].text or "") > 5 and len(root[1].text or "") > 5
    # What scrolls can be reached with the keyboard and has a name.
    for _, attributes in parsed.tags:
        if attributes.get("class") == "wide":
            assert attributes.get("tabindex") == "0" and attributes.get("aria-label")


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_text_has_enough_contrast() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    page = render(lineage())
    style = page[page.index("<style>") : page.index("</style>")]
    named = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", style))
    inks = {named.get(v, v) for v in re.findall(r"[{; ]color: (?:var\(--)?(#?\w+)", style)} - {"inherit", "transparent"}
    assert {named["ink"], named["muted"], named["alarm"], named["accent"]} <= inks
    grounds = ["#ffffff", named["faint"], "#eef3f9"]
    assert all(contrast(ink, ground) >= 4.5 for ink in inks for ground in grounds)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        for fill in re.findall(r'<text[^>]* fill="(#[0-9a-f]{6})"', svg):
            assert contrast(fill, "#ffffff") >= 4.5 or fill == "#ffffff"  # white stands on the alarm's red
    assert contrast("#ffffff", named["alarm"]) >= 4.5


# --- events in words --------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False) | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
known_keys = (
    "batch_id", "before", "after", "limit", "similar", "memorised", "passages", "exact_memorisation", "reasons",
    "brought_back", "left", "reason", "versions", "bytes", "bytes_before", "bytes_after", "cause",
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["received", "verified", "applied", "refused", "rolled-back", "purged", "repacked", "hold"]),
    data=st.dictionaries(st.sampled_from(known_keys), values, max_size=8),
)
def test_any_event_can_be_told_and_nothing_unknown_is(kind: str, data: dict[str, object]) -> None:
    told = Event(kind=kind, actor="x", data=data)
    note = event_note(told)
    more = {**data, "text": "CONFIDENTIAL", "contact": "CONFIDENTIAL", "commitment": "CONFIDENTIAL"}
    assert event_note(told.model_copy(update={"data": more})) == note


def test_events_are_told_in_words() -> None:
    def told(kind: str, **data: object) -> str:
        return event_note(Event(kind=kind, actor="x", data=data))

    assert told("received", batch_id="b-1", received_at="x", commitment="y") == "batch b-1"
    assert (
        told("verified", before={"exact_memorisation": 0.9}, after={"exact_memorisation": 0.2}, limit=0.25)
        == "exact memorisation 0.900 → 0.200; limit 0.250"
    )
    assert told("applied", memorised=4, passages=5, exact_memorisation=0.91, similar=0) == (
        "4 of 5 passages memorised; exact memorisation 0.910"
    )
    assert told("repeat", similar=2, evidence=[{"request_id": "A"}]) == "resembles 2 other texts"
    assert told("refused", reasons=["A (this): above.", "Kept works: below."]) == "A (this): above; Kept works: below"
    assert told("rolled-back", left=4, brought_back=["A"], reason="error") == (
        "from v4; brings back A, on an override; reason: error"
    )
    assert told("purged", versions=[0, 1], bytes=1_500_000, reason="law") == (
        "weights of v0, v1; 1.50 MB destroyed; reason: law"
    )
    assert told("repacked", bytes_before=2_000_000, bytes_after=30_000) == "2.00 MB → 30.0 kB"
    assert told("regressed", cause="measured on v5") == "cause: measured on v5"


@given(st.integers(0, 10**18))
def test_sizes_keep_three_digits(nbytes: int) -> None:
    value, unit = size(nbytes).replace(",", "").split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}[unit]
    assert float(value) * scale == pytest.approx(nbytes, rel=0.005, abs=0.5)
    assert unit == "PB" or len(value) <= 4  # three digits and a point


def test_numbers_are_written_out() -> None:
    assert [perplexity(x) for x in (0.0, 4.351, 20.0, 5000.0, None)] == ["1.0", "77.6", "4.85e+08", "e^5000", "–"]
    assert [share(1, 3), share(0, 0), share(2, 2)] == ["33.3 %", "–", "100 %"]


def test_reading_side_stays_light() -> None:
    code = "import sys, pipeline.report; print(sorted({'torch', 'transformers', 'prefect'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# --- from a workspace -------------------------------------------------------------------------------------

CONTACT = "someone@holder.example"


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """v1 without A and B, v2 without D, rolled back to v1, v3 without E; A is on hold. Only read."""
    folder = tmp_path_factory.mktemp("report")
    workspace = workspaces.copied(workspaces.published(folder), folder / "forked")
    workspaces.take_in(workspace, "batch-2", {"D": workspaces.WORKS["two"]}, contact=CONTACT)
    assert workspaces.step(workspace) is not None
    roll_back(workspace, 1, "counsel", "served by mistake", override=True)
    workspaces.take_in(workspace, "batch-3", {"E": workspaces.WORKS["three"]})
    assert workspaces.step(workspace, ["E"]) is not None
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(Event(kind="hold", actor="counsel", request_id="A", data={"reason": "litigation"}))
    return workspace


@pytest.fixture
def damaged(forked: Workspace, tmp_path: Path) -> Workspace:
    """A copy to damage."""
    return workspaces.copied(forked.root, tmp_path / "damaged")


@pytest.fixture(scope="module")
def view(forked: Workspace) -> LineageView:
    return lineage_view(forked, verify(forked))


def test_view_of_a_workspace_says_what_happened(view: LineageView) -> None:
    assert [(v.version, v.parent, v.status) for v in view.versions] == [
        (0, None, "superseded"), (1, 0, "superseded"), (2, 1, "rolled back"), (3, 1, "current"),
    ]  # fmt: skip
    assert {v.published_by for v in view.versions} == {"tester"} and view.breaks == ()
    states = {r.request_id: (r.state, r.version, r.on_hold) for r in view.requests}
    assert states == {
        "A": ("verified", 1, True), "B": ("verified", 1, False), "C": ("not-memorised", None, False),
        "D": ("regressed", None, False), "E": ("verified", 3, False),
    }  # fmt: skip
    assert [(e.kind, e.version, e.request_id) for e in view.chronicle] == [
        ("rolled-back", 1, None), ("hold", None, "A"),
    ]  # fmt: skip
    assert view.chronicle[0].note == "from v2; brings back D, on an override; reason: served by mistake"
    for item in view.requests:
        assert item.before is not None and item.after is not None and item.planned is not None
        assert item.events[0].kind == "received"
        decided = next(e for e in item.events if e.kind == item.decision)
        assert item.planned.seq < decided.seq and item.planned.limits.forget_tolerance == 0.05
        assert (item.limit is None) == (item.request_id == "C")
        assert item.limit is None or item.after.exact_memorisation <= item.limit + 1e-9
    assert next(r.note for r in view.requests if r.request_id == "B") == "with A (characters 0–222, 231–455)"
    assert [(c.version.version, c.meant) for c in rechecks(view)["A"]] == [(0, False), (1, True), (2, True), (3, True)]
    marks = {f.label: f.mark for f in summarise(view)}
    assert marks == {"Current version": "good", "Requests": "bad", "Forgetting": "good", "Everything else": "good",
                     "Stored evidence": "good"}  # fmt: skip


def test_storage_view_counts_every_byte_of_the_versions_once(forked: Workspace, view: LineageView) -> None:
    store = VersionStore(forked.versions)
    evidence = {store.objects.object_path(digest) for digest in all_evidence(read_entries(forked))}
    files = {p for p in forked.versions.rglob("*") if p.is_file()} - evidence
    assert sum(s.added or 0 for s in view.storage) == sum(p.stat().st_size for p in files)
    assert [s.kind for s in view.storage] == ["whole", "delta", "delta", "delta"]
    for item in view.storage:
        assert item.whole == sum(f.size for f in store.manifest(item.version).files)
    assert view.files == store.manifest(3).files


def test_storage_view_follows_repack_and_purge(damaged: Workspace) -> None:
    with Ledger.open(damaged.ledger) as ledger:
        ledger.append(Event(kind="released", actor="counsel", request_id="A"))
    repack(damaged, 1, "admin")
    assert [s.kind for s in lineage_view(damaged, None).storage] == ["whole"] * 4
    purge(damaged, 2, "admin", "kept long enough")
    found = lineage_view(damaged, verify(damaged))
    assert found.breaks == ()
    assert [s.kind for s in found.storage] == ["purged", "purged", "whole", "whole"]
    store = VersionStore(damaged.versions)
    evidence = {store.objects.object_path(digest) for digest in all_evidence(read_entries(damaged))}
    files = {p for p in damaged.versions.rglob("*") if p.is_file()} - evidence
    assert sum(s.added or 0 for s in found.storage) == sum(p.stat().st_size for p in files)
    assert [v.status for v in found.versions] == ["purged", "purged", "rolled back", "current"]
    assert [e.kind for e in found.chronicle] == ["rolled-back", "hold", "released", "repacked", "purged"]
    assert "✕ purged" in Page(render(found)).row("v1", "v0", "A, B")


def test_printed_checkpoint_is_a_checkpoint_that_verify_takes(
    forked: Workspace, view: LineageView, tmp_path: Path
) -> None:
    (note,) = re.findall(r'<pre id="checkpoint">(.*?)</pre>', render(view), re.DOTALL)
    kept = tmp_path / "kept"
    kept.write_text(html.unescape(note), encoding="utf-8")
    assert kept.read_bytes() == forked.checkpoint.read_bytes()
    assert verify(forked, Depth.QUICK, [kept]) == []
    assert digest_file(forked.keys / "model.pub") == view.log.model_key
    assert view.log.entries == int(note.splitlines()[1])


def test_page_holds_no_text_and_no_contact(view: LineageView) -> None:
    page = render(view)
    for text in (*workspaces.WORKS.values(), *workspaces.RETAIN.values(), workspaces.UNSEEN):
        words = text.split()
        assert not any(" ".join(words[i : i + 4]) in page for i in range(len(words) - 3))
    assert CONTACT not in page and CONTACT not in view.model_dump_json()


@pytest.mark.parametrize("harm", ["missing", "other bytes", "not a record"])
@pytest.mark.parametrize("name", ["plan", "dedupe", "screen", "saliency", "unlearn", "repair", "evaluate", "gate"])
def test_damaged_record_costs_its_step_and_no_more(damaged: Workspace, view: LineageView, name: str, harm: str) -> None:
    entry = list(decisions(read_entries(damaged)).values())[1]
    path = VersionStore(damaged.versions).objects.object_path(evidence_of(entry)[name])
    path.chmod(0o644)
    if harm == "missing":
        path.unlink()
    elif harm == "other bytes":
        first, *rest = path.read_bytes()  # some byte: not every record has a certain one
        path.write_bytes(bytes([first ^ 1, *rest]))
    else:
        path.write_bytes(b"[" * 100_000)
    breaks = verify(damaged, Depth.QUICK if harm == "missing" else Depth.FULL)
    found = lineage_view(damaged, breaks)
    assert [s.run_id for s in found.lost] == [entry.event.run_id] and found.lost[0].version == 2
    assert found.steps == (view.steps[0], view.steps[2])
    # What the ledger says by itself is still there.
    before, after = next((r.before, r.after) for r in view.requests if r.request_id == "D")
    assert (before, after) == next((r.before, r.after) for r in found.requests if r.request_id == "D")
    page = Page(render(found))
    assert f"▲ Records damaged: {entry.event.run_id}." in page.text
    assert any(f"evidence '{name}'" in b.where for b in breaks)
    assert f"evidence '{name}'" in page.text[: page.text.index("Summary ✓")]


def test_lost_manifest_costs_its_numbers_and_no_more(damaged: Workspace, view: LineageView) -> None:
    VersionStore(damaged.versions).manifest_path(1).unlink()
    found = lineage_view(damaged, verify(damaged))
    lost, kept = found.versions[1], view.versions[1]
    assert (lost.root, lost.parent, lost.requests) == (kept.root, kept.parent, kept.requests)
    assert lost.changed is None and [s.version for s in found.storage] == [0, 2, 3]
    assert "▲ manifest not readable" in " ".join(Page(render(found)).row("v1", "v0", "A, B"))
    assert excluded_requests(found) == excluded_requests(view)


def test_lost_weights_are_shown_as_missing(damaged: Workspace) -> None:
    store = VersionStore(damaged.versions)
    weights = next(f for f in store.manifest(2).files if f.path.endswith(".safetensors"))
    store.objects.paths(weights.digest)[-1].unlink()
    found = lineage_view(damaged, verify(damaged, Depth.QUICK))
    assert [s.kind for s in found.storage] == ["whole", "delta", "missing", "delta"]
    assert "▲ Something that 1 version needs is missing." in Page(render(found)).text


def test_lost_vault_and_keys_leave_a_page(damaged: Workspace) -> None:
    for path in (*damaged.vault.glob("*.json"), damaged.keys / "log.pub", damaged.keys / "model.pub"):
        path.unlink()
    (damaged.keys / "log.pub").symlink_to("log.pub")  # as for a reader who may not look into the folder
    found = lineage_view(damaged, verify(damaged))
    assert {r.title for r in found.requests} == {
        "(not in the vault, not readable, or not what the ledger committed to)"
    }
    assert (found.log.checkpoint, found.log.log_key, found.log.model_key) == (None, None, None)
    assert "▲ The newest checkpoint cannot be read or does not hold" in Page(render(found)).text


def test_title_beside_a_text_that_was_exchanged_is_not_shown(damaged: Workspace) -> None:
    vault = Vault(damaged.vault)
    name = vault.ids()[0]
    kept = vault.get(name)
    vault.put(kept.model_copy(update={"text": "other words", "title": "Exchanged"}), replace=True)
    found = lineage_view(damaged, None)
    shown = {r.request_id: r.title for r in found.requests}
    assert shown[name] == "(not in the vault, not readable, or not what the ledger committed to)"
    assert len(set(shown.values())) > 1 and "Exchanged" not in render(found)


def test_forged_checkpoint_is_never_printed(damaged: Workspace) -> None:
    with closing(sqlite3.connect(damaged.ledger)) as ledger, ledger:
        ledger.execute("DROP TRIGGER checkpoints_no_update")
        ledger.execute(
            "UPDATE checkpoints SET note = replace(note, char(10) || size || char(10), char(10) || '9' || size)"
        )
    with pytest.raises(StoreDamaged, match="its newest checkpoint does not hold"):
        lineage_view(damaged, verify(damaged, Depth.QUICK))


def test_ledger_that_does_not_hold_is_no_report(damaged: Workspace) -> None:
    with closing(sqlite3.connect(damaged.ledger)) as ledger, ledger:
        ledger.execute("DROP TRIGGER entries_no_update")
        ledger.execute("UPDATE entries SET event = replace(event, 'tester', 'nobody') WHERE seq = 3")
    with pytest.raises(StoreDamaged, match="does not hold"):
        lineage_view(damaged, verify(damaged, Depth.QUICK))
