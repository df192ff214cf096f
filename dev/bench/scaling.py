"""How time and memory grow with the length of the text: four models of equal size, trained on rows of 1k to 64k
tokens (65,536 tokens per step) and generating after a context of 1k to 128k tokens.

    python3 dev/bench/scaling.py run --data FILE [--binary build/train_mambacu] [--csv FILE] [--small] [--coarse]
                                     [--only train|generate]
    python3 dev/bench/scaling.py plot [--csv FILE] [--svg FILE]           (gnuplot)

The models read bytes (vocabulary 257), so that the layers are what is measured:
  Mamba-1      24 layers            Mamba-2      24 layers
  hybrid       24 layers, every sixth one attention with an MLP, the others Mamba-2
  attention    12 layers of attention and MLP, the Transformer
Weights are random. --small: a tenth of the sizes, to try it on a CPU. --only: measures one half, the other stays
as it is in the CSV file. Needs nothing but Python."""
import argparse
import csv
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = {
    "Mamba-1": "--preset mamba-130m",
    "Mamba-2": "--preset mamba2-130m",
    "hybrid": "--preset mamba2-130m --pattern 22222am --d-intermediate 640",
    "attention": "--preset mamba2-130m --pattern am --d-intermediate 2304 --n-layer 12",
}
NEW_TOKENS = 400                   # the first ones load their kernels, 0.05 to 0.1 s on a GPU
COLUMNS = ["model", "parameters", "what", "length", "microseconds_per_token", "kib_per_token", "mib"]


def call(binary, arguments):
    run = subprocess.run([binary, *arguments.split()], capture_output=True, text=True, errors="replace")
    if run.returncode != 0:
        raise SystemExit(f"{binary} {arguments}: exit code {run.returncode}: {run.stderr.strip()[-300:]}")
    return run.stdout + run.stderr


def number(pattern, text):
    found = re.search(pattern, text)
    if not found:
        raise SystemExit(f"expected '{pattern}' in the program's output, found: {text[-500:]}")
    return float(found.group(1))


def read_rows(path):
    """The first line of a CSV file without its mark, and the rows."""
    with open(path, newline="") as f:
        return f.readline().lstrip("# ").strip(), list(csv.DictReader(f))


def measure(args):
    other, today = [], str(datetime.date.today())
    if args.only:
        if not os.path.exists(args.csv):
            sys.exit(f"run: --only {args.only} keeps the other half of {args.csv}, which does not exist; leave it out")
        other = [list(row.values()) for row in read_rows(args.csv)[1] if row["what"] != args.only]
        today += f" ({args.only}; the rest before)"
    known = {row[0]: row[1] for row in other}
    if args.only == "generate" and set(known) != set(MODELS):
        sys.exit(f"run: expected rows of training of {', '.join(MODELS)} in {args.csv}, found {', '.join(known) or 'none'}")
    scale = 16 if args.small else 1
    sizes = "--vocab-size 257" + (" --d-model 64" if args.small else "")
    scratch = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    text = open(args.data, "rb").read()
    if len(text) < 70000:
        raise SystemExit(f"{args.data}: {len(text)} bytes, expected at least 70000")
    rows = []
    try:
        for name, options in MODELS.items():
            for power in range(10, 17, 2 if args.coarse else 1) if args.only != "generate" else []:
                T = 2 ** power // scale
                out = call(args.binary, f"train {options} {sizes} --data {args.data} --val-fraction 0 "
                           f"--seq-len {T} --batch-size {65536 // scale // T} --steps 5 --eval-every 0 "
                           f"--max-tokens 0 --out {scratch}/out")
                shutil.rmtree(f"{scratch}/out")
                found = re.search(r"sum +([\d.]+) MiB", out) or re.search(r"activations:? +([\d.]+) MiB", out)
                mib = float(found.group(1)) if found else 0
                known[name] = int(number(r"parameters: (\d+)", out))
                rows.append([name, known[name], "train", T,
                             1e6 / number(r"speed: ([\d.]+) tokens/s", out), mib * 1024 * scale / 65536, mib])
                print(*rows[-1], flush=True)
            for power in sorted({*range(10, 18, 2 if args.coarse else 1), 17}) if args.only != "train" else []:
                length = 2 ** power // scale
                with open(f"{scratch}/prompt", "wb") as f:
                    f.write((text * (length // len(text) + 1))[:length])
                out = call(args.binary, f"generate {options} {sizes} --prompt-file {scratch}/prompt "
                           f"--chunk {min(4096, length)} --max-tokens {NEW_TOKENS} --temperature 0 --raw")
                mib = number(r"state: ([\d.]+) MiB", out)
                rows.append([name, known[name], "generate", length,
                             1e6 / number(r"new: \d+ tokens, ([\d.]+) tok/s", out), mib * 1024 / length, mib])
                print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    with open(args.csv, "w", newline="") as f:
        f.write(f"# {args.machine}, {today}, 65536 tokens per "
                "training step; one sequence generating\n")
        writer = csv.writer(f)
        writer.writerow(COLUMNS)
        rows = [[*row[:4], *(f"{x:.6g}" for x in row[4:])] for row in rows] + other
        rows.sort(key=lambda row: (list(MODELS).index(row[0]), row[2] != "train", int(row[3])))
        writer.writerows(rows)
    print("wrote", args.csv)


def plot(args):
    title, rows = read_rows(args.csv)
    script = [f"set terminal svg size 1000,760 font 'sans,13' noenhanced background '#ffffff'; set output '{args.svg}'",
              "set logscale xy 2; set logscale y 10; set grid; set key top left Left reverse samplen 2; set format y '%g'",
              f"set multiplot layout 2,2 title \"{title}\"",
              "set xtics ('1k' 1024, '4k' 4096, '16k' 16384, '64k' 65536, '128k' 131072)"]
    pictures = [("train", "microseconds_per_token", "training: microseconds per token", "tokens per row"),
                ("train", "kib_per_token", "training: KiB of memory per token", "tokens per row"),
                ("generate", "microseconds_per_token", "generation: microseconds per token", "context"),
                ("generate", "mib", "generation: MiB of state per sequence", "context")]
    for what, column, heading, xlabel in pictures:
        script.append(f"set title '{heading}'; set xlabel '{xlabel}'; set xrange [1000:140000]"
                      + ("; set yrange [10:1000]" if column == "kib_per_token" else "; set yrange [*:*]"))
        script.append("plot " + ", ".join(f"'-' using 1:2 with linespoints lw 2 title '{m}'" for m in MODELS))
        for model in MODELS:
            script += [f"{r['length']} {r[column]}" for r in rows if r["model"] == model and r["what"] == what]
            script.append("e")
    run = subprocess.run(["gnuplot"], input="\n".join(script), text=True, capture_output=True)
    if run.returncode != 0 or not os.path.exists(args.svg):
        raise SystemExit(f"gnuplot: {run.stderr.strip()[-300:]}")
    print("wrote", args.svg)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", choices=["run", "plot"])
    parser.add_argument("--binary", default="build/train_mambacu")
    parser.add_argument("--data", help="any text of at least 70 kB")
    parser.add_argument("--csv", default=os.path.join(HERE, "scaling.csv"))
    parser.add_argument("--svg", default=os.path.join(HERE, "scaling.svg"))
    parser.add_argument("--machine", default="one H200, bf16")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--coarse", action="store_true", help="every second length")
    parser.add_argument("--only", choices=["train", "generate"])
    args = parser.parse_args()
    if args.word == "run" and not args.data:
        sys.exit("run: name a text with --data")
    measure(args) if args.word == "run" else plot(args)


if __name__ == "__main__":
    main()
