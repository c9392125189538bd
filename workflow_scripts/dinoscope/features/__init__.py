"""Features of tiles."""
