"""What is accepted is right at every size, and what is refused deserves it."""
