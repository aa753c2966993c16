"""aLoRA in torch: the branches of insert are PEFT's, token by token and step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraFxError
from lora_fx.adapter.invocation import NEVER, adapter_starts
from lora_fx.compare import rel
from lora_fx.fx.token_mask import InvocationMask
from lora_fx.passes.find import find
from lora_fx.passes.insert import Insert
from lora_fx.passes.verbs.open import capture
from tests.onnx.decoders import MODELS, llama

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
TOKENS = [5, 6]
IDS = np.random.default_rng(0).integers(10, 96, (4, 9))
IDS[0, 2:4] = IDS[0, 6:8] = TOKENS
IDS[1, 0:2] = TOKENS
IDS[3, 7:9] = TOKENS
CALL = {"input_ids": torch.tensor(IDS)}
STARTS = [6, 0, NEVER, 7]


def drawn(module: Any, seed: int = 0) -> Any:
    """The module with random a and b."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensors in module.tensors().values():
            for parameter in tensors.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def no_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def logits(model: Any) -> Any:
    return model(**CALL).logits


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_acts_from_the_last_invocation_on(name: str) -> None:
    model = MODELS[name]()
    module = drawn(lora_fx.insert(model, (), CALL, rank=3, invocation=TOKENS))
    assert module.invocation == (5, 6)
    assert module.report().effect is not None
    with torch.no_grad():
        ours, base = logits(module), logits(model)
    differs = (ours != base).any(-1).numpy()
    assert adapter_starts(IDS, TOKENS).tolist() == STARTS
    assert (differs == (np.arange(9) >= np.array(STARTS)[:, None])).all()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_steps_are_those_of_peft(tmp_path: Path, name: str) -> None:
    model = no_dropout(MODELS[name]())
    exclude = "role:head,role:embedding"
    module = drawn(lora_fx.insert(model, (), CALL, rank=3, invocation=TOKENS, exclude=exclude))
    assert lora_fx.save_adapter(module.adapter(), tmp_path / "a") == ()
    theirs = peft.PeftModel.from_pretrained(
        no_dropout(MODELS[name]()), tmp_path / "a", is_trainable=True
    )
    with torch.no_grad():
        expected = logits(theirs.eval()).numpy()
        assert rel(logits(module.eval()).numpy(), expected) < 1e-6

    losses: list[list[float]] = []
    for trained in (module.train(), theirs.train()):
        parameters = [p for p in trained.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.3)  # AdamW divides rounding by itself
        losses.append([])
        for _ in range(4):
            y = logits(trained)[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(y, CALL["input_ids"][:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert rel(np.array(losses[0]), np.array(losses[1])) < 1e-6
    assert losses[0][3] < losses[0][0]
    trained_factors = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    for key, tensors in module.tensors().items():
        path = key.removesuffix(".weight")
        for field, tensor in tensors.items():
            peer = trained_factors[f"base_model.model.{path}.lora_{field.upper()}.default.weight"]
            assert rel(tensor.detach().numpy(), peer.detach().numpy()) < 1e-6


def test_an_adapter_comes_back_with_its_tokens(tmp_path: Path) -> None:
    model = llama()
    module = drawn(lora_fx.insert(model, (), CALL, rank=3, invocation=TOKENS))
    lora_fx.save_adapter(module.adapter(), tmp_path / "a")
    again = lora_fx.insert(llama(), (), CALL, adapter=tmp_path / "a")
    assert again.invocation == (5, 6)
    with torch.no_grad():
        assert torch.equal(logits(again), logits(module))
    plain = lora_fx.insert(llama(), (), CALL, rank=3)
    with pytest.raises(LoraFxError, match=r"invocation tokens are \[5, 6\]"):
        plain.load_adapter(tmp_path / "a")
    with pytest.raises(LoraFxError, match=r"invocation is \[7\], and the adapter has \[5, 6\]"):
        lora_fx.insert(llama(), (), CALL, adapter=tmp_path / "a", invocation=[7])


def test_a_program_keeps_the_mask(tmp_path: Path) -> None:
    from lora_fx.passes.verbs.open import load_program
    from lora_fx.passes.verbs.program import save_program

    module = drawn(lora_fx.insert(llama(1), (), CALL, rank=3, invocation=TOKENS))
    save_program(module, tmp_path / "x.pt2")
    loaded = load_program(tmp_path / "x.pt2")
    assert loaded.adapter().invocation == (5, 6)
    with torch.no_grad():
        assert torch.equal(loaded(**CALL)["logits"], logits(module))


class Plain(nn.Module):
    """No ids: floats go in."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


class Turned(nn.Module):
    """Tokens first, then the batch: what a mask [batch, tokens] does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 6)
        self.up = nn.Linear(6, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.up(self.table(ids).transpose(0, 1)).transpose(0, 1)


class Pooled(Turned):
    """One row for each example."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.up(self.table(ids).mean(1))


def test_models_without_tokens_are_refused_by_name() -> None:
    with pytest.raises(LoraFxError, match="takes no token ids"):
        lora_fx.insert(Plain(), (torch.randn(2, 3, 6),), rank=2, invocation=[1])
    ids = (torch.randint(0, 32, (2, 5)),)
    for model in (Turned(), Pooled()):
        with pytest.raises(LoraFxError, match=r"'up.weight' .*does not begin with the tokens"):
            lora_fx.insert(model, ids, rank=2, invocation=[1], include="up")
    with pytest.raises(LoraFxError, match="do not see the token ids"):
        lora_fx.attach(llama(1), (), CALL, adapter=an_alora())


class TokensFirst(Turned):
    """Its rows are the tokens, in the order [tokens, batch]."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        batch, tokens = ids.shape
        flat = self.table(ids).transpose(0, 1).reshape(batch * tokens, 6)
        return self.up(flat).reshape(tokens, batch, 10).transpose(0, 1)


class Reversed(Turned):
    """Its tokens go in from the last to the first."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.up(self.table(ids).flip(1)).flip(1)


class BatchFirst(TokensFirst):
    """The same rows in the order [batch, tokens], as in GPT-2."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.up(self.table(ids).reshape(-1, 6)).reshape(*ids.shape, 10)


@pytest.mark.parametrize(
    ("model", "where"),
    [(TokensFirst, "a row without the"), (Reversed, "tokens before the")],
)
def test_rows_that_are_the_tokens_in_another_order_are_refused(
    model: type[Turned], where: str, tmp_path: Path
) -> None:
    words = rf"'up.weight' cannot be masked by token: output 'output' of {where} invocation"
    ids = (torch.randint(0, 32, (2, 5)),)
    with pytest.raises(LoraFxError, match=words) as caught:
        lora_fx.insert(model(), ids, rank=2, invocation=[1], include="up")
    assert caught.value.hint == "pass --exclude up"
    adapter = lora_fx.insert(BatchFirst(), ids, rank=2, invocation=[1], include="up").adapter()
    for mode in ("switch", "batch"):
        with pytest.raises(LoraFxError, match=f"mine: {words}"):
            lora_fx.export(
                model(), tmp_path / "x.onnx", ids, adapters={"mine": adapter}, mode=mode,
                provider="cpu",
            )  # fmt: skip
    assert not [*tmp_path.iterdir()]


def test_tokens_that_the_model_has_no_row_for_are_refused() -> None:
    ids = (torch.randint(0, 32, (2, 5)),)
    with pytest.raises(LoraFxError, match=r"token 32 is none of the model's: its ids are 0 to 31"):
        lora_fx.insert(BatchFirst(), ids, rank=2, invocation=[31, 32], include="up")


def an_alora() -> Any:
    return lora_fx.insert(llama(1), (), CALL, rank=2, invocation=TOKENS).adapter()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "dora"}, "invocation with variant 'dora'"),
        ({"variant": "qalora:4"}, "invocation with variant 'qalora:4'"),
        ({"init": "pissa"}, "invocation with init 'pissa'"),
        ({"invocation": []}, "expected a list of 1 to 4096 token ids"),
    ],
)
def test_what_has_no_mask_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LoraFxError, match=words):
        lora_fx.insert(llama(1), (), CALL, **{"invocation": TOKENS, **options})


