"""What is wrong with a base and an adapter: checks of the base, of the adapter and of the pair."""
