"""Compare the placement table with what ONNX Runtime's CUDA provider says: `python -m tests.cuda`.

No GPU is needed: a stand-in for the CUDA runtime is compiled (cc, nm and readelf are needed), with
which sessions are made and never run. Every file of tests/cuda/cases.py is exported. For each, one
line shows its placement, and how the stored row and the list of lora_fx.onnx.cuda_obstacles differ.
The exit code is 1 if one differs, or if the stand-in cannot be built.

    python -m tests.cuda                            the whole table, about ten minutes
    python -m tests.cuda --only hf_llama hf_bert    some families
    python -m tests.cuda --write                    store what was measured
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from tests.cuda import stand_in
from tests.cuda.cases import CASES, FAMILIES, Case
from tests.cuda.table import Row, Table, disagreement, measured


def shown(row: Row) -> str:
    """A row as a line."""
    if "copies" not in row:
        return "; ".join(f"{name}: {why}" for name, why in row.items())
    parts = [f"{row['on_device']} nodes on CUDA, {sum(row['on_cpu'].values())} on the CPU"]
    parts += [f"copies {copy}" for copy in row["copies"]]
    parts.append(f"no CUDA graph: {row['uncapturable']}" if row["uncapturable"] else "capturable")
    return "; ".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Measure, print and compare or store the rows."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=FAMILIES,
        default=FAMILIES,
        metavar="FAMILY",
        help=f"Families to measure, by default all: {', '.join(FAMILIES)}.",
    )
    parser.add_argument("--write", action="store_true", help="Store the rows in table.json.")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")

    table = Table()
    rows: dict[Case, Row] = {}
    differs = False
    with tempfile.TemporaryDirectory() as folder:
        try:
            stand_in_folder = stand_in.build(Path(folder, "stand_in"))
        except stand_in.CannotBuild as error:
            print(f"the stand-in for the CUDA runtime cannot be built: {error}", file=sys.stderr)
            return 1
        for case in CASES:
            if case.family not in options.only:
                continue
            rows[case] = measured(case, stand_in_folder, Path(folder))
            print(f"{case}: {shown(rows[case])}", flush=True)
            if disagreed := disagreement(case, rows[case], Path(folder)):
                print(f"    differs: {disagreed}", flush=True)
                differs = True
            if options.write:
                table.write(rows)
            elif difference := table.difference(case, rows[case]):
                print(f"    differs: {difference}", flush=True)
                differs = True
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
