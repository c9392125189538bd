"""From features to the files of other tools."""

# On request (features.export, or a file of theirs as the target): the same rows as other tools read them.
for export, files in EXPORT_FILES.items():

    rule:
        name:
            f"export_features_{export}"
        input:
            features=rules.extract_features.output.features,
            tiles=feature_tiles,
        output:
            files=[
                directory(file) if file.endswith(".zarr") else file
                for file in expand(
                    f"<results>/exports/{export}/{{{{model}}}}/{{file}}", file=files
                )
            ],
        log:
            f"<logs>/export_features/{export}/{{model}}/{{slide}}.log",
        group:
            "feature_exports_{model}"
        conda:
            "../envs/torch.yaml"
        resources:
            mem_mb=growing(8000, per_gb=4000),
            runtime=growing(10, per_gb=20),
        params:
            script=SCRIPTS / "export_features.py",
            format=export,
            folder=PLAN.results / "exports" / export,
            slide=slide_argument,
        shell:
            "python {params.script:q} --format {params.format:q} --features {input.features:q} --tiles {input.tiles:q}"
            " --slide {params.slide:q} --output-dir {params.folder:q}/{wildcards.model:q} > {log:q} 2>&1"
