"""verify: are two models the same? Tensor files are compared as tensors, others are run.

Comparing tensors needs no torch, so what runs models is imported only where one is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.prove import ROWS
from lora_fx.checkpoint.verify import fits_files, is_tensor_file, verify_files
from lora_fx.compare import ORT_TOL, Report
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import is_adapter, load_adapter


def verify(
    a: Any,
    b: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    adapter: Any = None,
    tol: float | None = None,
    provider: str = "auto",
    run: bool = False,
    rows: int | None = ROWS,
) -> Report:
    """Compare two models; `bool(report)` is the answer.

    Two tensor files (Hugging Face folders or `.safetensors`) are compared tensor by tensor,
    everything else output by output at three sizes.

    Args:
        a: A tensor file, a captured module, a Captured, or an .onnx or .pt2 file.
        b: Another one, the reference; or an Adapter or its path: does it fit `a`?
        inputs: Arrays by input name, instead of sampled ones.
        adapter: Of models that are run: applied to whichever of the two is not an .onnx file (b
            where both are or neither is). Of tensor files: `a` should be `b` with it merged; also
            several, and pairs (adapter, weight).
        tol: Gate on max|a − b| / max|b|: of each output, 2e-6; of each tensor, 0.
        provider: For .onnx files.
        run: Run tensor files too, as models.
        rows: Of tensor files with adapters: rows of every touched tensor that are computed again;
            None for all.

    Raises:
        LoraFxError: What cannot be compared; an adapter that does not fit.
    """
    fits = isinstance(b, Adapter) or (_is_path(b) and is_adapter(b))
    if is_tensor_file(a) and not run:
        if fits:
            return fits_files(a, b)
        if is_tensor_file(b):
            return verify_files(a, b, adapter, tol=tol or 0.0, rows=rows)
    if fits and _is_path(a) and str(a).endswith(".onnx"):
        return fits_switch(a, b)
    if _is_path(a) and _is_path(b) and str(a).endswith(".onnx") and str(b).endswith(".onnx"):
        from lora_fx.passes.verify_onnx import verify_onnx

        return verify_onnx(a, b, inputs, adapter, ORT_TOL if tol is None else tol, provider)
    from lora_fx.passes.verify_run import verify_run

    if fits and not isinstance(b, Adapter):
        b = load_adapter(b)
    if _is_path(adapter):
        adapter = load_adapter(adapter)
    if isinstance(adapter, Sequence):
        raise LoraFxError("models are run with one adapter", "merge them first, or mix them")
    return verify_run(a, b, inputs, adapter, ORT_TOL if tol is None else tol, provider)


def fits_switch(path: Any, adapter: Any) -> Report:
    """Does an adapter, or its file, fit the manifest of a switchable ONNX file? Nothing is run.

    Raises:
        LoraFxError: It does not, or the file is not switchable.
    """
    from lora_fx.onnx.session import manifest_of, tensors_of

    manifest = manifest_of(path)
    tensors = tensors_of(adapter, manifest)
    details = {"targets": len(manifest.slots), "adapted": len(tensors) // 2}
    return Report("verify", True, details=details)


def _is_path(value: Any) -> bool:
    from os import PathLike

    return isinstance(value, (str, PathLike))
