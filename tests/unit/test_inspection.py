"""What is written down of one slide: scanner, focal planes, looks, a guessed mpp; nothing of its metadata beside."""

import struct
from pathlib import Path

import numpy as np
import pytest

from aperio_slides import write_aperio
from dinoscope.slides.focal_planes import PLANE_PROPERTIES, focal_planes
from dinoscope.slides.inspection import describe_slide
from dinoscope.slides.looks import describe_looks, stain_contradiction
from dinoscope.slides.privacy import without_file_name
from dinoscope.slides.reader import Slide
from dinoscope.slides.resolution import find_resolution
from dinoscope.slides.scanners import MODEL_PROPERTIES, MODELS, scanner_model
from synthetic_slides import blobs, texture, write_lossless

TIFF_MAKE, TIFF_MODEL = 271, 272


def described(path: Path, mpp: float | None = None) -> dict:
    with Slide(path, "S", mpp) as slide:
        return describe_slide(slide)[0]


def test_the_scanner_is_one_of_a_list_and_no_text_of_the_file(tmp_path: Path) -> None:
    keys = {"MPP": "0.25", "AppMag": "40", "ScanScope ID": "SS12345", "User": "Jane"}
    image = texture(300, 400)
    known = write_aperio(tmp_path / "a.svs", image, keys | {"ScannerType": "GT450"})
    assert described(known)["scanner"] == "Aperio GT 450"
    unknown = write_aperio(tmp_path / "b.svs", image, keys | {"ScannerType": "Jane's own"}, {TIFF_MODEL: "Jane Doe"})
    assert described(unknown)["scanner"] is None


@pytest.mark.parametrize(
    ("name", "text", "model"),
    [
        ("hamamatsu.Product", "C9600-12", "Hamamatsu NanoZoomer 2.0-HT (C9600)"),
        ("tiff.Model", "C13220", "Hamamatsu NanoZoomer S360 (C13220)"),
        ("tiff.Model", "NanoZoomer S210", "Hamamatsu NanoZoomer S210 (C13239)"),
        ("ventana.ScannerModel", "VENTANA DP 200", "Ventana DP 200"),
        ("leica.device-model", "Leica SCN400;Leica SCN", "Leica SCN400"),
        ("philips.DICOM_MANUFACTURERS_MODEL_NAME", "UFS Scanner", "Philips Ultra Fast Scanner"),
        ("dicom.ManufacturerModelName", "Aperio AT2", "Aperio AT2"),
        ("tiff.Model", "Smith John 1950", None),
        ("tiff.Model", "", None),
    ],
)
def test_models_have_many_spellings(name: str, text: str, model: str | None) -> None:
    assert name in MODEL_PROPERTIES
    assert scanner_model({name: text}) == model
    assert model is None or model in MODELS


