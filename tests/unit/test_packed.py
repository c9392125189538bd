"""Tiles packed as JPEG: the same tiles in the same order, and what is refused."""

import functools
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, JpegImagePlugin

from dinoscope.data import packing as packing_module
from dinoscope.data.collate import Collate
from dinoscope.data.crops import AUGMENTATIONS, CropSizes
from dinoscope.data.dataset import ImageCrops, StepSizes, build_loader, open_images, pixels_digest
from dinoscope.data.packed import PackedSlide, PackedTiles, decode_jpeg, further_path, open_packed
from dinoscope.data.packing import encode_jpeg, pack_slide, write_index
from dinoscope.data.tiles import SlideAccess, open_tiles
from dinoscope.errors import ConfigError, ManifestError, SealError, SlideError
from dinoscope.slides.manifest import manifest_digest, merge_manifests, tile_table, write_tiles
from dinoscope.slides.reader import Slide
from dinoscope.slides.tiff_directory import TiledImage
from dinoscope.slides.tile_decoders import whole_jpeg
from dinoscope.train.seal import compare_pixels
from synthetic_slides import split_jpeg, texture, write_tiled
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
    assert PackedSlide(place.packed / "two.arrow").coordinates().shape == (0, 4)
    merge_manifests([place.folder / "one.parquet", place.folder / "two.parquet"], place.manifest)
    write_index(place.manifest, place.packed, place.index)
    assert len(place.tiles()) == 100


def test_scripts(place):
    shutil.rmtree(place.packed)
    for name in SLIDES:
        arguments = ["--slide", f"{name}.tiff", "--slide-id", name, "--tiles", f"{name}.parquet", "--quality", "75"]
        arguments += ["--copy-stored", "--file-gb", "1e-9"]
        run("pack_tiles.py", *arguments, "--subsampling", "4:4:4", "--output", f"packed/{name}.arrow", cwd=place.folder)
    run("pack_index.py", "--manifest", "train.parquet", "--output", "packed/index.json", cwd=place.folder)
    index = place.tiles().index
    assert (index.quality, index.subsampling) == (75, "4:4:4")
    told = json.loads(place.index.read_text())
    assert told["num_tiles"] == 200
    assert (told["files"], told["copied"]) == (4, 0)
    assert told["bytes"] == sum(file.stat().st_size for file in place.packed.rglob("*.arrow"))


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
    _, stream = PackedSlide(file).tile(3)
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
    read = packing_module.read_tile

    def damaged(slide, *where):
        if slide.slide_id == "two" and where[:2] == (x, y):
            raise SlideError(f"slide 'two' cannot be read at x {x}, y {y}")
        return read(slide, *where)

    monkeypatch.setattr(packing_module, "read_tile", damaged)
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


# ---- slides of several files


def further(place, slide="one"):
    return sorted(path.name for path in (place.packed / ".more").glob(f"{slide}.*"))


def test_many_tiles_are_split_over_files_and_stay_the_same(place):
    whole, before = [place.tiles().read(index)[0] for index in range(200)], pixels_digest(place.tiles())
    one_batch = 1  # byte: a file gets one batch of 64 tiles
    place.pack("one", file_bytes=one_batch)
    assert further(place) == ["one.2.arrow"]
    first, second = PackedSlide(place.packed / "one.arrow"), place.packed / ".more" / "one.2.arrow"
    assert (first.num_files, first.num_tiles) == (2, 100)
    assert first.num_bytes() == sum(file.stat().st_size for file in (first.path, second))
    told = write_index(place.manifest, place.packed, place.index)
    assert (told["files"], told["bytes"]) == (3, first.num_bytes() + (place.packed / "two.arrow").stat().st_size)
    packed = place.tiles()
    assert pixels_digest(packed) == before  # a run goes on, however its tiles are spread
    for index in (0, 63, 64, 99, 100, 199, *np.random.default_rng(0).integers(0, 200, 50).tolist()):
        assert np.array_equal(packed.read(index)[0], whole[index])
    again = pickle.loads(pickle.dumps(packed))
    assert np.array_equal(again.read(64)[0], whole[64])


