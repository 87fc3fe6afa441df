"""Finding works in a corpus: the rule against its plain definition, positions, interruptions, and the verb."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from histories import array_model, make_step, start_history
from hypothesis import given
from hypothesis import strategies as st
from tampered.calls import Answer, takedown
from workspaces import take_in

from pipeline import clusters, corpus, scan, search
from pipeline.corpus import Piece, corpus_files
from pipeline.errors import Interrupted, StoreDamaged, UsageError, WorkspaceBusy
from pipeline.fingerprints import CORPUS_PARAMETERS, FingerprintSet
from pipeline.requests import note as put_on_record
from pipeline.scan import BRIDGED_WORDS, WITHIN_WORDS, Copy, Rule, counting, find, scan_documents
from pipeline.search import PART, STATE, Outcome, claimed_works, find_copies
from pipeline.shingles import shingle
from pipeline.workers import searching
from pipeline.workspace import Workspace

STOCK = [a + b + c for a in ("bar", "lo", "mi", "tren", "su") for b in ("den", "ga", "vel", "ri", "", "kos") for c in
         ("a", "o", "um", "ish", "er", "ne", "th", "ing", "y", "s")]  # fmt: skip
"""300 words: ten in a row are never the same by chance."""


def prose(seed: object, words: int) -> str:
    """Words drawn at random, with line breaks and punctuation; the same for the same seed."""
    draw = random.Random(str(seed))
    return " ".join(draw.choice(STOCK) + draw.choice(["", "", "", "", ",", ".", ".\n"]) for _ in range(words))


def cut_out(text: str, start: int, words: int) -> str:
    return " ".join(text.split()[start : start + words])


WORK = prose("work", 400)
WORKS = [("TD-1", WORK), ("TD-2", prose("other", 200)), ("TD-3", prose("third", 60))]
SET = FingerprintSet.of(WORKS)


def found_in(text: str, prints: FingerprintSet = SET, hits: int = 3) -> list[Copy]:
    return scan_documents([(None, text)], prints, Rule(hits=hits))


# --- what is found, and where -----------------------------------------------------------------------------


def test_a_piece_of_a_work_is_found_at_its_place() -> None:
    part = cut_out(WORK, 100, 50)
    before, after = prose("before", 700), prose("after", 700)
    documents = [("a", prose("none", 900)), ("b", f"{before} {part} {after}"), ("c", ""), ("d", WORKS[2][1])]
    first, second = scan_documents(documents, SET)
    assert (first.document, first.name, first.request_id) == (2, "b", "TD-1")
    (place,) = first.ranges
    assert documents[1][1][slice(*place)].rstrip(",.\n ") == part.rstrip(",.\n ")
    assert (first.words, first.shingles) == (50, 41)
    assert first.containment == pytest.approx(41 / 391)
    assert (second.document, second.request_id, second.containment, second.words) == (4, "TD-3", 1.0, 60)


def test_pieces_far_apart_are_ranges_of_their_own() -> None:
    gap = BRIDGED_WORDS + 1
    text = " ".join(cut_out(WORK, at, 30) + " " + prose(at, gap) for at in (0, 100, 200))
    (copy,) = found_in(text)
    assert len(copy.ranges) == 3 and copy.words == 90
    assert [text[slice(*place)].split()[0] for place in copy.ranges] == [WORK.split()[at] for at in (0, 100, 200)]
    near = " ".join(cut_out(WORK, at, 30) + " " + prose(at, gap - 1) for at in (0, 100, 200))
    (copy,) = found_in(near)
    assert len(copy.ranges) == 1 and copy.words == 90


def test_two_runs_are_no_copy_and_three_are() -> None:
    runs = [cut_out(WORK, at, 10) for at in (0, 50, 100)]
    apart = prose("filler", 40)
    assert found_in(f"{apart} {runs[0]} {apart} {runs[1]} {apart}") == []
    assert found_in(f"{apart} {runs[0]} {apart} {runs[0]} {apart} {runs[0]}") == [], "the same run, three times"
    assert len(found_in(f"{apart} {runs[0]} {apart} {runs[1]} {apart} {runs[2]}")) == 1
    far = prose("far", WITHIN_WORDS)
    assert found_in(f"{runs[0]} {far} {runs[1]} {far} {runs[2]}") == []
    (copy,) = found_in(f"{far} {runs[0]} {far}", hits=1)
    assert (copy.shingles, copy.words) == (1, 10)


def test_copies_in_disguise_are_found() -> None:
    part = cut_out(WORK, 50, 60)
    disguised = (
        part.upper().replace(" ", "\u00a0\n").replace("A", "\uff21").replace("E", "E\u0301").replace("I", "I\u200b")
    )
    (copy,) = found_in(f"{prose('x', 100)} {disguised} {prose('y', 100)}")
    assert copy.shingles == 51


def test_a_work_shorter_than_a_shingle_is_found_as_a_whole_document_only() -> None:
    short = "seven words are all of this poem"
    prints = FingerprintSet.of([("short", short), ("eleven", cut_out(WORK, 0, 11)), *WORKS[1:]])
    documents = [(None, text) for text in (short.upper() + "!", short + " more", "", "and " + short, short)]
    assert [copy.document for copy in scan_documents(documents, prints)] == [1, 5]
    assert [copy.document for copy in scan_documents(documents[:1], prints)] == [1]
    assert found_in(prose("a", 50) + " " + cut_out(WORK, 0, 11), prints)[0].request_id == "eleven", "all it has is two"


def test_works_in_scripts_without_spaces() -> None:
    draw = random.Random(5)
    han = ["".join(chr(draw.randrange(0x4E00, 0x9000)) for _ in range(400)) for _ in range(3)]
    prints = FingerprintSet.of([("han", han[0]), ("mixed", f"{WORK} {han[1]}")])
    (copy,) = found_in(han[2] + han[0][100:130] + han[2], prints)
    assert copy.request_id == "han" and copy.ranges == ((400, 430),)
    assert found_in(han[2] + han[0][100:120] + han[2], prints) == [], "20 characters are a phrase"


def test_nothing_is_found_of_nothing() -> None:
    empty = FingerprintSet.of([])
    assert found_in(WORK, empty) == []
    only_marks = FingerprintSet.of([("marks", "... !!!"), ("none", "")])
    assert found_in("... !!!", only_marks) == [] and scan_documents([], SET) == []
    assert found_in("\ud800 " + WORK)[0].containment == 1.0, "half a pair of surrogates"


def test_a_shingle_of_several_works_is_a_hit_of_each() -> None:
    shared = cut_out(WORK, 0, 40)
    prints = FingerprintSet.of([("A", shared + prose("a", 50)), ("B", prose("b", 50)), ("C", shared)])
    assert [copy.request_id for copy in found_in(shared, prints)] == ["A", "C"]


# --- boilerplate ------------------------------------------------------------------------------------------


def test_boilerplate_is_nobodys() -> None:
    licence = prose("licence", 120)
    works = [(f"W{n}", licence + "\n" + prose(("book", n), 300)) for n in range(5)]
    host = f"{licence} {prose('host', 200)}"
    assert len(found_in(host, FingerprintSet.of(works))) == 5
    assert found_in(host, FingerprintSet.of(works, most_works=3)) == []
    assert len(found_in(host, FingerprintSet.of(works[:3], most_works=3))) == 3, "three works may share a passage"
    assert found_in(host, FingerprintSet.of(works[:1], [licence])) == []
    (copy,) = found_in(works[2][1], FingerprintSet.of(works, most_works=3))
    assert copy.request_id == "W2" and copy.containment == 1.0


def test_copies_of_one_work_are_not_boilerplate() -> None:
    noticed = [(f"R{n}", WORK if n % 2 else cut_out(WORK, 10 * n, 250)) for n in range(8)]
    prints = FingerprintSet.of([*noticed, *WORKS[1:]], most_works=3)
    assert len(found_in(cut_out(WORK, 100, 50), prints)) == 8


# --- the rule against its definition ----------------------------------------------------------------------


@given(steps=st.lists(st.tuples(st.integers(1, 150), st.integers(0, 4)), max_size=30), needed=st.integers(1, 4))
def test_hits_count_as_the_rule_says(steps: list[tuple[int, int]], needed: int) -> None:
    words = np.cumsum([step for step, _ in steps]).astype(np.int64)
    keys = np.array([key for _, key in steps], dtype=np.int64)
    expected = [False] * len(words)
    for start in range(len(words)):
        inside = [i for i in range(start, len(words)) if words[i] - words[start] < WITHIN_WORDS]
        if len({int(keys[i]) for i in inside}) >= needed:
            for i in inside:
                expected[i] = True
    assert counting(words, keys, needed).tolist() == expected


documents = st.lists(
    st.one_of(
        st.tuples(st.just(0), st.integers(0, 380), st.integers(1, 60)),
        st.tuples(st.just(1), st.integers(0, 180), st.integers(1, 60)),
        st.tuples(st.just(2), st.integers(0, 1000), st.integers(1, 400)),
    ),
    max_size=8,
)


def made_of(parts: Sequence[tuple[int, int, int]]) -> str:
    return "\n".join(cut_out(WORKS[kind][1], at, n) if kind < 2 else prose(at, n) for kind, at, n in parts)


@given(parts=documents, piece=st.integers(300, 3000))
def test_what_is_found_does_not_depend_on_how_a_document_is_cut(parts: list[tuple[int, int, int]], piece: int) -> None:
    text = made_of(parts)
    whole = found_in(text)
    with mock.patch.multiple(corpus, PIECE_CHARS=piece, OVERLAP_CHARS=250), mock.patch.object(scan, "UNIT_CHARS", 2000):
        assert found_in(text) == whole


@given(st.lists(documents, max_size=6))
def test_what_is_found_does_not_depend_on_the_documents_beside_it(parts: list[list[tuple[int, int, int]]]) -> None:
    texts = [made_of(document) for document in parts]
    alone = [copy.model_copy(update={"document": n}) for n, text in enumerate(texts, 1) for copy in found_in(text)]
    assert scan_documents([(None, text) for text in texts], SET) == alone


def test_the_set_finds_what_is_in_it_and_nothing_else() -> None:
    for size in (0, 1, 1000, 40_000):
        draw = np.random.default_rng(size)
        keys = np.unique(draw.integers(0, 2**64, size, dtype=np.uint64))
        prints = FingerprintSet.of([])
        first, owners = np.arange(len(keys) + 1), np.zeros(len(keys), np.int32)
        from pipeline.fingerprints import _filter

        prints = FingerprintSet(("w",), np.array([len(keys)]), keys, first, owners, _filter(keys), short=False)
        sequence = np.concatenate([keys[::3], draw.integers(0, 2**64, 5000, dtype=np.uint64), keys[:5]])
        places, where = prints.find(sequence)
        expected = np.flatnonzero(np.isin(sequence, keys))
        assert places.tolist() == expected.tolist()
        assert keys[where].tolist() == sequence[expected].tolist()


def test_the_set_travels_and_its_digest_is_of_all_it_holds() -> None:
    again = pickle.loads(pickle.dumps(SET))  # as executors ship it between trusted processes
    assert found_in(WORK, again) == found_in(WORK) and again.digest == SET.digest
    others = [FingerprintSet.of(works) for works in ([("TD-9", WORK), *WORKS[1:]], WORKS[:2], [*WORKS, ("TD-4", "x")])]
    assert len({SET.digest, *(other.digest for other in others)}) == 4
    assert CORPUS_PARAMETERS.shingle_words == 10


def test_pieces_of_documents_are_left_to_the_assembly() -> None:
    text = cut_out(WORK, 0, 30) + " " + prose("x", 10)
    keep = len(cut_out(WORK, 0, 15)) + 1
    (stretch,) = find([Piece(3, 8, "n", 1000, text, keep, last=False)], SET, Rule())
    assert (stretch.file, stretch.document, stretch.name, stretch.words) == (3, 8, "n", 15)
    (hits,) = stretch.hits
    assert hits.rows[:, 0].tolist() == list(range(15)) and hits.rows[0, 2] == 1000
    assert shingle(text, CORPUS_PARAMETERS).sequence[0] in SET.keys


# --- searching files --------------------------------------------------------------------------------------


def write_corpus(folder: Path, files: int = 3, documents: int = 40, words: int = 300) -> Path:
    """JSON lines and one long text, with a piece of a work in every seventh document."""
    folder.mkdir()
    for number in range(files):
        lines = []
        for at in range(documents):
            text = prose((number, at), words)
            if at % 7 == 3:
                text = f"{text} {cut_out(WORK, (11 * at) % 350, 40)} {prose(at, 50)}"
            lines.append(json.dumps({"id": f"{number}-{at}", "text": text}))
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines))
    long = [prose(("long", at), 500) + " " + cut_out(WORKS[at % 2][1], 20 * at % 150, 45) for at in range(30)]
    (folder / "a-long.txt").write_text("\n".join(long))
    return folder


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("scan") / "corpus")


@pytest.fixture
def small() -> Iterator[None]:
    """Pieces and batches so small that every file has many."""
    with (
        mock.patch.multiple(corpus, PIECE_CHARS=4000, OVERLAP_CHARS=400),
        mock.patch.object(search, "UNIT_CHARS", 10_000),
        mock.patch.object(search, "SAVED_EVERY_S", 0.0),
    ):
        yield


def searched(corpus: Path, out: Path, prints: FingerprintSet = SET, **options: Any) -> tuple[Outcome, list[str]]:
    notes: list[str] = []
    files = corpus_files([corpus])[0]
    return find_copies(prints, files, out, options.pop("rule", Rule()), note=notes.append, **options), notes


def test_every_planted_copy_is_in_the_file(some: Path, tmp_path: Path) -> None:
    outcome, notes = searched(some, tmp_path / "hits.jsonl")
    hits = [json.loads(line) for line in (tmp_path / "hits.jsonl").read_bytes().splitlines()]
    planted = [(f"part-{n}.jsonl", at + 1, f"{n}-{at}") for n in range(3) for at in range(40) if at % 7 == 3]
    lines = [(Path(hit["file"]).name, hit["document"], hit["name"]) for hit in hits if hit["name"]]
    assert lines == planted
    long = [hit for hit in hits if hit["name"] is None]
    assert [hit["request_id"] for hit in long] == ["TD-1", "TD-2"] and all(len(hit["ranges"]) == 15 for hit in long)
    assert outcome.totals.documents == 121 and outcome.totals.copies == len(hits) == 20 and outcome.totals.holding == 19
    assert outcome.files == 4 and outcome.faults == () and notes == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hits.jsonl"], "nothing lies beside it"
    assert not any(word in (tmp_path / "hits.jsonl").read_text() for word in WORK.split() if len(word) > 4)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_the_file_does_not_depend_on_the_number_of_workers(
    some: Path, tmp_path: Path, small: None, workers: int
) -> None:
    one, _ = searched(some, tmp_path / "one")
    several, _ = searched(some, tmp_path / "several", workers=workers)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "several").read_bytes() and one == several


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_workers_of_a_cluster_find_the_same(some: Path, tmp_path: Path, small: None, runner: str) -> None:
    pytest.importorskip({"dask": "distributed", "ray": "ray"}[runner])
    one, _ = searched(some, tmp_path / "one")
    several, _ = searched(some, tmp_path / "several", workers=2, runner=runner)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "several").read_bytes() and one == several


@pytest.mark.slow
def test_a_cluster_that_is_used_twice_and_one_that_is_not_there(
    some: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed, dask = pytest.importorskip("distributed"), pytest.importorskip("dask")
    searched(some, tmp_path / "one")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        monkeypatch.setenv("TAKEDOWN_DASK_ADDRESS", cluster.scheduler_address)
        for name in ("two", "three"):
            searched(some, tmp_path / name, runner="dask")
            assert (tmp_path / name).read_bytes() == (tmp_path / "one").read_bytes()
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
        pytest.raises(Interrupted, match="workers failed"),
    ):
        searched(some, tmp_path / "four", runner="dask")


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_a_missing_extra_is_told(some: Path, tmp_path: Path, runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, {"dask": "distributed", "ray": "ray"}[runner], None)
    with pytest.raises(UsageError, match=rf'pip install "takedown-pipeline\[{runner}\]"'):
        searched(some, tmp_path / "hits", runner=runner)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad"), ImportError("no reader")])
def test_what_fails_beside_the_workers_is_not_theirs(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk must be told as such: the way out is another one."""
    pytest.importorskip("distributed")
    place = (None, {"n_workers": 1, "processes": False, "dashboard_address": None})
    monkeypatch.setattr(clusters, "dask_place", lambda workers: place)
    prints = FingerprintSet.of([("w", WORK)], (), 3)
    with pytest.raises(type(error)) as raised, searching(prints, Rule(hits=1), 1, "dask") as search:
        (done,) = search([("label", [])])
        assert done == ("label", [])
        raise error
    assert raised.value is error


