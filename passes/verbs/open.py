"""The way from any kind of MODEL to a Captured; each verb and command calls `captured_of`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath

from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.fx.attach.attachment import is_attached
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.decoder import decoder
from lora_fx.fx.capture.root_module import unwrapped
from lora_fx.fx.load.loaded_model import LoadedModel
from lora_fx.fx.load.models import load_model
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.pt2.captured import FileCaptured, is_program, open_program
from lora_fx.fx.untie import lone_names, untied
from lora_fx.inputs import Dynamic, Named
from lora_fx.passes.verbs.build import module_of
from lora_fx.passes.verbs.options import CaptureOptions, ExportAdapters
from lora_fx.progress import stage

DEFAULTS = CaptureOptions()


def captured_of(model: object, options: CaptureOptions = DEFAULTS) -> Captured:
    """Capture a model of any kind; every verb and every command calls this function.

    Args:
        model: A Captured is taken as it is, and a module of ours stands for the model that it was
            made from. A text or path is opened as on the command line: a .pt2 file, a Hugging Face
            folder, hf:ORG/NAME, FILE.py:FACTORY and so on. What load_model returned has an example,
            which inputs of the options replace. Anything else is a module, a function of tensors,
            or a bound method of a module.
        options: What the verbs ask for.

    Raises:
        CaptureError: The model cannot be traced.
        LoraFxError: No such model, inputs that do not fit it, options that have no effect for it.
    """
    model = unwrapped(model)
    if isinstance(model, Captured):
        options.refuse_for_captured()
        if options.cache:
            model = decoder(model, check=options.check)
        return apart(model, options.adapter)
    if isinstance(model, CapturedModule) and not options.with_branches:
        options.refuse_for_captured()
        return _under_branches(model, options)
    if is_attached(model) and not options.with_branches:
        raise LoraFxError(
            f"an adapter is attached to this {type(model).__name__}",
            "keep model.adapter(), then lora_fx.detach(model), and pass the adapter",
        )
    if is_program(model):
        return _of_program(model, options)
    if isinstance(model, (str, PathLike)):
        with stage("loading the model"):
            model = load_model(
                fspath(model), weights=options.weights, meta=options.meta, trust=options.trust
            )
        if options.tell is not None:
            options.tell(*model.notes)
            model = replace(model, notes=())
    if isinstance(model, LoadedModel):
        return _of_loaded(model, options)
    return _of_module(model, options)


def _under_branches(module: CapturedModule, options: CaptureOptions) -> Captured:
    """Return the capture that a module of lora-fx was made from.

    Raises:
        LoraFxError: Another capture is asked for, with a cache, and the original has no more the
            weights of the module.
    """
    if not options.cache:
        return execution_of(module).captured
    if hasattr(module, "folded") or not _shares(module):
        raise LoraFxError(
            "this module's weights are no longer those of the model that was captured",
            "export the original with adapters=…",
        )
    return decoder(execution_of(module).captured, check=options.check)


def _shares(module: CapturedModule) -> bool:
    """True if the frozen weights of a module share memory with the captured model's."""
    originals = dict(execution_of(module).captured.model.named_parameters())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or name not in originals:
            continue
        if parameter.data_ptr() != originals[name].data_ptr():
            return False
    return True


def _of_program(path: str | PathLike[str], options: CaptureOptions) -> Captured:
    """Open a .pt2 file and return it as a capture."""
    if options.weights:
        raise LoraFxError(
            f"{fspath(path)} holds its weights inside the file", "leave --weights out"
        )
    with stage("loading the model"):
        program = open_program(
            path,
            options.args,
            options.kwargs,
            options.dynamic,
            options.static,
            trust=options.trust,
            meta=options.meta,
        )
    if options.cache:
        return decoder(program)  # raises
    return apart(program, options.adapter)


def _of_loaded(loaded: LoadedModel, options: CaptureOptions) -> Captured:
    """Capture a model that load_model opened, at its own example unless inputs are given."""
    if not options.cache and _is_empty(options.args) and _is_empty(options.kwargs):
        options = replace(options, args=loaded.args, kwargs=loaded.kwargs)
    cap = _of_module(loaded.module, options, loaded.notes)
    cap.tokenizer_folder = loaded.tokenizer_folder
    return cap


