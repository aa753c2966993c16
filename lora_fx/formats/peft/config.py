"""adapter_config.json of PEFT: how its fields are read, and what is refused.

PEFT's fields and their meaning are those of peft 0.21.2, `peft/tuners/lora/config.py` and
`peft/utils/other.py` (get_pattern_key). A field that changes the maths and is not supported here
is refused; a field that PEFT 0.21.2 does not know becomes a note.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lora_fx import regexes
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.regexes import PatternError, compiled, matched
from lora_fx.text import Json, JsonView, is_number, is_whole, near, plain_number

MERGE = "merge it into its model with PEFT (merge_and_unload) and use the merged model"
_CONVERT = (
    "save it again with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
    "which turns it into a plain LoRA for the original weights"
)
REFUSED: dict[str, tuple[str, str]] = {
    "alora_invocation_tokens": ("aLoRA acts only after certain tokens", "load it with PEFT"),
    "arrow_config": ("Arrow routes between adapters token by token", "load it with PEFT"),
    "layer_replication": ("layers of the base model are repeated", MERGE),
    "megatron_config": ("the layers are Megatron's parallel ones", MERGE),
}
TRAINS = {
    "monteclora_config": ("lora_monteclora_sampler", "MonteCLoRA samples its factors in training"),
    "velora_config": ("lora_velora_embed", "VeLoRA compresses what it keeps for backward"),
}
"""Fields that act in training alone, with the tensors that nothing else needs: PEFT itself merges
such an adapter as W + s·B·A."""
KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Names in init_lora_weights that leave the base weights as they are; so do true, false, null."""
REDONE = ("pissa", "olora")
"""Names that change the base in a way that `lora_fx.adapter.residual` can redo from the base
alone."""
KASA = {"beta": 1e-4, "gamma": 1e-3}
"""kasa_config as we write it: PEFT's defaults, of a loss that its user may add."""
_LOST = {
    "pissa_niter_": "its fast SVD starts from random numbers",
    "corda": "what it took off depends on the data it saw",
    "lora_ga": "what it took off depends on gradients on the data it saw",
    "loftq": "it quantised them",
}
_LISTS = ("target_parameters", "modules_to_save")
_FLAGS = (
    "use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying",
)  # fmt: skip
GROUP = 16
"""What qalora_group_size is in PEFT where it is left out."""
FIELDS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)
"""What says which modules are adapted; readers keep these under metadata["peft"]."""
VERSION = "peft_version"
"""Kept there too: how PEFT takes stacks of experts depends on it."""

ORIGIN = ("task_type", "base_model_name_or_path", "revision")
"""Fields that an adapter's metadata has too: what it was trained for, and of which model."""
SHARED = frozenset((
    *FIELDS, VERSION, *ORIGIN, "alpha_pattern", "auto_mapping", "inference_mode", "peft_type", "r",
    "rank_pattern",
))  # fmt: skip
"""Fields that LORA, LOHA and LOKR all have."""
KNOWN = SHARED | frozenset((
    *REFUSED, *TRAINS, *_LISTS, *_FLAGS, "bias", "corda_config", "eva_config", "init_lora_weights",
    "kasa_config", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config", "trainable_token_indices", "use_bdlora",
))  # fmt: skip


def check_config(config: JsonView, where: str) -> list[str]:
    """Notes on a config that can be read.

    Args:
        config: The JSON object.
        where: Its file, for messages.

    Raises:
        LoraFxError: A field says that the tensors mean something else than s·B·A.
    """
    for name, (why, hint) in REFUSED.items():
        value = config.get(name)
        # Not plain truth: alora_invocation_tokens and token indices may be a list with only a 0.
        if value not in (None, False, [], {}, ""):
            raise LoraFxError(f"{where}: {name} is {value!r}; expected it off: {why}", hint)
    if (config.get("bias") or "none") not in ("none", "all", "lora_only"):
        raise _wrong(f"{where}: bias is {config['bias']!r}; expected 'none', 'all' or 'lora_only'")
    for name in _LISTS:
        value = config.get(name)
        if value is not None and not (isinstance(value, list) and len(_texts(value)) == len(value)):
            raise _wrong(f"{where}: {name} is {value!r}; expected a list of names")
    for flag in _FLAGS:
        if config.get(flag) not in (None, True, False):
            raise _wrong(f"{where}: {flag} is {config[flag]!r}; expected true or false")
    if config.get("use_dora") and config.get("lora_bias"):
        raise LoraFxError(
            f"{where}: use_dora and lora_bias are both true; expected one of them, as PEFT does",
            "correct the flags to what the adapter was trained with",
        )
    _check_init(config, where)
    if config.get("use_qalora"):
        _check_groups(config, where)
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise _wrong(f"{where}: lora_dropout is {dropout!r}; expected a number in [0, 1)")
    if "lora_alpha" not in config:
        raise LoraFxError(
            f"{where}: lora_alpha is missing; expected a number: the scale is lora_alpha / r",
            "add the lora_alpha that the adapter was trained with",
        )
    notes = [f"{where}: unknown field {name!r} is ignored" for name in sorted(set(config) - KNOWN)]
    on = (n for n in TRAINS if config.get(n))
    return notes + [f"{where}: {n}: {TRAINS[n][1]}; read as W + s·B·A" for n in on]


