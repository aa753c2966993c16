"""What an ONNX file of ours says of itself: the tensors an adapter brings, and the sizes it takes.

The manifest of a switchable file is JSON in the model's metadata under `lora_fx.manifest`. For
every key it names two tensors: A [*batch, in, rank] and B [*batch, rank, out], scale multiplied
into B, so that the change of y is (x A) B. In mode switch they are inputs that have defaults; in
mode load initialisers of a fixed rank, which a session replaces when it is made. Adapter files,
sessions and checks read it; nothing guesses names.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lora_fx.adapter.adapter import Adapter, check_plain
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import from_json, to_json
from lora_fx.adapter.variant import (
    bare,
    expect_variant,
    fields_of_files,
    learning,
    slots_of,
    with_values,
)
from lora_fx.conditions import Condition
from lora_fx.dtypes import Array
from lora_fx.errors import (
    LoraFxError,
    MisfitError,
    check_format,
    expect_path,
    one_line,
    retold,
    stamp,
)
from lora_fx.files.read import open_input
from lora_fx.files.strict_json import json_object, json_value
from lora_fx.ir.layout import Layout
from lora_fx.onnx.graph.flow import dtype_name
from lora_fx.onnx.load import load
from lora_fx.onnx.validity import blaming
from lora_fx.targets.target import own_use
from lora_fx.text import Json, JsonView, near

if TYPE_CHECKING:
    import onnxruntime as ort

PROPERTY = "lora_fx.manifest"


def read_manifest(text: str, where: str) -> Json:
    """The JSON of any mode's manifest.

    Raises:
        LoraFxError: It is damaged, or of a later format.
    """
    data = json_object(text, f"{where}: its manifest", hint="export the model again")
    check_format(data, f"{where}: its manifest")
    return data


@dataclass(frozen=True)
class SwitchSlot:
    """The two tensors of one key.

    Attributes:
        a: Name of A [*batch, in, rank].
        b: Name of B [*batch, rank, out].
        inside: Size of in.
        out: Size of out.
        batch: Sizes before them (experts of a stack); empty for a plain matrix.
        shape: The stored shape of the weight in the ONNX file.
        op: The op that reads the weight.
        role: What the weight is for (q, k, v …), or empty.
        rank: The rank of the default, which changes nothing: 0, or 1 (zeros) where 0 is not safe.
            In mode load, the largest that an adapter may have.
        dtype: The dtype of both tensors.
    """

    a: str
    b: str
    inside: int
    out: int
    batch: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    op: str = ""
    role: str = ""
    rank: int = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class Manifest:
    """The slots of a file by key, and its mode.

    Attributes:
        slots: What an adapter has to bring, by key.
        mode: switch, load or train.
        training: In mode train: `optimizer`, `weight_decay`, `clip`, `loss`, `labels`, `seed` where
            there are dropouts, `states` (name of a slot → those of its states), `updates` (key →
            what `adapter` reads) and the `metadata` of the adapter.
    """

    slots: Mapping[str, SwitchSlot]
    mode: str = "switch"
    training: JsonView = field(default_factory=dict)

    def to_text(self) -> str:
        """The manifest as JSON, for the model's metadata."""
        slots = {k: asdict(s) for k, s in self.slots.items()}
        more = {"training": self.training} if self.training else {}
        return json.dumps({**stamp(), "mode": self.mode, "slots": slots, **more})

    @classmethod
    def from_text(cls, text: str, where: str) -> Manifest:
        """Read what `to_text` wrote.

        Raises:
            LoraFxError: No manifest, one of another mode, or one of another version.
        """
        data = read_manifest(text, where)
        try:
            if data["mode"] not in ("switch", "load", "train"):
                raise LoraFxError(
                    f"{where}: a file of mode {data['mode']}, whose adapters are in it",
                    "files of modes switch and load take adapters: lora-fx export --mode switch",
                )
            slots = {}
            for key, s in data["slots"].items():
                fields = {**s, "batch": tuple(s["batch"]), "shape": tuple(s["shape"])}
                slots[key] = SwitchSlot(**fields)
            return cls(slots, str(data["mode"]), data.get("training", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise LoraFxError(f"{where}: its manifest is damaged", "export the model again") from e

    def tensors(self, adapter: Adapter, where: str = "the adapter") -> dict[str, Array]:
        """The tensors of an adapter by their names in the file, the scale multiplied into B.

        Args:
            adapter: Keys as in the manifest, or a file's own names where those can be resolved.
            where: What errors call it.

        Raises:
            LoraFxError: A key that the file has no slot for, a shape that does not fit, or an
                entry that is no low-rank update.
        """
        adapter = adapter.resolved(self.slots)
        check_plain(adapter, f"{where}: a switchable file")
        if adapter.full:
            raise LoraFxError(
                f"{where}: {next(iter(adapter.full))!r} is a whole tensor; expected s·b·a",
                "export --mode merged folds whole tensors",
            )
        result: dict[str, Array] = {}
        for key, low in adapter.lowrank.items():
            slot = self.slots.get(key)
            if slot is None or low.use != own_use(key):
                name = key if "@" in key or not low.use else f"{key}@{low.use}"
                raise LoraFxError(
                    f"{where}: {name!r} is no target of the file", near(key, self.slots)
                )
            result[slot.a] = _stored(low.a, slot.dtype)
            result[slot.b] = _stored(low.b * np.float32(low.scale), slot.dtype)
        self.check(result, where)
        return result

    def adapter(self, tensors: Mapping[str, Array]) -> Adapter:
        """The adapter of tensors by their names in the file; the inverse of `tensors`."""
        entries = {}
        for key, row in self.training["updates"].items():
            slot = self.slots[key]
            a, b = (np.swapaxes(tensors[n], -1, -2).copy() for n in (slot.a, slot.b))
            u = update_of(row, {"a": a, "b": b})
            entries[key] = replace(u, b=b / np.float32(u.scale))
        return Adapter(entries, {**self.training["metadata"], **learning(entries)})

    def check(self, tensors: Mapping[str, Array], where: str) -> None:
        """Compare tensors with the slots.

        Raises:
            LoraFxError: An unknown name, half a pair, a shape, rank or dtype that does not fit.
        """
        known = {name: key for key, s in self.slots.items() for name in (s.a, s.b)}
        for name in tensors:
            if name not in known:
                raise LoraFxError(
                    f"{where}: tensor {name!r} is no input of the file", near(name, known)
                )
        if not tensors:
            raise LoraFxError(f"{where}: it holds no tensors", "was it converted for this file?")
        for key in dict.fromkeys(known[name] for name in tensors):
            self._check_pair(self.slots[key], tensors, where)

    def check_declared(
        self, declared: Mapping[str, tuple[str, Sequence[object]]], where: str
    ) -> None:
        """Compare the slots with what the graph has of them; another program may have changed it.

        Args:
            declared: Dtype and shape of the graph's tensors by name; sizes that are free are no
                numbers.
            where: What errors call the file.

        Raises:
            LoraFxError: A slot that the graph has no longer, or has in another dtype or shape.
        """
        hint = (
            "a program that simplifies or converts models has changed it since (onnxsim folds what "
            "has a default): take the file that export wrote"
        )
        for key, slot in self.slots.items():
            wanted = {
                slot.a: (*slot.batch, slot.inside, None),
                slot.b: (*slot.batch, None, slot.out),
            }
            for name, sizes in wanted.items():
                if name not in declared:
                    raise LoraFxError(
                        f"{where}: the graph has no {name!r}, which its manifest names for {key!r}",
                        hint,
                    )
                dtype, shape = declared[name]
                if dtype != slot.dtype:
                    raise LoraFxError(
                        f"{where}: {name!r} is {dtype}, and {slot.dtype} in its manifest", hint
                    )
                pairs = zip(sizes, shape, strict=False)
                fixed = [(size, n) for size, n in pairs if size is not None and isinstance(n, int)]
                same = len(sizes) == len(shape) and all(size == n for size, n in fixed)
                if not same:
                    shown = ", ".join("rank" if n is None else str(n) for n in sizes)
                    raise LoraFxError(
                        f"{where}: {name!r} is {list(shape)}, and [{shown}] in its manifest", hint
                    )

    def padded(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors with zeros up to the rank of their slots, which change no product."""
        result = {}
        for slot in self.slots.values():
            for name, axis in ((slot.a, -1), (slot.b, -2)):
                if name in tensors:
                    more = slot.rank - tensors[name].shape[axis]
                    result[name] = np.pad(tensors[name], {axis: (0, more)})
        return result

    def _check_pair(self, slot: SwitchSlot, tensors: Mapping[str, Array], where: str) -> None:
        for name, other in ((slot.a, slot.b), (slot.b, slot.a)):
            if name not in tensors:
                raise LoraFxError(
                    f"{where}: tensor {other!r} is there and {name!r} is missing",
                    "convert the adapter again",
                )
        a = tensors[slot.a]
        rank = a.shape[-1] if a.ndim else 0
        wanted = {slot.a: (*slot.batch, slot.inside, rank), slot.b: (*slot.batch, rank, slot.out)}
        if self.mode == "load" and rank > slot.rank:
            raise LoraFxError(
                f"{where}: tensor {slot.a!r} has rank {rank}; expected at most {slot.rank}",
                f"lora-fx export --mode load --rank {rank} makes room for it",
            )
        for name, shape in wanted.items():
            found = tensors[name]
            if found.shape != shape:
                raise MisfitError(
                    f"{where}: tensor {name!r} is {list(found.shape)}; expected {list(shape)}"
                )
            if found.dtype.name != slot.dtype:
                raise LoraFxError(
                    f"{where}: tensor {name!r} is {found.dtype.name}; expected {slot.dtype}",
                    "lora-fx convert ADAPTER --for X.onnx writes the dtype of the file",
                )


IDS = "adapter_ids"
"""The input of mode batch that says which adapter each row has."""


@dataclass(frozen=True)
class RowChoice:
    """What the input `adapter_ids` of a file of mode batch may hold.

    Attributes:
        adapters: Their names, in the order of their ids, 1, 2 …; 0 is the base.
        rowed: The inputs whose dimension 0 is the batch.
    """

    adapters: Sequence[str]
    rowed: Sequence[str]

    @classmethod
    def from_text(
        cls, text: str | None, shapes: Mapping[str, Sequence[object]]
    ) -> RowChoice | None:
        """The choice that a file's manifest leaves; None where it is of another mode.

        Args:
            text: The manifest, where the file has one.
            shapes: Sizes and symbols of the inputs by name.
        """
        sizes = shapes.get(IDS)
        if text is None or sizes is None or len(sizes) != 1:
            return None
        data = read_manifest(text, "the model")
        names = data.get("adapters")
        if data.get("mode") != "batch" or not isinstance(names, list):
            return None
        rowed = [n for n, s in shapes.items() if n != IDS and s and s[0] == sizes[0]]
        return cls(tuple(map(str, names)), tuple(rowed))

    def check(self, feeds: Mapping[str, Array]) -> None:
        """Raise for ids that are missing, of another dtype or shape, or out of range.

        Raises:
            LoraFxError: The runtime would refuse them, or answer with NaN.
        """
        last = len(self.adapters)
        names = [repr(n) for n in self.adapters]
        shown = ", ".join(names if last <= 4 else [*names[:3], "…", names[-1]])
        hint = f"int64 [batch]: 0 is the base, 1 to {last} are the adapters {shown}"
        if IDS not in feeds:
            raise LoraFxError(f"input {IDS!r} is missing: which adapter has each row?", hint)
        ids = feeds[IDS]
        if not isinstance(ids, np.ndarray) or ids.dtype != np.int64:
            found = ids.dtype if isinstance(ids, np.ndarray) else type(ids).__name__
            raise LoraFxError(f"input {IDS!r} is {found}; expected an array of int64", hint)
        rows = next((feeds[n].shape[0] for n in self.rowed if n in feeds and feeds[n].ndim), None)
        if ids.ndim != 1 or rows not in (None, len(ids)):
            wanted = "[batch]" if rows is None else f"[{rows}], one for each row"
            raise LoraFxError(f"input {IDS!r} is {list(ids.shape)}; expected {wanted}", hint)
        outside = np.flatnonzero((ids < 0) | (ids > last))
        if outside.size:
            row = int(outside[0])
            raise LoraFxError(
                f"input {IDS!r}: row {row} asks for adapter {ids[row]}, which is out of range; "
                f"expected 0 to {last}",
                hint,
            )


def _stored(matrix: Array, dtype: str) -> Array:
    """A matrix, or a stack of them, transposed and contiguous."""
    return np.ascontiguousarray(np.swapaxes(matrix, -1, -2).astype(dtype))


def manifest_of(path: str | PathLike[str]) -> Manifest:
    """The manifest of an ONNX file, read without its weights.

    Raises:
        LoraFxError: The file cannot be read, or is not switchable.
    """
    expect_path(path, "the model", "the path of an .onnx file")
    try:
        model = ir.load(fspath(path))
        text = model.metadata_props.get(PROPERTY)
    except Exception as e:  # protobuf's and the system's errors have no common base
        raise LoraFxError(
            f"{fspath(path)}: not an ONNX file that can be read",
            "is it a file of lora-fx export --mode switch, load or batch?",
        ) from e
    manifest = manifest_in(text, fspath(path))
    slots = list(model.graph.inputs)
    if manifest.mode == "load":
        slots = list(model.graph.initializers.values())
    if manifest.mode == "switch":
        slots = [v for v in slots if v.is_initializer()]
    declared = {str(v.name): (dtype_name(v), tuple(v.shape or ())) for v in slots}
    manifest.check_declared(declared, fspath(path))
    return manifest


def manifest_in(text: str | None, where: str) -> Manifest:
    """The manifest that a file's metadata has; raises where there is none."""
    if text is None:
        raise LoraFxError(
            f"{where}: no manifest of lora-fx: the file is not switchable",
            "lora-fx export MODEL -o X.onnx --mode switch writes one",
        )
    return Manifest.from_text(text, where)


# The tensors of an .onnx_adapter file, read and written by ONNX Runtime.
#
# `AdapterFormat.set_parameters` keeps pointers into the arrays: where those are gone before
# `export_adapter`, the file holds garbage and nothing says so. They are held here, and the file is
# read back and compared. bfloat16 has no numpy type in the runtime, so it goes as bits.


SERVED = int.from_bytes(b"LFX1")
"""The adapter_version of files with A [*batch, in, rank] and B [*batch, rank, out], as a graph's
inputs have them: a file of the runtime has room for no other mark."""
_BF16 = 16
"""The number of BFLOAT16 in onnx.TensorProto.DataType."""


def read_file(path: Path) -> tuple[dict[str, Array], dict[str, int]]:
    """The tensors by name, in name order, and adapter_version and model_version.

    Raises:
        LoraFxError: Not there, not such a file, or damaged.
    """
    from onnxruntime import AdapterFormat

    open_input(path).close()  # the runtime calls a file that is not there damaged
    damaged = f"{path}: a damaged ONNX Runtime adapter"
    again = "the download or copy may be incomplete; fetch the file again"
    with retold(damaged, again, (RuntimeError, ValueError)):
        file = AdapterFormat.read_adapter(str(path))
        values = file.get_parameters()
        tensors = {name: _array(values[name]) for name in sorted(values)}
    versions = {
        "adapter_version": int(file.get_adapter_version()),
        "model_version": int(file.get_model_version()),
    }
    return tensors, versions


def write_file(path: Path, tensors: Mapping[str, Array], versions: Mapping[str, int]) -> None:
    """Write a file and compare what it reads back as, bit by bit.

    Args:
        path: The file to create.
        tensors: Arrays by name.
        versions: adapter_version and model_version.

    Raises:
        LoraFxError: The file does not hold what was given.
    """
    from onnxruntime import AdapterFormat, OrtValue

    held = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    bits = {n: a.view(np.uint16) for n, a in held.items() if a.dtype == ml_dtypes.bfloat16}
    file = AdapterFormat()
    file.set_adapter_version(versions["adapter_version"])
    file.set_model_version(versions["model_version"])
    values = {n: OrtValue.ortvalue_from_numpy(a) for n, a in held.items() if n not in bits}
    values |= {n: OrtValue.ortvalue_from_numpy_with_onnx_type(b, _BF16) for n, b in bits.items()}
    file.set_parameters(values)
    try:
        file.export_adapter(str(path))
        again, _ = read_file(path)
    except (RuntimeError, LoraFxError) as error:
        _refuse_full_disk(path, 65_536 + sum(array.nbytes for array in held.values()))
        raise LoraFxError(
            f"{path.name}: ONNX Runtime cannot write it: {one_line(error, 160)}",
            "is there space and access?",
        ) from error
    for name, array in held.items():
        got = again.get(name)
        if got is None or got.dtype != array.dtype or got.tobytes() != array.tobytes():
            raise LoraFxError(
                f"{path}: tensor {name!r} does not read back as it was written",
                "is the disk full? write it again",
            )


def write_adapter(adapter: Adapter, manifest: Manifest, path: Path) -> None:
    """Write an .onnx_adapter for the file that the manifest is of."""
    write_file(path, manifest.tensors(adapter), {"adapter_version": SERVED, "model_version": 1})


def _refuse_full_disk(path: Path, size: int) -> None:
    """Raise what the system says of so many bytes at a path; the runtime says nothing of it.

    Raises:
        OSError: They cannot be written.
    """
    with open(path, "wb") as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())


def _array(value: ort.OrtValue) -> Array:
    """An own copy of a value of the runtime."""
    if value.data_type() != "tensor(bfloat16)":
        return np.array(value.numpy())
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(data, ml_dtypes.bfloat16).reshape(value.shape()).copy()


# Branches that insert put into an .onnx file: their list in the metadata, and the way back to an
# Adapter.
#
# A is [*batch, rank, in] and B [*batch, out, rank], as in an Adapter; the scale is a node.


def listed(updates: Mapping[str, LowRank], metadata: JsonView) -> str:
    """The bound updates by key, and their adapter's metadata, as JSON for the model's metadata."""
    targets = {}
    for key, u in updates.items():
        targets[key] = {**{slot.field: slot.name for slot in slots_of(key, u)}, **row_of(u)}
    return json.dumps({**stamp(), "mode": "insert", "targets": targets, "metadata": metadata})


def row_of(u: LowRank) -> Json:
    """All of a bound update but its tensors."""
    assert u.layout is not None
    said = to_json(u, "frozen", "rank", "alpha", "variant", "use", "extra")
    return {**said, "layout": list(u.layout.to_json().values())}  # without names, as 0.1 reads it


def update_of(row: JsonView, values: Mapping[str, Array]) -> LowRank:
    """The update of a row and its tensors by field."""
    layout = Layout(*(tuple(part) for part in row["layout"]))
    low = from_json(bare(values, row), {**row, "layout": layout.to_json()})
    return with_values(low, values)


@blaming
def adapter_in(path: str | PathLike[str]) -> Adapter:
    """Read the adapter whose branches stand in a file that insert wrote, trained since.

    Raises:
        LoraFxError: The file has no such branches, or one was renamed.
    """
    model = load(path)
    text = model.metadata_props.get(PROPERTY)
    found = read_manifest(text, str(path)) if text else {}
    if found.get("mode") != "insert":
        raise LoraFxError(
            f"{path}: an ONNX file without trainable branches",
            "lora-fx insert X.onnx -o Y.onnx adds them; lora-fx merge takes the model as its base",
        )
    entries = {}
    for key, row in found["targets"].items():
        expect_variant(str(row.get("variant", "lora")), f"{path}: the update of {key!r}")
        values = {f: _tensor(model, row[f], path) for f in fields_of_files() if f in row}
        entries[key] = update_of(row, values)
    return Adapter(entries, {**found.get("metadata", {}), **learning(entries)})


def check_no_slots(model: ir.Model, path: Path) -> None:
    """Raise for a file that a mode, or insert, has made for adapters."""
    if PROPERTY in model.metadata_props:
        raise LoraFxError(f"{path}: it has slots for adapters already", "start from its base")


def _tensor(model: ir.Model, name: str, path: str | PathLike[str]) -> Array:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise LoraFxError(f"{path}: tensor {name!r} is missing", "was it renamed?")
    return np.array(value.const_value.numpy(), np.float32)


# The sizes that a file is true for: in its metadata, and as nodes that fail elsewhere.
#
# A guard is a Reshape of an input to its own shape, or where the condition does not hold to
#
#     shape' = shape + (shape + 1) · broken
#
# which has another number of elements. ONNX has no assertion; a Reshape compares the two numbers on
# the host, on the CPU as with CUDA, and its name, which the runtime's error quotes, says what is
# wrong. A Gather out of range fails on the CPU only.


RANGES = "lora_fx.ranges"
GUARD = "lora_fx holds for "
_OPS = {
    "Add": "Add", "Sub": "Sub", "Mult": "Mul", "Mod": "Mod", "min": "Min", "max": "Max",
    "Lt": "Less", "LtE": "LessOrEqual", "Gt": "Greater", "GtE": "GreaterOrEqual", "Eq": "Equal",
    "Or": "Or", "And": "And",
}  # fmt: skip


def say_within(model: ir.Model, conditions: Sequence[Condition]) -> None:
    """Write conditions on a model's inputs into its metadata; a file of ours may have them."""
    own = _of_inputs(model, conditions)
    if own:
        model.metadata_props.setdefault(RANGES, json.dumps([c.stored() for c in own]))


def guard_within(model: ir.Model, conditions: Sequence[Condition]) -> None:
    """Put nodes in that fail where one of the conditions does not hold; once for a model."""
    inputs = {str(v.name): v for v in model.graph.inputs}
    if any(str(n.name).startswith(GUARD) for n in model.graph):
        return
    for i, condition in enumerate(_of_inputs(model, conditions)):
        _guard(model.graph, inputs[condition.sizes[0][1]], inputs, condition, i)


def _of_inputs(model: ir.Model, conditions: Sequence[Condition]) -> list[Condition]:
    """Those over the model's inputs, without folders of this machine."""
    names = {str(v.name) for v in model.graph.inputs}
    own = (c for c in conditions if all(n in names for _, n, _ in c.sizes))
    return [Condition.read(c.stored()) for c in own]


def conditions_of(metadata: Mapping[str, str], where: str) -> tuple[Condition, ...]:
    """What a file says of its sizes; nothing where another program wrote it."""
    text = metadata.get(RANGES)
    if text is None:
        return ()
    try:
        return tuple(Condition.read(row) for row in json_value(text, where))
    except (ValueError, TypeError, KeyError, LoraFxError) as e:
        raise LoraFxError(
            f"{where}: its metadata {RANGES} is damaged", "export the model again"
        ) from e


class _Nodes:
    """The nodes of one guard."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.nodes = prefix, list[ir.Node]()

    def op(
        self, kind: str, *xs: ir.Value | int, name: str = "", **given: int | ir.TensorProtocol
    ) -> ir.Value:
        values = [self.value(x) for x in xs]
        own = f"{self.prefix}_{len(self.nodes)}"
        node = ir.node(kind, values, given, name=name or own)
        node.outputs[0].name = f"{own}_value"
        self.nodes.append(node)
        return node.outputs[0]

    def value(self, x: ir.Value | int) -> ir.Value:
        return self.op("Constant", value=ir.tensor([x])) if isinstance(x, int) else x

    def make(self, op: str, xs: Sequence[ir.Value | int]) -> ir.Value | int:
        if op == "NotEq":
            return self.op("Not", self.op("Equal", *xs))
        if op == "FloorDiv":  # ONNX rounds towards zero
            x, by = map(self.value, xs)
            return self.op("Div", self.op("Sub", x, self.op("Mod", x, by)), by)
        return self.op(_OPS[op], *xs)


def _guard(
    graph: ir.Graph, x: ir.Value, inputs: Mapping[str, ir.Value], condition: Condition, i: int
) -> None:
    made = _Nodes(f"lora_fx_within_{i}")
    users = [(u.node, u.idx) for u in x.uses()]
    sizes: dict[str, ir.Value | int] = {
        n: made.op("Gather", made.op("Shape", inputs[name]), d) for n, name, d in condition.sizes
    }
    holds = condition.build(made.make, sizes)
    assert isinstance(holds, ir.Value)
    broken = made.op("Cast", made.op("Not", holds), to=int(ir.DataType.INT64))
    shape = made.op("Shape", x)
    other = made.op("Add", shape, made.op("Mul", made.op("Add", shape, 1), broken))
    name = f"{GUARD}{condition} only"
    if any(node.name == name for node in graph):  # another one comes to the same bound
        name = f"{name} ({i})"
    y = made.op("Reshape", x, other, name=name)
    y.type, y.shape = x.type, x.shape
    for node, index in users:
        node.replace_input_with(index, y)
    if x in graph.outputs:
        graph.outputs[graph.outputs.index(x)] = y
    graph.insert_before(graph[0], made.nodes)
