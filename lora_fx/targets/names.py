"""Find the tensors that a foreign name may mean: all spelling rules, in their order.

Two tools rarely call a tensor alike. A `NameRule` says how a tensor may be spelt and how a foreign
name may be read; where a reading is a spelling, the name may mean the tensor. `Names` asks its
rules one after the other. The first that has an answer decides, and all of its answers count.
Whoever asks says what no answer, or several, mean: the message depends on the files, the lookup
does not.

============  ==========================================  =======================  ===============
rule          how a tensor is spelt                       how a name is read       asked of
============  ==========================================  =======================  ===============
EXACT         as it is called                             as it is                 every model
also_called   as a release of transformers calls it       without the prefix       checkpoints
also_called   by the module of a node that reads it       as it is                 ONNX files
ENDS          whole, and by its ends                      whole, and by its ends   checkpoints
FLAT          by component, with "_" for "."              so, without tools' marks kohya, diffusers
size          by in and out                               by in and out            ONNX files
============  ==========================================  =======================  ===============

FLAT is in `lora_fx.formats.naming`, since what tools put before a name is a fact of formats; the
names of releases are in `lora_fx.checkpoint.releases`; the prefix of all names of an adapter is
found in `lora_fx.targets.prefix`.

Three ways from an adapter to a tensor are no rules of spelling, and stand where their matter is:
regions, uses and aliases are part of our own keys (`lora_fx.targets.found.Found.get`); a part of a
fused weight needs an update of other rows (`lora_fx.adapter.fused.other_split`); stacks of experts
are told by the shapes of all updates of a module together (`lora_fx.adapter.expert_stacks.place`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass


def as_it_is(name: str) -> tuple[str]:
    """The name itself."""
    return (name,)


@dataclass(frozen=True)
class NameRule:
    """One rule by which a foreign name may mean a tensor: a reading is a spelling of the tensor.

    Attributes:
        spellings: Name of a tensor → what may stand for it.
        readings: Foreign name → what it may stand for.
    """

    spellings: Callable[[str], Iterable[Hashable]] = as_it_is
    readings: Callable[[str], Iterable[Hashable]] = as_it_is


EXACT = NameRule()


def also_called(
    other_names: Mapping[str, Iterable[Hashable]],
    readings: Callable[[str], Iterable[Hashable]] = as_it_is,
) -> NameRule:
    """Tensors go by other names too.

    Args:
        other_names: Name of a tensor → its other names.
        readings: As those of a rule.
    """
    return NameRule(lambda name: other_names.get(name, ()), readings)


class Names:
    """The names of a model's tensors, looked up by rules in their order."""

    def __init__(self, names: Iterable[str], *rules: NameRule) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._indices = [(rule, self._index(rule)) for rule in rules]

    def _index(self, rule: NameRule) -> dict[Hashable, dict[str, None]]:
        index: dict[Hashable, dict[str, None]] = {}
        for name in self._names:
            for spelling in rule.spellings(name):
                index.setdefault(spelling, {})[name] = None
        return index

    def __iter__(self) -> Iterator[str]:
        """The names of the tensors, each once."""
        return iter(self._names)

    def find(self, name: str) -> tuple[str, ...]:
        """The tensors that a foreign name may mean, by the first rule that knows any."""
        for rule, index in self._indices:
            hits: dict[str, None] = {}
            for reading in rule.readings(name):
                hits |= index.get(reading, {})
            if hits:
                return tuple(hits)
        return ()


def tails(name: str) -> list[str]:
    """A name, and its ends after each dot.

    >>> tails("h.0.fc")
    ['h.0.fc', '0.fc', 'fc']
    """
    return [name, *(name[i + 1 :] for i, character in enumerate(name) if character == ".")]


def _longer_or_shorter(name: str, *, known: bool) -> Iterator[Hashable]:
    """What a whole name and the ends of another meet by: its text, and whether it is the known's.

    An end never meets an end: `a.fc` is no `b.fc`.
    """
    yield name, known
    for tail in tails(name):
        yield tail, not known


ENDS = NameRule(
    spellings=lambda name: _longer_or_shorter(name, known=True),
    readings=lambda name: _longer_or_shorter(name, known=False),
)
"""One of the two names is the other's end from a dot on, or they are equal."""
