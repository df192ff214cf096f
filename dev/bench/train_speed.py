"""Training speed on the CPU: our program beside transformers and mambapy, measured alternately in one run.

    python dev/bench/train_speed.py [--pattern 1|2] [--rounds 3] [--budget 60] [--threads N] [--only NAME ...]

One training step = forward, cross-entropy, backward, AdamW, in float32, on the same model: Mamba-1 or Mamba-2,
tied head, sizes below. Every contender gets all cores (or --threads). Each round runs every contender once, in
rotating order, so that a busy moment of the machine does not hit one of them alone; a contender's number is
the median over rounds, its spread (max - min) / median. One that has used up its time budget sits out the
remaining rounds; one that cannot run is shown with its reason, not left out.

  transformers           MambaForCausalLM as it runs without extra packages: a Python loop over time, whose
                         backward writes a gradient of full length for every step (work quadratic in T)
  transformers+mambapy   the same with use_mambapy=True: its scan replaced by mambapy's parallel scan
  mambapy                a stack of mambapy's own blocks, pscan=True
  transformers-mamba2    Mamba2ForCausalLM as it runs without extra packages: the chunked form written with
                         products of broadcast tensors, (B, chunks, Q, Q, H, N) numbers at a time
"""
import argparse
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SIZES = dict(D=256, n_layer=8, N=16, K=4, V=256, B=8, T=256)
SIZES_2 = dict(N=128, P=64, G=1, Q=256)                       # Mamba-2: in place of and beside those


def our_command(args):
    """The one place that knows our program's flags: cpu_speed.c, which prints `tokens_per_second X`."""
    s = SIZES
    more = ["--headdim", str(s["P"]), "--ngroups", str(s["G"]), "--chunk-size", str(s["Q"])] if "P" in s else []
    return [args.binary, "train", "--rounds", "1", "--pattern", args.pattern, *more,
            "--d-model", str(s["D"]), "--n-layer", str(s["n_layer"]),
            "--d-state", str(s["N"]), "--d-conv", str(s["K"]), "--vocab-size", str(s["V"]),
            "--batch-size", str(s["B"]), "--seq-len", str(s["T"]), "--threads", str(args.threads)]


class Ours:
    name = "ssm.c"

    def __init__(self, args):
        self.command = our_command(args)
        self.env = dict(os.environ, OMP_NUM_THREADS=str(args.threads), OPENBLAS_NUM_THREADS=str(args.threads))
        if not os.access(args.binary, os.X_OK):
            raise RuntimeError(f"{args.binary} not found; run `make dev` or name it with --binary")

    def measure(self, steps):
        run = subprocess.run(self.command, env=self.env, capture_output=True, text=True, timeout=300)
        found = re.search(r"^tokens_per_second\s+([0-9.eE+-]+)", run.stdout, re.MULTILINE)
        if run.returncode != 0 or not found:
            message = run.stderr.strip() or "no line tokens_per_second"
            raise RuntimeError(f"exit code {run.returncode}: {message}")
        count = re.search(r"^parameters\s+(\d+)", run.stdout, re.MULTILINE)
        self.n_parameters = int(count.group(1)) if count else None
        return float(found.group(1))

    def parameters(self):
        return self.n_parameters


class TorchContender:
    """A training step in PyTorch; the subclass builds self.model and says how ids become logits."""
    warm_up_T = SIZES["T"]

    def __init__(self, args):
        import torch
        self.torch = torch
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        self.build()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95),
                                           weight_decay=0.1)
        self.ids = torch.randint(0, SIZES["V"], (SIZES["B"], SIZES["T"] + 1))
        self.step(self.warm_up_T)                             # threads, allocator, optimizer state

    def step(self, T):
        inputs, targets = self.ids[:, :T], self.ids[:, 1:T + 1]
        loss = self.torch.nn.functional.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def measure(self, steps):
        start = time.perf_counter()
        for _ in range(steps):
            self.step(SIZES["T"])
        return steps * SIZES["B"] * SIZES["T"] / (time.perf_counter() - start)

    def parameters(self):
        return sum(p.numel() for p in self.model.parameters())


class Transformers(TorchContender):
    name = "transformers"
    use_mambapy = False
    warm_up_T = 16                                            # a full step takes minutes

    def build(self):
        import transformers
        transformers.logging.set_verbosity_error()
        config = transformers.MambaConfig(
            hidden_size=SIZES["D"], num_hidden_layers=SIZES["n_layer"], state_size=SIZES["N"],
            conv_kernel=SIZES["K"], vocab_size=SIZES["V"], use_cache=False,
            use_mambapy=self.use_mambapy)
        self.model = transformers.MambaForCausalLM(config)

    def logits(self, ids):
        return self.model(input_ids=ids).logits


