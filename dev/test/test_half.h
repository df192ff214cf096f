// Generation on the CPU with weight matrices, and with states, in bfloat16 (included by test_mamba.c).

static real half_rounded(real x) { return (real)widen_bf16(narrow_float((double)(float)x, 8, 7)); }

// Every bfloat16, and floats at, beside and between ties. Catches: ties away from zero or to odd, a carry
// that is lost, infinity that overflows.
static void check_round_bf16(void) {
    const uint32_t low[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
    double wrong = 0;
    for (uint32_t high = 0; high < 0x10000; high++)
        for (int k = 0; k < COUNT_OF(low); k++) {
            uint32_t bits = high << 16 | low[k], got, want;
            float x, y, z;
            memcpy(&x, &bits, 4);
            if (isnan(x)) continue;
            y = round_bf16(x);
            z = (float)half_rounded((real)x);
            memcpy(&got, &y, 4);
            memcpy(&want, &z, 4);
            wrong += got != want;
        }
    report("round_bf16 of all bfloat16, and between them: wrong", wrong, 0);
}

// Catches: the order of the weights in a row, rows and outputs left over, a stride, sums that depend on the
// other rows.
static void check_half_matmul(size_t M, size_t I, size_t O, bool has_bias) {
    size_t ldi = I + 3, ldo = O + 2;
    real *inp = (real*)test_alloc(M * ldi, sizeof(real)), *bias = (real*)test_alloc(O, sizeof(real));
    real *out = (real*)test_alloc(M * ldo, sizeof(real)), *one = (real*)test_alloc(ldo, sizeof(real));
    uint16_t* weight = (uint16_t*)test_alloc(O * I, sizeof(uint16_t));
    double* want = (double*)test_alloc(M * O, sizeof(double));
    double* got = (double*)test_alloc(M * O, sizeof(double));
    double differ = 0, outside = 0;
    char name[100];
    for (size_t i = 0; i < M * ldi; i++) inp[i] = (real)test_uniform(-1, 1, 1, i);
    for (size_t o = 0; o < O; o++) bias[o] = (real)test_uniform(-1, 1, 2, o);
    for (size_t i = 0; i < M * ldo; i++) out[i] = 77;
    for (size_t o = 0; o < O; o++)
        for (size_t i = 0; i < I; i++) {
            double w = test_uniform(-1, 1, 3, o * I + i);
            real r = half_rounded((real)w);
            float f = (float)r;
            uint32_t u;
            memcpy(&u, &f, sizeof u);
            weight[o * I + half_at(i, I)] = (uint16_t)(u >> 16);
            for (size_t m = 0; m < M; m++) {
                if (i == 0) want[m * O + o] = has_bias ? (double)bias[o] : 0;
                want[m * O + o] += (double)inp[m * ldi + i] * (double)r;
            }
        }
    #pragma omp parallel
    matmul_forward_half(out, ldo, inp, ldi, weight, has_bias ? bias : NULL, M, I, O);
    for (size_t m = 0; m < M; m++) {
        #pragma omp parallel
        matmul_forward_half(one, ldo, inp + m * ldi, ldi, weight, has_bias ? bias : NULL, 1, I, O);
        differ += memcmp(one, out + m * ldo, O * sizeof(real)) != 0;
        for (size_t o = 0; o < ldo; o++)
            if (o < O) got[m * O + o] = (double)out[m * ldo + o];
            else outside += out[m * ldo + o] != 77;
    }
    snprintf(name, sizeof name, "matmul M%zu I%zu O%zu%s", M, I, O, has_bias ? " bias" : "");
    report(name, relative_l2(got, want, M * O), REAL_IS_DOUBLE ? 1e-14 : 1e-6);
    snprintf(name, sizeof name, "M%zu I%zu O%zu: rows that are not those alone, or written between rows",
             M, I, O);
    report(name, differ + outside, 0);
}

// check_half_hash: a saved state belongs to the rounded weights. Catches: a hash of what the memory of the
// matrices holds after they are gone from it.
static void check_half_hash(const Config* c, const Model* half) {
    test_alloc(1001, sizeof(real));                  // the next model lies elsewhere in its pages
    for (int k = 0; k < 3; k++) {
        Model other = toy_model(c, false, 5);
        const Tensor* t = &other.tensor[k == 1 ? 0 : 2];
        if (k) other.params[t->offset + t->count / 2] += 1;
        model_to_half(&other);
        report(k ? "hash of other weights" : "hash of the same weights",
               (model_hash(&other) == model_hash(half)) == (k > 0), 0);
        model_free(&other);
    }
}

// check_states: what --state-dtype bf16 means: a call gives the logits that it gives without, and leaves the
// states of recurrences rounded, of its own rows only; states that come from the host are rounded, too.
// Catches: a state that is not rounded, or before its last use; inputs of a convolution, keys or positions
// that are.
static void check_states(const Config* config) {
    enum { ROWS = 3, CALLS = 6, LONGEST = 5 };
    const size_t first[CALLS + 1] = {0, 1, 2, 0, 1, 0, 0}, rows[CALLS + 1] = {1, 1, 1, 3, 2, 3, 3};
    const size_t T[CALLS] = {5, 4, 1, 1, 1, 1};
    Model m = toy_model(config, false, 5);
    Backend b = backend_cpu(&m, 0, 0, false, false);
    Session plain = session_create(&b, ROWS, LONGEST), kept = session_create(&b, ROWS, LONGEST);
    size_t Vp = (size_t)config->vocab_padded;
    real* want = (real*)test_alloc(ROWS * Vp, sizeof(real));
    real* got = (real*)test_alloc(ROWS * Vp, sizeof(real));
    int tokens[LONGEST];
    double logits = 0, wrong = 0, rounded = 0;
    char name[100];
    for (int k = 0; k <= CALLS; k++) {                       // the last time the host has changed the states
        for (int l = 0; (k == 0 || k == CALLS) && l < m.n_layers; l++)
            for (int i = 0; i < m.layer[l].kind->n_state; i++) {
                const TensorSpec* spec = &m.layer[l].kind->state[i];
                size_t n = spec->flags & RECURRENT ? ROWS * spec_count(spec, config) : 0;
                for (size_t j = 0; j < n; j++)
                    kept.state.field[l][i][j] = (real)test_uniform(-1, 1, (uint64_t)l, j);
            }
        memcpy(plain.state.data, kept.state.data, plain.state.n_elements * sizeof(real));
        for (size_t t = 0; t < LONGEST; t++) tokens[t] = (int)(random_bits(8, (uint64_t)k, t) % 19);
        m.config.state_bf16 = false;
        if (k < CALLS) b.decode(&b, &plain, first[k], rows[k], tokens, T[k], want);
        m.config.state_bf16 = true;
        if (k < CALLS) {
            b.decode(&b, &kept, first[k], rows[k], tokens, T[k], got);
            logits += bits_differ(got, want, rows[k] * Vp);
        } else {
            b.session_sync(&b, &kept, false);
        }
        for (int l = 0; l < m.n_layers; l++)
            for (int i = 0; i < m.layer[l].kind->n_state; i++) {
                const TensorSpec* spec = &m.layer[l].kind->state[i];
                size_t n = spec_count(spec, config);
                for (size_t j = 0; j < ROWS * n; j++) {
                    real x = plain.state.field[l][i][j], h = kept.state.field[l][i][j];
                    bool own = j / n >= first[k] && j / n < first[k] + rows[k];
                    wrong += !(h == (own && spec->flags & RECURRENT ? half_rounded(x) : x));
                    rounded += h != x;
                }
            }
    }
    snprintf(name, sizeof name, "%.9s, states in bf16: logits, calls whose bits differ", config->pattern);
    report(name, logits, 0);
    snprintf(name, sizeof name, "%.9s, states in bf16: not the rounded ones", config->pattern);
    report(name, wrong + (rounded == 0), 0);
    session_free(&b, &plain);
    session_free(&b, &kept);
    b.destroy(&b);
    model_free(&m);
}

// A saved state and several samples with states in bf16. Catches: a state that is rounded on the way, a
// setting that stays for the next run.
static void check_states_written(void) {
    Config c = toy_config("12m", 2, 9, 14, 5, 4, 2, 257);
    Model m = toy_model(&c, false, 6);
    char prompt[161], options[300];
    for (size_t i = 0; i < 160; i++) prompt[i] = (char)('!' + random_bits(10, 0, i) % 90);
    prompt[160] = 0;
    const char* half = "--state-dtype bf16 --chunk 40 --max-tokens";
    snprintf(options, sizeof options, "%s 60", half);
    char* whole = written(&m, prompt, options);
    snprintf(options, sizeof options, "%s 0 --save-state %s", half, scratch("bf16.state"));
    written(&m, prompt, options);
    snprintf(options, sizeof options, "%s 60 --load-state %s", half, scratch("bf16.state"));
    char* text = written(&m, "", options);
    report("states in bf16: text after a saved state differs", texts_differ(whole, text), 0);
    written(&m, "", "--max-tokens 0");
    report("the setting stays", m.config.state_bf16, 0);
    model_free(&m);
}

// Catches: a matrix that is not converted or not used, an embedding in another order; a sum that depends on
// how the text is cut.
void test_half(void) {
    Config states[] = {toy_config("1m", 2, 9, 14, 5, 4, 2, 19), toy_config("2", 2, 13, 24, 5, 4, 2, 19),
                       toy_config("12am", 4, 13, 24, 5, 4, 2, 19)};
    toy_mamba2(&states[1], "P3 S2 L4 W18");
    toy_mamba2(&states[2], "P3 S2 L4");
    check_round_bf16();
    for (int i = 0; i < COUNT_OF(states); i++) check_states(&states[i]);
    check_states_written();
    const size_t shapes[][3] = { {1, 1, 1}, {1, 37, 11}, {3, 64, 8}, {5, 133, 29}, {2, 300, 64} };
    for (int i = 0; i < COUNT_OF(shapes); i++)
        check_half_matmul(shapes[i][0], shapes[i][1], shapes[i][2], i % 2 == 0);
    Config c = toy_config("1m", 2, 37, 74, 5, 4, 3, 101);
    for (int tied = 0; tied < 2; tied++) {
        c.tie_embeddings = tied;
        Model rounded = toy_model(&c, false, 5), half = toy_model(&c, false, 5);
        size_t Vp = (size_t)c.vocab_padded;
        enum { LENGTH = 23 };
        int tokens[LENGTH];
        double* want = (double*)test_alloc(Vp, sizeof(double));
        double* got = (double*)test_alloc(Vp, sizeof(double));
        real* logits[3];
        for (int t = 0; t < LENGTH; t++) tokens[t] = (int)(random_bits(8, 0, (uint64_t)t) % 101);
        for (int i = 0; i < rounded.n_tensors; i++)
            for (size_t j = 0; rounded.tensor[i].spec->flags & DECAY && j < rounded.tensor[i].count; j++) {
                real* p = &rounded.params[rounded.tensor[i].offset + j];
                *p = half_rounded(*p);
            }
        model_to_half(&half);
        const int piece[3] = {LENGTH, LENGTH, 1};
        for (int k = 0; k < 3; k++) {
            Backend b = backend_cpu(k == 0 ? &rounded : &half, 0, 0, false, false);
            Session s = session_create(&b, 1, LENGTH);
            logits[k] = (real*)test_alloc(Vp, sizeof(real));
            for (int t = 0; t < LENGTH; t += piece[k])
                b.decode(&b, &s, 0, 1, tokens + t, (size_t)piece[k], logits[k]);
            session_free(&b, &s);
            b.destroy(&b);
        }
        for (size_t v = 0; v < Vp; v++) want[v] = (double)logits[0][v], got[v] = (double)logits[1][v];
        report(tied ? "tied: logits of the rounded model" : "logits of the rounded model",
               relative_l2(got, want, Vp), REAL_IS_DOUBLE ? 1e-13 : 2e-6);
        report("whole and token by token: bits", memcmp(logits[1], logits[2], Vp * sizeof(real)) != 0, 0);
        check_half_hash(&c, &half);
        model_free(&rounded);
        model_free(&half);
    }
}
