"""What every fit is given and what it reports, whatever its method and parameterisation.

In: the parent, the memorised passages, the retain text. Out: the passages of each iteration, a checked trace. Never: a
loss; those are `pipeline.methods`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from pipeline.anchor import NO_ANCHOR, Anchor
from pipeline.errors import NumericalFailure
from pipeline.halfway import (
    NOTHING_NOTED,
    Halfway,
    Numbers,
    Tensors,
    adam_state,
    random_state,
    set_adam_state,
    set_random_state,
)
from pipeline.passages import Passage
from pipeline.settings import UnlearnSettings
from pipeline.sparse import SalientWeights


@dataclass
class Trace:
    """What a fit did.

    Attributes:
        losses: Total loss of each iteration.
        tokens: Tokens run.
        begun: Iterations of the rounds begun so far.
        rounds: Rounds begun so far.
        left: Passages of the requests that were above the target at the end of the last round.
        above: How far this step's passages were above where the method wants them in the last iteration, mean nats; 0
            for a method that wants them nowhere.
        again: Earlier requests that were above the target and were pushed down, too.
    """

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    begun: int = 0
    rounds: int = 0
    left: Sequence[Passage] = ()
    above: float = 0.0
    again: set[str] = field(default_factory=set)


NOTED = ("losses", "tokens", "begun", "rounds", "above")
"""Of a trace, what is noted as it is; ``left`` is asked for again where it is needed."""

REACHED = 0.15
"""Mean nats above where a method wants its tokens up to which a passage counts as being there."""


@dataclass(frozen=True)
class Fit:
    """What every fit needs.

    Attributes:
        model: The parent, whose weights are displaced and restored through ``salient``.
        salient: Its salient coordinates.
        forget: Memorised passages of this step.
        anchor: Retain passages with v0's predictions; empty for none.
        settings: Method, strengths and lengths.
        pad_id: Padding id.
        max_tokens: Most tokens in a forward pass.
        seed: Seed of the order and of whatever a method draws.
        progress: Called after each iteration with its number, how many there are as far as is known, and its loss.
        put_back: Passages of reinstated texts with the predictions of the model that the step starts from, of which as
            many are held to as of retain passages; empty but in a reinstatement.
        target: Exact memorisation that counts as forgotten.
        earlier: Passages that earlier steps took out and that are not among those to forget, for methods that keep them
            out.
        remaining: Asks for the passages of requests, of this or of an earlier step, that are above the target on the
            model as it stands; without those that no fit may work on.
        on_hold: Earlier requests that no fit may work on: what is known of them may be kept as it is, no more.
        never_seen_nll: Nats per token of never-seen text; None where it was not measured.
        halfway: Where it is noted how far the fit has come.
    """

    model: nn.Module
    salient: SalientWeights
    forget: Sequence[Passage]
    anchor: Anchor
    settings: UnlearnSettings
    pad_id: int
    max_tokens: int
    seed: int
    progress: Callable[[int, int, float], None] = lambda iteration, of, loss: None
    put_back: Anchor = NO_ANCHOR
    target: float = 1.0
    earlier: Sequence[Passage] = ()
    remaining: Callable[[], Iterable[Passage]] = tuple
    on_hold: Collection[str] = ()
    never_seen_nll: float | None = None
    halfway: Halfway = NOTHING_NOTED


Backward = Callable[[Sequence[Passage], random.Random, Trace], float]
"""The loss of one iteration: backpropagates it on the given forget passages, counts the tokens it ran in the trace,
and returns its value. Gradients are left to whoever calls it."""


@runtime_checkable
class Remembers(Protocol):
    """A loss that gathers something while it is descended, beside what it knew of the parent when it was prepared."""

    def state(self) -> Numbers | None:
        """What it has gathered; None where that cannot be noted."""

    def set_state(self, numbers: Numbers) -> None:
        """The inverse of `state`, for one prepared in the same way."""


@dataclass(frozen=True)
class Descent:
    """All that changes while a loss is descended, to be noted half-way and taken up again.

    Attributes:
        optimiser: Adam, with its moments.
        parameters: What it changes, by name.
        random_: The generator that the loss draws from.
        trace: What the descent did.
        backward: The loss; None where it gathers nothing.
    """

    optimiser: torch.optim.Optimizer
    parameters: Mapping[str, torch.Tensor]
    random_: random.Random
    trace: Trace
    backward: Backward | None = None

    def take_up(self, halfway: Halfway) -> tuple[int, Numbers]:
        """Put everything where the newest note has it; the iterations that it spares, and its numbers."""
        found = halfway.take_up()
        if found is None:
            return 0, {}
        iterations, tensors, numbers = found
        set_adam_state(self.optimiser, self.parameters, tensors)
        set_random_state(self.random_, numbers["random"])
        for name in NOTED:
            setattr(self.trace, name, numbers["trace"][name])
        self.trace.again = set(numbers["again"])
        if isinstance(self.backward, Remembers):
            self.backward.set_state(numbers["loss"])
        halfway.tell("taken-up", iterations=iterations)
        return iterations, numbers

    def note(self, halfway: Halfway, iterations: int, **numbers: Any) -> None:
        """Note it, where the last note is old enough."""

        def state() -> tuple[Tensors, Numbers] | None:
            gathered: Numbers | None = self.backward.state() if isinstance(self.backward, Remembers) else {}
            if gathered is None:
                return None
            trace = {name: getattr(self.trace, name) for name in NOTED}
            own = {"random": random_state(self.random_), "trace": trace, "again": sorted(self.trace.again)}
            return adam_state(self.optimiser, self.parameters), {**numbers, **own, "loss": gathered}

        halfway.note(iterations, state)


def forget_slices(fit: Fit) -> Sequence[Sequence[Passage]]:
    """The passages of each iteration: all of them, or shuffled slices that cover them at least once."""
    size, count = fit.settings.passages_per_iteration, fit.settings.iterations
    if len(fit.forget) <= size:
        return [fit.forget] * count
    count = max(count, -(-len(fit.forget) // size))
    random_ = random.Random(f"{fit.seed} slices")
    order: list[Passage] = []
    while len(order) < count * size:
        order += random_.sample(fit.forget, len(fit.forget))
    return [order[i * size : (i + 1) * size] for i in range(count)]


def schedule(fit: Fit, trace: Trace, done: int = 0) -> Iterator[tuple[Sequence[Passage], float]]:
    """The passages of each iteration and its share of the learning rate: a round, and others while something remains.

    Args:
        fit: Whose passages.
        trace: Where the rounds are counted.
        done: Iterations that were done before, which the trace knows of.

    How many iterations forgetting takes depends on the model and on how well it knows the text. A rate that is high
    enough for the hardest text costs what is kept for all others; further rounds cost time, and only where needed.
    """
    slices = forget_slices(fit)
    first, within = divmod(done, len(slices))
    for number in range(first, fit.settings.rounds):
        if number > first or not within:
            if number:
                trace.left = tuple(fit.remaining())
                if not trace.left and trace.above <= REACHED:
                    return
            trace.rounds += 1
            trace.begun += len(slices)
        for iteration in range(within if number == first else 0, len(slices)):
            yield slices[iteration], rate_at(fit, iteration, len(slices))


def rate_at(fit: Fit, iteration: int, count: int) -> float:
    """Share of the learning rate in an iteration, from 0: it falls evenly to ``learning_rate_end`` in the last."""
    return 1 - (1 - fit.settings.learning_rate_end) * iteration / max(1, count - 1)


def record(fit: Fit, loss: float, trace: Trace) -> None:
    """Note the loss of an iteration.

    Raises:
        NumericalFailure: The loss is not finite.
    """
    if not abs(loss) < float("inf"):
        raise NumericalFailure(
            f"The loss of iteration {len(trace.losses) + 1} is not finite. Lower unlearn.learning_rate; "
            "nothing was published."
        )
    trace.losses.append(loss)
    fit.progress(len(trace.losses), trace.begun, loss)
