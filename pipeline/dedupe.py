"""Has this text been taken down before, does the batch hold it twice, does the retain text hold it?

In: requests, and the index of everything taken down. Out: one decision per request with its evidence, and the
retain documents to leave out. Never: keeps text (the index holds hashes), trusts a sketch (MinHash only proposes
pairs; exact overlap of word shingles decides), or drops a text through a chain of similar ones.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from datasketch import LeanMinHash, MinHash, MinHashLSH

from pipeline.errors import NoSpace, StoreDamaged, UsageError, WorkspaceBusy
from pipeline.files import canonical_json, digest_bytes, digest_json, write_atomic
from pipeline.normalise import NORMALISER, is_spaceless, words
from pipeline.records import DedupeDecision, Evidence, Record, RetainExclusion, TakedownRequest
from pipeline.settings import DedupeSettings

Prints: TypeAlias = npt.NDArray[np.uint64]
Flags: TypeAlias = npt.NDArray[np.bool_]
Signatures: TypeAlias = npt.NDArray[np.uint32]

REPORTED = 0.05
"""A pair is evidence from this Jaccard or containment on; 90 unrelated essays of 500 words reached 0.027."""
COVERED_RUN_WORDS = 10
"""Words that must be covered in a row before they count as taken down: with many earlier works some common
three-word phrases are covered by chance, ten in a row practically never."""
NEW_PASSAGE_WORDS = 50
"""A text with this many new words in a row is neither a repeat nor folded, however long the rest: 5 % of a novel
is a chapter."""


class DedupeParameters(Record):
    """What signatures and fingerprints depend on; an index of other parameters cannot be compared with.

    Attributes:
        normaliser: Version of `pipeline.normalise`.
        shingle_words: Words of a shingle.
        shingle_characters: Characters of a shingle that starts in a script without spaces: about as telling as
            three words; three characters would all be found in any long book.
        fingerprint: Hash of a shingle: 64 bits of BLAKE2b over its words joined by one space, little-endian.
        scheme: Permutations of datasketch.
        seed: Seed of the permutations.
        num_perm: Length of a signature.
        bands: Bands of the LSH.
        rows: Rows of a band. 64 x 2 finds pairs from Jaccard 0.2 on (93 % there, 99.7 % at 0.3).
        window_shingles: Shingles of a window; about 100 words, so that 30 words in common are enough.
        window_step: Shingles from one window to the next; any stretch of half a window lies whole in one.
    """

    normaliser: Literal["v1"] = NORMALISER
    shingle_words: int = 3
    shingle_characters: int = 8
    fingerprint: Literal["blake2b-64"] = "blake2b-64"
    scheme: Literal["affine32"] = "affine32"
    seed: int = 1
    num_perm: int = 128
    bands: int = 64
    rows: int = 2
    window_shingles: int = 98
    window_step: int = 49


@dataclass(frozen=True)
class ShingledText:
    """A text as its shingles; shingle i starts at word i.

    Attributes:
        length: Characters of the raw text.
        spans: (words, 2) character range of each word in the raw text.
        sequence: (shingles,) fingerprint of each shingle, in order of the text.
        ends: (shingles,) index of the word after each shingle.
    """

    length: int
    spans: npt.NDArray[np.int64]
    sequence: Prints
    ends: npt.NDArray[np.int64]

    @cached_property
    def prints(self) -> Prints:
        """The set of fingerprints, sorted."""
        return np.unique(self.sequence)

    def windows(self, parameters: DedupeParameters) -> list[Prints]:
        """Overlapping windows of the sequence; the last one may be shorter."""
        size, step = parameters.window_shingles, parameters.window_step
        count = len(self.sequence)
        return [self.sequence[at : at + size] for at in range(0, max(count - size + step, min(count, 1)), step)]


def fingerprint(shingle: str) -> int:
    """64-bit hash of a shingle's words joined by one space; the same on every machine, unlike Python's hash()."""
    return int.from_bytes(blake2b(shingle.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def shingle(text: str, parameters: DedupeParameters) -> ShingledText:
    """Cut a text into shingles.

    The last shingle is the first that reaches the end, so a text shorter than a shingle is one as a whole, and a
    text without words has none.
    """
    found = words(text)
    texts = [word.text for word in found]
    sequence: list[int] = []
    ends: list[int] = []
    for start, word in enumerate(texts):
        end = start + (parameters.shingle_characters if is_spaceless(word) else parameters.shingle_words)
        sequence.append(fingerprint(" ".join(texts[start:end])))
        ends.append(min(end, len(texts)))
        if end >= len(texts):
            break
    spans = np.array([(word.start, word.end) for word in found], dtype=np.int64).reshape(-1, 2)
    return ShingledText(len(text), spans, np.array(sequence, dtype=np.uint64), np.array(ends, dtype=np.int64))


def sign(windows: Iterable[Prints], parameters: DedupeParameters) -> Signatures:
    """MinHash signatures as datasketch computes them, one row per window.

    Returns:
        (windows, num_perm) uint32: the hashvalues of ``MinHash(num_perm, seed, scheme="affine32", hashfunc=low32)``
        updated with each shingle, ``low32`` being the low 32 bits of `fingerprint`.
    """
    sketches = MinHash.generator(
        # The 32 bits are cut here: datasketch refuses larger Python ints, but cuts NumPy's without a word.
        ((window & np.uint64(0xFFFFFFFF)).tolist() for window in windows),
        num_perm=parameters.num_perm,
        seed=parameters.seed,
        scheme=parameters.scheme,
        hashfunc=int,
    )
    rows = [sketch.hashvalues for sketch in sketches]
    return np.array(rows, dtype=np.uint32).reshape(len(rows), parameters.num_perm)


class WindowTable:
    """LSH over the windows of many texts: which of them may share a passage with a given one?

    Whole-text signatures would miss excerpts, whose Jaccard similarity is only the ratio of the sizes.
    """

    def __init__(self, parameters: DedupeParameters) -> None:
        self._parameters = parameters
        self._lsh = MinHashLSH(num_perm=parameters.num_perm, params=(parameters.bands, parameters.rows))

    def _sketches(self, signatures: Signatures) -> Iterator[LeanMinHash]:
        for row in signatures:
            yield LeanMinHash(seed=self._parameters.seed, hashvalues=row, scheme=self._parameters.scheme)

    def add(self, name: str, signatures: Signatures) -> None:
        """Add the windows of a text under a new name."""
        for number, sketch in enumerate(self._sketches(signatures)):
            self._lsh.insert((name, number), sketch)

    def query(self, signatures: Signatures) -> set[str]:
        """Names of the texts with a window similar to one of these."""
        return {name for sketch in self._sketches(signatures) for name, _ in self._lsh.query(sketch)}


class DedupeIndex:
    """Fingerprints and signatures of everything taken down: one SQLite file, no text. Build with `open`."""

    def __init__(self, path: Path, database: sqlite3.Connection, parameters: DedupeParameters) -> None:
        self.path = path
        self.parameters = parameters
        self._database = database
        self._table: WindowTable | None = None

    @classmethod
    def open(cls, folder: Path, parameters: DedupeParameters | None = None) -> Self:
        """Open the index of a folder, or begin an empty one.

        Args:
            folder: The workspace's ``index`` folder; made if absent.
            parameters: What the index must have been made with.

        Raises:
            UsageError: It was made with other parameters; each is named.
            StoreDamaged: The file is not a whole index.
        """
        parameters = parameters or DedupeParameters()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "index.db"
        if not path.exists():
            # Made whole, then renamed: an index that is empty later is a damaged one, never a new one.
            write_atomic(path, _empty_index(parameters), 0o600)
        database = sqlite3.connect(path, timeout=30, isolation_level=None)
        try:
            with _explained(path):
                database.execute("PRAGMA synchronous = FULL")
                _check(path, database, parameters)
        except BaseException:
            database.close()
            raise
        return cls(path, database, parameters)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def ids(self) -> tuple[str, ...]:
        """Every takedown indexed, in the order they were added."""
        with _explained(self.path):
            rows = self._database.execute("SELECT request_id FROM takedown ORDER BY position").fetchall()
        return tuple(row[0] for row in rows)

    def prints(self, request_id: str) -> Prints:
        """Sorted fingerprints of one takedown.

        Raises:
            UsageError: It is not indexed.
            StoreDamaged: Its row does not match its digest.
        """
        for _, prints, _ in self._rows("WHERE request_id = ?", request_id):
            return prints
        raise UsageError(f"{self.path}: holds no takedown {request_id!r}.")

    def add(self, request_id: str, text: str) -> bool:
        """Index a takedown, whole or not at all. Doing it again changes nothing.

        Returns:
            Whether it was added now; False when it was there, or has no words to find it by.

        Raises:
            UsageError: Another text is indexed under this id.
            NoSpace: The disk is full; nothing was added.
        """
        shingled = shingle(text, self.parameters)
        if request_id in self.ids():
            if not np.array_equal(self.prints(request_id), shingled.prints):
                raise UsageError(
                    f"{self.path}: {request_id!r} is indexed with another text. Give the new text a new id."
                )
            return False
        if not len(shingled.prints):
            return False  # two empty sketches are equal: an empty text would match every other one
        signatures = sign(shingled.windows(self.parameters), self.parameters)
        row = (request_id, shingled.prints.astype("<u8").tobytes(), signatures.astype("<u4").tobytes())
        with _explained(self.path):
            self._database.execute(
                "INSERT INTO takedown (request_id, prints, signatures, digest) VALUES (?, ?, ?, ?)",
                (*row, _row_digest(*row)),
            )
        if self._table is not None:
            self._table.add(request_id, signatures)
        return True

    def remove(self, request_id: str) -> bool:
        """Forget a takedown whose notice was withdrawn; returns whether it was there."""
        with _explained(self.path):
            gone = self._database.execute("DELETE FROM takedown WHERE request_id = ?", (request_id,)).rowcount > 0
        if gone:
            self._table = None
        return gone

    def candidates(self, text: ShingledText) -> tuple[str, ...]:
        """Takedowns that may share a passage with a text, in the order they were added; to be verified.

        The first call reads all signatures and builds the LSH tables: about 0.3 ms and 22 kB per 50 indexed words.

        Raises:
            StoreDamaged: A row does not match its digest.
        """
        if self._table is None:
            table = WindowTable(self.parameters)
            for request_id, _, signatures in self._rows():
                table.add(request_id, signatures)
            self._table = table
        found = self._table.query(sign(text.windows(self.parameters), self.parameters))
        return tuple(name for name in self.ids() if name in found) if found else ()

    def _rows(self, where: str = "", *values: str) -> Iterator[tuple[str, Prints, Signatures]]:
        query = f"SELECT request_id, prints, signatures, digest FROM takedown {where} ORDER BY position"
        with _explained(self.path):
            for request_id, prints, signatures, digest in self._database.execute(query, values):
                if digest != _row_digest(request_id, prints, signatures):
                    raise StoreDamaged(f"{self.path}: the row of {request_id!r} does not match its digest. {_REBUILD}")
                rows = np.frombuffer(signatures, "<u4").reshape(-1, self.parameters.num_perm)
                yield request_id, np.frombuffer(prints, "<u8"), rows


_REBUILD = "Rebuild the index: delete this file and add every takedown again from the vault."

_SCHEMA = (
    "CREATE TABLE parameters (value TEXT NOT NULL)",
    "CREATE TABLE takedown (position INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE,"
    " prints BLOB NOT NULL, signatures BLOB NOT NULL, digest TEXT NOT NULL)",
)


def _empty_index(parameters: DedupeParameters) -> bytes:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        for statement in _SCHEMA:
            database.execute(statement)
        database.execute("INSERT INTO parameters VALUES (?)", (canonical_json(parameters.model_dump()).decode(),))
        return database.serialize()


def _check(path: Path, database: sqlite3.Connection, parameters: DedupeParameters) -> None:
    """Check that a file is a whole index of these parameters."""
    state = " ".join(database.execute("PRAGMA quick_check(1)").fetchone()[0].split())
    if state != "ok":
        raise StoreDamaged(f"{path}: is damaged ({state}). {_REBUILD}")
    ((recorded,),) = database.execute("SELECT value FROM parameters").fetchall()
    found, wanted = dict(json.loads(recorded)), parameters.model_dump()
    other = [
        f"{key} is {found.get(key)!r}, wanted {wanted.get(key)!r}"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    ]
    if other:
        raise UsageError(f"{path}: was made with other parameters: {'; '.join(other)}. {_REBUILD}")


def _row_digest(request_id: str, prints: bytes, signatures: bytes) -> str:
    return digest_json([request_id, digest_bytes(prints), digest_bytes(signatures)])


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours; each statement is a transaction of its own."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # our own mistake, such as use after close
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY):
            raise NoSpace(
                f"{path}: cannot be written ({error}). Nothing was added; free some space and repeat."
            ) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise WorkspaceBusy(f"{path}: is in use by another process. Nothing was changed; repeat later.") from error
        raise StoreDamaged(f"{path}: is not a whole index ({error}). {_REBUILD}") from error
    except (ValueError, TypeError) as error:
        raise StoreDamaged(f"{path}: holds what this product does not write ({error}). {_REBUILD}") from error


def compare(request_id: str, new: Prints, other: Prints) -> Evidence:
    """Exact overlap of a new text with another one, over their sorted, non-empty fingerprints."""
    shared = int(np.count_nonzero(_member(new, other)))
    return Evidence(
        request_id=request_id,
        jaccard=shared / (len(new) + len(other) - shared),
        containment=shared / len(new),
        contained=shared / len(other),
    )


def _member(values: Prints, sorted_set: Prints) -> Flags:
    """Which values are in a sorted, non-empty set."""
    places = np.minimum(np.searchsorted(sorted_set, values), len(sorted_set) - 1)
    found: Flags = sorted_set[places] == values
    return found


def _runs(flags: Flags) -> list[tuple[int, int]]:
    """The ranges [start, end) where flags are set."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _words_of(text: ShingledText, shingles: Flags, at_least: int) -> Flags:
    """Words under runs of the given shingles, runs of fewer than ``at_least`` words left out."""
    inside = np.zeros(len(text.spans), dtype=np.bool_)
    for start, stop in _runs(shingles):
        end = int(text.ends[start:stop].max())
        if end - start >= at_least:
            inside[start:end] = True
    return inside


