"""The making of a probe's question for a server: prompts, and what base and adapter say after them.

Points are tokens that are probable for the base or for the adapter, since a server tells the most
probable tokens only: a server with the adapter tells those of the adapter, and one that lost the
adapter those of the base. Log-probabilities that move with the precision are no proof, so that
their movement is measured, and a greedy continuation ends before two tokens are about as probable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.updates import is_plain
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.inputs import Named
from lora_fx.passes.proofs.probe_making import NARROWER, multiplied
from lora_fx.passes.proofs.reference import Run
from lora_fx.probe.groups import groups_of
from lora_fx.probe.language import Continuations, LanguageProbe, NextToken, Prompt
from lora_fx.progress import stage
from lora_fx.targets.found import Found

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "To make bread you need flour, water and",
    "Dear Sir or Madam, I am writing to",
    "One, two, three, four,",
    "The opposite of hot is",
    "Monday, Tuesday, Wednesday,",
    "def add(a, b):\n    return",
)
"""Some of them leave little choice, so that their continuations are the same in all precisions."""
TOLD = 20
"""The number of most probable tokens that servers tell at most."""
POINTS = 8
"""The number of points after one prompt."""
SURE = 2
"""The number of most probable tokens of base and adapter that are always points."""
CONTINUED = 16
"""The number of tokens of a greedy continuation."""
MARGIN = 1.25
"""The level of bfloat16 as a multiple of what merged weights in bfloat16 move."""
LEAST_TOLERANCE = 1e-3
"""The least tolerance: what two implementations in float32 differ by on models of many layers."""
FINER = 512
"""The tolerance is the movement in bfloat16 by this; float32 has 2^16 times finer steps."""
UNMEASURED = 0.1
"""How far bfloat16 moves the two most probable tokens apart, where it cannot be measured."""
_LOGITS = "logits"


class Tokenizer(Protocol):
    """The part of a tokenizer of transformers that is used."""

    eos_token_id: int | None
    all_special_ids: Sequence[int]

    def __call__(self, text: str) -> Mapping[str, Any]:
        """Return the tokens of a text as `input_ids`."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens."""


@dataclass(frozen=True)
class Speaker:
    """A causal language model with its tokenizer.

    Attributes:
        run: Returns a run with an adapter, or of the base.
        narrow: Runs the same in bfloat16; None where the model cannot.
        tokenizer: Its tokenizer.
        names: The names of the model's inputs.
    """

    run: Callable[[Adapter | None], Run]
    narrow: Callable[[Adapter | None, Named], Named | None]
    tokenizer: Tokenizer
    names: Sequence[str]

    def after(self, adapter: Adapter | None, rows: Sequence[Sequence[int]]) -> Array:
        """Return the log-probabilities of the token after each row, float64 [rows, tokens].

        Rows are filled up on the right, which no token before sees.
        """
        outputs = self.run(adapter)(self._feeds(rows))
        return _last(outputs, rows)

    def after_in_bfloat16(
        self, adapter: Adapter | None, rows: Sequence[Sequence[int]]
    ) -> Array | None:
        """Return the same in bfloat16; None where the model cannot run in it."""
        outputs = self.narrow(adapter, self._feeds(rows))
        return None if outputs is None else _last(outputs, rows)

    def _feeds(self, rows: Sequence[Sequence[int]]) -> dict[str, Array]:
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), longest), np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        feeds = {"input_ids": ids, "attention_mask": mask}
        unknown = sorted(set(self.names) - feeds.keys())
        if unknown or "input_ids" not in self.names:
            raise LoraFxError(
                f"the model has the inputs {', '.join(self.names)}; expected input_ids and "
                "attention_mask",
                "leave --server out; the rest of the probe needs no tokens",
            )
        return {name: feeds[name] for name in self.names}

    def text_after(self, tokens: Sequence[int], more: Sequence[int]) -> str:
        """Return the text that further tokens add; empty if they change what stands before."""
        before = self.tokenizer.decode(list(tokens))
        whole = self.tokenizer.decode([*tokens, *more])
        return whole[len(before) :] if whole.startswith(before) else ""


