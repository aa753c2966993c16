"""What other runtimes than ONNX Runtime's Python package do with exported files."""
