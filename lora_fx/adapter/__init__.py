"""What is learnt: low-rank updates, their variants and first values, and the adapter of them."""
