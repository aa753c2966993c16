"""Every sample runs, with warnings as errors, and prints what it promises."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from sources import fashion, smollm2_file

from lora_fx.errors import LoraFxError
from tests.fx.train.loops import fresh_accelerator

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
PRINTS = {
    "mlp": "export: ok",
    "raw_matmul": "folded and unfolded differ by",
    "decode": "tokens equal those of transformers: True\ntokens equal the base model's: False",
    "accelerate_loop": "the resumed run gives the same adapter: True",
    "fabric_loop": "the resumed run gives the same adapter: True",
    "torchrun_loop": "the resumed run gives the same adapter: True",
    "hf_trainer": "the resumed run gives the same adapter: True",
    "from_scratch": "2 sites found, inserted and folded",
}
SLOW = {"minilm_stdlib": "equal"}
BESIDE_PEFT = {"efficientnet_fashion": fashion, "smollm2_text": smollm2_file}
"""Samples on real weights, and what finds the data or weights that no extra installs."""
NOTHING_MISSING = {"efficientnet_fashion": ["--digits"], "t5_pairs": []}
"""Samples that always run, and the options with which they do."""
QUANTISED = {"quantised_vit": None, "qlora_smollm2": smollm2_file}
"""Samples over codes, and what finds the weights of one."""
OTHERS = {"trl_sft_dpo": ("trl", "PEFT gives the same logits, which DPO has changed: True")}
"""Samples that need a library which no extra installs, and what they print."""
DOMAINS = {
    "detector_rtdetr": "scipy",
    "segmenter_sam2": "transformers",
    "protein_esm2": "transformers",
    "series_timesfm": "transformers",
    "graph_gat": "torch_geometric",
    "diffusion_flux": "diffusers",
}
"""Samples of the extra `domains`, and the library that each needs."""
IN_PROCESSES = ("llama_processes",)
"""Samples that take a way to run; tests/fx/train/test_llama_processes.py runs them."""
SHARED = ("beside_peft", "domains", "greedy", "greedy_pairs", "sources")
"""What samples import of each other; no program."""


def test_every_sample_is_listed() -> None:
    assert {p.stem for p in SAMPLES.glob("*.py")} == {
        *PRINTS,
        *SLOW,
        *BESIDE_PEFT,
        *NOTHING_MISSING,
        *QUANTISED,
        *OTHERS,
        *DOMAINS,
        *IN_PROCESSES,
        *SHARED,
    }


LONG = {"decode", "hf_trainer", "torchrun_loop"}  # half a minute
HERE = ("accelerate_loop", "fabric_loop", "mlp", "raw_matmul")
"""Samples that run in this process: a process of its own imports torch again."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in PRINTS if n not in HERE],
)
def test_sample(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert PRINTS[name] in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures(fresh_accelerator.__name__)
@pytest.mark.parametrize("name", HERE)
def test_sample_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(SAMPLES / f"{name}.py"), run_name="__main__")
    assert PRINTS[name] in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_sample_on_real_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SAMPLES / "minilm_stdlib.py"), "--quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    equal = re.search(r"predict equal classes for (\d+) of (\d+)", done.stdout)
    assert equal and equal[1] == equal[2], done.stdout
    assert int(equal[2]) > 100  # how many there are depends on the standard library


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_sample_of_another_library(name: str, tmp_path: Path) -> None:
    library, promise = OTHERS[name]
    pytest.importorskip(library)
    done = subprocess.run(
        [sys.executable, str(SAMPLES / f"{name}.py")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert promise in done.stdout
    before, after = re.findall(r"SFT: loss (\S+) → (\S+)", done.stdout)[0]
    assert float(after) < 0.1 * float(before), done.stdout
    first, last = re.findall(r"margin of the rewards (\S+) → (\S+)", done.stdout)[0]
    assert abs(float(first)) < 1e-3 and float(last) > 1, done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", DOMAINS)
def test_the_sample_of_a_domain(name: str, tmp_path: Path) -> None:
    pytest.importorskip(DOMAINS[name])
    done = subprocess.run(
        [sys.executable, str(SAMPLES / f"{name}.py")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stdout
    before, after = re.findall(r"20 steps: loss (\S+) → (\S+)", done.stdout)[0]
    assert float(after) < 0.6 * float(before), done.stdout
    assert "saved and loaded again: True" in done.stdout
    merged = "refused: " if name == "diffusion_flux" else "ok, fold within"  # over codes
    assert f"merged: {merged}" in done.stdout
    assert "switch: ok, base within" in done.stdout
    assert not list(tmp_path.iterdir())


def beside_peft(name: str, tmp_path: Path, *options: str) -> None:
    """The losses, the trained models' predictions and ONNX Runtime's, as the sample says them."""
    done = subprocess.run(
        [sys.executable, str(SAMPLES / f"{name}.py"), "--quick", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    gap = re.search(r"differ by (\S+) or less in \d+ steps, by (\S+) or less in all", done.stdout)
    assert gap and max(map(float, gap.groups())) < 1e-4, done.stdout
    moved = re.search(r"(\d+) predictions changed, (\d+) differ from PEFT's", done.stdout)
    assert moved and int(moved[1]) > 3 >= int(moved[2]), done.stdout
    assert "export: ok" in done.stdout
    equal = re.search(r"ONNX Runtime and torch predict equal .* for (\d+) of (\d+)", done.stdout)
    assert equal and equal[1] == equal[2], done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTHING_MISSING)
def test_the_sample_from_the_extras_alone(name: str, tmp_path: Path) -> None:
    beside_peft(name, tmp_path, *NOTHING_MISSING[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", BESIDE_PEFT)
def test_the_sample_beside_peft(name: str, tmp_path: Path) -> None:
    try:
        BESIDE_PEFT[name]()
    except LoraFxError as e:
        pytest.skip(str(e))
    beside_peft(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTISED)
def test_the_sample_over_codes(name: str, tmp_path: Path) -> None:
    try:
        if found := QUANTISED[name]:
            found()
    except LoraFxError as e:
        pytest.skip(str(e))
    done = subprocess.run(
        [sys.executable, str(SAMPLES / f"{name}.py"), "--quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    weights = re.search(r"weights: ([\d,]+) bytes as floats, ([\d,]+) as", done.stdout)
    assert weights, done.stdout
    floats, codes = (int(w.replace(",", "")) for w in weights.groups())
    assert 0.14 < codes / floats < 0.16
    equal = re.findall(r"(?:classes|torch predicts the same) for (\d+) of (\d+)", done.stdout)
    assert equal and all(int(same) > 0.98 * int(every) for same, every in equal), done.stdout
    steps = [row.split() for row in re.findall(r"^ +\d+ .*$", done.stdout, re.M)]
    if find_spec("bitsandbytes") and steps:
        assert all(abs(float(ours) - float(peft)) < 1e-4 for _, ours, _, peft in steps), done.stdout
    assert not list(tmp_path.iterdir())
