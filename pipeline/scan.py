"""Which documents hold a piece of a work? Word 10-grams of the documents against those of all works at once.

In: works by name, then documents in pieces. Out: one record per document and work found in it, with positions. Never:
a file, a text in a result, or memory that grows with a document's length. `scan_documents` is a pure function of its
arguments, so it maps over a corpus on any executor; the set of fingerprints is what every worker gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipeline.corpus import Piece, cut
from pipeline.fingerprints import CORPUS_PARAMETERS, FingerprintSet, Integers
from pipeline.records import Record
from pipeline.shingles import Flags, ShingledText, shingle

WITHIN_WORDS: Final = 300
"""The hits that make a copy begin within so many words."""
BRIDGED_WORDS: Final = 50
"""Up to so many words between two hits belong to the copy: misread or changed ones."""
UNIT_CHARS: Final = 1 << 20
"""Text that is shingled at once; short documents are put together."""


class Rule(Record):
    """When a document counts as holding a piece of a work.

    Attributes:
        hits: Distinct 10-grams of the work that begin within `WITHIN_WORDS`; a shorter work needs all it has.
            Measured: 3 found every copy with 2 % of the characters misread or 10 % of the words changed, and none of
            600 documents without one; 1 finds more of what is badly damaged, and up to 7 % of long documents.
    """

    hits: int = 3


class Copy(Record):
    """A work, or a piece of it, in a document.

    Attributes:
        file: Place of the file in the corpus; 0 without files.
        document: Number of the document in its file, from 1.
        name: The document's own id, where it has one.
        request_id: The work.
        ranges: Character ranges [start, end) of the document, in order, each from the first to the last hit of a
            stretch without a gap of more than `BRIDGED_WORDS`.
        words: Words of the document that are covered by hits.
        shingles: Distinct 10-grams of the work that were hit.
        containment: ``shingles`` as a share of all the work has.
    """

    file: int
    document: int
    name: str | None
    request_id: str
    ranges: tuple[tuple[int, int], ...]
    words: int
    shingles: int
    containment: float


# --- search -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hits:
    """Shingles of one work in a stretch of a document, in order of the text.

    Attributes:
        work: Place of the work in the set.
        rows: (hits, 5) the shingle's first word and the word after it, counted from the beginning of the stretch; its
            characters [start, end) in the document; place of its key. The columns are `WORD` … `KEY`.
    """

    work: int
    rows: Integers


WORD, WORD_END, CHAR, CHAR_END, KEY = range(5)


@dataclass(frozen=True)
class Stretch:
    """What is in a piece of a document that has others.

    Attributes:
        file: Place of the file in the corpus.
        document: Number of the document in its file.
        name: The document's id.
        last: Whether the document ends here.
        words: Words that begin in the piece.
        hits: Those of each work that has any.
    """

    file: int
    document: int
    name: str | None
    last: bool
    words: int
    hits: tuple[Hits, ...]


def scan_documents(
    documents: Iterable[tuple[str | None, str]], prints: FingerprintSet, rule: Rule | None = None
) -> list[Copy]:
    """Find the works in some documents; pure, for executors that map over parts of a corpus.

    Args:
        documents: Ids, or None, and texts of any length.
        prints: What is looked for; the same for all parts, so broadcast it.
        rule: When a document counts.

    Returns:
        The copies, numbered by document from 1, in order of the documents and in each by work.
    """
    rule = rule or Rule()
    pieces = (
        Piece(0, number, name, start, text, keep, last)
        for number, (name, whole) in enumerate(documents, 1)
        for start, text, keep, last in cut([whole])
    )
    assembly = Assembly(prints, rule)
    return [copy for unit in units(pieces) for copy in assembly.take(find(unit, prints, rule))]


def units(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Put pieces together to lists of about `UNIT_CHARS` characters."""
    unit: list[Piece] = []
    chars = 0
    for piece in pieces:
        unit.append(piece)
        chars += weight(piece)
        if chars >= UNIT_CHARS:
            yield unit
            unit, chars = [], 0
    if unit:
        yield unit


def weight(piece: Piece) -> int:
    """Characters of a piece, and a few more: an empty one costs something, too."""
    return len(piece.text) + 16


def find(pieces: Sequence[Piece], prints: FingerprintSet, rule: Rule) -> list[Copy | Stretch]:
    """Search some pieces of documents.

    Args:
        pieces: Any pieces; small ones are shingled together, so give many of them.
        prints: What is looked for.
        rule: When a document counts.

    Returns:
        In order of the pieces: the copies in those that are whole documents, and a stretch for each other piece.
    """
    # A blank line lies between two documents, so no word goes on from one to the next.
    text = shingle("\n\n".join(piece.text for piece in pieces), CORPUS_PARAMETERS)
    begins = np.cumsum([0, *(len(piece.text) + 2 for piece in pieces)])
    keeps = begins[:-1] + [piece.keep for piece in pieces]
    chars = np.ascontiguousarray(text.spans[:, 0])
    words, words_kept = np.searchsorted(chars, begins), np.searchsorted(chars, keeps)
    rows, owner = _own_hits(text, prints, begins, words, keeps)
    edges = np.searchsorted(owner, np.arange(len(pieces) + 1))
    short = _short(text, words) if prints.short else np.zeros(len(pieces), np.bool_)
    results: list[Copy | Stretch] = []
    for at, piece in enumerate(pieces):
        if piece.whole and short[at]:
            results += _copies(piece, _whole(piece.text, prints), prints, rule)
        elif piece.whole:
            if edges[at] < edges[at + 1]:
                results += _copies(piece, rows[edges[at] : edges[at + 1]], prints, rule)
        else:
            found = rows[edges[at] : edges[at + 1]] + np.array([0, 0, piece.start, piece.start, 0])
            count = int(words_kept[at] - words[at])
            hits = tuple(_by_work(found, prints))
            results.append(Stretch(piece.file, piece.document, piece.name, piece.last, count, hits))
    return results


