"""Deduplication: exact numbers against brute force, verdicts and spans, the index on disk, recall of excerpts."""

from __future__ import annotations

import json
import random
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from datasketch import LeanMinHash, MinHash
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.dedupe import compare, dedupe, exclude_retain
from pipeline.errors import NoSpace, StoreDamaged, UsageError, WorkspaceBusy
from pipeline.index import DedupeIndex
from pipeline.normalise import words
from pipeline.records import DedupeDecision, TakedownRequest
from pipeline.settings import DedupeSettings
from pipeline.shingles import DedupeParameters, WindowTable, fingerprint, shingle, sign

PARAMETERS = DedupeParameters()
SETTINGS = DedupeSettings()

FERRY = (
    "The ferry had two captains and they did not speak. One took her out in the morning, when the lake lay flat and "
    "grey, and the other brought her home after dark with the lamps lit along the rail. Between them they kept a "
    "slate in the wheelhouse, and whatever had to be said was said in chalk: the port engine runs hot, mind the new "
    "buoy off the mill, somebody has been at the sugar. The deckhand wiped it clean every Sunday. He was the only "
    "one aboard who knew that both men, each certain he was alone in it, corrected the other's spelling."
)
ORCHARD = (
    "My aunt pruned the pear trees in February with a saw her father had bent on purpose. You were not to watch her "
    "while she did it. She talked to the branches the whole time, low and reasonable, as if explaining to a child why "
    "the party was over, and when a limb came down she said thank you and stacked it with the rest. By April nobody "
    "could tell which cuts were hers and which were the winter's. The pears came small and hard that year and she "
    "was proud of every one, and gave them away in paper bags with the stems all pointing north."
)
CLOCK = (
    "Nobody in the office would admit to winding the clock, yet it never stopped. Accounts believed it was the night "
    "porter. The porter believed in a society of retired clerks with keys. When the building was sold the new owners "
    "had it opened, and behind the dial they found a card on which thirty-one people had signed their initials, each "
    "beside a date, each apparently believing that the others had died. The last entry was from that very Tuesday."
)
CHINESE = (
    "老船长每天清晨都要到码头上走一圈，看看潮水退到哪块石头。他说石头比日历可靠，因为石头从来不会骗人。"
    "镇上的孩子跟在他后面，数他在木板上留下的脚印，数到一百就跑回家吃早饭。"
)
THAI = "คุณยายเก็บกระป๋องเก่าไว้ใต้บันไดทุกใบ เพราะเชื่อว่าวันหนึ่งฝนจะตกลงมาในบ้าน และคนทั้งซอยจะต้องมาขอยืมกระป๋องของแก"
ARABIC = (
    "كان الحارس القديم يعدّ السفن التي تدخل الميناء كل مساء ويكتب أسماءها في دفتر صغير لا يقرؤه أحد غيره "
    "وحين سألوه لماذا يفعل ذلك قال إن البحر ينسى وأنا لا أنسى"
)
HINDI = (
    "नदी के किनारे वाली दुकान में बूढ़ा दर्जी हर शाम पुराने कपड़ों के टुकड़े जोड़कर पतंग बनाता था और बच्चों से कहता था "
    "कि हवा को भी कपड़े की ज़रूरत होती है वरना वह ठंड से काँपने लगती है"
)

SYLLABLES = [a + b for a in ("ba", "do", "ki", "lu", "me", "no", "ra", "si", "tu", "ve") for b in "lmnrst"]


def generated(seed: int, count: int) -> list[str]:
    """Words of a made-up language with a skewed vocabulary of a few thousand, so that chance overlap occurs."""
    rng = random.Random(seed)
    return [
        rng.choice(("the", "and", "of", "a")) if rng.random() < 0.25 else "".join(rng.choices(SYLLABLES, k=2))
        for _ in range(count)
    ]


def edited(text_words: list[str], rate: float, rng: random.Random) -> list[str]:
    """Replace words at random."""
    return ["zzz" if rng.random() < rate else word for word in text_words]


