"""What a server of a language model is asked: POST /completions of the OpenAI API.

Servers take different parts of that API, so FORMS are tried in order until one is answered: a
prompt as tokens or as text, 20 log-probabilities or 5, which is OpenAI's limit, and an option of
vLLM that names tokens by id. Sampling has no effect on log-probabilities of the first token; the
temperature is 1 because SGLang divides by it before it takes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_fx.errors import LoraFxError, one_line
from lora_fx.probe.language import LogProbabilities, Prompt
from lora_fx.probe.server import HttpAnswer, Server
from lora_fx.text import Json, JsonView, counted, is_number, is_whole, near, some

PATH = "/completions"
_ID = "token_id:"
"""Before a token's id, where vLLM writes it in place of the text."""
_NEXT_FORM = (400, 413, 415, 422, 500, 501)
"""What servers answer to a form of question that they do not take; 500 if they do not check it."""
_LOWEST = -9000.0
"""A log-probability below this stands for none: vLLM writes -9999 for that of probability 0."""


@dataclass(frozen=True)
class QuestionForm:
    """One form of the question.

    Attributes:
        by_tokens: The prompt is sent as tokens, and not as text.
        count: How many log-probabilities are asked for.
        names_ids: Tokens are to be named by their ids.
    """

    by_tokens: bool
    count: int
    names_ids: bool = False

    def body(self, model: str, prompt: Prompt) -> Json:
        """Return the question for log-probabilities of the token after a prompt."""
        body = {**self._prompt(model, prompt), "max_tokens": 1, "temperature": 1, "top_p": 1}
        body["logprobs"] = self.count
        if self.names_ids:
            body["return_tokens_as_token_ids"] = True
        return body

    def body_of_text(self, model: str, prompt: Prompt, count: int) -> Json:
        """Return the question for the most probable continuation of a prompt."""
        return {**self._prompt(model, prompt), "max_tokens": count, "temperature": 0}

    def _prompt(self, model: str, prompt: Prompt) -> Json:
        return {"model": model, "prompt": list(prompt.tokens) if self.by_tokens else prompt.text}


FORMS = (
    QuestionForm(by_tokens=True, count=20, names_ids=True),
    QuestionForm(by_tokens=True, count=20),
    QuestionForm(by_tokens=False, count=20),
    QuestionForm(by_tokens=True, count=5),
    QuestionForm(by_tokens=False, count=5),
)


@dataclass(frozen=True)
class Reply:
    """A server's replies to all prompts, in one form.

    Attributes:
        form: The form that the server took.
        logprobs: Log-probabilities of next tokens for each prompt; None if the server gives none.
        texts: In place of these, the continuation of each prompt.
    """

    form: QuestionForm
    logprobs: tuple[LogProbabilities, ...] | None = None
    texts: tuple[str, ...] | None = None


def ask(server: Server, model: str, prompts: Sequence[Prompt], greedy_tokens: int) -> Reply:
    """Ask a server what follows each prompt.

    Args:
        server: The server.
        model: The name under which it serves what is asked.
        prompts: The prompts.
        greedy_tokens: How many tokens of text are asked for if there are no log-probabilities.

    Raises:
        LoraFxError: The server cannot be asked: no connection, an unknown model, an error of its
            own, an answer in another form, or prompts that it reads as other tokens.
    """
    form, first = _first_answer(server, model, prompts[0])
    if _logprobs(first) is None:
        texts = [
            _text(_choice(server, form.body_of_text(model, prompt, greedy_tokens), prompt))
            for prompt in prompts
        ]
        return Reply(form, texts=tuple(texts))

    answers = []
    for prompt in prompts:
        logprobs = _logprobs(_choice(server, form.body(model, prompt), prompt))
        if logprobs is None:
            raise LoraFxError(
                f"{server.url}{PATH}: log-probabilities of one prompt and none of another",
                "try again",
            )
        answers.append(logprobs)
    return Reply(form, logprobs=tuple(answers))


