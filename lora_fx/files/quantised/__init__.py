"""Quantised weights in files and graphs; each file of this folder has one family of formats."""
