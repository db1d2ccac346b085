#!/usr/bin/env bash
# Rents a Cloud TPU slice, trains on it, and gives it back.
#   launch/tpu_vm.sh [--dry-run] create NAME ZONE TYPE [GCLOUD_FLAG ...]
#   launch/tpu_vm.sh [--dry-run] setup  NAME ZONE
#   launch/tpu_vm.sh [--dry-run] run    NAME ZONE CONFIG WORKDIR [--config.OPTION=VALUE ...]
#   launch/tpu_vm.sh [--dry-run] tail   NAME ZONE
#   launch/tpu_vm.sh [--dry-run] delete NAME ZONE
# TYPE is v5litepod-256, v5p-128, v6e-256 or the like; create passes further
# flags, such as --spot, to gcloud. The slice costs money from create to delete.
# setup sends the last commit, not what is uncommitted. run returns at once; on
# slices of several hosts WORKDIR must be gs://. --dry-run prints every command,
# ready to be pasted, and runs none. JAX_COMPILATION_CACHE_DIR=gs://... is passed
# on: compiled programs, which process 0 writes and all processes read.
set -euo pipefail
usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
(($# >= 3)) || usage
action=$1 name=$2 zone=$3
shift 3
case $action/$# in
  create/[1-9]* | run/[2-9]* | run/1? | setup/0 | tail/0 | delete/0) ;;
  *) usage ;;
esac
cd "$(dirname "$0")/.."

# Prints a command, quoted for a shell, and runs it unless this is a dry run.
call() {
  local word line=
  for word; do
    [[ $word =~ ^[[:alnum:]_=:./,+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
  $dry_run || "$@"
}

tpu=(gcloud compute tpus tpu-vm)

create() {
  local type=$1 version
  shift
  case $type in # https://cloud.google.com/tpu/docs/runtimes
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v[234]-*) version='tpu-ubuntu2204-base' ;;
    *)
      echo "TYPE=$type: unknown; v6e-*, v5p-*, v5litepod-* or v4-*" >&2
      exit 2
      ;;
  esac
  call "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$type" \
    --version="$version" "$@"
}

# Runs a command line in the home directory of one host or of all.
on_hosts() {
  call "${tpu[@]}" ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

setup() {
  local archive=moe_jax.tar.gz
  call git archive --prefix=moe_jax/ --output="$archive" HEAD
  call "${tpu[@]}" scp "$archive" "$name:$archive" --zone="$zone" --worker=all
  call rm "$archive"
  # Huge pages: jax warns that the TPU runtime starts slowly without them. The
  # Python of a slice may be too old; uv brings one.
  on_hosts all "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled \
&& rm -rf moe_jax && tar -xzf $archive && cd moe_jax \
&& python3 -m pip install --quiet --target=.uv uv==0.13.9 \
&& .uv/bin/uv venv --quiet --python='>=3.12,<3.14' .venv \
&& .uv/bin/uv pip install --quiet -r requirements.txt -r requirements-tpu.txt"
}

run() {
  local config=$1 workdir=$2 command
  shift 2
  local cache=${JAX_COMPILATION_CACHE_DIR:-}
  printf -v command '%q ' ${cache:+env "JAX_COMPILATION_CACHE_DIR=$cache"} \
    .venv/bin/python -m moe_jax.main \
    --config="$config" --workdir="$workdir" "$@"
  # It keeps running when the connection ends, and says at last how it ended.
  on_hosts all "cd moe_jax || exit; (trap '' HUP; $command; echo exit code \$?) \
>>../train.log 2>&1 </dev/null &"
}

tail() {
  on_hosts 0 'tail -n 100 -F train.log'
}

delete() {
  call "${tpu[@]}" delete "$name" --zone="$zone" --quiet
}

"$action" "$@"
