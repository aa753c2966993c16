"""Scripts of a new user."""