@stage("asking the model what follows")
def make_language(speaker: Speaker, adapter: Adapter, found: Found) -> LanguageProbe:
    """Make the question for a server.

    Args:
        speaker: The base.
        adapter: Bound to it.
        found: Its targets.

    Raises:
        LoraFxError: The model has other inputs than tokens and a mask, or its tokenizer no tokens.
    """
    prompts = [Prompt(text, _tokens(speaker.tokenizer, text)) for text in PROMPTS]
    rows = [prompt.tokens for prompt in prompts]
    base = speaker.after(None, rows)
    with_adapter = speaker.after(adapter, rows)
    points: list[NextToken] = []
    for number, prompt in enumerate(prompts):
        tokens = _candidates(speaker, prompt, base[number], with_adapter[number])
        points += [NextToken(number, token, text) for token, text in tokens.items()]
    if not points:
        raise LoraFxError("no token after the prompts has a text of its own", "report this model")

    numbers = [point.prompt for point in points]
    ids = [point.token for point in points]
    exact = [(None, base), (adapter, with_adapter)]
    moved, least_gap = _movements(speaker, exact, rows, (numbers, ids))
    precisions: dict[str, float] = {}
    if moved > 0:
        precisions = {"tf32": _rounded(moved / NARROWER), "bfloat16": _rounded(moved)}
    probe = LanguageProbe(
        prompts,
        points,
        _rounded(max(LEAST_TOLERANCE, moved / FINER)),
        precisions,
        _continued(speaker, None, prompts, base[numbers, ids], least_gap),
        _continued(speaker, adapter, prompts, with_adapter[numbers, ids], least_gap),
    )
    return _with_parts(probe, speaker, adapter, found)


def _with_parts(
    probe: LanguageProbe, speaker: Speaker, adapter: Adapter, found: Found
) -> LanguageProbe:
    """Add the values at half and twice the strength, and without each group of targets."""
    rows = [prompt.tokens for prompt in probe.prompts]
    numbers = [point.prompt for point in probe.points]
    ids = [point.token for point in probe.points]

    def values(varied: Adapter) -> Array:
        return speaker.after(varied, rows)[numbers, ids]

    plain = {key: low for key, low in adapter.lowrank.items() if is_plain(low)}
    if len(plain) == len(adapter.entries):
        half = values(multiplied(adapter, dict.fromkeys(plain, 0.5)))
        double = values(multiplied(adapter, dict.fromkeys(plain, 2.0)))
        if np.isfinite(half).all() and np.isfinite(double).all():
            probe = replace(probe, half=half, double=double)

    order = {key: number for number, key in enumerate(found)}
    keys = sorted(plain, key=lambda key: order.get(key, len(order)))
    targets = [target for key in keys if (target := found.get(key)) is not None]
    groups = groups_of(targets)
    if len(groups) < 2:
        return probe
    without = {
        name: values(multiplied(adapter, dict.fromkeys(keys_of_group, 0.0)))
        for name, keys_of_group in groups.items()
    }
    finite = {name: row for name, row in without.items() if np.isfinite(row).all()}
    return replace(probe, groups=finite)


