"""Measurements of speed and size; results and the commands that made them are in RESULTS.md."""
