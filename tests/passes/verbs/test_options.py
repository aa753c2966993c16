"""What a verb makes of its arguments before it does anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import lora_fx
from lora_fx import Adapter, LoraFxError, LowRank, save_adapter
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.passes.verbs.export import opened_adapters

ONE = Adapter({"fc.weight": LowRank(np.ones((2, 3), "f4"), np.ones((5, 2), "f4"), 2.0)})
OTHER = Adapter({"fc.weight": LowRank(np.ones((1, 3), "f4"), np.ones((5, 1), "f4"), 1.0)})


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(ONE, "runs/french")
    save_adapter(OTHER, "german.safetensors")
    save_adapter(OTHER, "old/french")


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("given", "mode", "wanted"),
    [
        (None, "merged", None),
        ("runs/french", "switch", {"french": 2}),
        (Path("runs/french"), "merged", 2),
        (["runs/french", "german.safetensors"], "batch", {"french": 2, "german": 1}),
        ({"a": "runs/french", "b": OTHER}, "switch", {"a": 2, "b": 1}),
        ([ONE, "german.safetensors"], "switch", {"adapter_1": 2, "adapter_2": 1}),
        (ONE, "switch", 2),
    ],
)
def test_adapters_are_named_after_their_paths(given: Any, mode: str, wanted: object) -> None:
    found = opened_adapters(given, mode)
    if isinstance(found, Adapter):
        assert found.lowrank["fc.weight"].rank == wanted
    elif isinstance(found, dict):
        assert {n: a.lowrank["fc.weight"].rank for n, a in found.items()} == wanted
    else:
        assert found is wanted is None


@pytest.mark.usefixtures("there")
def test_two_adapters_of_one_name_are_refused() -> None:
    with pytest.raises(LoraFxError, match="two adapters are called 'french'") as caught:
        opened_adapters(["runs/french", "old/french"], "switch")
    assert "{name: path" in str(caught.value.hint)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(number: float, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net, x = torch.nn.Linear(3, 5), torch.randn(2, 3)
    plan = {"weight": {"rank": 2, "alpha": number}}
    for verb in (lora_fx.insert, lora_fx.attach):
        for given in ({"rank": 2, "alpha": number}, {"plan": plan}):
            with pytest.raises(
                LoraFxError, match=f"alpha {number} of weight is not a finite number"
            ):
                verb(net, (x,), **given)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(LoraFxError, match=f"tol is {number}; expected a finite number, 0 or more"):
        lora_fx.verify(tmp_path / "a.safetensors", tmp_path / "a.safetensors", tol=number)


# An option that is given and has no effect is an error, whatever its value: the default's too.


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))


X = torch.ones(2, 4)
LOW = LowRank(np.ones((2, 4), "f4"), np.ones((6, 2), "f4"), 2.0)
GIVEN = Adapter({"0.weight": LOW})
WHOLE = {"0.weight": {"rank": 2, "alpha": 4.0}}
PARTS = {"0.weight": 2, "1.weight": {"alpha": 4.0}}
BATCH = [{"input": np.ones((2, 4), "f4"), "labels": np.zeros(2, "i8")}]

BRANCHES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # what has no effect, beside what, and another value of it
    *(
        (name, {"adapter": GIVEN}, {name: value})
        for name, values in {
            "rank": (8, 3), "alpha": (16.0, 4.0), "variant": ("lora-fa", "dora"),
            "init": ("kaiming", "pissa"), "seed": (0, 1), "loss": ("ce",), "data": (BATCH,),
        }.items()
        for value in values
    ),
    ("rank", {"plan": WHOLE}, {"rank": 8}),
    ("alpha", {"plan": WHOLE}, {"alpha": 16.0}),
    ("rank", {"plan": {"0.weight": 2}}, {"rank": 3}),
    ("include", {"plan": WHOLE}, {"include": "0"}),
    ("data", {"rank": 2}, {"data": BATCH}),
    ("data", {"rank": 2, "init": "olora"}, {"data": BATCH}),
    ("loss", {"rank": 2}, {"loss": "ce"}),
    ("loss", {"rank": 2, "init": "eva", "data": BATCH}, {"loss": "mse"}),
]  # fmt: skip


@pytest.mark.parametrize("verb", [lora_fx.insert, lora_fx.attach])
@pytest.mark.parametrize(("name", "beside", "given"), BRANCHES)
def test_an_option_without_a_say(
    verb: Any, name: str, beside: dict[str, Any], given: dict[str, Any]
) -> None:
    with pytest.raises(LoraFxError, match=f"{name} has no effect|so {name} has no effect"):
        verb(net(), (X,), **beside, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"adapter": GIVEN, "dropout": 0.1, "dead": "keep", "norm_stats": "frozen"},
        {"adapter": GIVEN, "rank": 2, "alpha": 2.0},  # which it has
        {"adapter": GIVEN, "variant": "lora"},  # the same
        {"plan": PARTS, "rank": 2, "alpha": 3.0},
        {"plan": WHOLE, "rank": 2, "alpha": 4.0},  # which it has
        {"plan": WHOLE, "exclude": "1", "seed": 1, "variant": "rslora"},
        {"rank": 2, "init": "gaussian", "seed": 3},
        {"rank": 2, "init": "pissa", "seed": 3},  # a seed is of whatever is drawn
        {"rank": 2, "init": "lora-ga", "data": BATCH, "loss": "ce"},
        {"rank": 2, "init": "eva", "data": BATCH},
        {"rank": 2, "include": None, "alpha": None, "adapter": None, "loss": None, "seed": None},
    ],
)
def test_options_that_have_one(given: dict[str, Any]) -> None:
    module = lora_fx.insert(net(), (X,), **given)
    assert module.adapter().lowrank


def test_the_variant_of_an_adapter_is_no_contradiction() -> None:
    """Told by its tensors: a DoRA's own name says lora, and a QA-LoRA's has no group."""
    for variant, others in (("dora", "lora"), ("qalora:2", "qalora:4"), ("lora+", "lora")):
        made = lora_fx.insert(net(), (X,), rank=2, variant=variant).adapter()
        assert lora_fx.insert(net(), (X,), adapter=made, variant=variant).adapter().lowrank
        with pytest.raises(LoraFxError, match="variant has no effect with an adapter"):
            lora_fx.insert(net(), (X,), adapter=made, variant=others)


FOLD: dict[str, Any] = {"base": "b.safetensors", "out": "o.safetensors"}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lora_fx.insert(net(), (X,), variant=5), "variant is an int, not a name"),
        (lambda: lora_fx.export(net(), "x.onnx", (X,), adapters=5), "adapters is an int"),
        (lambda: lora_fx.export(net(), "x.onnx", (X,), mode=lora_fx.Switch(include=5)),
         "include is an int, not selectors"),
        (lambda: lora_fx.export(net(), "x.onnx", (X,), mode=lora_fx.TrainStep(clip="much")),
         "clip is a str, not a number"),
        (lambda: lora_fx.verify("b.safetensors", "b.safetensors", tol="much"),
         "tol is a str, not a number"),
        (lambda: lora_fx.merge(adapters="a", threads=-1, **FOLD), "threads is -1"),
        (lambda: lora_fx.merge(adapters="a", threads="all", **FOLD), "threads is 'all'"),
        (lambda: lora_fx.doctor("b.safetensors", "a", server="vlm"), "unknown server 'vlm'"),
        (lambda: lora_fx.doctor("b.safetensors", GIVEN), "adapter is an Adapter, not a path"),
    ],
)  # fmt: skip
def test_an_option_of_another_type(
    call: Callable[[], object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"0.weight": np.ones((6, 4), "f4")}, "b.safetensors")
    lora_fx.save_adapter(GIVEN, "a")
    with pytest.raises(LoraFxError, match=said):
        call()


def test_targets_of_a_model_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6)).eval()
    assert [target.key for target in lora_fx.find(model, (X,)).targets] == ["0.weight"]


@pytest.mark.parametrize("learns", [[], {"variants": []}, {"variants": {"0.weight": []}}])
def test_metadata_that_says_something_else_of_how_it_learns(learns: Any) -> None:
    made = lora_fx.Adapter(GIVEN.entries, {"learns": learns})
    assert lora_fx.insert(net(), (X,), adapter=made).adapter().lowrank


@pytest.mark.parametrize(
    ("mode", "given", "name"),
    [
        (lora_fx.Load(rank=4), {"rank": 0}, "rank"),
        (lora_fx.TrainStep(), {"clip": 0.0}, "clip"),
        (lora_fx.TrainStep(), {"weight_decay": 0}, "weight_decay"),
    ],
)
def test_an_option_of_zero_beside_a_mode(
    tmp_path: Path, mode: Any, given: dict[str, Any], name: str
) -> None:
    """It is one that was given, and is not passed over."""
    with pytest.raises(LoraFxError, match=f"^{name}= with mode=lora_fx"):
        lora_fx.export(net(), tmp_path / "x.onnx", (X,), mode=mode, **given)


def test_a_variant_is_not_dropped_beside_an_adapter() -> None:
    """A of lora-fa stays as it is: of an adapter of lora it would train."""
    made = lora_fx.insert(net(), (X,), rank=2, variant="lora-fa")
    again = lora_fx.insert(net(), (X,), adapter=made.adapter())
    assert [a.requires_grad for a, _ in insertion_of(again).slots().values()] == [False, False]


def test_dimensions_beside_a_captured_model(tmp_path: Path) -> None:
    cap = lora_fx.capture(net(), (X,))
    module = lora_fx.insert(cap, rank=2)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (lambda **g: lora_fx.insert(cap, rank=2, **g), {}),
        (lambda **g: lora_fx.attach(cap, rank=2, **g), {}),
        (lambda **g: lora_fx.find(cap, **g), {}),
        (lambda **g: lora_fx.find(module, **g), {}),
        (lambda **g: lora_fx.fold(module, **g), {}),
        (lambda **g: lora_fx.plan(cap, **g), {}),
        (lambda **g: lora_fx.export(cap, tmp_path / "x.onnx", **g), {}),
    ]
    for call, more in calls:
        with pytest.raises(LoraFxError, match="dynamic has no effect with a captured model"):
            call(dynamic={"input": {0: "rows"}}, **more)
    assert not list(tmp_path.iterdir())
    assert lora_fx.fold(module, (X,)) and lora_fx.find(cap, (X,))  # the inputs that it has


def test_files_and_their_options(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({"fc.weight": np.ones((5, 3), "f4")}, base)
    save_adapter(ONE, tmp_path / "a")
    merge = [
        ("rank", {"rank": 4}), ("rank", {"rank": 4, "how": "linear"}), ("link", {"link": True}),
    ]  # fmt: skip
    for name, given in merge:
        with pytest.raises(LoraFxError, match=f"{name} has no effect"):
            lora_fx.merge(base, [tmp_path / "a"], out, **given)
    assert not out.exists()
    tensors = [("inputs", {"inputs": {"x": np.ones(2)}}), ("provider", {"provider": "auto"}),
               ("rows", {"rows": None})]  # fmt: skip
    for name, more in tensors:
        with pytest.raises(LoraFxError, match=f"{name} has no effect"):
            lora_fx.verify(base, base, **more)
    fits = [*tensors, ("tol", {"tol": 0.1}), ("adapter", {"adapter": ONE})]
    for name, more in fits:
        with pytest.raises(LoraFxError, match=f"{name} has no effect"):
            lora_fx.verify(base, tmp_path / "a", **more)
    assert lora_fx.verify(base, tmp_path / "a")
    with pytest.raises(LoraFxError, match="provider has no effect"):
        lora_fx.verify(lora_fx.capture(net(), (X,)), lora_fx.capture(net(), (X,)), provider="cpu")


@pytest.mark.parametrize("given", [{"loss": "ce"}, {"method": "eva", "data": BATCH, "loss": "ce"}])
def test_a_plan_that_reads_no_gradient(given: dict[str, Any]) -> None:
    with pytest.raises(LoraFxError, match="loss has no effect for method"):
        lora_fx.plan(net(), (X,), budget="uniform:2", **given)


def test_a_plan_that_reads_no_data_says_so() -> None:
    made = lora_fx.plan(net(), (X,), budget="uniform:2", data=BATCH)
    assert made.notes == ("data has no effect: method 'uniform' reads none",)
    assert made.rows == lora_fx.plan(net(), (X,), budget="uniform:2").rows
