#!/bin/sh
# Fetches tinyshakespeare (1.1 MB of plays) to data/tinyshakespeare.txt. Run again to resume.
# DATA_URL: another place to fetch from, for example a mirror or file:///some/directory
set -u
url=${DATA_URL:-https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare}
dir=$(dirname "$0")
. "$dir/fetch.sh"

fetch "$url/input.txt" "$dir/tinyshakespeare.txt" 1115394 \
    86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
