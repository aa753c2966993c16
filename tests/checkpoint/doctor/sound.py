"""Pairs that a merge takes: every method and every format of file, float bases and codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
from safetensors.numpy import save_file

import lora_fx
from lora_fx import Adapter, Full, LowRank, Origin
from lora_fx.adapter.updates import Entry
from tests.checkpoint import test_dequantise
from tests.checkpoint.doctor import pairs
from tests.checkpoint.doctor.pairs import LINEAR as LLAMA
from tests.checkpoint.doctor.tiny import (
    BF16,
    CONV,
    CONV1,
    LINEAR,
    TO_Q,
    Build,
    Options,
    Q,
    base,
    edit,
    kohya,
    lora,
    normal,
    peft_folder,
    pickled,
)
from tests.checkpoint.made import Array, adapter, checkpoint, factors
from tests.files.quantised.rows import read as read_row


def simple(kind: str, *ends: str, base_of: Mapping[str, Any] = {}, **config: Any) -> Build:
    """A base of a kind, and PEFT's folder for the modules that end so."""

    def build(folder: Path) -> None:
        base(folder, kind, **base_of)
        lora(folder, kind, *ends, **config)

    return build


def by_peft(model: Any, config: Any) -> Build:
    return lambda folder: peft_folder(folder, model(), config())


def one_file(
    key: str,
    entry: Entry,
    tensors: Mapping[str, Array] = {"tied.weight": normal(8, 6)},
    **config: Any,
) -> Build:
    """A base of these tensors and one more, and our own file of an update of each."""

    def build(folder: Path) -> None:
        stored = {**tensors, "other.weight": normal(8, 6)}
        checkpoint(folder / "base", stored, config=config)
        other = LowRank(normal(2, 6, size=0.1), normal(8, 2, size=0.1), 2.0)
        made = Adapter({key: entry, "other.weight": other})
        lora_fx.save_adapter(made, folder / "adapter.safetensors")

    return build


def image(tensors: Mapping[str, Any], lead: str = "lora_unet_") -> Build:
    def build(folder: Path) -> None:
        base(folder, "unet")
        kohya(folder, tensors, lead)

    return build


def saved(format: str, name: str = "adapter") -> Build:
    """An adapter of two linears in one of our own formats."""

    def build(folder: Path) -> None:
        base(folder)
        made = lora_fx.load_adapter(lora(folder, "llama", "q_proj", "down_proj"))
        (folder / "adapter").rename(folder / "source")
        lora_fx.save_adapter(made, folder / name, format=format, base=folder / "base")

    return build


def classifier(folder: Path) -> None:
    """PEFT names classifier and score for every classifier, and a model has one of them."""
    base(folder, "bert")
    whole = {"classifier.weight": normal(3, 12), "classifier.bias": normal(3)}
    lora(folder, "bert", "query", "value", whole=whole, task_type="SEQ_CLS",
         modules_to_save=["classifier", "score"])  # fmt: skip


def diffusers(folder: Path) -> None:
    base(folder, "unet")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{name}.lora_A.weight": normal(2, 6),
        f"{name}.lora_B.weight": normal(8, 2, size=0.2),
    }
    save_file(tensors, folder / "adapter.safetensors")


def torchtune(folder: Path) -> None:
    base(folder)
    sides = {"attn.q_proj": (16, 16), "attn.output_proj": (16, 16), "mlp.w1": (24, 16)}
    tensors = {}
    for i in (0, 1):
        for name, (out, in_) in sides.items():
            tensors[f"layers.{i}.{name}.lora_a.weight"] = normal(2, in_)
            tensors[f"layers.{i}.{name}.lora_b.weight"] = normal(out, 2, size=0.1)
    made = adapter(folder / "adapter", {}, r=2, lora_alpha=4)
    save_file(tensors, made / "adapter_model.safetensors")


def narrow(folder: Path) -> None:
    base(folder, dtype=BF16)
    lora(folder, "llama", "q_proj")
    edit(folder, lambda t, c: t.update({n: v.astype(BF16) for n, v in t.items()}))


def codes(name: str, size: float = 0.05, shards: int = 3, **options: Any) -> Build:
    """A base of codes as the quantiser's package wrote them, with the option that it needs."""

    def build(folder: Path) -> Options:
        _, key = test_dequantise.base(folder / "base", name, shards)
        weight = read_row(test_dequantise.GOLDEN[name])
        test_dequantise.update(folder / "adapter", weight.shape, key, size)
        return options

    return build


