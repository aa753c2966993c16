"""Every mode on twelve families of models, on a GPU: its numbers are those of the CPU.

The export proves its file on the GPU, at three sizes and within the gates of any export. Then the
file runs on both, at a size that no proof had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

import lora_fx
from lora_fx import AdaptedModule
from lora_fx.compare import rel
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.execution import execution_of
from lora_fx.onnx import Session
from lora_fx.onnx.session import open_session
from lora_fx.passes.proofs.proof_inputs import arrays_of
from tests.providers import GPU, ON_GPU
from tests.zoo import checks
from tests.zoo.test_zoo import BY_ROW

pytestmark = ON_GPU
FAMILIES = (
    "hf_bert/1", "hf_gpt2/1", "hf_llama/1", "hf_t5", "hf_vit", "hf_whisper", "hf_mixtral",
    "transformer_encoder/1", "tv_resnet18/1", "lstm", "tied_head", "moe_top_k",
)  # fmt: skip
MODES = ("merged", "switch", "load", "batch")
Named = Mapping[str, Array]


def runs(
    mode: str, path: Path, module: AdaptedModule, feeds: Named, provider: str
) -> Iterator[Named]:
    """The outputs of a file: of what its mode chooses, first the base where it has one."""
    if mode == "merged":
        yield open_session(path, provider).run(feeds)
    elif mode == "load":
        yield open_session(path, provider).run(feeds)
        yield Session(path, provider, adapter=module.adapter()).run(feeds)
    elif mode == "switch":
        session = Session(path, provider)
        session.load("one", module.adapter())
        for chosen in (None, "one", {"one": 0.5}, None):
            yield session.run(feeds, adapter=chosen)
    else:
        session = open_session(path, provider)
        for ids in ([0, 0, 0], [1, 1, 1], [1, 0, 1]):
            yield session.run({**feeds, "adapter_ids": np.array(ids)})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_it_computes_on_the_cpu(
    name: str, mode: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    module = checks.perturbed(name)
    if mode == "batch" and name in BY_ROW:
        with pytest.raises(LoraFxError, match=BY_ROW[name]):
            lora_fx.export(module, path, mode=mode, provider=GPU)
        return
    report = lora_fx.export(module, path, mode=mode, provider=GPU)
    assert report and report.details["provider"] == GPU

    feeds = arrays_of(execution_of(module).sample((3, 4)))
    on_cpu = list(runs(mode, path, module, feeds, "cpu"))
    on_gpu = list(runs(mode, path, module, feeds, GPU))
    for expected, found in zip(on_cpu, on_gpu, strict=True):
        for output, values in expected.items():
            # Each side may be a gate away from the model.
            assert rel(found[output], values) <= 2 * max(p.tol for p in report.parity)
    for other in on_gpu[1:2]:
        assert max(rel(other[output], values) for output, values in on_gpu[0].items()) > 0.01
