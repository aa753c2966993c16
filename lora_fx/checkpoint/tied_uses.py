"""A checkpoint whose output head is its embedding: one tensor, two uses.

An adapter on one of the two must not reach the other. The file holds the tensor once, or twice
with config.json tying them again when it is loaded: the two are untied or the merge is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from lora_fx.adapter.adapter import means_all
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import ReplacedRows, is_tied
from lora_fx.checkpoint.placed import Placed
from lora_fx.checkpoint.refusal import TIED, MergeRefusal
from lora_fx.checkpoint.storage_order import lookup
from lora_fx.checkpoint.tied_names import Tie, generates, is_head, is_table, tie_in
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint, says_tied, text_config
from lora_fx.files.safetensors import Tensors
from lora_fx.text import JsonView, some

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
    said = says_tied(config)
    heads = [n for n in tensors if is_head(n)]
    if said is False and (heads or config.get("model_type") not in _ALWAYS):
        return None
    named = config.get("architectures") or []
    if named and not generates(named):  # without a head, whatever its config was copied from
        return None
    tables = [n for n in tensors if is_table(n) and len(tensors[n].shape) == 2]
    family = tie_in(named, tables) or Tie("", "")
    tables = [n for n in tables if n not in family.lookups]
    if len(tables) != 1 or (heads and not said) or not (said or generates(named)):
        return None
    if heads:
        head = family.head if family.head in heads else heads[0]
    else:
        head = next((k for k in keys if is_head(k)), family.head)
    biases = {new: old for new, old in family.biases.items() if old in tensors}
    return replace(family, table=tables[0], head=head, biases=biases)


def tie_and_names(base: Checkpoint, keys: Iterable[str]) -> tuple[Tie | None, Tensors]:
    """The tie of a checkpoint, and its tensors under every name that an adapter may use."""
    tie = tie_of(base.tensors, base.config(), keys)
    return tie, base.tensors if tie is None else tie.known(base.tensors)


def check_unknown(placed: Iterable[Placed], tie: Tie | None, base: Checkpoint) -> None:
    """Raise where an update means one use of a tensor that may be table and head as well.

    That is a table of all tokens of a model that generates and stores no head, or stores the table
    more than once, under names that are not known here; or a head beside which nothing else has
    a row for every token.
    """
    tensors, config = base.tensors, base.config()
    sizes = {c.get("vocab_size") for c in (config, text_config(config))}
    untied = says_tied(config) is False
    heads = {n: t.shape for n, t in tensors.items() if is_head(n) and len(t.shape) == 2}
    if tie is not None or untied or not generates(config.get("architectures") or []):
        return
    others = {t.shape[0] for n, t in tensors.items() if n not in heads and len(t.shape) == 2}
    for p in placed:
        shape = tensors[p.tensor].shape if p.tensor in tensors else ()
        of_both = isinstance(p.entry, LowRank) and is_tied(p.entry)
        looked_up = isinstance(p.entry, ReplacedRows) or lookup(p.entry)
        if p.tensor in heads and shape[0] not in others and not of_both:
            raise LoraFxError(
                f"{base.path}: {p.tensor!r} is the output head, and the file has no other tensor "
                f"of {shape[0]} rows: it is the embedding too, and the update would change both",
                "load the base in transformers and save it again, which names the embedding",
            )
        if not heads and looked_up and len(shape) == 2 and shape[0] in sizes:
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
    return is_tied(p.entry)


def one_change(placed: Sequence[Placed], tie: Tie) -> list[Placed]:
    """The updates, with whole tensors of table, head and lookups as one where they are equal.

    PEFT saves a tied table under each name of its modules, and the same numbers where it keeps
    them tied (ensure_weight_tying).
    """
    names = {tie.table, tie.head, *tie.lookups}
    whole = {p.tensor: p.entry for p in placed if p.tensor in names and isinstance(p.entry, Full)}
    if not {tie.table, tie.head} <= set(whole) or not means_all(whole, names):
        return list(placed)
    return [
        replace(p, entry=replace(p.entry, tied=True)) if isinstance(p.entry, Full) else p
        for p in placed
        if p.tensor not in whole or p.tensor == tie.table
    ]


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
    unread = next((p for p in ours if isinstance(p.entry, Full) and p.tensor == tie.table), None)
    if unread is not None and tie.lookups:
        raise LoraFxError(
            f"{where}: {unread.key!r} is a whole tensor of that name alone, and such models read "
            f"their table as {some(list(tie.lookups))}: PEFT's copy of it changes nothing",
            "save the adapter with all names of the table (ensure_weight_tying)",
        )
    check_scaled(tie, config, where)
    if not tie.head:
        raise LoraFxError(
            f"{where}: {tie.table!r} is the output head too, and what a head of its own would "
            "be called is not known",
            "save the base with tie_word_embeddings false first, then merge",
        )
    if not untie:
        raise MergeRefusal(
            TIED,
            dict.fromkeys(p.key for p in ours),
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
