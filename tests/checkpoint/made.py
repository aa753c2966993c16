"""Checkpoints and adapters on disk, written and read without lora-fx's own code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

Array = npt.NDArray[Any]
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
         "int32": "I32", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
         "float8_e8m0fnu": "F8_E8M0"}  # fmt: skip


def raw(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None, pad: int = 0) -> bytes:
    """A safetensors file in the order given; `pad` spaces end its header, for an odd length."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode() + b" " * pad
    data = b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values())
    return len(text).to_bytes(8, "little") + text + data


def checkpoint(
    path: Path,
    tensors: Mapping[str, Array],
    shards: int = 1,
    *,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = {"format": "pt"},
    pad: int = 0,
) -> Path:
    """A file where the path ends in .safetensors, else a folder with one file or shards."""
    if path.suffix == ".safetensors":
        path.write_bytes(raw(tensors, metadata, pad))
        return path
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        (path / "model.safetensors").write_bytes(raw(tensors, metadata, pad))
        return path
    home: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mine = names[i::shards]
        (path / file).write_bytes(raw({n: tensors[n] for n in mine}, metadata, pad))
        home |= dict.fromkeys(mine, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": home}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return path


def adapter(
    path: Path,
    pairs: Mapping[str, tuple[Array, Array]],
    *,
    whole: Mapping[str, Array] | None = None,
    tensors: Mapping[str, Array] | None = None,
    **config: Any,
) -> Path:
    """PEFT's folder: module → (A, B) of linears; `whole` and `tensors` by their stored names."""
    path.mkdir()
    named = dict(tensors or {})
    for module, (a, b) in pairs.items():
        named[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a)
        named[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b)
    named |= {f"base_model.model.{n}": v for n, v in (whole or {}).items()}
    rank = next((len(a) for a, _ in pairs.values()), 4)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": None}
    save_file(named, path / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps({k: v for k, v in (settings | config).items() if v is not ...})
    (path / "adapter_config.json").write_text(text)
    return path


def factors(
    rng: np.random.Generator, out: int, in_: int, rank: int, size: float = 0.3
) -> tuple[Array, Array]:
    """A [rank, in] and B [out, rank] in fp32."""
    a = rng.standard_normal((rank, in_)) / np.sqrt(in_)
    b = size * rng.standard_normal((out, rank))
    return a.astype(np.float32), b.astype(np.float32)


def read(path: Path) -> dict[str, Array]:
    """Every tensor of a file or folder, by the safetensors library; shards by the index."""
    files: Sequence[Path] = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    result: dict[str, Array] = {}
    for file in files:
        with safe_open(file, framework="np") as f:
            result |= {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
    return result


def header(file: Path) -> dict[str, Any]:
    """The JSON of a safetensors file, names in its order."""
    with open(file, "rb") as f:
        return dict(json.loads(f.read(int.from_bytes(f.read(8), "little"))))


def tree(*paths: Path) -> dict[str, str]:
    """Everything under the paths: relative name → kind, mode and hash."""
    result = {}
    for path in paths:
        for p in [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]:
            content = ""
            if p.is_symlink():
                content = os.readlink(p)
            elif p.is_file():
                content = hashlib.sha256(p.read_bytes()).hexdigest()
            result[str(p)] = f"{p.lstat().st_mode:o} {content}"
    return result
