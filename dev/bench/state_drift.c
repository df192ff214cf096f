// state_drift: what --state-dtype bf16 changes. A model reads a text token by token, once with its states in
// float32 and once with them rounded to bfloat16 after every token.
//
//   state_drift MODEL TEXT [BYTE [TOKENS]]      from a byte of the text on (0), so many tokens (5000)
//
// prints, for five equal parts of the text, means over the tokens:
//   states    relative L2 difference of all states of the recurrences
//   logits    the same of the logits
//   KL        the divergence of the next token's probabilities, in nats
//   f32, bf16 the two losses, in nats per token
//   best      tokens of the part whose most likely successor is another one
//
// build: make build/dev/state_drift
#define SSM_NO_MAIN
// defines: the model, checkpoints, tokenizers, the CPU backend
#include "../../train_mamba.c"

enum { F32, BF16, TYPES };

// relative L2 difference of the states of all recurrences
static double states_apart(const Model* m, const State* a, const State* reference) {
    double d = 0, r = 0;
    for (int l = 0; l < m->n_layers; l++)
        for (int i = 0; i < m->layer[l].kind->n_state; i++) {
            const TensorSpec* spec = &m->layer[l].kind->state[i];
            size_t n = spec->flags & RECURRENT ? spec_count(spec, &m->config) : 0;
            for (size_t j = 0; j < n; j++) {
                double x = (double)reference->field[l][i][j], y = (double)a->field[l][i][j];
                d += (y - x) * (y - x);
                r += x * x;
            }
        }
    return r > 0 ? sqrt(d / r) : 0;
}

// log of the sum of exp(z): with it, z becomes the logarithms of probabilities
static double log_sum(const real* z, size_t V, size_t* best) {
    double sum = 0;
    *best = 0;
    for (size_t v = 1; v < V; v++) if (z[v] > z[*best]) *best = v;
    for (size_t v = 0; v < V; v++) sum += exp((double)(z[v] - z[*best]));
    return (double)z[*best] + log(sum);
}

int main(int argc, char** argv) {
    Model m;
    Tokenizer tok;
    SafeTensors st;
    Error err;
    char dir[4096];
    size_t size = 0;
    if (argc < 3) die("expected: state_drift MODEL TEXT [BYTE [TOKENS]]");
    if (!model_from_checkpoint(&m, &st, &tok, argv[1], dir, &err)) die("%s", err.text);
    model_alloc(&m, false);
    if (!model_load_tensors(&m, &st, &err)) die("%s", err.text);
    char* text = read_text(argv[2], INT64_MAX - 1, &size, &err);
    if (!text) die("%s", err.text);
    size_t from = argc > 3 ? (size_t)atoll(argv[3]) : 0, n = argc > 4 ? (size_t)atoll(argv[4]) : 5000;
    if (from >= size) die("%s has %zu bytes, byte %zu is not in it", argv[2], size, from);
    TokenList list = {NULL, 0, 0};
    Encoder encoder;
    encoder_open(&encoder, &tok);
    if (!encoder_add(&encoder, text + from, size - from, true, &list, &err)) die("%s", err.text);
    encoder_close(&encoder);
    if (list.n < 2 || n < 5) die("expected at least 2 tokens of text, and 5 to read");
    n = min_size(n, list.n - 1);
    m.config.context = (int64_t)n;

    size_t V = (size_t)m.config.vocab_size, best[TYPES];
    Backend b = backend_cpu(&m, 0, 0, false, RECOMPUTE_NONE);
    Session s[TYPES];
    real* z[TYPES];
    for (int k = 0; k < TYPES; k++) {
        s[k] = session_create(&b, 1, 1);
        z[k] = (real*)xcalloc((size_t)m.config.vocab_padded, sizeof(real));
    }
    printf("tokens          states    logits        KL      f32     bf16   best\n");
    double states = 0, logits = 0, kl = 0, loss[TYPES] = {0, 0}, all[TYPES] = {0, 0};
    for (size_t t = 0, begin = 0, other = 0; t < n; t++) {
        double of[TYPES], d = 0, r = 0;
        for (int k = 0; k < TYPES; k++) {
            m.config.state_bf16 = k == BF16;
            b.decode(&b, &s[k], 0, 1, &list.id[t], 1, z[k]);
            of[k] = log_sum(z[k], V, &best[k]);
            loss[k] += of[k] - (double)z[k][list.id[t + 1]];
        }
        for (size_t v = 0; v < V; v++) {
            double x = (double)z[F32][v], y = (double)z[BF16][v];
            d += (y - x) * (y - x);
            r += x * x;
            kl += exp(x - of[F32]) * (x - of[F32] - y + of[BF16]);
        }
        logits += sqrt(d / r);
        states += states_apart(&m, &s[BF16].state, &s[F32].state);
        other += best[F32] != best[BF16];
        if ((t + 1) * 5 / n == t * 5 / n) continue;
        double count = (double)(t + 1 - begin);
        printf("%6zu..%6zu  %.2e  %.2e  %.2e  %.5f  %.5f  %5zu\n", begin, t, states / count, logits / count,
               kl / count, loss[F32] / count, loss[BF16] / count, other);
        for (int k = 0; k < TYPES; k++) { all[k] += loss[k]; loss[k] = 0; }
        states = logits = kl = 0;
        begin = t + 1;
        other = 0;
    }
    printf("loss of all %zu tokens: f32 %.5f, bf16 %.5f\n", n, all[F32] / (double)n, all[BF16] / (double)n);
    for (int k = 0; k < TYPES; k++) { session_free(&b, &s[k]); free(z[k]); }
    b.destroy(&b);
    free(list.id);
    free(text);
    tokenizer_free(&tok);
    model_free(&m);
    return 0;
}