def _new_words(text: ShingledText, covered: Flags) -> list[tuple[int, int]]:
    """Ranges of words that no covered run of shingles holds; never empty while a shingle is uncovered."""
    new = ~_words_of(text, covered, COVERED_RUN_WORDS)
    if not new.any():
        # Every word is known but not in this order (two works joined, sentences moved): the seams are new.
        new = _words_of(text, ~covered, 1)
    return _runs(new)


def _known(text: ShingledText, covered: Flags, at_least: float) -> bool:
    """Whether at least this share of the distinct shingles is covered and no whole passage is new."""
    if covered.all():
        return True
    longest = max(end - start for start, end in _new_words(text, covered))
    return _share(text, covered) >= at_least and longest < NEW_PASSAGE_WORDS


def _share(text: ShingledText, covered: Flags) -> float:
    return len(np.unique(text.sequence[covered])) / len(text.prints)


def _spans(text: ShingledText, covered: Flags) -> tuple[tuple[int, int], ...]:
    """Character ranges of the new words; at the text's edges they take in what is not a word."""
    last = len(text.spans)
    return tuple(
        (int(text.spans[start][0]) if start else 0, int(text.spans[end - 1][1]) if end < last else text.length)
        for start, end in _new_words(text, covered)
    )


def dedupe(
    requests: Sequence[TakedownRequest], index: DedupeIndex, settings: DedupeSettings
) -> tuple[DedupeDecision, ...]:
    """Decide for each request whether it is fresh, a repeat, folded into another one, or empty.

    Earlier takedowns decide first: a repeat is neither folded nor folded into, since nothing is worked on for it.
    Of the others the longest stays, on equal length the first, and the rest are folded only into texts that stay.
    Requests of this batch that are in the index already do not count as earlier, so that a resumed run decides as
    the first one did.

    Args:
        requests: The batch; ids are unique.
        index: Everything taken down before.
        settings: Thresholds.

    Returns:
        One decision per request, in the order given. Evidence holds earlier takedowns and requests of the batch,
        strongest containment first; that of a repeat begins with the earlier takedowns, that of a folded request
        with the text that it is folded into.

    Raises:
        StoreDamaged: The index is damaged.
    """
    names = [request.request_id for request in requests]
    texts = [shingle(request.text, index.parameters) for request in requests]
    siblings = _siblings(names, texts, index.parameters)
    decisions: dict[str, DedupeDecision] = {}
    stays: dict[str, Prints] = {}
    for at in sorted(range(len(texts)), key=lambda at: (-len(texts[at].prints), at)):
        name, text = names[at], texts[at]
        if not len(text.prints):
            decisions[name] = DedupeDecision(request_id=name, verdict="empty", covered=0.0)
            continue
        earlier = {key: index.prints(key) for key in index.candidates(text) if key not in names}
        covered = _covered(text, earlier.values())
        mates = siblings[name]
        into = max(
            (
                key
                for key in mates
                if key in stays and _known(text, _covered(text, [mates[key]]), settings.fold_containment)
            ),
            key=lambda key: compare(key, text.prints, mates[key]).containment,
            default=None,
        )
        verdict: Literal["fresh", "repeat", "folded"] = "fresh"
        if _known(text, covered, settings.repeat_covered):
            verdict, first = "repeat", set(earlier)
        elif into is not None:
            verdict, first = "folded", {into}
        else:
            stays[name], first = text.prints, set()
        decisions[name] = DedupeDecision(
            request_id=name,
            verdict=verdict,
            covered=_share(text, covered),
            evidence=_evidence(text, {**earlier, **mates}, first),
            fresh_spans=_spans(text, covered) if verdict == "fresh" else (),
        )
    return tuple(decisions[name] for name in names)


