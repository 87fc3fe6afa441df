"""What the stages of a run share: models and texts brought back from disk, and what v0 says of the reference texts.

In: an opened run, or a workspace. Out: tensors and passages in memory; on disk what v0 says of reference texts, less
what is taken out or erased. Never: a text written anywhere.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from pipeline.anchor import Anchor, build_anchor, load_anchor, save_anchor
from pipeline.errors import UsageError
from pipeline.evaluate import never_seen_level, score_texts, scores_by_text, spread
from pipeline.files import digest_json, read_json, write_json
from pipeline.ledger import Ledger
from pipeline.models import (
    check_tokenizer,
    load_tokenizer,
    shared_model,
)
from pipeline.passages import Passage, cut, encode, pad_id, passages_of
from pipeline.recited import PREFIX, anchor_passages, still_recited
from pipeline.records import (
    DedupeReport,
    LedgerEntry,
    PassageSpan,
    Reference,
    ScreenReport,
    TextScore,
)
from pipeline.references import MEASURED, read_texts
from pipeline.runlog import timed
from pipeline.runs import Run, open_run
from pipeline.settings import Settings
from pipeline.states import (
    ancestry,
    erased_requests,
    excluded,
    published_versions,
    purged_versions,
    request_states,
)
from pipeline.undo import memorised_in
from pipeline.vault import Vault, open_vault
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

T = TypeVar("T")

LOADING = threading.Lock()
"""Held while a model is loaded: two threads that load at once disturb each other inside transformers."""


RESTORING = threading.Lock()
"""Held while a version is made a model folder: threads that share a run need it once."""


def model_folder(run: Run, version: int) -> Path:
    """A version as a model folder, restored from the store with every byte hashed again, once per run."""
    with RESTORING:
        return _restored(run, version)


def _restored(run: Run, version: int) -> Path:
    folder = run.folder / f"v{version}"
    if not (run.folder / f"v{version}.restored").exists():
        with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
            entries = ledger.entries()
        if version in purged_versions(entries):
            raise UsageError(
                f"v{version}: was purged, so it cannot be measured again on reference texts or settings that are "
                "new. Go back to those it was measured with."
            )
        shutil.rmtree(folder, ignore_errors=True)
        VersionStore(run.workspace.versions, published_versions(entries)).restore(version, folder, link=True)
        (run.folder / f"v{version}.restored").touch()
    return folder


def parent_model(run: Run) -> tuple[nn.Module, object]:
    """The version in force and its tokenizer."""
    return loaded(model_folder(run, run.plan.parent), run.settings.runtime.device)


def loaded(folder: Path, device: str) -> tuple[nn.Module, object]:
    """A model and its tokenizer, which stay loaded; from any thread."""
    with LOADING:
        return shared_model(folder, device), load_tokenizer(folder)


def start_folder(run: Run) -> Path:
    """What the step starts from as a model folder: the parent, in a reinstatement without the steps left out."""
    return run.folder / "start" if run.plan.left_out else model_folder(run, run.plan.parent)


def start_model(run: Run) -> tuple[nn.Module, object]:
    """What the step starts from, and its tokenizer."""
    return loaded(start_folder(run), run.settings.runtime.device)


def passages_at(
    tokenizer: object, vault: Vault, spans: Mapping[str, Sequence[PassageSpan]]
) -> dict[str, list[Passage]]:
    """Cut the texts in the vault at spans found earlier."""
    return {name: cut(encode(tokenizer, name, vault.get(name).text), found) for name, found in spans.items()}


def earlier_spans(run: Run) -> dict[str, list[PassageSpan]]:
    """The passages that the parent was made to forget and must still not know, by request; without what was erased.

    Of requests that are worked on again also those that are memorised where the step starts.
    """
    with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
        entries = ledger.entries()
    still = excluded(entries, run.plan.parent).keys() - set(run.plan.reinstates) - erased_requests(entries).keys()
    spans = {name: found for name, found in forgotten_spans(run).items() if name in still}
    if not (run.plan.reinstates or run.plan.reworks):
        return {name: found for name, found in spans.items() if name not in run.plan.requests}
    fresh, again = set(first_worked_on(run)), forget_spans(run)
    return {
        name: _united(spans.get(name, ()), again.get(name, ()))
        for name in sorted(spans.keys() | again.keys())
        if name not in fresh
    }


def held_texts(run: Run) -> frozenset[str]:
    """Requests under legal hold: no fit works on their text."""
    with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
        return frozenset(name for name, state in request_states(ledger.entries()).items() if state.on_hold)


def _united(*found: Sequence[PassageSpan]) -> list[PassageSpan]:
    """All spans of a text, each once, in order."""
    return sorted({span for spans in found for span in spans}, key=lambda s: (s.prompt_start, s.start, s.end))


def erased_texts(run: Run) -> tuple[str, ...]:
    """Requests that the parent was made to forget and whose text was erased: nobody can measure it."""
    with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
        entries = ledger.entries()
    still = excluded(entries, run.plan.parent).keys() & erased_requests(entries).keys()
    return tuple(name for name in sorted(forgotten_spans(run)) if name in still)


def first_worked_on(run: Run) -> list[str]:
    """Requests that a step works on for the first time; in a reinstatement they had been repeats, or not memorised."""
    if not run.plan.reinstates:
        return [name for name in forget_spans(run) if name not in run.plan.reworks]
    with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
        states = request_states(ledger.entries())
    return [name for name in forget_spans(run) if states[name].state in ("repeat", "not-memorised")]


def reinstated_spans(run: Run) -> dict[str, list[PassageSpan]]:
    """The passages of the texts to be put back, by request."""
    return {name: found for name, found in forgotten_spans(run).items() if name in run.plan.reinstates}


def scores_before(run: Run) -> dict[str, TextScore]:
    """How the texts to be put back scored before they were first taken out, as far as the ledger has it."""
    with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
        return {
            name: TextScore.model_validate(e.event.data.get("before"))
            for e in reversed(ledger.entries())
            if e.event.kind == "verified" and (name := str(e.event.request_id)) in run.plan.reinstates
        }


def forgotten_spans(run: Run) -> dict[str, list[PassageSpan]]:
    """Every passage that the parent or a version before it was made to forget, by request."""
    with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
        return spans_up_to(run.workspace, ledger.entries(), run.plan.parent)


def spans_up_to(workspace: Workspace, entries: Sequence[LedgerEntry], version: int) -> dict[str, list[PassageSpan]]:
    """Every passage that a version or one that it was made from was made to forget, by request."""
    known, spans = published_versions(entries), dict[str, set[tuple[int, int, int]]]()
    store = VersionStore(workspace.versions, known)
    for number in ancestry(known, version):
        for name, rows in memorised_in(store.manifest(number)).items():
            spans.setdefault(name, set()).update((a, b, c) for a, b, c in rows)
    return {
        name: [PassageSpan(request_id=name, prompt_start=a, start=b, end=c) for a, b, c in sorted(rows)]
        for name, rows in spans.items()
    }


def flatten(texts: Mapping[str, Sequence[T]]) -> list[T]:
    """What belongs to all texts, text by text."""
    return [item for found in texts.values() for item in found]


def reference(workspace_root: str, run_id: str) -> Reference:
    """Measure v0 on the reference texts, once for the lineage."""
    run = open_run(workspace_root, run_id)
    workspace, settings = run.workspace, run.settings
    texts: dict[str, dict[str, str]] = {kind: read_texts(workspace, kind) for kind in MEASURED}
    folder = _measured_in(workspace, settings, texts)
    if not (folder / "reference.json").is_file() and (earlier := _kept_measurement(run, texts)) is not None:
        folder = earlier
    if (folder / "reference.json").is_file():
        return _noted(run, Reference.model_validate(read_json(folder / "reference.json")))
    with timed(workspace, run_id, "reference"):
        return _measured(run, folder, texts)


def _measured_in(workspace: Workspace, settings: Settings, texts: Mapping[str, Mapping[str, str]]) -> Path:
    """The folder of what v0 says of some texts under some settings, whether it is there or not."""
    parts = (settings.passages, settings.screen, settings.evaluate, settings.unlearn.anchor_top_k,
             settings.unlearn.anchor_pool)  # fmt: skip
    # Only where it counts: what was measured by a release that did not have it must be found, v0 may be purged.
    recited = (settings.unlearn.recited_openings,) if settings.unlearn.recited_openings else ()
    key = digest_json([
        VersionStore(workspace.versions).manifest(0).root, texts,
        [p if isinstance(p, int) else p.model_dump() for p in (*parts, *recited)],
    ]).removeprefix("sha256:")[:16]  # fmt: skip
    return workspace.reference / "measured" / key


def _kept_measurement(run: Run, texts: Mapping[str, Mapping[str, str]]) -> Path | None:
    """Where v0 was purged, what a version before was measured by, if only how much is held to is another setting now.

    A default that a release changes must not stop a lineage that cannot ask v0 any more. Which one was used is in the
    run's evidence (`_noted`).
    """
    workspace, settings = run.workspace, run.settings
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        entries = ledger.entries()
    published = published_versions(entries)
    if 0 not in purged_versions(entries):
        return None
    store = VersionStore(workspace.versions, published)
    for version in reversed(ancestry(published, run.plan.parent)[1:]):  # v0 was made by no run
        before = Settings.model_validate(store.manifest(version).settings)
        same = all(getattr(before, part) == getattr(settings, part) for part in ("passages", "screen", "evaluate"))
        folder = _measured_in(workspace, before, texts)
        if same and (folder / "reference.json").is_file():
            return folder
    return None


def _measured(run: Run, folder: Path, texts: Mapping[str, Mapping[str, str]]) -> Reference:
    """Measure v0 into a folder; see `reference`."""
    workspace, settings = run.workspace, run.settings
    folder.mkdir(parents=True, exist_ok=True)
    source = model_folder(run, 0)
    model, tokenizer = shared_model(source, settings.runtime.device), load_tokenizer(source)
    check_tokenizer(model, tokenizer)
    held = reference_passages(tokenizer, texts["heldout"], "heldout", settings)
    kept = reference_passages(tokenizer, texts["kept"], "kept", settings)
    anchors = anchor_passages(model, tokenizer, texts["retain"], settings)
    retain = reference_passages(tokenizer, texts["retain"], "retain", settings) if not held else {}
    pad, tokens = pad_id(tokenizer), settings.runtime.batch_tokens
    level = never_seen_level(
        flatten(scores_by_text(model, held, pad, tokens)),
        flatten(scores_by_text(model, retain, pad, tokens)),
        settings.screen,
    )
    scores = score_texts(model, tokenizer, {**kept, **held}, 0, tokens)
    anchor = None
    if anchors:
        built = build_anchor(model, anchors, settings.unlearn.anchor_top_k, pad, tokens)
        if settings.unlearn.recited_openings and run.plan.parent:
            # v0 still recites what versions after it were made to forget, also what nobody has the text of any more.
            built = still_recited(parent_model(run)[0], built, pad, tokens)
        anchor = save_anchor(folder, built) if built.passages else None
    found = Reference(folder=str(folder.relative_to(workspace.root)), level=level, scores=scores, anchor=anchor)
    write_json(folder / "reference.json", found.model_dump(mode="json"))
    return _noted(run, found)


def thin_anchors(run: Run) -> None:
    """Remove what is out from everything that later versions are held to, so that no copy of it stays there.

    The smaller file is written before it is named and the larger one removed after that. What a killed call left is
    removed by the next run's, which looks for everything that is out, not for its own texts only.
    """
    measured = run.workspace.reference / "measured"
    texts: list[Passage] | None = None
    for path in sorted(measured.glob("*/reference.json")):
        found = Reference.model_validate(read_json(path))
        if found.anchor is not None:
            if texts is None:
                tokenizer = load_tokenizer(start_folder(run))
                vault, spans = open_vault(run.workspace), (forget_spans(run), earlier_spans(run))
                texts = [p for found_ in spans for p in flatten(passages_at(tokenizer, vault, found_))]
            anchor = load_anchor(path.parent, found.anchor)
            kept = anchor.apart_from(texts)
            if len(kept.passages) < len(anchor.passages):
                found = _name_anchor(path, found, kept)
        _remove_unnamed(path.parent, found)
    for folder in measured.glob("*"):
        if not (folder / "reference.json").is_file():  # a killed measurement's
            shutil.rmtree(folder)


def drop_recited(workspace: Workspace) -> None:
    """Remove all that v0 recites by itself from what later versions are held to.

    For texts that are erased: nobody can tell any more which passages are theirs. Where v0 is still there the next run
    lets it write anew, and keeps what the version in force recites, too.
    """
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        purged = 0 in purged_versions(ledger.entries())
    for path in sorted((workspace.reference / "measured").glob("*/reference.json")):
        found = Reference.model_validate(read_json(path))
        if found.anchor is None:
            continue
        anchor = load_anchor(path.parent, found.anchor)
        own = {p.span.request_id for p in anchor.passages if p.span.request_id.startswith(PREFIX)}
        if own and not purged:
            shutil.rmtree(path.parent)
        elif own:
            _remove_unnamed(path.parent, _name_anchor(path, found, anchor.without(own)))


def _name_anchor(path: Path, found: Reference, anchor: Anchor) -> Reference:
    """Write a smaller anchor and name it; what it replaces stays until `_remove_unnamed`."""
    ref = save_anchor(path.parent, anchor) if anchor.passages else None
    found = found.model_copy(update={"anchor": ref})
    write_json(path, found.model_dump(mode="json"))
    return found


def _remove_unnamed(folder: Path, found: Reference) -> None:
    for file in folder.glob("*.safetensors"):
        if found.anchor is None or file.name != found.anchor.path:
            file.unlink()


def _noted(run: Run, found: Reference) -> Reference:
    """Note in the run what it was measured against, so that it becomes part of the run's evidence."""
    write_json(run.folder / "reference.json", found.model_dump(mode="json"))
    return found