def _check_groups(config: JsonView, where: str) -> None:
    """Raise for a QA-LoRA that PEFT has not."""
    size = config.get("qalora_group_size", GROUP)
    if not is_whole(size) or size < 1:
        raise _wrong(f"{where}: qalora_group_size is {size!r}; expected a whole number from 1 up")
    other = mutation(config) or next((n for n in ("use_dora", "use_bdlora") if config.get(n)), "")
    if other:
        raise _wrong(f"{where}: use_qalora and {other}; expected one of them, as PEFT does")


WIDEST = 1 << 24
"""Elements of the largest A that QA-LoRA's groups are written out to: rank 256 of 65,536 inputs."""


def group_of(config: JsonView, a: Array, where: str) -> int:
    """The inputs that QA-LoRA reads as one, on the linear layers of an adapter; 0 for none.

    Args:
        config: PEFT's.
        a: [rank, in/group].
        where: The file and the tensor, for messages.

    Raises:
        LoraFxError: A group so large that A, with a column for each input, is no layer's.
    """
    size = config.get("qalora_group_size", GROUP) if config.get("use_qalora") else 0
    if not is_whole(size):
        return 0
    if size * a.size > WIDEST:
        raise _wrong(
            f"{where} is {list(a.shape)}, for groups of {size} inputs each (qalora_group_size); "
            f"expected {WIDEST} elements at most, groups written out"
        )
    return size


def _wrong(what: str) -> LoraFxError:
    return LoraFxError(what, "correct the file, or save the adapter again with PEFT")


def mutation(config: JsonView) -> str:
    """pissa, olora or kasa, where PEFT took a part off linear base weights; else empty."""
    init = config.get("init_lora_weights")
    name = init.lower() if isinstance(init, str) else ""
    return name if name in REDONE else "kasa" if config.get("kasa_config") else ""


def whole_factor(config: JsonView, module: str, half: str, stored: Array, where: str) -> Array:
    """A whole factor of BD-LoRA, which stores the blocks of a block-diagonal one in a column.

    Args:
        config: PEFT's. In peft 0.21.2 a module is meant where its name holds one of the listed
            texts; see BdLoraLinearVariant.
        module: Its name.
        half: a or b.
        stored: [n·rows, columns] of n blocks.
        where: The file, for messages.
    """
    given = config.get("use_bdlora") or {}
    names = given.get(f"target_modules_bd_{half}") if isinstance(given, dict) else None
    if not any(name in module for name in _texts(names)):
        return stored
    n = given.get("nblocks")
    if type(n) is not int or n < 1 or stored.ndim != 2 or len(stored) % n:
        raise _wrong(
            f"{where}: use_bdlora gives {n!r} blocks; expected a number of them that divides the "
            f"{len(stored)} rows of factor {half.upper()} of {module!r}"
        )
    rows, columns = len(stored) // n, stored.shape[1]
    whole = np.zeros((n, rows, n, columns), stored.dtype)
    whole[range(n), :, range(n)] = stored.reshape(n, rows, columns)
    return whole.reshape(n * rows, n * columns)


