"""Explain why a capture failed: the line of the user's code, the cause, and what to do."""

from __future__ import annotations

import re
import traceback

from lora_fx.errors import CaptureError, one_line

TAKEN = "torch.fx itself uses the name of a module that holds weights, such as graph"
_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        "GuardOnDataDependentSymNode|data-dependent",
        "a branch or a size depends on a tensor's value",
        "compute both branches with torch.where, or make the value a Python argument",
    ),
    (
        r"aten\._local_scalar_dense",
        "a tensor's value is read (.item(), int(), bool())",
        "keep it a tensor (torch.where, masks), or pass the value as a Python argument",
    ),
    (
        "references nonexistent attribute",
        TAKEN,
        "rename the module",
    ),
    ("numpy", "numpy is called on a tensor", "use torch's own functions"),
    (
        "FakeTensor",
        "a tensor that was made outside the model is used in the traced code",
        "register it as a buffer, or make it in forward",
    ),
)
"""(pattern of the error's text, cause, hint); the first that matches is used."""
_OF_SIZES = ("mat1 and mat2", "must match", "size mismatch", "shape", "Expected size", "inconsist")


def explain(error: Exception, name: str, training: bool) -> CaptureError:
    """The error to raise: which line of the user's code it was, why, and what to do."""
    mode = "train" if training else "eval"
    where = _user_line(error) or f"{name}.forward"
    text = f"{type(error).__name__}: {error}"
    why = one_line(text, 160)
    cure = "check that the model runs on the example inputs; -v prints the traceback"
    if any(words in text for words in _OF_SIZES):
        why = f"sizes do not fit: {one_line(error, 160)}"
        cure = "check the example inputs against what the model expects"
    for pattern, known_cause, known_cure in _CAUSES:
        if re.search(pattern, text):
            why = known_cause
            cure = known_cure
            break
    return CaptureError(f"cannot capture {name} in {mode} mode at {where}: {why}", cure)


def _user_line(error: BaseException) -> str:
    """file:line `code` of the innermost frame that is neither torch's nor ours."""
    root = __file__.rpartition("/lora_fx/")[0]
    ours = ("<", *(f"{root}/{folder}/" for folder in ("lora_fx", "passes", "cli")))
    line = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = frame.filename
        is_standard = "/lib/python3" in path and "site-packages" not in path
        is_library = "/torch/" in path or (is_standard and frame.name != "<module>")
        if not is_library and not path.startswith(ours):
            line = f"{path}:{frame.lineno} `{frame.line}`"
    return line
