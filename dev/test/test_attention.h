// ---------------------------------------------------------------------------------------------------
// test_attention.h: attention with its rotation and its cache, alone and as a block of a model.
//
// Layer: out = softmax(scale q k^T) v of the turned q and k; state: the cache. In a shape: Q query heads,
// G KV heads, H numbers per head, R of them turned (`interleaved`: neighbours), C tokens cached at first.

size_t shape_number(const Problem* p, char letter) { return (size_t)number_after_letter(p->shape, letter); }

typedef struct {
    size_t Hq, Hkv, dh, ro, capacity, width;
    bool interleaved;
    double base;
    real scale;
} TestHeads;

TestHeads test_heads(const Problem* p) {
    TestHeads a = { shape_number(p, 'Q'), shape_number(p, 'G'), shape_number(p, 'H'), shape_number(p, 'R'), 0,
                    0, strstr(p->shape, "interleaved") != NULL, 50, (real)0.7 };
    const char* T = strchr(p->shape, 'T');              // of the whole, also for a piece of it
    a.capacity = shape_number(p, 'C') + (size_t)atoi(T + 1) + 2;
    a.width = (a.Hq + 2 * a.Hkv) * a.dh;
    return a;
}

// p->ids: how many tokens of its document come before the token if it goes on with the document of the token
// before it. For the first token of a piece: what the state handed over has in its cache.
void attention_make(Problem* p) {
    TestHeads a = test_heads(p);
    size_t cached = shape_number(p, 'C');
    add_input(p, "qkv", PER_TOKEN, p->B * p->T, a.width, 3, -1, 1);
    Operand* kv0 = add_input(p, "kv0", PER_SEQUENCE, p->B * a.capacity, 2 * a.Hkv * a.dh, 0, -1, 1);
    kv0->skippable = true;
    given_if(kv0, p->flags & HAS_STATE);
    add_output(p, "out", PER_TOKEN, p->B * p->T, a.Hq * a.dh, 2);
    Operand* kvT = add_output(p, "kvT", PER_SEQUENCE, p->B * a.capacity, 2 * a.Hkv * a.dh, 0);
    given_if(kvT, p->flags & HAS_FINAL);
    p->ids = (int*)test_alloc(p->B * p->T, sizeof(int));
    for (size_t b = 0; b < p->B; b++) {
        int before = p->flags & HAS_STATE ? (int)((cached + 3 * b) % (cached + 1)) : 0;
        if (b == 0 && p->flags & HAS_STATE) before = (int)cached;
        for (size_t t = 0; t < p->T; t++) {
            p->ids[b * p->T + t] = before;
            before = document_starts(p, b, t) ? 1 : before + 1;
        }
    }
    p->saved_size = p->B * p->T * (1 + a.Hq + a.width + 1);
    p->scratch_size = p->B * p->T * (a.width + 2);
}

// Pieces: q of all tokens at its own stride, then k and v, so that the strides differ
typedef struct { real *q, *k, *v; size_t ldq, ldkv; } Pieces;

Pieces pieces_of(const TestHeads* a, real* memory, size_t M, size_t gap) {
    size_t ldq = a->Hq * a->dh + gap, k_width = a->Hkv * a->dh;
    Pieces x = { memory, memory + M * ldq, memory + M * ldq + k_width, ldq, 2 * k_width };
    return x;
}

