"""A view of a checkpoint with its quantised weights as floats: the same names, in new shards.

Only headers are read to make it. Codes are read, and turned into numbers, when rows are asked for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_fx.dtypes import DTYPES, FLOATING
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import STEMS, Checkpoint
from lora_fx.files.quantised.quantised_weight import QuantisedWeight
from lora_fx.files.quantised.read import ACTIVATIONS, parts_beside, quantised_weights
from lora_fx.files.safetensors import Header, TensorInfo
from lora_fx.text import Json, JsonView, some

SHARD = 5_000_000_000
"""The largest size of a shard's tensors in bytes, the default limit of transformers."""


@dataclass(frozen=True)
class CodesInfo(TensorInfo):
    """A quantised weight of a view; start and stop are the position of its codes.

    Attributes:
        weight: The weight, which can be read.
    """

    weight: QuantisedWeight


def dequantised(base: Checkpoint, dtype: str, most: int = SHARD) -> Checkpoint:
    """Return the view of a checkpoint whose quantised weights will be stored as `dtype`.

    Args:
        base: A folder or file.
        dtype: What the weights will be stored in; the view's own are fp32.
        most: Bytes of the tensors in one shard of a folder; a larger tensor has a shard to itself.

    Raises:
        LoraFxError: No weight is quantised, or one in a format that is not read.
    """
    config = base.config()
    with _naming(base.path):
        weights = quantised_weights(base.tensors, config)
        for weight in weights.values():
            if not weight.bits:
                weight.read()  # raises, and says which format it is and why it is not read
    if not weights:
        raise LoraFxError(
            f"{base.path}: none of its weights is quantised",
            "merge without --dequantise and --requantise",
        )
    tensors = _dequantised_tensors(base, weights)
    sizes = {name: _size(info, dtype) for name, info in tensors.items()}
    shards = _shards(base, tensors, sizes, most)
    tensors_by_shard: dict[str, TensorInfo] = {}
    for header in shards.values():
        tensors_by_shard |= header.tensors
    return replace(
        base,
        shards=shards,
        tensors=tensors_by_shard,
        settings=_settings(config, dtype),
        of=base,
    )


def _dequantised_tensors(
    base: Checkpoint, weights: Mapping[str, QuantisedWeight]
) -> dict[str, TensorInfo]:
    """Return the tensors of a view, each quantised weight at the position of its first part."""
    weight_of = parts_beside(weights, base.tensors)
    tensors: dict[str, TensorInfo] = {}
    for name, info in base.tensors.items():
        if name not in weight_of:
            tensors[name] = info
            continue
        weight_name = weight_of[name]
        if weight_name not in tensors:
            weight = weights[weight_name]
            weight = replace(weight, read=_naming(info.file)(weight.read))
            tensors[weight_name] = CodesInfo(
                "float32", weight.shape, info.file, info.start, info.stop, weight
            )
    return tensors


def _size(info: TensorInfo, dtype: str) -> int:
    """Return the size of a view's tensor, if its quantised weights are stored in a dtype."""
    stored_dtype = dtype if isinstance(info, CodesInfo) else info.dtype
    return math.prod(info.shape) * DTYPES[stored_dtype].bits // 8


_BESIDE = ("_scale", "_scale_inv", "_scales", "_weight_scale", ".absmax")
"""Suffixes of the tensor with the scales of a parameter, appended to the parameter's name."""


def refuse_left(base: Checkpoint) -> None:
    """Raise if a view still has codes, or input scales, that no float model reads."""
    is_awq = False
    if base.of is not None:
        quantisation = base.of.config().get("quantization_config")
        is_awq = isinstance(quantisation, dict) and quantisation.get("quant_method") == "awq"
    for name, info in base.tensors.items():
        are_codes = info.dtype not in FLOATING and _has_scales(name, base.tensors)
        is_float8 = info.dtype.startswith("float8")
        are_scales_of_inputs = is_awq and name.endswith(".scales")  # AutoAWQ's ScaledActivation
        if are_codes or is_float8 or are_scales_of_inputs:
            raise LoraFxError(
                f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}, in a layout "
                "that lora-fx does not read; a float model would read its codes as values",
                "use the checkpoint that it was quantised from",
            )


def _has_scales(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the checkpoint has scales for a tensor."""
    return any(f"{name}{end}" in tensors for end in _BESIDE)


def is_view(base: Checkpoint) -> bool:
    """Whether this is a view that `dequantised` made."""
    return any(isinstance(info, CodesInfo) for info in base.tensors.values())


def view_notes(base: Checkpoint) -> list[str]:
    """Return notes on a view: what it leaves out, and what its config.json rounds."""
    if base.of is None or not is_view(base):
        return []
    notes: list[str] = []
    weights = [name for name, info in base.tensors.items() if isinstance(info, CodesInfo)]
    parts = parts_beside(weights, base.of.tensors)
    activation_scales = [name for name in parts if name.endswith(ACTIVATIONS)]
    if activation_scales:
        notes.append(
            f"left out {len(activation_scales)} scales of activations "
            f"({some(activation_scales, 2)}), because the output computes in floats"
        )

    config = base.config()
    dtype_of_config = config.get("dtype") or config.get("torch_dtype")
    wider = _float_dtypes(base) - {"bfloat16"}
    if dtype_of_config == "bfloat16" and wider:
        notes.append(
            f"config.json now has dtype {dtype_of_config}, as the dequantised weights; the others "
            f"stay {' and '.join(sorted(wider))}, and transformers rounds them on loading: "
            f"pass --dtype {min(wider)} to keep them"
        )
    return notes


def _float_dtypes(base: Checkpoint) -> set[str]:
    """Return the float dtypes of the view's tensors that are not made from codes."""
    return {
        info.dtype
        for info in base.tensors.values()
        if info.dtype in FLOATING and not isinstance(info, CodesInfo)
    }


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A block whose errors get the file's name, because the readers of formats do not know it."""
    try:
        yield
    except LoraFxError as error:
        raise LoraFxError(f"{path}: {error.message}", error.hint) from error


def _shards(
    base: Checkpoint, tensors: Mapping[str, TensorInfo], sizes: Mapping[str, int], most: int
) -> dict[str, Header]:
    """Distribute tensors over shards, in order, as many in each as fit."""
    first = next(iter(base.shards))
    metadata = base.shards[first].metadata
    if not base.path.is_dir():
        return {first: Header(dict(tensors), metadata)}

    groups: list[dict[str, TensorInfo]] = [{}]
    free = most
    for name, info in tensors.items():
        if sizes[name] > free and groups[-1]:
            groups.append({})
            free = most
        groups[-1][name] = info
        free -= sizes[name]

    # A stem that transformers finds.
    stem = next((stem for stem in STEMS if first.startswith(stem)), STEMS[0])
    if len(groups) == 1:
        return {f"{stem}.safetensors": Header(groups[0], metadata)}
    return {
        f"{stem}-{number:05}-of-{len(groups):05}.safetensors": Header(group, metadata)
        for number, group in enumerate(groups, 1)
    }


def _settings(config: JsonView, dtype: str) -> Json:
    """Return config.json without quantisation, for a model of floats."""
    settings = {
        name: value
        for name, value in config.items()
        if name not in ("quantization_config", "compression_config")
    }
    for name in ("dtype", "torch_dtype"):
        if isinstance(settings.get(name), str):
            settings[name] = dtype
    if isinstance(settings.get("text_config"), dict):
        settings["text_config"] = _settings(settings["text_config"], dtype)
    return settings
