"""Small .onnx files with probes written by hand: what a file computes, and what its probe says.

A network looks numbers up in a table, adds other inputs, and applies two matrices w1 and w2, which
adapters change. The probe is computed in numpy from one set of adapters, and the file from another
one, so that every failure can be seeded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from safetensors.numpy import save_file

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import stamp
from lora_fx.formats.graph_inputs import KEYS
from lora_fx.onnx.manifest import PROPERTY as MANIFEST
from lora_fx.onnx.manifest import Manifest, SwitchSlot
from lora_fx.onnx.runtime_adapter import SERVED, write_file
from lora_fx.probe.drawn import drawn
from lora_fx.probe.probe import PROPERTY

TARGETS = ("w1", "w2")
MODES = ("merged", "switch", "portable", "load", "batch")
"""Those of a probe, and portable: mode switch without defaults."""
ROWS, LENGTH, WIDTHS = 2, 3, (3, 4, 5)
LARGEST_RANK = 3
"""The rank of a file of mode load."""
TOLERANCE = 1e-5
PRECISIONS = {"tf32": 5e-4, "bfloat16": 4e-3}
IDS = [[3, 1, 4], [1, 5, 9]]

Factors = dict[str, Array]
"""A and B of each target: w1.lora_A [in, rank], w1.lora_B [rank, out] …"""


@dataclass(frozen=True)
class Network:
    """What a file computes.

    Attributes:
        tensors: table [10, 3], w1, w2 and shift [], which is added to all outputs.
        adapters: The factors of each adapter, by its name.
        ids: In mode batch, what the file does with an id that no adapter has: refuse it, compute
            NaN, or take the last adapter's.
        dtype: That of the output.
        half: The dtype of the input `half`.
    """

    tensors: dict[str, Array]
    adapters: dict[str, Factors]
    ids: str = "refused"
    dtype: str = "float32"
    half: str = "float16"

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs as a probe has them."""
        return {**INPUTS, "half": {**INPUTS["half"], "dtype": self.half}}

    def outputs(self, adapter: Factors | None, scale: float = 1.0, without: str = "") -> Array:
        """Return the output [rows, length, 5] in float64, with an adapter or for the base.

        Args:
            adapter: Its factors; None for the base.
            scale: What its changes are multiplied by.
            without: A target that it does not change.
        """
        arrays = (X, drawn(SHAPE, self.half, 8), MASK)
        x, half, mask = (array.astype(np.float64) for array in arrays)
        hidden = self.tensors["table"][np.array(IDS)] + x + half * mask
        for target in TARGETS:
            weight = self.tensors[target].astype(np.float64)
            if adapter is not None and target != without:
                a, b = (adapter[f"{target}.lora_{side}"].astype(np.float64) for side in "AB")
                weight = weight + scale * (a @ b)
            hidden = hidden @ weight
        return np.asarray(hidden + self.tensors["shift"])


SHAPE = (ROWS, LENGTH, WIDTHS[0])
X = drawn(SHAPE, "float32", 7)
MASK = np.ones(SHAPE, bool)
INPUTS: dict[str, Any] = {
    "ids": {"dtype": "int64", "shape": [ROWS, LENGTH], "values": [n for row in IDS for n in row]},
    "x": {"dtype": "float32", "shape": list(SHAPE), "drawn": 7},
    "half": {"dtype": "float16", "shape": list(SHAPE), "drawn": 8},
    "mask": {"dtype": "bool", "shape": list(SHAPE), "fill": 1},
}


def network(seed: int = 0) -> Network:
    """Return a network with the adapters de of rank 2 and fr of rank 1."""
    rng = np.random.default_rng(seed)
    tensors = {"table": rng.standard_normal((10, WIDTHS[0])), "shift": np.array(0.0)}
    for number, target in enumerate(TARGETS):
        tensors[target] = rng.standard_normal(WIDTHS[number : number + 2])
    adapters = {"de": factors(rng, 2), "fr": factors(rng, 1)}
    return Network({name: t.astype(np.float32) for name, t in tensors.items()}, adapters)


