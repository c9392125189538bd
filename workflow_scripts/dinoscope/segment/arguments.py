"""Arguments that the segmentation scripts share. Nothing here imports torch, so that --help answers at once."""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dinoscope.errors import ConfigError
from dinoscope.segment.settings import DECODERS, INFERENCE, TRAINABLE, TrainSettings, default_views

__all__ = [
    "DATA_VARIABLE",
    "add_data_arguments",
    "add_encoder_arguments",
    "add_public_arguments",
    "add_segmenter_arguments",
    "add_training_arguments",
    "data_options",
    "data_root",
    "hyphenated",
    "settings_of",
    "test_split",
]

DATA_VARIABLE = "DINOSCOPE_DATA"
KINDS = ("voc", "ade20k", "folder", "slides")
# Where a data set is looked for below the folder of all of them.
_PLACES = {"voc": ("VOCdevkit", "VOC2012", "voc"), "ade20k": ("ADEChallengeData2016", "ade20k")}


def hyphenated(words: Sequence[str]) -> list[str]:
    """The words of a command line, --img_dim as --img-dim; values stay as they are."""
    return [
        word.partition("=")[0].replace("_", "-") + "".join(word.partition("=")[1:]) if word.startswith("--") else word
        for word in words
    ]


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """--dataset, --data-root, --data-option."""
    parser.add_argument("--dataset", choices=KINDS, required=True, help="kind of the data set (docs/segmentation.md)")
    parser.add_argument(
        "--data-root",
        type=Path,
        help=f"its folder (slides: the tiles' manifest); else voc and ade20k are sought in ${DATA_VARIABLE} or data/",
    )
    parser.add_argument(
        "--data-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the data set, a value as in YAML, e.g. instance=nucleus; again for each",
    )