def test_the_size_of_files_is_about_what_was_asked_for(place):
    write_manifest(place.folder / "one.parquet", ["one"], slide_px=640, tile_px=16)  # 1,600 tiles, 25 batches
    place.pack("one", file_bytes=100_000)
    files = [place.packed / "one.arrow", *(place.packed / ".more" / name for name in further(place))]
    batches = [pa.ipc.open_file(str(file)) for file in files]
    sizes = [
        [sum(len(jpeg.as_py()) for jpeg in reader.get_batch(k)["jpeg"]) for k in range(reader.num_record_batches)]
        for reader in batches
    ]
    assert len(files) > 5
    for each in sizes[:-1]:  # full with the last batch, and not before
        assert sum(each) >= 100_000 > sum(each[:-1])
    assert np.array_equal(
        PackedSlide(files[0]).coordinates()[:, :2],
        [(row["x"], row["y"]) for row in pq.read_table(place.folder / "one.parquet").to_pylist()],
    )


def test_files_of_an_earlier_packing_go(place):
    write_manifest(place.folder / "one.parquet", ["one"], slide_px=640, tile_px=16)
    place.pack("one", file_bytes=100_000)
    assert len(further(place)) > 5
    (place.packed / ".more" / "one.2.2.arrow").write_text("the second file of slide one.2")
    place.pack("one", file_bytes=300_000)
    assert 1 < len(further(place)) < 5
    place.pack("one")
    assert further(place) == ["one.2.2.arrow"]


@pytest.mark.parametrize("row", [10, 70, 150, 390])
def test_a_packing_that_fails_leaves_the_earlier_one_or_nothing(place, monkeypatch, row):
    write_manifest(place.folder / "one.parquet", ["one"], slide_px=640, tile_px=32)  # 400 tiles, seven batches
    place.pack("one", file_bytes=1)
    before = PackedSlide(place.packed / "one.arrow")
    tiles = [before.tile(number)[1].tobytes() for number in range(400)]
    read, count = packing_module.read_tile, iter(range(400))

    def damaged(*where):
        if next(count) == row:
            raise SlideError("damaged")
        return read(*where)

    monkeypatch.setattr(packing_module, "read_tile", damaged)
    with pytest.raises(SlideError, match="damaged"):
        place.pack("one", file_bytes=1, quality=50)
    if row < 128:  # not even the second file was begun
        after = PackedSlide(place.packed / "one.arrow")
        assert [after.tile(number)[1].tobytes() for number in range(400)] == tiles
    else:
        assert not (place.packed / "one.arrow").exists() and further(place) == []
    assert [path.name for path in place.packed.rglob("*partial*")] == []


def test_further_files_that_are_missing_or_of_another_packing_are_refused(place):
    place.pack("one", file_bytes=1)
    write_index(place.manifest, place.packed, place.index)
    second = further_path(place.packed / "one.arrow", 2)
    other = second.read_bytes()
    place.pack("one", file_bytes=1, quality=70)
    second.write_bytes(other)
    with pytest.raises(ManifestError, match=r"one\.2\.arrow does not belong to one\.arrow: delete one\.arrow"):
        write_index(place.manifest, place.packed, place.index)
    second.unlink()
    with pytest.raises(ManifestError, match=r"one\.2\.arrow is missing"):
        PackedSlide(place.packed / "one.arrow").tile(80)
    PackedSlide(place.packed / "one.arrow").tile(10)


# ---- JPEGs that the slide stores


