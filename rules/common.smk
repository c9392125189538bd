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

from dinoscope.evaluate.baseline_names import BASELINES
from dinoscope.file_lists import file_arguments
from dinoscope.plan import make_plan, one_sentence
from dinoscope.plan_evaluation import EvaluationJobs
from dinoscope.plan_features import EXPORT_FILES, FeatureJobs
from dinoscope.plan_pictures import PictureJobs
from dinoscope.plan_slides import SlideJobs
from dinoscope.train.seal import check_seal

PLAN = one_sentence(make_plan)(
    config, Path(workflow.basedir), check_files=workflow.is_main_process
)
SLIDES = SlideJobs(PLAN)
FEATURES = FeatureJobs(PLAN)
PICTURES = PictureJobs(PLAN)
EVALUATION = EvaluationJobs(PLAN, FEATURES)
one_sentence(EVALUATION.check)()

if workflow.is_main_process:
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
    run="|".join(PLAN.runs),
    model="|".join([*PLAN.models, *BASELINES]),
    task="|".join(EVALUATION.tasks) or "none",
    exported="|".join(["base", *PLAN.runs]),


def config_file():
    """The config that counts: the last one of the command line, else config/config.yaml."""
    return Path([*workflow.configfiles, *workflow.overwrite_configfiles][-1])


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
def slide_path(wildcards):
    """What is opened to read the slide; nothing where it is missing and slides are skipped on error."""
    return SLIDES.input_of(wildcards.slide)


@one_sentence
def slide_path_if_any(wildcards):
    """What is opened to read the slide; nothing where it is missing."""
    return SLIDES.input_of(wildcards.slide, may_be_missing=True)


@one_sentence
def slide_argument(wildcards, resources):
    """The same for the command line, whether it is there or not; no trigger, since the input is one."""
    path = str(PLAN.slide(wildcards.slide).path)
    return f"./{path}" if path.startswith("-") else path


@one_sentence
def own_reader(wildcards):
    """Arguments for a slide whose format OpenSlide does not know."""
    return SLIDES.own_reader(wildcards.slide)


def slide_options(stage=None, many=False):
    """Arguments for reading a slide, and what happens where that fails; no triggers."""
    return one_sentence(
        lambda wildcards, resources: SLIDES.options(
            wildcards.slide, stage and stage.format(wildcards=wildcards), many=many
        )
    )


def slide_attempt(stage):
    """Number of the attempt at a slide; a new one where a skipped slide is to be tried again."""
    return one_sentence(
        lambda wildcards: str(
            SLIDES.attempt(wildcards.slide, stage.format(wildcards=wildcards))
        )
    )


@one_sentence
def slide_members(wildcards):
    """The other files of the slide (MIRAX, VMS, DICOM)."""
    return PLAN.slide_members(wildcards.slide)


@one_sentence
def slide_mpp(wildcards):
    """Argument for the slide's micrometres a pixel, where table or config give it."""
    mpp = PLAN.slide_mpp(wildcards.slide)
    return [] if mpp is None else ["--slide-mpp", str(mpp)]


@one_sentence
def slide_annotations(wildcards):
    """Outlines of the slide's tissue that somebody has drawn, if any."""
    return PLAN.annotation_files.get(wildcards.slide, [])


@one_sentence
def tiling_arguments(wildcards):
    """One group of arguments for each tile set of a slide.

    Not a function of `output`: Snakemake records no param that depends on it, and changed sets must tile anew.
    """
    tiles = [
        str(PLAN.results / "tiles" / name / f"{wildcards.slide}.parquet")
        for name in PLAN.config["tiling"]["sets"]
    ]
    return PLAN.tiling_arguments(wildcards.slide, tiles)


@one_sentence
def train_tiles(wildcards):
    """Tile files of the slides that training sees."""
    return expand(
        "<results>/tiles/{set}/{slide}.parquet",
        set=wildcards.set,
        slide=PLAN.slides_to_train_on(),
    )


@one_sentence
def run_recipe(wildcards):
    """The run's recipe, refused while planning when a started run had other settings; nothing is deleted then."""
    run = PLAN.runs[wildcards.run]
    check_seal(PLAN.results / "runs" / run.name, run.recipe)
    return str(run.recipe)


