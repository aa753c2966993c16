"""`.pt2` files: a model with or without branches as programs that need no Python source.

A file of ours holds an eval and a train program over one set of weights, the branches included,
and a manifest; where sizes decide a path of the model's code, one of each for every path. Outputs
are plain tensors, tuples and dicts, operators are aten's, and no member is a pickle. The eval
program of the example's path is named "model", so `torch.export.load` opens it.
"""

from __future__ import annotations

import contextlib
import copy
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lora_fx.conditions import SizeError
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MistakeError, NoEffectError, one_line
from lora_fx.files.atomic import replacing
from lora_fx.fx.capture.capture import alike
from lora_fx.fx.module.module import CapturedModule, FoldedModule
from lora_fx.fx.pt2.write import Paths, write_programs
from lora_fx.fx.tensors import all_tensors, to_numpy
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import SIZES, Named
from lora_fx.passes.proofs.proof_inputs import is_real
from lora_fx.passes.proofs.recorded_run import prove_as_it_is
from lora_fx.passes.verbs.open import load_program


def save_program(
    module: CapturedModule, path: str | PathLike[str], *, force: bool = False
) -> tuple[str, ...]:
    """Write a module, branches and manifest included; returns what has to be said.

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
        raise LoraFxError(f"{fspath(path)}: a program's name ends in .pt2", "name it so")
    if any(p.device.type != "cpu" for p in module.parameters()):
        module = copy.deepcopy(module).to("cpu")
    was = module.training
    modes = [False]
    notes: list[str] = []
    try:
        module.captured.allows(False, module._norm_stats)
        notes += prove_as_it_is(module)
        if isinstance(module, FoldedModule):
            notes.append("a folded model has no train program")
        else:
            try:
                module.captured.allows(True, module._norm_stats)
                modes.append(True)
            except LoraFxError as e:
                notes.append(f"no train program is written: {e.message}")
        with replacing(path, force=force) as temporary:
            paths = {m: _paths(module, m) for m in modes}
            write_programs(module.eval(), temporary, paths)
            again, by_torch = load_program(temporary), _by_torch(temporary)
            _share_memory(again, module, "the file")
            _share_memory(by_torch, module, "the file that torch loads")
            for training, found in paths.items():
                _prove(module, again, training, found, None if training else by_torch)
    finally:
        module.train(was)
    return tuple(notes)


def _paths(module: CapturedModule, training: bool) -> Paths:
    """The paths of a mode that the module runs: what is written is proven."""
    module.train(training)
    first, *others = module.captured.paths(training, module.base_dtype)
    found = [first]
    for named, traced in others:
        with contextlib.suppress(RuntimeError, ValueError, IndexError):  # of the user's code
            module.flat(module._in_own_dtype(named))
            found.append((named, traced))
    return found


def _share_memory(again: nn.Module, module: nn.Module, what: str) -> None:
    """Demand that tensors of one name have equal bits, and let both modules use the same memory.

    How a product is summed up depends on the strides of its operands and on where they lie, and a
    file holds rows one after the other: to the bit, programs compare on the same memory only.
    """
    own = all_tensors(module)
    for name, t in all_tensors(again).items():
        if name in own:
            # an adapter is read as float32, whatever `.to(dtype)` made of it
            _demand({name: _bits(t)}, {name: _bits(own[name].to(t.dtype))}, what)
        t.data = own[name].data if name in own else t.data.clone()


def _bits(t: torch.Tensor) -> Array:
    return to_numpy(t.detach().contiguous().reshape(-1).view(torch.uint8))


def _prove(
    module: CapturedModule,
    again: CapturedModule,
    training: bool,
    paths: Paths,
    loaded: nn.Module | None,
) -> None:
    """Every size of the checks, with the same random numbers, must give the same bits."""
    names = "train" if training else "eval"
    for m in (module, again):
        m.train(training)
    ran = 0
    example = module._in_own_dtype()
    own = (*map(module.sample, SIZES), *([example] if is_real(example) else ()))
    for named in (*own, *(module._in_own_dtype(named) for named, _ in paths[1:])):
        leaves = [x for x in tree_leaves(named) if isinstance(x, torch.Tensor)]
        try:
            want = module.flat(named)
        except (RuntimeError, ValueError, IndexError):
            continue  # a size that the model itself does not take
        try:
            got = again.flat(named)
        except SizeError:
            continue  # the file says so by name; the module captures another path there
        ran += 1
        _demand(got, want, f"the {names} program")
        if loaded is not None and paths[0][1].door.admits(tree_leaves(named)):
            try:
                with torch.no_grad(), alike(loaded):
                    values = tree_leaves(loaded(*leaves))
            except RuntimeError as e:
                if "Expected input at" not in str(e):
                    raise
                continue  # torch keeps to the range of a split, where the path is the same beyond
            tensors = [to_numpy(v) for v in values if isinstance(v, torch.Tensor)]
            _demand(dict(zip(want, tensors, strict=True)), want, "the program that torch loads")
    if not ran:
        raise LoraFxError(
            "the model runs at none of the checks' sizes", "give --static or --inputs"
        )


def _demand(got: Named, want: Named, what: str) -> None:
    if list(got) != list(want):
        raise NoEffectError(
            f"{what} gives {list(got)}, the module {list(want)}",
            "report this: it is a mistake of lora-fx",
        )
    for name, a in got.items():
        if a.shape != want[name].shape or not np.array_equal(a, want[name], equal_nan=True):
            raise NoEffectError(f"{what} gives other numbers in {name!r}", "nothing was written")


def _by_torch(file: Path) -> nn.Module:
    """The eval program as torch itself loads it; safe, for the file is the one just written."""
    try:
        return torch.export.load(str(file)).module(check_guards=False)
    except Exception as e:
        raise MistakeError(f"torch does not load the program again: {one_line(e)}") from e
