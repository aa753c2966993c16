"""One pass a file, named by its verb; `pipeline` composes them into the public verbs."""
