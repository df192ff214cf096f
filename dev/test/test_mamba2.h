// ---------------------------------------------------------------------------------------------------
// test_mamba2.h: the layers of Mamba-2: step size, state space duality (recurrent and chunked), gated norm.
// What every layer must do is in test_mamba.c, section 3.

// dt_softplus: dt = clip(softplus(raw + bias), lo, hi), raw a part of wider rows. "limit" clips about half of
// the values, on both sides.
void dt_limits(const Problem* p, double* lo, double* hi) {
    *lo = strstr(p->shape, "limit") ? 0.4 : 0;
    *hi = strstr(p->shape, "limit") ? 1.1 : INFINITY;
}
void dt_make(Problem* p) {
    add_input(p, "dt_raw", PER_TOKEN, p->B * p->T, p->H, 3, -3, 3);
    add_input(p, "dt_bias", SHARED, 1, p->H, 0, -1, 1);
    add_output(p, "dt", PER_TOKEN, p->B * p->T, p->H, 0);
    double lo, hi;                                  // no value next to a limit, where there is no derivative
    dt_limits(p, &lo, &hi);
    for (size_t i = 0; i < p->B * p->T * p->H; i++) {
        real* raw = &p->in[0].value[i / p->H * p->in[0].ld + i % p->H];
        double s = softplus_exact((double)(*raw + p->in[1].value[i % p->H]));
        if (fabs(s - lo) < 0.05 || fabs(s - hi) < 0.05) *raw += (real)0.4;
    }
}
void dt_fwd(Problem* p) {
    double lo, hi;
    dt_limits(p, &lo, &hi);
    dt_softplus_forward(p->out[0].value, p->in[0].value, p->in[0].ld, p->in[1].value, (real)lo, (real)hi,
                        p->B * p->T, p->H);
}
void dt_bwd(Problem* p) {
    double lo, hi;
    dt_limits(p, &lo, &hi);
    dt_softplus_backward(p->in[0].grad, p->in[0].ld, p->in[1].grad, p->out[0].grad, p->in[0].value,
                         p->in[0].ld, p->in[1].value, (real)lo, (real)hi, p->B * p->T, p->H);
}
void dt_formula(const Problem* p, double** in, double** out) {
    double lo, hi;
    dt_limits(p, &lo, &hi);
    for (size_t i = 0; i < p->B * p->T * p->H; i++)
        out[0][i] = fmin(fmax(softplus_exact(in[0][i] + in[1][i % p->H]), lo), hi);
}
const LayerTest dt_layer = { "dt_softplus", dt_make, dt_fwd, dt_bwd, dt_formula, -1, false, false };
void test_dt_softplus(void) {
    const char* const shapes[] = {
        "B3 T7 H5", "B3 T7 H5 limit", "B1 T1 H1", "B3 T37 H33 limit", "B2 T67 H70 limit big" };
    check_layer(&dt_layer, shapes, COUNT_OF(shapes));

    // Far outside of where softplus bends, and exactly on a limit. Catches: 0 * infinity, a gradient lost at
    // the limit itself.
    real raw[6] = { -200, 200, (real)-1e30, (real)1e30, 0, 0 }, bias[1] = { 0 }, dt[6], ddt[6];
    real draw[6] = { 0 }, dbias[1] = { 0 };
    for (int i = 0; i < 6; i++) ddt[i] = 1;
    dt_softplus_forward(dt, raw, 1, bias, 0, (real)INFINITY, 6, 1);
    dt_softplus_backward(draw, 1, dbias, ddt, raw, 1, bias, 0, (real)INFINITY, 6, 1);
    const double expected[6] = { 0, 200, 0, 1e30, log(2), log(2) }, slope[6] = { 0, 1, 0, 1, 0.5, 0.5 };
    Worst worst = { 0, "" };
    for (int i = 0; i < 6; i++) {
        double err = fabs((double)dt[i] - expected[i]) / fmax(1, expected[i]);
        worst_add(&worst, err, "dt of %g", (double)raw[i]);
        worst_add(&worst, fabs((double)draw[i] - slope[i]), "slope at %g", (double)raw[i]);
    }
    real limit_lo = dt[4];                          // softplus(0) is the limit: not clipped, it has its slope
    draw[0] = draw[1] = dbias[0] = 0;
    raw[0] = 0;
    raw[1] = -1;
    dt_softplus_forward(dt, raw, 1, bias, limit_lo, (real)INFINITY, 2, 1);
    dt_softplus_backward(draw, 1, dbias, ddt, raw, 1, bias, limit_lo, (real)INFINITY, 2, 1);
    double err = fabs((double)draw[0] - 0.5) + fabs((double)draw[1]) + !(dt[1] == limit_lo);
    worst_add(&worst, err, "at the limit");
    worst_report("extremes and the limit itself", &worst, limit(1e-6, 1e-14));
}

