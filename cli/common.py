"""The command group, and what every command shares: errors, configs, exit codes, pages."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from itertools import combinations
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

import click
from click.core import ParameterSource

from lora_fx import __version__
from lora_fx.cli.arguments import split_weight
from lora_fx.cli.options import FORCE, GIVEN, Rules, given_here, in_groups
from lora_fx.cli.output import echo, note, result, say, show, stages
from lora_fx.errors import LoraFxError, Terminated, explain, one_line, refuse_no_say
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.leftovers import sweep
from lora_fx.files.read import trusting
from lora_fx.files.run_files import Remembered, remember, remembering
from lora_fx.files.strict_toml import read_toml
from lora_fx.progress import stage, telling
from lora_fx.text import Json, JsonView, is_number, is_whole, near, some

COMMANDS = {
    "targets": "List what an adapter can attach to, and why the rest cannot.",
    "insert": "Insert untrained branches.",
    "train": "Insert, train, keep the best, and save only the adapter.",
    "merge": "Fold adapters into the weights of a checkpoint or .onnx file.",
    "merge-all": "Merge every adapter of a fleet by itself.",
    "export": "Write an ONNX file: merged, or with adapters to choose from.",
    "extract": "Recover an adapter from two checkpoints, by SVD.",
    "truncate": "Fewer ranks, with the exact error that it costs.",
    "plan": "A rank for every target, under one budget.",
    "convert": "Convert an adapter between file formats.",
    "verify": "Compare two models, or tensor files; or: does an adapter fit?",
    "doctor": "Say what is wrong with a base and an adapter.",
    "bench": "Time ONNX files in turn, and print the ratios.",
    "demo": "All of it, end to end, on a real model and real data.",
}


MODELS = ("model", "base", "tuned", "adapter", "adapters", "a", "b", "weights")
"""Arguments and options that can name a model or an adapter of the Hub."""
NAMED = (*MODELS, "data", "inputs_file", "names", "old_names", "plan", "eval_data")
"""Arguments and options that can name a file. Not every word that is one's name is meant so."""
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
            _check_page(report, given["force"], ctx.params)
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


def input_paths(given: JsonView) -> list[Path]:
    """The files that were given: weights, and the function of `file.py:name`, cut off."""
    found: list[Path] = []
    for text in texts_of(given, NAMED):
        if "\0" not in text and len(text) <= 4096:
            paths = (Path(text), Path(text.rpartition(":")[0]))
            found += [p for p in paths if p.name and p.exists()][:1]
    return list(dict.fromkeys(found))


def texts_of(given: JsonView, names: Sequence[str]) -> Iterator[str]:
    """The texts that these arguments and options were given, one or several each."""
    for value in (given[n] for n in names if n in given):
        for text in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(text, str) and text:
                yield text


# --report PAGE.html: the result of a command as one HTML file, beside what it prints.


LIBRARIES = ("torch", "numpy", "safetensors", "onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime")
FILES = 100
"""The most files of a folder that are hashed."""


class ReportCommand(FileCommand):
    """A command that changes or judges a model, with --report.

    The path is checked before the work starts; emit() hands over the JSON object, whatever its
    answer, and an answer that is an error with exit code 1 makes a page too.
    """

    reports = True


def _check_page(report: str, force: bool, given: JsonView) -> None:
    """Refuse, before any work, a page that cannot be written or that would be something else."""
    if not report.endswith((".html", ".htm")):
        raise LoraFxError(f"--report {report} does not end in .html", "--report page.html")
    if Path(report).resolve() in [path.resolve() for path in input_paths(given)]:
        raise LoraFxError(f"--report {report} is also an input", "choose another name")
    check_output(report, force=force)
    if Path(report).is_dir():
        raise LoraFxError(f"--report {report} is a folder", "choose another name")


