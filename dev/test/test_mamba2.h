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

// chunked_and_recurrent: outputs and gradients of both forms for the same problem
void chunked_and_recurrent(Problem* p, const char* name, Worst* forward, Worst* backward) {
    size_t n, outputs = count(&p->out[0]) + count(&p->out[1]);
    double* values[2];
    for (int i = 0; i < 2; i++) {
        p->layer = i ? &ssd_recurrent_layer : &ssd_layer;
        run_forward(p);
        run_backward(p, 0, false);
        values[i] = snapshot(p, &n);
    }
    worst_add(forward, relative_l2(values[0], values[1], outputs), "%s", name);
    for (size_t i = 0, at = outputs; i < (size_t)p->n_in; at += count(&p->in[i++]))
        worst_add(backward, relative_l2(values[0] + at, values[1] + at, count(&p->in[i])), "d%s, %s",
                  p->in[i].name, name);
}

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
        chunked_and_recurrent(&p, same[s], &forward, &backward);
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

// Memory made for B x T tokens serves every call of at most B sequences and B T tokens: many short pieces,
// then one long prompt. Catches: a size counted from the wrong number of chunks, which no result shows.
void test_ssd_sizes(void) {
    enum { H = 2, P = 3, G = 2, N = 2 };
    double small = 0, calls = 0;
    for (size_t B = 1; B <= 4; B++)
        for (size_t T = 1; T <= 12; T++)
            for (size_t Q = 1; Q <= 9; Q++)
                for (size_t b = 1; b <= B; b++)
                    for (size_t t = 1; b * t <= B * T; t++, calls++) {
                        size_t q = Q < t ? Q : t, chunks = b * ((t + q - 1) / q), states = chunks * H * P * N;
                        size_t head = b * H * q * P, forward = chunks * G * q * (2 * q + P);
                        size_t backward = chunks * G * q * (4 * q + 2 * P + N), parts = chunks * (H + H * P);
                        size_t scratch_size = ssd_scratch(B, T, H, P, G, N, Q);
                        small += ssd_saved(B, T, H, P, N, Q) < states;
                        small += scratch_size < states + (head > forward ? head : forward);
                        small += scratch_size < states + parts + (head > backward ? head : backward);
                    }
    report("SSD: saved or scratch too small for a call", small + (calls < 10000), 0);
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

// dt and A far from where decays are between 0 and 1: the chunked form = the recurrence, both finite.
// Catches: 0 * infinity, infinity - infinity, a mask that is NaN; in a long chunk a gradient of dt made from
// differences of nearly equal numbers.
void test_ssd_extremes(void) {
    const struct { const char* name; double A_log, dt; } rows[] = {
        { "A 0", -200, 0.5 }, { "A huge", 80, 0.5 }, { "A above every number", 200, 0.5 }, { "dt 0", 1, 0 },
        { "dt 0, A huge", 80, 0 }, { "dt tiny", 1, 1e-30 }, { "dt large", 2.77, 100 },
        { "dt A -50", 2.77, 50 / 16. }, { "dt A -5", 2.77, 5 / 16. },
        { "every third dt large", 2.77, -100 }, { "dt A -1.6, a long chunk", 2.77, 0.1 } };
    Worst forward = { 0, "" }, backward = { 0, "" };
    for (int k = 0; k < COUNT_OF(rows); k++) {
        bool is_long = strstr(rows[k].name, "long") != NULL;
        const char* shape = is_long ? "B1 T256 H4 P16 G1 N32 Q256 state final"
                                    : "B1 T37 H2 P3 G1 N5 Q16 state final";
        Problem p;
        random_stream = 1 << 20;
        problem_make(&p, &ssd_layer, shape);
        for (size_t h = 0; h < p.H; h++) p.in[SSD_A].value[h] = (real)rows[k].A_log;
        for (size_t i = 0; i < p.T * p.H; i++) {
            bool small = rows[k].dt < 0 && i / p.H % 3;
            p.in[SSD_DT].value[i] = (real)(small ? 1e-3 : fabs(rows[k].dt));
        }
        chunked_and_recurrent(&p, rows[k].name, &forward, &backward);
        free_all();
    }
    worst_report("extreme dt and A: outputs = recurrent form", &forward, limit(3e-6, 1e-14));
    worst_report("extreme dt and A: gradients = recurrent form", &backward, limit(3e-6, 1e-14));

    // A NaN comes out: a model that breaks must be noticed. Catches: comparisons that turn NaN into 0.
    double hidden = 0;
    for (int i = 0; i < 6; i++) {
        Problem p;
        problem_make(&p, &ssd_layer, "B1 T9 H1 P2 G1 N3 Q4");
        p.in[i].value[0] = (real)NAN;
        for (int j = 0; j < 2; j++) {
            p.layer = j ? &ssd_recurrent_layer : &ssd_layer;
            run_forward(&p);
            run_backward(&p, 0, false);
            hidden += !isnan(loss_of(&p));
            size_t n, nans = 0;
            double* all = snapshot(&p, &n);
            for (size_t k = count(&p.out[0]); k < n; k++) nans += isnan(all[k]) != 0;
            hidden += !nans;
        }
    }
    report("NaN in one input: hidden", hidden, 0);
}

// Parameter totals of the published sizes, to the unit; initial values. Catches: a wrong shape, a tensor
// missing or too many, A or dt out of range.
void test_mamba2_parameters(void) {
    const struct { int64_t D, n_layer; size_t layer, total; } published[] = {
        { 768, 24, 3765320, 128989632 },  { 1024, 48, 6601056, 368346624 }, { 1536, 48, 14644112, 780161280 },
        { 2048, 48, 25849280, 1343757312 }, { 2560, 64, 40216560, 2702599680 } };
    Model m;
    Worst total = { 0, "" };
    for (int i = 0; i < COUNT_OF(published); i++) {
        int64_t D = published[i].D;
        Config c = toy_config("2", published[i].n_layer, D, 2 * D, 128, 4, 1, 50288);
        toy_mamba2(&c, "P64 S1 L256");
        model_describe(&m, &c);
        worst_add(&total, fabs((double)m.n_params - (double)published[i].total), "D %d", (int)c.d_model);
        size_t layer = 0;
        for (int k = 0; k < m.n_tensors; k++) if (m.tensor[k].layer == 1) layer += m.tensor[k].count;
        worst_add(&total, fabs((double)layer - (double)published[i].layer), "a layer, D %d", (int)c.d_model);
        model_free(&m);
    }
    worst_report("published sizes: parameters, difference", &total, 0);
    // by hand: D 7, E 12, Es 8, P 2, H 4, G 2, N 5, K 3
    Config c = toy_config("2", 1, 7, 12, 5, 3, 1, 24);
    toy_mamba2(&c, "P2 S2 L4 W8 hdim");
    c.bias = true;
    model_describe(&m, &c);
    size_t in = 2 * 12 + 2 * 2 * 5 + 4, conv = 8 + 2 * 2 * 5;
    size_t hand = 7 + in * 7 + in + conv * 3 + conv + 4 + 4 + 8 + 8 + 7 * 12 + 7 + 24 * 7 + 7;
    report("d_ssm, groups, D per channel, biases: parameters", fabs((double)m.n_params - (double)hand), 0);
    model_free(&m);

    c = toy_config("2", 4, 64, 128, 16, 4, 1, 50);
    toy_mamba2(&c, "P2 S1 L4");
    c.conv_init = 0.05;
    model_describe(&m, &c);
    model_alloc(&m, false);
    model_init(&m, 5);
    Moments A = tensor_moments(&m, "A_log"), dt = tensor_moments(&m, "dt_bias");
    Moments D = tensor_moments(&m, "mixer.D"), norm = tensor_moments(&m, "mixer.norm.weight");
    Moments out = tensor_moments(&m, "out_proj.weight"), conv1d = tensor_moments(&m, "conv1d.weight");
    Moments conv_bias = tensor_moments(&m, "conv1d.bias");
    double mean = 0;
    for (int i = 0; i < m.n_tensors; i++)
        for (size_t j = 0; ends_with(m.tensor[i].name, "A_log") && j < m.tensor[i].count; j++)
            mean += exp((double)m.params[m.tensor[i].offset + j]) / (double)A.n;
    report("A outside [1, 16]", fmax(1 / exp(A.lo), exp(A.hi) / 16), 1 + 1e-5);
    report("A uniform: mean 8.5, in standard errors", fabs(mean - 8.5) / (15 / sqrt(12.0 * (double)A.n)), 4);
    report("softplus(dt bias) outside [1e-3, 1e-1]",
           fmax(1e-3 / log1p(exp(dt.lo)), log1p(exp(dt.hi)) / 0.1), 1 + 1e-5);
    report("D and the gated norm are 1", D.lo != 1 || D.hi != 1 || norm.lo != 1 || norm.hi != 1, 0);
    double bound[3] = { 1 / sqrt(128.0 * 4), 0.05, 0.5 };
    const Moments* uniform[3] = { &out, &conv1d, &conv_bias };
    Worst size = { 0, "" };
    for (int i = 0; i < 3; i++) {
        worst_add(&size, fmax(uniform[i]->hi, -uniform[i]->lo) / bound[i], "tensor %d", i);
        worst_add(&size, 0.9 / (uniform[i]->hi / bound[i]), "tensor %d", i);
    }
    worst_report("out_proj, conv_init, conv bias: largest value / bound", &size, 1 + 1e-6);
    model_free(&m);
}

// The whole block against its formula in double precision, evaluated literally. Catches what differentiation
// cannot see: parts of in_proj in another order, gate and value exchanged, an activation left out.
double mamba2_formula_error(const char* text) {
    enum { M = 9, D = 5, E = 12, N = 3, K = 3 };
    Config c = toy_config("2", 1, D, E, N, K, 1, 8);
    toy_mamba2(&c, text);
    Toy toy;
    toy_make(&toy, &c, 1, M, -1, false);
    const Mamba2Params* p = (const Mamba2Params*)toy.m.layer[0].params;
    size_t P = (size_t)c.headdim, G = (size_t)c.ngroups, Es = (size_t)c.d_ssm, H = Es / P, mlp = E - Es;
    size_t Cd = Es + 2 * G * N, in = 2 * E + 2 * G * N + H;
    double* row = (double*)test_alloc(M * in, sizeof(double));
    double* state = (double*)test_alloc(Es * N, sizeof(double));
    double want[M * D], joined[E], xbc[200], w[E];
    real res[M * D], out[M * D];
    for (size_t i = 0; i < M * D; i++) res[i] = (real)test_uniform(-0.01, 0.01, 82, i);     // eps counts
    for (size_t t = 0; t < M; t++) {
        double sum = 0;
        for (size_t d = 0; d < D; d++) sum += (double)res[t * D + d] * (double)res[t * D + d] / D;
        for (size_t o = 0; o < in; o++)
            for (size_t d = 0; d < D; d++)
                row[t * in + o] += (double)p->in_proj[o * D + d] * (double)p->norm[d] *
                                   (double)res[t * D + d] / sqrt(sum + 1e-5);
        const double *z = row + t * in + 2 * mlp, *dt_raw = row + t * in + 2 * E + 2 * G * N;
        for (size_t i = 0; i < Cd; i++) {
            xbc[i] = (double)p->conv1d_bias[i];
            for (size_t k = 0; k < K; k++)
                if (t + k + 1 >= K)
                    xbc[i] += (double)p->conv1d[i * K + k] * row[(t + k + 1 - K) * in + 2 * mlp + Es + i];
            xbc[i] /= 1 + exp(-xbc[i]);
        }
        for (size_t e = 0; e < Es; e++) {
            size_t h = e / P, g = h / (H / G);
            double dt = fmin(fmax(softplus_exact(dt_raw[h] + (double)p->dt_bias[h]), c.dt_low), c.dt_high);
            double y = (double)p->D[c.D_has_hdim ? e : h] * xbc[e];
            for (size_t n = 0; n < N; n++) {
                double* s = &state[e * N + n];
                *s = exp(-exp((double)p->A_log[h]) * dt) * *s + dt * xbc[e] * xbc[Es + g * N + n];
                y += *s * xbc[Es + G * N + g * N + n];
            }
            joined[mlp + e] = y;
        }
        for (size_t e = 0; e < Es; e++) {
            double gate = z[e] / (1 + exp(-z[e]));
            w[e] = c.norm_before_gate ? joined[mlp + e] : joined[mlp + e] * gate;
            joined[mlp + e] *= gate;
        }
        for (size_t e = 0; c.rmsnorm && e < Es; e++) {
            size_t S = Es / G;
            double square = 0;
            for (size_t i = e / S * S; i < e / S * S + S; i++) square += w[i] * w[i] / (double)S;
            joined[mlp + e] *= (double)p->gated_norm[e] / sqrt(square + 1e-5);
        }
        for (size_t e = 0; e < mlp; e++) {
            double z0 = row[t * in + e];
            joined[e] = row[t * in + mlp + e] * z0 / (1 + exp(-z0));
        }
        for (size_t d = 0; d < D; d++) {
            want[t * D + d] = (double)res[t * D + d];
            for (size_t e = 0; e < E; e++) want[t * D + d] += (double)p->out_proj[d * E + e] * joined[e];
        }
    }
    Run run = { &toy.m.config, 1, M, NULL, RECOMPUTE_NONE, { 0, 0, 0, 0 }, { NULL, NULL } };
    const Layer* layer = &toy.m.layer[0];
    layer->kind->forward(&run, out, res, layer->params, toy.w.acts[0], toy.w.scratch[layer->kind - kinds],
                         toy.none.field[0], toy.none.field[0]);
    double err = relative_l2(to_double(out, M * D), want, M * D);
    toy_free(&toy);
    return err;
}

// One sequence in two calls, or a prompt and then single tokens, equals one call. Catches: a conv tail off by
// one, a state transposed, the path of single tokens doing something else.
void test_mamba2_pieces(void) {
    enum { T = 40, D = 9 };
    Worst split = { 0, "" }, steps = { 0, "" };
    for (int64_t K = 1; K <= 4; K++) {
        Config c = toy_config(K % 2 ? "21m" : "2", 2, D, 14, 5, K, 2, 19);
        toy_mamba2(&c, K > 2 ? "P2 S1 L8" : "P3 S2 L16 W12");
        Toy toy;
        toy_make(&toy, &c, 1, T, -1, false);
        Model* m = &toy.m;
        Workspace w = workspace_alloc(m, 1, T, false, false, false);
        State s = state_alloc(m, 1);
        double g[T * D];
        model_forward(m, &w, toy.tokens, NULL, 1, T, &toy.none, &toy.sT);
        double *f = to_double(w.f, T * D), *sT = to_double(toy.sT.data, s.n_elements);
        for (size_t cut = 1; cut <= T + (size_t)K; cut++) {     // from T on: a prompt, then steps
            size_t first = cut < T ? cut : cut - T + 1;
            memset(s.data, 0, s.n_elements * sizeof(real));
            for (size_t t = 0, n = first; t < T; t += n, n = cut < T ? T - cut : 1) {
                model_forward(m, &w, toy.tokens + t, NULL, 1, n, &s, &s);
                for (size_t i = 0; i < n * D; i++) g[t * D + i] = (double)w.f[i];
            }
            Worst* worst = cut < T ? &split : &steps;
            worst_add(worst, relative_l2(g, f, T * D), "K %d, first %zu", (int)K, first);
            worst_add(worst, relative_l2(to_double(s.data, s.n_elements), sT, s.n_elements),
                      "states, K %d, first %zu", (int)K, first);
        }
        workspace_free(&w);
        state_free(&s);
        toy_free(&toy);
    }
    worst_report("two calls = one call", &split, limit(1e-5, 1e-13));
    worst_report("prompt of 1 .. K+1 tokens, then single ones = one call", &steps, limit(1e-5, 1e-13));
}

// Documents packed into one row = each in a row of its own, outputs and gradients of the whole model.
// Catches: a boundary missed by one of conv, scan and their backwards; lengths around K and the chunk.
void test_mamba2_packed(void) {
    const size_t lengths[] = { 1, 2, 3, 8, 7, 9, 1, 1, 1, 5 };          // K-1 = 3, chunks of 8
    Config c = toy_config("2m", 2, 7, 12, 5, 4, 1, 19);
    toy_mamba2(&c, "P3 S2 L8");
    Worst forward = { 0, "" }, backward = { 0, "" };
    size_t T = 0;
    for (int d = 0; d < COUNT_OF(lengths); d++) T += lengths[d];
    Toy packed, alone;
    toy_packed(&packed, &alone, &c, T, lengths, COUNT_OF(lengths));
    int *tokens = alone.tokens, *targets = alone.targets;
    for (size_t d = 0, at = 0; d < COUNT_OF(lengths); d++, at += alone.T) {
        alone.T = lengths[d];
        alone.tokens = tokens + at;
        alone.targets = targets + at;
        toy_gradients(&alone);
        worst_add(&forward, real_relative(alone.w.f, packed.w.f + at * 7, alone.T * 7), "document %zu", d);
    }
    compare_tensors(&backward, &packed.m, packed.m.grads, alone.m.grads);
    worst_report("10 documents: outputs", &forward, limit(3e-6, 1e-14));
    worst_report("10 documents: gradients", &backward, limit(1e-5, 1e-12));
    toy_free(&packed);
    toy_free(&alone);
}

void test_mamba2(void) {
    test_ssd_sizes();
    test_ssd_extremes();
    test_mamba2_parameters();
    const char* const blocks[] = {
        "P4 S1 L4", "P4 S3 L2 hdim", "P2 S2 L3 before", "P3 S1 L16 limit", "P2 S2 L5 W8",
        "P3 S1 L4 W9 plain" };
    Worst block = { 0, "" };
    for (int i = 0; i < COUNT_OF(blocks); i++)
        worst_add(&block, mamba2_formula_error(blocks[i]), "%s", blocks[i]);
    worst_report("block = formula", &block, limit(3e-6, 1e-14));
    test_mamba2_pieces();
    test_mamba2_packed();
}
