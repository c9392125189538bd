"""Tiles packed as JPEG: the same tiles in the same order, and what is refused."""

import functools
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, JpegImagePlugin

from dinoscope.data import packed as packed_module
from dinoscope.data.collate import Collate
from dinoscope.data.crops import AUGMENTATIONS, CropSizes
from dinoscope.data.dataset import ImageCrops, StepSizes, build_loader, open_images, pixels_digest
from dinoscope.data.packed import (
    PackedFile,
    PackedTiles,
    decode_jpeg,
    encode_jpeg,
    open_packed,
    pack_slide,
    write_index,
)
from dinoscope.data.tiles import SlideAccess, open_tiles
from dinoscope.errors import ConfigError, ManifestError, SealError, SlideError
from dinoscope.slides.manifest import manifest_digest, merge_manifests, tile_table, write_tiles
from dinoscope.slides.reader import Slide
from dinoscope.train.seal import compare_pixels
from tiny_slides import write_manifest, write_slide

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
SLIDES = ("one", "two")
TILE_PX = 64  # 100 tiles of a slide of 640 px: more than one record batch


class Place:
    """A folder with slides, their manifest, packed files and index."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest, self.table = folder, folder / "train.parquet", str(folder / "slides.tsv")
        self.packed, self.index = folder / "packed", folder / "packed" / "index.json"

    def pack(self, slide: str, **options) -> None:
        settings = {"quality": 90, "subsampling": "4:2:0"} | options
        opened = functools.partial(Slide, self.folder / f"{slide}.tiff", slide)
        pack_slide(slide, opened, self.folder / f"{slide}.parquet", self.packed / f"{slide}.arrow", **settings)

    def tiles(self, **options) -> PackedTiles:
        return open_packed(self.manifest, self.table, self.index, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    place = Place(folder)
    for seed, name in enumerate(SLIDES):
        write_slide(folder / f"{name}.tiff", seed, side=640)
    write_manifest(place.manifest, list(SLIDES), slide_px=640, tile_px=TILE_PX)
    rows = "".join(f"{name}\t{folder / name}.tiff\tHE\n" for name in SLIDES)
    (folder / "slides.tsv").write_text(f"slide_id\tpath\tstain\n{rows}")
    for name in SLIDES:
        place.pack(name)
    write_index(place.manifest, place.packed, place.index)
    return folder


@pytest.fixture
def place(made, tmp_path) -> Place:
    return Place(shutil.copytree(made, tmp_path / "copy"))


# ---- round trip


def test_packed_tiles_are_the_slides_tiles_as_jpeg(place):
    slides, packed = open_tiles(place.manifest, place.table), place.tiles()
    assert len(packed) == len(slides) == 200
    for index in range(len(slides)):
        image, sample_id = slides.read(index)
        found, packed_id = packed.read(index)
        assert packed_id == sample_id == packed.sample_id(index)
        stream = encode_jpeg(image, 90, "4:2:0")
        assert np.array_equal(found, decode_jpeg(np.frombuffer(stream, np.uint8)))
        theirs = np.asarray(Image.open(io.BytesIO(stream)))  # Pillow's libjpeg
        assert np.abs(found.astype(int) - theirs).max() <= 2
        assert np.abs(found.astype(int) - image).mean() < 10  # small bright discs lose colour
    for name in ("windows", "slide_ids"):
        assert getattr(packed, name) == getattr(slides, name)
    assert packed.digest() == slides.digest()
    assert packed.slide_rows() == slides.slide_rows()
    assert packed.stain(0) == "HE"


@pytest.mark.parametrize(("subsampling", "layers"), [("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2)])
def test_streams_are_what_was_asked_for(subsampling, layers):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    stream = encode_jpeg(image, 95, subsampling)
    opened = Image.open(io.BytesIO(stream))
    assert opened.size == (64, 64)
    assert JpegImagePlugin.get_sampling(opened) == layers
    assert len(encode_jpeg(image, 60, subsampling)) < 0.7 * len(stream)


def test_colours_are_not_exchanged():
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    assert np.abs(decode_jpeg(np.frombuffer(encode_jpeg(red, 95, "4:4:4"), np.uint8)).astype(int) - red).max() < 4


def test_samples_come_in_the_same_order(place):
    sizes = CropSizes(global_px=48, local_px=32, num_local=1)
    slides, packed = (
        ImageCrops(tiles, StepSizes((sizes,)), AUGMENTATIONS["dinov3"], seed=3)
        for tiles in (open_tiles(place.manifest, place.table), place.tiles())
    )
    assert slides.sample_ids(list(range(500))) == packed.sample_ids(list(range(500)))
    (_, one), (_, other) = slides[7], packed[7]
    assert np.abs(one.global_crops.astype(int) - other.global_crops).mean() < 8


def test_loader_processes_and_copies_read_the_same(place):
    sizes = CropSizes(global_px=48, local_px=32, num_local=1)
    dataset = ImageCrops(place.tiles(), StepSizes((sizes,)), AUGMENTATIONS["dinov3"], seed=3)
    dataset.images.read(0)  # a file is open before the fork
    steps = {"first": 0, "last": 3, "rank": 0, "world_size": 1}

    def batches(data, workers):
        return list(build_loader(data, Collate(4, 16, 0.5, (0.1, 0.5), False, 0), num_workers=workers, **steps))

    plain = batches(dataset, 0)
    for other in (batches(dataset, 2), batches(pickle.loads(pickle.dumps(dataset)), 0)):
        for one, two in zip(plain, other, strict=True):
            assert torch.equal(one.global_crops, two.global_crops)


def test_few_files_are_open_at_a_time(place):
    packed = place.tiles()
    few = PackedTiles(packed.tiles, place_records(place), packed.digest(), packed.index, max_open=1)
    for index in (0, 150, 1, 199, 64, 0):
        assert np.array_equal(few.read(index)[0], packed.read(index)[0])
        assert len(few._files) == 1


def place_records(place):
    from dinoscope.slides.table import read_slide_table

    return read_slide_table(place.table)


def test_a_slide_without_tiles(place):
    table = tile_table("two", {name: np.array([], int) for name in ("x", "y", "level", "read_px", "tile_px", "mpp")}
                       | {"footprint_px": 1, "tissue_fraction": 1.0})  # fmt: skip
    about = {"slide_id": "two", "tile_set": "train", "tile_px": TILE_PX, "requested_mpp": 0.5, "stride_px": TILE_PX}
    write_tiles(place.folder / "two.parquet", table, about)
    place.pack("two")
    assert PackedFile(place.packed / "two.arrow").coordinates().shape == (0, 4)
    merge_manifests([place.folder / "one.parquet", place.folder / "two.parquet"], place.manifest)
    write_index(place.manifest, place.packed, place.index)
    assert len(place.tiles()) == 100


def test_scripts(place):
    shutil.rmtree(place.packed)
    for name in SLIDES:
        arguments = ["--slide", f"{name}.tiff", "--slide-id", name, "--tiles", f"{name}.parquet", "--quality", "75"]
        run("pack_tiles.py", *arguments, "--subsampling", "4:4:4", "--output", f"packed/{name}.arrow", cwd=place.folder)
    run("pack_index.py", "--manifest", "train.parquet", "--output", "packed/index.json", cwd=place.folder)
    index = place.tiles().index
    assert (index.quality, index.subsampling) == (75, "4:4:4")
    told = json.loads(place.index.read_text())
    assert told["num_tiles"] == 200
    assert told["bytes"] == sum(file.stat().st_size for file in place.packed.glob("*.arrow"))


def run(script, *arguments, cwd):
    subprocess.run([sys.executable, str(SCRIPTS / script), *arguments], cwd=cwd, check=True, timeout=120)


# ---- what is refused


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files(place, share):
    file = place.packed / "one.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ManifestError, match=r"packed file one\.arrow is damaged .*delete it"):
        place.tiles().read(0)
    with pytest.raises(ManifestError, match=r"packed file one\.arrow is damaged"):
        write_index(place.manifest, place.packed, place.index)


def test_damaged_pixels_name_their_tile(place):
    file = place.packed / "one.arrow"
    content = bytearray(file.read_bytes())
    _, stream = PackedFile(file).tile(3)
    start = bytes(content).index(stream.tobytes())
    content[start : start + len(stream)] = bytes(len(stream))
    file.write_bytes(content)
    packed = place.tiles()
    packed.read(2)
    with pytest.raises(ManifestError, match=r"packed tile one@192,0 cannot be read .*its JPEG cannot be decoded"):
        packed.read(3)


def test_a_text_or_another_arrow_file(place):
    (place.packed / "one.arrow").write_text("no tiles")
    with pytest.raises(ManifestError, match="damaged or no packed file"):
        place.tiles().read(0)
    with pa.OSFile(str(place.packed / "one.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([])) as writer:
        writer.write_batch(pa.record_batch({}))
    with pytest.raises(ManifestError, match="damaged or no packed file"):
        place.tiles().read(0)


def test_missing_files(place):
    (place.packed / "two.arrow").unlink()
    with pytest.raises(ManifestError, match=r"two\.arrow is missing from packed: pack the slide again"):
        place.tiles().read(150)
    with pytest.raises(ManifestError, match=r"two\.arrow is missing"):
        write_index(place.manifest, place.packed, place.index)
    place.index.unlink()
    with pytest.raises(ManifestError, match=r"no index of packed tiles .*index\.json: make it"):
        place.tiles()
    place.index.write_text("{}")
    with pytest.raises(ManifestError, match=r"index\.json is no index of packed tiles"):
        place.tiles()


def test_another_manifest_is_refused_and_an_earlier_one_kept(place):
    before, read = manifest_digest(place.manifest), place.tiles().read(0)[0]
    merge_manifests([place.folder / "one.parquet"], place.manifest)
    now = manifest_digest(place.manifest)
    with pytest.raises(ManifestError, match=f"those of manifest {before[:8]}, and {now[:8]} is trained on"):
        place.tiles()
    write_index(place.manifest, place.packed, place.index)
    assert len(place.tiles()) == 100
    going_on = place.tiles(sealed=before)  # a run that was started before
    assert len(going_on) == 200
    assert np.array_equal(going_on.read(0)[0], read)


def test_files_that_were_packed_anew_are_refused(place):
    place.pack("one", quality=60)
    packed = place.tiles()
    packed.read(150)
    with pytest.raises(ManifestError, match=r"one\.arrow is not the one that the index of packed names"):
        packed.read(0)
    with pytest.raises(ManifestError, match=r"two\.arrow has JPEG quality 90 with 4:2:0, others .* 60"):
        write_index(place.manifest, place.packed, place.index)


def test_other_tiles_are_refused(place):
    write_manifest(place.folder / "other.parquet", ["one"], slide_px=640, tile_px=80)
    place.pack("one")
    with pytest.raises(ManifestError, match=r"one\.arrow holds other tiles of slide one than the manifest"):
        write_index(place.manifest, place.packed, place.index)
    opened = functools.partial(Slide, place.folder / "two.tiff", "two")
    with pytest.raises(ManifestError, match="has tiles of slide one, not of two"):
        pack_slide(
            "two", opened, place.folder / "one.parquet", place.packed / "x.arrow", quality=90, subsampling="4:2:0"
        )
    assert not (place.packed / "x.arrow").exists()


def test_a_slide_that_is_not_in_the_index(place):
    told = json.loads(place.index.read_text())
    del told["slides"]["two"]
    place.index.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="slide two is not among the packed tiles"):
        place.tiles()


# ---- the seal


def test_the_seal_says_which_pixels(place, tmp_path):
    where = {"manifest": place.manifest, "slides": place.table, "run_dir": tmp_path}
    from_slides, packed = open_images(None, **where), open_images(None, **where, packed=place.index)
    assert pixels_digest(from_slides) is None
    pixels = pixels_digest(packed)
    assert pixels.startswith("JPEG 90 4:2:0 ")
    for before, now in ((None, pixels), (pixels, None), (pixels, pixels[:-1] + "!")):
        with pytest.raises(SealError, match="was started on other pixels"):
            compare_pixels(tmp_path / "run", {"inputs": {"pixels": before}}, now)
    compare_pixels(tmp_path / "run", {"inputs": {"pixels": pixels}}, pixels)
    compare_pixels(tmp_path / "run", {"inputs": {}}, None)  # seals from before there were packed tiles


def test_other_settings_are_other_pixels(place):
    before = pixels_digest(place.tiles())
    for name in SLIDES:
        place.pack(name, quality=80)
    write_index(place.manifest, place.packed, place.index)
    assert pixels_digest(place.tiles()) != before
    for name in SLIDES:
        place.pack(name)
    write_index(place.manifest, place.packed, place.index)
    assert pixels_digest(place.tiles()) == before


def test_another_tile_stands_in_for_one_that_could_not_be_packed(place, monkeypatch):
    whole = place.tiles()
    broken = next(index for index in range(len(whole)) if whole.sample_id(index).startswith("two@"))
    x, y = whole.tiles[broken].x, whole.tiles[broken].y
    read = packed_module.read_tile

    def damaged(slide, *where):
        if slide.slide_id == "two" and where[:2] == (x, y):
            raise SlideError(f"slide 'two' cannot be read at x {x}, y {y}")
        return read(slide, *where)

    monkeypatch.setattr(packed_module, "read_tile", damaged)
    with pytest.raises(SlideError, match="cannot be read at"):
        place.pack("two")
    place.pack("two", skip_unreadable=True)
    write_index(place.manifest, place.packed, place.index)
    with pytest.raises(SlideError, match=r"tile two@\d+,\d+ could not be read from its slide when it was packed: set"):
        place.tiles().read(broken)
    tiles = place.tiles(access=SlideAccess(on_error="skip"))
    image, name = tiles.read(broken)
    assert name.startswith("one@")  # of the same stain, on another slide, and always the same one
    assert np.array_equal(image, place.tiles(access=SlideAccess(on_error="skip")).read(broken)[0])
    assert tiles.read(broken + 1)[1] == whole.sample_id(broken + 1)


def test_a_slide_without_tiles_is_not_even_opened(place):
    """It may have been skipped, and be unreadable."""
    table = pq.read_table(place.folder / "one.parquet")
    pq.write_table(table.slice(0, 0), place.folder / "none.parquet")

    def opened():
        raise AssertionError("opened")

    settings = {"quality": 90, "subsampling": "4:2:0"}
    assert pack_slide("none", opened, place.folder / "none.parquet", place.packed / "none.arrow", **settings) == 0
    assert (place.packed / "none.arrow").is_file()
