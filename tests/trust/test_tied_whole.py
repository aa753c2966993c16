"""modules_to_save of one name of a tied tensor changes that name alone, as in PEFT.

Wrong on 1358f462: insert, fold, attach and export changed every use of the tensor (.3 to 1.6 of the
largest logit), and refused two names with equal numbers, which PEFT's ensure_weight_tying writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.lowrank import Full
from lora_fx.compare import FOLD_TOL, ORT_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx import Session
from tests.trust.tied import TIED, built, out

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Inputs = dict[str, Tensor]
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, intermediate_size=24, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def qwen() -> nn.Module:
    config = transformers.Qwen2Config(
        **SMALL, intermediate_size=24, num_key_value_heads=2, tie_word_embeddings=True
    )
    return transformers.Qwen2ForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        **SMALL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16
    )
    return transformers.OPTForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=32)
    return transformers.BertForMaskedLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=40, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        max_source_positions=8, max_target_positions=16, num_mel_bins=6, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def example(make: Callable[[], nn.Module]) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (2, 5), generator=generator)
    if make is whisper:
        features = torch.randn(2, 6, 16, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :4]} if make is t5 else {})}


def model_of(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model: Any = make().eval()
    model.config.use_cache = False
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


def logits(model: Any, inputs: Inputs) -> Any:
    with torch.no_grad():
        got = model(**inputs)
    return (got["logits"] if isinstance(got, dict) else got.logits).numpy()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that a layer is tied
        yield


def peft_of(model: nn.Module, folder: Path, **fields: Any) -> Any:
    """PEFT's model with random values in all that it trains, saved into the folder."""
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **fields)
    wrapped = peft.get_peft_model(model, config).eval()
    torch.manual_seed(3)
    trained = {id(p): p for n, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(torch.randn_like(p) * 0.3)
    wrapped.save_pretrained(str(folder))
    return wrapped


SLOW = pytest.mark.slow
QKV = {gpt2: "c_attn", bert: "query", t5: "q"}
ROWS = [
    pytest.param(llama, {"modules_to_save": ["embed_tokens"]}, id="llama-table", marks=SLOW),
    pytest.param(llama, {"modules_to_save": ["lm_head"]}, id="llama-head"),
    pytest.param(llama, {"modules_to_save": ["embed_tokens", "lm_head"]}, id="llama-unequal"),
    pytest.param(
        llama, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, id="llama-equal"
    ),
    pytest.param(
        llama, {"trainable_token_indices": {"lm_head": [1, 5]}}, id="llama-head-rows", marks=SLOW
    ),
    pytest.param(
        llama, {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2, 3]}},
        id="llama-unequal-rows", marks=SLOW,
    ),
    pytest.param(llama, {"trainable_token_indices": [1, 5]}, id="llama-rows", marks=SLOW),
    pytest.param(qwen, {"modules_to_save": ["lm_head"]}, id="qwen-head", marks=SLOW),
    pytest.param(gpt2, {"modules_to_save": ["wte"]}, id="gpt2-table", marks=SLOW),
    pytest.param(gpt2, {"modules_to_save": ["lm_head"]}, id="gpt2-head", marks=SLOW),
    pytest.param(opt, {"modules_to_save": ["embed_tokens"]}, id="opt-table", marks=SLOW),
    pytest.param(bert, {"modules_to_save": ["decoder"]}, id="bert-head"),
    pytest.param(bert, {"modules_to_save": ["predictions"]}, id="bert-around", marks=SLOW),
    pytest.param(bert, {"modules_to_save": ["word_embeddings"]}, id="bert-table", marks=SLOW),
    pytest.param(t5, {"modules_to_save": ["lm_head"]}, id="t5-head", marks=SLOW),
    pytest.param(t5, {"modules_to_save": ["decoder.embed_tokens"]}, id="t5-lookup", marks=SLOW),
    pytest.param(whisper, {"modules_to_save": ["proj_out"]}, id="whisper-head", marks=SLOW),
]  # fmt: skip


