"""Lowering: what one node holds as nodes of its own, for passes and in an exporter's operators."""
