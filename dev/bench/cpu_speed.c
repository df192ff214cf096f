// cpu_speed: how close the CPU trainer comes to what the machine can do, measured in one run, alternately.
//
//   cpu_speed train
//   a training step (forward, backward, clipping, AdamW) against 6 x parameters x tokens at the rate of
//                        a large sgemm (OpenBLAS on all cores when built with it, otherwise our own matmul)
//   cpu_speed generate
//   tokens of a 130M model against reading every weight once per token at the bandwidth of a read loop
//   with --half the weights in bfloat16
//   options: [--d-model 256] [--n-layer 8] [--batch-size 8] [--seq-len 256] [--rounds 7] [--vocab-size 257]
//   [--threads 0]
//
// build: make dev        prints `name value` lines; medians of the rounds, spread = (max - min) / median
#define SSM_NO_MAIN
// defines: the trainer
#include "../../train_mamba.c"
#ifdef USE_OPENBLAS
#include <cblas.h>
#endif

static int order_doubles(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

static double median(double* v, int n) {
    qsort(v, (size_t)n, sizeof(double), order_doubles);
    return n % 2 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
}

static double spread(const double* sorted, int n, double mid) { return (sorted[n - 1] - sorted[0]) / mid; }

// FLOP/s of C = A B^T with M = 4096, N = K = 1024, best of 5
static double sgemm_rate(void) {
    enum { M = 4096, N = 1024, K = 1024 };
    static real *a, *b, *c;
    if (!a) {
        a = (real*)xcalloc(M * K, sizeof(real));
        b = (real*)xcalloc(N * K, sizeof(real));
        c = (real*)xcalloc(M * N, sizeof(real));
        for (size_t i = 0; i < M * K; i++) a[i] = (real)random_uniform(1, 0, i);
        for (size_t i = 0; i < N * K; i++) b[i] = (real)random_uniform(1, 1, i);
    }
    double best = INFINITY;
    for (int i = 0; i < 5; i++) {
        double start = seconds_now();
#if defined(USE_OPENBLAS) && !REAL_IS_DOUBLE
        openblas_set_num_threads(thread_count());
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, M, N, K, 1, a, K, b, K, 0, c, N);
        openblas_set_num_threads(1);
#else
        matmul_forward(c, N, a, K, b, NULL, M, K, N);
#endif
        double seconds = seconds_now() - start;
        if (seconds < best) best = seconds;
    }
    return 2.0 * M * N * K / best;
}

// bytes per second of reading `n` numbers with all threads, best of 3
static double read_bandwidth(const real* p, size_t n) {
    double best = INFINITY, sink = 0;
    for (int i = 0; i < 3; i++) {
        double start = seconds_now();
        #pragma omp parallel for reduction(+:sink) schedule(static)
        for (size_t j = 0; j < n; j += 4096) {
            real sum = 0;
            size_t count = min_size(4096, n - j);
            #pragma omp simd reduction(+:sum)
            for (size_t k = 0; k < count; k++) sum += p[j + k];
            sink += (double)sum;
        }
        double seconds = seconds_now() - start;
        if (seconds < best) best = seconds;
    }
    if (sink == 0.123) printf(" ");      // the sum is used
    return (double)n * sizeof(real) / best;
}

enum { MAX_ROUNDS = 99 };

static void bench_train(Settings* s, int rounds) {
    Options* o = &s->o;
    size_t B = (size_t)o->batch_size, T = (size_t)o->seq_len, M = B * T;
    Config c = config_from_options(s, o->vocab_size ? o->vocab_size : 257, 256);
    Model m;
    model_describe(&m, &c);
    model_alloc(&m, true);
    model_init(&m, 1);
    Backend b = backend_cpu(&m, B, T, true, o->recompute);
    int *tokens = (int*)xcalloc(M, sizeof(int)), *targets = (int*)xcalloc(M, sizeof(int));
    for (size_t i = 0; i < M; i++) {
        tokens[i] = (int)(random_bits(1, 2, i) % (uint64_t)c.vocab_size);
        targets[i] = (int)(random_bits(1, 2, i + 1) % (uint64_t)c.vocab_size);
    }
    AdamW opt = {0.9, 0.95, 1e-8, 0.1};
    double rate[MAX_ROUNDS], sgemm[MAX_ROUNDS], fraction[MAX_ROUNDS];
    int64_t step = 0;
    for (int r = -1; r < rounds; r++) {         // round -1 warms up
        double flops = sgemm_rate(), start = seconds_now();
        for (int i = 0; i < 3; i++) {
            b.zero_gradients(&b);
            b.forward(&b, -1, tokens, targets, NULL, B, T, 1.0 / (double)M);
            b.backward(&b, -1, tokens, NULL, B, T);
            b.update(&b, &opt, 1e-4, clip_scale(b.gradient_norm(&b), 1), ++step);
        }
        double seconds = (seconds_now() - start) / 3;
        if (r < 0) continue;
        rate[r] = (double)M / seconds;
        sgemm[r] = flops;
        fraction[r] = 6.0 * (double)m.n_params * rate[r] / flops;
    }
    double mid = median(rate, rounds), gemm = median(sgemm, rounds), share = median(fraction, rounds);
    printf("parameters %zu\nactivations_mib %.1f\nthreads %d\n", m.n_params, mib((double)b.work.bytes),
           thread_count());
    printf("tokens_per_second %.0f\nspread %.2f\n", mid, spread(rate, rounds, mid));
    printf("sgemm_gflops %.1f\nbound_tokens_per_second %.0f\nfraction_of_bound %.3f\n", gemm / 1e9,
           gemm / (6.0 * (double)m.n_params), share);
}

