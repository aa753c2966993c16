"""The zoo by lot: architectures that nobody picked, made small by rule."""
