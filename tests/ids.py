"""List the tests of a checkout, or compare two such lists.

    python -m tests.ids [--python PYTHON] CHECKOUT > ids.txt     list the ids and mark slow tests
    python -m tests.ids OLD NEW                                  compare two lists

The comparison prints the tests that were removed, added, became slow or became fast. It matches
tests by function and parameters, so a test may move to another file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

SLOW = "slow "


def collect(checkout: Path, python: str) -> list[str]:
    """The ids of the tests of a checkout; ids of slow tests begin with "slow "."""

    def ids(expression: str) -> list[str]:
        command = [python, "-m", "pytest", "--collect-only", "-q", "-n0", "-m", expression]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr)
        return [line for line in done.stdout.splitlines() if "::" in line]

    fast = set(ids("not slow"))
    return [i if i in fast else SLOW + i for i in ids("slow or not slow")]


def known_as(line: str) -> str:
    """The function and parameters of a test, or the last name of the object with a doctest."""
    name = line.removeprefix(SLOW).partition("::")[2]
    return name if "[" in name or name.startswith("test") else name.rpartition(".")[2]


def only(lines: Iterable[str], than: Iterable[str]) -> list[str]:
    """The lines that are not in `than`; each line of `than` matches one line."""
    rest = Counter(known_as(line) for line in than)
    found = []
    for line in lines:
        if rest[known_as(line)]:
            rest[known_as(line)] -= 1
        else:
            found.append(line)
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.ids",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="+", type=Path, help="A checkout, or two lists.")
    parser.add_argument(
        "--python", default=sys.executable, help="The interpreter that runs pytest in the checkout."
    )
    given = parser.parse_args()
    if len(given.what) == 1:
        print(*collect(given.what[0], given.python), sep="\n")
        return
    old, new = (path.read_text().splitlines() for path in given.what)
    fast = [[line for line in lines if not line.startswith(SLOW)] for lines in (old, new)]
    gone, came = only(old, new), only(new, old)
    for title, lines in (
        ("removed", gone),
        ("added", came),
        ("became slow", only(only(fast[0], fast[1]), gone)),
        ("became fast", only(only(fast[1], fast[0]), came)),
    ):
        print(f"{title}: {len(lines)}", *lines, sep="\n  ")


if __name__ == "__main__":
    main()
