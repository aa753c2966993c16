"""Recomputation of blocks (activation checkpointing), by the names that transformers gave it.

A block saves its inputs only and runs again in backward. The blocks are those that a module's
programs call: children of its outermost ModuleLists and Sequentials. torch's non-reentrant form
is used: the older, reentrant one gives no gradients to a block none of whose inputs requires one,
as is so for the first block of a frozen base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, noop_context_fn

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.unchanged import as_it_was
from lora_fx.inputs import Named

OPTIONS = ("preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")
"""Options of torch.utils.checkpoint.checkpoint."""


@contextlib.contextmanager
def _unmoved(block: nn.Module, inner: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    """A block of code that leaves the module's buffers alone: its norms have moved already."""
    with as_it_was(block, None), inner:
        yield


def checkpointer(options: Named, *, offload: bool = False) -> Callable[..., Any]:
    """Torch's checkpoint with these options, to be called with (code, block, *values).

    Args:
        options: Some of OPTIONS.
        offload: Keep the saved inputs in host memory.
    """

    def run(code: Callable[..., object], block: nn.Module, *args: object) -> object:
        block_options = dict(options)
        if getattr(block, "_moves", False):
            user_contexts = block_options.pop("context_fn", noop_context_fn)

            def contexts() -> tuple[object, object]:
                forward, recomputation = user_contexts()
                return forward, _unmoved(block, recomputation)

            block_options["context_fn"] = contexts
        return checkpoint(code, block, *args, use_reentrant=False, **block_options)

    def run_offloaded(code: Callable[..., object], block: nn.Module, *args: object) -> object:
        device = torch.accelerator.current_accelerator(check_available=True)
        with save_on_cpu(device is not None, device.type if device else "cpu"):
            return run(code, block, *args)

    return run_offloaded if offload else run


class Recomputing:
    """Methods of a captured module; Trainer, accelerate and users of transformers call it."""

    def _blocks(self) -> dict[str, Any]:
        """Path → the blocks that programs call."""
        raise NotImplementedError

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Named | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
        *,
        gradient_checkpointing_kwargs: Named | None = None,
    ) -> None:
        """In train mode, save only the inputs of each block, and run it again in backward.

        Args:
            activation_checkpointing_kwargs: For torch.utils.checkpoint.checkpoint.
            every_n_layers: Only block 0, n, 2n, …
            offload: Keep the saved inputs in host memory.
            gradient_checkpointing_kwargs: The older name of the first.

        Raises:
            LoraFxError: A model without blocks, blocks that cannot be run apart, an unknown
                option, or reentrant checkpointing.
        """
        options = dict(activation_checkpointing_kwargs or gradient_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise LoraFxError(
                "with reentrant checkpointing the adapters get no gradients: no input of a "
                "frozen model's first block requires one",
                "leave use_reentrant at its default here, False",
            )
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise LoraFxError(
                f"checkpointing has no option {', '.join(unknown)}", f"use {', '.join(OPTIONS)}"
            )
        if every_n_layers < 1:
            raise LoraFxError(
                f"every_n_layers is {every_n_layers}; expected 1 or more",
                "leave it out to recompute every block",
            )
        blocks = self._blocks()
        if not blocks:
            raise LoraFxError(
                f"{type(self).__name__} has no blocks to recompute: no children of a ModuleList "
                "or Sequential",
                "train without recomputation",
            )
        chosen = dict(list(blocks.items())[::every_n_layers])
        refuse_inlined(chosen, self.__dict__["_programs"].inlined)
        self.activation_checkpointing_disable()
        for block in chosen.values():
            block.recompute = True
            block._again = checkpointer(options, offload=offload)

    def activation_checkpointing_disable(self) -> None:
        """Save what each block computes, and run nothing twice."""
        for block in self._blocks().values():
            block.recompute = False

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether any block is recomputed."""
        return any(block.recompute for block in self._blocks().values())

    gradient_checkpointing_enable = activation_checkpointing_enable  # the older names
    gradient_checkpointing_disable = activation_checkpointing_disable
    is_gradient_checkpointing = is_activation_checkpointing


def refuse_inlined(blocks: Named, inlined: set[str]) -> None:
    """Raise LoraFxError for blocks that are to be recomputed and cannot be."""
    stuck = [path for path in blocks if path in inlined]
    if stuck:
        raise LoraFxError(
            f"cannot recompute {', '.join(stuck)}: other parts of the model run in between",
            "train without recomputation, or leave these blocks out with every_n_layers",
        )
