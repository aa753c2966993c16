"""The question of a probe for a server of a language model, and the verdict on its answers.

docs/probe.md describes its JSON. A server tells log-probabilities of a few tokens that may follow a
prompt, so a verdict is over those points of the probe that it told. A server that tells none gives
texts, which can tell base and adapter apart and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.probe.fields import StrictFields
from lora_fx.probe.groups import MOST_GROUPS
from lora_fx.probe.verdict import (
    DIFFERS,
    NO_EFFECT,
    RIGHT,
    TOO_SMALL,
    Gauge,
    Known,
    Verdict,
    verdict_on_adapter,
    verdict_on_base,
)
from lora_fx.text import Json, JsonView, is_whole

MOST_POINTS = 64
MOST_PROMPTS = 16
MOST_TOKENS = 512
"""The largest number of tokens of a prompt or a continuation."""
MOST_CHARACTERS = 4096
"""The length of the longest text."""
FEWEST_POINTS = 4
"""The number of points that a server has to tell for a verdict on log-probabilities."""
TEXTS = "texts"
"""The end of a verdict for which there were texts alone."""
AGAIN = "make the probe again: lora-fx probe ADAPTER --base MODEL -o FILE"

LogProbabilities = Mapping[int | str, float]
"""Natural logarithms of the probabilities of next tokens, by id or by text."""


class Prompt(NamedTuple):
    """A text, and its tokens."""

    text: str
    tokens: tuple[int, ...]


class NextToken(NamedTuple):
    """A point: the number of a prompt, and a token that may follow the whole prompt."""

    prompt: int
    token: int
    text: str


@dataclass(frozen=True)
class Continuations:
    """What a model does with the prompts.

    Attributes:
        values: The log-probabilities at the points.
        greedy: The most probable tokens after each prompt.
        texts: Their texts.
    """

    values: Array
    greedy: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]

    def to_json(self) -> Json:
        """Return the continuations as a probe has them."""
        return {
            "values": _numbers(self.values),
            "greedy": [list(tokens) for tokens in self.greedy],
            "texts": list(self.texts),
        }


@dataclass(frozen=True)
class Told:
    """The points that a server told.

    Attributes:
        places: Their indices into the probe's points.
        found: The log-probabilities that the server gave.
    """

    places: Array
    found: Array


@dataclass(frozen=True)
class LanguageProbe:
    """The question for a server, and what was expected.

    Attributes:
        prompts: What the server is asked to continue.
        points: The tokens whose log-probabilities are compared.
        tolerance: What a log-probability may differ by.
        precisions: How far log-probabilities move in another precision.
        base: What the base does.
        adapter: What the base with the adapter does.
        half: The log-probabilities with all changes multiplied by 0.5, where they are known.
        double: Those with all changes multiplied by 2.
        groups: Those without some of the targets, by the name of the group.
    """

    prompts: Sequence[Prompt]
    points: Sequence[NextToken]
    tolerance: float
    precisions: Mapping[str, float]
    base: Continuations
    adapter: Continuations
    half: Array | None = None
    double: Array | None = None
    groups: Mapping[str, Array] = field(default_factory=dict)

    def to_json(self) -> Json:
        """Return the question as a probe has it."""
        adapter = self.adapter.to_json()
        if self.half is not None and self.double is not None:
            adapter |= {"half": _numbers(self.half), "double": _numbers(self.double)}
        if self.groups:
            adapter["groups"] = {name: _numbers(values) for name, values in self.groups.items()}
        return {
            "prompts": [{"text": text, "tokens": list(tokens)} for text, tokens in self.prompts],
            "points": [list(point) for point in self.points],
            "tolerance": self.tolerance,
            "precisions": dict(self.precisions),
            "base": self.base.to_json(),
            "adapter": adapter,
        }

    @classmethod
    def from_json(cls, data: JsonView, where: str) -> LanguageProbe:
        """Read the field `language` of a probe.

        Args:
            data: The field.
            where: The file, for messages.

        Raises:
            LoraFxError: A field is missing, too large or of another kind.
        """
        return _Reader(f"{where}: its probe: language", AGAIN).read(data)

    def told(self, answers: Sequence[LogProbabilities]) -> Told:
        """Return the points among a server's answers, of which there is one for each prompt.

        A point is looked up by its token, and then by its text.
        """
        places: list[int] = []
        found: list[float] = []
        for place, point in enumerate(self.points):
            answer = answers[point.prompt]
            value = answer.get(point.token)
            if value is None:
                value = answer.get(_text_in(answer, point.text))
            if value is not None:
                places.append(place)
                found.append(value)
        return Told(np.array(places, np.int64), np.array(found, np.float64))

    def verdict_on_adapter(self, told: Told) -> Verdict:
        """Return the verdict on the answers of a server that should have the adapter.

        It is too small to tell where another precision explains the difference, but the adapter's
        effect is not far above what that precision moves.
        """
        places = told.places
        groups = {name: values[places] for name, values in self.groups.items()}
        known = Known(
            self.adapter.values[places],
            self.base.values[places],
            groups=groups,
            half=None if self.half is None else self.half[places],
            double=None if self.double is None else self.double[places],
        )
        gauge = self._gauge(places)
        verdict = verdict_on_adapter(told.found, known, gauge)
        coarsest = max(self.precisions.values(), default=0.0)
        if verdict == DIFFERS and gauge.distance(told.found, known.expected) <= coarsest:
            return Verdict(TOO_SMALL)
        return verdict

    def verdict_on_base(self, told: Told, name: str) -> Verdict:
        """Return the verdict on the answers of a server that should have the base.

        Args:
            told: The points.
            name: The name of the adapter.
        """
        places = told.places
        adapters = {name: self.adapter.values[places]}
        base = self.base.values[places]
        return verdict_on_base(told.found, base, adapters, self._gauge(places))

    def _gauge(self, places: Array) -> Gauge:
        ones = np.ones(len(places))
        return Gauge(ones, ones * self.tolerance, self.precisions)

    def unseen_groups(self, told: Told, verdict: Verdict) -> list[str]:
        """Return the groups without which a server might have got the same verdict.

        Args:
            told: The points.
            verdict: The verdict on them, which may be right in a precision.
        """
        level = self.tolerance
        if verdict.precision:
            level = self.precisions[verdict.precision]
        places = told.places
        expected = self.adapter.values[places]
        gauge = self._gauge(places)
        return [
            name
            for name, values in self.groups.items()
            if not gauge.apart(values[places], expected, level)
        ]

    def difference(self, told: Told, *, of_base: bool) -> float:
        """Return the largest difference from what is expected of the base, or of the adapter."""
        expected = (self.base if of_base else self.adapter).values[told.places]
        return self._gauge(told.places).distance(told.found, expected)

    def effect(self, told: Told) -> float:
        """Return the largest change that the adapter makes at the told points."""
        places = told.places
        return self._gauge(places).distance(self.adapter.values[places], self.base.values[places])

    def verdict_on_texts(self, texts: Sequence[str], *, of_base: bool, name: str) -> Verdict:
        """Return the verdict on continuations, which a server's texts have to begin with.

        Only prompts after which base and adapter say different things count. A verdict other than
        differs is one in TEXTS: another scale may say the same.

        Args:
            texts: The server's continuation of each prompt.
            of_base: Whether the server should have the base.
            name: The name of the adapter.
        """
        telling = [
            number
            for number, pair in enumerate(zip(self.base.texts, self.adapter.texts, strict=True))
            if not _begins(*pair) and not _begins(*reversed(pair))
        ]
        if not telling:
            return Verdict(TOO_SMALL)
        is_base = all(_begins(texts[number], self.base.texts[number]) for number in telling)
        is_adapter = all(_begins(texts[number], self.adapter.texts[number]) for number in telling)
        if (is_base and of_base) or (is_adapter and not of_base):
            return Verdict(RIGHT, precision=TEXTS)
        if is_base:
            return Verdict(causes=[NO_EFFECT], precision=TEXTS)
        if is_adapter:
            return Verdict(causes=[f"adapter {name}"], precision=TEXTS)
        return Verdict(DIFFERS)


def _text_in(answer: LogProbabilities, text: str) -> str:
    """Return the text of a token as a server writes it.

    Tokenizers of SentencePiece leave out the space before a word where a token stands alone. A
    server whose texts come from such a tokenizer has no text with a space before it.
    """
    if any(isinstance(name, str) and name.startswith(" ") for name in answer):
        return text
    return text.lstrip(" ")


def _begins(text: str, expected: str) -> bool:
    """Whether a text begins with another, apart from spaces before them.

    The bytes of a character that is cut in two at the end are no text yet.
    """
    return text.lstrip().startswith(expected.lstrip().rstrip("\N{REPLACEMENT CHARACTER}"))


def _numbers(values: Array) -> list[float]:
    """Return log-probabilities as JSON has them, in steps of 1e-6."""
    return [round(value, 6) for value in values.tolist()]


class _Reader(StrictFields):
    """The strict reading of the question's JSON."""

    def read(self, data: JsonView) -> LanguageProbe:
        prompts = tuple(map(self._prompt, self._rows("prompts", data, MOST_PROMPTS)))
        points = self._rows("points", data, MOST_POINTS)
        count = len(points)
        adapter = self._fields("adapter", data.get("adapter"))
        groups = self._table(
            adapter, "groups", lambda name, numbers: self._values(name, numbers, count),
            needed=False,
        )  # fmt: skip
        if len(groups) > MOST_GROUPS:
            raise self._error("groups", f"{len(groups)} of them", f"at most {MOST_GROUPS}")
        base = self._fields("base", data.get("base"))
        return LanguageProbe(
            prompts,
            tuple(self._point(point, len(prompts)) for point in points),
            self._positive("tolerance", data.get("tolerance")),
            self._table(data, "precisions", self._positive, needed=False),
            self._continuations("base", base, len(prompts), count),
            self._continuations("adapter", adapter, len(prompts), count),
            self._optional(adapter, "half", count),
            self._optional(adapter, "double", count),
            groups,
        )

    def _prompt(self, value: Any) -> Prompt:
        fields = self._fields("prompts", value)
        tokens = self._tokens("prompts", fields.get("tokens"))
        if not tokens:
            raise self._error("prompts", value, "at least one token")
        return Prompt(self._text("prompts", fields.get("text")), tokens)

    def _point(self, value: Any, n_prompts: int) -> NextToken:
        if not isinstance(value, list) or len(value) != 3:
            raise self._error("points", value, "the number of a prompt, a token and its text")
        prompt, token, text = value
        if not is_whole(prompt) or not 0 <= prompt < n_prompts:
            raise self._error("points", value, "the number of a prompt")
        (token,) = self._tokens("points", [token])
        return NextToken(int(prompt), token, self._text("points", text))

    def _continuations(
        self, name: str, fields: JsonView, n_prompts: int, n_points: int
    ) -> Continuations:
        values = self._values(f"{name}.values", fields.get("values"), n_points)
        greedy = fields.get("greedy")
        texts = fields.get("texts")
        if not isinstance(greedy, list) or len(greedy) != n_prompts:
            raise self._error(f"{name}.greedy", greedy, f"tokens after {n_prompts} prompts")
        if not isinstance(texts, list) or len(texts) != n_prompts:
            raise self._error(f"{name}.texts", texts, f"texts after {n_prompts} prompts")
        return Continuations(
            values,
            tuple(self._tokens(f"{name}.greedy", tokens) for tokens in greedy),
            tuple(self._text(f"{name}.texts", text) for text in texts),
        )

    def _tokens(self, name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) > MOST_TOKENS:
            raise self._error(name, value, f"at most {MOST_TOKENS} tokens")
        for token in value:
            if not is_whole(token) or not 0 <= token < 1 << 31:
                raise self._error(name, token, "a token, a whole number from 0")
        return tuple(map(int, value))

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
            raise self._error(name, value, f"a text of at most {MOST_CHARACTERS} characters")
        return value

    def _rows(self, name: str, data: JsonView, most: int) -> list[Any]:
        value = data.get(name)
        if not isinstance(value, list) or not 0 < len(value) <= most:
            found = f"{len(value)} of them" if isinstance(value, list) else value
            raise self._error(name, found, f"1 to {most}")
        return value
