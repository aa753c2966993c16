"""Small models of three domains: robots, tables and recommendations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Policy(nn.Module):
    """A vision-language-action policy: patches, words and the arm's state in; actions out.

    Each step of the actions has a query of its own, which attends to all that was read. As in π0,
    the head gives the flow from noise to actions.
    """

    def __init__(self, words: int, width: int, heads: int, state: int, steps: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.words = nn.Embedding(words, width)
        self.state = nn.Linear(state, width)
        self.actions = nn.Linear(state + 1, width)
        self.queries = nn.Parameter(torch.zeros(steps, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.1, batch_first=True)
        self.trunk = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.flow = nn.Linear(width, state)

    def forward(
        self, image: Tensor, words: Tensor, state: Tensor, noisy: Tensor, time: Tensor
    ) -> Tensor:
        seen = self.patches(image).flatten(2).transpose(1, 2)
        steps = noisy.shape[1]
        timed = torch.cat([noisy, time[:, None, None].expand(-1, steps, 1)], -1)
        queries = self.actions(timed) + self.queries
        tokens = torch.cat([seen, self.words(words), self.state(state)[:, None], queries], 1)
        return self.flow(self.trunk(tokens)[:, -steps:])


class Table(nn.Module):
    """Attention over tables, as TabPFN's: between the columns of a row, then between the rows.

    The rows with a label are context; each row that is asked for attends to them.
    """

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.cell = nn.Linear(1, width)
        self.label = nn.Embedding(classes, width)
        self.columns = nn.MultiheadAttention(width, heads, batch_first=True)
        self.rows = nn.MultiheadAttention(width, heads, batch_first=True)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU())
        self.outer = nn.Linear(2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.out = nn.Linear(width, classes)

    def forward(self, known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
        """Numbers [batch, rows, columns], their labels [batch, rows] → logits of other rows."""
        context = self.rows_of(known) + self.label(labels)
        query = self.rows_of(asked)
        query = self.norms[1](query + self.rows(query, context, context, need_weights=False)[0])
        return self.out(self.norms[2](query + self.outer(self.inner(query))))

    def rows_of(self, numbers: Tensor) -> Tensor:
        """Numbers [batch, rows, columns] → a vector for each row."""
        cells = self.cell(numbers[..., None])
        batch, rows, columns, width = cells.shape
        cells = cells.reshape(batch * rows, columns, width)
        cells = self.norms[0](cells + self.columns(cells, cells, cells, need_weights=False)[0])
        return cells.mean(1).view(batch, rows, width)


class Recommender(nn.Module):
    """A recommender as DLRM: bags of categories, a network of numbers, and their products."""

    def __init__(self, sizes: tuple[int, ...], numbers: int, width: int) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="mean") for rows in sizes)
        self.bottom = nn.Sequential(nn.Linear(numbers, 2 * width), nn.ReLU())
        self.dense = nn.Linear(2 * width, width)
        vectors = len(sizes) + 1
        self.top = nn.Sequential(nn.Linear(width + vectors * (vectors - 1) // 2, 20), nn.ReLU())
        self.clicks = nn.Linear(20, 4)
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, -1), persistent=False)

    def forward(self, numbers: Tensor, first: Tensor, second: Tensor) -> Tensor:
        dense = self.dense(self.bottom(numbers))
        ids = (first, second)
        bags = [bag(chosen) for bag, chosen in zip(self.bags, ids, strict=True)]
        vectors = torch.stack([dense, *bags], 1)
        products = vectors @ vectors.transpose(1, 2)
        chosen = products[:, self.pairs[0], self.pairs[1]]
        return self.clicks(self.top(torch.cat([dense, chosen], 1)))
