"""Sessions of ONNX Runtime that write nothing to stderr.

The runtime's log quotes nodes and values as the file calls them: a name with a line break is a
second line of error on a terminal, and an escape sequence repaints it. Whatever it logs as an error
it raises too, and exceptions are told in one line, without control characters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as ort

FATAL = 4


def quiet_options() -> ort.SessionOptions:
    """Return options for a session without logs, and set the process's default to no logs."""
    import onnxruntime as ort

    ort.set_default_logger_severity(FATAL)
    options = ort.SessionOptions()
    options.log_severity_level = FATAL
    return options
