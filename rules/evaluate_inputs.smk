"""Input functions of the rules of evaluation."""


def task_labels(wildcards):
    """The table of labels, where the task is one of them."""
    return PLAN.config["labels"] if wildcards.task.startswith("label-") else []


def task_folders(wildcards):
    """Folders of the task's images, and the table of their groups."""
    return EVALUATION.image_inputs(wildcards.task)


@one_sentence
def task_digest(wildcards):
    """Changes with what the task takes of the slide table."""
    return EVALUATION.cohort_digest(wildcards.task)


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
    return evaluation_of(wildcards.model).features(wildcards.task, wildcards.model)


def model_samples(wildcards):
    """Samples of tiles that changed copies are made of, for a model."""
    return evaluation_of(wildcards.model).samples(wildcards.model)


def input_samples(wildcards, input, resources):
    """Arguments that name them; no trigger, since the files are one."""
    return ["--sampled", *input_files("samples")(wildcards, input, resources)]


def task_sampled(wildcards):
    """What the model gives of them and of their changed copies, where the task asks."""
    return evaluation_of(wildcards.model).sampled_features(
        wildcards.task, wildcards.model
    )


def sampled_argument(wildcards, input):
    """The same for the command line."""
    return ["--sampled", *input.sampled] if input.sampled else []


def sampled_slides(wildcards):
    """Slides that patches are compared on."""
    return [
        path for slide in EVALUATION.sampled_slides for path in SLIDES.input_of(slide)
    ]


def task_patches(wildcards):
    """Patches of the model and of those that it is compared with, where the task keeps any."""
    files = evaluation_of(wildcards.model).patch_files(wildcards.task, wildcards.model)
    return list(files.values())


def measure_arguments(wildcards):
    """Arguments that say how the model is measured."""
    evaluation = evaluation_of(wildcards.model)
    patches = evaluation.patch_arguments(wildcards.task, wildcards.model)
    return EVALUATION.measure_arguments() + patches


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
    return [
        path for slide in EVALUATION.probed_slides for path in SLIDES.input_of(slide)
    ]


@one_sentence
def probe_arguments(wildcards):
    """Arguments that say which images these are."""
    return EVALUATION.probe_arguments()


def evaluated_pooling(wildcards):
    """What is taken of an image with the model."""
    return evaluation_of(wildcards.model).pooling(wildcards.model)


def model_history(wildcards):
    """Arguments that say what the model was trained on."""
    return evaluation_of(wildcards.model).history(wildcards.task, wildcards.model)


def model_references(wildcards):
    """Arguments that say which models each model is held against, and which are one run with several seeds."""
    task = wildcards.task
    return [*EVALUATION.reference_arguments(task), *EVALUATION.run_arguments(task)]


@one_sentence
def primary_measure(wildcards):
    """Argument for the measure that the verdict rests on, where the config names one."""
    return EVALUATION.summary_arguments()


def evaluation(wildcards):
    """The table of all measures, and a figure of each task, where models are to be measured."""
    wanted = PLAN.config["evaluation"]["enabled"] and EVALUATION.tasks
    return evaluation_results() if wanted else []


@one_sentence
def evaluation_asked(wildcards):
    """The same where it was asked for by name; refused where there is nothing to ask."""
    EVALUATION.check_tasks()
    return evaluation_results()


def evaluation_results():
    """The same whatever the config says of it."""
    if not EVALUATION.tasks:
        return []
    figures = expand("<results>/evaluation/{task}/figure.png", task=EVALUATION.tasks)
    return ["<results>/evaluation/summary.json", *figures]


@one_sentence
def pilot_results(wildcards):
    """What the pilot found; refused while planning where it has nothing to judge by."""
    PILOT.check()
    for note in PILOT.notes() if workflow.is_main_process else []:
        print(f"note: {note}", file=sys.stderr)
    figures = expand("<results>/pilot/{task}/figure.png", task=PILOT.tasks)
    return ["<results>/pilot/advice.txt", *figures]


def pilot_models(wildcards):
    """Models that the pilot compares: starting weights, arms, encoders, baselines."""
    return PILOT.evaluation.models(wildcards.task)


def pilot_answers(wildcards):
    """What they answered."""
    return expand(
        "<results>/evaluation/{task}/answers/{model}.npz",
        task=wildcards.task,
        model=PILOT.evaluation.models(wildcards.task),
    )


def pilot_references(wildcards):
    """Arguments that say whom each of them is held against."""
    return PILOT.references(wildcards.task)


@one_sentence
def pilot_of_report(wildcards):
    """What the pilot found, where it was asked for in this call or before.

    Of a pilot before, the document that nothing declares; the report is made anew with it, and nothing of the pilot is.
    """
    if "pilot" in workflow.dag_settings.targets:
        return ["<results>/pilot/advice.txt"]
    document = PLAN.results / "pilot" / "advice.json"
    return [str(document)] if document.is_file() else []


def pilot_comparisons(wildcards):
    """The comparisons of all tasks that have a verdict."""
    return expand("<results>/pilot/{task}/comparison.npz", task=PILOT.tasks)


def pilot_finals(wildcards):
    """Of all arms."""
    return expand("<results>/runs/{run}/final.json", run=PILOT.arms)


@one_sentence
def pilot_arguments(wildcards):
    """Arguments for the table and the advice."""
    return PILOT.summary_arguments()
