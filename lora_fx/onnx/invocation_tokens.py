"""The invocation tokens of the adapters that were exported with an .onnx file."""

from __future__ import annotations

from os import PathLike, fspath

from lora_fx.errors import LoraFxError, expect_path
from lora_fx.onnx.manifest import PROPERTY, onnx_model, read_manifest
from lora_fx.onnx.row_starts import Starts


def invocations(path: str | PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return the tokens from which on each adapter of a file acts, by its name.

    In mode batch the order is that of the ids, 1, 2, … A LoRA has no tokens; a file without aLoRA
    adapters has no input `adapter_starts`, and gives an empty dictionary.

    Args:
        path: A file that export wrote, in mode switch or batch.

    Raises:
        LoraFxError: The file cannot be read, or has no manifest.
    """
    expect_path(path, "the model", "the path of an .onnx file")
    where = fspath(path)
    text = onnx_model(where).metadata_props.get(PROPERTY)
    if text is None:
        raise LoraFxError(f"{where}: it has no manifest", "pass a file that lora-fx export wrote")
    starts = starts_in(text, where)
    return {} if starts is None else dict(starts.invocations)


def starts_in(text: str | None, where: str) -> Starts | None:
    """Return what the text of a manifest says of starts; None where it says nothing.

    Raises:
        LoraFxError: It is damaged.
    """
    manifest = {} if text is None else read_manifest(text, where)
    if "starts" not in manifest:
        return None
    try:
        return Starts.from_json(manifest["starts"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise LoraFxError(f"{where}: its manifest is damaged", "export the model again") from e
