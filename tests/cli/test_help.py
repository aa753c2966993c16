"""--help of every command: titles, widths, and each option once."""

from __future__ import annotations

import io
import re
import time

import click
import pytest
from click.testing import CliRunner

from lora_fx.cli import main
from lora_fx.cli.group import COMMANDS, group
from lora_fx.cli.options import GROUPS, in_groups

WIDE = 100
MOST = 13
"""Options below one title: what an eye takes in at once."""


def sections(name: str) -> dict[str, list[str]]:
    """The help of a command: title → its lines."""
    done = CliRunner(env={"COLUMNS": str(WIDE)}).invoke(group, [name, "--help"])
    assert done.exit_code == 0, done.output
    found: dict[str, list[str]] = {}
    for line in done.output.splitlines():
        assert len(line) <= WIDE, line
        if re.fullmatch(r"[A-Z][^:]*:", line):
            found[line[:-1]] = rows = []
        elif found and line.startswith("  "):
            rows.append(line)
    return found


def command(name: str) -> click.Command:
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_once_below_a_title(name: str) -> None:
    made = command(name)
    shown = sections(name)
    options = [p for p in made.params if isinstance(p, click.Option) and not p.hidden]
    rows = [row for rows in shown.values() for row in rows if row.startswith("  -")]
    heads = [row.strip().partition("  ")[0] for row in rows]
    for option in options:
        there = [h for h in heads if max(option.opts, key=len) in re.split(r"[\s,/]+", h)]
        assert len(there) == 1, (option.opts, there)
    assert len(heads) == len(options) + 1, "and --help itself"
    assert next(iter(shown)) == "Options" and set(shown) - {"Options"} <= set(GROUPS)
    for title, rows in shown.items():
        assert 1 < sum(row.startswith("  -") for row in rows) <= MOST, title


def test_titles_name_options_that_are_there() -> None:
    there = {p.name for name in COMMANDS for p in command(name).params}
    named = [name for names in GROUPS.values() for name in names.split()]
    assert len(named) == len(set(named)), "an option has one title"
    assert set(named) <= there


def test_one_of_its_kind_has_no_title_of_its_own() -> None:
    """merge has one option of ranks (--rank, of --how svd), and train has eleven."""
    assert "Targets and ranks" not in in_groups(command("merge").params)
    titles = in_groups(command("train").params)
    assert [p.name for p in titles["States of a training"]] == [
        "save_state", "save_every", "save_total_limit", "resume",
    ]  # fmt: skip


def test_the_list_of_commands_is_instant() -> None:
    """Without the commands' own files; test_house looks at what is imported."""
    begun = time.process_time()
    done = CliRunner(env={"COLUMNS": str(WIDE)}).invoke(group, ["--help"])
    assert time.process_time() - begun < 0.1
    assert all(f"  {name} " in done.output for name in COMMANDS)
    assert max(map(len, done.output.splitlines())) <= WIDE


@pytest.mark.parametrize(
    ("terminal", "no_color", "red"),
    [(True, None, True), (True, "", True), (True, "1", False), (False, None, False)],
)
def test_errors_are_red_in_a_terminal_alone(
    terminal: bool, no_color: str | None, red: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """no-color.org: a variable that is set to nothing counts as unset."""

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    with pytest.raises(SystemExit):
        main(["tragets"])
    said = "Error: unknown command 'tragets'"
    error, hint = stream.getvalue().splitlines()
    assert error == (f"\x1b[31m{said}\x1b[0m" if red else said)
    assert hint == "Hint: did you mean targets?"
