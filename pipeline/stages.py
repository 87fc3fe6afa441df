"""The stages of one step, in the order the data travels; each is one call with a workspace and a run id.

In: the records of the stages before, from the run's folder. Out: the stage's own record, written once. Tensors and
texts are loaded where they are needed and travel nowhere. `flows/takedown.py` calls these, and nothing else.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from torch import nn

from pipeline.anchor import Anchor, build_anchor, load_anchor, retain_passages, save_anchor
from pipeline.calibrate import find_strength
from pipeline.dedupe import DedupeIndex, dedupe, exclude_retain
from pipeline.errors import StoreDamaged
from pipeline.evaluate import never_seen_level, score_texts, spread
from pipeline.files import digest_json, read_json, write_json
from pipeline.gate import decide
from pipeline.ledger import Ledger, request_states
from pipeline.merge import merge
from pipeline.metrics import PassageScore, exact_memorisation, mean_nll, score_passages
from pipeline.models import (
    check_tokenizer,
    file_names,
    load_model,
    load_tokenizer,
    shared_model,
    software,
    target_weights,
)
from pipeline.passages import Passage, cut, encode, pad_id, passages_of
from pipeline.progress import Counter
from pipeline.records import (
    Calibration,
    Comparison,
    CurvePoint,
    DedupeReport,
    Evaluation,
    Event,
    MaskReport,
    MergeReport,
    PassageSpan,
    Publication,
    Reference,
    ScreenedRequest,
    ScreenReport,
    Step,
    TextScore,
    VectorReport,
    Verdict,
)
from pipeline.runs import Run, clean, open_run
from pipeline.safefile import read_header
from pipeline.saliency import WeightedPassages, accumulate_gradients, select
from pipeline.settings import Settings
from pipeline.sparse import SalientWeights, Vector, load_mask, load_vector, norm, save_mask, save_vector
from pipeline.unlearn import Fit, Trace, fit_full, mismatched, repair
from pipeline.vault import Vault
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

# --- shared by the stages ---------------------------------------------------------------------------------


def read_texts(workspace: Workspace, kind: str) -> dict[str, str]:
    """The reference texts of one kind, by file name."""
    return {p.name: p.read_text(encoding="utf-8") for p in sorted((workspace.reference / kind).glob("*.txt"))}


def model_folder(run: Run, version: int) -> Path:
    """A version as a model folder, restored from the store with every byte hashed again, once per run."""
    folder = run.folder / f"v{version}"
    if not (run.folder / f"v{version}.restored").exists():
        shutil.rmtree(folder, ignore_errors=True)
        VersionStore(run.workspace.versions).restore(version, folder, link=True)
        (run.folder / f"v{version}.restored").touch()
    return folder


def _parent(run: Run) -> tuple[nn.Module, object, Path]:
    folder = model_folder(run, run.plan.parent)
    return shared_model(folder, run.settings.runtime.device), load_tokenizer(folder), folder


def _scores(model: nn.Module, passages: Sequence[Passage], tokenizer: object, settings: Settings) -> list[PassageScore]:
    return score_passages(model, passages, pad_id(tokenizer), settings.runtime.batch_tokens)


def _passages_of_spans(
    tokenizer: object, vault: Vault, spans: Mapping[str, Sequence[PassageSpan]]
) -> dict[str, list[Passage]]:
    """Cut the texts in the vault at spans found earlier."""
    return {name: cut(encode(tokenizer, name, vault.get(name).text), found) for name, found in spans.items()}


def earlier_spans(run: Run) -> dict[str, list[PassageSpan]]:
    """The passages that earlier versions of this lineage were made to forget, by request."""
    store, spans = VersionStore(run.workspace.versions), {}
    for version in range(1, run.plan.parent + 1):
        for name, rows in dict(store.manifest(version).report.get("memorised", {})).items():  # type: ignore[call-overload]
            spans[name] = [PassageSpan(request_id=name, prompt_start=a, start=b, end=c) for a, b, c in rows]
    return {name: found for name, found in spans.items() if name not in run.plan.requests}


def _grouped(passages: Mapping[str, Sequence[Passage]]) -> Callable[[Sequence[PassageScore]], float]:
    """A function from scores, in the order of the flattened passages, to the largest EM of a request."""
    sizes = [len(p) for p in passages.values()]

    def largest(scores: Sequence[PassageScore]) -> float:
        found, start = 0.0, 0
        for size in sizes:
            found, start = max(found, exact_memorisation(scores[start : start + size])), start + size
        return found

    return largest


def _flat(passages: Mapping[str, Sequence[Passage]]) -> list[Passage]:
    return [p for found in passages.values() for p in found]


# --- the stages -------------------------------------------------------------------------------------------


def reference(workspace_root: str, run_id: str) -> Reference:
    """Measure v0 on the reference texts, once for the lineage."""
    run = open_run(workspace_root, run_id)
    workspace, settings = run.workspace, run.settings
    texts = {kind: read_texts(workspace, kind) for kind in ("retain", "kept", "heldout")}
    parts = (settings.passages, settings.screen, settings.evaluate, settings.unlearn.anchor_top_k,
             settings.unlearn.anchor_pool)  # fmt: skip
    key = digest_json([
        VersionStore(workspace.versions).manifest(0).root, texts,
        [p if isinstance(p, int) else p.model_dump() for p in parts],
    ]).removeprefix("sha256:")[:16]  # fmt: skip
    folder = workspace.reference / "measured" / key
    if (folder / "reference.json").is_file():
        return Reference.model_validate(read_json(folder / "reference.json"))
    folder.mkdir(parents=True, exist_ok=True)
    source = model_folder(run, 0)
    model, tokenizer = shared_model(source, settings.runtime.device), load_tokenizer(source)
    check_tokenizer(model, tokenizer)
    held = reference_passages(tokenizer, texts["heldout"], "heldout", settings)
    kept = reference_passages(tokenizer, texts["kept"], "kept", settings)
    anchors = retain_passages(tokenizer, texts["retain"], settings.passages, settings.unlearn.anchor_pool)
    retain = reference_passages(tokenizer, texts["retain"], "retain", settings) if not held else {}
    level = never_seen_level(
        _scores(model, _flat(held), tokenizer, settings), _scores(model, _flat(retain), tokenizer, settings),
        settings.screen,
    )  # fmt: skip
    tokens = settings.runtime.batch_tokens
    scores = score_texts(model, tokenizer, {**kept, **held}, 0, tokens)
    anchor = None
    if anchors:
        built = build_anchor(model, anchors, settings.unlearn.anchor_top_k, pad_id(tokenizer), tokens)
        anchor = save_anchor(folder / "anchor.safetensors", built)
    found = Reference(folder=str(folder.relative_to(workspace.root)), level=level, scores=scores, anchor=anchor)
    write_json(folder / "reference.json", found.model_dump(mode="json"))
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


def dedupe_stage(workspace_root: str, run_id: str) -> DedupeReport:
    """Compare the requests with each other, with everything taken down, and with what is to be kept."""
    run = open_run(workspace_root, run_id)
    vault = Vault(run.workspace.vault)

    def compute() -> DedupeReport:
        requests = [vault.get(name) for name in run.plan.requests]
        for request, commitment in zip(requests, run.plan.commitments, strict=True):
            if vault.commitment(request.text) != commitment:
                raise StoreDamaged(f"{request.request_id}: its text in the vault is not the one that was received.")
        with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
            states = request_states(ledger.entries())
        done = [name for name, state in states.items() if state.state in ("applied", "folded")]
        with DedupeIndex.open(run.workspace.index) as index:
            # The index is derived: what a killed run published but did not index is added here.
            for name in done:
                if name not in index.ids():
                    index.add(name, vault.get(name).text)
            decisions = dedupe(requests, index, run.settings.dedupe)
        keep = {f"{k}/{n}": t for k in ("retain", "kept") for n, t in read_texts(run.workspace, k).items()}
        takedowns = {name: vault.get(name).text for name in (*done, *run.plan.requests)}
        return DedupeReport(decisions=decisions, retain_excluded=exclude_retain(keep, takedowns, run.settings.dedupe))

    return run.stage("dedupe", DedupeReport, (), compute)


def screen(workspace_root: str, run_id: str) -> ScreenReport:
    """Find the passages that the parent really reproduces; only those are unlearned."""
    run = open_run(workspace_root, run_id)
    level = reference(workspace_root, run_id).level
    deduped = run.finished("dedupe", DedupeReport)

    def compute() -> ScreenReport:
        model, tokenizer, _ = _parent(run)
        vault = Vault(run.workspace.vault)
        above = level.mean + run.settings.screen.sigma * level.std
        texts = {
            name: passages_of(encode(tokenizer, name, vault.get(name).text), run.settings.passages)
            for name in run.plan.requests
        }
        count = Counter("screen", len(texts))
        found = []
        for name, passages in texts.items():
            scores = _scores(model, passages, tokenizer, run.settings)
            hit = [p.span for p, s in zip(passages, scores, strict=True) if s.hits > above * s.tokens]
            found.append(
                ScreenedRequest(
                    request_id=name,
                    passages=len(passages),
                    memorised=tuple(hit),
                    exact_memorisation=exact_memorisation(scores),
                    longest_extraction=max((s.extraction for s in scores), default=0.0),
                )
            )
            count.add()
        return ScreenReport(level=level, memorised_above=above, requests=tuple(found))

    return run.stage("screen", ScreenReport, (deduped,), compute)


def forget_spans(run: Run) -> dict[str, list[PassageSpan]]:
    """What this step unlearns and is held to: request → memorised passages, folded requests included."""
    screened = run.finished("screen", ScreenReport)
    return {r.request_id: list(r.memorised) for r in screened.requests if r.memorised}


def needs_step(workspace_root: str, run_id: str) -> bool:
    """Whether any passage is memorised; if not, the requests are answered without a new version."""
    return bool(forget_spans(open_run(workspace_root, run_id)))


def _trained(run: Run) -> dict[str, list[PassageSpan]]:
    """The spans to train on: a folded request is worked on through the one it was folded into, if that one is."""
    spans = forget_spans(run)
    decisions = run.finished("dedupe", DedupeReport).decisions
    into = {d.request_id: d.evidence[0].request_id for d in decisions if d.verdict == "folded"}
    return {name: found for name, found in spans.items() if into.get(name) not in spans}


def saliency(workspace_root: str, run_id: str) -> MaskReport:
    """Select the weights that may change: |∇ L_SSU| over the whole forget set at the parent, one pass."""
    run = open_run(workspace_root, run_id)
    screened = run.finished("screen", ScreenReport)

    def compute() -> MaskReport:
        model, tokenizer, _ = _parent(run)
        unlearn = run.settings.unlearn
        forget = _flat(_passages_of_spans(tokenizer, Vault(run.workspace.vault), _trained(run)))
        terms = [WeightedPassages(forget, 1.0)]
        if unlearn.random_label_weight:
            drawn = random.Random(f"{run.settings.runtime.seed} saliency")
            pairs = mismatched(forget, unlearn.random_labels_per_prompt, drawn)
            terms.append(WeightedPassages(pairs, unlearn.random_label_weight))
        count = Counter("saliency", sum(len(t.passages) for t in terms))
        weights = target_weights(model)
        gradients = accumulate_gradients(
            model, weights, terms, pad_id(tokenizer), run.settings.runtime.batch_tokens, count.add
        )
        chosen = select(gradients, unlearn.saliency_k)
        per_tensor = {name: int(m.sum()) for name, m in chosen.mask.items()}
        return MaskReport(
            mask=save_mask(run.folder / "mask.safetensors", chosen.mask),
            mean=chosen.mean,
            std=chosen.std,
            k=unlearn.saliency_k,
            threshold=chosen.threshold,
            selected=sum(per_tensor.values()),
            total=sum(m.numel() for m in chosen.mask.values()),
            per_tensor=per_tensor,
        )

    return run.stage("saliency", MaskReport, (screened,), compute)


class _Bench:
    """The parent with its salient coordinates and everything a fit or a calibration needs."""

    def __init__(self, run: Run, stage: str, iterations: int) -> None:
        self.run, self.settings = run, run.settings
        self.model, self.tokenizer, self.folder = _parent(run)
        self.mask = load_mask(run.folder, run.finished("saliency", MaskReport).mask)
        vault = Vault(run.workspace.vault)
        self.forget = _passages_of_spans(self.tokenizer, vault, forget_spans(run))
        self.earlier = _passages_of_spans(self.tokenizer, vault, earlier_spans(run))
        trained = [p for name in _trained(run) for p in self.forget[name]]
        found = reference(str(run.workspace.root), run.run_id)
        self.level = found.level
        self.anchor = Anchor([], [], [])
        if found.anchor is not None:
            excluded = {e.document.removeprefix("retain/")
                        for e in run.finished("dedupe", DedupeReport).retain_excluded}  # fmt: skip
            self.anchor = load_anchor(run.workspace.root / found.folder, found.anchor).without(excluded)
        self.salient = SalientWeights(target_weights(self.model), self.mask)
        count = Counter(stage, iterations)
        self.fit = Fit(
            self.model, self.salient, trained, self.anchor, self.settings.unlearn, pad_id(self.tokenizer),
            self.settings.runtime.batch_tokens, self.settings.runtime.seed,
            lambda iteration, loss: count.add(note=f"loss {loss:.3f}"),
        )  # fmt: skip
        self._utility: list[Passage] | None = None

    @property
    def target(self) -> float:
        return self.level.mean + self.settings.calibrate.margin

    def measure(self, alpha: float, vector: Vector, with_earlier: bool) -> CurvePoint:
        """One point of the curve of θ_p - α·vector."""
        self.salient.displace(vector, -alpha)
        utility = self.utility_passages()
        return CurvePoint(
            alpha=alpha,
            forget=self.worst(self.forget),
            earlier=self.worst(self.earlier) if with_earlier and self.earlier else None,
            utility_nll=mean_nll(_scores(self.model, utility, self.tokenizer, self.settings)) if utility else None,
        )

    def worst(self, passages: Mapping[str, Sequence[Passage]]) -> float:
        """Largest exact memorisation of a request, on the model as it stands."""
        return _grouped(passages)(_scores(self.model, _flat(passages), self.tokenizer, self.settings))

    def remaining(self) -> list[Passage]:
        """Passages of the requests, of this and of earlier steps, above the target on the model as it stands."""
        texts = {**self.forget, **self.earlier}
        scores = iter(_scores(self.model, _flat(texts), self.tokenizer, self.settings))
        taken = {name: [next(scores) for _ in passages] for name, passages in texts.items()}
        return [p for name, passages in texts.items() for p in passages
                if exact_memorisation(taken[name]) > self.target]  # fmt: skip

    def utility_passages(self) -> list[Passage]:
        """What the strength must spare: held-out and retain passages in equal parts.

        Held-out text alone would not notice that a text the model knows by heart, and is to keep, is lost.
        """
        if self._utility is None:
            held = reference_passages(
                self.tokenizer, read_texts(self.run.workspace, "heldout"), "heldout", self.settings
            )
            count = self.settings.unlearn.anchor_passages
            self._utility = spread(_flat(held), count) + spread(self.anchor.passages, count)
        return self._utility

    def calibrated(
        self, vector: Vector, trace: Trace, name: str, max_alpha: float, max_rise: float | None, final: bool
    ) -> Step:
        """Find the strength of a vector, and keep both; a final strength must hold for earlier requests, too."""
        limits = self.settings.calibrate
        ref = save_vector(self.run.folder / f"{name}.safetensors", vector)
        with self.salient:
            found = find_strength(
                lambda alpha: self.measure(alpha, vector, final), self.target, max_alpha, limits.bisections,
                max_rise, fixed=limits.fixed_alpha,
            )  # fmt: skip
        return Step(
            vector=VectorReport(vector=ref, norm=norm(vector), losses=tuple(trace.losses), tokens=trace.tokens),
            calibration=Calibration(
                vector=ref,
                alpha=found.point.alpha,
                target=self.target,
                reached=found.reached,
                bounded_by_utility=found.bounded_by_utility,
                curve=found.curve,
            ),
        )


def unlearn(workspace_root: str, run_id: str) -> Step:
    """Fit the task vector and find the strength of its negation."""
    run = open_run(workspace_root, run_id)
    masked = run.finished("saliency", MaskReport)

    def compute() -> Step:
        bench = _Bench(run, "unlearn", run.settings.unlearn.iterations)
        if run.settings.unlearn.parameterisation == "lora":
            from pipeline.lora import fit_lora

            vector, trace = fit_lora(bench.fit, bench.mask)
        else:
            vector, trace = fit_full(bench.fit)
        repairs, limits = _repairs(bench), run.settings
        # Without a repair to follow, negation alone must reach the target; past the gate's limit it would be refused.
        max_rise = limits.calibrate.max_utility_rise if repairs else math.log1p(limits.gate.perplexity_rise)
        return bench.calibrated(vector, trace, "vector", limits.calibrate.max_alpha, max_rise, final=not repairs)

    return run.stage("unlearn", Step, (masked,), compute)


def _repairs(bench: _Bench) -> bool:
    unlearn = bench.settings.unlearn
    return bool(unlearn.repair_iterations and unlearn.anchor_weight and bench.anchor.passages)


def repair_stage(workspace_root: str, run_id: str) -> Step:
    """Mend what negation broke, then find the smallest share of the whole displacement that still forgets.

    Without retain text there is nothing to mend towards, and the step stays as it was.
    """
    run = open_run(workspace_root, run_id)
    fitted = run.finished("unlearn", Step)

    def compute() -> Step:
        bench = _Bench(run, "repair", run.settings.unlearn.repair_iterations)
        if not _repairs(bench):
            return fitted
        tau = load_vector(run.folder, fitted.vector.vector)
        start = {name: -fitted.calibration.alpha * value for name, value in tau.items()}

        displacement, trace = repair(bench.fit, start, bench.remaining)
        # Kept as a task vector, to be negated like any other: θ_p - α·(-d).
        return bench.calibrated({n: -v for n, v in displacement.items()}, trace, "repaired", 1.0, None, final=True)

    return run.stage("repair", Step, (fitted,), compute)


def merge_stage(workspace_root: str, run_id: str) -> MergeReport:
    """Write the candidate: the parent's files with θ_p - α·τ inside the mask."""
    run = open_run(workspace_root, run_id)
    step, masked = run.finished("repair", Step), run.finished("saliency", MaskReport)

    def compute() -> MergeReport:
        model, _, parent = _parent(run)
        mask = load_mask(run.folder, masked.mask)
        stored = {t.name: t for path in parent.glob("*.safetensors") for t in read_header(path).tensors}
        count = Counter("merge", len(mask))
        return merge(
            parent, run.folder / "candidate", mask, load_vector(run.folder, step.vector.vector),
            step.calibration.alpha, file_names(mask, stored, str(getattr(model, "base_model_prefix", ""))),
            lambda name: count.add(),
        )  # fmt: skip

    return run.stage("merge", MergeReport, (step, masked), compute)


