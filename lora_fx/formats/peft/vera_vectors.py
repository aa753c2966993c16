"""Adapters of the variant vera as PEFT's type VERA.

==============================================  ==================  ===============================
tensor                                          shape               is
==============================================  ==================  ===============================
base_model.vera_A                               [r, widest in]      A; a layer takes its first
                                                                    columns
base_model.vera_B                               [widest out, r]     B; a layer takes its first rows
base_model.model.X.vera_lambda_d                [r]                 λ_d
base_model.model.X.vera_lambda_b                [out]               λ_b
==============================================  ==================  ===============================

PEFT draws A and B again where a file has none of them (save_projection false). Facts: peft 0.21.2,
tuners/vera/model.py and layer.py.
"""

from __future__ import annotations

import re

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry
from lora_fx.adapter.variant import named_variant, variant_of
from lora_fx.adapter.vera import D_INITIAL, WIDEST
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, stamp
from lora_fx.formats.peft.build_config import build_config
from lora_fx.formats.peft.config import ORIGIN, SHARED
from lora_fx.formats.peft.form import form_of
from lora_fx.formats.peft.names import PREFIX
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.formats.peft.target_modules import target_facts, targets
from lora_fx.text import Json, JsonView

A = "base_model.vera_A"
B = "base_model.vera_B"
_KNOWN = SHARED | frozenset((
    "bias", "d_initial", "fan_in_fan_out", "init_weights", "modules_to_save",
    "projection_prng_key", "save_projection", "vera_dropout",
))  # fmt: skip
_OF_LORA = (
    "lora_alpha", "lora_dropout", "init_lora_weights", "rank_pattern", "alpha_pattern",
    "exclude_modules",
)  # fmt: skip
"""Fields of LoraConfig that VeraConfig does not have."""


def read_peft(source: PeftFile, ours: JsonView) -> Adapter:
    """Return an adapter of peft_type VERA: LowRank of variant vera, by the names of the layers.

    Args:
        source: The file; its notes become the adapter's.
        ours: JSON of lora-fx in its header; empty for files of PEFT.

    Raises:
        LoraFxError: A or B is missing, half a pair, another tensor, shapes that do not fit.
    """
    config = source.config
    for field in sorted(set(config) - _KNOWN):
        source.notes.append(f"{source.config_file}: unknown field {field!r} is ignored")
    for name in (A, B):
        if name not in source.tensors:
            raise LoraFxError(
                f"{source.name}: no tensor {name!r}; expected A and B, which PEFT draws again with "
                "torch's generator",
                "save the adapter again with save_projection=True in its VeraConfig",
            )
    a = source.factor(A)
    b = source.factor(B)
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise source.error(
            A, f"has shape {list(a.shape)} and {B!r} {list(b.shape)}; expected [r, in], [out, r]"
        )

    vectors: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        if name in (A, B):
            continue
        module, _, end = name.removeprefix(PREFIX).rpartition(".")
        if end not in ("vera_lambda_d", "vera_lambda_b") or not module:
            raise source.error(
                name,
                "does not belong to VERA; expected only X.vera_lambda_d and X.vera_lambda_b",
                "modules_to_save and biases are not supported here: merge the adapter into its "
                "model with PEFT (merge_and_unload)",
            )
        if not targets(config, module):
            raise source.error(name, "belongs to a module that target_modules does not name")
        vectors.setdefault(module, {})[end] = name
    entries: dict[str, Entry] = {}
    inputs = ours.get("inputs", {})
    for module, names in vectors.items():
        width = inputs.get(module, a.shape[1])
        entries[f"{module}.weight"] = _update(source, names, a[:, :width], b)

    metadata = target_facts(config, vectors, source.name, source.notes)
    metadata |= ours.get("metadata", {})
    metadata.pop(WIDEST, None)
    if len(entries) > 1 and set(vectors) - set(inputs):
        metadata[WIDEST] = True
    metadata |= {field: config[field] for field in ORIGIN if config.get(field)}
    if config.get("fan_in_fan_out"):
        metadata["fan_in_fan_out"] = True
    dropout = float(config.get("vera_dropout") or 0.0)
    return Adapter(entries, {**metadata, "dropout": dropout, "notes": source.notes})


