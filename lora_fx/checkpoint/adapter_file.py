"""What doctor checks of an adapter's file and config by themselves; a check yields findings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from lora_fx.checkpoint.pair import ERROR, WARNING, Check, Finding, Pair, about
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import finite, is_float
from lora_fx.formats.peft.config import KEEPS_BASE, MERGE, REDONE, REFUSED, Pattern, wanted_by
from lora_fx.formats.peft.file import KINDS, names_variant
from lora_fx.formats.peft.names import PREFIX
from lora_fx.text import Json, by_key, is_number

GATHER = "saved under ZeRO-3 or FSDP without gathering the shards; gather, then save again"


def config(pair: Pair) -> Iterator[Finding]:
    """adapter_config.json is there, and says nothing that has no weight form."""
    if pair.raw.file is None:
        return  # not of PEFT
    if not pair.raw.config:
        yield Finding(
            [str(pair.path)],
            "no adapter_config.json beside the tensors or inside the file",
            "one: ranks, scales and targets are stored there",
            "take it from where the adapter comes from",
        )
    kind = pair.raw.config.get("peft_type")
    if pair.raw.config and kind not in KINDS and not names_variant(kind):
        yield Finding(["peft_type"], f"peft_type = {kind!r}", " or ".join(KINDS), MERGE)
    for name, (why, hint) in REFUSED.items():
        value = pair.raw.config.get(name)
        if value not in (None, False, [], {}, ""):
            yield Finding([name], f"{name} = {value!r}: {why}", "it off", hint)


def scale(pair: Pair) -> Iterator[Finding]:
    """lora_alpha is a number; alpha, of LoHa and LoKr. OFT has none."""
    kind = pair.raw.config.get("peft_type")
    if kind not in KINDS or kind == "OFT":
        return
    name = "lora_alpha" if kind == "LORA" else "alpha"
    value = pair.raw.config.get(name)
    if not is_number(value) or not np.isfinite(value):
        found = f"no {name}" if value is None else f"{name} = {value!r}"
        yield Finding(
            [name],
            f"{found}; PEFT would take 8 without a word",
            f"a number: the scale of every update is {name} / r",
            f"add the {name} that the adapter was trained with",
        )


def ranks(pair: Pair) -> Iterator[Finding]:
    """The ranks of the tensors are those of the config."""
    if not pair.raw.config or pair.raw.config.get("target_parameters"):
        return
    try:
        pattern = Pattern(pair.raw.config, "rank_pattern", "r", "")
    except LoraFxError:
        return  # told by patterns
    wrong: dict[tuple[int, float], list[str]] = {}
    for key, low in pair.adapter.lowrank.items():
        want = pattern.of(key.removesuffix(".weight"))
        known = key in pair.raw.updates and key.endswith(".weight")
        if known and want is not None and want != low.rank:
            wrong.setdefault((low.rank, want), []).append(key)
    for (rank, want), keys in wrong.items():
        expected = f"rank {want:g}, as the config says: the scale would be in doubt"
        yield Finding(keys, f"rank {rank}", expected, "correct r or rank_pattern")


def patterns(pair: Pair) -> Iterator[Finding]:
    """Every entry of rank_pattern and alpha_pattern matches a module of the adapter."""
    keys = [*pair.raw.updates, *pair.adapter.lowrank]  # of modules; of parameters too
    modules = [k.removesuffix(".weight") for k in keys]
    for table, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        try:
            pattern = Pattern(pair.raw.config, table, default, str(pair.path))
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
    value = pair.raw.config.get("init_lora_weights", True)
    if value in (True, False, None, *KEEPS_BASE):
        return
    redone = str(value).lower() in REDONE
    yield Finding(
        list(pair.adapter.lowrank),
        f"init_lora_weights = {value!r}: a part of every base weight was taken off before training",
        "an adapter that was converted: on the original weights this one is wrong",
        "lora-fx merge takes that part off again; other tools do not"
        if redone
        else "save it again with save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        WARNING if redone else ERROR,
    )


def dora(pair: Pair) -> Iterator[Finding]:
    """use_dora is on where there are magnitudes, and off where there are none."""
    on = bool(pair.raw.config.get("use_dora"))
    odd = [k for k, p in pair.raw.updates.items() if ("magnitude" in p.names) != on]
    if on:
        yield from about(
            odd,
            "use_dora is on, but they have no lora_magnitude_vector",
            "a magnitude for each",
            "correct use_dora, or save the adapter again",
        )
    else:
        yield from about(
            odd,
            "lora_magnitude_vector tensors, but use_dora is off: they would be dropped",
            "use_dora true, or no magnitudes",
            "set use_dora to true if it was trained with DoRA",
        )


def _bad(pair: Pair, test: Callable[[Array], object]) -> list[str]:
    return [name for name, value in pair.raw.tensors.items() if test(value)]


def numbers(pair: Pair) -> Iterator[Finding]:
    """No NaN, no infinity."""
    yield from about(
        _bad(pair, lambda value: is_float(value) and not finite(value)),
        "NaN or infinite values",
        "finite numbers",
        "training has diverged; use an earlier checkpoint",
    )


def dtypes(pair: Pair) -> Iterator[Finding]:
    """Float factors; a whole tensor has the dtype of what it replaces, as a merge tells."""
    whole = {*pair.raw.whole.values()} if pair.refusal is None else set[str]()
    names = [n for n in _bad(pair, lambda value: not is_float(value)) if n not in whole]
    names = [n for n in names if re.search(r"\.(lora|hada|lokr)_|\.weight$", n)]
    yield from about(
        names,
        f"dtype {', '.join(sorted({str(pair.raw.tensors[n].dtype) for n in names}))}",
        "float32, float16 or bfloat16",
        "the adapter was quantised or cast; save it again in a float dtype",
    )


def sizes(pair: Pair) -> Iterator[Finding]:
    """No empty tensors, in the adapter or in what it changes of the base."""
    yield from about(_bad(pair, lambda value: not value.size), "size 0", "values", GATHER)
    empty = [k for k in pair.adapter.entries if (t := pair.tensor(k)) and 0 in t.shape]
    yield from about(empty, "their tensors of the base have size 0", "weights", GATHER)


def halves(pair: Pair) -> Iterator[Finding]:
    """A and B come in pairs whose shapes fit each other."""
    for key, why in pair.raw.broken.items():
        if "it has" in why:
            yield Finding([key], why, "A and B", "the file is incomplete: save or fetch it again")
        elif "; expected" in why:
            found, _, expected = why.partition("; expected ")
            yield Finding([key], found, expected, "do A and B come from the same file?")


def names(pair: Pair) -> Iterator[Finding]:
    """Every tensor has the prefix that PEFT writes."""
    by_prefix = by_key((prefix, name) for name, prefix in pair.raw.prefixes.items())
    for prefix, these in by_prefix.items():
        what = f"the prefix {prefix!r} before PEFT's" if prefix else f"no prefix {PREFIX!r}"
        yield Finding(
            these,
            f"names with {what}: PEFT would load none of them",
            f"{PREFIX}MODULE.lora_A.weight and so on",
            f"take {prefix!r} off the names" if prefix else f"put {PREFIX!r} before the names",
        )


def dropped(pair: Pair) -> Iterator[Finding]:
    """target_modules has every module that the file has an update of."""
    fields = {**pair.raw.config, "modules_to_save": None, "task_type": None}
    listed = fields.get("target_modules")
    if not listed or listed == "all-linear" or fields.get("target_parameters"):
        return
    out = [
        key
        for key, part in pair.raw.updates.items()
        if key.endswith(".weight")
        and part.names.get("a", "").startswith(PREFIX)
        and not _named(fields, part.names["a"], key)
    ]
    yield from about(
        out,
        "target_modules leaves them out: PEFT would drop their updates",
        "names in target_modules for all that the file holds",
        "correct target_modules in adapter_config.json",
    )


def _named(fields: Json, name: str, key: str) -> bool:
    outer = name.removeprefix(PREFIX).partition(".base_layer.")[0]
    tied = fields.get("ensure_weight_tying")
    return any(wanted_by(fields, m) for m in (key.removesuffix(".weight"), outer)) or bool(tied)


OF_FILE: dict[str, Check] = {
    "config": config,
    "alpha": scale,
    "ranks": ranks,
    "patterns": patterns,
    "initialisation": start,
    "dora": dora,
    "finite numbers": numbers,
    "dtypes": dtypes,
    "empty tensors": sizes,
    "pairs": halves,
    "names": names,
    "target_modules": dropped,
}
