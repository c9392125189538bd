"""Input functions of the rules that read slides: what is opened, how it is read, what is tiled and packed."""


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
def packed_tiles(wildcards):
    """The packed files of the slides that training sees."""
    return expand(
        "<results>/packed/{set}/{slide}.arrow",
        set=wildcards.set,
        slide=PLAN.slides_to_train_on(),
    )