def request(request_id: str, text: str) -> TakedownRequest:
    return TakedownRequest(
        request_id=request_id, title="T", rights_holder="R", basis="copyright", batch_id="b",
        received_at=datetime(2026, 11, 23, tzinfo=UTC), text=text,
    )  # fmt: skip


@pytest.fixture
def index(tmp_path: Path) -> Iterator[DedupeIndex]:
    with DedupeIndex.open(tmp_path) as opened:
        yield opened


def decide(index: DedupeIndex, *texts: str) -> list[DedupeDecision]:
    return list(dedupe([request(f"N{i}", text) for i, text in enumerate(texts)], index, SETTINGS))


# --- shingles and signatures ------------------------------------------------------------------------------


def brute(text: str) -> set[tuple[str, ...]]:
    """Word trigrams as tuples, no hashes."""
    found = [word.text for word in words(text)]
    if not found:
        return set()
    return {tuple(found[i : i + 3]) for i in range(max(1, len(found) - 2))}


def test_fingerprint_is_the_same_everywhere() -> None:
    # Golden: a change makes every index on disk unreadable and needs a new name in DedupeParameters.fingerprint.
    assert fingerprint("the ferry had") == 0xCBD3CCE6228B1E06


LATIN = st.lists(st.sampled_from(["a", "b", "c", "d", "Don’t", "é"]), max_size=40).map(" ".join)


@given(LATIN, LATIN)
@hypothesis_settings(max_examples=200, deadline=None)
def test_overlap_equals_brute_force(left: str, right: str) -> None:
    a, b = shingle(left, PARAMETERS).prints, shingle(right, PARAMETERS).prints
    assert (len(a), len(b)) == (len(brute(left)), len(brute(right)))
    if len(a) and len(b):
        shared = len(brute(left) & brute(right))
        found = compare("x", a, b)
        assert found.jaccard == shared / len(brute(left) | brute(right))
        assert (found.containment, found.contained) == (shared / len(a), shared / len(b))


@given(st.text(st.sampled_from(list("ab天地玄黄 ไท,।है")), max_size=60))
@hypothesis_settings(max_examples=200, deadline=None)
def test_every_word_lies_in_a_shingle(text: str) -> None:
    found = shingle(text, PARAMETERS)
    assert len(found.spans) == len(words(text))
    assert (len(found.sequence) == 0) == (len(found.spans) == 0)
    held = np.zeros(len(found.spans), dtype=bool)
    for start, end in enumerate(found.ends):
        assert start < end <= len(found.spans)
        held[start:end] = True
    assert held.all()


@pytest.mark.parametrize(("count", "shingles"), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2)])
def test_short_texts(count: int, shingles: int) -> None:
    assert len(shingle(" ".join("wxyz"[:count]), PARAMETERS).sequence) == shingles


@pytest.mark.parametrize("count", [1, 3, 98, 99, 147, 148, 500])
def test_windows_cover_everything_with_overlap(count: int) -> None:
    text = shingle(" ".join(generated(1, count + 2)), PARAMETERS)
    windows = text.windows(PARAMETERS)
    assert np.array_equal(np.unique(np.concatenate(windows)), text.prints)
    # Any stretch of one step lies whole in one window.
    step = PARAMETERS.window_step
    for at in range(max(1, count - step + 1)):
        stretch = text.sequence[at : at + step]
        assert any(np.isin(stretch, window).all() for window in windows)
    assert shingle("", PARAMETERS).windows(PARAMETERS) == []


def test_signatures_are_those_of_datasketch() -> None:
    text = shingle(FERRY, PARAMETERS)
    (row,) = sign([text.sequence], PARAMETERS)
    found = [word.text for word in words(FERRY)]
    reference = MinHash(num_perm=128, seed=1, scheme="affine32", hashfunc=lambda s: fingerprint(s) & 0xFFFFFFFF)
    for i in range(len(found) - 2):
        reference.update(" ".join(found[i : i + 3]))
    assert row.dtype == np.uint32
    assert np.array_equal(row, reference.hashvalues)
    assert LeanMinHash(seed=1, hashvalues=row, scheme="affine32") == LeanMinHash(reference)
    assert sign([], PARAMETERS).shape == (0, 128)


