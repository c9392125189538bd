"""A short trial of adaptation at equal compute, and one sentence of advice: snakemake --cores all pilot."""


localrules:
    pilot,


rule pilot:
    input:
        pilot_results,


use rule compare_models as pilot_compare with:
    input:
        units=rules.evaluation_units.output.units,
        answers=pilot_answers,
    output:
        comparison="<results>/pilot/{task}/comparison.npz",
        figure=report(
            "<results>/pilot/{task}/figure.png",
            caption="../report/evaluation.rst",
            category="Pilot",
            labels={"task": "{task}"},
        ),
    log:
        "<logs>/pilot_compare/{task}.log",
    params:
        script=SCRIPTS / "evaluate.py",
        models=pilot_models,
        references=pilot_references,
        how=EVALUATION.compare_arguments(),


rule pilot_summary:
    input:
        comparisons=pilot_comparisons,
        finals=pilot_finals,
        base="<results>/models/base/teacher.pth",
    output:
        table="<results>/pilot/summary.tsv",
        curves="<results>/pilot/curves.tsv",
        advice="<results>/pilot/advice.txt",
        figure=report(
            "<results>/pilot/figure.png",
            caption="../report/evaluation.rst",
            category="Pilot",
        ),
    log:
        "<logs>/pilot_summary.log",
    localrule: True
    conda:
        "../envs/pictures.yaml"
    params:
        script=SCRIPTS / "pilot.py",
        runs=str(PLAN.results / "runs"),
        told=pilot_arguments,
    shell:
        "python {params.script:q} summary --comparisons {input.comparisons:q} --runs {params.runs:q} --base {input.base:q}"
        " {params.told:q}"
        " --table {output.table:q} --curves {output.curves:q} --advice {output.advice:q} --figure {output.figure:q}"
        " > {log:q} 2>&1"
