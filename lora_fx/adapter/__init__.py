"""Low-rank updates, their variants and first values, and the adapter that holds them."""
