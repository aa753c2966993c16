"""Run the tests as other processors would: `python -m tests.processors [-- PYTEST_ARGUMENT …]`.

Libraries choose their kernels by the processor, and different kernels add in a different order.
Each setting in SETTINGS makes the libraries choose as on another processor, by environment
variables. pytest runs once under each setting. For each setting, one line shows the result of
pytest, and the names of the failed tests follow. The exit code is 1 if a test failed.

    python -m tests.processors                              the default tests, every setting
    python -m tests.processors --only oneDNN-AVX2 ATen-AVX2 the default tests, two settings
    python -m tests.processors -- tests/trust -n 1          some tests, in one process
    python -m tests.processors -- -m "slow or not slow"     slow tests too
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "ATen-default": {"ATEN_CPU_CAPABILITY": "default"},
    "ATen-AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "oneDNN-AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN-AVX512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "MKL-AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "OpenBLAS-Haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "one-thread": {"OMP_NUM_THREADS": "1"},
    "two-threads": {"OMP_NUM_THREADS": "2"},
    "all-AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "all-SSE4": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
}
"""The environment variables of each setting, by its name."""
WIDEST = (("amx_tile", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
"""Flags of /proc/cpuinfo and the instructions that they stand for, the widest first."""
ENDED = re.compile(r"^=* ?(.*\b(?:passed|failed|error|errors|no tests ran)\b.* in .*?s\b.*?) ?=*$")
"""The last line that pytest prints, with or without -q."""
ROOT = Path(__file__).parent.parent


def family(cpuinfo: str | None = None) -> str:
    """The family of this machine's processor, such as "AMD EPYC, family 26, AVX-512".

    Times of one family are kept apart from those of another, because libraries choose their kernels
    by the instructions that a processor has.

    Args:
        cpuinfo: The text of /proc/cpuinfo; None reads it.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else ""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.machine()

    brand = " ".join(fields["model name"].replace("(R)", "").split()[:2])
    flags = fields["flags"].split()
    widest = next((name for flag, name in WIDEST if flag in flags), "SSE")
    return f"{brand}, family {fields['cpu family']}, {widest}"


def environment(setting: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """The inherited variables, with those of one setting and of no other setting."""
    of_any = {name for variables in SETTINGS.values() for name in variables}
    others = {name: value for name, value in inherited.items() if name not in of_any}
    return {**others, **SETTINGS[setting]}


def closing_line(output: str) -> str:
    """The line in which pytest counts the tests, or the last line if there is no such line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in reversed(lines):
        if found := ENDED.match(line):
            return found[1]
    return lines[-1] if lines else "nothing was printed"


def failures(output: str) -> list[str]:
    """The lines of the summary that name the failed tests."""
    return [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]


def main(arguments: Sequence[str]) -> int:
    """Run pytest under each setting and print its result."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.processors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SETTINGS,
        default=[*SETTINGS],
        metavar="NAME",
        help=f"Settings to run, by default all: {', '.join(SETTINGS)}.",
    )
    parser.add_argument("pytest", nargs="*", help="Arguments for pytest, after --.")
    options = parser.parse_args(arguments)

    ended_well = True
    for setting in options.only:
        command = [sys.executable, "-m", "pytest", "-q", *options.pytest]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(setting, os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        variables = " ".join(f"{name}={value}" for name, value in SETTINGS[setting].items())
        print(f"{setting} ({variables}): {closing_line(done.stdout)}", flush=True)
        for failure in failures(done.stdout):
            print(f"    {failure}", flush=True)
        ended_well = ended_well and done.returncode == 0
    return 0 if ended_well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
