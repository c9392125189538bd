"""The scripts of segmentation as people call them, dinov2-finetune's example among them."""

import csv
import re
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import segment_compare
import segment_corruptions
import segment_evaluate
import segment_train
from dinoscope.errors import ConfigError, DinoscopeError, MasksError, SealError, WeightsError
from dinoscope.files import read_json, write_json
from dinoscope.segment.arguments import hyphenated
from dinoscope.segment.public_fpn import PublicFPNDecoder
from dinoscope.segment.questions import Asked
from dinoscope.segment.settings import TrainSettings
from dinoscope.segment.tables import components
from dinoscope.segment.voc import VOC_CLASSES
from segmentation_samples import write_discs
from tiny_segmenter import write_own_encoder

SEED = "../shared/seeds/dinov2_finetune_lora_segmentation.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    write_discs(folder / "discs")
    write_own_encoder(folder / "encoder.pth")
    return folder


def call(monkeypatch, script, *words):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
    script.main()


def data_of(folder):
    encoder = folder / "encoder.pth"
    return [
        "--dataset",
        "folder",
        "--data-root",
        folder / "discs",
        "--data-option",
        "instance=disc",
        "--weights",
        encoder,
    ]


@pytest.fixture(scope="module")
def trained(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, more in (("lora", []), ("other", ["--seed", "1"]), ("frozen", ["--no-use-lora"])):
            words = ["--exp-name", name, "--output-dir", folder / "runs" / "discs" / "tiny", *data_of(folder)]
            words += ["--img-dim", "48", "64", "--epochs", "3", "--batch-size", "4", "--workers", "0", *more]
            call(monkeypatch, segment_train, *words)
    return folder / "runs" / "discs" / "tiny"


def write_voc(root, names=("a", "b", "c")):
    """A VOCdevkit with all classes in each of its masks."""
    year = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (year / folder).mkdir(parents=True)
    for name in names:
        mask = (np.arange(60 * 84).reshape(60, 84) // 6 % 84 // 4).astype(np.uint8)
        image = np.stack([mask * 12, 255 - mask * 12, mask * 7 % 255], 2).astype(np.uint8)
        Image.fromarray(image).save(year / "JPEGImages" / f"{name}.jpg")
        picture = Image.fromarray(mask)
        picture.putpalette([value for index in range(256) for value in (index, index, index)])
        picture.save(year / "SegmentationClass" / f"{name}.png")
    (year / "ImageSets/Segmentation/train.txt").write_text("\n".join(names[:-1]) + "\n")
    (year / "ImageSets/Segmentation/val.txt").write_text(f"{names[-1]}\n")


def example_of(shared):
    """The words of the public tool's example, without the name of its script."""
    text = (shared / "seeds" / "dinov2_finetune_lora_segmentation.txt").read_text(encoding="utf-8")
    return re.search(r"^python main\.py (.+)$", text, re.MULTILINE)[1].split()


def test_the_public_example_runs_but_for_the_scripts_name(shared, folder, tmp_path, monkeypatch, caplog):
    words = example_of(shared)
    assert words[:2] == ["--exp_name", "base_voc"]
    (tmp_path / "models").mkdir()
    write_own_encoder(tmp_path / "models" / "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth")
    write_voc(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    call(monkeypatch, segment_train, *words, "--epochs", "1", "--batch_size", "2", "--debug", "--workers", "0")
    run = tmp_path / "results" / "segmentation" / "base_voc"
    card = read_json(run / "segmenter" / "segmenter.json")
    assert card["classes"] == list(VOC_CLASSES)
    assert (card["decoder"], card["trainable"], card["img_dim"]) == ("fpn", "lora", [304, 304])
    assert "img_dim 308 308 is no multiple of the encoder's patches of 16 px; the nearest are 304 or 320" in caplog.text
    assert [path.name for path in run.glob("debug/*")] == ["epoch_0001.png"]
    assert read_json(run / "run_config.json")["settings"]["views"] == "photographs"


def test_the_example_says_where_weights_and_images_are_sought(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"data set voc: where it lies is not said; give --data-root; data/VOCdevkit"):
        call(monkeypatch, segment_train, *example_of(shared))
    write_voc(tmp_path / "elsewhere")
    monkeypatch.setenv("DINOSCOPE_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(
        WeightsError, match=r"no dinov3 of size base lies in models: put dinov3_vitb16_pretrain_lvd\*\.pth"
    ):
        call(monkeypatch, segment_train, *example_of(shared))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--img-dim", "50", "64", "--no-round-img-dim"], r"img_dim 50 64 .* height 50: take 48 or 64"),
        (["--data-option", "instance"], "--data-option 'instance' must read KEY=VALUE"),
        (["--augmentation", "hed=1"], r"augmentation\.hed is unknown"),
        (["--class-weights", "many"], "--class-weights many: give balanced, or a number a class"),
        (["--epochs", "0"], "epochs is 0; at least 1 is wanted"),
        (["--lr", "0"], "lr is 0.0 .* give rates above 0"),
        (["--targets", "k", "queries"], "queries"),
        (["--blocks", "9"], "9"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--lora-weights", "nowhere"], "nowhere does not exist"),
        (["--data-root", "nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_sentence(folder, tmp_path, monkeypatch, words, sentence):
    told = ["--exp-name", "x", "--output-dir", tmp_path, *data_of(folder), "--img-dim", "48", "64", "--workers", "0"]
    with pytest.raises(DinoscopeError, match=sentence) as error:
        call(monkeypatch, segment_train, *told, *words)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("final.json"))


def test_hyphens_replace_underscores_in_names_alone():
    words = ["--img_dim", "3_0", "--exp_name=a_b", "--data-option", "class_map={0: a_b}", "x--y_z"]
    assert hyphenated(words) == ["--img-dim", "3_0", "--exp-name=a_b", "--data-option", "class_map={0: a_b}", "x--y_z"]


def test_a_training_begins_with_a_trained_segmenter(folder, trained, tmp_path, monkeypatch):
    words = [
        "--exp-name",
        "more",
        "--output-dir",
        tmp_path,
        *data_of(folder),
        "--lora_weights",
        trained / "lora",
    ]
    words += ["--img-dim", "48", "64", "--epochs", "1", "--workers", "0", "--lr", "1e-9", "--no-use-lora"]
    call(monkeypatch, segment_train, *words)
    before, after = (
        read_json(path / "final.json")["validation"]["miou"] for path in (trained / "lora", tmp_path / "more")
    )
    assert after == pytest.approx(before, abs=1e-3)
    assert read_json(tmp_path / "more" / "run_config.json")["settings"]["trainable"] == "lora"
    assert re.fullmatch("[0-9a-f]{64}", read_json(tmp_path / "more" / "run_config.json")["inputs"]["start"])
    with pytest.raises(SealError, match=r"more was begun with other first weights \([0-9a-f]{8}, now [0-9a-f]{8}\)"):
        call(monkeypatch, segment_train, *words, "--lora-weights", trained / "other")


def test_measures_tables_and_picture(folder, trained, monkeypatch):
    for name in ("lora", "frozen"):
        run = trained / name
        words = ["--segmenter", run, *data_of(folder), "--output", run / "evaluation.json", "--model-name", "tiny"]
        words += [
            "--classes-table",
            run / "classes.tsv",
            "--images-table",
            run / "images.tsv",
            "--picture",
            run / "e.png",
        ]
        call(monkeypatch, segment_evaluate, *words)
    told = read_json(trained / "lora" / "evaluation.json")
    assert (told["task"], told["split"], told["images"], told["registers"]) == ("lora", "test", 3, 3)
    assert told["file"] == "lora"
    low, high = told["miou_interval"] or (0, 1)
    assert low <= told["miou"] <= high
    with open(trained / "lora" / "classes.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["class"] for row in rows] == ["background", "disc"]
    assert [float(row["iou"]) for row in rows] == pytest.approx(told["iou_per_class"], abs=1e-4)
    assert cv2.imread(str(trained / "lora" / "e.png")).shape[1] > 1000
    words = ["--evaluations", *(trained / name / "evaluation.json" for name in ("frozen", "lora"))]
    call(monkeypatch, segment_compare, *words, "--output", trained / "c.tsv", "--runs-output", trained / "r.tsv")
    with open(trained / "c.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["finetuned_components"] for row in rows] == ["1x1 Conv decoder", "LoRA + 1x1 Conv decoder"]
    assert float(rows[1]["miou"]) == pytest.approx(told["miou"], abs=1e-4)


@pytest.fixture
def measured(folder, tmp_path, monkeypatch):
    """What segment_evaluate.py writes of a segmenter, with further words."""

    def measured(segmenter, *words):
        told = ["--segmenter", segmenter, *data_of(folder), "--output", tmp_path / "x.json", *words]
        call(monkeypatch, segment_evaluate, *told)
        return read_json(tmp_path / "x.json")

    return measured


def test_results_name_a_segmenter_but_no_place_on_disk(trained, tmp_path, measured):
    of_workflow = tmp_path / "somebody" / "nuclei" / "gram" / "lora_linear_seed0"
    shutil.copytree(trained / "lora", of_workflow)
    told = measured(of_workflow)
    assert (told["task"], told["file"]) == ("nuclei", "nuclei/gram/lora_linear_seed0")
    shutil.copytree(trained / "lora", tmp_path / "somebody" / "my.run")
    told = measured(tmp_path / "somebody" / "my.run")
    assert (told["task"], told["file"]) == ("my.run", "my.run")
    for path in (tmp_path / "somebody").rglob("*.json"):
        assert str(tmp_path.parent) not in path.read_text()


def test_the_best_of_a_training_is_measured_as_its_training_says(trained, tmp_path, measured):
    """Whichever of the two folders is named, also while the training goes on."""
    run = tmp_path / "run"
    shutil.copytree(trained / "lora", run)
    sealed = read_json(run / "run_config.json")
    write_json(run / "run_config.json", sealed | {"settings": sealed["settings"] | {"inference": "resize"}})
    (run / "final.json").unlink()
    whole, best = measured(run), measured(run / "segmenter")
    assert whole == best
    assert whole["inference"] == "resize"


def test_nothing_to_measure_is_said(folder, trained, tmp_path, measured):
    root = tmp_path / "discs"
    shutil.copytree(folder / "discs", root)
    for path in (root / "masks").iterdir():
        Image.fromarray(np.full((60, 90), 7, np.uint8)).save(path)
    options = ["--data-option", "instance=false", "--data-option", "class_map={0: background, 1: disc, 7: ignore}"]
    with pytest.raises(MasksError, match=r"all pixels of the 3 masks are ignored \(d08, d09, d10\).*another split"):
        measured(trained / "lora", "--data-root", root, *options)


def test_other_classes_and_other_encoders_are_refused(folder, trained, tmp_path, monkeypatch):
    run = trained / "lora"
    words = ["--segmenter", run, *data_of(folder), "--output", tmp_path / "x.json"]
    with pytest.raises(
        ConfigError, match=r"tells 2 classes apart \(background, disc\), but the data set has 2 \(background, nu"
    ):
        call(monkeypatch, segment_evaluate, *words, "--data-option", "instance=nucleus")
    write_own_encoder(tmp_path / "other.pth", seed=1)
    with pytest.raises(WeightsError, match="was trained on another encoder"):
        call(monkeypatch, segment_evaluate, *words, "--weights", tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="0 images are to be pictured; give at least 1"):
        call(monkeypatch, segment_evaluate, *words, "--picture", tmp_path / "x.png", "--pictured", "0")
    assert not (tmp_path / "x.json").exists()


def test_files_of_the_public_tool_are_measured(folder, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    state = {"classifier.weight": torch.randn(2, 48, 1, 1, generator=generator), "classifier.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "public.pt")
    words = ["--segmenter", tmp_path / "public.pt", *data_of(folder), "--output", tmp_path / "x.json"]
    with pytest.raises(ConfigError, match=r"public\.pt does not say which size it was trained on; give --img-dim"):
        call(monkeypatch, segment_evaluate, *words)
    call(monkeypatch, segment_evaluate, *words, "--img-dim", "48", "64")
    assert read_json(tmp_path / "x.json")["settings"] == {"trainable": "decoder", "decoder": "linear"}


@pytest.mark.parametrize("doublings", [2, 3])
def test_pyramids_of_the_public_tool_are_what_their_version_makes_of_them(
    folder, tmp_path, measured, caplog, doublings
):
    """Their files do not tell which of two it is; both are measured and have a place in tables."""
    decoder = PublicFPNDecoder(48, 2, doublings)
    torch.save(decoder.state_dict(), tmp_path / "public.pt")
    words = ["--img-dim", "128", "128", "--fpn_doublings", doublings]
    told = measured(tmp_path / "public.pt", *words)
    name = {2: "public_fpn", 3: "public_fpn3"}[doublings]
    assert told["settings"]["decoder"] == name
    assert components("decoder", name) == "FPN decoder (dinov2-finetune)"
    assert f"taken is {doublings} times (--fpn-doublings)" in caplog.text
    assert TrainSettings(decoder=name).decoder == name


def test_corruptions_lower_what_is_measured(folder, trained, monkeypatch):
    run = trained / "lora"
    words = [
        "--segmenter",
        run,
        *data_of(folder),
        "--output",
        run / "corruptions.json",
        "--table",
        run / "corruptions.tsv",
    ]
    words += ["--kinds", "gaussian_noise", "contrast", "--severities", "1", "5", "--picture", run / "corruptions.png"]
    call(monkeypatch, segment_corruptions, *words)
    told = read_json(run / "corruptions.json")
    rows = {(row["kind"], row["severity"]): row["miou"] for row in told["rows"]}
    assert set(rows) == {(kind, severity) for kind in ("gaussian_noise", "contrast") for severity in (1, 5)}
    hardest = [rows["gaussian_noise", 5], rows["contrast", 5]]
    assert told["miou_level_5"] == pytest.approx(sum(hardest) / 2)
    assert told["relative_drop"] == pytest.approx(1 - sum(hardest) / 2 / told["miou_clean"])
    with pytest.raises(ConfigError, match=r"corruption 'gausian_noise' is unknown.*gaussian_noise"):
        call(monkeypatch, segment_corruptions, *words, "--kinds", "gausian_noise")


def test_corruptions_go_on_where_a_run_was_ended(folder, trained, monkeypatch, tmp_path):
    output, measured, ended_at = tmp_path / "corruptions.json", [], 2
    words = ["--segmenter", trained / "lora", *data_of(folder), "--output", output, "--kinds", "contrast", "pixelate"]
    words += ["--severities", "1", "5"]
    measure = Asked.measure

    def counted(asked, description, change=None):
        if len(measured) == ended_at:
            raise KeyboardInterrupt
        measured.append(description)
        return measure(asked, description, change)

    monkeypatch.setattr(Asked, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, segment_corruptions, *words)
    assert measured == ["measuring images as they are", "contrast, severity 1"] and not output.exists()
    ended_at = None
    call(monkeypatch, segment_corruptions, *words)
    assert measured[2:] == ["contrast, severity 5", "pixelate, severity 1", "pixelate, severity 5"]
    pieced = output.read_bytes()
    assert list(tmp_path.iterdir()) == [output]

    monkeypatch.setattr(Asked, "measure", measure)
    call(monkeypatch, segment_corruptions, *words)
    assert output.read_bytes() == pieced


@pytest.mark.parametrize(
    "left", [b"{", b'{"identity": 1}', b'{"identity": ["another"], "mious": {"contrast, severity 1": 1.0}}']
)
def test_what_another_question_left_is_not_taken(folder, trained, monkeypatch, tmp_path, left):
    output = tmp_path / "corruptions.json"
    (tmp_path / ".corruptions.json.begun").write_bytes(left)
    words = ["--segmenter", trained / "lora", *data_of(folder), "--output", output]
    call(monkeypatch, segment_corruptions, *words, "--kinds", "contrast", "--severities", "1")
    assert read_json(output)["rows"][0]["miou"] < 1.0
    assert list(tmp_path.iterdir()) == [output]
