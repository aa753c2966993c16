"""The report page: a command's result as a self-contained HTML file, in pure Python."""
