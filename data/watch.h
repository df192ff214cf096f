// Between the steps of a run: validation, samples, and what watches over it. Part of section 11 of
// train_mamba.c: it uses the Trainer.

// bits per byte, when a token is a byte
static void bits_per_byte(const Tokenizer* tok, double loss, char text[32]) {
    if (tok->kind == TOKENIZER_BYTES) snprintf(text, 32, "%.4f", loss / log(2.0));
    else text[0] = 0;
}

static bool trainer_evaluate(Trainer* t, double* loss, Error* err) {
    const Options* o = &t->settings->o;
    Evaluation result;
    if (!evaluate(&t->backend, &t->val_loader, (size_t)o->batch_size, (size_t)o->seq_len, o->eval_batches,
                  o->reset_documents, NULL, &result,
                  err))    // one that has begun is finished: a resumed run would not make it up
        return false;
    *loss = result.loss;
    return true;
}

static bool trainer_sample(Trainer* t, Error* err) {
    const Options* o = &t->settings->o;
    GenerateStats stats;
    if (o->max_tokens == 0) return true;
    if (stop_signal) return true;
    printf("--- sample at step %lld\n", (long long)t->progress.step);
    Prompt prompt = prompt_open(&t->data.tokenizer, o->prompt, NULL);
    bool ok = generate(&t->backend, &t->data.tokenizer, o, &prompt, 1, stdout, &stats, &stop_signal, err);
    prompt_close(&prompt);
    if (!ok) return false;
    printf("---\n");
    return true;
}

static void name_tensor(char* text, size_t size, const char* what, const Tensor* t) {
    int n = snprintf(text, size, "%s %s", what, t->name);
    if (t->layer >= 0 && (size_t)n < size) snprintf(text + n, size - (size_t)n, " (layer %d)", t->layer);
}

// find_nonfinite: the name of the first tensor with a NaN or infinity, in the order in which a step computes
// them: parameters, then the activations of a forward run again layer by layer, then gradients from the last
// layer to the first.
bool find_nonfinite(const Model* m, Workspace* w, const int* tokens, const int* doc, size_t B, size_t T,
                    const State* s0, char* text, size_t size) {
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor* t = &m->tensor[i];
        if (all_finite(m->params + t->offset, t->count)) continue;
        name_tensor(text, size, "parameter", t);
        return true;
    }
    Run run = {&m->config, B, T, doc, w->recompute, w->dropout, m->half};
    State none = state_none(m);
    bool found = false;
    size_t D = (size_t)m->config.d_model;
    for (int l = 0; l < m->n_layers && !found; l++) {
        const Layer* layer = &m->layer[l];
        if (l == 0) embedding_forward(w->res[0], tokens, m->embedding, B * T, D);
        if (l == 0) dropout(w->res[0], w->res[0], &run.dropout, B * T, D);
        layer_forward(m, w, &run, l, s0, &none);
        for (int i = 0; i < layer->kind->n_acts && !found; i++) {
            if (all_finite(w->acts[l][i], activation_count(&layer->kind->acts[i], &m->config, B, T)))
                continue;
            snprintf(text, size, "activation %s of layer %d (%s)", layer->kind->acts[i].name, l,
                     layer->kind->name);
            found = true;
        }
        if (!found && !all_finite(w->res[l + 1], B * T * D)) {
            snprintf(text, size, "residual stream after layer %d (%s)", l, layer->kind->name);
            found = true;
        }
    }
    state_free(&none);
    for (int i = m->n_tensors - 1; i >= 0 && !found && m->grads; i--) {
        const Tensor* t = &m->tensor[i];
        if (all_finite(m->grads + t->offset, t->count)) continue;
        name_tensor(text, size, "gradient of", t);
        found = true;
    }
    return found;
}

// step_not_finite: *err: where a step that was not taken has its first value that is not finite. Returns
// false.
static bool step_not_finite(Trainer* t, const Record* r, const StepResult* result, Error* err) {
    const Options* o = &t->settings->o;
    Backend* b = &t->backend;
    size_t B = (size_t)o->batch_size, T = (size_t)o->seq_len;
    char what[256] = "the loss itself";
    size_t at = (size_t)result->micro * B * T;
    const State* s0 = b->carry_in ? &b->carry_in[result->micro] : &b->none;
    step_batch(t, r->samples);
    if (!b->work.data)
        b->work = workspace_alloc(&t->model, B, T, false, RECOMPUTE_NONE, false);    // the CPU looks for it
    b->work.dropout = step_dropout(o, r->step);
    b->work.dropout.first = at;
    find_nonfinite(&t->model, &b->work, t->inputs + at, o->reset_documents ? t->doc + at : NULL, B, T, s0,
                   what, sizeof what);
    bool starts;
    return fail(err,
                "step %lld: %s is not finite; first bad value in: %s; batch: samples %lld to %lld, from "
                "token %lld of the data",
                (long long)r->step, isfinite(result->loss) ? "the gradient" : "the loss", what,
                (long long)r->samples, (long long)(r->samples + o->batch_size * o->grad_accum - 1),
                (long long)loader_position(&t->loader, r->samples, &starts));
}

