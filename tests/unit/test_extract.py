import copy
import logging
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch

from dinoscope.errors import ConfigError, FeaturesError, ManifestError
from dinoscope.features.encoders import load_encoder
from dinoscope.features.extract import Extractor, ExtractSettings, choose_device, extract_slides
from dinoscope.features.read_ahead import load_tiles, read_batches
from dinoscope.features.writers import open_features, read_features
from dinoscope.files import write_json
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.slides.manifest import manifest_digest, tile_table, write_tiles
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid
from tiny_backbone import tiny_backbone

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "extract_features.py"
WIDTH, HEIGHT, MPP, TILE = 640, 512, 0.5, 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_backbone()


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    """A slide of coloured noise, so that every tile is like no other."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(40, 255, size=(HEIGHT // 32, WIDTH // 32, 3))
    image = np.repeat(np.repeat(coarse, 32, axis=0), 32, axis=1) + generator.integers(-30, 1, size=(HEIGHT, WIDTH, 3))
    path = tmp_path_factory.mktemp("slide") / "Jane Doe.tiff"
    image = image.clip(0, 255).astype(np.uint8)
    write_pyramid(path, [(WIDTH, HEIGHT, encode_tiles(image))], MPP)
    return path


def write_manifest(path, slide_id="A", keep=slice(None), tile_px=TILE, **metadata):
    """A regular grid of tiles at level 0."""
    y, x = np.mgrid[0 : HEIGHT - tile_px + 1 : tile_px, 0 : WIDTH - tile_px + 1 : tile_px]
    columns = {"x": x.ravel()[keep], "y": y.ravel()[keep], "level": 0, "read_px": tile_px, "tile_px": tile_px}
    columns |= {"mpp": MPP, "footprint_px": tile_px, "tissue_fraction": 1.0}
    document = {"slide_id": slide_id, "tile_set": "features", "tile_px": tile_px, "requested_mpp": MPP}
    document |= {"stride_px": tile_px, "width": WIDTH, "height": HEIGHT, "mpp_x": MPP, "mpp_y": MPP}
    write_tiles(path, tile_table(slide_id, columns), document | metadata)
    return path


@pytest.fixture
def manifest(tmp_path):
    return write_manifest(tmp_path / "A.parquet")


def extractor_of(model, device=CPU, **settings):
    return Extractor(model, "gram", "a" * 64, ExtractSettings(**({"dtype": "float32"} | settings)), device)


def extract(model, slide_path, manifest, output, **settings):
    extractor_of(model, **settings).extract(slide_path, manifest, output)
    return read_features(output)


def reference(model, slide_path):
    """Tokens of every tile: OpenSlide alone, one tile at a time, in float64."""
    double = DinoVisionTransformer(model.settings)
    double.load_state_dict(model.state_dict())
    double = double.double().eval()
    tokens = []
    with openslide.OpenSlide(slide_path) as slide:
        for y in range(0, HEIGHT, TILE):
            for x in range(0, WIDTH, TILE):
                pixels = np.asarray(slide.read_region((x, y), 0, (TILE, TILE)))[..., :3] / 255
                pixels = (pixels - np.array(model.mean)) / np.array(model.std)
                with torch.inference_mode():
                    out = double.forward_features(torch.from_numpy(pixels.transpose(2, 0, 1))[None])
                tokens.append({name: value[0].double().numpy() for name, value in out.items()})
    return tokens


@pytest.fixture(scope="module")
def tokens(model, slide_path):
    return reference(model, slide_path)


POOLED = {
    "cls": lambda out: out["cls"],
    "mean": lambda out: out["patches"].mean(axis=0),
    "cls+mean": lambda out: np.concatenate([out["cls"], out["patches"].mean(axis=0)]),
    "cls+storage": lambda out: np.concatenate([out["cls"], *out["storage"]]),
}


@pytest.mark.parametrize("pooling", POOLED)
def test_features_are_those_of_a_plain_loop_in_float64(tmp_path, model, slide_path, manifest, tokens, pooling):
    file = extract(model, slide_path, manifest, tmp_path / "A.h5", pooling=pooling)
    expected = np.stack([POOLED[pooling](out) for out in tokens])
    np.testing.assert_allclose(file.features, expected, atol=1e-5)
    assert expected.std(axis=0).mean() > 0.01  # tiles do differ, so that a wrong order would show
    assert file.coords.tolist() == [[x, y] for y in range(0, HEIGHT, TILE) for x in range(0, WIDTH, TILE)]


def test_what_the_file_says_of_itself(tmp_path, model, slide_path, manifest):
    info = extract(model, slide_path, manifest, tmp_path / "A.h5", pooling="mean").info
    assert info.manifest_hash == manifest_digest(manifest)
    assert (info.slide_id, info.model, info.pooling, info.mpp, info.level0_mpp) == ("A", "gram", "mean", MPP, MPP)
    assert (info.tile_px, info.patch_size_level0, info.overlap_px) == (TILE, TILE, 0)
    assert (info.level0_width, info.level0_height) == (WIDTH, HEIGHT)
    assert b"Jane Doe" not in (tmp_path / "A.h5").read_bytes()


@pytest.mark.parametrize("batch_size", [1, 7, 80, 1000])
@pytest.mark.parametrize("workers", [0, 1, 5])
def test_batch_size_and_workers_change_nothing(tmp_path, model, slide_path, manifest, tokens, batch_size, workers):
    file = extract(model, slide_path, manifest, tmp_path / "A.h5", batch_size=batch_size, workers=workers)
    np.testing.assert_allclose(file.features, np.stack([out["cls"] for out in tokens]), atol=1e-5)


def test_float16_is_the_rounded_float32(tmp_path, model, slide_path, manifest):
    full = extract(model, slide_path, manifest, tmp_path / "A.h5").features
    half = extract(model, slide_path, manifest, tmp_path / "B.h5", dtype="float16").features
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, full.astype(np.float16))


def test_dense_features_lie_where_the_patches_are(tmp_path, model, slide_path, manifest, tokens):
    extract(model, slide_path, manifest, tmp_path / "A.h5", dense=True, batch_size=33)
    with open_features(tmp_path / "A.h5") as (file, _):
        dense = file["patch_features"][:]
    grid = TILE // 16
    expected = np.stack([out["patches"].reshape(grid, grid, -1) for out in tokens])
    assert dense.shape == (len(tokens), grid, grid, 48)
    np.testing.assert_allclose(dense, expected, atol=2e-3)
    assert np.abs(expected - expected.swapaxes(1, 2)).max() > 0.1


def test_a_slide_without_tiles_gives_an_empty_file(tmp_path, model, slide_path):
    manifest = write_manifest(tmp_path / "A.parquet", keep=slice(0, 0))
    file = extract(model, slide_path, manifest, tmp_path / "A.h5", pooling="cls+mean")
    assert file.features.shape == (0, 96) and file.coords.shape == (0, 2)
    assert file.info.patch_size_level0 == TILE


def test_coarser_tiles_are_read_and_shrunk_as_the_reader_does(tmp_path, model, shared):
    """A real slide whose tiles need resampling: 0.499 µm a pixel read at 1 µm."""
    from dinoscope.slides.reader import Slide

    path = shared / "data" / "wsi" / "CMU-1-Small-Region.svs"
    with Slide(path, "CMU") as slide:
        side = round(64 * 1.0 / slide.mpp)
        columns = {"x": [600, 900], "y": [900, 1500], "level": 0, "read_px": side, "tile_px": 64, "mpp": 1.0}
        document = {"slide_id": "CMU", "tile_px": 64, "requested_mpp": 1.0, "stride_px": 64, "tile_set": "x"}
        document |= {"width": slide.width, "height": slide.height, "mpp_x": slide.mpp_x, "mpp_y": slide.mpp_y}
        table = tile_table("CMU", columns | {"footprint_px": side, "tissue_fraction": 1.0})
        write_tiles(tmp_path / "CMU.parquet", table, document)
        pixels = np.stack([slide.read_tile(x, y, 0, side, 64) for x, y in ((600, 900), (900, 1500))])
    file = extract(model, path, tmp_path / "CMU.parquet", tmp_path / "CMU.h5")
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(model.mean)[:, None, None]) / (
        torch.tensor(model.std)[:, None, None]
    )
    with torch.inference_mode():
        np.testing.assert_allclose(file.features, model.forward_features(images)["cls"], atol=1e-5)
    assert file.info.patch_size_level0 == side


class SlowSlide:
    """Counts the tiles that were read; each has its row number as its grey."""

    width, height = WIDTH, HEIGHT

    def __init__(self, fail_at=None):
        self.lock, self.count, self.fail_at = threading.Lock(), 0, fail_at

    def read_tile(self, x, y, level, read_px, tile_px, footprint_px=None):
        row = y // TILE * (WIDTH // TILE) + x // TILE
        if row == self.fail_at:
            raise OSError("the disk is gone")
        time.sleep(0.002 * (row % 3))
        with self.lock:
            self.count += 1
        return np.full((tile_px, tile_px, 3), row, np.uint8)


@pytest.mark.parametrize(("batch_size", "workers"), [(10, 2), (4, 8), (1, 3), (10, 0)])
def test_reading_ahead_keeps_order_and_is_bounded(manifest, batch_size, workers):
    tiles, slide = load_tiles(manifest), SlowSlide()
    most_ahead, rows_seen = 0, []
    for rows, images in read_batches(slide, tiles, batch_size, workers):
        time.sleep(0.01)
        most_ahead = max(most_ahead, slide.count - rows.stop)
        rows_seen += images[:, 0, 0, 0].tolist()
    assert rows_seen == list(range(len(tiles)))
    assert most_ahead <= 2 * workers + 2 * batch_size
    assert (most_ahead == 0) == (workers == 0)


def test_a_tile_that_cannot_be_read_ends_the_reading(manifest):
    before = threading.active_count()
    slide = SlowSlide(fail_at=33)
    with pytest.raises(OSError, match="disk is gone"):
        for _ in read_batches(slide, load_tiles(manifest), 10, 4):
            pass
    assert slide.count < 80 and threading.active_count() == before


@pytest.mark.parametrize(("tile_px", "fitting"), [(100, "96 px or 112 px"), (10, "16 px")])
def test_tiles_that_are_no_multiple_of_the_patch_are_refused(tmp_path, model, slide_path, tile_px, fitting):
    manifest = write_manifest(tmp_path / "A.parquet", tile_px=tile_px)
    with pytest.raises(FeaturesError, match=rf"slide 'A'.* {tile_px} px .* 16 px patches of model 'gram'; .*{fitting}"):
        extract(model, slide_path, manifest, tmp_path / "A.h5")


@pytest.mark.parametrize("workers", [0, 2])
def test_features_that_are_not_finite_name_slide_and_model(tmp_path, model, slide_path, manifest, workers):
    broken = DinoVisionTransformer(model.settings)
    broken.load_state_dict(model.state_dict())
    broken.norm.bias.data[5] = float("nan")
    with pytest.raises(FeaturesError, match=r"slide 'A': .* model 'gram' are not finite for the tile at \(0, 0\)"):
        extract(broken.eval(), slide_path, manifest, tmp_path / "A.h5", workers=workers, batch_size=16)
    assert not list(tmp_path.glob("*.h5")) and not list(tmp_path.glob(".*partial*"))


def test_features_too_large_for_float16_say_what_to_do(tmp_path, model, slide_path, manifest):
    large = DinoVisionTransformer(model.settings)
    large.load_state_dict(model.state_dict())
    large.norm.bias.data[5] = 1e6
    with pytest.raises(FeaturesError, match="overflow float16: use --dtype float32"):
        extract(large.eval(), slide_path, manifest, tmp_path / "A.h5", dtype="float16")
    assert extract(large, slide_path, manifest, tmp_path / "A.h5").features.max() > 9e5


def test_patch_features_too_large_for_float16_say_so(tmp_path, model, slide_path, manifest):
    large = DinoVisionTransformer(replace(model.settings, untie_cls_and_patch_norms=True))
    cls_norm = {f"cls_norm.{key}": value for key, value in model.norm.state_dict().items()}
    large.load_state_dict(model.state_dict() | cls_norm)
    large.norm.bias.data[5] = 1e6
    with pytest.raises(FeaturesError, match="patch features overflow float16: leave out --dense"):
        extract(large.eval(), slide_path, manifest, tmp_path / "A.h5", dense=True)


def test_compiled_features_are_the_same(tmp_path, model, slide_path, manifest, tokens, monkeypatch):
    """The compiler itself is long; here it is replaced by one that only insists on one batch size, as it does."""
    sizes = []

    def compile_once(function, **options):
        def run(images):
            sizes.append(len(images))
            return function(images)

        return run

    monkeypatch.setattr(torch, "compile", compile_once)
    file = extract(model, slide_path, manifest, tmp_path / "A.h5", batch_size=33, compile=True)
    np.testing.assert_allclose(file.features, np.stack([out["cls"] for out in tokens]), atol=1e-5)
    assert sizes == [33, 33, 33]


def test_rounding_the_weights_beforehand_changes_no_bit_of_bfloat16(model):
    images = torch.randint(0, 255, (3, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = extractor_of(model, precision="bfloat16").embedder
    prepared = extractor_of(copy.deepcopy(model), precision="bfloat16").embedder
    prepared.prepare()
    assert prepared.model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    torch.testing.assert_close(prepared.embed(images)[0], plain.embed(images)[0], atol=0, rtol=0)


def test_storage_tokens_must_be_there(model):
    settings = replace(model.settings, num_storage_tokens=0)
    with pytest.raises(FeaturesError, match=r"'gram' has no storage tokens.* use cls, mean or cls\+mean"):
        extractor_of(DinoVisionTransformer(settings), pooling="cls+storage")


def test_manifests_that_do_not_fit_are_refused(tmp_path, model, slide_path):
    other = write_manifest(tmp_path / "other.parquet", width=WIDTH + 1)
    with pytest.raises(ManifestError, match=r"slide 'A' is 640x512 px, but was 641x512 px .* tile it again"):
        extract(model, slide_path, other, tmp_path / "A.h5")
    columns = {"x": [0, 0], "y": [0, 64], "level": 0, "read_px": 64, "tile_px": 64, "mpp": [0.5, 1.0]}
    table = tile_table("B", columns | {"footprint_px": 64, "tissue_fraction": 1.0})
    document = {"slide_id": "B", "tile_px": 64, "requested_mpp": 0.5, "stride_px": 64, "mpp_x": 0.5, "mpp_y": 0.5}
    write_tiles(tmp_path / "many.parquet", table, document)
    with pytest.raises(ManifestError, match=r"many\.parquet: tiles of slide 'B' differ in mpp \(0\.5, 1\.0\)"):
        load_tiles(tmp_path / "many.parquet")
    write_tiles(tmp_path / "mix.parquet", table, document | {"requested_mpp": [0.5, 1.0], "tile_set": "train"})
    with pytest.raises(ManifestError, match=r"mix\.parquet: tile set train mixes mpp 0\.5, 1\.0, but a feature file"):
        load_tiles(tmp_path / "mix.parquet")
    write_manifest(tmp_path / "C.parquet", slide_id="C", stride_px=48)
    assert load_tiles(tmp_path / "C.parquet").overlap_px == 16


def test_a_slide_that_fails_does_not_stop_the_others(tmp_path, model, slide_path, caplog):
    manifests = [write_manifest(tmp_path / f"{name}.parquet", slide_id=name) for name in "ABC"]
    slides = [slide_path, tmp_path / "gone.tiff", slide_path]
    jobs = [(slide, m, tmp_path / f"{m.stem}.h5") for slide, m in zip(slides, manifests, strict=True)]
    with caplog.at_level(logging.INFO), pytest.raises(FeaturesError, match=r"1 of 3 slides failed .*'B'"):
        extract_slides(extractor_of(model), jobs)
    assert [job[2].exists() for job in jobs] == [True, False, True]
    assert "A: 80 tiles in " in caplog.text and " tiles/s (reading " in caplog.text
    first, third = (read_features(jobs[i][2]) for i in (0, 2))
    np.testing.assert_array_equal(first.features, third.features)
    assert third.info.slide_id == "C"


def test_finished_slides_are_kept_only_if_nothing_changed(tmp_path, model, slide_path, manifest):
    output = tmp_path / "A.h5"
    jobs = [(slide_path, manifest, output)]

    def is_redone(**settings):
        before = output.stat().st_mtime_ns
        extract_slides(extractor_of(model, **settings), jobs, keep_finished=True)
        return output.stat().st_mtime_ns != before

    extract_slides(extractor_of(model), jobs)
    assert not is_redone() and not is_redone(batch_size=3)
    assert is_redone(pooling="mean") and is_redone(pooling="mean", dtype="float16")
    assert is_redone(dense=True) and not is_redone(dense=True)
    write_manifest(manifest, keep=slice(0, 20))
    assert is_redone(dense=True) and not is_redone(dense=True)
    output.write_bytes(output.read_bytes()[:500])
    assert is_redone(dense=True)


@pytest.mark.parametrize("name", ["foo", "cuda:99", "cpu:x"])
def test_devices_that_are_not_there_are_refused_in_one_line(name):
    with pytest.raises(ConfigError, match=f"^there is no device '{name}' .*wanted is auto, cpu, or a GPU") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


def test_the_device_is_what_is_there():
    expected = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    assert choose_device().type == expected and choose_device("cpu").type == "cpu"


@pytest.fixture(scope="module")
def weights(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("models") / "gram" / "teacher.pth"
    path.parent.mkdir()
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}}, path)
    write_json(path.parent / "model.json", {"backbone": model.settings.as_dict(), "mean": model.mean, "std": model.std})
    return path


def run_script(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_script_extracts_several_slides(tmp_path, model, slide_path, weights):
    manifests = [write_manifest(tmp_path / f"{name}.parquet", slide_id=name) for name in ("A", "B [1]")]
    outputs = [tmp_path / "features" / f"{m.stem}.h5" for m in manifests]
    done = run_script(
        "--weights", weights, "--model-name", "gram", "--slide", slide_path, slide_path, "--tiles", *manifests,
        "--output", *outputs, "--pooling", "cls+mean", "--workers", 1, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "B [1]: 80 tiles in" in done.stderr
    file = read_features(outputs[1])
    assert file.info.weights_sha256 == load_encoder(weights).sha256 == load_encoder(weights.parent).sha256
    own = extract(model, slide_path, manifests[1], tmp_path / "own.h5", pooling="cls+mean", dtype="float16")
    np.testing.assert_allclose(file.features, own.features, atol=2e-3)


def test_script_refuses_in_one_sentence(tmp_path, slide_path, weights, manifest):
    common = ["--weights", weights, "--model-name", "gram", "--slide", slide_path]
    uneven = run_script(*common, "--tiles", manifest, manifest, "--output", tmp_path / "A.h5")
    assert uneven.returncode == 1
    assert uneven.stderr == "error: 1 --slide, 2 --tiles and 1 --output: give as many of each\n"
    given = [*common, "--tiles", manifest, "--output", tmp_path / "A.h5"]
    negative = run_script(*given, "--workers", -1)
    assert negative.returncode == 2 and "argument --workers: -1 is not at least 0" in negative.stderr
    device = run_script(*given, "--device", "foo")
    assert device.returncode == 1
    assert device.stderr.startswith("error: there is no device 'foo' (") and device.stderr.count("\n") == 1
    again = tmp_path / "x" / ".." / "A.h5"
    slides = ["--slide", slide_path, slide_path, "--tiles", manifest, manifest]
    twice = run_script(*given, again, *slides)
    assert twice.returncode == 1 and twice.stderr.startswith(f"error: --output {again} is given twice")
    missing = run_script(*common, "--tiles", tmp_path / "gone.parquet", "--output", tmp_path / "A.h5")
    assert missing.returncode == 1 and "gone.parquet does not exist" in missing.stderr.splitlines()[-1]
