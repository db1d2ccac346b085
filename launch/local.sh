#!/usr/bin/env bash
# Runs a training on this machine, on all its devices; or, to try out a mesh, on
# virtual CPU devices in one or more processes, which talk over loopback only.
#   launch/local.sh CONFIG WORKDIR [[PROCESSESx]DEVICES] [--config.OPTION=VALUE ...]
#   launch/local.sh experiments/demo.py:bip runs/mesh 8 --config.mesh.expert=4
#   launch/local.sh experiments/demo.py:bip runs/two 2x4 --config.mesh.expert=4
# If one process fails the others are stopped; the exit code is that of the first
# to fail. Environment: PYTHON (default: .venv/bin/python of the repository).
set -euo pipefail
if (($# < 2)); then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
processes=1
if [[ ${1:-} =~ ^(([1-9][0-9]*)x)?([1-9][0-9]*)$ ]]; then
  processes=${BASH_REMATCH[2]:-1}
  export JAX_PLATFORMS=cpu
  count=--xla_force_host_platform_device_count=${BASH_REMATCH[3]}
  export XLA_FLAGS="${XLA_FLAGS:-} $count"
  shift
fi
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
command=("${PYTHON:-$root/.venv/bin/python}" -m moe_jax.main
  --config="$config" --workdir="$workdir" "$@")
if ((processes == 1)); then
  exec "${command[@]}"
fi

# The system names a port that is free just now.
port=$("${command[0]}" -c 'import socket
print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
export JAX_NUM_PROCESSES=$processes
pids=()
# Stopping this script asks the processes to end; stopping it twice ends them.
signal=TERM
trap 'kill -"$signal" "${pids[@]}" 2>/dev/null || true; signal=KILL' INT TERM
for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID=$i "${command[@]}" &
  pids+=($!)
done

# Ends those that wait for one that is gone; first they may say why they stop.
end_others() {
  for ((i = 0; i < 10; i++)); do
    kill -0 "${pids[@]}" 2>/dev/null || return 0
    sleep 0.5
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
}

code=0
for ((left = processes; left > 0; )); do
  pid=
  wait -n -p pid && status=0 || status=$?
  [[ ${pid:-} ]] || continue # Not the end of a process: a signal, passed on.
  left=$((left - 1))
  # 75 is no failure: stopped and saved, and the others are about to.
  ((status == 0)) || code=$status
  if ((status != 0 && status != 75)); then
    end_others
    break
  fi
done
exit "$code"
