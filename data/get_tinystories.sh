#!/bin/sh
# Fetches TinyStories, version 2, stories by GPT-4 only (2.2 GB for training, 22 MB for validation), to
# data/TinyStoriesV2-GPT4-train.txt and -valid.txt; with the argument `valid` only the small one.
# Run again to resume.
# DATA_URL: another place to fetch from, for example a mirror or file:///some/directory
set -u
url=${DATA_URL:-https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main}
dir=$(dirname "$0")
. "$dir/fetch.sh"

fetch "$url/TinyStoriesV2-GPT4-valid.txt" "$dir/TinyStoriesV2-GPT4-valid.txt" 22502601 \
    6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d
[ "${1:-}" = valid ] && exit 0
fetch "$url/TinyStoriesV2-GPT4-train.txt" "$dir/TinyStoriesV2-GPT4-train.txt" 2227753162 \
    6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443
