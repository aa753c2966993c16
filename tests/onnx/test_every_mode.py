"""The table method × mode: a cell is a test against PEFT, or a reason, the refusal's own text.

A cell of METHODS is YES, or a regex of the message of LoraFxError. The page docs/modes.md has the
same table. A new method is a row here; a new way to use adapters is a function in COLUMNS.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.adapter.factor_tensors import slots_of, with_values
from lora_fx.adapter.updates import Hadamard, Kronecker
from lora_fx.adapter.variant import VARIANTS
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx import Session, adapter_starts
from lora_fx.onnx.session import open_session

GATE = 1e-6
YES = "yes"


class Net(nn.Module):
    """A lookup, two layers that are adapted, and a head; no two sizes are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.fc = nn.Linear(8, 16)
        self.mid = nn.Linear(16, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mid(torch.relu(self.fc(self.emb(input_ids))))))


class Causal(Net):
    """The same, as PEFT's models of task CAUSAL_LM call it: only those have aLoRA."""

    config = transformers.PretrainedConfig()

    def forward(self, input_ids: torch.Tensor, **more: object) -> torch.Tensor:
        return super().forward(input_ids)

    def prepare_inputs_for_generation(self) -> None:
        raise NotImplementedError


IDS = torch.randint(0, 13, (3, 5), generator=torch.Generator().manual_seed(0))
TARGETS = ["fc", "mid"]


def net(kind: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    return kind().eval()


def of_peft(config: peft.PeftConfig) -> Net:
    """The net as PEFT can wrap it."""
    return net(Causal if config.task_type else Net)


def of_net(state: dict[str, torch.Tensor]) -> np.ndarray:
    """The outputs with these tensors in the place of the net's own."""
    model = net()
    model.load_state_dict({**model.state_dict(), **state})
    with torch.no_grad():
        return model(IDS).numpy()


@dataclass(frozen=True)
class Made:
    """An adapter in a folder of PEFT's, and what the net gives with it."""

    folder: Path
    want: np.ndarray
    model: Any = None


def by_peft(config: peft.PeftConfig) -> Callable[[Path], Made]:
    """Let PEFT make an adapter, whose forward is the oracle."""

    def make(folder: Path) -> Made:
        model = peft.get_peft_model(of_peft(config), copy.deepcopy(config)).eval()
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not p.requires_grad:
                    continue
                if "magnitude" in name:
                    p.mul_(0.7 + 0.7 * torch.rand(p.shape, generator=g))
                else:
                    p.add_(0.3 * torch.randn(p.shape, generator=g))
        model.save_pretrained(str(folder))
        with torch.no_grad():
            return Made(folder, model(input_ids=IDS).numpy(), model)

    return make


def by_insert(variant: str) -> Callable[[Path], Made]:
    """Let insert make an adapter of one of our own variants; the oracle is W + ΔW."""

    def make(folder: Path) -> Made:
        module = lora_fx.insert(net(), (IDS,), rank=2, variant=variant, include=TARGETS)
        rng = np.random.default_rng(1)
        entries = {}
        for key, low in module.adapter().lowrank.items():
            values = {s.field: s.value for s in slots_of(key, low)}
            values["b"] = 0.4 * rng.standard_normal(values["b"].shape, np.float32)
            entries[key] = with_values(low, values)
        adapter = replace(module.adapter(), entries=entries)
        lora_fx.save_adapter(adapter, folder)
        state = net().state_dict()
        for key, delta in adapter.deltas().items():
            state[key] = state[key] + torch.from_numpy(delta)
        with torch.no_grad():
            model = Net().double()
            model.load_state_dict({k: v.double() for k, v in state.items()})
            return Made(folder, model(IDS).numpy())

    return make


def lora(**more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, **more)


# --- columns: what is done with an adapter in a folder; each returns the outputs -----------------


def trained(made: Made, path: Path) -> np.ndarray:
    module = lora_fx.insert(net(), (IDS,), adapter=made.folder).train()
    out = module(IDS)
    (out**2).sum().backward()
    for name, p in module.named_parameters():
        if p.requires_grad and "lora_" in name:
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), name
    if made.model is not None and hasattr(made.model.base_model.model.fc, "lora_B"):
        (made.model(input_ids=IDS) ** 2).sum().backward()
        theirs = made.model.base_model.model.fc.lora_B["default"].weight.grad
        ours = module.get_parameter("fc.lora_B.weight").grad
        assert ours is not None and rel(ours.numpy(), theirs.numpy()) < GATE
    return out.detach().numpy()


