"""A second tree of a model's code, over the same tensors."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lora_fx.errors import LoraFxError, one_line


def sharing_copy(model: nn.Module, purpose: str = "quantise it") -> nn.Module:
    """A second tree of a model's code, which shares its tensors and can hold others for some.

    Args:
        model: The model; it is not changed.
        purpose: The use of the copy, for the message.

    Raises:
        LoraFxError: The model cannot be copied.
    """
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        instead = "untie it before"
        if purpose == "quantise it":
            instead = "load it quantised"
        raise LoraFxError(
            f"{type(model).__name__} cannot be copied to {purpose}: {one_line(error)}",
            f"make it work with copy.deepcopy, or {instead}",
        ) from error
