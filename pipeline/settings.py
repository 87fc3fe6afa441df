"""All settings in one typed tree: defaults here, an optional ``takedown.toml`` over them.

The resolved tree travels with each version. Units stand in the names; the reason for a value under the field.
"""

from __future__ import annotations

import tomllib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from pipeline.errors import InvalidInput, Problem
from pipeline.method_defaults import DEFAULT_METHOD, METHOD_DEFAULTS, NEGATED, MethodName
from pipeline.periods import Period, read_period
from pipeline.records import Basis
from pipeline.states import State


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error, never ignored, and no error quotes a value."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class IntakeSettings(Section):
    """Limits on what a batch may hold."""

    max_text_chars: int = Field(5_000_000, gt=0)
    """Longest text of one request; a long novel has about 3 million characters."""
    max_requests: int = Field(10_000, gt=0)
    """Most requests of one batch."""
    settle_s: float = Field(2.0, ge=0, exclude=True)
    """A file in the drop folder touched within the last so many seconds is watched for as long before it is taken in.
    Decides no outcome, so it is not part of a run's identity."""


class DedupeSettings(Section):
    """Thresholds of deduplication; measured, see the README."""

    fold_containment: float = Field(0.9, gt=0, le=1)
    """Inside a batch, a text is folded into another that holds at least this share of its shingles."""
    repeat_covered: float = Field(0.95, gt=0, le=1)
    """A text is a repeat when the union of earlier takedowns covers at least this share of it."""
    retain_jaccard: float = Field(0.2, gt=0, le=1)
    """A retain document with this Jaccard similarity to a takedown is left out of the anchor …"""
    retain_containment: float = Field(0.4, gt=0, le=1)
    """… as is one with this containment in either direction. Losing a little retain text is cheap."""
    boilerplate_works: int = Field(3, ge=1)
    """A passage that is in more than this many unrelated works already taken down is boilerplate, such as a licence or
    a much quoted verse, and evidence for nothing; as is what ``reference/boilerplate/*.txt`` holds."""


class PassageSettings(Section):
    """How a text is cut into passages; continuations tile the text."""

    prompt_tokens: int = Field(64, gt=0)
    """Longest prompt in front of a continuation."""
    continuation_tokens: int = Field(64, gt=1)
    """Length of a continuation."""
    first_prompt_tokens: int = Field(16, gt=0)
    """Prompt of the first passage: the opening words of a work are what people try first."""


class ScreenSettings(Section):
    """What counts as memorised, relative to never-seen text."""

    sigma: float = Field(3.0, ge=0)
    """A passage is memorised above mean + sigma·std of the exact memorisation of never-seen passages."""
    assumed_mean: float = Field(0.35, ge=0, lt=1)
    """Never-seen level when the workspace has neither held-out nor retain text to measure it on."""
    assumed_std: float = Field(0.05, ge=0, lt=1)
    """Its standard deviation."""


class MethodSettings(Section):
    """What single methods need beyond lengths and weights; the names say whose it is."""

    npo_beta: float = Field(0.1, gt=0)
    """Inverse temperature of NPO, on summed sequence log-likelihoods in nats; towards 0 it becomes gradient ascent."""
    simnpo_beta: float = Field(2.5, gt=0)
    """Inverse temperature of SimNPO, on mean token log-likelihoods in nats; published for TOFU."""
    simnpo_margin: float = Field(0.0, ge=0)
    """γ of SimNPO, in units of β·nats: how far the likelihood must fall before the force fades; 0 as published."""
    rmu_depth: float = Field(0.25, gt=0, lt=1)
    """Share of the blocks below the hidden state that RMU steers; published: block 7, counted from 0, of 32."""
    rmu_steering: float = Field(5.0, gt=0)
    """c of RMU as a multiple of the parent's mean hidden norm there: the published 6.5 to 300 fit one model each."""
    obliviate_stride: int = Field(5, gt=0)
    """Every this many tokens Obliviate takes the true one away; published: 5."""
    obliviate_top_k: int = Field(10, gt=0)
    """Tokens per position that share the probability in Obliviate's target; published: 5 to 10."""


