"""Which models exist, and how their weights are found, read and written."""
