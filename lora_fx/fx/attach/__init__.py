"""Branches on the user's own live module, which take effect when its operations run."""