ASKED = {"asked": True}
"""Context of a validation of what somebody has just set, in which more is asked than of what is on record."""


class UnlearnSettings(Section):
    """The method, its saliency mask, the fit of the task vector, the repair.

    Each method has its own defaults (`pipeline.method_defaults`) for what is not set here or in ``takedown.toml``.
    """

    method: MethodName = DEFAULT_METHOD
    """What is descended; see `pipeline.methods`."""
    masked: bool = True
    """Only salient weights may change; else all target weights may."""
    parameterisation: Literal["full", "lora"] = "full"
    """``full``: the salient coordinates themselves; ``lora``: W + m⊙(BA)."""
    saliency_k: float = 1.0
    """γ = mean + k·std of |gradient| over all target weights; a very low k selects everything."""
    saliency_fraction: float | None = Field(None, gt=0, le=1)
    """Share of the target weights with the largest |gradient| to select instead, as SalUn does."""
    random_label_weight: float = Field(0.5, ge=0)
    """ε2, as in the paper."""
    random_labels_per_prompt: int = Field(3, gt=0)
    """K mismatched continuations for each prompt."""
    iterations: int = Field(10, gt=0)
    """Optimiser steps of the fit; more where needed to see every passage once."""
    rounds: int = Field(1, gt=0)
    """Most times that a direct method goes through these. A further round goes on from where the last one ended, and is
    begun only while a request is above the target, or this step's passages above where the method wants them."""
    passages_per_iteration: int = Field(32, gt=0)
    """Forget passages per step; a smaller forget set is seen whole in each."""
    learning_rate: float = Field(1e-4, gt=0)
    """Adam step size of the fit."""
    learning_rate_end: float = Field(1.0, gt=0, le=1)
    """Share of the step size that is left at the last iteration, after falling evenly; small last steps let what is
    kept heal."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of the displacement, that is towards the parent, inside the mask only."""
    lora_rank: int = Field(32, gt=0)
    lora_alpha: float = Field(32.0, gt=0)
    lora_learning_rate: float = Field(1e-3, gt=0)
    """Factors start at zero and need a larger step than weights."""
    anchor_weight: float = Field(8.0, ge=0)
    """λ of KL(v0 ‖ θ) on retain text, in the fit and in the repair; 0 is the paper's plain setting. The weight of the
    retain term of any other method."""
    anchor_truth: float = Field(0.0, ge=0)
    """ε, the weight beside that KL, under the same λ, of the cross-entropy of what the retain text really says: with KL
    alone ordinary text becomes a little less likely with every step."""
    anchor_passages: int = Field(16, gt=0)
    """Retain passages per iteration."""
    anchor_pool: int = Field(256, gt=0)
    """Retain passages that v0's predictions are kept of, spread evenly over the documents."""
    recited_openings: int = Field(0, ge=0)
    """Beginnings from which v0 is let write, once for the lineage, to learn what it knows by heart: held to like retain
    text, with nobody having to list it. Takes a minute on a CPU for a few million weights."""
    recited_passages: int = Field(32, gt=0)
    """Recited passages per iteration, of retain text or found in this way, beside ``anchor_passages`` others; by
    ``short-context``."""
    anchor_top_k: int = Field(64, gt=0)
    """Tokens per position kept apart in the KL; the rest share one bucket."""
    context_tokens: int = Field(8, gt=0)
    """Most true tokens before each token from which ``short-context`` takes what never-seen text would be predicted at;
    fewer are taken where the model still recognises the text from them."""
    replay_pool: int = Field(64, ge=0)
    """Earlier passages that ``short-context`` keeps at the level of never-seen text, drawn for each step from as many
    requests as there are; one that comes back above the target is pushed down, whether drawn or not."""
    replay_passages: int = Field(12, gt=0)
    """Of them per iteration."""
    repair_iterations: int = Field(120, ge=0)
    """Most iterations of the repair after negation; 0 is the paper's plain setting."""
    repair_min_iterations: int = Field(60, ge=0)
    """Iterations of the repair before it may stop at the target; those after reaching it heal what is kept."""
    repair_learning_rate: float = Field(3e-4, gt=0)
    repair_floor: float = Field(0.05, ge=0, lt=1)
    """Unlikelihood acts on tokens still predicted with more than this probability."""
    method_settings: MethodSettings = MethodSettings()
    """What only one method looks at."""

    @model_validator(mode="before")
    @classmethod
    def _with_method_defaults(cls, data: Any) -> Any:
        """Resolve the method's defaults here, once, so that what is recorded with a version is what was used."""
        if not isinstance(data, dict):
            return data
        method = data.get("method", DEFAULT_METHOD)
        known = METHOD_DEFAULTS.get(method, {}) if isinstance(method, str) else {}  # type: ignore[call-overload]
        return {**known, **data}

    @model_validator(mode="after")
    def _no_rounds_of_what_is_negated(self, info: ValidationInfo) -> UnlearnSettings:
        """While a fit goes towards the text, the text is always above the target. Asked of what somebody sets, not of
        what is on record."""
        if info.context == ASKED and self.rounds > 1 and self.method in NEGATED:
            raise ValueError(
                f"rounds: {self.method} descends towards the text, so there is no end but iterations; leave it at 1"
            )
        return self