def _own_hits(
    text: ShingledText, prints: FingerprintSet, begins: Integers, words: Integers, keeps: Integers
) -> tuple[Integers, Integers]:
    """The hits in a text that is put together from pieces.

    Args:
        text: The text.
        prints: What is looked for.
        begins: (pieces + 1,) where each piece begins, in characters.
        words: (pieces + 1,) the first word of each.
        keeps: (pieces,) where what each piece shows of the next one begins.

    Returns:
        Rows as in `Hits`, counted from the beginning of the piece, and the piece of each.
    """
    places, keys = prints.find(text.sequence)
    char, end = text.spans[places, 0], text.ends[places]
    owner = np.searchsorted(begins, char, side="right") - 1
    # A shingle that reaches into the next piece is none, and one that begins in what is shown of it is found there.
    own = (end <= words[owner + 1]) & (char < keeps[owner])
    places, keys, char, end, owner = places[own], keys[own], char[own], end[own], owner[own]
    from_word, from_char = words[owner], begins[owner]
    columns = (places - from_word, end - from_word, char - from_char, text.spans[end - 1, 1] - from_char, keys)
    return np.stack(columns, axis=1), owner


def _short(text: ShingledText, words: Integers) -> Flags:
    """Which pieces have words, but fewer than a shingle: their only shingle is not in the text put together."""
    first, after = words[:-1], words[1:]
    ends = np.append(text.ends, np.iinfo(np.int64).max)
    flags: Flags = (first < after) & (ends[np.minimum(first, len(text.ends))] > after)
    return flags


def _whole(text: str, prints: FingerprintSet) -> Integers:
    """The hits in a document by itself."""
    shingled = shingle(text, CORPUS_PARAMETERS)
    bounds = np.array([0, len(text) + 1])
    words = np.array([0, len(shingled.spans)])
    return _own_hits(shingled, prints, bounds, words, bounds[1:])[0]


def _by_work(rows: Integers, prints: FingerprintSet) -> list[Hits]:
    """Hits with the works that own their keys."""
    first = prints.first[rows[:, KEY]]
    count = prints.first[rows[:, KEY] + 1] - first
    each = np.repeat(np.arange(len(rows)), count)
    works = prints.owners[np.arange(len(each)) + np.repeat(first - np.cumsum(count) + count, count)]
    order = np.argsort(works, kind="stable")
    names, edges = np.unique(works[order], return_index=True)
    return [
        Hits(work, part) for work, part in zip(names.tolist(), np.split(rows[each][order], edges[1:]), strict=False)
    ]


# --- from hits to copies ----------------------------------------------------------------------------------


class Trail:
    """The hits of one work along one document, of which only the last `WITHIN_WORDS` words are kept.

    Law: what comes out does not depend on how the document was cut.

    Attributes:
        pending: (n, 5) the last hits, as in `Hits`, words counted from the beginning of the document.
        counted: (n,) which of them count already.
        ranges: Character ranges of the copy so far.
        words: Words covered so far.
        reach: Word after the last one that is covered.
        seen: Keys that were hit, sorted.
    """

    def __init__(self, needed: int) -> None:
        self._needed = needed
        self.pending = np.empty((0, 5), np.int64)
        self.counted = np.empty(0, np.bool_)
        self.ranges: list[tuple[int, int]] = []
        self.words = 0
        self.reach = -1 - BRIDGED_WORDS
        self.seen = np.empty(0, np.int64)

    def add(self, rows: Integers, upto: int) -> None:
        """Take the next hits.

        Args:
            rows: As in `Hits`, words counted from the beginning of the document.
            upto: All hits that begin in front of this word are known now.
        """
        rows = np.concatenate([self.pending, rows])
        counted = counting(rows[:, WORD], rows[:, KEY], self._needed)
        counted[: len(self.counted)] |= self.counted
        settled = int(np.searchsorted(rows[:, WORD], upto - WITHIN_WORDS))
        self._settle(rows[:settled][counted[:settled]])
        self.pending, self.counted = rows[settled:], counted[settled:]

    @property
    def going(self) -> bool:
        """Whether anything was found, or may be when more is known."""
        return bool(self.ranges) or len(self.pending) > 0

    def _settle(self, rows: Integers) -> None:
        """Add hits that count, in order of the text, to what was found."""
        if not len(rows):
            return
        start, end = rows[:, WORD], rows[:, WORD_END]
        reach = np.maximum.accumulate(np.append(self.reach, end))
        self.words += int(np.maximum(end - np.maximum(start, reach[:-1]), 0).sum())
        apart = start > reach[:-1] + BRIDGED_WORDS
        groups = np.flatnonzero(apart | (np.arange(len(rows)) == 0))
        char_ends = np.maximum.reduceat(rows[:, CHAR_END], groups)
        for new, char, char_end in zip(apart[groups], rows[groups, CHAR].tolist(), char_ends.tolist(), strict=True):
            if not new:
                char, known = self.ranges.pop()
                char_end = max(known, char_end)
            self.ranges.append((char, char_end))
        self.reach = int(reach[-1])
        seen = np.sort(np.append(self.seen, rows[:, KEY]))
        self.seen = seen[np.diff(seen, prepend=-1) != 0]


