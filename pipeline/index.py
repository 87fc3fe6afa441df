"""The index of everything taken down: SQLite as the record, a row per takedown with fingerprints and signatures.

In: request ids with their texts. Out: takedowns that may share a passage with a text. Never: text, pickle, an index
that was made with other parameters.

The record is ``index.db``; a commit of SQLite decides what is in it. Searching goes through segments
(`pipeline.segments`), in memory for the newest rows and, once there are many, in files under ``segments/``. They hold
nothing that the record does not, and are made again where they are missing, damaged, or of another state of the
record: each row carries a chain, the digest of the chain before it and its own digest, and a segment names the chain
where it ends. Whoever may not write searches in memory. There may be one writer and any number of readers; a reader
sees what was there when it searched first.

What is checked when: opening reads what the file declares and its parameters, whatever its size; a row is checked
against its digest whenever it is read; a segment's length and header are checked when the first search lists it, and
its SHA-256 and structure before it is searched. `examine` checks all of it, and compares the segments with the rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from pipeline.errors import NoSpace, StoreDamaged, UsageError, WorkspaceBusy
from pipeline.files import digest_bytes, digest_json, make_folder, remove, write_atomic
from pipeline.indexfile import (
    REBUILD,
    check_declared,
    connected,
    declare,
    empty_index,
    explained,
    release_of,
    transaction,
)
from pipeline.segments import (
    Segment,
    SegmentFile,
    Windows,
    build,
    describe,
    sign_texts,
    write_segment,
)
from pipeline.shingles import DedupeParameters, Prints, ShingledText, Signatures, shingle_many, to_lean

if TYPE_CHECKING:
    from datasketch import MinHashLSH

SMALLEST_SEGMENT = 4096
"""Windows from which on a segment is written: fewer are read from the record and sorted in some 20 ms."""
LARGEST_SEGMENT = 1 << 19
"""Windows up to which segments are merged; making one takes 1.3 kB of memory for each, and its fingerprints."""
TEXTS_AT_ONCE = 64
"""Texts that are signed together and committed together."""


class DedupeIndex:
    """Fingerprints and signatures of everything taken down, no text. Build with `open`.

    Attributes:
        path: The record.
        parameters: What it was made with.
        renewed: The older release whose index was found here and replaced by an empty one; None where none was.
    """

    def __init__(self, path: Path, database: sqlite3.Connection, parameters: DedupeParameters) -> None:
        self.path = path
        self.parameters = parameters
        self.renewed: str | None = None
        self._database = database
        self._segments: list[Segment] | None = None
        self._opened: dict[Path, SegmentFile] = {}

    @classmethod
    def open(cls, folder: Path, parameters: DedupeParameters | None = None) -> Self:
        """Open the index of a folder, or begin an empty one.

        The index of an older release, whose fingerprints are others, is replaced by an empty one, and ``renewed``
        says so: it is derived from the vault, and each run adds what is missing.

        Args:
            folder: The workspace's ``index`` folder; made if absent.
            parameters: What the index must have been made with.

        Raises:
            UsageError: It was made with other parameters; each is named.
            StoreDamaged: The file is not an index.
        """
        parameters = parameters or DedupeParameters()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "index.db"
        if not path.exists():
            # Made whole, then renamed: an index that is empty later is a damaged one, never a new one.
            write_atomic(path, empty_index(parameters), 0o600)
        with connected(path) as database:
            release = release_of(database) if parameters == DedupeParameters() else None
            if release is not None:
                with transaction(database):
                    for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                        database.execute(f'DROP TABLE "{table}"')
                    declare(database, parameters)
            check_declared(path, database, parameters)
        index = cls(path, database, parameters)
        index.renewed = release
        return index

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    # --- rows -------------------------------------------------------------------------------------------------

    def ids(self) -> tuple[str, ...]:
        """Every takedown indexed, in the order they were added."""
        with explained(self.path):
            rows = self._database.execute("SELECT request_id FROM takedown ORDER BY position").fetchall()
        return tuple(row[0] for row in rows)

    def prints(self, request_id: str) -> Prints:
        """Sorted fingerprints of one takedown.

        Raises:
            UsageError: It is not indexed.
            StoreDamaged: Its row does not match its digest.
        """
        return self._row(request_id).prints

    def signatures(self, request_id: str) -> Signatures:
        """(windows, num_perm) signatures of one takedown; raises what `prints` does."""
        return self._row(request_id).signatures

    def add(self, request_id: str, text: str) -> bool:
        """Index a takedown, whole or not at all. Doing it again changes nothing.

        Returns:
            Whether it was added now; False when it was there, or has no words to find it by.

        Raises:
            UsageError: Another text is indexed under this id.
            NoSpace: The disk is full; nothing was added.
        """
        return self.add_many([(request_id, text)]) == 1

    def add_many(self, takedowns: Iterable[tuple[str, str]]) -> int:
        """Index takedowns, each whole or not at all, in their order; raises what `add` does.

        Args:
            takedowns: Ids and texts; read a few at a time.

        Returns:
            How many were added now.
        """
        added, waiting = 0, iter(takedowns)
        while some := list(islice(waiting, TEXTS_AT_ONCE)):
            texts = shingle_many((text for _, text in some), self.parameters)
            windows = sign_texts(texts, self.parameters)
            # Two empty sketches are equal: a text without words would match every other one.
            rows = [
                (name, text.prints, windows.of(number))
                for number, ((name, _), text) in enumerate(zip(some, texts, strict=True))
                if len(text.prints)
            ]
            added += self._insert(rows)
        return added

    def _insert(self, rows: Sequence[tuple[str, Prints, Signatures]]) -> int:
        """Add rows in one transaction; returns how many were not there."""
        added = 0
        with explained(self.path), transaction(self._database):
            position, chain = self._tip()
            for name, prints, signatures in rows:
                for held in self._rows("WHERE request_id = ?", name):
                    if not np.array_equal(held.prints, prints):
                        raise UsageError(
                            f"{self.path}: {name!r} is indexed with another text. Give the new text a new id."
                        )
                    break
                else:
                    blobs = prints.astype("<u8").tobytes(), signatures.astype("<u4").tobytes()
                    digest = _row_digest(name, *blobs)
                    position, chain, added = position + 1, digest_json([chain, digest]), added + 1
                    self._database.execute(
                        "INSERT INTO takedown (position, request_id, digest, chain, prints, signatures)"
                        " VALUES (?, ?, ?, ?, ?, ?)",
                        (position, name, digest, chain, *blobs),
                    )
        if added:
            self._segments = None
        return added

    def remove(self, request_id: str) -> bool:
        """Forget a takedown whose notice was withdrawn; returns whether it was there.

        Its place is never given to another. Files that hold it are deleted, and made again without it.
        """
        with explained(self.path), transaction(self._database):
            found = self._database.execute(
                "SELECT position, chain FROM takedown WHERE request_id = ?", (request_id,)
            ).fetchone()
            if found is not None:
                self._database.execute("DELETE FROM takedown WHERE position = ?", found[:1])
                self._database.execute("INSERT INTO removed VALUES (?, ?)", found)
        if found is None:
            return False
        self._segments = None
        self._usable()  # deletes them; after a kill before this line, the next search does
        return True

    def _tip(self) -> tuple[int, str]:
        """The last place ever given, and the chain there."""
        last = self._database.execute(
            "SELECT position, chain FROM (SELECT position, chain FROM takedown UNION ALL SELECT * FROM removed)"
            " ORDER BY position DESC LIMIT 1"
        ).fetchone()
        return (0, "") if last is None else (int(last[0]), str(last[1]))

    def _row(self, request_id: str) -> _Row:
        for row in self._rows("WHERE request_id = ?", request_id):
            return row
        raise UsageError(f"{self.path}: holds no takedown {request_id!r}.")

    def _rows(self, where: str = "", *values: str | int) -> Iterator[_Row]:
        query = (
            f"SELECT position, request_id, digest, chain, prints, signatures FROM takedown {where} ORDER BY position"
        )
        with explained(self.path):
            for position, name, digest, chain, prints, signatures in self._database.execute(query, values):
                if digest != _row_digest(name, prints, signatures):
                    raise StoreDamaged(f"{self.path}: the row of {name!r} does not match its digest. {REBUILD}")
                rows = np.frombuffer(signatures, "<u4").reshape(-1, self.parameters.num_perm)
                found = _Row(position, name, digest, chain, np.frombuffer(prints, "<u8"), rows)
                if not len(found.prints) or not len(rows) or not (found.prints[1:] > found.prints[:-1]).all():
                    raise ValueError(f"the row of {name!r}")
                yield found

    # --- search -----------------------------------------------------------------------------------------------

    def candidates(self, text: ShingledText) -> tuple[str, ...]:
        """Takedowns that may share a passage with a text, in the order they were added; to be verified.

        Raises:
            StoreDamaged: A row does not match its digest.
        """
        (found,) = self.candidates_many(sign_texts([text], self.parameters))
        return tuple(found)

    def candidates_many(self, windows: Windows) -> list[dict[str, Prints]]:
        """Takedowns that may share a passage with each of some texts; to be verified.

        The first search opens and checks the segments, and makes those that are missing.

        Args:
            windows: Those of the texts.

        Returns:
            For each text the fingerprints of its candidates by id, in the order they were added; views.

        Raises:
            StoreDamaged: A row does not match its digest.
        """
        found: list[dict[str, Prints]] = [{} for _ in range(windows.texts)]
        if self._segments is None:
            self._segments = self._searched()
        for segment in self._segments:
            texts, works = segment.candidates(windows, self.parameters)
            names = self._names(segment.positions[np.unique(works)].tolist())
            for text, work in zip(texts.tolist(), works.tolist(), strict=True):
                name = names.get(int(segment.positions[work]))
                if name is not None:  # else another process removed it meanwhile
                    found[text][name] = segment.prints_of(work)
        return found

    def to_datasketch(self) -> MinHashLSH:
        """The same index as datasketch's, in memory, for whoever wants to go on with that.

        Returns:
            An LSH over all windows with the same candidates; a key is (request id, number of the window). Query it
            with a ``LeanMinHash`` of the same seed and scheme: it answers others with nothing, silently.
        """
        from datasketch import MinHashLSH  # importing it takes longer than many a search

        parameters = self.parameters
        lsh = MinHashLSH(num_perm=parameters.num_perm, params=(parameters.bands, parameters.rows))
        for row in self._rows():
            for number, sketch in enumerate(to_lean(row.signatures, parameters)):
                lsh.insert((row.request_id, number), sketch)
        return lsh

    def _names(self, positions: Sequence[int]) -> dict[int, str]:
        """Ids of the takedowns at some places."""
        found: dict[int, str] = {}
        with explained(self.path):
            for at in range(0, len(positions), 500):
                some = positions[at : at + 500]
                marks = ", ".join("?" * len(some))
                query = f"SELECT position, request_id FROM takedown WHERE position IN ({marks})"
                found.update(self._database.execute(query, some).fetchall())
        return found

    def _searched(self) -> list[Segment]:
        """Segments that together hold every row; what no file holds is made, and written where it is much."""
        files = self._cover()
        end = files[-1].header.last if files else 0
        tail = self._windows_behind(end)
        if tail >= SMALLEST_SEGMENT:
            # As in a log-structured merge: sizes at least halve from file to file, so that there are few.
            while files and files[-1].header.windows < min(2 * tail, LARGEST_SEGMENT - tail + 1):
                header = files.pop().header
                tail, end = tail + header.windows, header.first - 1
        segments = [file.read() for file in files]
        used, complete = {file.path for file in files}, tail >= SMALLEST_SEGMENT
        for rows in _groups(self._rows("WHERE position > ?", end)):
            segment = segment_of(rows, self.parameters)
            if segment.windows >= SMALLEST_SEGMENT:
                try:
                    file = self._written(segment, end + 1, rows[-1].chain)
                    segment = file.read()
                    used.add(file.path)
                except (NoSpace, OSError):
                    complete = False  # nothing can be written here, or there is no space: the search is in memory
            segments.append(segment)
            end = rows[-1].position
        for path in self._paths() if complete else ():
            if path not in used:
                _delete(path)
        return segments

    def _written(self, segment: Segment, first: int, chain: str) -> SegmentFile:
        removed = self._removed(first, int(segment.positions[-1]))
        make_folder(self._folder, 0o700)
        path = write_segment(self._folder, segment, describe(segment, self.parameters, first, removed, chain))
        file = self._opened[path] = SegmentFile(path, self.parameters)
        return file

    def _cover(self) -> list[SegmentFile]:
        """Files that hold every row from the first on, as far as there are whole ones."""
        usable, cover, end = self._usable(), list[SegmentFile](), 0
        while following := [file for file in usable if file.header.first == end + 1]:
            longest = max(following, key=lambda file: file.header.last)
            try:
                longest.read()
            except StoreDamaged:
                _delete(longest.path)
                usable.remove(longest)
                continue
            cover.append(longest)
            end = longest.header.last
        return cover

    def _usable(self) -> list[SegmentFile]:
        """Segment files of this state of the record; those that can never be of use are deleted."""
        usable = []
        for path in self._paths():
            try:
                file = self._opened.get(path) or SegmentFile(path, self.parameters)
            except StoreDamaged:
                _delete(path)
                continue
            header = file.header
            if header.removed != self._removed(header.first, header.last):
                self._opened.pop(path, None)
                _delete(path)  # it holds what was removed; nothing that was comes back
            elif header.chain == self._chain(header.last):
                self._opened[path] = file
                usable.append(file)
        return usable

    @property
    def _folder(self) -> Path:
        return self.path.parent / "segments"

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob("*.seg"))

    def _windows_behind(self, end: int) -> int:
        with explained(self.path):
            ((size,),) = self._database.execute(
                "SELECT COALESCE(SUM(LENGTH(signatures)), 0) FROM takedown WHERE position > ?", (end,)
            ).fetchall()
        return int(size) // (4 * self.parameters.num_perm)

    def _removed(self, first: int, last: int) -> int:
        """How many takedowns were removed from a range of places."""
        with explained(self.path):
            ((count,),) = self._database.execute(
                "SELECT COUNT(*) FROM removed WHERE position BETWEEN ? AND ?", (first, last)
            ).fetchall()
        return int(count)

    def _chain(self, position: int) -> str | None:
        """The record's chain at a place; None where it has not come to."""
        with explained(self.path):
            found = self._database.execute(
                "SELECT chain FROM takedown WHERE position = ?1 UNION ALL SELECT chain FROM removed"
                " WHERE position = ?1",
                (position,),
            ).fetchone()
        return None if found is None else str(found[0])

    # --- checks -----------------------------------------------------------------------------------------------

    def check(self) -> tuple[str, ...]:
        """Read and check everything: pages, rows, the chain, segment files against the rows. Writes nothing.

        Returns:
            Every takedown indexed.

        Raises:
            StoreDamaged: Something does not hold. A segment file of another state of the record is no damage.
        """
        with explained(self.path):
            state = " ".join(self._database.execute("PRAGMA quick_check(1)").fetchone()[0].split())
            if state != "ok":
                raise StoreDamaged(f"{self.path}: is damaged ({state}). {REBUILD}")
            removed = dict(self._database.execute("SELECT position, chain FROM removed").fetchall())
        names, position, chain = list[str](), 0, ""
        for row in self._rows():
            while (position + 1) in removed:
                position += 1
                chain = removed[position]
            # A row that is missing, though nobody removed it, is added again by the next run, like a lost index.
            if row.position == position + 1 and row.chain != digest_json([chain, row.digest]):
                raise StoreDamaged(f"{self.path}: the row of {row.request_id!r} does not follow its chain. {REBUILD}")
            position, chain = row.position, row.chain
            names.append(row.request_id)
        for path in self._paths():
            self._check_segment(SegmentFile(path, self.parameters))
        return tuple(names)

    def _check_segment(self, file: SegmentFile) -> None:
        header = file.header
        file.read()
        if header.chain != self._chain(header.last) or header.removed != self._removed(header.first, header.last):
            return
        rows = list(self._rows("WHERE position BETWEEN ? AND ?", header.first, header.last))
        segment = segment_of(rows, self.parameters)
        if describe(segment, self.parameters, header.first, header.removed, header.chain) != header:
            raise StoreDamaged(
                f"{file.path}: holds other than the record does. Delete it; the next search makes it again."
            )


