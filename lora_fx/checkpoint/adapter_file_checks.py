"""doctor's checks that read only the adapter's file and config. Each check yields findings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from lora_fx.checkpoint.findings import ERROR, WARNING, Finding, about
from lora_fx.checkpoint.pair import Check, Pair
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import finite, is_float
from lora_fx.formats.peft.config import ALORA, KEEPS_BASE, MERGE, REDONE, REFUSED
from lora_fx.formats.peft.file import KINDS, names_variant
from lora_fx.formats.peft.names import PREFIX
from lora_fx.formats.peft.pattern import Pattern
from lora_fx.formats.peft.target_modules import wanted_by
from lora_fx.text import Json, by_key, is_number

GATHER = "if it was saved under ZeRO-3 or FSDP, gather the shards and save it again"
_FACTOR = re.compile(r"\.(lora|hada|lokr)_|\.weight$")


def config(pair: Pair) -> Iterator[Finding]:
    """Check that adapter_config.json exists, and has no setting that a merge cannot apply."""
    if pair.raw.file is None:
        return  # not of PEFT
    if not pair.raw.config:
        yield Finding(
            [str(pair.path)],
            "no adapter_config.json next to the tensors or inside the file",
            "an adapter_config.json, which holds the ranks, scales and targets",
            "copy it from the source of the adapter",
        )
    peft_type = pair.raw.config.get("peft_type")
    if pair.raw.config and peft_type not in KINDS and not names_variant(peft_type):
        yield Finding(["peft_type"], f"peft_type = {peft_type!r}", " or ".join(KINDS), MERGE)
    for name, (why, hint) in REFUSED.items():
        value = pair.raw.config.get(name)
        if value not in (None, False, [], {}, ""):
            yield Finding([name], f"{name} = {value!r}: {why}", f"{name} off", hint)
    if pair.raw.config.get(ALORA):
        yield Finding(
            [ALORA, *pair.adapter.entries],
            "an aLoRA, which acts from its invocation tokens on: no weight can hold it",
            f"{ALORA} off",
            "export it with --mode switch or --mode batch",
        )


def scale(pair: Pair) -> Iterator[Finding]:
    """Check that lora_alpha (`alpha` for LoHa and LoKr) is a number. OFT has none."""
    peft_type = pair.raw.config.get("peft_type")
    if peft_type not in KINDS or peft_type == "OFT":
        return
    name = "lora_alpha" if peft_type == "LORA" else "alpha"
    value = pair.raw.config.get(name)
    if not is_number(value) or not np.isfinite(value):
        what = f"no {name}" if value is None else f"{name} = {value!r}"
        yield Finding(
            [name],
            f"{what}; PEFT would silently use 8",
            f"a number: the scale of every update is {name} / r",
            f"add the {name} that the adapter was trained with",
        )


def ranks(pair: Pair) -> Iterator[Finding]:
    """Check that the tensors have the ranks of the config."""
    if not pair.raw.config or pair.raw.config.get("target_parameters"):
        return
    try:
        pattern = Pattern(pair.raw.config, "rank_pattern", "r", "")
    except LoraFxError:
        return  # a finding of patterns
    keys_by_ranks: dict[tuple[int, float], list[str]] = {}
    for key, low in pair.adapter.lowrank.items():
        if key not in pair.raw.updates or not key.endswith(".weight"):
            continue
        rank = pattern.of(key.removesuffix(".weight"))
        if rank is not None and rank != low.rank:
            keys_by_ranks.setdefault((low.rank, rank), []).append(key)
    for (rank_of_tensors, rank), keys in keys_by_ranks.items():
        expected = f"rank {rank:g}, as in the config; otherwise the scale is uncertain"
        yield Finding(keys, f"rank {rank_of_tensors}", expected, "correct r or rank_pattern")


def patterns(pair: Pair) -> Iterator[Finding]:
    """Check that every entry of rank_pattern and alpha_pattern matches a module."""
    keys = [*pair.raw.updates, *pair.adapter.lowrank]  # of modules; of parameters too
    modules = [key.removesuffix(".weight") for key in keys]
    for table, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        try:
            pattern = Pattern(pair.raw.config, table, default, str(pair.path))
        except LoraFxError as error:
            yield Finding(
                [table], error.message, "module patterns with numbers", "correct the config"
            )
            continue
        for module in modules:
            pattern.of(module)
        for name in sorted(pattern.unmatched):
            what, hint = pattern.unused(name)
            yield Finding(
                [name],
                what,
                "the name of a module or the end of one; PEFT silently ignores others",
                "if the name is a mistake, the adapter was trained without this number; correct "
                f"the name, or remove the entry; {hint}",
                WARNING,
            )


def start(pair: Pair) -> Iterator[Finding]:
    """Check that init_lora_weights did not change the base; PiSSA, OLoRA, … need conversion."""
    value = pair.raw.config.get("init_lora_weights", True)
    if value in (True, False, None, *KEEPS_BASE):
        return
    hint = "save it again with save_pretrained(…, path_initial_model_for_weight_conversion=…)"
    severity = ERROR
    if str(value).lower() in REDONE:
        hint = "use lora-fx merge, which subtracts that part too; other tools do not"
        severity = WARNING
    yield Finding(
        list(pair.adapter.lowrank),
        f"init_lora_weights = {value!r}: a part of every base weight was subtracted before "
        "training",
        "a converted adapter; this adapter is wrong on the original weights",
        hint,
        severity,
    )


def dora(pair: Pair) -> Iterator[Finding]:
    """Check that use_dora is on exactly if there are magnitudes."""
    uses_dora = bool(pair.raw.config.get("use_dora"))
    contradicting = [
        key for key, group in pair.raw.updates.items() if ("magnitude" in group.names) != uses_dora
    ]
    if uses_dora:
        yield from about(
            contradicting,
            "use_dora is on, but these layers have no lora_magnitude_vector",
            "a lora_magnitude_vector for each layer",
            "correct use_dora, or save the adapter again",
        )
    else:
        yield from about(
            contradicting,
            "there are lora_magnitude_vector tensors, but use_dora is off: they would be dropped",
            "use_dora true, or no magnitudes",
            "set use_dora to true if it was trained with DoRA",
        )


def _tensors_that(pair: Pair, is_wrong: Callable[[Array], object]) -> list[str]:
    """Return the names of the tensors for which a test is true."""
    return [name for name, value in pair.raw.tensors.items() if is_wrong(value)]


def numbers(pair: Pair) -> Iterator[Finding]:
    """Check that the file has no NaN and no infinity."""
    yield from about(
        _tensors_that(pair, lambda value: is_float(value) and not finite(value)),
        "NaN or infinite values",
        "finite numbers",
        "training has diverged; use an earlier checkpoint",
    )


def dtypes(pair: Pair) -> Iterator[Finding]:
    """Check that factors are floats; merge itself checks the dtypes of whole tensors."""
    whole_tensors: set[str] = set()
    if pair.refusal is None:
        whole_tensors |= set(pair.raw.whole.values())
    wrong = [
        name
        for name in _tensors_that(pair, lambda value: not is_float(value))
        if name not in whole_tensors and _FACTOR.search(name)
    ]
    dtypes_of_wrong = {str(pair.raw.tensors[name].dtype) for name in wrong}
    yield from about(
        wrong,
        f"dtype {', '.join(sorted(dtypes_of_wrong))}",
        "float32, float16 or bfloat16",
        "the adapter was quantised or cast; save it again in a float dtype",
    )


def sizes(pair: Pair) -> Iterator[Finding]:
    """Check that no tensor of the adapter, and no base tensor that it changes, is empty."""
    empty = _tensors_that(pair, lambda value: not value.size)
    yield from about(empty, "size 0", "values", GATHER)
    of_empty_tensors = []
    for key in pair.adapter.entries:
        info = pair.tensor(key)
        if info is not None and 0 in info.shape:
            of_empty_tensors.append(key)
    yield from about(of_empty_tensors, "their tensors in the base have size 0", "weights", GATHER)


def halves(pair: Pair) -> Iterator[Finding]:
    """Check that A and B come in pairs whose shapes fit each other."""
    for key, why in pair.raw.broken.items():
        if "it has" in why:
            yield Finding([key], why, "A and B", "the file is incomplete: save or fetch it again")
        elif "; expected" in why:
            what, _, expected = why.partition("; expected ")
            yield Finding([key], what, expected, "check that A and B come from the same file")


def names(pair: Pair) -> Iterator[Finding]:
    """Check that every tensor has the prefix that PEFT writes."""
    by_prefix = by_key((prefix, name) for name, prefix in pair.raw.prefixes.items())
    for prefix, tensors in by_prefix.items():
        if prefix:
            what = f"names with {prefix!r} before PEFT's prefix"
            hint = f"remove {prefix!r} from the names"
        else:
            what = f"names without the prefix {PREFIX!r}"
            hint = f"add {PREFIX!r} before the names"
        yield Finding(
            tensors,
            f"{what}: PEFT would load none of them",
            f"names such as {PREFIX}MODULE.lora_A.weight",
            hint,
        )


def dropped(pair: Pair) -> Iterator[Finding]:
    """Check that target_modules names every module that the file updates."""
    fields = {**pair.raw.config, "modules_to_save": None, "task_type": None}
    target_modules = fields.get("target_modules")
    if not target_modules or target_modules == "all-linear" or fields.get("target_parameters"):
        return
    left_out = []
    for key, group in pair.raw.updates.items():
        name = group.names.get("a", "")
        if (
            key.endswith(".weight")
            and name.startswith(PREFIX)
            and not _is_target(fields, name, key)
        ):
            left_out.append(key)
    yield from about(
        left_out,
        "target_modules does not name them: PEFT would drop their updates",
        "a target_modules that names every module in the file",
        "correct target_modules in adapter_config.json",
    )


def _is_target(fields: Json, name: str, key: str) -> bool:
    """Whether PEFT would wrap the updated module, or the module around it, in a layer.

    Args:
        fields: The fields of the adapter's config.
        name: The name of the tensor A.
        key: The key of the update.
    """
    outer, _, _ = name.removeprefix(PREFIX).partition(".base_layer.")
    module = key.removesuffix(".weight")
    if wanted_by(fields, module) or wanted_by(fields, outer):
        return True
    return bool(fields.get("ensure_weight_tying"))


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
