"""The manifest of a switchable ONNX file: the tensors that an adapter provides for each key.

It is JSON in the model's metadata under `lora_fx.manifest`. For every key it names two tensors: A
[*batch, in, rank] and B [*batch, rank, out], scale multiplied into B, so that the change of y is (x
A) B. A slot for DoRA has a third, D [*batch, out] (see lora_fx.adapter.scaled_rows), and a hash of
the weight, since D holds for one base. In mode switch they are inputs, which have defaults unless
the file is portable; in mode load initialisers of a fixed rank, which a session replaces when it is
made. Adapter files, sessions and checks read it; nothing guesses names. The manifest of a .pt2 file
has the same in JSON.

Under `whole` it has the tensors that adapters replace, a new head for example, in the shape that
the parameter has in the model. The default of each is the base's own value.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.evaluated import BASE_NUMBER, base_number, check_served
from lora_fx.adapter.learning import learning
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.scaled_rows import GAINS, has_gains
from lora_fx.adapter.updates import Dense, ReplacedRows, name_of
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import (
    LoraFxError,
    MisfitError,
    check_format,
    expect_file,
    expect_path,
    stamp,
)
from lora_fx.files.program_manifest import BASE_ENDING, SWITCH, program_manifest
from lora_fx.files.strict_json import json_object
from lora_fx.files.tensor_files import read_tensors
from lora_fx.onnx.graph.values import dtype_name
from lora_fx.onnx.row_starts import Starts
from lora_fx.onnx.update_row import update_of
from lora_fx.targets.keys import own_use
from lora_fx.text import Json, JsonView, near

PROPERTY = "lora_fx.manifest"
WHOLE_FORMAT = 2
"""The format of manifests that have `whole`; those without it have format 1."""
CHANGED_SINCE = (
    "take the file that export wrote: another program has changed this one (onnxsim, for "
    "example, folds inputs with a default)"
)
"""The hint for a graph and a manifest that do not agree."""
NEEDS_BASE = (
    "write its file for this base, from the adapter as it was trained: lora-fx convert ADAPTER "
    "-o X.onnx_adapter --for MODEL.onnx; for a .pt2 file, give the adapter to lora-fx export"
)
"""The hint for an update that has to be evaluated on the base first."""
NO_GAINS = (
    "give an adapter that is DoRA to the export of the file, or pass --variant dora; or write this "
    "one as plain LoRA: lora-fx convert ADAPTER -o OUT --as lora --rank 16 --base MODEL"
)
"""The hint for a slot that has no input for the factors of rows."""


def read_manifest(text: str, where: str) -> Json:
    """Parse the JSON of a manifest of any mode.

    Raises:
        LoraFxError: It is damaged, or of a later format.
    """
    data = json_object(text, f"{where}: its manifest", hint="export the model again")
    check_format(data, f"{where}: its manifest", WHOLE_FORMAT)
    return data


@dataclass(frozen=True)
class SwitchSlot:
    """The adapter tensors of one key.

    Attributes:
        a: Name of A [*batch, in, rank].
        b: Name of B [*batch, rank, out].
        inside: Size of in.
        out: Size of out.
        batch: Sizes before them (experts of a stack); empty for a plain matrix.
        shape: The stored shape of the weight in the ONNX file.
        op: The op that reads the weight.
        role: What the weight is for (q, k, v …), or empty.
        rank: The rank of the default, which changes nothing: 0, or 1 (zeros) where 0 is not safe;
            where A and B are required, the rank of the zeros that a run of the base gives.
            In mode load, the largest that an adapter may have.
        dtype: The dtype of the tensors.
        d: Name of D [*batch, out], the factors of rows less 1; empty where the slot has none.
        weight: The hash of the weight, where the slot has D; see lora_fx.adapter.evaluated.
        layout: How the weight lies in the ONNX file, where the slot has D; fields of a Layout.
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
    d: str = ""
    weight: str = ""
    layout: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors: A, B, and D where there is one."""
        return (self.a, self.b, self.d) if self.d else (self.a, self.b)

    def tensor_shapes(self, rank: int | None) -> dict[str, tuple[int | None, ...]]:
        """Return the shapes of the tensors by name, for an update of a rank (None: any rank)."""
        shapes: dict[str, tuple[int | None, ...]] = {
            self.a: (*self.batch, self.inside, rank),
            self.b: (*self.batch, rank, self.out),
        }
        if self.d:
            shapes[self.d] = (*self.batch, self.out)
        return shapes

    def to_json(self) -> Json:
        """Return the slot as JSON, in which D and the hash are left out where there are none."""
        fields = asdict(self)
        if not self.d:
            del fields["d"], fields["weight"], fields["layout"]
        return fields


@dataclass(frozen=True)
class WholeSlot:
    """The tensor of one key that an adapter replaces.

    Attributes:
        name: Its name in the file.
        shape: Its shape, as it is stored.
        dtype: Its dtype.
        aliases: Other names of the parameter that an adapter may have it under.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    aliases: tuple[str, ...] = ()

    def stored(self, value: Array) -> Array:
        """Return an adapter's value of the tensor in the dtype of the file."""
        return np.ascontiguousarray(value.astype(numpy_dtype(self.dtype)))

    def check(self, tensor: Array, where: str) -> None:
        """Raise for a tensor of another shape or dtype."""
        if tensor.shape != self.shape:
            raise MisfitError(
                f"{where}: the whole tensor {self.name!r} is {list(tensor.shape)}; expected "
                f"{list(self.shape)}",
                "export a file for adapters with this shape; all adapters of a file share it",
            )
        if tensor.dtype.name != self.dtype:
            raise LoraFxError(
                f"{where}: tensor {self.name!r} is {tensor.dtype.name}; expected {self.dtype}",
                "write the dtype of the file with lora-fx convert ADAPTER --for X.onnx",
            )