def _tokens(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the tokens of a text, with those that the tokenizer adds, as servers add them."""
    tokens = tuple(map(int, tokenizer(text)["input_ids"]))
    eos = tokenizer.eos_token_id
    if len(tokens) > 1 and tokens[-1] == eos:
        return tokens[:-1]  # a tokenizer that ends every text; servers of completions do not
    if not tokens:
        raise LoraFxError(f"the tokenizer has no tokens for {text!r}", "check the tokenizer")
    return tokens


def _last(outputs: Named, rows: Sequence[Sequence[int]]) -> Array:
    """Return the log-probabilities after the last token of each row."""
    logits = outputs.get(_LOGITS)
    if logits is None or logits.ndim != 3:
        raise LoraFxError(
            "the model has no output logits [rows, tokens, vocabulary]", "report this model"
        )
    numbers = np.arange(len(rows))
    last = logits[numbers, [len(row) - 1 for row in rows]].astype(np.float64)
    last -= last.max(-1, keepdims=True)
    return np.asarray(last - np.log(np.exp(last).sum(-1, keepdims=True)))


def _candidates(
    speaker: Speaker, prompt: Prompt, base: Array, with_adapter: Array
) -> dict[int, str]:
    """Return tokens after a prompt that show the adapter, with their texts.

    Half of them are among the most probable of the base, and half among those of the adapter: the
    SURE most probable, and then those whose log-probability changes most.
    """
    change = np.abs(with_adapter - base)
    probable = {name: _most_probable(row) for name, row in (("b", base), ("a", with_adapter))}
    texts = _distinct_texts(speaker, prompt, [*probable["b"], *probable["a"]])
    chosen: dict[int, str] = {}
    for tokens in probable.values():
        ranked = tokens[:SURE] + sorted(tokens[SURE:], key=lambda token: -change[token])
        of_one = [token for token in ranked if token in texts][: POINTS // 2]
        chosen |= {token: texts[token] for token in of_one}
    for token in sorted(texts, key=lambda token: -change[token]):
        if len(chosen) < POINTS:
            chosen[token] = texts[token]
    return chosen


def _most_probable(row: Array) -> list[int]:
    """Return the TOLD most probable tokens, the first first."""
    return [int(token) for token in np.argsort(-row, kind="stable")[:TOLD]]


def _distinct_texts(speaker: Speaker, prompt: Prompt, tokens: Sequence[int]) -> dict[int, str]:
    """Return the texts of tokens; without those that are no text alone, or that two tokens have.

    Servers write special tokens in different ways.
    """
    special = set(speaker.tokenizer.all_special_ids)
    texts = {
        token: speaker.text_after(prompt.tokens, [token])
        for token in dict.fromkeys(tokens)
        if token not in special
    }
    counts: dict[str, int] = {}
    for text in texts.values():
        counts[text.lstrip(" ")] = counts.get(text.lstrip(" "), 0) + 1
    return {
        token: text
        for token, text in texts.items()
        if text and "\N{REPLACEMENT CHARACTER}" not in text and counts[text.lstrip(" ")] == 1
    }


def _movements(
    speaker: Speaker,
    exact: Sequence[tuple[Adapter | None, Array]],
    rows: Sequence[Sequence[int]],
    places: tuple[list[int], list[int]],
) -> tuple[float, float]:
    """Return how far bfloat16 moves a point, and the gap between the two most probable tokens.

    Both are MARGIN times what is measured, of the points and of the TOLD most probable tokens.
    Where the model cannot run in bfloat16, they are 0 and UNMEASURED.

    Args:
        speaker: The model.
        exact: The log-probabilities of the base, and with the adapter.
        rows: The tokens of the prompts.
        places: The rows and the tokens of the points.
    """
    moved = 0.0
    gap = 0.0
    for which, values in exact:
        narrow = speaker.after_in_bfloat16(which, rows)
        if narrow is None or not np.isfinite(narrow[places]).all():
            return 0.0, UNMEASURED
        probable = np.argsort(-values, axis=-1)[:, :TOLD]
        change = np.take_along_axis(narrow - values, probable, -1)
        at_points = (narrow - values)[places]
        moved = max(moved, float(np.abs(change).max()), float(np.abs(at_points).max()))
        gap = max(gap, float(np.abs(change[:, 0] - change[:, 1]).max()))
    return MARGIN * moved, MARGIN * gap


def _continued(
    speaker: Speaker,
    adapter: Adapter | None,
    prompts: Sequence[Prompt],
    values: Array,
    least_gap: float,
) -> Continuations:
    """Return the greedy continuations of all prompts.

    One ends at the end of the text, after CONTINUED tokens, or where the most probable token is
    less than `least_gap` before the next one.
    """
    continued: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for _ in range(CONTINUED):
        if not going:
            break
        rows = [[*prompts[number].tokens, *continued[number]] for number in going]
        still_going = []
        for number, row in zip(going, speaker.after(adapter, rows), strict=True):
            second, first = np.argsort(row, kind="stable")[-2:]
            is_end = int(first) == speaker.tokenizer.eos_token_id
            if not is_end and row[first] - row[second] > least_gap:
                continued[number].append(int(first))
                still_going.append(number)
        going = still_going
    texts = [
        speaker.text_after(prompt.tokens, tokens)
        for prompt, tokens in zip(prompts, continued, strict=True)
    ]
    return Continuations(values, tuple(map(tuple, continued)), tuple(texts))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
