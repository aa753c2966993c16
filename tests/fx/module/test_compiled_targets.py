"""One compilation for adapters of other targets, ranks and scales: numbers, gradients, optimizers.

The numbers are those of W + ΔW in fp64, and of the adapter's own program without completion.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.attach.attachment import attachment
from tests.fx.module.test_several import Feeding

SIZE = (3, 7, 18)
X = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
VARIANTS = ("lora", "rslora", "lora+")
KEYS = ("q.weight", "k.weight", "down.weight")


@pytest.fixture(autouse=True)
def compiled_afresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def whole(model: nn.Module, x: torch.Tensor) -> Adapter:
    inserted = lora_fx.insert(model, (x,), rank=2, dead="allow")
    return Adapter(inserted.adapter().entries)


def drawn(whole: Adapter, seed: int, most: int = 16, keys: tuple[str, ...] = ()) -> Adapter:
    """An adapter of some of the targets, each with a rank, an alpha and a variant of its own."""
    rng = np.random.default_rng(seed)
    chosen = keys or tuple(key for key in whole.lowrank if rng.random() < 0.6)
    entries = {}
    for key in chosen or tuple(whole.lowrank)[:1]:
        low = whole.lowrank[key]
        rank = int(rng.integers(1, most + 1))
        a = rng.normal(size=(*low.a.shape[:-2], rank, low.a.shape[-1])).astype(np.float32)
        b = rng.normal(size=(*low.b.shape[:-1], rank)).astype(np.float32)
        alpha, variant = float(rng.uniform(0.1, 2)), VARIANTS[seed % 3]
        entries[key] = replace(low, a=a / 4, b=b / 4, alpha=alpha * rank, variant=variant)
    return Adapter(entries)


def adapted(verb: str, model: nn.Module, x: torch.Tensor = X, **options: Any) -> Any:
    """A module of insert or attach; its program is captured before anything is compiled."""
    make = lora_fx.insert if verb == "insert" else lora_fx.attach
    module: Any = make(model, (x,), rank=4, dead="allow", **options)
    return module


def in_fp64(model: nn.Module, adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    wide: nn.Module = type(model)().double()
    state = {name: value.double() for name, value in model.state_dict().items()}
    for key, delta in adapter.deltas().items():
        state[key] = state[key] + torch.from_numpy(delta)
    result: torch.Tensor = torch.func.functional_call(wide, state, (x.double(),))
    return result.detach()


def gradients(module: Any, verb: str) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """Gradients of the adapter's own ranks by key."""
    slots = attachment(module).slots() if verb == "attach" else None
    if slots is None:
        slots = {key: (by["a"], by["b"]) for key, by in module.tensors().items()}
    ranks = {key: low.rank for key, low in module.adapter().lowrank.items()}
    result = {}
    for key, (a, b) in slots.items():
        assert a.grad is not None and b.grad is not None
        rest = (a.grad[ranks[key] :], b.grad[:, ranks[key] :])
        assert not any(part.any() for part in rest), "ranks that the adapter does not have"
        own = {"a": a.grad[: ranks[key]].numpy(), "b": b.grad[:, : ranks[key]].numpy()}
        result[key] = {field: value.copy() for field, value in own.items()}
    return result


