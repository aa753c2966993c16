"""Blocks that repeat: copies where blocks are alike, each traced by itself where they are not.

Every model here has blocks of one class and shape. Its graph with copies must be the graph that is
made the long way, node for node; a model whose blocks differ in what they do must have none.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.errors import CaptureError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.cleaned_graph import Traced

WIDTH = 6
ALL = 2**63 - 1
aten = torch.ops.aten


class Block(nn.Module):
    """Two products with a residual; subclasses do one thing more."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.up = nn.Linear(WIDTH, 10)
        self.act = nn.GELU()
        self.down = nn.Linear(10, WIDTH)

    def forward(self, x: Any) -> Any:
        return x + self.down(self.act(self.up(x)))


class ByIndex(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * (1.0 + self.index)


class OfTwo(Block):
    """Every other block does something else, by an attribute of a module below."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.act.kind = "odd" if index % 2 else "even"

    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        return -y if self.act.kind == "odd" else y


class ByClassDefault(Block):
    shift = 0.0

    def __init__(self, index: int) -> None:
        super().__init__(index)
        if index:
            self.shift = 0.5 * index

    def forward(self, x: Any) -> Any:
        return super().forward(x) + self.shift


class HeldTensor(Block):
    """What a block holds without registering it is another constant in each."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.scale = torch.tensor(1.0 + index)

    def forward(self, x: Any) -> Any:
        return super().forward(x) * self.scale


class Counts(Block):
    """Writes a buffer in place."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        self.seen.add_(1.0)
        return super().forward(x) + self.seen


class Remembers(Block):
    """Leaves an attribute behind, which the model reads."""

    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        self.last = y.mean()
        return y


class Collects(Block):
    """Puts something into a list that it holds."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: Any) -> Any:
        self.seen.append(x.mean())
        return super().forward(x)


class Appends(Block):
    """Puts something into a list that it is given."""

    def forward(self, x: Any, also: Any) -> Any:  # type: ignore[override]
        also.append(x.mean())
        return super().forward(x)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Appends(i) for i in range(3)])

    def forward(self, x: Any) -> Any:
        also: list[Any] = []
        for block in self.blocks:
            x = block(x, also)
        return x + sum(also)


class WritesArgument(Block):
    def forward(self, x: Any) -> Any:
        x.add_(1.0)
        return super().forward(x)


