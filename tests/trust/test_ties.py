"""A key without @ is an update of all uses of a tensor, and NAME@USE of one; else it is refused.

Wrong on 788628f: `*` and names of Inner and Called and the names of Aliased and Three adapted one
use, in the graph, live and in ONNX, under a key that names all; Raw was right there, and a merge
into its .onnx file reached the lookup alone. What roles, ops and the default plan chose had plain
keys, and a merge into a checkpoint changed all uses while verify said True. One stored copy of two
kept the old values (Aliased, Three), and exclude of one use took both away. Sliced was right.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_fx
from lora_fx.compare import FOLD_TOL, ORT_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx.adapter_session import Session
from tests.trust.tied import TIED, Apart, adapted, built, explicit, out, values

CASES = [(n, i) for n, make in TIED.items() for i in ("*", *make.names)]
LOOKUP, HEAD = "role:embedding", "role:head"


def stored(model: Any, names: Any, path: Path) -> Path:
    """A checkpoint that holds the model's tensors, the tied one under these names."""
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    table = state.pop(type(model).name)
    save_file({**state, **{n: table.clone() for n in names}}, path)
    return path


def loaded(model: Any, path: Path) -> Any:
    """A model of the same class with a checkpoint's tensors."""
    fresh, _ = built(type(model), 7)
    fresh.load_state_dict(load_file(path), strict=False)
    return fresh


def every_name(model: Any) -> list[str]:
    every = model.named_parameters(remove_duplicate=False)
    own = dict(model.named_parameters())[type(model).name]
    return [n for n, p in every if p is own]


@pytest.mark.parametrize(("name", "include"), CASES)
def test_a_name_means_all_uses(name: str, include: str, tmp_path: Path) -> None:
    model, ids = built(TIED[name])
    module = adapted(model, ids, include)
    (key,) = module.updates
    assert key == TIED[name].name
    (delta,) = module.adapter().deltas().values()
    want = explicit(model, ids, delta, delta)
    assert 0.05 < rel(want, out(model, ids)) < 5
    assert rel(out(module, ids), want) < ORT_TOL
    assert rel(out(lora_fx.fold(module), ids), want) < ORT_TOL
    report = module.report()
    target = lora_fx.find(model, (ids,))[key]
    assert [t[3] for t in report.targets] == [target.flops]
    assert any(key in n and "one update for" in n for n in report.notes)


@pytest.mark.parametrize("name", TIED)
def test_a_live_model_has_it_too(name: str) -> None:
    model, ids = built(TIED[name])
    adapter = adapted(model, ids, "*").adapter()
    (delta,) = adapter.deltas().values()
    want = explicit(model, ids, delta, delta)
    lora_fx.attach(model, (ids,), adapter=adapter)
    assert rel(out(model, ids), want) < ORT_TOL


@pytest.mark.parametrize("name", TIED)
def test_a_checkpoint_has_all_uses_under_each_of_its_names(name: str, tmp_path: Path) -> None:
    model, ids = built(TIED[name])
    adapter = adapted(model, ids, "*").adapter()
    (delta,) = adapter.deltas().values()
    want = explicit(model, ids, delta, delta)
    names = every_name(model)
    for i, held in enumerate((names, names[:1], names[-1:])):
        base, merged = stored(model, held, tmp_path / f"{i}.safetensors"), tmp_path / f"m{i}"
        merged = merged.with_suffix(".safetensors")
        lora_fx.save_adapter(adapter, tmp_path / f"adapter{i}")
        lora_fx.merge(base, tmp_path / f"adapter{i}", merged)
        assert set(load_file(merged)) == set(load_file(base))
        assert rel(out(loaded(model, merged), ids), want) < ORT_TOL, held
        assert lora_fx.verify(merged, base, adapter=adapter)
        again = lora_fx.extract(base, merged, rank=2)
        if len(held) == 1:
            assert rel(out(lora_fx.fold(model, (ids,), adapter=again), ids), want) < 1e-5
        else:  # two updates of one tensor
            with pytest.raises(LoraFxError, match="twice"):
                lora_fx.fold(model, (ids,), adapter=again)


