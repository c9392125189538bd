"""ADE20K's scene parsing, in the layout of its archive ADEChallengeData2016 (Zhou et al. 2017).

images/training/ADE_train_00000001.jpg
annotations/training/ADE_train_00000001.png   0: none of the 150 classes, ignored; else the class from 1 on
images/validation, annotations/validation     2,000 images to validate on
"""

from dataclasses import dataclass
from pathlib import Path

from dinoscope.errors import ConfigError, MasksError
from dinoscope.segment.masks import FileMasks, Pair, Problems, ValueTable
from dinoscope.segment.metrics import IGNORED
from dinoscope.segment.palettes import default_palette

__all__ = ["ADE20K_CLASSES", "Ade20kSettings", "open_ade20k"]

_FOLDERS = {"train": "training", "val": "validation"}
# the first of each class's names in the archive's objectInfo150.txt
ADE20K_CLASSES = tuple(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
    seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
    countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
    light, truck, tower, chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel, pole, land,
    bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
    plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step,
    tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase,
    traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock,
    flag""".replace("\n    ", " ").split(", ")
)


@dataclass(frozen=True)
class Ade20kSettings:
    """ADE20K needs no settings."""


def open_ade20k(root: Path, split: str, settings: Ade20kSettings) -> FileMasks:
    """The images of the archive's training or validation part, in the order of their names.

    Args:
        root: ADEChallengeData2016 or the folder it is in.
        split: "train" or "val"; the masks of the test are not published.
        settings: None so far.

    Raises:
        ConfigError: There is no such split.
        MasksError: The layout is another, or images or masks have no partner.
    """
    if split not in _FOLDERS:
        raise ConfigError(f"ADE20K has no split {split!r} with masks: take train or val")
    part = _FOLDERS[split]
    found = [folder for folder in (root, root / "ADEChallengeData2016") if (folder / "annotations" / part).is_dir()]
    if not found:
        raise MasksError(
            f"{root} is no ADEChallengeData2016: there is no annotations/{part} in it; give the folder that the "
            "archive was unpacked to"
        )
    pairs = _pairs(found[0], part)
    values = {0: IGNORED} | {number: number - 1 for number in range(1, len(ADE20K_CLASSES) + 1)}
    palette = default_palette(len(ADE20K_CLASSES) + 1)[1:]  # none of them is black
    return FileMasks(found[0], pairs, ADE20K_CLASSES, ValueTable.of(values), palette)


def _pairs(root: Path, part: str) -> list[Pair]:
    images, masks = (
        {path.stem: f"{folder}/{part}/{path.name}" for path in sorted((root / folder / part).glob(pattern))}
        for folder, pattern in (("images", "*.jpg"), ("annotations", "*.png"))
    )
    problems = Problems()
    for name in sorted(images.keys() - masks.keys()):
        problems.add("images without a mask", images[name])
    for name in sorted(masks.keys() - images.keys()):
        problems.add("masks without an image", masks[name])
    if problems:
        raise MasksError(f"{root}: {problems.sentence()}; unpack the archive again, or take these out")
    if not images:
        raise MasksError(f"{root} holds no image in images/{part}: unpack the archive again")
    return [Pair(name, images[name], masks[name], name) for name in sorted(images)]