def pickles(folder: Path) -> Options:
    base(folder)
    lora(folder, "llama", "q_proj")
    pickled(folder / "base" / "model.safetensors", folder / "base" / "pytorch_model.bin")
    where = folder / "adapter"
    pickled(where / "adapter_model.safetensors", where / "adapter_model.bin")
    return {"trust": True}


def pickled_codes(folder: Path) -> Options:
    codes("nf4 float32 64 64", shards=1)(folder)
    pickled(folder / "base" / "model.safetensors", folder / "base" / "pytorch_model.bin")
    return {"trust": True, "dequantise": True}


def tied(folder: Path) -> Options:
    base(folder, change={"lm_head.weight": None}, tie_word_embeddings=True)
    adapter(folder / "adapter", {"lm_head": factors(normal_rng(), 20, 16, 2)})
    return {"untie": True}


def normal_rng() -> np.random.Generator:
    return np.random.default_rng(8)


def new_head(folder: Path) -> Options:
    base(folder, change={"lm_head.weight": None})
    lora(folder, "llama", "q_proj", whole={"score.weight": normal(3, 16)},
         modules_to_save=["score"])  # fmt: skip
    return {"add": True}


def more_layers(folder: Path) -> Options:
    base(folder)
    pair = factors(normal_rng(), 16, 16, 2)
    adapter(folder / "adapter", {Q: pair, Q.replace("0", "7"): pair})
    return {"allow_unused": True}


def fewer_layers(folder: Path) -> Options:
    base(folder)
    pair = factors(normal_rng(), 16, 16, 2)
    adapter(folder / "adapter", {Q: pair}, target_modules=["q_proj"])
    return {"allow_missing": True}


def twice(folder: Path) -> Options:
    base(folder)
    lora(folder, "llama", "q_proj")
    (folder / "base").rename(folder / "first")
    lora_fx.merge(folder / "first", folder / "adapter", folder / "base")
    return {"again": True}


def experts(folder: Path) -> None:
    """target_parameters: one pair for a stack of three experts."""
    stack = {"model.layers.0.mlp.experts.up": normal(3, 16, 10)}
    base(folder, change=stack)
    a, b = normal(3 * 2, 16), normal(10, 3 * 2, size=0.1)
    named = {"target_parameters": ["experts.up"], "r": 2, "lora_alpha": 4}
    adapter(folder / "adapter", {"model.layers.0.mlp.experts": (a, b)}, **named)


def bias(folder: Path) -> None:
    base(folder, "bert")
    lora(folder, "bert", "query", bias="lora_only",
         whole={f"bert.encoder.layer.{i}.attention.self.query.bias": normal(12) for i in (0, 1)},
         )  # fmt: skip


def own_file(folder: Path) -> None:
    """insert's and extract's own: parts of a tensor, which PEFT cannot say."""
    base(folder, "gpt2")
    a, b = factors(normal_rng(), 16, 16, 2)
    key = "transformer.h.0.attn.c_attn.weight[:, 0:16]"
    from lora_fx.ir.layout import plain_layout

    layout = plain_layout((16, 16)).transposed()
    entries: dict[str, Any] = {key: LowRank(a, b, 4.0, layout)}
    entries["transformer.h.0.mlp.c_fc.bias"] = Full(normal(64))
    lora_fx.save_adapter(Adapter(entries), folder / "adapter.safetensors")


def lengths(folder: Path) -> None:
    """B is zero, and the rows get other norms all the same."""
    base(folder)
    pair = normal(2, 16), np.zeros((16, 2), np.float32)
    name = f"base_model.model.{Q}.lora_magnitude_vector"
    adapter(folder / "adapter", {Q: pair}, tensors={name: np.ones(16, np.float32)}, use_dora=True)


HADA = {f"{TO_Q}.hada_w{i}_{s}": normal(*shape) for i in (1, 2)
        for s, shape in (("a", (8, 2)), ("b", (2, 6)))}  # fmt: skip


