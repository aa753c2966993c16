"""The whole page: a string that is one HTML file, which asks for nothing outside itself.

Everything can be read without a script; the script sorts and filters the table. The policy in
the head lets a browser run that script alone, and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from typing import Any

from lora_fx.page import curves, parts, style
from lora_fx.page.blocks import blocks
from lora_fx.page.rows import rows_of
from lora_fx.page.table import table
from lora_fx.page.text import Json, esc, plural
from lora_fx.page.verdict import verdict


def page(result: Json) -> str:
    """The page of a command's JSON object (docs/json.md).

    Args:
        result: With what only a page shows under `page`: `argv`, `versions`, `files` rows of
            {of, path, bytes, sha256}, `adapters` rows of {path, updates: rows of {key, kind, rank,
            alpha, parameters, shape, sigma, norm}}; all may be missing.
    """
    rows = rows_of(result)
    title = f"lora-fx {result.get('command', '')}: {'done' if result.get('ok') else 'no'}"
    what = "tensor" if result.get("command") in ("merge", "verify") else "target"
    count = esc("; ".join(filter(None, [plural(len(rows), what), result.get("effect")])))
    body = [
        verdict(result, rows),
        "<main>",
        parts.warnings(result),
        parts.merges(result),
        parts.section("Training", curves.training(result)),
        parts.parity(result),
        parts.section("Structure", blocks(rows)),
        parts.section("Rounding", curves.rounding(rows)),
        parts.section(
            f"{what.capitalize()}s", f"<p class=count>{count}</p>{table(result, rows)}" * bool(rows)
        ),
        parts.stages(result),
        parts.unhandled(result),
        parts.files(result),
        parts.run(result),
        "</main>",
    ]
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_hash(style.SCRIPT)}'"
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        "<meta name=color-scheme content='light dark'>"
        f"<title>{esc(title)}</title><style>{style.CSS}</style></head>\n<body>"
        f"{''.join(body)}\n"
        f'<script type="application/json" id="data">{_data(result)}</script>\n'
        f"<script>{style.SCRIPT}</script></body></html>\n"
    )


def _data(result: Json) -> str:
    """The object as JSON that no HTML parser can take for a tag; ASCII only."""
    text = json.dumps(_plain(result), separators=(",", ":"), default=str, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN: they are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
