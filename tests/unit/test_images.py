"""Folders of images and data sets of the user's own as training images, from the files to a run."""

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from dinoscope.data.collate import Collate
from dinoscope.data.crops import AUGMENTATIONS, Augmentation, CropSizes, for_stain, make_crops, sample_rng
from dinoscope.data.dataset import ImageCrops, StepSizes, build_loader, open_images
from dinoscope.data.images import map_images, read_image
from dinoscope.data.sampler import tile_of_sample
from dinoscope.data.sources import TrainingImages, UserImages, Window, is_class_name, name_without_folders
from dinoscope.errors import ConfigError, DinoscopeError, SealError
from dinoscope.files import read_json

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
SIZES = CropSizes(global_px=64, local_px=32, num_local=2)
# The example of config/README.md.
EXAMPLE = """
import h5py

class Cells:
    def __init__(self):  # once in every process; no arguments
        self.images = h5py.File("cells.h5")["images"]  # uint8 RGB (N, H, W, 3)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], f"cell {index}"  # the image and its name in messages; or the image alone
"""
RECIPE = """
student: {arch: vit_nano, layerscale: 0.1}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}
dino: {head_n_prototypes: 32, head_hidden_dim: 16, head_bottleneck_dim: 8}
ibot: {head_n_prototypes: 32, head_hidden_dim: 16, head_bottleneck_dim: 8}
optim: {warmup_epochs: 0, freeze_last_layer_epochs: 0}
teacher: {warmup_teacher_temp_epochs: 0}
train: {OFFICIAL_EPOCH_LENGTH: 3, batch_size_per_gpu: 2, num_workers: 1, log_every: 1}
"""


