"""What a server serves under a name: the adapter of a probe, its base, or something else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_fx.errors import LoraFxError, one_line
from lora_fx.probe.completions import Reply, ask, model_names
from lora_fx.probe.language import FEWEST_POINTS, LanguageProbe, Told
from lora_fx.probe.server import TOKEN, Server
from lora_fx.probe.verdict import (
    DIFFERS,
    NO_EFFECT,
    NOT_FINITE,
    OR,
    RIGHT,
    RIGHT_IN,
    SCALED,
    TOO_SMALL,
    is_right,
)
from lora_fx.text import Json, some

LOGPROBS = "log-probabilities"
TEXTS = "texts"
_WITHOUT = "without "
_ADAPTER = "adapter "


@dataclass(frozen=True)
class Served:
    """The answer on one name of a server.

    Attributes:
        model: The name.
        role: adapter or base: what it should be.
        verdict: As docs/probe.md has it.
        by: What the server gave: log-probabilities or texts.
        told: How many points the server told; of texts, how many prompts it continued.
        asked: How many there are.
        difference: The largest difference from what is expected; NaN of texts.
        effect: The largest change by the adapter at the same points; NaN of texts.
        unseen: Groups of targets whose loss these points would not show.
    """

    model: str
    role: str
    verdict: str
    by: str
    told: int
    asked: int
    difference: float = math.nan
    effect: float = math.nan
    unseen: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether the name serves what it should."""
        return is_right(self.verdict)

    def line(self, adapter: str) -> str:
        """Return the answer as a sentence."""
        name = one_line(self.model, 80)
        return f"{name}: {self.meaning(adapter)} ({self.evidence()})"

    def meaning(self, adapter: str) -> str:
        """Return the verdict in words, for the adapter of this name."""
        verdict, _, precision = self.verdict.rpartition(" in ")
        if not verdict:
            verdict, precision = precision, ""
        if self.verdict.startswith(RIGHT_IN):
            return f"{self._expected(adapter)}, in {precision}"
        if verdict == RIGHT:
            return self._expected(adapter)
        suffix = f", in {precision}" if precision else ""
        if OR in verdict or verdict.startswith(_ADAPTER):
            return f"not {self._expected(adapter)}, but {verdict}{suffix}"
        if verdict == NO_EFFECT:
            return f"the base: the adapter {adapter} has no effect{suffix}"
        if verdict.startswith(SCALED):
            factor = verdict.removeprefix(SCALED)
            return f"the adapter {adapter} with its changes multiplied by {factor}{suffix}"
        if verdict.startswith(_WITHOUT):
            group = verdict.removeprefix(_WITHOUT)
            return f"the adapter {adapter} without its targets {group}{suffix}"
        return {
            NOT_FINITE: "numbers that are not finite",
            TOO_SMALL: f"the adapter {adapter} changes too little of what was told to be seen",
            DIFFERS: f"not {self._expected(adapter)}; the cause cannot be told",
        }.get(self.verdict, self.verdict)

    def _expected(self, adapter: str) -> str:
        return f"the adapter {adapter}" if self.role == "adapter" else "the base"

    def evidence(self) -> str:
        """Return the numbers behind the verdict."""
        if self.by == TEXTS:
            return f"by the texts after {self.told} prompts, which show no scale and no part"
        return (
            f"{self.told} of {self.asked} log-probabilities told, largest difference "
            f"{self.difference:.2g}, effect of the adapter {self.effect:.2g}"
        )

    def to_json(self) -> Json:
        """Return the answer as a JSON object."""
        return {**vars(self), "ok": bool(self), "unseen": list(self.unseen)}


@dataclass(frozen=True)
class ServerReport:
    """The answers on all names of a server; true if each serves what it should.

    Attributes:
        url: The server.
        adapter: The name of the adapter.
        rows: The answers.
        notes: What else there is to say.
    """

    url: str
    adapter: str
    rows: tuple[Served, ...]
    notes: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        """Whether every name serves what it should."""
        return all(self.rows)

    def __str__(self) -> str:
        """Return a line for each name."""
        return "\n".join(row.line(self.adapter) for row in self.rows)

    def to_json(self) -> Json:
        """Return the report as fields of a JSON object."""
        return {
            "ok": bool(self),
            "server": self.url,
            "served": [row.to_json() for row in self.rows],
        }


@dataclass(frozen=True)
class Question:
    """What a server is asked about.

    Attributes:
        adapter: The name of the adapter.
        probe: Its question.
        model: The name under which the server should have it.
        base_model: The name under which the server should have its base.
        others: Questions of other adapters that may be served in its place, by name.
    """

    adapter: str
    probe: LanguageProbe
    model: str
    base_model: str | None = None
    others: Mapping[str, LanguageProbe] = field(default_factory=dict)


