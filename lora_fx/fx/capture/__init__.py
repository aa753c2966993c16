"""Capture models as export graphs: tracing, its inputs and calls, decoders with a cache."""