@pytest.mark.parametrize(("make", "fields"), ROWS)
def test_as_peft(make: Callable[[], nn.Module], fields: dict[str, Any], tmp_path: Path) -> None:
    inputs, base = example(make), model_of(make)
    before = logits(base, inputs)
    target = [QKV.get(make, "q_proj")]
    wrapped = peft_of(model_of(make), tmp_path / "a", target_modules=target, **fields)
    want = logits(wrapped, inputs)
    assert 0.02 < rel(want, before) < 5
    module = lora_fx.insert(base, (), inputs, adapter=tmp_path / "a")
    assert rel(logits(module, inputs), want) < ORT_TOL
    assert rel(logits(lora_fx.fold(module), inputs), want) < FOLD_TOL * 4
    folded = lora_fx.fold(base, (), inputs, adapter=tmp_path / "a")
    assert rel(logits(folded, inputs), want) < FOLD_TOL * 4
    names = [n for n, _ in base.named_parameters()]
    lora_fx.attach(base, (), inputs, adapter=tmp_path / "a")
    assert rel(logits(base, inputs), want) < ORT_TOL
    lora_fx.detach(base)
    assert [n for n, _ in base.named_parameters()] == names  # tied again
    assert np.array_equal(logits(base, inputs), before)
    # what insert holds is the same adapter to PEFT and to insert
    lora_fx.save_adapter(module.adapter(), tmp_path / "b")
    again = peft.PeftModel.from_pretrained(model_of(make), str(tmp_path / "b")).eval()
    if "trainable_token_indices" not in fields:  # ours are whole tables
        assert rel(logits(again, inputs), want) < ORT_TOL
    twice = lora_fx.insert(base, (), inputs, adapter=tmp_path / "b")
    assert rel(logits(twice, inputs), want) < ORT_TOL


@pytest.mark.parametrize(
    ("fields", "untie"),
    [
        ({"modules_to_save": ["lm_head"]}, True),
        pytest.param({"modules_to_save": ["embed_tokens"]}, True, marks=SLOW),
        pytest.param({"modules_to_save": ["embed_tokens", "lm_head"]}, True, marks=SLOW),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    ],
)
def test_checkpoints_and_files(fields: dict[str, Any], untie: bool, tmp_path: Path) -> None:
    import onnxruntime

    inputs = example(llama)
    wrapped = peft_of(model_of(llama), tmp_path / "a", target_modules=["q_proj"], **fields)
    want = logits(wrapped, inputs)
    model_of(llama).save_pretrained(tmp_path / "base")
    if untie:
        with pytest.raises(LoraFxError, match="one of two uses"):
            lora_fx.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    lora_fx.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", untie=untie)
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert rel(logits(merged, inputs), want) < FOLD_TOL * 4
    assert lora_fx.verify(tmp_path / "out", tmp_path / "base", adapter=tmp_path / "a")
    assert merged.config.tie_word_embeddings is not untie
    captured = lora_fx.capture(model_of(llama), (), inputs)
    adapter = lora_fx.load_adapter(tmp_path / "a")
    assert lora_fx.verify(captured, adapter)
    lora_fx.export(captured, tmp_path / "m.onnx", adapters=adapter, provider="cpu")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    got = session.run(["logits"], {"input_ids": inputs["input_ids"].numpy()})[0]
    assert rel(got, want) < ORT_TOL
    # a graph that is only a file has one tensor, and says so
    program = torch.export.export(model_of(llama), (), inputs, strict=False)
    torch.export.save(program, tmp_path / "m.pt2")
    if untie:
        with pytest.raises(LoraFxError, match="for that name alone"):
            lora_fx.fold(tmp_path / "m.pt2", adapter=adapter)
    else:
        module = lora_fx.fold(tmp_path / "m.pt2", adapter=adapter)
        assert rel(logits(module, inputs), want) < FOLD_TOL * 4


class Twice(nn.Module):
    """One module under two paths: PEFT replaces it at the path that it saves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


class Biases(nn.Module):
    """Two layers that share their bias, and no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.bias = self.first.bias
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


