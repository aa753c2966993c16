"""Prints results as text or JSON on stdout, and notes and progress on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from lora_fx.cli.distribution import running
from lora_fx.errors import LoraFxError, explain, explained, one_line, visible
from lora_fx.progress import Listener
from lora_fx.text import Json, strict_json

if TYPE_CHECKING:
    from lora_fx.compare import Report


def table(report: Report) -> str:
    """The stages of an optimised export, one line for each; empty without stages."""
    if "stages" not in report.details:
        return ""
    from lora_fx.onnx.optimise import RewriteStage

    rows = [f"  {RewriteStage(**row)}" for row in report.details["stages"]]
    return "\n".join(["\nstages:", *(rows or ["  none changed anything"])])


def wrote(report: Report) -> str:
    """The lines that name the written file, adapters by input name, an encoder, Triton's copy."""
    endings = ("model.onnx", "-encoder.onnx", ".safetensors")
    others = [file for file in report.outputs[1:] if file.endswith(endings)]
    return "\n".join(f"wrote {file}" for file in [report.outputs[0], *others])


def emit(
    text: str,
    *,
    ok: bool = True,
    warnings: Sequence[str] = (),
    refused: LoraFxError | None = None,
    **fields: object,
) -> None:
    """Print the result, as text or as the JSON object of docs/json.md, and write files on it.

    These are the files of --report and --attest.

    `refused` ends the command after its result is printed: `ok` is false in the object, and the
    error follows on stderr, with its exit code.
    """
    if refused is not None:
        ok, refused.told = False, True
        fields |= {"error": refused.message, "hint": refused.hint}
    whole = result(ok, warnings, **fields)
    for write in _run().get("writers", ()):  # what --report and --attest left here
        try:
            with explained("the file on the result"):
                say(f"wrote {write(whole)}")
        except LoraFxError as e:
            outputs = fields.get("outputs")
            if not isinstance(outputs, list) or not outputs:
                raise
            told = f"{', '.join(outputs)} was written, and the file on it was not: {e.message}"
            raise LoraFxError(told, e.hint, exit_code=1) from e
    if _run().get("json"):
        show(whole)
    elif text:
        echo(text)
    if refused is not None:
        raise refused


def show(whole: Json) -> None:
    """Print the JSON object of a result."""
    end_line()
    spelled = running.get().spelled_messages(strict_json(whole))
    _write(json.dumps(spelled, indent=1, default=str))


def echo(text: str, *, err: bool = False, red: bool = False) -> None:
    """Print text, red on request in a terminal; control characters are shown as their codes."""
    end_line()
    said = running.get().spelled(visible(text, lines=True))
    shown = red and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    _write(click.style(said, fg="red") if shown else said, err=err)


def _write(text: str, *, err: bool = False) -> None:
    """Write a text to a standard stream.

    A failure to write to stderr, such as a full disk, is ignored: the result and the exit code of
    the command do not depend on stderr.

    Raises:
        LoraFxError: Writing to stdout fails.
        BrokenPipeError: The reader of stdout has closed it.
    """
    try:
        click.echo(text, err=err)
    except OSError as error:
        if err:
            return
        if isinstance(error, BrokenPipeError):
            raise
        raise explain(error, "standard output") from error


def result(ok: bool, warnings: Sequence[str] = (), **fields: object) -> Json:
    """The JSON object of docs/json.md; `warnings` begins with the notes of the run."""
    from lora_fx import __version__

    ctx = click.get_current_context(silent=True)
    said = dict.fromkeys([*_run().get("notes", ()), *warnings])
    head = {"command": ctx.info_name if ctx else "", "version": __version__, "ok": ok}
    return {**head, "inputs": [], "outputs": [], "warnings": list(said), **fields}


def _run() -> Json:
    """The state of this run of the command line, by name; empty outside a run."""
    ctx = click.get_current_context(silent=True)
    return (ctx.find_root().obj or {}) if ctx else {}


def say(text: str) -> None:
    """Print a line of progress on stderr, unless -q is given."""
    if not _run().get("quiet"):
        echo(text, err=True)


def note(*texts: str, warns: bool = False) -> None:
    """Print notes on stderr, one line for each, and add them to `warnings` of the JSON.

    Args:
        texts: The notes, one sentence each.
        warns: True if they are warnings, which the page of --report marks.
    """
    for text in (one_line(t, 10_000) for t in texts):
        _run().get("notes", []).append(text)
        if warns:
            _run().get("warned", set()).add(text)
        say(f"note: {text}")


def stages() -> Listener | None:
    """A listener that writes stages to stderr, one line for each with its seconds."""
    if _run().get("quiet") or sys.stderr is not sys.__stderr__:  # read by a program in this process
        return None
    lines = _run()["stages"] = _Lines()
    return lines


def end_line() -> None:
    """Close the line of a stage before something else is printed."""
    if lines := _run().get("stages"):
        lines.end()


class _Lines:
    """Writes stages; a line stays open for its seconds, or until another line begins."""

    def __init__(self) -> None:
        self.open, self.file = "", sys.stderr  # which a stage may redirect

    def __call__(self, line: str) -> None:
        """See lora_fx.progress.Listener."""
        name, _, seconds = line.rpartition(": ")
        if not line.endswith("…") and name == self.open:
            self._write(f" {seconds}")
            self.open = ""
            return
        self.end()
        begins = line.endswith("…")
        self._write(visible(line), nl=not begins)
        self.open = line.removesuffix(" …") if begins else ""

    def end(self) -> None:
        """Close an open line."""
        if self.open:
            self._write("")
            self.open = ""

    def _write(self, text: str, *, nl: bool = True) -> None:
        with contextlib.suppress(OSError):  # as in `_write`
            click.echo(text, file=self.file, nl=nl)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function of (bytes done, bytes in all) that draws a bar on a terminal's stderr."""
    if _run().get("quiet") or not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1, file=sys.stderr, width=40) as bar:

        def show(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield show
