"""doctor's checks of whether an adapter fits its base."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.checkpoint.findings import ERROR, NOTE, WARNING, Finding, about
from lora_fx.checkpoint.fold import arithmetic
from lora_fx.checkpoint.int8 import HINT
from lora_fx.checkpoint.missing_layers import missing_layers_of
from lora_fx.checkpoint.pair import Pair, sample
from lora_fx.checkpoint.plan_checks import planned
from lora_fx.checkpoint.stored_codes import codes_of, stored_as
from lora_fx.checkpoint.trained_on import base_note
from lora_fx.dtypes import FLOATING, finfo
from lora_fx.errors import LoraFxError
from lora_fx.targets.keys import base_name
from lora_fx.text import JsonView, near

LARGE = 1.0
"""‖ΔW‖/‖W‖ above which an update is worth a look: usual ones are below .3."""


TAKEN = (
    "lora-fx merge quantises again and reports how much of each update is kept; weak ones lose most"
)


_VOCABULARY = re.compile(
    r"(^|\.)(\w*embed\w*|wte|shared|lm_head|embed_out|output_projection|word_embeddings)\.\w+$"
)


def _unmatched(pair: Pair) -> list[str]:
    """Keys of updates for which the base has neither a tensor nor its codes."""
    keys = []
    for key in _updates(pair):
        if pair.tensor(key) is None and not _codes(pair, key):
            keys.append(key)
    return keys


def _updates(pair: Pair) -> list[str]:
    """The keys of an adapter that do not replace a tensor whole."""
    entries = pair.adapter.entries
    return [key for key, entry in entries.items() if not isinstance(entry, Full)]


def _codes(pair: Pair, key: str) -> str:
    """The format of the codes of a key's weight in the base; empty if the base has none."""
    return codes_of(pair.rename(base_name(key)), pair.base, pair.base.config())


def _is_of_other_model(pair: Pair) -> bool:
    """True where no update fits the base: the adapter is another model's."""
    updates = set(_updates(pair))
    misfits = {key for key in pair.misfits if not _vocabulary_sizes(pair, key)}
    fitting = updates - {*_unmatched(pair)} - misfits
    if not updates or fitting or pair.raw.prefixes:
        return False
    return _other_prefix(pair) is None


def model(pair: Pair) -> Iterator[Finding]:
    """Check that the base is the kind of model that the adapter was trained on."""
    if not _is_of_other_model(pair):
        return
    config = {**pair.adapter.metadata, **pair.raw.config}
    name = config.get("base_model_name_or_path")
    keys = [*pair.adapter.entries]
    model_type = _trained_model_type(config)
    if model_type:
        theirs = f"is for a {model_type}"
    elif name:
        theirs = f"is for {name}"
    else:
        theirs = f"has {keys[0]}"

    base_type = pair.base.config().get("model_type")
    first_tensor = next(iter((*pair.misfits, *pair.tensors)), "nothing")
    ours = f"is a {base_type}" if base_type else f"has {first_tensor}"
    _, _, why = next(iter(pair.misfits.values()), "").partition(": ")
    reason = f": {why}" if why else ""
    hint = "give the model that the adapter was trained on as the base"
    if name:
        hint = f"give {name} as the base"
    yield Finding(
        keys,
        f"the adapter {theirs}; the base {ours}{reason}",
        "the model that the adapter was trained on",
        hint,
    )


def _trained_model_type(config: JsonView) -> str:
    """The model type in an adapter's auto_mapping; empty where there is none."""
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if not isinstance(library, str):
        return ""
    _, _, model_type = library.rpartition(".modeling_")
    return model_type


def prefix(pair: Pair) -> Iterator[Finding]:
    """Check that the adapter's names begin as the base's do."""
    extra_prefix = pair.rename.prefix.more
    missing_prefix = pair.rename.prefix.less
    if pair.raw.prefixes:
        return  # a finding of `names`
    if extra_prefix or missing_prefix:
        how = (
            f"with {extra_prefix!r} before them" if extra_prefix else f"without {missing_prefix!r}"
        )
        keys = list(pair.adapter.entries)
        yield Finding(
            keys,
            f"the adapter's names are the base's names {how}",
            pair.rename(keys[0]),
            "lora-fx accepts these names; PEFT would apply none of the updates",
            WARNING,
        )
        return
    prefixes = _other_prefix(pair)
    if prefixes is not None:
        theirs, ours = prefixes
        unmatched = _unmatched(pair)
        yield Finding(
            unmatched,
            f"{len(unmatched)} names begin with {theirs!r}",
            f"names that begin with {ours!r}, as in the base",
            f"rename {theirs!r} to {ours!r} if the layers are the same",
        )


