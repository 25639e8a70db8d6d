"""Helpers for errors, files, limits of options, and precision."""
