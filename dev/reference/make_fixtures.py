"""Makes dev/reference/fixtures/: small models with their logits, loss, gradients and AdamW steps.

    python dev/reference/make_fixtures.py [--out DIR] [--case NAME]

The reference is transformers' MambaForCausalLM and Mamba2ForCausalLM on the CPU, in true float64. As
published they compute in float32 in many places whatever the dtype of the weights (RMSNorm, residual, A, D,
dt bias, the scan's input, logits, loss); Float64Only below answers those casts with the float64 tensor
itself. Three checks show that nothing was missed: no operation of a run may produce a 32-bit or 16-bit float
(AssertFloat64), the gradients equal finite differences, and the logits equal those of an independent
implementation (formulas.py). For models with attention, MLPs or what transformers' Mamba-2 does not have,
formulas.py is the reference; its parts are in the other cases too, except attention and MLP. A failed check
ends the script with exit code 1.

Each case is a directory:
  config.json, model.safetensors   as save_pretrained writes them, float64; in mamba2_ssm the model of the
                                   case mamba2 as mamba_ssm publishes it, config.json and pytorch_model.bin,
                                   without expected.safetensors; in the cases of formulas.py by this script,
                                   in the dialect of mamba_ssm, what that has no word for in "ssm_c"
  expected.safetensors             B sequences of T tokens, F64 unless said, hyperparameters in __metadata__:
    input_ids, labels (B,T) I64    labels as transformers wants them: it shifts by one itself; -100 is ignored
    targets (B,T) I64              labels shifted left, last column -100: logits[b,t] predicts targets[b,t]
    logits (B,T,Vp), loss          loss (1): mean cross-entropy over targets >= 0
    grad.<parameter>               d loss / d parameter, names as in model.safetensors
    losses, grad_norms (10)        before each of 10 optimizer steps on this batch, norms before clipping
    adamw.<parameter>              the parameters after those steps
    logits_step (B,T,Vp)           the logits again, from a prefill of 3 tokens and then one token at a time;
                                   not with formulas.py, nor with a time_step_limit, which the step of
                                   transformers ignores
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import safetensors.torch
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# defines: fields, language_model, cross_entropy
import formulas

LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP, STEPS, PREFILL = 1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0, 10, 3
# Only matrices decay; the conv weight, A_log, D, norm weights and biases do not.
DECAYED = re.compile(r"(in_proj|x_proj|dt_proj|out_proj|fc1|fc2|embeddings|lm_head)\.weight$")


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
# unnoticed. E is always expand * D in transformers, expand an integer. T is no multiple of the chunk_size.
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
    "mamba2": (
        dict(hidden_size=12, num_hidden_layers=2, state_size=5, conv_kernel=3, expand=2, num_heads=6,
             head_dim=4, n_groups=1, chunk_size=5, vocab_size=24, tie_word_embeddings=True), 19, 3, 13),
    "mamba2_limits": (
        dict(hidden_size=10, num_hidden_layers=2, state_size=7, conv_kernel=2, expand=3, num_heads=10,
             head_dim=3, n_groups=1, chunk_size=8, vocab_size=17, tie_word_embeddings=False, use_bias=True,
             use_conv_bias=False, time_step_limit=(0.1, 1.5), layer_norm_epsilon=1e-3), 17, 2, 37),
    "mamba2_groups": (
        dict(hidden_size=8, num_hidden_layers=2, state_size=3, conv_kernel=4, expand=3, num_heads=6,
             head_dim=4, n_groups=3, chunk_size=4, vocab_size=16, tie_word_embeddings=True), 13, 2, 11),
}
# mamba_ssm's words: D has a number per channel, the norm stands before the gate, 8 of 24 channels are an MLP
HYBRID = dict(
    d_model=12, d_intermediate=0, n_layer=3, vocab_size=19, pad_vocab_size_multiple=8, tie_embeddings=True,
    ssm_cfg=dict(layer="Mamba2", d_state=5, d_conv=3, expand=2, headdim=4, ngroups=2, chunk_size=6, d_ssm=16,
                 D_has_hdim=True, rmsnorm=True, norm_before_gate=True, dt_limit=[0.05, 2.0]),
    attn_layer_idx=[1],
    attn_cfg=dict(causal=True, num_heads=4, num_heads_kv=2, head_dim=6, mlp_dim=0, d_conv=3,
                  qkv_proj_bias=True, out_proj_bias=False, rotary_emb_dim=6, rotary_emb_base=100.0,
                  rotary_emb_interleaved=False, softmax_scale=None),
    rms_norm=True, residual_in_fp32=True, fused_add_norm=True)
# all kinds of layers, widths that mamba_ssm would round up, no norm after the gate, the other pairing
MIXED = dict(
    d_model=9, d_intermediate=10, n_layer=4, vocab_size=13, pad_vocab_size_multiple=1, tie_embeddings=False,
    ssm_cfg=dict(layer="Mamba2", d_state=4, d_conv=2, expand=2, headdim=3, ngroups=1, chunk_size=4,
                 d_ssm=None, D_has_hdim=False, rmsnorm=False, norm_before_gate=False, dt_limit=[0.0, 3.0],
                 dt_rank=2),
    attn_layer_idx=[],
    attn_cfg=dict(causal=True, num_heads=2, num_heads_kv=1, head_dim=6, mlp_dim=6, d_conv=0,
                  qkv_proj_bias=False, out_proj_bias=True, rotary_emb_dim=4, rotary_emb_base=10000.0,
                  rotary_emb_interleaved=True, softmax_scale=0.7),
    rms_norm=True, residual_in_fp32=True, fused_add_norm=True,
    ssm_c=dict(pattern="2ma1", d_intermediate=10, attn_mlp=6))
# attention alone, part of each head turned. No bias of keys: where no position turns them, the softmax does
# not change with it, and AdamW would divide rounding errors by rounding errors
ATTENTION = dict(HYBRID, n_layer=2, attn_layer_idx=[0, 1], ssm_cfg=dict(HYBRID["ssm_cfg"]),
                 attn_cfg=dict(HYBRID["attn_cfg"], num_heads=6, num_heads_kv=3, d_conv=0, qkv_proj_bias=False,
                               rotary_emb_dim=2))
CASES["hybrid"] = (HYBRID, 19, 2, 13)
CASES["mixed"] = (MIXED, 13, 2, 17)
CASES["attention"] = (ATTENTION, 19, 2, 11)


def tensor_shapes(config):
    """name -> shape of a model of formulas.py, in the order of the program"""
    c, D = formulas.fields(config), config["d_model"]
    ssm, attn = config["ssm_cfg"], config["attn_cfg"]
    E, Es, N, K, G, R = c["d_inner"], c["d_ssm"], c["d_state"], ssm["d_conv"], c["ngroups"], c["dt_rank"]
    H, Cd, F = Es // c["headdim"], Es + 2 * G * N, config["d_intermediate"]
    heads = c["attn_heads"] * c["attn_head_dim"]
    qkv = heads + 2 * c["attn_heads_kv"] * c["attn_head_dim"]
    kinds = {
        "1": {"in_proj.weight": (2 * E, D), "conv1d.weight": (E, 1, K), "conv1d.bias": (E,),
              "x_proj.weight": (0 if R is None else R + 2 * N, E), "dt_proj.weight": (E, R),
              "dt_proj.bias": (E,), "A_log": (E, N), "D": (E,), "out_proj.weight": (D, E)},
        "2": {"in_proj.weight": (2 * E + 2 * G * N + H, D), "conv1d.weight": (Cd, 1, K), "conv1d.bias": (Cd,),
              "dt_bias": (H,), "A_log": (H,), "D": (Es if ssm["D_has_hdim"] else H,),
              "norm.weight": (Es,) if ssm["rmsnorm"] else None, "out_proj.weight": (D, E)},
        "a": {"in_proj.weight": (qkv + c["attn_mlp"], D),
              "in_proj.bias": (qkv + c["attn_mlp"],) if attn["qkv_proj_bias"] else None,
              "conv1d.weight": (qkv, 1, attn["d_conv"]) if attn["d_conv"] else None,
              "conv1d.bias": (qkv,) if attn["d_conv"] else None,
              "out_proj.weight": (D, heads + c["attn_mlp"] // 2),
              "out_proj.bias": (D,) if attn["out_proj_bias"] else None}}
    multiple = config["pad_vocab_size_multiple"]
    vocabulary = -(-config["vocab_size"] // multiple) * multiple
    shapes, at, pattern = {"backbone.embeddings.weight": (vocabulary, D)}, 0, c["pattern"]
    for i in range(c["n_layer"]):
        layer = f"backbone.layers.{i}."
        shapes[layer + "norm.weight"] = (D,)
        for name, shape in kinds[pattern[at % len(pattern)]].items():
            if shape:
                shapes[layer + "mixer." + name] = shape
        at += 1
        if pattern[at % len(pattern)] == "m":
            shapes.update({layer + "norm2.weight": (D,), layer + "mlp.fc1.weight": (2 * F, D),
                           layer + "mlp.fc2.weight": (D, F)})
            at += 1
    shapes["backbone.norm_f.weight"] = (D,)
    if not config["tie_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, D)
    return shapes


class FormulaModel:
    """formulas.py with what the rest of this script uses of a transformers model"""

    def __init__(self, config):
        self.fields = formulas.fields(config)
        self.tensors = {name: torch.zeros(shape, requires_grad=True)
                        for name, shape in tensor_shapes(config).items()}

    def named_parameters(self):
        return self.tensors.items()

    def parameters(self):
        return self.tensors.values()

    def __call__(self, input_ids, labels=None):
        logits = formulas.language_model(self.tensors, self.fields, input_ids)
        if labels is None:
            return types.SimpleNamespace(logits=logits)
        targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        return types.SimpleNamespace(logits=logits, loss=formulas.cross_entropy(logits, targets))


def randomize(model, generator):
    """Weights far from their initial values, at sizes where every term of the model changes the logits."""

    def normal(shape, std, mean=0.0):
        return mean + std * torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            leaf = name.split("mixer.")[-1]
            if leaf == "A_log":
                # ln(1..N) plus noise: decays exp(dt A) from nearly 1 to nearly 0
                p.copy_(torch.log(torch.arange(1.0, p.shape[-1] + 1)) + normal(p.shape, 0.5) - 0.7)
            elif leaf in ("dt_proj.bias", "dt_bias"):
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


def expect(name, model, ids, labels, targets, generator):
    """What the program is compared with: logits, loss, gradients, optimizer steps, all in float64"""
    with Float64Only(), AssertFloat64() as watch:
        result = model(input_ids=ids, labels=labels)
        result.loss.backward()
        expected = {"input_ids": ids, "labels": labels, "targets": targets,
                    "logits": result.logits.detach().clone(), "loss": result.loss.detach().reshape(1)}
        for parameter, p in model.named_parameters():
            expected["grad." + parameter] = p.grad.detach().clone()
        config = getattr(model, "config", None)
        if config and getattr(config, "time_step_limit", (0, math.inf))[1] == math.inf:
            expected["logits_step"] = logits_of_steps(model, ids)
        fd_error = finite_difference_error(model, ids, labels, generator)
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
            norms.append(float(torch.nn.utils.clip_grad_norm_(list(model.parameters()), CLIP)))
            losses.append(float(loss.detach()))
            optimizer.step()
        expected["losses"], expected["grad_norms"] = torch.tensor(losses), torch.tensor(norms)
        for parameter, p in model.named_parameters():
            expected["adamw." + parameter] = p.detach().clone()
    print(f"{name:14s} float64 in all of {watch.operations} operations; loss {losses[0]:.4f} -> "
          f"{losses[-1]:.4f}, gradient norm {min(norms):.2f} to {max(norms):.2f}")
    check(name, "gradients against finite differences, worst parameter", fd_error, 1e-8)
    smallest = min(float(v.norm()) for k, v in expected.items() if k.startswith("grad."))
    check(name, "1 / smallest gradient norm (every parameter matters)", 1.0 / smallest, 1e4)
    if "logits_step" in expected:
        check(name, "logits, prefill and steps against full forward",
              relative_l2(expected["logits_step"], expected["logits"]), 1e-13)
    return expected


def logits_of_steps(model, ids):
    """The logits of a cache: a prefill, then single tokens"""
    model.eval()
    with torch.no_grad():
        step = model(input_ids=ids[:, :PREFILL], use_cache=True)
        pieces = [step.logits]
        for t in range(PREFILL, ids.shape[1]):
            step = model(input_ids=ids[:, t:t + 1], use_cache=True, cache_params=step.cache_params)
            pieces.append(step.logits)
    model.train()
    return torch.cat(pieces, dim=1).clone()


def assert_casts_are_noticed(name, model, ids):
    """The logits of the model as published, with its float32 casts, which AssertFloat64 must notice"""
    with torch.no_grad():
        try:
            with AssertFloat64():
                model(input_ids=ids)
        except AssertionError:
            return model(input_ids=ids).logits
    raise SystemExit(f"{name}: AssertFloat64 did not notice the float32 casts of the unchanged model")


def save_as_mamba_ssm(path, config, tensors):
    """A Mamba-2 model of transformers as mamba_ssm publishes its own"""
    os.makedirs(path)
    ssm = dict(layer="Mamba2", d_state=config.state_size, d_conv=config.conv_kernel, expand=config.expand,
               headdim=config.head_dim, chunk_size=config.chunk_size)
    with open(os.path.join(path, "config.json"), "w") as file:
        json.dump(dict(d_model=config.hidden_size, d_intermediate=0, n_layer=config.num_hidden_layers,
                       vocab_size=config.vocab_size, ssm_cfg=ssm, attn_layer_idx=[], attn_cfg={},
                       rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8,
                       tie_embeddings=config.tie_word_embeddings), file, indent=2)
    renamed = {k.replace("embeddings.", "embedding."): v for k, v in tensors.items()}
    renamed.setdefault("lm_head.weight", renamed["backbone.embedding.weight"])
    torch.save(renamed, os.path.join(path, "pytorch_model.bin"))


def make_case(name, out):
    sizes, n_tokens, B, T = CASES[name]
    generator = torch.Generator().manual_seed(1000 + list(CASES).index(name))
    path = os.path.join(out, name)
    shutil.rmtree(path, ignore_errors=True)
    if "ssm_cfg" in sizes:
        model, as_published = FormulaModel(sizes), None
        randomize(model, generator)
        ids, labels, targets = make_batch(n_tokens, B, T, generator)
        os.makedirs(path)
        with open(os.path.join(path, "config.json"), "w") as file:
            json.dump(sizes, file, indent=2)
        save(os.path.join(path, "model.safetensors"),
             {k.replace("embeddings.", "embedding."): v.detach() for k, v in model.named_parameters()}, {})
    else:
        Config, Model = (MambaConfig, MambaForCausalLM)
        if "head_dim" in sizes:
            Config, Model = Mamba2Config, Mamba2ForCausalLM
        config = Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0, use_cache=True)
        model = Model(config).to(torch.float64)
        model.train()
        randomize(model, generator)
        ids, labels, targets = make_batch(n_tokens, B, T, generator)
        model.save_pretrained(path)
        os.remove(os.path.join(path, "generation_config.json"))
        os.chmod(os.path.join(path, "model.safetensors"), 0o644)
        as_published = assert_casts_are_noticed(name, model, ids)
    expected = expect(name, model, ids, labels, targets, generator)
    rows = model.tensors["backbone.embeddings.weight"].shape[0] if as_published is None else config.vocab_size
    decay_list = ",".join(n for n, _ in model.named_parameters() if DECAYED.search(n))
    metadata = {"case": name, "vocab_size": n_tokens, "vocab_padded": rows, "ignore_index": -100,
                "lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": WEIGHT_DECAY,
                "decayed": decay_list, "clip": CLIP, "clip_rule": "g *= min(1, clip / (norm + 1e-6))",
                "steps": STEPS, "prefill": PREFILL,
                "torch": torch.__version__, "transformers": transformers.__version__}
    save(os.path.join(path, "expected.safetensors"), expected, metadata)
    if as_published is None:
        return

    # what is on disk, through the second implementation
    with open(os.path.join(path, "config.json")) as file:
        saved_config = json.load(file)
    saved = safetensors.torch.load_file(os.path.join(path, "model.safetensors"))
    logits = formulas.language_model(saved, formulas.fields(saved_config), ids)
    loss = float(formulas.cross_entropy(logits, targets))
    check(name, "logits against the formulas", relative_l2(logits, expected["logits"]), 1e-13)
    wanted = float(expected["loss"])
    check(name, "loss against the formulas", abs(loss - wanted) / wanted, 1e-13)
    print(f"{name:14s} for comparison: logits with the published float32 casts differ by "
          f"{relative_l2(as_published, expected['logits']):.1e}")
    if name == "mamba2":
        shutil.rmtree(path + "_ssm", ignore_errors=True)
        save_as_mamba_ssm(path + "_ssm", config, saved)


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
    check("all", "size of all files, in KB", total / 1000, 1000)


if __name__ == "__main__":
    main()
