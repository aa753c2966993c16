"""A checkpoint whose output head is its embedding: one tensor, two uses.

An adapter on one of the two must not reach the other. The file holds the tensor once, or twice
with config.json tying them again when it is loaded, so the two are untied or the merge is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import ReplacedRows
from lora_fx.checkpoint.match import Placed, lookup, use_of
from lora_fx.checkpoint.model_families import Tie, family_of, generates, is_head, is_table
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint, text_config
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.targets.target import base_name
from lora_fx.text import JsonView

_SCALED = frozenset(("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct", "udop"))
"""model_type of models whose logits are scaled where the head is tied, unless the config says."""
_SAYS_SCALE = frozenset(("t5", "umt5", "longt5"))
"""Those of them whose config can say it, as scale_decoder_outputs."""
_ALWAYS = frozenset(("t5", "mt5", "umt5", "longt5", "udop"))
"""model_type of models that are tied wherever no head is stored, whatever the config says."""


def tie_of(tensors: Tensors, config: JsonView, keys: Iterable[str] = ()) -> Tie | None:
    """The tie of a checkpoint by its names and config; None where there is none.

    `keys` are an adapter's: one of them may say what the head would be called.

    Without a word in the config a model that generates and has no head of its own is tied: that
    is the default of its class.
    """
    said = config.get("tie_word_embeddings")
    if said is None:
        said = text_config(config).get("tie_word_embeddings")
    heads = [n for n in tensors if is_head(n)]
    if said is False and (heads or config.get("model_type") not in _ALWAYS):
        return None
    named = config.get("architectures") or []
    if named and not generates(named):  # without a head, whatever its config was copied from
        return None
    tables = [n for n in tensors if is_table(n) and len(tensors[n].shape) == 2]
    family = family_of(named, tables) or Tie("", "")
    tables = [n for n in tables if n not in family.lookups]
    if len(tables) != 1 or (heads and not said) or not (said or generates(named)):
        return None
    if heads:
        head = family.head if family.head in heads else heads[0]
    else:
        head = next((k for k in keys if is_head(k)), family.head)
    biases = {new: old for new, old in family.biases.items() if old in tensors}
    return replace(family, table=tables[0], head=head, biases=biases)


def tie_and_names(
    base: Checkpoint, keys: Iterable[str]
) -> tuple[Tie | None, dict[str, TensorInfo]]:
    """The tie of a checkpoint, and its tensors under every name that an adapter may use."""
    tie = tie_of(base.tensors, base.config(), keys)
    return tie, dict(base.tensors) if tie is None else tie.known(base.tensors)


def at_its_use(p: Placed, tie: Tie | None, base: Checkpoint, *, untie: bool) -> Placed:
    """An update of one use of a tensor, at the tensor that this use will read.

    Raises:
        LoraFxError: The base stores one tensor for this use and others, or nothing says that the
            one of this use is read by no other.
    """
    use, name = use_of(p.key, p.entry), base_name(p.key)
    if not use:
        return p
    known = tie is not None and p.tensor in (tie.table, tie.head, *tie.lookups)
    said = base.config().get("tie_word_embeddings") is False or (untie and name != use)
    if use == p.tensor and (known or (said and name in base.tensors)):
        return p
    if tie is not None and p.tensor == tie.table:
        if use == "op:embedding":
            return p
        if use.startswith("op:") and tie.head:
            return replace(p, tensor=tie.head)
    raise LoraFxError(
        f"{base.path}: the update of {p.key!r} means one use of {p.tensor!r} ({use}), which the "
        "base stores once for several; merged, it would change all of them",
        "train one update for all uses, or export the model itself: fold keeps uses apart",
    )


def check_unknown(
    placed: Iterable[Placed], tie: Tie | None, base: Checkpoint, config: JsonView
) -> None:
    """Raise where an update means one use of a tensor that may be table and head as well.

    That is a table of all tokens of a model that generates and stores no head, or stores the table
    more than once, under names that are not known here; or a head beside which nothing else has
    a row for every token.
    """
    tensors = base.tensors
    sizes = {c.get("vocab_size") for c in (config, text_config(config))}
    untied = config.get("tie_word_embeddings") is False
    heads = {n: t.shape for n, t in tensors.items() if is_head(n) and len(t.shape) == 2}
    if tie is not None or untied or not generates(config.get("architectures") or []):
        return
    for p in placed if heads else ():
        rows = heads.get(p.tensor, ())[:1]
        others = (t.shape[:1] for n, t in tensors.items() if n not in heads and len(t.shape) == 2)
        if rows and rows not in others and not (isinstance(p.entry, LowRank) and p.entry.tied):
            raise LoraFxError(
                f"{base.path}: {p.tensor!r} is the output head, and the file has no other tensor "
                f"of {rows[0]} rows: it is the embedding too, and the update would change both",
                "load the base in transformers and save it again, which names the embedding",
            )
    if heads:
        return
    for p in placed:
        shape = tensors[p.tensor].shape if p.tensor in tensors else ()
        looked_up = isinstance(p.entry, ReplacedRows) or lookup(p.entry)
        if looked_up and len(shape) == 2 and shape[0] in sizes:
            raise LoraFxError(
                f"{base.path}: {p.tensor!r} is a table of all tokens, the file has no output head "
                "of a known name, and config.json does not say that the two are untied; merged, "
                "the update might change the head too",
                "save the base with tie_word_embeddings false first, then merge",
            )


def both(p: Placed, tie: Tie, placed: Iterable[Placed]) -> bool:
    """True for an update of both uses at once; rows of tokens are PEFT's for table and head."""
    if isinstance(p.entry, ReplacedRows):
        return not any(isinstance(q.entry, ReplacedRows) and q.tensor == tie.head for q in placed)
    return isinstance(p.entry, LowRank) and p.entry.tied


