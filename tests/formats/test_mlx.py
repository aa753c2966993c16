"""MLX-LM's files: scales by release, orders of axes, and what is refused; the package's own facts.

tests/formats/test_mlx_lm.py compares with the package itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import format_of, is_adapter, load_adapter, save_adapter
from tests.formats.test_round_trips import equal

Array = np.ndarray[Any, Any]
Q = "model.layers.1.self_attn.q_proj"
LORA = {"rank": 2, "scale": 5.0, "dropout": 0.1}
CONFIG = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": LORA, "model": "org/base"}


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PAIR = {f"{Q}.lora_a": normal(0, 4, 2), f"{Q}.lora_b": normal(1, 2, 6)}


def stored(folder: Path, tensors: dict[str, Array] = PAIR, config: Any = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_is_read_and_merged(tmp_path: Path) -> None:
    """W' = W + scale·(lora_a·lora_b)ᵀ, as LoRALinear.fuse has it."""
    folder = stored(tmp_path / "adapters")
    assert format_of(folder) == "mlx" and is_adapter(folder)
    adapter = load_adapter(folder)
    assert adapter.metadata["dropout"] == 0.1
    assert adapter.metadata["base_model_name_or_path"] == "org/base"
    weight = normal(2, 6, 4)
    save_file({f"{Q}.weight": weight}, tmp_path / "base.safetensors")
    out = tmp_path / "merged.safetensors"
    lora_fx.merge(str(tmp_path / "base.safetensors"), [str(folder)], str(out))
    want = weight + 5.0 * (PAIR[f"{Q}.lora_a"] @ PAIR[f"{Q}.lora_b"]).T
    np.testing.assert_allclose(load_file(out)[f"{Q}.weight"], want, rtol=1e-5, atol=1e-5)


def test_dora(tmp_path: Path) -> None:
    config = {**CONFIG, "fine_tune_type": "dora"}
    m = np.abs(normal(3, 6))
    low = load_adapter(stored(tmp_path, {**PAIR, f"{Q}.m": m}, config)).lowrank[f"{Q}.weight"]
    assert low.magnitude is not None
    np.testing.assert_array_equal(low.magnitude, m)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"num_layers": 4, "lora_parameters": {**LORA, "alpha": 16}}, 5.0),
        ({"lora_layers": 4, "lora_parameters": {**LORA, "alpha": 16}}, 40.0),
        ({"lora_layers": 4, "use_dora": False, "lora_parameters": LORA}, 5.0),
        ({"lora_layers": 4, "use_dora": False, "lora_parameters": {**LORA, "alpha": 2}}, 5.0),
    ],
)
def test_scales_of_releases(tmp_path: Path, fields: Any, scale: float) -> None:
    low = load_adapter(stored(tmp_path, config=fields)).lowrank[f"{Q}.weight"]
    assert low.scale == scale


def test_two_meanings_are_refused_and_the_hint_leads_on(tmp_path: Path) -> None:
    fields = {"lora_layers": 4, "use_dora": False, "lora_parameters": {**LORA, "alpha": 16}}
    with pytest.raises(LoraFxError, match=r"mean the scale 40 .* and 5 to later") as caught:
        load_adapter(stored(tmp_path, config=fields))
    assert "remove alpha from the file; else replace both by scale 40" in caught.value.hint
    fields["lora_parameters"] = LORA
    assert load_adapter(stored(tmp_path, config=fields)).lowrank[f"{Q}.weight"].scale == 5.0


def test_npz_of_early_releases(tmp_path: Path) -> None:
    file = tmp_path / "adapters.npz"
    np.savez(file, **PAIR)
    assert format_of(tmp_path) == "mlx" and is_adapter(file) and is_adapter(tmp_path)
    adapter = load_adapter(tmp_path)
    low = adapter.lowrank[f"{Q}.weight"]
    assert low.scale == 20.0 and "the scale is taken as 20" in adapter.metadata["notes"][0]
    np.testing.assert_array_equal(low.a, PAIR[f"{Q}.lora_a"].T)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    adapter = load_adapter(file)
    assert adapter.lowrank[f"{Q}.weight"].scale == 5.0 and not adapter.metadata["notes"]


def test_npz_of_data_and_of_pickles_is_no_adapter(tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, x=normal(0, 3))
    assert not is_adapter(data)
    with pytest.raises(LoraFxError, match="not an adapter in a known format"):
        load_adapter(data)
    objects = tmp_path / "adapters.npz"
    np.savez(objects, **{f"{Q}.lora_a": np.array([{}], object)})
    with pytest.raises(LoraFxError, match=r"not a readable \.npz: Object arrays"):
        load_adapter(objects)


