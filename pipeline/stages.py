"""The stages of one step, in the order the data travels; each is one call with a workspace and a run id.

In: the records of the stages before, from the run's folder. Out: the stage's own record, written once. Tensors and
texts are loaded where they are needed and travel nowhere. `flows/takedown.py` calls these in order, after
`pipeline.context.reference` and before `pipeline.answers.publish`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from pipeline.anchor import NO_ANCHOR, build_anchor, load_anchor
from pipeline.context import (
    earlier_spans,
    erased_texts,
    first_worked_on,
    flatten,
    forget_spans,
    held_texts,
    model_folder,
    parent_model,
    passages_at,
    reference,
    reference_passages,
    reinstated_spans,
    scores_before,
    start_folder,
    start_model,
    trained_spans,
)
from pipeline.dedupe import dedupe, exclude_retain
from pipeline.errors import StoreDamaged
from pipeline.evaluate import memorised_above, score_texts
from pipeline.evidence import noted_exclusions
from pipeline.files import digest_json, make_folder
from pipeline.gate import decide
from pipeline.halfway import Halfway
from pipeline.index import DedupeIndex
from pipeline.ledger import Ledger
from pipeline.merge import differing_entries, merge
from pipeline.metrics import exact_memorisation, score_passages
from pipeline.models import (
    file_names,
    load_model,
    shared_model,
)
from pipeline.passages import Passage, encode, pad_id, passages_of
from pipeline.preflight import has_finished, require_stage
from pipeline.progress import Counter, tell
from pipeline.records import (
    Calibration,
    Comparison,
    DedupeReport,
    Evaluation,
    LeftOut,
    MaskReport,
    Measured,
    MergeReport,
    Record,
    ScreenedRequest,
    ScreenReport,
    Step,
    TextScore,
    TextScores,
    VectorReport,
    Verdict,
)
from pipeline.references import boilerplate, read_texts
from pipeline.runlog import report, timed
from pipeline.runs import DAMAGED_RUN, Run, open_run
from pipeline.safefile import model_root, read_header
from pipeline.sparse import Mask, Vector, load_mask, load_vector, norm, save_mask, save_vector
from pipeline.states import erased_requests, excluded, published_versions
from pipeline.undo import leave_out
from pipeline.vault import open_vault
from pipeline.versions import VersionStore
from pipeline.workbench import Fitted, StepTexts, Workbench, select_weights


def dedupe_stage(workspace_root: str, run_id: str) -> DedupeReport:
    """Compare the requests with each other, with everything taken down, and with what is to be kept."""
    run = open_run(workspace_root, run_id)
    vault = open_vault(run.workspace)

    def compute() -> DedupeReport:
        texts = {name: vault.get(name) for name in run.plan.worked_on}
        for (name, request), commitment in zip(texts.items(), run.plan.commitments, strict=True):
            if vault.commitment(request.text) != commitment:
                raise StoreDamaged(f"{name}: its text in the vault is not the one that was received.")
        requests = [texts[name] for name in run.plan.requests]
        with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
            entries = ledger.entries()
        states, gone = excluded(entries, run.plan.parent), erased_requests(entries).keys()
        # In a reinstatement everything that stays out is worked on, and nothing but that is compared.
        standing = [] if run.plan.reinstates else [n for n, state in states.items() if state.decision != "repeat"]
        done = [name for name in standing if name not in gone]
        ignored = boilerplate(run.workspace)
        keep = {f"retain/{n}": t for n, t in read_texts(run.workspace, "retain").items()}
        keep |= {f"kept/{n}": t for n, t in read_texts(run.workspace, "kept").items()}
        with DedupeIndex.open(run.folder / "index" if run.plan.reinstates else run.workspace.index) as index:
            if index.renewed is not None:
                tell("dedupe", 0, 0, f"the index of release {index.renewed} is built again from the vault")
            # The index is derived: what a killed run published but did not index is added here, and what the parent
            # does not exclude any more, after a rollback or a withdrawal, is removed.
            known = set(index.ids())
            for name in known.difference(done):
                index.remove(name)
            index.add_many((name, vault.get(name).text) for name in done if name not in known)
            decisions = dedupe(requests, index, run.settings.dedupe, ignored)
            waiting = {request.request_id: request.text for request in requests}
            excluded_texts = exclude_retain(keep, waiting, run.settings.dedupe, index=index, boilerplate=ignored)
            found = {exclusion.document for exclusion in excluded_texts}
            noted = noted_exclusions(VersionStore(run.workspace.versions).objects, entries, states.keys() & gone)
        return DedupeReport(
            decisions=decisions,
            retain_excluded=(*excluded_texts, *(e for e in noted if e.document in keep.keys() - found)),
        )

    return run.stage("dedupe", DedupeReport, (), compute)


def leave_out_stage(workspace_root: str, run_id: str) -> LeftOut:
    """Write what a reinstatement starts from: the parent without the vectors of the steps that are left out.

    Raises:
        StoreDamaged: It cannot be made, or comes out differently from the first time.
    """
    run = open_run(workspace_root, run_id)
    start = run.folder / "start"

    def compute() -> LeftOut:
        with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
            store = VersionStore(run.workspace.versions, published_versions(ledger.entries()))
        parent = model_folder(run, run.plan.parent)
        return leave_out(store, run.plan.parent, run.plan.left_out, parent, start)

    done = run.stage("leave-out", LeftOut, (), compute)
    # A resumed run finds the folder as a killed process, or anybody, left it; nothing else would notice.
    if (not start.is_dir() or model_root(start) != done.root) and compute() != done:
        raise StoreDamaged(f"{start}: comes out differently from the first time. {DAMAGED_RUN}")
    return done


def screen(workspace_root: str, run_id: str) -> ScreenReport:
    """Find the passages that the model reproduces where the step starts; only those are unlearned."""
    run = open_run(workspace_root, run_id)
    deduped = run.finished("dedupe", DedupeReport)

    def compute() -> ScreenReport:
        found = screen_some(workspace_root, run_id, run.plan.worked_on)
        level = reference(workspace_root, run_id).level
        return ScreenReport(level=level, memorised_above=_memorised_above(run), requests=tuple(found))

    return run.stage("screen", ScreenReport, (deduped,), compute)


def prepare_screen(workspace_root: str, run_id: str) -> None:
    """Make what the step starts from a model folder, before several processes want it at once.

    Raises:
        NotEnough: Memory cannot suffice for screening.
    """
    run = open_run(workspace_root, run_id)
    start_folder(run)
    if not has_finished(run.folder, "screening"):
        _require(run, "screening")


def _require(run: Run, stage: str, selected: int | None = None) -> None:
    """Refuse a long stage that memory or disk cannot suffice for, see `pipeline.preflight`."""
    loaded = shared_model.cache_info().currsize > 0
    require_stage(run.workspace, run.run_id, start_folder(run), run.settings, stage, selected, loaded)


def screen_some(workspace_root: str, run_id: str, requests: Sequence[str]) -> list[ScreenedRequest]:
    """Screen some requests of a run, each by itself and kept by itself: several processes may share the work, and a
    killed one leaves what it finished."""
    run = open_run(workspace_root, run_id)
    deduped, above, vault = run.finished("dedupe", DedupeReport), _memorised_above(run), open_vault(run.workspace)
    make_folder(run.folder / "screened")
    count = Counter("screen", len(requests))

    def compute(name: str) -> ScreenedRequest:
        model, tokenizer = start_model(run)
        passages = passages_of(encode(tokenizer, name, vault.get(name).text), run.settings.passages)
        scores = score_passages(model, passages, pad_id(tokenizer), run.settings.runtime.batch_tokens)
        hit = [p.span for p, s in zip(passages, scores, strict=True) if s.hits > above * s.tokens]
        return ScreenedRequest(
            request_id=name,
            passages=len(passages),
            memorised=tuple(hit),
            exact_memorisation=exact_memorisation(scores),
            longest_extraction=max((s.extraction for s in scores), default=0.0),
        )

    found = []
    with timed(run.workspace, run_id, "screening", requests=len(requests)):
        for name in requests:
            found.append(run.stage(f"screened/{name}", ScreenedRequest, (deduped,), partial(compute, name)))
            count.add()
    return found


def _memorised_above(run: Run) -> float:
    """A passage is memorised where the model predicts more than this share of it."""
    return memorised_above(reference(str(run.workspace.root), run.run_id).level, run.settings.screen)


def needs_training(workspace_root: str, run_id: str) -> bool:
    """Whether any passage is memorised."""
    return bool(forget_spans(open_run(workspace_root, run_id)))


def needs_version(workspace_root: str, run_id: str) -> bool:
    """Whether the weights change; if not, the requests are answered without a new version."""
    return needs_training(workspace_root, run_id) or bool(open_run(workspace_root, run_id).plan.left_out)


def saliency(workspace_root: str, run_id: str) -> MaskReport:
    """Select the weights that may change: all, or the salient ones, over the whole forget set where the step starts."""
    run = open_run(workspace_root, run_id)
    screened = run.finished("screen", ScreenReport)

    def compute() -> MaskReport:
        _require(run, "saliency")
        model, tokenizer = start_model(run)
        forget = flatten(passages_at(tokenizer, open_vault(run.workspace), trained_spans(run)))
        chosen = select_weights(model, forget, run.settings, pad_id(tokenizer))
        per_tensor = {name: int(m.sum()) for name, m in chosen.mask.items()}
        return MaskReport(
            mask=save_mask(run.folder / "mask.safetensors", chosen.mask),
            mean=chosen.mean,
            std=chosen.std,
            k=run.settings.unlearn.saliency_k,
            threshold=chosen.threshold,
            selected=sum(per_tensor.values()),
            total=sum(m.numel() for m in chosen.mask.values()),
            per_tensor=per_tensor,
        )

    return run.stage("saliency", MaskReport, (screened,), compute)


def _workbench(run: Run, stage: str, after: Record) -> Workbench:
    """The workbench of a run whose mask is known, for a long stage that follows a certain record.

    What is noted of how far the stage has come counts only while all is as it was that is looked up anew when a run
    goes on: holds, withdrawals, erasures, and what v0 says.
    """
    model, tokenizer = start_model(run)
    vault, settings = open_vault(run.workspace), run.settings
    spans, earlier, reinstated = forget_spans(run), earlier_spans(run), reinstated_spans(run)
    on_hold = held_texts(run)
    forget = passages_at(tokenizer, vault, spans)
    found, anchor = reference(str(run.workspace.root), run.run_id), NO_ANCHOR
    if found.anchor is not None:
        excluded = {e.document.removeprefix("retain/") for e in run.finished("dedupe", DedupeReport).retain_excluded}
        anchor = load_anchor(run.workspace.root / found.folder, found.anchor).without(excluded)
    back = flatten(passages_at(tokenizer, vault, reinstated))
    put_back = build_anchor(
        model, [Passage(p.span, p.ids, 1) for p in back], settings.unlearn.anchor_top_k, pad_id(tokenizer),
        settings.runtime.batch_tokens,
    )  # fmt: skip
    texts = StepTexts(
        forget=forget,
        trained=[p for name in trained_spans(run) for p in forget[name]],
        earlier=passages_at(tokenizer, vault, earlier),
        anchor=anchor,
        put_back=put_back,
        held_out=flatten(reference_passages(tokenizer, read_texts(run.workspace, "heldout"), "heldout", settings)),
        on_hold=on_hold,
    )
    looked_up = [
        [after.model_dump(mode="json"), found.model_dump(mode="json"), sorted(on_hold)],
        [
            {name: [span.model_dump() for span in of] for name, of in part.items()}
            for part in (spans, earlier, reinstated)
        ],
    ]
    halfway = Halfway(
        run.folder, stage, digest_json([run.run_id, stage, looked_up]), run.workspace.settings().runtime.note_s,
        partial(report, run.workspace, run.run_id, stage=stage),
    )  # fmt: skip
    return Workbench(
        model, load_mask(run.folder, run.finished("saliency", MaskReport).mask), texts, found.level, settings,
        pad_id(tokenizer), lambda iteration, of, loss: tell(stage, iteration, of, f"loss {loss:.3f}"), halfway,
    )  # fmt: skip


def _kept(run: Run, fitted: Fitted, target: float, name: str) -> Step:
    """Write a fitted vector into the run's folder."""
    ref = save_vector(run.folder / f"{name}.safetensors", fitted.vector)
    trace, found = fitted.trace, fitted.strength
    return Step(
        vector=VectorReport(
            vector=ref,
            norm=norm(fitted.vector),
            losses=tuple(trace.losses),
            tokens=trace.tokens,
            rounds=trace.rounds or None,
            again=tuple(sorted(trace.again)),
        ),
        calibration=Calibration(
            vector=ref,
            alpha=found.point.alpha,
            target=target,
            reached=found.reached,
            bounded_by_utility=found.bounded_by_utility,
            curve=found.curve,
        ),
    )