class OutputNoTensor(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(x), {1, 2}


class OutputsAndNone(Block):
    def forward(self, x: Any, also: Any = None) -> Any:
        y = super().forward(x)
        return {"y": y, "also": also, "again": (y * 2, 3)}


class Tied(Block):
    """In some of them the bias is one for both products: the same values, another structure."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = self.first if index == 1 else nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        return super().forward(self.second(self.first(x)))


class Hooked(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.up.register_forward_hook(lambda m, a, y: y * (2.0 + index))


class Drops(Block):
    def forward(self, x: Any) -> Any:
        return nn.functional.dropout(super().forward(x), 0.3, self.training)


class Casts(Block):
    """A cast to what a tensor is already: torch's trace takes its result for the argument."""

    def forward(self, x: Any) -> Any:
        return x.to(torch.float32) + super().forward(x.to(torch.float32))


class NoGradient(Block):
    def forward(self, x: Any) -> Any:
        with torch.no_grad():
            y = super().forward(x)
        return x + y


class Autocast(Block):
    def forward(self, x: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class Expert(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.body = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, WIDTH))

    def forward(self, x: Any) -> Any:
        return self.body(x)


class ScaledExpert(Expert):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * (1 + self.index)


class Mixture(Block):
    expert: type[Expert] = Expert

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.experts = nn.ModuleList([self.expert(i) for i in range(3)])

    def forward(self, x: Any) -> Any:
        return super().forward(x) + sum(e(x) for e in self.experts)


class LaterExperts(Mixture):
    """Experts are alike inside a block, and not from block to block."""

    expert = ScaledExpert

    def __init__(self, index: int) -> None:
        super().__init__(index)
        for e in self.experts:
            e.index = index


class Stack(nn.Module):
    """Blocks one after the other, whatever they return."""

    def __init__(self, kind: type[Block], depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([kind(i) for i in range(depth)])

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            out = block(x)
            x = out if isinstance(out, torch.Tensor) else pytree.tree_leaves(out)[0]
            if isinstance(out, dict):
                x = x + out["again"][0]
            if hasattr(block, "last"):
                x = x + block.last
        return x


class Replaces(Block):
    """Puts another tensor in the place of a buffer."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Any) -> Any:
        self.mean = 0.5 * self.mean + x.mean((0, 1))
        return super().forward(x) + self.mean


class Deletes(Block):
    """Takes an attribute away and gives it back, and says so by no other sign."""

    def forward(self, x: Any) -> Any:
        index = self.index
        del self.index
        self.index = index
        return super().forward(x) * (1.0 + index)


class Given(Block):
    """Its model gives it something before a call: an attribute, or a thing that all hold."""

    shift = 0.0
    held: ClassVar[dict[str, list[torch.Tensor]]] = {"seen": [], "read": []}

    def forward(self, x: Any) -> Any:
        self.held["seen"].append(x.mean())
        return super().forward(x) + self.shift + sum(self.held["read"])


class Gives(nn.Module):
    """A model that does something before each call of a block, and one block, or one a call."""

    def __init__(self, before: str, kind: type[Block] = Given, blocks: int = 3) -> None:
        super().__init__()
        self.before = before
        self.blocks = nn.ModuleList([kind(i) for i in range(blocks)])
        self.others = nn.ModuleList([nn.Linear(WIDTH, 10) for _ in range(3)])

    def forward(self, x: Any) -> Any:
        heard = []
        seen, read = Given.held["seen"], Given.held["read"]
        seen.clear()
        read.clear()
        hooks = []
        for i, other in enumerate(self.others):
            block = self.blocks[i % len(self.blocks)]
            if self.before == "attribute":
                block.shift = float(i)
            elif self.before == "module":
                block.up = other
            elif self.before == "mode":
                block.train(i == 1)
            elif self.before == "hook":
                hooks.append(block.up.register_forward_hook(lambda m, a, y: heard.append(y)))
            elif self.before == "value":
                read[:] = [x * float(i)]
            x = block(x)
        for hook in hooks:
            hook.remove()
        x = x + sum(seen) if self.before == "read" else x
        seen.clear()
        read.clear()
        return x, *heard


class Doubled(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * 2


class OfBoth(nn.Module):
    """A class whose forward calls that of another one, which is called by itself too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(0), Doubled(1)

    def forward(self, x: Any) -> Any:
        return self.second(self.second(self.second(self.first(x))))


class Passes(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(x), x


class WritesWhatCameBack(nn.Module):
    """A block gives its argument back, and the model writes in it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Passes(i) for i in range(3)])

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            given = x * 1.0
            y, same = block(given)
            same.mul_(2.0)
            x = y + given
        return x


class Attention(nn.Module):
    """Sizes are computed in a block (heads times batch), and are the same in every one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Any) -> Any:
        return self.layers(x)


class Shared(nn.Module):
    """One block, three times (ALBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(0)

    def forward(self, x: Any) -> Any:
        return self.block(self.block(self.block(x)))


class TwoArguments(nn.Module):
    """The second call gives one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Mixing(i) for i in range(3)])

    def forward(self, x: Any) -> Any:
        y = torch.tanh(x)
        y = self.blocks[0](x, y)
        y = self.blocks[1](y, y)
        return self.blocks[2](y, x, 2.0)


class _Mixing(Block):
    def forward(self, x: Any, y: Any, scale: float = 1.0) -> Any:  # type: ignore[override]
        return super().forward(x) - scale * y


class Outside(nn.Module):
    """Blocks ask a thing that counts: nothing of theirs tells them apart."""

    calls: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Asking(i) for i in range(3)])

    def forward(self, x: Any) -> Any:
        self.calls.clear()
        for block in self.blocks:
            x = block(x)
        return x


class Unseen(Outside):
    """What they ask lies outside of Python, where no snapshot reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_AskingSystem(i) for i in range(3)])

    def forward(self, x: Any) -> Any:
        os.environ[COUNTER] = "0"
        for block in self.blocks:
            x = block(x)
        return x


COUNTER = "LORA_FX_TEST_REPEAT"


class _AskingSystem(Block):
    def forward(self, x: Any) -> Any:
        os.environ[COUNTER] = str(int(os.environ[COUNTER]) + 1)
        return super().forward(x) * int(os.environ[COUNTER])


class _Asking(Block):
    def forward(self, x: Any) -> Any:
        Outside.calls.append(1)
        return super().forward(x) * len(Outside.calls)


class AroundAll(Stack):
    """Autocast around the blocks."""

    def forward(self, x: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class InBranches(nn.Module):
    """Blocks in the bodies of a higher-order op are not its trace's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(i) for i in range(4)])

    def forward(self, x: Any) -> Any:
        first, second, third, fourth = self.blocks
        x = torch.cond(x.sum() > 0, lambda x: first(x), lambda x: second(x), (x,))
        return fourth(third(x))


