"""What features are worth: measures on held-out cases, their intervals, and verdicts."""
