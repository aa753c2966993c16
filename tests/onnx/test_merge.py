"""merge of .onnx files, judged by PEFT's own model and by numbers written by hand."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.cli import main
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.fx.module.execution import execution_of
from lora_fx.onnx import output_file
from lora_fx.onnx import save as saving
from lora_fx.onnx.session import open_session
from tests.zoo import checks


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base file beside the adapter that PEFT saved, and what PEFT's model says."""
    import peft

    folder = tmp_path_factory.mktemp("bert")
    subject = checks.built("hf_gpt2")
    lora_fx.export(subject.cap, folder / "base.onnx", provider="cpu")
    config = peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=["c_attn", "c_fc", "c_proj"], init_lora_weights=False,
        fan_in_fan_out=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about transformers' names
        tuned = peft.get_peft_model(copy.deepcopy(subject.model), config).eval()
        tuned.save_pretrained(folder / "adapter")
    feeds = execution_of(lora_fx.insert(subject.cap, rank=1)).sample((3, 7))
    with torch.no_grad():
        wanted = tuned(**{k: v for k, v in feeds.items() if isinstance(v, torch.Tensor)}).logits
    arrays = {k: v.numpy() for k, v in feeds.items() if isinstance(v, torch.Tensor)}
    np.savez(folder / "want.npz", wanted=wanted.numpy(), **arrays)
    return folder


def outputs(path: Path, folder: Path) -> tuple[Any, Any]:
    data = dict(np.load(folder / "want.npz"))
    wanted = data.pop("wanted")
    return open_session(path, "cpu").run(data)["logits"], wanted


def test_equals_pefts_model(bert: Path, tmp_path: Path) -> None:
    report = lora_fx.merge(bert / "base.onnx", bert / "adapter", tmp_path / "m.onnx")
    got, wanted = outputs(tmp_path / "m.onnx", bert)
    base, _ = outputs(bert / "base.onnx", bert)
    assert rel(base, wanted) > 0.05
    assert rel(got, wanted) < 2e-6
    assert len(report.details["tensors"]) == 8
    before, after = onnx.load(bert / "base.onnx"), onnx.load(tmp_path / "m.onnx")
    assert [n.op_type for n in before.graph.node] == [n.op_type for n in after.graph.node]
    assert before.graph.node == after.graph.node


def test_weights_and_several_adapters(bert: Path, tmp_path: Path) -> None:
    adapter = lora_fx.load_adapter(bert / "adapter")
    pairs = [(adapter, 0.25), (bert / "adapter", 0.75)]
    lora_fx.merge(bert / "base.onnx", pairs, tmp_path / "m.onnx")
    got, wanted = outputs(tmp_path / "m.onnx", bert)
    assert rel(got, wanted) < 2e-6
    lora_fx.merge(bert / "base.onnx", [(adapter, 0.5)], tmp_path / "half.onnx")
    assert rel(outputs(tmp_path / "half.onnx", bert)[0], wanted) > 1e-2


def test_the_same_adapter_twice_is_refused(bert: Path, tmp_path: Path) -> None:
    lora_fx.merge(bert / "base.onnx", bert / "adapter", tmp_path / "m.onnx")
    with pytest.raises(LoraFxError, match="already merged into it"):
        lora_fx.merge(tmp_path / "m.onnx", bert / "adapter", tmp_path / "m2.onnx")
    lora_fx.merge(tmp_path / "m.onnx", bert / "adapter", tmp_path / "m2.onnx", again=True)
    record = json.loads(
        {p.key: p.value for p in onnx.load(tmp_path / "m2.onnx").metadata_props}["lora_fx.merge"]
    )
    assert len(record) == 2


