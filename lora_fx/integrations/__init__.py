"""lora-fx inside other programs: one module for each, imported by nobody but its user."""
