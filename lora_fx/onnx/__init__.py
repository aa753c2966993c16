"""The ONNX side: op table, Graph and Emitter on onnx_ir, export, sessions and providers."""
