"""What a server serves under a name: the adapter of a probe, its base, or something else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lora_fx.errors import LoraFxError, one_line
from lora_fx.probe.completions import Reply, ask, model_names
from lora_fx.probe.language import FEWEST_POINTS, TEXTS, LanguageProbe, Told
from lora_fx.probe.sentences import sentence_of_causes
from lora_fx.probe.server import TOKEN, Server
from lora_fx.probe.verdict import (
    DIFFERS,
    NO_EFFECT,
    NOT_FINITE,
    RIGHT,
    TOO_SMALL,
    Verdict,
)
from lora_fx.text import Json, some

ADAPTER = "adapter"
BASE = "base"
LOGPROBS = "log-probabilities"


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
    verdict: Verdict
    by: str
    told: int
    asked: int
    difference: float = math.nan
    effect: float = math.nan
    unseen: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether the name serves what it should."""
        return self.verdict.is_right

    def line(self, adapter: str) -> str:
        """Return the answer as a sentence."""
        name = one_line(self.model, 80)
        return f"{name}: {self.sentence(adapter)} ({self.evidence()})"

    def sentence(self, adapter: str) -> str:
        """Return the verdict in words, for the adapter of this name."""
        expected = f"the adapter {adapter}" if self.role == ADAPTER else "the base"
        if self.verdict == RIGHT:
            return f"serves {expected}"
        if self.verdict == NOT_FINITE:
            return "log-probabilities are not finite (NaN or infinite)"
        if self.verdict == TOO_SMALL:
            return f"cannot tell: {adapter} changes too little of what the server told"
        if self.verdict == DIFFERS:
            return f"does not serve {expected}; the cause cannot be told"
        if self.by == TEXTS:
            return _sentence_on_texts(self.verdict, expected)
        if self.verdict.is_right:
            return f"serves {expected}, in the precision of {self.verdict.precision}"
        return sentence_of_causes(self.verdict)

    def evidence(self) -> str:
        """Return the numbers behind the verdict."""
        if self.by == TEXTS:
            return f"by texts after {self.told} prompts alone, which show no scale and no part"
        return (
            f"{self.told} of {self.asked} log-probabilities told, largest difference "
            f"{self.difference:.2g}, effect of the adapter {self.effect:.2g}"
        )

    def to_json(self) -> Json:
        """Return the answer as a JSON object."""
        return {
            **vars(self),
            "verdict": str(self.verdict),
            "ok": bool(self),
            "unseen": list(self.unseen),
        }


def _sentence_on_texts(verdict: Verdict, expected: str) -> str:
    """Return a verdict on texts in words."""
    if verdict.is_right:
        return f"says what {expected} says"
    (cause,) = verdict.causes
    if cause == NO_EFFECT:
        return "says what the base says: the adapter has no effect, or too small a one"
    return f"says what the {cause} says"


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
            rows[0] = replace(rows[0], verdict=Verdict(DIFFERS))
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
        return Served(question.model, ADAPTER, verdict, TEXTS, count, len(probe.prompts))
    told = probe.told(reply.logprobs or ())
    verdict = Verdict(DIFFERS)
    if _is_enough(server, probe, reply, told):
        verdict = probe.verdict_on_adapter(told)
    if verdict == DIFFERS:
        verdict = _other_by_points(reply, question)
    difference = probe.difference(told, of_base=False)
    return _by_points(question.model, ADAPTER, verdict, probe, told, difference)


def _of_base(server: Server, question: Question, model: str) -> Served:
    """Ask for the base."""
    probe = question.probe
    reply = _asked(server, model, probe)
    if reply.texts is not None:
        verdict = probe.verdict_on_texts(reply.texts, of_base=True, name=question.adapter)
        return Served(model, BASE, verdict, TEXTS, len(reply.texts), len(probe.prompts))
    told = probe.told(reply.logprobs or ())
    verdict = Verdict(DIFFERS)
    if _is_enough(server, probe, reply, told):
        verdict = probe.verdict_on_base(told, question.adapter)
    difference = probe.difference(told, of_base=True)
    return _by_points(model, BASE, verdict, probe, told, difference)


def _by_points(
    model: str, role: str, verdict: Verdict, probe: LanguageProbe, told: Told, difference: float
) -> Served:
    unseen: list[str] = []
    if verdict.is_right and role == ADAPTER:
        unseen = probe.unseen_groups(told, verdict)
    return Served(
        model,
        role,
        verdict,
        LOGPROBS,
        len(told.places),
        len(probe.points),
        difference,
        probe.effect(told),
        tuple(unseen),
    )


def _asked(server: Server, model: str, probe: LanguageProbe) -> Reply:
    continuations = (*probe.base.greedy, *probe.adapter.greedy)
    longest = max(map(len, continuations), default=0)
    return ask(server, model, probe.prompts, longest + 1)


def _is_enough(server: Server, probe: LanguageProbe, reply: Reply, told: Told) -> bool:
    """Whether a server told enough points for a verdict.

    The two most probable tokens of base and adapter are points, so that a server that told fewer
    serves neither, unless it has other names for tokens.

    Raises:
        LoraFxError: No point was told, and tokens were named by texts.
    """
    if len(told.places) >= FEWEST_POINTS:
        return True
    names_ids = any(isinstance(name, int) for answer in reply.logprobs or () for name in answer)
    if names_ids or len(told.places):
        return False
    raise LoraFxError(
        f"{server.url}: none of the tokens that the server told is one of the probe's: it serves "
        "neither the adapter nor its base, or it names tokens in another way",
        "check which model has this name on the server",
    )


def _other_by_points(reply: Reply, question: Question) -> Verdict:
    """Return which other adapter the log-probabilities are those of."""
    for name, probe in question.others.items():
        told = probe.told(reply.logprobs or ())
        enough = len(told.places) >= FEWEST_POINTS
        if enough and probe.verdict_on_adapter(told).is_right:
            return Verdict(causes=[f"adapter {name}"])
    return Verdict(DIFFERS)


def _other_by_texts(texts: tuple[str, ...], question: Question) -> Verdict:
    """Return which other adapter the texts are those of."""
    for name, probe in question.others.items():
        if probe.verdict_on_texts(texts, of_base=False, name=name).is_right:
            return Verdict(causes=[f"adapter {name}"], precision=TEXTS)
    return Verdict(DIFFERS)
