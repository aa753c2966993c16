"""Training: the loop, its objective, optimizer, state, processes and report."""