def unlearn(workspace_root: str, run_id: str) -> Step:
    """Fit the task vector by the method of the settings, and find the strength of its negation."""
    run = open_run(workspace_root, run_id)
    masked = run.finished("saliency", MaskReport)

    def compute() -> Step:
        _require(run, "unlearn", masked.selected)
        bench = _workbench(run, "unlearn", masked)
        return _kept(run, bench.fitted(), bench.target, "vector")

    done = run.stage("unlearn", Step, (masked,), compute)
    Halfway(run.folder, "unlearn").clear()
    return done


def repair_stage(workspace_root: str, run_id: str) -> Step:
    """Mend what negation broke, then find the smallest share of the whole displacement that still forgets.

    Without retain text there is nothing to mend towards, and the step stays as it was.
    """
    run = open_run(workspace_root, run_id)
    fitted = run.finished("unlearn", Step)

    def compute() -> Step:
        _require(run, "repair", run.finished("saliency", MaskReport).selected)
        bench = _workbench(run, "repair", fitted)
        if not bench.has_repair:
            return fitted
        tau = load_vector(run.folder, fitted.vector.vector)
        return _kept(run, bench.repaired(tau, fitted.calibration.alpha), bench.target, "repaired")

    done = run.stage("repair", Step, (fitted,), compute)
    Halfway(run.folder, "repair").clear()
    return done


