"""The capture of models as export graphs: tracing, inputs and calls, decoders with a cache."""
