"""Every promise on models whose every parameter and norm statistic was redrawn.

The fast ones run by default, but for some that are put together like others of them; ``pytest
tests/zoo -m "slow or not slow"`` runs all.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lora_fx
from lora_fx.compare import FOLD_TOL, ORT_TOL
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.tensors import has_values
from tests.fx.capture.test_repeat import rows
from tests.providers import PROVIDERS
from tests.zoo import checks, flops
from tests.zoo.models import ZOO

LIKE_OTHERS = {
    "hf_bert", "hf_t5", "hf_deberta_v2", "hf_vit", "hf_whisper", "timm_resnet18", "timm_mixer",
    "tv_vit",
}  # fmt: skip
NAMES = {
    e: pytest.param(name, marks=[pytest.mark.slow] * (not e.fast or name in LIKE_OTHERS))
    for name, e in ZOO.items()
}
CAPTURED = [p for e, p in NAMES.items() if e.captures]
TRAINED = [p for e, p in NAMES.items() if e.captures and e.trains]
DRAWN = "hf_visual_question"  # a run of it is captured, not its path, which random numbers decide
REFUSED = [p for e, p in NAMES.items() if not e.captures and e.name != DRAWN]


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    """The fused inference path of nn.MultiheadAttention rounds otherwise; the graph has none."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CAPTURED)
def test_blocks_that_repeat_are_as_the_long_way(name: str, training: bool) -> None:
    """Graphs, conditions, pinned sizes, notes and the form of the outputs."""
    s, found = checks.built(name), list[object]()
    for repeat in (True, False):
        cap = Captured(s.model, s.args, s.kwargs, repeat=repeat)
        traced = cap.traced(training, cap.named)
        for node in traced.graph.find_nodes(op="get_attr"):
            if "lifted_tensor" in str(node.target):  # a copy has the constant of its pattern
                constant = traced.constants[str(node.target)]
                node.target = f"{constant.tolist()}" if has_values(constant) else ""
        door = sorted(map(str, traced.door.conditions)), sorted(map(str, traced.doubtful))
        said = traced.pinned, traced.cuts, traced.left_out, traced.own_gradients, traced.modeless
        found.append((rows(traced.graph), door, said, cap.notes, str(traced.out_spec)))
    assert found[0] == found[1]


ROUNDED = {"hf_masked_image"}
"""transformers adds a mask that masks nothing to a bias where it is traced, and not elsewhere:
attention has another kernel then."""


@pytest.mark.parametrize("name", CAPTURED)
def test_zero_b_changes_nothing_in_both_modes(name: str) -> None:
    """To the bit, but for a GELU in many steps, which train programs compute in one.

    Statistics of two rows of one pixel make ±1 of all numbers, so that no gradient passes there.
    """
    equal = checks.near if name in ROUNDED else checks.same
    s = checks.built(name)
    module = checks.adapted(name, norm_stats="update", dead="allow")
    with torch.no_grad():
        assert equal(module(*s.args, **s.kwargs), s.model(*s.args, **s.kwargs))
        if not ZOO[name].trains:
            return
        own = copy.deepcopy(s.model).train()
        module.train()
        torch.manual_seed(0)
        got = module(*s.args, **s.kwargs)
        torch.manual_seed(0)
        assert checks.near(got, own(*s.args, **s.kwargs))


@pytest.mark.parametrize("name", CAPTURED)
def test_every_weight_that_the_model_multiplies_with_is_a_target(name: str) -> None:
    assert not checks.undue(checks.missed(name, lora_fx.find(checks.built(name).cap)))


@pytest.mark.parametrize("name", CAPTURED)
def test_flops_add_up_to_torchs_own_count(name: str) -> None:
    subject = checks.built(name)
    found = lora_fx.find(subject.cap)
    assert not flops.refused(found)
    assert (abs(flops.difference(subject, found)) <= flops.TOL) == (name not in flops.DIFFER)


@pytest.mark.parametrize("name", CAPTURED)
def test_equal_to_the_explicit_sum_and_seen(name: str) -> None:
    module = checks.perturbed(name)
    assert all(checks.seen(e) for e in checks.effects(module))
    parity = checks.explicit_parity(name, module)
    assert parity and all(p.ok for p in parity)
    assert not ZOO[name].fast or max(p.rel for p in parity) < ORT_TOL


@pytest.mark.parametrize("name", [p for e, p in NAMES.items() if e.idle])
def test_what_is_left_out_has_no_effect_in_the_original(name: str) -> None:
    moved = checks.moved_by_left_out(name, checks.adapted(name))
    assert moved and all(m <= checks.IDLE for m in moved.values())