def counting(words: Integers, keys: Integers, needed: int) -> Flags:
    """Which hits of one work are among ``needed`` distinct ones that begin within `WITHIN_WORDS`.

    Args:
        words: (n,) where each begins, rising.
        keys: (n,) which shingle each is.
        needed: How many distinct ones.
    """
    stop = np.searchsorted(words, words + WITHIN_WORDS)
    enough = _distinct(keys, stop, needed)
    steps = np.zeros(len(words) + 1, np.int64)
    np.add.at(steps, enough, 1)
    np.add.at(steps, stop[enough], -1)
    flags: Flags = np.cumsum(steps)[:-1] > 0
    return flags


def _distinct(keys: Integers, stop: Integers, needed: int) -> Integers:
    """The places i with at least ``needed`` different values among ``keys[i : stop[i]]``.

    All places look one further at the same time; those that have enough, or are at their end, drop out.
    """
    found: list[Integers] = []
    active = np.arange(len(keys))
    at = active.copy()
    chosen = np.full((len(keys), needed), -1)
    have = np.zeros(len(keys), np.int64)
    while len(active):
        key = keys[at]
        new = (chosen != key[:, None]).all(axis=1)
        chosen[new, have[new]] = key[new]
        have = have + new
        at = at + 1
        found.append(active[have == needed])
        going = (have < needed) & (at < stop[active])
        active, at, chosen, have = active[going], at[going], chosen[going], have[going]
    return np.concatenate([*found, np.empty(0, np.int64)])


def _needed(work: int, prints: FingerprintSet, rule: Rule) -> int:
    """How many distinct shingles of a work count."""
    return min(rule.hits, int(prints.sizes[work]))


def _copies(piece: Piece, rows: Integers, prints: FingerprintSet, rule: Rule) -> list[Copy]:
    """The copies in a document that is one piece."""
    trails: dict[int, Trail] = {}
    for hits in _by_work(rows, prints):
        needed = _needed(hits.work, prints, rule)
        if len(hits.rows) >= needed:  # almost never true where a hit is an accident
            trails[hits.work] = Trail(needed)
            trails[hits.work].add(hits.rows, 0)
    return _closed(piece.file, piece.document, piece.name, trails, prints)


def _closed(
    file: int, document: int, name: str | None, trails: Mapping[int, Trail], prints: FingerprintSet
) -> list[Copy]:
    """What the trails of a document came to, in order of the works."""
    copies = []
    for work, trail in sorted(trails.items()):
        trail.add(np.empty((0, 5), np.int64), np.iinfo(np.int64).max)
        if trail.ranges:
            copies.append(
                Copy(
                    file=file,
                    document=document,
                    name=name,
                    request_id=prints.names[work],
                    ranges=tuple(trail.ranges),
                    words=trail.words,
                    shingles=len(trail.seen),
                    containment=len(trail.seen) / int(prints.sizes[work]),
                )
            )
    return copies


class Assembly:
    """Puts the results of `find` together again, in their order: documents of many pieces become whole.

    Attributes:
        trails: Those of the document that is not at its end, by work.
        words: Its words so far.
    """

    def __init__(self, prints: FingerprintSet, rule: Rule) -> None:
        self._prints, self._rule = prints, rule
        self.trails: dict[int, Trail] = {}
        self.words = 0

    def trail(self, work: int) -> Trail:
        """The trail of a work, begun if there is none."""
        return self.trails.setdefault(work, Trail(_needed(work, self._prints, self._rule)))

    def take(self, results: Iterable[Copy | Stretch]) -> Iterator[Copy]:
        """Take the next results.

        Yields:
            The copies in documents that are complete now.
        """
        for result in results:
            if isinstance(result, Copy):
                yield result
                continue
            rows = {hits.work: hits.rows + np.array([self.words, self.words, 0, 0, 0]) for hits in result.hits}
            self.words += result.words
            for work in rows:
                self.trail(work)
            for work, trail in self.trails.items():
                trail.add(rows.get(work, np.empty((0, 5), np.int64)), self.words)
            self.trails = {work: trail for work, trail in self.trails.items() if trail.going}
            if result.last:
                yield from _closed(result.file, result.document, result.name, self.trails, self._prints)
                self.trails, self.words = {}, 0
