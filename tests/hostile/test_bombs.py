"""Bombs are refused before they go off, and what looks like one and is none passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lora_fx import regexes
from lora_fx.errors import LoraFxError
from lora_fx.files.strict_toml import MAX_DOTS, read_toml
from lora_fx.fx.train.chat import MAX_TEMPLATE, ChatTemplate
from lora_fx.targets.selectors import select_names
from tests.hostile import bombs


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    bombs.prepare()


def test_a_slice_of_the_drawn_ones(memory: Path) -> None:
    *failed, counts = bombs.rounds(20261201, 12, 8, memory)
    told = json.loads(counts[1])
    assert not failed and (told["toml"], told["template"], told["pattern"]) == (6, 6, 8)


# Patterns.


BOMBS = (
    "((a{999}){999}){999}", "(?:(?:a{999}){999}){999}", "(a{65535}){65535}", "a{4294967294}",
    "(((((((a{9}){9}){9}){9}){9}){9}){9}){9}", "(?=(b{400}){400})", "(x(y{500}z){300}|w)",
    "[\x00-\U0010ffff]" * 30, "a" * 100_001, "(?P<n>a{999}){999}", "(?>(?:a{99}){99}){99}",
    "(a{999,}){999}", "(?i:é{999}){999}", "(a{999}?){999}?", "(a{999}+){999}+",
)  # fmt: skip


@pytest.mark.parametrize("pattern", BOMBS)
def test_a_pattern_is_too_large(pattern: str) -> None:
    regexes.begin("a file")
    with pytest.raises(LoraFxError, match=r"^a file: the pattern .* parts"):
        regexes.compiled(pattern)
    with pytest.raises(LoraFxError, match=r"^selectors: the pattern"):
        select_names(["fc.weight"], f"re:{pattern}")


NAMES = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(64) for m in "qkvo"]
REAL = {
    r"model\.layers\.(\d|1[0-9]|2[0-7])\..*(q|k|v)_proj": "model.layers.27.self_attn.q_proj",
    "|".join(n.replace(".", r"\.") for n in [*NAMES, *(f"h.{n}" for n in NAMES)][:500]): NAMES[60],
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q|k|v|o|gate|up|down)_proj.*?)|(?:\bmodel\."
    r"layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q|k|v|o|gate|up|down)_proj))": NAMES[3],
    r"^(?!.*(?:bnet|fnet)).*(?:\.layers\.\d{1,3}\.)(?:attn|self_attn)\.q_proj": NAMES[4],
    r".*layers\.\d{1,2}\.self_attn\.(q|k|v|o)_proj$": NAMES[9],
    r"[a-z]+\.layers\.([0-9]|[1-5][0-9]|6[0-3])\.self_attn\.[qkvo]_proj": NAMES[255],
    r"(.*\.)?q_proj": NAMES[0],
    "q_proj|k_proj|v_proj|o_proj": "o_proj",
    r"(?i)MODEL\.LAYERS\.\d+\..*Q_PROJ": NAMES[0],
    "[\u4e00-\u9fff]*model.*q_proj": NAMES[0],
    r"model\.layers\.\d{1,9999}\..*q_proj": NAMES[0],
}


@pytest.mark.parametrize("number", range(len(REAL)))
def test_a_real_pattern_passes(number: int) -> None:
    pattern, name = [*REAL.items()][number]
    regexes.begin()
    for _ in range(300):
        assert regexes.matched(pattern, name, "fullmatch")


def test_the_tables_of_a_diffusion_model_pass() -> None:
    """800 names, each with a rank and an alpha of its own."""
    regexes.begin()
    names = [f"down_blocks.{i}.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in range(800)]
    for name in names:
        assert regexes.matched(rf"(.*\.)?(^{name})$", name)
        assert regexes.matched(rf"(.*\.)?({name})$", f"unet.{name}")


def test_patterns_in_all_have_a_bound() -> None:
    regexes.begin("a file")
    with pytest.raises(LoraFxError, match=r"^a file: the patterns have \d+ parts in all"):
        for i in range(10_000):
            regexes.compiled(f"name_{i}_of_a_module")
    regexes.begin()


def test_a_long_name_is_not_matched() -> None:
    with pytest.raises(LoraFxError, match="20000 characters"):
        regexes.matched("a+", "a" * 20_000)


NO_PATTERNS = (
    "(", "[", "*", "a**", r"\1", "(?P<n>", "(?(1)a|b)", r"\p{L}", "a{2,1}",
    "(" * 3000 + ")" * 3000, "a{99999999999999}",
)  # fmt: skip


@pytest.mark.parametrize("text", NO_PATTERNS)
def test_a_selector_that_cannot_be_compiled_is_refused(text: str) -> None:
    with pytest.raises(LoraFxError, match="is not a regular expression"):
        select_names(["fc.weight"], f"re:{text}")


# TOML.


TOML = {
    "nested lists": "x = " + "[" * 5000 + "]" * 5000,
    "nested tables": "x = " + "{a=" * 3000 + "1" + "}" * 3000,
    "5,000 digits": "x = " + "9" * 5000,
    "30 digits": "x = " + "9" * 30,
    "30 digits, below 0": "x = -" + "9" * 30,
    "30 digits in a list": "x = [1, [2, " + "9" * 30 + "]]",
    "65 bits": f"x = {1 << 63}",
    "hexadecimal": "x = 0x" + "f" * 400,
    "a dotted key": ".".join("a" * 20_000) + " = 1",
    "a dotted table": "[" + ".".join("a" * 20_000) + "]",
    "a dotted key of quoted parts": ".".join(['"a"'] * 20_000) + " = 1",
    "a dotted key in a table": "x = {" + " . ".join("a" * 20_000) + " = 1}",
    "600 KB": "# " + "x" * 600_000,
}


@pytest.mark.parametrize("name", TOML)
def test_a_config_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(TOML[name])
    with pytest.raises(LoraFxError, match=r"x\.toml: "):
        read_toml(tmp_path / "x.toml", "a hint")


GOOD = {
    "64 bits": (f"x = {(1 << 63) - 1}", (1 << 63) - 1),
    "63 bits, below 0": (f"x = {-(1 << 63)}", -(1 << 63)),
    "a text of dots": (f"x = '{'.'.join('a' * 300)}'", ".".join("a" * 300)),
    "a text of dots, quoted twice": (f'x = "{".".join("a" * 300)}" # a.b', ".".join("a" * 300)),
    "lines of dots": (f"x = '''\n{'.'.join('a' * 300)}'''", ".".join("a" * 300)),
    "escapes": ('x = "\\"a.b\\" # no"', '"a.b" # no'),
    "nine lists": ("x = " + "[" * 9 + "]" * 9, [[[[[[[[[]]]]]]]]]),
    "many texts": (f"x = {['a/b.c' for _ in range(5000)]}", ["a/b.c"] * 5000),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_config_is_read(name: str, tmp_path: Path) -> None:
    text, value = GOOD[name]
    (tmp_path / "x.toml").write_text(text)
    assert read_toml(tmp_path / "x.toml", "a hint") == {"x": value}


def test_keys_of_a_few_parts_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(".".join("a" * MAX_DOTS) + " = 1")
    assert read_toml(tmp_path / "x.toml", "a hint")["a"]


def test_a_config_of_three_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.toml").open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(LoraFxError, match="3221225472 bytes; expected at most"):
        read_toml(tmp_path / "x.toml", "a hint")


# Chat templates, as their models have them.


TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = [{"role": "user", "content": "How far? " * 9}, {"role": "assistant", "content": " Far. "}]
CALL = {"type": "function", "function": {"name": "far", "arguments": {"of": "moon"}}}
LINES: list[dict[str, Any]] = [
    {"messages": TURNS, "tools": None},
    {"messages": TURNS * 200, "tools": None},
    {"messages": TURNS * 2, "tools": [{"type": "function", "function": {"name": "far"}}]},
    {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [CALL], "content": ""}]},
]


def by_hand(template: str, row: dict[str, Any]) -> tuple[str, list[Any]]:
    """What transformers renders in this process."""
    texts, spans = render_jinja_template(
        conversations=[row["messages"]],
        tools=row.get("tools"),
        chat_template=template,
        return_assistant_tokens_mask="generation %" in template,
        **TOKENS,
    )
    return texts[0], spans[0] if spans else []


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_real_template_renders_what_transformers_does(name: str) -> None:
    cost = bombs.of_template(TEMPLATES[name], LINES, TOKENS)
    answers = [json.loads(line) for line in cost.told.splitlines()]
    wanted = [by_hand(TEMPLATES[name], row) for row in LINES]
    assert [(a["text"], [tuple(s) for s in a["spans"]]) for a in answers] == wanted


def test_lines_are_rendered_in_a_process_of_their_own() -> None:
    lines = {f"d.jsonl: line {i}": row for i, row in enumerate(LINES, 1)}
    found = ChatTemplate(TEMPLATES["marked"], "model", TOKENS, marked=True).render(lines)
    wanted = [by_hand(TEMPLATES["marked"], row) for row in LINES]
    assert [(r.text, [*r.spans]) for r in found.values()] == wanted and [*found] == [*lines]


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
REFUSED = {
    "loops": (ENDLESS, "takes more than"),
    "memory": ("{{ ('a' * 999999999) | length }}", "128 MB"),
    "text": ("{{ 'a' * 9999999 }}", "it writes 9999999 characters"),
    "error": ("{{ raise_exception('no') }}", "refuses it: TemplateError: no"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bomb_is_refused_in_one_line(name: str) -> None:
    template, say = REFUSED[name]
    with pytest.raises(LoraFxError, match=rf"^d\.jsonl: line 1: .*{say}") as caught:
        ChatTemplate(template, "model", {}, marked=False).render({"d.jsonl: line 1": LINES[0]})
    assert "\n" not in caught.value.message


def test_a_template_has_a_length() -> None:
    with pytest.raises(LoraFxError, match="has 131073 characters"):
        ChatTemplate("x" * (MAX_TEMPLATE + 1), "model", {}, marked=False).render({"x": LINES[0]})
