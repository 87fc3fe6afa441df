"""Every method of unlearning behind one call: parent, passages, retain text, settings, seed → task vector.

In: a `pipeline.fit.Fit` whose settings name the method. Out: τ such that the candidate is θ_p - α·τ, whichever way the
method goes. Never: a weight outside the mask.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.fit import Fit, Trace
from pipeline.method_defaults import MethodName
from pipeline.methods.ascent import GA, GA_KL, GA_KL_GENERAL, GRAD_DIFF, GRAD_DIFF_GENERAL
from pipeline.methods.labels import ADVERSARIAL, RANDOM_LABELS, SALUN
from pipeline.methods.method import Method
from pipeline.methods.obliviate import OBLIVIATE
from pipeline.methods.preference import NPO, NPO_GD, NPO_KL, SIMNPO
from pipeline.methods.rmu import RMU
from pipeline.methods.short_context import SHORT_CONTEXT
from pipeline.methods.ssu import NO_MASK, NO_RANDOM_LABELS, PAPER, SSU, TV
from pipeline.methods.unlikelihood import UNLIKELIHOOD_KL
from pipeline.sparse import Mask, Vector
from pipeline.unlearn import fit_full

METHODS: Mapping[MethodName, Method] = {
    method.name: method
    for method in (
        SSU, PAPER, NO_MASK, NO_RANDOM_LABELS, TV,
        GA, GRAD_DIFF, GRAD_DIFF_GENERAL, GA_KL, GA_KL_GENERAL,
        RANDOM_LABELS, SALUN, ADVERSARIAL,
        NPO, NPO_KL, NPO_GD, SIMNPO, RMU, UNLIKELIHOOD_KL, OBLIVIATE,
        SHORT_CONTEXT,
    )
}  # fmt: skip
"""By name, in the order of a table."""


def task_vector(fit: Fit, mask: Mask) -> tuple[Vector, Trace]:
    """Fit by the method and the parameterisation that the settings name.

    Args:
        fit: The parent and what to work on; ``fit.salient`` must be made from ``mask``.
        mask: Tensor name → bool tensor of the weight's shape.

    Returns:
        τ at the salient coordinates, float32: the candidate is θ_p - α·τ. For a method that is not negated τ is the
        descent's displacement with its sign turned, so that α in [0, 1] mixes parent and unlearned model as UWC does
        (Wang et al., arXiv 2406.09179). And the trace. The parent's weights are back in the model.

    Raises:
        UsageError: The method needs retain text that is not there.
        NumericalFailure: The loss or a gradient is not finite.
    """
    method = METHODS[fit.settings.method]
    backward = method.prepare(fit)
    if fit.settings.parameterisation == "lora":
        from pipeline.lora import fit_lora  # peft takes seconds to import, and the default does without

        vector, trace = fit_lora(fit, mask, backward)
    else:
        vector, trace = fit_full(fit, backward)
    return (vector if method.negated else {name: -value for name, value in vector.items()}), trace