class _Row(NamedTuple):
    """A row of the record."""

    position: int
    request_id: str
    digest: str
    chain: str
    prints: Prints
    signatures: Signatures


def segment_of(rows: Sequence[_Row], parameters: DedupeParameters) -> Segment:
    """The segment of some rows."""
    windows = Windows(
        signatures=np.concatenate([row.signatures for row in rows]),
        owners=np.repeat(np.arange(len(rows)), [len(row.signatures) for row in rows]),
        texts=len(rows),
    )
    return build([row.position for row in rows], [row.prints for row in rows], windows, parameters)


def _groups(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    """Neighbouring rows with at most `LARGEST_SEGMENT` windows together, or one that has more by itself."""
    group, windows = list[_Row](), 0
    for row in rows:
        if group and windows + len(row.signatures) > LARGEST_SEGMENT:
            yield group
            group, windows = [], 0
        group.append(row)
        windows += len(row.signatures)
    if group:
        yield group


def _delete(path: Path) -> None:
    """Delete a derived file; where that is not allowed it stays and is not used."""
    with suppress(OSError):
        remove(path)


def examine(folder: Path) -> tuple[str, ...]:
    """Check everything that the index of a folder holds; changes nothing.

    Returns:
        Every takedown indexed; nothing for the index of an older release, which the next run replaces.

    Raises:
        UsageError: It was made with other parameters.
        StoreDamaged: Something does not hold.
    """
    path, parameters = folder / "index.db", DedupeParameters()
    with connected(path) as database:
        if release_of(database) is not None:
            database.close()
            return ()
        check_declared(path, database, parameters)
    with closing(database):
        return DedupeIndex(path, database, parameters).check()


def older_release(folder: Path) -> str | None:
    """The older release that made the index of a folder; None where it is of this one, damaged, or none."""
    path = folder / "index.db"
    if not path.is_file():
        return None
    with suppress(StoreDamaged, NoSpace, WorkspaceBusy), connected(path) as database, closing(database):
        return release_of(database)
    return None


def _row_digest(request_id: str, prints: bytes, signatures: bytes) -> str:
    return digest_json([request_id, digest_bytes(prints), digest_bytes(signatures)])
