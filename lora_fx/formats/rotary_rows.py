"""The row order of q and k, which depends on how rotary embeddings pair the rows.

Rotary embeddings turn pairs of rows of q and k. torchtune and some models of llama.cpp pair
neighbours, Hugging Face's Llama the two halves of a head. With d rows a head, row h·d + 2i + j of
neighbours (j = 0, 1; i < d/2) is row h·d + j·d/2 + i of halves:

    B_halves[h, j, i] = B_neighbours[h, i, j]      as [heads, 2, d/2, r] and [heads, d/2, 2, r]

and likewise for magnitudes, which belong to rows. A is not touched: inputs keep their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.formats.checked_file import File
from lora_fx.text import JsonView


def to_halves(rows: Array, heads: int) -> Array:
    """Reorder rows of q or k, [heads·d, …], from neighbouring pairs to pairs across two halves.

    >>> to_halves(np.arange(8), 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    split = rows.reshape(heads, len(rows) // heads // 2, 2, -1)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def to_neighbours(rows: Array, heads: int) -> Array:
    """The inverse of `to_halves`.

    >>> to_neighbours(to_halves(np.arange(12), 2), 2).tolist() == list(range(12))
    True
    """
    split = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def heads_of(module: str, rows: int, config: JsonView, where: str, file: File) -> int:
    """Return the number of heads in the rows of a q_proj or k_proj.

    Args:
        module: Its name.
        rows: How many B has.
        config: config.json of the model.
        where: That file, for messages.
        file: The adapter's.

    Raises:
        LoraFxError: The config does not say, or the rows are not of so many heads.
    """
    heads = config.get("num_attention_heads")
    if module.endswith("k_proj"):
        heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim")
    if not _fit(heads, head_size, rows):
        of_size = "" if head_size is None else f" of {head_size!r}"
        number = "no number of" if heads is None else repr(heads)
        raise file.error(
            module,
            f"has {rows} rows, but {where} has {number} heads{of_size}",
            "pass the folder of the adapter's model with --base",
        )
    assert isinstance(heads, int)
    return heads


def _fit(heads: Any, head_size: Any, rows: int) -> bool:
    """Whether the rows divide into this many heads, each with an even number of rows."""
    if not isinstance(heads, int) or heads <= 0 or rows % (2 * heads) != 0:
        return False
    return head_size is None or bool(head_size * heads == rows)
