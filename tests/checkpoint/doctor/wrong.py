"""Pairs that a merge refuses, and what the doctor has to name of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
from safetensors.numpy import load_file

import lora_fx
from lora_fx import Full, LowRank, Origin
from tests.checkpoint.doctor import pairs, sound
from tests.checkpoint.doctor.sound import codes, image, new_head, normal_rng, simple, tied
from tests.checkpoint.doctor.tiny import (
    ATTN1,
    CONFIGS,
    LINEAR,
    TO_Q,
    Build,
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
from tests.checkpoint.test_dequantise import GOLDEN
from tests.files.quantised.rows import read as read_row

Change = Callable[[dict[str, Array], dict[str, Any]], Any]
A = f"base_model.model.{Q}.lora_A.weight"
B = f"base_model.model.{Q}.lora_B.weight"


def other_base(kind: str, *ends: str, onto: str = "bert", **config: Any) -> Build:
    """An adapter of one kind, and the base of another."""

    def build(folder: Path) -> None:
        base(folder, onto)
        lora(folder, kind, *ends, **config)

    return build


def but(change: Change, *ends: str, kind: str = "llama", **config: Any) -> Build:
    """A sound pair whose adapter is changed."""

    def build(folder: Path) -> None:
        base(folder, kind)
        lora(folder, kind, *(ends or ("q_proj", "v_proj")), **config)
        edit(folder, change)

    return build


def loha(change: Change) -> Build:
    def build(folder: Path) -> None:
        config = peft.LoHaConfig(r=2, init_weights=False, target_modules=["q_proj", "v_proj"])
        peft_folder(folder, pairs.llama(), config)
        edit(folder, change)

    return build


def by_peft(config: Callable[[], Any]) -> Build:
    return lambda folder: peft_folder(folder, pairs.llama(), config())


def put(**fields: Any) -> Change:
    return lambda tensors, config: config.update(fields)


def without(*parts: str) -> Change:
    """Without the tensors whose names hold one of these."""

    def change(tensors: dict[str, Array], config: dict[str, Any]) -> None:
        for name in [n for n in tensors if any(p in n for p in parts)]:
            del tensors[name]

    return change


def value(name: str, made: Callable[[Array], Array]) -> Change:
    """Another value of the first tensor whose name ends so."""

    def change(tensors: dict[str, Array], config: dict[str, Any]) -> None:
        key = next(n for n in sorted(tensors) if n.endswith(name))
        tensors[key] = made(tensors[key])

    return change


def nan(old: Array) -> Array:
    return np.where(np.arange(old.size).reshape(old.shape) == 3, np.float32(np.nan), old)


def cut(name: str) -> Build:
    """A sound pair one of whose files ends too early."""

    def build(folder: Path) -> None:
        base(folder)
        lora(folder, "llama", "q_proj")
        file = folder / name
        file.write_bytes(file.read_bytes()[:-7])

    return build


def unpicked(side: str) -> Build:
    """Pickles, and no --trust."""

    def build(folder: Path) -> None:
        base(folder)
        lora(folder, "llama", "q_proj")
        file, name = {
            "base": ("base/model.safetensors", "base/pytorch_model.bin"),
            "adapter": ("adapter/adapter_model.safetensors", "adapter/adapter_model.bin"),
        }[side]
        pickled(folder / file, folder / name)

    return build


def wide_llama(folder: Path) -> None:
    base(folder)
    both = {Q.replace("0", str(i)): factors(normal_rng(), 32, 32, 2) for i in (0, 1)}
    adapter(folder / "adapter", both, base_model_name_or_path="big-llama")


def one_wide(folder: Path) -> None:
    base(folder)
    wide = {Q: 16, Q.replace("0", "1"): 18}
    both = {module: factors(normal_rng(), 16, n, 2) for module, n in wide.items()}
    adapter(folder / "adapter", both)


def grown(folder: Path) -> None:
    base(folder)
    lora(folder, "llama", "q_proj", whole={"model.embed_tokens.weight": normal(24, 16)},
         modules_to_save=["embed_tokens"])  # fmt: skip


def values_of_base(change: Mapping[str, Array]) -> Build:
    def build(folder: Path) -> None:
        base(folder, change=change)
        lora(folder, "llama", "q_proj")

    return build


def of_other_weights(folder: Path) -> None:
    """An adapter that says which weights it is for."""
    base(folder)
    (folder / "base").rename(folder / "first")
    base(folder)
    tuned = load_file(folder / "first" / "model.safetensors")
    tuned[f"{Q}.weight"] = tuned[f"{Q}.weight"] + normal(16, 2) @ normal(2, 16)
    checkpoint(folder / "tuned", tuned, config=CONFIGS["llama"])
    made = lora_fx.extract(folder / "first", folder / "tuned", rank=2)
    lora_fx.save_adapter(made, folder / "adapter")


def twice(folder: Path) -> None:
    sound.twice(folder)


def more_layers(folder: Path) -> None:
    sound.more_layers(folder)


def shard_missing(folder: Path) -> None:
    base(folder, shards=2)
    lora(folder, "llama", "q_proj")
    (folder / "base" / "model-00002-of-00002.safetensors").unlink()


def no_config(folder: Path) -> None:
    base(folder)
    lora(folder, "llama", "q_proj")
    (folder / "adapter" / "adapter_config.json").unlink()


def dora_of_codes(folder: Path) -> None:
    """DoRA by columns: what codes would keep of it needs norms of the whole weight."""
    codes("nf4 float32 64 64")(folder)
    module = "model.layers.0.mlp"
    name = f"base_model.model.{module}.lora_magnitude_vector"
    rows = read_row(GOLDEN["nf4 float32 64 64"]).shape[0]
    edit(
        folder, lambda t, c: (t.update({name: np.ones(rows, np.float32)}), c.update(use_dora=True))
    )


def dora_of_another_size(folder: Path) -> None:
    dora_of_codes(folder)
    edit(folder, value("magnitude_vector", lambda v: np.ones(5, np.float32)))


def as_codes(name: str, size: float) -> Build:
    return codes(name, size, requantise=True)


def text(folder: Path) -> None:
    """A file of updates of the text encoder alone, onto the unet."""
    base(folder, "unet")
    parts = {"fc1.lora_down.weight": normal(2, 6), "fc1.lora_up.weight": normal(8, 2)}
    kohya(folder, parts, "lora_te_text_model_encoder_layers_0_mlp_")


def unpaired(*lost: str) -> Build:
    return image({n: v for n, v in LINEAR.items() if not any(p in n for p in lost)})


NARROW = LowRank(normal(2, 6), normal(8, 2), 2.0)
CODES = np.zeros((4, 4), np.int32)
WIDE = LowRank(normal(2, 7), normal(8, 2), 2.0)
FP8 = ml_dtypes.float8_e4m3fn
HALF = f"{Q}.weight"
WRONG: dict[str, tuple[Build, tuple[str, ...]]] = {
    # the base is of another model
    "llama onto bert": (
        other_base("llama", "q_proj", base_model_name_or_path="org/llama-x"),
        ("the adapter is for org/llama-x; the base is a bert",),
    ),
    "bert onto llama": (
        other_base(
            "bert", "query", onto="llama",
            auto_mapping={"parent_library": "transformers.models.bert.modeling_bert"},
        ),
        ("the adapter is for a bert; the base is a llama",),
    ),
    "gpt2 onto bert": (other_base("gpt2", "c_attn"), ("transformer.h.0.attn.c_attn", "is a bert")),
    "another width": (wide_llama, ("the adapter is for big-llama; the base is a llama", "32 × 32")),
    "another width of a unet": (
        image({f"{TO_Q}.lora_down.weight": normal(2, 9), f"{TO_Q}.lora_up.weight": normal(8, 2)}),
        (f"; the base has {ATTN1}.to_q.weight: tensor [8, 6]", "8 × 9"),
    ),
    "another width of one layer": (one_wide, (Q.replace("0", "1"), "16 × 18")),
    "a text encoder's onto a unet": (text, ("lora_te_text_model", "; the base has conv_in.weight")),
    "more layers than the base": (more_layers, (Q.replace("0", "7"), "--allow-unused")),
    "other weights of the same model": (of_other_weights, (Q, "trained on")),
    # the file lacks something, or has too much
    "a target's tensors are missing": (
        but(without("1.self_attn.v_proj")), ("model.layers.1.self_attn.v_proj", "--allow-missing")
    ),
    "a target of the config in no layer": (
        but(put(target_modules=["q_proj", "v_proj", "o_proj"])),
        ("self_attn.o_proj", "target_modules"),
    ),
    "loha, a target's tensors are missing": (
        loha(without("1.self_attn.v_proj")), ("model.layers.1.self_attn.v_proj", "--allow-missing")
    ),
    "half a pair": (but(without(B)), (Q, "it has A and no B")),
    "half a loha": (loha(without("q_proj.hada_w2_b")), ("q_proj", "hada_w2_b")),
    "half a kohya pair": (unpaired("lora_up"), (TO_Q, "lora_up")),
    "config missing": (no_config, ("adapter_config.json",)),
    "target_modules leaves it out": (but(put(target_modules=["v_proj"])), (Q, "target_modules")),
    "dora without magnitudes": (but(put(use_dora=True)), (Q, "lora_magnitude_vector")),
    "magnitudes without dora": (
        but(lambda t, c: t.update({f"base_model.model.{Q}.lora_magnitude_vector": normal(16)})),
        (Q, "use_dora"),
    ),
    "a grown vocabulary": (grown, ("model.embed_tokens.weight", "24 rows")),
    # numbers
    "NaN": (but(value("lora_A.weight", nan)), (A, "NaN")),
    "NaN in loha": (loha(value("hada_w1_a", nan)), ("q_proj.hada_w1_a", "NaN")),
    "infinity in kohya": (
        image({**LINEAR, f"{TO_Q}.lora_up.weight": np.full((8, 2), np.inf)}), (TO_Q, "infinite")
    ),
    "int8": (but(value("lora_A.weight", lambda v: v.astype(np.int8))), (A, "int8")),
    "size 0": (but(value("lora_B.weight", lambda v: v[:0])), (B, "size 0")),
    "untrained": (but(lambda t, c: t.update({n: 0 * v for n, v in t.items()})), (Q, "zero")),
    "untrained oft": (
        by_peft(lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"])),
        ("q_proj", "zero"),
    ),
    "beyond float16": (
        lambda folder: (
            base(folder, dtype=np.float16), lora(folder, "llama", "q_proj", lora_alpha=1e8), None
        )[-1],
        (Q, "dtype can hold"),
    ),
    "alpha missing": (but(lambda t, c: c.pop("lora_alpha")), ("lora_alpha",)),
    "alpha missing of loha": (loha(lambda t, c: c.pop("alpha")), ("alpha",)),
    "alpha 0 of kohya": (image({**LINEAR, f"{TO_Q}.alpha": 0.0}), (f"{TO_Q}.alpha", "not 0")),
    "another rank": (but(put(r=8)), (Q, "rank 2", "rank 8")),
    "another rank of loha": (loha(put(r=8)), ("q_proj", "rank 2", "8")),
    "a bad pattern": (but(put(rank_pattern={"(": 2})), ("rank_pattern",)),
    "NaN in the base": (
        values_of_base({HALF: np.full((16, 16), np.nan, np.float32)}), (HALF, "NaN")
    ),
    "an empty tensor in the base": (
        values_of_base({HALF: np.zeros((0,), np.float32)}), (HALF, "size 0")
    ),
    # methods without a weight form, or for another base
    "ia3": (by_peft(lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
            ("IA3", "peft_type")),
    "fourierft": (
        by_peft(lambda: peft.FourierFTConfig(n_frequency=9, target_modules=["q_proj"])),
        ("FOURIERFT",),
    ),
    "prompt tuning's config": (but(put(peft_type="PROMPT_TUNING")), ("PROMPT_TUNING",)),
    "oft of kohya": (image({f"{TO_Q}.oft_blocks": normal(2, 3, 3)}), (TO_Q, "OFT")),
    "alora": (but(put(alora_invocation_tokens=[0])), ("alora_invocation_tokens",)),
    "corda": (but(put(init_lora_weights="corda")), ("corda",)),
    # codes
    "FP8 in blocks": (codes("FP8 128 torch.float32"), ("quantised", "--dequantise")),
    "nf4": (codes("nf4 float32 64 64"), ("quantised", "--dequantise", "--requantise")),
    "dora onto nf4": (dora_of_codes, ("quantised", "--dequantise")),
    "two mistakes": (dora_of_another_size, ("magnitude_vector", "expected 3 numbers")),
    "nf4 as codes that keep little": (as_codes("nf4 float32 64 64", 1e-4), ("keep", "--lossy")),
    "floats that no flag is for": (
        lambda folder: simple("llama", "q_proj")(folder) or {"dequantise": True},
        ("none of its weights is quantised",),
    ),
    "codes that the config tells of": (
        sound.one_file(
            "w.weight", NARROW, {"w.numbers": CODES}, quantization_config={"quant_method": "xyz"}
        ),
        ("quantised base", "w.weight", "xyz, as config.json says"),
    ),
    "codes without their scales": (
        sound.one_file("w.weight", NARROW, {"w.qweight": CODES}),
        ("quantised base", "w.weight", "GPTQ or AWQ"),
    ),
    "int8 replaced by floats": (
        sound.one_file(
            "w.weight", Full(normal(8, 6)), {"w.weight": np.zeros((8, 6), np.int8)}
        ),
        ("'w.weight' is int8", "replaces it by float32"),
    ),
    # what an option of merge would take
    "a tied head": (lambda folder: tied(folder) and None, ("lm_head.weight", "--untie")),
    "a new head": (lambda folder: new_head(folder) and None, ("score.weight", "--add")),
    "merged before": (twice, ("merged", "--again")),
    # names of a tensor that the file stores once
    "one use of a tensor": (
        sound.one_file("alias.weight", replace(NARROW, use="tied.weight")),
        ("tied weights", "'alias.weight' is for one use of 'tied.weight'", "the base stores one"),
    ),
    "another shape than the twin's": (
        sound.one_file("alias.weight", replace(WIDE, origin=Origin(twins=("tied.weight",)))),
        ("shapes", "alias.weight", "8 × 7", "[8, 6]"),
    ),
    # files
    "the adapter is cut off": (cut("adapter/adapter_model.safetensors"), ("adapter_model",)),
    "the base is cut off": (cut("base/model.safetensors"), ("model.safetensors", "cut off")),
    "a shard is missing": (shard_missing, ("model-00002-of-00002", "missing")),
    "a pickled base": (unpicked("base"), ("pytorch_model.bin", "--trust")),
    "a pickled adapter": (unpicked("adapter"), ("adapter_model.bin", "--trust")),
}  # fmt: skip
"""Name → what makes the pair, and what the error has to say."""
