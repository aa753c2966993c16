"""Ops whose rules in torch fix the length of a sequence, with rules that leave it free.

lstm, gru    torch runs every step of a traced one in Python
max_pool1d   its rule in C++ reads the length as a number; that of max_pool2d does not (torch 2.13)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lora_fx.fx.operators import COMPOSITE, decomposition_table

aten = torch.ops.aten


@contextlib.contextmanager
def lengths_stay_free() -> Iterator[None]:
    """A block in which a trace has these ops as one node each, of any length."""
    with _recurrent_shapes(), _pooled_as_images():
        yield


@contextlib.contextmanager
def _recurrent_shapes() -> Iterator[None]:
    """A block in which LSTM and GRU tell the shapes of their results alone."""
    ops = (aten.lstm.input, aten.gru.input)  # the exporter to ONNX has no RNN, and needs its steps
    originals = [(op, dict(op.py_kernels), decomposition_table[op]) for op in ops]

    def output_shapes(x: torch.Tensor, hx: object, *args: object) -> tuple[torch.Tensor, ...]:
        states: Any = hx if isinstance(hx, (tuple, list)) else [hx]
        is_bidirectional = args[5]
        directions = 2 if is_bidirectional else 1
        out = x.new_empty((*x.shape[:2], directions * states[0].shape[2]))
        return out, *map(torch.empty_like, states)

    def put(op: Any, kernels: Mapping[Any, Any], decomposition: Callable[..., Any]) -> None:
        op.py_kernels.update(kernels)
        op._dispatch_cache.clear()
        decomposition_table[op] = decomposition

    try:
        for op in ops:
            put(op, dict.fromkeys(op.py_kernels, output_shapes), output_shapes)
        yield
    finally:
        for op, kernels, decomposition in originals:
            put(op, kernels, decomposition)


@contextlib.contextmanager
def _pooled_as_images() -> Iterator[None]:
    """A block in which max_pool1d is computed as a max_pool2d of images of height 1."""
    op: Any = aten.max_pool1d.default
    original = op.py_kernels.get(COMPOSITE)
    op.py_kernels[COMPOSITE] = _max_pool1d
    op._dispatch_cache.clear()
    try:
        yield
    finally:
        op.py_kernels.pop(COMPOSITE, None)  # another thread's block may have ended meanwhile
        if original is not None:
            op.py_kernels[COMPOSITE] = original
        op._dispatch_cache.clear()


def _max_pool1d(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> torch.Tensor:
    """Return the maxima over windows of x [N, C, L] or [C, L]."""
    images = x.unsqueeze(-2)
    window = [1, *kernel_size]
    steps = [1, *(stride or kernel_size)]
    pooled = aten.max_pool2d(images, window, steps, [0, *padding], [1, *dilation], ceil_mode)
    maxima: torch.Tensor = pooled.squeeze(-2)
    return maxima