def test_a_worker_without_this_package_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")

    def find(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'pipeline'")

    place = (None, {"n_workers": 1, "processes": False, "dashboard_address": None})
    monkeypatch.setattr(clusters, "dask_place", lambda workers: place)
    monkeypatch.setattr(clusters, "find", find)
    with (
        pytest.raises(Interrupted, match="workers failed"),
        searching(FingerprintSet.of([("w", WORK)], (), 3), Rule(hits=1), 1, "dask") as search,
    ):
        list(search([("label", [])]))


class Stop(Exception):
    pass


def stopped_at(write: int, run: Callable[[], object]) -> bool:
    """Run until the state is saved for the n-th time, and stop before; whether that happened."""
    calls = [0]
    real = search.write_json

    def save(path: Path, value: object) -> None:
        calls[0] += 1
        if calls[0] == write:
            raise Stop
        real(path, value)

    with mock.patch.object(search, "write_json", save):
        try:
            run()
        except Stop:
            return True
    return False


def test_interrupted_anywhere_it_goes_on_to_the_same_file(some: Path, tmp_path: Path, small: None) -> None:
    expected, _ = searched(some, tmp_path / "whole")
    out, count, notes = tmp_path / "hits", 0, [""]
    while stopped_at(7, lambda: notes.extend(searched(some, out)[1])):
        count += 1
        assert not out.exists() and (tmp_path / f"hits{PART}").exists()
        assert count < 100
    outcome, _ = searched(some, tmp_path / "again")
    assert count > 5 and "Going on where the search was interrupted" in notes[1]
    assert out.read_bytes() == (tmp_path / "whole").read_bytes() and outcome == expected
    assert not (tmp_path / f"hits{STATE}").exists()


def test_totals_and_faults_are_the_same_after_interruptions(tmp_path: Path, small: None) -> None:
    folder = write_corpus(tmp_path / "corpus", files=2)
    lines = (folder / "part-0.jsonl").read_text().splitlines()
    (folder / "part-0.jsonl").write_text(
        "\n".join(line for pair in zip(lines, ["{"] * 99, strict=False) for line in pair)
    )
    (folder / "bytes.txt").write_bytes(b"words and what is none: " * 9 + b"\xff" * 7)
    expected, _ = searched(folder, tmp_path / "whole")
    assert expected.faults[0].count == 40 and expected.totals.replaced == 7
    last: list[Outcome] = []
    while stopped_at(3, lambda: last.append(searched(folder, tmp_path / "hits")[0])):
        pass
    assert last == [expected]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("works", "had another works"), ("rule", "had another rule"), ("corpus", "had another corpus"),
        ("field", "had another text field"), ("part", "is not what the interrupted search wrote"),
        ("cut", "is not what the interrupted search wrote"), ("state", "is not the state of a search"),
        ("digest", "is damaged"), ("gone", "is not what the interrupted search wrote"),
        ("pieces", "had another way of cutting"),
    ],
)  # fmt: skip
def test_a_search_that_is_another_one_starts_anew_and_says_so(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, change: str, told: str
) -> None:
    folder, out = write_corpus(tmp_path / "corpus", files=1), tmp_path / "hits"
    assert stopped_at(17, lambda: searched(folder, out))
    part, state = tmp_path / f"hits{PART}", tmp_path / f"hits{STATE}"
    assert part.stat().st_size > 0
    options: dict[str, Any] = {}
    if change == "works":
        options["prints"] = FingerprintSet.of(WORKS[:2])
    elif change == "rule":
        options["rule"] = Rule(hits=1)
    elif change == "corpus":
        (folder / "new.txt").write_text("one more")
    elif change == "field":
        options["text_field"] = "id"
    elif change == "part":
        part.write_bytes(part.read_bytes().replace(b"TD-1", b"TD-2"))
    elif change == "cut":
        part.write_bytes(part.read_bytes()[:40])
    elif change == "gone":
        part.unlink()
    elif change == "pieces":
        monkeypatch.setattr(search, "OVERLAP_CHARS", 401)
    elif change == "state":
        state.write_bytes(b'{"digest": 5, "state": []}')
    else:
        state.write_bytes(state.read_bytes().replace(b'"pieces":', b'"pieces":1'))
    outcome, notes = searched(folder, out, **options)
    assert len(notes) == 1 and told in notes[0] and notes[0].endswith("Starting anew.")
    fresh, none = searched(folder, tmp_path / "fresh", **options)
    assert none == [] and outcome == fresh and out.read_bytes() == (tmp_path / "fresh").read_bytes()