def merged(made: Made, path: Path) -> np.ndarray:
    base = path / "base.safetensors"
    save_file(net().state_dict(), base)
    lora_fx.merge(base, [made.folder], path / "merged.safetensors")
    return of_net(load_file(path / "merged.safetensors"))


def switched(made: Made, path: Path) -> np.ndarray:
    file = path / "m.onnx"
    lora_fx.export(
        net(), file, (IDS,), adapters={"de": made.folder}, mode="switch", probe="none", force=True
    )
    session = Session(file)
    session.load("de", path / "de.onnx_adapter")
    session.load("later", made.folder)  # without an export
    (out,) = session.run({"input_ids": IDS.numpy()}, adapter="de").values()
    (later,) = session.run({"input_ids": IDS.numpy()}, adapter="later").values()
    assert rel(later, out) < GATE
    return out


def loaded(made: Made, path: Path) -> np.ndarray:
    file = path / "m.onnx"
    lora_fx.export(
        net(), file, (IDS,), adapters={"de": made.folder}, mode="load", probe="none", force=True
    )
    outs = []
    for adapter in (path / "de.onnx_adapter", made.folder):
        (out,) = Session(file, adapter=adapter).run({"input_ids": IDS.numpy()}).values()
        outs.append(out)
    assert rel(*outs) < GATE
    return outs[0]


def by_row(made: Made, path: Path) -> np.ndarray:
    """Two rows of the base beside those of the adapter."""
    file = path / "m.onnx"
    lora_fx.export(
        net(), file, (IDS,), adapters={"de": made.folder}, mode="batch", probe="none", force=True
    )
    both = np.concatenate([IDS.numpy(), IDS.numpy()])
    rows = np.array([1, 1, 1, 0, 0, 0])
    feeds = {"input_ids": both, "adapter_ids": rows}
    invocation = lora_fx.load_adapter(made.folder).invocation
    if invocation:
        feeds["adapter_starts"] = adapter_starts(both, invocation)
    (out,) = open_session(file).run(feeds).values()
    with torch.no_grad():
        assert rel(out[3:], net()(IDS).numpy()) < GATE
    return out[:3]


def saved(made: Made, path: Path) -> np.ndarray:
    """Read, saved, and merged from there; LoHa and LoKr have a place in kohya's files alone.

    An aLoRA cannot be merged, so that it runs from there.
    """
    adapter = lora_fx.load_adapter(made.folder)
    if adapter.invocation:
        lora_fx.save_adapter(adapter, path / "again")
        with torch.no_grad():
            return lora_fx.insert(net(), (IDS,), adapter=path / "again")(IDS).numpy()
    if any(isinstance(entry, (Hadamard, Kronecker)) for entry in adapter.values()):
        again = path / "again.safetensors"
        lora_fx.save_adapter(adapter, again, format="kohya")
    else:
        again = path / "again"
        lora_fx.save_adapter(adapter, again)
    return merged(Made(again, made.want), path)


def read_by_peft(made: Made, path: Path) -> np.ndarray:
    adapter = lora_fx.load_adapter(made.folder)
    if any(isinstance(entry, Hadamard) for entry in adapter.values()):  # as training has it
        adapter = lora_fx.insert(net(), (IDS,), adapter=adapter).adapter()
    lora_fx.save_adapter(adapter, path / "again")
    base = of_peft(peft.PeftConfig.from_pretrained(str(path / "again")))
    model = peft.PeftModel.from_pretrained(base, str(path / "again")).eval()
    with torch.no_grad():
        return model(input_ids=IDS).numpy()