def run_parents(wildcards):
    """The recipes that the run's recipe extends."""
    return [str(recipe) for recipe in PLAN.runs[wildcards.run].recipes[:-1]]


def kept_by_finished(file, wildcards):
    """A file that a run took in when it started: no news of it reruns a run that is finished.

    Not so while final.json is missing: Snakemake does not plan a job behind `ancient` in the same call in which that
    file is made again, even when the job's own output is missing.
    """
    finished = PLAN.results / "runs" / wildcards.run / "final.json"
    return ancient(file) if finished.is_file() else file


def run_manifest(wildcards):
    """The tiles that the run is trained on; none where its recipe names other data."""
    if PLAN.runs[wildcards.run].own_data is not None:
        return []
    tile_set = PLAN.runs[wildcards.run].tile_set
    return kept_by_finished(f"<results>/manifests/{tile_set}.parquet", wildcards)


@one_sentence
def packed_tiles(wildcards):
    """The packed files of the slides that training sees."""
    return expand(
        "<results>/packed/{set}/{slide}.arrow",
        set=wildcards.set,
        slide=PLAN.slides_to_train_on(),
    )


def run_packed(wildcards):
    """The index of the packed tiles that the run is trained on, if it is."""
    run = PLAN.runs[wildcards.run]
    if not PLAN.is_packed(run):
        return []
    return kept_by_finished(f"<results>/packed/{run.tile_set}/index.json", wildcards)


@one_sentence
def sampled_features(wildcards):
    """Features that the viewer's sample of tiles is drawn from."""
    slides = PLAN.sampled_slides(wildcards.model)
    return expand(
        "<results>/features/{model}/{slide}.h5", model=wildcards.model, slide=slides
    )


def viewer_page(wildcards):
    """The slide viewer, where it is wanted."""
    return ["<results>/viewer/index.html"] if PLAN.config["viewer"]["enabled"] else []


def run_weights(wildcards):
    """What the run starts from, unless it continues another."""
    return kept_by_finished("<results>/models/base/teacher.pth", wildcards)


def continued_run(wildcards):
    """What the run carries on with, if anything."""
    continued = PLAN.runs[wildcards.run].continues
    if continued is None:
        return []
    return kept_by_finished(f"<results>/runs/{continued}/final.json", wildcards)


def teacher_files(wildcards):
    """The gram teacher, where the config names a file, and the teacher that is distilled."""
    run = PLAN.runs[wildcards.run]
    files = [run.gram_teacher_file, run.distilled_file]
    return [
        kept_by_finished(str(file), wildcards) for file in files if file is not None
    ]


def launch_options(wildcards, output, resources):
    """Arguments of the launcher; no trigger, like all that depends on resources."""
    logs = Path(output.final).parent / "logs"
    return [
        "--processes",
        str(PLAN.config["launch"]["processes"]),
        "--log-dir",
        str(logs),
    ]


def run_probe(wildcards):
    """The images that the run is asked about while it trains, if it is."""
    if not EVALUATION.is_probed(wildcards.run):
        return []
    return kept_by_finished("<results>/evaluation/probe.npz", wildcards)


def run_data(wildcards, input):
    """Arguments for the tiles that the run is trained on."""
    slides = str(Path(PLAN.config["slides"]["source"]))
    packed = ["--packed", input.packed] if input.packed else []
    return (
        ["--manifest", input.manifest, "--slides", slides, *packed]
        if input.manifest
        else []
    )


def run_options(wildcards, input):
    """Arguments for what the run continues, and its gram teacher."""
    teacher = PLAN.runs[wildcards.run].gram_teacher
    continued = ["--continues", input.continued] if input.continued else []
    probe = ["--probe", input.probe] if input.probe else []
    return [
        *continued,
        *([] if teacher is None else ["--gram-teacher", teacher]),
        *probe,
    ]


def kept_exports(wildcards, resources):
    """Arguments for the exported teachers that other runs need; no trigger."""
    kept = PLAN.kept_exports(wildcards.run)
    return ["--keep-exports", *map(str, kept)] if kept else []


@one_sentence
def pca_maps(wildcards):
    """Maps of all slides by all models."""
    return expand(
        "<results>/pca/{model}/{slide}.png",
        model=PLAN.models,
        slide=PLAN.feature_slides,
    )


