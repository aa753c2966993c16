"""Every option of the command line is used by an example that the tests run.

Examples are the lines of `console` blocks, which `test_docs.py` runs, and the tables of the config
files that such a line reads. A block of `sh` or `text` is only shown, and a sample runs no command.

`python -m tests.test_examples` prints the counts, and where each option is used.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import click

from lora_fx.cli.group import COMMANDS
from tests.test_docs import PAGES, ROOT, blocks

NOT_RUN = {
    "probe": "it needs a language model or a server; tests/probe/test_server.py runs it",
    "demo": "it trains a real model for minutes; tests/cli/test_demo.py has its parts",
}
"""Commands whose examples are only shown, and why."""


class Option(NamedTuple):
    """An option as a reader of --help sees it: commands that share its help share the option."""

    name: str
    help: str


Uses = dict[Option, set[str]]
"""The pages whose examples use an option."""


def command_of(name: str) -> click.Command:
    """The click command of a name."""
    made: click.Command = import_module(f"lora_fx.cli.{name.replace('-', '_')}").command
    return made


def options_of(name: str) -> dict[str, Option]:
    """{name of the parameter: option} of a command."""
    options = {}
    for param in command_of(name).params:
        if isinstance(param, click.Option) and not param.hidden:
            options[param.name or ""] = Option(max(param.opts, key=len), param.help or "")
    return options


def lines_of(page: Path) -> Iterator[list[str]]:
    """The arguments of every `$ lora-fx …` that runs."""
    for block in blocks(page):
        if block.language == "console":
            for line in re.findall(r"^\$ lora-fx (.*)$", block.text, re.M):
                yield shlex.split(line.partition(" # exit ")[0])


def configs_of(page: Path) -> dict[str, dict[str, dict[str, object]]]:
    """{file: its tables} of the config files that a page writes."""
    files = {}
    for block in blocks(page):
        if block.language == "toml":
            name = block.info.removeprefix('title="').removesuffix('"')
            files[name] = tomllib.loads(block.text)
    return files


def used_in(page: Path) -> Iterator[tuple[str, str]]:
    """(command, name of the parameter) of every option that an example uses."""
    configs = configs_of(page)
    for arguments in lines_of(page):
        while arguments[0].startswith("-"):  # options of lora-fx itself
            del arguments[0]
        name, *rest = arguments
        command = command_of(name)
        context = click.Context(command, info_name=name, resilient_parsing=True)
        values, _, params = command.make_parser(context).parse_args(rest)
        yield from ((name, p.name or "") for p in params if isinstance(p, click.Option))
        table = configs.get(str(values.get("config")), {}).get(name, {})
        yield from ((name, key.replace("-", "_")) for key in table)


def uses() -> Uses:
    """The pages that use each option of every command."""
    found: Uses = {option: set() for name in COMMANDS for option in options_of(name).values()}
    for page in PAGES:
        for name, parameter in used_in(page):
            if option := options_of(name).get(parameter):
                found[option].add(str(page.relative_to(ROOT)))
    return found


def commands_of() -> dict[Option, list[str]]:
    """The commands that have each option."""
    commands: dict[Option, list[str]] = defaultdict(list)
    for name in COMMANDS:
        for option in options_of(name).values():
            commands[option].append(name)
    return commands


def test_every_option_is_used_by_an_example() -> None:
    commands = commands_of()
    unused = [option for option, pages in uses().items() if not pages]
    told = [
        f"{option.name} of {', '.join(commands[option])}: {option.help}"
        for option in unused
        if not all(name in NOT_RUN for name in commands[option])
    ]
    assert not told, "no example that runs uses\n" + "\n".join(told)


def test_what_is_not_run_is_so() -> None:
    """A command that gets an example leaves the list."""
    run = {arguments[0] for page in PAGES for arguments in lines_of(page)}
    assert not run & set(NOT_RUN)


def main() -> None:
    """Print the counts, and the pages of each option."""
    found = uses()
    names = {option.name for option in found}
    used_names = {option.name for option, pages in found.items() if pages}
    commands = commands_of()
    print(f"{sum(map(len, commands.values()))} options of {len(COMMANDS)} commands")
    print(f"{len(names)} names, {len(names - used_names)} in no example that runs")
    unused = [option for option, pages in found.items() if not pages]
    print(f"{len(found)} names and helps, {len(unused)} in no example that runs")
    for option, pages in sorted(found.items()):
        where = ", ".join(sorted(pages)) or "NONE"
        print(f"{option.name} ({', '.join(commands[option])}): {where}")


if __name__ == "__main__":
    main()
