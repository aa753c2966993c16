"""`.pt2` files: models, with or without branches, as programs that need no Python source.

A file of ours holds an eval and a train program over one set of weights, the branches included,
and a manifest; where sizes decide a path of the model's code, one of each for every path. Outputs
are plain tensors, tuples and dicts, operators are aten's, and no member is a pickle. The eval
program of the example's path is named "model", so `torch.export.load` opens it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lora_fx.conditions import SizeError
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MistakeError, NoEffectError, one_line
from lora_fx.files.atomic import replacing
from lora_fx.fx.capture.unchanged import alike
from lora_fx.fx.dotted_names import all_tensors
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.folded import FoldedModule
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.pt2.write import Paths, write_programs
from lora_fx.fx.tensors import to_numpy
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import SIZES, Named
from lora_fx.passes.proofs.proof_inputs import is_real
from lora_fx.passes.proofs.recorded_capture import prove_as_it_is
from lora_fx.passes.verbs.open import load_program
from lora_fx.progress import stage


@stage("writing and checking the program")
def save_program(
    module: CapturedModule, path: str | PathLike[str], *, force: bool = False
) -> tuple[str, ...]:
    """Write a module with its branches and manifest; return notes.

    The file is opened again, and every tensor and every program that it holds is compared bit by
    bit, before it gets its name. `torch.export.load(path).module()` takes the tensors of the call
    in order.

    Args:
        module: What insert, fold or load_program returned.
        path: The file, ending in .pt2.
        force: Replace a file that exists.

    Raises:
        LoraFxError: A program that cannot be written.
        NoEffectError: The file gives other numbers than the module.
    """
    if not fspath(path).endswith(".pt2"):
        raise LoraFxError(
            f"{fspath(path)}: expected a name that ends in .pt2",
            "give the file a name that ends in .pt2",
        )
    if any(parameter.device.type != "cpu" for parameter in module.parameters()):
        module = copy.deepcopy(module).to("cpu")
    was_training = module.training
    try:
        modes, notes = _modes(module)
        with replacing(path, force=force) as temporary:
            paths = {training: _paths(module, training) for training in modes}
            write_programs(module.eval(), temporary, paths)
            loaded = load_program(temporary)
            loaded_by_torch = load_by_torch(temporary)
            share_memory(loaded, module, "the file")
            share_memory(loaded_by_torch, module, "the file that torch loads")
            for training, paths_of_mode in paths.items():
                by_torch = None if training else loaded_by_torch
                _prove(module, loaded, training, paths_of_mode, by_torch)
    finally:
        module.train(was_training)
    return tuple(notes)


def _modes(module: CapturedModule) -> tuple[list[bool], list[str]]:
    """Return the modes that get a program, as training flags with eval first, and notes."""
    execution = execution_of(module)
    execution.captured.allows(False, execution.norm_stats)
    notes = [*prove_as_it_is(module)]
    if isinstance(module, FoldedModule):
        return [False], [*notes, "a folded model has no train program"]
    try:
        execution.captured.allows(True, execution.norm_stats)
    except LoraFxError as e:
        return [False], [*notes, f"no train program is written: {e.message}"]
    return [False, True], notes


def _paths(module: CapturedModule, training: bool) -> Paths:
    """Return the paths of a mode that the module can run; only these are written and proven."""
    module.train(training)
    execution = execution_of(module)
    first, *further = execution.captured.paths(training, execution.base_dtype)
    paths = [first]
    for named, traced in further:
        with contextlib.suppress(RuntimeError, ValueError, IndexError):  # of the user's code
            execution.flat(execution.in_own_dtype(named))
            paths.append((named, traced))
    return paths


def share_memory(loaded: nn.Module, module: nn.Module, what: str) -> None:
    """Raise unless tensors of one name have equal bits; then let both modules share the memory.

    How a product is summed up depends on the strides of its operands and on where they lie, and a
    file holds rows one after the other: to the bit, programs compare on the same memory only.
    """
    originals = all_tensors(module)
    for name, tensor in all_tensors(loaded).items():
        if name not in originals:
            tensor.data = tensor.data.clone()
            continue
        original = originals[name]
        # an adapter is read as float32, whatever `.to(dtype)` made of it
        _demand({name: _bits(tensor)}, {name: _bits(original.to(tensor.dtype))}, what)
        tensor.data = original.data


def _bits(tensor: torch.Tensor) -> Array:
    return to_numpy(tensor.detach().contiguous().reshape(-1).view(torch.uint8))


def _prove(
    module: CapturedModule,
    loaded: CapturedModule,
    training: bool,
    paths: Paths,
    loaded_by_torch: nn.Module | None,
) -> None:
    """Raise unless the file's programs give the same bits as the module at every checked size.

    Raises:
        NoEffectError: A program of the file gives other numbers.
        LoraFxError: The model runs at none of these sizes.
    """
    mode = "train" if training else "eval"
    module.train(training)
    loaded.train(training)
    count = 0
    for named in _calls(module, paths):
        try:
            expected = execution_of(module).flat(named)
        except (RuntimeError, ValueError, IndexError):
            continue  # a size that the model itself does not take
        try:
            outputs = execution_of(loaded).flat(named)
        except SizeError:
            continue  # the file says so by name; the module captures another path there
        count += 1
        _demand(outputs, expected, f"the {mode} program")
        if loaded_by_torch is not None and paths[0][1].door.admits(tree_leaves(named)):
            _prove_by_torch(loaded_by_torch, named, expected)
    if not count:
        raise LoraFxError(
            "the model runs at none of the sizes that the proof tries", "pass --static or --inputs"
        )


def _calls(module: CapturedModule, paths: Paths) -> Iterator[Named]:
    """Yield the calls of the check: each size, the example if it has values, each other path."""
    execution = execution_of(module)
    example = execution.in_own_dtype()
    yield from [execution.sample(size) for size in SIZES]
    if is_real(example):
        yield example
    for named, _ in paths[1:]:
        yield execution.in_own_dtype(named)


def _prove_by_torch(loaded: nn.Module, named: Named, expected: Mapping[str, Array]) -> None:
    """Raise unless the program that torch itself loads gives the same numbers."""
    tensors = [leaf for leaf in tree_leaves(named) if isinstance(leaf, torch.Tensor)]
    try:
        with torch.no_grad(), alike(loaded):
            values = tree_leaves(loaded(*tensors))
    except RuntimeError as e:
        if "Expected input at" not in str(e):
            raise
        return  # torch keeps to the range of a split, where the path is the same beyond
    arrays = [to_numpy(value) for value in values if isinstance(value, torch.Tensor)]
    outputs = dict(zip(expected, arrays, strict=True))
    _demand(outputs, expected, "the program that torch loads")


def _demand(outputs: Mapping[str, Array], expected: Mapping[str, Array], what: str) -> None:
    """Raise unless names, shapes and all numbers are equal; NaN equals NaN."""
    if list(outputs) != list(expected):
        raise NoEffectError(
            f"{what} has the outputs {list(outputs)}, the module has {list(expected)}",
            "report this: it is a mistake of lora-fx",
        )
    for name, array in outputs.items():
        same_shape = array.shape == expected[name].shape
        if not same_shape or not np.array_equal(array, expected[name], equal_nan=True):
            raise NoEffectError(
                f"{what} gives other numbers than the module in {name!r}", "nothing was written"
            )


def load_by_torch(file: Path) -> nn.Module:
    """Load the eval program by torch itself; this is safe, since the file was just written."""
    try:
        return torch.export.load(str(file)).module(check_guards=False)
    except Exception as e:
        raise MistakeError(f"torch cannot load the written program: {one_line(e)}") from e
