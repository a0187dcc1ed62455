#!/usr/bin/env bash
# Keeps one command running on a TPU VM and starts it again after a crash.
#
#   supervise.sh start  --dir DIR --id JOB [--env=NAME=VALUE] [--secret_env=NAME=SECRET] -- COMMAND...
#   supervise.sh run    the same in the foreground
#   supervise.sh stop   --dir DIR
#   supervise.sh status --dir DIR    one line: activations-host HOST STATE JOB DETAIL
#
# The command runs in DIR/work; with `start` its output goes to DIR/logs/extract.log. Exit code 0 ends it as finished, 2
# (wrong flags) as failed. After any other exit code it is started again, with a growing delay, until it has failed
# --max_failures times in a row, each time within --steady_s. `start` waits up to --settle_s for an early failure.
# --secret_env reads a secret from Secret Manager into the environment.
set -euo pipefail

die() {
    echo "error: $2" >&2
    exit "$1"
}

verb=${1:-}
shift || true
arguments=("$@")
dir=$HOME/activations
job=-
variables=()
secrets=()
declare -A seconds=([first_delay_s]=5 [max_delay_s]=60 [steady_s]=600 [settle_s]=10)
max_failures=10
while (($#)); do
    case $1 in
    --dir) dir=${2:?--dir needs a folder} && shift 2 ;;
    --id) job=${2:?--id needs a word} && shift 2 ;;
    --first_delay_s | --max_delay_s | --steady_s | --settle_s)
        [[ ${2:-} =~ ^[0-9]{1,6}$ ]] || die 2 "$1 needs whole seconds"
        seconds[${1#--}]=$2
        shift 2
        ;;
    --max_failures)
        [[ ${2:-} =~ ^[0-9]{1,6}$ ]] || die 2 "$1 needs a number"
        max_failures=$2
        shift 2
        ;;
    --env=[A-Z]*=*) variables+=("${1#--env=}") && shift ;;
    --secret_env=[A-Z]*=?*) secrets+=("${1#--secret_env=}") && shift ;;
    --) shift && break ;;
    *) die 2 "${1%%=*}: not a flag of supervise.sh; see the top of the file" ;;
    esac
done
command=("$@")
[[ $job =~ ^[-A-Za-z0-9]+$ ]] || die 2 "--id $job: use letters, digits and '-'"

home=$dir/supervisor
log=$dir/logs/extract.log
child=   # PID of the command while it runs
nap=     # PID of the sleep between two runs
reaper=  # PID of a process that ends a command which does not catch SIGTERM
ending=  # set once a signal was received
failures=0

say() { echo "$(date -u +%FT%TZ) supervisor: $*"; }

# Replaced atomically, so that a reader never sees a partial state.
set_state() {
    echo "$1 $job ${*:2}" >"$home/state.new"
    mv "$home/state.new" "$home/state"
    say "$@"
}

# The lock is held by the supervisor and by its command: while either lives, nothing else is started on this TPU.
is_locked() { ! flock --nonblock "$home/lock" true; }

status() {
    local state=absent id=- detail=-
    if [[ -f $home/state ]]; then
        read -r state id detail <"$home/state"
        if [[ $state == running || $state == waiting ]] && ! is_locked; then
            detail="it was $state and is gone"
            state=dead
        fi
    fi
    echo "activations-host $(hostname) $state $id ${detail:--}"
}

keep_log_small() {
    if [[ -f $log ]] && (($(stat --format=%s "$log") > 64 * 1024 * 1024)); then
        cp "$log" "$log.1"
        : >"$log" # truncated, not replaced, because the supervisor has it open
    fi
}

# Secrets are kept in the environment of the command and nowhere else.
read_secrets() {
    local pair value
    for pair in ${secrets[@]+"${secrets[@]}"}; do
        if ! value=$(gcloud secrets versions access latest --secret="${pair#*=}" 2>/dev/null); then
            say "the secret ${pair#*=} cannot be read: give this VM's service account roles/secretmanager.secretAccessor"
            return 1
        fi
        export "${pair%%=*}=$value"
    done
}

# SIGTERM is bit 14 of the signals that a process catches.
catches_term() {
    local caught
    caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) || return 1
    (((0x${caught:-0} >> 14) & 1))
}

