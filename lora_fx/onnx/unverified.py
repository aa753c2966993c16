"""What was built and tested without a GPU, and has never run on one.

`lora-fx --version`, docs/serving.md and a note of each session that uses one of them say so. A row
goes when `pytest -m gpu` has passed on a machine with a GPU.
"""

from __future__ import annotations

CUDA_GRAPHS = "Session(cuda_graph=True)"
CUDA_PACKAGES = "onnxruntime-ep-cuda12 and -cuda13"
NEVER_RUN = (CUDA_GRAPHS, CUDA_PACKAGES)


def never_run(what: str) -> str:
    """Return the line that says so of one of NEVER_RUN."""
    return f"{what}: never run on a GPU; compare its outputs with those of provider='cpu' first"
