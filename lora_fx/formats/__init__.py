"""Adapter file formats, one a file; foreign names exist only here."""
