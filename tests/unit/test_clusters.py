import json

import numpy as np
import pytest
from PIL import Image

from dinoscope.errors import FeaturesError
from dinoscope.features.writers import read_features
from dinoscope.visualize.cluster_pages import draw_cluster_maps, draw_examples
from dinoscope.visualize.clusters import (
    EXAMPLES,
    PALETTE,
    fit_clusters,
    load_clusters,
    save_clusters,
    write_geojson,
    write_labels,
)
from dinoscope.visualize.pca import fit_basis
from dinoscope.visualize.side_by_side import draw_comparison
from feature_samples import INFO, grid_coords, write_sample

WHITE = np.full((500, 1000, 3), 255, np.uint8)


def kinds_of_tiles(counts, seed, width=24, spread=0.1):
    """Rows of as many kinds as there are counts, far apart, and the kind of each row."""
    generator = np.random.default_rng(seed)
    centres = 5 * np.random.default_rng(77).normal(size=(len(counts), width))
    kinds = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    return (centres[kinds] + spread * generator.normal(size=(len(kinds), width))).astype(np.float32), kinds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three slides with four kinds of tiles, the kinds of their tiles, the basis and the clusters."""
    folder, kinds, paths = tmp_path_factory.mktemp("slides"), [], []
    for number, name in enumerate("ABC"):
        rows, kind = kinds_of_tiles([40, 25, 12, 6 if name != "B" else 0], number)
        paths.append(write_sample(folder / f"{name}.h5", rows, grid_coords(20, 5, 449)[: len(rows)]))
        kinds.append(kind)
    basis = fit_basis(paths)
    return paths, kinds, basis, fit_clusters(paths, basis, num_clusters=4)


def test_clusters_are_the_kinds_the_largest_first(world):
    paths, kinds, basis, clusters = world
    for path, kind in zip(paths, kinds, strict=True):
        np.testing.assert_array_equal(clusters.assign(read_features(path).features, basis), kind)
    found = clusters.info["clusters"]
    assert [kind["num_tiles_fitted"] for kind in found] == [120, 75, 36, 12]
    assert [kind["num_slides"] for kind in found] == [3, 3, 3, 2]
    assert clusters.info["names"] == [f"Cluster {n}" for n in (1, 2, 3, 4)]
    assert clusters.info["colors"][0] == "#e69f00" and len(clusters.info["colors"]) == 4
    assert clusters.info["explained"] > 0.99


def test_centres_are_the_means_of_their_tiles(world):
    paths, kinds, basis, clusters = world
    features = np.concatenate([read_features(path).features for path in paths]).astype(np.float64)
    scores = (features - basis.mean) @ basis.components.astype(np.float64).T
    means = np.stack([scores[np.concatenate(kinds) == kind].mean(axis=0) for kind in range(4)])
    np.testing.assert_allclose(clusters.centres, means, atol=1e-3)


def test_reruns_give_the_same_whatever_the_order(tmp_path, world):
    paths, _, basis, clusters = world
    save_clusters(clusters, tmp_path / "one")
    save_clusters(fit_clusters(paths[::-1], basis, num_clusters=4), tmp_path / "two")
    for file in ("clusters.json", "clusters.npz"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    loaded = load_clusters(tmp_path / "one")
    assert loaded.info == clusters.info
    np.testing.assert_array_equal(loaded.centres, clusters.centres)
    (tmp_path / "one" / "clusters.npz").write_bytes(b"PK")
    with pytest.raises(FeaturesError, match=r"one: no whole clusters .* run clusters\.py fit again"):
        load_clusters(tmp_path / "one")


def test_examples_are_the_nearest_of_all_slides(world):
    paths, kinds, basis, clusters = world
    examples = clusters.info["clusters"][0]["examples"]
    assert len(examples) == EXAMPLES
    assert sorted(example["slide"] for example in examples[:3]) == ["A", "B", "C"]
    file = read_features(paths[0])
    distances = np.square(basis.project(file.features) - clusters.centres[0]).sum(axis=1)
    distances[kinds[0] != 0] = np.inf
    first = next(example for example in examples if example["slide"] == "A")
    assert [first["x"], first["y"]] == file.coords[distances.argmin()].tolist()


def test_clusters_of_another_basis_are_refused(world):
    paths, _, _, clusters = world
    other = fit_basis(paths[:1])
    with pytest.raises(FeaturesError, match="made on another PCA basis"):
        clusters.assign(read_features(paths[0]).features, other)


def test_fewer_tiles_than_clusters_give_fewer(tmp_path):
    path = write_sample(tmp_path / "A.h5", kinds_of_tiles([2, 2, 1], 0)[0])
    assert len(fit_clusters([path], fit_basis([path]), num_clusters=8).centres) == 5


def test_background_is_in_no_cluster(tmp_path):
    rows, kinds = kinds_of_tiles([30, 30, 30], 3)
    rows = np.concatenate([rows + 60 * np.eye(24, dtype=np.float32)[0], 0.01 * rows[:20]])
    path = write_sample(tmp_path / "A.h5", rows)
    basis = fit_basis([path], background="low")
    labels = fit_clusters([path], basis, num_clusters=3).assign(rows, basis)
    assert (labels[90:] == -1).all() and (labels[:90] >= 0).all()
    assert len({(label, kind) for label, kind in zip(labels[:90], kinds, strict=True)}) == 3


def test_geojson_has_each_tile_with_class_and_colour(tmp_path, world):
    paths, _, basis, clusters = world
    file = read_features(paths[0])
    labels = clusters.assign(file.features, basis)
    labels[5] = -1
    write_geojson(tmp_path / "A.geojson", file, labels, clusters)
    document = json.loads((tmp_path / "A.geojson").read_text())
    assert document["type"] == "FeatureCollection" and len(document["features"]) == len(labels)
    for number, feature in enumerate(document["features"]):
        (ring,) = feature["geometry"]["coordinates"]
        assert feature["geometry"]["type"] == "Polygon" and ring[0] == ring[-1] and len(ring) == 5
        x, y = file.coords[number].tolist()
        right, bottom = min(x + 449, INFO.level0_width), min(y + 449, INFO.level0_height)
        assert ring[0] == [x, y] and ring[2] == [right, bottom]
        assert feature["properties"]["objectType"] == "tile"
        if number == 5:
            assert "classification" not in feature["properties"]
        else:
            kind = feature["properties"]["classification"]
            assert kind == {"name": f"Cluster {labels[number] + 1}", "color": PALETTE[labels[number]].tolist()}


def test_labels_are_stored_in_the_order_of_the_tiles(tmp_path):
    write_labels(tmp_path / "A.npz", np.array([3, -1, 0]))
    with np.load(tmp_path / "A.npz") as arrays:
        assert arrays["labels"].dtype == np.int16 and arrays["labels"].tolist() == [3, -1, 0]


def panel(page, number, size):
    """The picture in a place of a page with one row, by the layout of page.py."""
    left = 24 + number * (size[1] + 20)
    return page[162 : 162 + size[0], left : left + size[1]]


def test_maps_stand_side_by_side_each_in_its_colours(tmp_path, world):
    paths, _, basis, clusters = world
    file = read_features(paths[0])
    other_rows = kinds_of_tiles([40, 25, 12, 6], 9)[0]
    other_path = write_sample(tmp_path / "A.h5", other_rows, file.coords, model="base")
    other_basis = fit_basis([other_path])
    other = read_features(other_path)
    draw_comparison(tmp_path / "pca.png", [(other, other_basis), (file, basis)], WHITE)
    labels = clusters.assign(file.features, basis)
    labels[7] = -1
    draw_cluster_maps(tmp_path / "clusters.png", [(file, labels, clusters)], WHITE)
    centres = ((file.coords + 449 / 2) * 720 / INFO.level0_width).astype(int)
    pages = {}
    for name in ("pca", "clusters"):
        with Image.open(tmp_path / f"{name}.png") as image:
            pages[name] = np.asarray(image.convert("RGB"))
    for number, expected in ((1, other_basis.colors(other.features)), (2, basis.colors(file.features))):
        shown = panel(pages["pca"], number, (360, 720))[centres[:, 1], centres[:, 0]]
        np.testing.assert_allclose(shown, expected, atol=1)
    shown = panel(pages["clusters"], 1, (360, 720))[centres[:, 1], centres[:, 0]]
    expected = PALETTE[labels]
    expected[7] = 255  # in no cluster: the slide is seen
    np.testing.assert_allclose(shown, expected, atol=1)


def test_models_of_other_tiles_are_not_shown_together(tmp_path, world):
    paths, _, basis, _ = world
    file, other = read_features(paths[0]), read_features(paths[1])
    with pytest.raises(FeaturesError, match=r"model 'gram' are of other tiles \(slide 'B'"):
        draw_comparison(tmp_path / "x.png", [(file, basis), (other, basis)], WHITE)
    assert not (tmp_path / "x.png").exists()
    rows = kinds_of_tiles([40, 25, 12, 6], 0)[0]
    stale = read_features(write_sample(tmp_path / "A.h5", rows, file.coords, model="base", manifest_hash="c" * 64))
    with pytest.raises(FeaturesError, match=r"model 'base' are of other tiles \(slide 'A', manifest cccccccc\)"):
        draw_comparison(tmp_path / "x.png", [(file, basis), (stale, basis)], WHITE)
    larger = {"manifest_hash": "c" * 64, "tile_px": 448, "patch_size_level0": 898, "model": "foreign"}
    other_set = read_features(write_sample(tmp_path / "A.h5", rows, file.coords, **larger))
    draw_comparison(tmp_path / "x.png", [(file, basis), (other_set, basis)], WHITE)


def test_a_slide_without_tiles_is_drawn(tmp_path, world):
    _, _, basis, clusters = world
    path = write_sample(tmp_path / "E.h5", np.zeros((0, 24), np.float32), np.zeros((0, 2), np.int64))
    file = read_features(path)
    draw_comparison(tmp_path / "pca.png", [(file, basis)], WHITE)
    draw_cluster_maps(tmp_path / "clusters.png", [(file, clusters.assign(file.features, basis), clusters)], WHITE)
    write_geojson(tmp_path / "E.geojson", file, np.zeros(0, int), clusters)
    assert json.loads((tmp_path / "E.geojson").read_text())["features"] == []


def test_the_contact_sheet_has_a_row_a_cluster(tmp_path, world):
    clusters = world[3]
    examples = [[(np.full((32, 32, 3), 40 * n + 5 * m, np.uint8), "A") for m in range(8)] for n in range(4)]
    draw_examples(tmp_path / "sheet.png", clusters, examples, 112.0)
    with Image.open(tmp_path / "sheet.png") as image:
        page = np.asarray(image.convert("RGB"))
    for row in range(4):
        middle = 104 + row * 184 + 88
        assert page[middle, 28].tolist() == PALETTE[row].tolist()
        for column in range(8):
            assert page[middle, 274 + column * 184 + 88].tolist() == [40 * row + 5 * column] * 3
