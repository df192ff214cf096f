#!/bin/bash
# run.sh: interrupts a save at every one of its file operations, in ten ways, and checks that the old or the
# new checkpoint is whole afterwards, that no failed save is called a success, and that the next save works.
#
#   dev/faults/run.sh [SAVE_PROGRAM]       default: dev/faults/save_once.c, built here
#
# SAVE_PROGRAM DIR            loads the checkpoint in DIR if any, saves the next, exits 0 or 1 honestly
# SAVE_PROGRAM --verify DIR   exits 0 if and only if DIR/last, or DIR itself if it is a checkpoint, is whole
#                             and its files belong to one save
#
# Two situations: the next step is new; and it exists already, saved by an earlier run that went further.
# Kinds: see shim.c. A row counts the points after which the OLD or the NEW checkpoint was the last one, and
# the failures: BROKEN (something visible is not whole), LIED (exit code 0 without a new save, or although an
# fsync or close failed), STUCK (an interrupted call was not continued; or the next save fails or leaves
# something behind), CRASHED, SILENT (failed without a word). Last line: "N passed, N failed"; exit code 1 if
# any failed.
# Environment: KINDS="kill lost" runs only these; MALLOC=0 leaves out the allocations; WORKERS=2.
set -u
here=$(cd "$(dirname "$0")" && pwd)
build=$here/../../build
mkdir -p "$build"
cc=${CC:-cc}
$cc -shared -fPIC -O1 -o "$build/faults_shim.so" "$here/shim.c" -ldl || exit 1
if [ $# -gt 0 ]; then
    program=$(realpath "$1")
else
    program=$build/save_once
    libs=${LIBS:-$(pkg-config --cflags --libs jansson libpcre2-8 libutf8proc) -lm}
    # shellcheck disable=SC2086
    $cc -std=gnu11 -O1 -o "$program" "$here/save_once.c" $libs || exit 1
fi

# in memory if possible: the kernel's fsync is not what is tested, and there it costs nothing
top=$(mktemp -d "$([ -w /dev/shm ] && echo /dev/shm || echo /tmp)/ssm_faults_XXXXXX")
trap 'rm -rf "$top"' EXIT
workers=${WORKERS:-2}
file_kinds=${KINDS:-kill enospc eio eio1 eintr short lost reorder dropped torn}
shim=$build/faults_shim.so

# The starting points: new/ has steps 1 and 2; again/ has step 3 too, but `last` points to step 2.
out=$top/0/out
mkdir -p "$top/0"
if ! { "$program" "$out" && "$program" "$out" && "$program" --verify "$out"; } > "$top/log" 2>&1; then
    cat "$top/log"
    echo "error: $program does not save, or does not verify what it saved"
    exit 1
fi
cp -a "$out" "$top/new"
last=$(readlink "$out/last")
"$program" "$out" >> "$top/log" 2>&1 || exit 1
ln -sfn "$last" "$out/last"
cp -a "$out" "$top/again"

# one POINT KIND SITUATION DIR OPERATION: prints "KIND old|new|broken|lied|stuck|crashed"
one() {
    local out=$4/out before after code each
    rm -rf "$4" && mkdir -p "$4/backup" && cp -a "$top/$3" "$out"
    before=$(readlink "$out/last")
    {   # the braces keep the shell's own "Killed" off the screen
        FAULT_PATH=$out FAULT_AT=$1 FAULT_KIND=$2 FAULT_BACKUP=$4/backup LD_PRELOAD=$shim \
            "$program" "$out" > "$4/log" 2>&1
        code=$?
    } 2> /dev/null
    after=$(readlink "$out/last")
    local result=old
    [ "$before" != "$after" ] && result=new
    case "$code $2" in
        "0 "*|"1 "*|137\ kill|137\ lost|137\ reorder|137\ dropped|137\ torn) ;;
        *) result=crashed ;;
    esac
    # a failed fsync or close of a written file is never a success
    if [ "$code" = 0 ]; then
        [ $result = old ] && result=lied
        case "$2 $5" in eio1\ fsync|eio1\ close|enospc\ fsync|enospc\ close) result=lied ;; esac
    fi
    # an interrupted call or a short write is continued
    case "$code $2 $5" in
        1\ short\ *|1\ eintr\ write|1\ eintr\ open|1\ eintr\ fsync|1\ eintr\ close) result=stuck ;;
    esac
    [ "$code" = 1 ] && [ ! -s "$4/log" ] && result=silent
    for each in "$out" "$out"/step_*[0-9]; do     # whatever is visible is whole
        "$program" --verify "$each" > /dev/null 2> "$4/why" || { result=broken; break; }
    done
    if [ $result = old ] || [ $result = new ]; then   # the next save works and leaves nothing behind
        { "$program" "$out" && "$program" --verify "$out"; } > /dev/null 2> "$4/why" || result=stuck
        [ -z "$(find "$out" -maxdepth 2 -name '*.tmp' -o -maxdepth 1 -name 'probe*')" ] || result=stuck
    fi
    echo "$2 $result $3"
    case $result in
        old|new) ;;
        *) echo "point $1 ($5), $2, $3: $result, exit code $code:" "$(cat "$4/log" "$4/why" | head -2)" >&2 ;;
    esac
}