def merge_stage(workspace_root: str, run_id: str) -> MergeReport:
    """Write the candidate: the files of the start with θ - α·τ inside the mask; the start itself without training."""
    run = open_run(workspace_root, run_id)
    start = start_folder(run)
    if not forget_spans(run):
        left = run.finished("leave-out", LeftOut)
        made = run.stage("merge", MergeReport, (left,), lambda: _merged(run, {}, {}, 0.0, {}))
        if made.root != left.root:
            raise StoreDamaged(f"{run.folder / 'candidate'}: is not the model without these steps. {DAMAGED_RUN}")
        return made
    step, masked = run.finished("repair", Step), run.finished("saliency", MaskReport)

    def compute() -> MergeReport:
        _require(run, "merge", masked.selected)
        model, _ = start_model(run)
        mask = load_mask(run.folder, masked.mask)
        stored = {t.name: t for path in start.glob("*.safetensors") for t in read_header(path).tensors}
        names = file_names(mask, stored, str(getattr(model, "base_model_prefix", "")))
        return _merged(run, mask, load_vector(run.folder, step.vector.vector), step.calibration.alpha, names)

    return run.stage("merge", MergeReport, (step, masked), compute)


def _merged(run: Run, mask: Mask, vector: Vector, alpha: float, names: Mapping[str, str]) -> MergeReport:
    """Merge, and count what differs from the parent; in a reinstatement that is more than what merging changed."""
    count = Counter("merge", len(mask))
    report = merge(start_folder(run), run.folder / "candidate", mask, vector, alpha, names, lambda name: count.add())
    if not run.plan.left_out:
        return report
    changed = differing_entries(model_folder(run, run.plan.parent), run.folder / "candidate")
    return report.model_copy(update={"changed": sum(changed.values()), "changed_tensors": tuple(sorted(changed))})