LLAMA_ENDS = tuple(LLAMA)
SOUND: dict[str, Build] = {
    # methods, by PEFT's own code
    "lora of a llama": by_peft(
        pairs.llama, lambda: peft.LoraConfig(init_lora_weights=False, target_modules="all-linear")
    ),
    "dora": by_peft(
        pairs.llama,
        lambda: peft.LoraConfig(init_lora_weights=False, use_dora=True, target_modules=["q_proj"]),
    ),
    "loha": by_peft(
        pairs.llama, lambda: peft.LoHaConfig(r=2, init_weights=False, target_modules=["v_proj"])
    ),
    "lokr": by_peft(
        pairs.llama, lambda: peft.LoKrConfig(r=2, init_weights=False, target_modules=["up_proj"])
    ),
    "oft": by_peft(
        pairs.llama,
        lambda: peft.OFTConfig(
            r=0, oft_block_size=4, init_weights=False, target_modules=["q_proj"]
        ),
    ),
    "loha of convolutions": by_peft(
        pairs.Convolutions,
        lambda: peft.LoHaConfig(r=2, init_weights=False, target_modules=["stem", "mix"]),
    ),
    "a classifier by PEFT": by_peft(
        pairs.bert,
        lambda: peft.LoraConfig(
            init_lora_weights=False, task_type="SEQ_CLS", target_modules=["query", "value"]
        ),
    ),
    "dora, magnitudes alone": lengths,
    # the same, and others, by names and shapes
    "rslora with ranks": simple(
        "llama", "q_proj", "down_proj", use_rslora=True, rank_pattern={"q_proj": 2}, r=2
    ),
    "all linears": simple("llama", *LLAMA_ENDS),
    "embeddings": simple("llama", "q_proj", "lm_head"),
    "a classifier": classifier,
    "bert": simple("bert", "query", "dense"),
    "gpt2": simple("gpt2", "c_attn", "c_fc", fan_in_fan_out=True),
    "gpt2, square": simple("gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    "trained biases": bias,
    "experts": experts,
    # files of image models
    "kohya": image({**LINEAR, **CONV, f"{TO_Q}.alpha": 1.0, f"{CONV1}.alpha": 4.0}),
    "kohya without alpha": image({**LINEAR, **CONV}),
    "kohya, lora_unet_unet_": image({**LINEAR, f"{TO_Q}.alpha": 1.0}, "lora_unet_unet_"),
    "kohya, lycoris_": image(LINEAR, "lycoris_"),
    "kohya with tucker": image({
        f"{CONV1}.lora_down.weight": normal(2, 8, 1, 1),
        f"{CONV1}.lora_mid.weight": normal(2, 2, 3, 3, size=0.1),
        f"{CONV1}.lora_up.weight": normal(10, 2, 1, 1),
    }),
    "kohya with dora": image({**LINEAR, f"{TO_Q}.dora_scale": np.abs(normal(8, 1)) + 1}),
    "LyCORIS loha": image(HADA),
    "LyCORIS lokr": image({f"{TO_Q}.lokr_w1": normal(2, 3), f"{TO_Q}.lokr_w2": normal(4, 2)}),
    "LyCORIS differences": image({
        f"{TO_Q}.diff": normal(8, 6), f"{TO_Q}.diff_b": normal(8), "conv_norm_out.w_norm": normal(8)
    }),
    "diffusers": diffusers,
    "torchtune": torchtune,
    # files of ours, and how they lie
    "one file": saved("peft", "adapter.safetensors"),
    "onnx_adapter": saved("onnx_adapter", "adapter.onnx_adapter"),
    "gguf": saved("gguf", "adapter.gguf"),
    "mlx": saved("mlx", "adapter"),
    "kohya of ours": saved("kohya", "adapter.safetensors"),
    "parts of a tensor": own_file,
    "bfloat16": narrow,
    "shards": simple("llama", "q_proj", base_of={"shards": 3}),
    "float16 base": simple("llama", "q_proj", base_of={"dtype": np.float16}),
    "pickles": pickles,
    # what an option of merge takes
    "FP8 in blocks, as floats": codes("FP8 128 torch.float32", 0.001, dequantise=True),
    "nf4, as floats": codes("nf4 float32 64 64", dequantise=True),
    "pickled nf4, as floats": pickled_codes,
    "nf4, as codes": codes("nf4 float32 64 64", 0.2, requantise=True),
    "a tied head": tied,
    "a new head": new_head,
    "more layers than the base": more_layers,
    "fewer layers than the config": fewer_layers,
    "merged before": twice,
    "whole numbers, replaced whole": one_file(
        "ids.weight",
        Full(np.arange(12, dtype=np.int32).reshape(3, 4)),
        {"ids.weight": np.zeros((3, 4), np.int32)},
    ),
    # names of a tensor that the file stores once
    "a whole tensor under its twin's name": one_file(
        "untied.weight", Full(normal(8, 6), True, ("tied.weight",))
    ),
    "an update under its twin's name": one_file(
        "untied.weight",
        LowRank(
            normal(2, 6, size=0.1), normal(8, 2, size=0.1), 2.0,
            origin=Origin(twins=("tied.weight",)),
        ),
    ),
}  # fmt: skip
"""Name → what makes the pair, and returns the options of the merge that is meant."""
