"""From slides to the tile manifest."""

if PLAN.demo_slides():

    rule demo_slides:
        output:
            slides=PLAN.demo_slides(),
        log:
            "<logs>/demo_slides.log",
        conda:
            "../envs/slides.yaml"
        threads: 5
        params:
            script=SCRIPTS / "make_demo_slides.py",
            folder=PLAN.results / "demo",
            seed=PLAN.config["demo"]["seed"],
        shell:
            "python {params.script:q} --output-dir {params.folder:q} --seed {params.seed} > {log:q} 2>&1"


if PLAN.demo_biopsies():

    rule demo_biopsies:
        output:
            slides=PLAN.demo_biopsies(),
        log:
            "<logs>/demo_biopsies.log",
        conda:
            "../envs/slides.yaml"
        threads: 16
        params:
            script=SCRIPTS / "make_demo_slides.py",
            folder=PLAN.results / "demo",
            seed=PLAN.config["demo"]["seed"],
        shell:
            "python {params.script:q} --output-dir {params.folder:q} --seed {params.seed} --biopsies {output.slides:q} > {log:q} 2>&1"


# On a cluster group-components (profiles/slurm) puts the jobs of so many slides into one that is submitted.
# A slide that cannot be read is written down, so that one pass finds the problems of all; tiling it fails.
rule inspect_slide:
    input:
        slide=slide_path_if_any,
        members=slide_members,
    output:
        info="<results>/slides/{slide}.json",
        thumbnail="<results>/slides/{slide}.jpg",
    log:
        "<logs>/inspect_slide/{slide}.log",
    group:
        "inspect"
    conda:
        "../envs/slides.yaml"
    resources:
        mem_mb=growing(1000),
        runtime=growing(5, per_gb=1),
    params:
        script=SCRIPTS / "inspect_slide.py",
        slide=slide_argument,
        mpp=slide_mpp,
        reader=own_reader,
        attempt=slide_attempt("tiles"),  # only to look again when a skipped slide is tried again
        options=slide_options(),
    shell:
        "python {params.script:q} --slide {params.slide:q} --slide-id {wildcards.slide:q} {params.mpp:q}"
        " {params.reader:q} {params.options:q} --keep-going"
        " --output {output.info:q} --thumbnail {output.thumbnail:q} > {log:q} 2>&1"


rule slides_report:
    input:
        infos=of_slides("<results>/slides/{slide}.json", PLAN.slides),
    output:
        table="<results>/slides_report.tsv",
    log:
        "<logs>/slides_report.log",
    localrule: True
    conda:
        "../envs/slides.yaml"
    params:
        script=SCRIPTS / "report_slides.py",
        slides=Path(PLAN.config["slides"]["source"]),
        digest=PLAN.table_digest,
        sets=PLAN.tile_set_arguments(),
        files=input_files("infos"),
    shell:
        "python {params.script:q} --slides {params.slides:q} {params.sets:q} --output {output.table:q}"
        " {params.files:q} > {log:q} 2>&1"


# All tile sets of a slide in one job, which opens it once.
rule tile_slide:
    input:
        slide=slide_path,
        members=slide_members,
        annotations=slide_annotations,
    output:
        tiles=expand(
            "<results>/tiles/{set}/{{slide}}.parquet",
            set=PLAN.config["tiling"]["sets"],
        ),
        overview=report(
            "<results>/tiles/{slide}.jpg",
            caption="../report/overview.rst",
            category="Tiles",
            labels={"slide": "{slide}"},
        ),
        outline="<results>/tiles/{slide}.geojson",
    log:
        "<logs>/tile_slide/{slide}.log",
    benchmark:
        "<benchmarks>/tile_slide/{slide}.tsv"
    group:
        "tiles"
    conda:
        "../envs/slides.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(10, per_gb=15),
    params:
        script=SCRIPTS / "tile_slide.py",
        slide=slide_argument,
        mpp=slide_mpp,
        sets=tiling_arguments,
        reader=own_reader,
        attempt=slide_attempt("tiles"),
        options=slide_options("tiles"),
    shell:
        "python {params.script:q} --slide {params.slide:q} --slide-id {wildcards.slide:q} {params.mpp:q}"
        " {params.reader:q} {params.options:q} --attempt {params.attempt:q} {params.sets:q}"
        " --overview {output.overview:q} --outline {output.outline:q} > {log:q} 2>&1"


# Reruns when the split changes, not when the table does: a slide for features only leaves training alone.
rule split_slides:
    output:
        splits="<results>/splits.tsv",
    log:
        "<logs>/split_slides.log",
    localrule: True
    conda:
        "../envs/slides.yaml"
    params:
        script=SCRIPTS / "split_slides.py",
        slides=Path(PLAN.config["slides"]["source"]),
        digest=PLAN.split_digest,
        fraction=PLAN.config["split"]["fraction"],
        seed=PLAN.config["split"]["seed"],
    shell:
        "python {params.script:q} --slides {params.slides:q} --fraction {params.fraction} --seed {params.seed}"
        " --output {output.splits:q} > {log:q} 2>&1"


rule merge_manifest:
    input:
        tiles=train_tiles,
    output:
        manifest="<results>/manifests/{set}.parquet",
    log:
        "<logs>/merge_manifest/{set}.log",
    conda:
        "../envs/slides.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(60),
    params:
        script=SCRIPTS / "merge_manifest.py",
        files=input_files("tiles"),
    shell:
        "python {params.script:q} --output {output.manifest:q} {params.files:q} > {log:q} 2>&1"


rule slide_table:
    input:
        tiles=of_slides(
            "<results>/tiles/{set}/{slide}.parquet",
            PLAN.slides,
            set=PLAN.config["features"]["set"],
        ),
        splits=rules.split_slides.output.splits,
    output:
        table="<results>/slides.parquet",
    log:
        "<logs>/slide_table.log",
    localrule: True
    conda:
        "../envs/slides.yaml"
    params:
        script=SCRIPTS / "tabulate_slides.py",
        slides=Path(PLAN.config["slides"]["source"]),
        digest=PLAN.table_digest,
        files=input_files("tiles"),
    shell:
        "python {params.script:q} --slides {params.slides:q} --splits {input.splits:q} --output {output.table:q}"
        " {params.files:q} > {log:q} 2>&1"
