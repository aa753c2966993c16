"""--config and --save-config: a table of TOML says what the command line says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.core import ParameterSource
from safetensors.numpy import load_file, save_file

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.cli import main
from lora_fx.cli.config_file import OWN, config_text
from lora_fx.cli.group import COMMANDS, group
from lora_fx.formats.io import save_adapter


def parsed(name: str, args: list[str]) -> click.Context:
    root = click.Context(group, info_name="lora-fx")
    command = group.get_command(root, name)
    assert command is not None
    return command.make_context(name, args, parent=root)


def example(param: click.Parameter) -> Any:
    """A value that is not the default, as TOML would hold it."""
    if getattr(param, "is_flag", False):
        return True
    if isinstance(param.type, click.Choice):
        return param.type.choices[-1]
    if isinstance(param.type, type(click.INT)):
        return 3
    if isinstance(param.type, type(click.FLOAT)):
        return 0.25
    many = param.nargs == -1 or getattr(param, "multiple", False)
    text = 'a "b" \\ ‖ü\x7f'
    return [text, "c=1,d"] if many else text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_comes_through(name: str, tmp_path: Path) -> None:
    """The command line is the oracle; what it gave is saved, read, and gives the same."""
    root = click.Context(group)
    command = group.get_command(root, name)
    assert command is not None
    line: list[str] = []
    for param in command.params:
        if param.name in OWN:
            continue
        value = example(param)
        values = value if isinstance(value, list) else [value]
        if isinstance(param, click.Argument):
            line += values
        elif value is True:
            line.append(max(param.opts, key=len))
        else:
            line += [x for v in values for x in (max(param.opts, key=len), str(v))]
    given = parsed(name, line)
    text = config_text(given)
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    read = parsed(name, ["--config", str(tmp_path / "c.toml")])
    assert {**given.params, "config": 0} == {**read.params, "config": 0}
    assert config_text(read) == text
    (tmp_path / "d.toml").write_text(
        re.sub(r"(?m)^[a-z-]+(?= =)", lambda m: m[0].replace("-", "_"), text), encoding="utf-8"
    )
    under = parsed(name, ["--config", str(tmp_path / "d.toml")])
    assert {**under.params, "config": 0} == {**read.params, "config": 0}
    own = [p for p in command.params if p.name not in OWN and not isinstance(p, click.Argument)]
    assert all(under.get_parameter_source(p.name or "") is ParameterSource.DEFAULT_MAP for p in own)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    weights = {"fc1.weight": (12, 8), "fc2.weight": (5, 12)}
    base = {k: rng.standard_normal(s).astype("f") for k, s in weights.items()}
    save_file(base, "base.safetensors")
    entries = {}
    for key, (rows, columns) in weights.items():
        a, b = rng.standard_normal((2, columns)), rng.standard_normal((rows, 2))
        entries[key] = LowRank(a.astype("f"), b.astype("f"), alpha=6.0)
    save_adapter(Adapter(entries), "one")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_a_merge_from_a_config_is_the_merge(home: Path, capsys: Any) -> None:
    code, _, err = run(
        capsys, "merge", "base.safetensors", "one:0.5", "-o", "a.safetensors",
        "--dtype", "fp64", "--save-config", "run.toml",
    )  # fmt: skip
    assert code == 0 and "wrote run.toml" in err
    assert (home / "run.toml").read_text() == (
        "# lora-fx merge --config FILE\n[merge]\n"
        'base = "base.safetensors"\nadapters = ["one:0.5"]\nout = "a.safetensors"\n'
        'dtype = "fp64"\n'
    )
    first = (home / "a.safetensors").read_bytes()
    (home / "a.safetensors").unlink()
    code, _, _ = run(capsys, "merge", "--config", "run.toml")
    assert code == 0 and (home / "a.safetensors").read_bytes() == first
    code, _, _ = run(
        capsys, "merge", "--config", "run.toml", "--dtype", "fp32", "-o", "b.safetensors"
    )
    wide, narrow = load_file("a.safetensors"), load_file("b.safetensors")
    assert wide["fc1.weight"].dtype == np.float64, "what the config says"
    assert narrow["fc1.weight"].dtype == np.float32, "the command line wins"
    base, adapter = load_file("base.safetensors"), load_file("one/adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.fc1.lora_{x}.weight"].astype("d") for x in "AB")
    want = base["fc1.weight"].astype("d") + 0.5 * (6.0 / 2) * b @ a
    assert np.abs(wide["fc1.weight"] - want).max() < 1e-6


def test_what_is_refused_leaves_no_config(home: Path, capsys: Any) -> None:
    code, _, _ = run(
        capsys,
        "merge",
        "base.safetensors",
        "gone",
        "-o",
        "a.safetensors",
        "--save-config",
        "r.toml",
    )
    assert code == 2 and not (home / "r.toml").exists()
    (home / "r.toml").write_text("# lora-fx merge --config FILE\n")
    doctor = ["doctor", "base.safetensors", "one", "--save-config", "r.toml"]
    code, _, err = run(capsys, *doctor)
    assert code == 2 and "r.toml exists already" in err and "--force" in err
    code, _, _ = run(capsys, *doctor, "--force")
    assert code in (0, 1) and "[doctor]" in (home / "r.toml").read_text()
    (home / "r.toml").write_text("[doctor]\n# mine\n")
    code, _, err = run(capsys, *doctor, "--force")
    assert code == 2 and "lora-fx does not write files of this kind" in err


def test_options_of_a_config_count_as_given(home: Path, capsys: Any) -> None:
    (home / "r.toml").write_text('[insert]\nmodel = "m.py:build"\noutput = "x"\nrank = 4\n')
    code, _, err = run(capsys, "insert", "--config", "r.toml", "--plan", "p.json")
    assert code == 2 and "--rank has no effect with --plan" in err
    (home / "r.toml").write_text('[doctor]\nbase = "base.safetensors"\nadapter="one"\ntrust=true\n')
    _, _, err = run(capsys, "doctor", "--config=~/r.toml".replace("~", str(home)))
    assert "sets trust" in err


@pytest.mark.parametrize(
    ("table", "line", "accumulate", "precision"),
    [
        ("", [], 2, "no"),
        ('accumulate = 3\nmixed-precision = "bf16"\n', [], 3, "bf16"),
        ('accumulate = 3\nmixed-precision = "bf16"\n', ["--accumulate", "5"], 5, "bf16"),
    ],
)
def test_a_config_wins_over_what_accelerate_launch_always_sets(
    table: str, line: list[str], accumulate: int, precision: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    (tmp_path / "c.toml").write_text(f"[train]\n{table}")
    config = ["--config", str(tmp_path / "c.toml")]
    given = parsed("train", ["m.py:build", "d.npz", "-o", "a", *config, *line]).params
    assert (given["accumulate"], given["mixed_precision"]) == (accumulate, precision)


@pytest.mark.parametrize(
    "line",
    [
        ["verify", "a", "b", "--tol", "inf"],
        ["verify", "a", "b", "--tol", "1e-07"],
        ["verify", "a", "b", "--tol", "1e22"],
        ["extract", "a", "b", "-o", "c", "--no-fan-in-fan-out"],
        ["merge", "a", "\\:0.5", "-o", "\u2028", "--dtype", "\t"],
    ],
)
def test_odd_values_come_through(line: list[str], tmp_path: Path) -> None:
    given = parsed(line[0], line[1:])
    (tmp_path / "c.toml").write_text(config_text(given), encoding="utf-8")
    read = parsed(line[0], ["--config", str(tmp_path / "c.toml")])
    assert {**given.params, "config": 0} == {**read.params, "config": 0}


def test_a_name_that_is_no_utf8_is_refused_before_the_work(home: Path, capsys: Any) -> None:
    argv = ["merge", "base.safetensors", "on\udcffe", "-o", "a.safetensors"]
    code, _, err = run(capsys, *argv, "--save-config", "r.toml")
    assert code == 2 and "is not UTF-8" in err and "leave --save-config out" in err
    assert not (home / "a.safetensors").exists() and not (home / "r.toml").exists()


REFUSED = {
    "no file": ("", "--config gone.toml", "gone.toml: cannot be read", "is the path right"),
    "no TOML": ("[merge", "", "r.toml: not TOML", "[merge]"),
    "no table": ("[plan]\nseed = 1", "", "r.toml: no table [merge]", "it has [plan]"),
    "empty": ("", "", "r.toml: no table [merge]", "empty"),
    "no command": ("[mrge]\nlossy = true", "", "there is no command [mrge]", "did you mean merge"),
    "a key in no table": ("lossy = true\n[merge]", "", "'lossy' is not in a table", "[merge]"),
    "an unknown key": ("[merge]\ndtpe = 'fp32'", "", "[merge] dtpe: no such option", "mean dtype"),
    "a key of another command": ("[merge]\nepochs = 3", "", "epochs: no such option", ""),
    "twice": ("[merge]\nany_base = true\nany-base = true", "", "given twice", "leave one"),
    "a number for a flag": ("[merge]\nlossy = 1", "", "lossy = 1; expected true or", "= true"),
    "a text for a number": ("[merge]\nrank = '8'", "", 'rank = "8"; expected a whole', "rank = 8"),
    "true for a number": ("[merge]\nthreads = true", "", "threads = true; expected a whole", "8"),
    "a list for one": ("[merge]\ndtype = ['fp32']", "", "expected a text", "for example dtype"),
    "a number in a list": ("[merge]\nadapters = ['x', 3]", "", "a text or a list", "adapters"),
    "no choice": ("[merge]\nhow = 'cta'", "", "[merge] how: 'cta' is not one of", "mean cat"),
    "config in a config": ("[merge]\nconfig = 'x'", "", "config: no such option", ""),
    "not .toml": ("[merge]\nlossy = true", "--save-config r.txt", "not end in .toml", "run.toml"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_configs_are_one_line(what: str, home: Path, capsys: Any) -> None:
    text, more, message, hint = REFUSED[what]
    (home / "r.toml").write_text(text)
    (home / "r.md").write_text("")
    line = more.split() if more.startswith("--config") else ["--config", "r.toml", *more.split()]
    code, _, err = run(
        capsys, "-q", "merge", "base.safetensors", "one", "-o", "out.safetensors", *line
    )
    said = err.splitlines()
    assert code == 2 and len(said) == 2, err
    assert message in said[0] and hint in said[1], err
    assert not (home / "out.safetensors").exists()
