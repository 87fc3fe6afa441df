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
from collections.abc import Iterable, Sequence
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
        digest: Of all bytes.
        counts: SQLite's count of transactions as the head of the file has it, twice; equal in a sound file.
    """

    state: str
    digest: str
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


def index_file(path: Path) -> IndexFile | None:
    """The file of the index as it is while nobody writes to it; None where it cannot be read as one of this release."""
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
            stream.seek(0)
            return IndexFile(digest_json([counts[0], chain, removed]), digest_stream(stream), counts)
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
    image, found = ledger.image(), index_file(root / INDEX)
    index = None if found is None else (found.state, found.digest)
    if old is None:
        return Seal(image.entries, digest_bytes(image.pages), index)
    if old.index is not None and index is not None and old.index[0] == index[0]:
        index = old.index
    return Seal(image.entries, old.ledger if old.entries == image.entries else digest_bytes(image.pages), index)


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


class Checked(NamedTuple):
    """What comparing the files with their seal gave.

    Attributes:
        breaks: Files that are not those that were sealed, or a seal that does not hold.
        notes: Why a file was not compared, where that is no break.
    """

    breaks: list[Break]
    notes: list[str]


def check_seal(root: Path, note: bytes | OSError, entries: Sequence[LedgerEntry], with_index: bool) -> Checked:
    """Compare the databases with their seal.

    Args:
        root: The workspace.
        note: The seal's file, or why it cannot be read, from before the entries were read: a running writer adds
            entries and then renews it, so that it can be older than the entries, but not newer.
        entries: All that can be read.
        with_index: Whether to read the index, too.
    """
    if isinstance(note, OSError):
        # A ledger of an older release may get its first seal while it is read.
        if not seals_are_kept(entries) or (isinstance(note, FileNotFoundError) and (root / NAME).exists()):
            return Checked([], [])
        lost = "Bytes of the databases that nothing reads may have been changed; the next writing command seals them."
        return Checked([Break(where=NAME, found=unreadable(note), means=lost)], [])
    try:
        vkey = log_vkey(root / "keys")
    except (TakedownError, OSError):
        return Checked([], [])  # said of the key itself
    try:
        seal = read_seal(note, vkey)
    except StoreDamaged as error:
        means = "It was changed, or is of another lineage; the next writing command makes it again."
        return Checked([Break(where=NAME, found=str(error), means=means)], [])
    checked = check_ledger(root, seal)
    if not with_index or seal.index is None:
        return checked
    index = check_index(root, seal.index)
    return Checked(checked.breaks + index.breaks, checked.notes + index.notes)


_UNREAD = (
    "Where nothing else is named of this file, all that is read of it holds, and only bytes that mean nothing changed: "
    "the disk is failing, or somebody wrote to the file."
)


def check_ledger(root: Path, seal: Seal) -> Checked:
    """Compare the ledger's file with its seal; nothing where the file cannot be read: `Ledger.examine` says that."""
    try:
        with Ledger.open(root / LEDGER, read_only=True) as ledger:
            image = ledger.image()
    except (TakedownError, sqlite3.Error, OSError):
        return Checked([], [])  # said of the ledger itself
    if seal.entries > image.entries:
        found = f"seals {seal.entries} entries, the ledger has {image.entries}"
        return Checked([Break(where=NAME, found=found, means="The ledger was cut back, or is an older copy.")], [])
    if seal.entries < image.entries:
        return Checked([], [_STALE.format(f"of {seal.entries} entries, the ledger has {image.entries}", "ledger")])
    differs = {
        "its bytes are not those that were sealed": digest_bytes(image.pages) != seal.ledger,
        f"{image.behind} bytes follow behind its last page": image.behind > 0,
    }
    means = f"{_UNREAD} Restore it from a backup."
    return Checked([Break(where=LEDGER, found=found, means=means) for found, so in differs.items() if so], [])


_STALE = (
    "the seal is {}: a command was interrupted, or is running. Bytes of the {}'s file that nothing reads were not "
    "compared; the next writing command renews the seal."
)


def check_index(root: Path, sealed: tuple[str, str]) -> Checked:
    """Compare the file of the index with its sealed state and digest; nothing where it is gone, or cannot be read."""
    found = index_file(root / INDEX)
    if found is None:
        return Checked([], [])  # deleted, which is allowed; or said of the index itself
    means = f"{_UNREAD} Delete the file; the next run builds it from the vault."
    if found.counts[0] != found.counts[1]:
        told = f"counts {found.counts[0]} transactions in one place, {found.counts[1]} in another"
        return Checked([Break(where=INDEX, found=told, means=means)], [])
    if found.state != sealed[0]:
        return Checked([], [_STALE.format("of another state of the index", "index")])
    if found.digest != sealed[1]:
        return Checked([Break(where=INDEX, found="its bytes are not those that were sealed", means=means)], [])
    return Checked([], [])