def test_a_forged_state_is_refused(tmp_path: Path, small: None) -> None:
    from pipeline.files import digest_json, write_json

    folder, out = write_corpus(tmp_path / "corpus", files=1), tmp_path / "hits"
    assert stopped_at(9, lambda: searched(folder, out))
    path = tmp_path / f"hits{STATE}"
    state = json.loads(path.read_bytes())["state"]
    trail = {"work": 77, "pending": [], "counted": [], "ranges": [], "words": 0, "reach": 0, "seen": []}
    write_json(path, {"digest": digest_json(state | {"trails": [trail]}), "state": state | {"trails": [trail]}})
    with pytest.raises(StoreDamaged, match="Delete it"):
        searched(folder, out)


def test_two_searches_do_not_write_one_file(some: Path, tmp_path: Path, small: None) -> None:
    def second(*_: object) -> None:
        with pytest.raises(WorkspaceBusy, match="another search writes it"):
            searched(some, tmp_path / "hits")
        raise Stop

    with mock.patch.object(search, "write_json", second), pytest.raises(Stop):
        searched(some, tmp_path / "hits")


KILLED = """
import sys
from pathlib import Path
from unittest import mock
from pipeline import corpus, search
from pipeline.corpus import corpus_files
from pipeline.fingerprints import FingerprintSet
from pipeline.scan import Rule
folder, out, works, workers = sys.argv[1:]
if __name__ == "__main__":
    prints = FingerprintSet.of([tuple(line.split("\\t")) for line in Path(works).read_text().splitlines()])
    with mock.patch.object(search, "UNIT_CHARS", 20_000), mock.patch.object(search, "SAVED_EVERY_S", 0.0):
        search.find_copies(prints, corpus_files([Path(folder)])[0], Path(out), Rule(), workers=int(workers))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(tmp_path: Path, workers: int) -> None:
    folder = write_corpus(tmp_path / "corpus", files=6, documents=300, words=150)
    (tmp_path / "works").write_text("\n".join(f"{name}\t{' '.join(text.split())}" for name, text in WORKS))
    (tmp_path / "search.py").write_text(KILLED)
    searched(folder, tmp_path / "whole", FingerprintSet.of([(name, " ".join(text.split())) for name, text in WORKS]))
    out, state = tmp_path / "hits", tmp_path / f"hits{STATE}"
    command = [
        sys.executable,
        str(tmp_path / "search.py"),
        str(folder),
        str(out),
        str(tmp_path / "works"),
        str(workers),
    ]
    draw, killed = random.Random(workers), 0
    while not out.exists():
        before = state.stat().st_mtime_ns if state.exists() else 0
        child = subprocess.Popen(command, start_new_session=True)
        while child.poll() is None and (state.stat().st_mtime_ns if state.exists() else 0) == before:
            time.sleep(0.002)
        if killed < 6:
            time.sleep(draw.random() * 0.1)
            if child.poll() is None:
                os.kill(child.pid, signal.SIGKILL)
                killed += 1
        child.wait(timeout=60)
        group_ends(child.pid)
    assert killed >= 2
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def group_ends(group: int) -> None:
    """Wait until no process of a killed one's group is left: workers end with their parent."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a worker outlived its parent")


