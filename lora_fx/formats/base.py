"""The import path of `File` and `refused` for packages that add an adapter format."""

from lora_fx.formats.checked_file import File
from lora_fx.formats.unsupported import refused

__all__ = ["File", "refused"]
