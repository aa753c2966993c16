"""The interface that builds nodes in an IR: a closed set of primitives."""

from __future__ import annotations

from typing import Protocol, TypeVar

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)


class Ops(Protocol[V_co]):
    """A builder of the primitives. A pass gets the wider `lora_fx.ir.graph.Emitter`.

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
    where      mask, x, y: x where it is true
    gather     x, ids                                  picks along axis 0
    dropout    x, in training                          p
    cast       x                                       dtype
    cast_like  x, y                                    x in the dtype of y
    ========== ======================================= =========================
    """

    def op(self, prim: str, *xs: object, **attrs: object) -> V_co:
        """Build the node, or compute the value, of one primitive of the table above."""
