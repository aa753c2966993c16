"""Options: how a command declares them, alone and in groups, and where --help lists them.

A group is a frozen dataclass whose fields are options. A command takes it as one argument:

    @dataclass(frozen=True, kw_only=True)
    class Limits:
        rank: int = option("--rank", "-r", type=int, default=8, help="Rank of every target.")
        lossy: bool = flag("--lossy", "Accept a loss.")

    @click.command("cut")
    @option_group("limits", Limits)
    def command(limits: Limits) -> None: ...

model_options.py, branch_options.py, train_options.py and merge_options.py have the groups that
commands share, or that become an object of a verb; others stand in the file of their command.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from typing import Any

import click
from click.core import ParameterSource

from lora_fx.cli.output import note
from lora_fx.errors import LoraFxError, NoSay
from lora_fx.fx.train.run_defaults import CAUSAL, OTHERS
from lora_fx.spellings import under_either_name
from lora_fx.text import JsonView

FROM_1 = click.IntRange(1, 2**31 - 1)
THREADS = click.IntRange(0, 2**10)
"""Of ONNX Runtime; 0 leaves the number to it."""
FORCE = "Replace an output that exists."

Command = Callable[..., object]
"""What click makes a command of."""
Decorator = Callable[[Command], Command]
"""What adds options to a command."""


def option(*names: str, **settings: Any) -> Any:
    """A field of a group: the option that `click.option` makes of the same words.

    The parameter is called as the field. The field has the option's default, or None.
    """
    return _declared(settings.get("default"), names, settings)


def flag(name: str, text: str) -> Any:
    """A field of a group: an option without a value. The field is a bool."""
    return _declared(False, (name,), {"is_flag": True, "help": text})


def repeatable(name: str, metavar: str, text: str) -> Any:
    """A field of a group: an option that may be given several times. The field is a tuple."""
    return _declared((), (name,), {"metavar": metavar, "multiple": True, "help": text})


def selectors(name: str, text: str) -> Any:
    """A field of a group: a repeatable option of selectors. The field is None without them."""
    return option(
        name,
        metavar="SELECTORS",
        multiple=True,
        callback=lambda ctx, param, value: value or None,
        help=text,
    )


def label_option(text: str) -> Any:
    """A field of a group: the column of labels. Without it the usual names are looked for."""
    return option(
        "--label", default="", show_default=False, metavar="COL", help=f"{text}  [default: labels]"
    )


def loss_option() -> Any:
    """A field of a group: what is computed of outputs and labels."""
    return option("--loss", default="ce", help="ce, mse or module:function.")


def max_length_option() -> Any:
    """A field of a group: how many tokens of a text are read."""
    return count_option("--max-length", f"Tokens of a text.  {run_default('longest')}")


def run_default(name: str) -> str:
    """The text of a default that folders of causal language models have otherwise."""
    number = getattr(OTHERS, name)
    return f"[default: {number:g}; {getattr(CAUSAL, name):g} for causal language models]"


def quantise_option() -> Any:
    """A field of a group: the weights of the base that become codes."""
    return repeatable(
        "--quantise",
        "KIND[=SELECTORS]",
        "Store the base's weights as nf4, int4 or int8; of the default plan, or those named.",
    )


def seed_option(text: str) -> Any:
    """A field of a group: a seed that torch and numpy both take."""
    return option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help=text)


def count_option(name: str, text: str, default: int | None = None) -> Any:
    """A field of a group: a whole number from 1 on."""
    return option(name, type=FROM_1, metavar="N", default=default, help=text)


def _declared(default: object, names: Sequence[str], settings: dict[str, Any]) -> Any:
    return field(default=default, metadata={"names": names, "settings": settings})


def option_group(argument: str, group: type[Any]) -> Decorator:
    """Add the options of a group to a command.

    Args:
        argument: The argument of the command that takes the group.
        group: A frozen dataclass whose fields are declared by the functions above.
    """

    def add(command: Command) -> Command:
        names = names_of(group)

        @functools.wraps(command)
        def grouping(**parameters: object) -> object:
            in_group = {name: value for name, value in parameters.items() if name in names}
            others = {name: value for name, value in parameters.items() if name not in names}
            return command(**others, **{argument: group(**in_group)})

        decorated: Command = grouping
        for declared in reversed(fields(group)):  # click lists the last decorator first
            spellings, settings = declared.metadata["names"], declared.metadata["settings"]
            decorated = click.option(*spellings, declared.name, **settings)(decorated)
        return decorated

    return add


def names_of(group: type[Any]) -> tuple[str, ...]:
    """The names of the options of a group, as parameters."""
    return tuple(declared.name for declared in fields(group))


def output_option(metavar: str, text: str) -> Decorator:
    """The option of the file or folder that a command writes."""
    return click.option("-o", "--output", required=True, metavar=metavar, help=text)


TRUST = "Read pickles (.bin), by torch's unpickler that runs no code."
force_option = click.option("--force", is_flag=True, help=FORCE)
trust_option = click.option("--trust", is_flag=True, help=TRUST)


GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
"""Where what the user asked for stands: on the command line, or in a config."""


def given_here(ctx: click.Context) -> dict[str, str]:
    """The parameters that the user gave, each as a long option, or as the help names it."""
    given = {}
    for param in ctx.command.params:
        name = param.name or ""
        asked = ctx.params.get(name)
        nothing = asked is None or asked is False or asked == ()  # false in a config, say
        if ctx.get_parameter_source(name) in GIVEN and not nothing:
            argument = isinstance(param, click.Argument)
            given[name] = param.human_readable_name if argument else max(param.opts, key=len)
    return given


def first_given(*names: str) -> str:
    """The first of these that the user gave, as a long option; else empty."""
    given = given_here(click.get_current_context())
    return next((given[n] for n in names if n in given), "")


def refuse_given(model: str, names: Sequence[str]) -> None:
    """Raise for an option that was given and has no say for an .onnx file."""
    if option := first_given(*names):
        raise LoraFxError(f"{option} has no say for {model}, a graph as it is", "leave it out")


def under_new_name(old: str, old_value: str | None, new: str, new_value: str | None) -> str | None:
    """The value of an option that has a new name; the old one is a hidden option, and is noted.

    Raises:
        LoraFxError: Both are given.
    """
    return under_either_name(old, old_value, new, new_value, tell=_note_new_name)


def _note_new_name(old: str, new: str) -> None:
    note(f"{old} is called {new} now")


Rules = Sequence[NoSay[JsonView]]
"""When an option of a command has no say; what was asked for is click's parameters by name."""


