"""Checkpoint folders and files: what their headers say, without torch."""
