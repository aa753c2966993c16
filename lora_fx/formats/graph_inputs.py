"""Adapters as the inputs of one graph: a safetensors file with a tensor for each input.

=====================  ==================================  =======================
input                  shape                               value
=====================  ==================================  =======================
A of a target          [*batch, in, rank]                  a transposed
B of a target          [*batch, rank, out]                 s·b transposed
D of a DoRA target     [*batch, out]                       g − 1, of one base
whole tensor           as the parameter                    the adapter's, else the base's
=====================  ==================================  =======================

The names, shapes and dtypes are those of the file that an export wrote in mode switch, a .pt2 file
or a portable .onnx file, and there is a tensor for every A and B that it takes: zeros, which change
nothing, for targets that the adapter has no update of. So a runtime needs nothing but the file.
The header's metadata has under `lora_fx.inputs` the key of each update with the names of its A and
B, or of the one whole tensor, so that the file can be read as an adapter again. An aLoRA also has
its tokens there, under `lora_fx.invocation`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.adapter.adapter import INVOCATION, Adapter
from lora_fx.adapter.evaluated import BASE_NUMBER
from lora_fx.adapter.invocation import checked
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.scaled_rows import GAINS, has_gains
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, retold
from lora_fx.files.strict_json import json_object
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.formats.checked_file import File
from lora_fx.formats.format import FileHead, Format
from lora_fx.targets.keys import own_use
from lora_fx.text import Json

if TYPE_CHECKING:
    from lora_fx.onnx.manifest import Manifest

KEYS = "lora_fx.inputs"
"""The field of the header that has key → [name of A, name of B], and of D where it has factors."""
BASE = "lora_fx.base"
"""The field with the number of the base for which D was computed."""
TOKENS = "lora_fx.invocation"
"""The field with an aLoRA's invocation tokens, a list in JSON."""


class GraphInputs(Format):
    """A safetensors file whose tensors are the inputs of one switchable graph."""

    name = "graph_inputs"
    suffixes = (".safetensors",)
    only_read = True
    one_model = True
    fits_graphs = True

    def detect(self, seen: FileHead) -> bool:
        """Whether the header says which tensors are A and B."""
        return KEYS in seen.metadata

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read an adapter; the keys are those of the graph that the file was written for.

        Returns:
            An Adapter: LowRank in fp32 with alpha = rank; layouts are None.

        Raises:
            LoraFxError: A header that names no such tensors, or shapes that do not fit.
        """
        tensors, metadata = read_tensors(path)
        file = File(str(path))
        keys = json_object(metadata[KEYS], f"{path}: {KEYS} in its header")
        entries: dict[str, Entry] = {}
        for key, names in keys.items():
            if isinstance(names, list) and len(names) == 1 and names[0] in tensors:
                entries[key] = Full(file.master(names[0], tensors[names[0]]))
            else:
                entries[key] = _lowrank(key, names, tensors, file)
        of_adapter: Json = {"notes": file.notes}
        if BASE in metadata:
            if not metadata[BASE].isdecimal():
                raise file.error(
                    BASE, f"is {metadata[BASE][:80]!r} in its header; expected a number"
                )
            of_adapter[BASE_NUMBER] = int(metadata[BASE])
        if TOKENS in metadata:
            with retold(f"{path}: {TOKENS} in its header is no JSON", "export the file again"):
                tokens = json.loads(metadata[TOKENS])
            of_adapter[INVOCATION] = [*checked(tokens, f"{path}: {TOKENS} in its header")]
        return Adapter(entries, of_adapter)

    def write_for(self, graph: str, adapter: Adapter, path: Path) -> tuple[str, ...]:
        """Write a file with the names, shapes and dtypes of a switchable file's manifest."""
        from lora_fx.onnx.manifest import manifest_of
        from lora_fx.onnx.stored_weights import for_file

        manifest = manifest_of(graph)
        if not manifest.required:
            raise LoraFxError(
                f"{graph}: its A and B have defaults, and runtimes that take tensors by name take "
                "no others for them",
                "write an .onnx_adapter; or export the file with --target portable",
            )
        write_inputs(for_file(adapter, manifest, graph), manifest, path)
        return ()


def write_inputs(adapter: Adapter, manifest: Manifest, path: Path) -> None:
    """Write the inputs that a switchable file takes for an adapter, all of them.

    Args:
        adapter: What the file takes; without entries, zeros for the base.
        manifest: That of the switchable file.
        path: The file to create.

    Raises:
        LoraFxError: An update that does not fit.
    """
    tensors = manifest.all_tensors(adapter)
    keys: dict[str, tuple[str, ...]] = {}
    adapter = adapter.resolved({**manifest.slots, **manifest.whole})
    for key, update in adapter.lowrank.items():
        slot = manifest.slots[key]
        keys[key] = slot.names if has_gains(update) else (slot.a, slot.b)
    metadata = {"format": "pt"}
    if adapter.invocation:
        metadata[TOKENS] = json.dumps([*adapter.invocation])
    if any(len(names) > 2 for names in keys.values()):
        metadata[BASE] = str(adapter.metadata[BASE_NUMBER])
    for key in adapter.full:
        keys[key] = (manifest.whole_slot(key).name,)
    write_tensors(path, tensors, {**metadata, KEYS: json.dumps(keys)})


def _lowrank(key: str, names: object, tensors: Mapping[str, Array], file: File) -> LowRank:
    """Return the update of one key; raise for names and shapes that do not fit."""
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not isinstance(names, list) or not are_names or len(names) not in (2, 3):
        raise file.error(key, f"has {str(names)[:80]!r}; expected the names of its A and B")
    if not {*names} <= tensors.keys():
        raise file.error(key, f"has the tensors {names!r}; expected the names of its A and B")
    a, b, *gains = (file.master(name, tensors[name]) for name in names)
    if a.ndim < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise file.error(
            key,
            f"has A {list(a.shape)} and B {list(b.shape)}; expected [*batch, in, rank] and "
            "[*batch, rank, out]",
        )
    a = np.ascontiguousarray(a.swapaxes(-1, -2))
    b = np.ascontiguousarray(b.swapaxes(-1, -2))
    of_variant = {}
    if gains:
        of_variant[GAINS] = gains[0]
        if gains[0].shape != b.shape[:-1]:
            raise file.error(key, f"has D {list(gains[0].shape)} and B {list(b.shape)}")
    return LowRank(a, b, float(a.shape[-2]), use=own_use(key), variant_tensors=of_variant)


GRAPH_INPUTS = GraphInputs()
