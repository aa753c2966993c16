"""A and B of every target at addresses that stay, into which one adapter after the other is copied.

A CUDA graph reads the addresses that were bound when it was captured, and a replay looks at no
binding: an adapter that is bound later is not seen. So there is one pair of buffers for each
target, of one rank. An adapter of a smaller rank is padded with zeros, whose products with finite
activations add nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.onnx.feeds import ort_values
from lora_fx.onnx.manifest import Manifest
from lora_fx.text import Json

BASE: Mapping[str, Array] = {}
"""The tensors of the base model: zeros in every buffer."""


class AdapterBuffers:
    """The buffers of a file's targets, which hold the base model at first.

    Args:
        manifest: The slots of the file.
        rank: The rank of all buffers.
        device: Where they are: cpu or cuda.

    Attributes:
        rank: The largest rank that they take.
        values: The buffers by the names of A and B, as OrtValues.
    """

    def __init__(self, manifest: Manifest, rank: int, device: str) -> None:
        self.rank = rank
        slots = {key: replace(slot, rank=rank) for key, slot in manifest.slots.items()}
        self._manifest = replace(manifest, slots=slots)
        self.values: Json = ort_values(self._manifest.zeros(), device)
        self._held: Mapping[str, Array] | None = BASE
        self._written: set[str] = set()

    def write(self, tensors: Mapping[str, Array]) -> None:
        """Copy an adapter into the buffers, unless they hold this very adapter.

        Args:
            tensors: Its A and B by name. The buffers of targets that it leaves out become zero.
        """
        if tensors is self._held:
            return
        self._held = None  # until all of it is copied
        padded = self._manifest.padded(tensors)
        to_clear = self._written.difference(padded)
        zeros = self._manifest.zeros() if to_clear else {}
        self._written.update(padded)
        for name, array in padded.items():
            self.values[name].update_inplace(array)
        for name in to_clear:
            self.values[name].update_inplace(zeros[name])
        self._written = set(padded)
        self._held = tensors


def largest_rank(manifest: Manifest, tensors: Mapping[str, Array]) -> int:
    """Return the largest rank among an adapter's tensors; 0 where it has none."""
    factors = [slot.a for slot in manifest.slots.values() if slot.a in tensors]
    return max((tensors[name].shape[-1] for name in factors), default=0)


def check_rank(manifest: Manifest, tensors: Mapping[str, Array], rank: int, what: str) -> None:
    """Raise for an adapter that buffers of a rank do not hold.

    Args:
        manifest: The slots of the file.
        tensors: The adapter's A and B by name.
        rank: The rank of the buffers.
        what: What errors call the adapter.
    """
    found = largest_rank(manifest, tensors)
    if found <= rank:
        return
    raise LoraFxError(
        f"{what} has rank {found}, but the buffers that the CUDA graphs read have rank {rank}",
        f"make the session with Session(path, cuda_graph=True, rank={found})",
    )
