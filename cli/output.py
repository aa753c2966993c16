"""What export prints of what it wrote."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from lora_fx.errors import LoraFxError

if TYPE_CHECKING:
    from lora_fx.compare import Report


def table(report: Report) -> str:
    """The stages of an optimised export, a line each; empty without stages."""
    if "stages" not in report.details:
        return ""
    from lora_fx.onnx.optimise.stages import RewriteStage

    rows = [f"  {RewriteStage(**row)}" for row in report.details["stages"]]
    return "\n".join(["\nstages:", *(rows or ["  none changed anything"])])


def wrote(report: Report) -> str:
    """The file, and its copy for Triton."""
    copies = [f for f in report.outputs[1:] if f.endswith("model.onnx")]
    return "\n".join(f"wrote {f}" for f in [report.outputs[0], *copies])


def emit_file(as_json: bool, model: str, report: Report) -> None:
    """What became of an .onnx file."""
    for text in report.warnings:
        note(text)
    shown = {k: v for k, v in report.to_json().items() if k not in ("command", "warnings")}
    said = f"{report}{table(report)}\n{wrote(report)}"
    emit(as_json, "export", said, inputs=[{"model": model}], warnings=report.warnings, **shown)


def emit(
    as_json: bool,
    command: str,
    text: str,
    *,
    ok: bool = True,
    warnings: Sequence[str] = (),
    refused: LoraFxError | None = None,
    **fields: object,
) -> None:
    """The result: text for people, or the one JSON object of docs/json.md; and its --report.

    `refused` ends the command after its result was shown: the object says ok = false, and the
    error follows on stderr with its exit code.
    """
    ctx = click.get_current_context(silent=True)
    said = list(ctx.find_root().obj["notes"]) if ctx and ctx.find_root().obj else []
    if refused is not None:
        ok, refused.told = False, True
        fields |= {"error": refused.message, "hint": refused.hint}
    page = (ctx.find_root().obj or {}).get("report") if ctx else None  # what --report left here
    if as_json or page:
        from lora_fx import __version__

        whole = {
            "command": command,
            "version": __version__,
            "ok": ok,
            "inputs": [],
            "outputs": [],
            "warnings": list(dict.fromkeys([*said, *warnings])),
            **fields,
        }
    if page:
        say(f"wrote {page(whole)}")
    if as_json:
        click.echo(json.dumps(whole, indent=1, default=str))
    elif text:
        click.echo(text)
    if refused is not None:
        raise refused


def say(text: str) -> None:
    """A line of progress on stderr, unless -q."""
    ctx = click.get_current_context(silent=True)
    if not (ctx and (ctx.find_root().obj or {}).get("quiet")):
        click.echo(text, err=True)


def note(text: str) -> None:
    """Something the user should know: a line on stderr, and a row of the JSON's warnings."""
    ctx = click.get_current_context(silent=True)
    if ctx and ctx.find_root().obj:
        ctx.find_root().obj["notes"].append(text)
    say(f"note: {text}")


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """A function of (bytes done, bytes in all) that draws a bar on a terminal's stderr."""
    ctx = click.get_current_context(silent=True)
    quiet = ctx and (ctx.find_root().obj or {}).get("quiet")
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1, file=sys.stderr, width=40) as bar:

        def show(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield show
