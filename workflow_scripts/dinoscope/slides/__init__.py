"""Whole-slide images: opening, tissue, tiles, manifests."""
