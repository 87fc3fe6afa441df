"""Searching a corpus for the works of a workspace: `takedown find-copies`.

In: a workspace, the files of a corpus. Out: a file with one JSON line per document and work found in it, in order of
the corpus: the same bytes however often the search was interrupted and by how many processes it was done. Never: a text
outside the vault; a search that goes on from what was found for other works, files or settings.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

import numpy as np
from pydantic import Field, ValidationError

from pipeline.corpus import OVERLAP_CHARS, PIECE_CHARS, CorpusFile, Piece, read_file
from pipeline.errors import Problem, StoreDamaged, UsageError, WorkspaceBusy
from pipeline.files import (
    CHUNK_BYTES,
    canonical_json,
    digest_json,
    explained_space,
    put_in_place,
    read_json,
    remove,
    seal,
    write_json,
)
from pipeline.fingerprints import CORPUS_PARAMETERS, FingerprintSet
from pipeline.progress import tell
from pipeline.records import LedgerEntry, Record
from pipeline.references import boilerplate
from pipeline.scan import BRIDGED_WORDS, KEY, UNIT_CHARS, WITHIN_WORDS, Assembly, Copy, Rule, weight
from pipeline.settings import Runner
from pipeline.states import request_states
from pipeline.vault import open_vault, received_data
from pipeline.workers import searching
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

PART, STATE = ".part", ".state"
"""Endings of the files that lie beside the one being written."""

SAVED_EVERY_S: Final = 2.0
"""What a search that is killed has to do again, at most, beside reading up to there."""

_LET_GO = ("withdrawn", "reinstated")
"""States in which nothing speaks against a text; in all others somebody claims it."""


class Totals(Record):
    """What was read and found.

    Attributes:
        documents: Documents read.
        characters: Their characters.
        replaced: Those that stand for bytes that are not UTF-8 (or were U+FFFD already).
        holding: Documents that hold a copy.
        copies: Pairs of a document and a work found in it: lines of the file.
    """

    documents: int = 0
    characters: int = 0
    replaced: int = 0
    holding: int = 0
    copies: int = 0


class Fault(Record):
    """What could not be read of one file.

    Attributes:
        where: The file, or folder.
        found: The first thing that is wrong with it.
        count: How many things are.
    """

    where: str
    found: str
    count: int


class Outcome(Record):
    """A finished search; what it found is in its file."""

    files: int
    totals: Totals
    faults: tuple[Fault, ...]


class TrailState(Record):
    """A `pipeline.scan.Trail` at rest."""

    work: int = Field(ge=0)
    pending: list[tuple[int, int, int, int, int]]
    counted: list[bool]
    ranges: list[tuple[int, int]]
    words: int
    reach: int
    seen: list[int]


class SearchState(Record):
    """Where a search stands: all before this place of the corpus is in the file or in here.

    Attributes:
        format: Of this record.
        key: Digests of what the search depends on, by what they are of.
        file: Place of the file in the corpus; of the first one that was not finished.
        pieces: Pieces of it that are done.
        written: Bytes of the hits file.
        digest: SHA-256 of them.
        totals: So far.
        faults: So far.
        words: Words of the document that is being read.
        trails: Its trails.
    """

    format: Literal[1] = 1
    key: dict[str, str]
    file: int = Field(0, ge=0)
    pieces: int = Field(0, ge=0)
    written: int = Field(0, ge=0)
    digest: str = hashlib.sha256().hexdigest()
    totals: Totals = Totals()
    faults: tuple[Fault, ...] = ()
    words: int = Field(0, ge=0)
    trails: tuple[TrailState, ...] = ()


# --- what is looked for -----------------------------------------------------------------------------------


def claimed_works(workspace: Workspace, entries: Sequence[LedgerEntry]) -> FingerprintSet:
    """The works that somebody claims: taken out, to be worked on, contested, or found not to be memorised.

    Not those that were withdrawn, reinstated or erased. Boilerplate does not count: the texts in
    ``reference/boilerplate`` and what more unrelated works have than ``dedupe.boilerplate_works``.

    Raises:
        StoreDamaged: A text of the vault is missing, or is not the one that the ledger committed to.
        UsageError: There is no work, or a text of boilerplate is not UTF-8.
    """
    received, vault = received_data(entries), open_vault(workspace)
    states = request_states(entries)
    names = [name for name, state in states.items() if state.state not in _LET_GO and not state.erased]
    if not names:
        raise UsageError("Nothing is taken down and nothing waits whose text is there: there is nothing to look for.")
    works = ((name, vault.confirmed(name, received[name]).text) for name in names)
    return FingerprintSet.of(works, boilerplate(workspace), workspace.settings().dedupe.boilerplate_works)


# --- the search -------------------------------------------------------------------------------------------


def find_copies(
    prints: FingerprintSet,
    files: Sequence[CorpusFile],
    out: Path,
    rule: Rule,
    text_field: str = "text",
    workers: int = 1,
    runner: Runner = "threads",
    note: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Search files and write what is found; go on where the same search was interrupted.

    While it runs, hits are in ``<out>.part`` and its state in ``<out>.state``; ``out`` is there when it is done.

    Args:
        prints: What is looked for.
        files: The corpus, in order.
        out: File to write: a JSON object per line, a `Copy` with the path of its file.
        rule: When a document counts.
        text_field: Field of JSON objects, and column of tables, that holds the text.
        workers: Processes.
        runner: Whose: of this machine, or of a cluster.
        note: Told that a search goes on from an earlier one, or why it does not.

    Raises:
        WorkspaceBusy: Another process writes the same file.
        NoSpace: The disk is full; the same command goes on.
        UsageError: The cluster's extra is not installed.
        Interrupted: A worker died; the same command goes on.
    """
    key = {
        "works": prints.digest,
        "rule": digest_json([CORPUS_PARAMETERS.model_dump(), rule.model_dump(), WITHIN_WORDS, BRIDGED_WORDS]),
        "corpus": digest_json([[str(file.path), file.size, file.modified] for file in files]),
        "way of cutting": digest_json([PIECE_CHARS, OVERLAP_CHARS]),
        "text field": digest_json(text_field),
    }
    with explained_space(out), _Spool.open(out, key, note) as spool:
        assembly = _assembly(spool.state, prints, rule)
        size = sum(file.size for file in files)
        batches = read_batches(files, text_field, spool.state.file, spool.state.pieces)
        with searching(prints, rule, workers, runner) as search:
            for batch, results in search((batch, batch.pieces) for batch in batches):
                spool.take(batch, list(assembly.take(results)), files, assembly)
                tell("find copies", batch.read >> 20, size >> 20, f"MiB, {spool.state.totals.copies:,} copies")
        spool.finish(out)
    return Outcome(files=len(files), totals=spool.state.totals, faults=spool.state.faults)


