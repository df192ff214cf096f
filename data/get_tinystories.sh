#!/bin/sh
# Fetches TinyStories, version 2, stories by GPT-4 only (2.2 GB for training, 22 MB for validation), to
# data/TinyStoriesV2-GPT4-train.txt and -valid.txt; with the argument `valid` only the small one.
# Run again to resume.
# DATA_URL: another place to fetch from, for example a mirror or file:///some/directory
set -u
url=${DATA_URL:-https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main}
dir=$(dirname "$0")

die() { echo "error: $*" >&2; exit 1; }

command -v sha256sum >/dev/null || command -v shasum >/dev/null ||
    die "neither sha256sum nor shasum found; install coreutils"

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d' ' -f1
}

size() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

# download URL FILE: continues FILE where an earlier attempt stopped
download() {
    if command -v curl >/dev/null; then
        if [ -t 2 ]; then show=--progress-bar; else show=--silent; fi
        curl --fail --location $show --retry 3 --connect-timeout 20 --continue-at - --output "$2" "$1"
    elif command -v wget >/dev/null; then
        wget --quiet --tries=3 --timeout=20 --continue --output-document="$2" "$1"
    else die "neither curl nor wget found; install one of them"; fi ||
        die "cannot download $1 (offline?); run again to resume, or save it as $3 yourself"
}

# fetch URL FILE SIZE SHA256: FILE appears under its name only when it is complete and right
fetch() {
    if [ -e "$2" ]; then
        [ "$(size "$2")" = "$3" ] && [ "$(sha256 "$2")" = "$4" ] ||
            die "$2 exists with other content; move it away"
        echo "$2: already there"
        return
    fi
    [ "$(size "$2.part")" -le "$3" ] || rm -f "$2.part"
    [ "$(size "$2.part")" = "$3" ] || download "$1" "$2.part" "$2"
    if [ "$(size "$2.part")" != "$3" ] || [ "$(sha256 "$2.part")" != "$4" ]; then
        found=$(size "$2.part")
        rm -f "$2.part"
        die "$1: expected $3 bytes with sha256 $4, found other content ($found bytes); removed it"
    fi
    mv "$2.part" "$2" || die "cannot write $2"
    echo "$2: $3 bytes, checksum right"
}

fetch "$url/TinyStoriesV2-GPT4-valid.txt" "$dir/TinyStoriesV2-GPT4-valid.txt" 22502601 \
    6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d
[ "${1:-}" = valid ] && exit 0
fetch "$url/TinyStoriesV2-GPT4-train.txt" "$dir/TinyStoriesV2-GPT4-train.txt" 2227753162 \
    6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443
