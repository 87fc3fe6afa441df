"""A guard over a workspace: everything that waits and everything that was taken out, for whoever serves the model.

In: a workspace. Out: a folder with the guard's two files. Never: a text, an id or a title in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.bloom import DEFAULT_FPR, DEFAULT_LETTERS, Hashes
from pipeline.errors import UsageError
from pipeline.files import explained_space, fsync_folder, write_atomic
from pipeline.guard import PARAMETERS, Guard, letters
from pipeline.records import LedgerEntry, Record
from pipeline.states import TAKEN_OUT, TO_DO, request_states
from pipeline.vault import open_vault, received_data
from pipeline.workspace import Workspace


class Exported(Record):
    """What a guard was made of.

    Attributes:
        requests: Texts in it.
        erased: Requests that belong into it and whose text was erased.
        short: Requests whose text has fewer letters than a run, so that it is not guarded.
        runs: Distinct runs.
        letters: Letters of a run.
        fpr: See `pipeline.guard.Guard`.
        nbytes: Size of the files.
    """

    requests: int
    erased: tuple[str, ...]
    short: tuple[str, ...]
    runs: int
    letters: int
    fpr: float
    nbytes: int


def export_guard(
    workspace: Workspace,
    entries: Sequence[LedgerEntry],
    folder: Path,
    n: int = DEFAULT_LETTERS,
    fpr: float = DEFAULT_FPR,
) -> Exported:
    """Write a guard over what waits, held or not, and what was taken out; with fresh salts each time.

    Args:
        workspace: Where; only read.
        entries: Its ledger.
        folder: Made where there is none. A guard that is there is replaced, the parameters last: whoever reads in
            between finds files that do not belong together, and is told so.
        n: Letters of a run.
        fpr: See `pipeline.guard.Guard`.

    Raises:
        UsageError: There is no text to guard, or ``n`` or ``fpr`` is out of range.
        StoreDamaged: A text of the vault is missing, or is not the one that the ledger committed to.
        NoSpace: The disk is full or read-only.
    """
    claimed = {name: s for name, s in request_states(entries).items() if s.state in (*TO_DO, *TAKEN_OUT)}
    names = [name for name, state in claimed.items() if not state.erased]
    if not names:
        raise UsageError("Nothing waits and nothing was taken out whose text is there: there is nothing to guard.")
    received, vault, short = received_data(entries), open_vault(workspace), list[str]()

    def spelled() -> Iterator[Hashes]:
        for name in names:
            symbols = letters(vault.confirmed(name, received[name]).text)
            if len(symbols) < n:
                short.append(name)
            yield symbols

    guard = Guard.build_letters(spelled(), n, fpr)
    files = guard.files()
    with explained_space(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(files, key=lambda name: name == PARAMETERS):
            write_atomic(folder / name, files[name], mode=0o600)
        fsync_folder(folder.parent)
    return Exported(
        requests=len(names),
        erased=tuple(name for name in claimed if name not in names),
        short=tuple(short),
        runs=guard.runs,
        letters=n,
        fpr=fpr,
        nbytes=sum(map(len, files.values())),
    )


def guarded_ranges(guard: Guard, text: str) -> list[tuple[int, int]]:
    """Character ranges [start, end) of a text that hold runs of a guard; those that touch are one.

    Raises:
        UsageError: The guard is over tokens, and a text has none.
    """
    if guard.level != "letters":
        raise UsageError("This guard is over tokens; only one over letters can be held against a text.")
    places = [place for place, character in enumerate(text) for _ in letters(character)]
    ranges: list[tuple[int, int]] = []
    for start in guard.found(letters(text)):
        first, end = places[start], places[start + guard.n - 1] + 1
        if ranges and first <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((first, end))
    return ranges
