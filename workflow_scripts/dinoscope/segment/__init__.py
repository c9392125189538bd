"""Semantic segmentation with an adapted encoder."""
