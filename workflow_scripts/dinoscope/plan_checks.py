"""The checks behind plan.make_plan: each yields one sentence a problem."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoscope import user_code
from dinoscope.data.sources import is_class_name
from dinoscope.errors import ConfigError
from dinoscope.evaluate.baseline_names import BASELINES
from dinoscope.names import nearest
from dinoscope.plan_runs import planned_runs
from dinoscope.recipe import require_weights
from dinoscope.recipe_checks import check_processes
from dinoscope.resolutions import resolutions
from dinoscope.schema import problems, read_schema, with_defaults
from dinoscope.slides.remote import remote_address

if TYPE_CHECKING:
    from dinoscope.plan import Plan

__all__ = [
    "BASE",
    "TARGETS",
    "base_problems",
    "check_config",
    "file_problems",
    "process_problems",
    "remote_problems",
    "window_problems",
]

BASE = "base"
# Rules of the workflow; a run's name is a target too and must differ from them.
TARGETS = (
    "all", "budget", "cluster_examples", "cluster_fit", "cluster_map", "clusters", "compare_models", "convert",
    "demo_biopsies", "demo_slides", "described_patches", "described_tiles", "embed_images", "embed_samples",
    "evaluate", "evaluation_summary", "evaluation_units", "export", "export_features", "export_features_anndata",
    "export_features_clam", "export_features_parquet", "export_features_stamp", "export_features_wsidata",
    "export_hf", "export_onnx", "export_timm", "extract_features", "features", "initial_weights", "inspect",
    "inspect_slide", "list_features", "list_sampled", "manifest", "measure_model", "merge_manifest", "pack_index",
    "pack_slide", "pca", "pca_compare", "pca_fit", "pca_map", "pca_region", "pilot", "pilot_compare", "pilot_summary",
    "plot_metrics", "probe_set", "random_weights", "report", "sample_tiles", "segment_compare", "segment_corruptions",
    "segment_evaluate", "segment_predict_slide", "segment_train", "segmentation", "slide_table", "slides_report",
    "split_slides", "tile_slide", "tiles", "train", "upload", "upload_file", "viewer", "viewer_pyramid",
    "viewer_sample", "viewer_tiles",
)  # fmt: skip
_FOLDERS = ("compare", "maps", "regions")  # lie beside those of the models

# formats whose slide is more than the file that is opened
_SEVERAL_FILES = (".mrxs", ".vms", ".vmu", ".vsi", ".dcm")

_CROPS = ("crops.global_crops_size", "crops.local_crops_size", "crops.gram_teacher_crops_size")


def check_config(config: Mapping[str, Any], workflow_dir: Path) -> dict[str, Any]:
    """The config with its defaults filled in.

    Raises:
        ConfigError: One sentence for each key that is unknown (with the nearest known one), missing or of a wrong
            value, and for names that refer to nothing.
    """
    schema = read_schema(workflow_dir / "config" / "schemas" / "config.schema.yaml")
    checked = with_defaults(dict(config), schema)
    found = [f"config: {problem}" for problem in problems(checked, schema)]
    if not found:
        found = [f"config: {problem}" for problem in _reference_problems(checked)]
    if found:
        raise ConfigError("\n".join(found))
    return checked


def base_problems(plan: "Plan") -> Iterator[str]:
    """Starting weights that are missing, or other than the first run's; there is one set a workflow.

    Repeats of a run with other seeds start from the same weights too.
    """
    first = plan.base_run
    wanted = first.start
    for run in plan.written_runs.values():
        if run.continues is not None:
            continue
        try:
            require_weights(run.recipe, run.settings)
        except ConfigError as error:
            yield f"runs.{run.name}: {error}"
        start = wanted if run is first else run.start
        differing = [key for key, value in start.items() if value != wanted[key]]
        if differing:
            key = differing[0]
            yield (
                f"runs.{run.name} starts from other weights than runs.{first.name} ({key} is {start[key]!r} and "
                f"{wanted[key]!r}): all runs of a config start from one base; give it a config with "
                "results of its own"
            )


def process_problems(plan: "Plan") -> Iterator[str]:
    """Batches that do not suit the number of training processes, where the config says it."""
    processes = plan.config["launch"]["processes"]
    if not str(processes).isdecimal():
        return
    for run in plan.written_runs.values():
        try:
            check_processes(run.settings, int(processes))
        except ConfigError as error:
            yield f"runs.{run.name}, launch.processes {processes}: {error}"


def remote_problems(plan: "Plan") -> Iterator[str]:
    """Slides on object storage that Snakemake could not fetch, or that training would open one by one."""
    source = plan.config["slides"]["source"]
    for slide_id in plan.remote_slides:
        path = plan.slides[slide_id].path
        if path.suffix.lower() in _SEVERAL_FILES or not path.suffix:
            yield (
                f"slide {slide_id}: {remote_address(path)} has several files, of which storage would bring one: "
                f"convert it to a file such as TIFF, or give a path of this machine in {source}"
            )
            return
    remote = set(plan.remote_slides)
    for name in plan.trained_runs:
        run = plan.runs[name]
        if remote.intersection(plan.train_slides) and run.own_data is None and not plan.is_packed(run):
            yield (
                f"runs.{name}: training opens slides at random, and those of {source} lie on object storage: set "
                "packing.enabled to true, which brings each of them once"
            )
            return


def window_problems(plan: "Plan") -> Iterator[str]:
    """Crops larger than the tiles that they are cut from."""
    for run in plan.written_runs.values():
        if run.own_data is not None:
            continue
        tile_px = plan.config["tiling"]["sets"][run.tile_set]["tile_px"]
        sizes = [dict(zip(_CROPS, sizes, strict=False)) for sizes in resolutions(run.settings)]
        key, crop_px = max(
            ((key, px or 0) for of_step in sizes for key, px in of_step.items()), key=lambda item: item[1]
        )
        if crop_px > tile_px:
            yield (
                f"runs.{run.name}: {key} is {crop_px} px, but tiles of set {run.tile_set} have {tile_px}: "
                f"raise tiling.sets.{run.tile_set}.tile_px or take smaller crops"
            )


def file_problems(plan: "Plan") -> Iterator[str]:
    """Weights, images and teachers that do not exist; slides are looked for when a job needs them (plan_slides.py)."""
    yield from _annotation_problems(plan)
    yield from _encoder_problems(plan)
    weights = plan.base_run.settings.MODEL.WEIGHTS
    if weights and not Path(weights).exists():
        yield f"recipe {plan.base_run.recipe}: MODEL.WEIGHTS {weights} does not exist"
    for run in plan.written_runs.values():
        data = run.own_data
        if data is not None and not Path(data).is_dir() and not is_class_name(data):
            yield f"recipe {run.recipe}: train.dataset_path {data} is neither a folder of images nor module:Class"
        teacher = run.gram_teacher_file
        if teacher is not None and not teacher.exists():
            yield f"config: runs.{run.name}.gram_teacher {teacher} does not exist; give last, an iteration or a file"
        if run.distilled_file is not None and not run.distilled_file.exists():
            yield f"recipe {run.recipe}: distillation.checkpoint_path {run.distilled_file} does not exist"


def _encoder_problems(plan: "Plan") -> Iterator[str]:
    """Encoders whose files are not there."""
    for name, encoder in plan.encoders.items():
        source, key = encoder["source"], f"config: features.encoders.{name}"
        if user_code.is_function_name(source) and not Path(source).exists():
            file = user_code.function_file(source)
            if file is not None and not file.is_file():
                yield f"{key}.source {source}: {file} does not exist; give module:function or FILE.py:function"
        elif not Path(source).exists():
            yield (
                f"{key}.source {source} does not exist; give the file or folder of a model, module:function or "
                "FILE.py:function"
            )
        for file in encoder["files"]:
            if not Path(file).exists():
                yield f"{key}.files: {file} does not exist"


def _annotation_problems(plan: "Plan") -> Iterator[str]:
    """A folder of annotations that is missing or of other slides, and slides that should have some and have none."""
    tissue = plan.config["tissue"]
    folder = tissue["annotations"]
    if folder is None:
        return
    if not Path(folder).is_dir():
        yield f"config: tissue.annotations {folder} is no folder; give one with a file SLIDE.geojson a slide"
        return
    missing = [slide for slide in plan.slides if slide not in plan.annotation_files]
    if missing and tissue["method"] == "annotations":
        more = f" and {len(missing) - 1} more slides" if len(missing) > 1 else ""
        yield (
            f"slide {missing[0]}{more}: {folder} has no {missing[0]}.geojson, which tissue.method annotations needs; "
            "outline the tissue, or set tissue.method to auto for slides without"
        )
    elif len(missing) == len(plan.slides):
        yield f"config: tissue.annotations {folder} has no file named after a slide, such as {missing[0]}.geojson"


def _reference_problems(config: dict[str, Any]) -> Iterator[str]:
    """Names that refer to nothing, and runs that clash or go round in circles."""
    reader = config["slides"]["reader"]
    if reader is not None and not user_code.is_class_name(reader):
        yield f"slides.reader is {reader!r}, but must read module:Class, e.g. my_formats:ISyntax"
    sets, runs = config["tiling"]["sets"], config["runs"]
    references = [("features.set", config["features"]["set"], sets)]
    references += [(f"runs.{name}.tile_set", run["tile_set"], sets) for name, run in runs.items()]
    references += [(f"runs.{name}.continues", run["continues"], runs) for name, run in runs.items() if run["continues"]]
    encoders = config["features"]["encoders"]
    models = [BASE, *(planned.name for planned in planned_runs(runs)), *encoders]
    references += [("features.models", model, models) for model in config["features"]["models"] or ()]
    own_sets = {name: encoder["set"] for name, encoder in encoders.items() if encoder["set"] is not None}
    references += [(f"features.encoders.{name}.set", tile_set, sets) for name, tile_set in own_sets.items()]
    for key, name, known in references:
        if name not in known:
            yield f"{key} is {name!r}, which is not defined{nearest(name, known)}; known are {', '.join(known)}"
    for name, run in runs.items():
        if name in (*TARGETS, *_FOLDERS, *BASELINES, BASE):
            yield f"runs.{name}: this name is taken by a part of the workflow; give the run another"
        teacher = run["gram_teacher"]
        if run["continues"] is None and (teacher == "last" or str(teacher).isdecimal()):
            yield f"runs.{name}.gram_teacher is {teacher}, but the run continues none: name a file or set `continues`"
    for name in (*runs, *encoders):
        if name in (f"{config['pilot']['name']}-{arm}" for arm in config["pilot"]["arms"]):
            yield f"{name} is the name of a run of the pilot; give the run or encoder another, or change pilot.name"
    for name in encoders:
        if name in (*TARGETS, *_FOLDERS, *BASELINES, BASE) or name in runs:
            taken_by = "a run" if name in runs else "a part of the workflow"
            yield f"features.encoders.{name}: this name is taken by {taken_by}; give the encoder another"
    yield from _clashes(config)
    taken_from = {"features.set": config["features"]["set"]}
    taken_from |= {f"features.encoders.{name}.set": tile_set for name, tile_set in own_sets.items()}
    for key, tile_set in taken_from.items():
        if tile_set in sets and isinstance(sets[tile_set]["mpp"], list):
            yield (
                f"{key} is {tile_set}, which mixes several mpp ({', '.join(map(str, sets[tile_set]['mpp']))}), but "
                "a feature file holds one kind of tiles; name a set with one mpp"
            )
    upsample = config["pca"]["upsample"]
    if upsample not in ("jbu", "none") and not user_code.is_class_name(upsample):
        yield f"pca.upsample is {upsample!r}, but must be jbu, none or module:callable, e.g. my_code:featup"
    if config["tissue"]["method"] == "annotations" and config["tissue"]["annotations"] is None:
        yield "tissue.method is annotations, but tissue.annotations names no folder; give one with SLIDE.geojson files"
    yield from _circle_problems(runs)


def _clashes(config: dict[str, Any]) -> Iterator[str]:
    """Repeats and controls whose names are taken."""
    pilot, runs = config["pilot"], config["runs"]
    taken = dict.fromkeys((*TARGETS, *_FOLDERS, *BASELINES, BASE), "a part of the workflow")
    taken |= dict.fromkeys((f"{pilot['name']}-{arm}" for arm in pilot["arms"]), "a run of the pilot")
    taken |= dict.fromkeys(config["features"]["encoders"], "an encoder")
    taken |= {name: f"runs.{name}" for name in runs}
    for planned in planned_runs(runs):
        if planned.of is None:
            continue
        if planned.name in taken:
            yield (
                f"{planned.key} adds a run {planned.name}, but that is the name of {taken[planned.name]}: give one of "
                f"both another name, or leave out {planned.key}"
            )
        taken[planned.name] = f"another run that {planned.key} adds"


def _circle_problems(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name in runs:
        seen, current = [name], runs[name]["continues"]
        while current in runs and current not in seen:
            seen.append(current)
            current = runs[current]["continues"]
        if current == name:
            circle = " -> ".join([*seen, name])
            yield f"runs.{name}.continues leads back to itself: {circle}; one run must continue none"
            return
