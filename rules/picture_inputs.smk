"""Input functions of the rules that make pictures: maps, clusters, regions, the viewer."""

@one_sentence
def pca_maps(wildcards):
    """Maps of all slides by all models."""
    return expand(
        "<results>/pca/{model}/{slide}.png",
        model=PLAN.models,
        slide=PLAN.feature_slides,
    )


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


def viewer_page(wildcards):
    """The slide viewer, where it is wanted."""
    return ["<results>/viewer/index.html"] if PLAN.config["viewer"]["enabled"] else []


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
