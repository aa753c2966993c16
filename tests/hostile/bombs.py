"""Small files that would cost much: TOML configs, chat templates and patterns, drawn from a seed.

    python -m tests.hostile.bombs [--n 1000] [--patterns 200] [--seed S]

A round draws one and runs what reads it in a fork of a warm process with limits. No exception may
reach the user, and nothing may take more than SECONDS of processor time and MEGABYTES beyond what a
good file of its family takes. A line for each failure, then one JSON object of counts.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fx.fx.train import chat
from tests.hostile import child
from tests.hostile.mutate import make

Random = random.Random
SECONDS, MEGABYTES = 2.0, 200.0
"""Beyond a good file of the family."""


# TOML configs of merge.


GOOD_TOML = '[merge]\nbase = "base.safetensors"\nadapters = ["peft"]\ndtype = "float32"\n'
KEYS = ("dtype", "rank", "how", "force", "adapters", "max-shard-size", "threads", "x", "untie")


def deep(rng: Random) -> int:
    """A count from 10 up, mostly small."""
    return int(10 ** rng.uniform(1, 4.5))


TOML: tuple[Callable[[Random], str], ...] = (
    lambda rng: "[" * (n := deep(rng)) + "]" * n,
    lambda rng: "{a=" * (n := deep(rng)) + "1" + "}" * n,
    lambda rng: rng.choice(("", "-", "+")) + "9" * deep(rng),
    lambda rng: rng.choice(("0x", "0o", "0b")) + "1" * deep(rng),
    lambda rng: "1." + "9" * deep(rng),
    lambda rng: "1e" + "9" * rng.choice((3, 9, 4000)),
    lambda rng: rng.choice(("inf", "nan", "-inf", "+nan", "-0", "0.0", "1_0", "1__0")),
    lambda rng: rng.choice(("true", "false", "tru", "")),
    lambda rng: '"' + rng.choice(("\\u0000", "\\ud800", "\\x", "a" * deep(rng), "\u202e")) + '"',
    lambda rng: '"""' + '"' * deep(rng),
    lambda rng: "'''" + "'" * deep(rng),
    lambda rng: '"""\\' + "\n" * deep(rng) + '"""',
    lambda rng: rng.choice(("2024-13-01", "1979-05-27T07:32:00Z", "25:00:00", "0000-01-01")),
    lambda rng: "[" + ",".join('"peft"' for _ in range(deep(rng))) + "]",
    lambda rng: "[" + ",".join("9" * 30 for _ in range(rng.randrange(50))) + "]",
    lambda rng: "{" + ",".join(f"k{i}=1" for i in range(deep(rng))) + "}",
    lambda rng: "{" + ".".join("a" * deep(rng)) + "=1}",
)


def toml(rng: Random) -> str:
    """A config whose values, keys or tables are drawn."""
    match rng.randrange(8):
        case 0:
            return "[" + ".".join("a" * deep(rng)) + "]\n"
        case 1:
            return "[merge]\n" + "x." * deep(rng) + "y = 1\n"
        case 2:
            return "".join(f"[a{i}]\n" for i in range(deep(rng)))
        case 3:
            return "[[merge]]\n" * deep(rng)
        case 4:
            return "[merge]\n" + "".join(f'"k{i}".a.b = 1\n' for i in range(deep(rng)))
        case _:
            lines = [f"{rng.choice(KEYS)} = {rng.choice(TOML)(rng)}" for _ in range(2)]
            return GOOD_TOML + "\n".join(lines) + "\n"


# Chat templates, and a conversation.


ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "How far is the moon?"},
            {"role": "assistant", "content": "384,400 km."},
        ]
    }
]
GOOD_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)


def nested(rng: Random) -> str:
    """Loops in loops over ranges."""
    depth, count = rng.randrange(2, 12), rng.choice((10, 100, 1000, 99999))
    start = "".join(f"{{% for i{k} in range({count}) %}}" for k in range(depth))
    return start + rng.choice(("", "x", "{{ i0 }}")) + "{% endfor %}" * depth


