"""A command of files: with --json, --config and --report, and checks before any work."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import click

from lora_fx.cli.arguments import split_weight
from lora_fx.cli.config_file import config_options, saving_config
from lora_fx.cli.input_paths import MODELS, input_paths, texts_of
from lora_fx.cli.options import FORCE, Rules, given_here, in_groups
from lora_fx.cli.output import note, result
from lora_fx.cli.result_page import check_page, write_page
from lora_fx.errors import LoraFxError, one_line, refuse_no_say
from lora_fx.files.atomic import check_output
from lora_fx.files.read import remember, trusting
from lora_fx.progress import stage
from lora_fx.text import JsonView, is_whole

WRITTEN = ("output", "out", "report", "curve", "save_state", "resume", "save_config")
"""Options that name what is written."""


SHOWN = ("merge", "extract", "train")
"""Commands that draw a bar on a terminal, or print their steps."""


class FileCommand(click.Command):
    """A command with --json and --config, whose inputs are remembered.

    No output takes the place of an input.
    """

    reports: ClassVar = False
    """True where --report is an option too."""

    def __init__(self, *args: Any, no_say: Rules = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.no_say = no_say
        told = "Print one JSON object."
        self.params.append(click.Option(["--json", "as_json"], is_flag=True, help=told))
        self.params += config_options()
        self.own = {p.name for p in self.params} - {"config", "save_config", "as_json"}
        if "force" not in self.own:
            self.params.append(click.Option(["--force"], is_flag=True, help=FORCE))
        if self.reports:
            told = "Write the result as a page."
            self.params.append(click.Option(["--report"], metavar="PAGE.html", help=told))

    def invoke(self, ctx: click.Context) -> object:
        """Run it, with ~ as the home folder, and models of the Hub as their folders in the cache.

        Shells leave the ~ of --option=~/file as it is.
        """
        ctx.params = {k: _at_home(v) for k, v in ctx.params.items()}
        _check_numbers(ctx)
        refuse_no_say(self.no_say, ctx.params, given_here(ctx))
        remember(*input_paths(ctx.params))
        _check_outputs(ctx.params, inside=self.name != "merge-all")  # whose DIR is not replaced
        drawn = self.name in SHOWN and sys.stderr.isatty()
        work = contextlib.nullcontext() if drawn else stage(self.name or "working")
        with trusting(bool(ctx.params.get("trust"))), saving_config(ctx), work:
            for name, given in ((n, ctx.params.get(n)) for n in MODELS):
                if isinstance(given, tuple):
                    ctx.params[name] = tuple(self._local(text, True) for text in given)
                elif given:
                    ctx.params[name] = self._local(given, False)
            remember(*input_paths(ctx.params))  # the folders in the cache
            ctx.find_root().ensure_object(dict)["json"] = ctx.params.get("as_json")
            given, ctx.params = ctx.params, {k: v for k, v in ctx.params.items() if k in self.own}
            if (report := given.get("report")) is None:
                return super().invoke(ctx)
            check_page(report, given["force"], ctx.params)
            write = functools.partial(write_page, report, given["force"])
            ctx.find_root().obj["report"] = write
            try:
                return super().invoke(ctx)
            except LoraFxError as e:
                if e.exit_code == 1 and not e.told:
                    write(result(False, error=e.message, hint=e.hint))
                raise

    def _local(self, text: str, weighted: bool) -> str:
        """A path as it is; of `hf:…` the one in the cache, with the weight that stands behind."""
        if not text.startswith("hf:"):
            return text
        from lora_fx.files.hub import fetch
        from lora_fx.formats.registry import FORMATS

        model, weight = split_weight(text) if weighted else (text, 1.0)
        path, said = fetch(model, weights=self.name != "targets", files=FORMATS.files_of_folders)
        note(said)
        return str(path) if model == text else f"{path}:{weight!r}"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Below one title each, in columns of one width."""
        groups = in_groups(self.get_params(ctx))
        records = {t: [r for p in g if (r := p.get_help_record(ctx))] for t, g in groups.items()}
        wide = max(len(left) for rows in records.values() for left, _ in rows if len(left) <= 30)
        for title, rows in records.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(left.ljust(wide), text) for left, text in rows], wide)


def _check_numbers(ctx: click.Context) -> None:
    """Refuse a whole number that no array and no library of C holds."""
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        if is_whole(value) and not -(1 << 63) <= value < 1 << 63:
            told = f"{param.opts[-1]} {one_line(value, 40)} has more than 64 bits"
            raise LoraFxError(told, f"{ctx.command_path} --help says what it is")


def _check_outputs(given: JsonView, *, inside: bool) -> None:
    """Refuse, before any work, two outputs that are one, or one inside what is replaced whole."""
    named = {n: given[n] for n in WRITTEN if given.get(n) and "\0" not in given[n]}
    paths = {name: Path(text).resolve() for name, text in named.items()}
    for a, b in combinations(paths, 2):
        within = inside and a in ("output", "out") and paths[a] in paths[b].parents
        if (within or paths[a] == paths[b]) and (a, b) != ("save_state", "resume"):
            options = (f"--{n.replace('_', '-')} {given[n]}" for n in (b, a))
            told = (" lies in " if within else " is also ").join(options)
            raise LoraFxError(told, "choose a name beside it" if within else "choose another name")
    if inside and not given.get("force") and any(t[:3] == "hf:" for t in texts_of(given, MODELS)):
        for output in {"output", "out"} & named.keys():  # gigabytes are downloaded before the rest
            check_output(named[output])


def _at_home(value: object) -> object:
    """A value of an argument or option with ~ as the home folder, where it begins a path."""
    if isinstance(value, tuple):
        return tuple(_at_home(v) for v in value)
    return os.path.expanduser(value) if isinstance(value, str) and value[:1] == "~" else value


class ReportCommand(FileCommand):
    """A command that changes or judges a model, with --report.

    The path is checked before the work starts; emit() hands over the JSON object, whatever its
    answer, and an answer that is an error with exit code 1 makes a page too.
    """

    reports = True
