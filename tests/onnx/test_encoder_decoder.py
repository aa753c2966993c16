"""Encoder-decoders with their cache: the tokens of transformers' generate, from two files."""

from __future__ import annotations

import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.decoder import decoder
from lora_fx.fx.capture.encoder_decoder import encoder_of
from lora_fx.onnx import Session
from lora_fx.onnx.session import open_session
from tests.onnx.encoder_decoders import FAMILIES
from tests.onnx.test_decoder import with_delta

pytest.importorskip("transformers")
SAMPLES = Path(__file__).parents[2] / "samples"
greedy: Any = runpy.run_path(str(SAMPLES / "greedy_pairs.py"))["greedy"]
STEPS, START = 12, 2
IDS = np.array([[5, 17, 29, 31, 8, 77, 12], [44, 3, 61, 0, 0, 0, 0], [90, 33, 21, 4, 9, 0, 0]])
CASES = [
    ("whisper", "switch"),
    *(
        pytest.param(name, mode, marks=pytest.mark.slow)
        for name in FAMILIES
        for mode in ("merged", "switch")
        if (name, mode) != ("whisper", "switch")
    ),
]


def source(name: str) -> dict[str, Any]:
    """What the encoder reads: three rows, of which two have padding where it reads tokens."""
    if name == "whisper":
        draws = np.random.default_rng(0)
        return {"input_features": draws.standard_normal((3, 6, 28)).astype(np.float32)}
    return {"input_ids": IDS, "attention_mask": (IDS > 0).astype(np.int64)}


def adapter(parts: list[Captured], seed: int, rank: int) -> Adapter:
    """A random one for every layer's weights of both parts."""
    entries = {}
    for part in parts:
        for target in lora_fx.find(part).targets:
            if re.search(r"\.\d+\.", target.key) and "relative" not in target.key:
                a, b = draw(target.key, target.layout, rank, seed, "probe")
                entries[target.key] = lora_fx.LowRank(a, b, 0.5 * rank, target.layout)
    return Adapter(entries)


def generated(model: Any, inputs: dict[str, Any]) -> Any:
    """The tokens of transformers' own greedy loop; Whisper's class has one of its own around it."""
    from transformers import GenerationMixin

    first = torch.full((3, 1), START)
    call = {name: torch.tensor(x) for name, x in inputs.items()}
    out = GenerationMixin.generate(
        model, **call, decoder_input_ids=first, max_new_tokens=STEPS, do_sample=False
    )
    return out.numpy()


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_two_files_give_the_tokens_of_generate(name: str, mode: str, tmp_path: Path) -> None:
    model, inputs = FAMILIES[name](), source(name)
    step = decoder(model)
    encoder_part = encoder_of(step)
    adapters = {
        "de": adapter([encoder_part, step], 1, 3), "fr": adapter([encoder_part, step], 2, 5),
    }  # fmt: skip
    chosen: Any = adapters if mode == "switch" else adapters["de"]
    path = tmp_path / "x.onnx"
    report = lora_fx.export(
        step, path, adapters=chosen, cache=True, mode=mode, provider="cpu", probe="none"
    )
    files = {"x.onnx", "x-encoder.onnx"}
    if mode == "switch":
        files |= {f"{n}{part}.onnx_adapter" for n in adapters for part in ("", "-encoder")}
    assert {Path(file).name for file in report.outputs} == files
    assert {file.name for file in tmp_path.iterdir()} == files
    past = "past_key_values.0.decoder.key"
    of_steps = [row.sizes for row in report.parity if past in row.sizes]
    steps = {sizes["input_ids"][1] for sizes in of_steps}
    pasts = {sizes[past][2] for sizes in of_steps}
    assert {5, 7, 11, 1} <= steps and {3, 0, 4, 2} <= pasts
    check_names(tmp_path, name)

    chosen_names: list[str | None] = [None, "de", "fr"] if mode == "switch" else ["de"]
    found = []
    for n in chosen_names:
        runs = [run_of(tmp_path, f, n, mode) for f in ("x-encoder", "x")]
        tokens = greedy(*runs, inputs, START, STEPS)
        expected = generated(with_delta(model, adapters[n] if n else None), inputs)
        np.testing.assert_array_equal(tokens, expected)
        found.append(tokens)
    found.append(generated(model, inputs))
    assert all((tokens != found[0]).any() for tokens in found[1:-1])
    if mode == "merged":
        assert (found[0] != found[1]).any()