static void bench_generate(Settings* s, int rounds, bool half) {
    Model m;
    Config c = config_from_options(s, 50277, 0);
    model_describe(&m, &c);
    model_alloc(&m, false);
    model_init(&m, 1);
    if (half) model_to_half(&m);
    double bytes = 0;                       // that every token reads
    for (int i = 0; i < m.n_tensors; i++)
        bytes += (double)m.tensor[i].count * (half && m.tensor[i].spec->flags & DECAY ? 2 : sizeof(real));
    Backend b = backend_cpu(&m, 0, 0, false, false);
    Session session = session_create(&b, 1, 1);
    real* logits = (real*)xcalloc((size_t)c.vocab_padded, sizeof(real));
    Candidate* candidates = (Candidate*)xcalloc((size_t)c.vocab_size, sizeof(Candidate));
    unsigned char* seen = (unsigned char*)xcalloc((size_t)c.vocab_padded, 1);
    Sampler sampler = {1, 50, 0.9, 0, 1, 1};
    Error err;
    double rate[MAX_ROUNDS], bandwidth[MAX_ROUNDS], fraction[MAX_ROUNDS];
    int token = 0, n = 40;
    for (int r = -1; r < rounds; r++) {
        const real* memory = half ? (const real*)(const void*)m.half.bits : m.params;
        double bytes_per_second = read_bandwidth(memory, half ? m.n_elements / 2 : m.n_elements);
        double start = seconds_now();
        for (int i = 0; i < n; i++) {
            b.decode(&b, &session, 0, 1, &token, 1, logits);
            if (!sample_token(&sampler, logits, seen, (size_t)c.vocab_size, 0, (uint64_t)i, candidates,
                              &token, &err))
                die("%s", err.text);
        }
        double seconds = (seconds_now() - start) / n;
        if (r < 0) continue;
        rate[r] = 1 / seconds;
        bandwidth[r] = bytes_per_second;
        fraction[r] = rate[r] * bytes / bytes_per_second;
    }
    double mid = median(rate, rounds), read = median(bandwidth, rounds), share = median(fraction, rounds);
    printf("parameters %zu\nthreads %d\ntokens_per_second %.1f\nspread %.2f\nread_gb_per_second "
           "%.1f\nbound_tokens_per_second %.1f\n"
           "fraction_of_bound %.3f\n",
           m.n_params, thread_count(), mid, spread(rate, rounds, mid), read / 1e9,
           read / bytes, share);
}

int main(int argc, char** argv) {
    limit_spinning(argv);
    if (argc < 2 || (strcmp(argv[1], "train") && strcmp(argv[1], "generate")))
        die("usage: cpu_speed train|generate [options]");
    bool train = strcmp(argv[1], "train") == 0, half = false;
    char* args[64];
    int n = 0, rounds = 7;
    const char* defaults[] = {"--d-model", train ? "256" : "768", "--n-layer", train ? "8" : "24"};
    Settings s;
    Error err;
    memset(&s, 0, sizeof s);
    if (!settings_parse(&s, WORD_TRAIN, 0, NULL, &err) ||
        !options_parse(&s, 4, (char**)defaults, FROM_PRESET, &err))
        die("%s", err.text);
    for (int i = 2; i < argc && n < 64; i++) {
        if (strcmp(argv[i], "--half") == 0) half = true;
        else if (strcmp(argv[i], "--rounds") == 0 && i + 1 < argc) rounds = atoi(argv[++i]);
        else args[n++] = argv[i];
    }
    if (rounds < 1 || rounds > MAX_ROUNDS) die("--rounds expects 1 to %d", MAX_ROUNDS);
    if (!options_parse(&s, n, args, FROM_USER, &err)) die("%s", err.text);
    set_threads(s.o.threads);
    if (train) bench_train(&s, rounds);
    else bench_generate(&s, rounds, half);
    settings_free(&s);
    return 0;
}
