"""One torch.export of a source, cleaned into a flat graph over the skeleton's names."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from lora_fx.errors import silenced
from lora_fx.fx import fake_tensors, symbolic_sizes
from lora_fx.fx.capture.call import apart, leaves_of
from lora_fx.fx.capture.cleaned_graph import Pinned, Traced, clean_module
from lora_fx.fx.capture.door import Requested, less, ones_of
from lora_fx.fx.capture.guards import GuardLog
from lora_fx.fx.capture.observed import observing, observing_modes
from lora_fx.fx.capture.repeat import Repeats
from lora_fx.fx.capture.root_module import RootModule
from lora_fx.fx.capture.unchanged import same_attributes, same_dtypes
from lora_fx.fx.graph.nodes import random_ops
from lora_fx.fx.operators import HigherOrderOperator, decomposition_table
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
        requested: What should be dynamic.
        repeat: Trace blocks that repeat once; see lora_fx.fx.capture.repeat.
    """
    try:
        return _repeated(entry, named, requested, repeat=repeat)
    except Exception:
        lone = ones_of(named, requested)
        if not lone:
            raise
        traced = _repeated(entry, named, less(requested, lone), repeat=repeat)
        where = "the model: it does not run at size 2"
        traced.pinned = [*traced.pinned, *(Pinned(n, d, 1, where) for n, d in lone)]
        return traced


def _repeated(entry: RootModule, named: Named, requested: Requested, *, repeat: bool) -> Traced:
    """Export with blocks that repeat traced once, or each for itself where that fails."""
    if repeat and (repeats := Repeats(entry.source())).families:
        try:
            with repeats.watching():
                traced = _trace(entry, named, requested)
            traced.copies = repeats.copies
            return traced
        except Exception as error:  # of the model, or it comes of the watching
            if raises_alike(entry, named, error):
                raise
    return _trace(entry, named, requested)


def raises_alike(entry: RootModule, named: Named, error: BaseException | None) -> bool:
    """Whether a model raises an error of its export where nothing traces it, too.

    Every further try would take as long as an export.

    Args:
        entry: The model, with its values or on fake tensors, in the mode to run.
        named: Its arguments.
        error: What its export raised.
    """
    fake = next((p.fake_mode for p in entry.parameters() if fake_tensors.is_fake(p)), None)
    inputs = dict(named)
    if fake is not None:
        static = partial(fake.from_tensor, static_shapes=True)
        inputs = tree_map_only(torch.Tensor, static, inputs)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), fake or contextlib.nullcontext():
            entry(inputs)
    except Exception as found:
        return type(found) is type(error) and str(found) == str(error)
    return False


def _trace(entry: RootModule, named: Named, requested: Requested) -> Traced:
    """Export once, through one dict argument.

    torch 2.13 cannot name shapes inside **kwargs ("Must provide a tree_name"), and that is how
    Hugging Face's Trainer passes num_items_in_batch.
    """
    given, spec = leaves_of(named), tree_structure(dict(named))
    free = [requested.get(n, {}) if isinstance(x, torch.Tensor) else {} for n, x in given]
    large = [at_least_two(x, dims) for (_, x), dims in zip(given, free, strict=True)]
    named = tree_unflatten(apart(large), spec)
    shapes = tree_unflatten([{d: Dim.AUTO for d in dims} or None for dims in free], spec)
    log = GuardLog()
    model = entry.source()
    with (
        log.listening(),
        same_dtypes(),
        same_attributes(model),
        observing(model) as seen,
        observing_modes(model) as read,
    ):
        program = export_program(entry, (named,), (shapes,))
    module = program.module(check_guards=False)
    traced = clean_module(module, program, [n for n, _ in given], requested, log)
    traced.left_out, traced.notes, traced.own_gradients = tuple(entry.left_out()), *seen()
    # what draws numbers may be a layer that a train mode drops, see observing; the bodies of
    # higher-order ops are traced by a compiler, whose reads are not seen
    bodies = any(isinstance(n.target, HigherOrderOperator) for n in program.graph.nodes)
    traced.modeless = not (read() or bodies or random_ops(traced.graph))
    return traced


def export_program(
    module: nn.Module, args: tuple[Any, ...], shapes: tuple[Any, ...]
) -> ExportedProgram:
    """torch.export, as every capture and every re-export is made.

    strict=True takes twice the time, and captured no model that this does not. Deferred asserts
    leave the size checks in the graph as nodes, and a free batch keeps a cut such as `ids[:, :16]`
    where the example is shorter. Only what a model's own code says of free sizes has lines worth
    looking up, node by node: that takes a sixth of an export.
    """
    looked = not isinstance(module, fx.GraphModule) and any(tree_leaves(shapes))
    lines = patched(fx.config, do_not_emit_stack_traces=not looked)
    # an example of batch 1 still gives a free dimension
    with quiet(), symbolic_sizes.ones_stay_free(), recurrent_shapes(), lines:
        return torch.export.export(
            module,
            args,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def quiet() -> contextlib.AbstractContextManager[None]:
    """A block in which torch and the model warn of nothing; a failing capture prints its graph."""
    loggers = (symbolic_sizes.LOGGER, fake_tensors.LOGGER)
    return silenced(contextlib.redirect_stderr, dict.fromkeys(loggers, logging.CRITICAL))


@contextlib.contextmanager
def recurrent_shapes() -> Iterator[None]:
    """A block in which traces see LSTM and GRU as one op each, of any length.

    torch's rule for a traced one runs every step of it in Python, which fixes the length.
    """
    ops = (aten.lstm.input, aten.gru.input)  # the exporter to ONNX has no RNN, and needs its steps
    held = [(op, dict(op.py_kernels), decomposition_table[op]) for op in ops]

    def shapes(x: torch.Tensor, hx: object, *args: object) -> tuple[torch.Tensor, ...]:
        states: Any = hx if isinstance(hx, (tuple, list)) else [hx]
        directions = 2 if args[5] else 1
        out = x.new_empty((*x.shape[:2], directions * states[0].shape[2]))
        return out, *map(torch.empty_like, states)

    def put(op: Any, kernels: Mapping[Any, Any], decomposition: Callable[..., Any]) -> None:
        op.py_kernels.update(kernels)
        op._dispatch_cache.clear()
        decomposition_table[op] = decomposition

    try:
        for op in ops:
            put(op, dict.fromkeys(op.py_kernels, shapes), shapes)
        yield
    finally:
        for kept in held:
            put(*kept)


def at_least_two(x: Any, dims: Mapping[int, str]) -> Any:
    """A leaf whose every dynamic dimension of size 1 is doubled to 2."""
    for d in dims:
        if d < x.dim() and x.shape[d] == 1:
            x = torch.cat([x, x], d)
    return x
