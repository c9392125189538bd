"""What models see in images or a video that are no slides: PCA of patch features, side by side.

    python workflow_scripts/pca_images.py --input photos --models base=results/models/base/teacher.pth \\
        gram=results/models/gram/teacher.pth --output pictures
    python workflow_scripts/pca_images.py --input film.mp4 --models dinov3_vits16.pth --output pictures

Every model has one colour space for all images, or all frames; the order and signs of its components are those that
agree best with the first model's. Images give PNGs of the same names, a video gives an MP4.
"""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.data.images import IMAGE_SUFFIXES
from dinoscope.errors import ConfigError
from dinoscope.visualize.color_basis import BACKGROUNDS
from dinoscope.visualize.upsampling import load_upsampler


def main() -> None:
    """Draws the pictures."""
    arguments = parse_arguments()
    source = arguments.input
    if not source.exists():
        raise ConfigError(f"{source} does not exist; give a folder of images, an image or a video")
    upsampler = load_upsampler(arguments.upsample) or (arguments.upsample if arguments.upsample == "jbu" else None)

    # here, so that --help and mistakes in the arguments need not wait for torch
    from dinoscope.visualize.patches import load_patch_encoder
    from dinoscope.visualize.plain_images import PictureSettings, draw_images, draw_video

    settings = PictureSettings(arguments.size_px, upsampler, arguments.background, arguments.codec)
    encoders = [load_patch_encoder(name, weights, arguments.device) for name, weights in arguments.models]
    if source.is_dir() or source.suffix.lower() in IMAGE_SUFFIXES:
        pictures = draw_images(source, encoders, arguments.output, settings)
        logging.info("%d pictures are in %s", len(pictures), arguments.output)
        return
    output = arguments.output / f"{source.stem}.mp4"
    if output.resolve() == source.resolve():
        raise ConfigError(f"the video would be written over {source}; give another folder as --output")
    frames = draw_video(source, encoders, output, settings, every=arguments.every, max_frames=arguments.max_frames)
    logging.info("%d frames are in %s", frames, output)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--input", type=Path, required=True, help="folder of images (searched with all it contains), image or video")
    add("--models", nargs="+", type=named, required=True, metavar="[NAME=]SOURCE", help="models, from left to "
        "right: files, folders or module:function")  # fmt: skip
    add("--output", type=Path, required=True, help="folder for the pictures")
    add("--size-px", type=positive, default=896, help="longer side that images are brought to")
    add("--upsample", default="jbu", metavar="jbu|none|MODULE:CALLABLE", help="how features are brought to pixels")
    add("--background", choices=BACKGROUNDS, default="keep", help="leave out a side of the first component")
    add("--every", type=positive, default=1, help="video: take every so manieth frame")
    add("--max-frames", type=positive, help="video: end after so many")
    add("--codec", help="video: four letters, such as mp4v; the first that can be written when not given")
    add("--device", default="auto", help="auto, cpu, cuda:1 …")
    arguments = parser.parse_args()
    if arguments.codec is not None and len(arguments.codec) != 4:
        parser.error(f"--codec {arguments.codec} has not four letters, as mp4v has")
    return arguments


def named(text: str) -> tuple[str, str]:
    """NAME=FILE as a pair; without a name, that of the file or, where it is a teacher.pth, of its folder."""
    name, equals, file = text.partition("=")
    if equals and name and file:
        return name, file
    path = Path(text)
    return (path.parent.name if path.stem == "teacher" else path.stem), text


def positive(text: str) -> int:
    """An integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    run_script(main)
