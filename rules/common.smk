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
STORAGE = StorageJobs(PLAN)
EVALUATION = EvaluationJobs(PLAN, FEATURES)
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
    model="|".join(["base", *PLAN.models, *PLAN.encoders, *BASELINES, *PILOT.arms]),
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


def fetched(wildcards):
    """The slide where it lies on object storage: Snakemake brings it before its first job and removes it after the last."""
    address = SLIDES.address_of(wildcards.slide)
    return [storage.s3(address)] if address else []


@one_sentence
def slide_path(wildcards):
    """What is opened to read the slide; nothing where it is missing and slides are skipped on error."""
    return fetched(wildcards) or SLIDES.input_of(wildcards.slide)


@one_sentence
def slide_path_if_any(wildcards):
    """What is opened to read the slide; nothing where it is missing."""
    return fetched(wildcards) or SLIDES.input_of(wildcards.slide, may_be_missing=True)


@one_sentence
def slide_argument(wildcards, input, resources):
    """The same for the command line, whether it is there or not; no trigger, since the input is one."""
    path = str(PLAN.slide(wildcards.slide).path)
    if SLIDES.address_of(wildcards.slide):
        path = str(input.get("slide", path))
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
        f"{PLAN.results}/tiles/{name}/{wildcards.slide}.parquet"
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
    run = run_of(wildcards)
    if (
        run.recipe.is_file() or run.name not in PILOT.arms
    ):  # a rule writes those of the pilot
        check_seal(PLAN.results / "runs" / run.name, run.recipe)
    return str(run.recipe)


def run_parents(wildcards):
    """The recipes that the run's recipe extends."""
    return [str(recipe) for recipe in run_of(wildcards).recipes[:-1]]


def kept_by_finished(file, wildcards):
    """A file that a run took in when it started: no news of it reruns a run that is finished.

    Not so while final.json is missing: Snakemake does not plan a job behind `ancient` in the same call in which that
    file is made again, even when the job's own output is missing.
    """
    finished = PLAN.results / "runs" / wildcards.run / "final.json"
    return ancient(file) if finished.is_file() else file


def run_manifest(wildcards):
    """The tiles that the run is trained on; none where its recipe names other data."""
    if run_of(wildcards).own_data is not None:
        return []
    tile_set = run_of(wildcards).tile_set
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
    run = run_of(wildcards)
    if not plan_of(run.name).is_packed(run):
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
    continued = run_of(wildcards).continues
    if continued is None:
        return []
    return kept_by_finished(f"<results>/runs/{continued}/final.json", wildcards)


def teacher_files(wildcards):
    """The gram teacher, where the config names a file, and the teacher that is distilled."""
    run = run_of(wildcards)
    files = [run.gram_teacher_file, run.distilled_file]
    return [
        kept_by_finished(str(file), wildcards) for file in files if file is not None
    ]


def launch_options(wildcards, output, resources):
    """Arguments of the launcher; no trigger, like all that depends on resources."""
    logs = Path(output.final).parent / "logs"
    nodes, cpus = resources.get("nodes") or 1, resources.get("cpus_per_task")
    several = ["--nodes", str(nodes)] if nodes > 1 else []
    if several and cpus:
        several += ["--cpus-per-node", str(cpus)]
    return [
        "--processes",
        str(PLAN.config["launch"]["processes"]),
        "--log-dir",
        str(logs),
        *several,
    ]


def run_probe(wildcards):
    """The images that the run is asked about while it trains, if it is."""
    if not evaluation_of(wildcards.run).is_probed(wildcards.run):
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
    teacher = run_of(wildcards).gram_teacher
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
    return features_of(wildcards.model).tiles(wildcards.model)


def feature_tiles_folder(wildcards):
    """The folder of these tiles."""
    return (
        f"{PLAN.results}/tiles/{features_of(wildcards.model).tile_set(wildcards.model)}"
    )


def encoder_files(wildcards):
    """The files of the model; features are made anew when they change."""
    return features_of(wildcards.model).encoder_files(wildcards.model)


def encoder_arguments(wildcards):
    """Arguments that name the model."""
    return features_of(wildcards.model).encoder_arguments(wildcards.model)


def feature_pooling(wildcards):
    """What is taken of a tile with the model."""
    return features_of(wildcards.model).pooling(wildcards.model)


def minutes_for_others(wildcards, resources):
    """How long a job may go on with slides of other jobs: half of what it asks for, so that it ends in time."""
    runtime = resources.get("runtime")
    return runtime // 2 if isinstance(runtime, int) else 1


def wanted_slides(wildcards, resources):
    """The list of slides that jobs of this model may go on with; no trigger."""
    return f"logs/extract_features/{wildcards.model}/.wanted.json"


@one_sentence
def exported_features(wildcards):
    """Features of all slides by all models in the other formats that the config names."""
    return expand(FEATURES.exports(), model=PLAN.models, slide=PLAN.feature_slides)


@one_sentence
def uploaded(wildcards):
    """Results on object storage."""
    return [storage.s3(address) for address in STORAGE.objects()]


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
    if PLAN.remote_slides:  # examples would be cut from slides that are not here
        return maps
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


def region_slide_argument(wildcards, input, resources):
    """The slide for the command line; no trigger, since the input is one."""
    return slide_argument(PICTURES.wildcards(wildcards.region), input, resources)


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


onsuccess:
    for note in [*PLAN.manifest_notes(), *SLIDES.closing_notes()]:
        print(f"note: {note}", file=sys.stderr)


onerror:
    for note in SLIDES.closing_notes():
        print(f"note: {note}", file=sys.stderr)
