"""A variant that is defined here, from outside, is trained, folded, exported, saved and read."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir
import peft
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.as_lora import as_lora
from lora_fx.adapter.factor_tensors import slots_of
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.adapter.variant import VARIANTS, register, variant_of
from lora_fx.adapter.variant_protocol import Beginning, Read, Variant
from lora_fx.compare import rel
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MistakeError
from lora_fx.formats import io
from lora_fx.formats.format import Format, Magic
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.inputs import generator
from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.layout import Layout
from lora_fx.onnx.session import open_session
from lora_fx.passes.verbs.insert_onnx import insert_onnx
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program

RANK = 4


class Vectors(Variant):
    """ΔW = diag(e)·B·diag(d)·A; A and B are drawn once for a shape and do not train.

    Kopiczko et al. 2023 (arXiv:2310.11454).
    """

    made_of = ("frozen_a", "frozen_b", "d", "e")
    proportional = "e"
    zero_where = ("d", "e")

    def prepared(self, low: LowRank, beginning: Beginning) -> LowRank:
        """A and B are those of all targets of this shape; e is zero, so that W' = W."""
        assert low.layout is not None
        a, b = draw("vectors", low.layout, low.rank, beginning.seed, "probe")
        d = np.ones(low.rank, np.float32)
        e = np.zeros(low.b.shape[-2], np.float32)
        values = {"frozen_a": a, "frozen_b": b, "d": d, "e": e}
        return self.with_values(replace(low, alpha=float(low.rank)), values)

    def a(self, e: Ops[V], read: Read[V]) -> V:
        """diag(d)·A."""
        return e.op("mul", read("frozen_a"), e.op("reshape", read("d"), shape=(-1, 1)))

    def b(self, e: Ops[V], read: Read[V]) -> V:
        """diag(e)·B."""
        return e.op("mul", read("frozen_b"), e.op("reshape", read("e"), shape=(-1, 1)))

    def drawn(self, low: LowRank, key: str, seed: int) -> Mapping[str, Array]:
        """Both vectors."""
        rng = generator(key, seed)
        sizes = {"d": low.rank, "e": low.b.shape[-2]}
        return {name: rng.standard_normal(n).astype(np.float32) for name, n in sizes.items()}


VECTORS = Vectors("pairs", still=("frozen_a", "frozen_b"))


@pytest.fixture
def registered() -> Iterator[None]:
    with mock.patch.dict(VARIANTS):
        register(VECTORS)
        yield


