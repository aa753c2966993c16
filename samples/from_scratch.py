"""find, insert and fold in a hundred lines, on one MLP, with torch only.

Read this first if you want to work on lora-fx. lora-fx takes the same steps, by the same names, for
any op, any view of a weight and two graph libraries.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

import lora_fx

aten = torch.ops.aten


@dataclass
class Site:
    """One use of a weight: y = x @ view(W)."""

    node: fx.Node
    parameter: str
    transposed: bool  # the operand is Wᵀ


def capture(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    """Capture a flat graph of ATen ops; every weight is a get_attr by its name."""
    dims = ({0: torch.export.Dim.AUTO},)
    return torch.export.export(model, (x,), dynamic_shapes=dims).module(check_guards=False)


def find(gm: fx.GraphModule) -> list[Site]:
    """Find the uses of weights by data flow, so that nn.Linear and x @ w are treated alike."""
    weights: dict[fx.Node, tuple[str, bool]] = {}
    sites = []
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(gm.get_parameter(node.target), nn.Parameter):
            weights[node] = (node.target, False)
        elif node.target in (aten.t.default, aten.numpy_T.default) and node.args[0] in weights:
            name, turned = weights[node.args[0]]
            weights[node] = (name, not turned)
        elif node.target is aten.linear.default and node.args[1] in weights:
            name, turned = weights[node.args[1]]
            sites.append(Site(node, name, transposed=not turned))
        elif node.target is aten.matmul.default and node.args[1] in weights:
            sites.append(Site(node, *weights[node.args[1]]))
    return sites


def insert(gm: fx.GraphModule, rank: int, scale: float) -> dict[str, tuple[nn.Parameter, ...]]:
    """Add s·(x Aᵀ) Bᵀ at every site; A is random, B is zero, everything else is frozen."""
    gm.requires_grad_(False)
    adapter: dict[str, tuple[nn.Parameter, ...]] = {}
    for site in find(gm):
        w = gm.get_parameter(site.parameter)
        out, in_ = w.shape if site.transposed else w.shape[::-1]
        flat = site.parameter.replace(".", "_")
        a, b = nn.Parameter(torch.randn(rank, in_) / in_**0.5), nn.Parameter(torch.zeros(out, rank))
        gm.register_parameter(f"{flat}_a", a)
        gm.register_parameter(f"{flat}_b", b)
        adapter[site.parameter] = (a, b)
        with gm.graph.inserting_after(site.node):
            get_a, get_b = gm.graph.get_attr(f"{flat}_a"), gm.graph.get_attr(f"{flat}_b")
        with gm.graph.inserting_before(get_a.next):
            low = gm.graph.call_function(aten.linear.default, (site.node.args[0], get_a))
            up = gm.graph.call_function(aten.linear.default, (low, get_b))
            scaled = gm.graph.call_function(operator.mul, (up, scale))
            total = gm.graph.call_function(operator.add, (site.node, scaled))
        site.node.replace_all_uses_with(total)
        total.update_arg(0, site.node)
    gm.recompile()
    return adapter


def fold(gm: fx.GraphModule, adapter: dict[str, tuple[nn.Parameter, ...]], scale: float) -> None:
    """Replace W by W + s·BA in a graph without branches."""
    for site in find(gm):
        a, b = adapter[site.parameter]
        delta = scale * (b @ a)
        gm.get_parameter(site.parameter).data += delta if site.transposed else delta.t()


class Mlp(nn.Module):
    """One nn.Linear and one `h @ w` with a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 10)
        self.w = nn.Parameter(torch.randn(10, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x)) @ self.w


torch.manual_seed(0)
x, model = torch.randn(5, 6), Mlp().eval()
branched = capture(model, x)
adapter = insert(branched, rank=2, scale=2.0)
assert torch.equal(branched(x), model(x)), "B is zero"
for _, b in adapter.values():
    b.data.normal_()
folded = capture(Mlp().eval(), x)
folded.load_state_dict(model.state_dict())
fold(folded, adapter, scale=2.0)
assert not torch.allclose(branched(x), model(x))
torch.testing.assert_close(folded(x), branched(x))

keys = [t.key for t in lora_fx.find(model, (x,)).targets]
assert set(keys) == set(adapter), "lora_fx.find returns the same keys"
print(f"{len(adapter)} sites found, inserted and folded: {', '.join(adapter)}")
