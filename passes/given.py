"""What a verb is given, as a capture: a module, a function, a file, or a module of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from lora_fx.errors import LoraFxError
from lora_fx.fx.attach import is_attached
from lora_fx.fx.capture import Captured, capture
from lora_fx.fx.models import load_model
from lora_fx.fx.module import CapturedModule, with_signature
from lora_fx.fx.pt2 import is_program, module_of, open_program
from lora_fx.fx.pt2_captured import FileCaptured


def captured_of(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Any = None,
    *,
    meta: bool = False,
) -> Captured:
    """The capture of a model; a Captured or a captured module brings its own.

    A text or path is loaded as on the command line (a Hugging Face folder, file.py:factory …),
    without its weights where `meta` is given.
    """
    if isinstance(model, Captured):
        return model
    if isinstance(model, CapturedModule):
        return model.captured
    if is_attached(model):
        raise LoraFxError(
            f"an adapter is attached to this {type(model).__name__}",
            "keep model.adapter(), then lora_fx.detach(model), and pass the adapter",
        )
    if is_program(model):
        return open_program(model, args, kwargs, dynamic, meta=meta)
    if isinstance(model, (str, PathLike)):
        loaded = load_model(fspath(model), meta=meta)
        given = (args, kwargs) if args or kwargs else (loaded.args, loaded.kwargs)
        cap = capture(loaded.module, *given, dynamic)
        cap.notes += loaded.notes
        return cap
    return capture(model, args, kwargs, dynamic)


def opened(model: Any) -> Any:
    """A .pt2 file, or its capture, that holds branches as its module; anything else as it is."""
    if is_program(model):
        model = open_program(model)
    if isinstance(model, FileCaptured) and model.adapter is not None:
        return module_of(model)
    return model


def plain(captured: Captured) -> CapturedModule:
    """The captured model as a module, with no adapter."""
    module = with_signature(CapturedModule, captured)(captured)
    assert isinstance(module, CapturedModule)
    return module
