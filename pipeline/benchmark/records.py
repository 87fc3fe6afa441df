"""What the benchmark measures and writes: plain records, one JSON value each; never a text or a tensor.

Every number that differs between two runs of the same seed lies under ``cost``.
"""

from __future__ import annotations

from pydantic import Field

from pipeline.records import FileRef, NeverSeenLevel, Record
from pipeline.settings import Settings

VANILLA, RETRAINED, SYSTEM_PROMPT, GUARD = "vanilla", "retrained", "system-prompt", "guard"
"""Rows beside the methods: the model as it is, one that never saw the texts, and two that leave the weights alone."""

FIXED: dict[str, str] = {
    VANILLA: "Vanilla",
    RETRAINED: "Retrained without",
    SYSTEM_PROMPT: "System prompt",
    GUARD: "n-gram guard",
}
"""Their titles, in the order of a table."""


AS_IT_IS, RELEARNT, RELATED = "as it is", "relearned on 5 % of the text", "relearned on related text"
PREFIXED, PERTURBED = "prefixed prompts", "perturbed prompts"
UNDER_ATTACK = (AS_IT_IS, "8 bits", "4 bits", RELEARNT, RELATED, PREFIXED, PERTURBED)
"""Attacks on a final model, the first of them none, in the order of a table."""


class Inputs(Record):
    """Where the benchmark's texts are.

    Attributes:
        texts: Folder with a sub-folder or file for each step in order, or a ``.jsonl`` of passages.
        retain: Folder of texts that a method may hold the model to.
        kept: Folder of texts to keep, only ever measured.
        heldout: Folder of general text that the model never saw.
        unseen: Folder of text of the same kind as what is taken down, never seen.
        passage_tokens: Where the passages of a ``.jsonl`` are cut off, as they were in training; None for nowhere. What
            lies behind that was never memorised.
    """

    texts: str
    retain: str | None = None
    kept: str | None = None
    heldout: str | None = None
    unseen: str | None = None
    passage_tokens: int | None = Field(None, ge=2)


class ScreenedText(Record):
    """What the untouched model reproduces of one request.

    Attributes:
        passages: How many it has.
        memorised: Which of them the model reproduces, by number; only these are taken down and measured.
        exact_memorisation: Over all of them.
    """

    passages: int
    memorised: tuple[int, ...]
    exact_memorisation: float


class Screened(Record):
    """The untouched model on the texts of all steps.

    Attributes:
        level: Exact memorisation of never-seen text: what methods forget to.
        memorised_above: A passage counts as memorised above this.
        requests: Step → request → what was found.
    """

    level: NeverSeenLevel
    memorised_above: float
    requests: dict[str, dict[str, ScreenedText]]


class Job(Record):
    """One row of the table for one seed, done in a process of its own.

    Attributes:
        method: A method, or one of `FIXED`.
        model: Folder of the model it is measured on.
        model_root: Its tensor root.
        inputs: The texts.
        inputs_digest: Digest of what the texts say.
        settings: Resolved for this method and seed.
        screened: What is taken down; None for the job that finds out.
        software: Versions of what computes.
        threads: Of the arithmetic, which decide the last bit.
    """

    method: str
    model: str
    model_root: str
    inputs: Inputs
    inputs_digest: str
    settings: Settings
    screened: Screened | None
    software: dict[str, str]
    threads: int


class GroupScore(Record):
    """How a model reproduces a group of passages; None where it was not, or cannot be, measured.

    Attributes:
        passages: How many.
        exact_memorisation: Share of continuation tokens whose teacher-forced argmax is right.
        extraction_strength: Mean over passages.
        nll: Mean token negative log-likelihood, in nats.
        extractable: Share of passages that sampling gives away, see `pipeline.metrics.extractable`.
        rouge_1: F1 of greedy continuations, mean over those generated.
        rouge_l: Likewise.
        longest_run: Longest common run of words, mean over the continuations.
        longest_run_max: The longest of all.
        accumulated_runs: Words in common runs of three or more, mean.
        repetition: Share of repeated 4-grams of words in the continuations, mean.
    """

    passages: int
    exact_memorisation: float | None = None
    extraction_strength: float | None = None
    nll: float | None = None
    extractable: float | None = None
    rouge_1: float | None = None
    rouge_l: float | None = None
    longest_run: float | None = None
    longest_run_max: int | None = None
    accumulated_runs: float | None = None
    repetition: float | None = None


class Change(Record):
    """What a step did to the weights.

    Attributes:
        alpha: Strength of the last vector.
        reached: Whether calibration met the target; None where nothing was calibrated.
        selected: Entries that the mask let change.
        changed: Entries that differ from before.
        total: Entries that the mask could choose from.
    """

    alpha: float
    reached: bool | None
    selected: int
    changed: int
    total: int


class Cost(Record):
    """What a step cost, without its measurement.

    Attributes:
        seconds: Wall time.
        tokens: Tokens that went through the model, padding included.
        peak_bytes: Most memory of the process; of the GPU where the model is there.
        rise_bytes: How far that lies above what was held when the step began.
    """

    seconds: float
    tokens: int
    peak_bytes: int
    rise_bytes: int


class Row(Record):
    """A method, for one seed, after one step.

    Attributes:
        method: See `Job`.
        seed: Its seed.
        step: 1 for the first.
        source: Name of the step.
        groups: ``this`` step's texts, ``earlier`` and ``later`` ones, ``kept``, ``heldout``, ``unseen``; without those
            that are empty.
        persistence: Step → exact memorisation of its texts now.
        membership: Attack → AUC of all texts taken down so far against never-seen ones; empty without these.
        change: None where the weights were not changed.
        cost: Likewise.
    """

    method: str
    seed: int
    step: int
    source: str
    groups: dict[str, GroupScore]
    persistence: dict[str, float | None]
    membership: dict[str, float]
    change: Change | None = None
    cost: Cost | None = None


class Finished(Record):
    """A step that is done: its row, and where the weights after it are; None where they were not changed."""

    row: Row
    weights: FileRef | None


class Recovered(Record):
    """The final model of a method and seed once more, on all texts taken down, under every attack.

    Attributes:
        method: See `Job`.
        seed: Its seed.
        attacks: Attack → scores; ``as it is`` first.
    """

    method: str
    seed: int
    attacks: dict[str, GroupScore]


class Stopped(Record):
    """A run that went no further: what the method did to the numbers at which step."""

    method: str
    seed: int
    step: int
    reason: str


class Results(Record):
    """Everything one call of the benchmark found.

    Attributes:
        format: Of this record.
        model: Name of the model's folder.
        model_root: Its tensor root.
        reference: Tensor root of the model trained without the texts; None where none was.
        inputs_digest: Digest of the texts.
        software: Versions of what computed.
        threads: Of the arithmetic.
        methods: In the order of the table.
        seeds: In order.
        steps: In order.
        settings: Method → its settings, for the first seed.
        screened: See `Screened`.
        rows: By method, seed and step.
        recovered: By method and seed.
        stopped: Runs that broke down.
        tasks: Method → task → score of lm-evaluation-harness, where asked for.
    """

    format: int = 1
    model: str
    model_root: str
    reference: str | None
    inputs_digest: str
    software: dict[str, str]
    threads: int
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: tuple[str, ...]
    settings: dict[str, Settings]
    screened: Screened
    rows: tuple[Row, ...]
    recovered: tuple[Recovered, ...]
    stopped: tuple[Stopped, ...]
    tasks: dict[str, dict[str, float]]
