"""The memory that is free where tensors are: a GPU's own, or that of the machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lora_fx.free_memory import FreeMemory, free_memory
from lora_fx.peak_memory import MemoryPart, PeakMemory, check_memory


def free_on(device: torch.device) -> FreeMemory | None:
    """Return the free memory of a device; None where it is not known.

    Of a GPU's memory, what torch has taken and does not use at present is free too.
    """
    if device.type == "cpu":
        return free_memory()
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return FreeMemory(free + unused)


def check_move(module: nn.Module, device: torch.device) -> None:
    """Tell the memory of the weights on a device that they are moved to.

    Raises:
        LoraFxError: They are more than is free there.
    """
    tensors = (*module.parameters(), *module.buffers())
    moved = sum(tensor.nbytes for tensor in tensors if tensor.device.type != device.type)
    if device.type != "cpu" and moved:
        job = f"the model on {device}"
        peak = PeakMemory(job, (MemoryPart("weights", moved, moved),))
        check_memory(peak, free_on(device), _ways_out)


def _ways_out(free: int) -> Iterator[str]:
    yield "--quantise int4 takes about a sixth of float32; --device cpu uses the machine's memory"
