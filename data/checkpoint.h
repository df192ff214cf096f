// Checkpoints: saving, loading, resuming a model of train_mamba.c.
//
// A checkpoint is a directory that Hugging Face transformers loads: config.json, model.safetensors,
// tokenizer.json, and for resuming optimizer.safetensors with both AdamW moments, the carried states and, as
// metadata, the training settings and counters. Both tensor files carry the step and a save id, the hash of
// all parameters.

uint64_t model_hash(const Model* m) {
    uint64_t hash = 0;
    for (int i = 0; i < m->n_tensors; i++) {
        const unsigned char* p = (const unsigned char*)(m->params + m->tensor[i].offset);
        size_t bytes = m->tensor[i].count * sizeof(real);
        for (size_t j = 0; j < bytes; j += 8) {
            uint64_t word = 0;
            memcpy(&word, p + j, min_size(8, bytes - j));
            hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
            hash ^= hash >> 29;
        }
    }
    return mix64(hash);
}

// model_file_tensors: what a checkpoint file of the model holds, for writing and for comparing. The embedding
// has two published names: `embeddings` (Hugging Face) and `embedding` (mamba_ssm). out: n_tensors entries,
// caller frees
static SafeTensorOut* model_file_tensors(const Model* m, bool mamba_ssm) {
    SafeTensorOut* out = (SafeTensorOut*)xcalloc((size_t)m->n_tensors + 1, sizeof(SafeTensorOut));
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor* t = &m->tensor[i];
        out[i].name = i == 0 && mamba_ssm ? "backbone.embedding.weight" : t->name;
        out[i].ndim = t->ndim;
        for (int k = 0; k < t->ndim; k++) out[i].shape[k] = t->shape[k];
        out[i].dtype = REAL_IS_DOUBLE ? ST_F64 : ST_F32;
        out[i].data = m->params ? m->params + t->offset : NULL;
    }
    return out;
}

static SafeTensorOut flat_tensor(const char* name, const real* data, size_t n) {
    SafeTensorOut t;
    memset(&t, 0, sizeof t);
    t.name = name;
    t.ndim = 1;
    t.shape[0] = (int64_t)n;
    t.dtype = REAL_IS_DOUBLE ? ST_F64 : ST_F32;
    t.data = data;
    return t;
}

// optimizer_file_tensors: both moments of every tensor and the carried states, each as a flat array.
typedef struct { char text[96]; } TensorName;
static SafeTensorOut* optimizer_file_tensors(const Model* m, const State* carry, int n_carry,
                                             TensorName* name) {
    int n = m->n_tensors;
    SafeTensorOut* out = (SafeTensorOut*)xcalloc((size_t)(2 * n + n_carry), sizeof(SafeTensorOut));
    for (int i = 0; i < n; i++) {
        const Tensor* t = &m->tensor[i];
        snprintf(name[i].text, sizeof name[i].text, "exp_avg.%s", t->name);
        snprintf(name[n + i].text, sizeof name[i].text, "exp_avg_sq.%s", t->name);
        out[i] = flat_tensor(name[i].text, m->m + t->offset, t->count);
        out[n + i] = flat_tensor(name[n + i].text, m->v + t->offset, t->count);
    }
    for (int i = 0; i < n_carry; i++) {
        snprintf(name[2 * n + i].text, sizeof name[0].text, "carried_state.%d", i);
        out[2 * n + i] = flat_tensor(name[2 * n + i].text, carry[i].data, carry[i].n_elements);
    }
    return out;
}

