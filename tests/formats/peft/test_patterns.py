"""rank_pattern, alpha_pattern and rsLoRA: over random patterns PEFT's scales are ours."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_fx.formats.io import load_adapter, save_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

NAMES = ["fc", "h.0.fc", "h.0.up", "h.1.fc", "h.1.up", "ah.1.up", "h10fc"]


class Tree(nn.Module):
    """Layers whose names are endings and beginnings of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.h = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(3, 4), "up": nn.Linear(4, 5)}) for _ in range(2)
        )
        self.ah = nn.ModuleDict({"1": nn.ModuleDict({"up": nn.Linear(3, 2)})})
        self.h10fc = nn.Linear(2, 3)

    def forward(self, x: Any) -> Any:
        return x


PATTERNS = [
    "fc", "up", r"h\.0\.fc", "h.0.fc", "^fc", r"^h\.1\.up", "1.up", r"h\.\d\.fc", ".*up", "(fc|up)",
    r"h.*fc", "h10fc", r".*\.1\..*", "p", "[a-z]+", r"0\.[fu].",
]  # fmt: skip
# PEFT takes the first that matches and writes them sorted, so only sorted ones load as trained.
patterns = st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 6), max_size=3).map(
    lambda found: dict(sorted(found.items()))
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(patterns, patterns, st.booleans(), st.integers(1, 5), st.integers(1, 9))
def test_scales_are_those_of_peft(
    tmp_path: Path, ranks: dict[str, int], alphas: dict[str, int], rs: bool, r: int, alpha: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=r, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rs,
            target_modules=["fc", "up", "h10fc"], init_lora_weights=False,
        )  # fmt: skip
        model = peft.get_peft_model(Tree(), config)
        model.save_pretrained(tmp_path)
    unmatched = sorted(
        p for p in [*ranks, *alphas] if not any(re.match(rf"(.*\.)?({p})$", name) for name in NAMES)
    )
    got = load_adapter(tmp_path)
    said = [n for n in got.metadata["notes"] if "matches no module" in n]
    assert sorted(n.split("_pattern ")[1].split(" matches")[0] for n in said) == [
        repr(p) for p in unmatched
    ]
    save_adapter(got, tmp_path / "ours", force=True)
    again = load_adapter(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(Tree(), str(tmp_path / "ours"))
    for name in NAMES:
        layer = model.base_model.model.get_submodule(name)
        theirs = back.base_model.model.get_submodule(name)
        low = got.lowrank[f"{name}.weight"]
        assert low.rank == layer.r["default"] == theirs.r["default"], name
        assert low.scale == layer.scaling["default"] == theirs.scaling["default"], name
        assert again.lowrank[f"{name}.weight"].scale == low.scale
        want = layer.get_delta_weight("default").detach().numpy()
        assert np.abs(low.matrix(np.float32) - want).max() <= 1e-6 * np.abs(want).max()


def test_patterns_whose_order_was_lost_are_noted(tmp_path: Path) -> None:
    """PEFT sorts the table when it saves: what trained with 9 would then load with 2."""
    table = {"fc": 9, "^fc": 2}
    config = peft.LoraConfig(r=2, lora_alpha=4, alpha_pattern=table, target_modules=["fc"])
    peft.get_peft_model(Tree(), config).save_pretrained(tmp_path)
    got = load_adapter(tmp_path)
    assert got.lowrank["fc.weight"].alpha == 2
    notes = [n for n in got.metadata["notes"] if "alpha_pattern" in n]
    assert len(notes) == 1 and "'^fc' (2) and 'fc' (9) both match 'fc'" in notes[0]