@dataclass
class Batch:
    """Pieces that are searched together, and where the corpus stands behind them.

    Attributes:
        pieces: The pieces, of one file or of several.
        file: File that is read next, and
        done: how many pieces of it are done.
        read: Stored bytes read.
        faults: What could not be read since the batch before, by file.
    """

    pieces: list[Piece] = field(default_factory=list)
    file: int = 0
    done: int = 0
    read: int = 0
    faults: dict[str, Fault] = field(default_factory=dict)


def read_batches(files: Sequence[CorpusFile], text_field: str, file: int, done: int) -> Iterator[Batch]:
    """Read a corpus in batches of about `UNIT_CHARS` characters, from a place on.

    Args:
        files: The corpus.
        text_field: Field that holds the text.
        file: First file to read, and
        done: how many of its pieces to leave out; what is wrong with it in front of the last of them was told before.

    Yields:
        Batches; the last one stands behind the last file, and may have no pieces.
    """
    inside = 0

    def told(place: int) -> None:
        nonlocal inside
        inside = place

    batch, chars, before, skip = Batch(), 0, sum(f.size for f in files[:file]), done
    for number in range(file, len(files)):
        inside = done = 0
        for item in read_file(number, files[number], text_field, told):
            if isinstance(item, Problem):
                if done >= skip:
                    _add_fault(batch.faults, Fault(where=item.where, found=item.found, count=1))
                continue
            done += 1
            if done <= skip:
                continue
            batch.pieces.append(item)
            chars += weight(item)
            if chars >= UNIT_CHARS:
                batch.file, batch.done, batch.read = number, done, before + inside
                yield batch
                batch, chars = Batch(), 0
        skip = 0
        before += files[number].size
    batch.file, batch.done, batch.read = len(files), 0, before
    yield batch


def _add_fault(faults: dict[str, Fault], fault: Fault) -> None:
    """Count what is wrong with a file; the first thing is kept in words."""
    known = faults.get(fault.where)
    faults[fault.where] = known.model_copy(update={"count": known.count + fault.count}) if known else fault


def _assembly(state: SearchState, prints: FingerprintSet, rule: Rule) -> Assembly:
    """The document that was being read, as far as it was.

    Raises:
        StoreDamaged: It names works or shingles that there are not.
    """
    assembly = Assembly(prints, rule)
    assembly.words = state.words
    for rest in state.trails:
        keys = [*rest.seen, *(row[KEY] for row in rest.pending)]
        if rest.work >= len(prints.names) or any(not 0 <= key < len(prints.keys) for key in keys):
            raise StoreDamaged("The state of the search names what is not looked for. Delete it to start anew.")
        trail = assembly.trail(rest.work)
        trail.pending = np.array(rest.pending, dtype=np.int64).reshape(-1, 5)
        trail.counted = np.array(rest.counted, dtype=np.bool_)
        trail.ranges, trail.words, trail.reach = list(rest.ranges), rest.words, rest.reach
        trail.seen = np.array(rest.seen, dtype=np.int64)
    return assembly