def test_a_guess_from_the_objective_comes_with_a_warning(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", texture(300, 400), {"AppMag": "20"})
    found = described(path)
    assert (found["mpp_x"], found["mpp_source"], found["mpp_problem"]) == (0.5, "objective", None)
    assert any("guessed from its objective of 20x" in warning for warning in found["warnings"])
    given = described(path, 0.46)
    assert (given["mpp_x"], given["mpp_source"]) == (0.46, "table")
    assert not any("guess" in warning for warning in given["warnings"])


@pytest.mark.parametrize("power", ["0", "nan", "1000", "0.1", "twenty"])
def test_no_guess_from_an_objective_that_cannot_be(power: str) -> None:
    found = find_resolution({"openslide.objective-power": power, "openslide.vendor": "aperio"}, None)
    assert found.source is None and "column mpp" in found.problem


@pytest.mark.parametrize("planes", [1, 3])
def test_images_of_full_size_in_a_tiff_file_are_its_focal_planes(tmp_path: Path, planes: int) -> None:
    path = write_aperio(tmp_path / "a.svs", texture(300, 400), {"MPP": "0.5"}, planes=planes)
    assert described(path)["focal_planes"]["count"] == planes
    told = any("focal planes" in warning for warning in described(path)["warnings"])
    assert told == (planes > 1)


def test_levels_are_no_focal_planes(tmp_path: Path) -> None:
    path = write_lossless(tmp_path / "a.tiff", texture(600, 800), 0.5, (1, 2, 4))
    assert described(path)["focal_planes"]["count"] == 1


def test_big_tiff_files_are_counted_too(tmp_path: Path) -> None:
    import tifffile

    path, image = tmp_path / "big.tiff", texture(300, 400)
    for byteorder in ("<", ">"):
        with tifffile.TiffWriter(path, bigtiff=True, byteorder=byteorder) as writer:
            for part in (image, image, image[::2, ::2]):
                writer.write(part, tile=(128, 128), photometric="rgb", metadata=None)
        assert focal_planes("generic-tiff", {}, path, (400, 300)).count == 2


def test_directories_in_a_circle_end(tmp_path: Path) -> None:
    path = tmp_path / "circle.tiff"
    directory = struct.pack("<HHHIII", 1, 256, 4, 1, 400, 8)  # the next one is itself
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8) + directory)
    found = focal_planes("generic-tiff", {}, path, (400, 300))
    assert found.count is None and "unknown" in found.warning


@pytest.mark.parametrize(
    ("vendor", "suffix", "properties", "count", "used"),
    [
        ("mirax", "mrxs", {"mirax.HIERARCHICAL.HIER_0_NAME": "Slide zoom level"}, 1, 1),
        (
            "mirax",
            "mrxs",
            {
                "mirax.HIERARCHICAL.HIER_0_NAME": "Slide zoom level",
                "mirax.HIERARCHICAL.HIER_3_NAME": "Microscope focus level",
                "mirax.HIERARCHICAL.HIER_3_COUNT": "9",
            },
            9,
            1,
        ),
        ("mirax", "mrxs", {}, None, None),
        ("hamamatsu", "vms", {"hamamatsu.NoLayers": "5"}, 5, 1),
        ("hamamatsu", "vms", {}, None, None),
        ("ventana", "bif", {"ventana.Z-layers": "3"}, 3, None),
        ("ventana", "bif", {}, None, None),
        ("zeiss", "czi", {"zeiss.Information.Image.SizeZ": "1"}, 1, 1),
        ("dicom", "dcm", {"dicom.TotalPixelMatrixFocalPlanes": "1"}, 1, 1),
        ("dicom", "dcm", {"dicom.TotalPixelMatrixFocalPlanes": "many"}, None, None),
    ],
)
def test_formats_that_say_how_many_planes_there_are(
    vendor: str, suffix: str, properties: dict[str, str], count: int | None, used: int | None
) -> None:
    assert set(properties) <= set(PLANE_PROPERTIES)
    found = focal_planes(vendor, properties, Path(f"a.{suffix}"), (100, 100))
    assert (found.count, found.used) == (count, used)
    assert (found.warning is None) == (count == 1)
    assert count is not None or "unknown" in found.warning


PINK, PURPLE, BROWN, BLUE, GREEN = (230, 130, 180), (130, 70, 160), (150, 95, 40), (100, 120, 200), (110, 190, 140)


def looks_of(*colours: tuple[int, int, int], ground: tuple[int, int, int] = (243, 243, 244)) -> dict[str, float]:
    places = [(150 + 220 * number, 200, 90) for number in range(len(colours))]
    image = np.full((400, 800, 3), ground, np.uint8)
    for place, colour in zip(places, colours, strict=True):
        alone = blobs(400, 800, [place], colour, ground)
        image = np.where(np.abs(alone.astype(int) - ground).max(axis=2, keepdims=True) > 12, alone, image)
    return describe_looks(image)