def die(_: object) -> None:
    os._exit(9)


@pytest.mark.slow
def test_a_worker_that_dies_is_an_interruption(some: Path, tmp_path: Path, small: None) -> None:
    from pipeline import workers

    with mock.patch.object(workers, "_find", die), pytest.raises(Interrupted, match="A worker process died"):
        searched(some, tmp_path / "hits", workers=2)


# --- which works, and the verb ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A: taken out; B: waiting; C: withdrawn; D: taken out and contested; E: its text is a licence of the list."""
    folder = tmp_path_factory.mktemp("store")
    workspace = start_history(folder / "ws", array_model(folder / "model"))
    make_step(workspace, "A")
    make_step(workspace, "D")
    for name in ("B", "C", "E"):
        take_in(workspace, f"batch-{name}", {name: prose(name, 120)})
    put_on_record(workspace, "withdrawn", "C", "tester", "a mistake")
    put_on_record(workspace, "countered", "D", "tester", "a licence")
    (workspace.reference / "boilerplate").mkdir()
    (workspace.reference / "boilerplate" / "licence.txt").write_text(prose("E", 120))
    return workspace


def call(store: Workspace, folder: Path, *arguments: str) -> Answer:
    return takedown("-w", str(store.root), "find-copies", *arguments, folder=folder)


