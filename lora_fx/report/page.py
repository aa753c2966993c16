"""The whole page: one HTML text that loads nothing from outside.

Everything can be read without a script; the script sorts and filters the table, and loads the
page of a training again while it goes on, unless its reader wants otherwise. The policy in the
head lets a browser run that script alone, and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from lora_fx.errors import LoraFxError, visible
from lora_fx.files.strict_json import json_object
from lora_fx.report import charts
from lora_fx.report.facts import facts
from lora_fx.report.heading import STOPPED, heading, steps
from lora_fx.report.html_text import (
    broken,
    broken_hash,
    broken_path,
    duration,
    number,
    percent,
    plural,
    shape,
    size,
)
from lora_fx.report.parity_rows import parity_rows
from lora_fx.report.rows import rows_of
from lora_fx.report.structure import blocks
from lora_fx.report.target_table import table
from lora_fx.text import JsonView, strict_json

TEMPLATES = Path(__file__).parent / "templates"


def page(result: JsonView) -> str:
    """Return the page of a command's JSON object (docs/json.md).

    Args:
        result: With what only a page shows under `page`: `argv`, `when`, `seconds`, `host`,
            `notes` (of `warnings`, those that ask for nothing), `versions`, `files` rows of {of,
            path, bytes, sha256}, `adapters` rows of {path, updates: rows of {key, kind, rank,
            alpha, parameters, shape, sigma, norm}}, and of a training without a result `run`
            {state, step, steps}; all may be missing.
    """
    rows = rows_of(result)
    page_only: JsonView = result.get("page") or {}
    notes = set(page_only.get("notes") or ())
    texts: list[str] = result.get("warnings") or []
    state = _state(result)
    script = (TEMPLATES / "table.js").read_text("utf-8")
    if state == "running":
        script += (TEMPLATES / "reload.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    error = _error(result)
    values = {
        "result": result,
        "error": error,
        "state": state,
        "badge": state.capitalize(),
        "is_interrupted": state in STOPPED,
        "what": "tensor" if "tensors" in result and "targets" not in result else "target",
        "heading": heading(result, state, error),
        "steps": steps(result),
        "warnings": [text for text in texts if text not in notes],
        "notes": [text for text in texts if text in notes],
        "more": page_only,
        "facts": [*facts(result, rows)],
        "curve_of_losses": charts.training(result),
        "runs": charts.runs(result),
        "parity": parity_rows(result.get("parity") or ()),
        "structure": blocks(rows),
        "rounding": charts.rounding(rows),
        "table": table(result, rows),
        "command_words": [shlex.quote(word) for word in page_only.get("argv") or ()],
        "data": strict_json(result),
        "style": Markup((TEMPLATES / "style.css").read_text("utf-8")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
    }
    return _templates().get_template("page.html.j2").render(values)


def _state(result: JsonView) -> str:
    """Return how the command ended, in a word; a training may still be running."""
    run = (result.get("page") or {}).get("run")
    if run:
        return str(run["state"])
    if result.get("ok"):
        return "done"
    return "stopped" if isinstance(result.get("error"), str) else "differs"


def _error(result: JsonView) -> str:
    """Return the message of an error; empty without one. The error of truncate is a number."""
    error = result.get("error")
    return error if isinstance(error, str) else ""


def data_of_page(text: str) -> JsonView:
    """Return the JSON object in the text of a page; an empty one for another text."""
    opening = '<script type="application/json" id="data">'
    start = text.rfind(opening)
    end = text.find("</script>", start)
    if start < 0 or end < 0:
        return {}
    try:
        return json_object(text[start + len(opening) : end], "the page")
    except LoraFxError:
        return {}


@cache
def _templates() -> Environment:
    """Return Jinja's environment, in which every value is escaped unless it is markup."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        broken, broken_hash, broken_path, duration, number, percent, plural, shape, size
    )  # fmt: skip
    environment.filters |= {function.__name__: function for function in filters}
    environment.policies["json.dumps_kwargs"] = {
        "separators": (",", ":"), "default": str, "allow_nan": False,
    }  # fmt: skip
    return environment
