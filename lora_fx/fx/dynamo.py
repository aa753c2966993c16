"""The compiler of torch.compile: a facade of `torch._dynamo`, imported on first use.

Importing it takes about as long as importing torch. Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


@contextlib.contextmanager
def compiling_afresh() -> Iterator[None]:
    """A block that begins with no compiled code, and that leaves none behind.

    A backend is shown only what was not compiled before. Recurrent layers are compiled too.
    """
    from torch import _dynamo

    _dynamo.reset()
    try:
        with _dynamo.config.patch(allow_rnn=True):
            yield
    finally:
        _dynamo.reset()


def may_vary(tensor: Tensor, dimension: int) -> None:
    """Tell the compiler that a dimension of a tensor may have another size at the next call."""
    from torch import _dynamo

    _dynamo.maybe_mark_dynamic(tensor, dimension)


def with_free_parameters(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a compiled call that accepts parameters of other sizes without a new compilation.

    Sizes of parameters are constants to the compiler, whatever is marked, unless these options say
    no: the second for what it reaches through one of torch's own modules.
    """
    from torch import _dynamo

    static = ("force_parameter_static_shapes", "force_nn_module_property_static_shapes")
    free: Callable[..., Any] = _dynamo.config.patch(dict.fromkeys(static, False))(compiled)
    return free
