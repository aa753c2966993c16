"""One run of the command line: every way out of it has its message and its exit code."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from lora_fx.cli.group import COMMANDS, group
from lora_fx.cli.output import echo, result, show
from lora_fx.cli.streams import open_streams
from lora_fx.cli.termination import stopping
from lora_fx.errors import LoraFxError, Terminated, explain, one_line
from lora_fx.files.atomic import sweep
from lora_fx.files.read import Remembered, remembering
from lora_fx.text import near


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; every way out has its exit code."""
    open_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    everywhere = [a for a in argv if a in ("-v", "--verbose", "-q", "--quiet")]
    given = {"argv": argv}
    argv = everywhere + [a for a in argv if a not in everywhere]
    files = Remembered()
    try:
        with stopping(), remembering() as files:
            code = group.main(argv, prog_name="lora-fx", standalone_mode=False, obj=given)
        sys.exit(code if isinstance(code, int) else 0)
    except LoraFxError as e:
        _fail(e, argv, files)
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message())
        sys.exit(2)
    except click.ClickException as e:
        ctx = e.ctx if isinstance(e, click.UsageError) else None
        hint = f"{ctx.command_path if ctx else 'lora-fx'} --help"
        if choices := getattr(getattr(getattr(e, "param", None), "type", None), "choices", None):
            hint = near((e.message.split("'") * 2)[1], choices, hint)
        _fail(LoraFxError(e.format_message(), hint), argv, files)
    except (KeyboardInterrupt, click.Abort) as e:
        for target in files.outputs:
            sweep(target)
        ended = isinstance(e, Terminated) or isinstance(e.__cause__, Terminated)
        what = "terminated" if ended else "interrupted"
        left = getattr(e, "left", None) or getattr(e.__cause__, "left", None)
        if (written := files.written) and not left:
            left = f"{', '.join(map(str, written))} was written"
        echo(f"{what}; {left or 'nothing was left behind'}", err=True)
        sys.exit(143 if ended else 130)
    except BrokenPipeError:
        sys.exit(0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except MemoryError as e:
        _fail(LoraFxError(f"out of memory: {one_line(e)}", "a smaller model or batch"), argv, files)
    except Exception as e:
        cause: BaseException | None = e  # onnx_ir wraps what the system said
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__
        if cause is None:
            hint = "this is not a mistake of yours: please report it with the output of -v"
            error = LoraFxError(f"{type(e).__name__}: {one_line(e)}", hint)
        else:
            error = explain(cause, cause.filename or "standard output, or a file")
        error.__cause__ = e
        _fail(error, argv, files)


def _fail(error: LoraFxError, argv: Sequence[str], files: Remembered) -> NoReturn:
    """End with an error; one that comes after an output has its name says so, by exit code 1."""
    if error.exit_code == 2 and (written := files.written):
        told = f"{', '.join(map(str, written))} was written; then: {error.message}"
        before, error = error, LoraFxError(told, error.hint, exit_code=1)
        error.told, error.__cause__ = before.told, before
    if "-v" in argv or "--verbose" in argv:
        with contextlib.suppress(OSError):
            traceback.print_exception(error, file=sys.stderr)
    echo(f"Error: {one_line(error.message, 1000)}", err=True, red=True)
    if error.hint:
        echo(f"Hint: {one_line(error.hint, 1000)}", err=True)
    if "--json" in argv and not error.told:
        command = next((a for a in argv if a in COMMANDS), "")
        with contextlib.suppress(LoraFxError):  # stdout may be what is full
            show(result(False, command=command, error=error.message, hint=error.hint))
    sys.exit(error.exit_code)
