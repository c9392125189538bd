"""Dense answers: patches against the pixels of masks, whatever the size of a patch."""

import dataclasses

import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dinoscope.errors import FeaturesError
from dinoscope.evaluate.embedding import ImageFeatures
from dinoscope.evaluate.folds import Fold, grouped_folds
from dinoscope.evaluate.masked import answer_masks, patch_edges, patch_labels
from dinoscope.evaluate.measuring import Settings
from dinoscope.evaluate.probe import linear_probe
from dinoscope.evaluate.scores import mean_iou, statistic_of_repeats
from dinoscope.evaluate.tile_sets import list_masks
from dinoscope.evaluate.units import units_of_images

HEIGHT, WIDTH, IMAGES = 40, 56, 8


@pytest.fixture
def images(tmp_path):
    """Eight images of which a rectangle on multiples of 8 px, up to the right edge, is foreground (instances 1, 2)."""
    for index in range(IMAGES):
        mask = np.zeros((HEIGHT, WIDTH), np.uint16)
        mask[8 * (index % 3) : 8 * (index % 3) + 16, 16:] = 1 + index % 2
        for folder, pixels in (("images", np.repeat(mask[..., None] * 60, 3, 2).astype(np.uint8)), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / folder / f"{index}.png"), pixels)
    return list_masks("nuclei", tmp_path / "images", tmp_path / "masks", None)