// checkpoint_save: writes out/step_%08d and points out/last at it. settings: key, value, ..., NULL (training
// settings and counters) or NULL for a model without optimizer. On failure the previous checkpoint is still
// whole and visible.
enum { MAX_META = 512 };
bool checkpoint_save(const Model* m, const Tokenizer* tok, const char* out, int64_t step,
                     const char** settings, const State* carry, int n_carry, Error* err) {
    char dir[4096], path[4352], step_text[32], id_text[32];
    const char* meta[MAX_META];
    snprintf(step_text, sizeof step_text, "%lld", (long long)step);
    snprintf(id_text, sizeof id_text, "%016llx", (unsigned long long)model_hash(m));
    const char* fixed[] = {"format", "pt", "step", step_text, "save_id", id_text};
    int n = 0;
    for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; i++) meta[n++] = fixed[i];
    meta[n] = NULL;
    if (!checkpoint_begin(out, step, dir, sizeof dir, err)) return false;
    if (!config_write(&m->config, dir, err)) return false;
    if (tok->kind != TOKENIZER_NONE && !tokenizer_write(tok, dir, err)) return false;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    SafeTensorOut* tensors = model_file_tensors(m, strchr(m->config.pattern, 'm') != NULL);
    bool ok = safetensors_write(path, tensors, m->n_tensors, meta, err);
    free(tensors);
    if (ok && settings) {
        for (int i = 0; settings[i]; i++) {
            assert(n + 1 < MAX_META);
            meta[n++] = settings[i];
        }
        meta[n] = NULL;
        snprintf(path, sizeof path, "%s/optimizer.safetensors", dir);
        TensorName* names = (TensorName*)xcalloc((size_t)(2 * m->n_tensors + n_carry), sizeof(TensorName));
        tensors = optimizer_file_tensors(m, carry, n_carry, names);
        ok = safetensors_write(path, tensors, 2 * m->n_tensors + n_carry, meta, err);
        free(tensors);
        free(names);
    }
    return ok && checkpoint_commit(out, step, err);
}

// model_load_tensors: every parameter from a file, or one line that lists all that does not fit. Accepts both
// published names of the embedding, and a head beside a tied embedding when it is the same matrix.
bool model_load_tensors(Model* m, const SafeTensors* st, Error* err) {
    SafeTensorOut* want = model_file_tensors(m, safetensors_find(st, "backbone.embedding.weight") != NULL);
    const SafeTensor* tied_head = m->config.tie_embeddings ? safetensors_find(st, "lm_head.weight") : NULL;
    if (tied_head) {
        want[m->n_tensors] = want[0];
        want[m->n_tensors].name = "lm_head.weight";
    }
    bool ok = safetensors_expect(st, want, m->n_tensors + (tied_head != NULL), err);
    for (int i = 0; ok && i < m->n_tensors; i++) {
        const Tensor* t = &m->tensor[i];
        ok = safetensors_read_real(st, safetensors_find(st, want[i].name), m->params + t->offset, err);
        if (ok && !all_finite(m->params + t->offset, t->count))
            ok = fail(err, "%s: %s holds NaN or infinity; the file is damaged or the model had diverged",
                      st->path, t->name);
    }
    if (ok && tied_head) {
        real* copy = (real*)xcalloc(m->tensor[0].count, sizeof(real));
        ok = safetensors_read_real(st, tied_head, copy, err);
        if (ok && memcmp(copy, m->embedding, m->tensor[0].count * sizeof(real)) != 0)
            ok = fail(err, "%s: lm_head.weight differs from the embedding, but config.json ties them; "
                           "set tie_word_embeddings to false there", st->path);
        free(copy);
    }
    free(want);
    return ok;
}

// model_load: describes and allocates the model of a checkpoint directory and reads its parameters.
bool model_load(Model* m, const char* dir, bool training, Error* err) {
    Config config;
    char path[4352];
    SafeTensors st;
    if (!config_read(&config, dir, err)) return false;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (!safetensors_open(&st, path, err)) return false;
    model_describe(m, &config);
    model_alloc(m, training);
    bool ok = model_load_tensors(m, &st, err);
    safetensors_close(&st);
    if (!ok) model_free(m);
    return ok;
}

// optimizer_load: moments and carried states that belong to the loaded parameters: both files must be of one
// save, and the save id must be the hash of these parameters. st: the opened optimizer.safetensors
bool optimizer_load(Model* m, const SafeTensors* model_file, const SafeTensors* st, State* carry, int n_carry,
                    Error* err) {
    char id[32];
    snprintf(id, sizeof id, "%016llx", (unsigned long long)model_hash(m));
    if (!checkpoint_same_save(model_file, st, err)) return false;
    if (strcmp(id, safetensors_metadata(st, "save_id")) != 0)
        return fail(err, "%s: the weights are not those that were saved with %s; use another checkpoint",
                    model_file->path, st->path);
    int n = m->n_tensors;
    TensorName* names = (TensorName*)xcalloc((size_t)(2 * n + n_carry), sizeof(TensorName));
    SafeTensorOut* want = optimizer_file_tensors(m, carry, n_carry, names);
    bool ok = safetensors_expect(st, want, 2 * n + n_carry, err);
    for (int i = 0; ok && i < 2 * n + n_carry; i++)
        ok = safetensors_read_real(st, safetensors_find(st, want[i].name), (real*)want[i].data, err);
    free(want);
    free(names);
    return ok;
}
