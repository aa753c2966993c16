"""Formats of other installed packages: converted, read, merged and replaced by the command line."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.formats.registry import FORMATS, OURS
from lora_fx.ir.layout import plain_layout
from tests.formats.plugin_packages import TOY, Done, child, install, run
from tests.house import HERE as ROOT

RNG = np.random.default_rng(0)
A, B = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 4), (6, 2)))
ALL = ", ".join(format.name for format in OURS)
WRITTEN = ", ".join(format.name for format in OURS if not format.only_read)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base and an adapter of PEFT's."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    save_adapter(Adapter({"q.weight": LowRank(A, B, 3.0)}), "start")
    save_file({"q.weight": RNG.standard_normal((6, 4)).astype(np.float32)}, "base.safetensors")
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of imports, of this process and of those that it starts; nothing is in it yet."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    FORMATS.refresh()
    before = set(sys.modules)
    yield folder
    FORMATS.refresh()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    sys.modules.pop("lora_fx.cli.convert", None)


@pytest.fixture
def place(installed: Path, work: Path) -> Path:
    """The same with the package toy-format."""
    install(installed, "toy-format")
    FORMATS.refresh()
    return installed


def changed(module: Path, code: str) -> None:
    """Give an installed package other code."""
    module.write_text(code)
    sys.modules.pop(module.stem, None)
    importlib.invalidate_caches()
    FORMATS.refresh()


def refused(done: Done | subprocess.CompletedProcess[str], *words: str) -> None:
    """One line and a hint, with these words; nothing of a traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [x for x in done.stderr.splitlines() if not re.fullmatch(r"\w+ … [\d.]+ s", x)]
    assert len(lines) == 2 and lines[0].startswith("Error: "), done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_it_is_converted_read_merged_and_replaced(work: Path, tmp_path: Path) -> None:
    """By the command line, in processes that find the package by themselves."""
    place = tmp_path / "place"
    install(place, "toy-format")

    def lora_fx(line: str) -> subprocess.CompletedProcess[str]:
        return child("-P", "-m", "lora_fx.cli", *line.split(), place=place, cwd=work)

    done = lora_fx("convert start -o x.toy")
    assert done.returncode == 0, done.stderr
    assert "note: toys have no layouts" in done.stderr
    assert done.stdout == "wrote x.toy: 1 update, peft → toy\n"

    done = lora_fx("convert x.toy -o back")
    assert done.returncode == 0, done.stderr
    assert "toy → peft" in done.stdout
    update = load_adapter("back").lowrank["q.weight"]
    np.testing.assert_array_equal(update.a, A)
    np.testing.assert_array_equal(update.b, B)
    assert update.scale == 1.5

    done = lora_fx("merge base.safetensors x.toy -o merged.safetensors")
    assert done.returncode == 0, done.stderr
    before, after = (load_file(f"{name}.safetensors")["q.weight"] for name in ("base", "merged"))
    np.testing.assert_allclose(after - before, 1.5 * B @ A, rtol=1e-5, atol=1e-5)

    written = Path("x.toy").read_bytes()
    refused(lora_fx("convert back -o x.toy"), "x.toy already exists", "--force")
    Path("x.toy").write_bytes(written + b"    ")
    done = lora_fx("convert back -o x.toy --force")
    assert done.returncode == 0, done.stderr
    assert Path("x.toy").read_bytes() == written


def test_the_example_of_the_page(installed: Path, work: Path) -> None:
    """The format of passes/README.md, as a package: there and back, with the layout of lora-fx."""
    page = (ROOT / "passes" / "README.md").read_text()
    code = page.partition('```python title="toy_format.py"\n')[2].partition("\n```\n")[0]
    install(installed, "toy-format", code)
    FORMATS.refresh()
    update = LowRank(A, B, 3.0, plain_layout((6, 4)), variant="rslora")
    save_adapter(Adapter({"q.weight": update}), "bound")
    done = run("convert bound -o x.mine.safetensors --format toy")
    assert done.returncode == 0, done.stderr
    done = run("convert x.mine.safetensors -o back")
    assert done.returncode == 0 and "toy → peft" in done.stdout, done.stderr
    read = load_adapter("back").lowrank["q.weight"]
    assert (read.alpha, read.variant, read.layout) == (3.0, "rslora", update.layout)
    np.testing.assert_array_equal(read.matrix(), update.matrix())

    save_file({"q.left": A, "q.right": B, "q.strength": A[0]}, "wrong", {"toy_version": "1"})
    refused(run("convert wrong -o x"), "wrong: 'q.strength' is float32 [4]; expected one number")


