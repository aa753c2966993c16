"""One pass a file, named by its verb; `verbs` composes them into the public functions."""
