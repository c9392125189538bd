"""What the configured run will take, before its first job."""


# Without outputs, so that it is done anew whenever it is asked for: free space changes.
rule budget:
    input:
        of_slides("<results>/slides/{slide}.json", PLAN.slides),
    log:
        "<logs>/budget.log",
    localrule: True
    conda:
        "../envs/budget.yaml"
    params:
        script=SCRIPTS / "budget.py",
        config=written_config,
        groups=rule_groups,
    shell:
        "python {params.script:q} --config {params.config:q} --group {params.groups:q} 2>&1 | tee {log:q}"
