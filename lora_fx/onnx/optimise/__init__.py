"""Rewrites of an onnx_ir model, one a file: passes that onnx_ir's own pass manager runs too."""
