"""A module with branches as a .pt2 program that needs no Python source."""

from __future__ import annotations

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from lora_fx.checkpoint.osfile import replacing
from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.module import CapturedModule
from lora_fx.fx.tensors import to_numpy
from lora_fx.fx.to_onnx import flat_program


def save_program(module: CapturedModule, path: str, *, force: bool = False) -> None:
    """Write the eval graph, branches included; inputs and outputs are flat tensors.

    The file is loaded again and run before it gets its name.
    """
    flat, _, _ = flat_program(module, module.graph(False).graph)
    named = module.sample()
    leaves = [x for x in pytree.tree_leaves(named) if isinstance(x, torch.Tensor)]
    door = module.captured.traced(False, module.captured.named, module.base_dtype).door
    shapes = []
    for name, fixed in zip(door.names, door.sizes, strict=True):
        if fixed is not None:
            wanted = module.captured.requested.get(name, {})
            shapes.append({d: Dim.AUTO for d in wanted if fixed[d] is None} or None)
    program = torch.export.export(flat, tuple(leaves), dynamic_shapes=tuple(shapes), strict=False)
    with replacing(path, force=force) as temporary:
        with temporary.open("wb") as f:
            torch.export.save(program, f)
        try:
            again = torch.export.load(str(temporary)).module()
        except Exception as e:
            raise LoraFxError(f"the program does not load again: {one_line(e)}") from e
        expected = [to_numpy(x) for x in module.flat_tensors(named)]
        got = [to_numpy(x) for x in again(*leaves)]
        if any((a != b).any() for a, b in zip(got, expected, strict=True)):
            raise LoraFxError("the program gives other numbers after loading", exit_code=1)