def features_of(images, patch_px):
    """What a model would give whose patches say how much foreground they have, and noise beside it."""
    rng, rows, grids = np.random.default_rng(0), [], []
    for path in images.masks:
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) > 0
        grid = (-(-HEIGHT // patch_px), -(-WIDTH // patch_px))
        padded = np.pad(mask, ((0, grid[0] * patch_px - HEIGHT), (0, grid[1] * patch_px - WIDTH)), mode="edge")
        share = padded.reshape(grid[0], patch_px, grid[1], patch_px).mean((1, 3)).ravel()
        rows.append(np.stack([share, rng.normal(size=len(share)) / 50], axis=1))
        grids.append(grid)
    about = {"image_px": None, "patch_size": patch_px, "enlarge": 1.0}
    return ImageFeatures(about, np.concatenate(rows).astype(np.float16), np.array(grids, np.int32))


@pytest.mark.parametrize(("patch_px", "least"), [(8, 1.0), (12, 0.7)])
def test_every_pixel_takes_the_answer_of_its_patch(images, patch_px, least):
    units = units_of_images("masks-nuclei", images, 0, 0)
    answers = answer_masks(units, images, features_of(images, patch_px), True, Settings(folds=2, repeats=3))
    assert answers.confusions["dense"].shape[0] == 3  # of different folds, but the same pixels
    confusions = answers.confusions["dense"][1]
    assert confusions.shape == (IMAGES, 2, 2)
    assert (confusions.sum(axis=(1, 2)) == HEIGHT * WIDTH).all()
    truth = [int((cv2.imread(str(path), cv2.IMREAD_UNCHANGED) > 0).sum()) for path in images.masks]
    assert confusions[:, 1].sum(axis=1).tolist() == truth
    found = float(mean_iou(confusions.sum(axis=0)))
    assert found == 1 if least == 1 else least < found < 1


def test_patches_are_labelled_by_most_of_their_pixels():
    assert patch_edges(56, 4, 16).tolist() == [0, 16, 32, 48, 56]
    assert patch_edges(56, 4, None).tolist() == [0, 14, 28, 42, 56]
    mask = np.random.default_rng(0).integers(0, 3, (40, 56))
    expected = [
        np.bincount(mask[top : top + 16, left : left + 16].ravel(), minlength=3).argmax()
        for top in range(0, 40, 16)
        for left in range(0, 56, 16)
    ]
    assert patch_labels(mask, (3, 4), 3, 16).tolist() == expected


def test_masks_of_one_class_are_refused(images):
    for path in images.masks:
        cv2.imwrite(str(path), np.zeros((HEIGHT, WIDTH), np.uint8))
    units = units_of_images("masks-nuclei", images, 0, 0)
    with pytest.raises(FeaturesError, match="its masks have only class 0, and two are needed"):
        answer_masks(units, images, features_of(images, 8), True, Settings(folds=2, repeats=1))


def test_ignored_pixels_are_neither_learned_from_nor_counted(images):
    """Where the truth is hidden beside every foreground, patches are labelled by what is left, and scores stay."""
    features = features_of(images, 8)
    hidden = 0
    for index, path in enumerate(images.masks):
        mask = (cv2.imread(str(path), cv2.IMREAD_UNCHANGED) > 0).astype(np.uint8)
        mask[:, 40:] = 255  # whole patches
        mask[::2, :40] = 255  # half of each of the others
        hidden += int((mask == 255).sum())
        cv2.imwrite(str(path), mask)
        labels = patch_labels(np.where(mask == 255, -1, mask.astype(int)), (5, 7), 2, 8).reshape(5, 7)
        assert (labels[:, 5:] == -1).all() and (labels[:, :5] == (mask[1::8, 0:40:8] == 1)).all(), index
    units = units_of_images("masks-nuclei", images, 0, 0)
    confusions = answer_masks(units, images, features, False, Settings(folds=2, repeats=1)).confusions["dense"][0]
    assert confusions.sum() == IMAGES * HEIGHT * WIDTH - hidden
    assert float(mean_iou(confusions.sum(axis=0))) == 1


def test_masks_that_say_nothing_are_refused(images):
    for path in images.masks:
        cv2.imwrite(str(path), np.full((HEIGHT, WIDTH), 255, np.uint8))
    units = units_of_images("masks-nuclei", images, 0, 0)
    with pytest.raises(FeaturesError, match="its masks have no class"):
        answer_masks(units, images, features_of(images, 8), False, Settings(folds=2, repeats=1))


def test_repeats_are_those_of_scikit_learn_patch_by_patch(images):
    """Every fold of every repeat by hand: the scaling and penalty that were chosen, scikit-learn, pixel by pixel."""
    features, settings = features_of(images, 12), Settings(folds=4, repeats=2)
    noise = np.random.default_rng(3).normal(size=features.features.shape) * [0.35, 1]
    features = ImageFeatures(features.about, (features.features + noise).astype(np.float16), features.grids)
    units = units_of_images("masks-nuclei", images, 0, 0)
    found = answer_masks(units, images, features, True, settings).confusions["dense"]
    masks = [(cv2.imread(str(path), cv2.IMREAD_UNCHANGED) > 0).astype(int) for path in images.masks]
    labels = np.stack([patch_labels(mask, (4, 5), 2, 12) for mask in masks])
    rows = features.features.astype(np.float64).reshape(IMAGES, 20, 2)
    folds = grouped_folds(np.arange(IMAGES) % 2, units.groups, folds=4, repeats=2, seed=settings.seed)
    patch_folds = [
        Fold(f.repeat, f.name, *((20 * side[:, None] + np.arange(20)).ravel() for side in (f.train, f.test)))
        for f in folds
    ]
    flat = rows.reshape(-1, 2).astype(np.float32)
    choices = linear_probe(flat, labels.ravel(), np.repeat(units.groups, 20), patch_folds, seed=settings.seed).choices
    expected = np.zeros_like(found)
    for fold, choice in zip(folds, choices, strict=True):
        train = rows[fold.train].reshape(-1, 2)
        deviation = train.std(0) if choice.scaling == "each" else np.sqrt(train.var(0).mean())
        model = LogisticRegression(C=2 / (choice.penalty * 2), class_weight="balanced", tol=1e-8)
        model.fit((train - train.mean(0)) / deviation, labels[fold.train].ravel())
        for image in fold.test:
            said = model.predict((rows[image] - train.mean(0)) / deviation).reshape(4, 5)
            pixels = said.repeat(12, axis=0)[:HEIGHT].repeat(12, axis=1)[:, :WIDTH]
            np.add.at(expected[fold.repeat, image], (masks[image], pixels), 1)
    assert 0.5 < float(mean_iou(expected.sum(axis=(0, 1)))) < 0.95  # neither nothing nor all is told
    assert np.abs(found - expected).sum() / 2 <= 144  # of 35,840 pixels a patch may lie on the border
    both = [mean_iou(of_repeat.sum(axis=0)) for of_repeat in found]
    assert statistic_of_repeats(found, units.groups)(np.ones((1, IMAGES)))[0] == pytest.approx(np.mean(both))


def test_masks_of_another_size_are_refused(images):
    features = features_of(images, 8)
    cv2.imwrite(str(images.masks[3]), np.ones((HEIGHT // 2, WIDTH // 2), np.uint8))
    units = units_of_images("masks-nuclei", images, 0, 0)
    with pytest.raises(FeaturesError, match="mask of image 3 has 28 x 20 px, but the image 56 x 40"):
        answer_masks(units, images, features, True, Settings(folds=2, repeats=1))


def test_images_of_three_groups_are_too_few(images):
    few = dataclasses.replace(images, groups=["a", "b", "c", "a", "b", "c", "a", "b"])
    units = units_of_images("masks-nuclei", few, 0, 0)
    with pytest.raises(FeaturesError, match="are of 3 groups, and at least four are needed"):
        answer_masks(units, few, features_of(few, 8), True, Settings(folds=5, repeats=1))
