"""What all commands share: options, plan, output, and the order in which they run."""
