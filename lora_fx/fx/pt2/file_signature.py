"""The call of a program in a file: the arguments that it was exported with, and no others."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import Signature
from lora_fx.fx.pt2.file_manifest import is_constant
from lora_fx.text import Json, JsonView

kinds = inspect.Parameter


NO_SOURCE = "a file has no source to trace other arguments; insert from the source"


class FileSignature(Signature):
    """A Signature of the held arguments only; another call is one LoraFxError that names them."""

    def __init__(self, path: str, signature: inspect.Signature) -> None:
        super().__init__(signature)
        self.path = path

    def bind(self, args: Sequence[object], kwargs: JsonView) -> Json:
        """As Signature's; an unknown argument that is None is taken as left out."""
        given = {k: v for k, v in kwargs.items() if v is not None or k in self.keywords}
        try:
            return super().bind(args, given)
        except TypeError as e:
            raise LoraFxError(
                f"{self.path} holds the program for {self.signature}: {e}", NO_SOURCE
            ) from e


def held_signature(full: inspect.Signature, named: JsonView) -> inspect.Signature:
    """The part of a signature that `named` gives.

    By keyword only is what follows a gap, and a tensor behind a constant.
    """
    params: list[inspect.Parameter] = []
    gap = False
    for p in full.parameters.values():
        if p.name not in named:
            gap = gap or p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
            continue
        defaults = bool(params) and params[-1].default is not kinds.empty
        gap = gap or (defaults and not is_constant(named[p.name]))
        kind = kinds.KEYWORD_ONLY if gap and p.kind is not kinds.VAR_POSITIONAL else p.kind
        params.append(_held(p.name, kind, named[p.name]))
    rest = (k for k in named if k not in full.parameters)
    params += [_held(name, kinds.KEYWORD_ONLY, named[name]) for name in rest]
    return inspect.Signature(params)


def _held(name: str, kind: Any, value: object) -> inspect.Parameter:
    """A parameter of an argument that a file holds; a constant is its own default."""
    return kinds(name, kind, default=value if is_constant(value) else kinds.empty)


def call_text(named: JsonView) -> str:
    """A call in words: `(ids: int64 of 2 dimensions, scale=2.0)`."""
    parts = []
    for name, x in named.items():
        if isinstance(x, torch.Tensor):
            parts.append(f"{name}: {str(x.dtype).removeprefix('torch.')} of {x.dim()} dimensions")
        else:
            parts.append(f"{name}={x!r}" if is_constant(x) else name)
    return f"({', '.join(parts)})"
