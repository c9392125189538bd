"""From training checkpoints to files that other tools load."""