@pytest.mark.parametrize("include", [LOOKUP, HEAD])
@pytest.mark.parametrize("name", TIED)
def test_a_role_means_its_uses_under_a_key_with_at(name: str, include: str, tmp_path: Path) -> None:
    model, ids = built(TIED[name])
    module = adapted(model, ids, include)
    first = TIED[name].name
    assert all(k.startswith(f"{first}@") for k in module.updates)
    deltas = list(module.adapter().deltas().values())
    total = sum(deltas) if len(deltas) == 1 else None
    if total is None:  # the two lookups of Three have one name each
        assert include == LOOKUP
        return
    pair = (total, 0.0) if include == LOOKUP else (0.0, total)
    want = explicit(model, ids, *pair)
    assert 0.02 < rel(want, out(model, ids)) < 5
    assert rel(out(module, ids), want) < ORT_TOL
    assert rel(out(lora_fx.fold(module), ids), want) < ORT_TOL
    lora_fx.save_adapter(module.adapter(), tmp_path / "adapter")
    read = lora_fx.load_adapter(tmp_path / "adapter")
    assert rel(out(lora_fx.insert(model, (ids,), adapter=read), ids), want) < ORT_TOL
    flops = sum(t[3] for t in module.report().targets)
    whole = lora_fx.find(model, (ids,))[first].flops
    assert flops == (0 if include == LOOKUP else whole)
    names = every_name(model)
    for held in {tuple(names), tuple(names[:1]), tuple(names[-1:])}:
        base = stored(model, held, tmp_path / "base.safetensors")
        with pytest.raises(LoraFxError, match=r"is for one use|no tensor for") as caught:
            lora_fx.merge(base, read, tmp_path / "never.safetensors")
        assert caught.value.exit_code == 2
        assert not (tmp_path / "never.safetensors").exists()
        with contextlib.suppress(LoraFxError):
            assert not lora_fx.verify(base, base, adapter=read)


@pytest.mark.parametrize("name", TIED)
def test_the_default_plan_leaves_the_lookup(name: str) -> None:
    model, ids = built(TIED[name])
    module = adapted(model, ids, None)
    assert all(k.startswith(f"{TIED[name].name}@") for k in module.updates)
    (delta,) = module.adapter().deltas().values()
    assert rel(out(module, ids), explicit(model, ids, 0.0, delta)) < ORT_TOL


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("*", "op:embedding", "head"),
        ("*", "role:head", "look"),
        ("*", "emb@emb.weight", "head"),
        ("emb@*", "class:Linear", "look"),
        (None, "class:Embedding", "head"),
    ],
)
def test_exclude_takes_one_use_away(include: Any, exclude: str, left: str) -> None:
    model, ids = built(TIED["Aliased"])
    module = lora_fx.insert(model, (ids,), rank=2, include=include, exclude=exclude)
    want = {"head": "emb.weight@out.head.weight", "look": "emb.weight@emb.weight"}
    assert list(module.updates) == [want[left]]


def session(path: Path, ids: Tensor) -> Any:
    opened = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return opened.run(None, {opened.get_inputs()[0].name: ids.numpy()})[0]


@pytest.mark.parametrize("include", ["*", LOOKUP, HEAD])
@pytest.mark.parametrize("name", TIED)
def test_onnx(name: str, include: str, tmp_path: Path) -> None:
    """The merged export, and a merge into the exported base, are the module."""
    model, ids = built(TIED[name])
    module = adapted(model, ids, include)
    want = out(module, ids)
    lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    assert rel(session(tmp_path / "m.onnx", ids), want) < ORT_TOL
    lora_fx.export(model, tmp_path / "b.onnx", (ids,), provider="cpu")
    lora_fx.merge(tmp_path / "b.onnx", module.adapter(), tmp_path / "n.onnx")
    assert rel(session(tmp_path / "n.onnx", ids), want) < ORT_TOL


