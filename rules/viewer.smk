"""The slide viewer: a page that opens from disk, with its pictures and data in files beside it."""


# The tiles of the picture lie undeclared beside pyramid.js, which names them and is written last.
rule viewer_pyramid:
    input:
        slide=slide_path,
        members=slide_members,
    output:
        pyramid="<results>/viewer/slides/{slide}/pyramid.js",
    log:
        "<logs>/viewer_pyramid/{slide}.log",
    group:
        "viewer_pyramid"
    conda:
        "../envs/slides.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(15, per_gb=20),
    params:
        script=SCRIPTS / "build_viewer.py",
        slide=slide_argument,
        slide_mpp=slide_mpp,
        reader=own_reader,
        attempt=slide_attempt("tiles"),  # only to try again when a skipped slide is tried again
        options=slide_options(),
        on_error=not_a_trigger(PLAN.config["slides"]["on_error"]),
        mpp=PLAN.config["viewer"]["mpp"],
    shell:
        "python {params.script:q} pyramid --slide {params.slide:q} --slide-id {wildcards.slide:q} {params.slide_mpp:q}"
        " {params.reader:q} {params.options:q} --on-error {params.on_error:q} --mpp {params.mpp:q} --output {output.pyramid:q}"
        " > {log:q} 2>&1"


# In between for the same reason as list_features.
rule list_sampled:
    input:
        features=sampled_features,
    output:
        list="<logs>/list_sampled/{model}.txt",
    log:
        "<logs>/list_sampled/{model}.log",
    localrule: True
    conda:
        "../envs/plots.yaml"
    params:
        files=input_files("features"),
    shell:
        "printf '%s\\n' {params.files:q} > {output.list:q} 2> {log:q}"


# Drawn once a model and kept, as its colours are: a slide that comes later changes no other slide's neighbours.
rule viewer_sample:
    input:
        list=rules.list_sampled.output.list,
    output:
        arrays="<results>/neighbours/{model}.npz",
        about="<results>/neighbours/{model}.json",
        script="<results>/viewer/models/{model}/sample.js",
    log:
        "<logs>/viewer_sample/{model}.log",
    conda:
        "../envs/plots.yaml"
    resources:
        mem_mb=growing(4000),
        runtime=growing(60),
    params:
        script=SCRIPTS / "build_viewer.py",
        max_tiles=PLAN.config["viewer"]["max_tiles"],
        seed=PLAN.config["viewer"]["seed"],
    shell:
        "python {params.script:q} sample --features @{input.list:q} --max-tiles {params.max_tiles:q} --seed {params.seed}"
        " --output {output.arrays:q} --script {output.script:q} > {log:q} 2>&1"


rule viewer_tiles:
    input:
        features="<results>/features/{model}/{slide}.h5",
        basis="<results>/pca/{model}/basis.json",
        arrays="<results>/pca/{model}/basis.npz",
        sample="<results>/neighbours/{model}.npz",
        clusters=viewer_clusters,
    output:
        tiles="<results>/viewer/models/{model}/slides/{slide}.js",
    log:
        "<logs>/viewer_tiles/{model}/{slide}.log",
    group:
        "viewer_tiles_{model}"
    conda:
        "../envs/plots.yaml"
    threads: 2
    resources:
        mem_mb=growing(4000),
        runtime=growing(5, per_gb=10),
    params:
        script=SCRIPTS / "build_viewer.py",
        folder=subpath(input.basis, parent=True),
        neighbours=PLAN.config["viewer"]["neighbours"],
        clusters=viewer_cluster_options,
    shell:
        "python {params.script:q} tiles --features {input.features:q} --basis {params.folder:q} --sample {input.sample:q}"
        " --neighbours {params.neighbours:q} {params.clusters:q} --output {output.tiles:q} > {log:q} 2>&1"


rule viewer:
    input:
        pyramids=of_slides(
            "<results>/viewer/slides/{slide}/pyramid.js", PLAN.feature_slides
        ),
        tiles=of_slides(
            "<results>/viewer/models/{model}/slides/{slide}.js",
            PLAN.feature_slides,
            model=PLAN.models,
        ),
        samples=expand("<results>/viewer/models/{model}/sample.js", model=PLAN.models),
        bases=expand("<results>/pca/{model}/basis.json", model=PLAN.models),
    output:
        page="<results>/viewer/index.html",
    log:
        "<logs>/viewer.log",
    localrule: True
    conda:
        "../envs/plots.yaml"
    params:
        script=SCRIPTS / "build_viewer.py",
        pyramids=input_files("pyramids"),
        models=PLAN.models,
        bases=[str(PLAN.results / "pca" / model) for model in PLAN.models],
    shell:
        "python {params.script:q} page --pyramids {params.pyramids:q} --models {params.models:q} --bases {params.bases:q}"
        " --report ../report.html --output {output.page:q} > {log:q} 2>&1"