def _covered(text: ShingledText, others: Iterable[Prints]) -> Flags:
    """Which shingles of the text are in the union of others."""
    covered = np.zeros(len(text.sequence), dtype=np.bool_)
    for prints in others:
        covered |= _member(text.sequence, prints)
    return covered


def _siblings(
    names: Sequence[str], texts: Sequence[ShingledText], parameters: DedupeParameters
) -> dict[str, dict[str, Prints]]:
    """For each text the others of the batch that may share a passage with it, in order of the batch."""
    if len(texts) == 1:
        return {names[0]: {}}
    table = WindowTable(parameters)
    signatures = [sign(text.windows(parameters), parameters) for text in texts]
    for name, rows in zip(names, signatures, strict=True):
        table.add(name, rows)
    prints = {name: text.prints for name, text in zip(names, texts, strict=True)}
    found = {name: table.query(rows) for name, rows in zip(names, signatures, strict=True)}
    return {name: {key: prints[key] for key in names if key in found[name] and key != name} for name in names}


def _evidence(text: ShingledText, others: Mapping[str, Prints], first: set[str]) -> tuple[Evidence, ...]:
    """Verified pairs that say something: enough overlap, or a passage in common however long both texts are."""
    pairs = []
    for name, prints in others.items():
        pair = compare(name, text.prints, prints)
        overlap = max(pair.jaccard, pair.containment, pair.contained)
        if overlap >= REPORTED or _words_of(text, _member(text.sequence, prints), COVERED_RUN_WORDS).any():
            pairs.append(pair)
    return tuple(sorted(pairs, key=lambda pair: (pair.request_id not in first, -pair.containment)))


