"""Whether the version is the same wherever it stands: `python -m tests.release [VERSION]`.

Without VERSION it is that of pyproject.toml, and the changelog may still call it *Unreleased*. With
VERSION, a release is being made: the changelog has to have it, with its date.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADING = re.compile(r"^## \[(?P<version>[^]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?$", re.M)


def differences(root: Path, released: str = "") -> Iterator[str]:
    """Yield a line for each place whose version is another one.

    Args:
        root: The repository.
        released: The version of the release that is being made; empty for none.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    version = project["version"]
    if released and version != released:
        yield f"pyproject.toml: {version}; expected {released}"
    citation = (root / "CITATION.cff").read_text()
    if f"\nversion: {version}\n" not in citation:
        yield f"CITATION.cff: no line 'version: {version}'"
    first = HEADING.search((root / "CHANGELOG.md").read_text())
    if first is None:
        yield "CHANGELOG.md: no heading '## [VERSION] - DATE'"
    elif released and (first["version"] != released or not first["date"]):
        yield f"CHANGELOG.md: begins with {first[0]!r}; expected '## [{released}] - DATE'"


def main() -> None:
    """Print the differences; exit with 1 if there are any."""
    lines = [*differences(ROOT, *sys.argv[1:2])]
    print("\n".join(lines) or "the version is the same everywhere")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
