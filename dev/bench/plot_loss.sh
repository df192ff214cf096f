#!/bin/sh
# plot_loss.sh LOG.csv [OUT.png]: training and validation loss over steps, drawn by gnuplot.
#   Writes OUT.png (default: LOG.png beside the log); with TERM=dumb it draws in the terminal instead.
#   The log is the trainer's: a header line naming the columns, among them step, loss, val_loss; a field is
#   empty where its value is unknown (val_loss is known only at evaluations). Columns are found by name.
set -eu
usage="usage: $0 LOG.csv [OUT.png]   (TERM=dumb draws in the terminal)"
[ $# -ge 1 ] && [ $# -le 2 ] || { echo "$usage" >&2; exit 1; }
log=$1
out=${2:-${log%.csv}.png}
[ -r "$log" ] || { echo "error: cannot read $log" >&2; exit 1; }
command -v gnuplot > /dev/null || {
    echo "error: gnuplot not found; install the package gnuplot-nox" >&2; exit 1; }

# points COLUMN: "step value" for every row where the column has a value
points() {
    awk -F, -v column="$1" '
        { sub(/\r$/, "") }
        NR == 1 { for (i = 1; i <= NF; i++) { if ($i == "step") s = i; if ($i == column) c = i }; next }
        s && c && $s != "" && $c != "" { print $s, $c }' < "$log"
}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
points loss > "$scratch/train"
points val_loss > "$scratch/val"
[ -s "$scratch/train" ] || [ -s "$scratch/val" ] || {
    echo "error: $log: expected columns step and loss or val_loss, and a row with values" >&2; exit 1; }

if [ "${TERM:-}" = dumb ]; then
    columns=${COLUMNS:-100}
    terminal="set terminal dumb size $columns, 28"
else
    # gnuplot needs its quotes doubled
    terminal="set terminal pngcairo size 900,560; set output '$(printf %s "$out" | sed "s/'/''/g")'"
fi
curves=""
[ -s "$scratch/train" ] && curves="'$scratch/train' with lines linecolor rgb '#4477aa' title 'training'"
[ -s "$scratch/val" ] && curves="${curves:+$curves, }'$scratch/val' with linespoints linewidth 2 pointtype 7 \
linecolor rgb '#cc6677' title 'validation'"
gnuplot -e "$terminal; set xlabel 'step'; set ylabel 'loss (nats per token)'; set grid; plot $curves"
[ "${TERM:-}" = dumb ] || echo "$out"