def exports(wildcards):
    """What the models of all runs are written as for other tools."""
    return expand(
        "<results>/models/{exported}/{format}/verification.json",
        exported=PLAN.runs,
        format=PLAN.config["export"]["formats"],
    )


@one_sentence
def basis_features(wildcards):
    """Features that the model's colours are fitted on."""
    slides = PLAN.basis_slides(wildcards.model)
    return expand(
        "<results>/features/{model}/{slide}.h5", model=wildcards.model, slide=slides
    )


def feature_tiles(wildcards):
    """The tiles that the model's features are taken from."""
    return FEATURES.tiles(wildcards.model)


def feature_tiles_folder(wildcards):
    """The folder of these tiles."""
    return f"{PLAN.results}/tiles/{FEATURES.tile_set(wildcards.model)}"


def encoder_files(wildcards):
    """The files of the model; features are made anew when they change."""
    return FEATURES.encoder_files(wildcards.model)


def encoder_arguments(wildcards):
    """Arguments that name the model."""
    return FEATURES.encoder_arguments(wildcards.model)


def feature_pooling(wildcards):
    """What is taken of a tile with the model."""
    return FEATURES.pooling(wildcards.model)


def wanted_slides(wildcards, resources):
    """The list of slides that jobs of this model may go on with; no trigger."""
    return f"logs/extract_features/{wildcards.model}/.wanted.json"


@one_sentence
def exported_features(wildcards):
    """Features of all slides by all models in the other formats that the config names."""
    return expand(FEATURES.exports(), model=PLAN.models, slide=PLAN.feature_slides)


onstart:
    FEATURES.write_wanted(workflow.dag.needrun_jobs(), Path("logs/extract_features"))


def of_models(pattern):
    """A file of each model, in their order."""
    return expand(pattern, model=PLAN.models)


@one_sentence
def pictures(wildcards):
    """All that rules/pictures.smk makes for people to look at."""
    comparisons = expand("<results>/pca/compare/{slide}.png", slide=PLAN.feature_slides)
    regions = expand(
        "<results>/pca/regions/{region}/{picture}.png",
        region=PICTURES.regions,
        picture=["colors", "similarity"],
    )
    return [*comparisons, *regions, *cluster_pictures(wildcards)]


@one_sentence
def cluster_pictures(wildcards):
    """Maps of the clusters of all slides, and examples by all models."""
    if PLAN.config["pca"]["clusters"] is None:
        return []
    maps = expand("<results>/clusters/maps/{slide}.png", slide=PLAN.feature_slides)
    return [*maps, *of_models("<results>/clusters/{model}/examples.png")]


def viewer_clusters(wildcards):
    """Clusters of a slide's tiles by a model, and their colours; nothing where none are made."""
    if PLAN.config["pca"]["clusters"] is None:
        return []
    return [
        f"<results>/clusters/{wildcards.model}/labels/{wildcards.slide}.npz",
        f"<results>/clusters/{wildcards.model}/clusters.json",
    ]


def viewer_cluster_options(wildcards, input):
    """The same for the command line."""
    return (
        ["--clusters", input.clusters[0], "--cluster-legend", input.clusters[1]]
        if input.clusters
        else []
    )


@one_sentence
def shown_regions(wildcards):
    """Names of the regions that are shown at the scale of cells."""
    return list(PICTURES.regions)


def of_region(function):
    """The same input function for the slide of a region."""
    return one_sentence(
        lambda wildcards: function(PICTURES.wildcards(wildcards.region))
    )


@one_sentence
def region_slide_id(wildcards):
    """The slide that the region lies on."""
    return PICTURES.region(wildcards.region).slide


def region_slide_argument(wildcards, resources):
    """The slide for the command line; no trigger, since the input is one."""
    return slide_argument(PICTURES.wildcards(wildcards.region), resources)


@one_sentence
def region_tiles(wildcards):
    """The tiles that tell where the slide's tissue is, for a region that is looked for."""
    region = PICTURES.region(wildcards.region)
    tiles = f"<results>/tiles/{PLAN.config['features']['set']}/{region.slide}.parquet"
    return tiles if region.x is None else []


@one_sentence
def region_thumbnail(wildcards):
    """The picture of the whole slide."""
    return f"<results>/slides/{PICTURES.region(wildcards.region).slide}.jpg"