// saved: positions, lse, q, k and v after the rotation
void attention_fwd(Problem* p) {
    TestHeads a = test_heads(p);
    size_t M = p->B * p->T, q_width = a.Hq * a.dh, k_width = a.Hkv * a.dh;
    const Operand *qkv = &p->in[0], *kv0 = &p->in[1], *out = &p->out[0], *kvT = &p->out[1];
    real *position = p->saved, *lse = position + M;
    Pieces x = pieces_of(&a, lse + M * a.Hq, M, 1);
    real* position0 = (real*)test_alloc(2 * p->B, sizeof(real));
    for (size_t b = 0; b < p->B; b++) position0[b] = kv0->value ? (real)p->ids[b * p->T] : 0;
    copy_columns(x.q, x.ldq, qkv->value, qkv->ld, M, q_width);
    copy_columns(x.k, x.ldkv, qkv->value + q_width, qkv->ld, M, 2 * k_width);
    token_positions(position, kv0->value ? position0 : NULL, p->doc, p->B, p->T);
    rotary_forward(x.q, x.ldq, position, a.base, a.interleaved, M, a.Hq, a.dh, a.ro);
    rotary_forward(x.k, x.ldkv, position, a.base, a.interleaved, M, a.Hkv, a.dh, a.ro);
    attention_forward(out->value, out->ld, lse, x.q, x.ldq, x.k, x.v, x.ldkv, kv0->value, a.capacity,
                      position, a.scale, p->B, p->T, a.Hq, a.Hkv, a.dh);
    if (!kvT->value) return;
    real* positionT = position0 + p->B;
    kv_append_forward(kvT->value, positionT, kv0->value, x.k, x.v, x.ldkv, position, a.capacity, p->B, p->T,
                      a.Hkv, a.dh);
    for (size_t b = 0; b < p->B; b++) {
        size_t length = (size_t)positionT[b];
        assert(positionT[b] == position[b * p->T + p->T - 1] + 1);
        for (size_t i = length * 2 * k_width; i < a.capacity * 2 * k_width; i++)
            kvT->value[b * a.capacity * 2 * k_width + i] = 0;            // not written by the layer
    }
}

// without rotation the gradients are added to what is in the problem's arrays, else to zeros first
void attention_bwd(Problem* p) {
    TestHeads a = test_heads(p);
    size_t M = p->B * p->T, q_width = a.Hq * a.dh, k_width = a.Hkv * a.dh;
    const Operand *qkv = &p->in[0], *kv0 = &p->in[1], *out = &p->out[0], *kvT = &p->out[1];
    real *position = p->saved, *lse = position + M;
    Pieces x = pieces_of(&a, lse + M * a.Hq, M, 1), d = pieces_of(&a, p->scratch, M, 2);
    if (!a.ro) {
        Pieces grad = { qkv->grad, qkv->grad + q_width, qkv->grad + q_width + k_width, qkv->ld, qkv->ld };
        d = grad;
    }
    for (size_t i = 0; a.ro && i < M * (a.width + 2); i++) p->scratch[i] = 0;
    attention_backward(d.q, d.ldq, d.k, d.v, d.ldkv, kv0->grad, out->grad, out->value, out->ld, lse, x.q,
                       x.ldq, x.k, x.v, x.ldkv, kv0->value, a.capacity, position, a.scale, p->B, p->T, a.Hq,
                       a.Hkv, a.dh);
    if (kvT->grad)
        kv_append_backward(d.k, d.v, d.ldkv, kv0->grad, kvT->grad, position, a.capacity, p->B, p->T, a.Hkv,
                           a.dh);
    if (!a.ro) return;
    rotary_backward(d.q, d.ldq, position, a.base, a.interleaved, M, a.Hq, a.dh, a.ro);
    rotary_backward(d.k, d.ldkv, position, a.base, a.interleaved, M, a.Hkv, a.dh, a.ro);
    for (size_t m = 0; m < M; m++) {
        real* g = qkv->grad + m * qkv->ld;
        for (size_t i = 0; i < q_width; i++) g[i] += d.q[m * d.ldq + i];
        for (size_t i = 0; i < 2 * k_width; i++) g[q_width + i] += d.k[m * d.ldkv + i];
    }
}

// turned: element d of a head at a position, by the definition
double turned(const TestHeads* a, const double* x, size_t d, size_t position) {
    if (d >= a->ro) return x[d];
    size_t i = a->interleaved ? d / 2 : d % (a->ro / 2);
    bool second = a->interleaved ? d % 2 : d >= a->ro / 2;
    double angle = (double)position * pow(a->base, -2.0 * (double)i / (double)a->ro);
    double u = x[a->interleaved ? 2 * i : i], v = x[a->interleaved ? 2 * i + 1 : i + a->ro / 2];
    return second ? u * sin(angle) + v * cos(angle) : u * cos(angle) - v * sin(angle);
}

