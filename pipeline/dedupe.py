"""Has this text been taken down before, does the batch hold it twice, does the retain text hold it?

In: requests, and the index of everything taken down. Out: one decision per request with its evidence, and the
retain documents to leave out. Never: keeps text (the index holds hashes), trusts a sketch (MinHash only proposes
pairs; exact overlap of word shingles decides), or drops a text through a chain of similar ones.

What many unrelated works have in common, such as a licence in front of each, says nothing about any two of them: it is
found by how many earlier works hold it, or listed by the user, and then left out of every comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from pipeline.index import DedupeIndex
from pipeline.records import DedupeDecision, Evidence, RetainExclusion, TakedownRequest
from pipeline.segments import Numbers, Windows, build, sign_texts
from pipeline.settings import DedupeSettings
from pipeline.shingles import DedupeParameters, Flags, Prints, ShingledText, Signatures, shingle_many

REPORTED = 0.05
"""A pair is evidence from this Jaccard or containment on; 90 unrelated essays of 500 words reached 0.027."""
COVERED_RUN_WORDS = 10
"""Words that must be covered in a row before they count as taken down: with many earlier works some common
three-word phrases are covered by chance, ten in a row practically never."""
NEW_PASSAGE_WORDS = 50
"""A text with this many new words in a row is neither a repeat nor folded, however long the rest: 5 % of a novel
is a chapter."""
WORN_SHARE = 0.4
"""Share of words under shared shingles from which a stretch without a covered run is that of a worn copy: 20 % of words
exchanged leave half; whole books have 20 % by chance. Of texts that it was not chosen on, worn ones (20 % of words
exchanged, or OCR 5 %) keep 60 to 75 %, and 99 % of pairs of different ones have at most 10 %, none over 36 %."""
ALIKE_SLOTS = 8
"""Slots of 128 in which the signatures of two windows agree from which on the windows resemble each other. Of seven
million pairs of windows from fifteen different books six in a million did, mostly quotations. Of pairs of copies of
1,000 words, each worn by itself (OCR 5 % of letters, or 20 % of words) and begun up to 60 words apart, 97 % are seen to
be one work; of 150 words 73 to 83 %, and all with OCR 2 %. Those books are what it was chosen on; of other texts (the
demo's, docstrings of Python, generated prose) 86 and 84 of 92 pairs of 1,000 words, 112 and 98 of 142 of 150 words, and
none of 1,932 pairs of different texts of either length."""
ALIKE_SHARE = 0.9
"""Share of the shorter work's windows that must resemble one of the longer's for the two to be copies or pieces of one
work; what only begins with the same licence has windows of its own. 0.8 would know 98 to 100 % of the worn copies of
1,000 words, but also take two short works behind one long licence for copies of each other."""
SAMPLED_WINDOWS = 32
"""Windows of the shorter work that are compared, spread evenly."""
PRINTS_AT_ONCE = 1 << 22
"""Fingerprints of candidates compared in one call, 32 MB of them."""
DOCUMENTS_AT_ONCE = 64
"""Retain documents that are shingled together."""


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
    """Which values are in a sorted set."""
    if not len(sorted_set):
        return np.zeros(len(values), dtype=np.bool_)
    places = np.minimum(np.searchsorted(sorted_set, values), len(sorted_set) - 1)
    found: Flags = sorted_set[places] == values
    return found


def _runs(flags: Flags) -> tuple[Numbers, Numbers]:
    """Where the runs of set flags start, and where they end."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return edges[::2], edges[1::2]


def _passages(text: ShingledText, shingles: Flags, at_least: int) -> tuple[Numbers, Numbers, Numbers]:
    """Runs of the given shingles that hold at least so many words.

    Returns:
        For each run its first shingle, which starts at the run's first word; the shingle behind it; and the word behind
        it, which in mixed scripts need not be that of its last shingle.
    """
    starts, stops = _runs(shingles)
    if not len(starts):
        return starts, stops, stops
    bounds = np.stack((starts, stops), axis=1).reshape(-1)
    ends = np.maximum.reduceat(np.append(text.ends, 0), bounds)[::2]
    long = ends - starts >= at_least
    return starts[long], stops[long], ends[long]


def _spread(starts: Numbers, stops: Numbers, length: int) -> Flags:
    """Flags that are set in some ranges."""
    steps = np.zeros(length + 1, dtype=np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, stops, -1)
    return np.asarray(np.cumsum(steps[:-1]) > 0)


def _words_of(text: ShingledText, shingles: Flags, at_least: int) -> Flags:
    """Words under runs of the given shingles, runs of fewer than ``at_least`` words left out."""
    starts, _, ends = _passages(text, shingles, at_least)
    return _spread(starts, ends, len(text.spans))


def _new_words(text: ShingledText, covered: Flags) -> tuple[Numbers, Numbers]:
    """Ranges of words, starts and ends, that no covered run holds; never empty while a shingle is uncovered."""
    new = ~_words_of(text, covered, COVERED_RUN_WORDS)
    if not new.any():
        # Every word is known but not in this order (two works joined, sentences moved): the seams are new.
        new = _words_of(text, ~covered, 1)
    return _runs(new)


def _known(text: ShingledText, covered: Flags, counted: Flags, at_least: float) -> bool:
    """Whether at least this share of the distinct shingles that count is covered and no whole passage is new."""
    new = counted & ~covered
    if not new.any():
        return True
    starts, ends = _new_words(text, ~new)
    return _share(text, covered, counted) >= at_least and int((ends - starts).max()) < NEW_PASSAGE_WORDS


def _share(text: ShingledText, covered: Flags, counted: Flags) -> float:
    """Share of the distinct shingles that count which is covered, in [0, 1]."""
    return len(np.unique(text.sequence[covered & counted])) / len(np.unique(text.sequence[counted]))


def _spans(text: ShingledText, covered: Flags) -> tuple[tuple[int, int], ...]:
    """Character ranges of the new words; at the text's edges they take in what is not a word."""
    last = len(text.spans)
    starts, ends = _new_words(text, covered)
    return tuple(
        (int(text.spans[start][0]) if start else 0, int(text.spans[end - 1][1]) if end < last else text.length)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    )


def _ranges(text: ShingledText, covered: Flags) -> tuple[tuple[int, int], ...]:
    """Character ranges that are covered: passages, or where a copy is too worn for one, whatever is dense enough."""
    inside = _words_of(text, covered, COVERED_RUN_WORDS)
    if not inside.any():
        inside = _dense(_words_of(text, covered, 1))
    starts, ends = _runs(inside)
    return tuple(zip(text.spans[starts, 0].tolist(), text.spans[ends - 1, 1].tolist(), strict=True))


def _dense(words: Flags) -> Flags:
    """Stretches of `NEW_PASSAGE_WORDS` words with at least `WORN_SHARE` set, from the first set one to the last."""
    size = min(NEW_PASSAGE_WORDS, len(words))
    sums = np.concatenate(([0], np.cumsum(words)))
    starts = np.flatnonzero(sums[size:] - sums[:-size] >= WORN_SHARE * size)
    places = np.flatnonzero(words)
    firsts, lasts = np.searchsorted(places, starts), np.searchsorted(places, starts + size) - 1
    return _spread(places[firsts], places[lasts] + 1, len(words))


# --- boilerplate ------------------------------------------------------------------------------------------


class _Counted(NamedTuple):
    """A text, and what of it counts as evidence.

    Attributes:
        text: The text.
        places: (shingles,) where each shingle of its sequence is in its sorted fingerprints.
        flags: (shingles,) whether each shingle of its sequence counts.
        prints: Sorted fingerprints that count.
        left_out: Sorted fingerprints that do not.
    """

    text: ShingledText
    places: Numbers
    flags: Flags
    prints: Prints
    left_out: Prints

    @property
    def uncounted(self) -> float:
        """Share of the distinct shingles that do not count, in [0, 1]."""
        return len(self.left_out) / len(self.text.prints)

    def covered(self, others: Iterable[Prints]) -> Flags:
        """(shingles,) which shingles count and are in the union of other texts."""
        found = np.zeros(len(self.text.prints), dtype=np.bool_)
        for prints in others:
            # Sorted ones are looked up ten times faster than those of the sequence.
            found |= _member(self.text.prints, prints)
        return found[self.places] & self.flags


def _listed(boilerplate: Iterable[str], parameters: DedupeParameters) -> Prints:
    """Sorted fingerprints of the user's list."""
    found = [text.prints for text in shingle_many(boilerplate, parameters)]
    return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)


