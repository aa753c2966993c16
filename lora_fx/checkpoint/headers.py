"""The tensors of a `.safetensors` file or a Hugging Face folder, and those an adapter can take.

One file or shards with their index; only headers are read, and every one strictly (see strict.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from lora_fx.checkpoint.strict import AGAIN, CONVERT, TensorInfo, read_header, read_json
from lora_fx.errors import LoraFxError, one_line
from lora_fx.graph import Parameter
from lora_fx.lowrank import plain_layout
from lora_fx.policy import default_plan
from lora_fx.roles import HEAD_ROWS, role_of
from lora_fx.target import Found, Refusal, Target

WEIGHTS = frozenset(("float16", "bfloat16", "float32", "float64"))
"""dtypes of weights that an update can be added to."""

STEMS = ("model", "diffusion_pytorch_model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TABLE = re.compile(r"(^|\.)(\w*embed(ding)?s?(_tokens|_in)?|wte|wpe|shared)$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)$")


def tensors(path: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of a `.safetensors` file or of a Hugging Face folder, in file order.

    Args:
        path: A file, or a folder with one file or with shards and their index.

    Raises:
        LoraFxError: Damaged, incomplete or unsafe files; the message names file and tensor.
    """
    path = Path(path)
    if not path.is_dir():
        return dict(read_header(path).tensors)
    file, is_index = _weights_of(path)
    return _sharded(file) if is_index else dict(read_header(file).tensors)


def file_targets(path: str | Path) -> Found:
    """The targets of tensors without a graph: every float tensor of two or more dimensions.

    Axis 0 is taken as out, the rest as in; roles come from names.
    """
    found = {k: v for k, v in tensors(path).items() if len(v.shape) >= 2}
    tables = [v.shape for k, v in found.items() if _TABLE.search(_module(k))]
    vocabularies = [(s[0], s[1]) for s in tables if len(s) == 2 and s[0] >= HEAD_ROWS]
    targets, refusals = [], []
    for key, info in found.items():
        if info.dtype not in WEIGHTS or 0 in info.shape:
            why = "it is empty" if 0 in info.shape else f"{info.dtype} is no dtype of plain weights"
            refusals.append(Refusal(key, "tensor", why))
            continue
        layout, name = plain_layout(info.shape), _module(key)
        role = "head" if _HEAD.search(name) else "embedding" if _TABLE.search(name) else ""
        role = role or role_of([name], (), layout, vocabularies)
        region = tuple((0, n) for n in info.shape)
        parameter = Parameter(key, info.shape, info.dtype)
        targets.append(Target(key, parameter, region, layout, "tensor", (), role))
    note = "no graph was read: targets come from names and shapes, and their FLOPs are not known"
    return Found(default_plan(targets), tuple(refusals), notes=(note,))


def _module(key: str) -> str:
    return key.removesuffix(".weight")


def _weights_of(folder: Path) -> tuple[Path, bool]:
    """The file that holds a folder's weights, or the index of its shards and True."""
    for stem in STEMS:
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if os.path.lexists(folder / name):
                return folder / name, name.endswith(".json")
    names = sorted(p.name for p in folder.iterdir())
    files = [n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_")]
    indexes = [n for n in names if n.endswith(".safetensors.index.json")]
    if len(indexes) == 1 or (not indexes and len(files) == 1):
        return folder / (indexes or files)[0], bool(indexes)
    if indexes or files:
        raise LoraFxError(
            f"{folder}: {len(indexes) or len(files)} candidates and no model.safetensors "
            f"({', '.join((indexes or files)[:3])} …)",
            "give the one file that you mean",
        )
    pickles = [n for n in names if n.endswith(PICKLES)]
    if pickles:
        raise LoraFxError(
            f"{folder}: its weights are pickles ({pickles[0]}), which can run code and are not "
            "read; --trust is not supported yet",
            CONVERT,
        )
    if "adapter_config.json" in names:
        raise LoraFxError(f"{folder}: an adapter, not a model", "give the folder of its base model")
    raise LoraFxError(f"{folder}: no .safetensors file", "is the download complete?")


def _sharded(index: Path) -> dict[str, TensorInfo]:
    """The tensors of all shards; where two hold the same name, the index says which counts."""
    home = read_json(index).get("weight_map")
    if not isinstance(home, dict) or not all(isinstance(v, str) for v in home.values()):
        raise LoraFxError(f"{index}: no weight_map of tensor names to file names", AGAIN)
    result: dict[str, TensorInfo] = {}
    for shard in dict.fromkeys(home.values()):
        for name, info in _shard(index, shard, home):
            here = home.get(name, shard) == shard
            if here and name in result:
                raise LoraFxError(f"{index}: tensor {name!r} is in two shards and in no line of it")
            if here:
                result[name] = info
    lost = next((n for n in home if n not in result), None)
    if lost is not None:
        raise LoraFxError(
            f"{index.parent / home[lost]}: tensor {lost!r} is not there, but {index.name} says so",
            AGAIN,
        )
    return result


def _shard(index: Path, name: str, home: Mapping[str, str]) -> Iterator[tuple[str, TensorInfo]]:
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or bool(re.search(r"[\\:\0]", name))
    if outside or not name.endswith(".safetensors"):
        raise LoraFxError(
            f"{index}: names the shard {one_line(repr(name), 120)}; expected a .safetensors file "
            "inside the folder",
            "do not use this folder: its index points elsewhere" if outside else CONVERT,
        )
    file = index.parent / name
    if not file.exists():
        count = sum(1 for v in home.values() if v == name)
        raise LoraFxError(
            f"{file}: this shard is missing ({count} tensors)",
            "download it; lora-fx downloads nothing",
        )
    yield from read_header(file).tensors.items()