@pytest.mark.parametrize(
    ("stain", "looks", "contradicts"),
    [
        ("HE", looks_of(PINK, PURPLE), False),
        ("HE", looks_of(BLUE, BROWN), True),
        ("HE", looks_of(GREEN), True),
        ("HE", looks_of(BLUE, ground=(5, 5, 8)), True),
        ("HE", looks_of(), True),
        ("IHC:CD3", looks_of(BLUE, BROWN), False),
        ("IHC:CD3", looks_of(BLUE), False),  # negative
        ("IHC:CD3", looks_of(PINK, PINK, PURPLE), True),
        ("IF", looks_of(BLUE, ground=(5, 5, 8)), False),
        ("IF", looks_of(PINK), True),
        ("Pap", looks_of(GREEN, PINK), False),
        ("Pap", looks_of(BLUE, ground=(5, 5, 8)), True),
        ("Masson", looks_of(BLUE, ground=(5, 5, 8)), False),  # nothing is known of how it looks
        (None, looks_of(PINK), False),
    ],
)
def test_stain_against_looks(stain: str | None, looks: dict[str, float], contradicts: bool) -> None:
    assert bool(stain_contradiction(stain, looks)) == contradicts, looks


def test_real_pictures_look_like_their_stains(shared: Path) -> None:
    from PIL import Image

    singles = shared / "data" / "tiles" / "singles"
    images = [(singles / "histo.jpg", "HE", "IF"), (singles / "ihc.png", "IHC:CD3", "HE")]
    images += [(path, "HE", None) for path in (shared / "data/seg/dsb2018_histology/images").iterdir()]
    for path, stain, other in images:
        looks = describe_looks(np.asarray(Image.open(path).convert("RGB")))
        assert stain_contradiction(stain, looks) is None, path.name
        if other == "HE":
            assert "brown" in stain_contradiction(other, looks)
    for name, stain, other in (("CMU-1-Small-Region.svs", "HE", "IF"), ("test3-DAPI-2-(387).ndpi", "IF", "HE")):
        looks = described(shared / "data" / "wsi" / name)["looks"]
        assert stain_contradiction(stain, looks) is None and stain_contradiction(other, looks)


def test_content_is_that_of_pixels(tmp_path: Path) -> None:
    image = texture(500, 700)
    first = write_aperio(tmp_path / "a.svs", image, {"MPP": "0.5", "User": "Jane"})
    copy = write_lossless(tmp_path / "b.tiff", image, 0.5)
    other = image.copy()
    other[250:260, 350:360] = 0
    changed = write_lossless(tmp_path / "c.tiff", other, 0.5)
    blank = write_lossless(tmp_path / "d.tiff", np.full((500, 700, 3), 255, np.uint8), 0.5)
    contents = [described(path)["content"] for path in (first, copy, changed, blank)]
    assert contents[0] == contents[1] != contents[2]
    assert contents[3] is None  # empty glass is not a copy of empty glass


def test_messages_lose_names_but_not_the_slide(tmp_path: Path) -> None:
    folder = tmp_path / "Doe Jane"
    (folder / "Smith").mkdir(parents=True)
    path = folder / "Smith.mrxs"
    path.touch()
    (folder / "Smith" / "Data 01.dat").touch()
    message = f"slide 'Smith 7' (file Smith.mrxs) cannot be opened ({path}: Smith/Data 01.dat is bad, {folder})"
    clean = without_file_name(message, path, "Smith 7")
    assert clean.startswith("slide 'Smith 7' cannot be opened") and "is bad" in clean
    rest = clean.replace("'Smith 7'", "")
    assert not any(secret in rest for secret in ("Smith", "Doe", "Jane", "Data 01", str(tmp_path)))
    (folder / "v.vms").write_text("[Virtual Microscope Specimen]\nImageFile=Roe Richard.jpg\n")
    clean = without_file_name("slide 'v' cannot be opened (Roe Richard.jpg is missing)", folder / "v.vms", "v")
    assert "Richard" not in clean and clean.startswith("slide 'v'")
