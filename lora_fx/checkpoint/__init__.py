"""Checkpoint folders and files, read without torch: plan, merge, extract, verify, doctor."""
