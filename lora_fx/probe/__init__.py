"""The probe of a file: an input, what the outputs were on it, and the verdict on another run."""