def test_force_replaces_nothing_else(place: Path) -> None:
    Path("x.toy").write_text("years")
    refused(run("convert start -o x.toy --force"), "lora-fx does not write files of this kind")
    assert run("convert start -o y.toy").returncode == 0
    Path("y.toy").rename("y.onnx_adapter")
    done = run("convert start -o y.onnx_adapter --force")
    refused(done, "it is an adapter in a .toy file, and a .onnx_adapter file would replace it")


def test_the_other_commands_take_it(place: Path) -> None:
    assert run("convert start -o x.toy").returncode == 0
    done = run("truncate x.toy -o small --rank 1")
    assert done.returncode == 0, done.stderr
    assert "note: a toy" in done.stderr
    for line in ("verify base.safetensors x.toy", "doctor base.safetensors x.toy"):
        done = run(line)
        assert done.returncode == 0, done.stderr
    done = run("merge-all base.safetensors x.toy -o all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in Path("all").iterdir()] == ["x.safetensors"]


def test_it_is_listed(place: Path) -> None:
    text = " ".join(run("convert --help").stdout.split())
    assert f"{ALL}, toy. OUT is" in text
    assert f"Choose the format of OUT: {WRITTEN}, toy, peft-0.18" in text
    names = f"pass --format with one of {WRITTEN}, toy"
    refused(run("convert start -o x.safetensors"), names)
    Path("odd.bin").write_bytes(b"odd" * 40)
    refused(run("convert odd.bin -o x"), "not a safetensors file", ".toy")


def test_what_it_cannot_say_is_refused(work: Path, place: Path) -> None:
    done = run("convert start -o x --format toy")
    refused(done, "format toy needs a name that ends in .toy")
    refused(
        run("convert start -o x.toy --for m.onnx"),
        "--for works with onnx_adapter or graph_inputs, not with toy",
    )
    assert sorted(p.name for p in work.iterdir()) == ["base.safetensors", "start"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("peft", ("lora-fx and other-one", "'peft'", "pip uninstall other-one")),
        ("vllm", ("lora-fx and other-one", "'vllm'")),
        ("toy", ("other-one and toy-format", "'toy'")),
    ],
)
def test_two_of_one_name(place: Path, name: str, words: tuple[str, ...]) -> None:
    install(place, "other-one", TOY, {name: "other_one:TOY"})
    FORMATS.refresh()
    refused(run("convert start -o x.toy"), *words)
    assert run("--help").returncode == 0
    assert len(load_adapter("start")) == 1  # which lora-fx knows by itself
    assert not Path("x.toy").exists()
    Path("x.toy").write_bytes(b"TOY1{}")
    with pytest.raises(LoraFxError, match=words[0]):
        load_adapter("x.toy")


BROKEN = {
    "import nothing_of_this_name": "cannot be imported: ModuleNotFoundError",
    "raise SystemExit(0)": "cannot be imported: SystemExit",
    "TOY = 1": "is not a Format: int has no name, suffixes",
    f"{TOY}\nTOY = Toy": "is not a Format: Toy is a class",
    f"{TOY}\nToy.name = 'toys'": "is not a Format: its name is 'toys'",
    f"{TOY}\nToy.suffixes = ('.onnx',)": "is not a Format: one of its suffixes is '.onnx'",
    f"{TOY}\nToy.suffixes = ('.my.toy',)": "one of its suffixes is '.my.toy'; expected one dot",
    f"{TOY}\nToy.suffixes = ()": "is not a Format: its suffixes are ()",
    f"{TOY}\nToy.folder_files = ('../x',)": "is not a Format: its file names of a folder",
    f"{TOY}\nToy.magic = b'TOY1'": "is not a Format: its magic is b'TOY1'",
    f"{TOY}\nToy.magic = Magic(b'')": "is not a Format: its magic is",
    f"{TOY}\nToy.magic = Magic(bytes([128, 2]))": "which begins pickles",
    f"{TOY}\nToy.read = None": "is not a Format: its read cannot be called",
}


@pytest.mark.parametrize("code", BROKEN, ids=BROKEN.values())
def test_one_that_cannot_be_imported_or_is_none(place: Path, code: str) -> None:
    changed(place / "toy_format.py", code)
    words = ("the adapter format 'toy' of the package toy-format", BROKEN[code])
    refused(run("convert start -o x.toy"), *words)
    Path("x.toy").write_bytes(b"TOY1{}")
    refused(run("convert x.toy -o y"), *words)
    refused(run("convert start -o y --format toy"), *words)
    assert not Path("y").exists()