def noise(seed: int, height: int = 72, width: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images whose paths sort otherwise than their folders do, and files that are none."""
    for number, name in enumerate(("a/b.png", "a.png", "a-b/c.TIF", "Z.bmp", "a/d/e.webp", "ä.JPG")):
        path = tmp_path / "cells" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(number)).save(path, **({"lossless": True} if name.endswith("webp") else {}))
    for name in ("notes.txt", ".hidden.png", ".folder/x.png", "png"):
        (tmp_path / "cells" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cells" / name).write_bytes(b"no image")
    return tmp_path / "cells"


def opened(folder: Path, **changes) -> TrainingImages:
    given = {"manifest": None, "slides": None, "run_dir": folder.parent / "run"} | changes
    return open_images(str(folder), **given)


def test_a_folder_is_listed_in_the_order_of_its_paths(folder: Path) -> None:
    images = pickle.loads(pickle.dumps(opened(folder)))
    found = [images.read(index) for index in range(len(images))]
    wanted = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in (".png", ".jpg", ".tif", ".bmp", ".webp") and "/." not in path.as_posix()
    )
    assert [name for _, name in found] == wanted
    assert wanted[1:4] == ["a-b/c.TIF", "a.png", "a/b.png"]
    for image, name in found:
        if not name.endswith("JPG"):
            assert np.array_equal(image, cv2.imread(str(folder / name))[..., ::-1])
    assert images.windows == [Window(80, 72, None, "image Z.bmp")]
    assert (images.slide_ids, images.stain(0)) == ([], None)


def test_links_are_followed_and_lead_nowhere_twice(folder: Path) -> None:
    (folder / "a/up").symlink_to(folder)
    (folder / "again").symlink_to(folder / "a-b")
    images = opened(folder)
    names = [images.sample_id(index) for index in range(len(images))]
    assert "again/c.TIF" in names
    assert not [name for name in names if "up" in name]


def test_many_images_cost_neither_objects_nor_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoscope.data.images._ROWS_PER_BATCH", 7)
    monkeypatch.setattr("dinoscope.data.images._HEADERS_READ", 10)
    content = cv2.imencode(".png", noise(0))[1].tobytes()
    (tmp_path / "cells").mkdir()
    for index in range(50):
        (tmp_path / "cells" / f"{index:02}.png").write_bytes(content if index % 2 else content + b"x")
    monkeypatch.setattr(Image, "open", counted := Counted(Image.open))
    images = opened(tmp_path / "cells")
    assert counted.calls == 10
    assert [images.sample_id(index) for index in range(50)] == [f"{index:02}.png" for index in range(50)]
    assert len(pickle.dumps(images)) < 500
    opened(tmp_path / "cells", sealed={"images": images.digest()})
    assert counted.calls == 10


class Counted:
    def __init__(self, function) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.function(*arguments, **options)


def test_every_kind_of_eight_bits_becomes_rgb(tmp_path: Path) -> None:
    rgb, grey = noise(1), noise(2)[..., 0]
    alpha = noise(3)[..., 1]
    for name, image in {
        "grey.png": Image.fromarray(grey),
        "bits.png": Image.fromarray(grey > 127),
        "rgba.png": Image.fromarray(np.dstack([rgb, alpha])),
        "la.png": Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]),
        "palette.png": Image.fromarray(rgb).quantize(16),
        "cmyk.tif": Image.fromarray(rgb).convert("CMYK"),
    }.items():
        image.save(tmp_path / name)
    share = alpha[..., None] / 255.0
    expected = {
        "grey.png": np.dstack([grey] * 3),
        "bits.png": np.dstack([np.where(grey > 127, 255, 0)] * 3),
        "rgba.png": rgb * share + 255 * (1 - share),
        "la.png": grey[..., None] * share + 255 * (1 - share),
        "palette.png": np.array(Image.fromarray(rgb).quantize(16).convert("RGB")),
        "cmyk.tif": rgb,
    }
    for name, wanted in expected.items():
        image = read_image(tmp_path, name)
        assert (image.dtype, image.shape) == (np.uint8, (72, 80, 3)), name
        assert np.abs(image - wanted.astype(float)).max() <= (0.51 if name in ("rgba.png", "la.png") else 0), name


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_more_than_eight_bits_are_refused(tmp_path: Path, suffix: str) -> None:
    deep = noise(0).astype(np.uint16) * 257
    for number, image in enumerate((deep, deep[..., 0], np.dstack([deep, deep[..., :1]]))):
        cv2.imwrite(str(tmp_path / f"{number}.{suffix}"), image)
        with pytest.raises(DinoscopeError, match=rf"image {number}\.{suffix} .*more than 8 bits a channel"):
            read_image(tmp_path, f"{number}.{suffix}")
    if suffix == "tif":
        Image.fromarray(deep[..., 0].astype(np.float32)).save(tmp_path / "f.tif")
        with pytest.raises(DinoscopeError, match=r"image f\.tif .*more than 8 bits"):
            read_image(tmp_path, "f.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_damaged_images_are_named_whatever_is_wrong(
    tmp_path: Path, suffix: str, recwarn: pytest.WarningsRecorder
) -> None:
    Image.fromarray(noise(0)).save(tmp_path / f"whole.{suffix}")
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    rng, refused = random.Random(0), 0
    for turn in range(40):
        damaged = bytearray(content[: rng.randrange(len(content))] if turn % 2 else content)
        for _ in range(6 * (1 - turn % 2)):
            damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        (tmp_path / f"broken.{suffix}").write_bytes(damaged)
        try:
            assert read_image(tmp_path, f"broken.{suffix}").shape[2] == 3
        except DinoscopeError as error:
            refused += 1
            assert f"image broken.{suffix} of {tmp_path.name}" in str(error)
            assert str(tmp_path) not in str(error)
    assert refused >= 15


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"folder .*empty holds no image; looked for \.png"):
        opened(tmp_path / "empty")
    with pytest.raises(ConfigError, match="neither a folder of images that exists nor module:Class"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"both --manifest train\.parquet and train\.dataset_path"):
        opened(tmp_path / "empty", manifest=Path("x/train.parquet"), slides="slides.tsv")
    with pytest.raises(ConfigError, match=r"give --manifest and --slides, or set train\.dataset_path"):
        open_images(None, manifest=None, slides=None, run_dir=tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).touch()
    with pytest.raises(ConfigError, match=r"the name of image '\\udcff.png' is not UTF-8"):
        opened(tmp_path)


def test_a_run_keeps_its_list_of_images(folder: Path) -> None:
    begun = opened(folder)
    assert opened(folder).digest() == begun.digest()
    Image.fromarray(noise(9)).save(folder / "Y.png")
    (folder / "a.png").unlink()
    (folder.parent / "elsewhere").mkdir()
    moved = folder.rename(folder.parent / "elsewhere" / "cells")
    sealed = {"manifest": None, "images": begun.digest()}
    resumed = open_images(str(moved), manifest=None, slides=None, run_dir=folder.parent / "run", sealed=sealed)
    assert [resumed.sample_id(i) for i in range(len(resumed))] == [begun.sample_id(i) for i in range(len(begun))]
    with pytest.raises(DinoscopeError, match=r"image a\.png is no longer in cells"):
        resumed.read(2)
    with pytest.raises(ConfigError, match=r"was started on the images of cells with digest .*list of them is gone"):
        map_images(moved, folder.parent / "other", begun.digest())


@pytest.mark.parametrize("change", ["rename", "size", "more"])
def test_the_digest_tells_other_images(folder: Path, change: str) -> None:
    before = opened(folder).digest()
    if change == "rename":
        (folder / "a.png").rename(folder / "c.png")
    elif change == "size":
        Image.fromarray(noise(9, 90)).save(folder / "a.png")
    else:
        Image.fromarray(noise(9)).save(folder / "Y.png")
    assert opened(folder).digest() != before


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A working directory with the example of the documentation; what it imports is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "cells_of_mine.py").write_text(EXAMPLE)
    with h5py.File(tmp_path / "cells.h5", "w") as file:
        file["images"] = np.stack([noise(number) for number in range(10)])
    yield tmp_path
    sys.modules.pop("cells_of_mine", None)


def batches(images: TrainingImages, num_workers: int) -> list:
    crops = ImageCrops(images, StepSizes((SIZES,)), Augmentation(), 5)
    collate = Collate(4, 16, 0.5, (0.1, 0.5), False, seed=5)
    loader = build_loader(crops, collate, first=0, last=4, rank=0, world_size=1, num_workers=num_workers)
    return list(loader)


def test_the_documented_data_set_works_in_any_number_of_workers(place: Path) -> None:
    images = open_images("cells_of_mine:Cells", manifest=None, slides=None, run_dir=place)
    assert (len(images), images.windows) == (10, [Window(80, 72, None, "image cell 0")])
    image, sample_id = images.read(7)
    assert np.array_equal(image, noise(7))
    assert (sample_id, images.stain(7)) == ("cell 7", None)
    alone, spread = batches(images, 0), batches(pickle.loads(pickle.dumps(images)), 2)
    for first, second in zip(alone, spread, strict=True):
        assert torch.equal(first.global_crops, second.global_crops)
        assert torch.equal(first.local_crops, second.local_crops)
    expected = make_crops(noise(tile_of_sample(6, 10, 5)), SIZES, Augmentation(), sample_rng(5, 6))
    assert np.array_equal(alone[1].global_crops[4 + 2].numpy(), expected.global_crops[1])


def test_other_images_of_a_data_set_are_refused_when_a_run_goes_on(place: Path) -> None:
    def resume(sealed: str) -> str:
        sys.modules.pop("cells_of_mine", None)
        given = {"manifest": None, "slides": None, "run_dir": place / "mine"}
        return open_images("cells_of_mine:Cells", **given, sealed={"images": sealed}).digest()

    digest = UserImages("cells_of_mine:Cells").digest()
    assert resume(digest) == digest
    (place / "cells_of_mine.py").write_text(EXAMPLE + "\n    def digest(self):\n        return 'first edition'\n")
    with pytest.raises(SealError, match=r"run mine was started on other images of cells_of_mine:Cells"):
        resume(digest)


def of_class(body: str, init: str = "pass") -> str:
    return f"import numpy as np\nclass Cells:\n    def __init__(self):\n        {init}\n{body}"


LENGTH = "    def __len__(self):\n        return 3\n"
ITEM = "    def __getitem__(self, index):\n        return {}\n"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import nothing_of_that_name", "cannot be built: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("class Other: pass", "cannot be built: AttributeError: module 'cells_of_mine' has no attribute 'Cells'"),
        (of_class("", "1 / 0"), r"cannot be built: ZeroDivisionError: .* \(cells_of_mine.py line 4\)"),
        (of_class(LENGTH), "has no __getitem__; it needs __len__ and"),
        (of_class(ITEM.format(1)), "has no __len__; it needs __len__ and"),
        (of_class(LENGTH.replace("3", "0") + ITEM.format(1)), "has no image: its length is 0"),
        (of_class(LENGTH + ITEM.format("{}[index]")), r"failed at index 0: KeyError: 0 \(cells_of_mine.py line 8\)"),
        (of_class(LENGTH + ITEM.format("'text'")), "gave a str at index 0; it must give a numpy array of uint8"),
        (of_class(LENGTH + ITEM.format("np.ones((9, 9, 3))")), r"gave ndarray of float64 and shape \(9, 9, 3\) at"),
        (of_class(LENGTH + ITEM.format("np.ones((9, 9), np.uint8), 'x'")), r"gave ndarray of uint8 and shape \(9, 9\)"),
    ],
)
def test_what_is_wrong_with_a_data_set_is_said_in_a_sentence(place: Path, source: str, sentence: str) -> None:
    (place / "cells_of_mine.py").write_text(source)
    with pytest.raises(DinoscopeError, match=f"cells_of_mine:Cells .*{sentence}"):
        UserImages("cells_of_mine:Cells")


def test_errors_of_later_images_reach_the_trainer(place: Path) -> None:
    body = LENGTH.replace("3", "40") + ITEM.format("np.zeros((70, 70 if index != 11 else 50, 3), np.uint8)")
    (place / "cells_of_mine.py").write_text(of_class(body))
    wrong = [batch for batch in batches(UserImages("cells_of_mine:Cells"), 1) if isinstance(batch, DinoscopeError)]
    samples = [tile_of_sample(sample, 40, 5) for sample in range(16)]
    assert len(wrong) == samples.count(11) == 1
    assert "image cells_of_mine:Cells[11] is 50 × 70 px, but crops are 64 px" in str(wrong[0])


def test_what_is_built_differently_in_another_process_is_refused(place: Path) -> None:
    images = UserImages("cells_of_mine:Cells")
    state = pickle.dumps(images)
    with h5py.File(place / "only_one.h5", "w") as file:
        file["images"] = np.stack([noise(0)])
    (place / "cells_of_mine.py").write_text(EXAMPLE.replace("cells.h5", "only_one.h5"))
    del sys.modules["cells_of_mine"]
    with pytest.raises(DinoscopeError, match="has 1 images in one process and 10 in another"):
        pickle.loads(state).read(0)


def test_names_in_results_hold_no_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert (
        name_without_folders(str(folder)) == name_without_folders(f"{folder}/") == name_without_folders(".") == "cells"
    )
    assert name_without_folders("my.module:Cells") == "my.module:Cells"
    assert name_without_folders(None) is None
    assert is_class_name("my.module:Cells_2")
    assert not any(map(is_class_name, ("cells", "a/b:C", "ImageNet:split=TRAIN", "a:b:c", ":C", "m:", "1m:C")))


class Stained:
    """One image, of a stain."""

    def __init__(self, stain: str | None) -> None:
        self._stain = stain

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> tuple[np.ndarray, str]:
        return noise(0), "it"

    def stain(self, index: int) -> str | None:
        return self._stain


def test_distortions_go_by_the_stain_of_the_image() -> None:
    augmentation = AUGMENTATIONS["pathology"]
    for stain in ("IHC:KI67", "Pap", "HE", None):
        crops = ImageCrops(Stained(stain), StepSizes((SIZES,)), augmentation, 5)
        for sample in range(5):
            expected = make_crops(noise(0), SIZES, for_stain(augmentation, stain), sample_rng(5, sample))
            assert np.array_equal(crops[sample][1].global_crops, expected.global_crops)


def pretrain(place: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / "pretrain.py", "--config", "recipe.yaml", "--run-dir", "runs/mine", *overrides]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_a_run_on_a_folder_and_how_it_goes_on(folder: Path) -> None:
    place, run = folder.parent, folder.parent / "runs/mine"
    (place / "recipe.yaml").write_text(RECIPE)
    given = f"train.dataset_path={folder}"
    too_large = pretrain(place, given, "optim.epochs=1", "crops.global_crops_size=80")
    assert "global crops are 80 px but image Z.bmp only 80 × 72 px" in too_large.stderr
    assert not (run / "run_config.json").exists()
    done = pretrain(place, given, "optim.epochs=1")
    assert done.returncode == 0, done.stderr
    assert "data: 6 images" in done.stderr
    assert "global crops 64 px, magnification unknown (the smallest ones are upsampled)" in done.stderr
    final, seal = read_json(run / "final.json"), read_json(run / "run_config.json")
    assert (final["num_tiles"], final["tiles"], final["crops"][0]["finest_mpp"]) == (
        6,
        [{"tile_px": 72, "mpp": None}],
        None,
    )
    assert seal["settings"]["train.dataset_path"] == "cells"
    assert seal["inputs"]["manifest"] is None
    assert str(place) not in "".join(path.read_text() for path in run.iterdir() if path.suffix in (".json", ".yaml"))
    Image.fromarray(noise(9)).save(folder / "Y.png")
    moved = folder.rename(place / "elsewhere")
    refused = pretrain(place, f"train.dataset_path={moved}", "optim.epochs=2")
    assert "train.dataset_path was 'cells' and is now 'elsewhere'" in refused.stderr
    moved.rename(folder)
    assert pretrain(place, given, "optim.epochs=2").returncode == 0
    assert read_json(run / "final.json")["num_tiles"] == 6
    for image in [path for path in folder.rglob("*.*") if path.is_file()]:
        image.unlink()
    gone = pretrain(place, given, "optim.epochs=3")
    assert gone.returncode == 1
    assert "is no longer in cells: put it back" in gone.stderr.splitlines()[-1]


def test_a_run_on_a_data_set_of_ones_own(place: Path) -> None:
    (place / "recipe.yaml").write_text(RECIPE)
    without = pretrain(place)
    assert "give --manifest and --slides, or set train.dataset_path" in without.stderr.splitlines()[-1]
    done = pretrain(place, "train.dataset_path=cells_of_mine:Cells", "optim.epochs=1")
    assert done.returncode == 0, done.stderr
    assert read_json(place / "runs/mine/final.json")["num_tiles"] == 10
