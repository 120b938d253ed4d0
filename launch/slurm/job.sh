# shellcheck shell=bash
# The life of a Slurm job that runs megatron-vespo; sourced by the launchers beside it. docs/slurm.md says what can be set.
# Run by hand, a launcher submits itself; in a job it checks the nodes, brings up Ray on them, runs the driver, ends all.

# One answer each: what stopped the driver decides whether the job is queued again.
readonly REFUSED=2 STOPPED=75

if [ -z "${SLURM_JOB_ID:-}" ]; then
  flags=()
  [ -z "${NODES:-}" ] || flags+=(--nodes="$NODES")
  [ -z "${GPUS_PER_NODE:-}" ] || flags+=(--gpus-per-node="$GPUS_PER_NODE")
  [ -z "${ACCOUNT:-}" ] || flags+=(--account="$ACCOUNT")
  [ -z "${PARTITION:-}" ] || flags+=(--partition="$PARTITION")
  [ -z "${TIME:-}" ] || flags+=(--time="$TIME")
  exec sbatch "${flags[@]}" "$0" "$@"
fi

say() { echo "$(date '+%F %T') $*"; }
refuse() {
  say "refused: $*" >&2
  exit "$REFUSED"
}

# Everything about this start of the job that a step may want to know.
prepare() {
  : "${RUN_DIR:=runs/$SLURM_JOB_NAME}" "${RAY_DEADLINE_S:=300}" "${MAX_STARTS:=3}" "${GRACE_S:=60}"
  if [ -z "${PYTHON:-}" ]; then
    if [ -z "${CONTAINER_IMAGE:-}" ] && [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python3; fi
  fi
  [ -z "${VIRTUAL_BIN:=$(dirname "$PYTHON")}" ] || export PATH="$VIRTUAL_BIN:$PATH"
  LOGS=$RUN_DIR/logs/job-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  mkdir -p "$LOGS"
  LOGS=$(readlink -f "$LOGS")
  RUN_DIR=$(readlink -f "$RUN_DIR")
  ADDRESS_FILE=$LOGS/ray_address
  rm -f "$ADDRESS_FILE"
  # Whoever reaches an open Ray port runs what he likes as this user.
  RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
  RAY_TEMPORARY=/tmp/ray.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  export PYTHON LOGS RUN_DIR RAY_DEADLINE_S RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_TEMPORARY TRAINER_NODES
  STEP=(srun --overlap --cpu-bind=none --kill-on-bad-exit=0)
  [ -z "${SLURM_HET_SIZE:-}" ] || HET_GROUPS=(--het-group="$(seq -s, 0 $((SLURM_HET_SIZE - 1)))")
  choose_container
  ALL_NODES=$(count_nodes)
  say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $ALL_NODES nodes, run $RUN_DIR, logs $LOGS"
}

count_nodes() {
  local count=0 part
  for ((part = 0; part < ${SLURM_HET_SIZE:-0}; part++)); do
    local of_part=SLURM_JOB_NUM_NODES_HET_GROUP_$part
    count=$((count + ${!of_part}))
  done
  if ((count)); then echo "$count"; else echo "$SLURM_JOB_NUM_NODES"; fi
}

# CONTAINER_IMAGE: by pyxis where srun knows it, else by apptainer. Without one the environment is taken as it is.
choose_container() {
  CONTAINED=()
  [ -n "${CONTAINER_IMAGE:-}" ] || return 0
  local mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  if srun --help | grep -q -- --container-image=; then
    STEP+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD")
    STEP+=(--container-name="vespo-$SLURM_JOB_ID")
  elif command -v apptainer >/dev/null; then
    CONTAINED=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER_IMAGE")
  else
    refuse "CONTAINER_IMAGE=$CONTAINER_IMAGE, but srun has no --container-image (pyxis) and there is no apptainer;" \
      "ask for one of them, or leave CONTAINER_IMAGE out"
  fi
}

newest_checkpoint() {
  local folder newest=none
  for folder in "$RUN_DIR"/checkpoints/step_*; do [ ! -d "$folder" ] || newest=${folder##*/}; done
  echo "$newest"
}

# Counts starts since the newest checkpoint, over Slurm's own requeues too; a submission by hand counts anew.
notice_crash_loop() {
  local record=$RUN_DIR/starts.$SLURM_JOB_ID checkpoint starts=0 before=none
  checkpoint=$(newest_checkpoint)
  if [ -f "$record" ]; then read -r before starts <"$record"; fi
  if [ "$before" = "$checkpoint" ]; then STARTS=$((starts + 1)); else STARTS=1; fi
  echo "$checkpoint $STARTS" >"$record"
  if ((STARTS > MAX_STARTS)); then
    say "crash loop: $((STARTS - 1)) starts without a new checkpoint since $checkpoint; not started again. Logs: $RUN_DIR/logs" >&2
    exit 1
  fi
}

preflight() {
  local code=0
  "${STEP[@]}" "${HET_GROUPS[@]}" --ntasks-per-node=1 --label --output="$LOGS/doctor.log" \
    "${CONTAINED[@]}" "$PYTHON" -m megatron_vespo doctor "$@" || code=$?
  [ "$code" = 0 ] && return
  grep -hiE 'refused|error' "$LOGS/doctor.log" >&2 || tail -n 20 "$LOGS/doctor.log" >&2
  refuse "the preflight did not pass (exit code $code); all of it is in $LOGS/doctor.log"
}

# The first TRAINER_NODES nodes are for trainers, the rest for engines; without the variable every node is for both.
ray_node() {
  local first=() roles=(trainer rollout)
  [ "$SLURM_PROCID" != 0 ] || first=(--first)
  if [ -n "${TRAINER_NODES:-}" ]; then
    if ((SLURM_PROCID < TRAINER_NODES)); then roles=(trainer); else roles=(rollout); fi
  fi
  exec "$PYTHON" -m megatron_vespo.launch.ray_nodes serve "$LOGS" "${first[@]}" \
    --roles "${roles[@]}" --temporary "$RAY_TEMPORARY" --deadline "$RAY_DEADLINE_S"
}

start_ray() {
  "${STEP[@]}" "${HET_GROUPS[@]}" --ntasks-per-node=1 --output="$LOGS/ray-%t.log" \
    "${CONTAINED[@]}" bash -c "$(declare -f ray_node); ray_node" &
  RAY=$!
  on_head await "$PYTHON" -m megatron_vespo.launch.ray_nodes await "$LOGS" --nodes "$ALL_NODES" --deadline "$RAY_DEADLINE_S" &
  local waiting=$!
  while kill -0 "$waiting" 2>/dev/null; do
    kill -0 "$RAY" 2>/dev/null || kill -TERM "$waiting" 2>/dev/null || true # nobody is left to wait for
    pause
  done
  [ "$(exit_code await)" = 0 ] && return
  tail -n 20 "$LOGS"/await.log >&2
  say "Ray did not come up on $ALL_NODES nodes; logs $LOGS/ray-*.log" >&2
  return 1
}

# FILE COMMAND...: the task of a step, in a shell of its own. srun's own exit code may be 0 after a node was lost, so that of
# the command is kept in FILE. Slurm's cgroups give SIGTERM to the task alone and not to what it starts: it is passed on.
keep_exit_code() {
  local file=$1 command code again=1
  shift
  (
    trap - INT QUIT # which a shell lets its background processes ignore
    exec "$@"
  ) &
  command=$!
  trap 'again=1; kill -TERM "$command"' TERM
  while ((again)); do # a signal ends the wait early
    again=0 code=0
    wait "$command" || code=$?
  done
  echo "$code" >"$file"
  exit "$code"
}

# NAME COMMAND...: on the first node, its output in NAME.log, its exit code in NAME.exit.
on_head() {
  local name=$1
  shift
  rm -f "$LOGS/$name.exit"
  "${STEP[@]}" --nodes=1 --ntasks=1 --nodelist="$(hostname -s)" --output="$LOGS/$name.log" "${CONTAINED[@]}" \
    bash -c "$(declare -f keep_exit_code); keep_exit_code \"\$@\"" bash "$LOGS/$name.exit" "$@"
}

exit_code() { cat "$LOGS/$1.exit" 2>/dev/null || echo 1; }

pause() {
  sleep 1 &
  wait $! || true # a signal ends the wait early, and its trap runs
}

# Slurm says that the time will be up: the driver ends at its next step, with a checkpoint.
ask_to_stop() {
  say "Slurm announces the end of the time: the run stops at its next step"
  touch "$RUN_DIR/stop"
  STOP_AT=$(($(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s) - GRACE_S))
}

drive() {
  on_head driver "$PYTHON" -m megatron_vespo "$@" "cluster.address=$(cat "$ADDRESS_FILE")" &
  DRIVER=$!
  say "driver started: $LOGS/driver.log"
  while kill -0 "$DRIVER" 2>/dev/null; do
    pause
    if ((STOP_AT && $(date +%s) >= STOP_AT)); then
      say "no step ended in time: the driver is ended, and goes on from its newest checkpoint"
      kill -TERM "$DRIVER" 2>/dev/null || true
      wait "$DRIVER" || true
      return "$STOPPED"
    fi
  done
  return "$(exit_code driver)"
}

# Also on the way out of a failure or scancel: no step survives the script.
end_steps() {
  trap '' TERM USR1
  local process
  for process in ${DRIVER:-} ${RAY:-}; do
    kill -TERM "$process" 2>/dev/null || continue
    for ((i = 0; i < 30; i++)); do
      kill -0 "$process" 2>/dev/null || break
      sleep 1
    done
    kill -KILL "$process" 2>/dev/null || true
  done
}

# A dead node is Slurm's to find; until then a start could land on it again.
wait_for_dead_nodes() {
  local answer
  answer=$(timeout 30 "${STEP[@]:0:1}" --overlap "${HET_GROUPS[@]}" --ntasks-per-node=1 true 2>&1) && return
  say "a node does not answer (${answer##*$'\n'}): waiting until Slurm finds it down and queues the job again"
  sleep "${NODE_DOWN_S:-600}" &
  wait $! || true
}

requeue() {
  say "queued again: $*"
  end_steps
  scontrol requeue "$SLURM_JOB_ID" || say "Slurm had queued it again already"
  sleep 60 # Slurm ends this script
  exit 1
}

# split_into N: sets SPLIT to settings under which a rollout batch makes N updates of the paper's 256 prompts, and the run
# its 1,500. Without an N to none: the config's stay.
# shellcheck disable=SC2034 # the launchers pass it on
split_into() {
  SPLIT=()
  [ -n "$1" ] || return 0
  [[ $1 =~ ^[1-9][0-9]*$ ]] || refuse "N=$1: how many mini-batches a rollout batch is cut into, such as N=16"
  SPLIT=("train.mini_batches=$1" "train.prompts_per_step=$((256 * $1))" "train.steps=$(((1500 + $1 - 1) / $1))")
}

# train_job CONFIG key=value...: a training run, from its newest checkpoint if it has one; its exit code is the driver's.
train_job() {
  local code=0 settings
  STOP_AT=0 DRIVER='' RAY='' HET_GROUPS=()
  prepare
  rm -f "$RUN_DIR/stop" # of a start that ended before it obeyed
  settings=("$@" "run_dir=$RUN_DIR")
  [ -z "${MODEL:-}" ] || settings+=("model.path=$MODEL")
  [ -z "${DATA:-}" ] || settings+=("data.train=$DATA")
  notice_crash_loop
  trap end_steps EXIT
  trap ask_to_stop USR1
  trap 'exit 130' TERM INT
  preflight "${settings[@]}"
  if start_ray; then drive train "${settings[@]}" || code=$?; else code=1; fi
  say "driver ended with exit code $code"
  case $code in
    0 | "$REFUSED" | 130) ;;
    "$STOPPED") requeue "stopped before its time was up" ;;
    *)
      [ ! -f "$LOGS/driver.log" ] || tail -n 20 "$LOGS/driver.log" >&2
      if ((STARTS < MAX_STARTS)); then
        wait_for_dead_nodes
        requeue "start $STARTS of at most $MAX_STARTS since checkpoint $(newest_checkpoint)"
      fi
      say "crash loop: $STARTS starts without a new checkpoint since $(newest_checkpoint); not queued again" >&2
      ;;
  esac
  exit "$code"
}

# command_job COMMAND ARGUMENT...: any other command of megatron-vespo, on the first node, without Ray of ours. At the time
# limit, scancel or a requeue Slurm tells the command itself; what it says at its end still gets into the job's log.
command_job() {
  HET_GROUPS=()
  prepare
  trap : TERM INT
  on_head "$1" "$PYTHON" -m megatron_vespo "$@" &
  local command=$!
  while kill -0 "$command" 2>/dev/null; do wait "$command" || true; done
  cat "$LOGS/$1.log"
  exit "$(exit_code "$1")"
}
