"""A checkpoint whose output head is its embedding: one tensor, two uses.

An adapter on one of the two must not reach the other. The file holds the tensor once, or twice
with config.json tying them again when it is loaded: the two are untied or the merge is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from lora_fx.adapter.bind import means_all
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import ReplacedRows, is_tied
from lora_fx.checkpoint.placed import Placed
from lora_fx.checkpoint.refusal import TIED, MergeRefusal
from lora_fx.checkpoint.storage_order import is_lookup
from lora_fx.checkpoint.tied_names import Tie, generates, is_head, is_table, tie_in
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint, says_tied, text_config
from lora_fx.files.safetensors import Tensors
from lora_fx.text import JsonView, some

_SCALED = frozenset(("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct", "udop"))
"""model_types whose logits are scaled if the head is tied, unless the config says otherwise."""


_SAYS_SCALE = frozenset(("t5", "umt5", "longt5"))
"""Those model_types whose config can have the field scale_decoder_outputs."""


_ALWAYS = frozenset(("t5", "mt5", "umt5", "longt5", "udop"))
"""model_types that are tied whenever no head is stored, whatever the config says."""


def tie_of(tensors: Tensors, config: JsonView, keys: Iterable[str] = ()) -> Tie | None:
    """The tie of a checkpoint, from its names and config; None if it has none.

    Without a word in the config a model that generates and has no head of its own is tied: that
    is the default of its class.

    Args:
        tensors: The checkpoint's tensors.
        config: Its config.json.
        keys: An adapter's: one of them may say what the head would be called.
    """
    flag = says_tied(config)
    heads = [name for name in tensors if is_head(name)]
    if flag is False and (heads or config.get("model_type") not in _ALWAYS):
        return None
    if heads and not flag:
        return None
    classes = config.get("architectures") or []
    if classes and not generates(classes):  # without a head, whatever its config was copied from
        return None
    if not flag and not generates(classes):
        return None

    tables = [name for name in tensors if is_table(name) and len(tensors[name].shape) == 2]
    family = tie_in(classes, tables) or Tie("", "")
    tables = [name for name in tables if name not in family.lookups]
    if len(tables) != 1:
        return None
    return replace(
        family,
        table=tables[0],
        head=_head_of(family, heads, keys),
        biases={name: source for name, source in family.biases.items() if source in tensors},
    )


def _head_of(family: Tie, heads: Sequence[str], keys: Iterable[str]) -> str:
    """The name of a tied head: as stored, as an adapter calls it, or as its family does."""
    if not heads:
        return next((key for key in keys if is_head(key)), family.head)
    return family.head if family.head in heads else heads[0]


def tie_and_names(base: Checkpoint, keys: Iterable[str]) -> tuple[Tie | None, Tensors]:
    """The tie of a checkpoint, and its tensors under every name that an adapter may use."""
    tie = tie_of(base.tensors, base.config(), keys)
    if tie is None:
        return None, base.tensors
    return tie, tie.known(base.tensors)


def check_unknown(placed: Iterable[Placed], tie: Tie | None, base: Checkpoint) -> None:
    """Raise if an update is for one use of a tensor that may be both table and head.

    That is a table of all tokens of a model that generates and stores no head, or stores the table
    more than once, under names that are not known here; or a head beside which nothing else has
    a row for every token.
    """
    config = base.config()
    is_untied = says_tied(config) is False
    if tie is not None or is_untied or not generates(config.get("architectures") or []):
        return

    vocabulary_sizes = {section.get("vocab_size") for section in (config, text_config(config))}
    heads: set[str] = set()
    rows_of_others: set[int] = set()
    for name, info in base.tensors.items():
        if len(info.shape) != 2:
            continue
        if is_head(name):
            heads.add(name)
        else:
            rows_of_others.add(info.shape[0])

    for update in placed:
        info_of_update = base.tensors.get(update.tensor)
        if info_of_update is None:
            continue
        shape = info_of_update.shape
        if update.tensor in heads and shape[0] not in rows_of_others and not _is_tied_pair(update):
            raise LoraFxError(
                f"{base.path}: {update.tensor!r} is the output head, and the file has no other "
                f"tensor with {shape[0]} rows, so it is the embedding too; the update would "
                "change both",
                "load the base in transformers and save it again, so that the file names the "
                "embedding",
            )
        is_table_of_tokens = len(shape) == 2 and shape[0] in vocabulary_sizes
        if not heads and is_table_of_tokens and _is_looked_up(update):
            raise LoraFxError(
                f"{base.path}: {update.tensor!r} is an embedding, the file has no output head "
                "with a known name, and config.json does not say that the head is untied; a "
                "merge might change the head too",
                "save the base with tie_word_embeddings false first, then merge",
            )


def _is_tied_pair(update: Placed) -> bool:
    """True for a low-rank update that its adapter has for table and head together."""
    return isinstance(update.entry, LowRank) and is_tied(update.entry)


def _is_looked_up(update: Placed) -> bool:
    """True for an update of an embedding lookup."""
    return isinstance(update.entry, ReplacedRows) or is_lookup(update.entry)


def means_both_uses(update: Placed, tie: Tie, placed: Iterable[Placed]) -> bool:
    """True for an update of table and head at once; PEFT means both by rows of tokens."""
    if not isinstance(update.entry, ReplacedRows):
        return is_tied(update.entry)
    return not any(
        isinstance(other.entry, ReplacedRows) and other.tensor == tie.head for other in placed
    )


def one_change(placed: Sequence[Placed], tie: Tie) -> list[Placed]:
    """Make one update of equal whole tensors of table, head and lookups.

    PEFT saves a tied table under each name of its modules, and the same numbers where it keeps
    them tied (ensure_weight_tying).
    """
    names = {tie.table, tie.head, *tie.lookups}
    whole_tensors: dict[str, Full] = {}
    for update in placed:
        if update.tensor in names and isinstance(update.entry, Full):
            whole_tensors[update.tensor] = update.entry
    if not {tie.table, tie.head} <= whole_tensors.keys() or not means_all(whole_tensors, names):
        return list(placed)

    changes: list[Placed] = []
    for update in placed:
        if update.tensor in whole_tensors and update.tensor != tie.table:
            continue
        if isinstance(update.entry, Full):
            update = replace(update, entry=replace(update.entry, tied=True))
        changes.append(update)
    return changes


def of_one_use(
    placed: Sequence[Placed], tie: Tie, config: JsonView, where: str, *, untie: bool
) -> list[Placed]:
    """The updates that mean one use of a tied table and not all; for them the uses are untied.

    Args:
        placed: All updates.
        tie: The tie of the checkpoint.
        config: Its config.json.
        where: The checkpoint, for messages.
        untie: The two may be untied.

    Raises:
        LoraFxError: There are such, and the two may not, or cannot, be untied.
    """
    names = {tie.table, tie.head, *tie.lookups}
    of_one = [
        update
        for update in placed
        if update.tensor in names and not means_both_uses(update, tie, placed)
    ]
    if not of_one:
        return []

    _check_lookups(of_one, tie, where)
    check_scaled(tie, config, where)
    if not tie.head:
        raise LoraFxError(
            f"{where}: {tie.table!r} is the output head too, and the name of a separate head is "
            "not known",
            "save the base with tie_word_embeddings false first, then merge",
        )
    if not untie:
        raise MergeRefusal(
            TIED,
            dict.fromkeys(update.key for update in of_one),
            f"{where}: the update of {of_one[0].key!r} is for one of two uses of a tied tensor "
            f"({tie.table!r} is also the output head); a merge would change both",
            "--untie writes the head as a separate tensor and records that in config.json",
        )
    return of_one


def _check_lookups(of_one: Sequence[Placed], tie: Tie, where: str) -> None:
    """Raise if an update is for one lookup of a table that has several."""
    for update in of_one:
        if update.tensor in tie.lookups and not tie.apart:
            raise LoraFxError(
                f"{where}: {update.key!r} is for one of several lookups of {tie.table!r}, which "
                "models of this type hold once, tied or not",
                f"train one update of {tie.table!r}, which acts on all lookups",
            )
    if not tie.lookups:
        return
    for update in of_one:
        if isinstance(update.entry, Full) and update.tensor == tie.table:
            raise LoraFxError(
                f"{where}: {update.key!r} replaces the tensor under that name alone, but models "
                f"of this type read the table as {some(list(tie.lookups))}, so that PEFT's copy "
                "has no effect",
                "save the adapter with all names of the table (ensure_weight_tying)",
            )


def spread(placed: Sequence[Placed], tie: Tie, names: Collection[str]) -> list[Placed]:
    """Repeat each update for every other tensor among `names` that it applies to.

    1. The two names of a bias are one, unless each has an update.
    2. A name that is no tensor of its own is the one that it stands for.
    3. An update of the table is one of all its lookups, and of the head where it means both uses.
    """
    updated = {update.tensor for update in placed}
    sources = tie.sources()
    for name, source in tie.biases.items():
        if {name, source} <= updated:
            sources.pop(name)

    spread_updates: dict[tuple[int, str], Placed] = {}
    for update in placed:
        has_tensor = update.tensor in names and update.tensor not in tie.biases
        name = update.tensor if has_tensor else sources.get(update.tensor, update.tensor)
        spread_updates.setdefault((id(update.entry), name), replace(update, tensor=name))

    for update in tuple(spread_updates.values()):
        for name, source in sources.items():
            if source != update.tensor or name not in names:
                continue
            if name == tie.head and not means_both_uses(update, tie, placed):
                continue
            spread_updates.setdefault((id(update.entry), name), replace(update, tensor=name))
    return list(spread_updates.values())


def check_scaled(tie: Tie, config: JsonView, where: str) -> None:
    """Raise if untying alone would change the model's outputs."""
    model_type = config.get("model_type")
    if model_type not in _SCALED or "scale_decoder_outputs" in config:
        return
    hint = "train an update of other weights than the table and the head"
    if model_type in _SAYS_SCALE:
        if config.get("tie_word_embeddings") is False:  # it does not scale
            return
        hint = "save the base with transformers 5, whose config has scale_decoder_outputs"
    raise LoraFxError(
        f"{where}: a {model_type} scales its logits only if {tie.table!r} is also the head, and "
        "the config has no separate field for it; untied, the logits would be too large",
        hint,
    )
