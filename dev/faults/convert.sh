#!/bin/bash
# convert.sh: interrupts `train_mamba convert` at every one of its file operations, in ten ways (see shim.c).
# Afterwards the new directory is there and whole, or not there; the source is what it was; exit code 0 only
# with the new directory. Needs build/train_mamba and build/faults_shim.so (run.sh builds it). Last line:
# "N passed, N failed".
set -u
build=$(cd "$(dirname "$0")/../../build" && pwd)
program=$build/train_mamba shim=$build/faults_shim.so
top=$(mktemp -d "$([ -w /dev/shm ] && echo /dev/shm || echo /tmp)/ssm_convert_XXXXXX")
trap 'rm -rf "$top"' EXIT
export GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1      # it need not start itself again
passed=0 failed=0
must() { "$@" > "$top/log" 2>&1 || { cat "$top/log"; exit 1; }; }
must "$program" convert --preset tiny --d-model 16 --n-layer 1 --out "$top/source"
for dialect in hf mamba_ssm; do
    convert() { "$program" convert --from "$top/source" --out "$top/run/$1" --dialect $dialect --dtype bf16; }
    rm -rf "$top/run" && mkdir "$top/run"
    FAULT_PATH=$top/run FAULT_AT=0 FAULT_TRACE=$top/trace LD_PRELOAD=$shim must convert new
    mv "$top/run/new" "$top/$dialect" && cp -r "$top/source" "$top/before"
    points=$(wc -l < "$top/trace")
    for kind in kill enospc eio eio1 eintr short lost reorder dropped torn; do
        old=0 new=0 bad=0
        for at in $(seq "$points"); do
            rm -rf "$top/run" "$top/backup" && mkdir "$top/run" "$top/backup"
            { FAULT_PATH=$top/run FAULT_AT=$at FAULT_KIND=$kind FAULT_BACKUP=$top/backup LD_PRELOAD=$shim \
                convert new > "$top/log" 2>&1; code=$?; } 2> /dev/null
            result=old
            [ -e "$top/run/new" ] && result=new
            [ $result = new ] && ! diff -r "$top/run/new" "$top/$dialect" > /dev/null && result=broken
            [ $result = old ] && [ $code = 0 ] && result=lied
            [ $code = 1 ] && [ ! -s "$top/log" ] && result=silent
            diff -r "$top/source" "$top/before" > /dev/null || result=source
            case $result in
                old) old=$((old + 1)) ;;
                new) new=$((new + 1)) ;;
                *) bad=$((bad + 1))
                   echo "point $at, $kind, $dialect: $result, exit $code: $(head -1 "$top/log")" >&2 ;;
            esac
        done
        printf '%-9s convert to %-9s %4d points: %4d without the new directory, %4d with it, %d failed\n' \
            $kind $dialect "$points" $old $new $bad
        passed=$((passed + old + new)) failed=$((failed + bad))
    done
    rm -rf "$top/before"
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
