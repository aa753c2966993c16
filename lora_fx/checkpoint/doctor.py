"""doctor: everything that is wrong with a base and an adapter, not only what is found first.

A check is a row of CHECKS: its name, and a function from the Pair to its findings. Only headers
and samples of the base are read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_fx.adapter.fused import Family, family_of
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Entry, Rotation, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.adapter_file import OF_FILE
from lora_fx.checkpoint.fold import arithmetic
from lora_fx.checkpoint.match import model_types
from lora_fx.checkpoint.merge_plan import Given, MergeOptions, MergePlan, make_plan
from lora_fx.checkpoint.pair import ERROR, NOTE, WARNING, Finding, Pair, about, open_pair, sample
from lora_fx.checkpoint.provenance import base_note, history, refuse_again
from lora_fx.checkpoint.refusal import (
    BASE,
    MERGED,
    MISSING,
    READ_TOO,
    SHAPES,
    TIED,
    UNUSED,
    MergeRefusal,
)
from lora_fx.checkpoint.renaming import absent_of
from lora_fx.checkpoint.requantise import HINT, codes_of, refuse_loss, sampled, stored_as
from lora_fx.compare import Report
from lora_fx.dtypes import FLOATING, finfo
from lora_fx.errors import LoraFxError, expect_name, expect_path, explained, visible
from lora_fx.files.hub import local
from lora_fx.files.read import trusting
from lora_fx.formats.registry import FORMATS
from lora_fx.formats.servers import READS, SERVERS, STAYS, seen, verdicts
from lora_fx.targets.target import base_name
from lora_fx.text import Json, StrPath, near, some, table

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


# doctor's checks that ask the plan of a merge, or what a merge has left. They yield findings.


TAKEN_BY: Mapping[str, tuple[str, ...]] = {
    UNUSED: ("allow_unused",),
    MISSING: ("allow_missing",),
    TIED: ("untie",),
    BASE: ("any_base",),
    MERGED: ("again",),
    READ_TOO: ("other_readers",),
    "new tensors": ("add",),
    "quantised base": ("dequantise", "requantise"),
}
"""Check → the options of a merge, each of which takes what it finds."""
LENIENT: Json = {names[0]: True for names in TAKEN_BY.values() if len(names) == 1}
"""The options of a merge that takes what one of the checks has found already."""


def _plan(pair: Pair, entries: Mapping[str, Entry], *, lenient: bool = False) -> MergePlan:
    """What merge would do with these entries; `lenient` takes what a check has told already."""
    adapter, options = replace(pair.adapter, entries=entries), pair.options
    options = replace(options, **LENIENT) if lenient else options
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
    yield from about(
        plan.one_use,
        f"it is one of two uses of one tensor: {pair.tie.table} is also the output head",
        "an update of both uses, or a base whose head is a tensor of its own",
        "lora-fx merge --untie gives the head a tensor of its own; other tools change both",
    )


def merged(pair: Pair) -> Iterator[Finding]:
    """The adapter is not in the base already."""
    try:
        refuse_again(pair.base.path, history(pair.base), [("it", pair.digest)], again=False)
    except MergeRefusal:
        yield Finding(
            list(pair.adapter.entries),
            "the base's metadata says that this adapter is merged into it",
            "the original base",
            "start from the original; lora-fx merge --again merges it once more",
        )


def added(pair: Pair) -> Iterator[Finding]:
    """Whole tensors that the base lacks, such as a new head."""
    yield from about(
        [k for k in pair.adapter.full if pair.tensor(k) is None],
        "whole tensors that the base has not, such as a new head",
        "tensors of the base",
        "lora-fx merge --add writes them into the output",
    )


def trained(pair: Pair) -> Iterator[Finding]:
    """Updates that are zero: B (or A) was never moved from its start."""
    low = pair.adapter.lowrank.items()
    sums = [(k, e) for k, e in low if not e.mutated and not variant_of(e).reads_weight]
    zero = [k for k, e in sums if e.norm == 0.0]
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
        hint = f"lora-fx convert {pair.path} -o OUT --format {server} --base {pair.base.path}"
        hint = "lora-fx merge folds it into its base" if rule.what in STAYS else hint
        yield Finding(names, what, "what it applies as it was trained", hint)
    if not shapes:
        yield Finding(
            [],
            "a file of another format",
            "one of PEFT's",
            f"lora-fx convert {pair.path} -o FOLDER",
        )


# All checks, and what they come to.


CHECKS = {
    **OF_FILE,
    "model": model,
    "prefix": prefix,
    UNUSED: unused,
    MISSING: missing,
    "vocabulary": vocabulary,
    SHAPES: shapes,
    TIED: tied,
    "quantised base": quantised,
    BASE: base,
    "base values": values,
    MERGED: merged,
    "new tensors": added,
    "training": trained,
    "effect": effect,
}
LAST = "merge"
"""The check that says what no other has: lora-fx merge would take the pair."""

BY_READER = {*OF_FILE, "model"}
"""Checks of the adapter by itself, and whether it is of the base's model: what its reader tells."""
VALUES = ("base values", "training", "effect")
"""Checks of numbers, which a merge sees as it is carried out, and its plan does not."""
SERVED = "server"
"""The check of what a program makes of the adapter, where one is named."""


