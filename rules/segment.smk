"""From encoders and masks to segmenters, their measures, and class maps of slides."""


# As in rules/train.smk: only final.json is declared, and a finished training keeps the encoder that it began with. Its
# time does not grow with the attempt either, since the next one goes on.
rule segment_train:
    input:
        encoder=segment_encoder,
    output:
        final="<results>/segmentation/{task}/{model}/{variant}/final.json",
    log:
        "<logs>/segment_train/{task}/{model}/{variant}.log",
    benchmark:
        "<benchmarks>/segment_train/{task}/{model}/{variant}.tsv"
    conda:
        "../envs/segment.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=growing(32000),
        runtime=1440,
    params:
        launcher=SCRIPTS / "launch.py",
        script=SCRIPTS / "segment_train.py",
        arguments=segment_arguments,
        launch=launch_options,
        folder=subpath(output.final, ancestor=2),
        workers=segment_workers,
    shell:
        "python {params.launcher:q} {params.launch:q} --threads {threads} --stop-with-snakemake -- {params.script:q}"
        " --output-dir {params.folder:q} --exp-name {wildcards.variant:q} {params.arguments:q} {params.workers:q}"
        " 2>&1 | tee -i {log:q}"


rule segment_evaluate:
    input:
        final=rules.segment_train.output.final,
        encoder=segment_encoder,
    output:
        measures="<results>/segmentation/{task}/{model}/{variant}/evaluation.json",
        classes="<results>/segmentation/{task}/{model}/{variant}/classes.tsv",
        images="<results>/segmentation/{task}/{model}/{variant}/images.tsv",
        picture=report(
            "<results>/segmentation/{task}/{model}/{variant}/examples.png",
            caption="../report/segmentation.rst",
            category="Segmentation",
            subcategory="{task}",
            labels={"model": "{model}", "trained": "{variant}"},
        ),
    log:
        "<logs>/segment_evaluate/{task}/{model}/{variant}.log",
    conda:
        "../envs/segment.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=growing(16000),
        runtime=growing(120),
    params:
        script=SCRIPTS / "segment_evaluate.py",
        folder=subpath(input.final, parent=True),
        arguments=segment_question,
    shell:
        "python {params.script:q} --segmenter {params.folder:q} {params.arguments:q} --model-name {wildcards.model:q}"
        " --output {output.measures:q} --classes-table {output.classes:q} --images-table {output.images:q}"
        " --picture {output.picture:q} > {log:q} 2>&1"


rule segment_corruptions:
    input:
        final=rules.segment_train.output.final,
        encoder=segment_encoder,
    output:
        measures="<results>/segmentation/{task}/{model}/{variant}/corruptions.json",
        table="<results>/segmentation/{task}/{model}/{variant}/corruptions.tsv",
        picture="<results>/segmentation/{task}/{model}/{variant}/corruptions.png",
    log:
        "<logs>/segment_corruptions/{task}/{model}/{variant}.log",
    conda:
        "../envs/segment.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=growing(16000),
        runtime=growing(480),
    params:
        script=SCRIPTS / "segment_corruptions.py",
        folder=subpath(input.final, parent=True),
        arguments=segment_question,
        kinds=segment_kinds,
    shell:
        "python {params.script:q} --segmenter {params.folder:q} {params.arguments:q} {params.kinds:q}"
        " --output {output.measures:q} --table {output.table:q} --picture {output.picture:q} > {log:q} 2>&1"


rule segment_compare:
    input:
        measures=segment_measures,
        corruptions=segment_corruption_measures,
    output:
        table=report(
            "<results>/segmentation/comparison.tsv",
            caption="../report/segmentation.rst",
            category="Segmentation",
            labels={"table": "all tasks, encoders and methods"},
        ),
        runs="<results>/segmentation/runs.tsv",
    log:
        "<logs>/segment_compare.log",
    localrule: True
    conda:
        "../envs/plots.yaml"
    params:
        script=SCRIPTS / "segment_compare.py",
        measures=input_files("measures"),
    shell:
        "python {params.script:q} --evaluations {params.measures:q} --output {output.table:q} --runs-output {output.runs:q}"
        " > {log:q} 2>&1"


rule segment_predict_slide:
    input:
        final=rules.segment_train.output.final,
        encoder=segment_encoder,
        slide=slide_path,
        members=slide_members,
    output:
        classes="<results>/segmentation/{task}/{model}/{variant}/slides/{slide}.tiff",
        outlines="<results>/segmentation/{task}/{model}/{variant}/slides/{slide}.geojson",
        areas="<results>/segmentation/{task}/{model}/{variant}/slides/{slide}.tsv",
        picture=report(
            "<results>/segmentation/{task}/{model}/{variant}/slides/{slide}.png",
            caption="../report/segmentation.rst",
            category="Segmentation",
            subcategory="{task}",
            labels={"model": "{model}", "trained": "{variant}", "slide": "{slide}"},
        ),
    log:
        "<logs>/segment_predict_slide/{task}/{model}/{variant}/{slide}.log",
    group:
        "class_maps_{task}_{model}_{variant}"
    conda:
        "../envs/segment.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=growing(16000),
        runtime=growing(8, per_gb=8, of=["slide", "members"]),
    params:
        script=SCRIPTS / "segment_predict_slide.py",
        folder=subpath(input.final, parent=True),
        encoder=segmenter_source,
        slide=slide_argument,
        slide_mpp=slide_mpp,
        reader=own_reader,
        attempt=slide_attempt("segmentation"),
        options=slide_options("segmentation"),
        tissue=segment_tissue,
    shell:
        "python {params.script:q} --segmenter {params.folder:q}/segmenter --encoder {params.encoder:q}"
        " --slide {params.slide:q} --slide-id {wildcards.slide:q} {params.slide_mpp:q} {params.reader:q} {params.options:q}"
        " --attempt {params.attempt:q} {params.tissue:q} --class-map {output.classes:q} --outlines {output.outlines:q}"
        " --overview {output.picture:q} --areas {output.areas:q} > {log:q} 2>&1"
