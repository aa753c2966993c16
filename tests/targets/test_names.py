"""Names that mean tensors: which rule decides, what several answers are, and prefixes by vote."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from lora_fx.targets.names import ENDS, EXACT, NameRule, Names, also_called
from lora_fx.targets.prefix import Prefix, common_prefix


def test_the_first_rule_with_an_answer_decides() -> None:
    others = {"a.w": ("b.w", "alias"), "b.w": ("alias", "second")}
    names = Names(["a.w", "b.w", "a.w"], EXACT, also_called(others))
    assert list(names) == ["a.w", "b.w"]
    assert names.find("b.w") == ("b.w",), "a name is no alias of another tensor"
    assert names.find("second") == ("b.w",)
    assert names.find("alias") == ("a.w", "b.w")
    assert names.find("c.w") == ()


def test_every_reading_counts_and_each_tensor_once() -> None:
    def readings(name: str) -> Iterator[str]:
        yield name.replace("_", ".")
        yield name
        yield name.replace("_", ".")

    names = Names(["a.b", "a_b"], NameRule(readings=readings))
    assert names.find("a_b") == ("a.b", "a_b")
    assert names.find("a.b") == ("a.b",)


@pytest.mark.parametrize(
    ("name", "hits"),
    [
        ("bert.h.fc", ("bert.h.fc",)),
        ("h.fc", ("bert.h.fc",)),
        ("x.bert.h.fc", ("bert.h.fc",)),
        ("x.h.fc", ()),
        ("fc", ("bert.h.fc", "gpt.fc")),
        ("ert.h.fc", ()),
    ],
)
def test_one_is_an_end_of_the_other(name: str, hits: tuple[str, ...]) -> None:
    assert Names(["bert.h.fc", "gpt.fc"], ENDS).find(name) == hits


@pytest.mark.parametrize(
    ("foreign", "known", "prefix"),
    [
        (["h.q", "h.k"], ["bert.h.q", "bert.h.k", "gpt.h.q"], Prefix(less="bert.")),
        (["x.y.h.q", "x.y.h.k"], ["h.q", "h.k"], Prefix(more="x.y.")),
        (["h.q", "x.k"], ["h.q", "k"], Prefix()),
        (["h.q"], ["bert.h.q", "gpt.h.q"], Prefix()),
        (["x.q", "y.k"], ["q", "k"], Prefix()),
        (["h.q"], [], Prefix()),
    ],
)
def test_the_prefix_that_explains_the_most(
    foreign: list[str], known: list[str], prefix: Prefix
) -> None:
    assert common_prefix(foreign, known) == prefix
    assert bool(prefix) == (prefix != Prefix())


def by_trying(foreign: list[str], known: list[str]) -> Prefix:
    """Every prefix of every name is tried on all of them."""
    if set(foreign) & set(known):
        return Prefix()
    leads = [(name[: i + 1], n in foreign) for n in (*foreign, *known) for i, name in dotted(n)]
    tries = {Prefix(more=lead) if ours else Prefix(less=lead) for lead, ours in leads}
    hits = {p: sum(n.startswith(p.more) and p.changed(n) in known for n in foreign) for p in tries}
    most = max(hits.values(), default=0)
    winners = [p for p, count in hits.items() if count == most]
    return winners[0] if most and len(winners) == 1 else Prefix()


def dotted(name: str) -> Iterator[tuple[int, str]]:
    for i, character in enumerate(name):
        if character == ".":
            yield i, name


def test_a_vote_finds_what_trying_all_finds() -> None:
    rng = random.Random(0)

    def drawn() -> list[str]:
        parts = ("a", "b", "h", "0", "q")
        size = rng.randint(1, 5)
        return [".".join(rng.choices(parts, k=rng.randint(1, 4))) for _ in range(size)]

    found = 0
    for _ in range(2000):
        foreign, known = drawn(), drawn()
        prefix = common_prefix(foreign, known)
        assert prefix == by_trying(foreign, known)
        found += bool(prefix)
        for name in foreign:
            if name.startswith(prefix.more):
                assert prefix.back(prefix.changed(name)) == name
    assert found > 200
