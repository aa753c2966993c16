"""Layers of a decoder with its cache are traced and translated once, to the file of the long way.

The numbers of both files are those of the model without a cache, which reads the whole sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch.onnx._internal.exporter._building import OpRecorder

import lora_fx
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.decoder import decoder
from lora_fx.fx.capture.repeat import Repeats
from lora_fx.fx.module.doubts import plain
from lora_fx.fx.onnx_export import to_onnx
from lora_fx.onnx.session import open_session
from tests.onnx.decoders import gpt2, llama
from tests.onnx.test_repeat import tree

transformers = pytest.importorskip("transformers")
STEPS = (5, 1, 3, 1)
"""New tokens of each call: a prompt, a token, several, and one past every window."""
WINDOW = 4


def _of(family: str, layers: int, **settings: Any) -> Any:
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config", None)
    if config is None:
        config = getattr(transformers, f"{family}TextConfig")
    model = getattr(transformers, f"{family}ForCausalLM")
    return model(
        config(
            vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
            initializer_range=0.1,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
            **settings,
        )
    ).eval()  # fmt: skip


def qwen2(layers: int) -> Any:
    return _of("Qwen2", layers)


def qwen2_windowed(layers: int) -> Any:
    """Upper layers look back through a window."""
    settings = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
    return _of("Qwen2", layers, **settings)


def mistral(layers: int) -> Any:
    """All layers look back through a window."""
    return _of("Mistral", layers, sliding_window=WINDOW)


def gemma2(layers: int) -> Any:
    """Every other layer looks back through a window."""
    return _of("Gemma2", layers, sliding_window=WINDOW)


def gpt2_by_number(layers: int) -> Any:
    """Each layer divides its scores by its number, so of a layer only the part after is a copy."""
    config = gpt2(layers).config
    config.scale_attn_by_inverse_layer_idx = True
    return transformers.GPT2LMHeadModel(config).eval()


FAMILIES: dict[str, tuple[Callable[[int], Any], int]] = {
    "llama": (llama, 3),
    "gpt2": (gpt2, 3),
    "qwen2": (qwen2, 3),
    "qwen2_windowed": (qwen2_windowed, 3),
    "mistral": (mistral, 3),
    "gemma2": (gemma2, 2),
    "gpt2_by_number": (gpt2_by_number, 3),
}
"""Name → what makes a model of so many layers, and how many calls of blocks are copies at four.

Where a layer is none, its MLP is one: upper layers of `qwen2_windowed`, all of `gpt2_by_number`.
"""


def _by_steps(path: Path, ids: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """What a file gives, call by call, for a sequence in parts."""
    session = open_session(path, "cpu")
    past = {
        i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    results = []
    first = 0
    for new in STEPS:
        last = first + new
        mask = np.ones((len(ids), last), np.int64)
        out = session.run({"input_ids": ids[:, first:last], "attention_mask": mask, **past})
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
        results.append(out)
        first = last
    return results


def _read_from_first(model: ir.Model) -> ir.Model:
    """The same graph, where a size that inputs share is read from the first of them.

    Which of them an export reads it from is by chance, and no other number comes of it.
    """
    places: dict[str, tuple[ir.Value, int]] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim):
                places.setdefault(str(size), (value, axis))
    for node in model.graph:
        if node.op_type != "Shape" or node.inputs[0] not in model.graph.inputs:
            continue
        axis = node.attributes.get_int("start", 0)
        size = node.inputs[0].shape[axis]
        value, axis = places[str(size)]
        node.replace_input_with(0, value)
        node.attributes["start"] = ir.AttrInt64("start", axis)
        node.attributes["end"] = ir.AttrInt64("end", axis + 1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_is_that_of_the_long_way(name: str, tmp_path: Path) -> None:
    make, copies = FAMILIES[name]
    model = make(4)
    captured = decoder(model)
    assert captured.traced(False, captured.named).copies == copies
    lora_fx.export(captured, tmp_path / "short.onnx", cache=True, provider="cpu")
    lora_fx.export(model, tmp_path / "long.onnx", cache=True, provider="cpu", repeat=False)
    files = [ir.load(tmp_path / f"{way}.onnx") for way in ("short", "long")]
    short, long = (tree(_read_from_first(file)) for file in files)
    assert short == long

    ids = np.random.default_rng(0).integers(1, 96, (2, sum(STEPS)))
    with torch.no_grad():
        expected = model(torch.tensor(ids), use_cache=False).logits.numpy()
    first = 0
    by_short, by_long = (_by_steps(tmp_path / f"{way}.onnx", ids) for way in ("short", "long"))
    for ours, theirs, new in zip(by_short, by_long, STEPS, strict=True):
        assert ours.keys() == theirs.keys()
        for output, numbers in ours.items():
            np.testing.assert_array_equal(numbers, theirs[output])
        whole = expected[:, first : first + new]
        assert np.abs(ours["logits"] - whole).max() < 2e-6 * np.abs(whole).max()
        first += new


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_as_many_blocks_are_traced_as_without_a_cache(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer and what is in it, of three."""
    traced: list[str] = []
    trace = Repeats._trace

    def counted(repeats: Any, pattern: Any, *args: Any) -> Any:
        traced.append(type(pattern.block.top).__name__)
        return trace(repeats, pattern, *args)

    monkeypatch.setattr(Repeats, "_trace", counted)
    make, _ = FAMILIES[name]
    model = make(3)
    decoder(model)
    with_cache = Counter(traced)

    traced.clear()
    model.config.use_cache = False
    without = Captured(model, (torch.ones(2, 5, dtype=torch.int64),))
    without.traced(False, without.named)
    assert with_cache == Counter(traced)
    assert set(with_cache.values()) == {1}


def test_layers_cost_no_more_functions_and_inferences(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many calls for three layers as for two, with a cache as without."""
    run, infer = OpRecorder.eval, onnx.shape_inference.infer_node_outputs
    calls: Counter[str] = Counter()

    def counted(*args: Any, **named: Any) -> Any:
        calls["function"] += 1
        return run(*args, **named)

    def inferred(*args: Any) -> Any:
        calls["inference"] += 1
        return infer(*args)

    monkeypatch.setattr(OpRecorder, "eval", counted)
    monkeypatch.setattr(onnx.shape_inference, "infer_node_outputs", inferred)
    counts = []
    for layers in (2, 3):
        module = plain(decoder(llama(layers))).eval()
        calls.clear()
        to_onnx.to_onnx(module)
        counts.append(dict(calls))
    assert counts[0] == counts[1]
    assert min(counts[0].values()) > 10