def factors(rng: np.random.Generator, rank: int) -> Factors:
    """Return random factors of both targets."""
    result: Factors = {}
    for number, target in enumerate(TARGETS):
        shapes = {"A": (WIDTHS[number], rank), "B": (rank, WIDTHS[number + 1])}
        for side, shape in shapes.items():
            result[f"{target}.lora_{side}"] = 0.5 * rng.standard_normal(shape).astype(np.float32)
    return result


def probe_of(known: Network, mode: str) -> dict[str, Any]:
    """Return the probe that a right file of this network carries."""
    base = known.outputs(None)
    probe: dict[str, Any] = {
        "format": 1,
        "mode": "switch" if mode == "portable" else mode,
        "inputs": known.inputs,
        "outputs": {
            "y": {
                "shape": list(base.shape),
                "largest": float(np.abs(base).max()),
                "tolerance": TOLERANCE,
            }
        },
        "points": [["y", index] for index in range(base.size)],
        "base": numbers(base),
        "adapters": {},
        "precisions": PRECISIONS,
        "facts": {"version": "0"},
    }
    if mode == "portable":
        probe["base_file"] = "model.base.safetensors"
    for number, (name, adapter) in enumerate(known.adapters.items(), 1):
        of_adapter: dict[str, Any] = {
            "values": numbers(known.outputs(adapter)),
            "half": numbers(known.outputs(adapter, 0.5)),
            "double": numbers(known.outputs(adapter, 2.0)),
            "groups": {t: numbers(known.outputs(adapter, without=t)) for t in TARGETS},
        }
        if mode == "batch":
            of_adapter["id"] = number
        if mode in ("switch", "load"):
            of_adapter["file"] = f"{name}.onnx_adapter"
        if mode == "portable":
            of_adapter["file"] = f"{name}.safetensors"
        probe["adapters"][name] = of_adapter
    return probe


def numbers(array: Array) -> list[float]:
    """Return the elements of an array in the precision of a float32."""
    return [float(number) for number in array.astype(np.float32).ravel()]


# The files


