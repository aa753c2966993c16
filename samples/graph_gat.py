"""Adapt a graph network (GATv2 of PyTorch Geometric) to find the community of each node.

`python samples/graph_gat.py` needs `pip install 'lora-fx[domains]'`. The layers are PyTorch
Geometric's own, with random weights: graph networks are trained for each graph anew.
The task is made: nodes know noisy features, and most of their neighbours are of their community.
"""

from __future__ import annotations

import torch
from domains import Batch, adapt, prove, redraw, train
from torch import nn
from torch.nn.functional import cross_entropy
from torch_geometric.nn.models import GAT

COMMUNITIES, FEATURES = 3, 16
torch.manual_seed(0)
centres = torch.randn(COMMUNITIES, FEATURES)


def batch(nodes: int = 90, edges: int = 400) -> Batch:
    """A graph of three communities; 4 of 5 edges stay inside one."""
    labels = torch.arange(nodes) % COMMUNITIES
    source = torch.randint(0, nodes, (edges,))
    inside = torch.rand(edges) < 0.8
    target = torch.randint(0, nodes // COMMUNITIES, (edges,)) * COMMUNITIES + labels[source]
    target = torch.where(inside, target, torch.randint(0, nodes, (edges,)))
    x = 0.3 * centres[labels] + torch.randn(nodes, FEATURES)
    return {"x": x, "edge_index": torch.stack([source, target]), "labels": labels}


base = redraw(GAT(FEATURES, 32, 2, COMMUNITIES, v2=True, heads=4, dropout=0.0).eval())
print("GATv2, 2 layers of 4 heads, random weights")

batches = [batch() for _ in range(4)]
inputs = {name: batches[0][name] for name in ("x", "edge_index")}
adapted = adapt(base, inputs)


def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The cross entropy of all nodes."""
    return cross_entropy(module(x=batch["x"], edge_index=batch["edge_index"]), batch["labels"])


train(adapted, batches, loss)
smaller = batch(nodes=30, edges=100)  # random inputs would name nodes that are not there
others = {name: smaller[name] for name in inputs}
prove(base, adapted, inputs, others=others)
