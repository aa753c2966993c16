"""target_parameters: expert stacks as PEFT stores, nests and merges them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.fused import place
from lora_fx.adapter.lowrank import LowRank
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.ir.layout import Layout
from tests.formats.merging import check_with_peft, numbers

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

UP, DOWN = "moe.experts.gate_up_proj", "moe.experts.down_proj"


class Experts(nn.Module):
    """Stacks of 3 experts; `first` says which parameter the module defines first."""

    def __init__(self, turned: bool, first: str, hidden: int = 4, inner: int = 5) -> None:
        super().__init__()
        up, down = (3, 2 * inner, hidden), (3, hidden, inner)
        for name in sorted(("gate_up_proj", "down_proj"), key=lambda n: n != first):
            shape = up if name == "gate_up_proj" else down
            shape = (shape[0], shape[2], shape[1]) if turned else shape
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.is_transposed = turned
        self.router = nn.Linear(hidden, 3, bias=False)

    def forward(self, x: Any) -> Any:
        return x


class Moe(nn.Module):
    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.moe = nn.ModuleDict({"experts": Experts(*args)})
        self.fc = nn.Linear(4, 6)
        self.table = nn.Parameter(torch.randn(7, 2))

    def forward(self, x: Any) -> Any:
        return self.fc(self.moe["experts"](x))


def build(*args: Any) -> Any:
    torch.manual_seed(0)
    return Moe(*args)


def config(*parameters: str, **fields: Any) -> Any:
    usual = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": ["fc"]}
    return peft.LoraConfig(**{**usual, "target_parameters": list(parameters), **fields})


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["experts.gate_up_proj", "down_proj"])
@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True, "rank_pattern": {r"experts\..*_proj": 4}}]
)
def test_one_stack(tmp_path: Path, turned: bool, name: str, fields: dict[str, Any]) -> None:
    got = check_with_peft(
        tmp_path, lambda: build(turned, "down_proj"), config(name, **fields), changed=2
    )
    key = UP if "up" in name else DOWN
    low = got.lowrank[key]
    out, in_ = (10, 4) if key == UP else (4, 5)
    rank = 4 if fields else 2
    assert low.a.shape == (3, rank, in_) and low.b.shape == (3, out, rank)
    assert low.layout is None and low.origin.op == "experts"


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("first", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("order", [(UP, DOWN), (DOWN, UP)])
def test_nested_stacks_are_told_apart_by_the_base(
    tmp_path: Path, turned: bool, first: str, order: tuple[str, str]
) -> None:
    """PEFT nests by the order of definition, whatever the order in the config."""
    got = check_with_peft(tmp_path, lambda: build(turned, first), config(*order), changed=3)
    keys = [k for k in got.entries if k != "fc.weight"]
    assert keys == [f"moe.experts.(down_proj|gate_up_proj)#{i}" for i in (0, 1)]
    assert set(got.others) == set(keys)


def test_ranks_tell_nested_stacks_apart(tmp_path: Path) -> None:
    """15 rows are no multiple of 2: so the config alone says which is which."""
    given = config(UP, DOWN, rank_pattern={"gate_up_proj": 5})
    got = check_with_peft(tmp_path, lambda: build(False, "gate_up_proj"), given, changed=3)
    assert set(got.entries) == {UP, DOWN, "fc.weight"}
    assert got.lowrank[UP].rank == 5 and not got.others


def test_a_layer_inside_the_module_of_stacks(tmp_path: Path) -> None:
    """PEFT stores it under the stacks' wrappers, and forgets it in merge_and_unload."""
    given = config(UP, DOWN, target_modules=["fc", "router"])
    got = saved(tmp_path, build(False, "down_proj"), given)
    assert "moe.experts.router.weight" in got.entries and len(got) == 4


def test_a_matrix_that_is_a_parameter(tmp_path: Path) -> None:
    given = config("moe.experts.router.weight", target_modules=[])
    got = check_with_peft(tmp_path, lambda: build(False, "down_proj"), given, changed=1)
    assert got.lowrank["moe.experts.router.weight"].shape == (3, 4)


def saved(folder: Path, model: Any, given: Any) -> Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, given).save_pretrained(folder)
    return load_adapter(folder)


def test_square_stacks_are_refused(tmp_path: Path) -> None:
    """[E, 4, 4] may be [E, out, in] or [E, in, out]; a sibling that is not square tells."""
    square = (False, "down_proj", 4, 4)
    shapes = {k: v.shape for k, v in numbers(build(*square)).items()}
    one = saved(tmp_path / "one", build(*square), config(DOWN))
    with pytest.raises(LoraFxError, match=r"moe\.experts' are square"):
        place(one.entries, shapes.get)
    both = saved(tmp_path / "both", build(*square), config(UP, DOWN))
    placed = place(both.entries, shapes.get)
    down = placed[DOWN]
    assert isinstance(down, LowRank) and down.layout is not None and down.layout.out == (1,)


