"""--plan PLAN of the commands that insert, and what has no say beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from lora_fx.errors import LoraFxError


def given_option(name: str) -> bool:
    """True when an option stands on the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def plan_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The option, which has the targets and ranks; others that choose them are refused."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        for name in ("rank", "alpha", "include") if kwargs["plan"] else ():
            if given_option(name):
                raise LoraFxError(
                    f"--{name} has no say beside --plan {kwargs['plan']}", "leave one of them out"
                )
        return function(*args, **kwargs)

    added = click.option("--plan", metavar="PLAN", help="Targets and ranks, of lora-fx plan.")
    made: Callable[..., Any] = added(command)
    return made
