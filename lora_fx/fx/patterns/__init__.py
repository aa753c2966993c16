"""Shapes of graphs that passes look for: attention, GELU, chains of elementwise operations."""
