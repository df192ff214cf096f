"""Do transformers and our program read each other's checkpoints, and do both compute the same logits?

    python dev/reference/check_checkpoint.py [--binary build/train_mamba] [--only mamba2]    the matrix below
    python dev/reference/check_checkpoint.py out/last [--binary ...] [--data FILE]    one checkpoint of ours

Without a directory: randomly initialized models of transformers in odd configurations, in both directions

  theirs to ours   written as model.safetensors, in shards with an index, and both again with torch.save, in
                   every dtype; our program evaluates each. "same" says that the containers give the same bits
  ours to theirs   read and written again by `train_mamba convert` in each dialect and dtype;
  transformers loads
                   model.safetensors, torch.load(weights_only=True) reads pytorch_model.bin. "same" says that
                   every tensor has the bits that the source has when it is rounded to that dtype

With a directory: loads DIR/model.safetensors and config.json with AutoModelForCausalLM.from_pretrained and
DIR/tokenizer.json with tokenizers, lets our program evaluate the same checkpoint on a text, and compares

  weights  what transformers holds after loading with what the file holds (its loader re-runs initialization,
           which rescales a loaded out_proj.weight when rescale_prenorm_residual is true)
  tokens   the ids our program read from the text with those of the tokenizer, end tokens aside; "-" without
  logits   our float32 logits with transformers' in float64: relative L2 of the difference, limit 1e-4

Prints one row, then 20 tokens of greedy generation by transformers, for the eye. Exit code 1 on failure.
"""
import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# defines: Float64Only
from make_fixtures import Float64Only

LIMIT = 1e-4                                                  # relative L2 of the logits
SAMPLE = "The state of a model is a fixed-size summary of what it has read.\nNaïve readers count tokens. "


def run(command):
    """Standard output of a command of our program, which must succeed"""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise SystemExit(f"{command[0]}: {error.strerror}; build it or name it with --binary")
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nexit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def our_logits(binary, directory, data, *options):
    """Our program's input_ids (B,T) and logits (B,T,V) on the file data"""
    with tempfile.TemporaryDirectory() as scratch:
        dump = os.path.join(scratch, "logits.safetensors")
        run([binary, "eval", "--from", directory, "--data", data, "--dump-logits", dump, *options])
        if not os.path.exists(dump):
            raise SystemExit(f"{binary}: no dump")
        tensors = load_file(dump)
    return tensors["input_ids"].long(), tensors["logits"].double()


def their_logits(model, ids):
    """transformers' logits in float64, one sequence at a time: the reference keeps (T,E,N) decays of each"""
    with torch.no_grad(), Float64Only():
        return torch.cat([model(input_ids=row[None]).logits for row in ids])


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


# ---- the matrix

CONFIGS = {
    "defaults": dict(hidden_size=48, num_hidden_layers=3, vocab_size=64),
    "odd sizes": dict(hidden_size=37, num_hidden_layers=2, vocab_size=101, state_size=5, conv_kernel=3,
                      expand=3,
                      time_step_rank=7),
    "biases": dict(hidden_size=24, num_hidden_layers=2, vocab_size=37, use_bias=True, state_size=33,
                   conv_kernel=8, time_step_rank=1),
    "no biases": dict(hidden_size=20, num_hidden_layers=2, vocab_size=29, use_conv_bias=False, expand=1,
                      conv_kernel=2, state_size=1, layer_norm_epsilon=1e-3),
    "untied head": dict(hidden_size=40, num_hidden_layers=2, vocab_size=51, tie_word_embeddings=False,
                        state_size=8, time_step_rank=11),
    "tied, biases": dict(hidden_size=33, num_hidden_layers=4, vocab_size=77, use_bias=True, conv_kernel=1,
                         expand=4),
    "mamba2": dict(hidden_size=48, num_hidden_layers=3, vocab_size=64, num_heads=6, head_dim=16, n_groups=1,
                   state_size=24, tie_word_embeddings=True),
    "mamba2 odd": dict(hidden_size=37, num_hidden_layers=2, vocab_size=101, num_heads=3, head_dim=37,
                       n_groups=1, state_size=5, conv_kernel=3, expand=3, chunk_size=7,
                       time_step_limit=(0.03, 0.5), tie_word_embeddings=True),
    "mamba2 biases": dict(hidden_size=24, num_hidden_layers=2, vocab_size=37, num_heads=4, head_dim=12,
                          n_groups=1, state_size=33, conv_kernel=8, chunk_size=16, use_bias=True,
                          use_conv_bias=False, layer_norm_epsilon=1e-3, tie_word_embeddings=False),
    "mamba2 groups": dict(hidden_size=40, num_hidden_layers=2, vocab_size=51, num_heads=16, head_dim=5,
                          n_groups=4, state_size=9, conv_kernel=2, chunk_size=64),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}


