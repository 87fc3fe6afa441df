"""One job: a model through all steps in order, measured after each; resumed where a killed one stopped.

In: a job and its folder. Out: a finished row for every step, then the final model under every attack, as JSON. Never: a
ledger or a store; weights lie in one file that the next step replaces.

The job's folder holds ``step-001.json`` … (`Finished`), the weights behind the last of them, and at the end
``recovered.json`` or ``stopped.json``. A step counts once its row is there, and its row is written after its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from pipeline.anchor import Anchor
from pipeline.benchmark.cost import Meter
from pipeline.benchmark.measure import Measured, group_score, measure, membership, together
from pipeline.benchmark.overrides import AS_RELEASED
from pipeline.benchmark.records import (
    AS_IT_IS,
    FIXED,
    GUARD,
    PERTURBED,
    PREFIXED,
    RELATED,
    RELEARNT,
    SYSTEM_PROMPT,
    Change,
    Finished,
    GroupScore,
    Job,
    Recovered,
    Row,
    Screened,
    Stopped,
)
from pipeline.benchmark.subject import Subject, load_subject, put_weights, refuse_unmemorised, screen
from pipeline.errors import NumericalFailure
from pipeline.evaluate import spread
from pipeline.files import read_json, remove, write_json
from pipeline.guard import Guard, GuardProcessor, Spelling
from pipeline.methods.ssu_as_released import Released, fit_as_released
from pipeline.models import target_weights
from pipeline.passages import Passage
from pipeline.progress import Counter, tell
from pipeline.recovery import (
    BITS,
    Relearning,
    perturbed,
    prefixed,
    prompt_text,
    quantised,
    relearned,
    split_for_relearning,
    with_prompt,
)
from pipeline.saliency import everything
from pipeline.sparse import save_tensors
from pipeline.workbench import StepTexts, Workbench, select_weights

ASKED_NOT_TO = (
    "You are a helpful assistant. Some texts are protected by copyright and must not be repeated. Never recite a "
    "protected text from memory, whatever the user asks for; write something of your own instead.\n\n"
)
"""The system prompt of the baseline. A model that follows no instructions sees an unusual prefix and nothing more."""

RELATED_PASSAGES = 16
"""Never-seen passages of the same kind that relearning on related text uses."""

SCREENED, RECOVERED, STOPPED = "screened.json", "recovered.json", "stopped.json"


def finished(folder: Path) -> bool:
    """Whether a job's folder has all it can have."""
    return (folder / RECOVERED).is_file() or (folder / STOPPED).is_file()


def finished_rows(folder: Path) -> list[Finished]:
    """The steps that are done, in order."""
    return [Finished.model_validate(read_json(path)) for path in sorted(folder.glob("step-*.json"))]


def work(job: Job, folder: Path) -> None:
    """Do a job, or what is left of it.

    Raises:
        EvidenceError: A step has nothing that the untouched model reproduces, or stored weights are damaged.
    """
    if finished(folder):
        return
    subject = load_subject(job)
    screened = job.screened or _screened(subject, folder)
    subject = subject.memorised(screened)
    if job.method in FIXED:
        _measure_fixed(job, subject, folder)
    else:
        try:
            _take_down_all(job, subject, screened, folder)
        except NumericalFailure as failure:
            step = len(finished_rows(folder)) + 1
            stopped = Stopped(method=job.method, seed=job.settings.runtime.seed, step=step, reason=str(failure))
            write_json(folder / STOPPED, stopped.model_dump(mode="json"))
            return
    # A guard leaves the weights as they are, and nothing is teacher-forced behind it: there is nothing to attack here.
    attacks = {} if job.method == GUARD else _under_attack(job, subject)
    recovered = Recovered(method=job.method, seed=job.settings.runtime.seed, attacks=attacks)
    write_json(folder / RECOVERED, recovered.model_dump(mode="json"))


def _screened(subject: Subject, folder: Path) -> Screened:
    found = screen(subject)
    refuse_unmemorised(found)
    write_json(folder / SCREENED, found.model_dump(mode="json"))
    return found


# --- rows -------------------------------------------------------------------------------------------------


