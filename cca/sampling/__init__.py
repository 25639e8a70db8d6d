"""From a model to sample files."""
