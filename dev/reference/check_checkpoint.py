"""Does transformers read a checkpoint of ours, and do both compute the same logits?

    python dev/reference/check_checkpoint.py out/last [--binary build/train_mamba] [--data FILE]

Loads DIR/model.safetensors and config.json with MambaForCausalLM.from_pretrained and DIR/tokenizer.json with
tokenizers, lets our program evaluate the same checkpoint on a text, and compares

  weights  what transformers holds after loading with what the file holds (its loader re-runs initialization,
           which rescales a loaded out_proj.weight when rescale_prenorm_residual is true)
  tokens   the ids our program read from the text with those of the tokenizer, end tokens aside; "-" without
  logits   our float32 logits with transformers' in float64: relative L2 of the difference, limit 1e-4

Prints one row, then 20 tokens of greedy generation by transformers, for the eye. Exit code 1 on failure.
"""
import argparse
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import MambaForCausalLM

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# defines: Float64Only
from make_fixtures import Float64Only

LIMIT = 1e-4                                                  # relative L2 of the logits
SAMPLE = "The state of a model is a fixed-size summary of what it has read.\nNaïve readers count tokens. "


def our_logits(binary, directory, data):
    """Our program's input_ids (B,T) and logits (B,T,V) on the file data"""
    with tempfile.TemporaryDirectory() as scratch:
        dump = os.path.join(scratch, "logits.safetensors")
        command = [binary, "eval", "--from", directory, "--data", data, "--dump-logits", dump]
        try:
            run = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise SystemExit(f"{binary}: {error.strerror}; build it or name it with --binary")
        if run.returncode != 0 or not os.path.exists(dump):
            message = run.stderr.strip() or "no dump"
            raise SystemExit(f"{' '.join(command)}\nexit code {run.returncode}: {message}")
        tensors = load_file(dump)
    return tensors["input_ids"].long(), tensors["logits"].double()


def changed_by_loading(model, path):
    """Names of parameters that differ from the tensors of the same name in the file"""
    stored = load_file(path) if os.path.exists(path) else {}
    return [name for name, p in model.named_parameters()
            if name in stored and not torch.equal(p.detach(), stored[name].to(p.dtype))]


def compare_tokens(tokenizer, data, ids, ends):
    """True when every row of ids occurs in the tokenizer's encoding of the text, end tokens left out"""
    with open(data, encoding="utf-8", errors="replace", newline="") as file:
        encoded = tokenizer.encode(file.read(), add_special_tokens=False).ids
    text = "," + ",".join(str(i) for i in encoded if i not in ends) + ","
    return all("," + ",".join(str(i) for i in row if i not in ends) + "," in text for row in ids.tolist())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="DIR", help="checkpoint directory")
    parser.add_argument("--binary", default="build/train_mamba")
    parser.add_argument("--data", help="UTF-8 text to evaluate on; default: a few lines made here")
    parser.add_argument("--prompt", default="The ", help="start of the greedy generation")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    model, info = MambaForCausalLM.from_pretrained(args.directory, dtype=torch.float64,
                                                   output_loading_info=True)
    model.eval()
    wrong = [k for k in info if info[k] and ("missing" in k or "unexpected" in k or "mismatched" in k)]
    if wrong:
        details = ", ".join(f"{k} {info[k]}" for k in wrong)
        raise SystemExit(f"{args.directory}: transformers reports {details}")
    changed = changed_by_loading(model, os.path.join(args.directory, "model.safetensors"))
    tokenizer_path = os.path.join(args.directory, "tokenizer.json")
    tokenizer = Tokenizer.from_file(tokenizer_path) if os.path.exists(tokenizer_path) else None
    end = model.config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}

    with tempfile.TemporaryDirectory() as scratch:
        data = args.data
        if data is None:
            data = os.path.join(scratch, "sample.txt")
            with open(data, "w", encoding="utf-8") as file:
                file.write(SAMPLE * 60)
        ids, ours = our_logits(args.binary, args.directory, data)
        tokens_equal = compare_tokens(tokenizer, data, ids, ends) if tokenizer else None

    with torch.no_grad(), Float64Only():
        # one sequence at a time: the reference keeps (T,E,N) decays per sequence
        theirs = torch.cat([model(input_ids=row[None]).logits for row in ids])[..., :ours.shape[-1]]
    if ours.shape != theirs.shape:
        raise SystemExit(f"{args.directory}: our logits have shape {tuple(ours.shape)}, "
                         f"expected {tuple(theirs.shape)}")
    error = float((ours - theirs).norm() / theirs.norm())
    argmax = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    ok = error <= LIMIT and tokens_equal is not False and not changed      # NaN fails
    tokens = {True: "equal", False: "DIFFER", None: "-"}[tokens_equal]
    print(f"{'checkpoint':32s} {'B':>4s} {'T':>6s} {'V':>6s} {'weights':>8s} {'tokens':>7s} "
          f"{'logits':>9s} {'limit':>7s} {'argmax':>8s}")
    weights = "CHANGED" if changed else "equal"
    print(f"{args.directory[-32:]:32s} {ids.shape[0]:4d} {ids.shape[1]:6d} {ours.shape[-1]:6d} "
          f"{weights:>8s} {tokens:>7s} {error:9.1e} {LIMIT:7.0e} {argmax:8.2%}  {'ok' if ok else 'FAIL'}")

    if changed:
        print(f"changed by loading: {', '.join(changed)}")
        if model.config.rescale_prenorm_residual:
            print("config.json has rescale_prenorm_residual true: write false for transformers")

    # greedy generation, with the cache
    prompt = tokenizer.encode(args.prompt, add_special_tokens=False).ids if tokenizer else ids[0, :8].tolist()
    with torch.no_grad(), Float64Only():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    out = out[0].tolist()
    print("greedy:", repr(tokenizer.decode(out, skip_special_tokens=False)) if tokenizer else out)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
