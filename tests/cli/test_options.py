"""Groups of options: what click gets of their fields, and what the verbs get of their values."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click
import numpy as np
import pytest
from click.testing import CliRunner

from lora_fx.cli import branch_options, merge_options, model_options, train_options
from lora_fx.cli.branch_options import TargetOptions
from lora_fx.cli.extract import RecoveryOptions
from lora_fx.cli.group import COMMANDS
from lora_fx.cli.merge_options import CheckpointOptions
from lora_fx.cli.options import flag, names_of, option, option_group, repeatable, selectors
from lora_fx.cli.train_options import ExampleOptions, LoopOptions
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import save_adapter
from tests.cli.test_cli import run
from tests.mistakes.files import SHAPES, onnx_file, updates


def modules() -> list[Any]:
    shared = [merge_options, model_options, branch_options, train_options]
    return [*shared, *(import_module(f"lora_fx.cli.{c.replace('-', '_')}") for c in COMMANDS)]


def every_group() -> dict[str, Any]:
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": group
        for module in modules()
        for name, group in vars(module).items()
        if name.endswith("Options") and group.__module__ == module.__name__
    }


@dataclass(frozen=True, kw_only=True)
class Limits:
    rank: int = option("--rank", "-r", type=int, default=8, help="A rank.")
    of_file: str | None = option("--file", metavar="FILE", help="A file.")
    lossy: bool = flag("--lossy", "A loss.")
    sizes: tuple[str, ...] = repeatable("--size", "N", "Sizes.")
    include: tuple[str, ...] | None = selectors("--include", "Targets.")


def test_a_group_reaches_its_command_as_one_object() -> None:
    arrived: list[tuple[str, Limits, bool]] = []

    @click.command("cut")
    @click.argument("model")
    @option_group("limits", Limits)
    @click.option("--force", is_flag=True)
    def command(model: str, limits: Limits, force: bool) -> None:
        """Cut it."""
        arrived.append((model, limits, force))

    line = "m -r 3 --file f --lossy --size 1 --size 2 --include a --force"
    assert CliRunner().invoke(command, line.split()).exit_code == 0
    limits = Limits(rank=3, of_file="f", lossy=True, sizes=("1", "2"), include=("a",))
    assert arrived.pop() == ("m", limits, True)
    assert CliRunner().invoke(command, ["m"]).exit_code == 0
    assert arrived.pop() == ("m", Limits(), False), "the defaults are the same"
    assert [p.name for p in command.params] == ["model", *names_of(Limits), "force"]
    assert command.help == "Cut it."


@pytest.mark.parametrize("name", every_group())
def test_a_field_is_of_the_type_and_default_that_click_gives_it(name: str) -> None:
    group = every_group()[name]
    hints = get_type_hints(group)
    params = option_group("group", group)(lambda group: None)
    declared = {p.name: p for p in params.__click_params__}  # type: ignore[attr-defined]
    empty = group()
    for field in fields(group):
        param, hint = declared[field.name], hints[field.name]
        kinds = set(get_args(hint)) - {type(None)} if type(None) in get_args(hint) else {hint}
        (kind,) = kinds
        plain = str if str(get_origin(kind)) == "typing.Literal" else get_origin(kind) or kind
        wanted: type = str
        if param.is_flag:
            wanted = bool
        elif param.multiple:
            wanted = tuple
        elif isinstance(param.type, type(click.INT)):
            wanted = int
        elif isinstance(param.type, type(click.FLOAT)):
            wanted = float
        assert plain is wanted, field.name

        default = click.Context(click.Command("x", params=[param])).command.make_context("x", [])
        assert getattr(empty, field.name) == default.params[field.name], field.name
        assert (default.params[field.name] is None) == (type(None) in get_args(hint)), field.name


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_each_of_its_arguments(name: str) -> None:
    """No command takes what it is given as a dict."""
    module = import_module(f"lora_fx.cli.{name.replace('-', '_')}")
    signature = inspect.signature(module.command.callback)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    taken: list[str] = []
    for parameter in signature.parameters.values():
        group = getattr(module, str(parameter.annotation), None)
        taken += names_of(group) if group else [parameter.name]
    shared = {"as_json", "config", "save_config", "report", "attest", "no_memory_check"}
    own = {p.name for p in module.command.params} - shared
    assert len(taken) == len(set(taken))
    assert own - {"force"} <= set(taken) <= own


def other(value: object, hint: object) -> Any:
    """A value of a field that is not its default."""
    plain = str(hint)
    if isinstance(value, bool) or plain.startswith("bool"):
        return True
    if "tuple" in plain:
        return ("a", "b")
    if "int" in plain:
        return 3
    return 0.25 if "float" in plain else "a"


NAMES = {
    "dtype": "float16", "max_shard_size": "2GB", "variant": "dora", "init": "pissa",
    "dead": "keep", "schedule": "linear", "optimizer": "sgd", "mixed_precision": "bf16",
}  # fmt: skip
"""Values of options that take some names alone."""
NEEDED: dict[str, dict[str, Any]] = {
    "lossy": {"requantise": True}, "max_shard_size": {"dequantise": True},
    "max_rank": {"energy": 0.5},
}  # fmt: skip
"""What has to be given beside an option."""
HANDED_ON: dict[str, tuple[type[Any], Any, set[str]]] = {
    # a group, what makes a verb's options of it, and what a command reads of it by itself
    "merge": (CheckpointOptions, CheckpointOptions.merge, {"link"}),
    "extract": (RecoveryOptions, RecoveryOptions.extract, set()),
    "insert": (TargetOptions, TargetOptions.insert, {"quantise", "invocation"}),
    "loop": (
        LoopOptions,
        lambda group: group.settings(0),
        {
            "curve", "probe", "device", "gradient_accumulation_steps", "activation_checkpointing",
            "save_state", "save_every", "save_total_limit", "resume",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDED_ON)
def test_every_option_of_a_group_reaches_the_verb(name: str) -> None:
    group, made, by_itself = HANDED_ON[name]
    hints = get_type_hints(group)
    assert by_itself <= set(names_of(group))
    for field in fields(group):
        if field.name in by_itself:
            continue
        value = NAMES.get(field.name, other(field.default, hints[field.name]))
        asked = made(group(**{field.name: value, **NEEDED.get(field.name, {})}))
        assert getattr(asked, field.name) == value != getattr(made(group()), field.name)


def test_accumulated_batches_are_one_larger_batch_in_more_parts() -> None:
    loop = LoopOptions(batch_size=8, accumulate=2, gradient_accumulation_steps=3)
    settings = loop.settings(7)
    assert (settings.batch_size, settings.accumulate, settings.seed) == (24, 6, 7)


def test_a_state_is_kept_where_it_is_resumed_from(tmp_path: Path) -> None:
    resumed = LoopOptions(resume=str(tmp_path / "state"), save_every=2).saving(force=False)
    assert (resumed.folder, resumed.resume, resumed.every) == (*[str(tmp_path / "state")] * 2, 2)
    saved = LoopOptions(save_state="one", resume="two", save_total_limit=3).saving(force=False)
    assert (saved.folder, saved.resume, saved.limit) == ("one", "two", 3)
    assert LoopOptions().saving(force=False).folder is None


def test_held_out_examples_are_a_share() -> None:
    ExampleOptions(validation=0.0).check(None)
    ExampleOptions(validation=0.0, eval_data="x").check(2)
    with pytest.raises(LoraFxError) as refused:
        ExampleOptions(validation=1.5).check(None)
    assert refused.value.message == "--validation 1.5 is not in [0, 1)"


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A graph, an adapter whose names are others, and a file that says which are which."""
    rng = np.random.default_rng(0)
    onnx_file(tmp_path / "m.onnx", {k: rng.standard_normal(s) for k, s in SHAPES.items()})
    adapter = updates(rng, {k.replace("fc", "layer"): s for k, s in SHAPES.items()})
    save_adapter(adapter, tmp_path / "start")
    names = {k.replace("fc", "layer"): k for k in SHAPES}
    (tmp_path / "names.json").write_text(json.dumps(names))
    monkeypatch.chdir(tmp_path)
    return tmp_path


