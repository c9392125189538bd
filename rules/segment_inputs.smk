"""Input functions of the rules of segmentation."""

@one_sentence
def segment_encoder(wildcards):
    """Files of a task's encoder and images; refused while planning when a training was begun with other settings."""
    task, model, variant = wildcards.task, wildcards.model, wildcards.variant
    SEGMENTS.check_seal(task, model, variant)
    files = [*SEGMENTS.encoder_files(model), *SEGMENTS.data_files(task)]
    return (
        [ancient(file) for file in files]
        if SEGMENTS.is_finished(task, model, variant)
        else files
    )


@one_sentence
def segment_arguments(wildcards):
    """Arguments for all that changes the weights of a segmenter."""
    return SEGMENTS.train_arguments(wildcards.task, wildcards.model, wildcards.variant)


def segment_workers(wildcards, resources):
    """Arguments that change nothing but speed; no trigger."""
    return ["--workers", str(SEGMENTS.tasks[wildcards.task]["workers"])]


@one_sentence
def segment_question(wildcards):
    """Arguments for the encoder of a segmenter and the images that it is asked about."""
    return SEGMENTS.asked_arguments(wildcards.task, wildcards.model)


@one_sentence
def segment_kinds(wildcards):
    """Arguments for what is done to images."""
    return SEGMENTS.corruption_arguments(wildcards.task)


def segment_measures(wildcards):
    """What all segmenters of all tasks were measured at."""
    return [f"{folder}/evaluation.json" for folder in SEGMENTS.folders()]


def segment_corruption_measures(wildcards):
    """The same under corruptions, where these are wanted."""
    folders = SEGMENTS.folders(corrupted=True)
    return [f"{folder}/corruptions.json" for folder in folders]


def segmentations(wildcards):
    """All that tasks of segmentation are to end with; nothing without tasks."""
    if not SEGMENTS.tasks:
        return []
    return ["<results>/segmentation/comparison.tsv", *SEGMENTS.slide_maps()]


@one_sentence
def segment_tissue(wildcards):
    """Arguments for how closely and where a slide is segmented: on its tissue, found as for tiles."""
    return SEGMENTS.slide_arguments(wildcards.task, wildcards.slide)


def segmenter_source(wildcards):
    """Where the encoder of a segmenter is loaded from, and what else names it."""
    return FEATURES.encoder_arguments(wildcards.model)[1:]