def large(rng: Random) -> int:
    return int(10 ** rng.uniform(3, 12))


FILTERS = ("tojson", "list", "pprint", "string", "urlencode", "reverse | list")
TEMPLATES: tuple[Callable[[Random], str], ...] = (
    nested,
    lambda rng: f"{{{{ 'a' * {large(rng)} }}}}",
    lambda rng: f"{{{{ ('a' * {large(rng)}) | length }}}}",
    lambda rng: f"{{{{ '%{large(rng)}d' % 1 }}}}",
    lambda rng: f"{{{{ '{{:>{large(rng)}}}'.format(1) }}}}",
    lambda rng: f"{{{{ 'a'.{rng.choice(('ljust', 'rjust', 'center', 'zfill'))}({large(rng)}) }}}}",
    lambda rng: f"{{{{ 'a' | {rng.choice(('center', 'indent'))}({large(rng)}) }}}}",
    lambda rng: f"{{{{ [0] * {large(rng)} }}}}",
    lambda rng: f"{{{{ {rng.randrange(2, 99)} ** {large(rng)} }}}}",
    lambda rng: f"{{{{ lipsum(n={large(rng)}) }}}}",
    lambda rng: f"{{{{ range({large(rng)}) | list | length }}}}",
    lambda rng: (
        f"{{% for i in range(99999) %}}{{{{ messages | {rng.choice(FILTERS)} }}}}{{% endfor %}}"
    ),
    lambda rng: (
        "{% set ns = namespace(s='ab') %}{% for i in range("
        f"{rng.choice((20, 40, 99999))}) %}}{{% set ns.s = ns.s ~ ns.s %}}{{% endfor %}}"
        "{{ ns.s }}"
    ),
    lambda rng: (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        f"{{{{ f({rng.randrange(10, 900)}) }}}}"
    ),
    lambda rng: "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    lambda rng: "{{ " + "(" * (n := deep(rng)) + "1" + ")" * n + " }}",
    lambda rng: "{{ " + "not " * deep(rng) + "1 }}",
    lambda rng: "{% if 1 %}" * (n := deep(rng)) + "{% endif %}" * n,
    lambda rng: "{{ " + " ~ ".join(["'a'"] * deep(rng)) + " }}",
    lambda rng: "{# " + "x" * deep(rng) + rng.choice((" #}", "")),
    lambda rng: "{% generation %}" * rng.randrange(1, 40) + "x",
    lambda rng: "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    lambda rng: "{{ raise_exception('no') }}" * rng.randrange(1, 3),
    lambda rng: f"{{{{ strftime_now('{'%Y' * deep(rng)}') }}}}",
    lambda rng: (
        "{% set x = dict(a=1) %}{% for i in range(99999) %}{% set x = dict(a=x) %}"
        "{% endfor %}{{ x }}"
    ),
    lambda rng: "{{ messages.__class__.__mro__ }}{{ ''.__class__ }}{{ cycler.__init__ }}",
    lambda rng: "{% include 'x' %}{% import 'os' as os %}",
    lambda rng: f"{{{{ 'a,' * {large(rng)} }}}}{{{{ ('a,' * 99999).split(',') * 999 }}}}",
    lambda rng: f"{{{{ ('ab' * 5000).replace('a', 'a' * {large(rng)}) | length }}}}",
    lambda rng: "x" * rng.choice((1000, 200_000)),
)


def template(rng: Random) -> str:
    """A template of one or two bombs, around a good one or not."""
    parts = [rng.choice(TEMPLATES)(rng) for _ in range(rng.choice((1, 1, 2)))]
    return "".join([*parts, GOOD_TEMPLATE] if rng.random() < 0.5 else parts)


# Patterns of PEFT's configs, and of selectors.


LONGEST = 200_000
"""Characters of a pattern."""


