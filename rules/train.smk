"""From the tile manifest to trained models."""


rule initial_weights:
    input:
        recipe=ancient(str(PLAN.base_run.recipe)),
        source=PLAN.base_weights,
    output:
        weights="<results>/models/base/teacher.pth",
        tensors="<results>/models/base/teacher.safetensors",
        card="<results>/models/base/model.json",
    log:
        "<logs>/initial_weights.log",
    conda:
        "../envs/torch.yaml"
    resources:
        mem_mb=growing(8000),
        runtime=growing(30),
    params:
        script=SCRIPTS / "initial_weights.py",
        settings=PLAN.base_digest,
    shell:
        "python {params.script:q} --config {input.recipe:q} --output {output.weights:q} > {log:q} 2>&1"


# Only final.json is declared: Snakemake deletes declared outputs before every attempt, and checkpoints must stay.
# A finished run keeps what it started with: news of manifest, weights or continued run do not rerun it.
rule train:
    input:
        recipe=run_recipe,
        parents=run_parents,
        manifest=run_manifest,
        packed=run_packed,
        weights=run_weights,
        continued=continued_run,
        teachers=teacher_files,
        probe=run_probe,
    output:
        final="<results>/runs/{run}/final.json",
    log:
        "<logs>/train/{run}.log",
    benchmark:
        "<benchmarks>/train/{run}.tsv"
    conda:
        "../envs/torch.yaml"
    # As many as the machine has; on a cluster the profile says.
    threads: 64
    resources:
        gpu=all_gpus,
        mem_mb=growing(32000),
        runtime=2880,
    params:
        launcher=SCRIPTS / "launch.py",
        script=SCRIPTS / "pretrain.py",
        data=run_data,
        access=not_a_trigger(SLIDES.training_options()),
        run_dir=subpath(output.final, parent=True),
        launch=launch_options,
        options=run_options,
        changes=run_changes,
        keep=kept_exports,
    shell:
        "python {params.launcher:q} {params.launch:q} --threads {threads} --stop-with-snakemake -- {params.script:q}"
        " --config {input.recipe:q} {params.data:q} {params.access:q}"
        " --weights {input.weights:q} {params.options:q} {params.keep:q} --run-dir {params.run_dir:q}"
        " {params.changes:q} 2>&1 | tee -i {log:q}"


rule convert:
    input:
        final=rules.train.output.final,
    output:
        weights="<results>/models/{run}/teacher.pth",
        tensors="<results>/models/{run}/teacher.safetensors",
        card="<results>/models/{run}/model.json",
    log:
        "<logs>/convert/{run}.log",
    conda:
        "../envs/torch.yaml"
    resources:
        mem_mb=growing(8000),
        runtime=growing(30),
    params:
        script=SCRIPTS / "convert_checkpoint.py",
    shell:
        "python {params.script:q} --checkpoint {input.final:q} --output {output.weights:q} > {log:q} 2>&1"
