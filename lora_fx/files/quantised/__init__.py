"""Quantised weights as files and graphs hold them, one family of formats a file."""
