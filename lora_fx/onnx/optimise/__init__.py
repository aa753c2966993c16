"""Rewrites of an onnx_ir model: passes that onnx_ir's own pass manager runs too."""