class CalibrateSettings(Section):
    """Search for the strength α."""

    control: Literal["target", "uwc"] = "target"
    """``target``: the smallest strength that forgets to the target. ``uwc``: the largest share of the fit that leaves
    95 % of the extraction strength of retain text (Wang et al., arXiv 2406.09179), whatever it forgets,
    without a repair and whatever ``fixed_alpha`` says; for comparison."""
    margin: float = Field(0.02, ge=0)
    """Target = never-seen level + margin, for every request; below the gate's limit so that rounding cannot refuse."""
    fixed_alpha: float | None = Field(None, gt=0)
    """Use this strength instead of searching, as the SSU paper does with 1; the gate still decides."""
    max_alpha: float = Field(64.0, gt=0)
    """Largest strength tried."""
    bisections: int = Field(8, gt=0)
    """Halvings of the bracket."""
    max_utility_rise: float = Field(0.02, gt=0)
    """Largest rise of utility NLL in nats over the parent that the negation may cost; what it leaves to forget is left
    to the repair. Without retain text there is no repair, and negation alone goes to the target or to this limit."""


class GateSettings(Section):
    """Limits a candidate must meet to become the current version."""

    forget_tolerance: float = Field(0.05, ge=0)
    """Exact memorisation of every request of this and earlier steps ≤ never-seen level + this."""
    reinstated_share: float = Field(0.5, ge=0, le=1)
    """A text that is put back must regain at least this share of what it had lost above the never-seen level."""
    kept_share: float = Field(0.85, ge=0, le=1)
    """Kept works keep at least this share of their exact memorisation in v0."""
    perplexity_rise: float = Field(0.10, ge=0)
    """Held-out perplexity rises by at most this share over v0."""
    fold_regressed: bool = Field(False, exclude=True)
    """Where a step was refused because it brought earlier texts back above their limit, the next step from the same
    version works on those again, beside its own. No limit, and no part of a run's identity: which texts these are
    stands in its plan."""


class EvaluateSettings(Section):
    """What is measured, and what is generated for ROUGE and verbatim runs."""

    reference_passages: int = Field(128, gt=0)
    """Most passages of kept texts, and of held-out texts, spread evenly over the files."""

    generate_passages: int = Field(4, ge=0)
    """Passages per text that are continued greedily, spread evenly over the text; 0 turns generation off."""


class StoreSettings(Section):
    """How versions are kept."""

    keyframe_every: int = Field(16, ge=1)
    """Every n-th version of a line is kept whole, the others as deltas against their parents; 1 keeps every version
    whole. A restore reads the whole file and each delta on the way once. Of steps that change 7 % of the entries, a
    version takes .19, .13 or .10 of a whole one with 8, 16 or 32; the longest restore about doubles each time."""