// SSD: H_t = exp(dt_t A) H_{t-1} + dt_t x_t Bt_t^T,  y_t = H_t Ct_t + Dskip x_t. "hdim": a skip for every
// channel.
enum { SSD_X, SSD_DT, SSD_A, SSD_B, SSD_C, SSD_D, SSD_H0 };
bool ssd_hdim(const Problem* p) { return strstr(p->shape, "hdim") != NULL; }
void ssd_make(Problem* p) {
    size_t M = p->B * p->T;
    add_input(p, "x", PER_TOKEN, M, p->H * p->P, 3, -1, 1);
    add_input(p, "dt", PER_TOKEN, M, p->H, 0, 0.05, 1);
    add_input(p, "A_log", SHARED, 1, p->H, 0, -2, 1.5);
    add_input(p, "Bt", PER_TOKEN, M, p->G * p->N, 5, -1, 1);
    add_input(p, "Ct", PER_TOKEN, M, p->G * p->N, 5, -1, 1);
    add_input(p, "Dskip", SHARED, p->H, ssd_hdim(p) ? p->P : 1, 0, -1, 1);
    Operand* h0 = add_input(p, "h0", PER_SEQUENCE, p->B * p->H * p->P, p->N, 0, -1, 1);
    h0->skippable = true;
    given_if(h0, p->flags & HAS_STATE);
    add_output(p, "y", PER_TOKEN, M, p->H * p->P, 0);
    given_if(add_output(p, "hT", PER_SEQUENCE, p->B * p->H * p->P, p->N, 0), p->flags & HAS_FINAL);
}
void ssd_fwd(Problem* p) {
    const Operand* in = p->in;
    ssd_recurrent_forward(p->out[0].value, p->out[1].value, in[SSD_X].value, in[SSD_X].ld, in[SSD_DT].value,
                          in[SSD_A].value, in[SSD_B].value, in[SSD_C].value, in[SSD_B].ld, in[SSD_D].value,
                          ssd_hdim(p), in[SSD_H0].value, p->doc, p->B, p->T, p->H, p->P, p->G, p->N);
}
void ssd_bwd(Problem* p) {
    const Operand* in = p->in;
    ssd_recurrent_backward(in[SSD_X].grad, in[SSD_X].ld, in[SSD_DT].grad, in[SSD_A].grad, in[SSD_B].grad,
                           in[SSD_C].grad, in[SSD_B].ld, in[SSD_D].grad, in[SSD_H0].grad, p->out[0].grad,
                           p->out[1].grad, in[SSD_X].value, in[SSD_X].ld, in[SSD_DT].value, in[SSD_A].value,
                           in[SSD_B].value, in[SSD_C].value, in[SSD_B].ld, in[SSD_D].value, ssd_hdim(p),
                           in[SSD_H0].value, p->doc, p->B, p->T, p->H, p->P, p->G, p->N);
}
void ssd_formula(const Problem* p, double** in, double** out) {
    size_t T = p->T, H = p->H, P = p->P, G = p->G, N = p->N;
    for (size_t row = 0; row < p->B * H * P; row++) {
        size_t b = row / (H * P), h = row / P % H, c = row % (H * P), group = h / (H / G) * N;
        double skip = in[SSD_D][ssd_hdim(p) ? c : h];
        for (size_t t = b * T; t < b * T + T; t++) out[0][t * H * P + c] = skip * in[SSD_X][t * H * P + c];
        for (size_t n = 0; n < N; n++) {
            double state = in[SSD_H0] ? in[SSD_H0][row * N + n] : 0;
            for (size_t t = b * T; t < b * T + T; t++) {
                double dt = in[SSD_DT][t * H + h];
                if (document_starts(p, b, t - b * T)) state = 0;
                state = exp(-dt * exp(in[SSD_A][h])) * state +
                        dt * in[SSD_B][t * G * N + group + n] * in[SSD_X][t * H * P + c];
                out[0][t * H * P + c] += in[SSD_C][t * G * N + group + n] * state;
            }
            if (out[1]) out[1][row * N + n] = state;
        }
    }
}
const LayerTest ssd_recurrent_layer = {
    "ssd_recurrent", ssd_make, ssd_fwd, ssd_bwd, ssd_formula, SSD_H0, false, false
};

