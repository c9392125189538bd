"""Pictures of training, and the page that a person opens first."""


rule plot_metrics:
    input:
        final=rules.train.output.final,
    output:
        picture=report(
            "<results>/plots/{run}.png",
            caption="../report/training.rst",
            category="Training",
            labels={"run": "{run}"},
        ),
    log:
        "<logs>/plot_metrics/{run}.log",
    localrule: True
    conda:
        "../envs/plots.yaml"
    params:
        script=SCRIPTS / "plot_metrics.py",
        run_dir=subpath(input.final, parent=True),
    shell:
        "python {params.script:q} --metrics {params.run_dir:q}/training_metrics.json --output {output.picture:q}"
        " > {log:q} 2>&1"


rule report:
    input:
        table=rules.slides_report.output.table,
        infos=of_slides("<results>/slides/{slide}.json", PLAN.slides),
        splits=rules.split_slides.output.splits,
        overviews=of_slides("<results>/tiles/{slide}.jpg", PLAN.slides),
        finals=expand("<results>/runs/{run}/final.json", run=PLAN.trained_runs),
        cards=expand("<results>/models/{model}/model.json", model=PLAN.own_models),
        curves=expand("<results>/plots/{run}.png", run=PLAN.trained_runs),
        maps=pca_maps,
        pictures=pictures,
        viewer=viewer_page,
        segmentations=segmentations,
        evaluation=evaluation,
        pilot=pilot_of_report,
    output:
        page="<results>/report.html",
    log:
        "<logs>/report.log",
    localrule: True
    conda:
        "../envs/plots.yaml"
    params:
        script=SCRIPTS / "build_report.py",
        results=subpath(output.page, parent=True),
        config=config_file(),
        models=PLAN.models,
        runs=PLAN.trained_runs,
        regions=shown_regions,
        tasks=list(SEGMENTS.tasks),
    shell:
        "python {params.script:q} --results {params.results:q} --models {params.models:q} --runs {params.runs:q}"
        " --regions {params.regions:q} --tasks {params.tasks:q} --workflow-config {params.config:q} --output {output.page:q} > {log:q} 2>&1"
