"""Image sets, and what the trainer reads."""
