"""Mamba-1 language model, forward only, NumPy float64: the formulas as loops over time, nothing else.

The second oracle beside transformers: make_fixtures.py compares the two on every case.
Symbols: B, T batch and tokens, D model width, E inner width, N state size, K conv taps, R rank of dt.
Source: Mamba paper (arXiv 2312.00752), section 3.2 and algorithm 2; tensor names as transformers writes them.
"""
import numpy as np


def silu(x):
    return x / (1.0 + np.exp(-x))


def softplus(p):
    return np.where(p > 20.0, p, np.log1p(np.exp(np.minimum(p, 20.0))))


def rmsnorm(x, weight, eps):
    """y = w * x / sqrt(mean_d x^2 + eps), over the last axis"""
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def mamba1_mixer(u, p, N, K, R):
    """u (B,T,D) -> (B,T,D); p(name) is the layer's tensor `mixer.<name>`, or 0 where it has none"""
    B, T, _ = u.shape
    E = p("D").shape[0]
    A = -np.exp(p("A_log"))                                              # (E,N)
    w = p("conv1d.weight")[:, 0, :]                                      # (E,K), tap K-1 is the current token
    xz = u @ p("in_proj.weight").T + p("in_proj.bias")                   # (B,T,2E)
    x_raw, z = xz[..., :E], xz[..., E:]
    conv_in = np.concatenate([np.zeros((B, K - 1, E)), x_raw], axis=1)   # zeros before t = 0
    h = np.zeros((B, E, N))
    y = np.empty((B, T, E))
    for t in range(T):
        c = sum(conv_in[:, t + k] * w[:, k] for k in range(K)) + p("conv1d.bias")
        x = silu(c)                                                      # (B,E)
        q = x @ p("x_proj.weight").T                                     # (B,R+2N)
        r, Bt, Ct = q[:, :R], q[:, R:R + N], q[:, R + N:]
        dt = softplus(r @ p("dt_proj.weight").T + p("dt_proj.bias"))     # (B,E)
        # h_t = exp(dt A) h_{t-1} + dt Bt x        y_t = <Ct, h_t> + D x
        h = np.exp(dt[..., None] * A) * h + (dt * x)[..., None] * Bt[:, None, :]
        y[:, t] = (h * Ct[:, None, :]).sum(-1) + p("D") * x
    return (y * silu(z)) @ p("out_proj.weight").T + p("out_proj.bias")


def mamba1_lm(tensors, config, ids):
    """Logits (B,T,Vp) of ids (B,T); tensors: name -> float64 array, config: the parsed config.json"""
    N, K, R = config["state_size"], config["conv_kernel"], config["time_step_rank"]
    eps = config["layer_norm_epsilon"]
    embedding = tensors["backbone.embeddings.weight"]
    residual = embedding[ids]                                            # (B,T,D)
    for i in range(config["num_hidden_layers"]):
        layer = f"backbone.layers.{i}."
        u = rmsnorm(residual, tensors[layer + "norm.weight"], eps)
        residual = residual + mamba1_mixer(u, lambda name: tensors.get(layer + "mixer." + name, 0.0), N, K, R)
    head = tensors.get("lm_head.weight", embedding)                      # tied unless stored
    return rmsnorm(residual, tensors["backbone.norm_f.weight"], eps) @ head.T


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target] over the positions with target >= 0"""
    shifted = logits - logits.max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    valid = targets >= 0
    return -np.take_along_axis(logp, np.maximum(targets, 0)[..., None], -1)[..., 0][valid].mean()