// every token with all scores of a row side by side: keys[n], values[n] of its document, oldest first
void attention_formula(const Problem* p, double** in, double** out) {
    TestHeads a = test_heads(p);
    size_t dh = a.dh, kv_width = a.Hkv * dh;
    double* kv = (double*)test_alloc(2 * a.capacity * kv_width, sizeof(double));
    double* score = (double*)test_alloc(a.capacity, sizeof(double));
    for (size_t b = 0; b < p->B; b++) {
        size_t n = in[1] ? (size_t)p->ids[b * p->T] : 0;
        for (size_t i = 0; i < n * 2 * kv_width; i++) kv[i] = in[1][b * a.capacity * 2 * kv_width + i];
        for (size_t t = 0; t < p->T; t++) {
            const double* x = in[0] + (b * p->T + t) * a.width;
            if (document_starts(p, b, t)) n = 0;
            for (size_t i = 0; i < kv_width; i++) {
                kv[n * 2 * kv_width + i] = turned(&a, x + (a.Hq + i / dh) * dh, i % dh, n);
                kv[(n * 2 + 1) * kv_width + i] = x[(a.Hq + a.Hkv) * dh + i];
            }
            for (size_t h = 0; h < a.Hq; h++) {
                size_t g = h / (a.Hq / a.Hkv);
                double sum = 0, *o = out[0] + ((b * p->T + t) * a.Hq + h) * dh;
                for (size_t j = 0; j <= n; j++) {
                    score[j] = 0;
                    for (size_t d = 0; d < dh; d++)
                        score[j] += turned(&a, x + h * dh, d, n) * kv[j * 2 * kv_width + g * dh + d];
                    sum += score[j] = exp((double)a.scale * score[j]);
                }
                for (size_t d = 0; d < dh; d++) {
                    o[d] = 0;
                    for (size_t j = 0; j <= n; j++)
                        o[d] += score[j] / sum * kv[(j * 2 + 1) * kv_width + g * dh + d];
                }
            }
            n++;
        }
        for (size_t i = 0; out[1] && i < a.capacity * 2 * kv_width; i++)
            out[1][b * a.capacity * 2 * kv_width + i] = i < n * 2 * kv_width ? kv[i] : 0;
    }
}

const LayerTest attention_layer = {
    "attention", attention_make, attention_fwd, attention_bwd, attention_formula, 1, false, false
};

// Angles of far positions, both pairings. Catches: angles made in float, whose error grows with the position.
void test_far_rotation(void) {
    Worst w = { 0, "" };
    const double positions[] = { 0, 1, 1000, 65537, 131071, 16777215 };
    for (int interleaved = 0; interleaved < 2; interleaved++) {
        for (int k = 0; k < COUNT_OF(positions); k++) {
            TestHeads a = { 1, 1, 70, 64, 0, 0, interleaved != 0, 10000, 1 };
            real x[70], position = (real)positions[k];
            double before[70], after[70], exact[70];
            for (size_t d = 0; d < 70; d++) before[d] = (double)(x[d] = (real)test_uniform(-1, 1, 5, d));
            rotary_forward(x, 70, &position, a.base, a.interleaved, 1, 1, 70, 64);
            for (size_t d = 0; d < 70; d++) {
                after[d] = (double)x[d];
                exact[d] = turned(&a, before, d, (size_t)positions[k]);
            }
            worst_add(&w, relative_l2(after, exact, 70), "position %.0f", positions[k]);
        }
    }
    worst_report("rotation of far positions", &w, limit(1e-7, 1e-15));
}

