"""Names for the products of a stage: snakemake --cores all NAME."""


localrules:
    inspect,
    tiles,
    manifest,
    export,
    features,
    export_features,
    pca,
    clusters,
    segmentation,
    evaluate,


rule inspect:
    input:
        rules.slides_report.output,
        of_slides("<results>/slides/{slide}.jpg", PLAN.slides),


rule tiles:
    input:
        of_slides(
            "<results>/tiles/{set}/{slide}.parquet",
            PLAN.slides,
            set=PLAN.config["tiling"]["sets"],
        ),


rule manifest:
    input:
        expand("<results>/manifests/{set}.parquet", set=PLAN.training_sets),
        rules.slide_table.output,


rule export:
    input:
        exports,


rule features:
    input:
        of_slides(
            "<results>/features/{model}/{slide}.h5",
            PLAN.feature_slides,
            model=PLAN.models,
        ),


rule export_features:
    input:
        exported_features,


rule pca:
    input:
        pca_maps,
        pictures,


rule clusters:
    input:
        cluster_pictures,


rule segmentation:
    input:
        segmentations,


rule evaluate:
    input:
        evaluation_asked,


# Each run under its own name: training and the model that comes out of it.
for run in PLAN.runs:

    rule:
        name:
            run
        input:
            f"<results>/runs/{run}/final.json",
            f"<results>/models/{run}/teacher.pth",
        localrule: True
