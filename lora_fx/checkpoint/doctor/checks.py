"""doctor's checks of an adapter against its base. A check yields its findings."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lora_fx.adapter.experts import Family, family_of
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Entry, Rotation
from lora_fx.checkpoint.doctor.pair import ERROR, NOTE, WARNING, Finding, Pair, norm, sample
from lora_fx.checkpoint.fold import arithmetic
from lora_fx.checkpoint.match import model_types
from lora_fx.checkpoint.merge_plan import Given, MergePlan, make_plan
from lora_fx.checkpoint.provenance import base_note, history
from lora_fx.checkpoint.renaming import absent_of
from lora_fx.checkpoint.requantise import HINT, refuse_loss, sampled, stored_as
from lora_fx.dtypes import FLOATING, Array, finfo
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.read import scheme_of
from lora_fx.files.safetensors import finite, is_float
from lora_fx.formats.peft.config import KEEPS_BASE, MERGE, REDONE, REFUSED, Pattern, wanted_by
from lora_fx.formats.peft.file import KINDS
from lora_fx.formats.peft.names import PREFIX
from lora_fx.formats.servers import READS, SERVERS, STAYS, seen, verdicts
from lora_fx.targets.target import base_name
from lora_fx.text import Json, is_number, near

LARGE = 1.0
"""‖ΔW‖/‖W‖ above which an update is worth a look: usual ones are below .3."""
TAKEN = (
    "lora-fx merge quantises anew and reports how much of the update arrives: least of a weak one"
)
_VOCABULARY = re.compile(
    r"(^|\.)(\w*embed\w*|wte|shared|lm_head|embed_out|output_projection|word_embeddings)\.\w+$"
)


def _about(keys: Sequence[str], found: str, expected: str, hint: str) -> Iterator[Finding]:
    """An error of all these keys; nothing where there are none."""
    if keys:
        yield Finding(keys, found, expected, hint)


def _lost(pair: Pair) -> list[str]:
    """Keys of updates that the base has no tensor for."""
    updates = (k for k, e in pair.adapter.entries.items() if not isinstance(e, Full))
    return [k for k in updates if pair.tensor(k) is None]


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
    more, less = pair.rename.more, pair.rename.less
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
    lost = [m for m in absent_of(pair.adapter, pair.tensors, pair.rename) if m not in broken]
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
        have, width = (in_, out) if entry.op == "embedding" else (out, in_)
    else:
        return None
    return (have, rows) if width == dim and have != rows else None


def vocabulary(pair: Pair) -> Iterator[Finding]:
    """Embedding and head have the base's number of rows."""
    for key in pair.misfits:
        rows = _rows(pair, key)
        if rows:
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
        info, name = pair.tensor(key), pair.rename(base_name(key))
        scheme, info = scheme_of(name, pair.base.tensors), pair.base.tensors.get(name, info)
        if scheme or (info is not None and info.dtype not in FLOATING and key not in pair.misfits):
            why = ""
            try:
                taken = info is not None and stored_as(name, info, pair.base, [entry])
            except LoraFxError as error:
                taken, why = None, error.message.partition(" a scale a row: ")[2]
            kind = scheme or (info.dtype if info else "")
            if not taken and why and info is not None and info.dtype == "int8":
                kind += f": {why}"
            severity = WARNING if taken else ERROR
            kinds.setdefault((kind, severity), []).append(key)
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
    yield from _about(
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
    return abs(low.scale) > scale or norm(low) > top * math.sqrt(math.prod(info.shape))


def effect(pair: Pair) -> Iterator[Finding]:
    """No update is larger than its weight."""
    never = [k for k, low in pair.adapter.lowrank.items() if _overflows(pair, k, low)]
    yield from _about(
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


# doctor's checks that ask the plan of a merge, or what a merge has left. They yield findings.


TOLD: Json = dict.fromkeys(
    ("untie", "again", "any_base", "other_readers", "allow_unused", "allow_missing", "add"), True
)
"""The options of a merge that takes what one of the checks has told already."""


def _plan(pair: Pair, entries: Mapping[str, Entry], *, lenient: bool = False) -> MergePlan:
    """What merge would do with these entries; `lenient` takes what a check has told already."""
    adapter, options = replace(pair.adapter, entries=entries), pair.options
    options = replace(options, **TOLD) if lenient else options
    return make_plan(pair.base, [Given(adapter, 1.0, str(pair.path), pair.digest)], options)


def planned(pair: Pair, told: Collection[str] = ()) -> MergePlan | LoraFxError:
    """The plan of `lora-fx merge`, or why there is none.

    Args:
        pair: The pair.
        told: Keys of which a check has told; the others are planned, as if that were mended.
    """
    if pair.refusal is not None and not told:
        return pair.refusal
    rest = {k: e for k, e in pair.adapter.entries.items() if k not in told}
    try:
        plan = _plan(pair, rest, lenient=bool(told))
        if pair.options.requantise and not pair.options.lossy:
            anew = [(c.codes, c.fold) for c in plan.changes.values() if c.codes and c.fold]
            refuse_loss(sampled(anew), "the output")
    except LoraFxError as error:
        return error
    return plan


def tied(pair: Pair) -> Iterator[Finding]:
    """No update of one use of a tensor that is both embedding and output head."""
    if pair.tie is None:
        return
    sound = {k: e for k, e in pair.adapter.entries.items() if k not in pair.misfits}
    try:
        plan = _plan(pair, sound, lenient=True)
    except LoraFxError:
        return  # another check, or the last, tells
    yield from _about(
        plan.one_use,
        f"it is one of two uses of one tensor: {pair.tie.table} is also the output head",
        "an update of both uses, or a base whose head is a tensor of its own",
        "lora-fx merge --untie gives the head a tensor of its own; other tools change both",
    )


def merged(pair: Pair) -> Iterator[Finding]:
    """The adapter is not in the base already."""
    folded = {a.get("hash") for m in history(pair.base) for a in m["adapters"]}
    if pair.digest in folded:
        yield Finding(
            list(pair.adapter.entries),
            "the base's metadata says that this adapter is merged into it",
            "the original base",
            "start from the original; lora-fx merge --again merges it once more",
        )


def added(pair: Pair) -> Iterator[Finding]:
    """Whole tensors that the base lacks, such as a new head."""
    yield from _about(
        [k for k in pair.adapter.full if pair.tensor(k) is None],
        "whole tensors that the base has not, such as a new head",
        "tensors of the base",
        "lora-fx merge --add writes them into the output",
    )


# doctor's checks of an adapter's file and config by themselves. A check yields its findings.


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
    if pair.raw.config and kind not in KINDS:
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
        yield from _about(
            odd,
            "use_dora is on, but they have no lora_magnitude_vector",
            "a magnitude for each",
            "correct use_dora, or save the adapter again",
        )
    else:
        yield from _about(
            odd,
            "lora_magnitude_vector tensors, but use_dora is off: they would be dropped",
            "use_dora true, or no magnitudes",
            "set use_dora to true if it was trained with DoRA",
        )


def _bad(pair: Pair, test: Callable[[Array], object]) -> list[str]:
    return [name for name, value in pair.raw.tensors.items() if test(value)]


def numbers(pair: Pair) -> Iterator[Finding]:
    """No NaN, no infinity."""
    yield from _about(
        _bad(pair, lambda value: is_float(value) and not finite(value)),
        "NaN or infinite values",
        "finite numbers",
        "training has diverged; use an earlier checkpoint",
    )


def dtypes(pair: Pair) -> Iterator[Finding]:
    """Float tensors."""
    names = _bad(pair, lambda value: not is_float(value))
    names = [n for n in names if re.search(r"\.(lora|hada|lokr)_|\.weight$", n)]
    yield from _about(
        names,
        f"dtype {', '.join(sorted({str(pair.raw.tensors[n].dtype) for n in names}))}",
        "float32, float16 or bfloat16",
        "the adapter was quantised or cast; save it again in a float dtype",
    )


def sizes(pair: Pair) -> Iterator[Finding]:
    """No empty tensors, in the adapter or in what it changes of the base."""
    yield from _about(_bad(pair, lambda value: not value.size), "size 0", "values", GATHER)
    empty = [k for k in pair.adapter.entries if (t := pair.tensor(k)) and 0 in t.shape]
    yield from _about(empty, "their tensors of the base have size 0", "weights", GATHER)


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
    by_prefix: dict[str, list[str]] = {}
    for name, prefix in pair.raw.prefixes.items():
        by_prefix.setdefault(prefix, []).append(name)
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
    fields = {**pair.raw.config, "modules_to_save": None}
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
    yield from _about(
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
    low = pair.adapter.lowrank.items()
    zero = [k for k, e in low if e.magnitude is None and not e.mutated and norm(e) == 0.0]
    turns = ((k, e) for k, e in pair.adapter.entries.items() if isinstance(e, Rotation))
    zero += [k for k, e in turns if not e.turn.any()]
    if not zero:
        return
    whole = len(zero) == len(pair.adapter.entries)
    yield Finding(
        zero,
        "A or B is zero: untrained" + (", and so is every other update" if whole else ""),
        "an update",
        "was the adapter saved before training?" if whole else "did a gradient reach them?",
        ERROR if whole else WARNING,
    )


def served(pair: Pair, server: str) -> Iterator[Finding]:
    """What a program would make of the adapter, by the table of `lora_fx.formats.servers`."""
    types = model_types(pair.base.config())
    family = family_of(types) or Family()
    shapes = {name: array.shape for name, array in pair.raw.tensors.items()}
    found = seen(shapes, pair.raw.config, family)
    for rule, names in verdicts(server, found, family, types):
        what = f"{SERVERS[server]} {rule.outcome} {rule.said} ({rule.source})"
        if rule.outcome == READS:
            yield Finding(names, what, "", "", NOTE)
            continue
        hint = f"lora-fx convert --format {server} --base {pair.base.path}"
        hint = "lora-fx merge folds it into its base" if rule.what in STAYS else hint
        yield Finding(names, what, "what it applies as it was trained", hint)
    if not shapes:
        yield Finding([], "a file of another format", "one of PEFT's", "lora-fx convert -o FOLDER")
