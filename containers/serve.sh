#!/bin/sh
# serve judge|consistency [OPTIONS]: start a service; options go to it. JUDGE is the judge's model.
set -eu

service="${1:-}"
[ $# -eq 0 ] || shift
case "$service" in
judge)
    exec /opt/judge/bin/vllm serve "${JUDGE:-Qwen/Qwen3-VL-8B-Instruct}" --host 0.0.0.0 --port 8000 \
        --max-model-len 16384 --limit-mm-per-prompt '{"image": 4}' "$@"
    ;;
consistency)
    exec /opt/consistency/bin/mteditflow serve --host 0.0.0.0 --port 8200 --device cuda "$@"
    ;;
*)
    echo "error: service: expected judge or consistency, got '$service'" >&2
    exit 2
    ;;
esac