def run_of(folder: Path, file: str, name: str | None, mode: str) -> Any:
    """The run of a file, with an adapter where it is switchable."""
    path = folder / f"{file}.onnx"
    if mode == "merged":
        return open_session(path, "cpu").run
    session = Session(path, "cpu")
    if name is None:
        return session.run
    session.load(name, folder / f"{name}{file[1:]}.onnx_adapter")
    return partial(session.run, adapter=name)


def check_names(folder: Path, name: str) -> None:
    """The contract of names, which is that of other exporters' decoders with a past."""
    step, encoder = onnx.load(folder / "x.onnx").graph, onnx.load(folder / "x-encoder.onnx").graph
    reads = ["input_features"] if name == "whisper" else ["input_ids", "attention_mask"]
    crossed = [f"{i}.encoder.{kind}" for i in range(2) for kind in ("key", "value")]
    own = [text.replace("encoder", "decoder") for text in crossed]
    weights = {tensor.name for tensor in step.initializer}
    weights |= {tensor.name for tensor in encoder.initializer}
    assert [v.name for v in encoder.input if v.name not in weights] == reads
    assert [v.name for v in encoder.output] == [
        "last_hidden_state", *(f"present.{text}" for text in crossed),
    ]  # fmt: skip
    taken = {v.name for v in step.input if v.name not in weights}
    mask = set() if name == "whisper" else {"encoder_attention_mask"}
    assert taken == {"input_ids", *mask, *(f"past_key_values.{t}" for t in (*own, *crossed))}
    assert [v.name for v in step.output] == ["logits", *(f"present.{text}" for text in own)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mode": "batch"}, "mode='batch' with cache=True is for models without an encoder"),
        ({"mode": "load"}, "mode='load' with cache=True"),
        ({"mode": "switch", "include": "q_proj"}, "include or exclude with cache=True"),
        ({"quantise": "int8"}, "quantise with cache=True"),
    ],
)
def test_what_two_files_do_not_have_is_refused(
    more: dict[str, Any], words: str, tmp_path: Path, step: Captured
) -> None:
    given = {} if more.get("mode") != "batch" else {"adapters": {"de": adapter([step], 1, 2)}}
    with pytest.raises(LoraFxError, match=words):
        lora_fx.export(step, tmp_path / "x.onnx", cache=True, **given, **more)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_acts_from_a_token_on_is_refused(tmp_path: Path, step: Captured) -> None:
    invoked = Adapter(adapter([step], 1, 2).entries, {"invocation": [5, 17]})
    with pytest.raises(LoraFxError, match="de is an aLoRA"):
        lora_fx.export(
            step, tmp_path / "x.onnx", adapters={"de": invoked}, cache=True, mode="switch"
        )
    assert not list(tmp_path.iterdir())


def test_an_existing_encoder_file_is_not_replaced(tmp_path: Path, step: Captured) -> None:
    (tmp_path / "x-encoder.onnx").write_text("mine")
    with pytest.raises(LoraFxError, match="exists"):
        lora_fx.export(step, tmp_path / "x.onnx", cache=True)
    assert [file.name for file in tmp_path.iterdir()] == ["x-encoder.onnx"]


def test_an_encoder_that_reads_something_else_is_refused(tmp_path: Path) -> None:
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    config = Speech2TextConfig(
        vocab_size=96, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=36,
    )  # fmt: skip
    model = Speech2TextForConditionalGeneration(config).eval()
    with pytest.raises(LoraFxError, match="its encoder reads input_features"):
        lora_fx.export(model, tmp_path / "x.onnx", cache=True)


@pytest.fixture(scope="module")
def step() -> Captured:
    return decoder(FAMILIES["bart"]())
