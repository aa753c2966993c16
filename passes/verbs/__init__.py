"""The public verbs, one per file; each captures a model and runs passes on its graph."""