// trainer_check: the CPU as oracle of the device. The first CHECK_TOKENS tokens of the batch of step r go
// forward and backward on the device and on the CPU, with the device's weights after that step. Prints the
// relative L2 error of every tensor's gradient, of equal tensors of all layers the worst.
enum { CHECK_TOKENS = 64 };

static void trainer_check(Trainer* t, const Record* r) {
    const Options* o = &t->settings->o;
    Backend* b = &t->backend;
    Model* m = &t->model;
    size_t T = min_size(CHECK_TOKENS, (size_t)o->seq_len), n = 0;
    step_batch(t, r->samples);
    const int* doc = o->reset_documents ? t->doc : NULL;
    for (size_t i = 0; i < T; i++) n += t->targets[i] >= 0;
    double scale = n ? 1.0 / (double)n : 1;
    b->zero_gradients(b);
    double loss = b->forward(b, -1, t->inputs, t->targets, doc, 1, T, scale) * scale;
    b->backward(b, -1, t->inputs, doc, 1, T);
    b->download(b);
    real* device = (real*)xcalloc(m->n_elements, sizeof(real));
    memcpy(device, m->grads, m->n_elements * sizeof(real));
    Backend cpu = backend_cpu(m, 1, T, true, RECOMPUTE_NONE);
    cpu.zero_gradients(&cpu);
    double expected = cpu.forward(&cpu, -1, t->inputs, t->targets, doc, 1, T, scale) * scale;
    cpu.backward(&cpu, -1, t->inputs, doc, 1, T);
    printf("check of step %lld, %zu tokens: loss %.6f, on the CPU %.6f; relative errors of the gradients:\n",
           (long long)r->step, T, loss, expected);
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor* first = &m->tensor[i];
        double worst = -1;
        int layer = 0;
        bool shown = false;          // with an earlier tensor of the same kind
        for (int j = 0; j < m->n_tensors; j++) {
            const Tensor* u = &m->tensor[j];
            if (u->spec != first->spec) continue;
            if (j < i) { shown = true; break; }
            double diff = 0, norm = 0;
            for (size_t k = u->offset; k < u->offset + u->count; k++) {
                double want = (double)m->grads[k], d = (double)device[k] - want;
                diff += d * d;
                norm += want * want;
            }
            double error = norm > 0 ? sqrt(diff / norm) : sqrt(diff);
            if (!(error <= worst)) { worst = error; layer = u->layer; }
        }
        if (shown) continue;
        if (first->layer < 0) printf("  %-32s %.1e\n", first->spec->name, worst);
        else printf("  %-32s %.1e, in layer %d\n", first->spec->name, worst, layer);
    }
    cpu.destroy(&cpu);
    free(device);
}

// Spike: watches a number that should change slowly (loss, gradient norm). A value more than 6 standard
// deviations above the mean of the last 128 is reported; nothing else is done about it.
enum { SPIKE_WINDOW = 128 };
typedef struct { double value[SPIKE_WINDOW]; int64_t n; } Spike;

// spike_score: how many standard deviations `value` lies above the window, 0 until the window is full; then
// adds it
double spike_score(Spike* s, double value) {
    double mean = 0, square = 0, score = 0;
    for (int i = 0; i < SPIKE_WINDOW; i++) mean += s->value[i] / SPIKE_WINDOW;
    for (int i = 0; i < SPIKE_WINDOW; i++)
        square += (s->value[i] - mean) * (s->value[i] - mean) / SPIKE_WINDOW;
    if (s->n >= SPIKE_WINDOW && square > 0) score = (value - mean) / sqrt(square);
    s->value[s->n++ % SPIKE_WINDOW] = value;
    return score;
}

static void print_speed(const Trainer* t, double rate) {       // tokens per second
    Flop flop = flop_per_token(&t->model, t->settings->o.seq_len);
    double peak = t->backend.peak_flops;
    printf("speed: %.0f tokens/s, %.2f TFLOP/s (matmul %.1f + scan %.1f MFLOP per token; 6 N: %.1f)", rate,
           rate * (flop.matmul + flop.scan) * 1e-12, flop.matmul * 1e-6, flop.scan * 1e-6,
           6e-6 * (double)t->model.n_params);
    if (peak > 0) printf(", MFU %.1f %% of %.0f TFLOP/s", 100 * rate * flop.matmul / peak, peak * 1e-12);
    printf("\n");
}

static void format_time(double seconds, char text[32]) {
    long long s = (long long)(seconds + 0.5);
    if (s >= 3600) snprintf(text, 32, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
    else snprintf(text, 32, "%lld:%02lld", s / 60, s % 60);
}
