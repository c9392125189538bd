"""Slides read by a class of the user's own: the same tiles as OpenSlide's of the same pixels, in every script."""

import hashlib
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import array_reader
from dinoscope.data.dataset import reader_digest
from dinoscope.data.tiles import SlideAccess, open_tiles
from dinoscope.errors import ConfigError, SlideError
from dinoscope.features.extract import Extractor, ExtractSettings
from dinoscope.features.writers import read_features
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.slides.manifest import manifest_digest, merge_manifests, read_metadata, read_tiles
from dinoscope.slides.reader import Slide, SlidePool
from synthetic_slides import blobs, texture, write_lossless

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
READER = "array_reader:Arrays"


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same pixels as an array that a reader opens and as a TIFF that OpenSlide opens."""
    folder = tmp_path_factory.mktemp("own [format]")
    image = blobs(1200, 1600, [(600, 600, 450)], (200, 120, 160), (243, 242, 244))
    tissue = texture(1200, 1600)
    image = np.where((image.min(axis=2) < 200)[..., None], tissue, image)
    tiff = write_lossless(folder / "a.tiff", image, 1.0, (1, 4))
    with Slide(tiff) as slide:
        level1 = slide.read_region(0, 0, 1, *slide.level_dimensions[1])
    np.savez(folder / "a ß.npz", level0=image, level1=level1, mpp=1.0)
    return folder / "a ß.npz", tiff


def run(script: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a script in a working directory that holds the reader's module."""
    (folder / "array_reader.py").write_text(Path(array_reader.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-W", "error", str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def tiny_model() -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = DinoVisionTransformer(ViTSettings(embed_dim=48, depth=1, num_heads=3, ffn_hidden=96))
    model.init_weights()
    model.mean, model.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return model.eval()


def test_pixels_are_those_that_openslide_gives(slides: tuple[Path, Path]) -> None:
    own, tiff = slides
    with Slide(own, "S", reader=READER) as mine, Slide(tiff, "S") as theirs:
        assert mine.level_dimensions == theirs.level_dimensions and mine.level_downsamples == theirs.level_downsamples
        assert (mine.mpp, mine.mpp_source, mine.vendor) == (1.0, "file", "Arrays")
        assert mine.files() == [own]
        for where in ((-10, -20, 0, 300, 200), (1500, 1100, 0, 300, 200), (404, 200, 1, 90, 80), (0, 0, 1, 500, 400)):
            assert np.array_equal(mine.read_region(*where), theirs.read_region(*where)), where
        assert np.array_equal(mine.thumbnail(300), theirs.thumbnail(300))
        assert np.array_equal(mine.read_tile(800, 300, 1, 64, 100, 256), theirs.read_tile(800, 300, 1, 64, 100, 256))


def test_the_scripts_read_by_it(slides: tuple[Path, Path], tmp_path: Path) -> None:
    own, tiff = slides
    made = {}
    for name, path, options in (("own", own, ["--slide-reader", READER]), ("tiff", tiff, [])):
        folder = tmp_path / name
        folder.mkdir()
        sets = ["--set", "train", 128, 2.0, folder / "t.parquet", "--overview", folder / "o.jpg"]
        done = run("tile_slide.py", folder, "--slide", path, "--slide-id", "S", *sets, *options)
        assert done.returncode == 0, done.stderr
        outputs = ["--output", folder / "s.json", "--thumbnail", folder / "s.jpg"]
        done = run("inspect_slide.py", folder, "--slide", path, "--slide-id", "S", *outputs, *options)
        assert done.returncode == 0, done.stderr
        made[name] = folder
    own_tiles, tiff_tiles = (read_tiles(made[name] / "t.parquet").to_pandas() for name in ("own", "tiff"))
    assert own_tiles.equals(tiff_tiles) and len(own_tiles) > 3  # there NaN, a focus not measured, is equal to NaN
    assert read_metadata(made["own"] / "t.parquet")["num_tiles"] > 5
    for picture in ("o.jpg", "s.jpg"):
        assert (made["own"] / picture).read_bytes() == (made["tiff"] / picture).read_bytes()
    missing = run("tile_slide.py", tmp_path, "--slide", own, "--slide-id", "S", *sets)
    assert missing.returncode == 1 and "not a slide that OpenSlide can open" in missing.stderr


def test_training_and_features_read_by_it(slides: tuple[Path, Path], tmp_path: Path) -> None:
    own, tiff = slides
    for name, path, options in (("own", own, ["--slide-reader", READER]), ("tiff", tiff, [])):
        sets = ["--set", "train", 128, 2.0, tmp_path / f"{name}.parquet", "--overview", tmp_path / "o.jpg"]
        assert run("tile_slide.py", tmp_path, "--slide", path, "--slide-id", "S", *sets, *options).returncode == 0
        merge_manifests([tmp_path / f"{name}.parquet"], tmp_path / f"{name}_all.parquet")
        (tmp_path / f"{name}.tsv").write_text(f"slide_id\tpath\nS\t{path}\n")
    assert manifest_digest(tmp_path / "own_all.parquet") == manifest_digest(tmp_path / "tiff_all.parquet")
    access = SlideAccess(READER)
    mine = open_tiles(tmp_path / "own_all.parquet", str(tmp_path / "own.tsv"), access=access)
    theirs = open_tiles(tmp_path / "tiff_all.parquet", str(tmp_path / "tiff.tsv"))
    mine = pickle.loads(pickle.dumps(mine))  # as a worker gets it
    assert len(mine) == len(theirs) > 5
    for index in (0, 3, len(mine) - 1):
        assert np.array_equal(mine.read(index)[0], theirs.read(index)[0])
    features = {}
    for name, path, reader in (("own", own, READER), ("tiff", tiff, None)):
        extractor = Extractor(tiny_model(), "m", "0" * 64, ExtractSettings(slide_reader=reader), torch.device("cpu"))
        extractor.extract(path, tmp_path / f"{name}.parquet", tmp_path / f"{name}.h5")
        features[name] = read_features(tmp_path / f"{name}.h5").features
    assert len(features["own"]) == len(mine) and np.array_equal(features["own"], features["tiff"])


def test_the_seal_knows_the_reader_by_its_name_and_its_source(
    slides: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, tiff = slides
    sets = ["--set", "train", 128, 2.0, tmp_path / "own.parquet", "--overview", tmp_path / "o.jpg"]
    run("tile_slide.py", tmp_path, "--slide", own, "--slide-id", "S", *sets, "--slide-reader", READER)
    merge_manifests([tmp_path / "own.parquet"], tmp_path / "all.parquet")
    for name, path in (("own", own), ("tiff", tiff)):
        (tmp_path / f"{name}.tsv").write_text(f"slide_id\tpath\nS\t{path}\n")
    monkeypatch.chdir(tmp_path)
    source = (Path(__file__).parents[1] / "array_reader.py").read_text()
    found = []
    for number, text in enumerate((source, source, source + "\n# changed\n")):
        module = tmp_path / "sealed_reader.py"
        module.write_text(text)
        os.utime(module, (number, number))
        sys.modules.pop("sealed_reader", None)
        importlib.invalidate_caches()
        access = SlideAccess("sealed_reader:Arrays")
        images = open_tiles(tmp_path / "all.parquet", str(tmp_path / "own.tsv"), access=access)
        found.append(reader_digest(images))
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert found[-1] == f"sealed_reader:Arrays {digest[:16]}"
    assert found[0] == found[1] != found[2]
    # where OpenSlide reads all slides, a reader that is named besides changes nothing
    by_openslide = open_tiles(tmp_path / "all.parquet", str(tmp_path / "tiff.tsv"), access=access)
    assert reader_digest(by_openslide) is None
    assert reader_digest(open_tiles(tmp_path / "all.parquet", str(tmp_path / "tiff.tsv"))) is None


def test_a_pool_opens_it_anew_in_every_process(slides: tuple[Path, Path]) -> None:
    own, tiff = slides
    pool = SlidePool({"own": own, "tiff": tiff}, reader=READER)
    assert pool["own"].vendor == "Arrays" and pool["tiff"].vendor == "generic-tiff"
    assert pickle.loads(pickle.dumps(pool))["own"].vendor == "Arrays"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        pool["own"]
        os.write(writer, str(array_reader.Arrays.opened[-1]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reader, 20)) == child


def test_a_reader_without_suffixes_reads_everything(slides: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "a slide that is a folder.zarr"
    folder.mkdir()
    other = tmp_path / "x.svs"
    other.write_bytes(slides[0].read_bytes())
    with Slide(other, "S", reader="array_reader:Everything") as slide:
        assert slide.objective_power == 20 and slide.background == (250, 240, 230)
        assert slide.read_region(-5, -5, 0, 2, 2).tolist() == [[[250, 240, 230]] * 2] * 2
    with pytest.raises(SlideError, match="cannot open it"):
        Slide(folder, "S", reader="array_reader:Everything")


def test_what_was_never_scanned_is_background(slides: tuple[Path, Path]) -> None:
    with Slide(slides[0], "S", reader="array_reader:Unscanned128") as slide:
        assert (slide.read_region(1200, 300, 0, 300, 100) == 255).all()
        assert (slide.read_region(600, 300, 0, 200, 100) < 250).any()


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        ("CannotOpen", "reader array_reader:CannotOpen cannot open it (OSError: the file is locked"),
        ("TransposedPixels", "gave pixels of shape (200, 100, 3) from read_region, but wanted was (100, 200, 3)"),
        ("FloatPixels", "gave a ndarray from read_region, but wanted was a numpy array of uint8"),
        ("FailsInside", "failed at x 5, y 6 of level 0 (RuntimeError: decoder gave up (array_reader.py line"),
        ("NoLevels", "gave level_dimensions (), but wanted was at least one level"),
        ("GrowingLevels", "but wanted was 1 for the first, then growing ones"),
    ],
)
def test_a_faulty_reader_is_told_in_one_sentence(slides: tuple[Path, Path], reader: str, words: str) -> None:
    with pytest.raises(SlideError) as caught, Slide(slides[0], "S", reader=f"array_reader:{reader}") as slide:
        slide.read_region(5, 6, 0, 200, 100)
    message = str(caught.value)
    assert message.startswith("slide 'S' (file a ß.npz)") and words in message and "\n" not in message


@pytest.mark.parametrize("name", ["array_reader", "no_such_module:Arrays", "array_reader:Missing", "a b:C"])
def test_a_name_that_leads_nowhere(slides: tuple[Path, Path], name: str) -> None:
    with pytest.raises(ConfigError, match=r"slides\.reader"):
        Slide(slides[0], "S", reader=name)


def test_an_unknown_mpp_is_asked_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", level0=texture(100, 100))
    with Slide(tmp_path / "a.npz", "S", reader=READER) as slide, pytest.raises(SlideError, match="column mpp"):
        _ = slide.mpp
    with Slide(tmp_path / "a.npz", "S", mpp=0.4, reader=READER) as slide:
        assert slide.mpp == 0.4
