"""The memory that is free where tensors are: a GPU's own, or that of the machine."""

from __future__ import annotations

import torch

from lora_fx.free_memory import FreeMemory, free_memory


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
