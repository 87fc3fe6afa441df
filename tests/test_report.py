"""The report page: what it says follows from its records, and nothing in them can break out of it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest

from pipeline.records import (
    Break,
    Calibration,
    Comparison,
    CurvePoint,
    DedupeDecision,
    DedupeReport,
    Evaluation,
    Evidence,
    FileRef,
    MaskReport,
    NeverSeenLevel,
    PassageSpan,
    RetainExclusion,
    ScreenedRequest,
    ScreenReport,
    TextScore,
    VectorReport,
    Verdict,
)
from pipeline.report import (
    LineageView,
    RequestView,
    StepView,
    VersionView,
    ancestry,
    excluded_requests,
    forget_limits,
    measured_scores,
    perplexity,
    render,
    share,
    summarise,
)
from pipeline.settings import GateSettings

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
        requests=requests,
        selected=None if first else 151_233,
        changed=None if first else 150_871,
        total=None if first else 2_097_152,
        alpha=None if first else 3.4375,
        status="current" if current else "superseded",
    )


def request(
    number: int, title: str, state: str, at: int | None, em: tuple[float, float] | None = None, note: str = ""
) -> RequestView:
    return RequestView(
        request_id=f"TD-{number}",
        title=title,
        rights_holder="Estate of the author",
        batch_id=f"2026-11-batch-{(number + 1) // 2}",
        received_at=T0 + timedelta(days=(number + 1) // 2),
        state=state,
        version=at,
        before=score(em[0], 0.06) if em else None,
        after=score(em[1], 4.4) if em else None,
        note=note,
    )


def lineage(**changes: object) -> LineageView:
    """Five versions with a refusal, a repeat, a near-copy, a text never memorised, and v3 rolled back."""
    slight = Evidence(request_id="TD-1", jaccard=0.03, containment=0.05, contained=0.06)
    repeat = Evidence(request_id="TD-1", jaccard=0.71, containment=0.97, contained=0.73)
    folded = Evidence(request_id="TD-5", jaccard=0.88, containment=0.95, contained=0.92)
    steps = (
        step(1, 0, 1, (compared("TD-1", "this", 0.992, 0.181), compared("TD-2", "this", 0.967, 0.201)),
             (fresh("TD-1"), fresh("TD-2", slight))),
        step(2, 1, 2, (compared("TD-3", "this", 0.981, 0.160), compared("TD-4", "repeat", 0.184, 0.171),
                       compared("TD-1", "earlier", 0.181, 0.176), compared("TD-2", "earlier", 0.201, 0.188)),
             (fresh("TD-3"), DedupeDecision(request_id="TD-4", verdict="repeat", covered=0.97, evidence=(repeat,)))),
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
        request(1, "The Lighthouse at Penmarron", "applied", 1, (0.992, 0.181)),
        request(2, "Letters to a Gardener, in three volumes, with an introduction", "applied", 1, (0.967, 0.201)),
        request(3, "Ночь над рекой", "applied", 2, (0.981, 0.160)),
        request(4, "The Lighthouse at Penmarron (school edition)", "repeat", 1, (0.184, 0.171), "covered by TD-1"),
        request(5, "A Winter Ledger", "applied", 4, (0.97, 0.199)),
        request(6, "A Winter Ledger, abridged", "folded", 4, (0.93, 0.187), "with TD-5"),
        request(7, "Salt & Iron", "applied", 3, (0.94, 0.205), "notice countered; v3 was rolled back"),
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
            version(3, 2, ("TD-7",)), version(4, 2, ("TD-5", "TD-6"), current=True),
        ),
        requests=requests,
        steps=steps,
        breaks=(),
    )  # fmt: skip
    return view.model_copy(update=changes)


def empty() -> LineageView:
    """A workspace right after ``takedown init``."""
    return lineage(current=0, versions=(version(0, None, (), current=True),), requests=(), steps=(), breaks=None)


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

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
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
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
    assert parsed.row("v4", "current")[5:] == ["3.438", "150,871", "151,233", "2,097,152"]
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
    assert parsed.row("TD-4", "repeat", "TD-1")[1:] == ["repeat", "0.970", "TD-1", "0.710", "0.970", "0.730"]
    assert parsed.row("retain/anthology.txt")[1:] == ["TD-1", "0.310", "0.350", "0.800"]
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
        "v4, made from v2, published 2026-11-06 01:42 UTC. Not part of its history: v3.",
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
    assert "Not measured on v4: TD-3, TD-4, TD-6" in words
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


def test_numbers_are_written_out() -> None:
    assert [perplexity(x) for x in (0.0, 4.351, 20.0, 5000.0, None)] == ["1.0", "77.6", "4.85e+08", "e^5000", "–"]
    assert [share(1, 3), share(0, 0), share(2, 2)] == ["33.3 %", "–", "100 %"]


def test_reading_side_stays_light() -> None:
    code = "import sys, pipeline.report; print(sorted({'torch', 'transformers', 'prefect'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
