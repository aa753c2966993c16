"""What the PEFT reader refuses: each message names the file, what was found and expected."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx import regexes
from lora_fx.adapter.adapter import Adapter
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.formats.io import load_adapter
from lora_fx.formats.peft import file as peft
from lora_fx.formats.peft import target_modules
from lora_fx.formats.peft.modules_to_save import conflicts
from lora_fx.formats.peft.pattern import Pattern

Write = Callable[..., Path]
LEAD = "base_model.model."
A, B = f"{LEAD}m.fc.lora_A.weight", f"{LEAD}m.fc.lora_B.weight"
ONES = np.ones((4, 6), np.float32)


def refused(path: Path, *words: str) -> LoraFxError:
    """The error of reading `path`, after checking its words."""
    with pytest.raises(LoraFxError) as caught:
        load_adapter(path)
    for word in words:
        assert word in caught.value.message, caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("peft_type", "IA3", "'LORA'"),
        ("peft_type", ["LORA"], "'LORA'"),
        ("use_dora", "yes", "true or false"),
        ("alora_invocation_tokens", [-1], "list of 1 to 4096 token ids"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("layer_replication", [[0, 4], [2, 5]], "repeated"),
        ("trainable_token_indices", [0], "expected a tensor X.token_adapter"),
        ("trainable_token_indices", {"wte": [0]}, "expected a tensor X.token_adapter"),
        ("lora_bias", 2, "true or false"),
        ("megatron_config", {"x": 1}, "Megatron"),
        ("bias", "some", "'lora_only'"),
        ("init_lora_weights", "pissa_niter_16", "random numbers"),
        ("init_lora_weights", "corda", "training data"),
        ("init_lora_weights", "lora_ga", "gradients"),
        ("init_lora_weights", "loftq", "quantised"),
        ("init_lora_weights", "newest", "may change the base"),
        ("lora_alpha", "absent", "missing"),
        ("lora_alpha", "8", "a number"),
        ("use_rslora", "false", "true or false"),
        ("lora_dropout", 2, "a number in [0, 1)"),
        ("alpha_pattern", {"(": 4}, "bad pattern"),
        ("alpha_pattern", [4], "an object"),
    ],
)
def test_config_fields(plain: Write, field: str, value: Any, word: str) -> None:
    error = refused(plain({field: value}), "adapter_config.json", field, word)
    assert error.exit_code == 2


def test_flags_that_peft_itself_refuses_together(plain: Write) -> None:
    refused(plain({"use_dora": True, "lora_bias": True}), "use_dora and lora_bias")
    olora = {"init_lora_weights": "olora", "fan_in_fan_out": True}
    refused(plain(olora), "olora", "fan_in_fan_out")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_keep_the_base_are_read(plain: Write, init: Any) -> None:
    assert peft.read(plain({"init_lora_weights": init})).lowrank["m.fc.weight"].scale == 2.0


@pytest.mark.parametrize("field", ["target_modules", "r"])
def test_config_that_contradicts_the_tensors(plain: Write, field: str) -> None:
    value, words = {
        "target_modules": (["other"], ("does not name", A)),
        "r": (8, ("rank 4", "expected 8", A)),
    }[field]
    refused(plain({field: value}), *words)


@pytest.mark.parametrize("wanted", ["all-linear", r".*\.fc", ["m.fc"], None])
def test_ways_to_name_the_targets(plain: Write, wanted: Any) -> None:
    assert len(peft.read(plain({"target_modules": wanted}))) == 1


@pytest.mark.parametrize(
    ("tensors", "words", "hint"),
    [
        ({B: None}, (A, "no partner", B), "incomplete"),
        ({A: None}, (B, "no partner", A), "incomplete"),
        ({B: np.ones((8, 3), np.float32)}, (A, "[4, 6]", "[8, 3]"), "same file"),
        ({A: np.ones((4, 3, 3, 3), np.float32)}, (A, "[r, in, *kernel]"), ""),
        (
            {A: np.ones((4, 3, 3), np.float32), B: np.ones((8, 2, 1), np.float32)},
            (A, "[4, 3, 3]", "[8, 2, 1]"),
            "grouped convolution",
        ),
        ({A: np.ones((0,), np.float32)}, (A, "[0]"), "ZeRO-3"),
        ({A: np.ones((24,), np.float32)}, (A, "[24]"), "ZeRO-3"),
        ({A: np.ones((4, 6), np.int8)}, (A, "int8", "float"), "fp32"),
        ({A: ONES * np.float32("nan")}, (A, "NaN"), "diverged"),
        ({B: np.full((8, 4), np.inf, np.float16)}, (B, "NaN or inf"), "diverged"),
        (
            {f"{LEAD}m.fc.lora_magnitude_vector": ONES[0]},
            ("DoRA", "use_dora is off"),
            "use_dora on",
        ),
        ({f"{LEAD}m.fc.lora_B.bias": ONES[0]}, ("lora_bias is false",), "lora_bias"),
        ({f"{LEAD}m.up.lora_B.bias": ONES[0]}, ("no partner", "m.up.lora_B.weight"), "incomplete"),
        ({f"{LEAD}m.up.lora_magnitude_vector": ONES[0]}, ("m.up.lora_A.weight",), "incomplete"),
        ({f"{LEAD}m.fc.lora_diag": ONES[0]}, ("KaSA", "kasa_config is off"), "kasa_config on"),
        ({f"{LEAD}m.fc.lora_E": ONES[0]}, ("AdaLoRA",), "merge"),
        ({f"{LEAD}e.token_adapter.trainable_tokens_delta": ONES}, ("trainable_token",), "config"),
        ({f"{LEAD}m.fc.base_layer.bias": ONES[0]}, ("trained bias", "bias is 'none'"), "set bias"),
        (
            {
                f"{LEAD}e.base_layer.fc.lora_A.weight": ONES,
                f"{LEAD}e.base_layer.fc.lora_B.weight": ONES.T,
            },
            ("e.base_layer.fc", "target_parameters"),
            "merge",
        ),
        (
            {
                f"{LEAD}m.fc.base_layer.lora_A.weight": ONES,
                f"{LEAD}m.fc.base_layer.lora_B.weight": ONES.T,
            },
            ("m.fc.base_layer", "nested"),
            "merge",
        ),
        ({f"{LEAD}m.fc.lora_A.default.weight": ONES}, ("lora_A.default", "not a name"), "save_pre"),
        ({"transformer.ln.bias": ONES[0]}, ("'transformer.ln.bias'", "not a name"), "save_pre"),
        ({"lora_fx.w[0:2].lora_A": ONES}, ("lora_fx.w[0:2].lora_A", "not a name"), ""),
        (
            {f"{LEAD}m.fc.lora_embedding_A": ONES, f"{LEAD}m.fc.lora_embedding_B": ONES.T},
            ("second entry", "m.fc.weight"),
            "edited",
        ),
        ({A: None, B: None}, ("no update",), ""),
    ],
)
def test_tensors(
    plain: Write, tensors: dict[str, Array | None], words: tuple[str, ...], hint: str
) -> None:
    error = refused(plain({}, tensors), "adapter_model.safetensors", *words)
    assert hint in error.hint


def test_nan_in_a_whole_tensor(plain: Write) -> None:
    bad = {f"{LEAD}head.weight": ONES * np.float32("nan")}
    refused(plain({"modules_to_save": ["head"]}, bad), "head.weight", "NaN")


def test_missing_or_broken_config(plain: Write) -> None:
    folder = plain()
    (folder / peft.CONFIG).write_text("{")
    refused(folder, peft.CONFIG, "not valid JSON")
    (folder / peft.CONFIG).write_text("[]")
    refused(folder, peft.CONFIG, "not an object")
    (folder / peft.CONFIG).unlink()
    assert "next to the file" in refused(folder, peft.WEIGHTS, "no config in its metadata").hint


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": 99}, "format 99"),
        ({"entries": []}, "damaged"),
        ({"entries": {"h.weight": {"a": "gone", "b": "gone"}}}, "h.weight"),
        ({"entries": {"h.weight": 3}}, "h.weight"),
        ({"entries": {"h.weight": {"full": []}}}, "h.weight"),
    ],
)
def test_edited_metadata_of_ours(
    mixed: Adapter, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    peft.write(mixed, tmp_path)
    tensors, header = read_tensors(tmp_path / peft.WEIGHTS)
    ours = {**json.loads(header["lora_fx"]), **change}
    write_tensors(tmp_path / peft.WEIGHTS, tensors, {**header, "lora_fx": json.dumps(ours)})
    refused(tmp_path, peft.WEIGHTS, word)


def test_a_layout_that_leaves_an_axis_out(mixed: Adapter, tmp_path: Path) -> None:
    peft.write(mixed, tmp_path)
    tensors, header = read_tensors(tmp_path / peft.WEIGHTS)
    ours = json.loads(header["lora_fx"])
    ours["entries"]["in_proj_weight"]["layout"].update(shape=[8, 6, 1], out=[0], in_=[1])
    write_tensors(tmp_path / peft.WEIGHTS, tensors, {**header, "lora_fx": json.dumps(ours)})
    refused(tmp_path, "in_proj_weight", "layout")


def test_a_tensor_that_does_not_fit_its_layout(mixed: Adapter, tmp_path: Path) -> None:
    peft.write(mixed, tmp_path)
    tensors, header = read_tensors(tmp_path / peft.WEIGHTS)
    name = f"{LEAD}h.0.fc.lora_A.weight"
    tensors[name] = tensors[name][:, :5]
    write_tensors(tmp_path / peft.WEIGHTS, tensors, header)
    refused(tmp_path, "h.0.fc.weight", "A [2, 5]", "'stored': [8, 6]")


def test_a_pattern_without_end_is_refused_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    endless = "(([a-z._0-9])+){1,9}[XYZ]"
    monkeypatch.setattr(regexes, "SECONDS", 0.2)
    regexes.begin()
    start = time.monotonic()
    with pytest.raises(LoraFxError, match=r"takes longer than 0\.2 s"):
        target_modules.wanted_by({"target_modules": endless}, name)
    with pytest.raises(LoraFxError, match="alone or with the other patterns"):
        target_modules.wanted_by({"target_modules": endless}, f"{name}.lora")
    assert time.monotonic() - start < 5
    regexes.begin()


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        (r"q{e<=1}", "k", None),  # fuzzy for regex, plain for re
        (r"q{e<=1}", "q{e<=1}", True),
        (r"a{2}\{x\}", "aa{x}", True),
        (r"layers\.\d{1,2}\.q", "layers.12.q", True),
        (r".*(?i)q", "Q", "error"),
        (r"\p{L}+", "q", "error"),
    ],
)
def test_patterns_are_those_of_re(pattern: str, name: str, hit: bool | str | None) -> None:
    if hit == "error":
        with pytest.raises(regexes.PatternError):
            regexes.matched(pattern, name, "fullmatch")
    else:
        assert bool(regexes.matched(pattern, name, "fullmatch")) == bool(hit)


def test_many_patterns_are_compiled_once() -> None:
    """560 are 80 layers of 7 modules each."""
    names = [f"layers.{i}.m{j}" for i in range(80) for j in range(7)]
    table = Pattern({"rank_pattern": dict.fromkeys(names, 4)}, "rank_pattern", "r", "x")
    start = time.monotonic()
    assert [table.of(name) for name in names] == [4.0] * 560
    assert time.monotonic() - start < 10


def test_groups_that_are_wider_than_a_layer(plain: Write) -> None:
    refused(plain({"use_qalora": True, "qalora_group_size": 1 << 20}), "at most 16777216 elements")


def test_a_target_that_is_no_pattern(plain: Write) -> None:
    refused(plain({"target_modules": "("}), "that target_modules does not name")


@pytest.mark.parametrize(
    ("config", "module", "entry"),
    [
        ({"target_modules": "all-linear"}, "h.0.fc", "all-linear"),
        ({"target_modules": "all-linear"}, "model.embed_tokens", None),
        ({"target_modules": ["fc"], "exclude_modules": "("}, "h.0.fc", None),
    ],
)
def test_what_a_config_wants(config: dict[str, Any], module: str, entry: str | None) -> None:
    assert target_modules.wanted_by(config, module) == entry


def test_a_name_that_is_no_pattern_takes_every_update_off() -> None:
    assert conflicts("h.(", "m.fc")


def test_two_tensors_of_one_name(plain: Write) -> None:
    tensors = {f"{LEAD}score.weight": ONES, f"{LEAD}score.modules_to_save.weight": 2 * ONES}
    refused(plain({"modules_to_save": ["score"]}, tensors), "a second entry for 'score.weight'")