def test_all_requests_count_but_withdrawn_and_reinstated_ones(store: Workspace) -> None:
    from histories import entries_of

    prints = claimed_works(store, entries_of(store))
    assert prints.names == ("A", "D", "B", "E") and prints.sizes[3] == 0
    assert [copy.request_id for copy in found_in(prose("B", 120), prints)] == ["B"]
    assert found_in(prose("C", 120), prints) == []


def test_with_nothing_to_look_for_it_is_wrong_use(tmp_path: Path) -> None:
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model"))
    with pytest.raises(UsageError, match="nothing to look for"):
        claimed_works(workspace, ())


def test_boilerplate_that_is_no_text_is_wrong_use(store: Workspace, tmp_path: Path) -> None:
    broken = store.reference / "boilerplate" / "broken.txt"
    broken.write_bytes(b"\xff")
    try:
        found = call(store, tmp_path, str(tmp_path))
        assert found.code == 2 and "broken.txt: is not UTF-8 (byte 0)" in found.text
    finally:
        broken.unlink()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "host.txt").write_text(f"{prose('h', 300)} {cut_out(prose('B', 120), 20, 40)} {prose('i', 300)}")
    (folder / "lines.jsonl").write_text(
        "\n".join(json.dumps({"id": n, "body": prose(n, 80) if n else prose("B", 120)}) for n in range(3))
    )
    (folder / "notes.md").write_text("not read")
    return tmp_path