@pytest.mark.parametrize("include", ["*", HEAD])
def test_mode_switch(include: str, tmp_path: Path) -> None:
    model, ids = built(TIED["Called"])
    module = adapted(model, ids, include)
    lora_fx.export(module, tmp_path / "s.onnx", mode="switch", provider="cpu")
    opened = Session(tmp_path / "s.onnx", "cpu")
    opened.load("one", module.adapter())
    (got,) = opened.run({"ids": ids.numpy()}, "one").values()
    assert rel(got, out(module, ids)) < ORT_TOL


def test_a_file_without_the_head_by_its_name_is_refused(tmp_path: Path) -> None:
    """Another exporter's constant of the transposed head has a name that says nothing."""
    import onnx
    from onnx import numpy_helper

    model, ids = built(TIED["Raw"])
    lora_fx.export(model, tmp_path / "b.onnx", (ids,), provider="cpu")
    file = onnx.load(tmp_path / "b.onnx")
    w = model.w.detach().numpy()
    graph = file.graph
    turned = [n.output[0] for n in graph.node if n.op_type == "Transpose"]
    for node in graph.node:
        for i, read in enumerate(node.input):
            if read in turned and node.op_type in ("MatMul", "Gemm"):
                node.input[i] = "val_7"
    for node in [n for n in graph.node if n.op_type == "Transpose"]:
        graph.node.remove(node)
    del graph.initializer[:]
    graph.initializer.extend(
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(w.T.copy(), "val_7")]
    )
    del file.metadata_props[:]
    onnx.save(file, tmp_path / "o.onnx")
    adapter = adapted(model, ids, "*").adapter()
    with pytest.raises(LoraFxError, match="under this name the file has only the lookup"):
        lora_fx.merge(tmp_path / "o.onnx", adapter, tmp_path / "never.onnx")


@pytest.mark.parametrize("mode", ["kohya", "diffusers"])
def test_formats_that_name_modules_refuse_an_update_of_all_uses(mode: str, tmp_path: Path) -> None:
    model, ids = built(TIED["Aliased"])
    adapter = adapted(model, ids, "*").adapter()
    with pytest.raises(LoraFxError, match="several modules"):
        lora_fx.save_adapter(adapter, tmp_path / "x.safetensors", format=mode)


def test_twins_are_not_refused(tmp_path: Path) -> None:
    model, ids = built(Apart)
    module = adapted(model, ids, "*")
    assert list(module.updates) == ["emb.weight", "head.weight"]
    assert not any("one update for" in n for n in module.report().notes)
    save_file(model.state_dict(), tmp_path / "b.safetensors")
    lora_fx.merge(tmp_path / "b.safetensors", module.adapter(), tmp_path / "m.safetensors")
    fresh, _ = built(Apart, 7)
    fresh.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert rel(out(fresh, ids), out(module, ids)) < FOLD_TOL
    # one update of a tied table for one use, where the base is told to keep its two copies apart
    tied, ids = built(TIED["Aliased"])
    one = adapted(tied, ids, "emb@out.head.weight").adapter()
    base = stored(tied, every_name(tied), tmp_path / "t.safetensors")
    lora_fx.merge(base, one, tmp_path / "u.safetensors", untie=True)
    held = load_file(tmp_path / "u.safetensors")
    (delta,) = one.deltas().values()
    old = tied.emb.weight.detach().numpy()
    np.testing.assert_array_equal(held["emb.weight"].numpy(), old)
    assert rel(held["out.head.weight"].numpy(), old + delta) < FOLD_TOL


def test_an_old_file_keeps_its_meaning() -> None:
    """0.1 wrote the use beside the plain key."""
    model, ids = built(TIED["Aliased"])
    new = adapted(model, ids, HEAD).adapter().lowrank["emb.weight@out.head.weight"]
    old = lora_fx.Adapter({"emb.weight": new})
    assert new.use == "out.head.weight"
    module = lora_fx.insert(model, (ids,), adapter=old)
    assert list(module.updates) == ["emb.weight@out.head.weight"]
    (delta,) = values(module.updates).deltas().values()
    assert delta.shape == tuple(model.emb.weight.shape)
