"""Session and TrainSession refuse what is no argument of theirs in one line."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx import Adapter, LowRank, save_adapter
from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError
from lora_fx.onnx import Session, TrainSession
from lora_fx.onnx.manifest import manifest_of
from lora_fx.onnx.session import open_session

NAN, INF = float("nan"), float("inf")
X = {"x": np.ones((3, 4), np.float32)}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """switch.onnx, load.onnx and step.onnx of a linear layer, and an adapter of it."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype("f4") for s in ((2, 4), (6, 2)))
    adapter = Adapter({"fc.weight": LowRank(a, b, 3.0)})
    save_adapter(adapter, folder / "peft")
    net, args = Net(), (torch.ones(3, 4),)
    for mode in ("switch", "load"):
        path = folder / f"{mode}.onnx"
        lora_fx.export(net, path, args, adapters={mode: adapter}, mode=mode)
    lora_fx.export(net, folder / "step.onnx", args, adapters=adapter, mode="train")
    return folder


@pytest.fixture
def session(folder: Path) -> Session:
    made = Session(folder / "switch.onnx", "cpu")
    made.load("a", folder / "peft")
    return made


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(LoraFxError) as caught:
        call()
    assert "\n" not in caught.value.message and caught.value.hint


CHOICES: tuple[Any, ...] = (
    {"a": NAN}, {"a": INF}, {"a": -INF}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]},
    {"a": 1j}, {"a": 1e39}, {"a": 10**400}, {"a": np.float32("nan")}, {"a": np.bool_(1)},
    {0: 1.0}, {("a",): 1.0}, 0, 1.5, True, ["0"], ["a"], ("a",), b"a", {"a"}, np.array(["a"]),
    "b", object(),
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(CHOICES)))
def test_a_choice(session: Session, number: int) -> None:
    for verb in (session.run, session.bind):
        refused(lambda verb=verb: verb(X, CHOICES[number]))  # type: ignore[misc]
    refused(lambda: session.choice(CHOICES[number]))


def test_choices_that_are_taken(session: Session) -> None:
    (whole,) = session.run(X, "a").values()
    (base,) = session.run(X).values()
    assert np.abs(whole - base).max() > 0.1
    weights: tuple[Any, ...] = (1, 1.0, np.float32(1), np.float64(1), np.int64(1), Fraction(1))
    for weight in weights:
        (mixed,) = session.run(X, {"a": weight}).values()
        assert np.allclose(mixed, whole, atol=1e-6)
    nothing: tuple[Any, ...] = ({}, None)
    for choice in nothing:
        assert np.array_equal(base, *session.run(X, choice).values())
    tensor: Any = torch.ones(3, 4)
    assert np.array_equal(whole, *session.run({"x": tensor}, "a").values())


INPUTS: tuple[Any, ...] = (
    [1], None, "x", 0, X["x"], ("x", X["x"]), {"x": [[1], [1, 2]]}, {"x": object()}, {"x": None},
    {"x": "text"}, {0: X["x"]}, {}, {**X, "y": X["x"]}, {"x": 1}, {"x": np.ones((3, 4))},
    {"x": np.ones((3, 4), "c8")}, {"x": np.ones((1, 2, 3), "f4")}, {"x": np.ones((3, 5), "f4")},
    {"x": {"a": 1}}, {"x": torch.ones(3, 4, requires_grad=True)},
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(INPUTS)))
def test_inputs(session: Session, number: int) -> None:
    refused(lambda: session.run(INPUTS[number]))
    refused(lambda: session.run(INPUTS[number], "a"))
    refused(lambda: session.run(INPUTS[number], {"a": 0.5}))


NO_ADAPTERS: tuple[Any, ...] = (None, {}, 0, [], b"peft", "nope", "", "a\0b", np.ones(3), {"a": 1})


@pytest.mark.parametrize("number", range(len(NO_ADAPTERS)))
def test_what_is_no_adapter(folder: Path, session: Session, number: int) -> None:
    adapter = NO_ADAPTERS[number]
    refused(lambda: session.load("b", adapter))
    refused(lambda: TrainSession(folder / "step.onnx", provider="cpu").load(adapter))
    if adapter is not None:  # the base model, and the start beside the file
        refused(lambda: Session(folder / "load.onnx", "cpu", adapter=adapter))
        refused(lambda: TrainSession(folder / "step.onnx", provider="cpu", adapter=adapter))
    assert session.adapters == ("a",)