def _at_rest(assembly: Assembly) -> tuple[TrailState, ...]:
    return tuple(
        TrailState(
            work=work,
            pending=trail.pending.tolist(),
            counted=trail.counted.tolist(),
            ranges=trail.ranges,
            words=trail.words,
            reach=trail.reach,
            seen=trail.seen.tolist(),
        )
        for work, trail in assembly.trails.items()
    )


# --- what lasts -------------------------------------------------------------------------------------------


class _Spool:
    """The hits found so far and the state of the search, on disk; build with `open`.

    The hits are always written first. What they hold beyond the state, a search that goes on cuts off and finds again.
    """

    def __init__(self, stream: BinaryIO, part: Path, state_file: Path, state: SearchState, written: Hash) -> None:
        self.state = state
        self._stream, self._part, self._state_file, self._written = stream, part, state_file, written
        self._faults = {fault.where: fault for fault in state.faults}
        self._saved_at = time.monotonic()

    @classmethod
    @contextmanager
    def open(cls, out: Path, key: dict[str, str], note: Callable[[str], None]) -> Iterator[_Spool]:
        """Go on with a search that was interrupted, if it was the same, or begin one.

        Raises:
            WorkspaceBusy: Another process writes there.
        """
        part, state_file = (out.with_name(out.name + ending) for ending in (PART, STATE))
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "r+b") as stream:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.path.samestat(os.fstat(fd), part.stat())  # else its writer has just finished
            except (BlockingIOError, FileNotFoundError):
                free = False
            if not free:
                raise WorkspaceBusy(f"{part}: another search writes it. Wait for it, or name another --out.")
            state, written = SearchState(key=key), hashlib.sha256()
            if state_file.exists():
                found = _read_state(state_file, key, part, stream)
                if isinstance(found, str):
                    note(f"{found} Starting anew.")
                else:
                    state, written = found
                    note(f"Going on where the search was interrupted: {state.totals.documents:,} documents are done.")
            stream.truncate(state.written)
            stream.seek(0, os.SEEK_END)
            yield cls(stream, part, state_file, state, written)

    def take(self, batch: Batch, copies: Sequence[Copy], files: Sequence[CorpusFile], assembly: Assembly) -> None:
        """Write what a batch held, and save the state if it is time."""
        lines = b"".join(
            canonical_json({**copy.model_dump(), "file": str(files[copy.file].path)}) + b"\n" for copy in copies
        )
        self._stream.write(lines)
        self._written.update(lines)
        for fault in batch.faults.values():
            _add_fault(self._faults, fault)
        known = self.state.totals
        totals = Totals(
            documents=known.documents + sum(piece.last for piece in batch.pieces),
            characters=known.characters + sum(piece.keep for piece in batch.pieces),
            replaced=known.replaced + sum(piece.text.count("\ufffd", 0, piece.keep) for piece in batch.pieces),
            holding=known.holding + len({(copy.file, copy.document) for copy in copies}),
            copies=known.copies + len(copies),
        )
        self.state = self.state.model_copy(
            update={
                "file": batch.file,
                "pieces": batch.done,
                "written": self.state.written + len(lines),
                "totals": totals,
                "faults": tuple(self._faults.values()) if batch.faults else self.state.faults,
            }
        )
        if time.monotonic() - self._saved_at >= SAVED_EVERY_S:
            self._save(assembly)

    def _save(self, assembly: Assembly) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        state = self.state.model_copy(
            update={"digest": self._written.hexdigest(), "words": assembly.words, "trails": _at_rest(assembly)}
        ).model_dump(mode="json")
        write_json(self._state_file, {"digest": digest_json(state), "state": state})
        self._saved_at = time.monotonic()

    def finish(self, out: Path) -> None:
        """Give the file its name; nothing of the search is left beside it."""
        seal(self._stream, 0o644)
        put_in_place(self._part, out)
        remove(self._state_file)


def _read_state(path: Path, key: dict[str, str], part: Path, hits: BinaryIO) -> tuple[SearchState, Hash] | str:
    """The state of an interrupted search and the hash of what it has written, or why it cannot be gone on with."""
    try:
        tree = read_json(path)
        state = SearchState.model_validate(tree["state"])
        if tree["digest"] != digest_json(tree["state"]):
            return f"{path}: is damaged."
    except (StoreDamaged, OSError, ValidationError, KeyError, TypeError):
        return f"{path}: is not the state of a search of this release."
    other = sorted(name for name in {*key, *state.key} if key.get(name) != state.key.get(name))
    if other:
        return f"The interrupted search had another {' and another '.join(other)}."
    written, left = hashlib.sha256(), state.written
    hits.seek(0)
    while left and (block := hits.read(min(left, CHUNK_BYTES))):
        written.update(block)
        left -= len(block)
    if left or written.hexdigest() != state.digest:
        return f"{part}: is not what the interrupted search wrote."
    return state, written
