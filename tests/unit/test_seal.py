"""What may change when a run goes on, and what may not."""

from pathlib import Path

import pytest

from dinoscope.errors import SealError
from dinoscope.files import read_json, write_json
from dinoscope.recipe import load_recipe
from dinoscope.train.seal import (
    check_seal,
    compare_order,
    compare_reader,
    compare_with_seal,
    read_seal,
    seal_run,
    write_config,
)

RECIPE = Path(__file__).resolve().parents[2] / "config" / "runs" / "tiny.yaml"
INPUTS = {"manifest": "abc", "weights": "def", "continues": None, "gram_teacher": None}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    seal_run(tmp_path / "run", load_recipe(RECIPE), 16, INPUTS, "somewhere")
    (tmp_path / "run/ckpt/9").mkdir(parents=True)
    (tmp_path / "run/ckpt/9/.metadata").touch()
    return tmp_path / "run"


def test_a_run_without_a_checkpoint_is_sealed_anew(run: Path) -> None:
    (run / "ckpt/9/.metadata").unlink()
    (run / "training_metrics.json").touch()
    changed = ["optim.lr=5e-3"]
    check_seal(run, RECIPE, changed)
    seal_run(run, load_recipe(RECIPE, changed), 16, INPUTS, "somewhere")
    assert read_seal(run)["settings"]["optim.lr"] == 5e-3
    assert not (run / "training_metrics.json").exists()


def test_a_run_never_started_passes(tmp_path: Path) -> None:
    check_seal(tmp_path / "new", RECIPE)


def test_unchanged_and_harmless_changes_pass(run: Path) -> None:
    harmless = ["optim.epochs=20", "train.num_workers=0", "checkpointing.period=7", "train.log_every=1"]
    check_seal(run, RECIPE, harmless)
    seal = compare_with_seal(run, load_recipe(RECIPE, harmless), 16)
    assert (seal["inputs"], seal["epochs"]) == (INPUTS, 10)
    assert load_recipe(run / "config.yaml").optim.epochs == 10  # something else may still refuse the run
    write_config(run, load_recipe(RECIPE, harmless))
    assert load_recipe(run / "config.yaml").optim.epochs == 20


def test_keys_that_came_later_had_the_effect_of_their_defaults(run: Path) -> None:
    path = run / "run_config.json"
    seal = read_json(path)
    del seal["settings"]["student.trainable"]
    write_json(path, seal)
    check_seal(run, RECIPE)
    with pytest.raises(SealError, match=r"student\.trainable was 'full' and is now 'norms'"):
        check_seal(run, RECIPE, ["student.trainable=norms"])


def test_other_stains_or_strata_are_refused(run: Path) -> None:
    seal = {"inputs": {"strata": "a", "stains": "b"}}
    compare_order(run, seal, "a", "b")
    with pytest.raises(SealError, match="column stain of the slide table has changed"):
        compare_order(run, seal, "a", "c")
    with pytest.raises(SealError, match="these columns of the slide table have changed"):
        compare_order(run, seal, "c", "b")


def test_another_reader_of_slides_is_refused(tmp_path: Path) -> None:
    sealed, changed = "my_formats:ISyntax 0123456789abcdef", "my_formats:ISyntax fedcba9876543210"
    for before, now in ((sealed, changed), (sealed, None), (None, sealed), (sealed, "others:ISyntax 0123456789abcdef")):
        with pytest.raises(
            SealError, match=r"run main was started with slides read by slides\.reader .* put the reader"
        ):
            compare_reader(tmp_path / "main", {"inputs": {"reader": before}}, now)
    for same in (sealed, None):
        compare_reader(tmp_path / "main", {"inputs": {"reader": same}}, same)
        compare_reader(tmp_path / "main", {"inputs": {}}, same)  # started before readers were sealed


def test_fewer_tiles_at_once_are_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    divided = ["train.batch_size_per_gpu=4", "train.accumulation_steps=2"]
    compare_with_seal(run, load_recipe(RECIPE, divided), 16)
    assert "with 8 tiles a forward and goes on with 4" in caplog.text


def test_a_changed_setting_is_refused_and_nothing_is_lost(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for refuse in (
        lambda: check_seal(run, RECIPE, ["optim.lr=5e-3"]),
        lambda: compare_with_seal(run, load_recipe(RECIPE, ["optim.lr=5e-3"]), 16),
    ):
        with pytest.raises(SealError, match=r"optim\.lr was 0\.004 and is now 0\.005.*new run name"):
            refuse()
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_another_batch_is_refused_however_it_comes_about(run: Path) -> None:
    compare_with_seal(run, load_recipe(RECIPE, ["train.batch_size_per_gpu=16"]), 16)  # one process instead of two
    with pytest.raises(SealError, match=r"started with 16 tiles a step .* go on with 8: start as many processes"):
        compare_with_seal(run, load_recipe(RECIPE), 8)


def test_a_run_shorter_than_what_is_done_is_refused(run: Path) -> None:
    (run / "ckpt/199").mkdir()
    (run / "ckpt/199/.metadata").touch()
    for refuse in (check_seal, lambda run, _, overrides: compare_with_seal(run, load_recipe(RECIPE, overrides), 16)):
        with pytest.raises(SealError, match=r"has done 200 iterations and optim\.epochs now asks for 150"):
            refuse(run, RECIPE, ["optim.epochs=10"])


def test_checkpoints_without_a_seal_are_not_trusted(run: Path) -> None:
    (run / "run_config.json").unlink()
    with pytest.raises(SealError, match=r"its run_config\.json is gone"):
        check_seal(run, RECIPE)


def test_results_name_weight_files_without_their_folders(tmp_path: Path) -> None:
    config = load_recipe(RECIPE, ["MODEL.WEIGHTS=/secret/place/weights.pth"])
    seal_run(tmp_path, config, 16, INPUTS, "somewhere")
    assert "secret" not in "".join(path.read_text() for path in tmp_path.iterdir())
    assert load_recipe(tmp_path / "config.yaml").MODEL.WEIGHTS == "weights.pth"
