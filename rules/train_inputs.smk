"""Input functions of the rules that train runs and export them."""

@one_sentence
def run_recipe(wildcards):
    """The run's recipe, refused while planning when a started run had other settings; nothing is deleted then."""
    run = run_of(wildcards)
    check_seal(PLAN.results / "runs" / run.name, run.recipe, run.changes)
    return str(run.recipe)


@one_sentence
def run_changes(wildcards):
    """What repeats, controls and arms of the pilot have in place of the recipe's settings, key=value."""
    return list(run_of(wildcards).changes)


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


def run_packed(wildcards):
    """The index of the packed tiles that the run is trained on, if it is."""
    run = run_of(wildcards)
    if not plan_of(run.name).is_packed(run):
        return []
    return kept_by_finished(f"<results>/packed/{run.tile_set}/index.json", wildcards)


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


def exports(wildcards):
    """What the models of all runs are written as for other tools."""
    return expand(
        "<results>/models/{exported}/{format}/verification.json",
        exported=PLAN.written_runs,
        format=PLAN.config["export"]["formats"],
    )
