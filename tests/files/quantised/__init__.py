"""Quantised weights of files and graphs."""