def random_model(seed, **options):
    """A model of transformers in which no tensor is zero, one or constant"""
    torch.manual_seed(seed)
    Config, Model = MambaConfig, MambaForCausalLM
    if "head_dim" in options:
        Config, Model = Mamba2Config, Mamba2ForCausalLM
    config = Config(residual_in_fp32=True, eos_token_id=0, bos_token_id=0, pad_token_id=0, **options)
    model = Model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def write_shard(path, ids):
    """Token ids as a .bin file of llm.c: 256 int32 of header, then u16"""
    header = [20240520, 1, len(ids)] + [0] * 253
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}H", *ids))


def write_index(directory, kind, tensors, ending, save):
    """The tensors in three files and their index"""
    names, weight_map = sorted(tensors), {}
    for k in range(3):
        file = f"{kind}-{k + 1:05d}-of-00003.{ending}"
        part = {name: tensors[name] for name in names[k::3]}
        save(part, os.path.join(directory, file))
        weight_map.update({name: file for name in part})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    with open(os.path.join(directory, f"{kind}.{ending}.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file, indent=2)


def write_containers(scratch, model, dtype):
    """The model in every container; directories by the container's name"""
    model = model.to(dtype)
    state, out = model.state_dict(), {}
    unique = {k: v.contiguous() for k, v in state.items()
              if k != "lm_head.weight" or not model.config.tie_word_embeddings}
    for name in ("safetensors", "safetensors shards", "torch.save", "torch.save shards"):
        out[name] = os.path.join(scratch, name)
        os.makedirs(out[name])
        model.config.save_pretrained(out[name])
    model.save_pretrained(out["safetensors"])
    write_index(out["safetensors shards"], "model", unique, "safetensors",
                lambda part, path: save_file(part, path, metadata={"format": "pt"}))
    torch.save(state, os.path.join(out["torch.save"], "pytorch_model.bin"))
    write_index(out["torch.save shards"], "pytorch_model", unique, "bin", torch.save)
    return out


def rounded(state, dtype):
    """What `convert` must write: matrices in the dtype, everything else in float32"""
    matrices = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight", "embeddings.weight",
                "lm_head.weight")
    return {k: v.float().to(dtype if k.endswith(matrices) else torch.float32) for k, v in state.items()}


def same_tensors(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def read_dialect(directory, dialect, config):
    """The tensors of a converted model by transformers' names, and the keys of its config.json"""
    keys = set(json.load(open(os.path.join(directory, "config.json"))))
    if dialect == "hf":
        tensors = load_file(os.path.join(directory, "model.safetensors"))
        if config.tie_word_embeddings:
            tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
        return tensors, keys
    tensors = torch.load(os.path.join(directory, "pytorch_model.bin"), weights_only=True)
    return {k.replace("embedding.", "embeddings."): v for k, v in tensors.items()}, keys


# what MambaConfig of mamba_ssm 2.2 and later takes (models/config_mamba.py); any other key is an error
MAMBA_SSM_KEYS = {"d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx",
                  "attn_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple",
                  "tie_embeddings"}


def matrix(binary, only):
    failed = 0

    def row(name, form, what, same, error):
        nonlocal failed
        ok = same and error <= LIMIT                          # NaN fails
        failed += not ok
        print(f"{name:14s} {form:34s} {what:5s} {'yes' if same else 'NO':>5s} {error:9.1e}  "
              f"{'ok' if ok else 'FAIL'}")

    print(f"{'model':14s} {'form':34s} {'dtype':5s} {'same':>5s} {'logits':>9s}  (limit {LIMIT:.0e})")
    for seed, (name, options) in enumerate(CONFIGS.items()):
        if not name.startswith(only):
            continue
        for what, dtype in DTYPES.items():
            with tempfile.TemporaryDirectory() as scratch:
                model = random_model(seed, **options)
                forms = write_containers(scratch, model, dtype)
                state = {k: v.clone() for k, v in model.state_dict().items()}
                V = model.config.vocab_size
                data = os.path.join(scratch, "data.bin")
                write_shard(data, torch.randint(1, V, (123,)).tolist())
                first = None
                for form, directory in forms.items():
                    ids, ours = our_logits(binary, directory, data, "--seq-len", "61", "--batch-size", "2",
                                           "--no-reset-documents")
                    theirs = their_logits(model.double(), ids)
                    first = ours if first is None else first
                    row(name, form, what, torch.equal(ours, first), relative(ours[..., :V], theirs))
                if dtype is not torch.float32 and 1 < seed < 8:
                    continue
                for dialect in ("hf", "mamba_ssm"):
                    for to in ("f32", "f16", "bf16"):
                        if dialect == "mamba_ssm" and options.get("layer_norm_epsilon"):
                            continue                          # it has no key for it: refused
                        out = os.path.join(scratch, f"{dialect}-{to}")
                        run([binary, "convert", "--from", forms["torch.save shards"], "--out", out,
                             "--dialect", dialect,
                             "--dtype", to])
                        tensors, keys = read_dialect(out, dialect, model.config)
                        same = same_tensors(tensors, rounded(state, DTYPES[to]))
                        if dialect == "mamba_ssm":            # its tensors in transformers' model
                            same = same and keys <= MAMBA_SSM_KEYS
                            loaded = type(model)(model.config).double()
                            loaded.load_state_dict({k: v.double() for k, v in tensors.items()})
                        else:
                            loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64,
                                                                                output_loading_info=True)
                            same = same and not any(info[k] for k in info) and same_tensors(
                                {k: v.double() for k, v in tensors.items()}, loaded.state_dict())
                        theirs = their_logits(loaded.eval(), ids)
                        ids2, ours = our_logits(binary, out, data, "--seq-len", "61", "--batch-size", "2",
                                                "--no-reset-documents")
                        row(name, f"-> {dialect} {to}", what, same and torch.equal(ids, ids2),
                            relative(ours[..., :V], theirs))
    return failed


# ---- one checkpoint

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


def one_checkpoint(args):
    model, info = AutoModelForCausalLM.from_pretrained(args.directory, dtype=torch.float64,
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

    theirs = their_logits(model, ids)[..., :ours.shape[-1]]
    if ours.shape != theirs.shape:
        raise SystemExit(f"{args.directory}: our logits have shape {tuple(ours.shape)}, "
                         f"expected {tuple(theirs.shape)}")
    error = relative(ours, theirs)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="DIR", nargs="?", help="checkpoint directory; none: the matrix")
    parser.add_argument("--binary", default="build/train_mamba")
    parser.add_argument("--only", default="", help="of the matrix: the models whose names start with this")
    parser.add_argument("--data", help="UTF-8 text to evaluate on; default: a few lines made here")
    parser.add_argument("--prompt", default="The ", help="start of the greedy generation")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.directory:
        return one_checkpoint(args)
    failed = matrix(args.binary, args.only)
    print(f"{failed} failed" if failed else "all equal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