COLUMNS: dict[str, Callable[[Made, Path], np.ndarray]] = {
    "trained": trained,
    "merged": merged,
    "switched": switched,
    "loaded": loaded,
    "by row": by_row,
    "saved": saved,
    "read by PEFT": read_by_peft,
}
GRAPHS = ("trained", "switched", "loaded", "by row")
"""The columns in which a graph, and no checkpoint, takes the adapter."""
SLOTS = ("switched", "loaded", "by row")
"""The columns in which a file holds factors."""
NO_LOW_RANK = "is LoHa of rank 4² in a matrix|is LoKr whose factors have no low rank"
OFT = "is OFT, which turns the weight by a matrix of full rank"
ALORA = "is an aLoRA, which acts from its invocation tokens on"
NOT_OF_LORA = "which peft_type LORA cannot store"
ROWS_OF_QALORA = "QALoRA|size mismatch|expected"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        make: Writes an adapter of the method into a folder.
        cells: Column → the refusal; columns that it lacks are YES.
        rank: The rank that the note says, of a method that is taken as exact LoRA.
    """

    make: Callable[[Path], Made]
    cells: dict[str, str] = field(default_factory=dict)
    rank: str = ""


METHODS: dict[str, Method] = {
    "lora": Method(by_peft(lora())),
    "rslora": Method(by_peft(lora(use_rslora=True))),
    "dora": Method(by_peft(lora(use_dora=True))),
    "lora-fa": Method(by_insert("lora-fa")),
    "lora+": Method(by_insert("lora+")),
    "qalora": Method(by_insert("qalora:4"), {"read by PEFT": ROWS_OF_QALORA}),
    "loha": Method(by_peft(peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS)), rank="rank 4 "),
    "loha of a high rank": Method(
        by_peft(peft.LoHaConfig(r=4, alpha=3, target_modules=TARGETS)),
        dict.fromkeys(SLOTS, NO_LOW_RANK),
    ),
    "vera": Method(by_peft(peft.VeraConfig(r=3, target_modules=TARGETS, d_initial=0.5))),
    "LoKr": Method(
        by_peft(peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS, decompose_factor=2)),
        {"read by PEFT": NOT_OF_LORA},
        rank="rank 4 ",
    ),
    "LoKr of full rank": Method(
        by_peft(peft.LoKrConfig(r=32, alpha=30, target_modules=TARGETS, decompose_factor=2)),
        {**dict.fromkeys(GRAPHS, NO_LOW_RANK), "read by PEFT": NOT_OF_LORA},
    ),
    "OFT": Method(
        by_peft(peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS)),
        {**dict.fromkeys(GRAPHS, OFT), **dict.fromkeys(("saved", "read by PEFT"), NOT_OF_LORA)},
    ),
    "aLoRA": Method(
        by_peft(lora(alora_invocation_tokens=[int(IDS[0, 2])], task_type="CAUSAL_LM")),
        dict.fromkeys(("merged", "loaded"), ALORA),
    ),
    "a bias beside LoRA": Method(by_peft(lora(lora_bias=True))),
    "a whole head": Method(by_peft(lora(modules_to_save=["head"]))),
    "trained rows": Method(by_peft(lora(trainable_token_indices={"emb": [1, 4]}))),
}
CELLS = [(method, column) for method in METHODS for column in COLUMNS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @lru_cache
    def make(method: str) -> Made:
        return METHODS[method].make(tmp_path_factory.mktemp("adapter") / "de")

    return make


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("method", "column"), CELLS)
def test_a_cell(method: str, column: str, folders: Callable[[str], Made], tmp_path: Path) -> None:
    made = folders(method)
    cell = METHODS[method].cells.get(column, YES)
    use = COLUMNS[column]
    if cell != YES:
        kinds = RuntimeError if column == "read by PEFT" and method == "qalora" else LoraFxError
        with pytest.raises(kinds, match=cell):
            use(made, tmp_path)
        return
    out = use(made, tmp_path)
    with torch.no_grad():
        effect = rel(made.want, net()(IDS).numpy())
    assert 0.05 < effect < 5, "an effect that is seen"
    assert rel(out, made.want) < GATE


def test_the_rows_are_all_methods() -> None:
    assert set(VARIANTS) <= set(METHODS)


def test_the_page_has_the_table() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "modes.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    (head, *shown) = (row for row in rows if len(row) == len(COLUMNS) + 1)
    assert head == ["method", *COLUMNS]
    table = [
        [name, *("no" if column in method.cells else "yes" for column in COLUMNS)]
        for name, method in METHODS.items()
    ]
    assert shown == table


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.rank])
def test_a_note_says_the_exact_rank(
    method: str, folders: Callable[[str], Made], tmp_path: Path
) -> None:
    report = lora_fx.export(
        net(), tmp_path / "m.onnx", (IDS,), adapters={"de": folders(method).folder}, mode="switch",
        probe="none",
    )  # fmt: skip
    (note,) = [line for line in report.warnings if "exact LoRA" in line]
    assert METHODS[method].rank in note and "fc.weight, mid.weight" in note
