"""Adapters and small files that the tests of formats share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.dtypes import Array
from lora_fx.files.tensor_files import write_tensors
from lora_fx.ir.layout import Layout, plain_layout

Write = Callable[..., Path]


def factors(seed: int, rank: int, out: int, in_: int, *batch: int) -> tuple[Array, Array]:
    """Normal a [*batch, rank, in] and b [*batch, out, rank] in fp32."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*batch, rank, in_)).astype(np.float32)
    return a, rng.standard_normal((*batch, out, rank)).astype(np.float32)


@pytest.fixture
def mixed() -> Adapter:
    """One update of every form, in PEFT's terms and not, and whole tensors of both kinds."""
    conv_io = Layout((6, 8), (), (1,), (0,), (6, 8))
    rows = Layout((11, 6), (), (1,), (0,), (11, 6))
    head = plain_layout((11, 6))
    stack = Layout((3, 8, 6), (0,), (1,), (2,), (3, 8, 6))
    grouped = Layout((2, 4, 3, 3, 3), (0,), (1,), (2, 3, 4), (8, 3, 3, 3))
    part = Layout((6, 4), (), (1,), (0,), (6, 4))
    entries: dict[str, LowRank | Full] = {
        "h.0.fc.weight": LowRank(
            *factors(0, 2, 8, 6), 4.0, plain_layout((8, 6)), origin=Origin(op="linear")
        ),
        "h.1.fc.weight": LowRank(
            *factors(1, 3, 8, 6), 5.5, plain_layout((8, 6)), origin=Origin(op="linear")
        ),
        "h.0.proj.weight": LowRank(*factors(2, 2, 8, 6), 4.0, conv_io, origin=Origin(op="addmm")),
        "conv.weight": LowRank(
            *factors(3, 2, 8, 27), 4.0, plain_layout((8, 3, 3, 3)), origin=Origin(op="conv2d")
        ),
        "emb.weight": LowRank(*factors(4, 2, 6, 11), 4.0, rows, origin=Origin(op="embedding")),
        "wte.weight": LowRank(
            *factors(5, 2, 11, 6), 4.0, head, use="lm_head.weight", origin=Origin(op="linear")
        ),
        "pos.weight": LowRank(
            *factors(6, 2, 11, 6), 4.0, head, use="look.weight", origin=Origin(op="embedding")
        ),
        "tok.weight": LowRank(*factors(7, 2, 11, 6), 4.0, head, use="op:embedding"),
        "h.0.attn.weight[:, 0:4]": LowRank(*factors(8, 2, 4, 6), 4.0, part),
        "experts.up": LowRank(*factors(9, 4, 8, 6, 3), 2.0, stack),
        "gconv.weight": LowRank(
            *factors(10, 2, 4, 27, 2), 4.0, grouped, origin=Origin(op="conv2d")
        ),
        "in_proj_weight": LowRank(*factors(11, 2, 8, 6), 4.0, plain_layout((8, 6))),
        "score.weight": Full(np.arange(12, dtype=np.float32).reshape(3, 4)),
        "score.bias": Full(np.arange(3, dtype=np.float32)),
        "h.0.fc.bias": Full(np.arange(8, dtype=np.float32)),
        "cls_token": Full(np.ones((1, 1, 6), np.float32)),
    }
    metadata = {"dropout": 0.1, "base_model_name_or_path": "tiny", "base_hash": "sha256:ab"}
    return Adapter(entries, metadata)


@pytest.fixture
def plain(tmp_path: Path) -> Write:
    """Write a folder as PEFT would: plain(config fields to change, tensors to change)."""

    def write(config: Mapping[str, Any] = {}, tensors: Mapping[str, Array | None] = {}) -> Path:
        a, b = factors(0, 4, 8, 6)
        lead = "base_model.model.m.fc.lora_"
        every: dict[str, Array | None] = {f"{lead}A.weight": a, f"{lead}B.weight": b, **tensors}
        fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["fc"], **config}
        folder = tmp_path / "plain"
        folder.mkdir(exist_ok=True)
        kept = {k: v for k, v in every.items() if v is not None}
        write_tensors(folder / "adapter_model.safetensors", kept, {"format": "pt"})
        text = json.dumps({k: v for k, v in fields.items() if v != "absent"})
        (folder / "adapter_config.json").write_text(text)
        return folder

    return write


@pytest.fixture
def same() -> Callable[[Adapter, Adapter], None]:
    """Assert that two adapters are equal in every bit."""

    def check(got: Adapter, want: Adapter) -> None:
        assert list(got.entries.keys() ^ want.entries.keys()) == []
        for key, a in want.entries.items():
            b = got.entries[key]
            assert type(a) is type(b), key
            if isinstance(a, Full):
                assert isinstance(b, Full)
                np.testing.assert_array_equal(b.value, a.value, strict=True)
                continue
            assert isinstance(a, LowRank) and isinstance(b, LowRank)
            np.testing.assert_array_equal(b.a, a.a, strict=True, err_msg=key)
            np.testing.assert_array_equal(b.b, a.b, strict=True, err_msg=key)
            fields = ("alpha", "layout", "variant", "use")
            assert [getattr(b, f) for f in fields] == [getattr(a, f) for f in fields], key
            assert replace(b.origin, layer=None) == replace(a.origin, layer=None), key

    return check
