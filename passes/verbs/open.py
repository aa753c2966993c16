"""What a verb is given, as a capture: a module, a function, a file, or a module of ours."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath

from lora_fx.errors import LoraFxError
from lora_fx.fx.attach.attachment import is_attached
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.decoder import decoder
from lora_fx.fx.load.huggingface import LoadedModel
from lora_fx.fx.load.models import load_model
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule, with_signature
from lora_fx.fx.pt2.captured import FileCaptured, is_program, open_program
from lora_fx.inputs import Dynamic, Named
from lora_fx.passes.verbs.build_module import build_module
from lora_fx.passes.verbs.options import ExportAdapters, InsertOptions


def captured_of(
    model: object,
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    dynamic: Dynamic | None = None,
    *,
    meta: bool = False,
    repeat: bool = True,
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
        cap = capture_loaded(loaded, args, kwargs, dynamic, repeat=repeat)
        cap.notes += loaded.notes
        return cap
    return capture(model, args, kwargs, dynamic, repeat=repeat)


def capture_loaded(
    loaded: LoadedModel,
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    dynamic: Dynamic | None = None,
    static: Sequence[str] = (),
    *,
    repeat: bool = True,
) -> Captured:
    """The capture of a loaded model, on its own example where no other is given."""
    if not args and not kwargs:
        args, kwargs = loaded.args, loaded.kwargs
    return capture(loaded.module, args, kwargs, dynamic, static, repeat=repeat)


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
    """A .pt2 file, or its capture, that holds branches as its module; anything else as it is."""
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


def module_of(captured: FileCaptured) -> CapturedModule:
    """The module of an opened file."""
    adapter = captured.adapter
    if adapter is None:
        module: CapturedModule = with_signature(CapturedModule, captured)(captured)
        return module
    options = InsertOptions(
        adapter=adapter, dropout=captured.dropout, norm_stats=captured.norm_stats
    )
    return build_module(captured.plain(), options)


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
        model: An nn.Module, a function of tensors, a bound method of a module, or the path of a
            .pt2 file, which needs no inputs.
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
    cap = Captured(model, args, kwargs, dynamic, static, repeat=repeat)
    cap.traced(False, cap.named)
    return cap