def _count(
    text: ShingledText,
    earlier: Mapping[str, Prints],
    signatures_of: Callable[[str], Signatures],
    listed: Prints,
    most_works: int,
) -> _Counted:
    """Leave boilerplate out of a text: passages whose shingles are listed or in more than so many unrelated works.

    Only passages: single phrases of three words are in many works, and that does not make them boilerplate.
    """
    least = min(COVERED_RUN_WORDS, len(text.spans))
    places = np.searchsorted(text.prints, text.sequence)
    common = (_member(text.prints, listed) | _frequent(text, places, earlier, signatures_of, most_works))[places]
    starts, stops, _ = _passages(text, common, least)
    out = np.zeros(len(text.prints), dtype=np.bool_)
    out[places[_spread(starts, stops, len(places))]] = True
    return _Counted(text, places, ~out[places], text.prints[~out], text.prints[out])


def _frequent(
    text: ShingledText,
    places: Numbers,
    earlier: Mapping[str, Prints],
    signatures_of: Callable[[str], Signatures],
    most_works: int,
) -> Flags:
    """Which fingerprints of a text more than so many unrelated works have in passages in common with it.

    Copies and pieces of one work, however bad, count once; the longest comes first, so that its pieces are known by it.
    Works that add nothing are not looked at, so that a licence in front of a hundred thousand works costs little more
    than one in front of four.
    """
    if len(earlier) <= most_works:
        return np.zeros(len(text.prints), dtype=np.bool_)
    groups: list[tuple[Signatures, Flags]] = []
    works = np.zeros(len(text.prints), dtype=np.int64)
    for name, other in sorted(earlier.items(), key=lambda item: -len(item[1])):
        starts, stops, _ = _passages(text, _member(text.prints, other)[places], COVERED_RUN_WORDS)
        held = np.zeros(len(text.prints), dtype=np.bool_)
        held[places[_spread(starts, stops, len(places))]] = True
        if not (held & (works <= most_works)).any():
            continue
        signed = signatures_of(name)
        known = next((flags for first, flags in groups if _alike(first, signed)), None)
        if known is None:
            groups.append((signed, held))
            works += held
        else:
            works += held & ~known
            known |= held
    return np.asarray(works > most_works)


