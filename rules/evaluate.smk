"""What the models are worth: tasks, the answers of each model, and what may be said of them (docs/evaluation.md)."""


# The baseline that any training must be better than, where the starting weights are somebody's.
rule random_weights:
    input:
        recipe=ancient(str(PLAN.base_run.recipe)),
    output:
        weights="<results>/models/random/teacher.pth",
        tensors="<results>/models/random/teacher.safetensors",
        card="<results>/models/random/model.json",
    log:
        "<logs>/random_weights.log",
    conda:
        "../envs/pictures.yaml"
    resources:
        mem_mb=growing(8000),
        runtime=growing(30),
    params:
        script=SCRIPTS / "evaluate.py",
        settings=PLAN.base_digest,
    shell:
        "python {params.script:q} random --config {input.recipe:q} --output {output.weights:q} > {log:q} 2>&1"


# The only one that reads labels: changed ones ask anew, and rerun nothing but this and what follows.
rule evaluation_units:
    input:
        labels=task_labels,
        images=task_folders,
    output:
        units="<results>/evaluation/{task}/units.json",
    log:
        "<logs>/evaluation_units/{task}.log",
    conda:
        "../envs/pictures.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        script=SCRIPTS / "evaluate.py",
        slides=Path(PLAN.config["slides"]["source"]),
        digest=task_digest,
        asked=task_arguments,
    shell:
        "python {params.script:q} units --task {wildcards.task:q} --slides {params.slides:q} {params.asked:q}"
        " --output {output.units:q} > {log:q} 2>&1"


rule embed_images:
    input:
        units=rules.evaluation_units.output.units,
        encoder=encoder_files,
    output:
        features="<results>/evaluation/{task}/features/{model}.npz",
    log:
        "<logs>/embed_images/{task}/{model}.log",
    conda:
        "../envs/pictures.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=growing(16000),
        runtime=growing(120),
    params:
        script=SCRIPTS / "evaluate.py",
        encoder=encoder_arguments,
        pooling=evaluated_pooling,
        images=task_images,
        shifts=task_shifts,
    shell:
        "python {params.script:q} embed {params.encoder:q} --model-name {wildcards.model:q} --pooling {params.pooling}"
        " {params.images:q} {params.shifts:q} --output {output.features:q} > {log:q} 2>&1"


# What changed copies of slides are made of, where robustness is asked: some tiles of each test slide.
rule sample_tiles:
    input:
        slide=slide_path,
        members=slide_members,
        tiles="<results>/tiles/{set}/{slide}.parquet",
    output:
        sample="<results>/evaluation/sampled/{set}/{slide}.npz",
    log:
        "<logs>/sample_tiles/{set}/{slide}.log",
    group:
        "samples"
    conda:
        "../envs/pictures.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(5, per_gb=1),
    params:
        script=SCRIPTS / "evaluate.py",
        slide=slide_argument,
        reader=own_reader,
        on_error=not_a_trigger(PLAN.config["slides"]["on_error"]),
        sampled=EVALUATION.sample_arguments(),
    shell:
        "python {params.script:q} sample --slide {params.slide:q} --slide-id {wildcards.slide:q} {params.reader:q}"
        " --on-error {params.on_error:q} --tiles {input.tiles:q} {params.sampled:q}"
        " --output {output.sample:q} > {log:q} 2>&1"


use rule embed_images as embed_samples with:
    input:
        samples=model_samples,
        encoder=encoder_files,
    output:
        features="<results>/evaluation/sampled/{model}.npz",
    log:
        "<logs>/embed_samples/{model}.log",
    params:
        script=SCRIPTS / "evaluate.py",
        encoder=encoder_arguments,
        pooling=evaluated_pooling,
        images=input_samples,
        shifts=["--shifts", *SHIFTS],


rule probe_set:
    input:
        files=probe_inputs,
        slides=probe_slides,
    output:
        probe="<results>/evaluation/probe.npz",
    log:
        "<logs>/probe_set.log",
    conda:
        "../envs/pictures.yaml"
    resources:
        mem_mb=growing(4000),
        runtime=growing(30),
    params:
        script=SCRIPTS / "evaluate.py",
        reading=not_a_trigger(
            [
                *SLIDES.reading_options(),
                *("--on-error", PLAN.config["slides"]["on_error"]),
            ]
        ),
        asked=probe_arguments,
    shell:
        "python {params.script:q} probe {params.asked:q} {params.reading:q} --output {output.probe:q} > {log:q} 2>&1"


