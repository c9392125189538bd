"""From whole-slide images to a DINOv3 backbone adapted to them, its features and PCA maps.

snakemake --cores all                  everything in config/config.yaml
snakemake --cores all -n               what would run, and why
snakemake --cores 1 budget             tiles, disk space, hours and jobs that the config will take
snakemake --cores all inspect          a look at all slides before anything expensive starts
snakemake --cores all pretrain         one training run; likewise gram, export, features, pca, clusters, segmentation,
                                       evaluate, pilot, viewer, report
snakemake --cores all results/tiles/features/SLIDE.parquet
"""

from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


report: "report/workflow.rst"


include: "rules/common.smk"
include: "rules/container.smk"
include: "rules/groups.smk"
include: "rules/slide_inputs.smk"
include: "rules/train_inputs.smk"
include: "rules/feature_inputs.smk"
include: "rules/picture_inputs.smk"
include: "rules/segment_inputs.smk"
include: "rules/evaluate_inputs.smk"
include: "rules/slides.smk"
include: "rules/packing.smk"
include: "rules/train.smk"
include: "rules/export.smk"
include: "rules/features.smk"
include: "rules/feature_exports.smk"
include: "rules/pictures.smk"
include: "rules/viewer.smk"
include: "rules/segment.smk"
include: "rules/evaluate.smk"
include: "rules/pilot.smk"
include: "rules/report.smk"
include: "rules/targets.smk"
include: "rules/budget.smk"
include: "rules/storage.smk"


rule all:
    default_target: True
    input:
        rules.report.output,
        pca_maps,
        viewer_page,
        rules.slide_table.output,
        exports,
        exported_features,
        segmentations,
