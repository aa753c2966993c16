"""One torch.export of a model, cleaned to a flat graph with the names of the model's tensors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from lora_fx.errors import silenced
from lora_fx.fx import fake_tensors, symbolic_sizes
from lora_fx.fx.capture.call import in_separate_memory, leaves_of
from lora_fx.fx.capture.cleaned_graph import Pinned, Traced, clean_module
from lora_fx.fx.capture.door import Requested, dims_of_one, without_dims
from lora_fx.fx.capture.free_lengths import lengths_stay_free
from lora_fx.fx.capture.guards import GuardLog
from lora_fx.fx.capture.observed import observing, observing_modes
from lora_fx.fx.capture.repeat import Repeats
from lora_fx.fx.capture.root_module import RootModule
from lora_fx.fx.capture.unchanged import same_attributes, same_dtypes
from lora_fx.fx.graph.nodes import random_ops
from lora_fx.fx.operators import HigherOrderOperator
from lora_fx.fx.trees import tree_leaves, tree_map_only, tree_structure, tree_unflatten
from lora_fx.inputs import Named
from lora_fx.patching import patched

aten = torch.ops.aten


def trace(entry: RootModule, named: Named, requested: Requested, *, repeat: bool = True) -> Traced:
    """Export a model on `named` inputs and clean the graph.

    A dynamic dimension of size 1 is tried at 2, and fixed where the model does not take that.

    Args:
        entry: The model.
        named: Its arguments.
        requested: The dimensions that should be dynamic.
        repeat: Trace blocks that repeat once; see lora_fx.fx.capture.repeat.
    """
    try:
        return _trace_blocks(entry, named, requested, repeat=repeat)
    except Exception:
        dims_of_size_one = dims_of_one(named, requested)
        if not dims_of_size_one:
            raise
        remaining = without_dims(requested, dims_of_size_one)
        traced = _trace_blocks(entry, named, remaining, repeat=repeat)
        where = "the model: it does not run at size 2"
        pinned = [Pinned(name, dim, 1, where) for name, dim in dims_of_size_one]
        traced.pinned = [*traced.pinned, *pinned]
        return traced


def _trace_blocks(entry: RootModule, named: Named, requested: Requested, *, repeat: bool) -> Traced:
    """Export with repeated blocks traced once; trace every block if that fails."""
    if not repeat:
        return _export_once(entry, named, requested)
    repeats = Repeats(entry.source())
    if not repeats.families:
        return _export_once(entry, named, requested)

    try:
        with repeats.watching():
            traced = _export_once(entry, named, requested)
    except Exception as error:  # the model raises it, or the watching does
        if raises_alike(entry, named, error):
            raise
    else:
        traced.copies = repeats.copies
        return traced
    return _export_once(entry, named, requested)


def raises_alike(entry: RootModule, named: Named, error: BaseException | None) -> bool:
    """Whether a model raises the error of its export even if nothing traces it.

    Every further try would take as long as an export.

    Args:
        entry: The model, with its values or on fake tensors, in the mode to run.
        named: Its arguments.
        error: The error that its export raised.
    """
    fakes = (p.fake_mode for p in entry.parameters() if fake_tensors.is_fake(p))
    fake_mode = next(fakes, None)
    inputs = dict(named)
    if fake_mode is not None:
        as_fake = partial(fake_mode.from_tensor, static_shapes=True)
        inputs = tree_map_only(torch.Tensor, as_fake, inputs)

    on_fake_tensors = fake_mode or contextlib.nullcontext()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), on_fake_tensors:
            entry(inputs)
    except Exception as untraced:
        return type(untraced) is type(error) and str(untraced) == str(error)
    return False


def _export_once(entry: RootModule, named: Named, requested: Requested) -> Traced:
    """Export a model through one dict argument, and clean its graph.

    torch 2.13 cannot name shapes inside **kwargs ("Must provide a tree_name"), and that is how
    Hugging Face's Trainer passes num_items_in_batch.
    """
    names: list[str] = []
    examples: list[Any] = []
    dynamic_dims: list[dict[int, Any] | None] = []
    for name, leaf in leaves_of(named):
        dims = requested.get(name, {}) if isinstance(leaf, torch.Tensor) else {}
        names.append(name)
        examples.append(at_least_two(leaf, dims))
        dynamic_dims.append(dict.fromkeys(dims, Dim.AUTO) or None)
    spec = tree_structure(dict(named))
    arguments = tree_unflatten(in_separate_memory(examples), spec)
    dynamic_shapes = tree_unflatten(dynamic_dims, spec)

    log = GuardLog()
    model = entry.source()
    with (
        log.listening(),
        same_dtypes(),
        same_attributes(model),
        observing(model) as observed,
        observing_modes(model) as mode_readers,
    ):
        program = export_program(entry, (arguments,), (dynamic_shapes,))
    module = program.module(check_guards=False)
    traced = clean_module(module, program, names, requested, log)

    traced.left_out = tuple(entry.left_out())
    traced.notes = tuple(observed.notes)
    traced.own_gradients = tuple(observed.own_gradients)
    traced.modeless = not mode_readers and _has_no_mode(program, traced.graph)
    return traced


def _has_no_mode(program: ExportedProgram, graph: fx.Graph) -> bool:
    """Whether a graph is the same in both modes, given that no module read its mode.

    An op that draws numbers may belong to a layer that a train mode drops, see `EveryLayer`. The
    bodies of higher-order ops are traced by a compiler, whose reads of the mode are not seen.
    """
    has_bodies = any(isinstance(n.target, HigherOrderOperator) for n in program.graph.nodes)
    return not has_bodies and not random_ops(graph)


def export_program(
    module: nn.Module,
    args: tuple[Any, ...],
    shapes: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> ExportedProgram:
    """Call torch.export in the way of all captures and re-exports.

    strict=True takes twice the time, and captured no model that this does not. Deferred asserts
    leave the size checks in the graph as nodes, and a free batch keeps a cut such as `ids[:, :16]`
    where the example is shorter. Only what a model's own code says of free sizes has lines worth
    looking up, node by node: that takes a sixth of an export.
    """
    has_own_code = not isinstance(module, fx.GraphModule)
    wants_lines = has_own_code and any(tree_leaves(shapes))
    lines = patched(fx.config, do_not_emit_stack_traces=not wants_lines)
    # an example of batch 1 still gives a free dimension
    with quiet(), symbolic_sizes.ones_stay_free(), lengths_stay_free(), lines:
        return torch.export.export(
            module,
            args,
            kwargs,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def at_least_two(leaf: Any, dims: Mapping[int, str]) -> Any:
    """Double each dynamic dimension of size 1 of a leaf."""
    for dim in dims:
        if dim < leaf.dim() and leaf.shape[dim] == 1:
            leaf = torch.cat([leaf, leaf], dim)
    return leaf


def quiet() -> contextlib.AbstractContextManager[None]:
    """Return a block without warnings of torch or the model; a failing capture prints its graph."""
    loggers = (symbolic_sizes.LOGGER, fake_tensors.LOGGER)
    return silenced(contextlib.redirect_stderr, dict.fromkeys(loggers, logging.CRITICAL))