@pytest.mark.parametrize("saved", ["first", "second"])
@pytest.mark.parametrize("make", [Twice, Biases])
def test_modules_of_several_names(make: Any, saved: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(5, 6)
    before = out(model, x)
    torch.manual_seed(0)
    wrapped = peft_of(make().eval(), tmp_path, target_modules=["head"], modules_to_save=[saved])
    want = out(wrapped, x)
    assert rel(want, before) > 0.02
    assert rel(out(lora_fx.insert(model, (x,), adapter=tmp_path), x), want) < ORT_TOL
    assert rel(out(lora_fx.fold(model, (x,), adapter=tmp_path), x), want) < FOLD_TOL
    lora_fx.attach(model, (x,), adapter=tmp_path)
    assert rel(out(model, x), want) < ORT_TOL
    lora_fx.detach(model)
    assert np.array_equal(out(model, x), before)
    assert make is Biases or model.second is model.first


@pytest.mark.parametrize("given", ["a path", "a list", "by name"])
@pytest.mark.parametrize("saved", ["first", "second"])
def test_a_switch_file_of_one_adapter(saved: str, given: str, tmp_path: Path) -> None:
    """However the one adapter is given, as the command line gives it by name."""
    folder = tmp_path / "a"
    torch.manual_seed(0)
    model = Twice().eval()
    torch.manual_seed(0)
    wrapped = peft_of(Twice().eval(), folder, target_modules=["head"], modules_to_save=[saved])
    x = torch.randn(5, 6)
    adapters: Any = {"a path": folder, "a list": [folder], "by name": {"one": folder}}[given]
    path = tmp_path / "m.onnx"
    report = lora_fx.export(model, path, (x,), mode="switch", adapters=adapters, provider="cpu")
    session = Session(path, "cpu")
    session.load("one", report.outputs[1])
    found = session.run({"x": x.numpy()}, adapter="one")
    assert rel(found["output"], out(wrapped, x)) < ORT_TOL


def test_what_is_trained_whole_for_all_uses_stays_so(tmp_path: Path) -> None:
    """The twin: also_train of a tied table is one tensor of all uses, in every file of ours."""
    make = TIED["Aliased"]
    model, ids = built(make)
    module: Any = lora_fx.insert(model, (ids,), rank=2, include="op:linear", also_train="emb")
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    want = out(module, ids)
    adapter = module.adapter()
    (full,) = adapter.full.values()
    assert full.tied and full.twins == ("out.head.weight",)
    lora_fx.save_adapter(adapter, tmp_path / "a")
    read = lora_fx.load_adapter(tmp_path / "a")
    assert [(f.tied, f.twins) for f in read.full.values()] == [(True, ("out.head.weight",))]
    again = lora_fx.insert(model, (ids,), adapter=read)
    assert rel(out(again, ids), want) < ORT_TOL
    # a plain value that is made in Python is one of a name alone, as LowRank without a layout is
    alone = lora_fx.Adapter({"out.head.weight": Full(full.value)})
    one = out(lora_fx.insert(model, (ids,), adapter=alone), ids)
    two = model.changed(ids, 0.0, torch.from_numpy(full.value) - model.emb.weight)
    assert rel(one, two.detach().numpy()) < ORT_TOL


def test_an_adapter_that_is_loaded_later_is_refused(tmp_path: Path) -> None:
    """A module whose tensor is one cannot become two."""
    make = TIED["Aliased"]
    model, ids = built(make)
    lora_fx.save_adapter(
        lora_fx.insert(model, (ids,), rank=2, include="op:linear").adapter(), tmp_path / "a"
    )
    whole = lora_fx.Adapter({"out.head.weight": Full(model.emb.weight.detach().numpy() + 1)})
    module = lora_fx.insert(model, (ids,), rank=2, include="op:linear", also_train="emb")
    before = out(module, ids)
    with pytest.raises(LoraFxError, match="for that name alone"):
        module.load_adapter(whole)
    assert np.array_equal(out(module, ids), before)
