"""Random programs: everything that is accepted is right, everything refused is refused in words."""
