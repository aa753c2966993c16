"""Why a model could not be captured: the line of the user's code, the cause, what to do."""

from __future__ import annotations

import linecache
import traceback

from lora_fx.errors import CaptureError, one_line

_CAUSES = (
    (
        "GuardOnDataDependentSymNode",
        "a branch or a size depends on a tensor's value",
        "compute both branches with torch.where, or make the value a Python argument",
    ),
    (
        "data-dependent",
        "a branch or a size depends on a tensor's value",
        "compute both branches with torch.where, or make the value a Python argument",
    ),
    (
        "aten._local_scalar_dense",
        "a tensor's value is read (.item(), int(), bool())",
        "keep it a tensor: torch.where, masks, or a Python argument",
    ),
    (
        "cache_utils.",
        "its outputs hold a key-value cache, which is no tensor",
        "call it with use_cache=False, or set config.use_cache = False before; "
        "export(…, cache=True) has the cache as tensors",
    ),
    (
        "references nonexistent attribute",
        "torch.fx has a use of its own for the name of a module, such as graph, that holds weights",
        "rename the module",
    ),
    ("numpy", "numpy is called on a tensor", "use torch's own functions"),
    (
        "FakeTensor",
        "a tensor made outside the model meets the traced ones",
        "register it as a buffer, or make it in forward",
    ),
)


_SIZES = ("mat1 and mat2", "must match", "size mismatch", "shape", "Expected size", "inconsist")


def explain(error: Exception, name: str, training: bool) -> CaptureError:
    """One message: which line of the user's code, why, and what to do."""
    mode = "train" if training else "eval"
    where = _user_line(error) or f"{name}.forward"
    text = f"{type(error).__name__}: {error}"
    for needle, why, todo in _CAUSES:
        if needle in text:
            return CaptureError(f"cannot capture {name} in {mode} mode at {where}: {why}", todo)
    if any(words in text for words in _SIZES):
        return CaptureError(
            f"cannot capture {name} in {mode} mode at {where}: sizes do not fit: "
            f"{one_line(error, 160)}",
            "check the example inputs against what the model expects",
        )
    return CaptureError(
        f"cannot capture {name} in {mode} mode at {where}: "
        f"{one_line(f'{type(error).__name__}: {error}', 160)}",
        "check that the model runs on the example inputs; -v prints the traceback",
    )


def _user_line(error: BaseException) -> str:
    """file:line `code` of the innermost frame that is neither torch's nor ours."""
    ours = __file__.rpartition("/lora_fx/")[0]
    inner = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = frame.f_code.co_filename
        if "/torch/" in path or path.startswith(ours + "/lora_fx/") or path.startswith("<"):
            continue
        if path.startswith(ours + "/passes/") or path.startswith(ours + "/cli/"):
            continue
        if (
            frame.f_code.co_name != "<module>"
            and "/lib/python3" in path
            and "site-packages" not in path
        ):
            continue
        inner = (path, line)
    if inner is None:
        return ""
    code = linecache.getline(*inner).strip()
    return f"{inner[0]}:{inner[1]} `{code}`"
