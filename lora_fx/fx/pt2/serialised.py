"""The JSON and the bytes in a .pt2 archive: the facade of `torch._export.serde` and its packager.

Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._export.serde import schema
from torch._export.serde.schema import PayloadConfig, PayloadMeta
from torch._export.serde.serialize import (
    _SERIALIZE_TO_TORCH_DTYPE,
    ExportedProgramDeserializer,
    _dataclass_to_dict,
    _dict_to_dataclass,
    serialize,
    serialize_tensor_meta,
)
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import _get_raw_tensor_bytes

from lora_fx.text import Json, JsonView


def json_of(program: ExportedProgram) -> bytes:
    """The JSON of a program, without its tensors."""
    return serialize(program).exported_program


def program_of_json(
    data: JsonView, weights: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]
) -> ExportedProgram:
    """The program of its JSON and its tensors.

    Args:
        data: The JSON; nothing in it is run, and it has to be checked before.
        weights: Parameters and buffers by name.
        constants: Other tensors by name.

    Raises:
        Exception: Whatever torch's parsers raise for JSON that is damaged or of another torch.
    """
    parsed = _dict_to_dataclass(schema.ExportedProgram, data)  # type: ignore[no-untyped-call]
    return ExportedProgramDeserializer().deserialize(parsed, weights, constants)


def table_of(tensors: Mapping[str, torch.Tensor], files: Mapping[str, str]) -> Json:
    """The table with the place and form of each tensor in an archive.

    Args:
        tensors: The tensors by name.
        files: Name of a tensor → name of the member that holds its bytes.
    """
    rows = {
        name: PayloadMeta(
            path_name=files[name],
            is_param=isinstance(tensor, nn.Parameter),
            use_pickle=False,
            tensor_meta=serialize_tensor_meta(tensor),
        )
        for name, tensor in tensors.items()
    }
    table: Json = _dataclass_to_dict(PayloadConfig(config=rows))  # type: ignore[no-untyped-call]
    return table


def dtype_of_code(code: Any) -> torch.dtype:
    """The dtype for a number in a table.

    Raises:
        KeyError, TypeError: It stands for none.
    """
    dtype: torch.dtype = _SERIALIZE_TO_TORCH_DTYPE[code]
    return dtype


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of the whole storage of a tensor, none for one without values."""
    return _get_raw_tensor_bytes(tensor)
