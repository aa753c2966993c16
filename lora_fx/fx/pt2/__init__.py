""".pt2 files: the archive, its checks, its program and manifest, reading and writing."""