def test_one_that_cannot_be_imported_keeps_no_other_from_being_read(place: Path) -> None:
    changed(place / "toy_format.py", "import nothing_of_this_name")
    done = run("convert start -o x --format peft")
    assert done.returncode == 0, done.stderr
    assert "toy" not in done.stderr
    done = run("convert --help")
    assert done.returncode == 0 and f"{WRITTEN}, toy" in " ".join(done.stdout.split())


FAULTS = {
    "read": [
        ("1 / 0", "cannot read it: ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)", "cannot read it: SystemExit: 0"),
        ("return {}", "returned a dict; expected an Adapter"),
        ("return Adapter(1)", "read entries of type int; expected a mapping"),
        ("return Adapter({'x': LowRank(np.zeros((2, 3), 'f4'), np.zeros((4, 3), 'f4'), 1.0)})",
         "'x' has A [2, 3] and B [4, 3]"),
        ("return Adapter({'x': LowRank(np.zeros((2, 3)), np.zeros((4, 2)), 1.0)})",
         "'x' has A in float64, not float32"),
        ("x = np.full((2, 2), np.nan, 'f4'); return Adapter({'x': LowRank(x, x, 1.0)})",
         "'A' has NaN or infinite values"),
        ("x = np.ones((2, 2), 'f4'); return Adapter({'x': LowRank(x, x, float('nan'))})",
         "'x' has alpha nan"),
        ("return Adapter({})", "the adapter has no update"),
        ("return Adapter({'x': 5})", "'x' is of type int; expected a LowRank, a Full"),
        ("x = np.ones((2, 2), 'f4'); return Adapter({5: LowRank(x, x, 1.0)})", "read the key 5"),
        ("x = np.ones((2, 2), 'f4'); return Adapter({'x': LowRank(x, x, 1.0)}, {'notes': 5})",
         "read 5 as notes; expected a list of texts"),
        ("return Adapter({'x': LowRank([[1.0]], [[1.0]], 1.0)})", "'x' has A of type list"),
        ("from lora_fx import Full; return Adapter({'x': Full(1.0)})",
         "'x' has a value of type float; expected an array"),
        ("from lora_fx import Full; return Adapter({'x': Full(np.full(2, np.nan, 'f4'))})",
         "'value' has NaN or infinite values"),
        ("x = np.ones((2, 2), 'f4'); n = np.full(2, np.nan, 'f4')\n"
         "    return Adapter({'x': LowRank(x, x, 1.0, magnitude=n)})",
         "'magnitude' has NaN or infinite values"),
        ("x = np.ones((2, 2), 'f4'); return Adapter({'x': LowRank(x, x, 1.0, variant='none')})",
         "'x' has variant 'none', which is not known here"),
    ],
    "write": [
        ("1 / 0", "'toy' of the package toy-format cannot write it: Zero"),
        ("return ()", "wrote nothing"),
        ("path.write_bytes(b'TOY1{}'); return None", "returned NoneType; expected notes"),
        ("path.write_bytes(b'TOY2{}'); return ()", "made a file that no format would read"),
    ],
    "detect": [("1 / 0", "cannot recognise its files: ZeroDivisionError")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "body", "word"), [(m, body, word) for m in FAULTS for body, word in FAULTS[m]]
)
def test_what_it_raises_is_one_line(
    work: Path, place: Path, method: str, body: str, word: str
) -> None:
    """The file and the package are named, and nothing is written."""
    assert run("convert start -o good.toy").returncode == 0
    arguments = {"read": "path, base=None", "write": "adapter, path, base=None", "detect": "seen"}
    broken = f"\n\ndef broken(self, {arguments[method]}):\n    {body}\n\n\nToy.{method} = broken\n"
    changed(place / "toy_format.py", TOY + broken)
    if method == "write":
        refused(run("convert start -o x.toy"), "x.toy", word)
    else:
        refused(run("convert good.toy -o x"), word)
    assert sorted(p.name for p in work.iterdir()) == ["base.safetensors", "good.toy", "start"]