PIECE = 64
"""Texts that are measured together, and kept together when a process is killed."""


def evaluate(workspace_root: str, run_id: str) -> Evaluation:
    """Measure parent and candidate on this step, every earlier request, kept works and held-out text.

    A request that stays out is an earlier one, worked on again or not, but where a reinstatement works on it for the
    first time.
    """
    run = open_run(workspace_root, run_id)
    merged = run.finished("merge", MergeReport)

    def compute() -> Evaluation:
        settings, workspace = run.settings, run.workspace
        _require(run, "evaluate")
        parent, tokenizer = parent_model(run)
        vault, found = open_vault(workspace), reference(workspace_root, run_id)
        deduped = run.finished("dedupe", DedupeReport)
        verdicts = {d.request_id: d.verdict for d in deduped.decisions}
        fresh, earlier_texts = first_worked_on(run), earlier_spans(run)
        forget = passages_at(tokenizer, vault, {n: s for n, s in forget_spans(run).items() if n in fresh})
        rest = {
            name: passages_of(encode(tokenizer, name, vault.get(name).text), settings.passages)
            for name in run.plan.requests
            if name not in forget and name not in earlier_texts
        }
        excluded = {e.document for e in deduped.retain_excluded}
        kept = reference_passages(tokenizer, read_texts(workspace, "kept"), "kept", settings)
        kept = {name: passages for name, passages in kept.items() if name not in excluded}
        held = reference_passages(tokenizer, read_texts(workspace, "heldout"), "heldout", settings)
        roles = {name: {"folded": "folded", "repeat": "repeat"}.get(verdicts[name], "this") for name in forget}
        roles |= dict.fromkeys(rest, "not-memorised")
        earlier = passages_at(tokenizer, vault, earlier_texts)
        back = passages_at(tokenizer, vault, reinstated_spans(run))
        roles |= dict.fromkeys(earlier, "earlier") | dict.fromkeys(back, "reinstated") | dict.fromkeys(kept, "kept")
        recited = {**forget, **rest, **earlier, **back, **kept}
        count = Counter("evaluate", 2 * (len(flatten(recited)) + len(flatten(held))))
        inputs, passages = (merged, deduped, found), settings.evaluate.generate_passages

        def measure(model: nn.Module, piece: Mapping[str, Sequence[Passage]], generated: int) -> TextScores:
            tokens = settings.runtime.batch_tokens
            return TextScores(scores=score_texts(model, tokenizer, piece, generated, tokens))

        def scored(side: str, model: nn.Module) -> dict[str, TextScore]:
            """In pieces that are kept one by one: a killed process measures none of them again."""
            scores: dict[str, TextScore] = {}
            for kind, texts, generated in (("recited", recited, passages), ("held", held, 0)):
                for start in range(0, len(texts), PIECE):
                    piece = dict(list(texts.items())[start : start + PIECE])
                    of, name = (*inputs, Measured(names=tuple(piece))), f"scored/{side}-{kind}-{start}"
                    measured = run.stage(name, TextScores, of, partial(measure, model, piece, generated)).scores
                    # In the order of the texts: a record that is read again has its names in another.
                    scores |= {text: measured[text] for text in piece if text in measured}
                    count.add(len(flatten(piece)))
            return scores

        make_folder(run.folder / "scored")
        before = scored("parent", parent)
        shared_model.cache_clear()  # one model in memory at a time
        del parent
        after = scored("candidate", load_model(run.folder / "candidate", settings.runtime.device))
        roles |= dict.fromkeys(held, "held-out")
        comparisons = [
            Comparison(name=name, role=roles[name], before=before[name], after=after[name]) for name in before
        ]
        return Evaluation(level=found.level, comparisons=tuple(comparisons))

    return run.stage("evaluate", Evaluation, (merged,), compute)


def gate(workspace_root: str, run_id: str) -> Verdict:
    """Decide."""
    run = open_run(workspace_root, run_id)
    evaluation = run.finished("evaluate", Evaluation)
    original = {**reference(workspace_root, run_id).scores, **scores_before(run)}
    gone = erased_texts(run)
    idle = run.finished("merge", MergeReport).changed == 0 and not run.plan.left_out

    def compute() -> Verdict:
        return decide(evaluation, original, run.settings.gate, gone, idle)

    found = run.stage("gate", Verdict, (evaluation,), compute)
    report(run.workspace, run_id, "verdict", accepted=found.accepted, reasons=list(found.reasons))
    return found
