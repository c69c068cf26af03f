#!/usr/bin/env bash
# The paper's setting on DeiT-Small: see imagenet.sh for what to set; --dry-run says how long it takes on this machine.
exec bash "$(dirname "$0")/imagenet.sh" deit_small_patch16_224.fb_in1k 0.65 "$@"