def _first_answer(server: Server, model: str, prompt: Prompt) -> tuple[QuestionForm, JsonView]:
    """Return the first form that the server takes, and its choice."""
    answer = None
    for form in FORMS:
        answer = server.post(PATH, form.body(model, prompt))
        if answer.status == 200:
            return form, _read_choice(server, answer, prompt)
        if answer.status not in _NEXT_FORM:
            break
    assert answer is not None
    raise _refused(server, model, answer)


def _choice(server: Server, body: Json, prompt: Prompt) -> JsonView:
    """Ask one question in a form that the server takes."""
    answer = server.post(PATH, body)
    if answer.status != 200:
        raise _refused(server, str(body["model"]), answer)
    return _read_choice(server, answer, prompt)


def _refused(server: Server, model: str, answer: HttpAnswer) -> LoraFxError:
    """Return the error for an answer that is no success: the model is unknown, or what it says."""
    names = model_names(server) if 400 <= answer.status < 500 else []
    shown = one_line(model, 80)
    if names and model not in names:
        return LoraFxError(
            f"{server.url}: no model {shown!r}; it serves {some(names, 5)}",
            near(model, names, "pass one of these names as --model", cutoff=0.7),
        )
    place = f"{server.url}{PATH}"
    if answer.status == 404:
        hint = "check the address, and the name of the model"
    elif answer.status >= 500:
        hint = "read the server's log"
    else:
        hint = "check that the server completes text: a server of chats alone cannot be asked"
    return LoraFxError(f"{place}: {answer.status}: {answer.reason}", hint)


def model_names(server: Server) -> list[str]:
    """Return the names that the server lists; empty if it lists none."""
    try:
        data = server.get("/models").data
    except LoraFxError:
        return []
    rows = data.get("data") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        return []
    names = [row.get("id") for row in rows if isinstance(row, dict)]
    return [name for name in names if isinstance(name, str)]


def _read_choice(server: Server, answer: HttpAnswer, prompt: Prompt) -> JsonView:
    """Return the one choice of an answer.

    Raises:
        LoraFxError: It has another form, or the server read the prompt as other tokens.
    """
    data = answer.data
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _other_form(server, answer)
    usage = data.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if is_whole(count) and count > 0 and count != len(prompt.tokens):
        raise LoraFxError(
            f"{server.url}: the server reads {prompt.text!r} as {counted(count, 'token')}; "
            f"expected {len(prompt.tokens)}",
            "check that it has the tokenizer of the base, and adds no token at the beginning",
        )
    choice: JsonView = choices[0]
    if not isinstance(choice.get("text"), str):
        raise _other_form(server, answer)
    return choice


def _other_form(server: Server, answer: HttpAnswer) -> LoraFxError:
    return LoraFxError(
        f"{server.url}{PATH}: the answer has no choices with a text: {one_line(answer.text, 120)}",
        "check that this is an OpenAI-compatible server",
    )


def _text(choice: JsonView) -> str:
    return str(choice["text"])


def _logprobs(choice: JsonView) -> LogProbabilities | None:
    """Return the log-probabilities of the first token; None if the server gives none.

    Either `top_logprobs` is a list of objects, text → number, beside `tokens` and
    `token_logprobs`; or `content` is a list of tokens whose `top_logprobs` are objects with
    `token`, `logprob` and perhaps `id`, as in answers of chats.
    """
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        return None
    found: dict[int | str, float] = {}
    content = logprobs.get("content")
    if isinstance(content, list) and content and isinstance(content[0], dict):
        rows = content[0].get("top_logprobs")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict):
                _add(found, row.get("token"), row.get("logprob"))
                _add(found, row.get("id"), row.get("logprob"))
    tops = logprobs.get("top_logprobs")
    if isinstance(tops, list) and tops and isinstance(tops[0], dict):
        for name, value in tops[0].items():
            _add(found, name, value)
    return found or None


def _add(found: dict[int | str, float], name: Any, value: Any) -> None:
    """Add the log-probability of a token; not a number counts as one that is not finite."""
    if isinstance(name, str) and name.startswith(_ID) and name[len(_ID) :].isdecimal():
        name = int(name[len(_ID) :][:10])
    if not isinstance(name, str) and not is_whole(name):
        return
    if value is None:
        value = math.nan
    if is_number(value) and not value < _LOWEST:
        found[name] = float(value)
