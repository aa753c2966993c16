"""Runs the command line; every way to end has its message and exit code."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from lora_fx.cli.distribution import WHOLE, Distribution, running
from lora_fx.cli.group import COMMANDS, group_of
from lora_fx.cli.output import echo, result, show
from lora_fx.cli.process_end import end_quickly
from lora_fx.cli.streams import open_streams
from lora_fx.cli.termination import stopping
from lora_fx.errors import LoraFxError, Terminated, explain, one_line
from lora_fx.files.leftovers import sweep
from lora_fx.files.run_files import Remembered, remembering
from lora_fx.progress import collecting_less
from lora_fx.text import near


def main(argv: Sequence[str] | None = None, distribution: Distribution = WHOLE) -> None:
    """Run the command line and exit with its code.

    Args:
        argv: The words of a program that goes on afterwards; None for those of this process.
        distribution: Whose command line runs.
    """
    open_streams()
    running.set(distribution)
    if argv is None:
        end_quickly()
    words = list(sys.argv[1:] if argv is None else argv)
    flags_of_group = [word for word in words if word in ("-v", "--verbose", "-q", "--quiet")]
    argv = flags_of_group + [word for word in words if word not in flags_of_group]
    files = Remembered()
    try:
        with stopping(), collecting_less(), remembering() as files:
            code = group_of(distribution).main(
                argv, prog_name=distribution.name, standalone_mode=False, obj={"argv": words}
            )
        sys.exit(code if isinstance(code, int) else 0)
    except LoraFxError as error:
        _fail(error, argv, files)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(LoraFxError(error.format_message(), _hint_of(error)), argv, files)
    except (KeyboardInterrupt, click.Abort) as error:
        _end_interrupted(error, files)
    except BrokenPipeError:
        sys.exit(0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except MemoryError as error:
        message = f"out of memory: {one_line(error)}"
        _fail(LoraFxError(message, "use a smaller model or batch"), argv, files)
    except Exception as error:
        _fail(_explained(error), argv, files)


def _hint_of(error: click.ClickException) -> str:
    """The hint for a mistake in the command line: the nearest choice, or --help."""
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"{ctx.command_path if ctx else 'lora-fx'} --help"
    param_type = getattr(getattr(error, "param", None), "type", None)
    choices = getattr(param_type, "choices", None)
    if not choices:
        return hint
    pieces = error.message.split("'") * 2  # the value stands between the first two quotes
    return near(pieces[1], choices, hint)


def _end_interrupted(error: BaseException, files: Remembered) -> NoReturn:
    """End after Ctrl-C or SIGTERM, and print which files remain."""
    for target in files.outputs:
        sweep(target)
    was_terminated = isinstance(error, Terminated) or isinstance(error.__cause__, Terminated)
    left_behind = getattr(error, "left", None) or getattr(error.__cause__, "left", None)
    written = files.written
    if written and not left_behind:
        left_behind = f"{', '.join(map(str, written))} was written"
    ending = "terminated" if was_terminated else "interrupted"
    echo(f"{ending}; {left_behind or 'nothing was left behind'}", err=True)
    sys.exit(143 if was_terminated else 130)


def _explained(error: Exception) -> LoraFxError:
    """Explain an unexpected error: the system's message, or a request to report it."""
    cause: BaseException | None = error  # onnx_ir wraps what the system said
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    if cause is None:
        hint = "report this with the output of -v: it is a mistake of lora-fx"
        explained = LoraFxError(f"{type(error).__name__}: {one_line(error)}", hint)
    else:
        explained = explain(cause, cause.filename or "standard output, or a file")
    explained.__cause__ = error
    return explained


def _fail(error: LoraFxError, argv: Sequence[str], files: Remembered) -> NoReturn:
    """End with an error; if an output is already written, name it and exit with code 1."""
    written = files.written
    if error.exit_code == 2 and written:
        message = f"{', '.join(map(str, written))} was written; then: {error.message}"
        after_output = LoraFxError(message, error.hint, exit_code=1)
        after_output.told = error.told
        after_output.__cause__ = error
        error = after_output
    if "-v" in argv or "--verbose" in argv:
        with contextlib.suppress(OSError):
            traceback.print_exception(error, file=sys.stderr)
    echo(f"Error: {one_line(error.message, 1000)}", err=True, red=True)
    if error.hint:
        echo(f"Hint: {one_line(error.hint, 1000)}", err=True)
    if "--json" in argv and not error.told:
        command = next((word for word in argv if word in COMMANDS), "")
        with contextlib.suppress(LoraFxError):  # stdout may be what is full
            show(result(False, command=command, error=error.message, hint=error.hint))
    sys.exit(error.exit_code)
