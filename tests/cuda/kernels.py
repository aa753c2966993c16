"""Compare lora_fx/onnx/cuda_kernels.json with the CUDA provider: `python -m tests.cuda.kernels`.

The provider of the installed onnxruntime-gpu lists its kernels itself, on the stand-in for the CUDA
runtime, so no GPU is needed. The exit code is 1 if they differ from the stored ones, or if the
stand-in cannot be built.

Operators that have a kernel on no provider are functions, which the runtime replaces by their
bodies. The table has the dtypes with which no test of tests/cuda/one_node.py copies anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from lora_fx.onnx.cuda_kernels import TABLE
from tests.cuda import one_node, stand_in

REGISTRY = Path(__file__).with_name("registry.py")
DOMAINS = ("", "com.microsoft")
"""Those of files. The others are the runtime's own, and classical models' (one operator)."""
OF_RUNTIME = ("MemcpyFromHost", "MemcpyToHost")
LAST = 2**31 - 1

Row = dict[str, str]
"""Kernels that differ in one dtype alone: "versions" of the operator, and place → its dtypes."""
Kernels = dict[str, list[Row]]
"""Operator → its kernels."""


def registered(folder: Path) -> Any:
    """What registry.py prints.

    Raises:
        CannotBuild: See stand_in.
    """
    libraries = stand_in.build_for_registry(folder)
    child = stand_in.run_with(libraries, REGISTRY)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def kernels_of(registry: Any) -> Kernels:
    """The kernels of files, by operator."""
    schemas = {
        (domain, name, since): places for domain, name, since, *places in registry["schemas"]
    }
    rows: dict[str, list[Row]] = {}
    for domain, name, first, last, types in registry["kernels"]:
        if domain not in DOMAINS or name in OF_RUNTIME:
            continue
        inputs, outputs = schemas[domain, name, first]
        row = {"versions": f"{first}-{'' if last == LAST else last}"}
        for variable, allowed in types.items():
            row[place_of(variable, inputs, outputs)] = " ".join(sorted(map(dtype_of, allowed)))
        rows.setdefault("::".join(filter(None, (domain, name))), []).append(row)
    return {name: joined(rows[name]) for name in sorted(rows)}


def place_of(variable: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> str:
    """The first place of a node that has the type of a variable, one that must be given before."""
    places = [
        (not required, f"{kind} {i}")
        for kind, listed in (("input", inputs), ("output", outputs))
        for i, (name, type_name, required) in enumerate(listed)
        if variable in (name, type_name)
    ]
    return min(places, key=lambda place: place[0])[1]


def dtype_of(text: str) -> str:
    """float of tensor(float), seq(float) of seq(tensor(float))."""
    return text.replace("tensor(", "", 1).replace(")", "", 1)


def joined(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ at one place alone, as one row; first in dtypes, then in versions."""
    places = dict.fromkeys(place for row in rows for place in row)
    for place in sorted(places, key=lambda place: place == "versions"):
        groups: dict[Any, Row] = {}
        for row in rows:
            others = (place in row, *((name, row[name]) for name in sorted({*row} - {place})))
            group = groups.setdefault(others, dict(row))
            if place in row:
                values = dict.fromkeys([*group[place].split(), *row[place].split()])
                group[place] = " ".join(values if place == "versions" else sorted(values))
        rows = list(groups.values())
    return list(rows)


def functions_of(registry: Any) -> set[str]:
    """The operators of ONNX that have a kernel neither on CUDA nor on the CPU."""
    named = {name for domain, name, *_ in registry["schemas"] if not domain}
    with_kernels = {name for domain, name, *_ in registry["kernels"] if not domain}
    return named - with_kernels - {name for domain, name in registry["on_cpu"] if not domain}


def measured_functions(names: Collection[str], libraries: Path, folder: Path) -> Kernels:
    """The functions that the provider runs without a copy, as rows of one version each."""
    measured = {}
    for case in one_node.cases(names):
        for version in versions_of(case):
            name = f"{case.name}-{version}"
            measured[name] = dataclasses.replace(case, name=name, opset=version)
    placed = one_node.placed(measured.values(), libraries, folder)

    free: dict[tuple[str, tuple[tuple[str, str], ...]], bool] = {}
    for name, case in measured.items():
        if isinstance(placed[name], str):
            continue  # refused: this version has no such attribute or dtype
        key = case.node.op_type, tuple(row_of(case).items())
        free[key] = free.get(key, True) and not placed[name]
    rows: dict[str, list[Row]] = {}
    for (operator, row), is_free in free.items():
        if is_free:
            rows.setdefault(operator, []).append(dict(row))
    return {name: joined(rows[name]) for name in sorted(rows)}


def versions_of(case: one_node.NodeCase) -> Iterator[int]:
    """One opset for each version of an operator: the exporter's own where it has that version."""
    found = set()
    for opset in (one_node.OPSET, *range(one_node.OLDEST, one_node.NEWEST + 1)):
        if onnx.defs.has(case.node.op_type, opset):
            since = onnx.defs.get_schema(case.node.op_type, opset).since_version
            if since not in found:
                found.add(since)
                yield opset


def row_of(case: one_node.NodeCase) -> Row:
    """The version and the dtypes of a case."""
    schema = onnx.defs.get_schema(case.node.op_type, case.opset)
    row = {"versions": f"{schema.since_version}-{schema.since_version}"}
    places: dict[str, tuple[str, str]] = {}
    for kind, names, listed in (
        ("input", case.node.input, schema.inputs),
        ("output", case.node.output, schema.outputs),
    ):
        for i, name in enumerate(names):
            if name:
                places.setdefault(listed[min(i, len(listed) - 1)].type_str, (f"{kind} {i}", name))
    row |= {place: one_node.dtype_name(case.types[name]) for place, name in places.values()}
    return row


def stored() -> Mapping[str, Any]:
    """The table: version of ONNX Runtime → operator → its kernels."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def text_of(table: Mapping[str, Kernels]) -> str:
    """The table as JSON, with one operator a line."""
    blocks = []
    for version, kernels in table.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in kernels.items()]
        blocks.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def differences(measured: Kernels, left_out: Collection[str] = ()) -> Iterator[str]:
    """How measured kernels differ from those that are stored for this version, a line each."""
    before = stored().get(onnxruntime.__version__, {})
    for name in sorted({*before, *measured} - {*left_out}):
        if before.get(name) != measured.get(name):
            yield f"{name}: {before.get(name)} → {measured.get(name)}"


def main(arguments: Sequence[str]) -> int:
    """Measure, and compare or store."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cuda.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="Store the kernels in the package.")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            registry = registered(Path(folder, "registry"))
            measured = kernels_of(registry)
            libraries = stand_in.build(Path(folder, "stand_in"))
        except stand_in.CannotBuild as error:
            print(f"the stand-in for the CUDA runtime cannot be built: {error}", file=sys.stderr)
            return 1
        names = functions_of(registry)
        measured |= measured_functions(names, libraries, Path(folder, "files"))
    if options.write:
        TABLE.write_text(text_of({**stored(), onnxruntime.__version__: measured}))
        return 0
    lines = list(differences(measured))
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