// Scores far apart, equal, infinite and NaN; a cache with NaN behind its end. Catches: exp of a large score,
// a maximum that is lost between tiles, a NaN that disappears, rows read that are not there.
void test_attention_extremes(void) {
    enum { T = 70, CACHE = 10, CAPACITY = 90 };
    Worst finite = { 0, "" };
    double lost = 0, wrong = 0;
    real *q = (real*)test_alloc(T, sizeof(real)), *k = (real*)test_alloc(T, sizeof(real)),
        *v = (real*)test_alloc(T, sizeof(real)), *kv0 = (real*)test_alloc(2 * CAPACITY, sizeof(real));
    real position[T], position0 = CACHE, out[T], lse[T], dq[T], dk[T], dv[T], dkv0[2 * CAPACITY], one[T];
    const double sizes[] = { 0, 1, 1e4, 1e15 };
    for (int i = 0; i < COUNT_OF(sizes); i++) {
        for (int j = 0; j < 2 * CAPACITY; j++) {
            kv0[j] = j < 2 * CACHE ? (real)1 : (real)NAN;
            dkv0[j] = 0;
        }
        for (int t = 0; t < T; t++) {
            q[t] = (real)1;
            k[t] = (real)(sizes[i] * test_uniform(-1, 1, 6, (size_t)t));
            v[t] = (real)test_uniform(0, 1, 7, (size_t)t);
            one[t] = 1;
            dq[t] = dk[t] = dv[t] = 0;
        }
        token_positions(position, &position0, NULL, 1, T);
        attention_forward(out, 1, lse, q, 1, k, v, 1, kv0, CAPACITY, position, 1, 1, T, 1, 1, 1);
        attention_backward(dq, 1, dk, dv, 1, dkv0, one, out, 1, lse, q, 1, k, v, 1, kv0, CAPACITY, position,
                           1, 1, T, 1, 1, 1);
        double bad = 0, weights = 0;
        for (int t = 0; t < T; t++) {
            bad += !isfinite((double)(out[t] + lse[t] + dq[t] + dk[t] + dv[t])) || !(out[t] < 2);
            weights += (double)dv[t];                       // of all tokens together 1 each
        }
        for (int j = 0; j < 2 * CAPACITY; j++) bad += !isfinite((double)dkv0[j]);
        for (int j = 1; j < 2 * CACHE; j += 2) weights += (double)dkv0[j];
        worst_add(&finite, bad, "scores of %g", sizes[i]);
        wrong = fmax(wrong, fabs(weights / T - 1));
        q[66] = (real)(i % 2 ? NAN : INFINITY);
        attention_forward(out, 1, lse, q, 1, k, v, 1, kv0, CAPACITY, position, 1, 1, T, 1, 1, 1);
        lost += !isnan((double)out[66]) || isnan((double)out[65]) || isnan((double)out[67]);
    }
    worst_report("scores up to 1e15: values not finite", &finite, 0);
    report("the weights of a token do not add up to 1", wrong, limit(1e-6, 1e-14));
    report("a NaN query is lost, or reaches other tokens", lost, 0);
}

// A cache that is full ends the program with a line that says so.
void overflow_in_child(void* unused) {
    real kv[4] = { 0 }, x[3] = { 0 }, position[3] = { 0, 1, 2 }, positionT;
    (void)unused;
    kv_append_forward(kv, &positionT, NULL, x, x, 1, position, 2, 1, 3, 1, 1);
}

