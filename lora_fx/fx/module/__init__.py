"""AdaptedModule: one tree of tensors, and the programs that are captured and compiled for it."""
