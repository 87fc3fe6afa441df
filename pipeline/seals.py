"""Seals over the files of the two databases: every byte of them, the room that no row uses included.

In: a workspace whose writer is done. Out: ``seal``, a signed note of how many entries the ledger has, what state the
index is in, and the SHA-256 of both files; later whether they are these files still. Never: a row. What an entry or a
row says is checked by itself; a seal finds what changed beside that, on a failing disk or by hand.

A writing command renews the seal as the last thing that it does. Where it died before, the seal speaks of fewer entries
than there are, or of another state of the index: that says nothing against the files, and the next writing command
renews it. An index may also be deleted at any time.

The lines of the note are ``takedown-seal-1 ORIGIN``, ``ledger.db ENTRIES DIGEST`` and ``index.db STATE DIGEST`` (or
``index.db none``).
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import NoSpace, StoreDamaged, TakedownError
from pipeline.files import digest_bytes, digest_json, digest_stream, read_whole, unreadable, write_atomic
from pipeline.keys import load_log_key, log_vkey
from pipeline.ledger import Ledger
from pipeline.notes import MAX_NOTE_BYTES, open_note, parse_vkey, sign_note
from pipeline.records import Break, Event, LedgerEntry

FORMAT = "takedown-seal-1"

NAME, LEDGER, INDEX = "seal", "ledger.db", "index/index.db"
"""The seal and what it seals, as they lie in a workspace."""

MARK: dict[str, object] = {"seals": FORMAT}
"""Data of the event from which on there is a seal: the first one, or ``sealed`` where an older release wrote that."""

_TEXT = re.compile(
    rf"{FORMAT} (?P<origin>\S+)\n"
    r"ledger\.db (?P<entries>0|[1-9][0-9]{0,18}) (?P<ledger>sha256:[0-9a-f]{64})\n"
    r"index\.db (?:none|(?P<state>sha256:[0-9a-f]{64}) (?P<index>sha256:[0-9a-f]{64}))\n"
)


class IndexFile(NamedTuple):
    """The file of the index as it is.

    Attributes:
        state: Digest of what tells the states apart: SQLite's count of transactions, a chain over the rows,
            how many were removed.
        digest: Of all bytes; None where it was not asked for.
        counts: SQLite's count of transactions as the head of the file has it, twice; equal in a sound file.
    """

    state: str
    digest: str | None
    counts: tuple[int, int]


@dataclass(frozen=True)
class Seal:
    """What a seal says.

    Attributes:
        entries: How many the ledger had.
        ledger: Digest of all bytes of its database.
        index: State and digest of the index; None where there was none of this release.
    """

    entries: int
    ledger: str
    index: tuple[str, str] | None


def seal_text(seal: Seal, origin: str) -> str:
    """The text that is signed; `read_seal` is its inverse."""
    index = "none" if seal.index is None else " ".join(seal.index)
    return f"{FORMAT} {origin}\nledger.db {seal.entries} {seal.ledger}\nindex.db {index}\n"


def read_seal(note: bytes, vkey: str) -> Seal:
    """Check a seal and read it.

    Args:
        note: The whole file; hostile.
        vkey: The log's key; trusted.

    Raises:
        StoreDamaged: It is malformed, not signed by the key, or of another lineage.
    """
    found = _TEXT.fullmatch(open_note(note, vkey))
    if found is None or found["origin"] != parse_vkey(vkey).name:
        raise StoreDamaged("its signed text is not a seal of this lineage. The next writing command makes it again.")
    index = None if found["state"] is None else (found["state"], found["index"])
    return Seal(int(found["entries"]), found["ledger"], index)


def seals_are_kept(entries: Iterable[LedgerEntry]) -> bool:
    """Whether the ledger says that there is a seal; that of an older release does not, until it is written to."""
    return any(e.event.kind in ("initialised", "sealed") and e.event.data.get("seals") == FORMAT for e in entries)


def index_file(path: Path, digested: Callable[[str], bool]) -> IndexFile | None:
    """The file of the index as it is while nobody writes to it; None where it cannot be read as one of this release.

    Args:
        path: The file.
        digested: Whether to read every byte, given the state; under the same lock, so that both are of one moment.
    """
    try:
        # Closed after the connection: closing any file of a process ends the locks that SQLite holds on it.
        with path.open("rb") as stream, closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            database.execute("BEGIN")
            # From here on the file is locked against writing. The largest chain, not the newest: no row says of itself
            # which place it has, so that a place that changed must not look like another state.
            chain = database.execute(
                "SELECT max(chain) FROM (SELECT chain FROM takedown UNION ALL SELECT chain FROM removed)"
            ).fetchall()
            removed = database.execute("SELECT count(*) FROM removed").fetchall()
            head = stream.read(100)
            counts = int.from_bytes(head[24:28], "big"), int.from_bytes(head[92:96], "big")
            state = digest_json([counts[0], chain, removed])
            stream.seek(0)
            return IndexFile(state, digest_stream(stream) if digested(state) else None, counts)
    except (sqlite3.Error, OSError, UnicodeDecodeError, TypeError, ValueError):
        return None  # what is wrong with it, `pipeline.index.examine` tells


def renew(root: Path) -> None:
    """Seal the databases of a workspace; its writer is done and holds the lock still.

    What is in the same state as before keeps its seal: bytes that changed by themselves are not sealed anew.

    Raises:
        StoreDamaged: The ledger does not hold.
        UsageError: A key cannot be read.
        NoSpace: The disk is full or read-only; what the command did is done.
    """
    path = root / LEDGER
    if not path.is_file():
        return
    vkey = log_vkey(root / "keys")
    try:
        old = read_seal(read_note(root), vkey)
    except (OSError, StoreDamaged):  # none yet; or `verify` names it until here
        old = None
    with Ledger.open(path, read_only=True) as ledger:
        new = _sealed(root, ledger, old)
        marked = old is not None or seals_are_kept(ledger.entries())
    if new != old:
        _write(root, vkey, new)
    if not marked:
        # Behind the first seal, so that no crash leaves a ledger that promises one and a workspace without.
        with Ledger.open(path) as ledger:
            ledger.append(Event(kind="sealed", actor="takedown-pipeline", data=MARK))
            _write(root, vkey, _sealed(root, ledger, new))


def _sealed(root: Path, ledger: Ledger, old: Seal | None) -> Seal:
    """What is to be sealed now; what is in the state that was sealed before stays as it was sealed."""
    index = _sealed_index(root / INDEX, old.index if old is not None else None)
    if old is not None and old.entries == ledger.count():
        return Seal(old.entries, old.ledger, index)
    image = ledger.image()
    return Seal(image.entries, digest_bytes(image.pages), index)


def _sealed_index(path: Path, old: tuple[str, str] | None) -> tuple[str, str] | None:
    """State and digest of the index; its bytes are read only where the state is not the one that was sealed before."""
    found = index_file(path, lambda state: old is None or old[0] != state)
    if found is None:
        return None
    return old if found.digest is None else (found.state, found.digest)


def _write(root: Path, vkey: str, seal: Seal) -> None:
    origin = parse_vkey(vkey).name
    note = sign_note(seal_text(seal, origin), origin, load_log_key(root / "keys"))
    try:
        write_atomic(root / NAME, note.encode())
    except NoSpace as error:
        raise NoSpace(
            f"{root / NAME}: cannot be written. What the command did is done and on record; only this seal is old. "
            "Free some space; the next writing command renews it."
        ) from error


# --- checking ---------------------------------------------------------------------------------------------


def read_note(root: Path) -> bytes:
    """The seal's file as it is.

    Raises:
        OSError: It is missing or cannot be read.
    """
    return read_whole(root / NAME, MAX_NOTE_BYTES)


def check_seal(root: Path, note: bytes | OSError, entries: Sequence[LedgerEntry], with_index: bool) -> list[Break]:
    """Compare the databases with their seal; what is not compared, because the seal is older, `stale_notes` says.

    Args:
        root: The workspace.
        note: The seal's file, or why it cannot be read, from before the entries were read: a running writer adds
            entries and then renews it, so that it can be older than the entries, but not newer.
        entries: All that can be read.
        with_index: Whether to read the index, too.

    Returns:
        Files that are not those that were sealed, or a seal that does not hold.
    """
    if isinstance(note, OSError):
        # A ledger of an older release may get its first seal while it is read.
        if not seals_are_kept(entries) or (isinstance(note, FileNotFoundError) and (root / NAME).exists()):
            return []
        lost = "Bytes of the databases that nothing reads may have been changed; the next writing command seals them."
        return [Break(where=NAME, found=unreadable(note), means=lost)]
    try:
        vkey = log_vkey(root / "keys")
    except (TakedownError, OSError):
        return []  # said of the key itself
    try:
        seal = read_seal(note, vkey)
    except StoreDamaged as error:
        means = "It was changed, or is of another lineage; the next writing command makes it again."
        return [Break(where=NAME, found=str(error), means=means)]
    breaks = check_ledger(root, seal)
    return breaks + check_index(root, seal.index) if with_index and seal.index is not None else breaks


_UNREAD = (
    "Where nothing else is named of this file, all that is read of it holds, and only bytes that mean nothing changed: "
    "the disk is failing, or somebody wrote to the file."
)


def check_ledger(root: Path, seal: Seal) -> list[Break]:
    """Compare the ledger's file with its seal; nothing where the file cannot be read: `Ledger.examine` says that."""
    try:
        with Ledger.open(root / LEDGER, read_only=True) as ledger:
            image = ledger.image()
    except (TakedownError, sqlite3.Error, OSError):
        return []  # said of the ledger itself
    if seal.entries > image.entries:
        found = f"seals {seal.entries} entries, the ledger has {image.entries}"
        return [Break(where=NAME, found=found, means="The ledger was cut back, or is an older copy.")]
    if seal.entries < image.entries:
        return []
    differs = {
        "its bytes are not those that were sealed": digest_bytes(image.pages) != seal.ledger,
        f"{image.behind} bytes follow behind its last page": image.behind > 0,
    }
    means = f"{_UNREAD} Restore it from a backup."
    return [Break(where=LEDGER, found=found, means=means) for found, so in differs.items() if so]


