"""doctor's checks of a base and an adapter beside each other."""

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
from lora_fx.checkpoint.missing_layers import absent_of
from lora_fx.checkpoint.pair import Pair, sample
from lora_fx.checkpoint.plan_checks import planned
from lora_fx.checkpoint.stored_codes import codes_of, stored_as
from lora_fx.checkpoint.trained_on import base_note
from lora_fx.dtypes import FLOATING, finfo
from lora_fx.errors import LoraFxError
from lora_fx.targets.target import base_name
from lora_fx.text import near

LARGE = 1.0
"""‖ΔW‖/‖W‖ above which an update is worth a look: usual ones are below .3."""


TAKEN = (
    "lora-fx merge quantises anew and reports how much of the update arrives: least of a weak one"
)


_VOCABULARY = re.compile(
    r"(^|\.)(\w*embed\w*|wte|shared|lm_head|embed_out|output_projection|word_embeddings)\.\w+$"
)


def _lost(pair: Pair) -> list[str]:
    """Keys of updates that the base has no tensor for, nor codes of one."""
    updates = (k for k, e in pair.adapter.entries.items() if not isinstance(e, Full))
    absent = [k for k in updates if pair.tensor(k) is None]
    return [k for k in absent if not _codes(pair, k)]


def _codes(pair: Pair, key: str) -> str:
    """The format of the codes that the base has of a key's weight; empty where it has none."""
    return codes_of(pair.rename(base_name(key)), pair.base, pair.base.config())


def _strange(pair: Pair) -> bool:
    """True where no update fits the base: the adapter is another model's."""
    updates = {k for k, e in pair.adapter.entries.items() if not isinstance(e, Full)}
    fit = updates - {*_lost(pair)} - {k for k in pair.misfits if not _rows(pair, k)}
    return bool(updates) and not fit and not _swap(pair) and not pair.raw.prefixes


def model(pair: Pair) -> Iterator[Finding]:
    """The base is of the model that the adapter was trained on."""
    if not _strange(pair):
        return
    config = {**pair.adapter.metadata, **pair.raw.config}
    name, mapping = config.get("base_model_name_or_path"), config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    kind = library.rpartition(".modeling_")[2] if isinstance(library, str) else ""
    keys, own = [*pair.adapter.entries], pair.base.config().get("model_type")
    theirs = f"of a {kind}" if kind else f"of {name}" if name else f"with {keys[0]}"
    ours = f"is a {own}" if own else f"has {next(iter((*pair.misfits, *pair.tensors)), 'nothing')}"
    why = next(iter(pair.misfits.values()), "").partition(": ")[2]
    yield Finding(
        keys,
        f"an adapter {theirs}; the base {ours}" + (f": {why}" if why else ""),
        "an adapter and the model that it was trained on",
        f"give {name} as the base" if name else "which model was it trained on? give that one",
    )


def prefix(pair: Pair) -> Iterator[Finding]:
    """The adapter's names begin as the base's do."""
    more, less = pair.rename.prefix.more, pair.rename.prefix.less
    if pair.raw.prefixes:
        return  # told by names
    if more or less:
        first, *_ = pair.adapter.entries
        how = f"with {more!r} before them" if more else f"without {less!r}"
        yield Finding(
            list(pair.adapter.entries),
            f"the adapter's names are the base's {how}",
            pair.rename(first),
            "lora-fx takes them so; PEFT would apply none of them",
            WARNING,
        )
        return
    lost = _lost(pair)
    if swap := _swap(pair):
        yield Finding(
            lost,
            f"{len(lost)} names begin with {swap[0]!r}",
            f"names that begin with {swap[1]!r}, as the base's",
            f"rename {swap[0]!r} to {swap[1]!r} if the layers are the same",
        )


def _swap(pair: Pair) -> tuple[str, str] | None:
    """(prefix of the adapter, prefix of the base) that would place every lost name.

    None where a name would fall on a tensor that another update has, or on another layer.
    """
    lost = [base_name(k) for k in _lost(pair)]
    if not lost:
        return None
    taken = {pair.rename(base_name(k)) for k in pair.adapter.entries}
    votes: Counter[tuple[str, str]] = Counter()
    parts = lost[0].split(".")
    for i in range(1, len(parts) - 1):
        old, tail = ".".join(parts[:i]) + ".", ".".join(parts[i:])
        ends = [n for n in pair.tensors if n == tail or n.endswith(f".{tail}")]
        votes.update((old, n.removesuffix(tail)) for n in ends)
    for (old, new), _ in votes.most_common():
        if re.sub(r"\d+", "#", old) == re.sub(r"\d+", "#", new):
            continue
        names = {new + k.removeprefix(old) for k in lost}
        if all(k.startswith(old) for k in lost) and names <= {*pair.tensors} - taken:
            return old, new
    return None


def unused(pair: Pair) -> Iterator[Finding]:
    """Every update has a tensor in the base."""
    lost = _lost(pair)
    if lost and not _swap(pair) and not _strange(pair):
        yield Finding(
            lost,
            "no such tensor in the base: their updates would be dropped",
            f"names of {pair.base.path}",
            f"{near(base_name(lost[0]), [*pair.tensors])} lora-fx merge --allow-unused leaves out "
            "those without a tensor",
        )


def missing(pair: Pair) -> Iterator[Finding]:
    """Every layer that the config adapts has an update."""
    if pair.refusal is not None and not pair.raw.updates:
        return  # nobody knows which updates it has
    broken = {k.removesuffix(".weight") for k in pair.raw.broken}
    lost = [m for m in absent_of(pair.adapter, pair.rename) if m not in broken]
    if lost and not _strange(pair) and not _swap(pair):
        yield Finding(
            [f"{m}.weight" for m in lost],
            "the config adapts them (target_modules), but the file has no update of them",
            "an update of each",
            "is the file complete, and is this its base? lora-fx merge --allow-missing leaves "
            "them as they are",
        )