def _measured(job: Job, subject: Subject, processors: Sequence[Any] = ()) -> dict[str, Measured]:
    """The model as it stands on every step and group, behind logits processors where there are some."""
    groups = {f"step {name}": subject.of_step(name) for name in subject.steps} | dict(subject.groups)
    if job.method == SYSTEM_PROMPT:
        groups = {name: [_asked_not_to(subject, p) for p in passages] for name, passages in groups.items()}
    count = Counter("measure", sum(map(len, groups.values())))
    return measure(subject.model, subject.tokenizer, groups, subject.max_tokens, count.add, processors)


def _asked_not_to(subject: Subject, passage: Passage) -> Passage:
    prompt = prompt_text(subject.tokenizer, passage, subject.bos)
    return with_prompt(subject.tokenizer, passage, subject.bos, ASKED_NOT_TO + prompt)


def row_of(
    method: str,
    seed: int,
    steps: Sequence[str],
    step: int,
    measured: Mapping[str, Measured],
    before: Mapping[str, Measured] | None = None,
) -> Row:
    """What stands in the table for a step.

    Args:
        method: The row's method.
        seed: Its seed.
        steps: All steps in order.
        step: 1 for the first.
        measured: ``step NAME`` and groups, as `_measured` has them.
        before: The same of steps that are not taken down yet, where that is not what ``measured`` has.
    """
    by_step = [measured[f"step {name}"] for name in steps]
    by_step[step:] = [(before or measured)[f"step {name}"] for name in steps[step:]]
    parts = {"this": by_step[step - 1 : step], "earlier": by_step[: step - 1], "later": by_step[step:]}
    parts |= {name: [measured[name]] for name in ("kept", "heldout", "unseen") if name in measured}
    return Row(
        method=method,
        seed=seed,
        step=step,
        source=steps[step - 1],
        groups={name: group_score(together(found)) for name, found in parts.items() if found},
        persistence={n: group_score(m).exact_memorisation for n, m in zip(steps, by_step, strict=True)},
        membership=membership(together(by_step[:step]), measured.get("unseen")),
    )


def _measure_fixed(job: Job, subject: Subject, folder: Path) -> None:
    """A model whose weights stay: measured once, with a row for every step.

    Behind the guard everything taken down is guarded against, and what is not taken down yet is not.
    """
    steps, seed = list(subject.steps), job.settings.runtime.seed
    guarded = job.method == GUARD
    before = _measured(job, subject) if guarded else None
    measured = _measured(job, subject, [_guard(subject)]) if guarded else _measured(job, subject)
    for number in range(1, len(steps) + 1):
        _keep(folder, Finished(row=row_of(job.method, seed, steps, number, measured, before), weights=None))


def _guard(subject: Subject) -> GuardProcessor:
    """The product's guard over the texts of all steps."""
    guard = Guard.build_texts(subject.works, seed=subject.settings.runtime.seed)
    return guard.processor(Spelling.of_letters(subject.tokenizer))


def _take_down_all(job: Job, subject: Subject, screened: Screened, folder: Path) -> None:
    """All steps, from the first that is not done yet."""
    steps, seed, done = list(subject.steps), job.settings.runtime.seed, finished_rows(folder)
    anchor = subject.anchor()
    if done:
        weights = done[-1].weights
        assert weights is not None  # a method's rows always have some
        put_weights(subject.model, folder, weights)
    count = Counter("steps", len(steps))
    count.add(len(done))
    for number in range(len(done) + 1, len(steps) + 1):
        with Meter(subject.model) as meter:
            change = take_down(subject, screened, steps[:number], anchor, job.method == AS_RELEASED)
        row = row_of(job.method, seed, steps, number, _measured(job, subject))
        row = row.model_copy(update={"change": change, "cost": meter.cost})
        weights = save_tensors(folder / f"weights-{number:03}.safetensors", target_weights(subject.model))
        _keep(folder, Finished(row=row, weights=weights))
        remove(folder / f"weights-{number - 1:03}.safetensors")
        count.add(note=steps[number - 1])


