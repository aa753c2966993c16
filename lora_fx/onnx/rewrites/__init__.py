"""Rewrites of an exported ONNX graph, one pass a file, for ONNX Runtime and for float16."""
