"""Names for the products of a stage: snakemake --cores all NAME."""


localrules:
    inspect,
    tiles,
    manifest,
    features,
    pca,


rule inspect:
    input:
        rules.slides_report.output,
        expand("<results>/slides/{slide}.jpg", slide=PLAN.slides),


rule tiles:
    input:
        expand(
            "<results>/tiles/{set}/{slide}.parquet",
            set=PLAN.config["tiling"]["sets"],
            slide=PLAN.slides,
        ),


rule manifest:
    input:
        expand("<results>/manifests/{set}.parquet", set=PLAN.training_sets),
        rules.slide_table.output,


rule features:
    input:
        expand(
            "<results>/features/{model}/{slide}.h5",
            model=PLAN.models,
            slide=PLAN.feature_slides,
        ),


rule pca:
    input:
        expand(
            "<results>/pca/{model}/{slide}.png",
            model=PLAN.models,
            slide=PLAN.feature_slides,
        ),


# Each run under its own name: training and the model that comes out of it.
for run in PLAN.runs:

    rule:
        name:
            run
        input:
            f"<results>/runs/{run}/final.json",
            f"<results>/models/{run}/teacher.pth",
        localrule: True
