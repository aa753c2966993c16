"""Adapters for ONNX Runtime: an .onnx_adapter file, a flatbuffer of named tensors.

=====================  ================================  ====================================
update under key K     tensors                           shapes, those of a LowRank
=====================  ================================  ====================================
LowRank                K.lora_A, K.lora_B                [*batch, r, in], [*batch, out, r]
whole tensor           K                                 as the parameter
=====================  ================================  ====================================

in of a convolution is C_in/groups · ∏kernel. The format has no alpha, so s = alpha/rank is
multiplied into B in fp32: ΔW = B A, and reading gives alpha = rank. The runtime matches names with
graph inputs and checks dtypes, not meanings: a graph must take these names in these shapes. It also
has two version numbers, of adapter and model; they are kept in metadata as adapter_version and
model_version, and the runtime compares neither. Files that an export wrote for its graph hold A and
B transposed, as its inputs are; the version of the adapter is their mark. Of DoRA they also have
K.lora_D [*batch, out], the factors of the rows of one base, whose number is the model_version; see
lora_fx.adapter.evaluated. A whole tensor lies there as the graph has it, which is as the parameter
of a model of torch.

What the format cannot say is refused: DoRA for any base, LoHa, LoKr, and whether an update is for
one use of a tied tensor or for all. Layouts are not stored; `bind` gives those of a model. Files
begin with 4 bytes of offset and "TORT".

Facts: onnxruntime/lora/adapter_format/adapter_schema.fbs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.scaled_rows import GAINS
from lora_fx.adapter.updates import Entry, is_plain
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import finite, is_float
from lora_fx.formats.checked_file import File
from lora_fx.formats.format import Format, Magic
from lora_fx.formats.one_scale import multiplied
from lora_fx.formats.unsupported import refused
from lora_fx.targets.keys import own_use
from lora_fx.text import counted, is_whole

TRANSPOSED = "other tools and older exports store A and B transposed, without a mark"


class OnnxAdapter(Format):
    """A file of ONNX Runtime, which matches the file's tensors to a graph's inputs by name."""

    name = "onnx_adapter"
    suffixes = (".onnx_adapter",)
    magic = Magic(b"TORT", start=4)
    one_model = True
    fits_graphs = True
    sole_suffix = True

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read an adapter from a file of lora-fx, or from one with names X.lora_A, X.lora_B.

        Returns:
            An Adapter: LowRank in fp32 with alpha = rank, and whole tensors; layouts are None.

        Raises:
            LoraFxError: A damaged file, half a pair, shapes that do not fit.
        """
        from lora_fx.onnx.runtime_adapter import SERVED, read_file

        file = File(str(path))
        tensors, versions = read_file(path)
        if versions["adapter_version"] == SERVED:
            tensors = {name: _transposed(name, tensor) for name, tensor in tensors.items()}
            versions["adapter_version"] = 1
        entries: dict[str, Entry] = {}
        for name, array in tensors.items():
            key, dot, half = name.rpartition(".lora_")
            if not dot or half not in ("A", "B", "D"):
                entries[name] = _full(name, array, file)
            elif half == "D" and f"{key}.lora_A" in tensors:
                continue  # the update has it
            elif half == "A" or f"{key}.lora_A" not in tensors:
                entries[key] = _lowrank(key, tensors, file)
        return Adapter(entries, {**versions, "notes": file.notes})

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """Write a file, read it back and compare.

        Args:
            adapter: Bound or not; metadata may hold adapter_version and model_version (else 1).
            path: The file to create.
            base: Not needed.

        Returns:
            Notes: that scales were multiplied in.

        Raises:
            LoraFxError: An update that the format cannot store, or names that clash.
        """
        from lora_fx.onnx.runtime_adapter import write_file

        tensors: dict[str, Array] = {}
        for key, entry in adapter.entries.items():
            for name, array in _tensors(key, entry).items():
                if name in tensors:
                    what = f"two tensors would have the name {name!r}"
                    raise LoraFxError(what, "rename the parameter")
                if is_float(array):
                    array = array.astype(np.float32)
                tensors[name] = array
        fields = ("adapter_version", "model_version")
        write_file(path, tensors, {field: _version(adapter.metadata, field) for field in fields})
        scaled = sum(update.scale != 1.0 for update in adapter.lowrank.values())
        if not scaled:
            return ()
        updates = counted(scaled, "update")
        return (f"the format has no alpha: the scales of {updates} are multiplied into B",)

    def write_for(self, graph: str, adapter: Adapter, path: Path) -> tuple[str, ...]:
        """Write a file with the names, shapes and dtypes of a switchable file's manifest.

        Raises:
            LoraFxError: A and B have no defaults: ONNX Runtime misses required inputs in a run,
                though its active adapter holds them (1.31).
        """
        from lora_fx.onnx.manifest import manifest_of
        from lora_fx.onnx.runtime_adapter import write_adapter
        from lora_fx.onnx.stored_weights import for_file

        manifest = manifest_of(graph)
        if manifest.required:
            raise LoraFxError(
                f"{graph}: A and B are inputs without defaults, which no runtime takes from an "
                ".onnx_adapter file",
                "pass -o X.safetensors, which holds an array for every input",
            )
        write_adapter(for_file(adapter, manifest, graph), manifest, path)
        if not adapter.invocation:
            return ()
        return (
            "the format has no place for invocation tokens: sessions take them from the model's "
            "file, which has those of the adapters that were exported with it, by name",
        )


