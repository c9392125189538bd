import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoscope.features.writers import read_features
from dinoscope.slides.manifest import tile_table, write_tiles
from dinoscope.visualize.pca import fit_basis, save_basis
from dinoscope.visualize.pca_map import draw_map
from dinoscope.visualize.report import _number, _tile_kind, build_report, summary_sentences
from dinoscope.visualize.report_data import PATH_PLACEHOLDER, collect, without_paths
from feature_samples import write_sample

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "build_report.py"
SLIDES = ("A & <b>", "B [1]", "Präparat 3")
MODELS, RUNS = ("base", "pretrain", "gram"), ("pretrain", "gram")
SECRETS = ("/home/doe", "Jane", "slides.tsv", "workstation7")


class Page(HTMLParser):
    """What a browser would see: text, references, pictures."""

    def __init__(self, path):
        super().__init__()
        self.text, self.references, self.images, self.ids = [], [], [], []
        self._hidden = 0
        self.feed(path.read_text(encoding="utf-8"))
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.references += [attributes[name] for name in ("src", "href") if name in attributes]
        self._hidden += tag in ("style", "script")
        if tag == "img" and "src" in attributes:
            self.images.append(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []

    def handle_endtag(self, tag):
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data):
        if not self._hidden:
            self.text.append(data)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_slide(results, slide_id, num_tiles, warnings=()):
    info = {"slide_id": slide_id, "width": 9000, "height": 4500, "mpp_x": 0.25, "mpp_y": 0.25, "mpp_source": "file"}
    seen = {"vendor": "aperio", "num_levels": 3, "warnings": list(warnings)}
    write_json(results / "slides" / f"{slide_id}.json", info | seen)
    thumbnail = np.full((225, 450, 3), 240, np.uint8)
    Image.fromarray(thumbnail).save(results / "slides" / f"{slide_id}.jpg")
    (results / "tiles").mkdir(exist_ok=True)
    Image.fromarray(thumbnail // 2).save(results / "tiles" / f"{slide_id}.jpg", comment="made on workstation7")
    for tile_set, tile_px, count in (("train", 256, num_tiles // 2), ("features", 224, num_tiles)):
        columns = {"x": np.arange(count), "y": 0, "level": 0, "read_px": 2 * tile_px, "tile_px": tile_px, "mpp": 0.5}
        table = tile_table(slide_id, columns | {"footprint_px": 2 * tile_px, "tissue_fraction": 1.0})
        document = info | {"tile_set": tile_set, "tile_px": tile_px, "requested_mpp": 0.5, "stride_px": tile_px}
        write_tiles(results / "tiles" / tile_set / f"{slide_id}.parquet", table, document)
    return thumbnail


def write_model(results, model, seed):
    generator = np.random.default_rng(seed)
    files = []
    for slide_id in SLIDES:
        path = results / "features" / model / f"{slide_id}.h5"
        files.append(write_sample(path, generator.normal(size=(18, 16)).astype(np.float16), model=model))
    basis = fit_basis(files)
    save_basis(basis, results / "pca" / model)
    for path in files:
        thumbnail = np.full((225, 450, 3), 255, np.uint8)
        draw_map(results / "pca" / model / f"{path.stem}.png", read_features(path), basis, thumbnail)
    card = {
        "run": model,
        "iteration": 29,
        "embed_dim": 16,
        "origin": "/home/doe/weights.pth",
        "weights_sha256": "ab" * 32,
    }
    write_json(results / "models" / model / "model.json", card | {"backbone": {"depth": 2}, "license_note": None})
    return basis


def write_run(results, run, num_iterations, finished=True):
    folder = results / "runs" / run
    folder.mkdir(parents=True)
    lines = [{"event": "start", "iteration": 0}]
    for i in range(num_iterations):
        if i == 10:
            lines.append({"event": "resume", "iteration": 10})
        lines.append({"iteration": i, "total_loss": 12 - 0.1 * i, "lr": 1e-3, "samples_per_second": 17.0 + i % 2})
        if run == "gram":
            lines[-1]["gram_loss"] = 0.5 - 0.01 * i
    (folder / "training_metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("train: {seed: 3, data: /home/doe/slides}\nstudent: {arch: vit_small}\n")
    if finished:
        write_json(folder / "final.json", {"iteration": num_iterations - 1, "samples_seen": 16 * num_iterations})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished results folder, which no test changes."""
    results = tmp_path_factory.mktemp("Jane") / "results"
    for number, slide_id in enumerate(SLIDES):
        write_slide(results, slide_id, 18 * (number < 2), ["it has one level only"] if number == 1 else [])
    rows = [f"{slide_id}\tnone" for slide_id in SLIDES]
    (results / "slides_report.tsv").write_text("slide_id\tproblems\n" + "\n".join(rows) + "\n", encoding="utf-8")
    (results / "splits.tsv").write_text(f"slide_id\tcase_id\tuse\n{SLIDES[0]}\tJane\ttrain\n{SLIDES[1]}\tx\teval\n")
    for seed, model in enumerate(MODELS):
        write_model(results, model, seed)
    write_run(results, "pretrain", 30)
    write_run(results, "gram", 20)
    config = results.parent / "config.yaml"
    config.write_text("slides: {source: config/slides.tsv}\nlabels: Jane.csv\ntiling: {sets: {train: {mpp: 0.5}}}\n")
    return results


@pytest.fixture
def results(tmp_path, whole):
    """A copy to take things away from."""
    return Path(shutil.copytree(whole, tmp_path / "results"))


@pytest.fixture(scope="module")
def page(whole):
    output = whole.parent / "report.html"
    build_report(whole, MODELS, RUNS, output, workflow_config=whole.parent / "config.yaml")
    return Page(output)


def test_everything_is_inside_the_file(page):
    assert page.references
    for reference in page.references:
        assert reference.startswith(("data:", "#")), reference[:80]
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)


def decoded(image):
    kind, data = image["src"].split(";base64,")
    return kind, base64.b64decode(data)


def test_pictures_of_every_slide_and_model_in_order(page, whole):
    shown = [(image["alt"], *decoded(image)) for image in page.images]
    expected = [f"{slide}, {label}" for slide in SLIDES for label in ("tiling", *MODELS)]
    assert [alt for alt, _, _ in shown] == [*expected, "Curves of the training runs"]
    for alt, kind, data in shown[:-1]:
        assert kind == "data:image/webp"
        slide_id, label = alt.rsplit(", ", 1)
        with Image.open(io.BytesIO(data)) as image:
            assert max(image.size) <= 1200
            seen = np.asarray(image.convert("RGB").resize((60, 30)), float)
        if label == "tiling":
            np.testing.assert_allclose(seen, 120, atol=3)
        else:
            with Image.open(whole / "pca" / label / f"{slide_id}.png") as original:
                picture = original.convert("RGB").crop((24, 104, original.width - 24, original.height))
            np.testing.assert_allclose(seen, np.asarray(picture.resize((60, 30)), float), atol=25)
    kind, svg = decoded(page.images[-1])
    assert kind == "data:image/svg+xml" and b"<svg" in svg


def test_the_words_say_what_happened(page, whole):
    for sentence in (
        "3 slides were cut into 18 tiles for train (256 px at 0.5 µm a pixel) and 36 tiles for features (224 px at 0.5",
        "Training saw 1 slide; 1 was held out.",
        "Run pretrain trained for 30 iterations; its total loss went from 11.9 to 9.20, being resumed once.",
        "Run gram trained for 20 iterations",
        "Slide B [1]: it has one level only",
        "Slide Präparat 3: no tissue was found, so it has no tiles (set features, train).",
        "A & <b>",
        "9,000 × 4,500",
        "2.25 × 1.12",
        "arch: vit_small",
        "mpp: 0.5",
    ):
        assert sentence in page.words, sentence
    for model in MODELS:
        explained = json.loads((whole / "pca" / model / "basis.json").read_text())["explained_by_top_3"]
        assert f"{100 * explained:.0f} % with {model}" in page.words
    assert "11.9 → 9.20" in page.words and "0.495 → 0.315" in page.words
    assert "480" in page.words and "torch" in page.words and "Python" in page.words


def test_captions_say_what_colours_and_clusters_were_fitted_on(tmp_path, results):
    """On the training slides, as `Plan.basis_slides` has it: on all slides only where none trains."""
    write_page(results / "clusters" / "base" / "examples.png", 200)
    build_report(results, MODELS, RUNS, tmp_path / "report.html")
    page = " ".join((tmp_path / "report.html").read_text().split())
    folder = Path(__file__).parents[2] / "report"
    texts = {path.stem: " ".join(path.read_text().split()) for path in folder.glob("*.rst")}
    truth = re.compile(r"training slides[^.]* \(o[fn] all slides, if none was to be trained on\)")
    maps, clusters = page.split('id="maps"')[1], page.split('id="clusters"')[1]
    for caption in (maps, clusters, texts["cluster_map"], texts["cluster_examples"], texts["pca_map"]):
        assert truth.search(caption[:1500])
    for wrong in ("all tiles' features", "share of all tiles", "features of all slides", "tiles of all slides"):
        assert not any(wrong in caption for caption in (page, texts["cluster_map"], texts["cluster_examples"]))


def test_the_viewer_is_linked_where_there_is_one(tmp_path, results):
    build_report(results, MODELS, RUNS, tmp_path / "report.html")
    assert not any("viewer" in reference for reference in Page(tmp_path / "report.html").references)
    (results / "viewer").mkdir()
    (results / "viewer" / "index.html").touch()
    build_report(results, MODELS, RUNS, tmp_path / "report.html")
    assert "viewer/index.html" in Page(tmp_path / "report.html").references


def test_no_path_or_name_gets_in(page, whole):
    text = (whole.parent / "report.html").read_text()
    for secret in (*SECRETS, str(whole), str(Path.home())):
        assert secret not in text
    for image in page.images:
        assert b"workstation7" not in decoded(image)[1]
    assert PATH_PLACEHOLDER in page.words


def test_paths_are_told_from_settings():
    settings = {
        "runs": {"pretrain": {"recipe": "config/runs/a.yaml", "tile_set": "train"}},
        "slides": ["/data/x", "C:\\data", "~/x", "Doe.svs", "weights.PTH", "a.safetensors"],
        "/data/key": 1,
        "kept": ["cls+mean", "2.13.0+cpu", "vit_small", 0.5, None, True, "random initialisation, seed 0"],
    }
    clean = without_paths(settings)
    assert clean["runs"] == {"pretrain": {"recipe": "(path)", "tile_set": "train"}}
    assert clean["slides"] == ["(path)"] * 6 and clean["(path)"] == 1
    assert clean["kept"] == settings["kept"]


def test_stages_that_have_not_run_are_left_out(tmp_path, results):
    output = tmp_path / "report.html"
    shutil.rmtree(results / "runs" / "gram")
    shutil.rmtree(results / "pca" / "gram")
    (results / "models" / "gram" / "model.json").unlink()
    (results / "runs" / "pretrain" / "final.json").unlink()
    build_report(results, MODELS, RUNS, output)
    page = Page(output)
    assert "Run pretrain: not finished; its curves end at iteration 29." in page.words
    assert "Run gram: it has not logged anything yet." in page.words
    assert "Model gram: there are no PCA maps of its features." in page.words
    assert [image["alt"].rsplit(", ")[1] for image in page.images[:4]] == ["tiling", "base", "pretrain", "tiling"]


def test_even_an_empty_folder_gives_a_page(tmp_path):
    (tmp_path / "results").mkdir()
    build_report(tmp_path / "results", [], [], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "No slide has been inspected yet." in page.words and not page.images


def write_page(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((900, 2400, 3), value, np.uint8)).save(path)


def test_regions_and_clusters_are_shown_where_they_belong(tmp_path, results):
    write_page(results / "clusters" / "maps" / f"{SLIDES[1]}.png", 60)
    for value, name in ((90, "old_auto"), (120, "B [1]_auto")):
        write_page(results / "pca" / "regions" / name / "colors.png", value)
        write_page(results / "pca" / "regions" / name / "similarity.png", value + 10)
    write_page(results / "clusters" / "base" / "examples.png", 200)
    output = tmp_path / "report.html"
    build_report(results, MODELS, RUNS, output, regions=["B [1]_auto"])
    page = Page(output)
    alts = [image["alt"] for image in page.images]
    assert alts[8:10] == ["B [1], clusters", f"{SLIDES[2]}, tiling"]
    assert alts[-4:] == [
        "B [1]_auto, patches", "B [1]_auto, similarity", "Clusters, base", "Curves of the training runs",
    ]  # fmt: skip
    for image, value in zip([page.images[8], *page.images[-4:-1]], (60, 120, 130, 200), strict=True):
        with Image.open(io.BytesIO(decoded(image)[1])) as picture:
            assert picture.width == 1900
            np.testing.assert_allclose(np.asarray(picture), value, atol=3)
    assert {"regions", "clusters"} <= set(page.ids) and "old_auto" not in output.read_text()
    build_report(results, MODELS, RUNS, output)  # all that are there
    assert "old_auto" in output.read_text()


def test_slides_without_a_table_are_found(tmp_path, results):
    (results / "slides_report.tsv").unlink()
    (results / "splits.tsv").unlink()
    data = collect(results, MODELS, RUNS)
    assert [slide.slide_id for slide in data.slides] == sorted(SLIDES)
    assert data.num_tiles("features") == 36 and not any("Training saw" in line for line in summary_sentences(data))


def test_many_slides_are_sampled_and_said_to_be(tmp_path, results):
    for number in range(20):
        write_slide(results, f"S{number:02}", 2)
    (results / "slides_report.tsv").unlink()
    build_report(results, [], [], tmp_path / "report.html", max_slides=6)
    page = Page(tmp_path / "report.html")
    assert len(page.images) == 6
    assert "6 of 23 slides are shown, evenly chosen" in page.words
    assert all(f"S{number:02}" in page.words for number in range(20))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (11.523, "11.5"),
        (8.2, "8.20"),
        (-0.4862, "−0.486"),
        (123.4, "123"),
        (15999, "15,999"),
        (0, "0"),
        (1.2e-4, "1.20e-04"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert _number(value) == text


def test_script_needs_no_torch_and_refuses_a_missing_folder(tmp_path, whole):
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "--output", tmp_path / "r.html"]
    arguments = ["--models", *MODELS, "--runs", *RUNS, "--workflow-config", whole.parent / "config.yaml"]
    done = subprocess.run([*command, "--results", whole, *arguments], capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "jinja2" in imported and not imported & {"torch", "openslide", "snakemake"}
    assert (tmp_path / "r.html").read_text() == (whole.parent / "report.html").read_text()
    gone = subprocess.run([*command, "--results", tmp_path / "gone"], capture_output=True, text=True)
    assert gone.returncode == 1 and "gone: no such folder" in gone.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_click_enlarges_a_picture_and_arrows_walk_through(tmp_path, page, whole):
    """In a real browser: no error on the console, and the enlarged picture is the one it should be."""
    script = """<script>
      const images = document.querySelectorAll(".maps img");
      images[4].click();
      const titles = [zoom.querySelector("p").textContent];
      for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft"]) {
        zoom.dispatchEvent(new KeyboardEvent("keydown", {key}));
        titles.push(zoom.querySelector("p").textContent);
      }
      const same = zoom.querySelector("img").src === images[5].src;
      document.title = JSON.stringify([zoom.open, same, titles.map(title => title.split(":")[0])]);
      if (document.documentElement.scrollWidth > innerWidth) document.title = "wider than the window";
    </script></body>"""
    html = (whole.parent / "report.html").read_text().replace("</body>", script)
    (tmp_path / "page.html").write_text(html)
    switches = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    switches += " --disable-component-update --disable-sync --enable-logging=stderr --window-size=700,900 --dump-dom"
    command = ["chromium", *switches.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    labels = [f"B [1] · {label}" for label in ("tiling", "base", "pretrain", "base")]
    assert json.loads(title) == [True, True, labels]
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize(("mpp", "words"), [(0.5, "0.5"), ([0.25, 0.5, 1.0], "0.25, 0.5 and 1")])
def test_a_mix_of_mpp_is_told(mpp, words):
    assert _tile_kind({"tile_px": 256, "requested_mpp": mpp}) == f" (256 px at {words} µm a pixel)"
