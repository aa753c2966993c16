"""The demo's data, and what it calls a failure; the demo itself runs in CI as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.cli import demo_data
from lora_fx.cli.demo_data import VOLUMES, topics
from lora_fx.cli.demo_stages import Result, Size, _judge, refusal, table
from lora_fx.errors import LoraFxError
from lora_fx.fx.load import minilm

GOOD: dict[str, Any] = {
    "probe": 0.56, "before": 0.56, "after": 0.65, "moved": 9, "loss": [1.0, 0.5],
    "predictions_equal": 10, "examples": 10, "targets": 36, "adapted_share": 1.0, "trained": 1,
    "frozen": 2, "bytes": {"adapter": 1, "model.onnx": 2}, "runtime_difference": 1e-5,
}  # fmt: skip


def test_volumes_are_stable_and_no_text_is_in_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(demo_data.docstrings())  # the whole standard library is parsed once
    monkeypatch.setattr(demo_data, "docstrings", lambda root: iter(found))
    a = topics(300, 100)
    monkeypatch.setattr(demo_data, "docstrings", lambda root: reversed(found))
    b = topics(300, 100)
    assert a == b
    assert len(a.names) == VOLUMES and set(a.train[1]) == set(range(VOLUMES))
    assert not set(a.train[0]) & set(a.test[0])
    counts = np.bincount(topics(10**6, 0).train[1])
    assert counts.min() > 0.4 * counts.mean()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"probe": 0.71, "before": 0.71, "after": 0.8}, "above .70"),
        ({"after": 0.60}, "expected +0.05"),
        ({"before": 0.5}, "B = 0 changed"),
        ({"predictions_equal": 9}, "predict differently"),
        ({"moved": 0}, "moved no prediction"),
        ({"loss": [1.0, 1.1]}, "did not lower"),
    ],
)
def test_what_is_not_as_promised_is_a_failure(change: dict[str, Any], words: str) -> None:
    result = Result({**GOOD, **change})
    _judge(result, Size.of(quick=False))
    assert words in "; ".join(result.failures)
    error = refusal(result)
    assert error is not None and error.exit_code == 1
    good = Result(dict(GOOD))
    _judge(good, Size.of(quick=False))
    assert refusal(good) is None and "+0.090" in table(good, Path("out"))


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    minilm.folder()
    monkeypatch.setattr(minilm, "SHA256", "0" * 64)
    with pytest.raises(LoraFxError, match="has sha256"):
        minilm.folder()
    monkeypatch.setattr(minilm, "PACKAGE", "no-such-package")
    with pytest.raises(LoraFxError, match="not installed"):
        minilm.folder()


def test_a_module_larger_than_a_volume_leaves_no_number_out(tmp_path: Path) -> None:
    for name, count in (("a", 5), ("b", 80), ("c", 15)):
        defs = (f'def f{i}():\n    """The {i}th function of {name}."""\n' for i in range(count))
        (tmp_path / f"{name}.py").write_text("".join(defs))
    made = topics(80, 20, root=tmp_path)
    assert made.names == ("a … b", "c … c")
    assert set(made.train[1]) == {0, 1}
