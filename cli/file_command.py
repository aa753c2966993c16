"""The class of commands on files: --json, --config, --report, --attest, and checks first."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import click

from lora_fx.cli.adapter_arguments import split_weight
from lora_fx.cli.config_file import config_options, saving_config
from lora_fx.cli.input_paths import MODELS, input_paths, texts_of
from lora_fx.cli.options import FORCE, NO_MEMORY_CHECK, Rules, given_here, in_groups
from lora_fx.cli.output import note, result
from lora_fx.cli.result_page import PageFile, check_page
from lora_fx.cli.statement import check_statement, write_statement
from lora_fx.errors import LoraFxError, one_line, refuse_no_say
from lora_fx.files.atomic import check_output
from lora_fx.files.read import trusting
from lora_fx.files.run_files import remember
from lora_fx.peak_memory import refusing
from lora_fx.progress import stage
from lora_fx.text import JsonView, is_whole

WRITTEN = ("output", "out", "report", "attest", "curve", "save_state", "resume", "save_runs",
    "save_config",
)  # fmt: skip
"""Options that name an output."""


Writers = Sequence[Callable[[JsonView], str]]
"""Functions that write a file on the JSON object of a result, and return its path."""


CHECKED = ("train", "export", "bench", "verify")
"""Commands that refuse a job for which the memory does not suffice."""
SHOWN = ("merge", "extract", "train")
"""Commands that draw a progress bar on a terminal, or print their steps."""


class FileCommand(click.Command):
    """A command with --json and --config that never overwrites its inputs."""

    reports: ClassVar = False
    """True if the command also has --report and --attest."""

    def __init__(self, *args: Any, no_say: Rules = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.no_say = no_say
        self.function_params = {param.name for param in self.params}
        json_help = "Print the result as one JSON object."
        self.params.append(click.Option(["--json", "as_json"], is_flag=True, help=json_help))
        self.params += config_options()
        if "force" not in self.function_params:
            self.params.append(click.Option(["--force"], is_flag=True, help=FORCE))
        if self.name in CHECKED:
            self.params.append(
                click.Option(["--no-memory-check"], is_flag=True, help=NO_MEMORY_CHECK)
            )
        if self.reports:
            page_help = "Write the result as an HTML page."
            self.params.append(click.Option(["--report"], metavar="PAGE.html", help=page_help))
            attest_help = "Write what was done and proven as a JSON statement, to be signed."
            self.params.append(click.Option(["--attest"], metavar="FILE.json", help=attest_help))

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; ~ becomes the home folder, and Hub models their folders in the cache.

        Shells do not expand the ~ of --option=~/file.
        """
        ctx.params = {name: _at_home(value) for name, value in ctx.params.items()}
        _check_numbers(ctx)
        refuse_no_say(self.no_say, ctx.params, given_here(ctx))
        remember(*input_paths(ctx.params))
        _check_outputs(ctx.params, inside=self.name != "merge-all")  # whose DIR is not replaced

        draws_a_bar = self.name in SHOWN and sys.stderr.isatty()
        work = contextlib.nullcontext() if draws_a_bar else stage(self.name or "working")
        limited = refusing(not ctx.params.get("no_memory_check"))
        with trusting(bool(ctx.params.get("trust"))), saving_config(ctx), limited, work:
            self._download_models(ctx.params)
            remember(*input_paths(ctx.params))  # the folders in the cache
            ctx.find_root().ensure_object(dict)["json"] = ctx.params.get("as_json")
            params = ctx.params
            ctx.params = {
                name: value for name, value in params.items() if name in self.function_params
            }
            writers = self._writers_of_result(params, ctx.params)
            if not writers:
                return super().invoke(ctx)
            return self._invoke_with(ctx, writers)

    def _writers_of_result(self, params: JsonView, given: JsonView) -> Writers:
        """The writers of --report and --attest, whose paths are checked now.

        Args:
            params: All options of the command.
            given: Those of its function, among which are its inputs.
        """
        writers: list[Callable[[JsonView], str]] = []
        force = bool(params.get("force"))
        if params.get("report") is not None:
            report = params["report"]
            may_replace = self.may_replace_page(params)
            check_page(report, may_replace, given)
            page_file = PageFile(report, may_replace)
            click.get_current_context().find_root().obj["page"] = page_file
            writers.append(page_file.write)
        if params.get("attest") is not None:
            check_statement(params["attest"], force, given)
            writers.append(functools.partial(write_statement, params["attest"], force))
        return writers

    def may_replace_page(self, params: JsonView) -> bool:
        """Whether a page that is there may be replaced.

        Args:
            params: All options of the command.
        """
        return bool(params.get("force"))

    def _invoke_with(self, ctx: click.Context, writers: Writers) -> object:
        """Run the command and write files on its result, or on an error with exit code 1.

        The page of a training that goes on says so, whatever ends the training.
        """
        run = ctx.find_root().obj
        run["writers"] = writers
        try:
            return super().invoke(ctx)
        except BaseException as stop:
            if isinstance(stop, LoraFxError) and stop.exit_code == 1 and not stop.told:
                whole = result(False, error=stop.message, hint=stop.hint)
                for write in writers:
                    write(whole)
            if "page" in run:
                run["page"].write_stopped(stop)
            raise

    def _download_models(self, params: dict[str, Any]) -> None:
        """Replace models and adapters of the Hub by their paths in the cache."""
        for name in MODELS:
            value = params.get(name)
            if isinstance(value, tuple):
                params[name] = tuple(self._local(text, weighted=True) for text in value)
            elif value:
                params[name] = self._local(value, weighted=False)

    def _local(self, text: str, *, weighted: bool) -> str:
        """The path in the cache for `hf:…`, with the weight after it; other texts stay."""
        if not text.startswith("hf:"):
            return text
        from lora_fx.files.hub import fetch
        from lora_fx.formats.registry import FORMATS

        model = text
        weight = 1.0
        if weighted:
            model, weight = split_weight(text)
        path, commit_note = fetch(
            model, weights=self.name != "targets", files=FORMATS.files_of_folders
        )
        note(commit_note)
        if model == text:
            return str(path)
        return f"{path}:{weight!r}"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in groups with titles, in columns of one width."""
        rows_by_title: dict[str, list[tuple[str, str]]] = {}
        width = 0
        for title, params in in_groups(self.get_params(ctx)).items():
            records = [param.get_help_record(ctx) for param in params]
            rows_by_title[title] = [record for record in records if record]
            widths = [len(names) for names, _ in rows_by_title[title]]
            width = max([width, *(names_width for names_width in widths if names_width <= 30)])

        for title, rows in rows_by_title.items():
            if rows:
                with formatter.section(title):
                    padded = [(names.ljust(width), text) for names, text in rows]
                    formatter.write_dl(padded, width)


def _check_numbers(ctx: click.Context) -> None:
    """Refuse an integer of more than 64 bits, which arrays and C libraries cannot hold."""
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        if is_whole(value) and not -(1 << 63) <= value < 1 << 63:
            message = f"{param.opts[-1]} {one_line(value, 40)} has more than 64 bits"
            raise LoraFxError(message, f"run {ctx.command_path} --help to see what it takes")


def _check_outputs(params: JsonView, *, inside: bool) -> None:
    """Refuse, before any work, equal outputs, or an output inside a folder that is replaced.

    Args:
        params: The arguments and options of the command.
        inside: True if an output folder is replaced as a whole.
    """
    outputs = {}
    for name in WRITTEN:
        if params.get(name) and "\0" not in params[name]:
            outputs[name] = params[name]
    paths = {name: Path(text).resolve() for name, text in outputs.items()}
    for first, second in combinations(paths, 2):
        if (first, second) == ("save_state", "resume"):
            continue
        first_option = f"--{first.replace('_', '-')} {params[first]}"
        second_option = f"--{second.replace('_', '-')} {params[second]}"
        if inside and first in ("output", "out") and paths[first] in paths[second].parents:
            raise LoraFxError(
                f"{second_option} is inside {first_option}", "choose a path outside it"
            )
        if paths[first] == paths[second]:
            raise LoraFxError(f"{second_option} is also {first_option}", "choose another name")

    downloads = any(text.startswith("hf:") for text in texts_of(params, MODELS))
    if inside and downloads and not params.get("force"):
        # now: gigabytes are downloaded before the other checks
        for name in {"output", "out"} & outputs.keys():
            check_output(outputs[name])


def _at_home(value: object) -> object:
    """A value in which a leading ~ is replaced by the home folder."""
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    if isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)
    return value


class ReportCommand(FileCommand):
    """A command that changes or checks a model, with --report and --attest.

    The path of the page is checked before the work starts. emit() passes the JSON object to the
    page, also after an error with exit code 1.
    """

    reports = True
