"""Writing outputs: nothing half, nothing left, whatever fails and whenever."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_fx import errors
from lora_fx.errors import LoraFxError, explain
from lora_fx.files import atomic
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.copying import copy_range, preallocate, write_at
from lora_fx.files.replaceable import CONTENTS, write_contents
from tests.faults import WRITES, each_fault

State = dict[str, bytes] | bytes | None
NEW_FOLDER: State = {"a.bin": b"head" + b"input" * 50, "b.json": b'{"x": 1}', "sub/c": b"c"}
NEW_FILE: State = b'{"format": 1, "version": 2}'
OLD: dict[str, State] = {
    "file": b'{"format": 1, "version": 1}',
    "folder": {"old": b"1", "sub/older": b"2"},
    "none": None,
}


def state(path: Path) -> State:
    if not path.exists():
        return None
    if path.is_file():
        return path.read_bytes()
    found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert found.pop(CONTENTS)
    return found


def put(path: Path, what: State) -> None:
    if isinstance(what, bytes):
        path.write_bytes(what)
    for name, content in (what if isinstance(what, dict) else {}).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    if isinstance(what, dict):
        write_contents(path)


def write(out: Path, source: Path, kind: str, force: bool) -> None:
    """A small output by every way of writing."""
    with replacing(out, force=force) as temporary:
        if kind == "file":
            temporary.write_bytes(b'{"format": 1, "version": 2}')
            return
        (temporary / "sub").mkdir(parents=True)
        with source.open("rb") as f:
            fd = os.open(temporary / "a.bin", os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                preallocate(fd, 254)
                copy_range(f.fileno(), fd, 0, 4, 250)
                write_at(fd, b"head", 0)
            finally:
                os.close(fd)
        (temporary / "b.json").write_text('{"x": 1}')
        (temporary / "sub" / "c").write_text("c")


VARIANTS = [("file", "none"), ("file", "file"), ("folder", "none"), ("folder", "folder")]


class Scene:
    """A folder with an input and perhaps an old output."""

    def __init__(self, path: Path, kind: str, before: str) -> None:
        self.path, self.kind, self.before = path, kind, before
        self.out, self.source = path / "out", path / "input"
        self.new = NEW_FILE if kind == "file" else NEW_FOLDER

    def prepare(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        self.source.write_bytes(b"input" * 50)
        put(self.out, OLD[self.before])

    def work(self) -> None:
        write(self.out, self.source, self.kind, self.before != "none")

    def check(self, *, clean: bool = True) -> bool:
        """True for the new output, False for the old one; anything else fails."""
        assert self.source.read_bytes() == b"input" * 50
        left = sorted(p for p in os.listdir(self.path) if p not in ("out", "input"))
        assert not clean or left == []
        assert state(self.out) in (self.new, OLD[self.before])
        return state(self.out) == self.new


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize(("kind", "before"), VARIANTS)
def test_an_error_at_any_call_leaves_old_or_new(memory: Path, kind: str, before: str) -> None:
    scene = Scene(memory / "s", kind, before)
    cases = list(_checked(scene, errno.EIO))
    assert len(cases) > 20 and cases[-1] and not cases[0]
    assert cases == sorted(cases), "what fails before the rename leaves the old, after it the new"


def _checked(scene: Scene, error: int) -> Iterator[bool]:
    for case in each_fault(scene.prepare, scene.work, error):
        try:
            new = scene.check()
            assert new or case.raised is not None, "an output that is not there was reported"
            assert case.raised is None or isinstance(case.raised, (LoraFxError, OSError))
        except AssertionError as failed:
            raise AssertionError(str(case)) from failed
        yield new


@pytest.mark.parametrize(("kind", "before"), [("file", "none"), ("folder", "folder")])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_one_line(memory: Path, kind: str, before: str, error: int) -> None:
    scene = Scene(memory / "s", kind, before)
    words = {errno.ENOSPC: "disk full", errno.EDQUOT: "quota", errno.EROFS: "read-only"}
    for case in each_fault(scene.prepare, scene.work, error, only=WRITES):
        scene.check()
        if case.raised is not None:
            assert isinstance(case.raised, LoraFxError), str(case)
            synced = " was written, but its folder could not be synced to disk"
            if case.raised.exit_code == 2:
                synced = ""
            assert case.raised.message == f"{scene.out}{synced}: {errors._WHY[error][0]}"
            assert words[error] in case.raised.message and case.raised.hint


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("kind", "before"), [("file", "none"), ("folder", "folder")])
def test_ctrl_c_at_any_call(memory: Path, kind: str, before: str, late: bool) -> None:
    scene = Scene(memory / "s", kind, before)
    for case in each_fault(scene.prepare, scene.work, KeyboardInterrupt, late=late):
        # shutil.rmtree closes a second time then, and its EBADF hides the interrupt.
        heard = isinstance(case.raised, KeyboardInterrupt) or case.call in ("none", "close")
        assert heard, str(case)
        scene.check(clean=False)
        left = {p for p in os.listdir(scene.path) if p not in ("out", "input")}
        assert left <= {".out.lock"}, f"{case}: {left}"  # one that nobody holds


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize(("kind", "before"), VARIANTS)
def test_after_a_disk_that_died_the_next_run_mends(memory: Path, kind: str, before: str) -> None:
    scene = Scene(memory / "s", kind, before)
    for case in each_fault(scene.prepare, scene.work, errno.EIO, stay=True):
        with pytest.raises(KeyError), replacing(scene.out, force=True):
            raise KeyError(str(case))
        scene.check()  # what was being replaced is put back, the rest is gone
        write(scene.out, scene.source, kind, True)
        assert scene.check(), str(case)


# --- without faults ------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_come_from_the_umask(tmp_path: Path, umask: int) -> None:
    (tmp_path / "other").write_text("of the input")
    (tmp_path / "other").chmod(0o600)
    old = os.umask(umask)
    try:
        with replacing(tmp_path / "x") as temporary:
            temporary.mkdir(0o700)
            (temporary / "sub").mkdir(0o700)
            (temporary / "sub" / "f").write_text("f")
            (temporary / "sub" / "f").chmod(0o600)
            os.link(tmp_path / "other", temporary / "linked")
            (temporary / "nowhere").symlink_to("gone")
        with replacing(tmp_path / "y") as temporary:
            temporary.write_text("y")
            temporary.chmod(0o400)
    finally:
        os.umask(old)

    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    assert mode("x") == mode("x/sub") == 0o777 & ~umask
    assert mode("x/sub/f") == mode("y") == 0o666 & ~umask
    assert mode("other") == 0o600, "an input that the output links to stays as it is"
    assert os.readlink(tmp_path / "x" / "nowhere") == "gone"


def test_everything_is_synced_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, object]] = []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        done.append(("f", os.fstat(fd).st_ino))
        fsync(fd)

    def renamed(a: Path, b: Path) -> None:
        done.append(("r", b))
        replace(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    (tmp_path / "input").write_bytes(b"input" * 50)
    write(tmp_path / "out", tmp_path / "input", "folder", False)
    want = [tmp_path / "out" / n for n in ("a.bin", "b.json", "sub/c", "sub", ".")]
    before = done[: done.index(("r", tmp_path / "out"))]
    assert {("f", p.stat().st_ino) for p in want} <= set(before)
    assert done[-1] == ("f", tmp_path.stat().st_ino)


def test_stale_temporaries_go_and_nothing_else(tmp_path: Path) -> None:
    stale = tmp_path / ".out.lora_fx_0123abcd.tmp"
    part = tmp_path / ".out.data.lora_fx_0123abcd.tmp"  # what the same run wrote beside it
    others = [".out.txt.lora_fx_0123abce.tmp", ".out.mine.tmp", ".out2.lora_fx_0123abce.tmp",
              "xout.lora_fx_0123abcd.tmp", ".out.lora_fx_by_hand.tmp",
              ".out.lora_fx_0123abcd.tmp2"]  # fmt: skip
    for name in (stale.name, part.name, *others):
        put(tmp_path / name, {"f": b"1"})
    with replacing(tmp_path / "out") as temporary:
        assert not stale.exists() and not part.exists()
        put(temporary, NEW_FILE)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "out"])
    (tmp_path / ".out.lora_fx_00000000.tmp").write_text("a file is none of ours")
    with replacing(tmp_path / "out", force=True) as temporary:
        put(temporary, NEW_FILE)
    assert (tmp_path / ".out.lora_fx_00000000.tmp").exists()


def test_refused_outputs(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("gone")
    nameless = "is not the name of a file"
    for name, word in [("dangling", "exists"), ("no/x", "does not exist"), ("..", nameless),
                       ("a\0b", nameless), ("n" * 250, "name is too long")]:  # fmt: skip
        with pytest.raises(LoraFxError, match=word) as caught, replacing(tmp_path / name):
            pytest.fail("entered")
        assert caught.value.hint and caught.value.exit_code == 2
    for path in (Path("."), Path("/")):
        with pytest.raises(LoraFxError, match="is not the name of a file"):
            check_output(path, force=True)
    with replacing(tmp_path / "dangling", force=True) as temporary:
        temporary.mkdir()
    assert not (tmp_path / "dangling").is_symlink() and os.listdir(tmp_path) == ["dangling"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="exists"), replacing(tmp_path / "x") as temporary:
        temporary.write_text("ours")
        (tmp_path / "x").write_text("theirs")
    assert (tmp_path / "x").read_text() == "theirs" and os.listdir(tmp_path) == ["x"]


def test_an_output_that_came_before_the_lock_costs_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def late(target: Path) -> Iterator[None]:
        target.write_text("theirs")
        yield

    monkeypatch.setattr(atomic, "locked", late)
    with pytest.raises(LoraFxError, match="exists"), replacing(tmp_path / "x"):
        pytest.fail("entered")
    assert (tmp_path / "x").read_text() == "theirs" and os.listdir(tmp_path) == ["x"]


def test_explain() -> None:
    for code, words in [(errno.ENOSPC, "disk full"), (errno.EACCES, "permission denied"),
                        (errno.EIO, "input/output"), (errno.EPIPE, "Broken pipe")]:  # fmt: skip
        error = explain(OSError(code, os.strerror(code)), "m/x")
        assert error.message.startswith("m/x: ") and words in error.message and error.hint
    assert explain(OSError("ends\nearly"), "x").message == "x: ends early"
    assert explain(OSError(), "x").message == "x: OSError"
