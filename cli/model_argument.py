"""Captures a MODEL argument, and builds its module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.cli.data_arguments import load_npz
from lora_fx.cli.model_page import show_model
from lora_fx.cli.options import first_given
from lora_fx.cli.output import note
from lora_fx.errors import LoraFxError

if TYPE_CHECKING:
    from lora_fx.cli.model_options import ModelOptions
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.fx.module.adapted import AdaptedModule


def captured(
    model: str,
    options: ModelOptions,
    *,
    meta: bool = False,
    cache: bool = False,
    check: Callable[[Any], object] | None = None,
    later: bool = False,
) -> Captured:
    """Capture a MODEL argument, and print the notes of the capture.

    Args:
        model: A path or name, as on the command line.
        options: Options for loading and capturing the model.
        meta: True to read no weights.
        cache: True to capture a decoder with its key-value cache.
        check: For a decoder: called with its config before the capture; it may raise.
        later: True to leave the trace, and its notes, to `trace_example`.
    """
    from lora_fx.fx.tensors import from_numpy
    from lora_fx.inputs import parse_dynamic
    from lora_fx.passes.verbs.open import captured_of
    from lora_fx.passes.verbs.options import CaptureOptions

    arrays = load_npz(options.inputs_file)
    capture_options = CaptureOptions(
        kwargs={name: from_numpy(array) for name, array in arrays.items()},
        dynamic=parse_dynamic(options.dynamic) or None,
        static=options.static,
        repeat=not options.no_repeat,
        cache=cache,
        weights=options.weights,
        meta=meta,
        trust=options.trust,
        tell=note,
        check=check,
        later=later,
    )
    cap = captured_of(model, capture_options)
    show_model(model, cap, meta=meta)
    if not later:
        trace_example(cap)
    return cap


def trace_example(cap: Captured) -> None:
    """Trace the eval graph if it is not traced yet, and print the notes of the capture."""
    cap.traced(False, cap.named)
    note(*cap.notes, *(f"pinned: {pin}" for pin in cap.pinned))
    note(*(f"captured for: {condition}" for condition in cap.ranges))


def is_causal_folder(model: str, cap: Captured) -> bool:
    """Whether a MODEL argument is the folder of a causal language model."""
    from lora_fx.files.hub import PREFIX
    from lora_fx.fx.train.language_data import is_causal
    from lora_fx.passes.verbs.open import user_module

    is_folder = model.startswith(PREFIX) or Path(model).is_dir()
    return is_folder and is_causal(user_module(cap))


def module_with_adapter(cap: Captured) -> AdaptedModule:
    """Return the module of a .pt2 file with branches; raise for an option that chooses targets."""
    from lora_fx.fx.module.adapted import AdaptedModule
    from lora_fx.fx.pt2.captured import FileCaptured
    from lora_fx.passes.verbs.build import module_of

    assert isinstance(cap, FileCaptured)
    choosing = ("rank", "alpha", "include", "exclude", "also_train", "variant", "dropout", "init")
    option = first_given(*choosing, "plan", "quantise", "dead", "invocation")
    if option:
        raise LoraFxError(
            f"{cap.path} contains an adapter, whose training goes on, so {option} has no effect",
            "leave it out, or start from the original model",
        )
    module = module_of(cap)
    assert isinstance(module, AdaptedModule)  # it has branches
    return module
