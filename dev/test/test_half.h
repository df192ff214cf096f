// Generation on the CPU with weight matrices in bfloat16 (included by test_mamba.c).

static real half_rounded(real x) {
    float f = (float)x;
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
    memcpy(&f, &u, sizeof f);
    return (real)f;
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

// Catches: a matrix that is not converted or not used, an embedding in another order; a sum that depends on
// how the text is cut.
void test_half(void) {
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
