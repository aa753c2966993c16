"""transformers' language models, with the cache of their default configs, beside PEFT.

PEFT's own A and B are copied into the attached model: losses of training, greedy tokens and saved
adapters are compared with PEFT's, and never with lora-fx's.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.fx.attach.attachment import attachment

pytestmark = pytest.mark.filterwarnings("ignore")
VOCAB, RANK, STEPS = 50, 3, 20

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "smollm2": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"head_dim": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 6}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {"head_dim": 6, "moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 6}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
}  # fmt: skip
"""Class of the model, class of its config, and what it has beside SIZES."""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj",
          "gate_up_proj"]  # fmt: skip


def built(name: str, **more: Any) -> nn.Module:
    tf = pytest.importorskip("transformers")
    model, config, own = FAMILIES[name]
    torch.manual_seed(0)
    made: nn.Module = getattr(tf, model)(getattr(tf, config)(**{**SIZES, **own, **more})).eval()
    assert made.config.use_cache, "the default of every family"
    return made


def ids(seed: int, rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def linears(model: nn.Module) -> list[str]:
    """PEFT's targets: every linear layer of the blocks, but for routers."""
    return [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n.split(".")[-1] in LINEAR
    ]


def beside_peft(name: str) -> tuple[Any, Any]:
    """One base attached to and adapted by PEFT, with PEFT's A and a B that matters in both."""
    peft = pytest.importorskip("peft")
    model = built(name)
    targets = linears(model)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    lora_fx.attach(model, (), {"input_ids": ids(0)}, rank=RANK, include=targets)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for target in targets:
            module = theirs.base_model.model.get_submodule(target)
            a, b = module.lora_A.default.weight, module.lora_B.default.weight
            b.copy_(torch.randn(b.shape, generator=g) * 0.3)
            model.get_parameter(f"{target}.lora_A.weight").copy_(a)
            model.get_parameter(f"{target}.lora_B.weight").copy_(b)
    return model, theirs


def losses(model: Any, steps: int) -> Iterator[float]:
    """The loss of each AdamW step on batches that no seed of the models has drawn."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for step in range(steps):
        batch = ids(100 + step)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


def rows(fast: tuple[str, ...]) -> list[Any]:
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]


@pytest.mark.parametrize("name", rows(("smollm2", "qwen3_moe")))
def test_every_linear_has_the_output_form(name: str) -> None:
    model, said = built(name), list[str]()
    found = lora_fx.find(model, (), {"input_ids": ids(0)})
    lora_fx.attach(model, (), {"input_ids": ids(0)}, rank=RANK, progress=said.append)
    forms, targets = attachment(model).forms, linears(model)
    assert targets and {f"{n}.weight" for n in targets} <= {t.key for t in found.targets}
    assert all(forms[n].output and not forms[n].weights for n in targets)
    rest = {n: f for n, f in forms.items() if f.weights and not f.output}
    assert bool(rest) == (name == "qwen3_moe"), "stacks of experts are read by a grouped product"
    assert not [line for line in said if "W + s·B·A at every read" in line]
    if rest:  # something else reads one stack of each layer
        for path in rest:
            model.get_submodule(path).gate_up_proj.norm()
        (line,) = [n for n in model.report().notes if "W + s·B·A at every read" in n]
        numbers = 2 * 4 * 40 * 24  # 4 experts of [2·20, 24] in each of 2 layers
        assert f"{2 * RANK * numbers / 1e3:.1f} k FLOPs and {numbers / 1e3:.1f} k new" in line
        assert all(f"{path}.gate_up_proj" in line for path in rest) and "down_proj" not in line
    assert "every target in eval and train" in str(model.report())


@pytest.mark.parametrize("name", rows(("smollm2",)))
def test_training_and_decoding_are_pefts(name: str, tmp_path: Path) -> None:
    model, theirs = beside_peft(name)
    call = {"input_ids": ids(7, rows=2, length=5)}
    with torch.no_grad():
        assert model(**call).logits.allclose(theirs(**call).logits, rtol=1e-5, atol=1e-5)
    decode: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, use_cache=True)
    decode["attention_mask"] = torch.ones_like(call["input_ids"])
    tokens = model.generate(**call, **decode)
    assert torch.equal(tokens, theirs.generate(**call, **decode))
    lora_fx.detach(copied := copy.deepcopy(model))
    assert not torch.equal(tokens, copied.generate(**call, **decode)), "the adapter decides"
    # Rounding adds up: each step starts from weights that the steps before have rounded otherwise,
    # and 20 units of the last place is what a sum over some hundred products is off by.
    got, want = list(losses(model, STEPS)), list(losses(theirs, STEPS))
    assert want[-1] != want[0]
    for i, (a, b) in enumerate(zip(got, want, strict=True), 1):
        assert abs(a - b) <= 20 * i * torch.finfo(torch.float32).eps * b, (i, a, b)
    lora_fx.save_adapter(model.adapter(), tmp_path / "ours", format="peft")
    reloaded = built(name)
    lora_fx.attach(reloaded, (), {"input_ids": ids(0)}, adapter=tmp_path / "ours")
    peft = pytest.importorskip("peft")
    fresh = peft.PeftModel.from_pretrained(built(name), tmp_path / "ours")
    batch, ends = ids(500), list[float]()
    with torch.no_grad():
        for each in (model, theirs, reloaded, fresh.eval()):
            ends.append(float(each(input_ids=batch, labels=batch).loss))
    assert ends[2] == ends[0]
    assert all(abs(a - b) <= 5e-5 * b for a, b in itertools.combinations(ends, 2)), ends


@pytest.mark.parametrize("name", rows(()))
def test_insert_gives_the_same_numbers(name: str) -> None:
    model, theirs = beside_peft(name)
    adapter = model.adapter()
    module = lora_fx.insert(built(name), (), {"input_ids": ids(0)}, adapter=adapter)
    call = {"input_ids": ids(8, rows=4, length=9)}
    with torch.no_grad():
        want = theirs(**call).logits
        assert module(**call).logits.allclose(want, rtol=1e-5, atol=1e-5)


def test_what_trainers_ask_the_module_of_insert() -> None:
    model = built("llama", num_hidden_layers=1)
    module: Any = lora_fx.insert(model, (), {"input_ids": ids(0)}, rank=RANK)
    assert module.config is model.config
    assert (module.device, module.dtype) == (torch.device("cpu"), torch.float32)
    names = [n for n in module.state_dict() if ".lora_" not in n]
    assert names == list(model.state_dict())
    twin = copy.deepcopy(module).to("meta", torch.bfloat16)
    assert (twin.device, twin.dtype) == (torch.device("meta"), torch.bfloat16)
    assert module.dtype == torch.float32
    with pytest.raises(lora_fx.LoraFxError, match="no key-value cache") as e:
        module.generate(ids(1), max_new_tokens=2)
    # the hint, followed to the letter
    assert "lora_fx.attach(model, args, kwargs, adapter=adapter)" in e.value.hint
    args, kwargs = (), {"input_ids": ids(0)}
    adapter = module.adapter()
    lora_fx.attach(model, args, kwargs, adapter=adapter)
    assert model.generate(ids(1), max_new_tokens=2, do_sample=False).shape[0] == 3
    plain = lora_fx.insert(nn.Sequential(nn.Linear(4, 3)), (torch.ones(2, 4),), rank=2)
    assert not any(hasattr(plain, n) for n in ("config", "device", "dtype", "generate"))
