"""Rewrites of an exported ONNX graph for ONNX Runtime and float16, one pass in each file."""