# The extraction commits what it has on the first SIGTERM and dies on the second. When the VM shuts down, the extraction
# got the first one already and no longer catches it; an extraction that does not catch it yet is ended later.
on_signal() {
    ending=yes
    [[ -z $nap ]] || kill "$nap" 2>/dev/null || true
    [[ -n $child ]] || return 0
    if catches_term "$child"; then
        kill -TERM "$child" 2>/dev/null || true
    elif [[ -z $reaper ]]; then
        (sleep 20 && kill -TERM "$child") 9>&- 2>/dev/null &
        reaper=$!
    fi
}

# `wait` returns early on a signal; the command still gets its time to commit.
await() {
    local code=0
    while :; do
        wait "$1" && code=0 || code=$?
        kill -0 "$1" 2>/dev/null || return "$code"
    done
}

run_once() {
    local code=0
    keep_log_small
    set_state running "since $(date -u +%FT%TZ) after $failures failures in a row"
    read_secrets || return 1
    "${command[@]}" &
    child=$!
    echo "$child" >"$home/child"
    [[ -z $ending ]] || on_signal
    await "$child" || code=$?
    child=
    return "$code"
}

pause() {
    sleep "$1" 9>&- &
    nap=$!
    [[ -z $ending ]] || kill "$nap"
    await "$nap" || true
    nap=
}

# Whether to stop after exit code $1; then `result` is the exit code of the supervisor.
is_over() {
    result=0
    if [[ $1 == 0 ]]; then
        set_state finished "at $(date -u +%FT%TZ)"
    elif [[ -e $home/stop ]]; then
        set_state stopped "by supervise.sh stop"
    elif [[ -n $ending ]]; then
        set_state ended "by a signal"
        result=143
    elif [[ $1 == 2 ]]; then
        set_state failed "exit code 2: the flags are wrong, see $log"
        result=2
    elif ((failures >= max_failures)); then
        set_state failed "exit code $1, $failures failures in a row, see $log"
        result=1
    else
        return 1
    fi
}

supervise() {
    local code began delay
    trap on_signal TERM INT HUP
    while :; do
        began=$SECONDS
        run_once && code=0 || code=$?
        ((SECONDS - began < seconds[steady_s])) || failures=0
        failures=$((failures + 1))
        ! is_over "$code" || break
        delay=$((seconds[first_delay_s] << (failures < 16 ? failures - 1 : 15)))
        ((delay < seconds[max_delay_s])) || delay=${seconds[max_delay_s]}
        set_state waiting "$delay s after exit code $code"
        pause "$delay"
        ! is_over "$code" || break
    done
    [[ -z $reaper ]] || kill "$reaper" 2>/dev/null || true
    return "$result"
}

require_command() {
    ((${#command[@]})) || die 2 "no command after --"
    mkdir -p "$home" "$dir/logs" "$dir/work"
}

# Whether the command has read its flags: from then on the extraction catches SIGTERM.
listens() { [[ -s $home/child ]] && catches_term "$(<"$home/child")"; }

# Waits, for at most --settle_s, until the command catches SIGTERM or has ended.
settle() {
    local state deadline=$((SECONDS + seconds[settle_s]))
    while ((SECONDS <= deadline)) && ! listens; do
        if [[ -f $home/state ]] && read -r state _ <"$home/state" && [[ $state != running ]]; then
            return
        fi
        sleep 0.05
    done
}

start() {
    require_command
    if ! is_locked; then
        rm -f "$home/state" "$home/stop" "$home/child"
        setsid nohup bash "${BASH_SOURCE[0]}" run "${arguments[@]}" </dev/null >>"$log" 2>&1 &
        settle
    fi
    status
}

run() {
    require_command
    exec 9>"$home/lock"
    flock --nonblock 9 || die 1 "another job runs in $dir: $(status)"
    rm -f "$home/stop"
    echo $$ >"$home/pid"
    cd "$dir/work"
    [[ ${#variables[@]} == 0 ]] || export "${variables[@]}"
    supervise
}

stop() {
    [[ -d $home ]] || return 0
    touch "$home/stop"
    if is_locked; then
        kill -TERM "$(<"$home/pid")" 2>/dev/null || true
        for _ in {1..600}; do
            is_locked || break
            sleep 0.1
        done
        ! is_locked || die 1 "the command did not end within 60 s: $(status)"
    fi
    status
}

case $verb in
start | run | stop | status) "$verb" ;;
*) die 2 "start, run, stop or status: see the top of supervise.sh" ;;
esac
