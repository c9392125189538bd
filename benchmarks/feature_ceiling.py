"""How much could features of learned_features.py be worth? Its backbone trained end to end with labels, for scale.

    python benchmarks/feature_ceiling.py --split 0 student.arch=vit_micro

The recipe's backbone and a linear map of its last block, from scratch, on the labelled patches of the training half
(crops, flips, turns and changes of colour); asked about the other half in quarters of an image, as the probes are.
Nothing of it reaches what learned_features.py reports.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))
from feature_images import PATCH_PX, Tissue, read_tissue  # noqa: E402
from feature_probes import cut_windows, join_windows, mean_iou  # noqa: E402
from feature_reports import WINDOW_HW  # noqa: E402
from learned_features import random_network  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402

from dinoscope import load_backbone  # noqa: E402
from dinoscope.cli import run_script  # noqa: E402

CROP_PATCHES, BATCH = 10, 12
LR, WEIGHT_DECAY = 1e-3, 0.05
TINT = 0.15  # factors of each channel and of all, 1 ± this
REPORT_EVERY = 100


class Segmenter(nn.Module):
    """A backbone and a linear map of its last block: images (N, H, W, 3) uint8 or float 0–255 -> logits (N, P)."""

    def __init__(self, folder: Path) -> None:
        """Takes the exported backbone of that folder."""
        super().__init__()
        self.backbone = load_backbone(folder).requires_grad_(True)
        self.head = nn.Linear(self.backbone.embed_dim, 1)

    def forward(self, images: np.ndarray) -> torch.Tensor:
        """Logits of all patches, row by row."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.backbone.mean, self.backbone.std))
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        (patches,) = self.backbone.get_intermediate_layers((pixels - mean) / std, 1)
        return self.head(patches)[..., 0]


def main() -> None:
    """Trains and prints the measures of the other half as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder with seg/")
    parser.add_argument("--split", type=int, default=0, help="which split into halves")
    parser.add_argument("--iterations", type=int, default=700)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the recipe")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tissue = read_tissue(arguments.data / "seg/dsb2018_histology", arguments.split)
    with tempfile.TemporaryDirectory() as temporary:
        model = Segmenter(random_network("tissue", Path(temporary), 0, arguments.overrides))
    fit(model, tissue, arguments.iterations)


def fit(model: Segmenter, tissue: Tissue, iterations: int) -> None:
    """Trains with AdamW, a short warm-up and a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    rates = [min(1, (i + 1) / 50) * (1 + np.cos(np.pi * i / iterations)) / 2 for i in range(iterations + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates.__getitem__)
    rng = np.random.default_rng(0)
    print("| iterations | loss of the last batch | mean IoU | AUROC |\n|---:|---:|---:|---:|")
    for iteration in range(1, iterations + 1):
        images, nuclei = draw(tissue, rng)
        loss = functional.binary_cross_entropy_with_logits(model.train()(images), torch.from_numpy(nuclei).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if iteration % REPORT_EVERY == 0 or iteration == iterations:
            found = " | ".join(f"{value:.4f}" for value in measure(model, tissue))
            print(f"| {iteration} | {loss.item():.3f} | {found} |", flush=True)


def draw(tissue: Tissue, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Crops (B, H, W, 3) of training images, mirrored, turned and tinted, and the nuclei (B, P) in them."""
    images, rows, columns = tissue.images[tissue.training], *(size // PATCH_PX for size in tissue.images.shape[1:3])
    nuclei = tissue.nuclei[tissue.training].reshape(-1, rows, columns)
    crops, truths = [], []
    for _ in range(BATCH):
        index, top, left = rng.integers((len(images), rows - CROP_PATCHES + 1, columns - CROP_PATCHES + 1))
        truth = nuclei[index, top : top + CROP_PATCHES, left : left + CROP_PATCHES]
        box = (slice(PATCH_PX * start, PATCH_PX * (start + CROP_PATCHES)) for start in (top, left))
        crop = images[(index, *box)]
        if rng.random() < 0.5:
            crop, truth = crop[::-1], truth[::-1]
        turns = rng.integers(4)
        factors = rng.uniform(1 - TINT, 1 + TINT, 3) * rng.uniform(1 - TINT, 1 + TINT)
        crops.append(np.clip(np.rot90(crop, turns) * factors, 0, 255))
        truths.append(np.rot90(truth, turns).ravel())
    return np.stack(crops), np.stack(truths)


@torch.inference_mode()
def measure(model: Segmenter, tissue: Tissue) -> tuple[float, float]:
    """Mean IoU and AUROC over all patches of the other half."""
    images, nuclei = tissue.images[~tissue.training], tissue.nuclei[~tissue.training]
    windows = images.shape[1] // WINDOW_HW[0], images.shape[2] // WINDOW_HW[1]
    grid = WINDOW_HW[0] // PATCH_PX, WINDOW_HW[1] // PATCH_PX
    model.eval()
    said = [torch.sigmoid(model(cut_windows(image[None], WINDOW_HW)))[..., None].numpy() for image in images]
    joined = join_windows(np.concatenate(said), windows, grid)[..., 0]
    return mean_iou(joined, nuclei), float(roc_auc_score(nuclei.ravel(), joined.ravel()))


if __name__ == "__main__":
    run_script(main)