def check_name(graph: str, adapter: Adapter, path: Path) -> None:
    """Raise if a switchable file would take an adapter's file of this name for another aLoRA's.

    Args:
        graph: The switchable file; its manifest has the invocation tokens of exported adapters.
        adapter: What is written.
        path: The file to create, whose name tells a session the tokens.
    """
    from lora_fx.onnx.manifest import manifest_of

    starts = manifest_of(graph).starts
    if starts is None or starts.invocations.get(path.stem) == adapter.invocation:
        return
    tokens = f"the invocation tokens {[*adapter.invocation]}" if adapter.invocation else "none"
    by_name = "it was exported with no adapter of this name"
    if path.stem in starts.invocations:
        of_name = starts.invocations[path.stem]
        by_name = f"there {path.stem!r} has {[*of_name] if of_name else 'none'}"
    alike = [name for name, known in starts.invocations.items() if known == adapter.invocation]
    hint = "load the adapter from its own file or folder: session.load(name, path)"
    if alike:
        hint = f"pass -o {alike[0]}.onnx_adapter, whose tokens are the same; or {hint}"
    raise LoraFxError(
        f"{path.name}: sessions of {Path(graph).name} take the invocation tokens from the name of "
        f"an .onnx_adapter file; the adapter has {tokens}, and {by_name}",
        hint,
    )


_refused = partial(refused, "an .onnx_adapter file", hint="merge it into the model instead")


def _transposed(name: str, tensor: Array) -> Array:
    """Return A or B transposed; all other tensors are returned unchanged."""
    if tensor.ndim < 2 or not name.endswith((".lora_A", ".lora_B")):
        return tensor
    return tensor.swapaxes(-1, -2)


def _tensors(key: str, entry: Entry) -> dict[str, Array]:
    """Return the tensors of one entry by name; raise for an update that the format cannot store."""
    if isinstance(entry, Full):
        return {name: entry.value for name in (key, *entry.twins)}
    if not isinstance(entry, LowRank) or not is_plain(entry):
        raise _refused(key, entry)
    if entry.use:
        raise _refused(key, f"it acts on one use of the tensor only ({entry.use})")
    if entry.origin.tied:
        raise _refused(
            key,
            "it acts on several modules that share the tensor",
            hint="write it for one graph with lora-fx convert --for, or save it as peft",
        )
    b = entry.b
    if entry.scale != 1.0:
        b = multiplied(b, entry.scale, key, _refused)
    if not finite(b):
        raise _refused(key, "its B has NaN or infinite values")
    return {f"{key}.lora_A": entry.a, f"{key}.lora_B": b}


def _lowrank(key: str, tensors: Mapping[str, Array], file: File) -> LowRank:
    """Return the update of one key; raise for a missing factor, and for shapes that do not fit."""
    a_name = f"{key}.lora_A"
    b_name = f"{key}.lora_B"
    for name in (a_name, b_name):
        if name not in tensors:
            raise file.error(key, f"has no {name!r}; expected both A and B")
    a = file.master(a_name, tensors[a_name])
    b = file.master(b_name, tensors[b_name])
    if a.ndim < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
        raise file.error(
            key,
            f"has A {list(a.shape)} and B {list(b.shape)}; expected [*batch, r, in] and "
            "[*batch, out, r]",
            f"{TRANSPOSED}; pass the adapter that the file was made from",
        )
    if a.shape[-2] > max(a.shape[-1], b.shape[-2]):
        file.notes.append(f"{key!r} has more ranks than rows and columns; {TRANSPOSED}")
    of_variant = {}
    if f"{key}.lora_D" in tensors:
        gains = file.master(f"{key}.lora_D", tensors[f"{key}.lora_D"])
        if gains.shape != b.shape[:-1]:
            raise file.error(key, f"has D {list(gains.shape)} and B {list(b.shape)}")
        of_variant[GAINS] = gains
    return LowRank(a, b, float(a.shape[-2]), use=own_use(key), variant_tensors=of_variant)


def _full(name: str, array: Array, file: File) -> Full:
    """Return a whole tensor; narrow floats become fp32, other dtypes stay."""
    if not is_float(array):
        return Full(array)
    file.check(name, array)
    if array.dtype.itemsize < 4:
        array = array.astype(np.float32)
    return Full(array)


def _version(metadata: Mapping[str, object], field: str) -> int:
    value = metadata.get(field, 1)
    if not is_whole(value) or not 0 <= value < 2**31:
        raise LoraFxError(
            f"metadata {field} is {value!r}; expected a whole number below 2**31",
            "choose a smaller one",
        )
    return value


ONNX_ADAPTER = OnnxAdapter()