def test_the_verb_lists_copies_for_people(store: Workspace, texts: Path) -> None:
    found = call(store, texts, "texts/host.txt", "texts")
    assert found.code == 1, "lines without a field text"
    assert "Files with copies" in found.text and "host.txt" in found.text and " B " in found.text
    assert "1 of 1 documents in 2 files hold one of 4 works or a piece of one: 1 copies" in found.text
    assert "Not read, for their endings: 1 other files." in found.text
    assert "Not read: texts/lines.jsonl: document 1: holds no text in a field 'text'" in found.text
    assert "(and 2 more in this file)" in found.text
    assert cut_out(prose("B", 120), 20, 4) not in found.text


def test_the_verb_answers_in_json(store: Workspace, texts: Path) -> None:
    found = call(store, texts, "texts/lines.jsonl", "--text-field", "body", "--json")
    assert found.code == 0, found.text
    answer = json.loads(found.out)
    assert [(hit["document"], hit["name"], hit["request_id"], hit["containment"]) for hit in answer["hits"]] == [
        (1, "0", "B", 1.0)
    ]
    assert answer["totals"]["documents"] == 3 and answer["works"] == 4 and answer["faults"] == []
    assert sorted(path.name for path in texts.iterdir()) == ["texts"]


def test_the_verb_writes_a_file(store: Workspace, texts: Path) -> None:
    found = call(store, texts, "texts", "--text-field", "body", "--out", "texts/hits.jsonl")
    assert found.code == 0 and "Wrote texts/hits.jsonl" in found.text
    (host, line) = [json.loads(line) for line in (texts / "texts" / "hits.jsonl").read_bytes().splitlines()]
    assert host["file"] == "texts/host.txt" and line["file"] == "texts/lines.jsonl"
    text = (texts / "texts" / "host.txt").read_text()
    assert text[slice(*host["ranges"][0])].split()[0].rstrip(",.") == prose("B", 120).split()[20].rstrip(",.")
    before = (texts / "texts" / "hits.jsonl").read_bytes()
    again = call(store, texts, "texts", "--text-field", "body", "--out", "texts/hits.jsonl", "--json")
    assert again.code == 0, "the file that is written is no part of the corpus"
    assert json.loads(again.out)["hits"] is None and (texts / "texts" / "hits.jsonl").read_bytes() == before


