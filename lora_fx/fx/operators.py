"""torch's operators as objects: a facade of `torch._ops`, `torch._decomp` and `torch._export`.

An `OpOverload` is what a node calls (aten.add.Tensor), its packet all overloads of one name, and a
`HigherOrderOperator` calls bodies (cond, scan). `decomposition_table` says what an overload is made
of; writing into it changes what traces see. Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

import torch
from torch._decomp import decomposition_table
from torch._export import utils
from torch._export.verifier import SpecViolationError
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

__all__ = [
    "COMPOSITE",
    "SET_GRAD_ENABLED",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "SpecViolationError",
    "decomposes_unasked",
    "decomposition_table",
]

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
"""The key of the rule that says of which other operators an operator is made."""
SET_GRAD_ENABLED = torch._C._set_grad_enabled
"""The function that a recorded run calls where the model switches gradients on or off."""
_preservable = getattr(utils, "_is_preservable_cia_op", lambda operator: False)


def decomposes_unasked(operator: OpOverload) -> bool:
    """Whether a program is decomposed at an operator even if the decomposition table lacks it."""
    return operator._can_decompose() and not _preservable(operator)