def _alike(one: Signatures, other: Signatures) -> bool:
    """Whether one work is a copy of the other or a piece of it, window by window.

    Args:
        one: (windows, num_perm) signatures of a work.
        other: (windows, num_perm) signatures of another one.
    """
    few, many = sorted((one, other), key=len)
    sample = few[np.unique(np.linspace(0, len(few) - 1, SAMPLED_WINDOWS).round().astype(np.int64))]
    agreeing = [int((many == window).sum(axis=1).max()) for window in sample]
    least = ALIKE_SLOTS * one.shape[1] / 128
    return bool(sum(slots >= least for slots in agreeing) >= ALIKE_SHARE * len(sample))


# --- pairs ------------------------------------------------------------------------------------------------


def _overlapping(text: ShingledText, candidates: Mapping[str, Prints]) -> dict[str, Prints]:
    """The candidates whose exact overlap may be evidence; that of most is a handful of common phrases.

    Drops only pairs whose overlap is below `REPORTED` in both directions and has fewer shingles than a passage of
    `COVERED_RUN_WORDS` needs; no rule finds anything in those.
    """
    longest = int((text.ends - np.arange(len(text.ends))).max()) if len(text.ends) else 0
    least = max(1, COVERED_RUN_WORDS + 1 - longest)
    prints = text.prints
    counts = np.bincount(np.searchsorted(prints, text.sequence), minlength=len(prints))
    kept = {}
    for some in _together(candidates):
        joined = np.concatenate([candidates[name] for name in some])
        sizes = np.array([len(candidates[name]) for name in some])
        starts = np.cumsum(sizes) - sizes
        places = np.minimum(np.searchsorted(prints, joined), len(prints) - 1)
        found = prints[places] == joined
        shared = np.add.reduceat(found, starts, dtype=np.int64)
        positions = np.add.reduceat(np.where(found, counts[places], 0), starts)
        enough = (shared >= REPORTED * np.minimum(sizes, len(prints))) | (positions >= least)
        kept.update({name: candidates[name] for name, keep in zip(some, enough.tolist(), strict=True) if keep})
    return kept


def _together(candidates: Mapping[str, Prints]) -> Iterator[list[str]]:
    """Names in lists of about `PRINTS_AT_ONCE` fingerprints together."""
    group, size = list[str](), 0
    for name, prints in candidates.items():
        group.append(name)
        size += len(prints)
        if size >= PRINTS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _measure(name: str, counted: _Counted, other: Prints) -> tuple[Evidence, Flags] | None:
    """The overlap with another text and which shingles are covered; None where nothing that counts is in common.

    Boilerplate of the text is left out on both sides.
    """
    covered = counted.covered([other])
    if not covered.any():
        return None
    return compare(name, counted.prints, other[~_member(other, counted.left_out)]), covered


