"""Do mamba_ssm and our program read each other's models, and do both compute the same logits?

    python dev/reference/check_mamba_ssm.py SOURCE [--binary build/train_mamba]

SOURCE is the unpacked source of mamba_ssm (`pip download mamba-ssm==2.2.4 --no-deps --no-binary :all:`;
einops must be installed). Its CUDA and Triton kernels are replaced by the scan that it ships for reference and by
RMSNorm in PyTorch, so that it runs on a CPU. Random models in odd configurations:

  theirs to ours   MambaLMHeadModel.save_pretrained writes pytorch_model.bin, config.json; ours evaluates
  ours to theirs   `train_mamba convert --dialect mamba_ssm` in three dtypes, loaded by their from_pretrained
                   (strictly: every tensor and no other); logits of both on the same tokens

Limit: relative L2 of the logits 1e-4; theirs are computed in float32. Exit code 1 on failure.
"""
import argparse
import importlib.machinery
import os
import sys
import tempfile
import types

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# defines: run, our_logits, relative, write_shard, LIMIT
from check_checkpoint import LIMIT, our_logits, relative, run, write_shard

CONFIGS = {
    "defaults": dict(d_model=48, n_layer=3, vocab_size=61),
    "odd sizes": dict(d_model=37, n_layer=2, vocab_size=101, pad_vocab_size_multiple=1,
                      ssm_cfg=dict(d_state=5, d_conv=3, expand=3, dt_rank=7)),
    "biases": dict(d_model=24, n_layer=2, vocab_size=37, ssm_cfg=dict(bias=True, conv_bias=True, d_conv=2)),
    "no conv bias": dict(d_model=20, n_layer=2, vocab_size=29, ssm_cfg=dict(conv_bias=False, expand=1)),
    "own head": dict(d_model=40, n_layer=2, vocab_size=51, tie_embeddings=False),
    "MLPs": dict(d_model=32, n_layer=2, vocab_size=77, d_intermediate=100, pad_vocab_size_multiple=16),
}


def import_mamba_ssm(source):
    """mamba_ssm's model class, without its compiled parts"""
    for name in ("selective_scan_cuda", "causal_conv1d", "causal_conv1d_cuda"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["causal_conv1d"].causal_conv1d_fn = None
    sys.modules["causal_conv1d"].causal_conv1d_update = None
    package = types.ModuleType("mamba_ssm")           # without its __init__, which imports every kernel
    package.__path__ = [os.path.join(source, "mamba_ssm")]
    sys.modules["mamba_ssm"] = package
    import transformers.generation as generation
    for name in ("GreedySearchDecoderOnlyOutput", "SampleDecoderOnlyOutput"):
        if not hasattr(generation, name):
            setattr(generation, name, None)
    import mamba_ssm.modules.block as block
    import mamba_ssm.modules.mamba_simple as mixer
    import mamba_ssm.models.mixer_seq_simple as model
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    mixer.selective_scan_fn = selective_scan_ref

    def norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False, **unused):
        residual = x if residual is None else x + residual
        out = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps) * weight
        return (out, residual) if prenorm else out

    block.layer_norm_fn = model.layer_norm_fn = norm
    return model.MambaLMHeadModel, MambaConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--binary", default="build/train_mamba")
    args = parser.parse_args()
    Model, Config = import_mamba_ssm(args.source)
    failed = 0
    print(f"{'model':14s} {'form':20s} {'logits':>9s}  (limit {LIMIT:.0e})")
    for seed, (name, options) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        theirs = Model(Config(**options))
        with torch.no_grad():
            for p in theirs.parameters():
                p += 0.1 * torch.randn_like(p)
        with tempfile.TemporaryDirectory() as scratch:
            source = os.path.join(scratch, "theirs")
            theirs.save_pretrained(source)
            data = os.path.join(scratch, "data.bin")
            write_shard(data, torch.randint(1, options["vocab_size"], (123,)).tolist())
            for dtype in (None, "f32", "f16", "bf16"):
                directory, model = source, theirs
                if dtype:
                    directory = os.path.join(scratch, dtype)
                    run([args.binary, "convert", "--from", source, "--out", directory, "--dialect",
                         "mamba_ssm", "--dtype", dtype])
                    model = Model.from_pretrained(directory)
                ids, ours = our_logits(args.binary, directory, data, "--seq-len", "61", "--batch-size", "2",
                                       "--no-reset-documents")
                with torch.no_grad():
                    error = relative(ours, model.eval()(ids).logits.double())
                failed += not error <= LIMIT                      # NaN fails
                form = f"-> mamba_ssm {dtype}" if dtype else "save_pretrained"
                print(f"{name:14s} {form:20s} {error:9.1e}  {'ok' if error <= LIMIT else 'FAIL'}")
    print(f"{failed} failed" if failed else "all equal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
