"""The common prefix by which an adapter's names differ from a model's names.

A model that was saved by its inner class lacks the outer's prefix (`bert.`), a component of a
pipeline its own (`unet.`), and the reverse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lora_fx.targets.names import ENDS, Names


@dataclass(frozen=True)
class Prefix:
    """The prefix that foreign names have before the model's names, or lack.

    Attributes:
        more: What foreign names begin with, and the model's do not.
        less: What the model's names begin with, and foreign ones do not.
    """

    more: str = ""
    less: str = ""

    def __bool__(self) -> bool:
        """True where the two differ."""
        return bool(self.more or self.less)

    def changed(self, name: str) -> str:
        """A foreign name as the model would have it."""
        return self.less + name.removeprefix(self.more)

    def back(self, name: str) -> str:
        """A name of the model as the foreign ones have it."""
        return self.more + name.removeprefix(self.less)


def common_prefix(foreign: Iterable[str], known: Iterable[str]) -> Prefix:
    """The prefix that turns the most foreign names into known ones.

    There is none where a name is known as it is, or where two prefixes explain as many names.
    """
    counts = Counter(foreign)
    known = frozenset(known)
    if not known.isdisjoint(counts):
        return Prefix()

    by_ends = Names(counts, ENDS)  # of the two sets the smaller one
    votes: Counter[Prefix] = Counter()
    for name in known:
        for hit in by_ends.find(name):
            if name.endswith(hit):
                votes[Prefix(less=name.removesuffix(hit))] += counts[hit]
            else:
                votes[Prefix(more=hit.removesuffix(name))] += counts[hit]
    most = max(votes.values(), default=0)
    winners = [prefix for prefix, count in votes.items() if count == most]
    return winners[0] if len(winners) == 1 else Prefix()
