"""Equal, or not written: what is run and compared before a result gets its name."""
