"""What --force does not replace, case by case; and what is no file to read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_fx.formats.registry  # noqa: F401 (which tells the kinds of adapter files)
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import check_output
from lora_fx.files.read import open_input
from lora_fx.files.replaceable import CONTENTS, check_apart
from lora_fx.files.run_files import check_unchanged, remember, remembering


def repository(path: Path) -> None:
    (path / ".git").mkdir(parents=True)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def text(path: Path) -> None:
    path.write_text("notes")


def data(path: Path) -> None:
    path.write_text('{"a": 1}')


def odd_list(path: Path) -> None:
    path.mkdir()
    (path / "weights").write_text("x")
    (path / CONTENTS).write_text("{")


def no_list(path: Path) -> None:
    path.mkdir()
    (path / CONTENTS).write_text('{"files": 3}')
    (path / "weights").write_text("x")


REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a repository": (repository, "out", "out: lora-fx does not replace a git repository"),
    "a pipe": (pipe, "out", "out: not a regular file or folder"),
    "a text": (text, "out.txt", "does not replace it: lora-fx does not write files of this kind"),
    "JSON of another": (
        data,
        "out.json",
        "does not replace it: lora-fx does not write files of this kind",
    ),
    "a list that is no JSON": (odd_list, "out", f"files that lora-fx did not write: {CONTENTS}"),
    "a list of nothing": (no_list, "out", "files that lora-fx did not write: weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_force_does_not_replace(tmp_path: Path, case: str) -> None:
    make, name, message = REFUSED[case]
    make(tmp_path / name)
    with pytest.raises(LoraFxError) as caught:
        check_output(tmp_path / name, force=True)
    assert caught.value.message.endswith(message), caught.value.message


KINDS: dict[str, tuple[bytes, str, str]] = {
    "a page": (b"<!doctype html><title>lora-fx merge: done", "p.html", "it is a page of lora-fx"),
    "a curve": (b"step,loss,validation\n1,2,3\n", "c.csv", "it is a loss curve of lora-fx"),
    "a config": (b"# lora-fx config\n", "c.toml", "it is a config of lora-fx"),
    "JSON": (b'{"version": 1, "format": 1}', "j.json", "it is JSON of lora-fx"),
    "a graph": (b"\x08\x0a", "m.onnx", "it is a .onnx file"),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path, case: str) -> None:
    content, name, kind = KINDS[case]
    (tmp_path / name).write_bytes(content)
    new = tmp_path / "new"
    new.write_bytes(b"what nobody knows")
    with pytest.raises(LoraFxError, match=f"does not replace it: {kind}\n"):
        check_output(tmp_path / name, force=True, new=new)
    check_output(tmp_path / name, force=True)
    check_output(tmp_path / name, force=True, new=tmp_path / name)


def test_a_link_to_a_folder_and_an_empty_file_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes").write_text("x")
    (tmp_path / "link").symlink_to("theirs")
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "empty").touch()
    for name in ("link", "nowhere", "empty"):
        check_output(tmp_path / name, force=True)


def test_a_folder_of_known_names_is_replaced_without_a_list(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_text("x")
    (tmp_path / "out" / "a").write_text("x")
    check_output(tmp_path / "out", force=True)
    check_output(tmp_path / "out", force=True, names=["a", "b"])
    with pytest.raises(LoraFxError, match="files that lora-fx did not write: a\n"):
        check_output(tmp_path / "out", force=True, names=["b"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("a\0b", "is not the name of a file"), (".", "a folder, not a regular file")],
)
def test_what_is_no_file_is_not_read(name: str, message: str) -> None:
    with pytest.raises(LoraFxError, match=message):
        open_input(name)


def test_a_tensor_file_that_goes_is_a_change(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with remembering():
        remember(tmp_path)
        check_unchanged()
        (tmp_path / "a.safetensors").unlink()
        with pytest.raises(LoraFxError, match=r"'a\.safetensors' was removed"):
            check_unchanged()


def test_the_inode_of_a_replaced_input_is_free(tmp_path: Path) -> None:
    """A run that replaces its state frees the inode, which a new page may get."""
    state = tmp_path / "state"
    linked = tmp_path / "linked"
    state.write_text("{}")
    os.link(state, linked)
    with remembering():
        remember(state)
        with pytest.raises(LoraFxError, match="would replace the input"):
            check_apart(linked)
        (tmp_path / "new").write_text("{}")
        os.replace(tmp_path / "new", state)
        check_apart(linked)
