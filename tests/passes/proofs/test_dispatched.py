"""What runs in a block of recorded choices is as it was: afterwards, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fx.passes.proofs.live_choices import Dispatched


def branch(x: Tensor) -> Tensor:
    y: Tensor = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))
    return y


def repeated(x: Tensor) -> Tensor:
    from torch._higher_order_ops.while_loop import while_loop

    _, y = while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 2), (torch.tensor(0), x))
    return y


def scanned(x: Tensor) -> Tensor:
    from torch._higher_order_ops.scan import scan

    return scan(lambda c, x: (c + x, c * x), torch.zeros(x.shape[1:]), x)[1]


HIGHER_ORDER: dict[str, Callable[[Tensor], Tensor]] = {
    "cond": branch,
    "while_loop": repeated,
    "scan": scanned,
}


@pytest.mark.parametrize("name", HIGHER_ORDER)
def test_a_higher_order_op_runs_as_before(name: str) -> None:
    x, run = torch.randn(4, 3), HIGHER_ORDER[name]
    torch._dynamo.reset()
    with Dispatched({}):
        inside = run(x)
    assert inside.equal(run(x))
    with torch.no_grad():  # guards of another kind: what was compiled above is not taken
        assert inside.equal(run(x))


def test_a_compiled_module_stays_compiled() -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    x = torch.randn(4, 3)
    compiled = torch.compile(net, backend=backend)
    with Dispatched({}), torch.no_grad():
        inside = compiled(x)
    assert inside.equal(net(x)) and len(graphs) == 1
    compiled(x)  # with gradients
    assert len(graphs) == 2
