"""The torch side: capture, its op table, Graph and Emitter, the trainable module."""