def test_other_verbs_do_not_wait_for_what_searches_a_corpus() -> None:
    code = "import sys, flows.cli; print(sorted({'pipeline.search', 'multiprocessing'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["[]"]


def test_thorough_finds_a_single_run(store: Workspace, texts: Path) -> None:
    (texts / "one.txt").write_text(f"{prose('h', 300)} {cut_out(prose('B', 120), 20, 10)} {prose('i', 300)}")
    assert json.loads(call(store, texts, "one.txt", "--json").out)["hits"] == []
    (hit,) = json.loads(call(store, texts, "one.txt", "--json", "--thorough").out)["hits"]
    assert hit["shingles"] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("absent", "absent: is missing or cannot be reached"), ("texts/notes.md", "is no kind of file that"),
        ("texts --out nowhere/hits", "Name a file in an existing folder"), ("texts --out texts", "Name a file"),
        ("texts --out pipe", "Name a file"), ("empty", "There is nothing to search"),
        ("texts --workers 0", "--workers"), ("", "Missing argument"),
    ],
)  # fmt: skip
def test_wrong_use_is_told(store: Workspace, texts: Path, arguments: str, told: str) -> None:
    (texts / "empty").mkdir()
    (texts / "empty" / "notes.md").write_text("not read")
    os.mkfifo(texts / "pipe")
    found = call(store, texts, *arguments.split())
    assert found.code == 2 and told in found.text
    assert (texts / "pipe").is_fifo()


