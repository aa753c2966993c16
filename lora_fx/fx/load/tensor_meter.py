"""Limit the number and the bytes of the tensors that building a model may ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import Tensors
from lora_fx.fx.load.config_gate import LARGEST
from lora_fx.fx.tensors import has_values
from lora_fx.fx.trees import tree_leaves, tree_map_only
from lora_fx.text import human

MOST_CALLS = 100_000
"""Tensors that are made while a model without weights is built."""
SPARE_CALLS = 4000
SPARE_BYTES = 1 << 27
"""Calls and bytes for tensors that are not in the file, such as tables of positions or masks."""
_CONSTRUCTORS = frozenset({
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint,
    torch.arange, torch.linspace, torch.logspace, torch.eye, torch.tril_indices,
    torch.triu_indices,
})  # fmt: skip
"""The functions that make a tensor of a given size."""
FEW = 4096
"""Elements of operands whose result is not looked at: a product of two has some millions."""


def _makes_anew(func: Callable[..., Any]) -> bool:
    """Whether a function may take memory: none that works in place, or reads an attribute."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return False
    works_in_place = name.endswith("_") and not name.endswith("__")
    return not works_in_place


def _operands(value: object) -> Iterator[torch.Tensor]:
    """The tensors in arguments or results, that are no views and have memory or would take some."""
    if isinstance(value, torch.Tensor):
        if not value._is_view():
            yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _operands(entry)


def _size(values: tuple[object, ...]) -> int:
    """The elements of arguments that have values."""
    size = 0
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and has_values(leaf):
            size += leaf.numel()
    return size


def _as_shapes(values: Any) -> Any:
    """Arguments with their tensors on the meta device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("meta"), values)


class Metered(TorchFunctionMode):
    """A block in which tensors are counted before they are made.

    Args:
        where: The config, for messages.
        tensors: Those of the weights, which say how much there can be; None where there are none.
    """

    def __init__(self, where: str, tensors: Tensors | None) -> None:
        super().__init__()
        self.where = where
        self.calls = 0
        self.bytes = 0
        self.most_calls = MOST_CALLS
        self.most_bytes = LARGEST
        if tensors:
            stored = sum(tensor.stop - tensor.start for tensor in tensors.values())
            self.most_calls = SPARE_CALLS + 16 * len(tensors)
            self.most_bytes = SPARE_BYTES + 8 * stored

    @contextlib.contextmanager
    def anew(self) -> Iterator[None]:
        """A block whose tensors are counted by themselves, against the same bounds."""
        calls = self.calls
        size = self.bytes
        self.calls = 0
        self.bytes = 0
        try:
            yield
        finally:
            self.calls = calls
            self.bytes = size

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count the tensors that a constructor is about to make, and other large results."""
        keywords = dict(kwargs or {})
        if func in _CONSTRUCTORS:
            self._count(func, args, keywords)
        elif _makes_anew(func) and _size((*args, *keywords.values())) > FEW:
            self._look(func, args, keywords)
        return func(*args, **keywords)

    def _look(
        self, func: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Refuse a result that alone is larger than all may be, such as a product of two lines."""
        try:
            result = func(*_as_shapes(args), **_as_shapes(keywords))
        except Exception:  # what reads values has no result on the meta device
            return
        self._refuse_bytes(
            sum(tensor.numel() * tensor.element_size() for tensor in _operands(result))
        )

    def _count(
        self, func: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Count a tensor that a constructor makes, and its bytes.

        Raises:
            LoraFxError: They are more than the weights have.
        """
        self.calls += 1
        if self.calls > self.most_calls:
            raise LoraFxError(
                f"{self.where} asks for more than {self.most_calls} tensors",
                "is config.json the config of these weights?",
            )
        on_meta = {**keywords, "device": "meta"}
        on_meta.pop("generator", None)
        on_meta.pop("out", None)
        result = func(*args, **on_meta)
        self.bytes += result.numel() * result.element_size()
        self._refuse_bytes(self.bytes)

    def _refuse_bytes(self, size: int) -> None:
        if size > self.most_bytes:
            raise LoraFxError(
                f"{self.where} asks for tensors of more than {human(self.most_bytes)}B",
                "is config.json the config of these weights?",
            )
