"""The report page: one result of a command as a self-contained HTML file, in pure Python."""

from lora_fx.page.page import page

__all__ = ["page"]