def test_sketch_estimates_the_exact_jaccard() -> None:
    left, right = generated(1, 300), generated(2, 300)
    texts = [shingle(" ".join(left), PARAMETERS), shingle(" ".join(left[:150] + right[150:]), PARAMETERS)]
    a, b = (LeanMinHash(seed=1, hashvalues=sign([t.sequence], PARAMETERS)[0], scheme="affine32") for t in texts)
    exact = compare("x", texts[0].prints, texts[1].prints).jaccard
    # Standard error sqrt(J(1-J)/128) is 0.042 at J = 1/3; 0.13 is three of them.
    assert a.jaccard(b) == pytest.approx(exact, abs=0.13)


# --- against earlier takedowns ------------------------------------------------------------------------------


def test_unrelated_is_fresh_as_a_whole(index: DedupeIndex) -> None:
    index.add("T1", FERRY)
    assert decide(index, ORCHARD) == [
        DedupeDecision(request_id="N0", verdict="fresh", covered=0.0, fresh_spans=((0, len(ORCHARD)),))
    ]


@pytest.mark.parametrize(
    "edit",
    [str, str.upper, lambda t: t.replace(" ", "\n"), lambda t: "\u200b".join(t), lambda t: f"“{t}” —"],
    ids=["same", "upper", "wrapped", "zero width", "quoted"],
)
def test_a_copy_is_a_repeat(index: DedupeIndex, edit: Callable[[str], str]) -> None:
    index.add("T1", FERRY)
    index.add("T2", ORCHARD)
    (decision,) = decide(index, edit(FERRY))
    assert (decision.verdict, decision.covered, decision.fresh_spans) == ("repeat", 1.0, ())
    assert [(e.request_id, e.jaccard, e.containment) for e in decision.evidence] == [("T1", 1.0, 1.0)]


def test_an_excerpt_of_an_earlier_long_work_is_a_repeat(index: DedupeIndex) -> None:
    work = generated(1, 3000)
    index.add("T1", " ".join(work))
    (decision,) = decide(index, " ".join(work[1234:1274]))
    assert (decision.verdict, decision.covered) == ("repeat", 1.0)
    assert decision.evidence[0].containment == 1.0
    assert decision.evidence[0].contained == pytest.approx(38 / 2998, rel=0.01)


@pytest.mark.parametrize("order", ["{old} {new}", "{new} {old}", "{new} {old} {new2}"])
def test_the_new_part_of_a_longer_text_is_fresh(index: DedupeIndex, order: str) -> None:
    index.add("T1", FERRY)
    text = order.format(old=FERRY, new=ORCHARD, new2=CLOCK)
    (decision,) = decide(index, text)
    assert decision.verdict == "fresh"
    wanted = [part for part in (ORCHARD, CLOCK) if part in text]
    found = [text[start:end] for start, end in decision.fresh_spans]
    # A span ends with its last word; the full stop belongs to it only at the end of the text.
    assert sorted(part.rstrip(" .") for part in found) == sorted(part.rstrip(".") for part in wanted)
    assert decision.fresh_spans == tuple(sorted(decision.fresh_spans))


def test_the_union_of_two_works_covers(index: DedupeIndex) -> None:
    index.add("T1", FERRY)
    index.add("T2", ORCHARD)
    (decision,) = decide(index, f"{FERRY}\n\n{ORCHARD}")
    assert decision.verdict == "repeat"
    assert 0.95 <= decision.covered < 1  # the two shingles of the seam are new
    assert {e.request_id for e in decision.evidence} == {"T1", "T2"}
    assert all(0.4 < e.containment < 0.6 and e.contained == 1 for e in decision.evidence)