def _check_init(config: JsonView, where: str) -> None:
    """Raise for a start that changed the base weights in a way that cannot be redone."""
    init = config.get("init_lora_weights", True)
    said = f"{where}: init_lora_weights is {init!r}"
    if mutation(config) == "olora" and config.get("fan_in_fan_out"):
        raise LoraFxError(f"{said} with fan_in_fan_out; PEFT takes the QR of the wrong side", MERGE)
    name = str(init).lower()
    if config.get("kasa_config") and name in REDONE:
        raise LoraFxError(f"{said} beside kasa_config; expected one start", MERGE)
    if init in (True, False, None) or name in REDONE:
        return
    why = next((why for start, why in _LOST.items() if name.startswith(start)), "")
    if why:
        raise LoraFxError(
            f"{said}; expected one that keeps the base weights, or {' or '.join(REDONE)}: this "
            f"one changes them and that cannot be redone: {why}",
            _CONVERT,
        )
    if name not in KEEPS_BASE:
        raise LoraFxError(
            f"{said}; expected one of peft 0.21.2: another may change the base weights", _CONVERT
        )


class Pattern:
    """rank_pattern or alpha_pattern with its default: module name → number.

    PEFT takes the first pattern, in the order of the file, that matches the end of the name from
    a dot on; then a pattern that equals the name; then the default.
    """

    def __init__(self, config: JsonView, table: str, default: str, where: str) -> None:
        """Compile the patterns of `config[table]`; the default is `config.get(default)`."""
        self.where, self.table = where, table
        given = config.get(table) or {}
        if not isinstance(given, dict):
            raise _wrong(f"{where}: {table} is {given!r}; expected an object")
        self.default = None if default not in config else self._number(default, config[default])
        self.numbers = {k: self._number(f"{table} {k!r}", v) for k, v in given.items()}
        self.unmatched = set(self.numbers)
        self.seen: set[str] = set()
        self.doubts: set[str] = set()  # where the order of the table decides
        try:
            self.regexes = {k: compiled(rf"(.*\.)?({k})$") for k in self.numbers}
        except PatternError as error:
            raise _wrong(f"{where}: {table} holds a bad pattern: {error}") from error

    def of(self, module: str) -> float | None:
        """The number of one module; None where the config gives none."""
        self.seen.add(module)
        hits = [k for k, pattern in self.regexes.items() if matched(pattern, module)]
        hits += [module] if module in self.numbers else []
        self.unmatched -= set(hits)
        other = next((k for k in hits if self.numbers[k] != self.numbers[hits[0]]), None)
        if other is not None:
            self.doubts.add(
                f"{self.where}: {self.table} {hits[0]!r} ({self.numbers[hits[0]]:g}) and {other!r} "
                f"({self.numbers[other]:g}) both match {module!r}; the first counts, as in PEFT, "
                "which sorts them when it saves: was it the first in training?"
            )
        return self.numbers[hits[0]] if hits else self.default

    def unused(self, pattern: str) -> tuple[str, str]:
        """What a pattern that matched no module comes to, and the nearest names.

        PEFT ignores it, in training as in merging, so it may well be right; or a typing mistake.
        """
        ends = sorted({m.rpartition(".")[2] for m in self.seen} | self.seen)
        said = f"{self.table} {pattern!r} matches no module of the adapter"
        return said, near(pattern, ends)

    def notes(self) -> list[str]:
        """What to tell once every module has been asked for."""
        notes = []
        for pattern in sorted(self.unmatched):
            (said, hint), number = self.unused(pattern), f"{self.numbers[pattern]:g}"
            notes.append(f"{self.where}: {said}; its {number} is for none, as in PEFT; {hint}")
        return notes + sorted(self.doubts)

    def _number(self, what: str, value: object) -> float:
        if not is_number(value) or not math.isfinite(value):
            raise _wrong(f"{self.where}: {what} is {value!r}; expected a number")
        return float(value)


def targets(config: JsonView, module: str) -> bool:
    """True when PEFT would put an adapter on this module, by target_modules alone."""
    wanted = config.get("target_modules")
    try:
        return wanted in (None, "all-linear") or _named(wanted, module) is not None
    except PatternError:
        return False


def _named(wanted: object, module: str) -> str | None:
    """What names a module: a pattern as a whole, or an entry of a list that is its end."""
    if isinstance(wanted, str):
        return wanted if matched(wanted, module, "fullmatch") else None
    names = _texts(wanted)
    return module if module in names else next((n for n in names if module.endswith(f".{n}")), None)


