"""What a method of unlearning is to the rest of the product: a loss, prepared at the parent, and a direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.fit import Backward, Fit
from pipeline.method_defaults import NEGATED, MethodName


@dataclass(frozen=True)
class Method:
    """One method of the field.

    Attributes:
        name: Its name in settings, tables and files.
        title: Its name for people.
        source: Paper and equation.
        prepare: Called once with the parent's weights in the model; computes what the loss needs of the parent
            (reference log-probabilities, labels, control vectors) and returns the loss. Nothing of the size of the
            model is kept.
        stops: Whether the descent ends at the level of never-seen text by itself, so that its displacement is applied
            whole where that is affordable. A smaller share that reaches the target in what is recited would leave more
            of the trace that membership attacks look for.
    """

    name: MethodName
    title: str
    source: str
    prepare: Callable[[Fit], Backward]
    stops: bool = False

    @property
    def negated(self) -> bool:
        """Whether the descent goes towards the text and is subtracted (SSU, TV); False where it itself unlearns."""
        return self.name in NEGATED