def test_known_words_in_a_new_order_are_never_fresh_without_a_span(index: DedupeIndex) -> None:
    left, right = generated(1, 40), generated(2, 40)
    index.add("T1", " ".join(left))
    index.add("T2", " ".join(right))
    text = " ".join(left[:14] + right[:14])
    (decision,) = decide(index, text)
    assert (decision.verdict, decision.covered) == ("fresh", 24 / 26)
    ((start, end),) = decision.fresh_spans
    assert text[start:end].split() == left[12:14] + right[:2]


def test_chance_overlap_does_not_punch_holes(index: DedupeIndex) -> None:
    work, text = generated(1, 400), generated(2, 400)
    for at in range(0, 400, 40):
        text[at : at + 7] = work[at : at + 7]  # phrases of seven words
    index.add("T1", " ".join(work))
    raw = " ".join(text)
    (decision,) = decide(index, raw)
    assert decision.covered > 0.1
    assert decision.fresh_spans == ((0, len(raw)),)


def test_a_new_chapter_in_a_long_known_work_is_not_a_repeat(index: DedupeIndex) -> None:
    work, chapter = generated(1, 3000), generated(2, 100)
    index.add("T1", " ".join(work))
    raw = " ".join(work[:1000] + chapter + work[1000:])
    (decision,) = decide(index, raw)
    assert decision.covered > SETTINGS.repeat_covered
    assert decision.verdict == "fresh"
    assert [raw[a:b] for a, b in decision.fresh_spans] == [" ".join(chapter)]


def test_a_short_quotation_in_a_long_text_is_found_and_reported(index: DedupeIndex) -> None:
    work, text = generated(1, 2000), generated(2, 2000)
    text[700:760] = work[300:360]
    index.add("T1", " ".join(work))
    raw = " ".join(text)
    (decision,) = decide(index, raw)
    assert [raw[a:b] for a, b in decision.fresh_spans] == [" ".join(text[:700]), " ".join(text[760:])]
    assert [e.request_id for e in decision.evidence] == ["T1"]  # although it is only 3 % of either text


@pytest.mark.parametrize("text", ["", " \n", "… — ?!", "\u200b\ufeff", "’’"])
def test_texts_without_words_are_empty_and_like_nothing(index: DedupeIndex, text: str) -> None:
    assert index.add("E", text) is False
    assert index.ids() == ()
    index.add("T1", FERRY)
    for decision in decide(index, text, text):
        assert decision == DedupeDecision(request_id=decision.request_id, verdict="empty", covered=0.0)


@pytest.mark.parametrize("text", ["cat", "cat dog", "cat dog cow"])
def test_texts_of_one_shingle(index: DedupeIndex, text: str) -> None:
    index.add("T1", text)
    assert [d.verdict for d in decide(index, text.upper(), "owl", "owl dog", "cat dog hen")] == ["repeat"] + [
        "fresh"
    ] * 3


@pytest.mark.parametrize("text", [CHINESE, THAI, ARABIC, HINDI], ids=["Chinese", "Thai", "Arabic", "Devanagari"])
def test_other_scripts(index: DedupeIndex, text: str) -> None:
    for name, other in (("zh", CHINESE), ("th", THAI), ("ar", ARABIC), ("hi", HINDI)):
        if other != text:
            index.add(name, other)
    (before,) = decide(index, text)
    assert (before.verdict, before.covered, before.evidence) == ("fresh", 0.0, ())
    index.add("T1", text)
    (same,) = decide(index, f"«{text}»")
    assert (same.verdict, same.evidence[0].request_id) == ("repeat", "T1")
    longer = f"{FERRY} {text}"
    (partly,) = decide(index, longer)
    assert [longer[a:b] for a, b in partly.fresh_spans] == [FERRY.rstrip(".")]


@pytest.mark.parametrize("text", [CHINESE, THAI], ids=["Chinese", "Thai"])
def test_characters_in_common_are_not_text_in_common(text: str) -> None:
    # Any long book holds nearly all runs of three characters, so runs of four in a new order must not match.
    pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
    a, b = shingle(text, PARAMETERS).prints, shingle("".join(reversed(pieces)), PARAMETERS).prints
    assert compare("x", a, b).containment == 0