def _pair(name: str, counted: _Counted, other: Prints) -> Evidence | None:
    """The overlap with another text if it says something: a large share, or a passage however long both texts are."""
    measured = _measure(name, counted, other)
    if measured is None:
        return None
    pair, covered = measured
    overlap = max(pair.jaccard, pair.containment, pair.contained)
    if overlap < REPORTED and not _words_of(counted.text, covered, COVERED_RUN_WORDS).any():
        return None
    return pair.model_copy(update={"ranges": _ranges(counted.text, covered)})


def _pairs(counted: _Counted, others: Mapping[str, Prints]) -> dict[str, Evidence]:
    """The pairs that say something, by name."""
    pairs = ((name, _pair(name, counted, other)) for name, other in others.items())
    return {name: pair for name, pair in pairs if pair is not None}


# --- requests ---------------------------------------------------------------------------------------------


def dedupe(
    requests: Sequence[TakedownRequest],
    index: DedupeIndex,
    settings: DedupeSettings,
    boilerplate: Iterable[str] = (),
) -> tuple[DedupeDecision, ...]:
    """Decide for each request whether it is fresh, a repeat, folded into another one, or empty.

    Earlier takedowns decide first: a repeat is neither folded nor folded into, since nothing is worked on for it.
    Of the others the longest stays, on equal length the first, and the rest are folded only into texts that stay.
    Requests of this batch that are in the index already do not count as earlier, so that a resumed run decides as
    the first one did. A text that is boilerplate, by the rule for repeats, is fresh: whether the model knows it is then
    measured, and nothing else is concluded from it.

    Args:
        requests: The batch; ids are unique.
        index: Everything taken down before.
        settings: Thresholds.
        boilerplate: Texts that are evidence for nothing.

    Returns:
        One decision per request, in the order given. Evidence holds earlier takedowns and requests of the batch,
        strongest containment first; that of a repeat begins with the earlier takedowns, that of a folded request
        with the text that it is folded into.

    Raises:
        StoreDamaged: The index is damaged.
    """
    names = [request.request_id for request in requests]
    batch = set(names)
    texts = shingle_many([request.text for request in requests], index.parameters)
    windows = sign_texts(texts, index.parameters)
    history, siblings = index.candidates_many(windows), _siblings(names, texts, windows, index.parameters)
    listed = _listed(boilerplate, index.parameters)
    decisions: dict[str, DedupeDecision] = {}
    stays = set[str]()
    for at in sorted(range(len(texts)), key=lambda at: (-len(texts[at].prints), at)):
        name, text = names[at], texts[at]
        if not len(text.prints):
            decisions[name] = DedupeDecision(request_id=name, verdict="empty", covered=0.0)
            continue
        earlier = _overlapping(text, {key: prints for key, prints in history[at].items() if key not in batch})
        mates = _overlapping(text, siblings[at])
        counted = _count(text, earlier, index.signatures, listed, settings.boilerplate_works)
        if len(counted.left_out) and _known(text, ~counted.flags, np.ones_like(counted.flags), settings.repeat_covered):
            decisions[name] = DedupeDecision(
                request_id=name, verdict="fresh", covered=0.0, fresh_spans=((0, text.length),),
                uncounted=counted.uncounted,
            )  # fmt: skip
            continue
        before, beside = _pairs(counted, earlier), _pairs(counted, mates)
        covered = counted.covered(earlier[key] for key in before)
        into = max(
            (
                key
                for key in beside
                if key in stays
                and _known(text, counted.covered([mates[key]]), counted.flags, settings.fold_containment)
            ),
            key=lambda key: beside[key].containment,
            default=None,
        )
        verdict: Literal["fresh", "repeat", "folded"] = "fresh"
        if _known(text, covered, counted.flags, settings.repeat_covered):
            verdict, first = "repeat", set(before)
        elif into is not None:
            verdict, first = "folded", {into}
        else:
            stays.add(name)
            first = set[str]()
        pairs = [*before.values(), *beside.values()]
        decisions[name] = DedupeDecision(
            request_id=name,
            verdict=verdict,
            covered=_share(text, covered, counted.flags),
            evidence=tuple(sorted(pairs, key=lambda pair: (pair.request_id not in first, -pair.containment))),
            fresh_spans=_spans(text, covered) if verdict == "fresh" else (),
            uncounted=counted.uncounted,
        )
    return tuple(decisions[name] for name in names)


