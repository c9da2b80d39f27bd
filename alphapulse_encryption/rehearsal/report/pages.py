"""How pages are made of templates, and put on the disk.

Everything that comes from a database or from a message is escaped where it is put into a page; the measurements hold no
values, keys or addresses to begin with.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphapulse_encryption.rehearsal.measures import Stage
from alphapulse_encryption.rehearsal.report import drawings, found, verdict, wording

if TYPE_CHECKING:
    import jinja2

_FILTERS = (
    *(wording.duration, wording.size, wording.number, wording.number_or_nothing, wording.milliseconds),
    *(wording.moment, wording.share),
    *(wording.span_of_time, wording.span_of_size),
)


def render(template: str, **told: Any) -> str:
    """A page, or the Markdown that Dagster shows."""
    return _environment().get_template(template).render(told)


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alphapulse_encryption.rehearsal.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {filter_.__name__: filter_ for filter_ in _FILTERS}
    # The plots are ours, and their labels are escaped where they are drawn.
    environment.filters |= {"drawing": Markup, "plain": _plain, "option": _option}
    environment.globals |= {
        "Level": verdict.Level,
        "Stage": Stage,
        "GUIDE_GROWTH": drawings.GUIDE_GROWTH,
        "EXAMPLE_TIMES": found.EXAMPLE_TIMES,
        "MOST_TIMES_SIZE": verdict.MOST_TIMES_SIZE,
        "MOST_TIMES_P99": verdict.MOST_TIMES_P99,
        "PACED": drawings.PACED,
    }
    return environment


def _option(name: str, option: str) -> str:
    """An option with a table's name, for the shell."""
    # One that begins with a dash would be taken for an option.
    return f"--{option}{'=' if name.startswith('-') else ' '}{shlex.quote(name)}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", escape(" ".join(text.split()), quote=False))


def keep(path: Path, text: str) -> Path:
    """Write a page so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".html")
    try:
        # Lone surrogates cannot be encoded.
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