def _is_empty(inputs: object) -> bool:
    """Whether no inputs were given; an array is never empty."""
    if isinstance(inputs, (tuple, list, Mapping)):
        return not inputs
    return inputs is None


def _of_module(model: object, options: CaptureOptions, notes: Sequence[str] = ()) -> Captured:
    """Capture a live model, traced in eval mode; `notes` come from its loading."""
    names: tuple[str, ...] = ()
    if options.adapter is not None and isinstance(model, nn.Module):
        names = lone_names(options.adapter, model)
        if names:
            model = untied(model, names)

    if options.cache:
        cap = decoder(model, repeat=options.repeat, check=options.check)
    else:
        cap = Captured(
            model,
            options.args,
            options.kwargs,
            options.dynamic,
            options.static,
            repeat=options.repeat,
        )
        if options.example_sizes:
            cap.fix_sizes()
        if not options.later:
            cap.traced(False, cap.named)

    cap.notes += notes
    if names:
        cap.notes.append(note_of_untied(names))
    return cap


def apart(cap: Captured, adapter: Adapter | None) -> Captured:
    """Return the capture; capture again if the adapter saves one name of a tied tensor alone.

    Raises:
        LoraFxError: There is such a name, and no source that could be captured again.
    """
    if not adapter:
        return cap
    names = lone_names(adapter, cap.model)
    if not names:
        return cap
    if isinstance(cap, FileCaptured):
        raise LoraFxError(
            f"{cap.path} holds one tied tensor for {names[0]!r} and other names, but the "
            "adapter's whole tensor is for that name alone",
            "pass the model itself instead of this file",
        )
    untied_cap = captured_again(cap, untied(user_module(cap), names))
    untied_cap.notes += [*cap.notes, note_of_untied(names)]
    return untied_cap


def captured_again(cap: Captured, model: nn.Module) -> Captured:
    """Capture another module, with the inputs and free sizes of a given capture."""
    return Captured(model, (), cap.named, cap.requested, repeat=cap.repeat)


def user_module(cap: Captured) -> nn.Module:
    """Return the captured module itself, since `model` may be a copy without quantised layers."""
    return cap.quantised or cap.model


def note_of_untied(names: Sequence[str]) -> str:
    """Return the report's note on names that now have separate tensors."""
    return f"these names were saved apart, and are no longer tied: {', '.join(names)}"


def opened(model: object) -> object:
    """Return a .pt2 file or capture with branches as its module, and a wrapper's inner module."""
    model = unwrapped(model)
    if is_program(model):
        model = captured_of(model)
    if isinstance(model, FileCaptured) and model.adapter is not None:
        return module_of(model)
    return model


def own_adapters(model: object, adapters: ExportAdapters | None) -> ExportAdapters | None:
    """Return the adapters of an export; if none are given, the adapter of the model itself."""
    if adapters is None and isinstance(model, AdaptedModule):
        return model.adapter()
    return adapters


def load_program(path: str | PathLike[str], *, trust: bool = False) -> CapturedModule:
    """Load the module that a .pt2 file holds; a file with branches gives an AdaptedModule.

    The adapter, its dropout and the norms are as they were saved; training goes on from there.
    Outputs are plain: a dict takes the place of a class with fields.

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
        model: An nn.Module, a function of tensors, a bound method of a module, what load_model
            returned, or a path or name as on the command line; the last two have an example, which
            `args` and `kwargs` replace, and a .pt2 file needs none. A Captured is returned.
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
    options = CaptureOptions(
        args=args,
        kwargs=kwargs,
        dynamic=dynamic,
        static=static,
        repeat=repeat,
        with_branches=True,
    )
    return captured_of(model, options)


def live_model(name: str) -> LoadedModel:
    """Return the live model of a name on the command line, which is not captured."""
    return load_model(name)


def file_program(path: str | PathLike[str]) -> FileCaptured:
    """Return the program of a .pt2 file, without the pickles in it."""
    return open_program(path)
