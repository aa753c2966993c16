"""A run that is interrupted goes on as if it had not been; a state of another run is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_fx.data import Table
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.fx.train.loop import fit
from lora_fx.fx.train.settings import Saving, Settings
from tests.fx.train.test_loop import adapted, table
from tests.fx.train.test_watch import noise

OPTIONS: dict[str, Any] = {"dropout": 0.3, "variant": "lora+", "also_train": "fc2.bias"}
S = Settings(steps=40, lr=0.05, checks=10, batch_size=10)


class Cut(Exception):
    """What ends a run from outside."""


def cut_at(last: int) -> Any:
    def progress(step: int, steps: int, loss: float) -> None:
        if step == last:
            raise Cut

    return progress


def trained(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters() if p.requires_grad}


def interrupted(
    folder: Path, settings: Settings, at: int, every: int | None, held: Table | None
) -> tuple[Any, Any]:
    """(model, report) of a run that was cut in step `at` and went on from its last state."""
    with pytest.raises(Cut):
        saving = Saving(str(folder), every)
        fit(adapted(**OPTIONS), noise(), held, "ce", settings, cut_at(at), saving=saving)
    model = adapted(**{**OPTIONS, "seed": 9})  # what it starts from is replaced
    torch.rand(17)
    saving = Saving(str(folder), every, resume=str(folder))
    return model, fit(model, noise(), held, "ce", settings, saving=saving)


@pytest.mark.parametrize(
    ("at", "every", "patience"),
    # in an epoch, at its end (24 examples make 3 batches), after the best one, early stopping
    [(8, 7, None), (10, 3, None), (39, None, None), (10, 1, 2)],
)
def test_it_goes_on_to_the_bit(tmp_path: Path, at: int, every: Any, patience: Any) -> None:
    settings = replace(S, patience=patience)
    whole = adapted(**OPTIONS)
    want = fit(whole, noise(), table(60), "ce", settings)
    model, report = interrupted(tmp_path / "state", settings, at, every, table(60))
    saved = (at - 1) // (every or 4) * (every or 4)
    assert report.resumed == saved and 0 < saved < at
    assert replace(report, resumed=None) == want  # losses, validations, verdict
    assert want.best_step < 40 and (want.stopped is None) == (patience is None)
    for name, value in trained(whole).items():
        assert np.array_equal(value, trained(model)[name]), name
    assert not [p for p in tmp_path.iterdir() if p.name != "state"]


def test_without_validation_and_of_a_run_that_is_done(tmp_path: Path) -> None:
    whole = adapted(**OPTIONS)
    want = fit(whole, noise(), None, "ce", S)
    model, report = interrupted(tmp_path / "state", S, 30, 8, None)
    assert report.resumed == 24 and replace(report, resumed=None) == want
    again = adapted(**OPTIONS)
    done = fit(again, noise(), None, "ce", S, saving=Saving(resume=str(tmp_path / "state")))
    assert done.resumed == 40 and done.losses == want.losses
    for name, value in trained(whole).items():
        assert np.array_equal(value, trained(model)[name])
        assert np.array_equal(value, trained(again)[name])


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states") / "state"
    fit(adapted(), noise(), table(60), "ce", replace(S, steps=4), saving=Saving(str(folder)))
    return folder


def go_on(state: Path, model: Any = None, data: Any = None, held: Any = None, **s: Any) -> Any:
    settings = replace(S, **{"steps": 4, **s})
    data, held = data or noise(), held or table(60)
    return fit(model or adapted(), data, held, "ce", settings, saving=Saving(resume=str(state)))


def other_data() -> Table:
    data = noise()
    data.columns["x"][23, 7] += 1e-3
    return data


def heavier() -> Any:
    model = adapted()
    with torch.no_grad():
        dict(model.named_parameters())["fc1.bias"][15] += 1e-3
    return model


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr": 0.01}, "settings: lr: 0.05 there, 0.01 here"),
        ({"steps": 9}, "settings: steps: 4 there, 9 here"),
        ({"batch_size": 5, "seed": 2}, "batch_size: 10 there, 5 here; 1 more differences"),
        ({"accumulate": 2}, "accumulate: 1 there, 2 here"),
        ({"patience": 2}, "patience: none there, 2 here"),
        ({"data": other_data}, "data: training: 24 examples, sha256"),
        ({"held": lambda: table(61)}, "data: validation: 60 examples"),
        ({"model": lambda: adapted(dropout=0.1)}, "model: dropout: 0.0 there, 0.1 here"),
        ({"model": lambda: adapted(alpha=8.0)}, "update of 'fc1.weight': rank 2, alpha 4, lora th"),
        ({"model": lambda: adapted(variant="lora+")}, "rank 2, alpha 4, lora+ here"),
        ({"model": heavier}, "model: weights: another"),
    ],
)
def test_another_run_is_refused(state: Path, given: dict[str, Any], said: str) -> None:
    made = {k: v() if callable(v) else v for k, v in given.items()}
    model = made.setdefault("model", adapted())
    before = trained(model)
    with pytest.raises(LoraFxError, match="is the state of another run") as info:
        go_on(state, **made)
    assert said in info.value.message and str(state) in info.value.message
    assert all(np.array_equal(v, before[k]) for k, v in trained(model).items())


def damaged(state: Path, to: Path, words: Any = None, tensors: Any = None) -> Path:
    to.mkdir()
    said = json.loads((state / "state.json").read_text())
    held = read_tensors(state / "state.safetensors")[0]
    text = json.dumps(words(said) or said) if words else json.dumps(said)
    (to / "state.json").write_text(text)
    write_tensors(to / "state.safetensors", tensors(held) if tensors else held, {})
    return to


def without(name: str) -> Any:
    return lambda held: {k: v for k, v in held.items() if k != name}


def test_damaged_states(state: Path, tmp_path: Path) -> None:
    a = "now/fc1.lora_A.weight"
    cases: list[tuple[Any, Any, str]] = [
        (lambda w: w.pop("epoch") and None, None, "damaged: KeyError('epoch')"),
        (lambda w: w.update(format=2), None, "format 2; this lora-fx reads formats up to 1"),
        (lambda w: w.update(facts=None), None, "is the state of another run"),
        (lambda w: w.update(step=3), None, "4 losses of 3 steps"),
        (lambda w: [w], None, "a JSON list, not an object"),
        (None, without(a), f"no tensor '{a}'"),
        (lambda w: w["moments"].append("odd"), None, "damaged: KeyError('odd')"),
        (None, without("rng/0"), "no tensor 'rng/0'"),
        (None, without("adam/fc1.lora_A.weight/exp_avg_sq"), "no tensor 'adam/fc1.lora_A"),
        (None, lambda h: {**h, a: h[a][:1]}, "is torch.float32 [1, 8]; expected torch.float32 [2"),
    ]
    for i, (words, tensors, said) in enumerate(cases):
        folder = damaged(state, tmp_path / str(i), words, tensors)
        with pytest.raises(LoraFxError) as info:
            go_on(folder)
        assert said in info.value.message, info.value.message
    (tmp_path / "0" / "state.json").write_text("{")
    with pytest.raises(LoraFxError, match="damaged"):
        go_on(tmp_path / "0")
    with pytest.raises(LoraFxError, match="is not a training state"):
        go_on(tmp_path / "gone")


def test_a_state_holds_no_pickle(state: Path) -> None:
    assert {p.name for p in state.iterdir()} == {"lora_fx.json", "state.json", "state.safetensors"}
    held = read_tensors(state / "state.safetensors")[0]
    assert {k.partition("/")[0] for k in held} == {"now", "best", "adam", "rng", "losses"}
    json.loads((state / "state.json").read_text())
