"""Has this text been taken down before, does the batch hold it twice, does the retain text hold it?

In: requests, and the index of everything taken down. Out: one decision per request with its evidence, and the
retain documents to leave out. Never: keeps text (the index holds hashes), trusts a sketch (MinHash only proposes
pairs; exact overlap of word shingles decides), or drops a text through a chain of similar ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from pipeline.index import DedupeIndex
from pipeline.records import DedupeDecision, Evidence, RetainExclusion, TakedownRequest
from pipeline.settings import DedupeSettings
from pipeline.shingles import (
    DedupeParameters,
    Flags,
    Prints,
    ShingledText,
    WindowTable,
    shingle,
    sign,
)

REPORTED = 0.05
"""A pair is evidence from this Jaccard or containment on; 90 unrelated essays of 500 words reached 0.027."""
COVERED_RUN_WORDS = 10
"""Words that must be covered in a row before they count as taken down: with many earlier works some common
three-word phrases are covered by chance, ten in a row practically never."""
NEW_PASSAGE_WORDS = 50
"""A text with this many new words in a row is neither a repeat nor folded, however long the rest: 5 % of a novel
is a chapter."""


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