def evaluate(workspace_root: str, run_id: str) -> Evaluation:
    """Measure parent and candidate on this step, every earlier request, kept works and held-out text."""
    run = open_run(workspace_root, run_id)
    merged = run.finished("merge", MergeReport)

    def compute() -> Evaluation:
        settings, workspace = run.settings, run.workspace
        parent, tokenizer, _ = _parent(run)
        vault, found = Vault(workspace.vault), reference(workspace_root, run_id)
        deduped = run.finished("dedupe", DedupeReport)
        verdicts = {d.request_id: d.verdict for d in deduped.decisions}
        forget = _passages_of_spans(tokenizer, vault, forget_spans(run))
        rest = {
            name: passages_of(encode(tokenizer, name, vault.get(name).text), settings.passages)
            for name in run.plan.requests
            if name not in forget
        }
        excluded = {e.document for e in deduped.retain_excluded}
        kept = reference_passages(tokenizer, read_texts(workspace, "kept"), "kept", settings)
        kept = {name: passages for name, passages in kept.items() if name not in excluded}
        held = reference_passages(tokenizer, read_texts(workspace, "heldout"), "heldout", settings)
        roles = {name: {"folded": "folded", "repeat": "repeat"}.get(verdicts[name], "this") for name in forget}
        roles |= dict.fromkeys(rest, "not-memorised")
        earlier = _passages_of_spans(tokenizer, vault, earlier_spans(run))
        roles |= dict.fromkeys(earlier, "earlier") | dict.fromkeys(kept, "kept")
        recited = {**forget, **rest, **earlier, **kept}
        count = Counter("evaluate", 2 * (len(_flat(recited)) + len(_flat(held))))
        tokens, passages = settings.runtime.batch_tokens, settings.evaluate.generate_passages

        def scored(model: nn.Module) -> dict[str, TextScore]:
            return {
                **score_texts(model, tokenizer, recited, passages, tokens, count.add),
                **score_texts(model, tokenizer, held, 0, tokens, count.add),
            }

        before = scored(parent)
        shared_model.cache_clear()  # one model in memory at a time
        del parent
        after = scored(load_model(run.folder / "candidate", settings.runtime.device))
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
    original = reference(workspace_root, run_id).scores
    return run.stage("gate", Verdict, (evaluation,), lambda: decide(evaluation, original, run.settings.gate))


