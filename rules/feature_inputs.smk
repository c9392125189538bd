"""Input functions of the rules that make features and pass them on."""


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
def sampled_features(wildcards):
    """Features that the viewer's sample of tiles is drawn from."""
    slides = PLAN.sampled_slides(wildcards.model)
    return expand(
        "<results>/features/{model}/{slide}.h5", model=wildcards.model, slide=slides
    )


@one_sentence
def basis_features(wildcards):
    """Features that the model's colours are fitted on."""
    slides = PLAN.basis_slides(wildcards.model)
    return expand(
        "<results>/features/{model}/{slide}.h5", model=wildcards.model, slide=slides
    )


@one_sentence
def exported_features(wildcards):
    """Features of all slides by all models in the other formats that the config names."""
    return expand(FEATURES.exports(), model=PLAN.models, slide=PLAN.feature_slides)


def all_encoder_files(wildcards):
    """The files of all models."""
    return [file for model in PLAN.models for file in FEATURES.encoder_files(model)]


def named_sources(wildcards, input):
    """NAME=SOURCE of each model, and what the names of timm's models are where files do not tell."""
    told = {model: FEATURES.architecture(model) for model in PLAN.models}
    names = [f"{model}={name}" for model, name in told.items() if name is not None]
    sources = [f"{model}={FEATURES.source(model)}" for model in PLAN.models]
    return sources + (["--architecture", *names] if names else [])


def of_models(pattern):
    """A file of each model, in their order."""
    return expand(pattern, model=PLAN.models)
