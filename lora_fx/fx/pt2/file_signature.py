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

NO_SOURCE = (
    "a file cannot be traced for other arguments: insert into the model that it was made from"
)


class FileSignature(Signature):
    """A Signature of the held arguments only; another call is one LoraFxError that names them."""

    def __init__(self, path: str, signature: inspect.Signature) -> None:
        super().__init__(signature)
        self.path = path

    def bind(self, args: Sequence[object], kwargs: JsonView) -> Json:
        """As Signature's; an unknown argument that is None is taken as left out."""
        keywords = {}
        for name, value in kwargs.items():
            if value is not None or name in self.keywords:
                keywords[name] = value
        try:
            return super().bind(args, keywords)
        except TypeError as e:
            raise LoraFxError(
                f"{self.path} holds the program for {self.signature}: {e}", NO_SOURCE
            ) from e


def plain_signature(named: JsonView) -> inspect.Signature:
    """The signature of a call, from its arguments only."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in named
    ]
    return signature_of_call(inspect.Signature(parameters), named)


def signature_of_call(full: inspect.Signature, named: JsonView) -> inspect.Signature:
    """The part of a signature that the arguments of a call fill.

    1. A parameter without an argument is left out.
    2. A parameter behind one that was left out is passed by keyword only.
    3. So is a tensor behind a constant, since a constant is its own default.
    4. Arguments that the signature does not have are passed by keyword only.
    """
    parameters: list[inspect.Parameter] = []
    by_keyword = False
    for parameter in full.parameters.values():
        if parameter.name not in named:
            by_keyword = by_keyword or parameter.kind in (
                inspect.Parameter.POSITIONAL_ONLY,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
            )
            continue
        argument = named[parameter.name]
        has_default = bool(parameters) and parameters[-1].default is not inspect.Parameter.empty
        if has_default and not is_constant(argument):
            by_keyword = True
        kind = parameter.kind
        if by_keyword and kind is not inspect.Parameter.VAR_POSITIONAL:
            kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(_parameter(parameter.name, kind, argument))
    for name, argument in named.items():
        if name not in full.parameters:
            parameters.append(_parameter(name, inspect.Parameter.KEYWORD_ONLY, argument))
    return inspect.Signature(parameters)


def _parameter(name: str, kind: Any, argument: object) -> inspect.Parameter:
    """The parameter of an argument that a file holds; a constant is its own default."""
    default = argument if is_constant(argument) else inspect.Parameter.empty
    return inspect.Parameter(name, kind, default=default)


def call_text(named: JsonView) -> str:
    """A call as text: `(ids: int64 of 2 dimensions, scale=2.0)`."""
    texts = []
    for name, argument in named.items():
        if isinstance(argument, torch.Tensor):
            dtype = str(argument.dtype).removeprefix("torch.")
            texts.append(f"{name}: {dtype} of {argument.dim()} dimensions")
        elif is_constant(argument):
            texts.append(f"{name}={argument!r}")
        else:
            texts.append(name)
    return f"({', '.join(texts)})"
