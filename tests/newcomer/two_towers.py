"""A recommender of two towers over one table of words, with an adapter for each customer."""

import torch
from torch import nn

import lora_fx


class Recommender(nn.Module):
    """Scores of items for users; both towers read the same table of words."""

    def __init__(self):
        super().__init__()
        self.user_words = nn.Embedding(60, 16)
        self.item_words = nn.Embedding(60, 16)
        self.item_words.weight = self.user_words.weight
        self.user_tower = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
        self.item_tower = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))

    def forward(self, user, item):
        user = self.user_tower(self.user_words(user).mean(1))
        item = self.item_tower(self.item_words(item).mean(1))
        return (user * item).sum(-1)


torch.manual_seed(0)
net = Recommender().eval()
user, item = torch.randint(0, 60, (32, 5)), torch.randint(0, 60, (32, 4))
base = net(user, item).detach()

# The table is tied: one update of it serves both towers.
model = lora_fx.insert(net, (user, item), rank=3, include="*")
print(model.report())
adapters, scores = {}, {}
for customer in ("books", "shoes"):
    model.load_adapter(
        lora_fx.insert(net, (user, item), rank=3, include="*").adapter(), name=customer
    )
    model.activate(customer)
    bought = torch.randint(0, 2, (32,)).float()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(user, item), bought)
        loss.backward()
        optimizer.step()
    model.eval()
    adapters[customer], scores[customer] = model.adapter(), model(user, item).detach()


def by_hand(adapter):
    """The scores of the plain class, with W + alpha/rank * B A in its weights."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for key, update in adapter.items():
        change = torch.from_numpy(update.alpha / update.rank * update.b @ update.a)
        state[key] += change.T if key == "user_words.weight" else change
    state["item_words.weight"] = state["user_words.weight"]
    copy = Recommender().eval()
    copy.load_state_dict(state)
    return copy(user, item).detach()


for customer in ("shoes", "books", "shoes"):
    model.activate(customer)
    assert torch.equal(model(user, item), scores[customer])
    assert torch.allclose(scores[customer], by_hand(adapters[customer]), atol=1e-5)
model.activate(None)
assert torch.equal(model(user, item), base)
assert not torch.allclose(scores["books"], scores["shoes"])