def untouched(config: JsonView, modules: Iterable[str]) -> list[str]:
    """The names in target_modules and target_parameters that no module with tensors answers to."""
    have = [f".{m}" for m in modules]
    named = [(n, n) for n in _texts(config.get("target_modules"))]
    named += [(n, n.rpartition(".")[0]) for n in _texts(config.get("target_parameters"))]
    unused = {n for n, end in named if end and not any(m.endswith(f".{end}") for m in have)}
    return sorted(unused)


HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""task_type → what PEFT adds to modules_to_save for it: names of which a model has one."""


def heads_of(config: JsonView) -> tuple[str, ...]:
    """The names that PEFT adds to modules_to_save; older files have them in no list."""
    task = config.get("task_type")
    return HEADS.get(task, ()) if isinstance(task, str) else ()


def listed_whole(config: JsonView) -> tuple[str, ...]:
    """The names in modules_to_save, with those that PEFT adds."""
    return tuple(dict.fromkeys((*_texts(config.get("modules_to_save")), *heads_of(config))))


def saved_whole(config: JsonView, module: str) -> bool:
    """True when modules_to_save lists the module or one around it (PEFT compares endings)."""
    names = listed_whole(config)
    path = module.split(".")
    return any(".".join(path[: i + 1]).endswith(names) for i in range(len(path)))


def conflicts(saved: str, module: str) -> bool:
    """True when PEFT, told to save `saved` whole, leaves out or wraps a low-rank `module`."""
    try:
        return module.endswith(saved) or bool(matched(_around(saved), module))
    except PatternError:  # PEFT takes the name for a pattern, and would fail on this one
        return True


def _around(saved: str) -> str:
    """The pattern by which PEFT takes a module for one in modules_to_save, or inside of one."""
    return rf"(^|.*\.){saved}($|\..*)"


def _texts(value: object) -> tuple[str, ...]:
    """The texts of a list that a file should hold; nothing where it holds something else."""
    return tuple(v for v in value if isinstance(v, str) and v) if isinstance(value, list) else ()


# Which modules a PEFT config says it has adapted: target_modules against a model's names.
#
# PEFT's rules are those of peft 0.21.2, `check_target_module_exists` in tuners_utils.py. It looks
# at modules and we at the names of tensors, which may be those of more modules than the adapter's
# model had (a pre-training head, another tower). So a module counts as missing only where the
# adapter has one beside it: in the same stack of layers, or under the same parent. Where it has
# none anywhere for a name in target_modules, all that the name matches are missing.


_NOT_LINEAR = re.compile(
    r"(^|\.)(\w*embed(ding)?s?(_\w+)?|wte|wpe|shared|relative_attention_bias|lm_head|embed_out)$"
)


def facts(config: JsonView) -> Json:
    """The fields of a config that say which modules it adapts; JSON, for an adapter's metadata."""
    kept = {name: config[name] for name in (*FIELDS, VERSION) if config.get(name) is not None}
    whole = listed_whole(config)
    return {**kept, "modules_to_save": list(whole)} if whole else kept


def target_facts(config: JsonView, modules: Iterable[str], file: str, notes: list[str]) -> Json:
    """What an adapter's metadata keeps of the modules that a config adapts.

    Args:
        config: PEFT's.
        modules: Those with tensors in the file.
        file: Its name, for a note on targets that have none.
        notes: Get that note.
    """
    kept: Json = {"peft": facts(config)}
    if unused := untouched(config, modules):
        kept["untouched_targets"] = unused
        names = ", ".join(map(repr, unused))
        notes.append(f"{file}: the config targets {names}, of which the file has no tensor")
    return kept


def wanted_by(config: JsonView, module: str) -> str | None:
    """The entry of target_modules through which PEFT would adapt a module; None where it is not.

    >>> wanted_by({"target_modules": ["q", "v"], "layers_to_transform": [1]}, "m.layers.1.attn.q")
    'q'
    >>> wanted_by({"target_modules": ["q"], "exclude_modules": "layers.0.*"}, "layers.0.q") is None
    True
    """
    out, targets = config.get("exclude_modules"), config.get("target_modules")
    try:
        if out and _named(out, module):
            return None
        if any(matched(_around(saved), module) for saved in listed_whole(config)):
            return None
        if targets == "all-linear":
            return None if _NOT_LINEAR.search(module) else "all-linear"
        name = _named(targets, module)
        by_end = isinstance(targets, list) and name != module
        return name if not by_end or _layer_is_meant(config, module) else None
    except PatternError:
        return None  # PEFT would fail on such a pattern


