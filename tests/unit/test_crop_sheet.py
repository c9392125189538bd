"""The picture of a recipe's crops."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoscope.data.crops import contact_sheet
from dinoscope.data.dataset import ImageCrops, crop_settings
from dinoscope.data.tiles import open_tiles
from dinoscope.errors import ConfigError
from dinoscope.recipe import load_recipe
from dinoscope.visualize.crop_sheet import save_crop_sheet
from tiny_slides import write_manifest, write_slide

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "config" / "runs" / "tiny.yaml"
SMALL = ["crops.global_crops_size=64", "crops.local_crops_size=32", "crops.local_crops_number=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "one.tiff", 0, side=512)
    write_manifest(folder / "train.parquet", ["one"], slide_px=512, tile_px=128)
    (folder / "slides.tsv").write_text(f"slide_id\tpath\none\t{folder / 'one.tiff'}\n")
    return folder


def test_script_draws_the_samples_of_the_recipe(folder, tmp_path):
    output = tmp_path / "crops.png"
    script = [sys.executable, str(ROOT / "workflow_scripts" / "show_crops.py"), "--config", str(RECIPE)]
    data = ["--manifest", str(folder / "train.parquet"), "--slides", str(folder / "slides.tsv")]
    wanted = ["--output", str(output), "--samples", "2", "--first", "3"]
    subprocess.run([*script, *data, *wanted, *SMALL], check=True, timeout=120)
    config = load_recipe(RECIPE, SMALL)
    tiles = open_tiles(folder / "train.parquet", str(folder / "slides.tsv"))
    dataset = ImageCrops(tiles, *crop_settings(config), config.train.seed)
    picture = np.asarray(Image.open(output))
    first, second = (contact_sheet(dataset[sample][1]) for sample in (3, 4))
    assert np.array_equal(picture[: len(first)], first)
    assert np.array_equal(picture[-len(second) :], second)


def test_crops_must_fit(folder, tmp_path):
    config = load_recipe(RECIPE, ["crops.global_crops_size=256"])
    with pytest.raises(ConfigError, match="global crops are 256 px"):
        save_crop_sheet(config, folder / "train.parquet", str(folder / "slides.tsv"), [0], tmp_path / "crops.png")
    assert not (tmp_path / "crops.png").exists()
