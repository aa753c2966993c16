"""Tensors out of a pickle that torch.save wrote; the one place where one is opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line


def read_pickle(path: Path) -> dict[str, Array]:
    """The tensors of a file, by torch's unpickler that runs no code (weights_only=True).

    Args:
        path: A state dict, name → tensor.

    Raises:
        LoraFxError: It holds anything but tensors, or is damaged.
    """
    import ml_dtypes
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, UnpicklingError for code
        raise LoraFxError(
            f"{path}: torch will not read it as tensors alone: {one_line(error)}",
            "it may hold code; get the adapter as safetensors",
        ) from error
    tensors: dict[str, Array] = {}
    for name, value in state.items() if isinstance(state, dict) else [("", None)]:
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise LoraFxError(
                f"{path}: holds a {type(value).__name__} at {name!r}; expected a tensor by name",
                "is it the adapter_model.bin that save_pretrained wrote?",
            )
        value = value.detach().contiguous()
        if value.dtype == torch.bfloat16:
            tensors[name] = value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        else:
            try:
                tensors[name] = np.asarray(value.numpy())
            except (TypeError, RuntimeError) as error:
                raise LoraFxError(
                    f"{path}: tensor {name!r} has dtype {value.dtype}; expected a float dtype",
                    "save the adapter in fp32, fp16 or bf16",
                ) from error
    return tensors