# --- inside the batch ---------------------------------------------------------------------------------------


def test_exact_duplicates_keep_the_first(index: DedupeIndex) -> None:
    decisions = decide(index, FERRY, ORCHARD, FERRY.upper())
    assert [d.verdict for d in decisions] == ["fresh", "fresh", "folded"]
    assert decisions[2].evidence[0].request_id == "N0"
    assert decisions[0].evidence[0].request_id == "N2"
    assert decisions[2].fresh_spans == ()


def test_a_near_copy_is_folded_into_the_longer_one(index: DedupeIndex) -> None:
    near = FERRY.replace("Sunday", "Monday")
    decisions = decide(index, near, FERRY + " He never told.", ORCHARD)
    assert [d.verdict for d in decisions] == ["folded", "fresh", "fresh"]
    first = decisions[0].evidence[0]
    assert first.request_id == "N1"
    assert 0.9 <= first.containment < 1


def test_partial_overlap_is_linked_not_folded(index: DedupeIndex) -> None:
    decisions = decide(index, f"{FERRY} {ORCHARD}", f"{ORCHARD} {CLOCK}")
    assert [d.verdict for d in decisions] == ["fresh", "fresh"]
    assert [d.evidence[0].request_id for d in decisions] == ["N1", "N0"]


def test_an_excerpt_with_a_passage_of_its_own_is_not_folded(index: DedupeIndex) -> None:
    work, own = generated(1, 1500), generated(2, 60)
    decisions = decide(index, " ".join(work), " ".join(work[:1000] + own))
    assert decisions[1].evidence[0].containment > SETTINGS.fold_containment
    assert [d.verdict for d in decisions] == ["fresh", "fresh"]