@pytest.mark.parametrize("axes", [2, 3])
def test_experts(tmp_path: Path, axes: int) -> None:
    """A stack of experts, whose lora_a had two axes until 0.28.2."""
    a, b = normal(0, 3, 2, 4), normal(1, 3, 6, 2)
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    lora_a = a if axes == 3 else a.reshape(6, 4)
    adapter = load_adapter(stored(tmp_path, {f"{name}.lora_a": lora_a, f"{name}.lora_b": b}))
    low = adapter.lowrank["model.layers.0.mlp.experts.up_proj.weight"]
    np.testing.assert_array_equal(low.a, a)
    np.testing.assert_array_equal(low.b, b)


def test_a_table_is_changed_in_all_uses(tmp_path: Path) -> None:
    name = "model.embed_tokens"
    tensors = {f"{name}.lora_a": normal(0, 9, 2), f"{name}.lora_b": normal(1, 2, 4)}
    low = load_adapter(stored(tmp_path, tensors)).lowrank[f"{name}.weight"]
    assert low.origin == Origin(op="embedding", tied=True) and low.shape == (4, 9)


@pytest.mark.parametrize(
    ("tensors", "config", "word"),
    [
        ({}, None, "no adapter_config.json next to it"),
        ({}, {**CONFIG, "fine_tune_type": "full", "lora_parameters": None}, "whole weights"),
        ({}, {**CONFIG, "fine_tune_type": "ia3"}, "fine_tune_type is 'ia3'"),
        ({}, {"num_layers": 4}, "no lora_parameters"),
        ({}, {**CONFIG, "lora_parameters": {"rank": 2}}, "scale of lora_parameters is None"),
        ({}, {**CONFIG, "lora_parameters": {**LORA, "scale": 0}}, "scale of lora_parameters is 0"),
        (
            {},
            {**CONFIG, "lora_parameters": {**LORA, "rank": "8"}},
            "rank of lora_parameters is '8'",
        ),
        ({}, {**CONFIG, "lora_parameters": {**LORA, "rank": 8}}, "has rank 2; .* has 8"),
        ({}, {**CONFIG, "fine_tune_type": "dora"}, "has no m"),
        ({f"{Q}.m": normal(0, 6)}, CONFIG, "has m, which only DoRA has"),
        ({f"{Q}.m": normal(0, 5)}, {**CONFIG, "fine_tune_type": "dora"}, r"\[5\]; expected 6"),
        ({f"{Q}.lora_b": normal(0, 3, 6)}, CONFIG, r"lora_b \[3, 6\]; expected"),
        ({"model.norm.lora_a": normal(0, 4, 2)}, CONFIG, "has lora_a; expected lora_a and lora_b"),
        ({"model.norm.weight": normal(0, 4)}, CONFIG, "is not a name that MLX-LM writes"),
        ({f"{Q}.lora_a": np.full((4, 2), np.nan, np.float32)}, CONFIG, "NaN"),
        (
            {
                "model.embed_tokens.lora_a": normal(0, 9, 2),
                "model.embed_tokens.lora_b": normal(1, 2, 6),
                "model.embed_tokens.m": normal(2, 9),
                f"{Q}.m": normal(2, 6),
            },
            {**CONFIG, "fine_tune_type": "dora"},
            "DoRA of an embedding",
        ),
        (
            {"x.switch_mlp.lora_a": normal(0, 5, 4), "x.switch_mlp.lora_b": normal(1, 3, 6, 2)},
            CONFIG,
            r"expected \[E, r, in\]",
        ),
    ],
)
def test_refused(tmp_path: Path, tensors: Any, config: Any, word: str) -> None:
    with pytest.raises(LoraFxError, match=word):
        load_adapter(stored(tmp_path, {**PAIR, **tensors}, config))


def low(rank: int = 2, alpha: float = 10.0, **fields: Any) -> LowRank:
    return LowRank(normal(rank, rank, 4), normal(rank + 9, 6, rank), alpha, **fields)


def test_written_and_read_back(tmp_path: Path) -> None:
    entries = {"model.layers.0.self_attn.q_proj.weight": low(), "lm_head.weight": low()}
    adapter = Adapter({**entries}, {"dropout": 0.05})
    assert save_adapter(adapter, tmp_path / "out", "mlx") == ()
    equal(load_adapter(tmp_path / "out"), adapter)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    keys = ["self_attn.q_proj", "lm_head"]
    lora = {"rank": 2, "scale": 5.0, "dropout": 0.05, "keys": keys}
    assert config == {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora}
    assert load_adapter(tmp_path / "out").metadata["dropout"] == 0.05