def doctor(
    base: StrPath,
    adapter: StrPath,
    server: str | None = None,
    *,
    how: str = "sum",
    rank: int | None = None,
    dtype: str | None = None,
    allow_unused: bool = False,
    untie: bool = False,
    add: bool = False,
    again: bool = False,
    allow_missing: bool = False,
    any_base: bool = False,
    other_readers: bool = False,
    trust: bool = False,
    dequantise: bool = False,
    requantise: bool = False,
    lossy: bool = False,
    max_shard_size: int | str | None = None,
) -> Report:
    """What is wrong with a base and an adapter.

    Args:
        base: A Hugging Face folder or a `.safetensors` file.
        adapter: A file or folder that `lora_fx.load_adapter` reads, or would if it were sound.
        server: vllm, sglang or peft: also say what that program would read, misread or drop.
        how: As in `lora_fx.merge`, with which the pair is to be merged; so are those below.
        rank: As there.
        dtype: As there.
        allow_unused: As there.
        untie: As there.
        add: As there.
        again: As there.
        allow_missing: As there.
        any_base: As there.
        other_readers: As there.
        trust: Read pickles, by torch's unpickler that runs no code.
        dequantise: As there.
        requantise: As there.
        lossy: As there.
        max_shard_size: As there.

    Returns:
        A Report that is true where no finding is an error; `details["findings"]` has them all,
        `details["updates"]` rank, scale and ‖ΔW‖/‖W‖ of every update.

    Raises:
        LoraFxError: One of the two cannot be read at all.
    """
    asked = MergeOptions(
        how=how, rank=rank, dtype=dtype, allow_unused=allow_unused, untie=untie, add=add,
        again=again, allow_missing=allow_missing, any_base=any_base,
        other_readers=other_readers, trust=trust, dequantise=dequantise,
        requantise=requantise, lossy=lossy, max_shard_size=max_shard_size,
    )  # fmt: skip
    return examine(base, adapter, asked, server)


def examine(
    base: StrPath, adapter: StrPath, asked: MergeOptions, server: str | None = None
) -> Report:
    """What `doctor` says, with the options of the merge that is meant as an object."""
    for name, path in (("base", base), ("adapter", adapter)):
        expect_path(path, name, "doctor(base, adapter)")
    if server:
        expect_name(server, SERVERS, "no server", f"one of {', '.join(SERVERS)}")
    base, adapter = local(base), local(adapter, files=FORMATS.files_of_folders)
    with explained(base), trusting(asked.trust):
        pair = open_pair(Path(base), Path(adapter), asked)
        findings: list[Finding] = []
        for name, check in CHECKS.items():
            findings += [replace(f, check=name) for f in check(pair)]
        rows = [_update(pair, key, entry) for key, entry in pair.adapter.entries.items()]
        plan = planned(pair)
        findings += _more(pair, findings, plan)
        if isinstance(plan, MergePlan):
            findings = [_taken(f, asked) for f in findings]
        if server:
            findings += [replace(f, check=SERVED) for f in served(pair, server)]
    findings.sort(key=lambda f: (ERROR, WARNING, NOTE).index(f.severity))
    details = {
        "used": sum(r["tensor"] is not None for r in rows),
        "unused": sum(r["tensor"] is None for r in rows),
        "missing": len(absent_of(pair.adapter, pair.rename)),
        "findings": [f.to_json() for f in findings],
        "updates": rows,
        "merge": plan.message if isinstance(plan, LoraFxError) else "",
    }
    notes = [*pair.adapter.metadata.get("notes", ())]
    notes += plan.notes if isinstance(plan, MergePlan) else ()
    notes = [n for n in dict.fromkeys(notes) if not any(f.found in n for f in findings)]
    ok = not any(f.severity == ERROR for f in findings)
    return Report("doctor", ok, warnings=tuple(notes), details=details)