def test_no_chain_of_folds(index: DedupeIndex) -> None:
    work = generated(1, 320)
    # Each holds 90 % of the one after it, but the first only 80 % of the last.
    chain = [" ".join(work[at : at + 220 - at // 10]) for at in (0, 20, 40)]
    decisions = decide(index, *chain)
    assert [d.verdict for d in decisions] == ["fresh", "folded", "fresh"]
    kept = {d.request_id for d in decisions if d.verdict == "fresh"}
    assert all(d.evidence[0].request_id in kept for d in decisions if d.verdict == "folded")


def test_history_wins_over_folding(index: DedupeIndex) -> None:
    index.add("T1", FERRY)
    decisions = decide(index, FERRY, FERRY)
    assert [d.verdict for d in decisions] == ["repeat", "repeat"]
    assert [d.evidence[0].request_id for d in decisions] == ["T1", "T1"]


def test_evidence_of_a_repeat_begins_with_history(index: DedupeIndex) -> None:
    index.add("T1", FERRY)
    index.add("T2", ORCHARD)
    both = f"{FERRY} {ORCHARD}"
    for decision, sibling in zip(decide(index, both, both), ("N1", "N0"), strict=True):
        assert decision.verdict == "repeat"
        # T2 is the longer part; the sibling comes last although it is the most alike.
        assert [e.request_id for e in decision.evidence] == ["T2", "T1", sibling]


def test_nothing_is_folded_into_a_repeat(index: DedupeIndex) -> None:
    work, own = generated(1, 1000), generated(2, 40)
    index.add("T1", " ".join(work))
    # The longer one is 96 % known; 90.7 % of the shorter one lies in it, yet only 0.4 of that is in T1.
    longer = " ".join(work + own)
    shorter = " ".join(own + generated(3, 3) + work[:20])
    decisions = decide(index, longer, shorter)
    assert [d.verdict for d in decisions] == ["repeat", "fresh"]


def test_order_of_answers_is_that_of_the_batch(index: DedupeIndex) -> None:
    assert [d.request_id for d in decide(index, CLOCK, FERRY, "", ORCHARD)] == ["N0", "N1", "N2", "N3"]
    assert dedupe([], index, SETTINGS) == ()


def test_a_resumed_run_decides_the_same(index: DedupeIndex) -> None:
    first = decide(index, FERRY, ORCHARD, FERRY)
    index.add("N0", FERRY)  # the run died half-way through indexing its batch
    assert decide(index, FERRY, ORCHARD, FERRY) == first


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.randoms(use_true_random=False))
@hypothesis_settings(max_examples=25, deadline=None)
def test_laws_of_a_batch(seeds: list[int], rng: random.Random) -> None:
    texts = []
    for seed in seeds:
        work = generated(seed, 150)
        start = rng.randrange(100)
        texts.append(" ".join(work[start : start + rng.randrange(151)]))
    with tempfile.TemporaryDirectory() as folder, DedupeIndex.open(Path(folder)) as index:
        index.add("T", " ".join(generated(0, 150)))
        decisions = decide(index, *texts)
    kept = {d.request_id for d in decisions if d.verdict == "fresh"}
    for decision, text in zip(decisions, texts, strict=True):
        assert (decision.verdict == "empty") == (not text)
        assert bool(decision.fresh_spans) == (decision.verdict == "fresh")
        assert 0 <= decision.covered <= 1
        if decision.verdict == "folded":
            assert decision.evidence[0].request_id in kept
        for left, right in pairwise(decision.fresh_spans):
            assert left[1] < right[0]
        assert all(0 <= a < b <= len(text) for a, b in decision.fresh_spans)


# --- retain text --------------------------------------------------------------------------------------------


def test_retain_documents_that_hold_a_takedown_are_found() -> None:
    long = generated(1, 3000)
    long[1000:1000] = FERRY.split()
    documents = {
        "copy.txt": FERRY.upper(), "long.txt": " ".join(long), "excerpt.txt": " ".join(FERRY.split()[10:60]),
        "other.txt": ORCHARD, "empty.txt": " … ", "mixed.txt": f"{CLOCK} {ORCHARD} {FERRY}",
    }  # fmt: skip
    found = {
        e.document: e for e in exclude_retain(documents, {"T1": FERRY, "T0": "", "T2": generated_text()}, SETTINGS)
    }
    assert list(found) == ["copy.txt", "long.txt", "excerpt.txt", "mixed.txt"]
    assert {e.request_id for e in found.values()} == {"T1"}
    assert found["long.txt"].contained == 1
    assert found["excerpt.txt"].containment == 1
    assert found["copy.txt"].jaccard == 1


def generated_text() -> str:
    return " ".join(generated(9, 400))


def test_a_passage_of_a_long_takedown_in_a_long_document_is_found() -> None:
    work, document = generated(1, 2000), generated(2, 2000)
    document[500:600] = work[900:1000]
    (found,) = exclude_retain({"d": " ".join(document)}, {"T1": " ".join(work)}, SETTINGS)
    assert found.contained < SETTINGS.retain_containment <= found.containment  # that of its nearest window


def test_unrelated_texts_never_match() -> None:
    texts = {"f": FERRY, "o": ORCHARD, "c": CLOCK, "z": CHINESE, "t": THAI}
    for name, text in texts.items():
        others = {key: other for key, other in texts.items() if key != name}
        assert exclude_retain({name: text}, others, SETTINGS) == ()
    assert exclude_retain({"d": generated_text()}, {"T": " ".join(generated(8, 3000))}, SETTINGS) == ()
    assert exclude_retain({}, {"T": FERRY}, SETTINGS) == exclude_retain({"d": FERRY}, {}, SETTINGS) == ()


# --- recall -------------------------------------------------------------------------------------------------


def test_excerpts_are_found_exact_and_edited() -> None:
    """Measured on five books with this configuration (30 words): exact 1.00, 2 % of words edited 0.995, inside a
    host of 1,000 words 0.99; the bounds leave room for 150 draws."""
    rng = random.Random(5)
    work = generated(1, 3000)
    table = WindowTable(PARAMETERS)
    table.add("T1", sign(shingle(" ".join(work), PARAMETERS).windows(PARAMETERS), PARAMETERS))
    table.add("T2", sign(shingle(" ".join(generated(2, 3000)), PARAMETERS).windows(PARAMETERS), PARAMETERS))

    def recall(length: int, rate: float, host: int) -> float:
        hits = 0
        for draw in range(150):
            at = rng.randrange(len(work) - length)
            excerpt = edited(work[at : at + length], rate, rng)
            around = generated(1000 + draw, host)
            text = shingle(" ".join(around[: host // 2] + excerpt + around[host // 2 :]), PARAMETERS)
            hits += "T1" in table.query(sign(text.windows(PARAMETERS), PARAMETERS))
        return hits / 150

    assert recall(30, 0.0, 0) >= 0.98
    assert recall(30, 0.02, 0) >= 0.97
    assert recall(50, 0.02, 0) >= 0.99
    assert recall(30, 0.0, 300) >= 0.93
    assert recall(60, 0.02, 300) >= 0.98


# --- the index on disk --------------------------------------------------------------------------------------


def test_the_file_is_private_and_holds_no_text(tmp_path: Path) -> None:
    with DedupeIndex.open(tmp_path / "index") as index:
        index.add("T1", FERRY)
        path = index.path
    assert path == tmp_path / "index" / "index.db"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    data = path.read_bytes().lower()
    assert not [word for word in FERRY.lower().split() if len(word) > 5 and word.encode() in data]
    assert [p.name for p in path.parent.iterdir()] == ["index.db"]


def test_add_is_idempotent_and_refuses_another_text(index: DedupeIndex) -> None:
    assert index.add("T1", FERRY) is True
    before = index.path.read_bytes()
    assert index.add("T1", FERRY) is False
    assert index.add("T1", FERRY.upper()) is False  # the same after normalisation
    with pytest.raises(UsageError, match="another text"):
        index.add("T1", ORCHARD)
    assert index.path.read_bytes() == before
    assert index.ids() == ("T1",)


def test_reopening_gives_the_same_answers(tmp_path: Path) -> None:
    batch = (f"{FERRY} {CLOCK}", ORCHARD, CHINESE, FERRY[50:400])
    with DedupeIndex.open(tmp_path) as index:
        index.candidates(shingle(FERRY, PARAMETERS))  # tables built before, kept up to date after
        for name, text in (("T2", ORCHARD), ("T1", FERRY), ("T3", CHINESE)):
            index.add(name, text)
        first, prints = decide(index, *batch), index.prints("T1")
    with DedupeIndex.open(tmp_path) as index:
        assert index.ids() == ("T2", "T1", "T3")
        assert decide(index, *batch) == first
        assert np.array_equal(index.prints("T1"), prints)


def test_removed_takedowns_no_longer_count(index: DedupeIndex) -> None:
    index.add("T1", FERRY)
    index.add("T2", ORCHARD)
    assert decide(index, FERRY)[0].verdict == "repeat"
    assert index.remove("T1") is True
    assert index.remove("T1") is False
    assert index.ids() == ("T2",)
    assert [d.verdict for d in decide(index, FERRY, ORCHARD)] == ["fresh", "repeat"]
    with pytest.raises(UsageError, match="T1"):
        index.prints("T1")
    assert index.add("T1", FERRY) is True


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"num_perm": 256}, {"bands": 32, "rows": 4}, {"shingle_words": 5}, {"window_step": 20}],
    ids=str,
)
def test_other_parameters_are_refused(tmp_path: Path, other: dict[str, int]) -> None:
    DedupeIndex.open(tmp_path).close()
    with pytest.raises(UsageError, match="Rebuild the index") as caught:
        DedupeIndex.open(tmp_path, DedupeParameters(**other))  # type: ignore[arg-type]
    assert all(f"{key} is" in str(caught.value) for key in other)
    assert "scheme is" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("normaliser", "v0"), ("scheme", "legacy"), ("fingerprint", "sha1-64"), ("seed", None)]
)
def test_an_index_of_another_release_is_refused(tmp_path: Path, key: str, value: str | None) -> None:
    recorded = {**PARAMETERS.model_dump(), key: value}
    with DedupeIndex.open(tmp_path) as index:
        path = index.path
    execute(path, "UPDATE parameters SET value = ?", json.dumps(recorded))
    with pytest.raises(UsageError, match=f"{key} is {value!r}, wanted"):
        DedupeIndex.open(tmp_path)