def _update(source: PeftFile, names: dict[str, str], a: Array, b: Array) -> LowRank:
    """Return the update of one layer.

    λ_b tells its outputs. A file of PEFT has nothing to tell its inputs: `within` of the variant
    takes A's first columns when the layer is known.
    """
    if len(names) != 2:
        (name,) = names.values()
        raise source.error(name, "stands alone; expected vera_lambda_d and vera_lambda_b")
    lambda_d = source.numbers(names["vera_lambda_d"], len(a))
    name = names["vera_lambda_b"]
    outputs = source.tensors[name].size
    if outputs > len(b):
        raise source.error(name, f"has {outputs} numbers; {B!r} has {len(b)} rows")
    lambda_b = source.numbers(name, outputs)
    values = {
        "projection_a": a,
        "projection_b": b[:outputs],
        "lambda_d": lambda_d.reshape(-1, 1),
        "lambda_b": lambda_b.reshape(-1, 1),
    }
    vera = named_variant("vera")
    empty = np.zeros((1, 1), np.float32)
    low = LowRank(empty, empty, float(len(a)), variant="vera")
    return vera.with_values(low, values)


def refusal(key: str, entry: object) -> str:
    """Return why PEFT's type VERA cannot hold an entry; empty if it can."""
    if not isinstance(entry, LowRank) or variant_of(entry).name != "vera":
        return "PEFT's type VERA is read here with updates of variant vera alone"
    form = form_of(key, entry)
    if form.kind == "own":
        return form.why
    if form.kind != "linear":
        return "PEFT's VeRA has linear layers alone"
    return ""


def refusal_of_all(adapter: Adapter) -> str:
    """Return why one file of PEFT cannot hold all updates, which `refusal` lets pass one by one."""
    updates = adapter.lowrank.values()
    if len({update.rank for update in updates}) > 1:
        return "PEFT's VeRA has one rank for all layers"
    transposed = {form_of(key, update).transposed for key, update in adapter.lowrank.items()}
    if len(transposed) > 1:
        return "PEFT has one flag fan_in_fan_out for all layers"
    a, b = _projections(adapter)
    for update in updates:
        own_a = update.variant_tensors["projection_a"]
        own_b = update.variant_tensors["projection_b"]
        same = np.array_equal(own_a, a[:, : own_a.shape[1]])
        if not same or not np.array_equal(own_b, b[: len(own_b)]):
            return "PEFT's VeRA has one A and one B for all layers"
    return ""


def _projections(adapter: Adapter) -> tuple[Array, Array]:
    """Return the widest A and the widest B of an adapter's updates."""
    tensors = [update.variant_tensors for update in adapter.lowrank.values()]
    a = max((of["projection_a"] for of in tensors), key=lambda array: array.shape[1])
    b = max((of["projection_b"] for of in tensors), key=len)
    return a, b


def encode(adapter: Adapter, metadata: JsonView) -> tuple[dict[str, Array], Json, Json]:
    """Return the tensors, the config, and lora-fx's JSON of an adapter that VERA can hold.

    Args:
        adapter: `refusal` and `refusal_of_all` are empty for it.
        metadata: What is kept of its metadata.
    """
    a, b = _projections(adapter)
    tensors = {A: np.ascontiguousarray(a), B: np.ascontiguousarray(b)}
    numbers = {}
    inputs = {}
    is_transposed = False
    for key, update in adapter.lowrank.items():
        form = form_of(key, update)
        is_transposed = form.transposed
        numbers[form.module] = (update.rank, 1.0)
        if update.layout is not None or not adapter.metadata.get(WIDEST):
            inputs[form.module] = update.a.shape[-1]
        vectors = update.variant_tensors
        lead = f"{PREFIX}{form.module}.vera_lambda"
        tensors[f"{lead}_d"] = vectors["lambda_d"].reshape(-1)
        # a weight of the adapter, for which VeRA has no number
        tensors[f"{lead}_b"] = vectors["lambda_b"].reshape(-1) * np.float32(update.scale)
    fields = {
        "peft_type": "VERA",
        "fan_in_fan_out": is_transposed,
        "projection_prng_key": 0,
        "save_projection": True,
        "d_initial": D_INITIAL,
        "vera_dropout": float(metadata.get("dropout") or 0.0),
        "init_weights": True,
    }
    config = build_config(numbers, numbers, (), metadata, fields)
    if "exclude_modules" in config:  # VeraConfig has none: a pattern names the modules one by one
        config["target_modules"] = "|".join(re.escape(module) for module in sorted(numbers))
    for field in _OF_LORA:
        config.pop(field, None)
    return tensors, config, {**stamp(), "metadata": dict(metadata), "inputs": inputs}
