"""What the entries of an adapter make of a base: the plainest merge, for comparing with PEFT's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.adapter import dora as variant
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.fused import place
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, ReplacedRows
from lora_fx.adapter.variant import residual
from lora_fx.dtypes import Array
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.ir.numpy_emitter import NumpyEmitter

Tensors = dict[str, Array]


def merged(base: Mapping[str, Array], adapter: Adapter, turned: tuple[str, ...] = ()) -> Tensors:
    """New tensors in fp32; `turned` are linear weights that the model stores [in, out]."""
    result = dict(base)
    shapes = {k: v.shape for k, v in base.items()}
    for key, entry in place(adapter.entries, shapes.get).items():
        old = result[key]
        if isinstance(entry, Full):
            result[key] = entry.value
        elif isinstance(entry, ReplacedRows):
            result[key] = old.copy()
            result[key][list(entry.index)] = entry.value
        elif isinstance(entry, Dense):
            result[key] = old + entry.value * np.float32(entry.scale)
        else:
            assert isinstance(entry, LowRank)
            result[key] = _updated(key, old, entry, key in turned)
            for name in entry.origin.twins:
                result[name] = result[key]
    return result


def _updated(key: str, old: Array, low: LowRank, turned: bool) -> Array:
    if low.layout is not None and low.layout.batch:
        return old + low.layout.to_stored(NumpyEmitter(), low.matrix(np.float32))
    flip = turned or low.origin.op == "embedding"
    matrix = old.T if flip else old.reshape(len(old), -1)
    if low.mutated:
        matrix = residual(matrix, low, key)
    wide = matrix.astype(np.float32) + low.block(0, slice(None), slice(None))
    if low.magnitude is not None:
        wide = variant.factors(low.magnitude, variant.squares(wide), key)[:, None] * wide
    return wide.T if flip else wide.reshape(old.shape)


def numbers(model: Any) -> Tensors:
    """Every tensor of a model, also under the names that share one."""
    return {k: v.detach().float().numpy().copy() for k, v in model.state_dict().items()}


def close(got: Mapping[str, Array], want: Mapping[str, Array], tolerance: float = 2e-6) -> None:
    """Equal names and, up to fp32 rounding, values."""
    assert set(got) == set(want)
    for key, value in want.items():
        assert got[key].shape == value.shape, key
        assert np.abs(got[key] - value).max() <= tolerance * np.abs(value).max(), key


def randomise(model: Any, seed: int = 0) -> None:
    """Training, as far as a file can tell: every trained tensor moves."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                low = "lora_A" in name or "lora_B" in name or "embedding" in name
                step = torch.randn(p.shape, generator=generator) * (0.3 if low else 0.1)
                p.add_(step.to(p.dtype))


def check_with_peft(
    folder: Path,
    build: Callable[[], Any],
    config: Any,
    *,
    turned: tuple[str, ...] = (),
    tolerance: float = 2e-6,
    changed: int | None = None,
) -> Adapter:
    """PEFT's merge equals ours, and equals PEFT's merge of what we write of it.

    Args:
        folder: For files.
        build: Makes the base model, equal every time.
        config: A LoraConfig.
        turned: Weights that the model stores [in, out].
        tolerance: Relative to a tensor's largest element.
        changed: How many tensors of the base the merge must change.
    """
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = numbers(build())
        model = peft.get_peft_model(build(), copy.deepcopy(config))
        randomise(model)
        model.save_pretrained(folder / "theirs")
        want = numbers(model.merge_and_unload())
        got = load_adapter(folder / "theirs")
        ours = merged(base, got, turned)
        close(ours, want, tolerance)
        moved = [k for k in base if np.abs(want[k] - base[k]).max() > 1e-3 * np.abs(base[k]).max()]
        assert moved and (changed is None or len(moved) == changed), moved
        save_adapter(got, folder / "ours")
        again = peft.PeftModel.from_pretrained(build(), str(folder / "ours"))
        close(numbers(again.merge_and_unload()), want, tolerance)
        same_entries(load_adapter(folder / "ours"), got)
    return got


def same_entries(got: Adapter, want: Adapter) -> None:
    """Two adapters are equal in every bit."""
    assert set(got.entries) == set(want.entries)
    for key, a in want.entries.items():
        b = got.entries[key]
        assert type(a) is type(b), key
        for name, value in vars(a).items():
            other = getattr(b, name)
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(other, value, strict=True, err_msg=key)
            else:
                assert other == value, (key, name)