def test_the_list_may_not_be_written_into_the_workspace(store: Workspace, texts: Path) -> None:
    found = call(store, texts, "texts", "--out", str(store.root / "vault" / "x"))
    assert found.code == 2 and "lies inside the workspace" in found.text


# --- the benchmarks at toy size ---------------------------------------------------------------------------


def benchmark(name: str, folder: Path, *options: object) -> tuple[str, dict[str, Any]]:
    out = folder / "numbers.json"
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--json", str(out), *map(str, options)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return done.stdout, json.loads(out.read_bytes())


@pytest.mark.slow
def test_the_quality_table_of_a_few_passages(tmp_path: Path) -> None:
    shown, found = benchmark("dedupe_quality", tmp_path, "--passages", 12)
    assert found["works"] == found["negatives"] == 12 and len(found["edits"]) > 20
    for kind in ("exact", "upper case", "hyphenated line ends", "accents, NFD", "zero-width characters"):
        assert {stage: row["found"] for stage, row in found["edits"][kind].items()} == dict.fromkeys(
            ("candidate", "related", "folded", "repeat", "scan", "scan --thorough"), 1.0
        ), kind
        assert f"| {kind} | 100.0" in shown
    for kind, row in found["edits"].items():
        assert row["scan"]["found"] >= 0.7, kind
        assert row["scan"]["false"] == row["repeat"]["false"] == 0, kind


@pytest.mark.slow
def test_the_scan_benchmark_of_a_few_megabytes(tmp_path: Path) -> None:
    _, found = benchmark("dedupe_scan", tmp_path, "--megabytes", 4, "--works", 30, "--fingerprints", "0,100000")
    assert [run["workers"] for run in found["runs"]] == [1, 2, 1, 2]
    assert found["runs"][0]["fingerprints"] < found["runs"][2]["fingerprints"] == 100_000
    assert found["runs"][0]["characters"] == pytest.approx(4e6, rel=0.1)
    assert found["false_documents"] == found["text_files"]["false"] == 0
    assert all(row["found"] == 1 for kind, row in found["kinds"].items() if row["planted"] and "5 %" not in kind)
