"""Image sets, labels, extracted codes, and the datasets that the trainer reads."""
