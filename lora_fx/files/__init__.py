"""Files on disk: atomic writing, locks, copying, strict safetensors and checkpoint folders."""
