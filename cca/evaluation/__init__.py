"""From sample files to figures."""