class Net(nn.Module):
    """Two weights of one shape, one of another, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.out = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        out: torch.Tensor = self.out(torch.tanh(self.down(torch.relu(self.up(x)))))
        return out


X = torch.randn(8, 3, 7, 5, generator=torch.Generator().manual_seed(1))
LAYERS = "conv,up,down,out"


def net() -> Net:
    torch.manual_seed(3)
    return Net().eval()


def trained() -> tuple[AdaptedModule, list[float]]:
    """The module after ten steps, and the loss of each."""
    module = lora_fx.insert(net(), (X[:2],), rank=RANK, include=LAYERS, variant="pairs")
    optimizer = torch.optim.AdamW(module.parameter_groups(0.1))
    labels = torch.arange(len(X)) % 10
    losses = []
    module.train()
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(X), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return module.eval(), losses


def of(module: nn.Module) -> np.ndarray[Any, Any]:
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        return np.asarray(module(X.to(dtype)).double().numpy())


def by_hand(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Net:
    """The net in fp64 with W + diag(e)·B·diag(d)·A written out."""
    changed = net().double()
    for key, held in tensors.items():
        frozen_a, frozen_b, d, e = (held[f].detach().double() for f in VECTORS.made_of)
        delta = torch.diag(e) @ frozen_b @ torch.diag(d) @ frozen_a
        weight = changed.get_parameter(key)
        weight.data += delta.reshape(weight.shape)
    return changed


@pytest.mark.usefixtures("registered")
def test_it_trains_folds_and_is_exported(tmp_path: Path) -> None:
    module, losses = trained()
    assert losses[-1] < 0.9 * losses[0]
    learns = {n.rpartition(".")[0].rpartition(".")[2] for n, p in module.named_parameters()
              if p.requires_grad}  # fmt: skip
    assert learns == {"lora_d", "lora_e"}
    held = module.tensors()
    assert torch.equal(held["up.weight"]["frozen_a"], held["out.weight"]["frozen_a"])
    assert not torch.equal(held["up.weight"]["e"], held["out.weight"]["e"])
    assert str(insertion_of(module).effect).startswith(
        "gradients reach every target in eval and train"
    )
    assert insertion_of(module).changes_anything()

    want, before = of(by_hand(held)), of(net())
    assert rel(want, before) > 0.05
    assert rel(of(module), want) < 1e-6
    assert rel(of(lora_fx.fold(module)), want) < 1e-6
    lora_fx.export(module, tmp_path / "merged.onnx", provider="cpu")
    session = open_session(tmp_path / "merged.onnx", "cpu")
    (made,) = session.run({"x": X.numpy()}).values()
    assert rel(made, want) < 2e-6


@pytest.mark.usefixtures("registered")
def test_it_starts_as_the_base() -> None:
    module = lora_fx.insert(net(), (X[:2],), rank=RANK, include=LAYERS, variant="pairs")
    assert not insertion_of(module).changes_anything()
    assert np.array_equal(of(module), of(net()))
    with pytest.raises(
        LoraFxError, match="init 'pissa' sets a and b, but variant pairs computes them"
    ):
        lora_fx.insert(net(), (X[:2],), rank=2, variant="pairs", init="pissa")


@pytest.mark.usefixtures("registered")
def test_it_is_saved_and_read(tmp_path: Path) -> None:
    module, _ = trained()
    want = of(by_hand(module.tensors()))
    adapter = module.adapter()
    save_adapter(adapter, tmp_path / "folder")
    save_adapter(adapter, tmp_path / "file.safetensors")
    save_program(module, tmp_path / "program.pt2")
    stored = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    assert sum("frozen_a" in name for name in stored) == 3, "one for each shape"
    for place in ("folder", "file.safetensors"):
        again = lora_fx.insert(net(), (X[:2],), adapter=tmp_path / place)
        assert np.array_equal(of(again), of(module))
        assert _learning(again) == _learning(module)
        assert {variant_of(u).name for u in again.updates.values()} == {"pairs"}
    program = load_program(tmp_path / "program.pt2")
    assert isinstance(program, AdaptedModule)
    assert rel(of(program.eval()), want) < 1e-6
    assert _learning(program) == _learning(module)
    other = lora_fx.insert(net(), (X[:2],), rank=1)
    other.load_adapter(tmp_path / "folder")
    assert rel(of(other), want) < 1e-6
    live = lora_fx.attach(net(), (X[:2],), rank=RANK, include=LAYERS, variant="pairs")
    live.load_adapter(adapter)
    assert rel(of(live), want) < 1e-6
    lora_fx.detach(live)
    assert np.array_equal(of(live), of(net()))


def _learning(module: nn.Module) -> set[str]:
    return {n for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.usefixtures("registered")
def test_a_checkpoint_takes_it(tmp_path: Path) -> None:
    module, _ = trained()
    wanted = dict(by_hand(module.tensors()).named_parameters())
    save_adapter(module.adapter(), tmp_path / "folder")
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    report = lora_fx.merge(
        tmp_path / "base.safetensors", [tmp_path / "folder"], tmp_path / "out.safetensors"
    )
    assert report
    for name, value in load_file(tmp_path / "out.safetensors").items():
        assert rel(value.numpy(), wanted[name].detach().numpy()) < 1e-6
    assert lora_fx.doctor(tmp_path / "base.safetensors", tmp_path / "folder")


def test_branches_in_an_onnx_file(tmp_path: Path) -> None:
    """insert into a file, any trainer, merge: the vectors are in the graph, and read back."""
    base, slots, out = (tmp_path / f"{n}.onnx" for n in ("base", "slots", "out"))
    numbers = "0.1, 0.7, -0.4, 0.3, -0.9, 0.2, 0.5, -0.6, 0.8, -0.2, 0.4, -0.7"
    source = f"""
    <ir_version: 10, opset_import: ["": 20]>
    m (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w = {{{numbers}}}> {{ y = MatMul(x, w) }}
    """
    onnx_ir.save(onnx_ir.from_onnx_text(source), base)
    with mock.patch.dict(VARIANTS):
        register(VECTORS)
        insert_onnx(base, slots, rank=2, variant="pairs", include="*", provider="cpu")
        model = onnx.load(slots)
        tensors = {t.name: t for t in model.graph.initializer}
        drawn = np.array([0.5, -1.0, 2.0], np.float32)
        tensors["lora_e.w"].CopyFrom(numpy_helper.from_array(drawn, "lora_e.w"))
        onnx.save(model, slots)
        held = {n: numpy_helper.to_array(t).astype(np.float64) for n, t in tensors.items()}
        frozen_a, frozen_b, d, e = (held[f"lora_{f}.w"] for f in VECTORS.made_of)
        weight = held["w"] + (np.diag(e) @ frozen_b @ np.diag(d) @ frozen_a).T
        lora_fx.merge(base, [slots], out)
    x = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)
    want = x.astype(np.float64) @ weight
    for path in (slots, out):
        assert rel(open_session(path, "cpu").run({"x": x})["y"], want) < 1e-6
    assert rel(open_session(base, "cpu").run({"x": x})["y"], want) > 0.05
    with pytest.raises(LoraFxError, match=r"slots.onnx: the update of 'w' has variant 'pairs'"):
        lora_fx.merge(base, [slots], tmp_path / "other.onnx")


@pytest.mark.usefixtures("registered")
def test_parts_of_it_are_plain_lora() -> None:
    """Whoever rewrites a or b gets an update of the same ΔW, and no vectors that say another."""
    adapter = trained()[0].adapter()
    low = adapter.lowrank["up.weight"]
    delta = low.matrix()
    as_plain, rows = as_lora(adapter, rank=1)
    np.testing.assert_allclose(as_plain.lowrank["up.weight"].matrix(), delta, rtol=1e-12)
    assert {(row.kind, row.error) for row in rows} == {("pairs", 0.0)}
    part = variant_of(low).rows(low, slice(2, 7))
    np.testing.assert_array_equal(part.matrix(), delta[2:7])
    turned = variant_of(low).turned(low, "up.weight")
    np.testing.assert_allclose(turned.matrix(), delta.T, rtol=1e-6, atol=1e-7)
    halved = replace(low, b=low.b * np.float32(0.5))
    for rewritten in (part, turned, halved, as_plain.lowrank["up.weight"]):
        assert variant_of(rewritten).name == "lora"
        assert {slot.field for slot in slots_of("up.weight", rewritten)} == {"a", "b"}


def test_who_does_not_know_it_refuses_it(tmp_path: Path) -> None:
    with mock.patch.dict(VARIANTS):
        register(VECTORS)
        module, _ = trained()
        save_adapter(module.adapter(), tmp_path / "folder")
        save_adapter(module.adapter(), tmp_path / "file.safetensors")
        save_program(module, tmp_path / "program.pt2")
        with pytest.raises(MistakeError, match="it is taken or not allowed"):
            register(VECTORS)
    for read, place in (
        (load_adapter, "folder"),
        (load_adapter, "file.safetensors"),
        (load_program, "program.pt2"),
    ):
        with pytest.raises(LoraFxError, match=r" has variant 'pairs', which is not") as e:
            read(tmp_path / place)
        assert place in e.value.message and "\n" not in e.value.message
        assert "use one of lora, rslora" in e.value.hint
    with pytest.raises(LoraFxError, match="unknown variant 'pairs'"):
        lora_fx.insert(net(), (X[:2],), variant="pairs")
    with pytest.raises((KeyError, ValueError), match="pairs"):
        peft.PeftModel.from_pretrained(net(), str(tmp_path / "folder"))


def test_a_file_that_keeps_no_variant_says_so(tmp_path: Path) -> None:
    a, b = np.ones((2, 6), np.float32), np.ones((10, 2), np.float32)
    tensors = {"frozen_a": a, "frozen_b": b, "d": np.ones(2, "f4"), "e": np.ones(10, "f4")}
    note = "updates of variant pairs are written as plain LoRA with the same ΔW"
    with mock.patch.dict(VARIANTS):
        register(VECTORS)
        low = LowRank(a, b, 2.0, variant="pairs", variant_tensors=tensors)
        adapter = lora_fx.Adapter({"up.weight": low})
        assert note in save_adapter(adapter, tmp_path / "x.safetensors", "kohya")
        assert note in save_adapter(adapter, tmp_path / "x.onnx_adapter", "onnx_adapter")
        assert note not in save_adapter(adapter, tmp_path / "folder")
    assert "pairs" in repr(adapter)  # of a process that does not know the variant


class Columns(Variant):
    """W' = (W + s·b·a)·diag(c): more than a sum, so that there is no branch beside the op."""

    reads_weight = True
    also = ("c",)

    def prepared(self, low: LowRank, beginning: Beginning) -> LowRank:
        """All c are 1, so that W' = W."""
        return replace(low, variant_tensors={"c": np.ones(low.a.shape[-1], np.float32)})

    def change(self, e: Ops[V], layout: Layout, w: V, delta: V, read: Read[V]) -> V:
        """See the class."""
        v = layout.from_stored(e, e.op("add", w, delta))
        new = layout.to_stored(e, e.op("mul", v, e.op("reshape", read("c"), shape=(1, -1))))
        return e.op("add", new, e.op("mul", w, -1.0))


class Careless(Format):
    """A format of another package that writes A and B of every update, and asks nothing."""

    name = "careless"
    suffixes = (".careless",)
    magic = Magic(b"CARE")

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """See the class."""
        tensors = [(update.a, update.b) for update in adapter.lowrank.values()]
        path.write_bytes(b"CARE" + pickle.dumps(tensors))
        return ()

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Fail: no file is written, so none is read."""
        raise AssertionError(path)


def _save_with_a_careless_format(adapter: Adapter, path: Path) -> None:
    with mock.patch.object(io, "_writer", lambda name: Careless()):
        save_adapter(adapter, path, "careless")


def test_one_that_reads_the_weight(tmp_path: Path) -> None:
    with mock.patch.dict(VARIANTS):
        register(Columns("columns"))
        module = lora_fx.insert(net(), (X[:2],), rank=2, include="up", variant="columns")
        assert not insertion_of(module).changes_anything()
        assert rel(of(module), of(net())) < 1e-6
        held = module.tensors()["up.weight"]
        assert {f for f, p in held.items() if p.requires_grad} == {"a", "b", "c"}
        with torch.no_grad():
            held["c"].copy_(torch.linspace(-1, 2, 6))
            held["b"].normal_(generator=torch.Generator().manual_seed(2))
        assert insertion_of(module).changes_anything()
        a, b, c = (held[f].detach().double() for f in "abc")
        changed = net().double()
        changed.up.weight.data = (changed.up.weight.data + 2 * b @ a) * c
        want = of(changed)
        assert rel(want, of(net())) > 0.05
        assert rel(of(module), want) < 1e-6
        assert rel(of(lora_fx.fold(module)), want) < 1e-6
        save_adapter(module.adapter(), tmp_path / "folder")
        again = lora_fx.insert(net(), (X[:2],), adapter=tmp_path / "folder")
        assert np.array_equal(of(again), of(module))
        low = replace(module.adapter().lowrank["up.weight"], variant_tensors={})
        with pytest.raises(LoraFxError, match="variant columns has no tensor 'c'"):
            slots_of("up.weight", low)
        save_file(net().state_dict(), tmp_path / "base.safetensors")
        base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
        for refuse in (
            lambda: lora_fx.merge(base, [tmp_path / "folder"], out),
            lambda: save_adapter(module.adapter(), tmp_path / "k.safetensors", format="kohya"),
            lambda: _save_with_a_careless_format(module.adapter(), tmp_path / "x.careless"),
            lambda: lora_fx.export(module, tmp_path / "s.onnx", mode="switch"),
        ):
            with pytest.raises(LoraFxError, match="columns"):
                refuse()
        assert {p.name for p in tmp_path.iterdir()} == {"base.safetensors", "folder"}


def test_pickles_of_older_versions() -> None:
    """They have no `variant_tensors`, and the group of QA-LoRA was a field."""
    a, b = np.repeat(np.ones((2, 3), np.float32), 4, -1), np.ones((5, 2), np.float32)
    low = LowRank(a, b, 2.0)
    for group in (0, 4):
        fields = {k: v for k, v in vars(low).items() if k != "variant_tensors"}
        older = object.__new__(LowRank)
        older.__setstate__({**fields, "group": group})
        assert variant_of(older).constant_over == group
        assert vars(pickle.loads(pickle.dumps(older))).keys() == vars(low).keys()


@pytest.mark.parametrize(
    ("fields", "taken"), [(("A",), "A"), (("d", "B0"), "B0"), (("d", "d"), "d"), (("x.y",), "x.y")]
)
def test_fields_whose_tensors_would_have_one_name(fields: tuple[str, ...], taken: str) -> None:
    """The factor a is called lora_A in a model."""

    class Clashing(Variant):
        made_of = fields

    with pytest.raises(LoraFxError, match=f"cannot have the field '{taken}'"):
        register(Clashing("clashing"))


def test_names_that_files_have_already() -> None:
    class Odd(Variant):
        made_of = ("rank", "b")

    taken = "cannot have the field 'rank'"
    with mock.patch.dict(VARIANTS), pytest.raises(MistakeError, match=taken):
        register(Odd("odd"))
