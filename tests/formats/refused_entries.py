"""One update of every kind that some format cannot store, and what the error calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import (
    Dense,
    Entry,
    Hadamard,
    Kronecker,
    ReplacedRows,
    Rotation,
)
from lora_fx.ir.layout import Layout, plain_layout

Array = np.ndarray[Any, Any]
OUT, IN, RANK, EXPERTS = 28, 20, 2, 3


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def low(**fields: Any) -> LowRank:
    """An update of a weight [OUT, IN], with some fields changed."""
    return LowRank(**{"a": normal(0, RANK, IN), "b": normal(1, OUT, RANK), "alpha": 3.0, **fields})


A1, B1, A2, B2 = (
    normal(2, RANK, IN),
    normal(3, OUT, RANK),
    normal(4, RANK, IN),
    normal(5, OUT, RANK),
)
W1, W2 = normal(6, 4, 2), normal(7, OUT // 4, IN // 2)
IN_OUT = Layout((IN, OUT), (), (1,), (0,), (IN, OUT))
STACK = Layout((EXPERTS, OUT, IN), (0,), (1,), (2,), (EXPERTS, OUT, IN))
STACKED = {"a": normal(8, EXPERTS, RANK, IN), "b": normal(9, EXPERTS, OUT, RANK)}


@dataclass(frozen=True)
class Row:
    """An update of one kind.

    Attributes:
        entry: The update.
        words: A pattern of the reason in the error.
        end: What follows the module in its key.
    """

    entry: Entry
    words: str
    end: str = ".weight"


ENTRIES = {
    "LoHa": Row(Hadamard(A1, B1, A2, B2, 3.0), "LoHa"),
    "LoHa, stored [in, out]": Row(
        Hadamard(A1, B1, A2, B2, 3.0, IN_OUT), r"LoHa|stored \[in, out\]"
    ),
    "LoKr": Row(Kronecker(W1, W2, 1.5), "LoKr"),
    "LoKr, stored [in, out]": Row(Kronecker(W1, W2, 1.5, IN_OUT), r"LoKr|stored \[in, out\]"),
    "OFT": Row(Rotation(normal(10, 5, 4, 4)), "OFT"),
    "a whole ΔW": Row(Dense(normal(11, OUT, IN)), "a whole ΔW"),
    "a bias": Row(Dense(normal(12, OUT)), "a whole ΔW", ".bias"),
    "a whole tensor": Row(Full(normal(13, OUT, IN)), "a whole tensor"),
    "trained rows": Row(ReplacedRows((1,), normal(14, 1, IN)), "trained rows"),
    "DoRA": Row(low(magnitude=normal(15, OUT)), "DoRA"),
    "a start that changed the base": Row(low(mutated="pissa"), "a base that pissa changed"),
    "a part": Row(low(), "a part", ".weight[0:28]"),
    "no weight of a module": Row(low(), "not the weight of a module|no weight|no such matrix", ""),
    "one use": Row(low(use="op:linear"), "one use"),
    "all uses": Row(low(origin=Origin("linear", tied=True)), "modules that share the tensor"),
    "a stack": Row(low(**STACKED, layout=STACK), "a stack|no such matrix"),
    "a stack, unbound": Row(low(**STACKED), "a stack|no such matrix"),
    "a convolution": Row(low(layout=plain_layout((OUT, IN // 2, 2))), "a convolution"),
    "a convolution, unbound": Row(low(origin=Origin("conv1d", (2,))), "a convolution"),
    "an embedding": Row(low(layout=IN_OUT, origin=Origin("embedding")), "an embedding"),
    "an embedding, unbound": Row(low(origin=Origin("embedding")), "an embedding"),
    "stored [in, out]": Row(low(layout=IN_OUT, origin=Origin("addmm")), r"stored \[in, out\]"),
}