def reference_passages(
    tokenizer: object, texts: Mapping[str, str], kind: str, settings: Settings
) -> dict[str, list[Passage]]:
    """Passages of reference texts under ``kind/NAME``, evenly thinned to the number that settings allow."""
    most = settings.evaluate.reference_passages
    each = max(1, most // max(1, len(texts)))
    found = {
        f"{kind}/{name}": spread(passages_of(encode(tokenizer, f"{kind}/{name}", text), settings.passages), each)
        for name, text in texts.items()
    }
    return {name: passages for name, passages in list(found.items())[:most] if passages}


def forget_spans(run: Run) -> dict[str, list[PassageSpan]]:
    """What this step unlearns and is held to: request → memorised passages, folded requests included.

    Of texts that are worked on again also the passages that earlier steps took out: it was a step that brought them
    back, and the parent may reproduce none. Without a text of its own a step has nothing to do.
    """
    screened, again = run.finished("screen", ScreenReport).requests, set(run.plan.reworks)
    own = {r.request_id: list(r.memorised) for r in screened if r.memorised and r.request_id not in again}
    if not (own and again):
        return own
    known = forgotten_spans(run)
    return own | {r.request_id: _united(known[r.request_id], r.memorised) for r in screened if r.request_id in again}


def trained_spans(run: Run) -> dict[str, list[PassageSpan]]:
    """The spans to train on: a folded request is worked on through the one it was folded into, if that one is."""
    spans = forget_spans(run)
    decisions = run.finished("dedupe", DedupeReport).decisions
    into = {d.request_id: d.evidence[0].request_id for d in decisions if d.verdict == "folded"}
    return {name: found for name, found in spans.items() if into.get(name) not in spans}
