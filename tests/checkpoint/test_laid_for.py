"""Layouts of experts by a base: how many it has, and which parameters are one matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.expert_layouts import LAYOUTS
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.checkpoint.stored_stacks import laid_for
from lora_fx.cli.group import group
from lora_fx.errors import LoraFxError
from tests.checkpoint import made

E, H, F = 4, 8, 5
M = "model.layers.0.mlp"


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A Qwen3-MoE of one layer: experts one by one, and a router that is a bare parameter."""
    rng = np.random.default_rng(0)
    tensors = {f"{M}.gate.weight": rng.standard_normal((E, H)).astype("f4")}
    for n in range(E):
        for name, shape in (("gate", (F, H)), ("up", (F, H)), ("down", (H, F))):
            key = f"{M}.experts.{n}.{name}_proj.weight"
            tensors[key] = rng.standard_normal(shape).astype("f4")
    config = {"model_type": "qwen3_moe", "num_experts": E}
    return str(made.checkpoint(tmp_path / "base", tensors, config=config))


def low(rng: np.random.Generator, out: int, in_: int, **more: Any) -> LowRank:
    return LowRank(*made.factors(rng, out, in_, 2), 3.0, **more)


def apart(count: int) -> dict[str, LowRank]:
    rng = np.random.default_rng(1)
    sizes = {"gate_proj": (F, H), "up_proj": (F, H), "down_proj": (H, F)}
    return {
        f"{M}.experts.{n}.{name}.weight": low(rng, *shape)
        for n in range(count)
        for name, shape in sizes.items()
    }


@pytest.mark.parametrize("layout", ["peft", "sglang-3d"])
def test_the_last_experts_are_missed(base: str, layout: str) -> None:
    adapter, chosen = Adapter(apart(E - 1)), LAYOUTS[layout]
    assert chosen is not None
    if not chosen.apart:
        with pytest.raises(LoraFxError, match=r"experts 0 to 2, and .* has 4") as refused:
            laid_for(adapter, chosen, base, None)
        assert "per-expert" in str(refused.value.hint)
    assert laid_for(Adapter(apart(E)), chosen, base, None)
    kept = LAYOUTS["per-expert"]
    assert kept is not None and len(laid_for(adapter, kept, base, None)) == 3 * (E - 1)


def test_a_router_among_the_parameters_stays_what_it_is(base: str) -> None:
    """PEFT trains it by target_parameters, and knows it by no other name."""
    router = low(np.random.default_rng(2), E, H, origin=Origin(op="experts"))
    adapter = Adapter({f"{M}.gate.weight": router, **apart(E)})
    chosen = LAYOUTS["peft"]
    assert chosen is not None
    assert laid_for(adapter, chosen, base, None).entries[f"{M}.gate.weight"] is router


def test_the_hint_of_a_merge_leads_on(base: str, tmp_path: Path) -> None:
    """A layout that no base has is told as such, and the command that is named makes it one."""
    chosen = LAYOUTS["sglang-3d"]
    assert chosen is not None
    theirs, folder = laid_for(Adapter(apart(E)), chosen, base, None), tmp_path / "adapter"
    lora_fx.save_adapter(theirs, folder)
    with pytest.raises(LoraFxError, match=f"no tensor for 3 of .*{M}.experts") as refused:
        lora_fx.merge(base, folder, tmp_path / "out")
    command = str(refused.value.hint).partition(";")[0].split()
    assert command[:4] == ["lora-fx", "convert", str(folder), "-o"] and "peft" in command
    done = CliRunner().invoke(group, [*command[1:4], str(tmp_path / "laid"), *command[5:]])
    assert done.exit_code == 0, done.output
    assert lora_fx.merge(base, tmp_path / "laid", tmp_path / "out")
    assert lora_fx.merge(base, Adapter(apart(E)), tmp_path / "wanted")
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "wanted"))
    assert load(one).keys() == load(two).keys()
    for name, value in load(one).items():
        np.testing.assert_allclose(value, load(two)[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "said"), [(None, True), ("qwen3_moe", False)])
def test_what_is_taken_for_granted_is_said(base: str, kind: str | None, said: bool) -> None:
    stacks = LAYOUTS["peft"]
    assert stacks is not None
    adapter = laid_for(Adapter(apart(E)), stacks, base, None)
    again = laid_for(adapter, stacks, None, kind)
    assert any("Llama 4" in n for n in again.metadata.get("notes", [])) is said
    assert not any("Llama 4" in n for n in adapter.metadata.get("notes", []))
