"""Bases and adapters that are pickles: read by every command that takes one, where trusted."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.files.read import trusting
from lora_fx.fx.tensors import from_numpy, to_numpy
from tests.checkpoint.made import Array, adapter, checkpoint, factors, read
from tests.checkpoint.refused_bases import CONFIG, DOWN, Q
from tests.cli.test_cli import run

RNG = np.random.default_rng(3)
HALF = to_numpy(torch.randn(8, 6, generator=torch.manual_seed(0)).bfloat16())
TENSORS: dict[str, Array] = {
    "model.embed_tokens.weight": RNG.standard_normal((20, 6)).astype(np.float32),
    f"{Q}.weight": HALF,
    f"{DOWN}.weight": RNG.standard_normal((6, 8)).astype(np.float32),
    "model.norm.weight": np.ones(6, np.float16),
    "model.ids": np.arange(5),
    "model.scalar": np.array(2.5, np.float32),
}
INDEX = "pytorch_model.bin.index.json"


def state() -> dict[str, torch.Tensor]:
    """The tensors; one is a part of a larger storage, one a Parameter."""
    made = {n: from_numpy(v) for n, v in TENSORS.items()}
    wide = torch.cat([torch.zeros(2, 8), made[f"{DOWN}.weight"]])
    return made | {
        f"{DOWN}.weight": wide[2:],
        "model.norm.weight": torch.nn.Parameter(made["model.norm.weight"]),
    }


def pickles(folder: Path, shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save({}, folder / "training_args.bin")  # what lies beside weights
    made = state()
    if shards == 1:
        torch.save(made, folder / "pytorch_model.bin")
        return folder
    names = list(made)
    home: dict[str, str] = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save({n: made[n] for n in names[i::shards]}, folder / file)
        home |= dict.fromkeys(names[i::shards], file)
    (folder / INDEX).write_text(json.dumps({"weight_map": home}))
    return folder


def pair(folder: Path) -> tuple[Path, Path, Array]:
    """An adapter, the same pickled, and W + s·BA of Q in fp64."""
    a, b = factors(np.random.default_rng(1), 8, 6, 2)
    plain = adapter(folder / "plain", {Q: (a, b)})
    held = {n: torch.from_numpy(v) for n, v in read(plain).items()}
    (folder / "pickled").mkdir()
    torch.save(held, folder / "pickled" / "adapter_model.bin")
    config = (plain / "adapter_config.json").read_text()
    (folder / "pickled" / "adapter_config.json").write_text(config)
    want = HALF.astype(np.float64) + 2 * b.astype(np.float64) @ a.astype(np.float64)
    return plain, folder / "pickled", want


@pytest.mark.parametrize("shards", [1, 2])
def test_merge_and_verify(shards: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output is what the same base as safetensors gives, as safetensors; and nothing else."""
    base = pickles(tmp_path / "base", shards)
    plain, pickled, want = pair(tmp_path)
    checkpoint(tmp_path / "same", TENSORS, shards, config=CONFIG)
    lora_fx.merge(tmp_path / "same", plain, tmp_path / "wanted")
    out = tmp_path / "out"
    code, _, err = run(capsys, "merge", str(base), str(pickled), "-o", str(out), "--trust")
    assert code == 0 and "its weights are pickles; the output's weights are safetensors" in err
    found = read(out)
    for name, value in read(tmp_path / "wanted").items():
        assert found[name].dtype == value.dtype and np.array_equal(found[name], value), name
    step = np.abs(want).max() * 2.0**-8
    assert set(found) == set(TENSORS)
    assert np.abs(found[f"{Q}.weight"].astype(float) - want).max() <= step
    assert json.loads((out / "config.json").read_text()) == CONFIG
    names = {p.name for p in out.iterdir()} - {"config.json", "report.json", "lora_fx.json"}
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    assert names == ({"model.safetensors"} if shards == 1 else {*files, index})
    given = ("verify", str(out), str(base), "--adapter", str(pickled), "--trust")
    assert run(capsys, *given)[0] == 0
    assert lora_fx.verify(out, base, adapter=pickled, trust=True)
    assert lora_fx.verify(base, tmp_path / "same", trust=True)
    assert not lora_fx.verify(out, base, trust=True)


def test_a_file(tmp_path: Path) -> None:
    base = pickles(tmp_path / "base") / "pytorch_model.bin"
    plain, _, want = pair(tmp_path)
    with pytest.raises(LoraFxError, match="lora-fx does not write pickles"):
        lora_fx.merge(base, plain, tmp_path / "out.bin", trust=True)
    lora_fx.merge(base, plain, tmp_path / "out.safetensors", trust=True)
    found = read(tmp_path / "out.safetensors")[f"{Q}.weight"]
    assert np.abs(found.astype(float) - want).max() <= np.abs(want).max() * 2.0**-8


COMMANDS: dict[str, tuple[str, ...]] = {
    "doctor": ("doctor", "base", "pickled"),
    "doctor of a pickled adapter": ("doctor", "same", "pickled"),
    "doctor of a pickled base": ("doctor", "base", "plain"),
    "verify, does it fit": ("verify", "base", "pickled"),
    "verify, equal": ("verify", "base", "same"),
    "convert": ("convert", "pickled", "-o", "x", "--base", "base"),
    "convert of an adapter without a base": ("convert", "pickled", "-o", "x.onnx_adapter"),
    "truncate": ("truncate", "pickled", "-o", "x", "--rank", "1"),
    "merge": ("merge", "base", "plain", "-o", "x"),
    "merge-all": ("merge-all", "base", "pickled", "plain", "-o", "x"),
    "extract": ("extract", "base", "tuned", "-o", "x"),
    "targets of a file": ("targets", "base/pytorch_model.bin"),
}