ALIKE = {  # name: (model, copies in eval mode)
    "plain": (lambda: Stack(Block), 2),
    "parts": (lambda: Stack(OutputsAndNone), 2),
    "dropout": (lambda: Stack(Drops), 2),
    "casts": (lambda: Stack(Casts), 2),
    "autocast": (lambda: Stack(Autocast), 2),
    "attention": (lambda: Attention().eval(), 2),
    "no_grad": (lambda: Stack(NoGradient), 2),
    "every_other": (lambda: Stack(OfTwo, 4), 2),
    "tied": (lambda: Stack(Tied), 1),
    "shared": (Shared, 1),  # from the second call on
    "experts": (lambda: Stack(Mixture), 2 + 2),  # of the first block's experts, and of blocks
    "later_experts": (lambda: Stack(LaterExperts), 3 * 2 + 2),  # and what is in the experts
    "in_branches": (InBranches, 1),
    "of_both": (OfBoth, 1),
    "mode": (lambda: Gives("mode", Drops), 1),
    "writes_back": (WritesWhatCameBack, 2),
}
APART = {
    "by_index": lambda: Stack(ByIndex),
    "class_default": lambda: Stack(ByClassDefault),
    "held_tensor": lambda: Stack(HeldTensor),
    "counts": lambda: Stack(Counts),
    "remembers": lambda: Stack(Remembers),
    "collects": lambda: Stack(Collects),
    "appends": Auxiliary,
    "writes_argument": lambda: Stack(WritesArgument),
    "no_tensor": lambda: Stack(OutputNoTensor),
    "hooked": lambda: Stack(Hooked),
    "around_all": lambda: AroundAll(Block),
    "two_arguments": TwoArguments,
    "replaces": lambda: Stack(Replaces),
    "deletes": lambda: Stack(Deletes),
    "attribute": lambda: Gives("attribute"),
    "attribute_of_one": lambda: Gives("attribute", blocks=1),
    "module_of_one": lambda: Gives("module", Block, blocks=1),
    "hook": lambda: Gives("hook", Block),
    "reads_outside": lambda: Gives("value"),
    "writes_outside": lambda: Gives("read"),
    "asks_outside": Outside,
}


def rows(graph: fx.Graph) -> list[object]:
    """A graph without the names of its nodes: ops, operands, shapes, and the modules of each."""
    # torch leaves a cut of everything out where it knows by then that it is one (Mamba's layer 1)
    whole = [n for n in graph.nodes if n.target is aten.slice.Tensor and n.args[2:] == (0, ALL)]
    held = [n for n in graph.nodes if n.op != "get_attr" and n not in whole]
    at = {n: i for i, n in enumerate(held)}
    spelled = {n: str(n.target) if n.op == "get_attr" else f"%{at.get(n)}" for n in graph.nodes}
    for n in whole:
        spelled[n] = spelled[n.args[0]]
    result: list[object] = []
    for n in at:
        args = (
            n.args[:1] if n.target is aten._assert_scalar.default else n.args
        )  # without its words
        operands = fx.node.map_arg((args, n.kwargs), lambda x: spelled[x])
        made = pytree.tree_leaves(n.meta.get("val"))
        shapes = [(t.dtype, t.dim()) for t in made if isinstance(t, torch.Tensor)]
        path = [path for path, _ in (n.meta.get("nn_module_stack") or {}).values()]
        target = "" if n.op == "placeholder" else str(n.target)
        result.append((n.op, target, str(operands), shapes, path))
    return result


def captures(model: nn.Module, training: bool = False) -> list[tuple[Captured, Traced]]:
    """(with copies, the long way) of a model."""
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    model.requires_grad_(False)  # else the first block alone has an argument without gradient
    both = [Captured(model, (x,), repeat=repeat) for repeat in (True, False)]
    return [(cap, cap.traced(training, cap.named)) for cap in both]


@pytest.mark.parametrize("name", ALIKE)
def test_copies_are_the_graph_of_the_long_way(name: str) -> None:
    make, copies = ALIKE[name]
    torch.manual_seed(0)
    (cap, ours), (_, long) = captures(make(), training=name in ("dropout", "experts", "mode"))
    assert (ours.copies, long.copies) == (copies, 0)
    assert rows(ours.graph) == rows(long.graph)
    assert ours.door.conditions == long.door.conditions
    assert ours.modeless == long.modeless
    assert not any("alike" in n for n in cap.notes)


@pytest.mark.parametrize("name", APART)
def test_what_differs_is_traced_by_itself(name: str) -> None:
    torch.manual_seed(0)
    (cap, ours), (_, long) = captures(APART[name]())
    assert ours.copies == 0
    assert rows(ours.graph) == rows(long.graph)
    assert not any("alike" in n for n in cap.notes)


def test_what_a_copy_cannot_know_is_found_by_running() -> None:
    """A counter outside of Python: the copies' numbers are not the model's, so none is kept."""
    torch.manual_seed(0)
    (cap, ours), (_, long) = captures(Unseen())
    assert any(
        "look alike" in n and "copies differ by" in n and "at x [2, 5, 6]" in n for n in cap.notes
    )
    assert ours.copies == 0
    assert rows(ours.graph) == rows(long.graph)