PLAIN = '''
"""Two formats without a magic of their own: safetensors under names of theirs, and an archive."""

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from lora_fx import Adapter, LowRank
from lora_fx.formats.format import Format, Magic


class Flat(Format):
    name = "flat"
    suffixes = (".safetensors", ".flat")
    folder_files = ("flat.safetensors",)

    def detect(self, seen):
        return bool(seen.names) and all(name.endswith((".left", ".right")) for name in seen.names)

    def read(self, path, base=None):
        tensors = load_file(path)
        keys = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        pairs = {key: (tensors[f"{key}.right"], tensors[f"{key}.left"]) for key in keys}
        return Adapter({key: LowRank(a, b, float(len(a))) for key, (a, b) in pairs.items()})

    def write(self, adapter, path, base=None):
        if path.suffix not in self.suffixes:
            path.mkdir()
            path = path / "flat.safetensors"
        tensors = {}
        for key, low in adapter.lowrank.items():
            tensors |= {f"{key}.right": low.a, f"{key}.left": low.b * np.float32(low.scale)}
        save_file(tensors, path)
        return ()


class Zipped(Format):
    name = "zipped"
    suffixes = (".zipped",)
    magic = Magic(b"PK\\x03\\x04")

    def read(self, path, base=None):
        tensors = np.load(path, allow_pickle=False)
        keys = dict.fromkeys(name[:-2] for name in tensors)
        pairs = {key: (tensors[f"{key}.a"], tensors[f"{key}.b"]) for key in keys}
        return Adapter({key: LowRank(a, b, float(len(a))) for key, (a, b) in pairs.items()})

    def write(self, adapter, path, base=None):
        tensors = {}
        for key, low in adapter.lowrank.items():
            tensors |= {f"{key}.a": low.a, f"{key}.b": low.b * np.float32(low.scale)}
        with open(path, "wb") as file:
            np.savez(file, **tensors)
        return ()


FLAT, ZIPPED = Flat(), Zipped()
'''


@pytest.fixture
def two(installed: Path, work: Path) -> Path:
    """The module of a package with two formats."""
    entries = {"flat": "plain:FLAT", "zipped": "plain:ZIPPED"}
    module = install(installed, "plain", PLAIN, entries)
    FORMATS.refresh()
    return module