void ssd_chunked_make(Problem* p) {
    ssd_make(p);
    p->saved_size = ssd_saved(p->B, p->T, p->H, p->P, p->N, p->Q);
    p->scratch_size = ssd_scratch(p->B, p->T, p->H, p->P, p->G, p->N, p->Q);
}
void ssd_chunked_call(Problem* p, real* hs) {
    const Operand* in = p->in;
    ssd_forward(p->out[0].value, hs, p->out[1].value, in[SSD_X].value, in[SSD_X].ld, in[SSD_DT].value,
                in[SSD_A].value, in[SSD_B].value, in[SSD_C].value, in[SSD_B].ld, in[SSD_D].value, ssd_hdim(p),
                in[SSD_H0].value, p->doc, p->scratch, p->B, p->T, p->H, p->P, p->G, p->N, p->Q);
}
void ssd_chunked_fwd(Problem* p) { ssd_chunked_call(p, p->saved); }
void ssd_chunked_bwd(Problem* p) {
    const Operand* in = p->in;
    ssd_backward(in[SSD_X].grad, in[SSD_X].ld, in[SSD_DT].grad, in[SSD_A].grad, in[SSD_B].grad,
                 in[SSD_C].grad, in[SSD_B].ld, in[SSD_D].grad, in[SSD_H0].grad, p->out[0].grad,
                 p->out[1].grad, p->saved, in[SSD_X].value, in[SSD_X].ld, in[SSD_DT].value, in[SSD_A].value,
                 in[SSD_B].value, in[SSD_C].value, in[SSD_B].ld, in[SSD_D].value, ssd_hdim(p),
                 in[SSD_H0].value, p->doc, p->scratch, p->B, p->T, p->H, p->P, p->G, p->N, p->Q);
}
const LayerTest ssd_layer = {
    "ssd", ssd_chunked_make, ssd_chunked_fwd, ssd_chunked_bwd, ssd_formula, SSD_H0, false, true
};
void test_ssd(void) {
    const char* const shapes[] = {
        "B3 T7 H2 P3 G1 N5 Q3", "B3 T7 H4 P3 G2 N5 Q7 state final", "B2 T37 H3 P2 G3 N1 Q7 final hdim",
        "B3 T7 H6 P5 G2 N7 Q2 state hdim", "B1 T1 H1 P1 G1 N1 Q1 state final", "B1 T1 H4 P3 G2 N33 Q64",
        "B3 T8 H4 P3 G2 N5 Q4 state final", "B2 T9 H4 P3 G2 N5 Q1 state final documents0",
        "B3 T37 H4 P1 G2 N3 Q7 state final documents0", "B8 T7 H2 P2 G1 N2 Q3 state documents0",
        "B3 T37 H6 P2 G3 N4 Q8 state final hdim documents2", "B2 T30 H2 P3 G1 N2 Q5 state final documents6",
        "B2 T67 H2 P5 G1 N17 Q64 state final big documents0",
        "B8 T67 H4 P7 G2 N33 Q16 state final big documents0",
        "B1 T300 H2 P65 G1 N3 Q256 final big", "B1 T256 H2 P3 G2 N129 Q128 state big" };
    check_layer(&ssd_layer, shapes, COUNT_OF(shapes));
    const char* const pieces[] = {
        "B1 T40 H6 P3 G1 N5 Q7 state final", "B1 T40 H6 P3 G2 N5 Q16 state final documents1",
        "B1 T7 H2 P3 G1 N5 Q2 state final documents4" };
    check_split(&ssd_layer, pieces, COUNT_OF(pieces));
    const char* const packed[] = {
        "B8 T67 H4 P3 G2 N5 Q16 state final documents0", "B8 T67 H2 P3 G1 N2 Q7 state final documents0" };
    check_packed(&ssd_layer, packed, COUNT_OF(packed));

    // Without saved states (inference): the same bits; one token: those of the recurrence. Catches: a second
    // code path that drifts.
    Problem p;
    double wrong = 0;
    for (int s = 0; s < COUNT_OF(shapes); s++) {
        problem_make(&p, &ssd_layer, shapes[s]);
        run_forward(&p);
        if (p.T == 1) ssd_fwd(&p);
        size_t n, m;
        double* with = snapshot(&p, &n);
        run_forward(&p);
        for (size_t i = 0; i < p.scratch_size; i++) p.scratch[i] = (real)NAN;
        ssd_chunked_call(&p, NULL);
        wrong += differing(snapshot(&p, &m), with, n);
    }
    report("without saved states: differing bits", wrong, 0);

    // The chunk length does not matter: all equal the recurrence. Catches: a chunk edge in the wrong place.
    const char* const same[] = {
        "B2 T257 H4 P5 G2 N6 Q1 state final documents3", "B2 T257 H4 P5 G2 N6 Q7 state final documents3",
        "B2 T257 H4 P5 G2 N6 Q64 state final documents3", "B2 T257 H4 P5 G2 N6 Q256 state final documents3" };
    Worst forward = { 0, "" }, backward = { 0, "" };
    for (int s = 0; s < COUNT_OF(same); s++) {
        Problem p;
        random_stream = 1 << 20;                    // the same inputs
        problem_make(&p, &ssd_layer, same[s]);
        run_forward(&p);
        run_backward(&p, 0, false);
        size_t n, outputs = count(&p.out[0]) + count(&p.out[1]);
        double* chunked = snapshot(&p, &n);
        p.layer = &ssd_recurrent_layer;
        run_forward(&p);
        run_backward(&p, 0, false);
        double* recurrent = snapshot(&p, &n);
        worst_add(&forward, relative_l2(chunked, recurrent, outputs), "%s", same[s]);
        for (size_t i = 0, at = outputs; i < (size_t)p.n_in; at += count(&p.in[i++]))
            worst_add(&backward, relative_l2(chunked + at, recurrent + at, count(&p.in[i])), "d%s, %s",
                      p.in[i].name, same[s]);
    }
    worst_report("Q = 1, 7, 64, 256: outputs = recurrent form", &forward, limit(3e-6, 1e-14));
    worst_report("Q = 1, 7, 64, 256: gradients = recurrent form", &backward, limit(3e-6, 1e-14));
}
void test_ssd_recurrent(void) {
    const char* const shapes[] = {
        "B3 T7 H2 P3 G1 N5", "B3 T7 H4 P3 G2 N5 state final", "B2 T37 H3 P2 G3 N1 final hdim",
        "B3 T7 H6 P5 G2 N7 state hdim", "B1 T1 H1 P1 G1 N1 state final", "B1 T1 H4 P3 G2 N33",
        "B3 T37 H4 P1 G2 N3 state final documents0", "B8 T7 H2 P2 G1 N2 state documents0",
        "B3 T37 H6 P2 G3 N4 state final hdim documents2", "B8 T67 H4 P7 G2 N33 state final big documents0" };
    check_layer(&ssd_recurrent_layer, shapes, COUNT_OF(shapes));
    const char* const pieces[] = {
        "B1 T40 H2 P3 G1 N5 state final", "B1 T40 H2 P3 G2 N5 state final documents1",
        "B1 T7 H2 P3 G1 N5 state final documents4" };
    check_split(&ssd_recurrent_layer, pieces, COUNT_OF(pieces));
    const char* const packed[] = { "B8 T67 H4 P3 G2 N5 state final documents0" };
    check_packed(&ssd_recurrent_layer, packed, COUNT_OF(packed));
}

