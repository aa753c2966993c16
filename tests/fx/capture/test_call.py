"""The arguments of a call by name, its flat leaves, and the names that an ONNX file gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import register_pytree_node

import lora_fx
from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import (
    Signature,
    in_separate_memory,
    leaf_names,
    leaves_of,
    program_key,
    without_cache,
)
from lora_fx.fx.capture.door import Door, dims_of_one, without_dims
from lora_fx.fx.capture.example import describe, filled, sample_call
from lora_fx.fx.capture.onnx_names import onnx_conditions, output_name, symbols_of
from lora_fx.fx.capture.root_module import as_module
from lora_fx.fx.trees import tree_leaves


def open_forward(x: Any, /, y: Any = 2, *others: Any, z: Any = None, **options: Any) -> Any:
    return x, y, others, z, options


def closed_forward(x: Any, y: Any = None) -> Any:
    return x, y


@pytest.mark.parametrize(
    ("forward", "args", "kwargs", "message"),
    [
        (closed_forward, (1, 2, 3), {}, "takes 2 positional arguments, got 3"),
        (closed_forward, (1,), {"x": 2}, "got multiple values for argument 'x'"),
        (closed_forward, (1,), {"z": 2}, "got an unexpected keyword argument 'z'"),
        (closed_forward, (), {"y": 2}, "missing a required argument: 'x'"),
    ],
)
def test_a_call_that_python_refuses_is_refused(
    forward: Any, args: Any, kwargs: Any, message: str
) -> None:
    with pytest.raises(TypeError) as e:
        Signature(forward).bind(args, kwargs)
    assert str(e.value) == message


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [
        ((1,), {}, {"x": 1}),
        ((1, 2), {}, {"x": 1}),
        ((1, 2.0), {}, {"x": 1, "y": 2.0}),
        ((1, None), {"z": None}, {"x": 1, "y": None}),
        ((1, 3, 4, 5), {"z": 6, "b": 8, "a": 7},
         {"x": 1, "y": 3, "others": (4, 5), "z": 6, "a": 7, "b": 8}),
    ],
)  # fmt: skip
def test_arguments_are_named_in_the_signatures_order(args: Any, kwargs: Any, named: Any) -> None:
    signature = Signature(open_forward)
    bound = signature.bind(args, kwargs)
    assert bound == named and list(bound) == list(named)
    assert signature.call(open_forward, bound) == open_forward(*args, **kwargs)


def test_leaves_have_the_names_of_their_containers() -> None:
    pair = (torch.ones(1), torch.ones(2))
    named = {"x": torch.ones(3), "pair": pair, "tree": {"a": [None, 4]}}
    assert leaf_names(named) == ["x", "pair.0", "pair.1", "tree.a.0", "tree.a.1"]
    key = program_key(named, [leaf for _, leaf in leaves_of(named)])
    assert key[:5] == ("x", "pair", 2, "tree", 2)
    assert key[5:] == (*((torch.float32, 1),) * 3, ("NoneType", None), ("int", 4))


def test_leaves_are_apart_and_whole() -> None:
    whole = torch.arange(8.0)
    cut = torch.ones(2, 6)[:, :3]
    leaves = in_separate_memory(
        [whole, 5, whole, cut, torch.ones(1, 3).expand(2, 3), torch.ones(0, 3)]
    )
    assert leaves[0] is whole and leaves[1] == 5
    assert leaves[2] is not whole and torch.equal(leaves[2], whole)
    assert leaves[3].stride() == (3, 1) and leaves[4].stride() == (3, 1)


@dataclass
class Result:
    first: torch.Tensor
    second: torch.Tensor


class ThingCache:
    __module__ = "transformers.cache_utils"


@pytest.mark.parametrize(
    ("out", "remaining", "names"),
    [
        (5, 5, []),
        ({"a": 1, "b": ThingCache()}, {"a": 1}, ["b"]),
        ((1, ThingCache(), 3), (1, 3), ["1"]),
        ([1, 2], [1, 2], []),
        ({"a": 1}, {"a": 1}, []),
    ],
)
def test_caches_are_left_out(out: object, remaining: object, names: list[str]) -> None:
    left_out: list[str] = []
    assert without_cache(out, left_out) == remaining and left_out == names
    assert without_cache(out) == remaining


def test_a_plain_dataclass_is_a_tree() -> None:
    result = Result(torch.ones(1), torch.ones(2))
    assert without_cache(result) is result
    assert leaf_names({"out": result}) == ["out.first", "out.second"]


@pytest.mark.parametrize(
    ("path", "name"),
    [("", "output"), ("0", "output"), (".1", "output_1"), ("0.1", "output_0_1"),
     ("logits", "logits"), (".pair.0", "pair_0"), ("present.0.key", "present.0.key")],
)  # fmt: skip
def test_outputs_have_names(path: str, name: str) -> None:
    assert output_name(path) == name


def test_conditions_and_symbols_have_the_names_of_the_file() -> None:
    condition = Condition("s0 <= s1", (("s0", "pair.0", 1), ("s1", "x", 0)))
    (renamed,) = onnx_conditions([condition])
    assert renamed.sizes == (("s0", "pair_0", 1), ("s1", "x", 0))
    assert symbols_of({"pair.0": {1: "n"}, "x": {0: "batch"}}) == {
        ("pair_0", 1): "n",
        ("x", 0): "batch",
    }


def test_a_door_knows_what_is_free_and_what_is_fixed() -> None:
    door = Door(("x", "flag", "y"), ((None, 4), None, (2,)))
    requested = {"x": {0: "batch", 1: "n"}, "flag": {0: "n"}, "y": {0: "batch", 3: "far"}}
    assert door.fixed(requested) == {("x", 1): 4, ("y", 0): 2}
    assert door.free({"x": {0: "batch", 1: "n"}}) == {"x": {0: "batch"}, "y": {}}
    assert without_dims(requested, [("x", 1), ("flag", 0)]) == {
        "x": {0: "batch"},
        "flag": {},
        "y": {0: "batch", 3: "far"},
    }
    named = {"x": torch.ones(1, 4), "flag": 1, "y": torch.ones(1)}
    assert dims_of_one(named, requested) == [("x", 0), ("y", 0)]
    door.check([torch.ones(3, 4), 1, torch.ones(2)])
    with pytest.raises(LoraFxError, match="captured for sizes"):
        door.check([torch.ones(3, 5), 1, torch.ones(2)])


class Unnamed(dict[str, Any]):
    """A mapping that is registered without the names of its parts, as diffusers' outputs are."""


