#!/usr/bin/env bash
# From preset rl4evit-code to preset tokengame, a change a row, three seeds, on the embedded model: KL and agreement at
# 0.80, 0.70 and 0.60 of the compute, beside the starting rule, which has learned nothing. Each policy plays 6,400 games
# (100 updates of 64) and is measured on 500 held-back scenes. Two to three hours on one core; an interrupted run goes on
# from build/walk. 6,400 games are few for the first rows: runs/paper.sh has their 1.3 million.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-.venv/bin/python}" -m tokengame ablate --rows walk --preset rl4evit-code --backbone fashion \
    --images fashion-train --holdout 0.025 --updates 100 --output "${OUTPUT:-build/walk}" "$@"