@dataclass(frozen=True)
class Manifest:
    """The slots of a file by key, and its mode.

    Attributes:
        slots: What an adapter has to bring, by key.
        whole: The tensors that an adapter may replace, by key.
        base: In memory only: the base's value of each of these by its name, where the file has no
            default for it.
        mode: switch, load or train.
        training: In mode train: `optimizer`, `weight_decay`, `clip`, `loss`, `labels`, `seed` where
            there are dropouts, `states` (name of a slot → those of its states), `updates` (key →
            what `adapter` reads) and the `metadata` of the adapter.
        required: In mode switch: A and B have no defaults, and every run has to give them.
        rank: In mode switch, the rank that A and B have in every run; 0 where each may have any.
        largest_rank: The largest of ranks that are free; 0 where there is none.
        starts: Where adapters begin to act, in a file with the input `adapter_starts`.
    """

    slots: Mapping[str, SwitchSlot]
    mode: str = "switch"
    training: JsonView = field(default_factory=dict)
    required: bool = False
    rank: int = 0
    largest_rank: int = 0
    whole: Mapping[str, WholeSlot] = field(default_factory=dict)
    base: Mapping[str, Array] = field(default_factory=dict, compare=False)
    starts: Starts | None = None

    def to_text(self) -> str:
        """Return the manifest as JSON, for the model's metadata."""
        data: Json = {**stamp(WHOLE_FORMAT if self.whole else 1), "mode": self.mode}
        data["slots"] = {key: slot.to_json() for key, slot in self.slots.items()}
        if self.whole:
            data["whole"] = {key: asdict(slot) for key, slot in self.whole.items()}
        if self.rank:
            data["rank"] = self.rank
        if self.largest_rank:
            data["largest_rank"] = self.largest_rank
        if self.training:
            data["training"] = self.training
        if self.required:
            data["required"] = True
        if self.starts is not None:
            data["starts"] = self.starts.to_json()
        return json.dumps(data)

    @classmethod
    def from_text(cls, text: str, where: str) -> Manifest:
        """Parse the text that `to_text` wrote.

        Raises:
            LoraFxError: No manifest, one of another mode, or one of another version.
        """
        data = read_manifest(text, where)
        try:
            if data["mode"] not in ("switch", "load", "train"):
                raise LoraFxError(
                    f"{where}: a file of mode {data['mode']} already contains its adapters and "
                    "takes no others",
                    "run it with onnxruntime.InferenceSession; or export a file that takes "
                    "adapters: lora-fx export --mode switch or load",
                )
            slots = {key: _slot_from_json(fields) for key, fields in data["slots"].items()}
            return cls(
                slots,
                str(data["mode"]),
                data.get("training", {}),
                data.get("required", False) is True,
                int(data.get("rank", 0)),
                int(data.get("largest_rank", 0)),
                {key: _whole_from_json(row) for key, row in data.get("whole", {}).items()},
                starts=Starts.from_json(data["starts"]) if "starts" in data else None,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise LoraFxError(f"{where}: its manifest is damaged", "export the model again") from e

    def tensors(self, adapter: Adapter, where: str = "the adapter") -> dict[str, Array]:
        """Return an adapter's tensors by their names in the file; the scale is multiplied into B.

        Args:
            adapter: Keys as in the manifest, or a file's own names where those can be resolved.
            where: What errors call it.

        Raises:
            LoraFxError: A key that the file has no slot for, a shape that does not fit, or an
                entry that is neither a low-rank update nor a whole tensor.
        """
        adapter = adapter.resolved({**self.slots, **self.whole})
        for key, entry in adapter.entries.items():
            if isinstance(entry, (Dense, ReplacedRows)):
                self.whole_slot(key, where)
        check_served(adapter, f"{where}: a switchable file", NEEDS_BASE)
        if adapter.invocation and self.starts is None:
            raise LoraFxError(
                f"{where}: it is an aLoRA, and the file has no input that says from which token on "
                "an adapter acts",
                "export the file with this adapter: lora-fx export MODEL ADAPTER --mode switch",
            )
        tensors = self._whole_tensors(adapter, where)
        for key, update in adapter.lowrank.items():
            slot = self._slot_of(key, update, where)
            scaled_b = update.b * np.float32(update.scale)
            tensors[slot.a] = _transposed(update.a, slot.dtype)
            tensors[slot.b] = _transposed(scaled_b, slot.dtype)
            if has_gains(update):
                if not slot.d:
                    raise LoraFxError(
                        f"{where}: {key!r} is {name_of(update)}, and the file has no input for the "
                        "factors of its rows",
                        NO_GAINS,
                    )
                tensors[slot.d] = update.variant_tensors[GAINS].astype(slot.dtype)
        self.check(tensors, where)
        self.check_base(tensors, adapter.metadata.get(BASE_NUMBER), where)
        return tensors

    def check_base(self, tensors: Mapping[str, Array], number: object, where: str) -> None:
        """Raise for factors of rows that were computed from another base.

        Args:
            tensors: Those of an adapter, by name.
            number: That of the base for which they were computed.
            where: What errors call the adapter.
        """
        keys = [key for key, slot in self.slots.items() if slot.d and slot.d in tensors]
        hashes = {key: slot.weight for key, slot in self.slots.items()}
        if keys and number != base_number(hashes, keys):
            raise LoraFxError(
                f"{where}: the factors of its rows (DoRA) were computed from another base than "
                "this file's",
                NEEDS_BASE,
            )

    def all_tensors(self, adapter: Adapter, where: str = "the adapter") -> dict[str, Array]:
        """Return A and B of every slot, for a file whose inputs have no defaults.

        Slots that the adapter has no update for get zeros. Where the file fixes the rank, all
        tensors are padded to it with zeros.

        Args:
            adapter: As in `tensors`; without entries, it stands for the base.
            where: What errors call it.
        """
        tensors = self.tensors(adapter, where) if adapter.entries else {}
        tensors = {**self.zeros(), **self.base, **tensors}
        self.check_whole(tensors, where)
        return self.padded(tensors) if self.rank else tensors

    def check_whole(self, names: Collection[str], where: str) -> None:
        """Raise for a whole tensor without a value, where the file's inputs have no defaults.

        Args:
            names: The names of the tensors that have values.
            where: What errors call the adapter.
        """
        for slot in self.whole.values():
            if self.required and slot.name not in names:
                raise LoraFxError(
                    f"{where}: it does not hold {slot.name!r}, and the file of the base's value, "
                    f"X{BASE_ENDING}, is not there",
                    "put that file, which the export wrote, beside the model",
                )

    def whole_slot(self, name: str, where: str = "the adapter") -> WholeSlot:
        """Return the slot of a whole tensor by any of its names.

        Raises:
            LoraFxError: The file has none.
        """
        for key, slot in self.whole.items():
            if name in (key, *slot.aliases):
                return slot
        raise LoraFxError(
            f"{where}: {name!r} is a whole tensor, and the file has no slot that replaces it; "
            f"{near(name, self.whole)}",
            "export the file with an adapter that holds this tensor, or leave it out with "
            f"lora-fx convert ADAPTER -o OUT --exclude {name}",
        )

    def _whole_tensors(self, adapter: Adapter, where: str) -> dict[str, Array]:
        """Return an adapter's whole tensors by their names in the file, and as the file has them.

        Raises:
            LoraFxError: A tensor without a slot, or that has two values under two names.
        """
        tensors: dict[str, Array] = {}
        for name, full in adapter.full.items():
            slot = self.whole_slot(name, where)
            value = slot.stored(full.value)
            if not np.array_equal(tensors.setdefault(slot.name, value), value):
                raise LoraFxError(
                    f"{where}: {name!r} is one tensor of the file with {slot.name!r}, but the "
                    "adapter has another value for each",
                    "pass an adapter that trained one of these names",
                )
        return tensors

    def _slot_of(self, key: str, update: LowRank, where: str) -> SwitchSlot:
        """Return the slot of an update; raise unless both are for the same use of the weight."""
        slot = self.slots.get(key)
        if slot is not None and update.use == own_use(key):
            return slot
        name = key
        if update.use and "@" not in key:
            name = f"{key}@{update.use}"
        hint = near(key, self.slots).removesuffix("?")
        raise LoraFxError(
            f"{where}: {name!r} is not a target of the file",
            f"{hint}; an export chooses the targets of a file with --include",
        )

    def zeros(self) -> dict[str, Array]:
        """Return tensors that change nothing, by name, in the ranks of the slots."""
        zeros: dict[str, Array] = {}
        for slot in self.slots.values():
            for name, shape in slot.tensor_shapes(slot.rank).items():
                sizes = [size or 0 for size in shape]
                zeros[name] = np.zeros(sizes, numpy_dtype(slot.dtype))
        return zeros

    def adapter(self, tensors: Mapping[str, Array]) -> Adapter:
        """Return the adapter for tensors by their names in the file; the inverse of `tensors`."""
        updates: dict[str, LowRank] = {}
        for key, row in self.training["updates"].items():
            slot = self.slots[key]
            a = np.swapaxes(tensors[slot.a], -1, -2).copy()
            scaled_b = np.swapaxes(tensors[slot.b], -1, -2).copy()
            scaled = update_of(row, {"a": a, "b": scaled_b})
            updates[key] = replace(scaled, b=scaled_b / np.float32(scaled.scale))
        return Adapter(updates, {**self.training["metadata"], **learning(updates)})

    def check(self, tensors: Mapping[str, Array], where: str) -> None:
        """Check tensors against the slots.

        Raises:
            LoraFxError: An unknown name, half a pair, a shape, rank or dtype that does not fit.
        """
        key_of_tensor: dict[str, str] = {}
        for key, slot in self.slots.items():
            key_of_tensor |= dict.fromkeys(slot.names, key)

        whole = {slot.name: slot for slot in self.whole.values()}
        for name, tensor in tensors.items():
            if name in whole:
                whole[name].check(tensor, where)
            elif name not in key_of_tensor:
                raise LoraFxError(
                    f"{where}: tensor {name!r} is not an input of the file",
                    near(name, [*key_of_tensor, *whole]),
                )
        if not tensors:
            raise LoraFxError(
                f"{where}: it holds no tensors", "check that it was converted for this file"
            )
        for key in dict.fromkeys(key_of_tensor[name] for name in tensors if name not in whole):
            self._check_pair(self.slots[key], tensors, where)

    def _check_pair(self, slot: SwitchSlot, tensors: Mapping[str, Array], where: str) -> None:
        """Check the A and B of one key against their slot; raise as `check` does."""
        for name, other in ((slot.a, slot.b), (slot.b, slot.a)):
            if name not in tensors:
                raise LoraFxError(
                    f"{where}: it has tensor {other!r}, but {name!r} is missing",
                    "convert the adapter again",
                )

        a = tensors[slot.a]
        rank = a.shape[-1] if a.ndim else 0
        largest_rank = self.largest_rank
        if self.mode == "load" or self.rank:
            largest_rank = slot.rank
        if largest_rank and rank > largest_rank:
            option = f"--largest rank={rank}" if self.largest_rank else f"--rank {rank}"
            raise LoraFxError(
                f"{where}: tensor {slot.a!r} has rank {rank}; expected at most {largest_rank}",
                f"export the file with lora-fx export --mode {self.mode} {option}",
            )

        for name, shape in slot.tensor_shapes(rank).items():
            if name == slot.d and name not in tensors:
                continue  # of plain LoRA: the default, zeros
            tensor = tensors[name]
            if tensor.shape != shape:
                raise MisfitError(
                    f"{where}: tensor {name!r} is {list(tensor.shape)}; expected {list(shape)}"
                )
            if tensor.dtype.name != slot.dtype:
                raise LoraFxError(
                    f"{where}: tensor {name!r} is {tensor.dtype.name}; expected {slot.dtype}",
                    "write the dtype of the file with lora-fx convert ADAPTER --for X.onnx",
                )

    def check_declared(
        self, declared: Mapping[str, tuple[str, Sequence[object]]], where: str
    ) -> None:
        """Check the slots against the graph, which another program may have changed.

        Args:
            declared: Dtype and shape of the graph's tensors by name; sizes that are free are no
                numbers.
            where: What errors call the file.

        Raises:
            LoraFxError: A slot that the graph has no longer, or has in another dtype or shape.
        """
        for key, slot in self.slots.items():
            for name, expected_shape in slot.tensor_shapes(None).items():
                _check_declared(key, name, slot.dtype, expected_shape, declared, where)
        for key, whole in self.whole.items():
            _check_declared(key, whole.name, whole.dtype, whole.shape, declared, where)

    def padded(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Return the tensors zero-padded to the rank of their slots, which changes no product."""
        padded: dict[str, Array] = {}
        for slot in self.slots.values():
            for name, rank_axis in ((slot.a, -1), (slot.b, -2)):
                if name in tensors:
                    missing_ranks = slot.rank - tensors[name].shape[rank_axis]
                    padded[name] = np.pad(tensors[name], {rank_axis: (0, missing_ranks)})
            if slot.d in tensors:
                padded[slot.d] = tensors[slot.d]
        for whole in self.whole.values():
            if whole.name in tensors:
                padded[whole.name] = tensors[whole.name]
        return padded

    def names(self) -> list[str]:
        """Return the names of all tensors that an adapter may bring."""
        names: list[str] = []
        for slot in self.slots.values():
            names += slot.names
        return names + [whole.name for whole in self.whole.values()]


def _slot_from_json(fields: JsonView) -> SwitchSlot:
    """Return the slot that `Manifest.to_text` wrote; JSON lists become tuples."""
    batch = tuple(fields["batch"])
    shape = tuple(fields["shape"])
    return SwitchSlot(**{**fields, "batch": batch, "shape": shape})


def _whole_from_json(row: JsonView) -> WholeSlot:
    """Return the slot of a whole tensor that `Manifest.to_text` wrote."""
    shape = tuple(map(int, row["shape"]))
    aliases = tuple(map(str, row["aliases"]))
    return WholeSlot(**{**row, "shape": shape, "aliases": aliases})


def _check_declared(
    key: str,
    name: str,
    dtype: str,
    expected_shape: Sequence[int | None],
    declared: Mapping[str, tuple[str, Sequence[object]]],
    where: str,
) -> None:
    """Raise unless the graph declares a tensor of a slot as the manifest has it.

    Args:
        key: The key of the slot.
        name: The tensor.
        dtype: Its dtype in the manifest.
        expected_shape: Its shape there; None is the rank.
        declared: Dtype and shape of the graph's tensors by name.
        where: What errors call the file.
    """
    if name not in declared:
        raise LoraFxError(
            f"{where}: the graph has no {name!r}, which its manifest names for {key!r}",
            CHANGED_SINCE,
        )
    declared_dtype, shape = declared[name]
    if declared_dtype != dtype:
        raise LoraFxError(
            f"{where}: {name!r} is {declared_dtype}, but {dtype} in its manifest", CHANGED_SINCE
        )
    if not _fits(shape, expected_shape):
        shown = ", ".join("rank" if size is None else str(size) for size in expected_shape)
        raise LoraFxError(
            f"{where}: {name!r} is {list(shape)}, but [{shown}] in its manifest", CHANGED_SINCE
        )


def _fits(shape: Sequence[object], expected: Sequence[int | None]) -> bool:
    """Whether a declared shape has the expected sizes; a free size on either side fits any."""
    if len(shape) != len(expected):
        return False
    for size, expected_size in zip(shape, expected, strict=True):
        fixed = isinstance(size, int) and expected_size is not None
        if fixed and size != expected_size:
            return False
    return True


def _transposed(matrix: Array, dtype: str) -> Array:
    """Return a matrix, or a stack of matrices, transposed and contiguous."""
    return np.ascontiguousarray(np.swapaxes(matrix, -1, -2).astype(dtype))


def manifest_of(path: str | PathLike[str]) -> Manifest:
    """Return the manifest of an ONNX or .pt2 file, read without the weights.

    Raises:
        LoraFxError: The file cannot be read, or is not switchable.
    """
    expect_path(path, "the model", "the path of an .onnx or .pt2 file")
    expect_file(path, "pass the path of an .onnx or .pt2 file")
    if fspath(path).endswith(".pt2"):
        switch = program_manifest(Path(path)).get(SWITCH)
        in_program = manifest_in(None if switch is None else json.dumps(switch), fspath(path))
        return with_base(in_program, Path(path))
    model = onnx_model(fspath(path))
    manifest = manifest_in(model.metadata_props.get(PROPERTY), fspath(path))
    declared = {
        str(value.name): (dtype_name(value), tuple(value.shape or ()))
        for value in _possible_slots(model.graph, manifest)
    }
    manifest.check_declared(declared, fspath(path))
    return with_base(manifest, Path(path))


def onnx_model(where: str) -> ir.Model:
    """Return an .onnx file's model, its weights unread.

    Raises:
        LoraFxError: The file cannot be read.
    """
    try:
        return ir.load(where)
    except Exception as e:  # protobuf's and the system's errors have no common base
        raise LoraFxError(
            f"{where}: cannot be read as an ONNX file",
            "pass a file that lora-fx export --mode switch, load or batch wrote",
        ) from e


def _possible_slots(graph: ir.Graph, manifest: Manifest) -> list[ir.Value]:
    """Return the values that can be the manifest's slots."""
    if manifest.mode == "load":
        return list(graph.initializers.values())
    if manifest.mode == "train":
        return list(graph.inputs)
    return [value for value in graph.inputs if value.is_initializer() != manifest.required]


def manifest_in(text: str | None, where: str) -> Manifest:
    """Parse the manifest in a file's metadata; raise if there is none."""
    if text is None:
        raise LoraFxError(
            f"{where}: it has no manifest of lora-fx, so the file is not switchable",
            "write a switchable file with lora-fx export MODEL -o X.onnx --mode switch",
        )
    return Manifest.from_text(text, where)


def with_base(manifest: Manifest, path: Path) -> Manifest:
    """Return the manifest with the base's values of whole tensors that have no default in the file.

    They lie beside the file, in the one that stands for the base; without it they are unknown.
    """
    beside = path.with_name(f"{path.stem}{BASE_ENDING}")
    if not (manifest.required and manifest.whole and beside.exists()):
        return manifest
    tensors, _ = read_tensors(beside)
    base: dict[str, Array] = {}
    for slot in manifest.whole.values():
        if slot.name in tensors:
            slot.check(tensors[slot.name], str(beside))
            base[slot.name] = tensors[slot.name]
    return replace(manifest, base=base)


def check_no_slots(model: ir.Model, path: Path) -> None:
    """Raise for a file that already has slots or branches for adapters."""
    if PROPERTY in model.metadata_props:
        raise LoraFxError(
            f"{path}: it has slots for adapters already", "use the base that the file was made from"
        )
