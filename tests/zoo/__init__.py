"""The tiny models that the tests adapt."""
