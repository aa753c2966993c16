"""Draws arguments of pure functions, one subject of the product a file; see old_against_new.py."""