// The block against its formula in double precision. Catches what differentiation cannot see: q, k, v or up
// and gate exchanged, the conv behind the rotation, an activation behind the conv, columns of out_proj in
// another order, a scale that is left out.
double block_formula_error(const char* text) {
    enum { T = 9, D = 5 };
    Config c = toy_config("a", 1, D, 5, 5, 4, 1, 11);
    toy_attention(&c, text, T);
    Toy toy;
    toy_make(&toy, &c, 1, T, -1, false);
    const AttentionParams* p = (const AttentionParams*)toy.m.layer[0].params;
    size_t Hq = (size_t)c.attn_heads, Hkv = (size_t)c.attn_heads_kv, dh = (size_t)c.attn_head_dim;
    size_t K = (size_t)c.attn_conv, F = (size_t)c.attn_mlp / 2, W = (Hq + 2 * Hkv) * dh, O = Hq * dh + F;
    TestHeads a = { Hq, Hkv, dh, (size_t)c.rotary_dim, 0, W, c.rotary_interleaved, c.rotary_base, 0 };
    double scale = c.softmax_scale > 0 ? c.softmax_scale : 1 / sqrt((double)dh), want[T * D];
    double* in = (double*)test_alloc(T * (W + 2 * F), sizeof(double));
    double *qkv = (double*)test_alloc(T * W, sizeof(double)), *x = (double*)test_alloc(T * W, sizeof(double));
    double* y = (double*)test_alloc(O, sizeof(double));
    real res[T * D], out[T * D];
    for (size_t i = 0; i < T * D; i++) res[i] = (real)test_uniform(-0.01, 0.01, 82, i);        // eps counts
    for (size_t t = 0; t < T; t++) {
        double sum = 0;
        for (size_t d = 0; d < D; d++) sum += (double)res[t * D + d] * (double)res[t * D + d] / D;
        for (size_t o = 0; o < W + 2 * F; o++) {
            double* in_to = in + t * (W + 2 * F) + o;
            *in_to = p->in_proj_bias ? (double)p->in_proj_bias[o] : 0;
            for (size_t d = 0; d < D; d++)
                *in_to += (double)p->in_proj[o * D + d] * (double)p->norm[d] * (double)res[t * D + d] /
                          sqrt(sum + 1e-5);
        }
        for (size_t e = 0; e < W; e++) {
            double* q = qkv + t * W + e;
            *q = K ? (double)p->conv1d_bias[e] : in[t * (W + 2 * F) + e];
            for (size_t back = 0; back < K && back <= t; back++)
                *q += (double)p->conv1d[e * K + K - 1 - back] * in[(t - back) * (W + 2 * F) + e];
        }
        for (size_t e = 0; e < W; e++)
            x[t * W + e] = e < (Hq + Hkv) * dh ? turned(&a, qkv + t * W + e / dh * dh, e % dh, t)
                                               : qkv[t * W + e];
        for (size_t h = 0; h < Hq; h++) {
            double weight[T], total = 0;
            const double *k = x + (Hq + h * Hkv / Hq) * dh, *v = k + Hkv * dh;
            for (size_t j = 0; j <= t; j++) {
                double score = 0;
                for (size_t d = 0; d < dh; d++) score += scale * x[t * W + h * dh + d] * k[j * W + d];
                total += weight[j] = exp(score);
            }
            for (size_t d = 0; d < dh; d++) {
                y[h * dh + d] = 0;
                for (size_t j = 0; j <= t; j++) y[h * dh + d] += weight[j] / total * v[j * W + d];
            }
        }
        for (size_t f = 0; f < F; f++) {
            double up = in[t * (W + 2 * F) + W + f], gate = in[t * (W + 2 * F) + W + F + f];
            y[Hq * dh + f] = up * gate / (1 + exp(-gate));
        }
        for (size_t d = 0; d < D; d++) {
            double* w = want + t * D + d;
            *w = (double)res[t * D + d] + (p->out_proj_bias ? (double)p->out_proj_bias[d] : 0);
            for (size_t o = 0; o < O; o++) *w += (double)p->out_proj[d * O + o] * y[o];
        }
    }
    Run run = { &toy.m.config, 1, T, NULL, RECOMPUTE_NONE, { 0, 0, 0, 0 }, { NULL, NULL } };
    attention_block_forward(&run, out, res, toy.m.layer[0].params, toy.w.acts[0],
                            toy.w.scratch[toy.m.layer[0].kind - kinds], toy.none.field[0], toy.none.field[0]);
    double error = relative_l2(to_double(out, T * D), want, T * D);
    toy_free(&toy);
    return error;
}

