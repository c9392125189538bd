"""Tiles packed as JPEG (packing.enabled): a job a slide, and an index for each tile set that training reads."""


# A large slide has further files, which the declared one names: it is the last to come, and the first to go.
rule pack_slide:
    input:
        slide=slide_path,
        members=slide_members,
        tiles="<results>/tiles/{set}/{slide}.parquet",
    output:
        packed="<results>/packed/{set}/{slide}.arrow",
    log:
        "<logs>/pack_slide/{set}/{slide}.log",
    benchmark:
        "<benchmarks>/pack_slide/{set}/{slide}.tsv"
    group:
        "packing"
    conda:
        "../envs/slides.yaml"
    resources:
        mem_mb=growing(1000),
        runtime=growing(15, per_gb=20),
    params:
        script=SCRIPTS / "pack_tiles.py",
        slide=slide_argument,
        mpp=slide_mpp,
        reader=own_reader,
        on_error=not_a_trigger(PLAN.config["slides"]["on_error"]),
        quality=PLAN.config["packing"]["quality"],
        subsampling=PLAN.config["packing"]["subsampling"],
        copies=["--copy-stored"] if PLAN.config["packing"]["copy_stored"] else [],
        file_gb=not_a_trigger(PLAN.config["packing"]["file_gb"]),
    shell:
        "python {params.script:q} --slide {params.slide:q} --slide-id {wildcards.slide:q} {params.mpp:q}"
        " {params.reader:q} --on-error {params.on_error:q} --tiles {input.tiles:q} --quality {params.quality}"
        " --subsampling {params.subsampling} {params.copies:q} --file-gb {params.file_gb:q}"
        " --output {output.packed:q} > {log:q} 2>&1"


# The files are found in the index's folder: 10,000 arguments would burst the command line.
rule pack_index:
    input:
        manifest="<results>/manifests/{set}.parquet",
        packed=packed_tiles,
    output:
        index="<results>/packed/{set}/index.json",
    log:
        "<logs>/pack_index/{set}.log",
    conda:
        "../envs/slides.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(60),
    params:
        script=SCRIPTS / "pack_index.py",
    shell:
        "python {params.script:q} --manifest {input.manifest:q} --output {output.index:q} > {log:q} 2>&1"