def exclude_retain(
    documents: Mapping[str, str],
    takedowns: Mapping[str, str],
    settings: DedupeSettings,
    parameters: DedupeParameters | None = None,
) -> tuple[RetainExclusion, ...]:
    """Find retain documents that hold text to be taken out: keeping them on purpose would undo the takedown.

    Beside the document as a whole each of its windows is compared, so that a long document is found by one passage
    of a long work; ``containment`` is that of the document or of its most similar window, whichever is larger.

    Args:
        documents: Retain texts by name.
        takedowns: Texts of takedowns by request id.
        settings: Thresholds.
        parameters: Shingles and windows.

    Returns:
        At most one exclusion per document, with the takedown that it resembles most, in order of the documents.
    """
    parameters = parameters or DedupeParameters()
    table = WindowTable(parameters)
    works: dict[str, Prints] = {}
    for name, raw in takedowns.items():
        text = shingle(raw, parameters)
        if len(text.prints):
            works[name] = text.prints
            table.add(name, sign(text.windows(parameters), parameters))
    excluded: list[RetainExclusion] = []
    for document, raw in documents.items():
        text = shingle(raw, parameters)
        windows = text.windows(parameters)
        found = table.query(sign(windows, parameters))
        pairs = []
        for name in (name for name in works if name in found):
            pair = compare(name, text.prints, works[name])
            nearest = max(float(_member(window, works[name]).mean()) for window in windows)
            containment = max(pair.containment, nearest)
            if (
                pair.jaccard >= settings.retain_jaccard
                or max(containment, pair.contained) >= settings.retain_containment
            ):
                pairs.append(pair.model_copy(update={"containment": containment}))
        if pairs:
            strongest = max(pairs, key=lambda pair: (pair.containment + pair.contained, pair.jaccard))
            excluded.append(RetainExclusion(document=document, **strongest.model_dump()))
    return tuple(excluded)