void test_block_formula(void) {
    Worst w = { 0, "" };
    const char* const layers[] = {
        "Q2 G2 H4", "Q4 G2 H4 R2 K3", "Q4 G1 H3 R2 K4 F5 biases", "Q2 G1 H4 R4 F3 interleaved scale" };
    for (int i = 0; i < COUNT_OF(layers); i++) worst_add(&w, block_formula_error(layers[i]), "%s", layers[i]);
    worst_report("block = formula", &w, limit(3e-6, 1e-14));

    // one layer of mamba2attn-2.7b, to the unit; initial values of the conv and of the projections
    Config c = toy_config("a", 1, 2560, 1, 1, 1, 1, 8);
    toy_attention(&c, "Q30 G30 H128 R64 K4", 1);
    Model m;
    model_describe(&m, &c);
    report("parameters of a layer of mamba2attn-2.7b", fabs((double)m.n_params - 9 * 2560 - 39381760), 0);
    model_free(&m);
    c = toy_config("a", 4, 64, 1, 1, 7, 1, 8);
    toy_attention(&c, "Q4 G4 H32 K3 biases", 1);
    model_describe(&m, &c);
    model_alloc(&m, false);
    model_init(&m, 3);
    Moments in = tensor_moments(&m, "in_proj.weight"), conv = tensor_moments(&m, "conv1d.weight"),
            bias = tensor_moments(&m, "conv1d.bias"), out = tensor_moments(&m, "out_proj.weight"),
            zero = tensor_moments(&m, "proj.bias");
    double wrong = fmax(fabs(in.hi * 8 - 1), fabs(out.hi * sqrt(128 * 4) - 1));
    wrong = fmax(wrong, fmax(fabs(conv.hi * sqrt(3) - 1), fabs(bias.hi * sqrt(3) - 1)));
    report("initial values: largest value / bound - 1", wrong, 0.01);
    report("initial values: biases that are not 0, or not there",
           fabs(zero.hi) + fabs(zero.lo) + (zero.n == 0), 0);
    model_free(&m);
}

// The two faults of decoding after a prefill in the published code: a conv state that holds outputs, and a
// mask that lets a single token see the first key only. Here the state holds inputs, and every value in the
// cache reaches the next token.
void test_decode_faults(void) {
    Config c = toy_config("a", 1, 6, 5, 5, 4, 1, 11);
    toy_attention(&c, "Q2 G1 H4 K3", 8);
    Toy toy;
    toy_make(&toy, &c, 1, 5, -1, false);
    Workspace w = workspace_alloc(&toy.m, 1, 5, false, false, false);
    State s = state_alloc(&toy.m, 1);
    double conv = 0;
    const AttentionState* f = (const AttentionState*)s.field[0];
    model_forward(&toy.m, &w, toy.tokens, NULL, 1, 5, &toy.none, &s);
    const AttentionActs* a = (const AttentionActs*)w.acts[0];
    for (size_t k = 0; k < 2; k++)
        for (size_t e = 0; e < 16; e++) conv += f->conv[k * 16 + e] != a->in[(3 + k) * 16 + e];
    report("conv state: numbers that are not inputs of the conv", conv, 0);
    report("tokens in the cache after 5", fabs((double)f->position[0] - 5), 0);
    real y[8];
    double seen = 0;
    for (size_t p = 0; p < 5; p++) {
        for (int bump = 0; bump < 2; bump++) {
            State copy = state_alloc(&toy.m, 1);
            state_copy_row(&toy.m, &copy, 0, &s, 0);
            ((AttentionState*)copy.field[0])->kv[(p * 2 + 1) * 4] += (real)bump;
            model_forward(&toy.m, &w, toy.tokens, NULL, 1, 1, &copy, &copy);
            if (bump) seen += (double)(a->y[0] - y[0]) > 1e-4;
            memcpy(y, a->y, sizeof y);
            state_free(&copy);
        }
    }
    report("keys that the next token does not see", 5 - seen, 0);
    workspace_free(&w);
    state_free(&s);
    toy_free(&toy);
}