MASK = """\
constant_pad_nd.default(named_ids, [0, 1], -1)
slice.Tensor(lora_constant_pad_nd, 1, 0, -1)
eq.Scalar(lora_slice, 7)
slice.Tensor(lora_constant_pad_nd, 1, 1, 9223372036854775807)
eq.Scalar(lora_slice_1, 8)
logical_and.default(lora_eq, lora_eq_1)
cumsum.default(lora_logical_and, 1)
sum.dim_IntList(lora_logical_and, [1], True)
eq.Tensor(lora_cumsum, lora_sum)
gt.Scalar(lora_cumsum, 0)
logical_and.default(lora_eq_2, lora_gt)
unsqueeze.default(invocation_tokens, -1)
"""


class Straight(Turned):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.up(self.table(ids))


def test_the_graph_is_as_it_is_written_here() -> None:
    captured = capture(Straight(), (torch.randint(0, 32, (2, 5)),))
    graph = captured.fx_graph()
    twin = captured.fx_graph()
    target = find(graph)["up.weight"]
    from lora_fx.adapter.lowrank import draw

    a, b = draw(target.key, target.layout, 3, 0, "probe")
    updates = {target.key: lora_fx.LowRank(a, b, 6.0, target.layout)}
    step = Insert(updates, mask=InvocationMask((7, 8)))
    assert step(graph).modified
    assert not step(graph).modified

    def lines(of: Any) -> list[str]:
        nodes = [node for node in of.graph.nodes if node.op == "call_function"]
        return [f"{str(n.target).removeprefix('aten.')}{n.args}".replace(",)", ")") for n in nodes]

    with_mask = lines(graph)
    assert "\n".join(with_mask[:12]) + "\n" == MASK
    Insert(updates)(twin)
    assert with_mask[12:-1] == lines(twin), "a LoRA's graph is as it was"
    assert with_mask[-1] == "where.self(invocation_3, lora_add, linear)"
