"""The checked plan, constants and input functions that all rules share."""

import os
import sys
from pathlib import Path

SCRIPTS = Path(workflow.basedir) / "workflow_scripts"
sys.path.insert(0, str(SCRIPTS))
# Jobs find the Python that Snakemake runs on, also when its environment is not activated.
os.environ.update(
    PATH=os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
)

from dinoscope.demands import grown
from dinoscope.evaluate.baseline_names import BASELINES
from dinoscope.file_lists import file_arguments
from dinoscope.files import write_json
from dinoscope.plan import make_plan, one_sentence
from dinoscope.plan_evaluation import SHIFTS, EvaluationJobs
from dinoscope.plan_features import EXPORT_FILES, FeatureJobs
from dinoscope.plan_pictures import PictureJobs
from dinoscope.plan_pilot import PilotJobs
from dinoscope.plan_segmentation import SegmentJobs
from dinoscope.plan_slides import SlideJobs
from dinoscope.plan_storage import StorageJobs
from dinoscope.train.seal import check_seal

PLAN = one_sentence(make_plan)(
    config, Path(workflow.basedir), check_files=workflow.is_main_process
)
SLIDES = SlideJobs(PLAN)
FEATURES = FeatureJobs(PLAN)
PICTURES = PictureJobs(PLAN)
SEGMENTS = one_sentence(SegmentJobs)(PLAN)
EVALUATION = EvaluationJobs(PLAN, FEATURES)
STORAGE = StorageJobs(PLAN, EVALUATION, SEGMENTS)
PILOT = PilotJobs(PLAN)
one_sentence(EVALUATION.check)()

if workflow.is_main_process:
    one_sentence(SEGMENTS.check_options)()
    os.environ.update(one_sentence(PLAN.visible_gpus)(os.environ))
    for note in [*PLAN.notes(), *EVALUATION.notes()]:
        print(f"note: {note}", file=sys.stderr)


pathvars:
    results=PLAN.config["results"],
    logs="logs",
    benchmarks="logs/benchmarks",


wildcard_constraints:
    slide="[^/]+",
    set="|".join(PLAN.config["tiling"]["sets"]),
    run="|".join([*PLAN.runs, *PILOT.arms]),
    model="|".join(["base", *PLAN.runs, *PLAN.encoders, *BASELINES, *PILOT.arms]),
    exported="|".join(["base", *PLAN.runs]),
    task="|".join([*EVALUATION.tasks, *SEGMENTS.tasks]) or "-",
    variant="|".join(SEGMENTS.all_variants) or "-",


def plan_of(name):
    """The plan that knows a run or model: that of the pilot for its arms, which is made for them alone."""
    return PILOT.plan if name in PILOT.arms else PLAN


def run_of(wildcards):
    """The run that a job belongs to."""
    return plan_of(wildcards.run).runs[wildcards.run]


def features_of(model):
    """What knows how features of a model are made."""
    return PILOT.features if model in PILOT.arms else FEATURES


def evaluation_of(name):
    """What knows how a run or model is measured."""
    return PILOT.evaluation if name in PILOT.arms else EVALUATION


def config_file():
    """The config that counts: the last one of the command line, else config/config.yaml."""
    return Path([*workflow.configfiles, *workflow.overwrite_configfiles][-1])


def written_config(wildcards, resources):
    """The config that counts, with all that the command line adds, as a file for a script that plans by itself."""
    path = Path("logs/budget_config.json")
    if not workflow.dryrun:
        write_json(path, config)
    return path


def rule_groups(wildcards, resources):
    """RULE=GROUP of all rules that have one; local for those that no cluster gets.

    `rule.group` itself says None wherever nothing is submitted.
    """
    groups = {
        each.name: "local" if each.name in workflow._localrules else each._group
        for each in workflow.rules
    }
    return [f"{name}={group}" for name, group in groups.items() if group]


def growing(base, per_gb=0, of=None):
    """A resource that grows with the size of the job's input (of the inputs of these names), and with each attempt."""

    def demand(wildcards, input, attempt):
        files = input if of is None else [input[name] for name in of]
        return grown(base, per_gb, files, attempt)

    return demand


def all_gpus(wildcards):
    """All GPUs that jobs of this machine may take (--resources gpu=4); a cluster's profile says its own number."""
    return (
        workflow.global_resources["gpu"].value or 1
        if "gpu" in workflow.global_resources
        else 1
    )


def not_a_trigger(value):
    """A param that reruns nothing when it changes: Snakemake records no param that depends on resources."""
    return one_sentence(lambda wildcards, resources: value)


def of_slides(pattern, slides, **values):
    """Input function for a file of each slide (and each of other values).

    A list in its place would be gone through whenever the workflow is read, by every job of a cluster too.
    """
    return one_sentence(lambda wildcards: expand(pattern, slide=slides, **values))


def input_files(name):
    """The job's input files of that name as arguments, or as a list where a command line could not hold them.

    No trigger, since the files themselves are one.
    """
    return one_sentence(
        lambda wildcards, input, resources: file_arguments(
            input[name], Path("logs/lists"), write=not workflow.dryrun
        )
    )


@one_sentence
def uploaded(wildcards):
    """Results on object storage."""
    return [storage.s3(address) for address in STORAGE.objects()]


onstart:
    FEATURES.write_wanted(workflow.dag.needrun_jobs(), Path("logs/extract_features"))


onsuccess:
    for note in [*PLAN.manifest_notes(), *SLIDES.closing_notes()]:
        print(f"note: {note}", file=sys.stderr)


onerror:
    for note in SLIDES.closing_notes():
        print(f"note: {note}", file=sys.stderr)