def write_page(path: str, force: bool, shown: JsonView) -> str:
    """Write the page of a result, all of it or nothing; its path."""
    from lora_fx.report.page import page

    ctx = click.get_current_context()
    run = ctx.find_root().obj
    added: Json = {"argv": run.get("argv") or [], "versions": versions(), **when(run["began"])}
    added["notes"] = [text for text in run["notes"] if text not in run["warned"]]
    outputs = [Path(p) for p in shown["outputs"]]
    source = [p for p in input_paths(ctx.params) if p not in outputs]
    added |= _hashed([("input", p) for p in source] + [("output", p) for p in outputs], path)
    added["adapters"], said = _adapters(outputs, ctx.params)
    added["unhashed"] += said
    _once(added["adapters"], shown)
    text = page({**shown, "page": added})
    with replacing(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _once(adapters: list[Json], told: JsonView) -> None:
    """Take out of the adapters' rows what the result's own row of the same key says."""
    own = told.get("targets")
    rows = {t["key"]: t for t in own} if isinstance(own, list) else {}
    for adapter in adapters:
        for i, row in enumerate(adapter["updates"]):
            same = rows.get(row["key"], {})
            kept = {k: v for k, v in row.items() if k == "key" or k not in same or same[k] != v}
            adapter["updates"][i] = kept


def when(began: dict[str, float]) -> Json:
    """When the command began, in local time, how many seconds it took, and on which machine."""
    start = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(began["when"]))
    seconds = time.monotonic() - began["seconds"]
    return {"when": start, "seconds": round(seconds, 1), "host": platform.node()}


def versions() -> dict[str, str]:
    """{library: version} of those that are installed; nothing is imported."""
    found = {"lora-fx": __version__, "python": platform.python_version(), **installed(*LIBRARIES)}
    return {**found, "platform": platform.platform(terse=True)}


def _hashed(paths: list[tuple[str, Path]], page: str) -> Json:
    """Rows of files with their hashes; of a folder the files in it, hidden ones left out."""
    rows: list[Json] = []
    said: list[str] = []
    seen: set[Path] = set()
    for of, path in paths:
        files = sorted(f for f in path.iterdir() if f.name[0] != ".") if path.is_dir() else [path]
        plain = [f for f in files if f.is_file() and f.resolve() != Path(page).resolve()]
        for file in plain[:FILES]:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                with file.open("rb") as f:
                    digest = hashlib.file_digest(f, "sha256").hexdigest()
                size = file.stat().st_size
            except OSError as e:
                said.append(f"{file}: not hashed: {e.strerror or e}")
                continue
            rows.append({"of": of, "path": str(file), "bytes": size, "sha256": digest})
        if len(plain) > FILES:
            said.append(f"{path}: {len(plain) - FILES} more files are not hashed")
    return {"files": rows, "unhashed": said}


def _adapters(outputs: list[Path], given: JsonView) -> tuple[list[Json], list[str]]:
    """The adapters that were written, or else those that were given, with their spectra."""
    found, said = [], []
    base = given.get("base")
    base = base if base and not str(base).endswith(".onnx") else None
    asked = map(split_weight, texts_of(given, ("adapter", "adapters", "b")))
    for path, weight in _loadable((str(p), 1.0) for p in outputs) or _loadable(asked):
        from lora_fx.adapter.truncate import summary
        from lora_fx.formats.io import load_adapter

        try:
            loaded = load_adapter(path, base=base)
            rows = summary(loaded.weighted(weight))
        except LoraFxError as e:
            said.append(f"{path}: no spectra: {e.message}")
            continue
        found.append({"path": path, "weight": weight, "updates": rows})
    return found, said


def _loadable(paths: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    from lora_fx.formats.io import is_adapter

    plain = ((p, w) for p, w in paths if not p.endswith((".onnx", ".pt2", ".data")))
    return [(path, weight) for path, weight in plain if is_adapter(path)]


# --config FILE and --save-config FILE: what a command is given, as a table of a TOML file.
#
#     [train]
#     model = "model.py:build"
#     rank = 16
#     include = ["q_proj", "v_proj"]
#
# Keys are the names of options and arguments, with - or _. The command line wins.


OWN = ("config", "save_config")


def config_options() -> list[click.Option]:
    """Options of every command."""
    return [
        click.Option(
            ["--config"],
            metavar="FILE.toml",
            is_eager=True,  # what it says is there before a required option is missed
            callback=_read,
            help="What stands in its table of this command.",
        ),
        click.Option(["--save-config"], metavar="FILE.toml", help="Write what --config reads."),
    ]


def _read(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Make the table of a config file what the command has where its line says nothing."""
    if path is None:
        return None
    path = os.path.expanduser(path)
    remember(path)
    name = ctx.info_name or ""
    tables = read_toml(path, f"[{name}], and lines such as rank = 8")
    assert ctx.parent is not None and isinstance(ctx.parent.command, click.Group)
    commands = ctx.parent.command.list_commands(ctx)
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise LoraFxError(f"{path}: {key!r} stands in no table", f"put it below [{name}]")
        if key not in commands:
            hint = near(key, commands, "lora-fx --help lists the commands")
            raise LoraFxError(f"{path}: [{key}] is no command", hint)
    if name not in tables:
        has = f"it has {some([f'[{t}]' for t in tables])}" if tables else "it is empty"
        raise LoraFxError(f"{path}: no table [{name}]", has)
    ctx.default_map = _checked(ctx, path, tables[name])
    return path


def _checked(ctx: click.Context, path: str, table: JsonView) -> Json:
    """{parameter: value} of a table, each of the type of its option."""
    known = {key: p for p in ctx.command.params if p.name not in OWN for key in _keys(p)}
    found: Json = {}
    for key, value in table.items():
        where = f"{path}: [{ctx.info_name}] {key}"
        param = known.get(key.replace("_", "-"))
        if param is None or param.name is None:
            hint = near(key.replace("_", "-"), known, f"{ctx.command_path} --help lists them")
            raise LoraFxError(f"{where}: no such option", hint)
        if param.name in found:
            raise LoraFxError(f"{where}: given twice", "leave one of them out")
        found[param.name] = _value(ctx, param, value, where)
    if found.get("trust"):
        note(f"{path} says trust: pickles are read, by torch's unpickler that runs no code")
    return found


def _keys(param: click.Parameter) -> list[str]:
    """The names that a parameter has in a file; the first is the one that is written."""
    long = [o.removeprefix("--") for o in param.opts if o.startswith("--")]
    return long or [(param.name or "").replace("_", "-")]


def _value(ctx: click.Context, param: click.Parameter, value: object, where: str) -> object:
    """A value of a file as click takes it from a default."""
    many = param.nargs == -1 or getattr(param, "multiple", False)
    kind, fits, example = _type(param)
    whole = value if isinstance(value, list) and many else [value]
    for part in whole:
        if not fits(part):
            said = one_line(json.dumps(value, default=str, ensure_ascii=False), 80)
            raise LoraFxError(
                f"{where} = {said}; expected {kind}{' or a list of them' if many else ''}",
                f"for example {_keys(param)[0]} = {example}",
            )
        try:
            param.type.convert(part, param, ctx)
        except click.BadParameter as e:
            choices = getattr(param.type, "choices", ())
            raise LoraFxError(f"{where}: {e.message}", near(str(part), choices, example)) from e
    return list(whole) if many else value


def _type(param: click.Parameter) -> tuple[str, Callable[[object], bool], str]:
    """What a value of a parameter has to be: in words, as a test, and an example."""
    if getattr(param, "is_flag", False):
        return "true or false", lambda x: isinstance(x, bool), "true"
    if isinstance(param.type, type(click.INT)):
        return "a whole number", is_whole, "8"
    if isinstance(param.type, type(click.FLOAT)):
        return "a number", is_number, "0.5"
    return "a text", lambda x: isinstance(x, str), '"…"'


@contextlib.contextmanager
def saving_config(ctx: click.Context) -> Iterator[None]:
    """A block at whose end the config of --save-config is written, unless it refused its input."""
    path, force = ctx.params.get("save_config"), bool(ctx.params.get("force"))
    if not path or os.environ.get("RANK", "0") != "0":  # the first of several processes writes it
        yield
        return
    if not path.endswith(".toml"):
        raise LoraFxError(f"--save-config {path} does not end in .toml", "--save-config run.toml")
    check_output(path, force=force)
    text = config_text(ctx)
    refused = False
    try:
        yield
    except BaseException as e:
        answer = isinstance(e, click.exceptions.Exit) or getattr(e, "exit_code", 2) == 1
        refused = not answer
        raise
    finally:
        if not refused:
            with replacing(path, force=force) as temporary:
                temporary.write_text(text, encoding="utf-8")
            say(f"wrote {path}")


def config_text(ctx: click.Context) -> str:
    """What the command was given, as a file that --config reads."""
    lines = [f"# lora-fx {ctx.info_name} --config FILE", f"[{ctx.info_name}]"]
    for param in ctx.command.params:
        name = param.name or ""
        source = ctx.get_parameter_source(name)
        if name in OWN or source not in (*GIVEN, ParameterSource.ENVIRONMENT):
            continue
        value = ctx.params[name]
        if value is None or value == ():
            continue
        lines.append(f"{_keys(param)[0]} = {_toml(value)}")
    return "\n".join([*lines, ""])


def _toml(value: object) -> str:
    """A value as TOML has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)  # inf and nan are other words in JSON
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if any("\ud800" <= c <= "\udfff" for c in text):
        hint = "rename the file, or leave --save-config out"
        raise LoraFxError(f"{text} is not UTF-8, and a .toml file is", hint)
    return text


# The group of all commands, and every way out of it.


class LazyGroup(click.Group):
    """Commands are imported when they run; the list and its help lines need none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names in the order of the work, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command's file."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"lora_fx.cli.{cmd_name.replace('-', '_')}").command
        command.help = (command.help or "").replace("\\b", "\b")  # click's keep-lines mark
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line each, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest command for a name that is none."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = near(args[0], COMMANDS, "lora-fx --help lists them", cutoff=0.6)
            raise LoraFxError(f"no command {args[0]!r}", hint)
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        return
    click.echo(f"lora-fx {__version__}")
    found = installed("torch", "onnx", "onnxruntime-gpu", "onnxruntime")
    for name, number in found.items():
        click.echo(f"{name} {number}")
    if "onnxruntime" in found or "onnxruntime-gpu" in found:
        from lora_fx.onnx.session import providers

        click.echo(f"providers {', '.join(providers())}")
    if both := two_runtimes():
        say(both)
    ctx.exit()


def installed(*names: str) -> dict[str, str]:
    """{library: version} of those that are installed; nothing is imported."""
    from importlib import metadata

    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def two_runtimes() -> str:
    """A warning when onnxruntime and onnxruntime-gpu are both installed, else an empty text."""
    found = installed("onnxruntime", "onnxruntime-gpu")
    if len(found) < 2:
        return ""
    both = " and ".join(f"{name} {number}" for name, number in found.items())
    return (
        f"warning: {both} are both installed and overwrite each other's files; "
        "uninstall both, then install one"
    )


@click.group(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    },
    help="Insert, train, fold and export low-rank adapters by rewriting a model's graph; merge "
    "them into checkpoint files, extract them from two, and convert them, tensor by tensor.",
    epilog="MODEL is a Hugging Face folder, hf:ORG/NAME[@REVISION] of the Hub, a .safetensors, "
    ".onnx or .pt2 file, package.module:factory, file.py:factory, timm:NAME or torchvision:NAME. "
    "See docs/ for one page a command.",
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
    """Every command is in COMMANDS."""
    began = {"when": time.time(), "seconds": time.monotonic()}
    run = {"quiet": quiet, "began": began, "notes": [], "warned": set()}
    ctx.obj = {**(ctx.obj or {}), **run}  # main's, which has argv
    # Of several processes (torchrun, accelerate) the first alone prints, before torch is there too.
    ctx.with_resource(telling(stages() if os.environ.get("RANK", "0") == "0" else None))


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


def open_streams() -> None:
    """Open the standard streams that are closed, as `2>&-` leaves them, on the null device.

    Python has None in their place, which libraries print to; and the next file that is opened
    would get their number, so that what a library of C writes to stderr would land in it.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    with contextlib.suppress(OSError):  # a machine without a null device keeps them closed
        descriptor = os.open(os.devnull, os.O_RDWR)
        while descriptor <= 2:
            descriptor = os.dup(descriptor)
        os.close(descriptor)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


# SIGTERM as Ctrl-C: what a command was writing is removed on the way out.


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Within this block SIGTERM raises Terminated, once; then it is ignored until the end.

    Does nothing outside the main thread, where no handler can be set, and where SIGTERM already
    has another handler or is ignored. A forked process ends as it would without this.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    mine = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would stop the clean-up
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
