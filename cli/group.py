"""The group of all commands."""

from __future__ import annotations

import copy
import os
import time
from importlib import import_module

import click

from lora_fx import __version__
from lora_fx.cli.distribution import WHOLE, Distribution, running
from lora_fx.cli.library_versions import installed, two_runtimes
from lora_fx.cli.output import say, stages
from lora_fx.errors import LoraFxError
from lora_fx.progress import telling
from lora_fx.text import near

COMMANDS = {
    "targets": "List the weights that an adapter can attach to.",
    "insert": "Insert untrained low-rank branches.",
    "train": "Train an adapter on data, and save only the adapter.",
    "merge": "Fold adapters into the weights of a checkpoint or .onnx file.",
    "merge-all": "Merge each of many adapters into the same base.",
    "export": "Write an ONNX file, merged or with adapters to choose from.",
    "extract": "Extract an adapter from two checkpoints.",
    "truncate": "Reduce the ranks of an adapter, with an exact error.",
    "plan": "Choose a rank for every target under one budget.",
    "convert": "Convert an adapter between file formats.",
    "verify": "Compare two models, or check one file or an adapter.",
    "probe": "Make an adapter's probe, and ask a server for it.",
    "doctor": "Report every problem of a base and an adapter.",
    "bench": "Time ONNX files in turn.",
    "demo": "Train, fold, export and check on a real model and data.",
}

PLUGINS = ("onnxruntime-ep-cuda12", "onnxruntime-ep-cuda13", "onnxruntime-ep-webgpu")
"""Packages with providers of ONNX Runtime."""


class LazyGroup(click.Group):
    """A group that imports a command only when it runs; --help of the group imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands, in the order in which they are used."""
        return [name for name in COMMANDS if running.get().has(name)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"lora_fx.cli.{cmd_name.replace('-', '_')}").command
        command = copy.copy(command)  # its help is of this run
        text = running.get().spelled(command.help or "")
        command.help = text.replace("\\b", "\b")  # click's keep-lines mark
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one line for each command, without importing it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest command for an unknown name."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            names = self.list_commands(ctx)
            hint = near(args[0], names, "run lora-fx --help to list them", cutoff=0.6)
            raise LoraFxError(f"unknown command {args[0]!r}", hint)
        distribution = running.get()
        if args and not args[0].startswith("-") and not distribution.has(args[0]):
            raise LoraFxError(
                f"{distribution.name} has no command {args[0]}",
                f"pip install lora-fx, and run lora-fx {args[0]}",
            )
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        return
    click.echo(f"{running.get().name} {__version__}")
    if running.get() is not WHOLE:
        ctx.exit()
    libraries = installed("torch", "onnx", "onnxruntime-gpu", "onnxruntime", *PLUGINS)
    for name, number in libraries.items():
        click.echo(f"{name} {number}")
    if "onnxruntime" in libraries or "onnxruntime-gpu" in libraries:
        from lora_fx.onnx.session import providers
        from lora_fx.onnx.unverified import NEVER_RUN

        click.echo(f"never run on a GPU: {', '.join(NEVER_RUN)}")
        click.echo(f"providers {', '.join(providers())}")
    warning = two_runtimes()
    if warning:
        say(warning)
    ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    },
    help=WHOLE.summary,
    epilog=WHOLE.epilog,
)
@click.option("-v", "--verbose", is_flag=True, help="Print tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Print no notes and no progress.")
@click.option(
    "--version",
    is_flag=True,
    callback=_version,
    expose_value=False,
    is_eager=True,
    help="Print the versions of lora-fx, torch, onnx and ONNX Runtime, and its providers.",
)
@click.pass_context
def group(ctx: click.Context, verbose: bool, quiet: bool) -> None:
    """The group; COMMANDS lists its commands."""
    began = {"when": time.time(), "seconds": time.monotonic()}
    run = {"quiet": quiet, "began": began, "notes": [], "warned": set()}
    ctx.obj = {**(ctx.obj or {}), **run}  # main's, which has argv
    # Of several processes (torchrun, accelerate) the first alone prints, before torch is there too.
    is_first_process = os.environ.get("RANK", "0") == "0"
    ctx.with_resource(telling(stages() if is_first_process else None))


def group_of(distribution: Distribution) -> click.Group:
    """Return the group of the commands that a distribution has, with its texts of --help."""
    shown = copy.copy(group)
    shown.help = distribution.summary
    shown.epilog = distribution.epilog
    return shown
