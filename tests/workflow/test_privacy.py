"""Names planted in metadata, file names and folders of slides: after a run nothing in results holds any of them."""

import io
import os
import zipfile
from pathlib import Path

import h5py
import openslide
import pyarrow.parquet as pq
import pytest
import yaml

from aperio_slides import write_aperio
from snakemake_runs import NANO_RECIPE, SKIPPING_CONFIG, snakemake
from synthetic_slides import texture

pytestmark = pytest.mark.long

# Fifteen letters that occur nowhere else; each is planted in a place of its own.
SECRETS = {
    place: f"Zq{place.title().replace('_', '')}Xw{number:02d}Kj"
    for number, place in enumerate(
        (
            "folder", "file", "user", "filename", "title", "barcode", "scanner_id", "comment", "artist", "host",
            "software", "make", "model", "copyright", "document", "page", "date", "dicom", "vms", "broken", "link",
            "reader",
        )
    )
}  # fmt: skip
TAGS = {
    269: "document", 271: "make", 272: "model", 285: "page", 306: "date", 305: "software", 315: "artist", 316: "host",
    33432: "copyright",
}  # fmt: skip


def write_slides(folder: Path) -> dict[str, Path]:
    """An Aperio slide full of names, a TIFF likewise, and slides that cannot be read, whose errors could tell names."""
    image = texture(768, 768)
    keys = {"MPP": "0.5", "AppMag": "20", "User": SECRETS["user"], "Filename": SECRETS["filename"]}
    keys |= {"Title": SECRETS["title"], "Barcode": SECRETS["barcode"], "ScanScope ID": SECRETS["scanner_id"]}
    keys |= {"ScannerType": SECRETS["model"], "Comment": SECRETS["comment"]}
    tags = {number: SECRETS[place] for number, place in TAGS.items()}
    slides = {"aperio": write_aperio(folder / f"{SECRETS['file']}.svs", image, keys, tags)}
    broken = folder / f"{SECRETS['broken']} cut.svs"
    broken.write_bytes(slides["aperio"].read_bytes()[:200_000])
    slides["broken"] = broken
    slides["vms"] = folder / f"{SECRETS['vms']}.vms"
    slides["vms"].write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\n"
        f"ImageFile={SECRETS['vms']}(0,0).jpg\nMapFile={SECRETS['vms']}_map.jpg\nOptimisationFile=x.opt\n"
        f"MacroImage={SECRETS['vms']}_macro.jpg\nPhysicalWidth=1\nPhysicalHeight=1\nSourceLens=20\n"
    )
    slides["gone"] = folder / f"{SECRETS['link']}.ndpi"
    slides["dicom"] = folder / SECRETS["dicom"]
    slides["dicom"].mkdir()
    (slides["dicom"] / f"{SECRETS['dicom']}.dcm").write_bytes(bytes(128) + b"DICM" + SECRETS["dicom"].encode() * 9)
    slides["reader"] = folder / f"{SECRETS['reader']}.isyntax"
    slides["reader"].write_text("x")
    return slides


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on such slides leaves, features and report included."""
    folder = tmp_path_factory.mktemp("privacy")
    (folder / "config").mkdir()
    config = SKIPPING_CONFIG | {"slides": SKIPPING_CONFIG["slides"] | {"reader": "formats:Locked"}}
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "root.yaml").write_text(NANO_RECIPE)
    (folder / "formats.py").write_text(
        "class Locked:\n    suffixes = ('.isyntax',)\n\n"
        "    def __init__(self, path):\n        raise OSError(path + ' is locked')\n"
    )
    secret = folder / SECRETS["folder"]
    secret.mkdir()
    uses = {"aperio": "train,features"}
    rows = [f"{name}\t{path}\t{uses.get(name, 'train')}\n" for name, path in write_slides(secret).items()]
    (folder / "slides.tsv").write_text("slide_id\tpath\tuse\n" + "".join(rows))
    done = snakemake(folder)
    assert "5 of 6 slides were skipped" in done.stdout + done.stderr
    return folder / "results"


def texts_of(path: Path) -> bytes:
    """The bytes of a file, and those of what is packed inside it as far as the standard formats go."""
    content = path.read_bytes()
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(path) as archive:
            content += b"".join(archive.read(name) + name.encode() for name in archive.namelist())
    if path.suffix == ".parquet":
        content += repr(pq.read_metadata(path).metadata).encode() + repr(pq.read_table(path).to_pylist()).encode()
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            found = [repr(dict(file.attrs))]
            file.visititems(lambda name, item: found.append(f"{name} {dict(item.attrs)}"))
        content += " ".join(found).encode()
    return content


def test_the_run_did_what_it_could_leak_from(results: Path) -> None:
    made = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    wanted = {"report.html", "slides_report.tsv", "failed_slides.tsv", "features/base/aperio.h5", "slides.parquet"}
    wanted |= {"slides/aperio.json", "slides/vms.json", "tiles/train/aperio.parquet", "skipped/tiles/vms.json"}
    assert wanted <= made
    (slide,) = (results.parent / SECRETS["folder"]).glob("*Kj.svs")
    with openslide.OpenSlide(slide) as opened:
        told = " ".join(opened.properties.values())
    for place in (
        "user",
        "filename",
        "title",
        "barcode",
        "scanner_id",
        "comment",
        "artist",
        "make",
        "model",
        "software",
    ):
        assert SECRETS[place] in told, place


def test_no_planted_name_is_in_results(results: Path) -> None:
    leaks = [
        (path.relative_to(results).as_posix(), place)
        for path in results.rglob("*")
        if path.is_file()
        for place, secret in SECRETS.items()
        if secret.encode() in (content := texts_of(path)) or secret.encode("utf-16-le") in content
    ]
    leaks += [(str(path), place) for path in results.rglob("*") for place, name in SECRETS.items() if name in path.name]
    assert leaks == []


def test_neither_is_the_place_where_it_was_made(results: Path) -> None:
    place = os.fsencode(results.parent)
    leaks = [path for path in results.rglob("*") if path.is_file() and place in texts_of(path)]
    assert leaks == []
