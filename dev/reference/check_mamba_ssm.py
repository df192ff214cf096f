"""Do mamba_ssm and our program read each other's models, and do both compute the same logits?

    python dev/reference/check_mamba_ssm.py SOURCE [--binary build/train_mamba]

SOURCE is the unpacked source of mamba_ssm (`pip download mamba-ssm==2.2.4 --no-deps --no-binary :all:`;
einops must be installed). Its CUDA and Triton kernels are replaced by the scans and the gated norm that it
ships for reference, by RMSNorm in PyTorch and, for flash_attn's rotary embedding, by that of formulas.py, so
that it runs on a CPU. Random models in odd configurations:

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
# defines: rotate
import formulas
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
    "Mamba-2": dict(d_model=48, n_layer=3, vocab_size=61, ssm_cfg=dict(layer="Mamba2", headdim=16)),
    "Mamba-2 odd": dict(d_model=30, n_layer=2, vocab_size=53, d_intermediate=100, pad_vocab_size_multiple=1,
                        ssm_cfg=dict(layer="Mamba2", headdim=5, d_ssm=40, ngroups=4, d_state=7, d_conv=3,
                                     chunk_size=16, D_has_hdim=True, norm_before_gate=True, bias=True)),
    "no norm": dict(d_model=24, n_layer=2, vocab_size=37, tie_embeddings=False,
                    ssm_cfg=dict(layer="Mamba2", headdim=8, d_state=9, rmsnorm=False, conv_bias=False,
                                 chunk_size=32, dt_limit=[0.01, 0.05])),
    "hybrid": dict(d_model=32, n_layer=4, vocab_size=41, ssm_cfg=dict(layer="Mamba2", headdim=8, d_state=9),
                   attn_layer_idx=[1, 3],
                   attn_cfg=dict(causal=True, num_heads=6, num_heads_kv=3, head_dim=10, d_conv=4, mlp_dim=100,
                                 rotary_emb_dim=6, rotary_emb_base=500.0)),
    "hybrid, Mamba-1": dict(d_model=32, n_layer=3, vocab_size=41, d_intermediate=64, attn_layer_idx=[0],
                            attn_cfg=dict(causal=True, num_heads=4, qkv_proj_bias=False, out_proj_bias=False,
                                          rotary_emb_dim=8, rotary_emb_interleaved=True, softmax_scale=0.5)),
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

    import mamba_ssm.modules.mamba2 as mamba2
    import mamba_ssm.modules.mha as mha
    from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref
    from mamba_ssm.ops.triton.ssd_combined import ssd_chunk_scan_combined_ref

    def scan(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_limit=(0.0, float("inf")), **unused):
        dt = torch.nn.functional.softplus(dt + dt_bias).clamp(*dt_limit)
        T, pad = x.shape[1], -x.shape[1] % chunk_size     # their reference wants whole chunks; dt = 0 is none
        x, dt, B, C, z = (None if a is None else torch.cat([a, torch.zeros_like(a[:, :1]).expand(
            -1, pad, *a.shape[2:])], dim=1) for a in (x, dt, B, C, z))
        return ssd_chunk_scan_combined_ref(x, dt, A, B, C, chunk_size, D=D, z=z)[:, :T]

    class Rotary(torch.nn.Module):
        def __init__(self, dim, base, interleaved, device):
            super().__init__()
            self.options = dim, base, interleaved

        def forward(self, q, kv, **unused):
            k, v = kv.unbind(dim=-3)
            return formulas.rotate(q, *self.options), torch.stack(
                [formulas.rotate(k, *self.options), v], dim=-3)

    init = mamba2.Mamba2.__init__

    def unfused(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.use_mem_eff_path = False

    mamba2.Mamba2.__init__ = unfused
    mamba2.mamba_chunk_scan_combined = scan
    mamba2.RMSNormGated.forward = lambda self, x, z=None: rms_norm_ref(
        x, self.weight, None, z=z, eps=self.eps, group_size=self.group_size,
        norm_before_gate=self.norm_before_gate)
    mha.RotaryEmbedding = Rotary
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
