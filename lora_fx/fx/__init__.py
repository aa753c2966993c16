"""The torch side: capture, the op table, Graph and Emitter, and the trainable module."""
