"""Capture and passes composed, one public verb a file."""