def pattern(rng: Random, depth: int = 0) -> str:
    """Repeats of repeats, sets, alternatives, looks and references, nested at random."""
    text = _pattern(rng, depth)
    return text if len(text) < LONGEST else text[:1000]


def _pattern(rng: Random, depth: int) -> str:
    if depth > 6 or rng.random() < 0.15:
        return rng.choice(("a", "[a-z]", r"\w", ".", r"(fc|f|c)", "[\x00-\U0010ffff]", r"\d", "é"))
    inner = pattern(rng, depth + 1)
    counts = (2, 9, 99, 999, 65535, 4294967294, 10**12)
    match rng.randrange(12):
        case 0 | 1 | 2:
            return f"({inner}){{{rng.choice(counts)}}}"
        case 3:
            return f"(?:{inner}){{{rng.choice(counts[:4])},{rng.choice(counts)}}}"
        case 4:
            return f"({inner})+" * rng.choice((1, 2, 30))
        case 5:
            return f"({inner})*{rng.choice(('', '?', '+'))}{pattern(rng, depth + 1)}"
        case 6:
            return "|".join([inner] * min(rng.choice((2, 50, 5000)), 2 + LONGEST // len(inner)))
        case 7:
            return f"({rng.choice(('?=', '?!', '?<=', '?<!', '?>', '?:', '?i:', '?P<n>'))}{inner})"
        case 8:
            return "(" * (n := deep(rng) // 10) + inner + ")" * n
        case 9:
            return f"({inner})" + r"\1" * rng.choice((1, 20))
        case 10:
            return f"(?i:{inner})" + "[\x00-\U0010ffff]" * rng.choice((1, 99))
        case _:
            return inner + rng.choice(("(", "[", "\\", "{9", "**", "(?(1)a|b)", "X", "$"))


PLACES: tuple[Callable[[str], dict[str, Any]], ...] = (
    lambda text: {"target_modules": text},
    lambda text: {"rank_pattern": {text: 2}},
    lambda text: {"alpha_pattern": {text: 2}},
    lambda text: {"exclude_modules": text},
    lambda text: {"modules_to_save": [text]},
    lambda text: {"layers_pattern": text, "layers_to_transform": [0]},
)
READ = ("merge base.safetensors bad -o out.safetensors", "doctor base.safetensors bad",
        "convert bad -o out", "verify base.safetensors bad")  # fmt: skip


# Rounds.


@dataclass(frozen=True)
class Cost:
    """What a fork took, and how it ended.

    Attributes:
        cpu: Seconds of processor time.
        megabytes: Resident, beyond what the parent had.
        told: What was said; for messages.
        raw: An exception reached the user, or the process died of something else than a limit.
    """

    cpu: float
    megabytes: float
    told: str
    raw: bool


def of_command(argv: list[str], folder: Path) -> Cost:
    """A command of the command line."""
    got = child.command(argv, folder, seconds=20)
    for out in folder.glob("out*"):
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    raw = got.raw or (got.code == 2 and not got.refused)
    return Cost(got.cpu, got.megabytes, got.err.strip()[-300:], raw)


def of_template(
    text: str, rows: Sequence[dict[str, Any]] = ROWS, tokens: dict[str, str] | None = None
) -> Cost:
    """The process that renders, forked here and not started anew: the same code and limits."""
    if len(text) > chat.MAX_TEMPLATE:
        return Cost(0.0, 0.0, "too long", raw=False)
    marked = "{% generation %}" in text
    job = {"template": text, "tokens": tokens or {}, "marked": marked, "lines": rows}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryFile("w+") as out:
        pid = os.fork()
        if not pid:
            try:
                os.dup2(out.fileno(), 1)
                sys.stdin, sys.stdout = io.StringIO(json.dumps(job)), open(1, "w")  # noqa: SIM115
                chat.main()
                sys.stdout.flush()
                os._exit(0)
            finally:
                os._exit(70)
        end = time.monotonic() + 120
        done, status, usage = os.wait4(pid, os.WNOHANG)
        while not done and time.monotonic() < end:
            time.sleep(0.002)
            done, status, usage = os.wait4(pid, os.WNOHANG)
        if not done:
            os.kill(pid, 9)
            _, status, usage = os.wait4(pid, 0)
        out.seek(0)
        told = out.read()
    code = os.waitstatus_to_exitcode(status)
    cpu, grown = usage.ru_utime + usage.ru_stime, max(0.0, usage.ru_maxrss / 1024 - before)
    refused = code == -signal.SIGALRM
    answers = [json.loads(line) for line in told.splitlines()]
    answered = code == 0 and all(a.keys() <= {"error", "text", "spans"} for a in answers)
    raw = not done or not (refused or answered)
    return Cost(cpu, grown, told or f"exit {code}", raw)


def rounds(seed: int, n: int, patterns: int, folder: Path) -> Iterator[tuple[str, ...]]:
    """(class, family, round, what was said) of each that failed; counts at the end."""
    make(folder)
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    shutil.copytree(folder / "peft", folder / "bad")
    good = {
        "template": of_template(GOOD_TEMPLATE),
        "toml": run_toml(GOOD_TOML, folder),
        **{line: run_pattern(line, {}, config, folder) for line in READ},
        "selector": run_selector("fc", folder),
    }
    assert not any(cost.raw for cost in good.values()), good
    ended: Counter[str] = Counter()
    most = {"cpu": 0.0, "megabytes": 0.0}
    for i in range(n + patterns):
        rng = Random(f"{seed}/{i}")
        if i >= n and rng.random() < 0.25:
            family, text = "selector", pattern(rng)
            cost = run_selector(text, folder)
        elif i >= n:
            family, text = rng.choice(READ), pattern(rng)
            cost = run_pattern(family, rng.choice(PLACES)(text), config, folder)
        elif i % 2:
            family, text = "template", template(rng)
            cost = of_template(text)
        else:
            family, text = "toml", toml(rng)
            cost = run_toml(text, folder)
        kind = "pattern" if i >= n else family
        more = {k: getattr(cost, k) - getattr(good[family], k) for k in most}
        most = {k: max(most[k], more[k]) for k in most}
        label = (family, str(i), repr(text[:100]), cost.told[-300:])
        ended[kind] += 1
        if cost.raw:
            yield "raw", *label
        elif more["cpu"] > SECONDS:
            yield "time", *label, f"{more['cpu']:.1f} s"
        elif more["megabytes"] > MEGABYTES:
            yield "memory", *label, f"{more['megabytes']:.0f} MB"
    told = {k: round(v, 2) for k, v in most.items()}
    yield "counts", json.dumps({**ended, "most beyond a good one": told})


def run_toml(text: str, folder: Path) -> Cost:
    """merge with a config."""
    (folder / "bad.toml").write_text(text, encoding="utf-8")
    return of_command(["merge", "-o", "out.safetensors", "--config", "bad.toml"], folder)


def run_pattern(line: str, fields: dict[str, Any], config: dict[str, Any], folder: Path) -> Cost:
    """A command that reads an adapter with changed fields."""
    (folder / "bad" / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return of_command(line.split(), folder)


def run_selector(text: str, folder: Path) -> Cost:
    """insert with a selector."""
    argv = ["insert", "graph.onnx", "-o", "out.onnx", "-r", "2", "--include", f"re:{text}"]
    return of_command(argv, folder)


def main() -> None:
    """Run rounds, print what failed and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000, help="TOML files and templates")
    parser.add_argument("--patterns", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        found = rounds(given.seed, given.n, given.patterns, Path(folder))
        child.tell(found, rounds=given.n + given.patterns)


def prepare() -> None:
    """Import what the forks need."""
    child.prepare()
    import regex  # noqa: F401
    import transformers.utils.chat_template_utils  # noqa: F401


if __name__ == "__main__":
    main()
