# Sourced by the other scripts: a Python environment with the requirements, and how they run their commands. The
# environment is the active virtual one, else .venv in the repository, which is made if missing.
# With --dry_run among its arguments a script prints its commands, one a line, and runs none: nothing is written.
set -euo pipefail

dry_run=
rest=()
for word in "$@"; do
    if [ "$word" = --dry_run ]; then dry_run=1; else rest+=("$word"); fi
done
set -- "${rest[@]}" # of the script that sources this
exec 3>&1           # where commands are printed, whatever their own output goes to

# A command as a line to paste. Words with * are patterns of files that the commands before it make.
show() {
    local word line=
    for word in "$@"; do
        [[ $word =~ ^[][[:alnum:]_./:,=+@%*-]+$ ]] || printf -v word %q "$word"
        line+=" $word"
    done
    echo "${line# }" >&3
}

# run COMMAND …: every command of a script goes through it, or through `into`.
run() {
    if [ -n "$dry_run" ]; then show "$@"; else "$@"; fi
}

# Before long work: ends the script with what a command says of its flags, and says nothing if they are right.
check() {
    [ -n "$dry_run" ] || "$@" --dry_run >/dev/null
}

# into FILE COMMAND …: its output is printed and kept in the file.
into() {
    local file=$1
    shift
    if [ -n "$dry_run" ]; then
        echo "$(show "$@" 3>&1) | $(show tee "$file" 3>&1)" >&3
    else
        mkdir -p "$(dirname "$file")"
        "$@" | tee "$file"
    fi
}

# What is told besides, of what was done: nothing with --dry_run.
say() {
    [ -n "$dry_run" ] || echo "$@"
}

# split ARGUMENTS …: they are in `words`, --flag=value as --flag value.
split() {
    local word
    words=()
    for word in "$@"; do
        case $word in
            --*=*) words+=("${word%%=*}" "${word#*=}") ;;
            *) words+=("$word") ;;
        esac
    done
}

fail() {
    echo "error: $1" >&2
    exit 2
}

# out_of NAME PRESET: the folder to write to unless told otherwise, another one for each preset.
out_of() {
    if [ "$2" = digits ]; then echo "output_dir/$1"; else echo "output_dir/$1_$2"; fi
}

# The GPUs of this machine, unless GPUS says how many; with --dry_run 8 where it has none.
num_gpus() {
    local count=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
    if [ "$count" = 0 ] && [ -n "$dry_run" ] && [ -z "${GPUS:-}" ]; then
        echo "# no GPU here: the commands are for 8, GPUS says another number" >&2
        count=8
    fi
    [ "$count" != 0 ] || fail "no GPU here; GPUS says how many to use, PRESET=digits needs none"
    [[ $count =~ ^[1-9][0-9]*$ ]] || fail "GPUS must be a number above 0, got '$count'"
    echo "$count"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -z "$dry_run" ] || [ "$PWD" = "$root" ] || run cd "$root"
cd "$root"

if [ -z "${VIRTUAL_ENV:-}${MAR_ENV_READY:-}" ]; then
    if [ ! -f .venv/bin/activate ]; then
        python=${PYTHON:-python3}
        [ -n "$dry_run" ] || "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "Python 3.11 or newer is needed, $("$python" --version 2>&1) found; set PYTHON to one"
        say "making .venv"
        run "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    run source .venv/bin/activate
fi

# Install if requirements.txt is not the one of the last installation in this environment.
stamp="${VIRTUAL_ENV:-.venv}/.mar_requirements"
if [ -z "${MAR_ENV_READY:-}" ] && ! cmp -s requirements.txt "$stamp"; then
    say "installing requirements.txt (once; a few minutes)"
    run python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    run cp requirements.txt "$stamp"
fi
export MAR_ENV_READY=1 # for scripts that this one calls
