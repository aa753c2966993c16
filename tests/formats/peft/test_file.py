"""PEFT folders and files: exact round trips, and our names, shapes and configs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.formats.peft import file as peft
from lora_fx.ir.layout import Layout, plain_layout

Same = Callable[[Adapter, Adapter], None]
Write = Callable[..., Path]


@pytest.mark.parametrize("single", [False, True])
def test_round_trip_is_exact(mixed: Adapter, same: Same, tmp_path: Path, single: bool) -> None:
    where = tmp_path / ("x.safetensors" if single else "x")
    (peft.write_file if single else peft.write)(mixed, where)
    got = peft.read(where)
    same(got, mixed)
    assert got.metadata == {**mixed.metadata, "notes": []}


def test_names_and_shapes_are_those_of_peft(mixed: Adapter, tmp_path: Path) -> None:
    peft.write(mixed, tmp_path)
    shapes = {k: v.shape for k, v in load_file(tmp_path / peft.WEIGHTS).items()}
    theirs = {
        k.removeprefix("base_model.model."): s
        for k, s in shapes.items()
        if k.startswith("base_model.model.")
    }
    assert theirs == {
        "h.0.fc.lora_A.weight": (2, 6),
        "h.0.fc.lora_B.weight": (8, 2),
        "h.1.fc.lora_A.weight": (3, 6),
        "h.1.fc.lora_B.weight": (8, 3),
        "h.0.proj.lora_A.weight": (2, 6),
        "h.0.proj.lora_B.weight": (8, 2),
        "conv.lora_A.weight": (2, 3, 3, 3),
        "conv.lora_B.weight": (8, 2, 1, 1),
        "emb.lora_embedding_A": (2, 11),
        "emb.lora_embedding_B": (6, 2),
        "lm_head.lora_A.weight": (2, 6),
        "lm_head.lora_B.weight": (11, 2),
        "look.lora_embedding_A": (2, 11),
        "look.lora_embedding_B": (6, 2),
        "experts.lora_A.weight": (12, 6),
        "experts.lora_B.weight": (8, 12),
        "score.weight": (3, 4),
        "score.bias": (3,),
        "h.0.fc.base_layer.bias": (8,),
    }
    own = {k.removeprefix("lora_fx.") for k in shapes if k.startswith("lora_fx.")}
    assert own == {
        *(f"{k}.lora_{h}" for k in ("tok.weight", "gconv.weight") for h in "AB"),
        *(f"{k}.lora_{h}" for k in ("h.0.attn.weight[:, 0:4]", "in_proj_weight") for h in "AB"),
        "cls_token.full",
    }


def test_config(mixed: Adapter, tmp_path: Path) -> None:
    notes = peft.write(mixed, tmp_path)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    assert config["target_modules"] == sorted(
        ["h.0.fc", "h.1.fc", "h.0.proj", "conv", "emb", "lm_head", "look"]
    )
    assert config["target_parameters"] == ["experts.up"]
    assert (config["r"], config["rank_pattern"]) == (2, {r"^h\.1\.fc": 3, r"^experts\.up": 4})
    assert config["lora_alpha"] == 4
    assert config["alpha_pattern"] == {r"^h\.1\.fc": 5.5, r"^experts\.up": 2}
    assert config["modules_to_save"] == ["score"] and config["bias"] == "lora_only"
    assert config["lora_dropout"] == 0.0 and config["base_model_name_or_path"] == "tiny"
    assert not config["fan_in_fan_out"] and not config["use_rslora"]
    unseen = ("tok.weight", "h.0.attn.weight[:, 0:4]", "in_proj_weight", "cls_token")
    for key in unseen:
        assert any(repr(key) in note for note in notes), key
    assert any("lora_dropout is 0" in note for note in notes)
    assert not any("score" in note for note in notes)


def test_a_name_stands_for_all_its_modules(tmp_path: Path) -> None:
    """Where the model has more modules of a name than are adapted, each stands for itself."""
    a, b = np.ones((2, 6), np.float32), np.ones((8, 2), np.float32)
    low = LowRank(a, b, 2.0, plain_layout((8, 6)))
    keys = ("head", "h.0.q", "h.1.q", "h.0.v", "h.2.head.x")
    adapter = Adapter({f"{key}.weight": low for key in keys})
    modules = {"modules_of_name": {"q": 2, "v": 2, "x": 1, "head": 2}}
    peft.write(replace(adapter, metadata=modules), tmp_path)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    assert config["target_modules"] == ["h.0.v", "head", "q", "x"]
    assert not re.fullmatch(config["exclude_modules"], "h.2.head.x")
    assert re.fullmatch(config["exclude_modules"], "h.2.head"), "which is not adapted"

    got = peft.read(tmp_path)
    assert set(got.entries) == set(adapter.entries)
    fewer = {key: low for key in got.entries if not key.startswith("h.1")}
    peft.write(replace(got, entries=fewer), tmp_path)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    assert "q" not in config["target_modules"] and "h.0.q" in config["target_modules"]


@pytest.mark.parametrize("narrower", ["", "exclude_modules", "layers_to_transform"])
def test_names_of_a_peft_file_stay_what_they_are(narrower: str, tmp_path: Path) -> None:
    """PEFT adapted every module of a name, so that it stands for them, and nothing is excluded."""
    low = LowRank(np.ones((2, 6), np.float32), np.ones((8, 2), np.float32), 2.0)
    peft.write(Adapter({"h.0.q.weight": low, "h.1.q.weight": low, "head.weight": low}), tmp_path)
    tensors, _ = read_tensors(tmp_path / peft.WEIGHTS)
    write_tensors(tmp_path / peft.WEIGHTS, tensors, {"format": "pt"})
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    del config["exclude_modules"]
    config["target_modules"] = ["q", "head"]
    if narrower:
        config[narrower] = {"exclude_modules": "x", "layers_to_transform": [0, 1]}[narrower]
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))

    peft.write(peft.read(tmp_path), tmp_path / "again")
    again = json.loads((tmp_path / "again" / peft.CONFIG).read_text())
    if narrower:
        assert again["target_modules"] == ["h.0.q", "h.1.q", "head"] and again["exclude_modules"]
    else:
        assert again["target_modules"] == ["head", "q"] and "exclude_modules" not in again


def test_fan_in_fan_out_when_every_linear_is_transposed(tmp_path: Path) -> None:
    layout = Layout((6, 8), (), (1,), (0,), (6, 8))
    low = LowRank(np.ones((2, 6), np.float32), np.ones((8, 2), np.float32), 2.0, layout)
    peft.write(Adapter({"a.weight": low}), tmp_path)
    assert json.loads((tmp_path / peft.CONFIG).read_text())["fan_in_fan_out"] is True


def test_reading_needs_no_metadata_of_ours(mixed: Adapter, tmp_path: Path) -> None:
    """Without it the file says what PEFT would apply: unbound, under the aliases."""
    peft.write(mixed, tmp_path)
    tensors, _ = read_tensors(tmp_path / peft.WEIGHTS)
    theirs = {k: v for k, v in tensors.items() if not k.startswith("lora_fx.")}
    write_tensors(tmp_path / peft.WEIGHTS, theirs, {"format": "pt"})
    got = peft.read(tmp_path)
    assert set(got.full) == {"score.weight", "score.bias", "h.0.fc.bias"}
    for key in ("h.0.fc.weight", "h.1.fc.weight", "h.0.proj.weight", "conv.weight", "emb.weight"):
        low, want = got.lowrank[key], mixed.lowrank[key]
        assert low.layout is None and low.use == "" and low.scale == want.scale
        np.testing.assert_array_equal(low.matrix(), want.matrix())
    conv, emb = got.lowrank["conv.weight"], got.lowrank["emb.weight"]
    assert (conv.origin.op, conv.origin.kernel) == ("conv2d", (3, 3))
    assert emb.origin == Origin(op="embedding")
    head, look = got.lowrank["lm_head.weight"], got.lowrank["look.weight"]
    np.testing.assert_array_equal(head.matrix(), mixed.lowrank["wte.weight"].matrix())
    turned = mixed.lowrank["pos.weight"].matrix().T  # a lookup reads b·a transposed
    np.testing.assert_allclose(look.matrix(), turned, rtol=1e-15)
    again = tmp_path / "again"
    peft.write(got, again)
    second, _ = read_tensors(again / peft.WEIGHTS)
    assert {k: v.tobytes() for k, v in second.items()} == {
        k: v.tobytes() for k, v in theirs.items()
    }


def test_an_edited_alpha_counts(mixed: Adapter, tmp_path: Path) -> None:
    peft.write(mixed, tmp_path)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    (tmp_path / peft.CONFIG).write_text(json.dumps({**config, "lora_alpha": 40}))
    got = peft.read(tmp_path)
    assert got.lowrank["h.0.fc.weight"].alpha == 40 and got.lowrank["h.1.fc.weight"].alpha == 5.5


def test_equal_adapters_give_equal_bytes(mixed: Adapter, tmp_path: Path) -> None:
    for name in ("x", "y"):
        peft.write(mixed, tmp_path / name)
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_masters_are_fp32(plain: Write, dtype: type) -> None:
    name = "base_model.model.m.fc.lora_A.weight"
    value: Array = np.random.default_rng(0).standard_normal((4, 6)).astype(dtype)
    whole = {"base_model.model.head.weight": value}
    got = peft.read(plain({"modules_to_save": ["head"]}, {name: value, **whole}))
    low, full = got.lowrank["m.fc.weight"], got.full["head.weight"]
    assert low.a.dtype == np.float32
    np.testing.assert_array_equal(low.a, value.astype(np.float32))
    assert full.value.dtype == (np.float64 if dtype is np.float64 else np.float32)
    assert any("rounded" in n for n in got.metadata["notes"]) == (dtype is np.float64)


def test_transposed_memory_is_written_right(tmp_path: Path) -> None:
    """safetensors.numpy 0.8.0 writes such arrays in the wrong order."""
    value: Array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"b": np.ones(3, bool), "x": value}, {"b": "1", "a": "2"})
    data = path.read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0 and data.index(b'"a"') < data.index(b'"b"')
    got = load_file(path)
    np.testing.assert_array_equal(got["x"], value)
    assert got["b"].all()


def test_attention_modules_as_peft_names_them(plain: Write) -> None:
    lead = "base_model.model.mha."
    a, b = np.ones((4, 6), np.float32), np.ones((18, 4), np.float32)
    tensors = {
        f"{lead}lora_A.weight": a,
        f"{lead}lora_B.weight": b,
        f"{lead}base_layer.out_proj.lora_A.weight": a,
        f"{lead}base_layer.out_proj.lora_B.weight": b[:6],
    }
    got = peft.read(plain({"target_modules": ["fc", "mha"]}, tensors))
    assert set(got.entries) == {"m.fc.weight", "mha.in_proj_weight", "mha.out_proj.weight"}


def test_harmless_oddities_are_noted(plain: Write) -> None:
    value = np.ones((3, 6), np.float32)
    fields = {"later_field": 1, "modules_to_save": ["score", "wte"]}
    tensors = {
        "base_model.model.m.fc.base_layer.weight": value,
        "base_model.model.lm_head.weight": value,
        "base_model.model.wte.modules_to_save.weight": value,
        "base_model.model.wte.original_module.weight": value * 2,
        "base_model.model.wte.weight": value,
    }
    got = peft.read(plain(fields, tensors))
    text = "\n".join(got.metadata["notes"])
    for word in ("later_field", "'score' has no tensor", "copy of the base", "replaces a whole"):
        assert word in text
    assert set(got.full) == {"lm_head.weight", "wte.weight"}
    np.testing.assert_array_equal(got.full["wte.weight"].value, value)


def test_whole_tensors_that_peft_would_confuse_are_kept_apart(tmp_path: Path) -> None:
    """PEFT takes `head` for `lm_head` too (it compares endings), so the update would be lost."""
    ones = np.ones((2, 2), np.float32)
    low = LowRank(ones, ones, 2.0, plain_layout((2, 2)))
    adapter = Adapter({"lm_head.weight": low, "head.weight": Full(ones)})
    notes = peft.write(adapter, tmp_path)
    assert json.loads((tmp_path / peft.CONFIG).read_text())["modules_to_save"] is None
    assert any("'lm_head'" in n for n in notes)
    assert set(peft.read(tmp_path).entries) == set(adapter.entries)


def test_modules_are_listed_once_and_only_with_their_weight(tmp_path: Path) -> None:
    one = Full(np.ones(2, np.float32))
    names = ("out.weight", "out.inner.weight", "norm.gain", "pos_embed")
    notes = peft.write(Adapter({name: one for name in names}), tmp_path)
    assert json.loads((tmp_path / peft.CONFIG).read_text())["modules_to_save"] == ["out"]
    for word in ("'norm.gain'", "'pos_embed'", "inner.weight, weight", "will not load"):
        assert any(word in note for note in notes), word
    assert set(peft.read(tmp_path).entries) == set(names)


def test_an_update_of_several_modules_is_beyond_peft(tmp_path: Path) -> None:
    ones = np.ones((2, 2), np.float32)
    low = LowRank(ones, ones, 2.0, plain_layout((2, 2)), origin=Origin(op="linear", tied=True))
    assert any(
        "share the tensor" in note for note in peft.write(Adapter({"w.weight": low}), tmp_path)
    )


def test_the_first_pattern_counts(plain: Write) -> None:
    got = peft.read(plain({"alpha_pattern": {"fc": 4, r"m\.fc": 12}})).lowrank["m.fc.weight"]
    assert got.alpha == 4


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"x.weight": "lora", "y.weight": "rslora"}, ["x.weight", "y.weight", "one variant"]),
        ({"x.weight": "dora"}, ["x.weight", "'dora'", "lora or rslora"]),
    ],
)
def test_variants_that_one_config_cannot_say(
    tmp_path: Path, entries: dict[str, str], words: list[str]
) -> None:
    ones = np.ones((2, 2), np.float32)
    updates = {k: LowRank(ones, ones, 2.0, None, v) for k, v in entries.items()}
    with pytest.raises(LoraFxError) as caught:
        peft.write(Adapter(updates), tmp_path / "x")
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("bad", [np.full((2, 2), np.nan, np.float32), np.ones((0, 2), np.float32)])
def test_writing_refuses_what_reading_would(tmp_path: Path, bad: Array) -> None:
    ones = np.ones((2, 2), np.float32)
    with pytest.raises(LoraFxError, match=r"x\.weight"):
        peft.write(Adapter({"x.weight": LowRank(bad, ones, 1.0)}), tmp_path)
    with pytest.raises(LoraFxError, match="metadata"):
        peft.write(Adapter({"x.weight": LowRank(ones, ones, 1.0)}, {"odd": object()}), tmp_path)


NAMES = st.lists(
    st.sampled_from(["h", "0", "1", "fc", "head", "lora_A", "weight", "a-b"]),
    min_size=1,
    max_size=3,
).map(lambda parts: ".".join([*parts, "weight"]))


@st.composite
def updates(draw: st.DrawFn) -> LowRank:
    """A bound or unbound update of any of the layouts that find gives."""
    rank, out, in_ = (draw(st.integers(1, 5)) for _ in range(3))
    batch = draw(st.sampled_from([(), (), (2,), (2, 3)]))
    a, b = (
        np.random.default_rng(draw(st.integers(0, 9))).standard_normal((*batch, m, n), np.float32)
        for m, n in ((rank, in_), (out, rank))
    )
    n = len(batch)
    straight = Layout((*batch, out, in_), tuple(range(n)), (n,), (n + 1,), (*batch, out, in_))
    turned = Layout((*batch, in_, out), tuple(range(n)), (n + 1,), (n,), (*batch, in_, out))
    window = Layout(
        (*batch, out, in_, 1), tuple(range(n)), (n,), (n + 1, n + 2), (*batch, out, in_, 1)
    )
    layout = draw(st.sampled_from([None, straight, turned, window]))
    use = draw(st.sampled_from(["", "", "tied.weight", "op:embedding"]))
    op = draw(st.sampled_from(["", "embedding", "linear", "conv1d"]))
    tied = draw(st.booleans())
    alpha = draw(st.floats(1e-3, 1e3))
    return LowRank(a, b, alpha, layout, "rslora", use, origin=Origin(op=op, tied=tied))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(NAMES, updates(), min_size=1, max_size=4), st.booleans())
def test_any_adapter_survives(
    tmp_path: Path, same: Same, entries: dict[str, LowRank], single: bool
) -> None:
    uses = [low.use for low in entries.values() if low.use == "tied.weight"]
    adapter = Adapter(dict(entries))
    where = tmp_path / ("x.safetensors" if single else "x")
    try:
        (peft.write_file if single else peft.write)(adapter, where)
    except LoraFxError as error:
        assert len(uses) > 1 and "both act on" in str(error)
        return
    same(peft.read(where), adapter)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_stack_that_has_the_name_of_a_module(tmp_path: Path, same: Same, rank: int) -> None:
    """The rank and alpha of h.weight in the config are those of h.weight.weight's module."""
    layout = Layout((2, 1, 3), (0,), (1,), (2,), (2, 1, 3))
    a, b = np.full((2, rank, 3), 0.5, np.float32), np.ones((2, 1, rank), np.float32)
    plain = LowRank(np.ones((1, 4), np.float32), np.ones((3, 1), np.float32), 1.0)
    stack = LowRank(a, b, 5.0, layout)
    adapter = Adapter({"h.weight": stack, "h.weight.weight": plain, "fc.weight": plain})
    notes = peft.write(adapter, tmp_path / "x")
    assert any("h.weight'" in note and "PEFT will not load" in note for note in notes)
    same(peft.read(tmp_path / "x"), adapter)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_module_whose_name_ends_like_a_stack(tmp_path: Path, same: Same, alpha: float) -> None:
    """PEFT's comparison of endings finds h.weight in h.h.weight, which is another one's rank."""
    stack = Layout((2, 1, 1), (0,), (1,), (2,), (2, 1, 1))
    a, b = np.ones((2, 1, 1), np.float32), np.ones((2, 1, 1), np.float32)
    plain = LowRank(np.array([[1.0], [2.0]], np.float32), np.ones((3, 2), np.float32), 1.0)
    adapter = Adapter({"h.weight": LowRank(a, b, alpha, stack), "h.h.weight": plain})
    peft.write(adapter, tmp_path / "x")
    same(peft.read(tmp_path / "x"), adapter)


def test_two_updates_of_one_layer(tmp_path: Path) -> None:
    low = LowRank(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32), 2.0)
    entries = {"x.weight": low, "y.weight": replace(low, use="x.weight")}
    with pytest.raises(
        LoraFxError, match=r"'x\.weight' and 'y\.weight' both act on the module 'x'"
    ):
        peft.write(Adapter(entries), tmp_path / "x")
