"""Bases that nothing may be merged into: hostile files, broken folders, quantised weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.checkpoint.made import Array, checkpoint

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
}
GOOD: dict[str, Array] = {
    f"{Q}.weight": np.linspace(-1, 1, 48, dtype=np.float32).reshape(8, 6),
    f"{DOWN}.weight": np.linspace(-1, 1, 48, dtype=np.float32).reshape(6, 8),
    "model.norm.weight": np.ones(6, np.float32),
    "model.square.weight": np.eye(6, dtype=np.float32),
}
Make = Callable[[Path], object]


def base(
    folder: Path,
    change: Mapping[str, Array | None] | None = None,
    *,
    shards: int = 1,
    config: Any = CONFIG,
) -> Path:
    """The good base with these tensors changed, added, or left out where None."""
    tensors = {n: v for n, v in (GOOD | dict(change or {})).items() if v is not None}
    return checkpoint(folder / "base", tensors, shards, config=config)


def file_of(change: Callable[[bytes], bytes]) -> Make:
    """A base of one file whose bytes are changed."""

    def make(folder: Path) -> None:
        base(folder)
        file = folder / "base" / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return make


def header(change: Callable[[dict[str, Any]], object], more: int = 0) -> Make:
    """A base whose header's JSON is changed; `more` bytes of data follow."""

    def edit(content: bytes) -> bytes:
        n = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + n])
        change(entries)
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + n :] + bytes(more)

    return file_of(edit)


def index(change: Callable[[dict[str, Any]], object]) -> Make:
    """A base in two shards whose index is changed."""

    def make(folder: Path) -> None:
        base(folder, shards=2)
        file = folder / "base" / "model.safetensors.index.json"
        whole = json.loads(file.read_text())
        change(whole)
        file.write_text(json.dumps(whole))

    return make


def without(name: str, text: bytes | None = None) -> Make:
    """A base in two shards without one of its files, or with other content in it."""

    def make(folder: Path) -> None:
        base(folder, shards=2)
        file = folder / "base" / name
        file.unlink()
        if text is not None:
            file.write_bytes(text)

    return make


def only(files: Mapping[str, bytes]) -> Make:
    """A folder of these files."""

    def make(folder: Path) -> None:
        (folder / "base").mkdir()
        for name, content in files.items():
            (folder / "base" / name).write_bytes(content)

    return make


def beside(
    siblings: Mapping[str, Array], weight: Array | None = None, method: str = "", **more: Any
) -> Make:
    """A base whose q_proj is quantised: its weight (or none) and the tensors beside it."""
    config = CONFIG | ({"quantization_config": {"quant_method": method} | more} if method else {})
    change: dict[str, Array | None] = {f"{Q}.{n}": v for n, v in siblings.items()}
    return lambda folder: base(folder, {f"{Q}.weight": weight, **change}, config=config)


def _shift(entries: dict[str, Any], name: str, by: int) -> None:
    entries[name]["data_offsets"] = [n + by for n in entries[name]["data_offsets"]]


def _home(path: str) -> Make:
    return index(lambda w: w["weight_map"].update({f"{Q}.weight": path}))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SHARD = "model-00002-of-00002.safetensors"
