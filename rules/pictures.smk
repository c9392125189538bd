"""Pictures of what models see: slides side by side, regions at the scale of cells, clusters of tiles."""


rule pca_compare:
    input:
        features=of_models("<results>/features/{model}/{{slide}}.h5"),
        bases=of_models("<results>/pca/{model}/basis.json"),
        arrays=of_models("<results>/pca/{model}/basis.npz"),
        thumbnail=rules.inspect_slide.output.thumbnail,
    output:
        picture=report(
            "<results>/pca/compare/{slide}.png",
            caption="../report/pca_compare.rst",
            category="PCA maps",
            subcategory="{slide}",
            labels={"slide": "{slide}", "model": "all, side by side"},
        ),
    log:
        "<logs>/pca_compare/{slide}.log",
    group:
        "comparisons"
    conda:
        "../envs/plots.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(5, per_gb=10),
    params:
        script=SCRIPTS / "pca.py",
        folders=of_models(f"{PLAN.results}/pca/{{model}}"),
    shell:
        "python {params.script:q} compare --features {input.features:q} --basis {params.folders:q}"
        " --thumbnail {input.thumbnail:q} --slide-name {wildcards.slide:q} --output {output.picture:q} > {log:q} 2>&1"


rule pca_region:
    input:
        slide=of_region(slide_path),
        members=of_region(slide_members),
        tiles=region_tiles,
        thumbnail=region_thumbnail,
        encoders=all_encoder_files,
    output:
        colors=report(
            "<results>/pca/regions/{region}/colors.png",
            caption="../report/pca_region.rst",
            category="Regions",
            labels={"region": "{region}", "picture": "PCA of patches"},
        ),
        similarity=report(
            "<results>/pca/regions/{region}/similarity.png",
            caption="../report/similarity.rst",
            category="Regions",
            labels={"region": "{region}", "picture": "similarity of patches"},
        ),
    log:
        "<logs>/pca_region/{region}.log",
    conda:
        "../envs/pictures.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=growing(16000),
        runtime=growing(60),
    params:
        script=SCRIPTS / "pca_regions.py",
        slide=region_slide_argument,
        slide_id=region_slide_id,
        mpp=of_region(slide_mpp),
        reader=of_region(own_reader),
        options=region_options,
        where=region_arguments,
        models=named_sources,
        pictures=[
            "--upsample",
            PLAN.config["pca"]["upsample"],
            "--background",
            PLAN.config["pca"]["region_background"],
        ],
    shell:
        "python {params.script:q} --slide {params.slide:q} --slide-id {params.slide_id:q} {params.mpp:q}"
        " {params.reader:q} {params.options:q} --model {params.models:q} {params.where:q} {params.pictures:q}"
        " --thumbnail {input.thumbnail:q} --output {output.colors:q} --similarity {output.similarity:q}"
        " > {log:q} 2>&1"


# Fitted on the tiles that the colours are fitted on, and kept like these.
rule cluster_fit:
    input:
        list=rules.list_features.output.list,
        basis=rules.pca_fit.output.basis,
        arrays=rules.pca_fit.output.arrays,
    output:
        clusters="<results>/clusters/{model}/clusters.json",
        centres="<results>/clusters/{model}/clusters.npz",
    log:
        "<logs>/cluster_fit/{model}.log",
    conda:
        "../envs/plots.yaml"
    resources:
        mem_mb=growing(8000),
        runtime=growing(60),
    params:
        script=SCRIPTS / "clusters.py",
        basis=subpath(input.basis, parent=True),
        folder=subpath(output.clusters, parent=True),
        number=PLAN.config["pca"]["clusters"],
        seed=PLAN.config["pca"]["seed"],
    shell:
        "python {params.script:q} fit --features @{input.list:q} --basis {params.basis:q}"
        " --clusters {params.folder:q} --number {params.number:q} --seed {params.seed} > {log:q} 2>&1"


rule cluster_map:
    input:
        features=of_models("<results>/features/{model}/{{slide}}.h5"),
        bases=of_models("<results>/pca/{model}/basis.json"),
        arrays=of_models("<results>/pca/{model}/basis.npz"),
        clusters=of_models("<results>/clusters/{model}/clusters.json"),
        centres=of_models("<results>/clusters/{model}/clusters.npz"),
        thumbnail=rules.inspect_slide.output.thumbnail,
    output:
        picture=report(
            "<results>/clusters/maps/{slide}.png",
            caption="../report/cluster_map.rst",
            category="Clusters",
            subcategory="Slides",
            labels={"slide": "{slide}", "model": "all, side by side"},
        ),
        geojson=of_models("<results>/clusters/{model}/{{slide}}.geojson"),
        labels=of_models("<results>/clusters/{model}/labels/{{slide}}.npz"),
    log:
        "<logs>/cluster_map/{slide}.log",
    group:
        "clusters"
    conda:
        "../envs/plots.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(10, per_gb=10),
    params:
        script=SCRIPTS / "clusters.py",
        bases=of_models(f"{PLAN.results}/pca/{{model}}"),
        clusters=of_models(f"{PLAN.results}/clusters/{{model}}"),
    shell:
        "python {params.script:q} map --features {input.features:q} --basis {params.bases:q}"
        " --clusters {params.clusters:q} --thumbnail {input.thumbnail:q} --slide-name {wildcards.slide:q}"
        " --output {output.picture:q} --geojson {output.geojson:q} --labels {output.labels:q} > {log:q} 2>&1"


rule cluster_examples:
    input:
        clusters=rules.cluster_fit.output.clusters,
        centres=rules.cluster_fit.output.centres,
    output:
        picture=report(
            "<results>/clusters/{model}/examples.png",
            caption="../report/cluster_examples.rst",
            category="Clusters",
            subcategory="Examples",
            labels={"slide": "examples of all", "model": "{model}"},
        ),
    log:
        "<logs>/cluster_examples/{model}.log",
    conda:
        "../envs/pictures.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(10, per_gb=10),
    params:
        script=SCRIPTS / "clusters.py",
        folder=subpath(input.clusters, parent=True),
        slides=Path(PLAN.config["slides"]["source"]),
        reading=not_a_trigger(SLIDES.reading_options()),
        tiles=feature_tiles_folder,
    shell:
        "python {params.script:q} examples --clusters {params.folder:q} --slides {params.slides:q}"
        " {params.reading:q} --tiles {params.tiles:q} --output {output.picture:q} > {log:q} 2>&1"
