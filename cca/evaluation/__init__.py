"""Metrics of sample files: FID, sFID, inception score, precision, recall and KID."""
