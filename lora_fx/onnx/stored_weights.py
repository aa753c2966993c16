"""The weights in a switchable ONNX file, on which an adapter that reads its base is evaluated.

A slot for DoRA says how its weight lay in the file, and its hash. So a weight that is stored
otherwise by now (in 16 bits, in codes, fused with another) is told, and nothing is computed of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike, fspath

import onnx_ir as ir

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.evaluated import Evaluation, can_be_evaluated, weight_hash
from lora_fx.adapter.exact_lora import as_exact_lora
from lora_fx.adapter.updates import Dense, ReplacedRows
from lora_fx.adapter.variant import variant_of
from lora_fx.adapter.vera import WIDEST
from lora_fx.adapter.whole_values import as_whole_tensors
from lora_fx.dtypes import Array, widened
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import Layout
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.onnx.load import load
from lora_fx.onnx.manifest import NO_GAINS, Manifest
from lora_fx.targets.keys import base_name, split_key, split_region
from lora_fx.text import near


def for_file(adapter: Adapter, manifest: Manifest, path: str | PathLike[str]) -> Adapter:
    """Return an adapter as a file takes it: as LoRA, or evaluated on the weights in the file.

    Args:
        adapter: Keys as in the manifest, or a file's own names where those can be resolved.
        manifest: That of the file.
        path: The file.

    Raises:
        LoraFxError: A slot without factors of rows, or a weight that is stored otherwise by now.
    """
    adapter, _ = as_exact_lora(adapter)
    weights = _FileWeights(fspath(path), manifest)
    if any(isinstance(entry, (Dense, ReplacedRows)) for entry in adapter.entries.values()):
        adapter = adapter.resolved({**manifest.slots, **manifest.whole})
        transposed = bool(adapter.metadata.get("fan_in_fan_out"))
        entries = as_whole_tensors(adapter.entries, weights.whole_value, transposed=transposed)
        adapter = replace(adapter, entries=entries)
    if adapter.metadata.get(WIDEST):
        adapter = _with_inputs(adapter.resolved(manifest.slots), manifest)
    if not any(can_be_evaluated(low) for low in adapter.lowrank.values()):
        return adapter
    if fspath(path).endswith(".pt2"):  # its tensors are torch's; the manifest tells what to do
        return adapter
    return Evaluation(weights.read)(adapter.resolved(manifest.slots))


def _with_inputs(adapter: Adapter, manifest: Manifest) -> Adapter:
    """Return the adapter with as many inputs as each slot has, where its own file tells none."""
    entries = dict(adapter.entries)
    for key, low in adapter.lowrank.items():
        slot = manifest.slots.get(key)
        if slot is not None:
            entries[key] = variant_of(low).within(low, slot.inside * slot.out)
    return replace(adapter, entries=entries)


@dataclass(eq=False)
class _FileWeights:
    """The weights of a file's slots."""

    path: str
    manifest: Manifest

    @cached_property
    def _initializers(self) -> dict[str, ir.Value]:
        return dict(load(self.path).graph.initializers)

    def _stored(self, key: str) -> Array | None:
        """Return the tensor of a key: an initialiser, or the base's value of an input."""
        name, _ = split_region(key)
        value = self._initializers.get(name) or self._initializers.get(base_name(key))
        if value is not None and value.const_value is not None:
            return value.const_value.numpy()
        whole = self.manifest.whole.get(name) or self.manifest.whole.get(base_name(key))
        if whole is None:
            return None
        self.manifest.check_whole(self.manifest.base, self.path)
        return self.manifest.base.get(whole.name)

    def whole_value(self, key: str) -> Array | None:
        """Return the base's tensor of a whole slot as it is stored; None if the file has no such.

        A .pt2 file has the values in its manifest, or in a file beside it.
        """
        for name, slot in self.manifest.whole.items():
            if key in (name, *slot.aliases):
                if self.path.endswith(".pt2"):
                    return self.manifest.base.get(slot.name)
                return self._stored(name)
        return None

    def read(self, key: str) -> Array:
        """Return the weight of a slot as [*batch, out, in], in fp64."""
        slot = self.manifest.slots.get(key)
        if slot is None:
            raise LoraFxError(
                f"{self.path}: {key!r} is not a target of the file", near(key, self.manifest.slots)
            )
        if not slot.d:
            raise LoraFxError(
                f"{self.path}: its slot for {key!r} takes plain LoRA, and no factors of rows",
                NO_GAINS,
            )
        stored = self._stored(key)
        if stored is not None and stored.shape == slot.shape:
            _, region = split_key(key, slot.shape)
            part = stored[tuple(slice(first, end) for first, end in region)]
            layout = Layout.from_json(dict(slot.layout))
            weight = layout.from_stored(NumpyEmitter(), widened(part))
            if weight_hash(weight) == slot.weight:
                return weight
        raise LoraFxError(
            f"{self.path}: the weight of {key!r} is stored in another form than the adapter needs",
            "give the adapter to the export, which writes its file: lora-fx export MODEL ADAPTER "
            "-o X.onnx --mode switch",
        )
