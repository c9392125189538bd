"""Training samples: tiles, crops, masks, batches."""
