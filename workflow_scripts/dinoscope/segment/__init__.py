"""Semantic segmentation: masks and their data sets, LoRA, decoders, training, measures, robustness."""