def publish(workspace_root: str, run_id: str, actor: str) -> Publication:
    """Publish what the gate accepted and write the answer of every request, in one ledger transaction."""
    run = open_run(workspace_root, run_id)
    workspace = run.workspace
    deduped, screened = run.finished("dedupe", DedupeReport), run.finished("screen", ScreenReport)
    spans = forget_spans(run)
    verdict = run.finished("gate", Verdict) if spans else None
    version, data = None, dict[str, object]()
    if verdict is not None and verdict.accepted:
        version = _next_version(run)
        data = _publish_version(run, version, spans)
    events = list(_decisions(run, actor, deduped, screened, verdict, version))
    if version is not None:
        events.append(Event(kind="published", actor=actor, version=version, run_id=run_id, data=data))
    with Ledger.open(workspace.ledger) as ledger:
        if not any(e.event.run_id == run_id for e in ledger.entries()):  # a resumed run answers once
            ledger.append(*events)
    if version is not None:
        # What an interrupted publish of other weights left behind is named by nothing.
        VersionStore(workspace.versions).collect()
        vault = Vault(workspace.vault)
        with DedupeIndex.open(workspace.index) as index:
            for name in spans:
                index.add(name, vault.get(name).text)
    clean(run.folder)
    return Publication(
        outcome="nothing" if verdict is None else "published" if verdict.accepted else "refused", version=version
    )