worker() {   # every workers-th job of the list
    local i=0 point kind situation operation
    while read -r point kind situation operation; do
        i=$((i + 1))
        [ $((i % workers)) = "$1" ] && one "$point" "$kind" "$situation" "$top/w$1" "$operation"
    done < "$top/jobs"
}

for situation in new again; do
    rm -rf "$top/t" && mkdir -p "$top/t" && cp -a "$top/$situation" "$top/t/out"
    FAULT_PATH=$top/t/out FAULT_AT=0 FAULT_TRACE=$top/trace LD_PRELOAD=$shim \
        "$program" "$top/t/out" > "$top/log" 2>&1
    echo "$(wc -l < "$top/trace") file operations in a save, next step $situation"
    for kind in $file_kinds; do
        # an fsync that fails after `last` is in place (when old checkpoints are removed) may be passed over
        awk -v kind="$kind" -v situation=$situation '
            $1 == "rename" && $2 ~ /\/last$/ { late = 1 }
            late && ($1 == "fsync" || $1 == "close") && ++late > 3 { $1 = "late-" $1 }
            kind != "short" || $1 == "write" { print NR, kind, situation, $1 }' "$top/trace"
    done >> "$top/jobs"
done
if [ "${MALLOC:-1}" = 1 ]; then   # allocation 1, 2, ... fails, until the save no longer notices
    rm -rf "$top/t" && mkdir -p "$top/t" && cp -a "$top/new" "$top/t/out"
    FAULT_AT=0 FAULT_KIND=malloc1 FAULT_TRACE=$top/trace LD_PRELOAD=$shim \
        "$program" "$top/t/out" > "$top/log" 2>&1
    echo "$(cat "$top/trace") allocations in a save"
    for n in $(seq 1 $(($(cat "$top/trace") + 1))); do
        printf '%s malloc1 new malloc\n%s mallocs new malloc\n' "$n" "$n"
    done >> "$top/jobs"
fi
for w in $(seq 0 $((workers - 1))); do worker "$w" > "$top/results$w" 2> "$top/failures$w" & done
wait
cat "$top"/failures* >&2
cat "$top"/results* | awk '
    { n[$1]++; r[$1, $2]++; if ($2 == "old" || $2 == "new") passed++; else failed++ }
    END {
        kinds = split("kill enospc eio eio1 eintr short lost reorder dropped torn malloc1 mallocs", kind, " ")
        results = split("old new broken lied stuck crashed silent", result, " ")
        printf "%-9s%8s", "kind", "points"
        for (j = 1; j <= results; j++) printf "%8s", result[j]
        for (i = 1; i <= kinds; i++) {
            if (!n[kind[i]]) continue
            printf "\n%-9s%8d", kind[i], n[kind[i]]
            for (j = 1; j <= results; j++) printf "%8d", r[kind[i], result[j]]
        }
        printf "\n%d passed, %d failed\n", passed, failed
        exit failed > 0
    }'
