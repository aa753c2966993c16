"""verify of one .pt2 file alone: torch runs its program on its own probe.

The archive is read by our own reader, which opens no pickle, and an adapter is the safetensors file
beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path

import torch

from lora_fx.compare import Report
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.tensor_files import read_tensors
from lora_fx.fx.capture.onnx_names import onnx_name
from lora_fx.fx.pt2.captured import FileCaptured
from lora_fx.onnx.manifest import Manifest, manifest_of
from lora_fx.onnx.probe_runs import ProbeRuns
from lora_fx.passes.proofs.switchable import NO_UPDATE
from lora_fx.passes.proofs.switchable_program import SwitchableProgram
from lora_fx.passes.verbs.open import file_program
from lora_fx.passes.verbs.verify_probe import report_on
from lora_fx.probe.in_program import probe_of_program
from lora_fx.probe.probe import AGAIN, BASE, Probe
from lora_fx.probe.sentences import tolerant


def verify_program(path: str | PathLike[str], *, tol: float | None = None) -> Report:
    """Run a .pt2 file of mode switch on its probe; see `lora_fx.verify`.

    Args:
        path: The file.
        tol: Accept outputs that differ by this share of the largest, where that is more than the
            file's own tolerance.

    Raises:
        LoraFxError: The file has no probe, or a damaged one, or does not run.
    """
    probe = in_torch(probe_of_program(path))
    if tol is not None:
        probe = tolerant(probe, tol)
    return report_on(path, probe, run_program(path, probe))


def in_torch(probe: Probe) -> Probe:
    """Return a probe for a run in torch: no narrower products explain a difference there.

    They do where the caller has allowed them with torch.set_float32_matmul_precision.
    """
    if torch.get_float32_matmul_precision() == "highest":
        return replace(probe, precisions={})
    return probe


def run_program(path: str | PathLike[str], probe: Probe) -> ProbeRuns:
    """Run a .pt2 file of mode switch on its probe.

    Raises:
        LoraFxError: The file does not load, or does not take the probe.
    """
    where = fspath(path)
    if probe.mode != "switch":
        raise LoraFxError(f"{where}: its probe is of mode {probe.mode}; expected switch", AGAIN)
    manifest = manifest_of(path)
    captured = file_program(path)
    file = SwitchableProgram(manifest, captured.named, captured.switchable())
    feeds = probe.feeds()
    _check_inputs(captured, feeds, where)

    answers = {BASE: _answer(file, manifest.all_tensors(NO_UPDATE), probe, feeds, where)}
    absent: dict[str, str] = {}
    for name, adapter in probe.adapters.items():
        if adapter.file is None:
            absent[name] = "the probe names no file of it"
            continue
        beside = Path(path).with_name(adapter.file)
        if not beside.exists():
            absent[name] = f"{beside} does not exist"
            continue
        answers[name] = _answer(file, _tensors(beside, manifest), probe, feeds, where)
    return ProbeRuns(answers, absent, provider="torch")


def _check_inputs(captured: FileCaptured, feeds: Mapping[str, Array], where: str) -> None:
    """Raise unless the probe has just the inputs of the program, in their dtypes."""
    expected = {onnx_name(spec.name): spec.dtype for spec in captured.inputs.specs}
    found = {name: array.dtype.name for name, array in feeds.items()}
    if found != expected:
        raise LoraFxError(
            f"{where}: its probe has the inputs {one_line(found, 120)}; expected "
            f"{one_line(expected, 120)}",
            AGAIN,
        )


def _tensors(file: Path, manifest: Manifest) -> dict[str, Array]:
    """Read A and B by name; targets without any get zeros.

    The file is read by the names of its tensors, as other runtimes do, and not as an adapter.
    """
    tensors, _ = read_tensors(file)
    manifest.check(tensors, str(file))
    tensors = {**manifest.zeros(), **manifest.base, **tensors}
    return manifest.padded(tensors) if manifest.rank else tensors


def _answer(
    file: SwitchableProgram,
    tensors: Mapping[str, Array],
    probe: Probe,
    feeds: Mapping[str, Array],
    where: str,
) -> Array:
    """Return the outputs of one run at the points of the probe."""
    try:
        outputs = file.run_of(tensors)(feeds)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as e:
        raise LoraFxError(
            f"{where}: the program does not take its probe: {one_line(e, 160)}", AGAIN
        ) from e
    return probe.at_points(outputs, where)
