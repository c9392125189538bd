"""From models and tiles to features and PCA maps."""


# One job a slide, so that a slide can be made alone and a new one plans nothing else. A job that has loaded the weights
# goes on with slides that are wanted too, whose own jobs then find their features finished (dinoscope/features/sharing.py).
rule extract_features:
    input:
        slide=slide_path,
        members=slide_members,
        tiles=feature_tiles,
        encoder=encoder_files,
    output:
        features="<results>/features/{model}/{slide}.h5",
    log:
        "<logs>/extract_features/{model}/{slide}.log",
    benchmark:
        "<benchmarks>/extract_features/{model}/{slide}.tsv"
    group:
        "features_{model}"
    conda:
        "../envs/torch.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=growing(16000),
        runtime=growing(5, per_gb=5, of=["slide", "members"]),
    params:
        script=SCRIPTS / "extract_features.py",
        slide=slide_argument,
        reader=own_reader,
        attempt=slide_attempt("features_{wildcards.model}"),
        options=slide_options("features_{wildcards.model}", many=True),
        encoder=encoder_arguments,
        pooling=feature_pooling,
        dtype=PLAN.config["features"]["dtype"],
        taken=FEATURES.taken(),
        speed=not_a_trigger(FEATURES.speed()),
        wanted=wanted_slides,
        minutes=minutes_for_others,
    shell:
        "python {params.script:q} {params.encoder:q} --model-name {wildcards.model:q} --slide {params.slide:q}"
        " {params.reader:q} {params.options:q} --attempt {params.attempt:q} --tiles {input.tiles:q}"
        " --output {output.features:q} --pooling {params.pooling} --dtype {params.dtype} {params.taken:q}"
        " {params.speed:q} --wanted {params.wanted:q} --minutes {params.minutes:q} > {log:q} 2>&1"


# In between, because Snakemake goes through all inputs of a job for each job that needs its output: through the
# features of all slides for each of their maps, if these needed a job that has them as inputs.
rule list_features:
    input:
        features=basis_features,
    output:
        list="<logs>/list_features/{model}.txt",
    log:
        "<logs>/list_features/{model}.log",
    localrule: True
    conda:
        "../envs/plots.yaml"
    params:
        files=input_files("features"),
    shell:
        "printf '%s\\n' {params.files:q} > {output.list:q} 2> {log:q}"


# One colour space a model: fitted once and kept, so that a slide that comes later has comparable colours.
rule pca_fit:
    input:
        list=rules.list_features.output.list,
    output:
        basis="<results>/pca/{model}/basis.json",
        arrays="<results>/pca/{model}/basis.npz",
    log:
        "<logs>/pca_fit/{model}.log",
    conda:
        "../envs/plots.yaml"
    resources:
        mem_mb=growing(8000),
        runtime=growing(60),
    params:
        script=SCRIPTS / "pca.py",
        folder=subpath(output.basis, parent=True),
        seed=PLAN.config["pca"]["seed"],
        background=PLAN.config["pca"]["background"],
    shell:
        "python {params.script:q} fit --features @{input.list:q} --basis {params.folder:q} --seed {params.seed}"
        " --background {params.background:q} > {log:q} 2>&1"


rule pca_map:
    input:
        features=rules.extract_features.output.features,
        basis=rules.pca_fit.output.basis,
        arrays=rules.pca_fit.output.arrays,
        thumbnail=rules.inspect_slide.output.thumbnail,
    output:
        picture=report(
            "<results>/pca/{model}/{slide}.png",
            caption="../report/pca_map.rst",
            category="PCA maps",
            subcategory="{slide}",
            labels={"slide": "{slide}", "model": "{model}"},
        ),
    log:
        "<logs>/pca_map/{model}/{slide}.log",
    group:
        "maps_{model}"
    conda:
        "../envs/plots.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(5, per_gb=10),
    params:
        script=SCRIPTS / "pca.py",
        folder=subpath(input.basis, parent=True),
    shell:
        "python {params.script:q} map --features {input.features:q} --basis {params.folder:q}"
        " --thumbnail {input.thumbnail:q} --slide-name {wildcards.slide:q} --output {output.picture:q} > {log:q} 2>&1"
