"""Lowering: one node is replaced by several simpler nodes, for passes and for the exporter."""