def test_keys_of_the_last_layers(tmp_path: Path) -> None:
    """With the base's number of layers the keys are names within a layer, as MLX-LM has them."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 4}')
    entries = {f"model.layers.{n}.self_attn.q_proj.weight": low() for n in (2, 3)}
    for base, num_layers in ((tmp_path, 2), (None, -1)):
        save_adapter(Adapter({**entries}), tmp_path / "out", "mlx", base=base, force=True)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["num_layers"] == num_layers
        whole = [key.removesuffix(".weight") for key in entries]
        assert config["lora_parameters"]["keys"] == (["self_attn.q_proj"] if base else whole)


def test_foreign_tensors_stay(tmp_path: Path) -> None:
    theirs = stored(tmp_path / "theirs")
    save_adapter(load_adapter(theirs), tmp_path / "ours", "mlx")
    save_adapter(load_adapter(tmp_path / "ours"), tmp_path / "again", "mlx")
    for name in ("ours", "again"):
        tensors = load_file(tmp_path / name / "adapters.safetensors")
        assert tensors.keys() == PAIR.keys()
        for key, value in PAIR.items():
            np.testing.assert_array_equal(tensors[key], value)


def test_one_rank_and_one_scale(tmp_path: Path) -> None:
    """Ranks of zeros and a ratio in lora_b: ΔW stays, and notes say it."""
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in (1, 2, 3)]
    entries = dict(zip(names, [low(), low(3, 15.0), low(3, 6.0, variant="rslora")], strict=True))
    notes = save_adapter(Adapter({**entries}), tmp_path / "out", "mlx")
    assert notes == (
        "MLX-LM has one rank, here 3: zeros fill 1 update",
        "MLX-LM has one scale, here 5: the ratio of 1 update with another is multiplied into "
        "lora_b",
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == [name.removesuffix(".weight") for name in names]
    got = load_adapter(tmp_path / "out").lowrank
    for name, update in entries.items():
        np.testing.assert_allclose(got[name].matrix(), update.matrix(), rtol=2e-7)
        assert got[name].rank == 3 and got[name].scale == 5.0


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"a.weight": low(), "b.weight": low(magnitude=normal(0, 6))}, "others are DoRA"),
        ({"a.wte.weight": low(magnitude=normal(0, 6))}, "an embedding has lengths for other axes"),
        ({"a.experts.0.up_proj.weight": low()}, "stacks of gate and up apart"),
        (
            {"a.weight": low(alpha=1e-20), "b.weight": low(alpha=1e20)},
            r"'b\.weight': .* times 1e\+40 are out of fp32's range",
        ),
        (
            {"a.weight": low(alpha=1e20), "b.weight": low(alpha=1e-20)},
            r"'b\.weight': .* times 1e-40 are out of fp32's range",
        ),
    ],
)
def test_not_written(tmp_path: Path, entries: Any, word: str) -> None:
    with pytest.raises(LoraFxError, match=word):
        save_adapter(Adapter(entries), tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


def test_the_table_of_a_tied_model(tmp_path: Path) -> None:
    """MLX-LM would apply a lookup's update to the head too, where both read one table."""
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true, "model_type": "llama"}')
    key = "model.embed_tokens.weight"
    adapter = Adapter({key: low(origin=Origin("embedding"))})
    with pytest.raises(LoraFxError, match="to the head too"):
        save_adapter(adapter, tmp_path / "out", "mlx", base=tmp_path)
    adapter = Adapter({key: low(origin=Origin("embedding", tied=True))})
    save_adapter(adapter, tmp_path / "out", "mlx", base=tmp_path)
    equal(load_adapter(tmp_path / "out"), adapter)


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["convert", *argv])
    return int(stop.value.code or 0)


def test_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stored(Path("adapters"))
    assert run("adapters", "-o", "peft") == 0
    assert "mlx → peft" in capsys.readouterr().out
    assert run("peft", "-o", "again", "--format", "mlx") == 0
    assert run("peft", "-o", "again", "--format", "mlx") == 2
    assert "already exists" in capsys.readouterr().err
    assert run("peft", "-o", "again", "--format", "mlx", "--force") == 0
    assert run("peft", "-o", "x.safetensors", "--format", "mlx") == 2
    assert "format mlx needs a folder" in capsys.readouterr().err
