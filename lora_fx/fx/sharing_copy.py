"""A second tree of a model's code, over the same tensors."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lora_fx.errors import LoraFxError, one_line


def beside(model: nn.Module, purpose: str = "quantise it") -> nn.Module:
    """A second tree of a model's code, which shares its tensors and can hold others for some.

    Args:
        model: The model; it is not changed.
        purpose: What the copy is for, for the message.

    Raises:
        LoraFxError: The model cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as e:
        raise LoraFxError(
            f"{type(model).__name__} cannot be copied to {purpose}: {one_line(e)}",
            "make it deepcopy-able, or load it quantised"
            if purpose == "quantise it"
            else "make it deepcopy-able, or untie it before",
        ) from e