def check_index(root: Path, sealed: tuple[str, str]) -> list[Break]:
    """Compare the file of the index with its sealed state and digest; nothing where it is gone, or cannot be read."""
    found = index_file(root / INDEX, lambda state: state == sealed[0])
    if found is None:
        return []  # deleted, which is allowed; or said of the index itself
    means = f"{_UNREAD} Delete the file; the next run builds it from the vault."
    if found.counts[0] != found.counts[1]:
        told = f"counts {found.counts[0]} transactions in one place, {found.counts[1]} in another"
        return [Break(where=INDEX, found=told, means=means)]
    if found.digest not in (None, sealed[1]):
        return [Break(where=INDEX, found="its bytes are not those that were sealed", means=means)]
    return []


def stale_notes(root: Path, note: bytes | OSError, with_index: bool) -> tuple[str, ...]:
    """Which database was not compared with its seal, because that speaks of an earlier state, which is no break.

    Counts of entries and states of the index are compared; no database is read byte by byte.

    Args:
        root: The workspace.
        note: See `check_seal`.
        with_index: Whether the index was compared, too.
    """
    try:
        if isinstance(note, OSError):
            return ()  # as in all of these cases, `check_seal` and others say it
        seal = read_seal(note, log_vkey(root / "keys"))
        with Ledger.open(root / LEDGER, read_only=True) as ledger:
            entries = ledger.count()
    except (TakedownError, sqlite3.Error, OSError):
        return ()
    notes = []
    if seal.entries < entries:
        notes.append(_STALE.format(f"of {seal.entries} entries, the ledger has {entries}", "ledger"))
    if with_index and seal.index is not None:
        found = index_file(root / INDEX, lambda _: False)
        if found is not None and found.counts[0] == found.counts[1] and found.state != seal.index[0]:
            notes.append(_STALE.format("of another state of the index", "index"))
    return tuple(notes)


_STALE = (
    "the seal is {}: a command was interrupted, or is running. Bytes of the {}'s file that nothing reads were not "
    "compared; the next writing command renews the seal."
)
