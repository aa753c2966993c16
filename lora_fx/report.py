"""The report page: one result of a command as a self-contained HTML file, in pure Python."""

from lora_fx.report.page import page

__all__ = ["page"]