def add_encoder_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--weights and what else names an encoder, as extract_features.py has them."""
    add = parser.add_argument
    words = "the encoder: teacher.pth, a published file, a folder, or a function"
    add("--weights", "--encoder", required=required, help=words)
    add("--architecture", help="timm's name of the encoder, where --weights is a timm file without a config.json")
    add("--encoder-files", nargs="+", type=Path, default=[], help="further files that a function of your own reads")
    add("--encoder-version", default="", help="anything; counts for the identity of the encoder")


def add_public_arguments(parser: argparse.ArgumentParser) -> None:
    """What a .pt file of dinov2-finetune does not tell."""
    words = "of a .pt of dinov2-finetune with its FPN decoder: how often that version of the tool doubles the map"
    parser.add_argument("--fpn-doublings", type=int, choices=(2, 3), default=2, help=words)


def add_segmenter_arguments(parser: argparse.ArgumentParser) -> None:
    """What names a trained segmenter and the images that it is asked about."""
    add = parser.add_argument
    add("--segmenter", type=Path, required=True, help="run folder, folder of a segmenter, or a .pt of dinov2-finetune")
    add_public_arguments(parser)
    add_encoder_arguments(parser)
    add_data_arguments(parser)
    add("--split", choices=("train", "val", "test"), help="default: test, but val of voc and ade20k")
    add("--img-dim", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of a window, px (default: as trained)")
    add("--inference", choices=("slide", "resize"), help="windows over the image, or all of it resized (as trained)")
    add("--overlap", type=float, help="share of a window that the next one covers again (as trained)")
    add("--batch-size", type=int, default=8, help="windows a forward pass")
    add("--device", default="auto", help="auto, cpu, cuda:1 …")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on GPUs")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """All that `TrainSettings` holds, with its defaults."""
    add, default = parser.add_argument, TrainSettings()
    add("--use-lora", action=argparse.BooleanOptionalAction, default=True, help="adapters; without, the decoder alone")
    add("--train", choices=TRAINABLE, help="what is trained beside the decoder, in place of --use-lora")
    add("--last-n", type=int, default=default.last_n, help="blocks that --train last_n trains")
    add("--r", "--rank", dest="rank", type=int, default=default.rank, help="rank of the adapters")
    add("--alpha", type=float, help="adapters are scaled by alpha / rank (default: by 1)")
    add("--targets", nargs="+", default=list(default.targets), help="what is adapted: q, k, v, qkv, proj, ffn")
    add("--blocks", nargs="+", type=int, help="blocks that are adapted, from 0 (default: all)")
    add("--use-fpn", action="store_true", help="the pyramid decoder in place of the linear one")
    add("--decoder", choices=DECODERS, help="the decoder, in place of --use-fpn")
    add(
        "--img-dim", nargs=2, type=int, default=[304, 304], metavar=("HEIGHT", "WIDTH"), help="of views and windows, px"
    )
    add(
        "--round-img-dim",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the nearest multiples of the patch size; else other sizes are refused",
    )
    add("--epochs", type=int, default=default.epochs, help="passes over the training images")
    add("--batch-size", type=int, default=default.batch_size, help="images a step, over all processes")
    add("--lr", type=float, default=default.lr, help="highest learning rate")
    add("--decoder-lr", type=float, help="that of the decoder (default: --lr)")
    add("--min-lr", type=float, default=default.min_lr, help="lowest rate, a share of the highest")
    add("--weight-decay", type=float, default=default.weight_decay, help="of matrices")
    add("--warmup-epochs", type=float, default=default.warmup_epochs, help="in which the rate rises from 0")
    add("--clip-grad", type=float, default=default.clip_grad, help="largest norm of the gradient; 0: none")
    add("--dice-weight", type=float, default=default.dice_weight, help="of the Dice term beside cross-entropy")
    add("--class-weights", nargs="+", help="balanced, or a number a class (default: equal)")
    add("--views", choices=("pathology", "photographs"), help="how training views are drawn (default: by data set)")
    add(
        "--augmentation",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what differs from that, again for each",
    )
    add("--inference", choices=INFERENCE, default=default.inference, help="windows over an image, or all of it resized")
    add("--overlap", type=float, default=default.overlap, help="share of a window that the next one covers again")
    add("--eval-epochs", type=int, default=default.eval_epochs, help="epochs between validations")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on GPUs")
    add("--seed", type=int, default=default.seed, help="of first weights and all draws")


def settings_of(arguments: argparse.Namespace, data: dict[str, Any]) -> TrainSettings:
    """The settings that a command line asks for.

    Args:
        arguments: With those of `add_training_arguments` and `add_data_arguments`.
        data: Options of the data set.

    Raises:
        ConfigError: A value that cannot be meant.
    """
    given = vars(arguments)
    taken = {field.name: given[field.name] for field in dataclasses.fields(TrainSettings) if field.name in given}
    taken |= {
        "data": data,
        "trainable": arguments.train or ("lora" if arguments.use_lora else "decoder"),
        "decoder": arguments.decoder or ("fpn" if arguments.use_fpn else "linear"),
        "targets": tuple(arguments.targets),
        "blocks": None if arguments.blocks is None else tuple(arguments.blocks),
        "img_dim": tuple(arguments.img_dim),
        "class_weights": _class_weights(arguments.class_weights),
        "views": arguments.views or default_views(arguments.dataset),
        "augmentation": data_options(arguments.augmentation, "--augmentation"),
    }
    return TrainSettings(**taken)


def _class_weights(given: Sequence[str] | None) -> str | tuple[float, ...] | None:
    if given is None or given == ["balanced"]:
        return None if given is None else "balanced"
    try:
        return tuple(float(number) for number in given)
    except ValueError:
        raise ConfigError(f"--class-weights {' '.join(given)}: give balanced, or a number a class") from None


def data_root(dataset: str, given: Path | None) -> Path:
    """Where a data set lies.

    Raises:
        ConfigError: It is not said, and not found where it is looked for.
    """
    if given is not None:
        return given
    folder = Path(os.environ.get(DATA_VARIABLE) or "data")
    for place in _PLACES.get(dataset, ()):
        if (folder / place).is_dir():
            return folder / place
    wanted = " or ".join(str(folder / place) for place in _PLACES.get(dataset, ()))
    looked = f"; {wanted} does not exist (the variable {DATA_VARIABLE} names another folder)" if wanted else ""
    raise ConfigError(f"data set {dataset}: where it lies is not said; give --data-root{looked}")


def data_options(given: Sequence[str], argument: str = "--data-option") -> dict[str, Any]:
    """KEY=VALUE … -> options; `argument` is what messages call them.

    Raises:
        ConfigError: A word has no =, or its value is no YAML.
    """
    options = {}
    for word in given:
        key, equals, value = word.partition("=")
        try:
            options[key] = _value(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise ConfigError(
                f"{argument} {word!r} must read KEY=VALUE, the value as in YAML, such as instance=nucleus"
            )
    return options


def _value(text: str) -> Any:
    """What YAML reads in a text, and JSON where it is some: 1e-5 is a number there."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def test_split(dataset: str, given: str | None) -> str:
    """The split that results are told of."""
    return given or ("val" if dataset in ("voc", "ade20k") else "test")
