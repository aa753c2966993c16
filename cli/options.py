"""Declares options of commands, alone and in groups, and sets where --help lists them.

A group is a frozen dataclass whose fields are options. A command takes it as one argument:

    @dataclass(frozen=True, kw_only=True)
    class Limits:
        rank: int = option("--rank", "-r", type=int, default=8, help="Set the rank.")
        lossy: bool = flag("--lossy", "Accept a loss.")

    @click.command("cut")
    @option_group("limits", Limits)
    def command(limits: Limits) -> None: ...

model_options.py, branch_options.py, train_options.py and merge_options.py have the groups that
several commands share, or that become an object of a verb. Other groups are in the file of their
command.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from typing import Any

import click
from click.core import ParameterSource

from lora_fx.cli.output import note
from lora_fx.errors import LoraFxError, NoSay
from lora_fx.run_defaults import CAUSAL, OTHERS
from lora_fx.spellings import under_either_name
from lora_fx.text import JsonView

FROM_1 = click.IntRange(1, 2**31 - 1)


class FiniteRange(click.FloatRange):
    """A range of finite numbers; click's own has infinity and NaN in it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_bounded = self.min is not None or self.max is not None
        if not self.is_bounded:
            self.name = "float"  # as the help calls its values

    def _describe_range(self) -> str:
        """Return the bounds as the help has them; click writes "x<=None" where there are none."""
        return super()._describe_range() if self.is_bounded else ""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number of a text."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


FINITE = FiniteRange()
THREADS = click.IntRange(0, 2**10)
"""The allowed number of ONNX Runtime threads; 0 lets ONNX Runtime choose."""
FORCE = "Replace the output if it exists."

Command = Callable[..., object]
"""A function that click turns into a command."""
Decorator = Callable[[Command], Command]
"""A decorator that adds options to a command."""


def option(*names: str, **settings: Any) -> Any:
    """A field of a group: an option with the arguments of `click.option`.

    The name of the parameter is that of the field. The field has the option's default, or None.
    """
    return _declared(settings.get("default"), names, settings)


def flag(name: str, text: str) -> Any:
    """A field of a group: an option without a value. The field is a bool."""
    return _declared(False, (name,), {"is_flag": True, "help": text})


def repeatable(name: str, metavar: str, text: str) -> Any:
    """A field of a group: an option that may be given several times. The field is a tuple."""
    return _declared((), (name,), {"metavar": metavar, "multiple": True, "help": text})


def selectors(name: str, text: str) -> Any:
    """A field of a group: a repeatable option of selectors. The field is None without any."""
    return option(
        name,
        metavar="SELECTORS",
        multiple=True,
        callback=lambda ctx, param, value: value or None,
        help=text,
    )


def label_option(text: str) -> Any:
    """A field of a group: the column of labels. Without it, common names are tried."""
    return option(
        "--label", default="", show_default=False, metavar="COL", help=f"{text}  [default: labels]"
    )


def loss_option() -> Any:
    """A field of a group: the loss of outputs and labels."""
    return option("--loss", default="ce", help="Choose the loss: ce, mse or module:function.")


def max_length_option() -> Any:
    """A field of a group: the number of tokens that are read of a text."""
    return count_option("--max-length", f"Cut texts to this many tokens.  {run_default('longest')}")


def run_default(name: str) -> str:
    """Return the text of a default that differs for folders of causal language models."""
    number = getattr(OTHERS, name)
    return f"[default: {number:g}; {getattr(CAUSAL, name):g} for causal language models]"


def quantise_option() -> Any:
    """A field of a group: the weights of the base that become codes."""
    return repeatable(
        "--quantise",
        "KIND[=SELECTORS]",
        "Store weights of the base as nf4, int4 or int8: those of the default targets, "
        "or those named.",
    )


def seed_option(text: str) -> Any:
    """A field of a group: a seed that both torch and numpy accept."""
    return option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help=text)


def count_option(name: str, text: str, default: int | None = None) -> Any:
    """A field of a group: an integer of at least 1."""
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


NO_MEMORY_CHECK = "Start a job that needs more memory than is free."
TRUST = "Read pickled tensors (.bin), without running code from them."
force_option = click.option("--force", is_flag=True, help=FORCE)
trust_option = click.option("--trust", is_flag=True, help=TRUST)


GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
"""The sources of values that the user gave: the command line, or a config."""


def given_here(ctx: click.Context) -> dict[str, str]:
    """The parameters that the user gave, by their long option or their name in --help."""
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
    """Return the long option of the first of these names that the user gave; else an empty text."""
    given = given_here(click.get_current_context())
    return next((given[n] for n in names if n in given), "")


def refuse_given(model: str, names: Sequence[str]) -> None:
    """Raise for a given option that has no effect for an .onnx file."""
    if option := first_given(*names):
        raise LoraFxError(
            f"{option} has no effect for {model}, which is already a graph", "leave it out"
        )


def under_new_name(old: str, old_value: str | None, new: str, new_value: str | None) -> str | None:
    """Return the value of a renamed option; note the use of the old name, a hidden option.

    Raises:
        LoraFxError: Both are given.
    """
    return under_either_name(old, old_value, new, new_value, tell=_note_new_name)


def _note_new_name(old: str, new: str) -> None:
    note(f"{old} is called {new} now")


Rules = Sequence[NoSay[JsonView]]
"""Rules that refuse an option without effect; they read the values of click's parameters."""


GROUPS = {
    "Data": "data eval_data label loss validation split_seed max_length examples",
    "Training": "epochs steps batch_size gradient_accumulation_steps accumulate checks patience "
    "mixed_precision activation_checkpointing curve",
    "Optimizer": "optimizer lr schedule warmup weight_decay clip",
    "Many runs": "sweep seeds together save_runs",
    "States of a training": "save_state save_every save_total_limit resume",
    "Targets and ranks": "plan rank alpha energy max_rank params max_error max_abs_error include "
    "exclude also_train also_full whole variant init seed dropout quantise accuracy_level dead",
    "What is accepted": "allow_unused allow_missing any_base other_readers untie add again "
    "no_memory_check",
    "Quantised weights": "dtype dequantise requantise lossy max_shard_size",
    "ONNX": "opset optimise precision tol cache genai names delta triton max_batch",
    "Model and its inputs": "model weights inputs_file dynamic static trust no_repeat",
    "Run and result": "provider device threads dry_run run link report config save_config force "
    "as_json",
}
"""Titles in --help, with their options; other options are listed under Options."""


def in_groups(params: Sequence[click.Parameter]) -> dict[str, list[click.Option]]:
    """The options of a command by title; a group of one option goes to Options."""
    options = [p for p in params if isinstance(p, click.Option) and not p.hidden]
    by_name = {option.name: option for option in options}
    groups: dict[str, list[click.Option]] = {}
    for title, names in GROUPS.items():
        below = [by_name[name] for name in names.split() if name in by_name]
        if len(below) > 1:
            groups[title] = below

    grouped = [option for below in groups.values() for option in below]
    return {"Options": [option for option in options if option not in grouped], **groups}
