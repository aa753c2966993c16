"""The translation of a program to an onnx_ir model by torch's ONNX exporter."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram

from lora_fx.errors import LoraFxError, one_line, silenced
from lora_fx.fx.capture.free_lengths import lengths_stay_free
from lora_fx.fx.onnx_export.exporter_speed import repeating
from lora_fx.onnx.constant_folding import unfolded
from lora_fx.onnx.onnxscript_rules import (
    constants_apart,
    exact_constants,
    graphs_forgotten,
    norms_unfused,
    weights_unjoined,
)
from lora_fx.patching import patched
from lora_fx.progress import stage

OPSET = 20
LEAST = {"torch.onnx": logging.CRITICAL, "onnxscript": logging.ERROR, "onnx_ir": logging.ERROR}
"""The levels of the exporter's loggers, which silence most of its messages."""


def translated(
    program: Callable[[], ExportedProgram],
    inputs: Sequence[str],
    outputs: Sequence[str],
    unchanged: Collection[str],
    opset: int,
    *,
    repeat: bool = True,
) -> Any:
    """Translate a program to an onnx_ir.Model.

    Args:
        program: Makes the program.
        inputs: The names of its inputs.
        outputs: The names of its outputs.
        unchanged: The names of weights, which stay as they are.
        opset: The opset of the file.
        repeat: As in `to_onnx`.

    Raises:
        LoraFxError: The exporter cannot translate an op, with its own words in the message, or it
            does not write this opset.
    """
    with contextlib.ExitStack() as blocks:
        blocks.enter_context(stage("translating to ONNX"))
        blocks.enter_context(silenced(contextlib.redirect_stdout, LEAST))
        blocks.enter_context(weights_apart(unchanged))
        blocks.enter_context(graphs_forgotten())
        blocks.enter_context(lengths_stay_free())
        if repeat:
            blocks.enter_context(repeating())
        blocks.enter_context(torch.no_grad())
        try:
            onnx = torch.onnx.export(
                program(),
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
        except Exception as e:
            reason = one_line(_innermost(e), 200)
            raise LoraFxError(
                f"torch's ONNX exporter refused the model: {reason}",
                "run with -v for the exporter's whole message",
            ) from e
    assert onnx is not None
    written = onnx.model.opset_imports[""]
    if written != opset:
        raise LoraFxError(
            f"torch's ONNX exporter writes opset {written}, and not {opset}",
            f"pass --opset {written}, or leave it out",
        )
    return onnx.model


def _innermost(error: BaseException) -> BaseException:
    """Return the innermost cause of an exporter's error, which names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def weights_apart(weights: Collection[str]) -> Iterator[None]:
    """A block in which weights stay unchanged: no folding, fusing or joining.

    The exporter would multiply batch norms into convolutions, compute what reads small weights
    and constants, and store weights once that are equal; adapters of the model would no longer fit
    the file. ONNX Runtime does the same when it loads a file, so nothing is lost. onnxscript has
    no option for norms; where its rules are others, weights are marked as changed
    (names.mark_changed).
    """
    from onnxscript import optimizer

    optimize = partial(optimizer.optimize_ir, should_fold=unfolded(weights))
    weights_unfolded = patched(optimizer, optimize_ir=optimize)
    with (
        norms_unfused(),
        weights_unjoined(weights),
        weights_unfolded,
        exact_constants(),
        constants_apart(),
    ):
        yield
