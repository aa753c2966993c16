"""Adapters of PEFT: configuration and names, reading and writing."""
