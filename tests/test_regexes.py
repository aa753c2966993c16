"""Patterns are read as Python's `re` reads them, and each thread counts what it spends."""

from __future__ import annotations

import re
import threading

import pytest

from lora_fx import regexes
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft.target_modules import missing

PATTERNS = (
    r"a\\{e}", r"\\{e<=9}", r"\\\{e}", r"a{e}", r"a{e<=9}", r"a{", r"a{1", r"a{}", r"a{,}",
    r"a{,3}", r"a{2}", r"\[{e}", r"[{]a", r"[]{e}]", r"[\]{]+", r"[[:alpha:]]", r"[^[:digit:]]x",
    r"[[]x", r"[\[a]", r"[a&&b]", r"[~~a]", r"[||a]", r"\N{LATIN SMALL LETTER A}",
    r"\N{FULL STOP}x", r"[\N{LATIN SMALL LETTER A}{]b", r"(a)?(?(1)b|c)", r"(?i)ſ", r"x$",
)  # fmt: skip
TEXTS = (
    "a", "aa", "aaa", "aax", "a\\{e}", "a\\zzz", "\\{e}", "\\{e<=9}", "whatever", "a{e}", "a{e<=9}",
    "a{", "a{1", "a{}", "[{e}", "{a", "{b", "e", "]{", "x", ":", ":]", "1x", "1:]x", "[x", "[", "&",
    "b", "~", "|", ".x", "ax", "ab", "c", "s", "x\n",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_a_pattern_matches_what_re_matches(pattern: str) -> None:
    regexes.begin("here")
    for text in TEXTS:
        wanted = re.fullmatch(pattern, text) is not None
        assert (regexes.matched(pattern, text, "fullmatch") is not None) == wanted, text


def test_each_thread_names_its_file_and_counts_by_itself() -> None:
    told = {}
    begun = threading.Barrier(3)

    def run(file: str) -> None:
        regexes.begin(file)
        regexes.compiled(f"{file}{'x' * 90_000}")
        begun.wait(10)
        regexes.compiled(f"{file}{'y' * 90_000}")
        with pytest.raises(LoraFxError) as error:
            regexes.compiled(f"{file}{'z' * 90_000}")
        told[file] = error.value.message

    threads = [threading.Thread(target=run, args=(f"file{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == ["file0", "file1", "file2"]
    assert all(
        message.startswith(f"{file}: the patterns have 27") for file, message in told.items()
    )


def test_no_error_names_the_file_of_an_earlier_pattern() -> None:
    regexes.begin("another/adapter_config.json")
    config = {"target_modules": "((a{999}){999}){999}"}
    with pytest.raises(LoraFxError) as error:
        missing(config, ["l.0.q"], ["l.0.v"])
    assert error.value.message.startswith("adapter_config.json: the pattern")