// Room in the cache. Catches: one token too few, that of another prompt, a saved state that is not counted.
void test_context(void) {
    Config c = toy_config("1am", 2, 12, 18, 5, 4, 2, 257);
    Model m = toy_model(&c, false, 6);
    Backend backend = backend_cpu(&m, 0, 0, false, false);
    Tokenizer tok;
    tokenizer_bytes(&tok);
    char option[300], *argv[64];
    snprintf(option, sizeof option, "--max-tokens 0 --save-state %s", scratch("part.state"));
    written(&m, "seventeen letters", option);
    double more = flop_per_token(&m, 9).matmul + flop_per_token(&m, 9).scan -
                  flop_per_token(&m, 1).matmul - flop_per_token(&m, 1).scan;
    report("flop of 8 tokens more: 48 per channel of the queries",
           fabs(more - 48.0 * (double)(c.attn_heads * c.attn_head_dim)), 1e-6);
    report("context of a prompt of 17 tokens", fabs((double)m.config.context - 17), 0);
    Error err;
    SafeTensors st;
    must(safetensors_open(&st, scratch("part.state"), &err), &err);
    report("numbers in the saved state, which is what is filled",
           fabs((double)safetensors_find(&st, "state")->count - (double)state_count(&m)), 0);
    safetensors_close(&st);
    snprintf(option, sizeof option, "--max-tokens 40 --load-state %s", scratch("part.state"));
    written(&m, "abc", option);
    report("context of state, prompt and new tokens", fabs((double)m.config.context - 60), 0);
    // a saved state in a cache that is too small, and a conversation that gets too long
    int64_t tokens = 0;
    real* logits = (real*)test_alloc(2 * (size_t)c.vocab_padded, sizeof(real));
    real* seen = logits + c.vocab_padded;
    State s[2];
    for (int k = 0; k < 2; k++) {
        m.config.context = 17 - k;
        s[k] = state_alloc(&m, 1);
        bool ok = state_load(&m, &s[k], logits, seen, &tokens, scratch("part.state"), &err);
        report(k ? "a state that is too long: not refused" : "a state that just fits: refused", ok != !k, 0);
        state_free(&s[k]);
    }
    m.config.context = 17;
    State good = state_alloc(&m, 1);
    must(state_load(&m, &good, logits, seen, &tokens, scratch("part.state"), &err), &err);
    for (int k = 0; k < 3; k++) {
        ((AttentionState*)good.field[1])->position[0] = (real)(k == 0 ? 1e6 : k == 1 ? -1 : NAN);
        must(state_save(&m, &good, logits, seen, 17, scratch("damaged.state"), &err), &err);
        s[0] = state_alloc(&m, 1);
        bool ok = state_load(&m, &s[0], logits, seen, &tokens, scratch("damaged.state"), &err);
        report("a saved state with a wrong number of tokens: not refused",
               refused(ok, &err, "in the cache of a layer"), 0);
        state_free(&s[0]);
    }
    state_free(&good);
    static Settings set;
    snprintf(option, sizeof option, "--interactive --max-tokens 8 --context 30 --temperature 0");
    int argc = split_words(option, argv);
    must(settings_parse(&set, WORD_GENERATE, argc, argv, &err), &err);
    Prompt prompt = prompt_open(&tok, "", NULL);
    GenerateStats stats;
    volatile sig_atomic_t no = 0;
    char lines[] = "123456\n123456\n123456\n", *text = NULL;
    size_t size = 0;
    FILE *in = fmemopen(lines, sizeof lines - 1, "r"), *out = open_memstream(&text, &size);
    bool ok = generate_turns(&backend, &tok, &set.o, &prompt, in, out, &stats, &no, &err);
    report("a conversation of 42 tokens in a context of 30: not refused",
           refused(ok, &err, "room for 30 tokens; raise --context"), 0);
    report("tokens before that", fabs((double)stats.new_tokens - 16), 0);
    fclose(in), fclose(out);
    free(text);
    prompt_close(&prompt);
    settings_free(&set);
    backend.destroy(&backend);
    model_free(&m);
}

