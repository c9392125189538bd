"""The images of the segmentation show: nuclei in stained tissue, split, enlarged twice, and squares to pretrain on.

    python benchmarks/nuclei_data.py --data ../shared/data --out results/nuclei/data

Writes OUT/images, OUT/masks and OUT/splits.tsv (a data set of kind folder) and OUT/squares: pieces of 144 px of the
images of split train alone, for a self-supervised training that sees neither validation nor test images.

Enlarged, because nuclei are about 20 px wide and patches 16 px. Of the 40 images of the Data Science Bowl 2018 the
split is drawn by seed: 16 to train on, 4 to choose weights by, 20 to measure.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))
from feature_images import tiles_of, write_training_images  # noqa: E402

from dinoscope.files import write_text  # noqa: E402

ENLARGED = 2
NUM_TRAIN, NUM_VAL = 16, 4


def main() -> None:
    """Reads, splits and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder with seg/dsb2018_histology")
    parser.add_argument("--out", type=Path, default=Path("results/nuclei/data"), help="where they go")
    parser.add_argument("--split", type=int, default=4, help="seed of the split")
    arguments = parser.parse_args()
    source = arguments.data / "seg" / "dsb2018_histology"
    if not source.is_dir():
        sys.exit(f"error: {arguments.data} has no folder seg/dsb2018_histology; give --data a folder that has")
    write_nuclei(source, arguments.out, arguments.split)


def write_nuclei(source: Path, out: Path, split: int) -> None:
    """Writes the data set and the squares."""
    files = sorted(source.glob("images/*.png"))
    order = np.random.default_rng(split).permutation(len(files))
    splits = dict.fromkeys(order.tolist(), "test")
    splits |= dict.fromkeys(order[:NUM_TRAIN].tolist(), "train")
    splits |= dict.fromkeys(order[NUM_TRAIN : NUM_TRAIN + NUM_VAL].tolist(), "val")
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    training, rows = [], []
    for index, file in enumerate(files):
        image = cv2.resize(cv2.imread(str(file)), None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_CUBIC)
        mask = cv2.imread(str(source / "masks" / file.name), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(out / "images" / file.name), image)
        cv2.imwrite(str(out / "masks" / file.name), mask.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1))
        rows.append(f"{file.stem}\t{splits[index]}\n")
        if splits[index] == "train":
            training.append(image[..., ::-1])
    write_text(out / "splits.tsv", "name\tsplit\n" + "".join(rows))
    write_training_images(tiles_of(np.stack(training)), out / "squares")


if __name__ == "__main__":
    main()
