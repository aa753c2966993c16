"""The graph passes, one per file and named by its verb; `verbs` builds the public functions."""