@one_sentence
def region_options(wildcards, resources):
    """Arguments whose change redoes nothing: reader of other slides, and how errors are taken."""
    slide = PICTURES.region(wildcards.region).slide
    return [*SLIDES.options(slide), "--on-error", PLAN.config["slides"]["on_error"]]


@one_sentence
def region_arguments(wildcards, input):
    """Arguments that say where to look."""
    tiles = ["--tiles", str(input.tiles)] if input.tiles else []
    return [*tiles, *PICTURES.arguments(wildcards.region)]


def all_encoder_files(wildcards):
    """The files of all models."""
    return [file for model in PLAN.models for file in FEATURES.encoder_files(model)]


def named_sources(wildcards, input):
    """NAME=SOURCE of each model, and what the names of timm's models are where files do not tell."""
    told = {model: FEATURES.architecture(model) for model in PLAN.models}
    names = [f"{model}={name}" for model, name in told.items() if name is not None]
    sources = [f"{model}={FEATURES.source(model)}" for model in PLAN.models]
    return sources + (["--architecture", *names] if names else [])


def task_labels(wildcards):
    """The table of labels, where the task is one of them."""
    return PLAN.config["labels"] if wildcards.task.startswith("label-") else []


def task_folders(wildcards):
    """Folders of the task's images."""
    return EVALUATION.folders(wildcards.task)


@one_sentence
def task_arguments(wildcards):
    """Arguments that say what the task asks about."""
    return EVALUATION.unit_arguments(wildcards.task)


def task_images(wildcards):
    """Arguments that say which images the task has; none of a task of slides."""
    is_of_images = wildcards.task in EVALUATION.image_tasks
    return EVALUATION.image_arguments(wildcards.task) if is_of_images else []


def task_features(wildcards):
    """Features that the model answers the task with."""
    return EVALUATION.features(wildcards.task, wildcards.model)


def task_models(wildcards):
    """Models that answer the task."""
    return EVALUATION.models(wildcards.task)


def task_answers(wildcards):
    """What they answered."""
    return expand(
        "<results>/evaluation/{task}/answers/{model}.npz",
        task=wildcards.task,
        model=EVALUATION.models(wildcards.task),
    )


@one_sentence
def task_shifts(wildcards):
    """Arguments for changed copies of the task's tiles, where robustness is asked."""
    return EVALUATION.shift_arguments(wildcards.task)


@one_sentence
def probe_inputs(wildcards):
    """What the images that runs are asked about come from."""
    return EVALUATION.probe_inputs()


@one_sentence
def probe_slides(wildcards):
    """Slides that these are read from."""
    if EVALUATION.probed_task is not None:
        return []
    slides = EVALUATION.cohort.slides_of("selection")
    return [path for slide in slides for path in SLIDES.input_of(slide)]


@one_sentence
def probe_arguments(wildcards):
    """Arguments that say which images these are."""
    return EVALUATION.probe_arguments()


def evaluated_pooling(wildcards):
    """What is taken of an image with the model."""
    return EVALUATION.pooling(wildcards.model)


def model_history(wildcards):
    """Arguments that say what the model was trained on."""
    return EVALUATION.history(wildcards.task, wildcards.model)


def model_references(wildcards):
    """Arguments that say which models each model is held against."""
    return EVALUATION.reference_arguments(wildcards.task)


@one_sentence
def primary_measure(wildcards):
    """Argument for the measure that the verdict rests on, where the config names one."""
    return EVALUATION.summary_arguments()


def evaluation(wildcards):
    """The table of all measures, and a figure of each task, where models are to be measured."""
    wanted = PLAN.config["evaluation"]["enabled"] and EVALUATION.tasks
    return evaluation_results() if wanted else []


def evaluation_results():
    """The same in any case."""
    if not EVALUATION.tasks:
        return []
    figures = expand("<results>/evaluation/{task}/figure.png", task=EVALUATION.tasks)
    return ["<results>/evaluation/summary.json", *figures]


onsuccess:
    for note in [*PLAN.manifest_notes(), *SLIDES.closing_notes()]:
        print(f"note: {note}", file=sys.stderr)


onerror:
    for note in SLIDES.closing_notes():
        print(f"note: {note}", file=sys.stderr)
