"""Language models of Mamba-1, Mamba-2, attention and MLP layers, forward only, in PyTorch: the formulas as
loops over time, nothing else. Gradients are those of autograd.

The second oracle beside transformers: make_fixtures.py compares the two on every case that transformers has,
and takes this one alone for hybrid models.
Symbols: B, T batch and tokens, D model width, E inner width, N state size, K conv taps, R rank of dt, H
heads, P channels per head, G groups of B and C. Tensors by the names of transformers. A layer gets p, where
p(name) is its tensor `mixer.<name>`, or 0 where it has none, and c, a dictionary of sizes (fields, below).
Sources: Mamba (arXiv 2312.00752), section 3.2 and algorithm 2; Mamba-2 (arXiv 2405.21060), sections 3, 6, 7
and 9.2.3; the semantics of mamba_ssm's mamba2.py, layernorm_gated.py, mha.py and mlp.py.
"""
import math

import torch


def silu(x):
    return x / (1.0 + torch.exp(-x))


def softplus(p):
    return torch.where(p > 20.0, p, torch.log1p(torch.exp(torch.clamp(p, max=20.0))))


def rmsnorm(x, weight, eps):
    """y = w * x / sqrt(mean_d x^2 + eps), over the last axis"""
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def causal_conv(x, weight, bias):
    """x (B,T,C), weight (C,1,K), tap K-1 for the current token, zeros before t = 0"""
    B, T, C = x.shape
    K = weight.shape[-1]
    padded = torch.cat([torch.zeros((B, K - 1, C), dtype=x.dtype), x], dim=1)
    return sum(padded[:, k:k + T] * weight[:, 0, k] for k in range(K)) + bias


def mamba1_mixer(u, p, c):
    """u (B,T,D) -> (B,T,D)"""
    B, T, _ = u.shape
    E, N, R = c["d_inner"], c["d_state"], c["dt_rank"]
    A = -torch.exp(p("A_log"))                                           # (E,N)
    x, z = (u @ p("in_proj.weight").T + p("in_proj.bias")).split([E, E], dim=-1)
    x = silu(causal_conv(x, p("conv1d.weight"), p("conv1d.bias")))
    r, Bt, Ct = (x @ p("x_proj.weight").T).split([R, N, N], dim=-1)
    dt = softplus(r @ p("dt_proj.weight").T + p("dt_proj.bias"))         # (B,T,E)
    h, y = torch.zeros((B, E, N), dtype=u.dtype), []
    for t in range(T):
        # h_t = exp(dt A) h_{t-1} + dt Bt x        y_t = <Ct, h_t> + D x
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * x)[:, t, :, None] * Bt[:, t, None, :]
        y.append((h * Ct[:, t, None, :]).sum(-1) + p("D") * x[:, t])
    return (torch.stack(y, dim=1) * silu(z)) @ p("out_proj.weight").T + p("out_proj.bias")


