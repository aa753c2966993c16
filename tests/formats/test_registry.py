"""The registry of formats: its members hold, the page lists it, and nothing else knows a name."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from lora_fx.errors import LoraFxError
from lora_fx.formats import base, checked_file, unsupported
from lora_fx.formats.checked_file import File
from lora_fx.formats.format import FileHead, Format, Magic
from lora_fx.formats.installed import fault_of
from lora_fx.formats.io import Format as NameInIo
from lora_fx.formats.io import format_for
from lora_fx.formats.registry import FORMATS, OURS, FormatName
from tests.house import HERE as ROOT
from tests.house import House

PAGE = (ROOT / "docs" / "convert.md").read_text()


def rows() -> dict[str, tuple[str, str, str]]:
    """(files, read, written) by format: the table of docs/convert.md."""
    section = PAGE.partition("## Formats\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| `([\w.+-]+)` \| (.+?) \| (.+?) \| (.+?) \|$", section, re.M)
    return {name: (files, read, written) for name, files, read, written in cells}


def test_the_page_lists_the_formats() -> None:
    table = rows()
    assert list(table) == [format.name for format in OURS], "docs/convert.md, Formats: the rows"
    for format in OURS:
        files, read, written = table[format.name]
        assert written.startswith("no") == format.only_read
        assert read != "no"
        assert ("folder" in files) == bool(format.folder_files), format.name
        assert not format.suffixes or any(s in files for s in format.suffixes), format.name


def test_the_page_says_every_scale() -> None:
    section = PAGE.partition("\n## Scales\n")[2].partition("\n## ")[0]
    files = re.findall(r"^\| ([\w.+, -]+?) \|", section, re.M)
    named = {name for cell in files for name in cell.split(", ")}
    missing = {format.name for format in OURS} - named
    assert not missing, f"docs/convert.md, Scales: no row for {', '.join(sorted(missing))}"


def test_no_other_page_lists_the_formats() -> None:
    """A list of programs or names is one more place that a new format would have to be added to."""
    names = {format.name for format in OURS} | {"mlx-lm", "llama.cpp"}
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name != "convert.md"]
    for file in (*pages, ROOT / "README.md", ROOT / "lora_fx" / "formats" / "io.py"):
        for paragraph in re.split(r"\n\s*\n|\n\|", file.read_text()):
            words = set(re.findall(r"[a-z_]+(?:[.-][a-z]+)?", paragraph.lower()))
            listed = sorted(names & words)
            assert len(listed) < 4, f"{file.name} lists {', '.join(listed)}; link to convert.md"


def members_of(kind: type[object]) -> set[str]:
    """The public attributes and methods of a class."""
    return {name for name in {**vars(kind), **kind.__annotations__} if not name.startswith("_")}


@pytest.mark.parametrize(
    ("heading", "kind"), [("### The members of a format", Format), ("### To read: `File`", File)]
)
def test_how_to_extend_lists_the_members(heading: str, kind: type[object]) -> None:
    page = (ROOT / "passes" / "README.md").read_text()
    section = page.partition(f"\n{heading}\n")[2].partition("\n### ")[0]
    cells = re.findall(r"^\| (`.+?) \|", section, re.M)
    listed = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    assert listed == members_of(kind) - {"notes"} - ({"name"} if kind is File else set())


def test_the_type_of_a_format_has_the_names_that_are_written() -> None:
    literal, _ = get_args(FormatName)
    written = tuple(format.name for format in OURS if not format.only_read)
    assert get_args(literal) == written, "FormatName in registry.py, in the order of OURS"
    assert FORMATS.writers()[: len(written)] == written
    assert NameInIo == FormatName


@pytest.mark.parametrize("format", OURS, ids=lambda format: format.name)
def test_a_format_of_ours(format: Format) -> None:
    assert FORMATS[format.name] is format
    assert not fault_of(format.name, format)
    if not format.folder_files and format.magic is not None:
        assert format_for(f"x{format.suffixes[0]}") == format.name
        head = format.magic.text.rjust(format.magic.start + len(format.magic.text), b".")
        assert [f.name for f in FORMATS.with_magic(head)] == [format.name]
        assert FORMATS.detecting(FileHead(head)) == [format]
    if format.only_read:
        with pytest.raises(LoraFxError, match="but does not write it"):
            format.write(None, Path("x"))
    if not format.fits_graphs:
        with pytest.raises(LoraFxError, match=r"cannot be written for one \.onnx file"):
            format.write_for("x.onnx", None, Path("x"))


def test_a_safetensors_file_is_one_whatever_magic_it_has() -> None:
    header = (300).to_bytes(8, "little") + b'{"a"'
    assert Magic(header[:2]).begins(header) and not Magic(header[:2], start=1).begins(header)
    assert FORMATS.with_magic(header) == []


SERVED = ".onnx_adapter"
"""The ending of ONNX Runtime's file, which an export writes beside a graph."""
ELSEWHERE = {
    ("lora_fx.adapter.expert_layouts", "peft"): "a layout of experts",
    ("lora_fx.checkpoint.stored_stacks", "peft"): "of the adapter's metadata: PEFT's own fields",
    ("lora_fx.checkpoint.raw_adapter", "peft"): "the same",
    ("lora_fx.checkpoint.missing_layers", "peft"): "the same",
    ("lora_fx.files.checkpoint", ".gguf"): "weights of a model",
    ("lora_fx.files.hub", ".gguf"): "the same",
    ("lora_fx.onnx.train_session", "peft"): "a default, as save_adapter has it",
    ("lora_fx.onnx.feeds", SERVED): "what a session loads",
    ("lora_fx.onnx.train_session", SERVED): "the same",
    ("lora_fx.passes.verbs.export_options", SERVED): "what an export writes",
    ("lora_fx.passes.verbs.export_train", SERVED): "the same",
}


def test_nothing_else_knows_a_format() -> None:
    names = {f.name for f in OURS} | {s for f in OURS for s in f.suffixes if s != ".safetensors"}
    found = {
        (module.name, node.value)
        for module in House().modules.values()
        if not module.name.startswith("lora_fx.formats")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }
    assert found == set(ELSEWHERE), "a name that is another word there gets a row of ELSEWHERE"


def test_packages_import_by_the_older_name() -> None:
    assert base.File is checked_file.File
    assert base.refused is unsupported.refused


def test_a_number_may_be_a_text_of_the_header() -> None:
    file = File("x.safetensors")
    assert file.alpha("alpha", "6.5") == 6.5 and file.number("scale", "0") == 0.0
    for text, words in (("six", "is .six.; expected one number"), ("inf", "is inf"), ("0", "is 0")):
        with pytest.raises(LoraFxError, match=words):
            file.alpha("alpha", text)


def test_a_name_that_formats_share_is_there_once() -> None:
    names = FORMATS.names_of_input()
    assert "adapter_config.json" in names and len(names) == len(set(names))