def _other_prefix(pair: Pair) -> tuple[str, str] | None:
    """(prefix of the adapter, prefix of the base) that would place every unmatched name.

    None where a name would fall on a tensor that another update has, or on another layer.
    """
    unmatched = [base_name(key) for key in _unmatched(pair)]
    if not unmatched:
        return None
    updated = {pair.rename(base_name(key)) for key in pair.adapter.entries}
    free = {*pair.tensors} - updated
    for (theirs, ours), _ in _prefixes_of(unmatched[0], pair).most_common():
        if re.sub(r"\d+", "#", theirs) == re.sub(r"\d+", "#", ours):
            continue
        renamed = {ours + name.removeprefix(theirs) for name in unmatched}
        if all(name.startswith(theirs) for name in unmatched) and renamed <= free:
            return theirs, ours
    return None


def _prefixes_of(name: str, pair: Pair) -> Counter[tuple[str, str]]:
    """(prefix of the name, prefix of a tensor) pairs that would match the name, with counts."""
    votes: Counter[tuple[str, str]] = Counter()
    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        theirs = ".".join(parts[:i]) + "."
        tail = ".".join(parts[i:])
        for tensor in pair.tensors:
            if tensor == tail or tensor.endswith(f".{tail}"):
                votes[theirs, tensor.removesuffix(tail)] += 1
    return votes


def unused(pair: Pair) -> Iterator[Finding]:
    """Check that every update has a tensor in the base."""
    unmatched = _unmatched(pair)
    if unmatched and not _other_prefix(pair) and not _is_of_other_model(pair):
        nearest = near(
            base_name(unmatched[0]), [*pair.tensors], "run lora-fx targets BASE for the names;"
        )
        yield Finding(
            unmatched,
            "the base has no such tensors: these updates would be dropped",
            f"names of tensors in {pair.base.path}",
            f"{nearest} lora-fx merge --allow-unused leaves these updates out",
        )


def missing(pair: Pair) -> Iterator[Finding]:
    """Check that every layer that the config adapts has an update."""
    if pair.refusal is not None and not pair.raw.updates:
        return  # nobody knows which updates it has
    broken = {key.removesuffix(".weight") for key in pair.raw.broken}
    absent = [name for name in missing_layers_of(pair.adapter, pair.rename) if name not in broken]
    if absent and not _is_of_other_model(pair) and not _other_prefix(pair):
        yield Finding(
            [f"{name}.weight" for name in absent],
            "target_modules in the config names these layers, but the file has no updates for them",
            "an update for each",
            "check that the file is complete and that this is its base; lora-fx merge "
            "--allow-missing leaves these layers unchanged",
        )


def _vocabulary_sizes(pair: Pair, key: str) -> tuple[int, int] | None:
    """(rows of the adapter, rows of the base) of a vocabulary that differs; else None."""
    entry = pair.adapter.entries[key]
    info = pair.tensor(key)
    if info is None or len(info.shape) != 2 or not _VOCABULARY.search(base_name(key)):
        return None
    if isinstance(entry, Full) and entry.value.ndim == 2:
        rows, width = entry.value.shape
    elif isinstance(entry, LowRank) and entry.a.ndim == 2:
        rows, width = entry.shape
        if entry.origin.op == "embedding":
            width, rows = entry.shape
    else:
        return None
    base_rows, base_width = info.shape
    if width != base_width or rows == base_rows:
        return None
    return rows, base_rows


def vocabulary(pair: Pair) -> Iterator[Finding]:
    """Check that embedding and head have the base's number of rows."""
    for key in pair.misfits:
        sizes = _vocabulary_sizes(pair, key)
        if sizes is None:
            continue
        rows, base_rows = sizes
        change = "grown" if rows > base_rows else "cut"
        yield Finding(
            [key],
            f"{rows} rows: the vocabulary was {change} before training",
            f"{base_rows} rows, as in the base",
            f"resize the base to {rows} tokens (resize_token_embeddings), save it, and merge into "
            "that",
        )


def shapes(pair: Pair) -> Iterator[Finding]:
    """Check that every update has the shape of its tensor."""
    if _is_of_other_model(pair):
        return
    for key, why in pair.misfits.items():
        info = pair.tensor(key)
        if info is None or 0 in info.shape or _vocabulary_sizes(pair, key):
            continue
        _, _, update = why.partition("the adapter's ")
        yield Finding(
            [key],
            update or why,
            f"an update for a tensor {list(info.shape)}",
            "was the adapter trained on another model?",
        )