ONE = "model.safetensors"
FP8 = np.ones((8, 6), ml_dtypes.float8_e4m3fn)
CODES = np.ones((1, 8), np.int32)
SCALES = np.ones((1, 8), np.float16)
CODES8 = np.ones((8, 6), np.int8)
BASES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "truncated": (file_of(lambda c: c[:-5]), (ONE, "cut off")),
    "header truncated": (file_of(lambda c: c[:50]), (ONE, "header")),
    "trailing bytes": (file_of(lambda c: c + b"xyz"), (ONE, "belong to no tensor")),
    "empty file": (file_of(lambda c: b""), (ONE, "0 bytes")),
    "hole": (
        header(lambda e: _shift(e, "model.norm.weight", 8), 8),
        (ONE, "model.norm.weight", "hole"),
    ),
    "overlap": (
        header(lambda e: _shift(e, "model.norm.weight", -8)),
        (ONE, "model.norm.weight", "overlaps"),
    ),
    "shape against bytes": (
        header(lambda e: e[f"{Q}.weight"].update(shape=[8, 7])),
        (ONE, Q, "192 bytes", "needs 224"),
    ),
    "unknown dtype": (header(lambda e: e[f"{Q}.weight"].update(dtype="F7")), (ONE, Q, "'F7'")),
    "header over 32 MB": (
        file_of(lambda c: (33 << 20).to_bytes(8, "little") + b" " * (33 << 20)),
        (ONE, str(33 << 20)),
    ),
    "header bomb": (
        file_of(lambda c: (1 << 60).to_bytes(8, "little") + c[8:]),
        (ONE, str(1 << 60)),
    ),
    "git-LFS pointer": (file_of(lambda c: LFS), (ONE, "git-LFS pointer", "lfs pull")),
    "git-LFS pointer of a shard": (without(SHARD, LFS), (SHARD, "git-LFS pointer")),
    "git-LFS pointer of the index": (
        without(f"{ONE}.index.json", LFS),
        ("index.json", "git-LFS pointer"),
    ),
    "pickle by another name": (file_of(lambda c: b"PK\x03\x04" + bytes(99)), (ONE, "pickle")),
    "shard missing": (without(SHARD), (SHARD, "missing", "download")),
    "index leaves the folder": (
        _home("../x.safetensors"),
        ("index.json", "'../x.safetensors'", "inside"),
    ),
    "index is absolute": (
        _home("/etc/x.safetensors"),
        ("index.json", "'/etc/x.safetensors'", "inside"),
    ),
    "index names a pickle": (_home("x.bin"), ("index.json", "'x.bin'")),
    "index names a tensor that is not there": (
        index(lambda w: w["weight_map"].update({"ghost": SHARD})),
        (SHARD, "'ghost'", "index.json"),
    ),
    "index without a map": (index(lambda w: w.pop("weight_map")), ("index.json", "weight_map")),
    "index is no JSON": (without(f"{ONE}.index.json", b"{"), ("index.json", "not valid JSON")),
    "empty folder": (only({}), ("base", "no .safetensors")),
    "pickles only": (
        only({"pytorch_model.bin": b"\x80\x02"}),
        ("base", "pytorch_model.bin", "pickle"),
    ),
    "an adapter": (only({"adapter_config.json": b"{}"}), ("base", "adapter, not a model")),
    "nothing there": (lambda folder: None, ("base", "cannot be read")),
    # quantised
    "GPTQ": (
        beside({"qweight": CODES, "qzeros": CODES, "scales": SCALES, "g_idx": CODES}, None, "gptq"),
        (Q, "GPTQ", "unquantised original"),
    ),
    "AWQ": (beside({"qweight": CODES, "qzeros": CODES, "scales": SCALES}, None, "awq"), (Q, "AWQ")),
    "bitsandbytes nf4": (
        beside(
            {
                "weight.absmax": SCALES[0],
                "weight.quant_map": SCALES[0],
                "weight.quant_state.bitsandbytes__nf4": np.ones(9, np.uint8),
            },
            np.ones((24, 1), np.uint8),
        ),
        (ONE, Q, "uint8", "bitsandbytes", "unquantised original"),
    ),
    "bitsandbytes int8 in an order for GPUs": (
        beside({"SCB": np.ones(8, np.float32), "weight_format": np.array(2, np.uint8)}, CODES8),
        (ONE, Q, "int8", "bitsandbytes int8", "weight_format is 2"),
    ),
    "bitsandbytes int8 with other scales": (
        beside({"SCB": np.ones(6, np.float32)}, CODES8),
        (ONE, Q, "SCB is float32 [6]; expected float32 [8]"),
    ),
    "compressed-tensors int8 that no config tells": (
        beside({"weight_scale": np.ones((8, 1), np.float32)}, CODES8),
        (ONE, Q, "int8", "config.json does not say that weight_scale belongs to"),
    ),
    "compressed-tensors int8 with a scale a tensor": (
        beside({"weight_scale": np.ones(1, np.float32)}, CODES8, "compressed-tensors"),
        (ONE, Q, "weight_scale is float32 [1]", "[8, 1]"),
    ),
    "compressed-tensors int8 in groups": (
        beside({"weight_scale": np.ones((8, 2), np.float32)}, CODES8, "compressed-tensors"),
        (ONE, Q, "weight_scale is float32 [8, 2]", "[8, 1]"),
    ),
    "compressed-tensors int8, asymmetric": (
        beside(
            {"weight_scale": np.ones((8, 1), np.float16), "weight_zero_point": CODES8[:, :1]},
            CODES8,
            "compressed-tensors",
        ),
        (ONE, Q, "weight_zero_point", "symmetric"),
    ),
    "compressed-tensors int8, rotated": (
        beside(
            {"weight_scale": np.ones((8, 1), np.float16)},
            CODES8,
            "compressed-tensors",
            transform_config={"config_groups": {"u": {"type": "hadamard"}}},
        ),
        (ONE, Q, "transform_config"),
    ),
    "compressed-tensors int8, sparse": (
        beside(
            {"weight_scale": np.ones((8, 1), np.float16)},
            CODES8,
            "compressed-tensors",
            sparsity_config={"format": "dense", "sparsity_structure": "2:4"},
        ),
        (ONE, Q, "sparsity_config"),
    ),
    "int8 of two kinds": (
        beside({"SCB": np.ones(8, np.float32), "weight_scale": SCALES}, CODES8),
        (ONE, Q, "int8", "SCB or weight_scale"),
    ),
    "bitsandbytes int8 by another name": (
        beside({"weight.SCB": np.ones(8, np.float32)}, CODES8),
        (ONE, Q, "int8", "SCB or weight_scale"),
    ),
    "optimum-quanto int8": (
        beside({"weight._data": CODES8, "weight._scale": np.ones((8, 1), np.float32)}),
        (Q, "optimum-quanto codes"),
    ),
    "compressed-tensors packed": (
        beside({"weight_packed": CODES, "weight_scale": SCALES, "weight_shape": np.array([8, 6])}),
        (Q, "packed"),
    ),
    "FP8 in blocks": (
        beside({"weight_scale_inv": np.ones((1, 1), np.float32)}, FP8),
        (ONE, Q, "float8_e4m3fn", "FP8"),
    ),
    "FP8 with a scale": (
        beside({"weight_scale": np.ones((1,), np.float32)}, FP8),
        (ONE, Q, "float8_e4m3fn"),
    ),
    "FP8 bare": (beside({}, FP8), (ONE, Q, "float8_e4m3fn", "unquantised original")),
    "MXFP4": (
        beside(
            {
                "weight_blocks": np.ones((8, 1, 3), np.uint8),
                "weight_scales": np.ones((8, 1), np.uint8),
            }
        ),
        (Q, "MXFP4"),
    ),
    "HQQ": (beside({"W_q": np.ones((4, 6), np.uint8), "scale": SCALES}), (Q, "HQQ")),
    "a method of its own": (beside({"codebook": SCALES}, None, "vptq"), (Q, "vptq", "config.json")),
    "int8 without a scale": (
        beside({}, CODES8),
        (ONE, Q, "int8", "it has no scales named SCB or weight_scale"),
    ),
}
