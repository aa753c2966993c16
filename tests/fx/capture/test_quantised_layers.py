"""Models that hold layers of bitsandbytes, torchao, compressed-tensors and gptqmodel.

What a layer stands for is told by its package's own dequantisation: kernels round on their way
(bitsandbytes' to bfloat16 in eval mode on some CPUs), and some quantise x as well.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.compare import FOLD_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.quantised_parameters import forms, numbers
from lora_fx.passes.verbs.open import capture, load_program
from lora_fx.passes.verbs.program import save_program
from tests.fx.capture import quantised_nets
from tests.fx.capture.quantised_nets import Case, ids, net
from tests.passes.test_quantise import Made

NAMES = {
    "bitsandbytes": [
        *(f"{k}{n} {c}" for k in ("nf4", "fp4") for n in ("", " nested")
          for c in ("None", "float32", "bfloat16")),
        "int8", "table nf4", "table fp4", "table int8",
    ],
    "torchao": ["int4 groups", "int4 rows", "int4 with zeros", "int2 groups", "int8", "float8",
                "nf4", "int8 and x", "int4 and x"],
    "compressed_tensors": ["int4", "int4 with zeros", "int8 and x", "fp8"],
    "gptqmodel": ["gptq", "gptq in an order", "awq"],
}  # fmt: skip
FAST = {"nf4 None", "int8", "int4 groups", "table nf4"}
CASES = [
    pytest.param(p, n, id=f"{p}-{n}", marks=() if n in FAST else pytest.mark.slow)
    for p, names in NAMES.items()
    for n in names
]
TRAINED = [c for c in CASES if c.values[0] in ("bitsandbytes", "torchao")]


@functools.cache
def cases(package: str) -> dict[str, Case]:
    pytest.importorskip(package)
    return dict(getattr(quantised_nets, package)())


def made(package: str, name: str) -> tuple[Any, Case]:
    case = cases(package)[name]
    model = net()
    case.make(model)
    return model, case


def adapted(case: Case) -> list[str]:
    """Float layers above a table that is quantised; else the quantised layers."""
    return ["up", "down"] if case.names == ("table",) else list(case.names)


@pytest.mark.parametrize("package", NAMES)
def test_the_table_is_whole(package: str) -> None:
    assert set(NAMES[package]) == set(cases(package))


@pytest.mark.parametrize(("package", "name"), CASES)
def test_a_layer_is_its_own_dequantised_weight(package: str, name: str) -> None:
    model, case = made(package, name)
    cap = capture(model, (ids(),))
    found = lora_fx.find(cap)
    told = {t.key: t.parameter for t in (*found.targets, *found.optional) if t.parameter.format}
    assert list(told) == [f"{n}.weight" for n in case.names]
    assert {p.bits for p in told.values()} == {case.bits}
    (note,) = [n for n in cap.notes if "read as codes" in n]
    assert f": {case.format}" in note
    assert note.endswith("; x stays in floats here") is case.x
    plain = net()
    for n in case.names:
        want = case.own(model.get_submodule(n)).detach()
        assert f"{n}.weight" in forms(cap.model)
        ours = numbers(cap.model, f"{n}.weight", want.dtype)
        assert torch.equal(ours, want), n
        plain.get_submodule(n).weight.data = want.float()
    module = lora_fx.insert(cap, rank=2, include=adapted(case))
    gate = FOLD_TOL if want.dtype == torch.float32 else 1e-3  # gptqmodel rounds to float16
    assert rel(module(ids(3)).detach().numpy(), plain(ids(3)).detach().numpy()) < gate


def losses(model: Any) -> list[float]:
    """Of 20 steps, all on other batches."""
    g = torch.Generator().manual_seed(3)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    model.train()
    for _ in range(20):
        x = torch.randint(0, quantised_nets.TOKENS, (4, 5), generator=g)
        loss = F.cross_entropy(model(x).flatten(0, 1), (x % 5).flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return found


def worst(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
@pytest.mark.parametrize(("package", "name"), TRAINED)
def test_twenty_steps_are_those_of_peft(package: str, name: str) -> None:
    peft = pytest.importorskip("peft")
    model, case = made(package, name)
    options: dict[str, Any] = {"rank": 2, "alpha": 4, "include": adapted(case)}
    ours = lora_fx.insert(model, (ids(),), **options)
    start = ours.adapter()
    live = lora_fx.attach(made(package, name)[0], (ids(),), **options)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=adapted(case), lora_dropout=0)
    try:
        theirs = peft.get_peft_model(made(package, name)[0], config)
    except ImportError as e:
        pytest.skip(f"PEFT asks for another package: {e}")
    for key, update in start.lowrank.items():
        layer = theirs.base_model.model.get_submodule(key.removesuffix(".weight"))
        layer.lora_A.default.weight.data = torch.from_numpy(update.a.copy())
    want = losses(theirs)
    assert want[0] - want[-1] > 0.2, "something is learnt"
    assert worst(losses(live), want) < 1e-4, "the live layers' own kernels"
    if not case.x:  # torchao rounds x and gives no gradient to it
        assert worst(losses(ours), want) < 1e-4


@pytest.mark.parametrize(("package", "name"), CASES)
def test_the_file_computes_the_same(package: str, name: str, tmp_path: Path) -> None:
    import onnx

    model, case = made(package, name)
    module = lora_fx.insert(model, (ids(),), rank=2, include=adapted(case))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in module.named_parameters():
            if "lora_B" in n:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    file = tmp_path / "m.onnx"
    report = lora_fx.export(module, file, mode="switch", provider="cpu")
    assert report.ok and max(p.rel for p in report.parity) < 2e-6
    ops = [n.op_type for n in onnx.load(file).graph.node if n.domain == "com.microsoft"]
    matrices = len(case.names) if case.names != ("table",) else 0
    if case.format.endswith(("float8", "Float8Tensor", "fp8")) or case.format == "torchao nf4":
        matrices = 0  # no operator has these codes
    if name.endswith("in an order"):
        matrices = 0  # nor these places
    assert len(ops) == matrices
    four = case.format in ("bitsandbytes nf4", "bitsandbytes fp4")
    assert set(ops) <= {"MatMulBnb4" if four else "MatMulNBits"}


def one_error(run: Callable[[], Any]) -> str:
    """Empty where it works; the message of the one error that users see where it does not."""
    try:
        run()
    except LoraFxError as e:
        assert e.hint and "\n" not in e.message
        return e.message
    return ""


def every_verb(model: Any, include: list[str]) -> list[str]:
    x = ids()
    verbs: list[Callable[[], Any]] = [
        lambda: lora_fx.find(model, (x,)),
        lambda: lora_fx.insert(model, (x,), rank=2, include=include),
        lambda: lora_fx.attach(model, (x,), rank=2, include=include),
    ]
    return [one_error(verb) for verb in verbs]


def test_layers_of_groups_of_several_sizes_are_refused_in_words() -> None:
    model, _ = made("gptqmodel", "gptq in an order")
    model.up.g_idx[model.up.g_idx == 0] = 1
    model.up.g_idx[0] = 0
    assert all("blocks of 1 inputs" in m for m in every_verb(model, ["up", "down"]))


@pytest.mark.parametrize("name", NAMES["compressed_tensors"])
def test_a_live_layer_that_does_not_run_is_no_raw_error(name: str) -> None:
    model, case = made("compressed_tensors", name)
    found = every_verb(model, list(case.names))
    assert found[:2] == ["", ""] and "does not run on the example inputs" in found[2]


def bitsandbytes_layers() -> Iterator[type[nn.Module]]:
    bnb = pytest.importorskip("bitsandbytes")
    for cls in vars(bnb.nn).values():
        if inspect.isclass(cls) and issubclass(cls, nn.Module):
            yield cls


@pytest.mark.slow
def test_every_layer_class_of_bitsandbytes() -> None:
    count = 0
    for cls in bitsandbytes_layers():
        for moved in (True, False):  # moving quantises
            model = net()
            name = "table" if issubclass(cls, nn.Embedding) else "up"
            old: Any = getattr(model, name)
            layer: Any = cls(*old.weight.shape[:: 1 if name == "table" else -1])
            layer.load_state_dict(old.state_dict(), strict=False)
            setattr(model, name, layer.requires_grad_(False).eval())
            if moved:
                model.to("cpu")
            said = every_verb(model, ["up", "down"])
            assert len(set(said)) == 1, (cls, said)
            count += not said[0]
            if said[0]:
                unmoved = not moved and cls.__name__.endswith(("4bit", "NF4", "FP4", "8bit"))
                assert unmoved or cls.__name__ in ("Linear8bitLt", "OutlierAwareLinear"), said
                assert "holds no codes yet" in said[0] or cls.__name__ == "OutlierAwareLinear"
    assert count >= 11


@pytest.mark.slow
def test_every_config_of_torchao() -> None:
    quantization = pytest.importorskip("torchao").quantization
    seen: dict[str, bool] = {}
    for name, cls in vars(quantization).items():
        if not (inspect.isclass(cls) and name.endswith("Config")):
            continue
        model: Any = net()
        try:
            quantization.quantize_(model, cls(), lambda m, n: n in ("up", "down"))
        except Exception:  # it does not run on a CPU, or wants more than defaults
            continue
        seen[name] = not any(every_verb(model, ["up", "down"]))
    assert all(seen.values()) and len(seen) >= 5, seen


def packed_for_this_cpu() -> Any:
    model, _ = made("bitsandbytes", "nf4 None")
    if not getattr(model.up, "support_avx512bf16_for_cpu", False):
        pytest.skip("bitsandbytes packs on CPUs with AVX512-BF16 only")
    with torch.no_grad():
        model(ids())  # which packs it, in place
    assert model.up.weight.quant_state.packing_format_for_cpu
    return model


def test_a_packed_layer_is_read_and_left_as_it_is() -> None:
    model = packed_for_this_cpu()
    before = {n: p.data.clone() for n, p in model.named_parameters()}
    live = model(ids())
    cap = capture(model, (ids(),))
    assert any("kernel has rounded their scales" in n for n in cap.notes)
    fresh, case = made("bitsandbytes", "nf4 None")
    for n in case.names:
        own = case.own(fresh.get_submodule(n))
        assert f"{n}.weight" in forms(cap.model)
        ours = numbers(cap.model, f"{n}.weight", torch.float32)
        assert 0 < rel(ours.numpy(), own.numpy()) < 2**-8, "scales in bfloat16"
    module = lora_fx.insert(cap, rank=2, include=list(case.names))
    assert rel(module(ids()).detach().numpy(), live.numpy()) < 0.02
    assert all(torch.equal(p.data, before[n]) for n, p in model.named_parameters())
    assert torch.equal(model(ids()), live), "the user's layers are as they were"


def test_attach_keeps_bitsandbytes_from_packing() -> None:
    with pytest.raises(LoraFxError, match="up: bitsandbytes has packed this layer"):
        lora_fx.attach(packed_for_this_cpu(), (ids(),), rank=2, include=["up", "down"])
    model, _ = made("bitsandbytes", "nf4 None")
    lora_fx.attach(model, (ids(),), rank=2, include=["up", "down"])
    with torch.no_grad():
        model(ids())
    model.train()(ids()).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    assert len(grads) == 2 and all(g is not None and bool(g.any()) for g in grads.values())

    other, (fresh, _) = copy.deepcopy(model), made("bitsandbytes", "nf4 None")
    for done in (model, other):
        lora_fx.detach(done)
        for n in ("up", "down"):
            told = [m.get_submodule(n).support_avx512bf16_for_cpu for m in (done, fresh)]
            assert told[0] == told[1], "it may pack them again"


def test_a_layer_trains_in_the_dtype_that_it_computes_in(tmp_path: Path) -> None:
    """Products are rounded as its kernel does; a branch reads x as it is, and W̃ is not kept."""
    model, case = made("bitsandbytes", "nf4 bfloat16")
    module = lora_fx.insert(model, (ids(),), rank=2, include=list(case.names))
    with torch.no_grad():
        exact = module(ids())
        rounded = module.train()(ids())
    assert 1e-4 < rel(rounded.numpy(), exact.numpy()) < 0.02
    weights = Made()
    with weights:
        y = module(ids())
    assert weights.weights and all(r.expired() for r in weights.weights)
    y.sum().backward()
    save_program(module, tmp_path / "m.pt2")
    with torch.no_grad():
        assert torch.equal(load_program(tmp_path / "m.pt2").train()(ids()), rounded)


def test_a_users_subclass_of_a_layer_is_known() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    Mine = type("Mine", (bnb.nn.Linear4bit,), {"__module__": "users"})
    model, _ = made("bitsandbytes", "nf4 None")
    want = lora_fx.insert(model, (ids(),), rank=2, include="up")(ids())
    model.up.__class__ = Mine
    assert torch.equal(lora_fx.insert(model, (ids(),), rank=2, include="up")(ids()), want)

    def forward(self: Any, x: torch.Tensor) -> Any:
        return bnb.nn.Linear4bit.forward(self, x) * 2

    model.up.__class__ = type("Doubled", (Mine,), {"__module__": "users", "forward": forward})
    with pytest.raises(LoraFxError, match="up: this quantised Doubled has a custom forward"):
        lora_fx.find(model, (ids(),))


def test_no_package_is_imported_for_a_model_without_its_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    for package in NAMES:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError):
        importlib.import_module("torchao")
    model = net()
    assert lora_fx.insert(model, (ids(),), rank=2)(ids()).shape == model(ids()).shape
