"""adapter_model.bin: refused, or opened on request by an unpickler that runs no code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import read_tensors
from lora_fx.formats.io import load_adapter
from lora_fx.formats.peft import file as peft
from tests.formats.merging import same_entries

torch = pytest.importorskip("torch")
Write = Callable[..., Path]


def pickled(folder: Path, dtype: str = "float32") -> Path:
    """The folder's tensors as torch.save writes them."""
    tensors, _ = read_tensors(folder / peft.WEIGHTS)
    (folder / peft.WEIGHTS).unlink()
    state = {k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in tensors.items()}
    torch.save(state, folder / peft.PICKLED)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["", peft.PICKLED, peft.CONFIG])
def test_read_where_it_is_trusted(plain: Write, tmp_path: Path, dtype: str, name: str) -> None:
    folder = plain()
    want = load_adapter(folder)
    folder = pickled(folder, dtype)
    got = load_adapter(folder / name, trust=True)
    if dtype == "float32":
        same_entries(got, want)
    a, b = got.lowrank["m.fc.weight"].a, want.lowrank["m.fc.weight"].a
    assert a.dtype == np.float32 and np.abs(a - b).max() < 0.02
    for path in (folder, folder / peft.PICKLED):
        with pytest.raises(LoraFxError, match="a pickle"):
            load_adapter(path)


def test_safetensors_go_first(plain: Write, tmp_path: Path) -> None:
    folder = plain()
    (folder / peft.PICKLED).write_bytes(b"\x80\x02never read")
    assert len(load_adapter(folder, trust=True)) == 1


class Attack:
    """Runs a command where it is unpickled without care."""

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.system, ("touch attacked",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_does_not_run(
    plain: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = pickled(plain())
    state = {"base_model.model.m.fc.lora_A.weight": Attack()}
    torch.save(state, folder / peft.PICKLED, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(LoraFxError, match="refuses to read it as tensors only"):
        load_adapter(folder, trust=True)
    assert not (tmp_path / "attacked").exists()


def test_what_is_no_state_dict(plain: Write) -> None:
    folder = pickled(plain())
    for value, word in (([1, 2], "NoneType"), ({"x": 3}, "int at 'x'")):
        torch.save(value, folder / peft.PICKLED)
        with pytest.raises(LoraFxError, match=word):
            load_adapter(folder, trust=True)
    (folder / peft.PICKLED).write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(LoraFxError, match="tensors only"):
        load_adapter(folder, trust=True)


def test_torch_is_imported_for_pickles_only(plain: Write) -> None:
    folder = plain()
    code = (
        "import sys; from lora_fx.formats.io import load_adapter\n"
        f"load_adapter({str(folder)!r}, trust=True); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    shutil.rmtree(folder)
