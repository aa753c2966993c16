"""Adapter file formats, one module each; the names of other libraries appear only here."""
