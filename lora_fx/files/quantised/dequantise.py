"""A checkpoint seen as if its quantised weights were floats: the same names, in new shards.

Nothing is read but headers. What makes numbers of codes is read row by row, by who asks for rows.
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
"""Bytes of the tensors of one shard, which is transformers' limit, too."""


@dataclass(frozen=True)
class CodesInfo(TensorInfo):
    """A weight of a view; start and stop are those of its codes.

    Attributes:
        weight: What reads it.
    """

    weight: QuantisedWeight


def dequantised(base: Checkpoint, dtype: str, most: int = SHARD) -> Checkpoint:
    """The view of a checkpoint whose quantised weights will be stored as `dtype`.

    Args:
        base: A folder or file.
        dtype: What the weights will be stored in; the view's own are fp32.
        most: Bytes of the tensors of one shard of a folder; a larger tensor has a shard of its own.

    Raises:
        LoraFxError: No weight is quantised, or one in a format that is not read.
    """
    config = base.config()
    with _naming(base.path):
        weights = quantised_weights(base.tensors, config)
        for weight in (w for w in weights.values() if not w.bits):
            weight.read()  # raises: says what it is and why it is not read
    if not weights:
        raise LoraFxError(
            f"{base.path}: none of its weights is quantised", "merge without --dequantise"
        )
    gone = parts_beside(weights, base.tensors)
    seen: dict[str, TensorInfo] = {}
    for tensor, info in base.tensors.items():
        if tensor not in gone:
            seen[tensor] = info
        elif (name := gone[tensor]) not in seen:
            weight = replace(weights[name], read=_naming(info.file)(weights[name].read))
            shape = weight.shape
            seen[name] = CodesInfo("float32", shape, info.file, info.start, info.stop, weight)
    kinds = {n: dtype if isinstance(t, CodesInfo) else t.dtype for n, t in seen.items()}
    sizes = {n: math.prod(seen[n].shape) * DTYPES[kind].bits // 8 for n, kind in kinds.items()}
    shards = _shards(base, seen, sizes, most)
    return replace(
        base,
        shards=shards,
        tensors={n: t for h in shards.values() for n, t in h.tensors.items()},
        settings=_settings(config, dtype),
        of=base,
    )


_BESIDE = ("_scale", "_scale_inv", "_scales", "_weight_scale", ".absmax")
"""Ends of the names of scales, after the name of a parameter that is a weight itself."""


def refuse_left(base: Checkpoint) -> None:
    """Raise where a view has codes, or scales of a module's inputs, that no float model reads."""
    told = base.of.config().get("quantization_config") if base.of is not None else None
    awq = isinstance(told, dict) and told.get("quant_method") == "awq"
    for name, info in base.tensors.items():
        codes = info.dtype not in FLOATING and any(f"{name}{n}" in base.tensors for n in _BESIDE)
        of_act = awq and name.endswith(".scales")  # AutoAWQ's ScaledActivation
        if codes or of_act or info.dtype.startswith("float8"):
            raise LoraFxError(
                f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}, of a layout "
                "that is not read; a model of floats would take it for numbers",
                "use the checkpoint that it was quantised from",
            )


def is_view(base: Checkpoint) -> bool:
    """True for what `dequantised` makes."""
    return any(isinstance(t, CodesInfo) for t in base.tensors.values())


def view_notes(base: Checkpoint) -> list[str]:
    """What should be said of a view: what it leaves out, and what its config.json rounds."""
    if base.of is None or not is_view(base):
        return []
    weights = [n for n, t in base.tensors.items() if isinstance(t, CodesInfo)]
    gone = [n for n in parts_beside(weights, base.of.tensors) if n.endswith(ACTIVATIONS)]
    told = f"{some(gone, 2)}: the output computes in floats"
    notes = [f"left out, {len(gone)} scales of activations: {told}"] if gone else []
    config = base.config()
    said = config.get("dtype") or config.get("torch_dtype")
    floats = {t.dtype for t in base.tensors.values() if not isinstance(t, CodesInfo)} & {*FLOATING}
    if said == "bfloat16" and (wider := floats - {said}):
        notes.append(
            f"config.json says {said} now, as the weights that were codes; the others stay "
            f"{' and '.join(sorted(wider))}, and transformers rounds them when it loads: "
            f"--dtype {min(wider)} keeps them"
        )
    return notes


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of a format, which knows no files, with the name of the file."""
    try:
        yield
    except LoraFxError as error:
        raise LoraFxError(f"{path}: {error.message}", error.hint) from error


def _shards(
    base: Checkpoint, seen: Mapping[str, TensorInfo], sizes: Mapping[str, int], most: int
) -> dict[str, Header]:
    """Tensors in their order, as many in a shard as it can hold."""
    first = next(iter(base.shards))
    metadata = base.shards[first].metadata
    if not base.path.is_dir():
        return {first: Header(dict(seen), metadata)}
    groups: list[dict[str, TensorInfo]] = [{}]
    room = most
    for name, info in seen.items():
        if sizes[name] > room and groups[-1]:
            groups.append({})
            room = most
        groups[-1][name] = info
        room -= sizes[name]
    stem = next((s for s in STEMS if first.startswith(s)), STEMS[0])  # which transformers finds
    count = len(groups)
    names = [f"{stem}-{i + 1:05}-of-{count:05}" for i in range(count)] if count > 1 else [stem]
    each = zip(names, groups, strict=True)
    return {f"{name}.safetensors": Header(group, metadata) for name, group in each}


def _settings(config: JsonView, dtype: str) -> Json:
    """A config.json of floats."""
    gone = "quantization_config", "compression_config"
    settings = {k: v for k, v in config.items() if k not in gone}
    for name in ("dtype", "torch_dtype"):
        if isinstance(settings.get(name), str):
            settings[name] = dtype
    if isinstance(settings.get("text_config"), dict):
        settings["text_config"] = _settings(settings["text_config"], dtype)
    return settings
