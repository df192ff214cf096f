#!/bin/sh
# Fetches enwik8 (100,000,000 bytes of Wikipedia, of 2006) to data/enwik8. Run again to resume.
# DATA_URL: another place to fetch from, for example a mirror or file:///some/directory
set -u
url=${DATA_URL:-http://mattmahoney.net/dc}
dir=$(dirname "$0")
. "$dir/fetch.sh"

file=$dir/enwik8
bytes=100000000
sum=2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8
if [ -e "$file" ]; then
    [ "$(size "$file")" = $bytes ] && [ "$(sha256 "$file")" = $sum ] ||
        die "$file exists with other content; move it away"
    echo "$file: already there"
    exit 0
fi
command -v unzip >/dev/null || die "unzip not found; install it"
# A zip file ends with its table of contents, so only a complete one passes unzip's test.
unzip -tq "$file.zip.part" >/dev/null 2>&1 || download "$url/enwik8.zip" "$file.zip.part" "$file.zip.part"
if ! unzip -p "$file.zip.part" enwik8 >"$file.part" 2>/dev/null || [ "$(sha256 "$file.part")" != $sum ]; then
    found=$(size "$file.part")
    rm -f "$file.part" "$file.zip.part"
    die "$url/enwik8.zip: expected enwik8 of $bytes bytes with sha256 $sum," \
        "found other content ($found bytes); removed it"
fi
mv "$file.part" "$file" || die "cannot write $file"
rm -f "$file.zip.part"
echo "$file: $bytes bytes, checksum right"