class VaultSettings(Section):
    """How the texts are kept."""

    key_file: str = "keys/vault.key"
    """File of the master key, from the workspace on or absolute: better on another disk, so that a copy of the
    workspace opens no text. ``TAKEDOWN_VAULT_KEY``, where it is set, goes before it."""


Runner = Literal["threads", "dask", "ray"]
"""Workers of this machine, or of a cluster."""


class RuntimeSettings(Section):
    """Where and how the numbers are computed."""

    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """``auto``: CUDA when present, else the CPU; or a torch device name."""
    batch_tokens: int = Field(4096, gt=0)
    """Most tokens, padding included, in one forward pass."""
    seed: int = 0
    runner: Runner = Field("threads", exclude=True)
    """What runs the pieces of stages that map over requests, and `takedown find-copies`, which takes processes instead
    of threads; ``dask`` and ``ray`` need the extra of that name. Changes no byte of a result, so it is not part of a
    run's identity; nor is the number below."""
    preflight: Literal["refuse", "warn"] = Field("refuse", exclude=True)
    """A run that memory or disk are estimated not to suffice for: ``refuse`` it before anything is changed, or ``warn``
    in its log and go on. Changes no result, like the two above and below."""
    note_s: float = Field(300.0, ge=0, exclude=True)
    """Seconds of a fit or a repair after which it is noted how far it has come, 12 bytes for each salient weight: what
    a killed process loses. It goes on with the same bytes, so this changes no result either."""
    workers: int = Field(2, ge=1, le=1024, exclude=True)
    """Pieces that are worked on at the same time; each Dask or Ray worker loads the model for itself."""


class Schedule(Section):
    """When something is run: by a cron expression or at a fixed spacing."""

    cron: str | None = None
    """Five fields: minute, hour, day, month, weekday."""
    every_s: float | None = Field(None, ge=1)
    """Seconds from one run to the next, counted from midnight."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Schedule:
        if (self.cron is None) == (self.every_s is None):
            raise ValueError("give either cron or every_s")
        return self


LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine."""


class ServeSettings(Section):
    """What `takedown serve` runs, and when."""

    scheduled: Schedule = Schedule(cron="0 2 * * *")
    """A step for all that has arrived."""
    audit: Schedule = Schedule(cron="0 6 * * *")
    """The check of everything that is kept, and of every request on the version in force."""
    time_zone: str = "UTC"
    """IANA name, e.g. ``Europe/Berlin``; schedules are read in it, and follow its summer time."""
    port: int = Field(4200, ge=1, le=65535)
    """Of Prefect's server on 127.0.0.1, where none is configured."""
    wait_s: float = Field(3600.0, ge=0)
    """How long a scheduled run waits for another writer before it leaves its work to the next one."""
    webhook_in_clear: bool = False
    """Let ``webhook`` be plain http to another machine, where anybody on the way can read along."""
    webhook: str | None = Field(None, repr=False)
    """Address that is sent a JSON object when a run fails, is refused, or finds a deadline passed; ids only. Whoever
    knows it may post there, so it is shown nowhere."""

    @field_validator("webhook")
    @classmethod
    def _is_an_address(cls, url: str, info: ValidationInfo) -> str:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port  # a port that is none shows only when it is asked for
        except ValueError as error:
            raise ValueError("is no address like https://chat.example/hooks/…") from error
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not host or port == 0 or not plain or parts.username is not None:
            raise ValueError("is no address like https://chat.example/hooks/…, without blanks or a user's name")
        # Where that setting is wrong itself, one problem is told, not two.
        if parts.scheme == "http" and host not in LOOPBACK and not info.data.get("webhook_in_clear", True):
            raise ValueError("is readable on the way; use https, or set webhook_in_clear = true")
        return url

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError("is no time zone known here; names are like Europe/Berlin") from error
        return name


