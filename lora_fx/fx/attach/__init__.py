"""Branches on the user's own live module, by hooks on its operations."""
