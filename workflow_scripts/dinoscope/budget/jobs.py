"""How many jobs Snakemake will run for a plan, rule by rule, and how many a cluster gets of them."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import yaml

from dinoscope.evaluate.baseline_names import BASELINES
from dinoscope.plan import Plan
from dinoscope.plan_evaluation import EvaluationJobs
from dinoscope.plan_features import EXPORT_FILES, FeatureJobs
from dinoscope.plan_pictures import PictureJobs
from dinoscope.plan_segmentation import SegmentJobs

__all__ = ["count_jobs", "featured_slides", "profile_groups", "submitted"]


def count_jobs(plan: Plan) -> Counter[str]:
    """Rule -> jobs of `snakemake` without a target, with nothing made yet; their number for 40,000 takes no planning.

    Tested against Snakemake's own plan (tests/workflow/test_budgeted_jobs.py).
    """
    slides, used, models = len(plan.slides), len(plan.feature_slides), len(plan.models)
    formats, clusters = plan.config["export"]["formats"], plan.config["pca"]["clusters"]
    viewer, runs = plan.config["viewer"]["enabled"], _made_runs(plan)
    sets = dict.fromkeys(run.tile_set for run in map(plan.runs.get, runs) if run and run.own_data is None)
    packed = dict.fromkeys(run.tile_set for run in map(plan.runs.get, runs) if run and plan.is_packed(run))
    jobs = Counter(
        demo_slides=int(bool(plan.demo_slides())),
        demo_biopsies=int(bool(plan.demo_biopsies())),
        inspect_slide=slides,
        slides_report=1,
        tile_slide=slides,
        split_slides=1,
        merge_manifest=len(sets),
        slide_table=1,
        pack_slide=len(packed) * len(plan.train_slides),
        pack_index=len(packed),
        initial_weights=int(bool(plan.own_models or runs)),
        train=len(runs),
        convert=len(_converted(plan)),
        plot_metrics=len(plan.trained_runs),
        extract_features=sum(len(featured_slides(plan, model)) for model in plan.measured_models),
        list_features=models,
        pca_fit=models,
        pca_map=models * used,
        pca_compare=used,
        pca_region=len(PictureJobs(plan).regions),
        cluster_fit=models if clusters else 0,
        cluster_map=used if clusters else 0,
        cluster_examples=models if clusters and not plan.remote_slides else 0,
        viewer_pyramid=used if viewer else 0,
        list_sampled=models if viewer else 0,
        viewer_sample=models if viewer else 0,
        viewer_tiles=models * used if viewer else 0,
        viewer=int(viewer),
        report=1,
        all=1,
    )
    jobs.update({f"export_{name}": len(plan.written_runs) for name in formats})
    jobs.update({f"export_features_{name}": models * used for name in plan.config["features"]["export"]})
    assert set(plan.config["features"]["export"]) <= set(EXPORT_FILES)
    return +(jobs + _evaluation_jobs(plan) + _segmentation_jobs(plan))


def _evaluation_jobs(plan: Plan) -> Counter[str]:
    """Of the evaluation, where there is anything to ask."""
    evaluation = EvaluationJobs(plan, FeatureJobs(plan))
    probed = Counter(probe_set=int(any(evaluation.is_probed(run) for run in _made_runs(plan))))
    if not (plan.config["evaluation"]["enabled"] and evaluation.tasks):
        return probed
    asked = [(task, model) for task in evaluation.tasks for model in evaluation.models(task)]
    sampled = {model for task, model in asked if evaluation.sampled_features(task, model)}
    patched = {file for task, model in asked for file in evaluation.patch_files(task, model).values()}
    patched = {file for file in patched if Path(file).parent.name == "patches"}
    return probed + Counter(
        described_tiles=int(bool(patched)),
        described_patches=len(patched),
        evaluation_units=len(evaluation.tasks),
        embed_images=sum(task in evaluation.image_tasks for task, _ in asked),
        sample_tiles=len({file for model in sampled for file in evaluation.samples(model)}),
        embed_samples=len(sampled),
        extract_features=len(
            {
                file
                for task, model in asked
                if task not in evaluation.image_tasks and model in BASELINES
                for file in evaluation.features(task, model)
            }
        ),
        random_weights=int(any(model == "random" for _, model in asked)),
        measure_model=len(asked),
        compare_models=len(evaluation.tasks),
        evaluation_summary=1,
    )


def _segmentation_jobs(plan: Plan) -> Counter[str]:
    """Of the tasks of segmentation."""
    segments = SegmentJobs(plan)
    trained = len(segments.folders())
    return Counter(
        segment_train=trained,
        segment_evaluate=trained,
        segment_corruptions=len(segments.folders(corrupted=True)),
        segment_compare=int(bool(segments.tasks)),
        segment_predict_slide=len(segments.slide_maps()),
    )


def featured_slides(plan: Plan, model: str) -> list[str]:
    """Slides whose features by a model are made: those that want them, and those that its colours are fitted on.

    Of repeats and controls, which nothing shows, those that it is measured on.
    """
    if model not in plan.models:
        evaluation = EvaluationJobs(plan, FeatureJobs(plan))
        tasks = evaluation.tasks if plan.config["evaluation"]["enabled"] else []
        of_slides = [task for task in tasks if task not in evaluation.image_tasks]
        measured = {slide for task in of_slides for slide in evaluation.slides(task)}
        return [slide_id for slide_id in plan.slides if slide_id in measured]
    wanted = {*plan.feature_slides, *plan.basis_slides(model)}
    return [slide_id for slide_id in plan.slides if slide_id in wanted]


def _made_runs(plan: Plan) -> list[str]:
    """Runs that are trained: those whose models are asked for, and with export.formats all of the config."""
    exported = plan.written_runs if plan.config["export"]["formats"] else ()
    return list(dict.fromkeys([*plan.trained_runs, *exported]))


def _converted(plan: Plan) -> set[str]:
    """Runs whose model is wanted: of those that are shown, measured or exported; not all that others continue."""
    measured = plan.config["evaluation"]["enabled"] and EvaluationJobs(plan, FeatureJobs(plan)).tasks
    wanted = {*(plan.measured_models if measured else plan.own_models)}
    wanted |= {*(plan.written_runs if plan.config["export"]["formats"] else ())}
    return wanted & plan.runs.keys()


def submitted(jobs: Mapping[str, int], groups: Mapping[str, str], components: Mapping[str, int]) -> int:
    """Jobs that a cluster's scheduler gets: grouped ones so many at a time, local ones not at all.

    Args:
        jobs: Rule -> jobs.
        groups: Rule -> group, or "local" for rules that the main process runs itself.
        components: Group -> jobs that are submitted as one.
    """
    total = 0
    for rule, count in jobs.items():
        group = groups.get(rule)
        if group != "local":
            total += math.ceil(count / components.get(group, 1)) if group else count
    return total


def profile_groups(profile: Path) -> tuple[dict[str, str], dict[str, int]] | None:
    """What a profile says of groups: rule -> group, and group -> jobs submitted as one; None if it has no executor."""
    try:
        told = yaml.safe_load(profile.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    if not isinstance(told, dict) or "executor" not in told:
        return None
    groups, components = (_pairs(told.get(key) or {}) for key in ("groups", "group-components"))
    return groups, {group: int(number) for group, number in components.items()}


def _pairs(told: Mapping[str, object] | list[str]) -> dict[str, str]:
    """A mapping, or a list of NAME=VALUE, as profiles may have either."""
    if isinstance(told, list):
        return dict(part.split("=", 1) for part in told)
    return {str(name): str(value) for name, value in told.items()}