class TransformersMambapy(Transformers):
    name = "transformers+mambapy"
    use_mambapy = True
    warm_up_T = SIZES["T"]

    def build(self):
        import mambapy.pscan                                  # a clear error when it is missing
        super().build()


class Mambapy(TorchContender):
    name = "mambapy"

    def build(self):
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm
        nn = self.torch.nn
        config = MambaConfig(d_model=SIZES["D"], n_layers=SIZES["n_layer"], d_state=SIZES["N"],
                             d_conv=SIZES["K"], pscan=True)
        self.model = nn.Sequential(nn.Embedding(SIZES["V"], SIZES["D"]), Mamba(config), RMSNorm(SIZES["D"]),
                                   nn.Linear(SIZES["D"], SIZES["V"], bias=False))
        nn.init.normal_(self.model[0].weight, std=0.02)
        self.model[3].weight = self.model[0].weight           # tied, as the others

    def logits(self, ids):
        return self.model(ids)


class TransformersMamba2(Transformers):
    name = "transformers-mamba2"

    def build(self):
        import transformers
        transformers.logging.set_verbosity_error()
        s = SIZES
        self.model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
            hidden_size=s["D"], num_hidden_layers=s["n_layer"], state_size=s["N"], conv_kernel=s["K"],
            head_dim=s["P"], num_heads=2 * s["D"] // s["P"], n_groups=s["G"], chunk_size=s["Q"],
            vocab_size=s["V"], tie_word_embeddings=True, use_cache=False))


CONTENDERS = {"1": [Ours, Transformers, TransformersMambapy, Mambapy], "2": [Ours, TransformersMamba2]}


def versions():
    from importlib import metadata
    found = []
    for package in ("torch", "transformers", "mambapy"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} -")
    return ", ".join([f"Python {platform.python_version()}"] + found)


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", file.read(), re.MULTILINE))
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def main():
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default="build/dev/cpu_speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="timed PyTorch steps per round")
    parser.add_argument("--budget", type=float, default=60, help="seconds per contender, checked per round")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--pattern", choices=list(CONTENDERS), default="1")
    parser.add_argument("--only", nargs="+", choices=[c.name for c in sum(CONTENDERS.values(), [])])
    args = parser.parse_args()
    if args.pattern == "2":
        SIZES.update(SIZES_2)

    running, reason, rates, used, load = [], {}, {}, {}, os.getloadavg()[0]
    chosen = [c for c in CONTENDERS[args.pattern] if not args.only or c.name in args.only]
    for contender in chosen:
        try:
            running.append(contender(args))
            rates[contender.name], used[contender.name] = [], 0.0
        except (ImportError, RuntimeError) as error:
            reason[contender.name] = str(error)
    for k in range(args.rounds):
        for i in range(len(running)):
            c = running[(i + k) % len(running)]
            if c.name in reason or used[c.name] > args.budget:
                continue
            start = time.perf_counter()
            try:
                rates[c.name].append(c.measure(args.steps))
                used[c.name] += time.perf_counter() - start
                print(f"round {k + 1}/{args.rounds}  {c.name:20s} {rates[c.name][-1]:10.0f} tokens/s",
                      file=sys.stderr)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                reason[c.name] = str(error)

    # the table; ratio: our median over the contender's
    median = {name: statistics.median(r) for name, r in rates.items() if r and name not in reason}
    print("| trainer | parameters | rounds | tokens/s (median) | spread | ssm.c is faster by |")
    print("|---|---:|---:|---:|---:|---:|")
    for contender in chosen:
        name = contender.name
        if name not in median:
            print(f"| {name} | - | - | - | - | not measured: {reason.get(name, 'no round ran')} |")
            continue
        width = (max(rates[name]) - min(rates[name])) / median[name]
        spread = f"{width:.0%}" if len(rates[name]) > 1 else "-"
        count = next(c.parameters() for c in running if c.name == name)
        count = f"{count:,}" if count else "-"
        ratio = f"{median[Ours.name] / median[name]:.2f}x" if Ours.name in median else "-"
        print(f"| {name} | {count} | {len(rates[name])} | {median[name]:.0f} | {spread} | {ratio} |")
    print()
    sizes = " ".join(f"{k}={v}" for k, v in SIZES.items())
    print(f"Mamba-{args.pattern} {sizes}, float32, forward + backward + AdamW, "
          f"up to {args.rounds} alternating rounds, {args.threads} threads on {cores} cores of {cpu_name()}, "
          f"load {load:.1f} before the run, {datetime.date.today()}. {versions()}.")


if __name__ == "__main__":
    main()
