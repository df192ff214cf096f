"""Makes dev/reference/fixtures/: small Mamba-1 models with their logits, loss, gradients and AdamW steps.

    python dev/reference/make_fixtures.py [--out DIR] [--case NAME]

The reference is transformers' MambaForCausalLM on the CPU, in true float64. As published it computes in
float32 in many places whatever the dtype of the weights (RMSNorm, residual, A, D, dt bias, the scan's input,
logits, loss); Float64Only below answers those casts with the float64 tensor itself. Three checks show that
nothing was missed: no operation of a run may produce a 32-bit or 16-bit float (AssertFloat64), the gradients
equal finite differences, and the logits equal those of an independent implementation (mamba1_numpy.py). A
failed check ends the script with exit code 1.

Each case is a directory:
  config.json, model.safetensors   as save_pretrained writes them, float64
  expected.safetensors             B sequences of T tokens, F64 unless said, hyperparameters in __metadata__:
    input_ids, labels (B,T) I64    labels as transformers wants them: it shifts by one itself; -100 is ignored
    targets (B,T) I64              labels shifted left, last column -100: logits[b,t] predicts targets[b,t]
    logits (B,T,Vp), loss          loss (1): mean cross-entropy over targets >= 0
    grad.<parameter>               d loss / d parameter, names as in model.safetensors
    losses, grad_norms (10)        before each of 10 optimizer steps on this batch, norms before clipping
    adamw.<parameter>              the parameters after those steps
    logits_step (B,T,Vp)           the logits again, from a prefill of 3 tokens and then one token at a time
"""
import argparse
import json
import os
import re
import shutil
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import safetensors.torch
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MambaConfig, MambaForCausalLM

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# defines: mamba1_lm, cross_entropy
import mamba1_numpy

LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP, STEPS, PREFILL = 1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0, 10, 3
# Only matrices decay; the conv weight, A_log, D, norm weights and biases do not.
DECAYED = re.compile(r"(in_proj|x_proj|dt_proj|out_proj|embeddings|lm_head)\.weight$")


class Float64Only(TorchFunctionMode):
    """Inside `with Float64Only():` the .float(), .to(torch.float32) and .to(dtype=torch.float32) of a float64
    tensor return the tensor itself. That undoes each hard-wired cast of the model without touching its code.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        cast = func is torch.Tensor.float or (
            func is torch.Tensor.to and (torch.float32 in args[1:] or kwargs.get("dtype") is torch.float32))
        if cast and args[0].dtype is torch.float64:
            return args[0]
        return func(*args, **kwargs)


class AssertFloat64(TorchDispatchMode):
    """Looks at every operation below autograd, in backward and optimizer too: no result is narrower."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
                raise AssertionError(f"{func} produced {leaf.dtype}")
        return result


# name -> (config, tokens that occur, B, T). Odd little sizes, so that a swapped size or stride does not go
# unnoticed. E is always expand * D in transformers, expand an integer.
CASES = {
    "default": (
        dict(hidden_size=12, num_hidden_layers=2, state_size=5, conv_kernel=4, expand=2, time_step_rank=1,
             vocab_size=24, tie_word_embeddings=True), 19, 3, 7),
    "bias_untied": (
        dict(hidden_size=10, num_hidden_layers=2, state_size=3, conv_kernel=3, expand=2, time_step_rank=2,
             vocab_size=17, tie_word_embeddings=False, use_bias=True, use_conv_bias=True,
             residual_in_fp32=False, layer_norm_epsilon=1e-3), 17, 2, 37),
    "no_conv_bias": (
        dict(hidden_size=7, num_hidden_layers=3, state_size=4, conv_kernel=2, expand=3, time_step_rank=3,
             vocab_size=16, tie_word_embeddings=True, use_conv_bias=False), 13, 2, 11),
}


