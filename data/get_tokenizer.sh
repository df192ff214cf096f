#!/bin/sh
# Fetches a published tokenizer: `neox` (default; GPT-NeoX-20B's, which the published Mamba models use) to
# data/gpt-neox-20b/tokenizer.json, or `gpt2` to data/gpt2/tokenizer.json. Run again to resume.
# DATA_URL: another place to fetch from, for example a mirror or file:///some/directory
set -u
dir=$(dirname "$0")
. "$dir/fetch.sh"

case ${1:-neox} in
neox) name=gpt-neox-20b
    url=https://huggingface.co/EleutherAI/gpt-neox-20b/resolve/c292233c833e336628618a88a648727eb3dff0a7
    bytes=2113710 sum=c24618a1b3e6a38167beff1c72cffd126c3a66254347304b50547d12c5f25624 ;;
gpt2) name=gpt2
    url=https://huggingface.co/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e
    bytes=1355256 sum=8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6 ;;
*) die "expected neox or gpt2, found '$1'" ;;
esac
mkdir -p "$dir/$name" || die "cannot make $dir/$name"
fetch "${DATA_URL:-$url}/tokenizer.json" "$dir/$name/tokenizer.json" $bytes $sum
