"""Make the environments of other runtimes, and run their tests: `python -m tests.runtimes`.

    python -m tests.runtimes                        all of them
    python -m tests.runtimes openvino simplifiers   some: see requirements/
    python -m tests.runtimes openvino --write       store the rows that are measured
    python -m tests.runtimes openvino -- -k bert    with arguments of pytest
    python -m tests.runtimes web                    onnxruntime-web: npm ci --prefix samples

The environments are made in `.venv-runtimes` at their first call, and anew where their requirements
have changed. The exit code is pytest's, or 1 where an environment cannot be made.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from tests.runtimes.consumers import WRITE
from tests.runtimes.environments import ROOT, make, names

WEB = "web"
"""The environment of npm, whose packages samples/package-lock.json pins."""


def make_web() -> None:
    """Install what samples/package-lock.json pins.

    Raises:
        CalledProcessError: npm cannot install it.
        OSError: There is no npm.
    """
    subprocess.run(["npm", "ci", "--prefix", ROOT / "samples"], check=True)


def main(arguments: Sequence[str]) -> int:
    """Make the environments, and run the tests of this folder that belong to them."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.runtimes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [*names(), WEB]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--write", action="store_true", help="Store the rows that are measured.")
    of_pytest: list[str] = []
    if "--" in arguments:
        split = arguments.index("--")
        of_pytest = [*arguments[split + 1 :]]
        arguments = arguments[:split]
    options = parser.parse_args(arguments)
    unknown = sorted({*options.names}.difference(known))
    if unknown:
        parser.error(f"no environment {unknown[0]!r}; there are {', '.join(known)}")

    for name in options.names or known:
        try:
            if name == WEB:
                make_web()
            else:
                make(name)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"the environment {name!r} cannot be made: {error}", file=sys.stderr)
            return 1

    folder = "tests/runtimes"
    tests = [f"{folder}/test_{name}.py" for name in options.names] or [folder]
    environment = {**os.environ, WRITE: "1" if options.write else ""}
    command = [sys.executable, "-m", "pytest", "-m", "slow or not slow", "-n", "0"]
    command += [*tests, *of_pytest]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