def test_numbers_are_compared_where_sizes_had_to_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Unseen().requires_grad_(False)
    x = torch.randn(2, 5, WIDTH)
    real = Captured._trace

    def fixed(self: Any, source: Any, training: bool, named: Any, requested: Any) -> Any:
        if requested:
            raise CaptureError("sizes have to be fixed", "")
        return real(self, source, training, named, requested)

    monkeypatch.setattr(Captured, "_trace", fixed)
    cap = Captured(model, (x,))
    (got,) = fx.Interpreter(cap.eval).run(x, enable_io_processing=False)
    torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-6)
    assert any("look alike" in n for n in cap.notes)


class InBodies(Block):
    def forward(self, x: Any) -> Any:
        return x + torch.cond(
            x.sum() > 0, lambda x: x + 1, lambda x: super(InBodies, self).forward(x), (x,)
        )


def test_copies_have_bodies_of_their_own() -> None:
    """A pass edits the body of a higher-order op for the one node that calls it."""
    (_, ours), _ = captures(Stack(InBodies))
    read = [
        n.args[1] for n in ours.graph.nodes if n.op == "call_function" and "cond" in str(n.target)
    ]
    assert ours.copies == 2
    assert len({n.target for n in read}) == len(read) == 3
    assert {n.target for n in read} <= ours.bodies.keys()


def test_classes_and_modules_are_as_they_were() -> None:
    model = Stack(OfTwo, 4)
    model.requires_grad_(False)
    before = [dict(vars(k)) for k in (OfTwo, Block, nn.GELU)]
    held = [dict(m.__dict__) for m in model.modules()]
    captures(model)
    assert [dict(vars(k)) for k in (OfTwo, Block, nn.GELU)] == before
    assert [dict(m.__dict__) for m in model.modules()] == held


def test_a_decoder_with_its_default_cache() -> None:
    """The cache that a decoder makes is empty, so its layers are alike without it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 31, (2, 7))
    cap = Captured(model, (), {"input_ids": ids})
    assert cap.traced(False, cap.named).copies == 3
    assert any("'cache'" in n for n in cap.notes)
    (got,) = fx.Interpreter(cap.eval).run(ids, enable_io_processing=False)
    torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-6)


class Prefill(nn.Module):
    """A decoder whose keys are outputs: its cache cannot be left out."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: torch.Tensor) -> Any:
        out = self.decoder(ids, use_cache=True)
        return out.logits, [layer.keys for layer in out.past_key_values.layers]


@pytest.mark.parametrize("name", ["keys", "attentions"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_decoder_that_gives_more_than_its_logits(name: str, device: str) -> None:
    """What a model reads of its layers by a cache or by hooks is there as it is the long way."""
    transformers = pytest.importorskip("transformers")
    more = {"output_attentions": True, "use_cache": False} if name == "attentions" else {}
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        attn_implementation="eager", **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model = (model if more else Prefill(model)).to(device).requires_grad_(False)
    ids = torch.randint(0, 31, (2, 7))
    caps = [Captured(model, (ids,), repeat=repeat) for repeat in (True, False)]
    ours, long = (cap.traced(False, cap.named) for cap in caps)
    assert rows(ours.graph) == rows(long.graph)
    assert not any("alike" in n for n in caps[0].notes)


def test_nodes_grow_with_depth_and_traced_ops_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch traces of a deep model is one block: its ops are counted as they are run."""
    from torch.fx.experimental import proxy_tensor

    traced: list[int] = []
    original = proxy_tensor.proxy_call

    def counted(*args: Any, **kwargs: Any) -> Any:
        traced.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(proxy_tensor, "proxy_call", counted)
    counts: dict[object, int] = {}
    for depth in (2, 10):
        traced.clear()
        (cap, ours), _ = captures(Stack(Block, depth))
        counts[depth] = len(ours.graph.nodes)
        traced.clear()
        again = Captured(Stack(Block, depth).requires_grad_(False), tuple(cap.named.values()))
        again.traced(False, again.named)
        counts[depth, "traced"] = len(traced)
    assert counts[10] - counts[2] == 8 * 8  # four ops and four tensors a block
    assert counts[10, "traced"] - counts[2, "traced"] == 8  # one opaque op a block


class ByRow(nn.ModuleList):
    """Three blocks without a forward of their own, which is that of every module."""


def test_classes_are_as_they_were() -> None:
    """What a class has from its base it has from there again: a later patch of the base is seen."""
    model = Stack(Block, 3)
    model.more = ByRow([ByRow([Block(0), Block(1)]) for _ in range(2)])
    before = {kind: set(vars(kind)) for kind in map(type, model.modules())}
    cap = Captured(model.requires_grad_(False), (torch.randn(2, 4, WIDTH),))
    cap.traced(False, cap.named)
    assert {kind: set(vars(kind)) for kind in before} == before
