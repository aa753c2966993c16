"""The kernels of ONNX Runtime's CUDA provider, by operator, version and dtypes.

The provider itself listed them for cuda_kernels.json (`python -m tests.cuda.kernels --write`). They
are those of the installed version of ONNX Runtime, or else of the newest in the table.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from lora_fx.onnx.value_dtypes import ValueDtypes, schema_of

TABLE = Path(__file__).with_name("cuda_kernels.json")
UNKNOWN = "is not known to have a CUDA kernel"

Row = Mapping[str, str]
"""Kernels of an operator: their "versions", as "7-12 14-", and "input 0", "output 1" … → dtypes."""


def why_no_kernel(node: ir.Node, opset: int, dtypes: ValueDtypes) -> str:
    """Return why a node is not known to run on CUDA, as a clause; empty where it runs there.

    Args:
        node: A node of any domain.
        opset: The version of ONNX's operators in its file.
        dtypes: Those of its inputs and results.
    """
    if why := _why_no_form(node):
        return why
    name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    schema = schema_of(node, opset)
    version = schema.since_version if schema else 1
    rows = [row for row in kernels().get(name, ()) if _has_version(row["versions"], version)]
    if not rows:
        return UNKNOWN

    lacking: dict[str, str] = {}
    for row in rows:
        lacks = dict(_lacking(row, node, dtypes))
        if not lacks:
            return ""
        lacking = {**lacks, **lacking}
    if "" in lacking.values():
        return f"{UNKNOWN} for its dtypes, which the file does not say"
    return f"has no CUDA kernel for {', '.join(dict.fromkeys(lacking.values()))}"


def _why_no_form(node: ir.Node) -> str:
    """Return why CUDA has no kernel for the attributes of a node, whatever its dtypes."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type in ("ArgMax", "ArgMin") and given.get("select_last_index"):
        return "has no CUDA kernel that selects the last index"
    if node.op_type == "BatchNormalization" and given.get("training_mode"):
        return "has no CUDA kernel for training"
    if node.op_type == "ConvTranspose":
        pads = given.get("pads")
        pads = [*pads] if isinstance(pads, Sequence) else []
        half = len(pads) // 2
        if "SAME" in str(given.get("auto_pad")) or pads[:half] != pads[half:]:
            return "has no CUDA kernel for padding that differs between both sides"
    return ""


def _lacking(row: Row, node: ir.Node, dtypes: ValueDtypes) -> Sequence[tuple[str, str]]:
    """Return the places of a node, with their dtypes, that kernels do not take."""
    lacking = []
    for place, allowed in row.items():
        kind, _, number = place.partition(" ")
        values = {"input": node.inputs, "output": node.outputs}.get(kind, ())
        value = values[int(number)] if number and int(number) < len(values) else None
        if value is None or (kind == "output" and not value.name):
            continue
        dtype = dtypes.of(value)
        if dtype not in allowed.split():
            lacking.append((place, dtype))
    return lacking


def _has_version(versions: str, version: int) -> bool:
    """Whether kernels are those of a version: the runtime's own rule.

    Kernels without a last version are those of their first alone, because a later version may do
    something else.
    """
    for span in versions.split():
        first, _, last = span.partition("-")
        if version == int(first) or (last and int(first) < version <= int(last)):
            return True
    return False


@functools.cache
def kernels() -> Mapping[str, Sequence[Row]]:
    """Return the kernels by operator, of a domain as com.microsoft::MatMulNBits."""
    import onnxruntime

    table: Mapping[str, Mapping[str, Sequence[Row]]] = json.loads(TABLE.read_text("utf-8"))
    newest = max(table, key=lambda text: [int(part) for part in text.split(".")])
    return table.get(onnxruntime.__version__, table[newest])