def test_equal_shapes_need_the_order_of_definition(tmp_path: Path) -> None:
    """With 2·inner = hidden … the two stacks may be each other's; only a live model knows."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w2 = nn.Parameter(torch.randn(3, 4, 5))
            self.w1 = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: Any) -> Any:
            return x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = Twins()

        def forward(self, x: Any) -> Any:
            return x

    model = peft.get_peft_model(Outer(), config("w1", "w2", target_modules=[]))
    model.save_pretrained(tmp_path)
    got = load_adapter(tmp_path)
    shapes = {k: v.shape for k, v in numbers(Outer()).items()}
    with pytest.raises(LoraFxError, match="more than one order"):
        place(got.entries, shapes.get)
    placed = place(got.entries, shapes.get, order=list(shapes))
    outer = model.base_model.model.m
    for wrapper in (outer, outer.base_layer):
        low = placed[f"m.{wrapper.parameter_name}"]
        assert isinstance(low, LowRank)
        want = wrapper.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(low.matrix(), want, rtol=1e-5, atol=1e-6)


def test_shapes_that_fit_nothing(tmp_path: Path) -> None:
    got = saved(tmp_path, build(False, "down_proj"), config(DOWN))
    with pytest.raises(LoraFxError, match="fit no parameter"):
        place(got.entries, {DOWN: (3, 9, 9)}.get)
    assert place(got.entries, {}.get) == dict(got.entries)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"rank_pattern": {"down_proj": 4}}, r"\[6\] rows"),
        ({"r": None}, "whole number"),
        ({"r": 1.5}, "whole number"),
        ({"target_parameters": "down_proj"}, "a list of names"),
        ({"init_lora_weights": "pissa"}, "plain lora"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, fields: dict[str, Any], word: str) -> None:
    import json

    saved(tmp_path, build(False, "down_proj"), config(DOWN, target_modules=[]))
    path = tmp_path / "adapter_config.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**old, **fields}.items() if v is not None}))
    with pytest.raises(LoraFxError, match=word):
        load_adapter(tmp_path)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("first", ["gate_up_proj", "down_proj"])
def test_stacks_of_our_own_are_applied(tmp_path: Path, turned: bool, first: str) -> None:
    """Nested by the order of definition, a layer inside their module and one called gate_proj."""

    class Outer(Moe):
        def __init__(self) -> None:
            super().__init__(turned, first)
            self.gate_proj = nn.Linear(5, 3)

    torch.manual_seed(0)
    shapes = {k: tuple(v.shape) for k, v in Outer().state_dict().items()}
    rng, entries = np.random.default_rng(0), {}
    for key in (k for k in shapes if len(shapes[k]) > 1 and k != "table"):
        shape, stack = shapes[key], len(shapes[key]) == 3
        way = ((2,), (1,)) if stack and turned else ((len(shape) - 2,), (len(shape) - 1,))
        layout = Layout(shape, (0,) if stack else (), *way, shape)
        rank = 3 if "gate" in key else 2
        a = rng.standard_normal((*layout.batch_shape, rank, layout.in_size), np.float32)
        b = rng.standard_normal((*layout.batch_shape, layout.out_size, rank), np.float32)
        entries[key] = LowRank(a, b, 1.5, layout)
    adapter = Adapter(entries, {"dropout": 0.1})
    save_adapter(adapter, tmp_path / "ours")
    before = Outer()
    with warnings.catch_warnings():
        # PEFT looks for patterns among modules only, and yet goes by them for parameters.
        for wrong in ("no modules were excluded", "did not match any targeted module"):
            warnings.filterwarnings("ignore", message=f".*{wrong}")
        wrapped = peft.PeftModel.from_pretrained(before, tmp_path / "ours")
    weights = {k: v.clone() for k, v in wrapped.state_dict().items() if "lora_" not in k}
    merged = wrapped.merge_and_unload().state_dict()
    plain = {k.replace(".base_layer", "").removeprefix("base_model.model."): v
             for k, v in weights.items()}  # fmt: skip
    for key, delta in adapter.deltas().items():
        if ".router." in key:
            continue  # which PEFT forgets in merge_and_unload, its own as well
        got = (merged[key] - plain[key]).numpy()
        np.testing.assert_allclose(got, delta, rtol=1e-4, atol=1e-5, err_msg=key)
    again = load_adapter(tmp_path / "ours")
    assert again.entries.keys() == entries.keys() and again.metadata["dropout"] == 0.1
    assert all(np.array_equal(again.lowrank[k].a, entries[k].a) for k in entries)
