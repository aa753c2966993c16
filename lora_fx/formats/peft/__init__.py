"""Adapters of PEFT: their configuration, names, reading and writing."""
