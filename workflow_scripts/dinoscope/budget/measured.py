"""The numbers behind a budget: sizes and times that were measured once, and how they were.

Sizes: files of the demo (2026-11-28: five drawn slides of 4.6 to 5.6 thousand px, three models). Pictures of real
sections are within a factor of two of it, tables and features nearly exact; tests/workflow/test_end_to_end.py holds
both. Times: the same run, virtual machine with two cores of an AMD EPYC, torch 2.13.0 on the CPU, other jobs on it. No
GPU was at hand: what GPUs reach in matrix products is what their maker publishes (dense bfloat16), of which a training
is taken to reach as much as outlook.py says.
"""

__all__ = [
    "GPU_FLOPS",
    "JPEG_BYTES_PER_PIXEL",
    "PICTURE_BYTES_PER_PIXEL",
    "SECONDS_PER_JOB",
    "VIEWER_BYTES_PER_PIXEL",
]

# of thumbnails and overviews (JPEG), and of maps (PNG), a pixel of the slide's thumbnail
JPEG_BYTES_PER_PIXEL = 0.3
PICTURE_BYTES_PER_PIXEL = 0.52
# of the viewer's tiles (JPEG of quality 82), bare glass included, which is left out
VIEWER_BYTES_PER_PIXEL = 0.19
# of packed tiles, bytes a pixel by subsampling, at the qualities measured in benchmarks/README.md (512 px, H&E)
PACKED_BYTES_PER_PIXEL = {"4:2:0": {80: 0.233, 90: 0.340}, "4:2:2": {90: 0.41}, "4:4:4": {90: 0.492, 95: 0.729}}
PACKED_QUALITY_STEP = 1.04  # so many times as large with each step of quality

# seconds of a job of a small slide, start of Python included; jobs that compute with a model are counted by operations
SECONDS_PER_JOB = {
    "demo_slides": 25.0, "demo_biopsies": 50.0, "inspect_slide": 1.4, "slides_report": 0.7, "tile_slide": 1.0,
    "split_slides": 0.2, "merge_manifest": 1.6, "slide_table": 1.5, "initial_weights": 3.2, "convert": 11.5,
    "plot_metrics": 8.4,
    "extract_features": 0.8, "list_features": 0.1, "list_sampled": 0.1, "pca_fit": 8.0, "pca_map": 6.2,
    "pca_compare": 1.6, "pca_region": 23.0, "cluster_fit": 7.7, "cluster_map": 1.3, "cluster_examples": 5.8,
    "viewer_pyramid": 1.6, "viewer_sample": 0.9, "viewer_tiles": 0.25, "viewer": 0.3, "report": 9.3,
    "export_hf": 7.3, "export_timm": 7.4, "export_onnx": 15.7,
    "evaluation_units": 2.0, "embed_images": 4.0, "probe_set": 4.0, "measure_model": 4.0, "compare_models": 6.0,
    "evaluation_summary": 3.0, "segment_train": 5.0, "segment_evaluate": 4.0, "segment_corruptions": 4.0,
    "segment_predict_slide": 5.0, "segment_compare": 2.0,
}  # fmt: skip
SECONDS_OF_OTHER_JOBS = 3.0
# seconds that a large slide takes besides, by rule: a million pixels of the viewer's finest picture; a packed tile of
# 512 px (benchmarks/README.md)
VIEWER_SECONDS_PER_MEGAPIXEL = 0.15
PACKING_SECONDS_PER_TILE = 0.013

# Evaluation (2026-11-29, the same machine, one thread): a fold of the probes, a row of it and a value of its features
# (450 tiles under changes, 12,800 patches, benchmarks/README.md); epochs after which attention MIL gets no better, a
# bag of an epoch and a value of its features (30 to 60 cases); of a value of 10,000 tiles, descriptions and sites.
PROBE_SECONDS_PER_FOLD, PROBE_SECONDS_PER_ROW, PROBE_SECONDS_PER_VALUE = 0.2, 4e-4, 1.5e-7
ATTENTION_EPOCHS, ATTENTION_SECONDS_PER_BAG, ATTENTION_SECONDS_PER_BAG_AND_WIDTH = 25, 4e-4, 3.1e-6
DESCRIPTION_SECONDS_PER_WIDTH, SITE_SECONDS_PER_WIDTH = 0.07, 0.04
# Segmentation, the same: drawing views and blending windows, corrupting images, a million pixels; a tile of 224 px of a
# slide, read and blended; a pixel of a class map with its outlines.
SEGMENT_SECONDS_PER_MEGAPIXEL, CORRUPTION_SECONDS_PER_MEGAPIXEL = 0.2, 0.5
CLASS_MAP_SECONDS_PER_TILE, CLASS_MAP_BYTES_PER_PIXEL = 0.02, 0.05

# FLOP/s of dense bfloat16 matrix products as published by NVIDIA
GPU_FLOPS = {
    "t4": 65e12, "v100": 125e12, "a10": 125e12, "l4": 121e12, "rtx3090": 71e12, "rtx4090": 165e12, "a40": 150e12,
    "a6000": 155e12, "l40s": 362e12, "a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12,
}  # fmt: skip
GPU_GIB = {
    "t4": 15, "v100": 32, "a10": 23, "l4": 23, "rtx3090": 24, "rtx4090": 24, "a40": 45, "a6000": 48, "l40s": 45,
    "a100": 80, "h100": 80, "h200": 139, "b200": 180,
}  # fmt: skip
CPU_FLOPS_PER_CORE = 98e9  # float32, one core of the machine above
