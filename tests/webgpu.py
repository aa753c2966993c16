"""Run the tests marked gpu on WebGPU, computed on the CPU: `python -m tests.webgpu`.

No GPU is needed, but a Vulkan driver is: on Debian, mesa-vulkan-drivers and libvulkan1. The tests
run in an environment of their own, which is made at the first call: lora-fx, the runtime and its
WebGPU provider are installed there, because onnxruntime and onnxruntime-gpu share a folder. All
other packages are those of the environment that this is called in. The exit code is pytest's, or
1 where the provider cannot be used.

    python -m tests.webgpu                                      all of them
    python -m tests.webgpu -- tests/onnx/test_gpu.py -k bert    some tests
    python -m tests.webgpu --folder OTHER                       in another new folder
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("onnxruntime==1.32.0", "onnxruntime-ep-webgpu==0.4.0")
"""What the tests were last run with."""
ASK = "from lora_fx.onnx.webgpu import webgpu_devices; webgpu_devices()"


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment(folder: Path) -> None:
    """Make an environment with packages of its own before those of this one."""
    venv.create(folder, with_pip=True)
    python = str(python_of(folder))
    where = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    here = [path for path in sys.path if path.endswith("site-packages")]
    (Path(where.strip()) / "others.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
    install: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--force-reinstall",
    ]
    subprocess.run([*install, *PACKAGES], check=True)
    subprocess.run([*install, str(ROOT)], check=True)


def main(arguments: Sequence[str]) -> int:
    """Make the environment if there is none, and run pytest in it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.webgpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / ".venv-webgpu",
        help="The environment's folder; it is made if it does not exist.",
    )
    parser.add_argument("pytest", nargs="*", help="Arguments of pytest, after --.")
    options = parser.parse_args(arguments)
    if not python_of(options.folder).exists():
        make_environment(options.folder)

    python = str(python_of(options.folder))
    environment = {**os.environ, "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1"}
    usable = subprocess.run(
        [python, "-c", ASK], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if usable.returncode:
        print(usable.stderr.strip().splitlines()[-1], file=sys.stderr)
        return 1
    command = [python, "-m", "pytest", "-m", "gpu", "-n", "0", *options.pytest]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
