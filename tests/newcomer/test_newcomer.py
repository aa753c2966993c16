"""Five scripts of a new user, written from the pages alone; each asserts its own result."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = ("tenants_onnx", "speech_gru", "two_towers", "bert_checkpoint", "sensor_cnn")


# torch.onnx.export copies torch's own LeafSpec, of which torch warns.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_a_new_user_runs(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).with_name(f"{script}.py")), run_name="__main__")