# Tiles on which the similarities of patches are compared (Gram distance), the same for all models.
rule described_tiles:
    input:
        tiles=lambda wildcards: EVALUATION.sampled_manifests(),
        slides=sampled_slides,
    output:
        sampled="<results>/evaluation/descriptive/tiles.npz",
    log:
        "<logs>/described_tiles.log",
    conda:
        "../envs/pictures.yaml"
    resources:
        mem_mb=growing(4000),
        runtime=growing(30),
    params:
        script=SCRIPTS / "evaluate.py",
        reading=not_a_trigger(
            [
                *SLIDES.reading_options(),
                *("--on-error", PLAN.config["slides"]["on_error"]),
            ]
        ),
        asked=lambda wildcards: EVALUATION.sample_arguments_described(),
    shell:
        "python {params.script:q} tiles {params.asked:q} {params.reading:q} --output {output.sampled:q}"
        " > {log:q} 2>&1"


rule described_patches:
    input:
        sampled=rules.described_tiles.output.sampled,
        encoder=encoder_files,
    output:
        patches="<results>/evaluation/descriptive/patches/{model}.npz",
    log:
        "<logs>/described_patches/{model}.log",
    conda:
        "../envs/pictures.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=growing(8000),
        runtime=growing(30),
    params:
        script=SCRIPTS / "evaluate.py",
        encoder=encoder_arguments,
    shell:
        "python {params.script:q} patches {params.encoder:q} --model-name {wildcards.model:q} --sampled {input.sampled:q}"
        " --output {output.patches:q} > {log:q} 2>&1"


rule measure_model:
    input:
        units=rules.evaluation_units.output.units,
        patches=task_patches,
        features=task_features,
        sampled=task_sampled,
    output:
        answers="<results>/evaluation/{task}/answers/{model}.npz",
    log:
        "<logs>/measure_model/{task}/{model}.log",
    benchmark:
        "<benchmarks>/measure_model/{task}/{model}.tsv"
    conda:
        "../envs/pictures.yaml"
    threads: 4
    resources:
        mem_mb=growing(16000),
        runtime=growing(240),
    params:
        script=SCRIPTS / "evaluate.py",
        features=input_files("features"),
        sampled=sampled_argument,
        slides=Path(PLAN.config["slides"]["source"]),
        history=model_history,
        images=task_images,
        how=measure_arguments,
    shell:
        "python {params.script:q} measure --units {input.units:q} --features {params.features:q}"
        " {params.sampled:q} --model-name {wildcards.model:q} --slides {params.slides:q} {params.history:q} {params.images:q}"
        " {params.how:q} --output {output.answers:q} > {log:q} 2>&1"


rule compare_models:
    input:
        units=rules.evaluation_units.output.units,
        answers=task_answers,
    output:
        comparison="<results>/evaluation/{task}/comparison.npz",
        figure=report(
            "<results>/evaluation/{task}/figure.png",
            caption="../report/evaluation.rst",
            category="Evaluation",
            labels={"task": "{task}"},
        ),
    log:
        "<logs>/compare_models/{task}.log",
    conda:
        "../envs/pictures.yaml"
    resources:
        mem_mb=growing(8000),
        runtime=growing(60),
    params:
        script=SCRIPTS / "evaluate.py",
        models=task_models,
        references=model_references,
        how=EVALUATION.compare_arguments(),
    shell:
        "python {params.script:q} compare --units {input.units:q} --answers {input.answers:q} --models {params.models:q}"
        " {params.references:q} {params.how:q} --output {output.comparison:q} --figure {output.figure:q} > {log:q} 2>&1"


# The JSON a measure lie undeclared in a folder of their own: which measures there are depends on the labels.
rule evaluation_summary:
    input:
        comparisons=expand(
            "<results>/evaluation/{task}/comparison.npz", task=EVALUATION.tasks
        ),
    output:
        table="<results>/evaluation/summary.tsv",
        document="<results>/evaluation/summary.json",
    log:
        "<logs>/evaluation_summary.log",
    localrule: True
    conda:
        "../envs/pictures.yaml"
    params:
        script=SCRIPTS / "evaluate.py",
        margin=PLAN.config["evaluation"]["margin"],
        primary=primary_measure,
        measures=str(PLAN.results / "evaluation" / "measures"),
    shell:
        "python {params.script:q} summary --comparisons {input.comparisons:q} --margin {params.margin:q} {params.primary:q}"
        " --table {output.table:q} --document {output.document:q} --measures {params.measures:q} > {log:q} 2>&1"
