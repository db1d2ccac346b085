#!/usr/bin/env bash
# Runs a training on this machine, on all its devices; on CPU with as many
# virtual devices as asked for, to try out a mesh.
#   launch/local.sh CONFIG WORKDIR [DEVICES] [--config.OPTION=VALUE ...]
#   launch/local.sh experiments/demo.py:bip runs/mesh 8 --config.mesh.expert=4
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n 's/^# \{0,1\}//p' "$0" | tail -n +2
  exit 2
fi
config=$1 workdir=$2
shift 2
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$1"
  shift
fi
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "$root/.venv/bin/python" -m moe_jax.main --config="$config" \
  --workdir="$workdir" "$@"
