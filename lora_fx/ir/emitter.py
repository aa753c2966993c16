"""What builds a node in some IR, and what the nodes that it adds are for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)


class Ops(Protocol[V_co]):
    """Builds the primitives of one closed set. A pass gets the wider `lora_fx.ir.graph.Emitter`.

    ========== ======================================= =========================
    prim       operands                                attributes
    ========== ======================================= =========================
    matmul     x, y, as numpy.matmul
    add, mul   x, y (broadcast); y may be a float
    div        x, y (broadcast)
    norm       x: its length along the last axis,
               which stays with size 1
    detach     x, through which no gradient flows
    transpose  x                                       perm
    reshape    x (sizes known)                         shape
    repeat     x: each column                          times
    slice      x                                       axis, start, stop
    pad        x, zeros around                         before, after (per axis)
    einsum     x, y                                    equation
    conv       x, w [g·out, in, *kernel]               stride padding dilation groups
    conv_tr…   x, w [g·in, out, *kernel]               the same and output_padding
    gather     x, ids                                  picks along axis 0
    dropout    x, in training                          p
    cast       x                                       dtype
    cast_like  x, y                                    x in the dtype of y
    ========== ======================================= =========================
    """

    def op(self, prim: str, *xs: object, **attrs: object) -> V_co:
        """Build the node, or compute the value, of one primitive of the table above."""


class Role(Enum):
    """What a parameter that an emitter adds is for."""

    TRAIN = "train"
    FROZEN = "frozen"
    OPTIONAL_INPUT = "optional input"


@dataclass(frozen=True)
class Parameter:
    """One stored tensor: all its names (the first is the canonical one), shape and dtype.

    `format` and `bits` say how it is quantised; the shape is that of the numbers then.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()
    format: str = ""
    bits: int = 0