def quantised(pair: Pair) -> Iterator[Finding]:
    """Check that the tensors to change are plain floats; int8 that merge takes is a warning."""
    keys_by_kind: dict[tuple[str, str], list[str]] = {}
    for key in pair.adapter.entries:
        kind_and_severity = _kind_of_codes(pair, key)
        if kind_and_severity is not None:
            keys_by_kind.setdefault(kind_and_severity, []).append(key)
    if not keys_by_kind:
        return

    refusal = planned(pair, ("",))  # as if all other errors were corrected
    advice = "merge with --dequantise or --requantise, as requested"
    if isinstance(refusal, LoraFxError):
        advice = HINT
        if refusal.hint.startswith("--dequantise"):
            advice = refusal.hint
    for (kind, severity), keys in keys_by_kind.items():
        hint = advice
        if severity != ERROR:
            hint = f"{TAKEN}; to lose nothing, {HINT}"
        yield Finding(keys, f"the base is quantised: {kind}", "float weights", hint, severity)


def _kind_of_codes(pair: Pair, key: str) -> tuple[str, str] | None:
    """The format of the codes that a key would change, and the severity of that.

    None for a plain float tensor, and for one that the base lacks.
    """
    name = pair.rename(base_name(key))
    info = pair.base.tensors.get(name, pair.tensor(key))
    scheme = _codes(pair, key)
    if info is None:
        if not scheme:
            return None
        return scheme, ERROR
    if not scheme and (info.dtype in FLOATING or key in pair.misfits):
        return None

    kind = scheme or info.dtype
    try:
        int8 = stored_as(name, info, pair.base, [pair.adapter.entries[key]])
    except LoraFxError as error:
        _, _, why = error.message.partition(" one scale for each row: ")
        if why and info.dtype == "int8":
            kind += f": {why}"
        return kind, ERROR
    if int8 is not None:
        return kind, WARNING
    if scheme:  # a view of the codes as floats, which a merge takes by option
        return kind, ERROR
    return None


def base(pair: Pair) -> Iterator[Finding]:
    """Check that the base is the one that the adapter says it was trained on."""
    try:
        why = base_note(pair.adapter, "the adapter", pair.base, pair.tensors, any_base=False)
    except LoraFxError as error:
        yield Finding(
            list(pair.adapter.lowrank),
            error.message.removeprefix("the adapter: "),
            "the weights that it was trained on",
            error.hint,
        )
        return
    if why:
        message = why.removeprefix("the adapter: ")
        yield Finding([], message, "", "compare a few outputs by hand", NOTE)


def values(pair: Pair) -> Iterator[Finding]:
    """Check that samples of the base's tensors hold finite numbers."""
    broken = []
    for key in pair.adapter.entries:
        info = pair.tensor(key)
        if info is None or info.dtype not in FLOATING:
            continue
        if not np.isfinite(sample(info)).all():
            broken.append(key)
    yield from about(
        broken,
        "their tensors in the base have NaN or infinite values",
        "finite numbers",
        "is the checkpoint damaged?",
    )


def _overflows(pair: Pair, key: str, low: LowRank) -> bool:
    """True where the scale, or ΔW in root mean square, is beyond the range of its tensor."""
    info = pair.tensor(key)
    if info is None or info.dtype not in FLOATING or 0 in info.shape:
        return False
    dtype = pair.options.dtype or info.dtype
    largest_scale = float(np.finfo(arithmetic(info.dtype, dtype)).max)
    if abs(low.scale) > largest_scale:
        return True
    largest = float(finfo(dtype).max)
    return low.norm > largest * math.sqrt(math.prod(info.shape))


def effect(pair: Pair) -> Iterator[Finding]:
    """Check that no update is larger than its weight."""
    overflowing: list[str] = []
    ratios: dict[str, float] = {}
    for key, low in pair.adapter.lowrank.items():
        if _overflows(pair, key, low):
            overflowing.append(key)
        else:
            ratios[key] = pair.ratio(key) or 0.0
    yield from about(
        overflowing,
        "the update is larger than the tensor's dtype can hold",
        "finite numbers",
        "is lora_alpha right?",
    )

    large = [key for key, ratio in ratios.items() if ratio > LARGE]
    large.sort(key=lambda key: -ratios[key])
    if large:
        yield Finding(
            large,
            f"‖ΔW‖/‖W‖ is {ratios[large[0]]:.3g} at {large[0]}",
            f"less than {LARGE:g}; usual updates are below .3",
            "is lora_alpha right, and is this the base?",
            WARNING,
        )
