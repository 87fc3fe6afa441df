"""Rows of the ledger: what is hashed of each, how they hang together, and what was found sound already.

In: rows as SQLite gives them, and the checkpoint that signs them. Out: entries; or every break. Never: a file, a
database, a key.

What was checked once in this process is not parsed and hashed again where the rows are the same, byte for byte; a row
that differs is, and so is all that follows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from pipeline.errors import StoreDamaged
from pipeline.files import canonical_json, digest_bytes
from pipeline.merkle import Frontier, leaf_hash
from pipeline.notes import Checkpoint
from pipeline.records import Break, Event, LedgerEntry

GENESIS = "genesis:takedown-pipeline-ledger-1"
"""What the first entry names as its predecessor."""


def time_text(at: datetime) -> str:
    """A moment as stored: UTC, microseconds, always 27 characters."""
    if at.tzinfo is None:
        raise ValueError("a ledger time needs a zone")
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


def leaf_data(seq: int, at: str, event: str, previous: str) -> bytes:
    """The bytes that are a leaf of the log, and whose SHA-256 is the entry's digest.

    Args:
        seq: Number of the entry.
        at: Time as stored.
        event: The event as canonical JSON.
        previous: Digest of the entry before.
    """
    # What `json.dumps` does with a mere text, which is the canonical form, too.
    return b'{"at":%s,"event":%s,"previous":%s,"seq":%d}' % (
        encode_basestring_ascii(at).encode(), event.encode("utf-8", "surrogateescape"),
        encode_basestring_ascii(previous).encode(), seq,
    )  # fmt: skip


class Row(NamedTuple):
    """A row as it is found; after tampering a column may hold anything."""

    seq: Any
    at: Any
    event: Any
    previous: Any
    digest: Any


def leaf_of(row: Row) -> bytes:
    """The leaf of a row as it is found; something else than was ever signed where a column is of another kind."""
    if not isinstance(row.seq, int) or not all(isinstance(value, str) for value in row[1:]):
        return repr(tuple(row)).encode("utf-8", "surrogateescape")
    return leaf_data(row.seq, row.at, row.event, row.previous)


class Checked(NamedTuple):
    """The rows of a ledger from the first one on, all sound, with what follows from them. Never changed.

    Attributes:
        rows: As SQLite gives them.
        entries: What they say.
        hashes: Leaf hash of each, 32 bytes.
        frontier: Of the tree over all of them; to be copied before it grows.
    """

    rows: list[tuple[Any, ...]]
    entries: tuple[LedgerEntry, ...]
    hashes: tuple[bytes, ...]
    frontier: Frontier

    def grown(self, rows: list[tuple[Any, ...]], entries: Sequence[LedgerEntry]) -> Checked:
        """These rows and further ones that were checked, too."""
        hashes, frontier = [leaf_hash(leaf_of(Row(*row))) for row in rows], self.frontier.copy()
        for hash_ in hashes:
            frontier.append(hash_)
        return self.joined(rows, entries, hashes, frontier)

    def joined(
        self, rows: list[tuple[Any, ...]], entries: Sequence[LedgerEntry], hashes: Sequence[bytes], frontier: Frontier
    ) -> Checked:
        """These and further ones, with the tree over all of them."""
        return Checked(self.rows + rows, (*self.entries, *entries), (*self.hashes, *hashes), frontier)


_NOTHING = Checked([], (), (), Frontier())

_newest = _NOTHING
"""What this process checked last. One ledger's worth: a process works on one workspace."""


def remember(checked: Checked) -> Checked:
    """Keep what was checked for the next look of this process; returns it."""
    global _newest
    _newest = checked
    return checked


_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
"""A moment as `time_text` writes it."""

_FIELDS = set(LedgerEntry.model_fields)
"""What pydantic keeps with each entry of which of its fields are set; one for all saves a quarter of their memory."""


def _entry_of(row: Row) -> LedgerEntry:
    """What a row says that is known to be as it was written."""
    at, event = datetime.fromisoformat(row.at), Event.model_validate_json(row.event)
    return LedgerEntry.model_construct(
        _FIELDS, seq=row.seq, at=at, event=event, previous=row.previous, digest=row.digest
    )


def _known(rows: list[tuple[Any, ...]]) -> Checked:
    """What was checked last, where these rows begin with the same."""
    known = _newest
    return known if rows[: len(known.rows)] == known.rows else _NOTHING