def ask_server(server: Server, question: Question) -> ServerReport:
    """Ask a server whether it serves an adapter, and its base, under their names.

    Raises:
        LoraFxError: The server cannot be asked, or told too little.
    """
    rows = [_of_adapter(server, question)]
    if question.base_model is not None:
        base = _of_base(server, question, question.base_model)
        if not base and not rows[0] and rows[0].verdict not in (NOT_FINITE, DIFFERS):
            # what is known of the adapter holds on its own base alone
            rows[0] = _with_verdict(rows[0], DIFFERS)
        rows.append(base)
    notes: list[str] = []
    unseen = rows[0].unseen
    if rows[0] and unseen:
        notes.append(
            f"the told points would not show the loss of {some(unseen)}, whose effect is too small"
        )
    notes += _unlisted(server, rows)
    if server.sends_token_openly:
        notes.append(f"the token of {TOKEN} was sent without encryption")
    return ServerReport(server.url, question.adapter, tuple(rows), tuple(notes))


def _unlisted(server: Server, rows: list[Served]) -> list[str]:
    """Return a note on each wrong name that the server does not list: some answer to any name."""
    wrong = [row.model for row in rows if not row]
    if not wrong:
        return []
    names = model_names(server)
    return [
        f"the server does not list {one_line(model, 80)!r}; it may have answered for another of "
        f"its models: {some(names, 5)}"
        for model in wrong
        if names and model not in names
    ]


def _of_adapter(server: Server, question: Question) -> Served:
    """Ask for the adapter."""
    probe = question.probe
    reply = _asked(server, question.model, probe)
    if reply.texts is not None:
        verdict = probe.verdict_on_texts(reply.texts, of_base=False, name=question.adapter)
        if verdict == DIFFERS:
            verdict = _other_by_texts(reply.texts, question)
        count = len(reply.texts)
        return Served(question.model, "adapter", verdict, TEXTS, count, len(probe.prompts))
    told = _told(server, probe, reply)
    verdict = probe.verdict_on_adapter(told)
    if verdict == DIFFERS:
        verdict = _other_by_points(reply, question)
    difference = probe.difference(told, of_base=False)
    return _by_points(question.model, "adapter", verdict, probe, told, difference)


def _of_base(server: Server, question: Question, model: str) -> Served:
    """Ask for the base."""
    probe = question.probe
    reply = _asked(server, model, probe)
    if reply.texts is not None:
        verdict = probe.verdict_on_texts(reply.texts, of_base=True, name=question.adapter)
        return Served(model, "base", verdict, TEXTS, len(reply.texts), len(probe.prompts))
    told = _told(server, probe, reply)
    verdict = probe.verdict_on_base(told, question.adapter)
    difference = probe.difference(told, of_base=True)
    return _by_points(model, "base", verdict, probe, told, difference)


def _by_points(
    model: str, role: str, verdict: str, probe: LanguageProbe, told: Told, difference: float
) -> Served:
    return Served(
        model,
        role,
        verdict,
        LOGPROBS,
        len(told.places),
        len(probe.points),
        difference,
        probe.effect(told),
        tuple(probe.unseen_groups(told)),
    )


def _asked(server: Server, model: str, probe: LanguageProbe) -> Reply:
    continuations = (*probe.base.greedy, *probe.adapter.greedy)
    longest = max(map(len, continuations), default=0)
    return ask(server, model, probe.prompts, longest + 1)


def _told(server: Server, probe: LanguageProbe, reply: Reply) -> Told:
    """Return the told points.

    Raises:
        LoraFxError: There are fewer than FEWEST_POINTS.
    """
    told = probe.told(reply.logprobs or ())
    if len(told.places) < FEWEST_POINTS:
        raise LoraFxError(
            f"{server.url}: the server told {len(told.places)} of {len(probe.points)} points; "
            f"expected at least {FEWEST_POINTS}",
            "check that it serves this base: the tokens it tells are others",
        )
    return told


def _other_by_points(reply: Reply, question: Question) -> str:
    """Return which other adapter the log-probabilities are those of."""
    for name, probe in question.others.items():
        told = probe.told(reply.logprobs or ())
        enough = len(told.places) >= FEWEST_POINTS
        if enough and is_right(probe.verdict_on_adapter(told)):
            return f"{_ADAPTER}{name}"
    return DIFFERS


def _other_by_texts(texts: tuple[str, ...], question: Question) -> str:
    """Return which other adapter the texts are those of."""
    for name, probe in question.others.items():
        if probe.verdict_on_texts(texts, of_base=False, name=name) == RIGHT:
            return f"{_ADAPTER}{name}"
    return DIFFERS


def _with_verdict(served: Served, verdict: str) -> Served:
    return Served(**{**vars(served), "verdict": verdict})