def randomize(model, generator):
    """Weights far from their initial values, at sizes where every term of the model changes the logits."""

    def normal(shape, std, mean=0.0):
        return mean + std * torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            leaf = name.split("mixer.")[-1]
            if leaf == "A_log":
                # ln(1..N) plus noise: decays exp(dt A) from nearly 1 to nearly 0
                p.copy_(torch.log(torch.arange(1.0, p.shape[1] + 1)) + normal(p.shape, 0.5) - 0.7)
            elif leaf == "dt_proj.bias":
                p.copy_(normal(p.shape, 1.0, -1.0))
                p[0] = 20.5                                   # softplus on both sides of its threshold 20
            elif leaf == "D" or "norm" in name:
                p.copy_(normal(p.shape, 0.4, 1.0))
            elif leaf.endswith("bias"):
                p.copy_(normal(p.shape, 0.3))
            elif leaf == "conv1d.weight":
                p.copy_(normal(p.shape, p.shape[-1] ** -0.5))
            elif "embeddings" in name:
                p.copy_(normal(p.shape, 0.6))
            else:
                p.copy_(normal(p.shape, 1.2 * p.shape[1] ** -0.5))       # p.shape[1]: the fan-in


def make_batch(n_tokens, B, T, generator):
    ids = torch.randint(0, n_tokens, (B, T), generator=generator)
    labels = ids.clone()
    labels[torch.rand((B, T), generator=generator) < 0.2] = -100
    labels[0, 1] = ids[0, 1]                                  # at least one position counts
    targets = torch.cat([labels[:, 1:], torch.full((B, 1), -100)], dim=1)
    return ids, labels, targets


def relative_l2(a, b):
    return float((a - b).norm() / b.norm())


def check(name, what, measured, limit):
    ok = measured <= limit                                    # false for NaN
    print(f"{name:14s} {what:58s} {measured:10.2e} {limit:10.0e}  {'ok' if ok else 'FAIL'}")
    if not ok:
        raise SystemExit(1)


def finite_difference_error(model, ids, labels, generator):
    """The largest error of <grad, v> against the five-point derivative of the loss along v, one random unit
    vector v per parameter, relative to |grad| of that parameter.
        f'(0) = (8 (f(s) - f(-s)) - (f(2s) - f(-2s))) / (12 s) + O(s^4)
    """
    s, worst = 5e-4, 0.0
    for p in model.parameters():
        v = torch.randn(p.shape, generator=generator)
        v /= v.norm()
        f = {}
        with torch.no_grad():
            origin = p.clone()
            for k in (-2, -1, 1, 2):
                p.copy_(origin + k * s * v)
                f[k] = float(model(input_ids=ids, labels=labels).loss)
            p.copy_(origin)
        numeric = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * s)
        worst = max(worst, abs(numeric - float((p.grad * v).sum())) / float(p.grad.norm()))
    return worst


def save(path, tensors, metadata):
    """A safetensors file, the same bytes on every run (the library writes __metadata__ in random order)."""
    blob = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()},
                                  metadata={k: str(v) for k, v in metadata.items()})
    n = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:8 + n])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= n
    with open(path, "wb") as file:
        file.write(blob[:8] + text.ljust(n) + blob[8 + n:])


