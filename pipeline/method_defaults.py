"""The methods that a run may use, and what each sets that differs from the product's defaults.

Apart from the methods themselves, because settings are resolved where torch is not loaded. `pipeline.methods` has one
entry for each name; what is set explicitly goes over what stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

MethodName = Literal["ssu", "tv", "ga", "unlikelihood-kl"]
"""What ``unlearn.method`` may be."""

_PUBLISHED: Mapping[str, Any] = {"repair_iterations": 0, "random_label_weight": 0.0}
"""A published method stands on its own: neither the product's repair nor SSU's random labels help it."""

METHOD_DEFAULTS: Mapping[MethodName, Mapping[str, Any]] = {
    "ssu": {},
    "tv": {**_PUBLISHED, "masked": False, "anchor_weight": 0.0},
    "ga": {**_PUBLISHED, "masked": False, "anchor_weight": 0.0},
    "unlikelihood-kl": {**_PUBLISHED, "masked": False},
}
"""By method, keys of `pipeline.settings.UnlearnSettings`."""
