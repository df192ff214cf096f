# What the get_*.sh scripts share. To be sourced: . "$dir/fetch.sh"

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
