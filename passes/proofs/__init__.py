"""Prove a result before it is written: run it, and compare it with its reference."""