def _next_version(run: Run) -> int:
    """One more than the highest version that the ledger names; a manifest it does not name was never published."""
    with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
        return 1 + max(e.event.version or 0 for e in ledger.entries() if e.event.kind in ("initialised", "published"))


def _publish_version(run: Run, version: int, spans: Mapping[str, Sequence[PassageSpan]]) -> dict[str, object]:
    """Put the candidate into the store; returns what the ledger says of it."""
    store = VersionStore(run.workspace.versions)
    step, masked = run.finished("repair", Step), run.finished("saliency", MaskReport)
    merged, evaluation = run.finished("merge", MergeReport), run.finished("evaluate", Evaluation)
    manifest = store.publish(
        run.folder / "candidate",
        version=version,
        parent=store.manifest(run.plan.parent),
        created_at=datetime.now(UTC),
        run_id=run.run_id,
        requests=tuple(spans),
        settings=run.settings.model_dump(mode="json"),
        report={
            "alpha": step.calibration.alpha,
            "selected": merged.selected,
            "changed": merged.changed,
            "total": masked.total,
            "threshold": masked.threshold,
            "level": evaluation.level.model_dump(mode="json"),
            "memorised": {n: [[s.prompt_start, s.start, s.end] for s in found] for n, found in spans.items()},
            "evaluation": digest_json(evaluation.model_dump(mode="json")),
        },
        software=software(),
        replace_orphan=True,
    )
    if manifest.root != merged.root:
        raise StoreDamaged(f"v{version}: the store holds {manifest.root}, the evaluated candidate is {merged.root}.")
    return {"root": manifest.root, "manifest": store.manifest_digest(version)}


def _decisions(
    run: Run, actor: str, deduped: DedupeReport, screened: ScreenReport, verdict: Verdict | None, version: int | None
) -> Iterable[Event]:
    """The answer to each request; refused ones keep waiting."""
    screens = {r.request_id: r for r in screened.requests}
    for decision in deduped.decisions:
        found = screens[decision.request_id]
        data: dict[str, object] = {
            "exact_memorisation": found.exact_memorisation,
            "passages": found.passages,
            "memorised": len(found.memorised),
            "covered": decision.covered,
            "evidence": [e.model_dump() for e in decision.evidence[:8]],
        }
        kind: str = decision.verdict
        if found.memorised and version is None:
            kind = "refused"
            data["reasons"] = list(verdict.reasons) if verdict else []
        elif found.memorised:
            kind = "folded" if kind == "folded" else "applied"
        elif kind == "fresh":
            kind = "not-memorised"
        yield Event(
            kind=kind, actor=actor, request_id=decision.request_id, run_id=run.run_id,
            version=version if found.memorised and version is not None else run.plan.parent, data=data,
        )  # fmt: skip