class Pair:
    """Two parts, registered without names."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts


register_pytree_node(
    Unnamed,
    lambda m: (list(m.values()), list(m)),
    lambda parts, names: Unnamed(zip(names, parts, strict=True)),
)
register_pytree_node(Pair, lambda pair: (pair.parts, None), lambda parts, _: Pair([*parts]))


def test_leaves_of_classes_without_names_of_their_parts() -> None:
    output = Unnamed(sample=1, more=(2, Pair([3, {"z": 4}])))
    leaves = [("y.sample", 1), ("y.more.0", 2), ("y.more.1.0", 3), ("y.more.1.1.z", 4)]
    assert leaves_of({"y": output}) == leaves
    assert [leaf for _, leaf in leaves] == tree_leaves(output)


def test_a_model_with_such_an_output_is_adapted() -> None:
    layer = nn.Linear(4, 3)
    model = as_module(lambda x: Unnamed(sample=layer(x)))
    adapted = lora_fx.insert(model, (torch.ones(2, 4),), rank=2)
    output = adapted.eval()(torch.ones(5, 4))
    assert type(output) is Unnamed and torch.equal(output["sample"], layer(torch.ones(5, 4)))


def test_drawn_arguments_are_like_the_example() -> None:
    named = {"ids": torch.tensor([[3, 5]]), "mask": torch.tensor([True]), "flag": 1}
    inputs = describe(named)
    assert [(spec.name, spec.high, spec.fill) for spec in inputs.specs] == [
        ("ids", 6, 1),
        ("mask", None, 1),
    ]
    arrays = {"ids": torch.tensor([[1, 2]]).numpy()}
    call = sample_call(inputs, named, {}, arrays=arrays)
    assert call["ids"].tolist() == [[1, 2]] and call["flag"] == 1
    call = sample_call(inputs, named, {}, arrays={"ids": torch.tensor([[1, 2]])})
    assert call["ids"].tolist() == [[1, 2]]
    with pytest.raises(LoraFxError, match="no input is named 'tokens'"):
        sample_call(inputs, named, {}, arrays={"tokens": arrays["ids"]})
    mask = torch.tensor([False]).numpy()
    assert filled(named, {**arrays, "mask": mask})["mask"].tolist() == [False]


def test_a_function_owns_the_parameters_that_it_names() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    layer = nn.Linear(2, 2)
    model = as_module(lambda x: layer(x) @ weight)
    assert set(dict(model.named_parameters())) == {"weight", "layer.weight", "layer.bias"}
    assert model(torch.ones(1, 2)).shape == (1, 2)
    with pytest.raises(LoraFxError, match="an int is not a model"):
        as_module(5)
