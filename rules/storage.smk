"""Results on object storage (storage.results): copied there once they are made here, file by file."""

if PLAN.config["storage"]["results"] is not None:

    # By the main process: a cluster gets no jobs of it. Training writes here alone, whose checkpoints are no outputs.
    rule upload_file:
        input:
            "<results>/{file}",
        output:
            storage.s3(f"{PLAN.config['storage']['results']}/{{file}}"),
        log:
            "<logs>/upload/{file}.log",
        localrule: True
        shell:
            "cp {input:q} {output:q} 2> {log:q}"


rule upload:
    input:
        uploaded,
    localrule: True