@pytest.mark.parametrize("name", [None, 0, b"a", ["a"], ("a",), {}])
def test_what_is_no_name(folder: Path, session: Session, name: Any) -> None:
    refused(lambda: session.load(name, folder / "peft"))


FILES: tuple[Any, ...] = (None, 0, "nope.onnx", "", [], b"switch.onnx", "a\0", ".", {})


@pytest.mark.parametrize("number", range(len(FILES)))
def test_what_is_no_file(number: int) -> None:
    refused(lambda: Session(FILES[number]))
    refused(lambda: TrainSession(FILES[number]))


def test_a_missing_file_is_said_by_name(folder: Path) -> None:
    gone = folder / "swich.onnx"
    for opened in (Session, TrainSession, open_session, manifest_of):
        with pytest.raises(LoraFxError, match=r"swich\.onnx: no such file") as error:
            opened(gone)
        assert "switch.onnx" in error.value.hint


OPTIONS: dict[str, tuple[Any, ...]] = {
    "provider": (None, "gpu", [], 0, {}),
    "threads": (-1, "2", 10**30, None, 1.5, True, []),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(folder: Path, name: str) -> None:
    for value in OPTIONS[name]:
        refused(lambda value=value: Session(folder / "switch.onnx", **{name: value}))  # type: ignore[misc]
        refused(lambda value=value: TrainSession(folder / "step.onnx", **{name: value}))  # type: ignore[misc]


RATES: tuple[Any, ...] = (NAN, INF, -1.0, "1e-3", None, [1e-3], True, 1j, 1e39, np.ones(2))
SEEDS: tuple[Any, ...] = (-1, 1.5, "0", None, 10**30, True, [0], NAN)


def test_a_training_step(folder: Path) -> None:
    path = folder / "step.onnx"
    for rate in RATES:
        refused(lambda rate=rate: TrainSession(path, rate, "cpu"))  # type: ignore[misc]
    for seed in SEEDS:
        refused(lambda seed=seed: TrainSession(path, provider="cpu", seed=seed))  # type: ignore[misc]
    session = TrainSession(path, provider="cpu")
    batch = {**X, "labels": np.array([0, 1, 2])}
    for rate in RATES:
        session.lr = rate
        refused(lambda: session.step(batch))
    session.lr = np.float32(1e-2)
    for inputs in (*INPUTS, X, {**batch, "labels": None}, {**batch, "labels": "x"}):
        refused(lambda inputs=inputs: session.step(inputs))  # type: ignore[misc]
    assert session.steps == 0 and session.step(batch) > 0 and session.steps == 1
    for format in ("nope", None, 5):
        refused(lambda format=format: session.save(folder / "out", format))  # type: ignore[misc]
    for out in (None, 5, ""):
        refused(lambda out=out: session.save(out))  # type: ignore[misc]


def test_files_of_other_modes(folder: Path) -> None:
    with pytest.raises(LoraFxError, match="a training step, and takes no adapter"):
        Session(folder / "step.onnx", "cpu")
    with pytest.raises(LoraFxError, match="a file of mode switch, which has no training step"):
        TrainSession(folder / "switch.onnx", provider="cpu")
    with pytest.raises(LoraFxError, match="a file of mode switch takes an adapter at each run"):
        Session(folder / "switch.onnx", "cpu", adapter=folder / "peft")


def test_a_training_step_needs_a_start_of_its_ranks(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("step.onnx*"):
        if file.suffix != ".onnx_adapter":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(
        LoraFxError, match=r"step\.onnx_adapter does not exist: there is no adapter to start from"
    ):
        TrainSession(tmp_path / "step.onnx", provider="cpu")
    session = TrainSession(folder / "step.onnx", provider="cpu")
    a, b = np.ones((3, 4), np.float32), np.ones((6, 3), np.float32)
    with pytest.raises(LoraFxError, match=r"the adapter: 'fc\.weight' has rank 3; expected 2"):
        session.load(Adapter({"fc.weight": LowRank(a, b, 3.0)}))


def test_an_input_of_too_few_dimensions(session: Session) -> None:
    session.ranges = [Condition("a <= 5", (("a", "x", 1),))]
    with pytest.raises(LoraFxError, match="input 'x' has 1 dimensions; expected 2 at least"):
        session.run({"x": np.ones(4, np.float32)})
