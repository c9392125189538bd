"""Predicts the classes of a whole slide with a trained segmentation model.

Writes a pyramidal TIFF of classes (OpenSlide and QuPath show it in colours, tifffile reads the indices; 255: not looked
at), the classes' outlines as GeoJSON for QuPath, an overview picture, and the area of each class.

    segment_predict_slide.py --segmenter results/segmentation/nuclei --weights results/models/gram/teacher.pth \\
        --slide S1.svs --slide-id S1 --class-map S1.tiff --outlines S1.geojson --overview S1.png --areas S1.tsv
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.files import atomic_path, write_text
from dinoscope.segment.arguments import add_encoder_arguments, add_public_arguments, hyphenated
from dinoscope.slides.geojson import read_annotations
from dinoscope.slides.reader import Slide
from dinoscope.slides.skipping import Attempt, add_skip_arguments, try_slide
from dinoscope.slides.tissue import METHODS, Tissue, detect_tissue


def main() -> None:
    """Parses the command line and predicts, or skips the slide."""
    arguments = _parser().parse_args(hyphenated(sys.argv[1:]))
    cv2.setNumThreads(1)  # a job has one core, and pictures this small gain nothing from more
    if (arguments.tissue_method == "annotations") != (arguments.annotations is not None):
        raise ConfigError("--tissue-method annotations and --annotations FILE need each other")
    how = (arguments.on_error, arguments.attempt, arguments.skip_record)
    attempt = Attempt(arguments.slide, arguments.slide_id, "segmentation", *how)
    try_slide(lambda: _predict(arguments), lambda _: _give_up(arguments), attempt)


def _predict(arguments: argparse.Namespace) -> None:
    from dinoscope.features.embedding import choose_device
    from dinoscope.features.encoders import load_encoder
    from dinoscope.segment.class_map import write_class_map
    from dinoscope.segment.files import load_segmenter
    from dinoscope.segment.slide_picture import draw_segmented_slide
    from dinoscope.segment.slides import class_outlines, predict_slide, slide_settings

    device = choose_device(arguments.device)
    encoder = load_encoder(
        arguments.weights,
        architecture=arguments.architecture,
        device=device,
        files=arguments.encoder_files,
        version=arguments.encoder_version,
    )
    segmenter = load_segmenter(arguments.segmenter, encoder, device, doublings=arguments.fpn_doublings)
    segmenter.merge()
    options = {name: getattr(arguments, name) for name in ("batch_size", "workers", "precision")}
    settings = slide_settings(segmenter, arguments.mpp, arguments.tile_px, arguments.overlap_px, **options)
    arguments.class_map.parent.mkdir(parents=True, exist_ok=True)
    with (
        Slide(arguments.slide, arguments.slide_id, arguments.slide_mpp, reader=arguments.slide_reader) as slide,
        tempfile.TemporaryDirectory(prefix=".segment_", dir=arguments.class_map.parent) as scratch,
    ):
        class_map = predict_slide(slide, segmenter, _tissue(slide, arguments), settings, Path(scratch))
        areas = class_map.areas_mm2()
        if arguments.outlines is not None:
            document = class_outlines(class_map, slide, arguments.leave_out)
            write_text(arguments.outlines, json.dumps(document, separators=(",", ":")) + "\n")
        if arguments.areas is not None:
            _write_areas(arguments.areas, arguments.slide_id, areas)
        if arguments.overview is not None:
            draw_segmented_slide(arguments.overview, slide, class_map, areas)
        write_class_map(arguments.class_map, class_map)


def _tissue(slide: Slide, arguments: argparse.Namespace) -> Tissue:
    annotations = None
    if arguments.annotations is not None:
        annotations = read_annotations(arguments.annotations, arguments.slide_id, arguments.include)
    return detect_tissue(slide, arguments.tissue_method, annotations=annotations)


def _give_up(arguments: argparse.Namespace) -> None:
    """Outputs that say that nothing was looked at."""
    from dinoscope.segment.class_map import UNKNOWN, ClassMap, write_class_map
    from dinoscope.visualize.overview import placeholder

    write_class_map(arguments.class_map, ClassMap([np.full((1, 1), UNKNOWN, np.uint8)], 1.0, 1.0, (), ()))
    if arguments.outlines is not None:
        write_text(arguments.outlines, json.dumps({"type": "FeatureCollection", "features": []}) + "\n")
    if arguments.areas is not None:
        _write_areas(arguments.areas, arguments.slide_id, {})
    if arguments.overview is not None:
        with atomic_path(arguments.overview) as temporary:
            Image.fromarray(placeholder("this slide was skipped")).save(temporary, format="PNG")


def _write_areas(path: Path, slide_id: str, areas_mm2: dict[str, float]) -> None:
    total = sum(areas_mm2.values())
    lines = ["slide_id\tclass\tarea_mm2\tshare"]
    for name, area in areas_mm2.items():
        lines.append(f"{slide_id}\t{name}\t{area:.6g}\t{area / total if total else 0:.6g}")
    write_text(path, "\n".join(lines) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--segmenter", required=True, help="run folder, folder of a segmenter, or a .pt of dinov2-finetune")
    add_public_arguments(parser)
    add_encoder_arguments(parser)
    add("--slide", type=Path, required=True, help="file, or folder of a DICOM series")
    add("--slide-id", required=True, metavar="ID", help="name of the slide in all results")
    add("--class-map", type=Path, required=True, metavar="OUT.tiff", help="pyramidal TIFF of classes to write")
    add("--outlines", type=Path, metavar="OUT.geojson", help="outlines of the classes to write")
    add("--overview", type=Path, metavar="OUT.png", help="picture to write")
    add("--areas", type=Path, metavar="OUT.tsv", help="table of the classes' areas to write")
    add("--leave-out", nargs="*", metavar="CLASS", help="classes without outlines; else those called background, …")
    add("--mpp", type=float, metavar="M", help="micrometres a pixel to work at; else what the model was trained at")
    add("--tile-px", type=int, metavar="PX", help="side of a tile; else that of the model's training images, else 512")
    add("--overlap-px", type=int, metavar="PX", help="overlap of neighbouring tiles; else a quarter of a tile")
    add("--batch-size", type=int, default=8, metavar="N", help="tiles a forward pass")
    add("--workers", type=int, default=2, metavar="N", help="threads that read tiles ahead")
    add("--device", default="auto", help="auto, cpu, cuda:1 …")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on GPUs that can")
    add("--tissue-method", choices=METHODS, default="auto", help="how tissue is found; nothing else is predicted")
    add("--annotations", type=Path, metavar="GEOJSON", help="outlines of the tissue, for method annotations")
    add("--include", nargs="*", default=["Tissue"], metavar="CLASS", help="annotations that are tissue")
    add("--slide-mpp", type=float, metavar="M", help="micrometres a level-0 pixel; else what the file says")
    add("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    add_skip_arguments(parser)
    return parser


if __name__ == "__main__":
    run_script(main)
