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
    run: JsonView = result.get("page") or {}
    notes = set(run.get("notes") or ())
    texts: list[str] = result.get("warnings") or []
    changes_tensors = result.get("command") in ("merge", "verify")
    style = (TEMPLATES / "style.css").read_text("utf-8")
    script = (TEMPLATES / "table.js").read_text("utf-8")
    values = {
        "result": result,
        "what": "tensor" if changes_tensors else "target",
        "headline": headline(str(result.get("error") or "")),
        "warnings": [text for text in texts if text not in notes],
        "notes": [text for text in texts if text in notes],
        "more": run,
        "facts": list(facts(result, rows)),
        "curve_of_losses": charts.training(result),
        "structure": blocks(rows),
        "rounding": charts.rounding(rows),
        "table": table(result, rows),
        "command_line": shlex.join(run.get("argv") or ()),
        "data": strict_json(result),
        "style": Markup(style),
        "script": Markup(script),
        "script_hash": _hash_for_policy(script),
    }
    return _templates().get_template("page.html.j2").render(values)


def _hash_for_policy(script: str) -> str:
    """The hash by which a page's Content-Security-Policy names a script."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@cache
def _templates() -> Environment:
    """Jinja's environment: every value is made visible, then escaped, unless it is markup."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_visible_unless_markup,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (broken, number, percent, plural, shape, size):
        environment.filters[function.__name__] = function
    environment.policies["json.dumps_kwargs"] = {
        "separators": (",", ":"), "default": str, "allow_nan": False,
    }  # fmt: skip
    return environment


def _visible_unless_markup(value: object) -> str:
    return value if isinstance(value, Markup) else visible(value)


def headline(error: str, most: int = 90) -> str:
    """An error as a heading: all of a short one, else its start without the path before it.

    It ends at the last mark between two clauses, or where that would leave too little, between two
    words.

    >>> headline("runs/a.safetensors: its keys fit no parameter; expected layers.0.fc", 40)
    'its keys fit no parameter …'
    """
    if len(error) <= most:
        return error
    text = re.sub(r"^\S+: ", "", error)
    marks = [match.start() for match in re.finditer(r"[;,:.] ", text[: most + 1])]
    end = max(marks, default=0)
    if end > most / 3:
        start = text[:end]
    else:
        start = text[:most].rpartition(" ")[0] or text[:most]
    return f"{start} …"
