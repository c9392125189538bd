#!/bin/bash
# What both containers run: system packages, then exactly what requirements.txt pins. Arguments go to pip.
set -euo pipefail
cd /opt/dinoscope
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates fonts-dejavu-core git make procps python3 python3-venv
rm -rf /var/lib/apt/lists/*
python3 -m venv .venv
.venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check "$@" -r requirements.txt
.venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps "$@" .
.venv/bin/python -c 'import dinoscope, snakemake, torch'