GROUPS = {
    "Data": "data eval_data label loss validation max_length examples",
    "Training": "epochs steps batch_size gradient_accumulation_steps accumulate checks patience "
    "mixed_precision activation_checkpointing curve",
    "Optimizer": "optimizer lr schedule warmup weight_decay clip",
    "States of a training": "save_state save_every save_total_limit resume",
    "Targets and ranks": "plan rank alpha energy max_rank params max_error max_abs_error include "
    "exclude also_train also_full whole variant init seed dropout quantise accuracy_level dead",
    "What is accepted": "allow_unused allow_missing any_base other_readers untie add again",
    "Quantised weights": "dtype dequantise requantise lossy max_shard_size",
    "ONNX": "opset optimise precision tol cache genai names delta triton max_batch",
    "Model and its inputs": "model weights inputs_file dynamic static trust no_repeat",
    "Run and result": "provider device threads dry_run run link report config save_config force "
    "as_json",
}
"""Titles in --help, and what stands below them; what is in none of them is a command's own."""


def in_groups(params: Sequence[click.Parameter]) -> dict[str, list[click.Option]]:
    """The options of a command below their titles; one that would stand alone is its own."""
    options = [p for p in params if isinstance(p, click.Option) and not p.hidden]
    by_name = {option.name: option for option in options}
    groups: dict[str, list[click.Option]] = {}
    for title, names in GROUPS.items():
        below = [by_name[name] for name in names.split() if name in by_name]
        if len(below) > 1:
            groups[title] = below

    grouped = [option for below in groups.values() for option in below]
    return {"Options": [option for option in options if option not in grouped], **groups}
