"""Adapter file formats, one module each; the names of other libraries appear only here.

passes/README.md says how to add one.
"""