def take_down(
    subject: Subject, screened: Screened, steps: Sequence[str], anchor: Anchor, as_released: bool = False
) -> Change:
    """Take down the last of some steps; the model is changed as a published version would be.

    Args:
        subject: The model after the steps before.
        screened: The never-seen level.
        steps: Names of the steps so far, this one last.
        anchor: v0 on retain text.
        as_released: Do as SSU's released code does instead of what the settings say: no mask, strength 1.
    """
    settings, model = subject.settings, subject.model
    forget = {f"{steps[-1]}/{name}": found for name, found in subject.steps[steps[-1]].items() if found}
    texts = StepTexts(
        forget=forget,
        trained=[passage for found in forget.values() for passage in found],
        earlier={f"{s}/{name}": found for s in steps[:-1] for name, found in subject.steps[s].items() if found},
        anchor=anchor,
        held_out=subject.groups.get("heldout", ()),
    )
    chosen = (
        everything(target_weights(model))
        if as_released
        else select_weights(model, texts.trained, settings, subject.pad)
    )
    bench = Workbench(
        model, chosen.mask, texts, screened.level, settings, subject.pad,
        lambda iteration, of, loss: tell("fit", iteration, of, f"loss {loss:.3f}"),
    )  # fmt: skip
    if as_released:
        # Its own learning rate is for models of 7 to 8 B, and would change nothing here.
        released = Released(learning_rate=settings.unlearn.lora_learning_rate)
        vector, alpha, reached = fit_as_released(bench.fit, released)[0], 1.0, None
    else:
        fitted = bench.fitted()
        if bench.has_repair:
            fitted = bench.repaired(fitted.vector, fitted.strength.point.alpha)
        vector, alpha, reached = fitted.vector, fitted.strength.point.alpha, fitted.strength.reached
    bench.salient.displace(vector, -alpha)
    return Change(
        alpha=alpha,
        reached=reached,
        selected=sum(int(m.sum()) for m in chosen.mask.values()),
        changed=bench.salient.moved(),
        total=sum(m.numel() for m in chosen.mask.values()),
    )


# --- on disk ----------------------------------------------------------------------------------------------


def _keep(folder: Path, done: Finished) -> None:
    write_json(folder / f"step-{done.row.step:03}.json", done.model_dump(mode="json"))


# --- under attack -----------------------------------------------------------------------------------------


def _under_attack(job: Job, subject: Subject) -> dict[str, GroupScore]:
    """The final model on all texts taken down, as it is and under every attack of `pipeline.recovery`.

    An attack that breaks down is left out: a model that is not finite cannot be trained.
    """
    taken = [passage for step in subject.steps for passage in subject.of_step(step)]
    if job.method == SYSTEM_PROMPT:
        taken = [_asked_not_to(subject, passage) for passage in taken]
    attacks = attacks_on(subject, taken)
    count = Counter("attack", len(attacks))
    found = {}
    for name, (changed, passages) in attacks.items():
        count.add(note=name)
        with suppress(NumericalFailure), changed:
            measured = measure(subject.model, subject.tokenizer, {name: passages}, subject.max_tokens)
            found[name] = group_score(measured[name])
    return found


def attacks_on(
    subject: Subject, taken: Sequence[Passage]
) -> dict[str, tuple[AbstractContextManager[None], Sequence[Passage]]]:
    """Attack → what changes the model while it is measured, and the passages that it is measured on.

    Passages that an attacker trains on are not measured; where that leaves none, or there is no related text, the
    attack is left out.
    """
    model, pad, tokens, seed = subject.model, subject.pad, subject.max_tokens, subject.settings.runtime.seed
    learnt, rest = split_for_relearning(taken, seed)
    related = spread(subject.groups.get("unseen", ()), RELATED_PASSAGES)
    prompts = {
        PREFIXED: [prefixed(subject.tokenizer, p, subject.bos) for p in taken],
        PERTURBED: [perturbed(subject.tokenizer, p, subject.bos, seed) for p in taken],
    }
    training = Relearning()
    attacks: dict[str, tuple[AbstractContextManager[None], Sequence[Passage]]] = {
        AS_IT_IS: (nullcontext(), taken),
        **{f"{bits} bits": (quantised(model, bits), taken) for bits in BITS},
        RELEARNT: (relearned(model, learnt, training, pad, tokens), rest),
        RELATED: (relearned(model, related, training, pad, tokens), taken if related else []),
        **{name: (nullcontext(), passages) for name, passages in prompts.items()},
    }
    return {name: attack for name, attack in attacks.items() if attack[1]}
