"""verify of one merged checkpoint alone: its model runs in torch, on the probe of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path

import torch
from torch import nn

from lora_fx.checkpoint.probe_in_header import probe_of_merge
from lora_fx.compare import Report
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line, silenced
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.fx.capture.call import without_cache
from lora_fx.fx.capture.model_source import base_dtype
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.load.loaded_model import LoadedModel
from lora_fx.fx.module.module import by_output
from lora_fx.fx.quantised_parameters import forms
from lora_fx.fx.tensors import from_numpy
from lora_fx.onnx.probe_runs import ProbeRuns
from lora_fx.passes.proofs.probe_making import TOLERANCES
from lora_fx.passes.verbs.open import live_model
from lora_fx.passes.verbs.verify_probe import report_on
from lora_fx.passes.verbs.verify_program import in_torch
from lora_fx.probe.probe import AGAIN, Probe
from lora_fx.probe.sentences import tolerant

LEVELS = {"bfloat16": "bfloat16", "float16": "tf32"}
"""The precision of a probe that a dtype of weights has; TF32 and float16 both have 10 bits."""


def verify_checkpoint(path: str | PathLike[str], *, tol: float | None = None) -> Report:
    """Run a merged Hugging Face folder on its adapter's probe; see `lora_fx.verify`.

    Args:
        path: The folder.
        tol: Accept outputs that differ by this share of the largest, where that is more than what
            the dtype of the weights makes them differ by.

    Raises:
        LoraFxError: The folder has no probe, or a damaged one, or does not run.
    """
    where = fspath(path)
    probe = probe_of_merge(open_checkpoint(Path(path)))
    if not Path(path).is_dir():
        raise LoraFxError(
            f"{where}: it holds weights alone; a folder with config.json can be run",
            f"name the model to compare with: lora-fx verify {where} BASE --adapter ADAPTER",
        )
    loaded = live_model(where)
    precision = _precision_of(loaded.module)
    probe = in_torch(_at_precision(probe, precision))
    if tol is not None:
        probe = tolerant(probe, tol)
    (name,) = probe.adapters
    answers = {name: probe.at_points(_outputs(loaded, probe, where), where)}
    runs = ProbeRuns(answers, provider="torch", note="; ".join(loaded.notes))
    return report_on(path, probe, runs, quantised=precision == "int8")


def _precision_of(model: nn.Module) -> str:
    """Return the name of a model's dtype; int8 where weights are codes."""
    if forms(model):
        return "int8"
    dtype = base_dtype(model)
    return "float32" if dtype is None else dtype_name(dtype)


def _at_precision(probe: Probe, precision: str) -> Probe:
    """Return a probe whose tolerance is what a dtype of weights makes outputs differ by."""
    if precision in ("float32", "float64"):
        return probe
    if precision == "int8":
        return tolerant(probe, max(probe.precisions.values(), default=TOLERANCES[precision]))
    measured = probe.precisions.get(LEVELS[precision])
    return tolerant(probe, TOLERANCES[precision] if measured is None else measured)


def _outputs(loaded: LoadedModel, probe: Probe, where: str) -> Mapping[str, Array]:
    """Return the outputs of the model, by name."""
    dtype = base_dtype(loaded.module)
    arguments: dict[str, torch.Tensor] = {}
    for name, array in probe.feeds().items():
        tensor = from_numpy(array)
        is_float = tensor.is_floating_point() and dtype is not None
        arguments[name] = tensor.to(dtype) if is_float else tensor
    try:
        with torch.no_grad(), silenced():
            return by_output(without_cache(loaded.module(**arguments)))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as e:
        raise LoraFxError(
            f"{where}: its model does not take the probe: {one_line(e, 160)}", AGAIN
        ) from e
