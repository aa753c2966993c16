"""merge: adapters folded into a file of weights, or into an ONNX graph; neither needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from lora_fx.compare import Report
from lora_fx.errors import LoraFxError

Path = str | PathLike[str]
ONNX_OPTIONS = (
    "names", "again", "trust", "force", "external_over", "how", "rank", "delta", "run", "inputs",
    "provider",
)  # fmt: skip


def merge(base: Path, adapters: Any, out: Path, **options: Any) -> Report:
    """Fold adapters into `base` and write `out`: the same kind of file.

    Args:
        base: A Hugging Face folder, a `.safetensors` or an `.onnx` file; it is not changed.
        adapters: Paths or Adapters; a pair (adapter, weight) multiplies its updates by weight.
        out: The folder or file to write.
        options: Those of `lora_fx.checkpoint.merge.merge`; of an `.onnx` file those of
            `lora_fx.passes.merge_onnx.merge_onnx`.

    Raises:
        LoraFxError: Every reason not to merge; nothing is written.
        NoEffectError: Every element of the output would be what it was.
    """
    if not is_onnx(base):
        from lora_fx.checkpoint.merge import merge as merge_files

        return merge_files(base, adapters, out, **options)
    from lora_fx.passes.merge_onnx import merge_onnx

    if not is_onnx(out):
        raise LoraFxError(
            f"{fspath(out)} does not end in .onnx, and {fspath(base)} does", "-o OUT.onnx"
        )
    return merge_onnx(base, adapters, out, **onnx_options_of(options))


def onnx_options_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a merge into an .onnx file has; raises where another is given."""
    for name, value in options.items():
        if name not in ONNX_OPTIONS and value not in (None, False, "sum"):
            raise LoraFxError(f"{name} is an option for checkpoints, not for .onnx files")
    return {k: v for k, v in options.items() if k in ONNX_OPTIONS}


def is_onnx(path: Path) -> bool:
    """By its name."""
    return fspath(path).endswith(".onnx")