def _more(pair: Pair, findings: list[Finding], plan: MergePlan | LoraFxError) -> Iterator[Finding]:
    """Why merge refuses the pair, or would once what the checks found is mended."""
    errors = [f for f in findings if f.severity == ERROR and f.check not in VALUES]
    told = {k for f in errors for k in f.keys}
    clear = errors and (pair.refusal is None or BY_READER & {f.check for f in errors})
    if clear and told >= pair.adapter.entries.keys():
        return
    left = planned(pair, told) if clear else plan
    if isinstance(left, MergeRefusal):
        check = left.check if left.check in CHECKS else LAST
        yield Finding(left.keys, left.message, "a pair that can be merged", left.hint, check=check)
    elif isinstance(left, LoraFxError):
        yield Finding([], left.message, "a pair that can be merged", left.hint, check=LAST)


def _taken(finding: Finding, asked: MergeOptions) -> Finding:
    """What merge takes is no error: a note where an option was given for it, else a warning."""
    if finding.severity != ERROR or finding.check in VALUES:
        return finding
    wanted = any(getattr(asked, option) for option in TAKEN_BY.get(finding.check, ()))
    return replace(finding, severity=NOTE if wanted else WARNING)


def _update(pair: Pair, key: str, entry: Entry) -> Json:
    """One row of `updates[]`; of a stack that the base has apart, the first tensor is named."""
    stack = pair.rename.stack(base_name(key))
    name = stack.parts[0].tensor if stack else pair.rename(key)
    scale = getattr(entry, "scale", None)
    return {
        "key": key,
        "tensor": name if pair.tensor(key) is not None else None,
        "kind": name_of(entry),
        "rank": getattr(entry, "rank", None),
        "scale": scale if scale is not None and math.isfinite(scale) else None,
        "ratio": pair.ratio(key),
    }


def lines(report: Report) -> str:
    """The report for people: updates, the checklist, what was found."""
    d = report.details
    rows = [("update", "kind", "rank", "scale", "‖ΔW‖/‖W‖")]
    for r in d["updates"]:
        scale = "?" if r["rank"] and r["scale"] is None else _number(r["scale"], ".6g")
        key = r["key"] if r["tensor"] else f"{r['key']} (not in the base)"
        rows.append((key, r["kind"], _number(r["rank"], "d"), scale, _number(r["ratio"], ".2e")))
    text = [*table([(*r,) for r in rows])]
    worst: dict[str, str] = {}
    for f in d["findings"]:
        worst.setdefault(f["check"], f["severity"])
        text += ["", f"{f['severity']}: {f['check']}: {some(f['keys'])}".removesuffix(": ")]
        for name, label in (("found", "found:"), ("expected", "expected:"), ("hint", "do:")):
            text += [f"  {label:<10}{f[name]}"] if f[name] else []
    width = max(map(len, CHECKS))
    text += ["", *(f"{name:<{width}}  {worst.get(name, 'ok')}" for name in (*CHECKS, LAST))]
    errors, warned = (sum(f["severity"] == s for f in d["findings"]) for s in (ERROR, WARNING))
    verdict = f"healthy; warnings: {warned}" if warned else "healthy"
    bad = any(f["severity"] == ERROR and f["check"] != SERVED for f in d["findings"])
    advice = "do not merge this pair" if bad else "do not serve it so"
    text += ["", verdict if report else f"errors: {errors}; {advice}"]
    text += [f"lora-fx merge refuses it: {d['merge']}"] if d["merge"] else []
    return "\n".join(map(visible, text))


def _number(value: object, form: str) -> str:
    return "" if value is None else format(value, form)
