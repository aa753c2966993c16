"""Bases and adapters that do not go together, and what merge has to say about each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoint.made import Array, adapter, factors
from tests.checkpoint.refused_bases import BASES, CONFIG, DOWN, Q, base

RNG = np.random.default_rng(0)
Build = Callable[[Path], list[str]]
"""Makes base and adapter in a folder; returns more arguments."""


def good(folder: Path, **config: Any) -> None:
    adapter(folder / "adapter", {Q: factors(RNG, 8, 6, 2), DOWN: factors(RNG, 6, 8, 2)}, **config)


def pair(pairs: dict[str, tuple[int, int]], *args: str, nan: str = "", **config: Any) -> Build:
    """A good base and an adapter of modules with these sides."""

    def build(folder: Path) -> list[str]:
        base(folder)
        made = {m: factors(RNG, *sides, 2) for m, sides in pairs.items()}
        if nan:
            made[nan][0][1, 2] = np.nan
        adapter(folder / "adapter", made, **config)
        return list(args)

    return build


def other(make: Callable[[Path], object], *args: str, **config: Any) -> Build:
    """A base that is bad and a good adapter."""

    def build(folder: Path) -> list[str]:
        make(folder)
        good(folder, **config)
        return list(args)

    return build


def tensors(change: dict[str, Array], **config: Any) -> Callable[[Path], object]:
    """The good base with other tensors; None of a name leaves it out."""
    return lambda folder: base(folder, change, **config)


def stored(change: dict[str, Array], **config: Any) -> Build:
    """A good base and an adapter of these stored tensors."""

    def build(folder: Path) -> list[str]:
        base(folder)
        adapter(folder / "adapter", {}, tensors=change, **config)
        return []

    return build


def whole(name: str, value: Array, *args: str, **tensors_of_base: Array) -> Build:
    def build(folder: Path) -> list[str]:
        base(folder, tensors_of_base)
        adapter(
            folder / "adapter",
            {Q: factors(RNG, 8, 6, 2)},
            whole={name: value},
            modules_to_save=[name.rpartition(".")[0]],
        )
        return list(args)

    return build


def same_output(folder: Path) -> list[str]:
    base(folder)
    good(folder)
    return ["-o", str(folder / "base"), "--force"]


def output_of_another_kind(folder: Path) -> list[str]:
    base(folder)
    good(folder)
    return ["-o", str(folder / "merged.onnx")]


def around_output(folder: Path) -> list[str]:
    base(folder)
    good(folder)
    return ["-o", str(folder), "--force"]


def existing_output(folder: Path) -> list[str]:
    (folder / "out").mkdir()
    base(folder)
    good(folder)
    return []


def pickled_adapter(folder: Path) -> list[str]:
    base(folder)
    good(folder)
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    (folder / "adapter" / "adapter_model.bin").write_bytes(b"PK\x03\x04" + bytes(60))
    return []


def again_in_one(folder: Path) -> list[str]:
    base(folder)
    good(folder)
    return [str(folder / "adapter") + ":0.5"]


def tie(adapted: str, *args: str, table: str = "model.embed_tokens", **config: Any) -> Build:
    def build(folder: Path) -> list[str]:
        tied = CONFIG | {"tie_word_embeddings": True} | config
        base(folder, {f"{table}.weight": np.ones((20, 6), np.float32)}, config=tied)
        a, b = factors(RNG, 20, 6, 2)
        if adapted == "lm_head":
            adapter(folder / "adapter", {adapted: (a, b)})
        else:
            lead = f"base_model.model.{table}.lora_embedding_"
            adapter(
                folder / "adapter",
                {},
                r=2,
                tensors={f"{lead}A": b.T.copy(), f"{lead}B": a.T.copy()},
            )
        return list(args)

    return build


WIDE = np.full((3, 6), 1e30, np.float32)
PAIRS: dict[str, tuple[Build, tuple[str, ...]]] = {
    # what checkpoints.md calls wrong adapters
    "all keys renamed": (
        pair({"transformer.h.0.q": (8, 6)}),
        ("1 of the adapter's keys", "transformer.h.0.q"),
    ),
    "one key unused": (
        pair({Q: (8, 6), f"{Q}2": (8, 6)}),
        (
            "no tensor for 1 of the adapter's keys",
            f"{Q}2.weight",
            "did you mean",
            "--allow-unused",
        ),
    ),
    "more layers than the base": (
        pair({Q: (8, 6), "model.layers.7.self_attn.q_proj": (8, 6)}),
        ("model.layers.7.self_attn.q_proj.weight",),
    ),
    "A too wide": (pair({Q: (8, 7)}), ("model.safetensors", Q, "[8, 6]", "8 × 7")),
    "B too high": (pair({Q: (9, 6)}), ("model.safetensors", Q, "[8, 6]", "9 × 6")),
    "rank is not r": (
        pair({Q: (8, 6)}, r=3),
        ("adapter_model.safetensors", "rank 2", "expected 3"),
    ),
    "rank_pattern typo that the file shows": (
        pair({Q: (8, 6)}, r=4, rank_pattern={"q_porj": 2}),
        ("adapter_model.safetensors", "rank 2", "expected 4"),
    ),
    "lora_alpha missing": (
        pair({Q: (8, 6)}, lora_alpha=...),
        ("adapter_config.json", "lora_alpha is missing"),
    ),
    "target_modules narrower": (
        pair({Q: (8, 6), DOWN: (6, 8)}, target_modules=["q_proj"]),
        ("adapter_model.safetensors", "down_proj", "does not name"),
    ),
    "peft_type unknown": (
        pair({Q: (8, 6)}, peft_type="FOO"),
        ("adapter_config.json", "'FOO'", "'LORA'"),
    ),
    "NaN in the adapter": (pair({Q: (8, 6)}, nan=Q), ("adapter_model.safetensors", Q, "NaN")),
    "B missing": (
        stored({f"base_model.model.{Q}.lora_A.weight": np.ones((2, 6), np.float32)}),
        ("adapter_model.safetensors", "lora_A", "no partner", "lora_B"),
    ),
    "int8 adapter": (
        stored(
            {
                f"base_model.model.{Q}.lora_{h}.weight": np.ones(s, np.int8)
                for h, s in (("A", (2, 6)), ("B", (8, 2)))
            },
            r=2,
        ),
        ("adapter_model.safetensors", "int8", "expected a float"),
    ),
    "pickled adapter": (pickled_adapter, ("adapter_model.bin", "pickle", "safetensors")),
    "given twice": (again_in_one, ("adapter", "given twice")),
    "fan_in_fan_out on Linear": (
        pair({Q: (8, 6), "model.square": (6, 6)}, fan_in_fan_out=True),
        ("fan_in_fan_out", "[out, in]", "model.square.weight", "square"),
    ),
    # the base's values, and what a dtype holds
    "NaN in the base": (
        other(tensors({f"{Q}.weight": np.full((8, 6), np.nan, np.float32)})),
        (Q, "the base has nan", "row 0"),
    ),
    "infinity in the base": (
        other(tensors({f"{Q}.weight": np.full((8, 6), -np.inf, np.float32)})),
        (Q, "the base has -inf"),
    ),
    "scale without measure": (
        pair({Q: (8, 6)}, lora_alpha=1e39),
        (Q, "the fold gives", "expected finite"),
    ),
    "too large for fp16": (
        other(tensors({f"{Q}.weight": np.full((8, 6), 1e5, np.float32)}), "--dtype", "float16"),
        (Q, "float16 cannot hold", "bfloat16"),
    ),
    "whole tensor too large": (
        whole("head.weight", WIDE, **{"head.weight": np.ones((3, 6), np.float16)}),
        ("model.safetensors", "head.weight", "float16", "1e+30"),
    ),
    "whole tensor of another shape": (
        whole("head.weight", WIDE, **{"head.weight": np.ones((4, 6), np.float32)}),
        ("model.safetensors", "head.weight", "[4, 6]", "[3, 6]"),
    ),
    "whole tensor for integers": (
        whole("head.weight", WIDE, **{"head.weight": np.ones((3, 6), np.int64)}),
        ("model.safetensors", "head.weight", "int64", "float32"),
    ),
    "whole tensor that is new": (whole("head.weight", WIDE), ("head.weight", "no tensor")),
    "vocabulary grown": (
        whole(
            "model.embed_tokens.weight",
            np.ones((24, 6), np.float32),
            **{"model.embed_tokens.weight": np.ones((20, 6), np.float32)},
        ),
        ("model.safetensors", "embed_tokens", "[20, 6]", "[24, 6]", "resize"),
    ),
    "empty tensor (ZeRO-3)": (
        other(tensors({f"{Q}.weight": np.ones((0,), np.float32)})),
        ("model.safetensors", Q, "is empty, [0]", "ZeRO-3"),
    ),
    # weights and mixes
    "weight is nan": (pair({Q: (8, 6)}, "ADAPTER:nan"), ("adapter", "weight is nan")),
    "weight beyond fp32": (
        pair({Q: (8, 6)}, "ADAPTER:1e30"),
        (Q, "beyond the range of fp32", "ADAPTER:W", "--dtype float64"),
    ),
    "weight of a whole tensor": (
        whole(
            "head.weight",
            np.ones((3, 6), np.float32),
            "ADAPTER:0.5",
            **{"head.weight": np.ones((3, 6), np.float32)},
        ),
        ("weight 0.5", "head.weight"),
    ),
    "rank of a sum": (pair({Q: (8, 6)}, "--rank", "2"), ("rank", "svd")),
    # tied heads
    "head of a tied model": (tie("lm_head"), ("lm_head.weight", "tied", "--untie")),
    "embedding of a tied model": (tie("table"), ("embed_tokens", "tied", "--untie")),
    "head without a known name": (
        tie(
            "table",
            "--untie",
            table="funnel.embeddings.word_embeddings",
            architectures=["FunnelForMaskedLM"],
        ),
        ("word_embeddings", "not known"),
    ),
    "T5 scales a tied head": (
        tie(
            "table",
            "--untie",
            table="shared",
            architectures=["T5ForConditionalGeneration"],
            model_type="t5",
        ),
        ("shared.weight", "scales its logits"),
    ),
    # outputs
    "output exists": (existing_output, ("out exists", "--force")),
    "output is the base": (same_output, ("would replace the input", "base")),
    "output of another kind": (
        output_of_another_kind,
        ("merged.onnx", "is a checkpoint", "-o X.safetensors"),
    ),
    "output around the base": (around_output, ("would replace the input",)),
}
PAIRS |= {name: (other(make), texts) for name, (make, texts) in BASES.items()}