SLOW = ("merge-all",)
"""Merges in a process of its own."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in COMMANDS]
)
def test_every_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with the option to give, which then works; the same over the Python interface."""
    pickles(tmp_path / "base")
    checkpoint(tmp_path / "same", TENSORS, config=CONFIG)
    plain, _, _ = pair(tmp_path)
    lora_fx.merge(tmp_path / "same", plain, tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *COMMANDS[name])
    if name != "merge-all":
        assert code == 2 and "pickle" in err and "Hint: pass --trust" in err, err
    assert code and not Path("x").exists(), out
    code, out, err = run(capsys, *COMMANDS[name], "--trust")
    assert code == 0, err
    if COMMANDS[name][0] in ("convert", "extract", "truncate"):
        (made,) = (Path(n) for n in ("x", "x.onnx_adapter") if Path(n).exists())
        assert f"{Q}.weight" in lora_fx.load_adapter(made).entries


def test_the_python_interface(tmp_path: Path) -> None:
    base = pickles(tmp_path / "base")
    plain, pickled, _ = pair(tmp_path)
    checkpoint(tmp_path / "same", TENSORS, config=CONFIG)
    lora_fx.merge(tmp_path / "same", plain, tmp_path / "tuned")
    for call in (
        lambda trust: lora_fx.doctor(base, pickled, trust=trust),
        lambda trust: lora_fx.verify(base, pickled, trust=trust),
        lambda trust: lora_fx.extract(base, tmp_path / "tuned", trust=trust),
        lambda trust: lora_fx.load_adapter(pickled, trust, base=base),
    ):
        with pytest.raises(LoraFxError, match="pickle"):
            call(False)
        assert call(True)
    with pytest.raises(LoraFxError, match="pickle"):  # trust ends with the call
        lora_fx.load_adapter(pickled)


class Attack:
    """Runs a command where it is unpickled without care."""

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.system, ("touch attacked",)


def transposed(file: Path) -> None:
    torch.save({"w": torch.ones(2, 3).t()}, file)


def negative(file: Path) -> None:
    torch.save({"w": torch._neg_view(torch.ones(2, 3))}, file)


def sparse(file: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, file)


def legacy(file: Path) -> None:
    torch.save({"w": torch.ones(2, 3)}, file, _use_new_zipfile_serialization=False)


def compressed(file: Path) -> None:
    torch.save({"w": torch.ones(2, 3)}, file)
    with zipfile.ZipFile(file) as old:
        parts = {n: old.read(n) for n in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in parts.items():
            new.writestr(name, data)


def foreign(file: Path) -> None:
    """Bytes the other way round: torch turns them as it reads, plain reads would not."""
    torch.save({"w": torch.ones(2, 3)}, file)
    with zipfile.ZipFile(file) as old:
        parts = {n: old.read(n) for n in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, data in parts.items():
            new.writestr(name, b"big" if name.endswith("byteorder") else data)


def shorter(file: Path) -> None:
    """A record of fewer bytes than its storage is said to have."""
    torch.save({"w": torch.ones(2, 3), "v": torch.ones(9)}, file)
    with zipfile.ZipFile(file) as old:
        parts = {n: old.read(n) for n in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, data in parts.items():
            new.writestr(name, data[:8] if name.endswith("data/0") else data)


class Made:
    """A tensor of any offset, size and stride, as no torch.save writes it."""

    def __init__(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.sizes = offset, size, stride

    def __reduce__(self) -> tuple[object, ...]:
        storage = torch.arange(12.0)._typed_storage()
        made = torch._utils._rebuild_tensor_v2
        return made, (storage, *self.sizes, False, OrderedDict())


def made(offset: int, *size: int) -> Any:
    stride = tuple(int(np.prod([max(n, 1) for n in size[i + 1 :]])) for i in range(len(size)))
    return put({"w": Made(offset, size, stride)})


def put(value: Any) -> Any:
    return lambda file: torch.save(value, file)


HOSTILE = {
    "code": (put({"w": Attack()}), "refuses to read it as tensors only"),
    "no tensors": (put({"w": 3}), "holds an int at 'w'"),
    "a trainer's": (put({"state_dict": {"w": torch.ones(2)}}), "holds a dict at 'state_dict'"),
    "complex": (put({"w": torch.ones(2, 2, dtype=torch.complex128)}), "'w' has dtype complex128"),
    "transposed": (transposed, "'w' is not stored row by row"),
    "negative by a bit": (negative, "'w' is not stored row by row"),
    "sparse": (sparse, "'w' is not stored row by row"),
    "legacy": (legacy, "'w' is not stored row by row"),
    "compressed": (compressed, "'w' is not stored row by row"),
    "big-endian": (foreign, "'w' is not stored row by row"),
    "beyond its storage": (made(10, 3, 4), "'w' is not stored row by row"),
    "before its storage": (made(-4, 3, 4), "tensors only"),
    "huge": (made(0, 2**40, 4), "'w' is not stored row by row"),
    "huge and empty": (made(0, 2**61, 0), "'w' is not stored row by row"),
    "a record cut off": (shorter, "'w' is not stored row by row"),
    "cut off": (lambda file: file.write_bytes(b"PK\x03\x04 cut"), "tensors only"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, text = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "pytorch_model.bin")
    with trusting(), pytest.raises(LoraFxError, match=r"pytorch_model\.bin") as refused:
        open_checkpoint(tmp_path)
    assert text in refused.value.message and refused.value.hint
    assert not Path("attacked").exists()


def test_safetensors_go_first(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base", TENSORS, config=CONFIG)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02never read")
    with trusting():
        assert set(open_checkpoint(folder).tensors) == set(TENSORS)