def execute(path: Path, statement: str, *values: object) -> None:
    database = sqlite3.connect(path)
    with database:
        database.execute(statement, values)
    database.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"not a database, whatever its name says" * 100),
        lambda p: p.write_bytes(p.read_bytes()[:5000]),
        lambda p: p.write_bytes(p.read_bytes()[:4096] + b"\xff" * 4096 + p.read_bytes()[8192:]),
        lambda p: execute(p, "DROP TABLE takedown"),
        lambda p: execute(p, "DELETE FROM parameters"),
        lambda p: execute(p, "UPDATE parameters SET value = 'x'"),
        lambda p: execute(p, "UPDATE parameters SET value = '[1]'"),
    ],
    ids=["emptied", "not SQLite", "cut", "overwritten", "no table", "no parameters", "not JSON", "not an object"],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    with DedupeIndex.open(tmp_path) as index:
        for i in range(5):
            index.add(f"T{i}", " ".join(generated(i, 300)))
        path = index.path
    damage(path)
    with pytest.raises(StoreDamaged, match=r"index\.db.*Rebuild the index"), DedupeIndex.open(tmp_path) as index:
        index.ids()


@pytest.mark.parametrize("column", ["prints", "signatures", "request_id"])
def test_a_changed_row_is_named(tmp_path: Path, column: str) -> None:
    with DedupeIndex.open(tmp_path) as index:
        index.add("T1", FERRY)
        path = index.path
    execute(path, f"UPDATE takedown SET {column} = ?", "T9" if column == "request_id" else b"\0" * 512)
    with DedupeIndex.open(tmp_path) as index, pytest.raises(StoreDamaged, match="does not match its digest"):
        decide(index, ORCHARD)


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("CREATE TRIGGER grow AFTER INSERT ON takedown BEGIN DELETE FROM takedown WHERE request_id = 'a'; END", "grow"),
        ("ALTER TABLE takedown ADD COLUMN extra", "takedown"),
        ("ALTER TABLE parameters RENAME COLUMN value TO worth", "parameters"),
        ("CREATE TABLE other (x)", "other"),
        ("CREATE VIEW seen AS SELECT * FROM takedown", "seen"),
        ("CREATE INDEX faster ON takedown (digest)", "faster"),
        ("DROP TABLE takedown", "sqlite_autoindex_takedown_1"),
    ],
)
def test_an_index_that_declares_anything_else_is_refused(tmp_path: Path, statement: str, name: str) -> None:
    with DedupeIndex.open(tmp_path) as made:
        made.add("a", "one two three four five six seven eight nine ten eleven twelve")
    database = sqlite3.connect(tmp_path / "index.db", isolation_level=None)
    database.execute(statement)
    database.close()
    with pytest.raises(StoreDamaged, match=rf"declares other than this product does: .*'{name}'.*delete this file"):
        DedupeIndex.open(tmp_path)


def test_a_busy_or_read_only_file_is_no_damage(index: DedupeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sqlite3.connect(index.path)
    other.execute("BEGIN EXCLUSIVE")
    index._database.execute("PRAGMA busy_timeout = 10")
    with pytest.raises(WorkspaceBusy):
        index.add("T1", FERRY)
    other.close()
    index._database.execute("PRAGMA query_only = 1")
    with pytest.raises(NoSpace):
        index.add("T1", FERRY)
    index._database.execute("PRAGMA query_only = 0")
    assert index.ids() == ()
    assert index.add("T1", FERRY)
