"""Lowering: replace one node by several simpler nodes, for passes and for the exporter."""