// Gated RMSNorm over groups of S channels; z a part of wider rows. "before": the norm comes before the gate.
bool norm_first(const Problem* p) { return strstr(p->shape, "before") != NULL; }
void gated_rmsnorm_make(Problem* p) {
    add_input(p, "y", PER_TOKEN, p->B * p->T, p->E, 0, -1, 1);
    add_input(p, "z", PER_TOKEN, p->B * p->T, p->E, 3, -4, 4);
    add_input(p, "weight", SHARED, 1, p->E, 0, 0.5, 1.5);
    add_output(p, "out", PER_TOKEN, p->B * p->T, p->E, 0);
    p->saved_size = p->B * p->T * (p->E / p->S);
}
void gated_rmsnorm_fwd(Problem* p) {
    gated_rmsnorm_forward(p->out[0].value, p->saved, p->in[0].value, p->in[1].value, p->in[1].ld,
                          p->in[2].value, p->B * p->T, p->E, p->S, TEST_EPS, norm_first(p));
}
void gated_rmsnorm_bwd(Problem* p) {
    gated_rmsnorm_backward(p->in[0].grad, p->in[1].grad, p->in[1].ld, p->in[2].grad, p->out[0].grad,
                           p->in[0].value, p->in[1].value, p->in[1].ld, p->in[2].value, p->saved, p->B * p->T,
                           p->E, p->S, norm_first(p));
}
void gated_rmsnorm_formula(const Problem* p, double** in, double** out) {
    size_t E = p->E, S = p->S;
    for (size_t i = 0; i < p->B * p->T * E; i++) {
        double sum = 0, gate = in[1][i] / (1 + exp(-in[1][i]));
        for (size_t k = i - i % E % S; k < i - i % E % S + S; k++) {
            double w = norm_first(p) ? in[0][k] : in[0][k] * in[1][k] / (1 + exp(-in[1][k]));
            sum += w * w;
        }
        out[0][i] = in[2][i % E] * in[0][i] * gate / sqrt(sum / (double)S + (double)TEST_EPS);
    }
}
const LayerTest gated_rmsnorm_layer = {
    "gated_rmsnorm", gated_rmsnorm_make, gated_rmsnorm_fwd, gated_rmsnorm_bwd, gated_rmsnorm_formula, -1,
    false, false
};
void test_gated_rmsnorm(void) {
    const char* const shapes[] = {
        "B3 T7 E5 S5", "B3 T7 E15 S5", "B3 T7 E15 S5 before", "B3 T37 E13 S13 before", "B1 T1 E1 S1",
        "B3 T7 E74 S37 before", "B3 T7 E74 S37", "B4 T67 E132 S33 big", "B4 T67 E133 S133 big before" };
    check_layer(&gated_rmsnorm_layer, shapes, COUNT_OF(shapes));
}
