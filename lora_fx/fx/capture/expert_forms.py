"""The experts of a mixture, in a form that a graph can hold.

transformers computes experts in three forms, of the same numbers. Eager loops over the experts
that the values chose, which no export follows and a recorded run writes down for the example's
values only: a capture takes one grouped product instead. For that one ONNX has no op, nor has
ATen where torch lacks the kernel: a capture for export takes the batched form, which gathers
every row's matrices by common ops.

Other libraries and plain models write the same loop themselves: see `EveryTurn`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from lora_fx.fx.graph.ops import row_of
from lora_fx.patching import patched

EAGER = "eager"
GROUPED = "grouped_mm"
BATCHED = "batched_mm"


def has_grouped(graph: fx.Graph) -> bool:
    """True when a graph has a grouped product."""
    rows = (row_of(node) for node in graph.nodes)
    return any(row is not None and row.op == GROUPED for row in rows)


@contextlib.contextmanager
def traceable_experts(model: nn.Module, *, portable: bool) -> Iterator[tuple[str, ...]]:
    """A context in which transformers' experts run in a form that a graph can hold.

    Args:
        model: The model; its configs are put back.
        portable: Take the form that other runtimes have.

    Yields:
        Notes for the user: which form stands for a loop.
    """
    name = "_experts_implementation_internal"  # the public setter also reaches into sub-configs
    notes: tuple[str, ...] = ()
    with contextlib.ExitStack() as switched:
        for experts in model.modules():
            if not hasattr(experts, "_apply_gate"):
                continue
            config = getattr(experts, "config", None)
            if not hasattr(config, name):  # another library's
                continue
            configured = getattr(config, name) or EAGER
            form = BATCHED if portable or not _is_aligned(experts) else GROUPED
            if configured == EAGER or (configured == GROUPED and portable):
                switched.enter_context(patched(config, **{name: form}))
            if configured == EAGER:
                notes = (
                    f"experts that run in a loop (experts_implementation={EAGER!r}) are captured "
                    f"as {form!r}, which gives the same numbers; the model itself keeps its loop",
                )
        yield notes


def _is_aligned(experts: nn.Module) -> bool:
    """True where the grouped product takes these matrices: in bfloat16 torch's kernel traces it.

    Every row and column of such a matrix has to fill whole units of 16 bytes.
    """
    for parameter in experts.parameters():
        if parameter.dtype != torch.bfloat16 or parameter.dim() != 3:
            continue
        if any(size * parameter.element_size() % 16 for size in parameter.shape[1:]):
            return False
    return True


@dataclass(frozen=True, eq=False)
class _Places:
    """The places where a mask is true, as nonzero gives them.

    Attributes:
        tensor: The result of nonzero, or the same squeezed.
        mask: The mask.
        shape: That of one place: [1], or [] after the squeeze.
    """

    tensor: torch.Tensor
    mask: torch.Tensor
    shape: list[int]

    def all_places(self) -> tuple[torch.Tensor, ...]:
        """The number of every place of the mask, whether it is true there or not."""
        device = self.mask.device
        return tuple(
            torch.tensor(i, device=device).reshape(self.shape) for i in range(self.mask.shape[0])
        )


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
        self._places: list[_Places] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function; the parts of a mask's places are the numbers of all places."""
        if func in (torch.unbind, torch.Tensor.unbind) and args[1:] in ((), (0,)) and not kwargs:
            for places in self._places:
                if args[0] is places.tensor:
                    self.turns.append(places.mask.shape[0])
                    return places.all_places()
        if func is torch.Tensor.__format__ and args[0].dim() == 0:  # the name of an expert
            return format(args[0].item(), args[1])

        result = func(*args, **(kwargs or {}))
        if func in (torch.nonzero, torch.Tensor.nonzero) and not kwargs:
            mask = args[0]
            if mask.dim() == 1 and isinstance(mask.shape[0], int):
                self._places.append(_Places(result, mask, [1]))
        elif func in (torch.squeeze, torch.Tensor.squeeze) and args[1:] in ((1,), (-1,)):
            squeezed = [places for places in self._places if places.tensor is args[0]]
            self._places += [_Places(result, places.mask, []) for places in squeezed]
        return result