// Gradients with states that are not wanted (NULL) = those with a state of zero, as training calls it.
void test_no_state(void) {
    Config c = toy_config("1am", 4, 5, 6, 3, 3, 2, 9);
    Toy toy[2];
    for (int k = 0; k < 2; k++) {
        Toy* t = &toy[k];
        toy_make(t, &c, 2, 9, 0, RECOMPUTE_NONE);
        memset(t->s0.data, 0, t->s0.n_elements * sizeof(real));
        memset(t->dsT.data, 0, t->dsT.n_elements * sizeof(real));
        const State *s0 = k ? &t->none : &t->s0, *sT = k ? &t->none : &t->sT;
        model_forward(&t->m, &t->w, t->tokens, t->doc, 2, 9, s0, sT);
        model_loss(&t->m, &t->w, t->targets, 18, true, t->scale);
        model_backward(&t->m, &t->w, t->tokens, t->doc, 2, 9, s0, k ? &t->none : &t->ds0,
                       k ? &t->none : &t->dsT);
    }
    report("no state = a state of zero: bits differ",
           bits_differ(toy[0].m.grads, toy[1].m.grads, toy[0].m.n_elements), 0);
    for (int k = 0; k < 2; k++) toy_free(&toy[k]);
}

void test_attention(void) {
    const char* const shapes[] = {
        "B3 T7 Q2 G2 H3", "B2 T7 Q4 G2 H4 R2 state final C3", "B2 T7 Q6 G2 H4 R4 interleaved final",
        "B1 T1 Q1 G1 H1 state final C1", "B1 T1 Q3 G1 H2 R2 state C65",
        "B3 T9 Q2 G1 H5 R4 state final documents0 C4",
        "B8 T7 Q2 G2 H3 R2 interleaved state final documents0 C2", "B1 T5 Q2 G1 H2 state final C62",
        "B2 T66 Q2 G1 H2 R2 final", "B2 T70 Q2 G2 H37 R6 state final big documents0 C60",
        "B1 T130 Q2 G1 H16 R16 state final big C70", "B1 T200 Q3 G3 H33 interleaved R8 big documents5",
        "B2 T64 Q2 G1 H32 R8 state final big C64", "B1 T3 Q4 G2 H256 R256 state final big C2",
        "B2 T5 Q2 G1 H4 R2 state final big C200" };      // tiles of keys in the cache only
    check_layer(&attention_layer, shapes, COUNT_OF(shapes));
    const char* const pieces[] = {
        "B1 T40 Q2 G1 H5 R4 state final C3", "B1 T40 Q2 G2 H4 R2 interleaved state final C50",
        "B1 T40 Q2 G1 H3 state final documents0 C2", "B1 T40 Q2 G1 H4 R4 state final documents5 C63",
        "B1 T7 Q2 G1 H4 R4 state final documents4 C2" };
    check_split(&attention_layer, pieces, COUNT_OF(pieces));
    const char* const packed[] = {
        "B8 T37 Q2 G1 H5 R4 state final documents0 C3",
        "B8 T3 Q4 G2 H4 R2 interleaved state final documents0 C1",
        "B8 T70 Q2 G2 H3 state final documents0 C62" };
    check_packed(&attention_layer, packed, COUNT_OF(packed));
    test_far_rotation();
    test_block_formula();
    test_decode_faults();
    test_no_state();
    test_context();
    test_attention_extremes();
    char line[256];
    int code = in_child(overflow_in_child, NULL, line, sizeof line);
    report("a full cache: one line, exit code 1",
           code != 1 || !strstr(line, "3 tokens do not fit into a cache of 2; raise --context"), 0);
}
