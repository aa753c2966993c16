"""Names and links of others lead nowhere else: what --genai copies, and where a download writes."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import replacing
from lora_fx.files.hub import fetch, parse
from lora_fx.files.permissions import copy_file
from lora_fx.files.sealed import confined, sealed
from lora_fx.files.side_outputs import Beside
from lora_fx.onnx.genai import genai_folder
from tests.checkpoint.made import adapter, factors
from tests.files import hub_server
from tests.files.hub_server import FakeHub
from tests.files.test_gates import RNG, base
from tests.onnx.test_genai import settings, source, write_decoder  # noqa: F401 (a fixture)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --genai


def link(name: str, to: str) -> Callable[[Path], None]:
    """A file of the model's folder becomes a link."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return change


def chain(folder: Path) -> None:
    """A link to a link that leads out."""
    link("tokenizer.json", "first")(folder)
    link("first", "../secret")(folder)


def by_a_folder(folder: Path) -> None:
    """A link through a folder that is a link."""
    (folder / "sub").symlink_to("..")
    link("vocab.json", "sub/secret")(folder)


LEADING_OUT: dict[str, Callable[[Path], None]] = {
    "a tokenizer": link("tokenizer.json", "../secret"),
    "an absolute link": link("tokenizer_config.json", str(Path(__file__).resolve())),
    "a chat template": link("chat_template.jinja", "../secret"),
    "a link to a link": chain,
    "through a folder": by_a_folder,
    "merges": link("merges.txt", "../other/merges.txt"),
    "a vocabulary": link("vocab.txt", "../secret"),
    "generation_config.json": link("generation_config.json", "../secret"),
}


@pytest.mark.parametrize("name", LEADING_OUT)
def test_genai_follows_no_link_out_of_the_folder(name: str, source: Path) -> None:  # noqa: F811
    (source.parent / "secret").write_text("{}")
    (source.parent / "other").mkdir()
    (source.parent / "other" / "merges.txt").write_text("a b")
    (source.parent / "secret").chmod(0o600)
    LEADING_OUT[name](source)
    with pytest.raises(LoraFxError, match="this link leads out of the folder") as error:
        genai_folder("genai", Path("m.onnx"), settings(), force=False)
    assert error.value.exit_code == 2 and error.value.hint
    assert not Path("genai").exists()


def test_genai_takes_links_within_the_folder_and_snapshots(source: Path) -> None:  # noqa: F811
    write_decoder(Path("m.onnx"))
    (source / "real.json").write_text("{}")
    link("tokenizer.json", "real.json")(source)
    with Beside() as beside:
        genai_folder("inner", Path("m.onnx"), settings(), force=False).place(Path("m.onnx"), beside)
    assert not Path("inner/tokenizer.json").is_symlink()

    home = Path("hub/models--a--b")
    snapshot = home / "snapshots" / "1f"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for i, file in enumerate(sorted(p for p in source.iterdir() if p.is_file())):
        (home / "blobs" / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    config = settings()
    config._name_or_path = str(snapshot)
    with Beside() as beside:
        genai_folder("cached", Path("m.onnx"), config, force=False).place(Path("m.onnx"), beside)
    assert Path("cached/tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("before", "after"), [(0o600, 0o600), (0o640, 0o640), (0o644, 0o644), (0o444, 0o644)]
)
def test_a_copy_is_read_by_no_more_people(before: int, after: int, source: Path) -> None:  # noqa: F811
    write_decoder(Path("m.onnx"))
    (source / "tokenizer.json").chmod(before)
    with Beside() as beside:
        genai_folder("genai", Path("m.onnx"), settings(), force=False).place(Path("m.onnx"), beside)
    assert mode(Path("genai/tokenizer.json")) == after
    assert mode(Path("genai/tokenizer_config.json")) == 0o644


def test_merge_keeps_the_modes_of_companions(tmp_path: Path) -> None:
    base(tmp_path / "base")
    adapter(tmp_path / "adapter", {"q": factors(RNG, 6, 4, 2)})
    for name, bits in {"tokenizer.json": 0o600, "config.json": 0o640}.items():
        (tmp_path / "base" / name).chmod(bits)
    (tmp_path / "base" / "notes.txt").write_text("x")
    lora_fx.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    found = {n: mode(tmp_path / "out" / n) for n in ("tokenizer.json", "config.json", "notes.txt")}
    assert found == {"tokenizer.json": 0o600, "config.json": 0o640, "notes.txt": 0o644}


def test_a_copy_is_of_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LoraFxError, match="a pipe"), replacing(tmp_path / "out") as new:
        copy_file(tmp_path / "pipe", new)
    assert not (tmp_path / "out").exists()


# The Hub


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with hub_server.here(tmp_path, monkeypatch) as found:
        found.push("org/base", {"config.json": "{}", "tokenizer.json": "{}"})
        found.push("org/other", {"config.json": '{"x": 1}'})
        yield found


@pytest.mark.parametrize(
    "revision",
    [
        "../../..", "..", ".", "../x", "a/../../b", "/etc", "//", "a//b", "a/", "/", "...",
        "a/./b", "..\\..\\x", "a\\b", "main/..",
    ],
)  # fmt: skip
def test_a_revision_is_no_path(revision: str, there: FakeHub, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LoraFxError, match="expected hf:ORG/NAME") as error:
        fetch(f"hf:org/base@{revision}")
    assert error.value.exit_code == 2 and there.asked == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "revision",
    ["main", "refs/pr/1", "v1.0", "v1.0+cpu", "feature/a_b-c", "1" * 40, ".hidden", "a..b"],
)
def test_a_revision_of_git_is_taken(revision: str) -> None:
    assert parse(f"hf:org/base@{revision}").revision == revision