def test_large_weights_are_streamed_beside_the_file(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    report = lora_fx.merge(bert / "base.onnx", bert / "adapter", out, external_over=100)
    assert [Path(p).name for p in report.outputs] == ["m.onnx", "m.onnx.data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    got, wanted = outputs(out, bert)
    assert rel(got, wanted) < 2e-6
    (out).unlink()
    with pytest.raises(LoraFxError, match=r"m\.onnx\.data exists"):
        lora_fx.merge(bert / "base.onnx", bert / "adapter", out, external_over=100)


def test_what_the_proof_catches(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_fx.passes.fold as fold

    real = fold.fold_value
    monkeypatch.setattr(fold, "fold_value", lambda b, u: (real(b, u)[0] * np.float32(1.001), 1.0))
    with pytest.raises(LoraFxError, match=r"not written: tensor .* is wrong by"):
        lora_fx.merge(bert / "base.onnx", bert / "adapter", tmp_path / "m.onnx")
    monkeypatch.undo()
    save = saving.save

    def spoiled(model: Any, path: Path, **options: Any) -> Any:
        files = save(model, path, **options)
        proto = onnx.load(path)
        tensor = next(t for t in proto.graph.initializer if t.name == "transformer.wpe.weight")
        value = numpy_helper.to_array(tensor).copy()
        value[1, 2] += 1
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        path.write_bytes(proto.SerializeToString())
        return files

    monkeypatch.setattr(output_file, "save", spoiled)
    with pytest.raises(
        LoraFxError, match=r"tensor 'transformer\.wpe\.weight' differs from the base's"
    ):
        lora_fx.merge(bert / "base.onnx", bert / "adapter", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_refusals(bert: Path, tmp_path: Path) -> None:
    base, out = bert / "base.onnx", tmp_path / "m.onnx"
    adapter = lora_fx.load_adapter(bert / "adapter")
    key = next(iter(adapter.entries))
    low = adapter.entries[key]
    assert isinstance(low, LowRank)
    cases = [
        (Adapter({"nowhere.weight": low}), "is not a target of the model"),
        (Adapter({key: replace(low, a=low.a[:, 1:])}), "expected A"),
        (Adapter({key: replace(low, b=low.b * 0)}), "no element"),
    ]
    for bad, words in cases:
        with pytest.raises((LoraFxError, NoEffectError), match=words):
            lora_fx.merge(base, bad, out)
    with pytest.raises(LoraFxError, match=r"does not end in \.onnx"):
        lora_fx.merge(base, adapter, tmp_path / "m")
    with pytest.raises(LoraFxError, match="untie is an option for checkpoints"):
        lora_fx.merge(base, adapter, out, untie=True)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a net of convolutions and norms, plain.onnx and optimised.onnx."""
    folder = tmp_path_factory.mktemp("resnet")
    plain = folder / "plain.onnx"
    lora_fx.export(checks.built("timm_resnet18/1").cap, plain, provider="cpu")
    lora_fx.export(plain, folder / "optimised.onnx", optimise=True, provider="cpu")
    return folder


def test_convolutions_before_batch_norms(resnet: Path, tmp_path: Path) -> None:
    """The norm stays a node, and ONNX Runtime puts it into the weight that it finds."""
    module = checks.perturbed("timm_resnet18/1")
    lora_fx.merge(resnet / "plain.onnx", module.adapter(), tmp_path / "m.onnx")
    named = execution_of(module).sample((2, 5))
    with torch.no_grad():
        wanted = next(iter(execution_of(module.eval()).flat(named).values()))
    feeds = {k: v.numpy() for k, v in named.items()}
    got = next(iter(open_session(tmp_path / "m.onnx", "cpu").run(feeds).values()))
    base = next(iter(open_session(resnet / "plain.onnx", "cpu").run(feeds).values()))
    assert rel(base, wanted) > 0.05
    assert rel(got, wanted) < 5e-6
    stages = {"Conv", "BatchNormalization"}
    assert stages <= {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}


@pytest.mark.parametrize("marked", [True, False])
def test_a_weight_with_a_norm_folded_into_it_is_refused(
    resnet: Path, marked: bool, tmp_path: Path
) -> None:
    """onnxscript keeps the convolution's name, and the adapter would be merged wrongly."""
    shutil.copy(resnet / "optimised.onnx", tmp_path / "base.onnx")
    adapter = checks.perturbed("timm_resnet18/1").adapter()
    if not marked:  # a file that this version did not write
        proto = onnx.load(tmp_path / "base.onnx")
        for tensor in proto.graph.initializer:
            del tensor.metadata_props[:]
        for value in proto.graph.value_info:
            del value.metadata_props[:]
        onnx.save(proto, tmp_path / "base.onnx")
    with pytest.raises(LoraFxError, match="normalisation folded into it") as error:
        lora_fx.merge(tmp_path / "base.onnx", adapter, tmp_path / "m.onnx")
    assert "export" in error.value.hint
    assert not (tmp_path / "m.onnx").exists()


def test_a_map_names_what_the_names_do_not_tell(bert: Path, tmp_path: Path) -> None:
    proto = onnx.load(bert / "base.onnx")
    names = {}
    for i, tensor in enumerate(t for t in proto.graph.initializer if len(t.dims) == 2):
        names[tensor.name] = f"onnx::MatMul_{i}"
        for node in proto.graph.node:
            node.input[:] = [names[tensor.name] if n == tensor.name else n for n in node.input]
        tensor.name = names[tensor.name]
        del tensor.metadata_props[:]
    onnx.save(proto, tmp_path / "base.onnx")
    with pytest.raises(LoraFxError, match="is no target"):
        lora_fx.merge(tmp_path / "base.onnx", bert / "adapter", tmp_path / "m.onnx")
    wanted = lora_fx.load_adapter(bert / "adapter").entries
    given = {k: names[k] for k in wanted}
    (tmp_path / "map.json").write_text(json.dumps(given))
    command = ["merge", str(tmp_path / "base.onnx"), str(bert / "adapter")]
    command += ["-o", str(tmp_path / "m.onnx"), "--names", str(tmp_path / "map.json")]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert not stop.value.code
    got, right = outputs(tmp_path / "m.onnx", bert)
    assert rel(got, right) < 2e-6


def test_neither_merge_nor_targets_import_torch(bert: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from lora_fx.cli import main\n"
        "for a in (['targets', sys.argv[1]], ['merge', *sys.argv[1:3], '-o', sys.argv[3]]):\n"
        "    try: main(a)\n"
        "    except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    files = [str(bert / "base.onnx"), str(bert / "adapter"), str(tmp_path / "m.onnx")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, capture_output=True)
    assert (tmp_path / "m.onnx").is_file()
