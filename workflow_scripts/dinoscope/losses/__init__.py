"""Losses of DINOv3 and their targets."""