def check_signed(rows: list[tuple[Any, ...]], signed: Checkpoint) -> Checked | None:
    """Take rows whose bytes are those that were signed; None where they are not, or one cannot be read.

    A third of the time of `check_sound`: what is signed was checked when it was written, and only its bytes can have
    changed, which the root over all of them tells. Whoever has the key can sign an event in another form than is
    written (spaces, a key twice); only `Ledger.examine` says so.
    """
    known = _known(rows)
    fresh = rows[len(known.rows) :]
    previous = known.rows[-1][-1] if known.rows else GENESIS
    hashes, frontier = list[bytes](), known.frontier.copy()
    try:
        for row in map(Row._make, fresh):
            if type(row.seq) is not int or not _TIME.fullmatch(row.at):
                return None  # 2.0 is written into a leaf like 2, and equal to it
            leaf = leaf_data(row.seq, row.at, row.event, row.previous)
            # The digest is no part of the leaf; the number and the predecessor are, and must be the right ones.
            if (row.seq, row.previous, row.digest) != (frontier.size + 1, previous, digest_bytes(leaf)):
                return None
            hashes.append(leaf_hash(leaf))
            frontier.append(hashes[-1])
            previous = row.digest
        if (signed.size, signed.root) != (frontier.size, frontier.root()):
            return None
        entries = [_entry_of(Row(*row)) for row in fresh]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return remember(known.joined(fresh, entries, hashes, frontier))


def check_sound(path: Path, rows: list[tuple[Any, ...]]) -> Checked:
    """Check all rows, those anew that are not the same as at the last time.

    Raises:
        StoreDamaged: An entry was changed, removed or inserted.
    """
    known = _known(rows)
    fresh = rows[len(known.rows) :]
    if not fresh:
        return known
    entries, breaks = check_rows(path.name, fresh, known.entries[-1] if known.entries else None)
    if breaks:
        first = breaks[0]
        raise StoreDamaged(
            f"{path}: does not hold in {len(breaks)} places, first {first.where}: {first.found}. "
            "`takedown verify` lists all breaks."
        )
    return remember(known.grown(fresh, entries))


def read_row(row: Row) -> tuple[LedgerEntry | None, list[str]]:
    """Check one row by itself: well-formed, canonical, and matching its own digest."""
    if not isinstance(row.seq, int) or not all(isinstance(value, str) for value in row[1:]):
        return None, ["a column does not hold the kind of value it should"]
    found = []
    try:
        tree = json.loads(row.event)
        event = Event.model_validate(tree)
        at = datetime.fromisoformat(row.at)
        if at.tzinfo is None or time_text(at) != row.at:
            found.append("the time is not in the form that is written")
        if canonical_json(tree).decode() != row.event:
            found.append("the event is not in the form that is written")
        digest = digest_bytes(leaf_data(row.seq, row.at, row.event, row.previous))
    except (ValueError, RecursionError, OverflowError) as error:  # ValidationError is a ValueError
        what = "fields that are not an event's" if isinstance(error, ValidationError) else str(error)
        return None, [f"time or event cannot be read ({what})"]
    if digest != row.digest:
        found.append(f"content does not match its digest (stored {row.digest[:80]!r}, computed {digest})")
    try:
        entry = LedgerEntry(seq=row.seq, at=at, event=event, previous=row.previous, digest=row.digest)
    except ValidationError:  # text that is not Unicode
        return None, [*found, "a column holds text that cannot be read"]
    return entry, found


def check_rows(
    name: str, rows: Iterable[tuple[Any, ...]], last: LedgerEntry | None = None
) -> tuple[list[LedgerEntry], list[Break]]:
    """Read rows, in order; also check numbering and chain.

    Args:
        name: The ledger's, for the breaks.
        rows: As SQLite gives them.
        last: The entry before the first of them; None where that is the ledger's first.

    Returns:
        Every entry that could be read, sound or not, and every break.
    """
    entries, breaks = [], []
    seq, previous = (last.seq, last.digest) if last else (0, GENESIS)
    for row in map(Row._make, rows):
        where = f"{name}: entry {row.seq}"
        if row.seq != seq + 1:
            gap = f"entry {seq + 1}" if row.seq == seq + 2 else f"the entries after {seq}"
            breaks.append(Break(where=where, found=f"{gap} missing before it", means="Entries were removed."))
        elif row.previous != previous:
            breaks.append(
                Break(
                    where=where,
                    found=f"names {str(row.previous)[:80]!r} as its predecessor, which has {str(previous)[:80]!r}",
                    means="This entry or the one before it was changed, inserted or replaced after it was written.",
                )
            )
        entry, found = read_row(row)
        breaks += [Break(where=where, found=f, means="It was changed after it was written.") for f in found]
        if entry is not None:
            entries.append(entry)
        seq, previous = (row.seq if isinstance(row.seq, int) else seq + 1), row.digest
    return entries, breaks