def grouped_norm(x, weight, groups, eps):
    """RMSNorm of each of `groups` equal pieces of the last axis, times the weight"""
    pieces = x.unflatten(-1, (groups, x.shape[-1] // groups))
    return weight * rmsnorm(pieces, 1.0, eps).flatten(-2)


def mamba2_mixer(u, p, c):
    """u (B,T,D) -> (B,T,D). [z0; x0; z; x; B; C; dt] = W_in u; z0, x0 are an MLP of the other E - Es channels
    """
    B, T, _ = u.shape
    E, Es, N, P, G = c["d_inner"], c["d_ssm"], c["d_state"], c["headdim"], c["ngroups"]
    H, rest = Es // P, E - Es
    A = -torch.exp(p("A_log"))                                           # (H)
    z0, x0, z, xBC, dt = (u @ p("in_proj.weight").T + p("in_proj.bias")).split(
        [rest, rest, Es, Es + 2 * G * N, H], dim=-1)
    x, Bt, Ct = silu(causal_conv(xBC, p("conv1d.weight"), p("conv1d.bias"))).split([Es, G * N, G * N], dim=-1)
    dt = torch.clamp(softplus(dt + p("dt_bias")), *c["dt_limit"])        # (B,T,H)
    x = x.reshape(B, T, H, P)
    group = torch.arange(H) * G // H                                     # of each head
    Bt, Ct = Bt.reshape(B, T, G, N)[:, :, group], Ct.reshape(B, T, G, N)[:, :, group]      # (B,T,H,N)
    skip = p("D").reshape(H, -1)                                         # one per head, or per channel
    h, y = torch.zeros((B, H, P, N), dtype=u.dtype), []
    for t in range(T):
        # h_t = exp(dt A) h_{t-1} + dt x Bt^T      y_t = h_t Ct + D x
        h = torch.exp(dt[:, t] * A)[..., None, None] * h \
            + (dt[:, t, :, None] * x[:, t])[..., None] * Bt[:, t, :, None, :]
        y.append((h * Ct[:, t, :, None, :]).sum(-1) + skip * x[:, t])
    y = torch.stack(y, dim=1).reshape(B, T, Es)
    if not c["rmsnorm"]:
        y = y * silu(z)
    elif c["norm_before_gate"]:
        y = grouped_norm(y, p("norm.weight"), G, c["norm_eps"]) * silu(z)
    else:
        y = grouped_norm(y * silu(z), p("norm.weight"), G, c["norm_eps"])
    return torch.cat([silu(z0) * x0, y], dim=-1) @ p("out_proj.weight").T + p("out_proj.bias")


def rotate(x, n, base, interleaved):
    """The pairs of the first n numbers of every head, turned by the angle t base^(-2i/n). x (B,T,heads,dh)"""
    if n == 0:
        return x
    T = x.shape[1]
    angle = torch.arange(T)[:, None] * base ** (-2.0 * torch.arange(n // 2) / n)
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]      # (T,1,n/2)
    first = torch.arange(0, n, 2) if interleaved else torch.arange(n // 2)
    second = first + (1 if interleaved else n // 2)
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def attention_mixer(u, p, c):
    """u (B,T,D) -> (B,T,D). [q; k; v; up; gate] = W_in u; causal, query head h reads KV head h Hkv / Hq"""
    B, T, _ = u.shape
    Hq, Hkv, dh, F = c["attn_heads"], c["attn_heads_kv"], c["attn_head_dim"], c["attn_mlp"] // 2
    qkv, up, gate = (u @ p("in_proj.weight").T + p("in_proj.bias")).split([(Hq + 2 * Hkv) * dh, F, F], dim=-1)
    if c["attn_conv"]:
        qkv = causal_conv(qkv, p("conv1d.weight"), p("conv1d.bias"))     # no activation
    q, k, v = qkv.reshape(B, T, Hq + 2 * Hkv, dh).split([Hq, Hkv, Hkv], dim=2)
    q, k = (rotate(a, c["rotary_dim"], c["rotary_base"], c["rotary_interleaved"]) for a in (q, k))
    shared = torch.arange(Hq) * Hkv // Hq                                # the KV head of each query head
    k, v = k[:, :, shared], v[:, :, shared]
    out = []
    for t in range(T):
        # O_t = sum_{j <= t} softmax_j(scale q_t k_j) v_j
        scale = c["softmax_scale"] or 1 / math.sqrt(dh)
        score = scale * (q[:, t, None] * k[:, :t + 1]).sum(-1)           # (B,j,Hq)
        weight = torch.exp(score - score.amax(1, keepdim=True))
        weight = weight / weight.sum(1, keepdim=True)
        out.append((weight[..., None] * v[:, :t + 1]).sum(1).reshape(B, Hq * dh))
    return torch.cat([torch.stack(out, dim=1), up * silu(gate)], dim=-1) @ p("out_proj.weight").T \
        + p("out_proj.bias")


MIXERS = {"1": mamba1_mixer, "2": mamba2_mixer, "a": attention_mixer}


def fields(config):
    """The sizes that config.json describes, by the names of the program's Config; the pattern has a letter
    for each mixer, and an m behind those with an MLP"""
    if "model_type" in config:
        c = dict(pattern={"mamba": "1", "mamba2": "2"}[config["model_type"]], d_state=config["state_size"],
                 d_inner=config["expand"] * config["hidden_size"], norm_eps=config["layer_norm_epsilon"],
                 n_layer=config["num_hidden_layers"])
        if c["pattern"] == "1":
            return dict(c, dt_rank=config["time_step_rank"])
        limit = [float(v["__float__"]) if isinstance(v, dict) else v for v in config["time_step_limit"]]
        return dict(c, d_ssm=c["d_inner"], headdim=config["head_dim"], ngroups=config["n_groups"],
                    dt_limit=limit, rmsnorm=True, norm_before_gate=False)
    ssm, attn, ours = config["ssm_cfg"], config["attn_cfg"], config.get("ssm_c", {})
    layers = ["a" if i in config["attn_layer_idx"] else "2" for i in range(config["n_layer"])]
    c = dict(pattern=ours.get("pattern", "".join(layers)), n_layer=config["n_layer"], norm_eps=1e-5,
             d_inner=ssm["expand"] * config["d_model"], d_state=ssm["d_state"], headdim=ssm["headdim"],
             dt_rank=ssm.get("dt_rank"), ngroups=ssm["ngroups"], rmsnorm=ssm["rmsnorm"],
             norm_before_gate=ssm["norm_before_gate"], dt_limit=ssm["dt_limit"],
             attn_heads=attn["num_heads"], attn_heads_kv=attn["num_heads_kv"], attn_head_dim=attn["head_dim"],
             attn_mlp=attn["mlp_dim"], attn_conv=attn["d_conv"], rotary_dim=attn["rotary_emb_dim"],
             rotary_base=attn["rotary_emb_base"], rotary_interleaved=attn["rotary_emb_interleaved"],
             softmax_scale=attn["softmax_scale"])
    return dict(c, d_ssm=ssm["d_ssm"] or c["d_inner"])


def language_model(tensors, c, ids):
    """Logits (B,T,Vp) of ids (B,T); tensors: name -> tensor, c: fields(config)"""
    embedding = tensors["backbone.embeddings.weight"]
    residual = embedding[ids]                                            # (B,T,D)
    pattern, at = c["pattern"], 0
    for i in range(c["n_layer"]):
        layer = f"backbone.layers.{i}."
        u = rmsnorm(residual, tensors[layer + "norm.weight"], c["norm_eps"])
        mixer = MIXERS[pattern[at % len(pattern)]]
        residual = residual + mixer(u, lambda name: tensors.get(layer + "mixer." + name, 0.0), c)
        at += 1
        if pattern[at % len(pattern)] == "m":
            u = rmsnorm(residual, tensors[layer + "norm2.weight"], c["norm_eps"])
            up, gate = (u @ tensors[layer + "mlp.fc1.weight"].T).chunk(2, dim=-1)
            residual = residual + (up * silu(gate)) @ tensors[layer + "mlp.fc2.weight"].T
            at += 1
    head = tensors.get("lm_head.weight", embedding)                      # tied unless stored
    return rmsnorm(residual, tensors["backbone.norm_f.weight"], c["norm_eps"]) @ head.T


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target] over the positions with target >= 0"""
    logp = logits - logits.amax(-1, keepdim=True)
    logp = logp - torch.log(torch.exp(logp).sum(-1, keepdim=True))
    valid = targets >= 0
    return -logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0][valid].mean()
