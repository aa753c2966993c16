"""The name under which packages that bring a format import `File` and `refused`."""

from lora_fx.formats.checked_file import File
from lora_fx.formats.unsupported import refused

__all__ = ["File", "refused"]
