"""The report page: one result of a command as a self-contained HTML file, in pure Python."""