def make_case(name, out):
    sizes, n_tokens, B, T = CASES[name]
    generator = torch.Generator().manual_seed(1000 + list(CASES).index(name))
    config = MambaConfig(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0, use_cache=True)
    model = MambaForCausalLM(config).to(torch.float64)
    model.train()
    randomize(model, generator)
    ids, labels, targets = make_batch(n_tokens, B, T, generator)

    path = os.path.join(out, name)
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path)
    os.remove(os.path.join(path, "generation_config.json"))
    os.chmod(os.path.join(path, "model.safetensors"), 0o644)

    with torch.no_grad():
        as_published = model(input_ids=ids).logits
        try:
            with AssertFloat64():
                model(input_ids=ids)
            raise SystemExit(f"{name}: AssertFloat64 did not notice the float32 casts of the unchanged model")
        except AssertionError:
            pass
    with Float64Only(), AssertFloat64() as watch:
        # 1. logits, loss, gradients
        result = model(input_ids=ids, labels=labels)
        result.loss.backward()
        expected = {"input_ids": ids, "labels": labels, "targets": targets,
                    "logits": result.logits.detach().clone(), "loss": result.loss.detach().reshape(1)}
        for parameter, p in model.named_parameters():
            expected["grad." + parameter] = p.grad.detach().clone()

        # 2. the same logits from a cache: a prefill, then single tokens
        model.eval()
        with torch.no_grad():
            step = model(input_ids=ids[:, :PREFILL], use_cache=True)
            pieces = [step.logits]
            for t in range(PREFILL, T):
                step = model(input_ids=ids[:, t:t + 1], use_cache=True, cache_params=step.cache_params)
                pieces.append(step.logits)
        expected["logits_step"] = torch.cat(pieces, dim=1).clone()
        model.train()

        fd_error = finite_difference_error(model, ids, labels, generator)

        # 3. optimizer steps
        decayed = [p for n, p in model.named_parameters() if DECAYED.search(n)]
        others = [p for n, p in model.named_parameters() if not DECAYED.search(n)]
        optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=WEIGHT_DECAY),
                                       dict(params=others, weight_decay=0.0)],
                                      lr=LR, betas=(BETA1, BETA2), eps=EPS)
        losses, norms = [], []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
            losses.append(float(loss.detach()))
            optimizer.step()
        expected["losses"], expected["grad_norms"] = torch.tensor(losses), torch.tensor(norms)
        for parameter, p in model.named_parameters():
            expected["adamw." + parameter] = p.detach().clone()

    decay_list = ",".join(n for n, _ in model.named_parameters() if DECAYED.search(n))
    metadata = {"case": name, "vocab_size": n_tokens, "vocab_padded": config.vocab_size, "ignore_index": -100,
                "lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": WEIGHT_DECAY,
                "decayed": decay_list, "clip": CLIP, "clip_rule": "g *= min(1, clip / (norm + 1e-6))",
                "steps": STEPS, "prefill": PREFILL,
                "torch": torch.__version__, "transformers": transformers.__version__}
    save(os.path.join(path, "expected.safetensors"), expected, metadata)

    # what is on disk, through the second implementation
    with open(os.path.join(path, "config.json")) as file:
        saved_config = json.load(file)
    saved = safetensors.torch.load_file(os.path.join(path, "model.safetensors"))
    tensors = {k: v.numpy() for k, v in saved.items()}
    logits = mamba1_numpy.mamba1_lm(tensors, saved_config, ids.numpy())
    loss = mamba1_numpy.cross_entropy(logits, targets.numpy())

    print(f"{name:14s} float64 in all of {watch.operations} operations; the unchanged model is caught")
    check(name, "gradients against finite differences, worst parameter", fd_error, 1e-8)
    check(name, "logits against NumPy", relative_l2(torch.from_numpy(logits), expected["logits"]), 1e-13)
    check(name, "loss against NumPy", abs(loss - float(expected["loss"])) / float(expected["loss"]), 1e-13)
    check(name, "logits, prefill and steps against full forward",
          relative_l2(expected["logits_step"], expected["logits"]), 1e-13)
    smallest = min(float(v.norm()) for k, v in expected.items() if k.startswith("grad."))
    check(name, "1 / smallest gradient norm (every parameter matters)", 1.0 / smallest, 1e4)
    print(f"{name:14s} for comparison: logits with the published float32 casts differ by "
          f"{relative_l2(as_published, expected['logits']):.1e}; loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
          f"gradient norm {min(norms):.2f} to {max(norms):.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures"))
    parser.add_argument("--case", choices=list(CASES), help="make only this one")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)                                  # the same bits on every run
    torch.set_default_dtype(torch.float64)
    print(f"{'case':14s} {'check':58s} {'measured':>10s} {'limit':>10s}")
    for name in [args.case] if args.case else CASES:
        make_case(name, args.out)
    total = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(args.out) for f in files)
    check("all", "size of all files, in KB", total / 1000, 700)


if __name__ == "__main__":
    main()
