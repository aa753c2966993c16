"""Every pair that merge refuses: exit 2, one line that says what is wrong, a hint, no output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_fx.cli import main
from tests.checkpoint.made import adapter, factors, read, tree
from tests.checkpoint.refused_bases import Q, base
from tests.checkpoint.refused_pairs import PAIRS, RNG, good


def run(folder: Path, args: list[str]) -> int:
    argv = ["merge", str(folder / "base")]
    if not any(a.startswith("ADAPTER") for a in args):
        argv.append(str(folder / "adapter"))
    argv += [a.replace("ADAPTER", str(folder / "adapter")) for a in args]
    with pytest.raises(SystemExit) as caught:
        main(argv if "-o" in argv else [*argv, "-o", str(folder / "out")])
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize("name", PAIRS)
def test_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, texts = PAIRS[name]
    args = build(tmp_path)
    before = tree(tmp_path)
    capsys.readouterr()
    code = run(tmp_path, args)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    hints = [line for line in lines if line.startswith("Hint: ")]
    assert (code, len(errors), len(hints)) == (2, 1, 1), said.err
    assert lines[-2:] == [errors[0], hints[0]] and said.out == ""
    assert "please report it" not in hints[0], said.err
    for text in texts:
        assert text in errors[0] + hints[0], said.err
    assert tree(tmp_path) == before


VALUES = (
    "NaN in the base",
    "infinity in the base",
    "too large for fp16",
    "scale without measure",
    "weight beyond fp32",
)
"""What only reading the weights can show; the rest shows before."""


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in VALUES and "output" not in n])
def test_a_dry_run_refuses_it_too(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = PAIRS[name][0](tmp_path)
    assert run(tmp_path, [*args, "--dry-run"]) == 2


def test_what_is_let_through(tmp_path: Path) -> None:
    """The good pair, and what a flag allows: the table above would refuse anything otherwise."""
    base(tmp_path)
    good(tmp_path)
    assert run(tmp_path, []) == 0
    adapter(tmp_path / "wide", {Q: factors(RNG, 8, 6, 2), "no": factors(RNG, 8, 6, 2)})
    argv = ["ADAPTER", str(tmp_path / "wide"), "--allow-unused", "-o", str(tmp_path / "out2")]
    assert run(tmp_path, argv) == 0
    assert set(read(tmp_path / "out2")) == set(read(tmp_path / "base"))


def test_json_of_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base(tmp_path)
    adapter(tmp_path / "adapter", {"no": factors(RNG, 8, 6, 2)})
    assert run(tmp_path, ["--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["command"] == "merge" and said["ok"] is False and "no" in said["error"]


def test_merged_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base(tmp_path)
    good(tmp_path)
    assert run(tmp_path, []) == 0
    (tmp_path / "base").rename(tmp_path / "old")
    (tmp_path / "out").rename(tmp_path / "base")
    before = tree(tmp_path)
    for more in ([], ["ADAPTER:0.5"]):
        assert run(tmp_path, more) == 2
        assert "already merged into it" in capsys.readouterr().err
        assert tree(tmp_path) == before
    assert run(tmp_path, ["--again"]) == 0


def reported(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "report" in p.name)


@pytest.mark.parametrize("content", ['{"ok": true}', "[1]", "no JSON", ""])
def test_a_report_of_the_bases_own_is_kept(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base(tmp_path)
    good(tmp_path)
    (tmp_path / "base" / "report.json").write_text(content)
    assert run(tmp_path, []) == 0
    out = tmp_path / "out"
    assert "the report is lora-fx-report.json" in capsys.readouterr().err
    assert reported(out) == ["lora-fx-report.json", "report.json"]
    assert (out / "report.json").read_text() == content
    assert json.loads((out / "lora-fx-report.json").read_text())["touched_bytes"] > 0


def test_reports_of_earlier_merges_are_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would say of the output what is true of its base."""
    base(tmp_path)
    good(tmp_path)
    adapter(tmp_path / "two", {Q: factors(RNG, 8, 6, 3)})
    assert run(tmp_path, []) == 0
    (tmp_path / "base").rename(tmp_path / "old")
    (tmp_path / "out").rename(tmp_path / "base")
    capsys.readouterr()
    assert run(tmp_path, ["ADAPTER", "--again"]) == 0
    assert "report.json" not in capsys.readouterr().err
    assert reported(tmp_path / "out") == ["report.json"]
    (tmp_path / "base" / "report.json").write_text("mine")
    (tmp_path / "base" / "lora-fx-report.json").write_text("mine too")
    argv = ["merge", str(tmp_path / "base"), str(tmp_path / "two"), "-o", str(tmp_path / "out2")]
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0 and "no report is written" in capsys.readouterr().err
    assert (tmp_path / "out2" / "lora-fx-report.json").read_text() == "mine too"
