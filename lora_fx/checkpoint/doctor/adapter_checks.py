"""doctor's checks of an adapter's file and config by themselves. A check yields its findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lora_fx.checkpoint.doctor.pair import WARNING, Finding, Pair, norm
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import is_float
from lora_fx.formats.peft.config import REDONE, REFUSED, Pattern, wanted_by
from lora_fx.formats.peft.names import PREFIX
from lora_fx.text import Json

GATHER = "saved under ZeRO-3 or FSDP without gathering the shards; gather, then save again"
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def config(pair: Pair) -> Iterator[Finding]:
    """adapter_config.json is there, and says nothing that has no weight form."""
    if pair.raw is None:
        return
    if not pair.fields:
        yield Finding(
            [str(pair.path)],
            "no adapter_config.json beside the tensors or inside the file",
            "one: ranks, scales and targets are stored there",
            "take it from where the adapter comes from",
        )
    for name, (why, hint) in REFUSED.items():
        value = pair.fields.get(name)
        if value not in (None, False, [], {}, ""):
            yield Finding([name], f"{name} = {value!r}: {why}", "it off", hint)


def scale(pair: Pair) -> Iterator[Finding]:
    """lora_alpha is a number."""
    if pair.raw is None or not pair.fields:
        return
    value = pair.fields.get("lora_alpha")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not np.isfinite(value):
        found = "no lora_alpha" if value is None else f"lora_alpha = {value!r}"
        yield Finding(
            ["lora_alpha"],
            f"{found}; PEFT would take 8 without a word",
            "a number: the scale of every update is lora_alpha / r",
            "add the lora_alpha that the adapter was trained with",
        )


def ranks(pair: Pair) -> Iterator[Finding]:
    """The ranks of the tensors are those of the config."""
    if pair.raw is None or not pair.fields or pair.fields.get("target_parameters"):
        return
    try:
        pattern = Pattern(pair.fields, "rank_pattern", "r", "")
    except LoraFxError:
        return  # told by patterns
    for key, low in pair.adapter.lowrank.items():
        want = pattern.of(key.removesuffix(".weight"))
        if key in pair.raw.updates and key.endswith(".weight") and want not in (None, low.rank):
            yield Finding(
                [key],
                f"rank {low.rank}",
                f"rank {want:g}, as the config says: the scale would be in doubt",
                "correct r or rank_pattern",
            )


def patterns(pair: Pair) -> Iterator[Finding]:
    """Every entry of rank_pattern and alpha_pattern matches a module of the adapter."""
    if pair.raw is None:
        return
    keys = [*pair.raw.updates, *pair.adapter.lowrank]  # of modules; of parameters too
    modules = [k.removesuffix(".weight") for k in keys]
    for table, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        try:
            pattern = Pattern(pair.fields, table, default, str(pair.path))
        except LoraFxError as error:
            yield Finding([table], error.message, "patterns and numbers", "correct the config")
            continue
        for module in modules:
            pattern.of(module)
        for name in sorted(pattern.unmatched):
            found, hint = pattern.unused(name)
            yield Finding(
                [name],
                found,
                "a module's name or the end of one; PEFT ignores it without a word",
                "is it a mistake in the name? then the adapter was trained without its number; "
                f"correct it, or take it out; {hint}",
                WARNING,
            )


def start(pair: Pair) -> Iterator[Finding]:
    """init_lora_weights left the base as it is: no PiSSA, OLoRA, … that was not converted."""
    value = pair.fields.get("init_lora_weights", True)
    if value in KEEPS_BASE:
        return
    redone = str(value).lower() in REDONE
    yield Finding(
        list(pair.adapter.lowrank),
        f"init_lora_weights = {value!r}: a part of every base weight was taken off before training",
        "an adapter that was converted: on the original weights this one is wrong",
        "lora-fx merge takes that part off again; other tools do not"
        if redone
        else "save it again with save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        WARNING if redone else "",
    )


def dora(pair: Pair) -> Iterator[Finding]:
    """use_dora is on where there are magnitudes, and off where there are none."""
    if pair.raw is None:
        return
    on = bool(pair.fields.get("use_dora"))
    have = [k for k, p in pair.raw.updates.items() if "magnitude" in p.names]
    if have and not on:
        yield Finding(
            have,
            "lora_magnitude_vector tensors, but use_dora is off: they would be dropped",
            "use_dora true, or no magnitudes",
            "set use_dora to true if it was trained with DoRA",
        )
    lost = [k for k, p in pair.raw.updates.items() if "magnitude" not in p.names]
    if on and lost:
        yield Finding(
            lost,
            "use_dora is on, but they have no lora_magnitude_vector",
            "a magnitude for each",
            "correct use_dora, or save the adapter again",
        )


def _bad(pair: Pair, test: Callable[[Array], object]) -> list[str]:
    return [name for name, value in pair.arrays.items() if test(value)]


def numbers(pair: Pair) -> Iterator[Finding]:
    """No NaN, no infinity."""

    def broken(value: Array) -> bool:
        with np.errstate(all="ignore"):
            return is_float(value) and not np.isfinite(value.astype(np.float64)).all()

    names = _bad(pair, broken)
    if names:
        yield Finding(
            names,
            "NaN or infinite values",
            "finite numbers",
            "training has diverged; use an earlier checkpoint",
        )


def dtypes(pair: Pair) -> Iterator[Finding]:
    """Float tensors."""
    names = _bad(pair, lambda value: not is_float(value))
    names = [n for n in names if ".lora_" in n or n.endswith(".weight")]
    if names:
        kinds = ", ".join(sorted({str(pair.arrays[n].dtype) for n in names}))
        yield Finding(
            names,
            f"dtype {kinds}",
            "float32, float16 or bfloat16",
            "the adapter was quantised or cast; save it again in a float dtype",
        )


def sizes(pair: Pair) -> Iterator[Finding]:
    """No empty tensors, in the adapter or in what it changes of the base."""
    names = _bad(pair, lambda value: not value.size)
    if names:
        yield Finding(names, "size 0", "values", GATHER)
    empty = [k for k in pair.adapter.entries if (t := pair.tensor(k)) and 0 in t.shape]
    if empty:
        yield Finding(empty, "their tensors of the base have size 0", "weights", GATHER)


def halves(pair: Pair) -> Iterator[Finding]:
    """A and B come in pairs whose shapes fit each other."""
    for key, why in (pair.raw.broken if pair.raw else {}).items():
        if "it has" in why:
            yield Finding([key], why, "A and B", "the file is incomplete: save or fetch it again")
        elif "; expected" in why:
            found, _, expected = why.partition("; expected ")
            yield Finding([key], found, expected, "do A and B come from the same file?")


def names(pair: Pair) -> Iterator[Finding]:
    """Every tensor has the prefix that PEFT writes."""
    by_prefix: dict[str, list[str]] = {}
    for name, prefix in (pair.raw.prefixes if pair.raw else {}).items():
        by_prefix.setdefault(prefix, []).append(name)
    for prefix, these in by_prefix.items():
        what = f"the prefix {prefix!r} before PEFT's" if prefix else f"no prefix {PREFIX!r}"
        yield Finding(
            these,
            f"names with {what}: PEFT would load none of them",
            f"{PREFIX}MODULE.lora_A.weight and so on",
            f"take {prefix!r} off the names" if prefix else f"put {PREFIX!r} before the names",
            "" if pair.refusal else WARNING,
        )


def dropped(pair: Pair) -> Iterator[Finding]:
    """target_modules has every module that the file has an update of."""
    if pair.raw is None or not pair.fields.get("target_modules"):
        return
    fields = {**pair.fields, "modules_to_save": None}
    if pair.fields["target_modules"] == "all-linear" or pair.fields.get("target_parameters"):
        return
    out = [
        key
        for key, part in pair.raw.updates.items()
        if key.endswith(".weight")
        and part.names.get("a", "").startswith(PREFIX)
        and not _named(fields, part.names["a"], key)
    ]
    if out:
        yield Finding(
            out,
            "target_modules leaves them out: PEFT would drop their updates",
            "names in target_modules for all that the file holds",
            "correct target_modules in adapter_config.json",
        )


def _named(fields: Json, name: str, key: str) -> bool:
    outer = name.removeprefix(PREFIX).partition(".base_layer.")[0]
    tied = fields.get("ensure_weight_tying")
    return any(wanted_by(fields, m) for m in (key.removesuffix(".weight"), outer)) or bool(tied)


def trained(pair: Pair) -> Iterator[Finding]:
    """Updates that are zero: B (or A) was never moved from its start."""
    zero = [k for k, low in pair.adapter.lowrank.items() if norm(low) == 0.0]
    if not zero:
        return
    whole = len(zero) == len(pair.adapter.entries)
    yield Finding(
        zero,
        "A or B is zero: untrained" + (", and so is every other update" if whole else ""),
        "an update",
        "was the adapter saved before training?" if whole else "did a gradient reach them?",
        "" if whole else WARNING,
    )