NOTE = "note: --map is called --names now"


@pytest.mark.parametrize(
    "verb", ["merge m.onnx start -o out.onnx", "export m.onnx start -o out.onnx"]
)
def test_map_goes_on_working_as_names(verb: str, graph: Path, capsys: Any) -> None:
    code, _, error = run(capsys, *verb.split(), "--names", "names.json")
    assert code == 0 and NOTE not in error, error
    written = (graph / "out.onnx").read_bytes()

    code, _, error = run(capsys, *verb.split(), "--map", "names.json", "--force")
    assert code == 0 and error.count(NOTE) == 1, error
    assert (graph / "out.onnx").read_bytes() == written

    (graph / "c.toml").write_text(f'[{verb.split()[0]}]\nmap = "names.json"\n')
    code, _, error = run(capsys, *verb.split(), "--config", "c.toml", "--force")
    assert code == 0 and error.count(NOTE) == 1, error
    assert (graph / "out.onnx").read_bytes() == written

    code, _, error = run(capsys, *verb.split(), *["--map", "names.json", "--names", "x", "--force"])
    assert (
        code == 2
        and "--map and --names are the same option" in error
        and "leave --map out" in error
    )


@pytest.mark.parametrize("name", ["merge", "export"])
def test_help_shows_names_alone(name: str, capsys: Any) -> None:
    _, shown, _ = run(capsys, name, "--help")
    assert "--names FILE" in shown and "--map" not in shown