def of_one_use(
    placed: Sequence[Placed], tie: Tie, config: JsonView, where: str, *, untie: bool
) -> list[Placed]:
    """The updates that mean one use of a tied table, but not all: for them the two are untied.

    Raises:
        LoraFxError: There are such, and the two may not, or cannot, be untied.
    """
    names = {tie.table, tie.head, *tie.lookups}
    ours = [p for p in placed if p.tensor in names and not both(p, tie, placed)]
    if not ours:
        return []
    shared = next((p for p in ours if p.tensor in tie.lookups and not tie.apart), None)
    if shared is not None:
        raise LoraFxError(
            f"{where}: {shared.key!r} means one of several lookups of {tie.table!r}, which such "
            "models hold once, tied or not",
            f"train one update of {tie.table!r} for all lookups",
        )
    check_scaled(tie, config, where)
    if not tie.head:
        raise LoraFxError(
            f"{where}: {tie.table!r} is the output head too, and what a head of its own would "
            "be called is not known",
            "save the base with tie_word_embeddings false first, then merge",
        )
    if not untie:
        raise LoraFxError(
            f"{where}: {ours[0].key!r} is one of two uses of a tied tensor "
            f"({tie.table!r} is also the output head); merged into it, the update would change "
            "both",
            "--untie writes the head as a tensor of its own and says so in config.json",
        )
    return ours


def spread(placed: Sequence[Placed], tie: Tie, names: Collection[str]) -> list[Placed]:
    """The updates, and each once more for every other tensor among `names` that it means.

    An update of the table is one of all its lookups, and of the head where it means both uses. The
    two names of a bias are one, unless each has an update. A name that is no tensor of its own is
    the one that it stands for.
    """
    given = {p.tensor for p in placed}
    sources = {n: s for n, s in tie.sources().items() if n not in tie.biases or not {n, s} <= given}
    moved: dict[tuple[int, str], Placed] = {}
    for p in placed:
        source = sources.get(p.tensor, p.tensor)
        name = p.tensor if p.tensor in names and p.tensor not in tie.biases else source
        moved.setdefault((id(p.entry), name), replace(p, tensor=name))
    for p in tuple(moved.values()):
        for name, source in sources.items():
            skip = name == tie.head and not both(p, tie, placed)
            if source == p.tensor and name in names and not skip:
                moved.setdefault((id(p.entry), name), replace(p, tensor=name))
    return list(moved.values())


def check_scaled(tie: Tie, config: JsonView, where: str) -> None:
    """Raise where untying alone would change what the model computes."""
    kind, said = config.get("model_type"), config.get("tie_word_embeddings")
    if kind not in _SCALED or "scale_decoder_outputs" in config:
        return
    if kind in _SAYS_SCALE and said is False:  # it does not scale
        return
    raise LoraFxError(
        f"{where}: a {kind} scales its logits where {tie.table!r} is also the head, and its config "
        "does not say so apart; untied, they would be too large",
        "save the base once with transformers 5, whose config has scale_decoder_outputs"
        if kind in _SAYS_SCALE
        else "train an update of other weights than the table's and the head's",
    )