@pytest.mark.parametrize(
    ("out", "name"),
    [
        ("x.safetensors", "flat"),
        ("x.mine.safetensors", "flat"),
        ("x.flat", "flat"),
        ("x", "flat"),
        ("x.zipped", "zipped"),
    ],
)
def test_safetensors_folders_and_archives(two: Path, out: str, name: str) -> None:
    first = f"convert start -o {out} --format {name}"
    for line in (first, f"{first} --force"):
        done = run(line)
        assert done.returncode == 0, done.stderr
    refused(run(first), f"{out} already exists")
    done = run(f"convert {out} -o back --json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["from"] == name
    update = load_adapter("back").lowrank["q.weight"]
    np.testing.assert_allclose(update.matrix(), 1.5 * B @ A, rtol=1e-5)
    if out == "x.safetensors":
        done = run(f"merge base.safetensors start -o {out} --force")
        refused(done, "it is an adapter in a .safetensors file")


def test_a_format_that_is_always_a_folder(two: Path) -> None:
    changed(two, f"{PLAIN}\nFlat.suffixes = ()\n")
    for line in ("convert start -o x --format flat", "convert start -o x --format flat --force"):
        done = run(line)
        assert done.returncode == 0, done.stderr
    assert run("convert x -o back").returncode == 0
    assert run("convert x/flat.safetensors -o again").returncode == 0
    refused(run("convert start -o x.gguf --format flat"), "format flat needs a folder")


def test_the_door_is_the_same_for_all(two: Path) -> None:
    """Pickles, archives that grow and too many elements: the format's `read` is not called."""
    code = f"{PLAIN}\n\ndef read(self, path, base=None):\n    print('called')\n\n\n"
    changed(two, f"{code}Flat.read = Zipped.read = read\n")

    torch.save({"q.left": torch.ones(2, 2)}, "x.zipped")
    done = run("convert x.zipped -o x")
    refused(done, "x.zipped: a pickle, which can run any code; expected safetensors", "--trust")
    assert "called" in run("convert x.zipped -o x --trust").stdout  # by its names, as ours are

    np.savez_compressed("x", **{"q.a": np.zeros((1, 1 << 26), np.float32)})
    Path("x.npz").rename("x.zipped")
    done = run("convert x.zipped -o x")
    refused(done, "bytes when unpacked, over 100 times its size")
    assert "called" not in done.stdout

    save_file({"q.left": np.zeros(17 << 20, np.float32)}, "x.flat")
    done = run("merge base.safetensors x.flat -o m.safetensors")
    refused(
        done,
        "its tensors have 17825792 elements; expected at most 48, twice the elements of this base",
    )
    assert "called" not in done.stdout

    Path("x.flat").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(run("convert x.flat -o x"), "a git-LFS pointer")


def test_a_large_file_with_a_magic_is_bounded_too(place: Path) -> None:
    with open("x.toy", "wb") as file:
        file.write(b"TOY1{}")
        file.truncate(65 << 20)
    done = run("merge base.safetensors x.toy -o m.safetensors")
    refused(done, "68157440 bytes; expected at most 48 elements, twice the elements of this base")


def test_two_packages_that_know_a_file(two: Path) -> None:
    assert run("convert start -o x.flat").returncode == 0
    changed(two, f"{PLAIN}\nZipped.magic = None\nZipped.detect = Flat.detect\n")
    refused(run("convert x.flat -o x --format peft"), "the format is ambiguous (flat or zipped)")


def test_a_file_of_ours_is_ours(two: Path) -> None:
    """No package is asked about it, and a package that says that it is its own is not believed."""
    changed(two, f"{PLAIN}\nFlat.detect = lambda self, seen: True\n")
    done = run("convert start -o x --format peft --json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["from"] == "peft"


NOTHING_IS_ASKED = """
import sys
import lora_fx
from lora_fx.cli import main
from lora_fx.formats.io import adapter_name, format_for, save_adapter
from lora_fx.formats.registry import FORMATS, OURS
lines = (
    "merge base.safetensors start -o m.safetensors",
    "merge base.safetensors one.safetensors -o m.safetensors --dry-run",
    "merge base.safetensors start/adapter_config.json -o m.safetensors --dry-run",
    "merge base.safetensors start one.safetensors -o m.safetensors --again --dry-run",
    "truncate start -o small --rank 1",
    "truncate one.safetensors -o small --rank 1 --force",
)
for line in lines:
    try:
        main(line.split())
    except SystemExit as stop:
        assert not stop.code, line
assert adapter_name("start") == "start" and adapter_name("one.safetensors") == "one"
assert format_for("x.gguf") == "gguf" and format_for("x") == "peft"
save_adapter(lora_fx.load_adapter("start"), "one.safetensors", force=True)
assert "_points" not in vars(FORMATS) and "toy_format" not in sys.modules
assert "importlib.metadata" not in sys.modules
"""


def test_nothing_is_asked_where_ours_know_every_file(work: Path, tmp_path: Path) -> None:
    """Not even which packages there are."""
    install(tmp_path / "place", "toy-format", "open('canary', 'w')")
    save_adapter(load_adapter("start"), "one.safetensors")
    done = child("-c", NOTHING_IS_ASKED, place=tmp_path / "place", cwd=work)
    assert done.returncode == 0, done.stderr
    assert not Path("canary").exists()


def test_a_file_that_its_own_format_would_not_read_is_not_written(two: Path) -> None:
    changed(two, f"{PLAIN}\nFlat.detect = lambda self, seen: False\n")
    done = run("convert start -o x.flat --format flat")
    refused(done, "x.flat: not written", "'flat' of the package plain", "no format would read")
    assert not Path("x.flat").exists()


def test_nothing_is_imported_before_it_is_needed(work: Path, tmp_path: Path) -> None:
    install(tmp_path / "place", "toy-format")
    code = """
import sys
import lora_fx
import lora_fx.formats.io
from lora_fx.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
from lora_fx.formats.registry import FORMATS, OURS
assert "_points" not in vars(FORMATS)
assert "toy" in FORMATS and "toy_format" not in sys.modules
assert FORMATS["toy"].suffixes == (".toy",) and "toy_format" in sys.modules
"""
    done = child("-c", code, place=tmp_path / "place", cwd=work)
    assert done.returncode == 0, done.stderr


def test_a_package_in_the_current_folder_is_not_installed(work: Path, tmp_path: Path) -> None:
    install(work, "toy-format", "open('canary', 'w')")
    load = "import lora_fx; print(len(lora_fx.load_adapter('start')))"
    for code in (("-m", "lora_fx.cli", "convert", "start", "-o", "x.toy"), ("-c", load)):
        done = child(*code, place=tmp_path / "none", cwd=work)
        assert done.returncode == 0 and not Path("canary").exists(), done.stderr
