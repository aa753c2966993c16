"""How a model becomes export graphs: tracing, its inputs and calls, decoders with a cache."""
