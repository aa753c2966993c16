"""Low-rank updates, their variants and initial values, and the adapter that holds them."""