def swaps_20_times(verb: str, training: bool, backend: str) -> None:
    base = Feeding()
    every = whole(Feeding(), X)
    module = adapted(verb, Feeding())
    own_program = adapted(verb, Feeding())
    module.train(training)
    module(X)
    module.compile(backend=backend, fullgraph=True)
    with torch.set_grad_enabled(training):
        module(X)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(20):
                adapter = drawn(every, seed)
                module.load_adapter(adapter)
                own_program.load_adapter(adapter)
                module.zero_grad()
                y = module(X)
                got = y.detach().numpy()
                assert rel(got, in_fp64(base, adapter, X).numpy()) < 2e-6, seed
                assert rel(got, own_program(X).detach().numpy()) < 1e-6, seed
                back = module.adapter().lowrank
                assert set(back) == set(adapter.lowrank)
                for key, low in adapter.lowrank.items():
                    assert (back[key].rank, back[key].alpha) == (low.rank, low.alpha)
                    assert np.array_equal(back[key].a, low.a)
                    assert np.array_equal(back[key].b, low.b)
                if not training:
                    continue
                y.square().sum().backward()
                own_program.zero_grad()
                own_program(X).square().sum().backward()
                expected = gradients(own_program, verb)
                for key, by_field in gradients(module, verb).items():
                    for field, gradient in by_field.items():
                        assert gradient.any()
                        assert rel(gradient, expected[key][field]) < 2e-6, (seed, key, field)
    assert graphs() == 1


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("verb", ["insert", "attach"])
def test_twenty_adapters(verb: str, training: bool) -> None:
    swaps_20_times(verb, training, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit")  # inductor's own imports
@pytest.mark.parametrize("verb", ["insert", "attach"])
def test_twenty_adapters_in_inductor(verb: str) -> None:
    swaps_20_times(verb, True, "inductor")


def test_bits_without_padding() -> None:
    """With ranks from 2 up, the completed program gives the bits of the adapter's own program."""
    every = whole(Feeding(), X)
    module, own_program = adapted("insert", Feeding()), adapted("insert", Feeding())
    module.compile(backend="eager")
    for seed in range(5):
        adapter = drawn(every, seed)
        if min(low.rank for low in adapter.lowrank.values()) < 2:
            continue
        module.load_adapter(adapter)
        own_program.load_adapter(adapter)
        assert torch.equal(module(X), own_program(X))


@pytest.mark.parametrize("verb", ["insert", "attach"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_trains_as_uncompiled(verb: str, kind: str) -> None:
    """Steps on the completed branches are those of the adapter alone; inert ones stay zero."""
    every = whole(Feeding(), X)
    adapter = drawn(every, 3, keys=("q.weight",))
    single = drawn(every, 5, most=1, keys=("k.weight", "down.weight"))
    for chosen in (adapter, single):
        trained = []
        for compiled in (False, True):
            module = adapted(verb, Feeding())
            module.train()
            if compiled:
                module(X)
                module.compile(backend="aot_eager")
            module.load_adapter(chosen)
            parameters = [p for p in module.parameters() if p.requires_grad]
            options = {"momentum": 0.9} if kind == "SGD" else {}
            rate = 1e-3
            optimizer: Any = getattr(torch.optim, kind)(
                parameters, lr=rate, weight_decay=0.1, **options
            )
            for _ in range(4):
                optimizer.zero_grad()
                module(X).square().mean().backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
            trained.append(module.adapter().lowrank)
        for key, low in trained[0].items():
            assert not np.array_equal(low.b, chosen.lowrank[key].b)
            assert rel(trained[1][key].a, low.a) < 1e-5
            assert rel(trained[1][key].b, low.b) < 1e-5


@pytest.mark.parametrize("verb", ["insert", "attach"])
def test_compile_keeps_the_parameters(verb: str) -> None:
    """An optimizer that was made before compile() still trains the branches."""
    module = adapted(verb, Feeding())
    module.train()
    module(X)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    names = set(module.state_dict())
    module.compile(backend="aot_eager")
    assert set(module.state_dict()) == names, "a scale is not saved"
    before = module.adapter().lowrank
    module(X).square().mean().backward()
    optimizer.step()
    after = module.adapter().lowrank
    assert all(not np.array_equal(after[key].b, low.b) for key, low in before.items())


@pytest.mark.parametrize("verb", ["insert", "attach"])
def test_an_old_optimizer_moves_no_inert_target(verb: str) -> None:
    every = whole(Feeding(), X)
    module = adapted(verb, Feeding())
    module.train()
    module(X)
    module.compile(backend="aot_eager")
    module.load_adapter(drawn(every, 1, keys=KEYS))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    module(X).square().mean().backward()
    optimizer.step()
    module.load_adapter(drawn(every, 2, keys=KEYS[:1]))
    module(X).square().mean().backward()
    optimizer.step()
    assert list(module.adapter().lowrank) == ["q.weight"]
    # noise in the place of a gradient is no training of the adapter
    name = next(n for n, _ in module.named_parameters() if n == "k.lora_B.weight")
    module.get_parameter(name).data += 1.0
    with pytest.raises(LoraFxError, match=r"'k\.weight' was trained in ranks"):
        module.adapter()


def test_the_loaded_adapters_are_the_union() -> None:
    every = whole(Feeding(), X)
    base = Feeding()
    module = adapted("insert", Feeding(), include="q")
    module.load_adapter(drawn(every, 1, keys=("k.weight",)), name="k")
    module.load_adapter(drawn(every, 2, keys=("q.weight", "k.weight")), name="both")
    module.eval()
    module(X)
    module.compile(backend="aot_eager")
    module(X)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("k", "both", "default", "k"):
            module.activate(name)
            assert (
                rel(module(X).detach().numpy(), in_fp64(base, module.adapter(), X).numpy()) < 2e-6
            )
            assert set(module.updates) == set(module.adapter(name).lowrank)
    assert graphs() == 1
    # an adapter outside of the union compiles once more, and says so
    late = drawn(every, 4, keys=("down.weight",))
    with pytest.warns(RuntimeWarning, match=r"compiles again: 'down\.weight' is a new target"):
        module.load_adapter(late, name="late")
    for name in ("late", "k", "late", "both"):
        module.activate(name)
        assert rel(module(X).detach().numpy(), in_fp64(base, module.adapter(), X).numpy()) < 2e-6
    assert graphs() == 2
    # a mix does not train: its tensors require no grad, which is one compilation more
    module.activate({"k": 0.5, "late": 2.0})
    assert rel(module(X).detach().numpy(), in_fp64(base, module.adapter(), X).numpy()) < 2e-6
    module.activate(None)
    assert torch.equal(module(X), base(X))
    module.activate("k")
    module.compile(backend="aot_eager")  # again, with all that it had
    module.load_adapter(drawn(every, 5, keys=KEYS))  # without a warning
    module.load_adapter(drawn(every, 6, keys=KEYS[1:2]))
    fewer = str(module.report()).splitlines()
    assert fewer[0].startswith("1 target adapted") and len(fewer) == 3, fewer


@pytest.mark.parametrize("verb", ["insert", "attach"])
def test_other_variants_are_said(verb: str) -> None:
    every = whole(Feeding(), X)
    base = Feeding()
    dora = lora_fx.insert(Feeding(), (X,), rank=2, variant="dora", dead="allow").adapter()
    module = adapted(verb, Feeding())
    module.eval()
    module(X)
    module.compile(backend="aot_eager")
    with pytest.warns(RuntimeWarning, match=r"compiles again: 'q\.weight' is of variant DoRA"):
        module.load_adapter(dora)
    assert rel(module(X).detach().numpy(), base(X).detach().numpy()) < 1e-6
    with pytest.warns(RuntimeWarning, match="the last adapter had a program of its own"):
        module.load_adapter(drawn(every, 1))
    expected = in_fp64(base, drawn(every, 1), X)
    assert rel(module(X).detach().numpy(), expected.numpy()) < 2e-6


class Convolved(nn.Module):
    """A convolution, whose rank is in the program, before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.conv(x).mean((2, 3)))
        return result


@pytest.mark.parametrize("verb", ["insert", "attach"])
def test_ranks_that_are_in_the_program(verb: str) -> None:
    """Convolutions are filled up to the highest rank so far; a higher one compiles again."""
    x = torch.randn(2, 3, 7, 9)
    every = whole(Convolved(), x)
    module = adapted(verb, Convolved(), x)  # rank 4
    module.eval()
    module(x)
    module.compile(backend="aot_eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(8):
            adapter = drawn(every, seed, most=4, keys=("conv.weight", "out.weight")[seed % 2 :])
            module.load_adapter(adapter)
            assert rel(module(x).numpy(), in_fp64(Convolved(), adapter, x).numpy()) < 2e-6
    assert graphs() == 1
    high = drawn(every, 0, most=1, keys=("out.weight",))
    low = every.lowrank["conv.weight"]
    a, b = np.ones((6, low.a.shape[-1]), np.float32), np.ones((low.b.shape[0], 6), np.float32)
    high = Adapter({**high.entries, "conv.weight": replace(low, a=a, b=b, alpha=1.0)})
    by_name: dict[str, Any] = {"name": "high"} if verb == "insert" else {}
    with pytest.warns(RuntimeWarning, match=r"'conv\.weight' has rank 6, and the program 4"):
        module.load_adapter(high, **by_name)
    if by_name:
        module.activate("high")
    assert rel(module(x).detach().numpy(), in_fp64(Convolved(), high, x).numpy()) < 2e-6


def test_verbs_take_the_adapter_alone() -> None:
    """What fold and other verbs see has no inert targets and no tensors for scales."""
    every = whole(Feeding(), X)
    module = adapted("insert", Feeding())
    module.eval()
    module(X)
    module.compile(backend="aot_eager")
    adapter = drawn(every, 3, most=1, keys=("k.weight",))
    module.load_adapter(adapter)
    expected = in_fp64(Feeding(), adapter, X).numpy()
    assert rel(lora_fx.fold(module)(X).detach().numpy(), expected) < 2e-6
    names = [str(node.target) for node in module.graph().graph.nodes if node.op == "get_attr"]
    assert [name for name in names if "lora_" in name] == ["k.lora_A.weight", "k.lora_B.weight"]
    assert list(module.tensors()) == ["k.weight"] and set(module.tensors()["k.weight"]) == {
        "a",
        "b",
    }