def _siblings(
    names: Sequence[str], texts: Sequence[ShingledText], windows: Windows, parameters: DedupeParameters
) -> list[dict[str, Prints]]:
    """For each text the others of the batch that may share a passage with it, in order of the batch."""
    segment = build(range(len(texts)), [text.prints for text in texts], windows, parameters)
    found: list[dict[str, Prints]] = [{} for _ in texts]
    for text, other in zip(*(pairs.tolist() for pairs in segment.candidates(windows, parameters)), strict=True):
        if text != other:
            found[text][names[other]] = texts[other].prints
    return found


# --- retain text ------------------------------------------------------------------------------------------


def exclude_retain(
    documents: Mapping[str, str],
    takedowns: Mapping[str, str],
    settings: DedupeSettings,
    parameters: DedupeParameters | None = None,
    index: DedupeIndex | None = None,
    boilerplate: Iterable[str] = (),
) -> tuple[RetainExclusion, ...]:
    """Find retain documents that hold text to be taken out: keeping them on purpose would undo the takedown.

    Beside the document as a whole each of its windows is compared, so that a long document is found by one passage
    of a long work; ``containment`` is that of the document or of its most similar window, whichever is larger.

    Args:
        documents: Retain texts by name.
        takedowns: Texts of takedowns by request id.
        settings: Thresholds.
        parameters: Shingles and windows; those of the index where there is one.
        index: More takedowns; one that is in ``takedowns``, too, is taken from there.
        boilerplate: Texts that are evidence for nothing.

    Returns:
        At most one exclusion per document, with the takedown that it resembles most, in order of the documents.

    Raises:
        StoreDamaged: The index is damaged.
    """
    parameters = index.parameters if index else parameters or DedupeParameters()
    names, texts = list(takedowns), shingle_many(takedowns.values(), parameters)
    places = {name: place for place, name in enumerate(names)}
    signed = sign_texts(texts, parameters)
    segment = build(range(len(texts)), [text.prints for text in texts], signed, parameters)
    listed = _listed(boilerplate, parameters)

    def signatures_of(name: str) -> Signatures:
        if index is not None and name not in places:
            return index.signatures(name)
        return signed.of(places[name])

    excluded: list[RetainExclusion] = []
    waiting = iter(documents.items())
    while some := list(islice(waiting, DOCUMENTS_AT_ONCE)):
        shingled = shingle_many([raw for _, raw in some], parameters)
        windows = sign_texts(shingled, parameters)
        found: list[dict[str, Prints]] = [{} for _ in some]
        if index is not None:
            found = [
                {name: prints for name, prints in earlier.items() if name not in places}
                for earlier in index.candidates_many(windows)
            ]
        for at, other in zip(*(pairs.tolist() for pairs in segment.candidates(windows, parameters)), strict=True):
            found[at][names[other]] = texts[other].prints
        for (document, _), text, candidates in zip(some, shingled, found, strict=True):
            works = _overlapping(text, candidates)
            if works:
                counted = _count(text, works, signatures_of, listed, settings.boilerplate_works)
                excluded += _exclusion(document, counted, works, settings, parameters)
    return tuple(excluded)


def _exclusion(
    document: str,
    counted: _Counted,
    works: Mapping[str, Prints],
    settings: DedupeSettings,
    parameters: DedupeParameters,
) -> list[RetainExclusion]:
    """The takedown that a document resembles most, if it resembles one enough."""
    pairs = []
    for name, other in works.items():
        measured = _measure(name, counted, other)
        if measured is None:
            continue
        pair, covered = measured
        containment = max(pair.containment, _nearest(counted.text, covered, parameters))
        if (
            pair.jaccard >= settings.retain_jaccard
            or max(containment, pair.contained) >= settings.retain_containment
        ):  # fmt: skip
            pairs.append(pair.model_copy(update={"containment": containment, "ranges": _ranges(counted.text, covered)}))
    if not pairs:
        return []
    strongest = max(pairs, key=lambda pair: (pair.containment + pair.contained, pair.jaccard))
    return [RetainExclusion(document=document, uncounted=counted.uncounted, **strongest.model_dump())]


def _nearest(text: ShingledText, covered: Flags, parameters: DedupeParameters) -> float:
    """Largest share of a window of a text that is covered, in [0, 1]."""
    sums = np.concatenate(([0], np.cumsum(covered)))
    windows = text.windows(parameters)
    starts = np.arange(len(windows)) * parameters.window_step
    sizes = np.array([len(window) for window in windows])
    return float(((sums[starts + sizes] - sums[starts]) / sizes).max())