def jpeg_slide(path, kind):
    """A slide of 1,024 px that stores tiles of 128 px as JPEG, and its picture as OpenSlide gives it."""
    subsampling, colours, tables = {
        "4:2:0": ("420", "ycbcr", False),
        "4:4:4": ("444", "ycbcr", False),
        "RGB": ("444", "rgb", False),
        "shared tables": ("420", "ycbcr", True),
        "RGB, shared tables": ("444", "rgb", True),
        "YCbCr that the file calls RGB": ("444", "wrong", False),
    }[kind]
    options = {"outcolorspace": "RGB"} if colours == "rgb" else {}

    def encode(tile):
        return imagecodecs.jpeg8_encode(tile, level=80, subsampling=subsampling, **options)

    image = texture(1024, 1024)
    more = {"subsampling": (2, 2) if subsampling == "420" else None}
    if tables:
        more["jpegtables"] = split_jpeg(encode(image[:128, :128].copy()))[0]
    write_tiled(
        path,
        image,
        (lambda tile: split_jpeg(encode(tile))[1]) if tables else encode,
        tile=(128, 128),
        downsamples=(1,),
        photometric="ycbcr" if colours == "ycbcr" else "rgb",
        **more,
    )
    with openslide.OpenSlide(path) as handle:
        return np.asarray(handle.read_region((0, 0), 0, (1024, 1024)).convert("RGB"))


KINDS = ["4:2:0", "4:4:4", "RGB", "shared tables", "RGB, shared tables", "YCbCr that the file calls RGB"]


@pytest.mark.parametrize("kind", KINDS)
def test_stored_jpegs_are_copied_without_loss(tmp_path, kind):
    picture = jpeg_slide(tmp_path / "one.tiff", kind)
    write_manifest(tmp_path / "one.parquet", ["one"], slide_px=1024, tile_px=128)
    place = Place(tmp_path)
    place.pack("one", copy_stored=True)
    packed = PackedSlide(place.packed / "one.arrow")
    assert packed.copied == packed.num_tiles == 64
    for row in range(64):
        (x, y), stream = packed.tile(row)
        wanted = picture[y : y + 128, x : x + 128]
        assert np.array_equal(decode_jpeg(stream), wanted)
        theirs = np.asarray(Image.open(io.BytesIO(stream.tobytes())).convert("RGB"))  # Pillow's libjpeg
        assert np.array_equal(theirs, wanted)
    place.pack("one")
    assert PackedSlide(place.packed / "one.arrow").copied == 0


@pytest.mark.parametrize(("tile_px", "offset"), [(64, 0), (256, 0), (128, 16)])
def test_tiles_that_are_not_stored_as_such_are_encoded(tmp_path, tile_px, offset):
    jpeg_slide(tmp_path / "one.tiff", "4:2:0")
    columns = {name: np.full(4, tile_px) for name in ("read_px", "tile_px", "footprint_px")}
    columns |= {"x": np.arange(4) * tile_px + offset, "y": np.full(4, offset), "level": np.zeros(4, int)}
    columns |= {"mpp": np.full(4, 0.5), "tissue_fraction": np.ones(4)}
    about = {"slide_id": "one", "tile_set": "train", "tile_px": tile_px, "requested_mpp": 0.5, "stride_px": tile_px}
    write_tiles(tmp_path / "one.parquet", tile_table("one", columns), about)
    place = Place(tmp_path)
    place.pack("one", copy_stored=True)
    packed = PackedSlide(place.packed / "one.arrow")
    assert packed.copied == 0
    assert decode_jpeg(packed.tile(3)[1]).shape == (tile_px, tile_px, 3)


def test_copied_jpegs_hold_no_texts(tmp_path):
    with_comment = imagecodecs.jpeg8_encode(np.full((128, 128, 3), 90, np.uint8), level=80)
    texts = b"\xff\xfe\x00\x0cJane Doe 7" + b"\xff\xe1\x00\x0cJane Doe 7"
    stream = with_comment[:2] + texts + with_comment[2:]
    image = TiledImage(128, 128, 128, 128, 7, 6, np.array([0]), np.array([len(stream)]), None)
    found = whole_jpeg(stream, image)
    assert b"Jane" not in found and b"JFIF" not in found
    assert np.array_equal(decode_jpeg(np.frombuffer(found, np.uint8)), imagecodecs.jpeg8_decode(with_comment))
    for broken in (b"", b"\xff\xd8", stream[:40], b"\xff\xd8\xff", bytes(200)):
        assert whole_jpeg(broken, image) is None
