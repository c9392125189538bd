"""Fine-tunes an encoder for semantic segmentation: low-rank adapters (LoRA) and a small decoder on its patches.

    python workflow_scripts/segment_train.py --exp-name nuclei --dataset folder --data-root nuclei \\
        --data-option instance=nucleus --weights results/models/gram/teacher.pth --img-dim 224 224 --epochs 50
    several GPUs:  python workflow_scripts/launch.py -- workflow_scripts/segment_train.py ARGUMENTS

Names of arguments may be written with - or _. Published encoders are found by --size and --dino-type in the folder
models (or $DINOSCOPE_MODELS), data sets in data (or $DINOSCOPE_DATA). A training goes on where it was interrupted when
the same command is given again; its folder is OUTPUT_DIR/EXP_NAME.
"""

import argparse
import sys
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.segment.arguments import (
    add_data_arguments,
    add_encoder_arguments,
    add_public_arguments,
    add_training_arguments,
    data_options,
    data_root,
    hyphenated,
    settings_of,
)
from dinoscope.segment.published import published_encoder


def main() -> None:
    """Trains, or goes on."""
    arguments = parse_arguments()
    settings = settings_of(arguments, data_options(arguments.data_option))
    root = data_root(arguments.dataset, arguments.data_root)
    weights = arguments.weights or published_encoder(arguments.dino_type, arguments.size, arguments.models_dir)
    from dinoscope.segment.runs import DataSource, EncoderSource, train_run  # torch takes its time

    train_run(
        settings,
        EncoderSource(weights, arguments.architecture, tuple(arguments.encoder_files), arguments.encoder_version),
        DataSource(arguments.dataset, root, settings.data),
        arguments.output_dir / arguments.exp_name,
        round_img_dim=arguments.round_img_dim,
        start=arguments.lora_weights,
        doublings=arguments.fpn_doublings,
        mpp=arguments.mpp,
        workers=arguments.workers,
        debug=arguments.debug,
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--exp-name", required=True, help="name of the training; its folder lies in --output-dir")
    add("--output-dir", type=Path, default=Path("results/segmentation"), help="folder of all trainings")
    add("--debug", action="store_true", help="after each validation write pictures into DIR/debug")
    add_data_arguments(parser)
    add_encoder_arguments(parser, required=False)
    add("--dino-type", choices=("dinov2", "dinov3"), default="dinov3", help="family, where --weights is not given")
    add("--size", default="base", help="small | base | large | giant (dinov3 also huge), where --weights is not given")
    add("--models-dir", type=Path, help="where published encoders lie (default: $DINOSCOPE_MODELS, else models)")
    add("--lora-weights", type=Path, help="begin with a trained segmenter: its folder, or a .pt of dinov2-finetune")
    add_public_arguments(parser)
    add("--mpp", type=float, help="micrometres a pixel of the images, for slides that are segmented later")
    add_training_arguments(parser)
    add("--workers", type=int, default=2, help="processes that draw views; change nothing but speed")
    return parser.parse_args(hyphenated(sys.argv[1:]))


if __name__ == "__main__":
    run_script(main)