class LoggingSettings(Section):
    """The log of runs: JSON lines with ids, never texts; see `pipeline.runlog`."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """``debug`` also has each request that is screened, and stages that were finished before."""
    destination: str = "run"
    """``run``: kept with the run, in ``runs/<id>/log.jsonl``, later in ``reports/logs/``; ``stderr``; or a file, from
    the workspace on or absolute, that everything is added to: its name ends in ``.log`` or ``.jsonl``, as that of no
    ledger, key or checkpoint does. Times of earlier runs are known from ``run`` alone."""

    @field_validator("destination")
    @classmethod
    def _is_no_evidence(cls, place: str) -> str:
        if place not in ("run", "stderr") and Path(place).suffix not in (".log", ".jsonl"):
            raise ValueError('is not "run", "stderr" or a file whose name ends in .log or .jsonl')
        return place


class Clock(Section):
    """How long requests may stay where they are; which law or contract says so is the team's to know."""

    states: tuple[Literal[State, "on-hold"], ...] = Field(min_length=1)
    """The clock runs while a request is in one of these: from the moment it came to be in one, and stops with the
    first moment that it is in none. ``on-hold`` is beside the state, and stops no other clock. What was erased has no
    deadline."""
    within: str
    """``36 hours`` exactly; ``7 days``, ``10 business days``, ``1 month`` until the end of their last day in
    ``serve.time_zone``. The first day is not counted. A last day that is no business day stays the last."""
    basis: tuple[Basis, ...] = ()
    """Only for requests of these; none means all. A request that came in before the ledger noted the basis counts as
    one of each."""

    @field_validator("within")
    @classmethod
    def _is_a_period(cls, text: str) -> str:
        read_period(text)
        return text

    @property
    def period(self) -> Period:
        """``within`` in numbers."""
        return read_period(self.within)


class DeadlineSettings(Section):
    """What must be done by when. None is set by itself."""

    clocks: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")], Clock] = {}
    """By a name of your own in small letters."""
    holidays: frozenset[date] = frozenset()
    """Days that are no business days, beside Saturdays and Sundays."""


class Settings(Section):
    """The whole tree."""

    approval: Literal["none", "required"] = "none"
    """``required``: what the gate accepts waits, unpublished, until somebody approves it."""
    intake: IntakeSettings = IntakeSettings()
    dedupe: DedupeSettings = DedupeSettings()
    passages: PassageSettings = PassageSettings()
    screen: ScreenSettings = ScreenSettings()
    unlearn: UnlearnSettings = UnlearnSettings()
    calibrate: CalibrateSettings = CalibrateSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    gate: GateSettings = GateSettings()
    store: StoreSettings = StoreSettings()
    # A path of one machine changes no result: it belongs neither to a run's id nor into what a version is given with.
    vault: VaultSettings = Field(VaultSettings(), exclude=True)
    runtime: RuntimeSettings = RuntimeSettings()
    serve: ServeSettings = Field(ServeSettings(), exclude=True)
    logging: LoggingSettings = Field(LoggingSettings(), exclude=True)
    deadlines: DeadlineSettings = Field(DeadlineSettings(), exclude=True)
    """Decides no outcome, so it is not part of a run's identity; nor do those of ``serve`` and ``logging``."""


def read_settings(path: Path) -> Settings:
    """Read ``takedown.toml``; an absent file means all defaults.

    Raises:
        InvalidInput: Not TOML, an unknown key, or a value out of range; every problem is listed.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Settings()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput([Problem(str(path), f"is not TOML ({error})", "Correct the file.")]) from error
    try:
        return Settings.model_validate(tree, context=ASKED)
    except ValidationError as error:
        raise InvalidInput(
            Problem(
                f"{path}: {'.'.join(str(p) for p in e['loc'])}",
                e["msg"].removeprefix("Value error, "),
                "See pipeline/settings.py for all keys.",
            )
            for e in error.errors()
        ) from error
