"""Any adapter that PEFT saved for a base works on every export of that base, judged by PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx.compare import rel
from lora_fx.onnx import Session
from lora_fx.onnx.session import open_session
from tests.onnx.decoders import gpt2, llama
from tests.onnx.test_batch import bert

TOL = 1e-5
IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(3))
LAYERS = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
}


def built(name: str) -> torch.nn.Module:
    kinds = {"bert": lambda: bert()[0], "gpt2": gpt2, "llama": llama}
    model = bert(layers=1)[0] if "one" in name else kinds[name]()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.eval()


def outputs(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS)[0].numpy()


def trained(name: str, folder: Path, seed: int) -> Any:
    """PEFT's own model, its adapter saved."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=3 + seed, lora_alpha=5, target_modules=LAYERS[name.split()[0]], init_lora_weights=False,
        use_rslora=seed == 2, fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about transformers' names
        model = peft.get_peft_model(copy.deepcopy(built(name)), config).eval()
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.data.mul_(0.8 if "bert" in name else 0.3)
        model.save_pretrained(folder)
    return outputs(model)


@pytest.mark.parametrize(
    "name",
    ["bert of one layer", *(pytest.param(n, marks=pytest.mark.slow) for n in LAYERS)],
)
def test_every_export_takes_pefts_adapters(name: str, tmp_path: Path) -> None:
    model, base = built(name), tmp_path / "base.onnx"
    cap = lora_fx.capture(model, (IDS,))
    lora_fx.export(cap, base, provider="cpu")
    wanted = {n: trained(name, tmp_path / n, s) for s, n in ((1, "one"), (2, "two"))}
    plain = outputs(model)
    assert all(rel(w, plain) > 0.05 for w in wanted.values())
    feeds = {open_session(base, "cpu").input_names[0]: IDS.numpy()}
    adapters = {n: lora_fx.load_adapter(tmp_path / n) for n in wanted}

    def first(found: Any) -> Any:
        return next(iter(found.values()))

    for source, given in (("torch", cap), ("file", base)):
        options: dict[str, Any] = {"adapters": adapters, "provider": "cpu", "force": True}
        files = {m: tmp_path / f"{source}-{m}.onnx" for m in ("switch", "load", "batch")}
        for mode, path in files.items():
            lora_fx.export(given, path, mode=mode, **options)
        session = Session(files["switch"], "cpu")
        rows = first(
            open_session(files["batch"], "cpu").run({**feeds, "adapter_ids": np.array([2, 0, 1])})
        )
        assert rel(rows[1], plain[1]) < TOL
        for i, (n, want) in enumerate(wanted.items(), 1):
            session.load(n, tmp_path / n)  # PEFT's folder itself
            assert rel(first(session.run(feeds, n)), want) < TOL
            loaded = Session(files["load"], "cpu", adapter=tmp_path / n)
            assert rel(first(loaded.run(feeds)), want) < TOL
            row = {2: 0, 1: 2}[i]
            assert rel(rows[row], want[row]) < TOL
            each = source == "torch" and "one" in name  # an option an adapter; the slow take all
            for optimise in (n == "one",) if each else (False, True):
                merged = tmp_path / "merged.onnx"
                lora_fx.export(
                    given, merged, adapters=adapters[n], optimise=optimise,
                    provider="cpu", force=True,
                )  # fmt: skip
                assert rel(first(open_session(merged, "cpu").run(feeds)), want) < TOL


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_optimised_decoders_with_a_cache_survive(name: str, tmp_path: Path) -> None:
    from lora_fx.fx.capture.decoder import decoder
    from tests.onnx.test_decoder import adapter
    from tests.onnx.test_survive import fused, kinds

    cap = decoder({"gpt2": gpt2, "llama": llama}[name]())
    given = {"base": None, "all": adapter(cap, 1, 3)}
    few = {k: u for k, u in given["all"].entries.items() if "attn" in k}
    given["few"] = lora_fx.Adapter(few)
    counts = {}
    for which, one in given.items():
        path = tmp_path / f"{which}.onnx"
        report = lora_fx.export(cap, path, adapters=one, provider="cpu", optimise=True, cache=True)
        runs = [p for p in report.parity if p.of == "onnxruntime"]
        assert len(runs) == 5 and max(p.rel for p in runs) <= TOL
        assert any(p.sizes["input_ids"][1] == 1 for p in runs)  # a step of one token
        assert not [s for s in report.details["stages"] if not s["kept"]]
        counts[which] = kinds(fused(path))
    assert counts["base"].total() > 0
    assert counts["few"] >= counts["base"] and counts["all"] >= counts["base"]
