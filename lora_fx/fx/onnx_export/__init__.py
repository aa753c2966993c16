"""The export of a captured module through torch's ONNX exporter."""
