"""What the models need of the machine: errors, files, precision."""
