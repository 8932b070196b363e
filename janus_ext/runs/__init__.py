"""Runs on disk: their folder, their files, and the metrics of their results."""
