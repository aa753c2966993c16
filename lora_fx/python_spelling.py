"""Translation of options in hints from the command line's spelling to Python's."""

from __future__ import annotations

import re

_FLAGS = (
    "force", "trust", "dequantise", "requantise", "lossy", "untie", "add", "again", "allow-unused",
    "allow-missing", "any-base", "other-readers", "optimise", "cache", "within", "scales",
    "also-full", "run",
)  # fmt: skip
_KEYWORDS = (
    "accuracy-level", "base", "clip", "data", "dead", "dtype", "dynamic", "energy", "exclude",
    "genai", "how", "include", "init", "inputs", "invocation", "max-abs-error", "max-error",
    "max-rank", "max-shard-size", "mode", "names", "opset", "params", "precision", "provider",
    "quantise", "rank", "static", "target", "tol", "validation", "variant", "weight-decay",
    "weights", "whole",
)  # fmt: skip
_OPTION = re.compile(
    r"(?<![^\s(])--([a-z][a-z-]+)(?![\w./])"
    r"(?: (b?float\d+|int8|switch|batch|load|merged|svd|cpu|portable|eva|lora-ga|qalora:\d+"
    r"|drop|allow|[A-Z]+\b|\d[\d.]*\w*|[\w*]+(?:\.[\w*]+)+))?"
)

_PHRASES = {
    r"run lora-fx targets MODEL": "print(lora_fx.find(model))",
    r"--dynamic [\w:=,]+": "dynamic={NAME: {DIM: SYMBOL}}",
    r"MODEL --weights (\S+)": r"lora_fx.load_model(MODEL, weights='\1')",
    r"--inputs FILE\.npz": "inputs=dict(numpy.load('FILE.npz'))",
    r"--static NAME:DIM": "static=['NAME:DIM']",
    r"--data FILE": "data=[{INPUT: TENSOR}, …]",
    r"; -v prints the traceback": "",
    r"run with -v for (.*)": r"the __cause__ of the error has \1",
}
"""What the command line and Python say in different words: a pattern → Python's."""


def in_python(hint: str) -> str:
    """Return a hint or message with its options in Python's spelling.

    Clauses with a command are unchanged.

    >>> in_python("--dtype float32 keeps more; or --trust reads it; lora-fx merge --add writes it")
    "dtype='float32' keeps more; or trust=True reads it; lora-fx merge --add writes it"
    >>> in_python("--exclude leaves it out; --dead drop leaves all such out")
    "exclude leaves it out; dead='drop' leaves all such out"
    >>> in_python("/models/bert--base/a --force/x.npz: no such file")  # a user's name
    '/models/bert--base/a --force/x.npz: no such file'
    """
    for pattern, replacement in _PHRASES.items():
        hint = re.sub(pattern, replacement, hint)
    return "; ".join(map(_clause_in_python, hint.split("; ")))


def _clause_in_python(clause: str) -> str:
    """Return a clause with its options in Python's spelling; unchanged if it has a command."""
    if "lora-fx " in clause or "--as " in clause:
        return clause
    clause = re.sub(r"(?<!\S)-o ([\w.*]+)", r"'\1'", clause)
    return _OPTION.sub(_keyword, clause)


def _keyword(match: re.Match[str]) -> str:
    """Return an option of the command line as a keyword argument."""
    option = match[1]
    value = match[2]
    name = option.replace("-", "_")
    if option in _FLAGS:
        return f"{name}=True {value}" if value else f"{name}=True"
    if option not in _KEYWORDS:
        return match[0]
    if not value:
        return name
    is_text = not value.isupper() and not value[0].isdigit()
    return f"{name}={value!r}" if is_text else f"{name}={value}"
