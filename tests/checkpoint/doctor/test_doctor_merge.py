"""doctor finds what merge would refuse: every bad pair of the tests, by merge's own words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lora_fx
from lora_fx import Adapter, Full
from tests.checkpoint.doctor.test_doctor import run
from tests.checkpoint.families import FAMILIES, tied
from tests.checkpoint.made import adapter, factors
from tests.checkpoint.refused_bases import BASES, Q, base
from tests.checkpoint.refused_pairs import PAIRS, RNG
from tests.checkpoint.test_merge_refusals import VALUES
from tests.checkpoint.test_untie_families import HEAD, LOOKUP

SAMPLED = ("NaN in the base", "infinity in the base", "scale without measure")
"""What a plan cannot see, and samples can."""
NOT_PAIRS = {*VALUES, "weight is nan", "given twice", "rank of a sum", "weight of a whole tensor"}
NOT_PAIRS |= {n for n in PAIRS if n.startswith("output")}
"""What is wrong with merge's other arguments, not with the pair."""


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in NOT_PAIRS or n in SAMPLED])
def test_doctor_refuses_what_merge_refuses(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1 and merge's own words; 2 where a file cannot be read at all, which names it too."""
    build, texts = PAIRS[name]
    build(tmp_path)
    pair = tmp_path / "base", tmp_path / "adapter"
    code, found = run(*pair)
    said = capsys.readouterr().err
    assert not found["ok"]
    if code == 2:
        assert name in BASES or name == "pickled adapter"
        assert all(t in said for t in texts), said
        return
    assert code == 1
    errors = [f for f in found["findings"] if f["severity"] == "error"]
    assert errors and all(f["found"] and f["hint"] for f in errors)
    if name in SAMPLED:
        assert found["merge"] == "" and all(f"{Q}.weight" in f["keys"] for f in errors)
        return
    with pytest.raises(lora_fx.LoraFxError) as refusal:
        lora_fx.merge(*pair, tmp_path / "out")
    assert found["merge"] == refusal.value.message
    text = refusal.value.message + refusal.value.hint + str(errors)
    assert all(t in text for t in texts if t != "not known"), text


@pytest.mark.parametrize("name", FAMILIES)
def test_an_update_of_one_use(name: str, tmp_path: Path) -> None:
    _, _, _, table, head = FAMILIES[name]
    tied(name, tmp_path / "base")
    for key, entry in ((head, HEAD), (table, LOOKUP)):
        lora_fx.save_adapter(Adapter({key: entry}), tmp_path / key)
        code, found = run(tmp_path / "base", tmp_path / key)
        (error,) = [f for f in found["findings"] if f["severity"] == "error"]
        assert code == 1 and error["check"] == "tied weights" and error["keys"] == [key]
        assert "--untie" in error["hint"] and "one of two uses" in found["merge"]


def test_what_a_flag_of_merge_would_allow(tmp_path: Path) -> None:
    """A new head, and a second merge: refused by merge without the flag, so errors here."""
    base(tmp_path)
    entries = lora_fx.load_adapter(adapter(tmp_path / "a", {Q: factors(RNG, 8, 6, 2)})).entries
    head = Full(np.ones((3, 6), "f4"))
    lora_fx.save_adapter(Adapter({**entries, "score.weight": head}), tmp_path / "head")
    code, found = run(tmp_path / "base", tmp_path / "head")
    (error,) = [f for f in found["findings"] if f["severity"] == "error"]
    assert code == 1 and error["keys"] == ["score.weight"] and "--add" in error["hint"]
    lora_fx.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    code, found = run(tmp_path / "out", tmp_path / "a")
    (error,) = [f for f in found["findings"] if f["severity"] == "error"]
    assert code == 1 and "--again" in error["hint"] and "already" in found["merge"]
    code, found = run(tmp_path / "base", tmp_path / "a")
    assert code == 0 and found["ok"] and found["merge"] == ""
