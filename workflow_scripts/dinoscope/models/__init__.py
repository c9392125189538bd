"""The DINOv3 backbone, its heads and its weights."""
