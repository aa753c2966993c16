"""Training: the loop, its objective, optimiser, state, processes and report."""
