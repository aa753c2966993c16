"""Chat templates, rendered in a separate process with limits on time, memory and text.

A template is a program in a language with loops: how long it runs and how much it writes no
arithmetic on its text tells. transformers' sandbox lets it reach nothing of the machine, and gives
it all of the machine's time and memory: `{{ '%999999999d' % 1 }}` is a gigabyte. So the process
that renders has as little of both as the lines of a data file need.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files import isolated
from lora_fx.files.strict_json import json_object
from lora_fx.text import Json, JsonView

MAX_TEMPLATE = 1 << 17
"""Characters of the longest template; gpt-oss has 17,000."""
SECONDS = 0.8
"""Processor time for all lines; a template takes less than 50 ms to compile."""
OF_A_LINE = 0.02
"""Additional CPU seconds for each line; a line takes a millisecond."""
MEGABYTES = 128
"""Memory that rendering may take in addition to the libraries."""
CHARACTERS = 1 << 20
"""Characters that a line may be rendered to, in addition to a multiple of its own length."""
TIMES = 20
"""The factor by which a rendered line may be longer than its characters."""
_HINT = "write the turns as the model's chat template wants them"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the spans of it that the assistant generates."""

    text: str
    spans: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and where it is from.

    Attributes:
        text: In Jinja, as transformers extends it.
        folder: The folder of the tokenizer that has it, for messages.
        tokens: The special tokens that it may write, by name.
        marked: Whether it marks what the assistant generates.
    """

    text: str
    folder: str
    tokens: JsonView
    marked: bool

    def render(self, lines: Mapping[str, JsonView]) -> dict[str, Rendered]:
        """The conversations of a data file.

        Args:
            lines: By file and number of the line: objects with `messages` and `tools`.

        Raises:
            LoraFxError: The template refuses a line, or needs more than the limits.
        """
        if len(self.text) > MAX_TEMPLATE:
            raise LoraFxError(
                f"{self.folder}: its chat template has {len(self.text)} characters; at most "
                f"{MAX_TEMPLATE} are read",
                "is it the template of this model?",
            )
        job = {
            "template": self.text,
            "tokens": self.tokens,
            "marked": self.marked,
            "lines": [*lines.values()],
        }
        process = subprocess.run(
            [*isolated.PYTHON, "-W", "ignore", "-m", __name__],
            input=json.dumps(job, default=str),
            env=isolated.environment(),
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        rendered = {}
        for where, answer in zip(lines, process.stdout.splitlines(), strict=False):
            conversation = json_object(answer, where)
            if "error" in conversation:
                why = f"the chat template refuses this line: {conversation['error']}"
                raise LoraFxError(f"{where}: {why}", _HINT)
            spans = [(start, end) for start, end in conversation["spans"]]
            rendered[where] = Rendered(conversation["text"], spans)
        for where in lines:
            if where not in rendered:
                raise self._killed(where, process.returncode, process.stderr)
        return rendered

    def _killed(self, where: str, code: int, err: str) -> LoraFxError:
        """The error for a process that ended before a line was rendered."""
        if code == -signal.SIGALRM:
            why = f"takes more than {SECONDS} s of CPU time"
        else:
            lines = err.strip().splitlines() or [f"exit code {code}"]
            why = (
                f"ended its process, which is limited to {MEGABYTES} MB: {one_line(lines[-1], 200)}"
            )
        what = f"{where}: the chat template of {self.folder} {why}"
        return LoraFxError(what, "is it the template of this model?")


# The process that renders.


def main() -> None:
    """Render the conversations of standard input, a line of JSON each, within the limits."""
    from transformers.utils.chat_template_utils import render_jinja_template

    job = json.load(sys.stdin)
    _limit(SECONDS + OF_A_LINE * len(job["lines"]))
    left = 64 * CHARACTERS
    for row in job["lines"]:
        most = CHARACTERS + TIMES * len(json.dumps(row))
        try:
            texts, spans = render_jinja_template(
                conversations=[row["messages"]],
                tools=row.get("tools"),
                chat_template=job["template"],
                return_assistant_tokens_mask=job["marked"],
                **job["tokens"],
            )
            answer = _answer(texts[0], spans[0] if spans else [], min(most, left))
        except MemoryError:
            answer = {"error": f"it takes more than {MEGABYTES} MB"}
        except Exception as error:  # templates raise what they like
            answer = {"error": one_line(f"{type(error).__name__}: {error}", 200)}
        print(json.dumps(answer), flush=True)
        if "error" in answer:
            return
        left += TIMES * len(json.dumps(row)) - len(answer["text"])


def _answer(text: str, spans: Sequence[tuple[int, int]], most: int) -> Json:
    if len(text) > most:
        return {"error": f"it writes {len(text)} characters, expected at most {most}"}
    return {"text": text, "spans": spans}


def _end_after(seconds: float) -> None:
    """Let SIGALRM end this process once it has had so much processor time.

    `setitimer` counts the ticks of the kernel at which this process runs, of which a busy machine
    misses most: it was late by 2 s. A timer of the process's own clock counts what it had.
    """
    libc, timer = ctypes.CDLL(None), ctypes.c_void_p()
    if not hasattr(libc, "timer_create"):  # macOS
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), signal.SIGALRM))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    libc.timer_create(time.CLOCK_PROCESS_CPUTIME_ID, None, ctypes.byref(timer))
    now = time.process_time()
    at = (ctypes.c_long * 4)(0, 0, *map(int, divmod((now + seconds) * 1e9, 1e9)))
    libc.timer_settime(timer, 1, at, None)  # 1: absolute, on that clock


def _limit(seconds: float) -> None:
    """End this process after so much processor time, and let it have no more than MEGABYTES."""
    _end_after(seconds)
    pages = Path("/proc/self/statm")
    if pages.exists():  # Linux alone counts address space as it is taken
        used = int(pages.read_text().split()[0]) * resource.getpagesize()
        most = used + (MEGABYTES << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
