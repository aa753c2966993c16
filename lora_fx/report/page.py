"""The whole page: a string that is one HTML file, which asks for nothing outside itself.

Everything can be read without a script; the script sorts and filters the table. The policy in
the head lets a browser run that script alone, and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from lora_fx.errors import visible
from lora_fx.report import charts
from lora_fx.report.facts import facts
from lora_fx.report.formatting import broken, number, percent, plural, shape, size
from lora_fx.report.rows import rows_of
from lora_fx.report.structure import blocks
from lora_fx.report.target_table import table
from lora_fx.text import JsonView, strict_json

TEMPLATES = Path(__file__).parent / "templates"


def page(result: JsonView) -> str:
    """The page of a command's JSON object (docs/json.md).

    Args:
        result: With what only a page shows under `page`: `argv`, `when`, `seconds`, `host`,
            `notes` (of `warnings`, those that ask for nothing), `versions`, `files` rows of {of,
            path, bytes, sha256}, `adapters` rows of {path, updates: rows of {key, kind, rank,
            alpha, parameters, shape, sigma, norm}}; all may be missing.
    """
    rows = rows_of(result)
    more: JsonView = result.get("page") or {}
    notes = set(more.get("notes") or ())
    said: list[str] = result.get("warnings") or []
    script = (TEMPLATES / "table.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        "result": result,
        "what": "tensor" if result.get("command") in ("merge", "verify") else "target",
        "headline": headline(str(result.get("error") or "")),
        "warnings": [text for text in said if text not in notes],
        "notes": [text for text in said if text in notes],
        "more": more,
        "facts": [*facts(result, rows)],
        "curve_of_losses": charts.training(result),
        "structure": blocks(rows),
        "rounding": charts.rounding(rows),
        "table": table(result, rows),
        "command_line": shlex.join(more.get("argv") or ()),
        "data": strict_json(result),
        "style": Markup((TEMPLATES / "style.css").read_text("utf-8")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
    }
    return _templates().get_template("page.html.j2").render(values)


@cache
def _templates() -> Environment:
    """Jinja's environment: every value is made visible, then escaped, unless it is markup."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {f.__name__: f for f in (broken, number, percent, plural, shape, size)}
    made.policies["json.dumps_kwargs"] = {
        "separators": (",", ":"), "default": str, "allow_nan": False,
    }  # fmt: skip
    return made


def headline(error: str, most: int = 90) -> str:
    """An error as a heading: all of a short one, else its start without the path before it.

    >>> headline("runs/a.safetensors: its keys fit no parameter; expected layers.0.fc", 40)
    'its keys fit no parameter …'
    """
    if len(error) <= most:
        return error
    told = re.sub(r"^\S+: ", "", error)
    ends = [m.start() for m in re.finditer(r"[;,:.] ", told[: most + 1])]
    cut = max(ends, default=0)
    return (told[:cut] if cut > most / 3 else told[:most].rpartition(" ")[0] or told[:most]) + " …"
