"""What a verb is given, as a capture or as a module: opened, quantised, built and proven.

It may be a module, a function, a file, or a module of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath

from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import LoraFxError, NoSay, given_options, refuse_no_say
from lora_fx.fx.attach.attachment import is_attached
from lora_fx.fx.capture.call import unwrapped
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.decoder import decoder
from lora_fx.fx.load.huggingface import LoadedModel
from lora_fx.fx.load.models import load_model
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.pt2.captured import FileCaptured, is_program, open_program
from lora_fx.fx.untie import lone_names, untied
from lora_fx.inputs import Dynamic, Named
from lora_fx.passes.verbs.build import module_of
from lora_fx.passes.verbs.options import ExportAdapters


def captured_of(
    model: object,
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    dynamic: Dynamic | None = None,
    *,
    meta: bool = False,
    repeat: bool = True,
    adapter: Adapter | None = None,
) -> Captured:
    """The capture of a model; a Captured or a captured module brings its own.

    A text or path is loaded as on the command line (a Hugging Face folder, file.py:factory …),
    without its weights where `meta` is given. Where the adapter saves one name of a tied tensor,
    the capture is of a copy of the model in which this name has a tensor of its own.
    """
    model = unwrapped(model)
    if isinstance(model, (Captured, CapturedModule)):
        refuse_dynamic(dynamic)
        return apart(model, adapter) if isinstance(model, Captured) else model.captured
    if is_attached(model):
        raise LoraFxError(
            f"an adapter is attached to this {type(model).__name__}",
            "keep model.adapter(), then lora_fx.detach(model), and pass the adapter",
        )
    if is_program(model):
        return apart(open_program(model, args, kwargs, dynamic, meta=meta), adapter)
    if isinstance(model, (str, PathLike)):
        model = load_model(fspath(model), meta=meta)
    module = model.module if isinstance(model, LoadedModel) else model
    if adapter is None or not isinstance(module, nn.Module):
        return capture(model, args, kwargs, dynamic, repeat=repeat)
    names = lone_names(adapter, module)
    if not names:
        return capture(model, args, kwargs, dynamic, repeat=repeat)
    changed = untied(module, names)
    source = replace(model, module=changed) if isinstance(model, LoadedModel) else changed
    cap = capture(source, args, kwargs, dynamic, repeat=repeat)
    cap.notes.append(said_of_names(names))
    return cap


def apart(cap: Captured, adapter: Adapter | None) -> Captured:
    """The capture; another one where the adapter saves one name of a tied tensor.

    Raises:
        LoraFxError: There is such a name, and no source that could be captured again.
    """
    names = lone_names(adapter, cap.model) if adapter else ()
    if not names:
        return cap
    if isinstance(cap, FileCaptured):
        raise LoraFxError(
            f"{cap.path} holds one tensor for {names[0]!r} and other names, and the adapter's "
            "whole tensor is for that name alone",
            "give the model itself, instead of a file of its graph",
        )
    model = untied(cap.quantised or cap.model, names)
    new = Captured(model, (), cap.named, cap.requested, repeat=cap.repeat)
    new.notes += [*cap.notes, said_of_names(names)]
    return new


def said_of_names(names: Sequence[str]) -> str:
    """What a report says of names that have tensors of their own."""
    return f"saved alone, and so no longer tied: {', '.join(names)}"


def refuse_dynamic(dynamic: Dynamic | None) -> None:
    """Refuse other free dimensions of a model that is captured already.

    Example inputs are let be: a caller who passes those of the capture again asks for nothing else.
    """
    asked = {"dynamic": dynamic or None}
    captured = NoSay[Named](tuple(asked), bool, "beside a captured model, which has its sizes")
    refuse_no_say([captured], asked, given_options(asked))


def with_cache(
    model: object, adapters: ExportAdapters | None = None
) -> tuple[Captured, ExportAdapters | None]:
    """The capture of a decoder with its cache as tensors, and the adapters.

    A module that insert returned brings its own adapter where none are given.

    Raises:
        LoraFxError: No decoder; or a module of ours whose weights the original has no more.
    """
    model = opened(model)
    if is_attached(model):
        return captured_of(model), adapters  # raises
    if isinstance(model, CapturedModule):
        if hasattr(model, "folded") or not _shares(model):
            raise LoraFxError(
                "this module's weights are no longer those of the model that was captured",
                "export the original with adapters=…",
            )
        if adapters is None and isinstance(model, AdaptedModule):
            adapters = model.adapter()
        model = model.captured
    elif isinstance(model, (str, PathLike)):
        loaded = load_model(fspath(model))
        captured = decoder(loaded.module)
        captured.notes += loaded.notes
        return captured, adapters
    return decoder(model), adapters


def _shares(module: CapturedModule) -> bool:
    """True where the frozen weights of a module are the captured model's own."""
    theirs = dict(module.captured.model.named_parameters())
    return all(
        p.requires_grad or p.data_ptr() == theirs[n].data_ptr()
        for n, p in module.named_parameters()
        if n in theirs
    )


def opened(model: object) -> object:
    """A .pt2 file, or its capture, that holds branches as its module; a wrapper's own module."""
    model = unwrapped(model)
    if is_program(model):
        model = open_program(model)
    if isinstance(model, FileCaptured) and model.adapter is not None:
        return module_of(model)
    return model


def load_program(path: str | PathLike[str], *, trust: bool = False) -> CapturedModule:
    """The module that a .pt2 file holds: an AdaptedModule where it has branches.

    The adapter, its dropout and the norms are as they were saved; training goes on from there.
    Outputs are plain: where the model returned a class with fields, a dict.

    Args:
        path: The file.
        trust: As in `open_program`.

    Raises:
        LoraFxError: As `open_program`.
    """
    return module_of(open_program(path, trust=trust))


def capture(
    model: object,
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    dynamic: Dynamic | None = None,
    static: Sequence[str] = (),
    *,
    repeat: bool = True,
) -> Captured:
    """Capture a model with example inputs.

    Args:
        model: An nn.Module, a function of tensors, a bound method of a module, the path of a .pt2
            file, which needs no inputs, or what load_model returned, which has an example.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        dynamic: {input: {dimension: name}} or {input: (dimensions)}, beside the defaults:
            dimension 0 of every tensor, dimension 1 of integers, masks and 3-d floats.
        static: Inputs (`NAME` or `NAME:DIM`) that stay fixed.
        repeat: Trace a block that repeats once, and copy its nodes; the graph is then compared
            with the model where it has weights. False traces each one: slower, and the same.

    Raises:
        CaptureError: The model cannot be traced; the message names the line of its code.
        LoraFxError: The inputs do not fit the signature.
    """
    if is_program(model):
        return open_program(model, args, kwargs, dynamic, static)
    if isinstance(model, LoadedModel):
        if not args and not kwargs:
            args, kwargs = model.args, model.kwargs
        cap = capture(model.module, args, kwargs, dynamic, static, repeat=repeat)
        cap.notes += model.notes
        return cap
    cap = Captured(model, args, kwargs, dynamic, static, repeat=repeat)
    cap.traced(False, cap.named)
    return cap
