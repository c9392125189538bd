"""Draws every corruption at every severity, and says how far each takes an image from itself and how long it takes.

    python benchmarks/corruption_sheet.py --image tile.png --output sheet.png --table corruptions.tsv

Without an image a tile is cut from a slide of the demo, which the project draws itself.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))
from dinoscope.files import write_text
from dinoscope.segment.corruptions import ALL_CORRUPTIONS, SEVERITIES, corrupt
from dinoscope.segment.mask_files import read_image
from dinoscope.slides.demo import draw_demo_slide

LABEL_PX, DRAWS = 118, 5


def main() -> None:
    """Draws the sheet and prints the table."""
    arguments = parse_arguments()
    image = read_image(arguments.image.parent, arguments.image.name) if arguments.image else demo_tile()
    if arguments.output:
        height, width = arguments.size
        Image.fromarray(sheet(image[:height, :width], arguments.kinds)).save(arguments.output, quality=88)
    lines = ["kind\tseverity\tpsnr_db\tmean_difference\tcpu_milliseconds"]
    for kind in arguments.kinds if arguments.table else ():
        lines += ["\t".join((kind, str(severity), *measured(image, kind, severity))) for severity in SEVERITIES]
    if arguments.table:
        write_text(arguments.table, "\n".join(lines) + "\n")


def demo_tile() -> np.ndarray:
    """512 x 512 px of a demo slide at 0.5 um a pixel."""
    return np.ascontiguousarray(draw_demo_slide("demo_he_1")[1900:2412, 2300:2812])


def sheet(image: np.ndarray, kinds: list[str]) -> np.ndarray:
    """A row a kind: its name, the clean image, severities 1 to 5."""
    rows = []
    for kind in kinds:
        label = np.full((image.shape[0], LABEL_PX, 3), 255, np.uint8)
        cv2.putText(label, kind, (3, image.shape[0] // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1, cv2.LINE_AA)
        rows.append(np.hstack([label, image, *(corrupt(image, kind, severity, 0, 0) for severity in SEVERITIES)]))
    return np.vstack(rows)


def measured(image: np.ndarray, kind: str, severity: int) -> tuple[str, str, str]:
    """PSNR, mean absolute difference in grey levels, CPU milliseconds: means of a few draws, of the time the least."""
    found, times = [], []
    for index in range(DRAWS):
        start = time.process_time()
        changed = corrupt(image, kind, severity, 0, index)
        times.append(1000 * (time.process_time() - start))
        difference = np.abs(changed.astype(int) - image)
        found.append((10 * math.log10(255**2 / max((difference**2).mean(), 1e-9)), difference.mean()))
    psnr, mean = np.mean(found, axis=0)
    return f"{psnr:.2f}", f"{mean:.2f}", f"{min(times):.1f}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="any picture")
    parser.add_argument("--output", type=Path, help="the sheet, .png or .jpg")
    parser.add_argument("--table", type=Path, help="the measures, .tsv")
    parser.add_argument("--kinds", nargs="+", default=list(ALL_CORRUPTIONS))
    parser.add_argument(
        "--size", nargs=2, type=int, default=(96, 128), help="height and width of a picture on the sheet"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
