"""The ONNX side of the IR: op table, data flow and emitter."""
