"""The experts of a mixture, in a form that a graph can hold.

transformers computes experts in three forms, of the same numbers. Eager loops over the experts
that the values chose, which no export follows and a recorded run writes down for the example's
values only: a capture takes one grouped product instead. For that one ONNX has no op, nor has
ATen where torch lacks the kernel: a capture for export takes the batched form, which gathers
every row's matrices by common ops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from lora_fx.fx.graph.ops import row_of
from lora_fx.patching import patched


class EveryTurn(TorchFunctionMode):
    """A block in which a loop over the places where a mask is true runs over all of its places.

    So do mixtures of experts that are written as a loop, `for expert in hit.nonzero()`: how many
    turns there are depends on values, which no graph can hold. A turn for an expert without rows
    adds nothing; that it does not is for the caller to check.

    Attributes:
        turns: The loops that were seen, by the number of their turns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[int] = []
        self._places: list[tuple[torch.Tensor, torch.Tensor, list[int]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function; the parts of a mask's places are the numbers of all places."""
        if func in (torch.unbind, torch.Tensor.unbind) and args[1:] in ((), (0,)) and not kwargs:
            for places, mask, shape in self._places:
                if args[0] is places:
                    self.turns.append(mask.shape[0])
                    rows = range(mask.shape[0])
                    return tuple(torch.tensor(i, device=mask.device).reshape(shape) for i in rows)
        if func is torch.Tensor.__format__ and args[0].dim() == 0:  # the name of an expert
            return format(args[0].item(), args[1])
        result = func(*args, **(kwargs or {}))
        if func in (torch.nonzero, torch.Tensor.nonzero) and not kwargs:
            mask = args[0]
            if mask.dim() == 1 and isinstance(mask.shape[0], int):
                self._places.append((result, mask, [1]))
        elif func in (torch.squeeze, torch.Tensor.squeeze) and args[1:] in ((1,), (-1,)):
            self._places += [(result, m, []) for p, m, _ in self._places if p is args[0]]
        return result


EAGER, GROUPED, BATCHED = "eager", "grouped_mm", "batched_mm"


def has_grouped(graph: fx.Graph) -> bool:
    """True when a graph has a grouped product."""
    return any((row := row_of(n)) is not None and row.op == GROUPED for n in graph.nodes)


@contextlib.contextmanager
def traceable_experts(model: nn.Module, *, portable: bool) -> Iterator[tuple[str, ...]]:
    """A context in which transformers' experts run in a form that a graph can hold.

    Args:
        model: The model; its configs are put back.
        portable: Take the form that other runtimes have.

    Yields:
        What has to be said: which form stands for a loop.
    """
    name = "_experts_implementation_internal"  # the public setter also reaches into sub-configs
    said: tuple[str, ...] = ()
    with contextlib.ExitStack() as switched:
        for experts in (m for m in model.modules() if hasattr(m, "_apply_gate")):
            config = getattr(experts, "config", None)
            if not hasattr(config, name):  # another library's
                continue
            own = getattr(config, name) or EAGER
            form = BATCHED if portable or not _aligned(experts) else GROUPED
            if own == EAGER or (own == GROUPED and portable):
                switched.enter_context(patched(config, **{name: form}))
            if own == EAGER:
                said = (
                    f"experts that run in a loop (experts_implementation={EAGER!r}) are captured "
                    f"as {form!r}, which has the same numbers; the model keeps its loop",
                )
        yield said


def _aligned(experts: nn.Module) -> bool:
    """True where the grouped product takes these matrices: in bfloat16 torch's kernel traces it."""
    narrow = [p for p in experts.parameters() if p.dtype == torch.bfloat16 and p.dim() == 3]
    return not any(n * p.element_size() % 16 for p in narrow for n in p.shape[1:])