def _rows(pair: Pair, key: str) -> tuple[int, int] | None:
    """(rows of the adapter, rows of the base) of a vocabulary that differs; else None."""
    entry, info = pair.adapter.entries[key], pair.tensor(key)
    if info is None or len(info.shape) != 2 or not _VOCABULARY.search(base_name(key)):
        return None
    rows, dim = info.shape
    if isinstance(entry, Full) and entry.value.ndim == 2:
        have, width = entry.value.shape
    elif isinstance(entry, LowRank) and entry.a.ndim == 2:
        out, in_ = entry.shape
        have, width = (in_, out) if entry.origin.op == "embedding" else (out, in_)
    else:
        return None
    return (have, rows) if width == dim and have != rows else None


def vocabulary(pair: Pair) -> Iterator[Finding]:
    """Embedding and head have the base's number of rows."""
    for key in pair.misfits:
        if rows := _rows(pair, key):
            more = "grown" if rows[0] > rows[1] else "cut"
            yield Finding(
                [key],
                f"{rows[0]} rows: the vocabulary was {more} before training",
                f"{rows[1]} rows, as the base has",
                f"resize the base to {rows[0]} tokens (resize_token_embeddings), save it, and "
                "merge into that",
            )


def shapes(pair: Pair) -> Iterator[Finding]:
    """Every update has the shape of its tensor."""
    for key, why in pair.misfits.items() if not _strange(pair) else ():
        info = pair.tensor(key)
        if not _rows(pair, key) and info is not None and 0 not in info.shape:
            yield Finding(
                [key],
                why.partition("the adapter's ")[2] or why,
                f"one for a tensor {list(info.shape)}",
                "was the adapter trained on another model?",
            )


def quantised(pair: Pair) -> Iterator[Finding]:
    """The tensors to change are plain floats; int8 that merge takes is a warning."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for key, entry in pair.adapter.entries.items():
        name = pair.rename(base_name(key))
        info = pair.base.tensors.get(name, pair.tensor(key))
        scheme = _codes(pair, key)
        if info is None:
            if scheme:
                kinds.setdefault((scheme, ERROR), []).append(key)
            continue
        if not scheme and (info.dtype in FLOATING or key in pair.misfits):
            continue

        kind = scheme or info.dtype
        try:
            int8 = stored_as(name, info, pair.base, [entry])
        except LoraFxError as error:
            why = error.message.partition(" a scale a row: ")[2]
            if why and info.dtype == "int8":
                kind += f": {why}"
            kinds.setdefault((kind, ERROR), []).append(key)
            continue
        if int8 is not None:
            kinds.setdefault((kind, WARNING), []).append(key)
        elif scheme:  # a view of the codes as floats, which a merge takes by option
            kinds.setdefault((kind, ERROR), []).append(key)
    no = planned(pair, ("",)) if kinds else None  # as if all else that is wrong were mended
    ways = "--dequantise or --requantise, as is asked"
    if isinstance(no, LoraFxError):
        ways = no.hint if no.hint.startswith("--dequantise") else HINT
    for (kind, severity), keys in kinds.items():
        hint = ways if severity == ERROR else f"{TAKEN}; to lose nothing, {HINT}"
        yield Finding(keys, f"the base is quantised: {kind}", "float weights", hint, severity)


def base(pair: Pair) -> Iterator[Finding]:
    """The base is the one that the adapter was trained on, where the adapter says."""
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
        yield Finding(
            [], why.removeprefix("the adapter: "), "", "compare a few outputs by hand", NOTE
        )


def values(pair: Pair) -> Iterator[Finding]:
    """The base's tensors hold finite numbers, as far as samples of them tell."""
    known = ((key, pair.tensor(key)) for key in pair.adapter.entries)
    floats = ((key, info) for key, info in known if info is not None and info.dtype in FLOATING)
    broken = [key for key, info in floats if not np.isfinite(sample(info)).all()]
    yield from about(
        broken,
        "their tensors of the base have NaN or infinite values",
        "finite numbers",
        "is the checkpoint damaged?",
    )


def _overflows(pair: Pair, key: str, low: LowRank) -> bool:
    """True where the scale, or ΔW in root mean square, is beyond the range of its tensor."""
    info = pair.tensor(key)
    if info is None or info.dtype not in FLOATING or 0 in info.shape:
        return False
    dtype = pair.options.dtype or info.dtype
    top = float(finfo(dtype).max)
    scale = float(np.finfo(arithmetic(info.dtype, dtype)).max)
    return abs(low.scale) > scale or low.norm > top * math.sqrt(math.prod(info.shape))


def effect(pair: Pair) -> Iterator[Finding]:
    """No update is larger than its weight."""
    never = [k for k, low in pair.adapter.lowrank.items() if _overflows(pair, k, low)]
    yield from about(
        never,
        "the update is beyond what the tensor's dtype can hold",
        "finite numbers",
        "is lora_alpha right?",
    )
    ratios = {k: pair.ratio(k) or 0.0 for k in pair.adapter.lowrank if k not in never}
    large = sorted((k for k, r in ratios.items() if r > LARGE), key=lambda k: -ratios[k])
    if large:
        yield Finding(
            large,
            f"‖ΔW‖/‖W‖ is {ratios[large[0]]:.3g} at {large[0]}",
            f"less than {LARGE:g}; usual updates are below .3",
            "is lora_alpha right, and is this the base?",
            WARNING,
        )
