"""How pages are made from templates: everything is escaped, nothing missing passes, nothing untrusted hides.

In: filters of a page's own. Out: an environment over ``templates/``. Never: a template from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report_svg import plain_text


def _clean(value: object) -> object:
    """What Jinja calls on every output before escaping: control characters of untrusted text become visible."""
    return plain_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def pages(**filters: Callable[..., Any]) -> Environment:
    """An environment with a page's filters."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment
