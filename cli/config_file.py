"""Reads and writes the options of a command as a table of a TOML file (--config, --save-config).

    [train]
    model = "model.py:build"
    rank = 16
    include = ["q_proj", "v_proj"]

Keys are the names of options and arguments, with - or _. The command line wins.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator

import click
from click.core import ParameterSource

from lora_fx.cli.options import GIVEN
from lora_fx.cli.output import note, say
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.run_files import remember
from lora_fx.files.strict_toml import read_toml
from lora_fx.text import Json, JsonView, is_number, is_whole, near, some

OWN = ("config", "save_config")


def config_options() -> list[click.Option]:
    """The options --config and --save-config, which every command has."""
    return [
        click.Option(
            ["--config"],
            metavar="FILE.toml",
            is_eager=True,  # what it says is there before a required option is missed
            callback=_read,
            help="Read options from a TOML file: the table named after this command.",
        ),
        click.Option(
            ["--save-config"],
            metavar="FILE.toml",
            help="Write the options of this run to a TOML file for --config.",
        ),
    ]


def _read(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Read a config file; its values replace defaults, and the command line wins."""
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
            raise LoraFxError(f"{path}: {key!r} is not in a table", f"write it below [{name}]")
        if key not in commands:
            hint = near(key, commands, "lora-fx --help lists the commands")
            raise LoraFxError(f"{path}: there is no command [{key}]", hint)
    if name not in tables:
        has = f"it has {some([f'[{t}]' for t in tables])}" if tables else "it is empty"
        raise LoraFxError(f"{path}: no table [{name}]", has)
    ctx.default_map = _checked(ctx, path, tables[name])
    return path


def _checked(ctx: click.Context, path: str, table: JsonView) -> Json:
    """The values of a table by parameter, each with the type of its option."""
    param_of: dict[str, click.Parameter] = {}
    for param in ctx.command.params:
        if param.name not in OWN:
            param_of.update(dict.fromkeys(_keys(param), param))

    values: Json = {}
    for key, value in table.items():
        where = f"{path}: [{ctx.info_name}] {key}"
        spelling = key.replace("_", "-")
        if spelling not in param_of or param_of[spelling].name is None:
            hint = near(spelling, param_of, f"{ctx.command_path} --help lists them")
            raise LoraFxError(f"{where}: no such option", hint)
        param = param_of[spelling]
        name = param.name or ""
        if name in values:
            raise LoraFxError(f"{where}: given twice", "leave one of them out")
        values[name] = _value(ctx, param, value, where)
    if values.get("trust"):
        note(f"{path} sets trust: pickled tensors are read, without running code from them")
    return values


def _keys(param: click.Parameter) -> list[str]:
    """The names that a parameter may have in a file; --save-config writes the first."""
    long = [option.removeprefix("--") for option in param.opts if option.startswith("--")]
    return long or [(param.name or "").replace("_", "-")]


def _value(ctx: click.Context, param: click.Parameter, value: object, where: str) -> object:
    """A value from a file in the form in which click takes a default."""
    takes_several = param.nargs == -1 or getattr(param, "multiple", False)
    kind, fits, example = _type(param)
    items = value if isinstance(value, list) and takes_several else [value]
    for item in items:
        if not fits(item):
            shown = one_line(json.dumps(value, default=str, ensure_ascii=False), 80)
            expected = f"{kind} or a list of them" if takes_several else kind
            raise LoraFxError(
                f"{where} = {shown}; expected {expected}",
                f"for example {_keys(param)[0]} = {example}",
            )
        try:
            param.type.convert(item, param, ctx)
        except click.BadParameter as error:
            choices = getattr(param.type, "choices", ())
            hint = near(str(item), choices, example)
            raise LoraFxError(f"{where}: {error.message}", hint) from error
    if takes_several:
        return list(items)
    return value


def _type(param: click.Parameter) -> tuple[str, Callable[[object], bool], str]:
    """The values that a parameter accepts: a description, a test and an example."""
    if getattr(param, "is_flag", False):
        return "true or false", lambda x: isinstance(x, bool), "true"
    if isinstance(param.type, type(click.INT)):
        return "a whole number", is_whole, "8"
    if isinstance(param.type, type(click.FLOAT)):
        return "a number", is_number, "0.5"
    return "a text", lambda x: isinstance(x, str), '"…"'


@contextlib.contextmanager
def saving_config(ctx: click.Context) -> Iterator[None]:
    """Write the file of --save-config after the block, unless the block refused its input."""
    path = ctx.params.get("save_config")
    force = bool(ctx.params.get("force"))
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
    except BaseException as error:
        is_answer = isinstance(error, click.exceptions.Exit) or getattr(error, "exit_code", 2) == 1
        refused = not is_answer
        raise
    finally:
        if not refused:
            with replacing(path, force=force) as temporary:
                temporary.write_text(text, encoding="utf-8")
            say(f"wrote {path}")


def config_text(ctx: click.Context) -> str:
    """The options of this run, as the text of a file for --config."""
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
    """A value in TOML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)  # inf and nan are other words in JSON
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if any("\ud800" <= character <= "\udfff" for character in text):
        hint = "rename the file, or leave --save-config out"
        raise LoraFxError(f"{text} is not UTF-8, and a .toml file is", hint)
    return text
