"""Models for other tools (export.formats): a folder each, which appears once the tool itself has the same features."""


rule export_hf:
    input:
        weights="<results>/models/{exported}/teacher.pth",
        card="<results>/models/{exported}/model.json",
    output:
        verification="<results>/models/{exported}/hf/verification.json",
        card="<results>/models/{exported}/hf/model.json",
        config="<results>/models/{exported}/hf/config.json",
        preprocessor="<results>/models/{exported}/hf/preprocessor_config.json",
        weights="<results>/models/{exported}/hf/model.safetensors",
    log:
        "<logs>/export_hf/{exported}.log",
    conda:
        "../envs/export.yaml"
    threads: 4
    resources:
        mem_mb=growing(16000),
        runtime=growing(60),
    params:
        script=SCRIPTS / "export_model.py",
        format="hf",
        folder=subpath(output.verification, parent=True),
    shell:
        "python {params.script:q} --weights {input.weights:q} --format {params.format:q} --output {params.folder:q}"
        " > {log:q} 2>&1"


use rule export_hf as export_timm with:
    output:
        verification="<results>/models/{exported}/timm/verification.json",
        card="<results>/models/{exported}/timm/model.json",
        config="<results>/models/{exported}/timm/config.json",
        weights="<results>/models/{exported}/timm/model.safetensors",
    log:
        "<logs>/export_timm/{exported}.log",
    params:
        script=SCRIPTS / "export_model.py",
        format="timm",
        folder=subpath(output.verification, parent=True),


use rule export_hf as export_onnx with:
    output:
        verification="<results>/models/{exported}/onnx/verification.json",
        card="<results>/models/{exported}/onnx/model.json",
        model="<results>/models/{exported}/onnx/model.onnx",
    log:
        "<logs>/export_onnx/{exported}.log",
    params:
        script=SCRIPTS / "export_model.py",
        format="onnx",
        folder=subpath(output.verification, parent=True),
