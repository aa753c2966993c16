"""A captured module through torch's ONNX exporter."""