def write_model(folder: Path, mode: str, computed: Network, probe: str | None) -> Path:
    """Write model.onnx and its adapters' files into a folder, and return its path.

    Args:
        folder: An empty folder.
        mode: One of MODES.
        computed: What the file computes.
        probe: The text of its probe, or None for none.
    """
    graph = _Graph(mode, computed)
    model = helper.make_model(
        graph.proto(), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    metadata = {}
    if mode != "merged":
        metadata[MANIFEST] = _manifest(mode, computed)
    if probe is not None:
        metadata[PROPERTY] = probe
    helper.set_model_props(model, metadata)
    path = folder / "model.onnx"
    if mode == "load":  # a session replaces external data only
        external_data_helper.convert_model_to_external_data(
            model, location="model.onnx.data", size_threshold=0
        )
    onnx.save(model, path)

    for name, adapter in computed.adapters.items():
        if mode in ("switch", "load"):
            versions = {"adapter_version": SERVED, "model_version": 1}
            write_file(folder / f"{name}.onnx_adapter", adapter, versions)
        if mode == "portable":
            keys = {target: [f"{target}.lora_A", f"{target}.lora_B"] for target in TARGETS}
            save_file(adapter, folder / f"{name}.safetensors", {KEYS: json.dumps(keys)})
    if mode == "portable":
        zeros = {
            name: np.zeros_like(array)
            for name, array in factors(np.random.default_rng(), 1).items()
        }
        save_file(zeros, folder / "model.base.safetensors")
    return path


def _manifest(mode: str, computed: Network) -> str:
    """Return the manifest of a file that takes or holds several adapters."""
    if mode == "batch":
        return json.dumps({**stamp(), "mode": mode, "adapters": list(computed.adapters)})
    rank = LARGEST_RANK if mode == "load" else 1
    slots = {}
    for number, target in enumerate(TARGETS):
        inside, out = WIDTHS[number : number + 2]
        names = (f"{target}.lora_A", f"{target}.lora_B")
        slots[target] = SwitchSlot(*names, inside, out, shape=(inside, out), rank=rank)
    is_portable = mode == "portable"
    return Manifest(slots, "load" if mode == "load" else "switch", required=is_portable).to_text()


class _Graph:
    """The graph of a file."""

    def __init__(self, mode: str, computed: Network) -> None:
        self.mode = mode
        self.computed = computed
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.inputs = {
            name: helper.make_tensor_value_info(name, _dtype(of["dtype"]), _free(of["shape"]))
            for name, of in computed.inputs.items()
        }

    def proto(self) -> onnx.GraphProto:
        """Return the whole graph."""
        tensors = self.computed.tensors
        looked_up = self.add("Gather", self.constant("table", tensors["table"]), "ids")
        half = self.add("Cast", "half", to=TensorProto.FLOAT)
        mask = self.add("Cast", "mask", to=TensorProto.FLOAT)
        hidden = self.add("Add", self.add("Add", looked_up, "x"), self.add("Mul", half, mask))
        if self.mode == "batch":
            self.add_ids()
        for target in TARGETS:
            hidden = self.product(hidden, target)
        hidden = self.add("Add", hidden, self.constant("shift", tensors["shift"]))
        if self.mode == "batch" and self.computed.ids == "NaN":
            nan = self.constant("nan", np.array(np.nan, np.float32))
            hidden = self.add("Where", "outside", nan, hidden)
        dtype = _dtype(self.computed.dtype)
        self.add("Cast", hidden, output="y", to=dtype)
        output = helper.make_tensor_value_info("y", dtype, ["rows", "length", 5])
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        return helper.make_graph(self.nodes, "g", list(self.inputs.values()), [output], constants)

    def product(self, hidden: str, target: str) -> str:
        """Multiply by a matrix, changed in the way of the mode."""
        weight = self.computed.tensors[target]
        if self.mode == "merged":
            for adapter in self.computed.adapters.values():
                with np.errstate(over="ignore"):
                    weight = weight + adapter[f"{target}.lora_A"] @ adapter[f"{target}.lora_B"]
            return self.add("MatMul", hidden, self.constant(target, weight))

        a, b = (self.factor(f"{target}.lora_{side}") for side in "AB")
        branch = self.add("MatMul", self.add("MatMul", hidden, a), b)
        product = self.add("MatMul", hidden, self.constant(target, weight))
        return self.add("Add", product, branch)

    def factor(self, name: str) -> str:
        """Return A or B as the mode has it."""
        adapters = self.computed.adapters.values()
        is_a = name.endswith("A")
        width = factors(np.random.default_rng(), 1)[name].shape[0 if is_a else 1]
        if self.mode == "batch":
            stack = [_padded(np.zeros((width, 0) if is_a else (0, width), np.float32), is_a)]
            stack += [_padded(adapter[name], is_a) for adapter in adapters]
            return self.add("Gather", self.constant(f"{name}.all", np.stack(stack)), "checked_ids")

        shape = (width, "rank") if is_a else ("rank", width)
        if self.mode != "load":
            self.inputs[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        if self.mode != "portable":
            rank = LARGEST_RANK if self.mode == "load" else 1
            sizes = [size if isinstance(size, int) else rank for size in shape]
            self.constant(name, np.zeros(sizes, np.float32))
        return name

    def add_ids(self) -> None:
        """Add the input adapter_ids, and what it does with an id that no adapter has."""
        self.inputs["adapter_ids"] = helper.make_tensor_value_info(
            "adapter_ids", TensorProto.INT64, ["rows"]
        )
        count = len(self.computed.adapters)
        if self.computed.ids == "refused":
            numbers = self.constant("numbers", np.arange(count + 1))
            self.add("Gather", numbers, "adapter_ids", output="checked_ids")
            return
        last = self.constant("last", np.array(count))
        self.add("Min", "adapter_ids", last, output="checked_ids")
        if self.computed.ids == "NaN":
            column = self.add("Unsqueeze", "adapter_ids", self.constant("axes", np.array([1, 2])))
            self.add("Greater", column, last, output="outside")

    def constant(self, name: str, array: Array) -> str:
        self.constants[name] = np.ascontiguousarray(array) if array.ndim else array
        return name

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: int) -> str:
        """Add a node and return its output."""
        output = output or f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output


def _padded(factor: Array, is_a: bool) -> Array:
    """Return a factor with zeros up to LARGEST_RANK."""
    axis = 1 if is_a else 0
    return np.pad(factor, {axis: (0, LARGEST_RANK - factor.shape[axis])})


def _dtype(name: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(numpy_dtype(name)))


def _free(shape: list[int]) -> list[int | str]:
    """Return the shape of an input with its rows and length free."""
    return ["rows", "length", *shape[2:]]


# What goes wrong

Change = Callable[[Network], Network]


def scaled(scale: float, name: str = "de") -> Change:
    """Return a change that multiplies B of an adapter."""

    def change(known: Network) -> Network:
        adapter = {
            key: (array * np.float32(scale) if key.endswith("B") else array)
            for key, array in known.adapters[name].items()
        }
        return with_adapter(known, name, adapter)

    return change


def with_adapter(known: Network, name: str, adapter: Factors) -> Network:
    """Return a network with another adapter under a name."""
    return replace(known, adapters={**known.adapters, name: adapter})


def only(*names: str) -> Change:
    """Return a change that leaves out the adapters that are not named."""

    def change(known: Network) -> Network:
        return replace(known, adapters={name: known.adapters[name] for name in names})

    return change


def another_adapter(known: Network) -> Network:
    """The file of fr lies where that of de should."""
    return with_adapter(known, "de", known.adapters["fr"])


def without(target: str) -> Change:
    """Return a change after which an adapter does not reach a target."""

    def change(known: Network) -> Network:
        adapter = dict(known.adapters["de"])
        adapter[f"{target}.lora_B"] = np.zeros_like(adapter[f"{target}.lora_B"])
        return with_adapter(known, "de", adapter)

    return change


def random_factors(known: Network) -> Network:
    """The file has an adapter that nobody knows."""
    return with_adapter(known, "de", factors(np.random.default_rng(99), 2))


def another_base(known: Network) -> Network:
    """The file has other weights."""
    return replace(known, tensors={**known.tensors, "w1": network(5).tensors["w1"]})


def adapter_in_base(known: Network) -> Network:
    """An adapter was folded into the weights, and its own file is empty."""
    tensors = dict(known.tensors)
    for target in TARGETS:
        a, b = (known.adapters["de"][f"{target}.lora_{side}"] for side in "AB")
        tensors[target] = tensors[target] + a @ b
    return scaled(0)(replace(known, tensors=tensors))


def rounded(known: Network) -> Network:
    """All outputs move by 0.2 %, as in another precision."""
    shift = 0.002 * np.abs(known.outputs(None)).max()
    return replace(known, tensors={**known.tensors, "shift": np.array(shift, np.float32)})


def not_finite(known: Network) -> Network:
    """A factor has overflowed."""
    adapter = dict(known.adapters["de"])
    adapter["w2.lora_B"] = np.full_like(adapter["w2.lora_B"], 3e38)
    return with_adapter(known, "de", adapter)


def unchanged(known: Network) -> Network:
    """Nothing goes wrong."""
    return known


def both(first: Change, second: Change) -> Change:
    """Return a change that is one after another."""
    return lambda known: second(first(known))


@dataclass(frozen=True)
class Failure:
    """What a file computes that its probe does not say, and the verdicts.

    Attributes:
        change: From the network of the probe to that of the file.
        adapter: The verdict on de.
        base: The verdict on the base; empty where the probe does not know it.
        other: The verdict on fr.
        ids: The verdict on the ids of mode batch.
        prepare: Makes the network of the probe.
        edit: Changes the probe before it is written.
        modes: The kinds of files that it can happen to.
    """

    change: Change
    adapter: str
    base: str = "right"
    other: str = "right"
    ids: str = "right"
    prepare: Change = unchanged
    edit: Callable[[dict[str, Any]], object] = lambda probe: None
    modes: tuple[str, ...] = MODES

    def expected(self, mode: str) -> dict[str, Any]:
        """Return the verdicts on a file of a mode."""
        if mode == "merged":
            return {"adapters": {"de": self.adapter}}
        result: dict[str, Any] = {}
        if self.base:
            result["base"] = self.base
        if mode == "batch":
            result["ids"] = self.ids
        result["adapters"] = {"de": self.adapter, "fr": self.other}
        return result

    def write(self, folder: Path, mode: str) -> Path:
        """Write the file of a mode and those beside it into a folder, and return its path."""
        known = self.prepare(network())
        if mode == "merged":
            known = only("de")(known)
        probe = probe_of(known, mode)
        self.edit(probe)
        return write_model(folder, mode, self.change(known), json.dumps(probe))


def without_groups(probe: dict[str, Any]) -> None:
    """Leave out what a short probe has not."""
    for adapter in probe["adapters"].values():
        del adapter["groups"]


def of_float16(probe: dict[str, Any]) -> None:
    """Allow what the output's dtype rounds."""
    probe["outputs"]["y"]["tolerance"] = 2e-3


WITH_BASE = ("switch", "portable", "load", "batch")
FAILURES: Mapping[str, Failure] = {
    "right": Failure(unchanged, "right"),
    "no effect": Failure(scaled(0), "no effect"),
    "another adapter": Failure(another_adapter, "adapter fr", modes=WITH_BASE),
    "without a group": Failure(without("w2"), "without w2"),
    "half": Failure(scaled(0.5), "scaled by 0.5"),
    "double": Failure(scaled(2), "scaled by 2"),
    "a scale": Failure(scaled(1.45), "scaled by 1.45"),
    "a fine scale": Failure(scaled(1.37), "scaled by 1.37"),
    "a large scale": Failure(scaled(3), "scaled by 3"),
    "a scale near 1": Failure(scaled(0.95), "differs"),
    "a scale near 1, with a tolerance": Failure(scaled(1.1), "differs"),
    "not finite": Failure(not_finite, "not finite"),
    "unknown factors": Failure(random_factors, "differs"),
    "another base": Failure(another_base, "differs", "differs", "differs"),
    "an adapter in the base": Failure(
        adapter_in_base, "right", "adapter de", "differs", modes=WITH_BASE
    ),
    "another precision": Failure(
        rounded, "right in bfloat16", "right in bfloat16", "right in bfloat16"
    ),
    "no effect in another precision": Failure(
        both(scaled(0), rounded), "no effect in bfloat16", "right in bfloat16", "right in bfloat16"
    ),
    "a precision that was not measured": Failure(
        rounded, "differs", "differs", "differs", edit=lambda probe: probe.pop("precisions")
    ),
    "almost nothing": Failure(unchanged, "too small to tell", prepare=scaled(1e-9)),
    "two causes": Failure(scaled(0), "no effect or without w1", prepare=without("w2")),
    "a short probe": Failure(without("w2"), "differs", edit=without_groups),
    "an unknown base": Failure(scaled(0), "differs", "", edit=lambda probe: probe.pop("base")),
    "float16": Failure(lambda known: replace(known, dtype="float16"), "right", edit=of_float16),
    "no effect in float16": Failure(
        both(scaled(0), lambda known: replace(known, dtype="float16")), "no effect", edit=of_float16
    ),
    "the last adapter for every id": Failure(
        lambda known: replace(known, ids="last"),
        "right",
        ids="ids are not checked",
        modes=("batch",),
    ),
    "NaN for wrong ids": Failure(
        lambda known: replace(known, ids="NaN"), "right", modes=("batch",)
    ),
}
"""What can be seeded, by what it is called."""
