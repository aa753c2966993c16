"""The call of a program in a file: the arguments that it was exported with, and no others."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import Signature

kinds = inspect.Parameter
NO_SOURCE = "a file has no source to trace other arguments; insert from the source"


class FileSignature(Signature):
    """A Signature of the held arguments only; another call is one LoraFxError that names them."""

    def __init__(self, path: str, signature: inspect.Signature) -> None:
        def forward() -> None: ...

        forward.__signature__ = signature  # type: ignore[attr-defined]
        super().__init__(forward)
        self.path = path

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """As Signature's; an unknown argument that is None is taken as left out."""
        given = {k: v for k, v in kwargs.items() if v is not None or k in self.keywords}
        try:
            return super().bind(args, given)
        except TypeError as e:
            raise LoraFxError(
                f"{self.path} holds the program for {self.signature}: {e}", NO_SOURCE
            ) from e


def is_constant(value: Any) -> bool:
    """True for arguments that a program has built in."""
    return value is None or isinstance(value, (bool, int, float, str))


def signature_of(named: Mapping[str, Any]) -> inspect.Signature:
    """A signature of these arguments; constants have themselves as defaults."""
    params: list[inspect.Parameter] = []
    kind: Any = kinds.POSITIONAL_OR_KEYWORD
    optional = False
    for name, value in named.items():
        plain = is_constant(value)
        if optional and not plain:
            kind = kinds.KEYWORD_ONLY
        optional = optional or plain
        params.append(kinds(name, kind, default=value if plain else kinds.empty))
    return inspect.Signature(params)


def held_signature(full: inspect.Signature, named: Mapping[str, Any]) -> inspect.Signature:
    """The part of a signature that `named` gives; what follows a gap is by keyword only."""
    params: list[inspect.Parameter] = []
    gap = False
    for p in full.parameters.values():
        if p.name not in named:
            gap = gap or p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
            continue
        kind = kinds.KEYWORD_ONLY if gap and p.kind is not kinds.VAR_POSITIONAL else p.kind
        value = named[p.name]
        constant = is_constant(value)
        gap = gap or constant
        params.append(kinds(p.name, kind, default=value if constant else kinds.empty))
    rest = {k: v for k, v in named.items() if k not in full.parameters}
    for name, value in rest.items():
        default = value if is_constant(value) else kinds.empty
        params.append(kinds(name, kinds.KEYWORD_ONLY, default=default))
    return inspect.Signature(params)


def call_text(named: Mapping[str, Any]) -> str:
    """A call in words: `(ids: int64 of 2 dimensions, scale=2.0)`."""
    parts = []
    for name, x in named.items():
        if isinstance(x, torch.Tensor):
            parts.append(f"{name}: {str(x.dtype).removeprefix('torch.')} of {x.dim()} dimensions")
        else:
            parts.append(f"{name}={x!r}" if is_constant(x) else name)
    return f"({', '.join(parts)})"
