"""An ONNX graph while it is drawn: its text so far, and the ways in which a weight is stored."""

# ruff: noqa: E501  # lines of drawn text are not folded

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

WIDTHS = (3, 4, 6)


@dataclass
class Draft:
    """A graph while it is drawn.

    Attributes:
        rng: Of the seed.
        opset: Of the graph.
        kind: Of h: seq [N, T, width], flat [N, width] or image [N, width, H, W].
        width: Of h.
        steps: T where it is a number.
        lines: The text.
        known: Weights that may be used again: (variable, in, out, whether stored [in, out]).
        ids: There is an input of ids, int64.
        rows: N where it is a number.
    """

    rng: random.Random
    opset: int
    kind: str
    width: int
    steps: int | None = None
    lines: list[str] = field(default_factory=list)
    known: list[tuple[str, int, int, bool]] = field(default_factory=list)
    ids: bool = False
    rows: int | None = None
    count: int = 0

    def say(self, *lines: str) -> None:
        """Lines of the text."""
        self.lines += lines

    def out(self) -> int:
        """Another width, or the same."""
        return self.rng.choice((self.width, *WIDTHS))

    def chance(self, share: float) -> bool:
        """True so often."""
        return self.rng.random() < share

    def name(self) -> str:
        """A new variable, which is what a weight is called too; see Text.weight for odd names."""
        self.count += 1
        return f"w{self.count}"

    def weight(self, shape: str, layout: str, *, plain: bool = False, owner: str = "g") -> str:
        """A weight, stored in one of many ways; returns its variable."""
        w = self.name()
        sizes = [int(n) for n in shape.split()]
        text = ", ".join(map(str, sizes))
        way = 0 if plain else self.rng.randrange(16)
        how = {1: ", how='constant'", 2: ", how='input'"}.get(way, "")
        if how and owner != "g":
            how = ""
        if way == 3 and len(sizes) == 2:
            turned = " ".join(layout.split()[::-1])
            self.say(f"{w} = g.weight('{w}', ({sizes[1]}, {sizes[0]}), '{turned}')",
                     f"{w} = g.turn({w}, 1, 0)")  # fmt: skip
        elif way == 4 and not any(c.isdigit() for c in layout):
            split = " ".join(t + str(n) for t, n in zip(layout.split(), sizes, strict=True))
            whole = 1
            for n in sizes:
                whole *= n
            self.say(f"{w} = g.weight('{w}', ({whole},), '{split}')",
                     f"{w} = g.shape({w}, [{text}])")  # fmt: skip
        elif way == 5:
            self.say(f"{w} = g.weight('{w}', ({text},), '{layout}', dtype='float16')",
                     f"{w} = g.cast({w}, 'float32')", "g.gate.append(8e-3)")  # fmt: skip
        elif way == 6:
            self.say(f"{w} = g.weight('{w}', ({text},), '{layout}', dtype='float64')",
                     f"{w} = g.cast({w}, 'float32')")  # fmt: skip
        elif way == 7:
            self.say(f"{w} = g.weight('{w}', ({text},), '{layout}')",
                     f"{w} = g.view('Identity', {w})")  # fmt: skip
        elif way == 8 and not any(c.isdigit() for c in layout):
            self.say(f"{w} = g.weight('{w}', ({sizes[0] * 2}, {text[len(str(sizes[0])) + 2:]}), "
                     f"'{layout}')", f"{w} = g.cut({w}, {sizes[0]}, {2 * sizes[0]}, 0)")  # fmt: skip
        elif way == 9:
            self.say(f"{w} = g.weight('{w}', (1, {text}), 'o1 "
                     + self._sized(layout, sizes) + "')", f"{w} = g.squeeze({w}, 0)")  # fmt: skip
        else:
            self.say(f"{w} = {owner}.weight('{w}', ({text},), '{layout}'{how})")
        return w

    @staticmethod
    def _sized(layout: str, sizes: list[int]) -> str:
        if any(c.isdigit() for c in layout):
            return layout
        return " ".join(t + str(n) for t, n in zip(layout.split(), sizes, strict=True))

    def matrix(self, inside: int, out: int, *, stored_in_out: bool = True) -> str:
        """A matrix, or one that stands there already."""
        if self.chance(0.15):
            fits = [
                n for n, i, o, first in self.known if (i, o, first) == (inside, out, stored_in_out)
            ]
            if fits:
                return self.rng.choice(fits)
        shape, layout = (f"{inside} {out}", "i o") if stored_in_out else (f"{out} {inside}", "o i")
        w = self.weight(shape, layout)
        self.known.append((w, inside, out, stored_in_out))
        return w


Block = Callable[[Draft], None]
