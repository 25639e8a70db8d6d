"""From options and data to fine-tuned weights."""