@pytest.mark.parametrize("name", TRAINED)
def test_only_the_adapter_moves_and_every_zero_gets_a_gradient(name: str) -> None:
    module = checks.adapted(name)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert not checks.without_gradient(name, module)
    trained = [p for p in module.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.1).step()
    moved = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    told = {k for k in moved if k in str(insertion_of(module).effect)}
    assert told == ({k for k in moved if "lora_" not in k}), "what else moves is said"
    moved -= told
    assert moved and all(".lora_B." in f".{k}" for k in moved), "A has no gradient while B is zero"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", CAPTURED)
def test_fold_and_onnx_runtime(name: str, provider: str, tmp_path: Path) -> None:
    module = checks.perturbed(name)
    folded = lora_fx.fold(module)
    parity = checks.fold_parity(module, folded)
    report = checks.export_report(module, tmp_path / "m.onnx", provider)
    assert report and all(p.ok for p in parity)
    sizes = {tuple(p.sizes.values()) for p in parity}
    assert len(sizes) >= 3
    assert len(parity) >= 4, "limits of a length are sizes of their own; the example comes last"
    assert [p.sizes for p in parity] == [p.sizes for p in checks.runtime_parity(report)]
    if ZOO[name].fast:  # these do not need the wider gate
        assert max(p.rel for p in parity) < FOLD_TOL
        assert max(p.rel for p in report.parity) < ORT_TOL
    if ZOO[name].tied:  # the lookup's tensor is as it was
        model = checks.built(name).model
        (grown,) = (f for f in folded.folded if f.grew)
        assert torch.equal(
            folded.get_parameter(grown.parameter), model.get_parameter(grown.parameter)
        )


BY_ROW = {
    **dict.fromkeys(
        ("einsum", "gathered_experts", "hf_mixtral", "hf_gpt_oss", "hf_qwen3_moe", "hf_xlnet"),
        "this use cannot be computed row by row",
    ),
    **dict.fromkeys(
        ("embedding_bag", "hf_timesformer", "hf_image_text_to_text", "hf_table_question"),
        "may mix the rows of the batch",
    ),
    **dict.fromkeys(
        ("hf_image_to_image", "hf_mask_generation", "hf_deberta_v2", "hf_deberta", "timm_swinv2"),
        "the same for every row of the batch",
    ),
    **dict.fromkeys(("lstm", "lstm_projected", "gru"), "the weight is computed by Concat"),
    **dict.fromkeys(
        ("bilinear", "lstm_bidirectional", "timm_vision_lstm"), "no matmul of the exported graph"
    ),
    **dict.fromkeys(
        ("torch_cond", "hf_zero_shot_audio", "hf_zero_shot_image", "hf_siglip"),
        # every text is compared with every image
        "row . of a batch differs from a run of .* alone \\(the model may mix rows",
    ),
    "depthwise_conv": "too small for a low-rank update",
    "orthogonal": "torch's ONNX exporter refused the model",
}  # fmt: skip
"""Models that mode batch does not serve, and what it says."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [p.values[0] for p in CAPTURED])
def test_every_row_has_an_adapter_of_its_own(name: str, tmp_path: Path) -> None:
    """The export compares mixed batches with every adapter alone."""
    module = checks.perturbed(name)
    if name in BY_ROW:
        with pytest.raises(lora_fx.LoraFxError, match=BY_ROW[name]) as caught:
            lora_fx.export(module, tmp_path / "b.onnx", mode="batch")
        assert caught.value.hint and not any(tmp_path.iterdir())
        return
    report = lora_fx.export(module, tmp_path / "b.onnx", mode="batch")
    assert report and any(p.of == "mixed batch" for p in report.parity)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_hold_is_one_readable_error(name: str) -> None:
    model, args, kwargs = ZOO[name].build()
    start = time.monotonic()
    with pytest.raises(lora_fx.LoraFxError, match="cannot capture") as caught:
        lora_fx.capture(model, args, kwargs)
    assert time.monotonic() - start < 30
    assert "\n" not in caught.value.message and len(caught.value.message) < 500
    assert ".py:" in caught.value.message, "it names the line of the model's code"
    assert caught.value.hint


@pytest.mark.slow
def test_what_draws_its_path_is_recorded_and_not_exported(tmp_path: Path) -> None:
    subject = checks.built(DRAWN)
    said = " ".join(subject.cap.notes)
    assert "one recorded run, valid for the example's sizes" in said
    assert "draws random numbers in eval mode (multinomial)" in said
    assert lora_fx.insert(subject.cap, rank=2).report().effect.modes == ("eval", "train")
    with pytest.raises(
        lora_fx.LoraFxError, match="ONNX Runtime would draw others: multinomial"
    ) as caught:
        lora_fx.export(subject.cap, tmp_path / "m.onnx")
    assert caught.value.hint and not any(tmp_path.iterdir())