def _layer_is_meant(config: JsonView, module: str) -> bool:
    """False where layers_to_transform leaves the module's layer out."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    names = config.get("layers_pattern") or []
    names = [names] if isinstance(names, str) else names
    meant = layers if isinstance(layers, list) else [layers]
    for pattern in [rf"(?:^|.*?\.){n}\.(\d+)\." for n in names] or [r".*?\.[^.]*\.(\d+)\."]:
        if found := matched(pattern, module):
            return len(found[1]) < 20 and int(found[1]) in meant
    return False


def missing(config: JsonView, modules: Iterable[str], adapted: Iterable[str]) -> dict[str, str]:
    """{module that PEFT would have adapted and the adapter lacks: the entry that names it}.

    Args:
        config: PEFT's config, or the facts of it.
        modules: Those of the base with a weight of two dimensions or more, as PEFT names them.
        adapted: Modules that the adapter has an update of.

    >>> missing({"target_modules": ["q", "v"]}, ["l.0.q", "l.0.v", "l.1.q", "head.q"], ["l.0.q"])
    {'l.0.v': 'v', 'l.1.q': 'q'}
    """
    here = set(adapted)
    places = {_place(m) for m in here}
    regexes.begin("adapter_config.json")
    entries = {wanted_by(config, m) for m in here}
    wanted = {m: wanted_by(config, m) for m in modules if m not in here}
    return {
        module: entry
        for module, entry in wanted.items()
        if entry is not None and (_place(module) in places or entry not in entries)
    }


def _place(module: str) -> str:
    """The stack of layers that a module is in, or its parent.

    >>> _place("model.layers.3.attn.q"), _place("bert.pooler.dense")
    ('model.layers', 'bert.pooler')
    """
    stack = re.match(r"(.*?)(?:^|\.)\d+(?:\.|$)", module)
    return stack[1] if stack else module.rpartition(".")[0]


# adapter_config.json of PEFT as we write it.


def build_config(
    numbers: Mapping[str, tuple[int, float]],
    modules: Iterable[str],
    whole: Iterable[str],
    metadata: JsonView,
    fields: JsonView,
) -> Json:
    """The config of an adapter.

    Args:
        numbers: (rank, alpha) by the name that PEFT compares with its patterns.
        modules: Names for target_modules.
        whole: Modules that are saved whole.
        metadata: dropout, task_type, base_model_name_or_path and revision are taken from here.
        fields: More fields (use_rslora, use_dora, target_parameters …); None leaves one out.
    """
    ranks = {name: rank for name, (rank, _) in numbers.items()}
    alphas = {name: plain_number(alpha) for name, (_, alpha) in numbers.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    targets = sorted(set(modules))
    config = {
        "peft_type": "LORA",
        **{field: metadata.get(field) for field in ORIGIN},
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(k)}": v for k, v in ranks.items() if v != rank},
        "alpha_pattern": {f"^{re.escape(k)}": v for k, v in alphas.items() if v != alpha},
        "lora_dropout": float(metadata.get("dropout") or 0.0),
        "target_modules": targets,
        "modules_to_save": sorted(whole) or None,
        "bias": "none",
        "init_lora_weights": True,
    }
    more = {"exclude_modules": _exclude(targets) or None, **fields}
    return config | {k: v for k, v in more.items() if v is not None}


def _exclude(modules: Sequence[str]) -> str:
    """A pattern of what target_modules would match by accident, or an empty text.

    PEFT also adapts modules whose name ends in `.NAME`; for a NAME without dots (`head`, or `0`
    of a Sequential) such modules are likely, and may be of a class that PEFT cannot adapt.
    """
    short = [re.escape(name) for name in modules if "." not in name]
    if not short:
        return ""
    all_ = "|".join(re.escape(name) for name in modules)
    return rf"(?!(?:{all_})\Z).+\.(?:{'|'.join(short)})"


def _most_common(values: Iterable[float]) -> float:
    """The most frequent value, the smallest of several; PEFT's default where there is none."""
    counts = Counter(values)
    return min(counts, key=lambda v: (-counts[v], v)) if counts else 8
