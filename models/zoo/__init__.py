"""The table of models, and finding, reading and writing their weights."""