HOSTILE = (
    "../../../escape",
    "../../models--org--other/blobs/x",
    "/{0}/escape",
    "../..",
    "a/../../../../e",
    "../../../escape.py",
    "/{0}/escape.pyc",
)


def answering(**headers: str) -> Callable[..., Any]:
    """Answers of the Hub with other values for a commit (`sha`) or for the ETag of a file."""
    plain = hub_server.reply

    def reply(hub: FakeHub, path: str, token: str) -> Any:
        code, found, body = plain(hub, path.replace(headers.get("sha", "\0"), "main"), token)
        if "sha" in headers:
            body = body.replace(hub.refs["org/base", "main"].encode(), headers["sha"].encode())
            found = {**found, "X-Repo-Commit": headers["sha"]}
        if "ETag" in found and "etag" in headers:
            found = {**found, "ETag": f'"{headers["etag"]}"'}
        return code, found, body

    return reply


@pytest.mark.parametrize("kind", ["sha", "etag"])
@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_hub_writes_in_its_part_of_the_cache_alone(
    kind: str, value: str, there: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch("hf:org/other", weights=False)
    named = value.format(tmp_path)
    monkeypatch.setattr(hub_server, "reply", answering(**{kind: named}))
    own = tmp_path / "cache" / "models--org--base"
    locks = tmp_path / "cache" / ".locks" / "models--org--base"

    def others() -> dict[Path, bytes]:
        return {
            p: p.read_bytes() for p in tmp_path.rglob("*")
            if p.is_file() and not {own, locks} & set(p.parents)
        }  # fmt: skip

    before = others()
    with pytest.raises(LoraFxError) as error:
        fetch("hf:org/base", weights=False)
    assert error.value.exit_code == 2 and "\n" not in error.value.message
    assert others() == before
    assert not [p for p in own.rglob("*") if not p.resolve().is_relative_to(own.resolve())]


def test_an_honest_hub_is_served(there: FakeHub) -> None:
    folder, _ = fetch("hf:org/base", weights=False)
    assert (folder / "config.json").read_text() == "{}"
    repository = folder.parent.parent  # whose probe of links is a folder that goes again
    assert {p.name for p in repository.iterdir()} == {"blobs", "refs", "snapshots", "trees"}


def removed(place: Path) -> None:
    shutil.rmtree(place / "folder")


def made(place: Path) -> None:
    with opened(place) as folder:
        os.mkdir("new", dir_fd=folder)


def renamed(place: Path) -> None:
    with opened(place) as folder:
        os.rename("file", "other", src_dir_fd=folder, dst_dir_fd=folder)


def linked(place: Path) -> None:
    with opened(place) as folder:
        os.symlink("file", "link", dir_fd=folder)


def unlinked(place: Path) -> None:
    with opened(place) as folder:
        os.unlink("file", dir_fd=folder)


def touched(place: Path) -> None:
    with opened(place) as folder:
        os.utime("file", dir_fd=folder)


@contextlib.contextmanager
def opened(place: Path) -> Iterator[int]:
    folder = os.open(place, os.O_RDONLY)
    try:
        yield folder
    finally:
        os.close(folder)


@pytest.mark.parametrize("change", [removed, made, renamed, linked, unlinked, touched])
def test_a_path_from_an_open_folder_is_that_of_the_folder(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the current folder is the place that may be changed, or the other one."""
    for name in ("own", "other"):
        (tmp_path / name / "folder").mkdir(parents=True)
        (tmp_path / name / "folder" / "file").write_text("x")
        (tmp_path / name / "file").write_text("x")
    monkeypatch.chdir(tmp_path / "other")
    with confined("it", tmp_path / "own"):
        change(tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    before = sorted(p.relative_to(tmp_path) for p in (tmp_path / "other").rglob("*"))
    with pytest.raises(LoraFxError, match="would write"), confined("it", tmp_path / "own"):
        change(tmp_path / "other")
    assert sorted(p.relative_to(tmp_path) for p in (tmp_path / "other").rglob("*")) == before


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a folder of shared memory")
def test_shared_memory_is_not_the_systems() -> None:
    """A file that lies there is read and written by whoever may, and not by a model or a server."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        secret = Path(folder, "secret")
        secret.write_text("x")
        with pytest.raises(LoraFxError, match="outside"), sealed("it", "/nowhere"):
            secret.read_text()
        with pytest.raises(LoraFxError, match="would write"), confined("it", "/nowhere"):
            secret.write_text("y")
        assert secret.read_text() == "x"


@pytest.mark.parametrize("name", ["x.py", "__pycache__/x.cpython-311.pyc", "x.so"])
def test_code_is_written_no_more_than_other_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "__pycache__").mkdir()
    with pytest.raises(LoraFxError, match="would write"), confined("it", tmp_path / "own"):
        (tmp_path / name).write_text("x")
    assert not (tmp_path / name).exists()


def test_the_null_device_takes_what_nobody_reads(tmp_path: Path) -> None:
    with confined("it", tmp_path / "own"):
        Path(os.devnull).write_text("x")
