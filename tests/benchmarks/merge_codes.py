"""lora-fx merge into quantised checkpoints, against a merge of floats that writes as many bytes.

    python -m tests.benchmarks.merge_codes [--rounds 5] [--folder /dev/shm] [--requantise]

Eight weights of 4096 × 4096 in 3 shards, rank 16 on all of them, codes at random; the floats are
bf16. The first command is the float merge, the second the same again, as control.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_fx import Adapter, LowRank, save_adapter
from lora_fx.onnx.timing import interleave
from tests.benchmarks.interleave import processor, rows, run
from tests.benchmarks.kept import add_keep, report
from tests.checkpoint.made import Array, checkpoint

SIDE, LAYERS = 4096, 8
MODULES = [f"model.layers.{i}.mlp.up_proj" for i in range(LAYERS)]
SAID: dict[str, dict[str, Any]] = {
    "bf16": {},
    "FP8 in blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "NVFP4": {"quant_method": "modelopt"},
    "nf4, nested": {"quant_method": "bitsandbytes"},
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "AWQ": {"quant_method": "awq", "version": "gemm"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
}


def parts(kind: str, rng: np.random.Generator) -> dict[str, Array]:
    """The tensors of one module, by their last names."""
    groups = SIDE // 128

    def words(*shape: int) -> Array:
        return rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)

    def scales(*shape: int, dtype: Any = np.float16) -> Array:
        return (rng.random(shape) / 100 + 0.001).astype(dtype)

    if kind in ("bf16", "FP8 in blocks"):
        w = rng.standard_normal((SIDE, SIDE), np.float32)
        if kind == "bf16":
            return {"weight": (w * 0.02).astype(ml_dtypes.bfloat16)}
        blocks = scales(SIDE // 128, SIDE // 128, dtype=np.float32)
        narrow = np.clip(w * 90, -440, 440).astype(ml_dtypes.float8_e4m3fn)
        return {"weight": narrow, "weight_scale_inv": blocks}
    if kind == "NVFP4":
        fine = (rng.random((SIDE, SIDE // 16)) * 100 + 1).astype(ml_dtypes.float8_e4m3fn)
        codes = rng.integers(0, 256, (SIDE, SIDE // 2), dtype=np.uint8)
        return {"weight": codes, "weight_scale": fine, "weight_scale_2": np.array(1e-4, "f4")}
    if kind == "nf4, nested":
        blocks_ = SIDE * SIDE // 64
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [SIDE, SIDE],
                 "nested_blocksize": 256, "nested_offset": 0.02}  # fmt: skip
        return {
            "weight": rng.integers(0, 256, (SIDE * SIDE // 2, 1), dtype=np.uint8),
            "weight.absmax": rng.integers(0, 256, blocks_, dtype=np.uint8),
            "weight.nested_absmax": rng.random(blocks_ // 256).astype(np.float32) / 100,
            "weight.nested_quant_map": np.linspace(-1, 1, 256).astype(np.float32),
            "weight.quant_state.bitsandbytes__nf4": np.frombuffer(
                json.dumps(state).encode(), np.uint8
            ),
        }
    if kind == "compressed-tensors":
        return {
            "weight_packed": words(SIDE, SIDE // 8),
            "weight_scale": scales(SIDE, groups, dtype=ml_dtypes.bfloat16),
            "weight_shape": np.array([SIDE, SIDE], np.int64),
        }
    zeros = np.full((groups, SIDE // 8), 0x77777777, np.int64).astype(np.int32)
    rest = {"qzeros": zeros, "scales": scales(groups, SIDE)}
    if kind == "AWQ":
        return {"qweight": words(SIDE, SIDE // 8), **rest}
    order = (np.arange(SIDE) // 128).astype(np.int32)
    return {"qweight": words(SIDE // 8, SIDE), **rest, "g_idx": order}


def main() -> None:
    """Make the inputs, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--requantise", action="store_true")
    add_keep(parser)
    options = parser.parse_args()
    way = ["--requantise", "--lossy"] if options.requantise else ["--dequantise"]
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        root = Path(scratch)
        rng, out = np.random.default_rng(0), str(root / "out")
        entries = {
            f"{m}.weight": LowRank(
                rng.standard_normal((16, SIDE), np.float32) / 64,
                rng.standard_normal((SIDE, 16), np.float32) * np.float32(0.02),
                24.0,
            )
            for m in MODULES
        }
        save_adapter(Adapter(entries), root / "adapter")
        merge = [sys.executable, "-m", "lora_fx.cli", "-q", "merge"]
        commands = {}
        for i, (kind, said) in enumerate(SAID.items()):
            tensors = {f"{m}.{n}": a for m in MODULES for n, a in parts(kind, rng).items()}
            config: dict[str, Any] = {"model_type": "llama", "torch_dtype": "bfloat16"}
            config |= {"quantization_config": said} if said else {}
            checkpoint(root / f"base{i}", tensors, 3, config=config)
            tensors.clear()  # what this process holds would count as a command's peak
            argv = [*merge, str(root / f"base{i}"), str(root / "adapter"), "-o", out]
            commands[kind] = partial(run, [*argv, *way] if said else argv)
            if not said:
                commands["bf16, again"] = commands[kind]
        print(f"{processor()}; {options.folder}; {' '.join(way)}")
        found = interleave(
            commands, options.rounds, before=lambda: shutil.rmtree(out, ignore_errors=True)
        )
        what = f"{' '.join(way)}: whole commands, seconds"
        report("merge_codes", what, rows(found), options.keep)


if __name__ == "__main__":
    main()
