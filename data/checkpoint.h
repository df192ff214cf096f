// Checkpoints: saving, loading, resuming a model of train_mamba.c.
//
// A checkpoint is a directory that Hugging Face transformers loads: config.json, model.safetensors,
// tokenizer.json, and for resuming optimizer.safetensors with both AdamW moments, the carried states and, as
// metadata, the training settings and counters. Both tensor files carry the step and a save id, the hash of
// all parameters.

// model_hash: of all parameters; of a matrix in bfloat16 those numbers, as params has lost it
uint64_t model_hash(const Model* m) {
    uint64_t hash = 0;
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor* t = &m->tensor[i];
        const unsigned char* p = (const unsigned char*)(m->params + t->offset);
        const uint16_t* bits = m->half.bits && (t->spec->flags & DECAY) ? m->half.bits + t->offset : NULL;
        size_t bytes = t->count * (bits ? sizeof *bits : sizeof(real)), I = (size_t)t->shape[1];
        for (size_t j = 0; j < bytes; j += 8) {
            uint64_t word = 0;
            if (!bits) memcpy(&word, p + j, min_size(8, bytes - j));
            for (size_t k = j / 2; bits && k < min_size(j / 2 + 4, t->count); k++)
                word = word << 16 | bits[k / I * I + half_at(k % I, I)];
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
    if (!config_write(&m->config, -1, "float32", dir, err)) return false;
    if (tok->kind != TOKENIZER_NONE && !tokenizer_write(tok, dir, err)) return false;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    SafeTensorOut* tensors = model_file_tensors(m, !config_is_hf(&m->config));
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

// file_tensor: where tensor i of the model is in the files
static const SafeTensor* file_tensor(const Model* m, const SafeTensors* st, int i) {
    const SafeTensor* other_name = i == 0 ? safetensors_find(st, "backbone.embedding.weight") : NULL;
    return other_name ? other_name : safetensors_find(st, m->tensor[i].name);
}

// model_expect: the files hold the tensors of this model and no others, or one line that lists all that does
// not
// fit. Accepts both published names of the embedding, and a head beside a tied embedding.
static bool model_expect(const Model* m, const SafeTensors* st, Error* err) {
    SafeTensorOut* want = model_file_tensors(m, safetensors_find(st, "backbone.embedding.weight") != NULL);
    const SafeTensor *embedding = file_tensor(m, st, 0), *head = safetensors_find(st, "lm_head.weight");
    bool tied = m->config.tie_embeddings && head;
    if (tied) {
        want[m->n_tensors] = want[0];
        want[m->n_tensors].name = "lm_head.weight";
    }
    bool ok = safetensors_expect(st, want, m->n_tensors + tied, err);
    free(want);
    if (ok && !tied && head && head->part == embedding->part && head->begin == embedding->begin)
        ok = fail(err, "%s: lm_head.weight and embedding are the same bytes, but config.json unties them: "
                  "set tie_word_embeddings to true there", st->path);
    return ok;
}

// model_load_tensors: every parameter from the files; a head beside a tied embedding must be the same matrix.
bool model_load_tensors(Model* m, const SafeTensors* st, Error* err) {
    if (!model_expect(m, st, err)) return false;
    const SafeTensor* tied_head = m->config.tie_embeddings ? safetensors_find(st, "lm_head.weight") : NULL;
    int first = m->n_tensors;
    // the first tensor that failed: the message does not depend on the threads
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor* t = &m->tensor[i];
        Error why;
        bool ok = safetensors_read_real(st, file_tensor(m, st, i), m->params + t->offset, &why);
        if (ok && !all_finite(m->params + t->offset, t->count))
            ok = fail(&why, "%s: %s holds NaN or infinity; the file is damaged or the model had diverged",
                      st->path, t->name);
        #pragma omp critical
        if (!ok && i < first) {
            first = i;
            *err = why;
        }
    }
    if (first < m->n_tensors) return false;
    bool differs = false;
    if (tied_head && !read_or_compare(st, tied_head, m->embedding, &differs, err)) return false;
    return !differs || fail(err, "%s: lm_head.weight differs from the embedding, but config.json ties them; "
                            "set tie_word_embeddings to false there", st->path);
}

// checkpoint_open: the description of the model in a checkpoint directory, and its opened files, which hold
// exactly
// its tensors. Nothing is allocated for them yet: what config.json says is only believed when the files
// agree.
bool checkpoint_open(Model* m, SafeTensors* st, const char* dir, Error* err) {
    Config config;
    if (!config_read(&config, dir, err) || !weights_open(st, dir, err)) return false;
    if (config.n_layer > st->n) {    // before the table of so many layers is made
        fail(err, "%s: config.json says %lld layers, but the weights are only %d tensors", dir,
             (long long)config.n_layer, st->n);
        safetensors_close(st);
        return false;
    }
    model_describe(m, &config);
    if (model_expect(m, st, err)) return true;
    safetensors_close(st);
    model_free(m);
    return false;
}

// model_load: the same, and the parameters are read. They are the only memory of their size: the files are
// read
// in pieces, each converted into its place.
bool model_load(Model* m, const char* dir, bool training, Error* err) {
    SafeTensors st;
    if (!checkpoint_open(m, &st, dir, err)) return false;
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

// ---- converting: the forms that other programs load

// copy_file: one small file of a checkpoint as it is; a missing one is no error
static bool copy_file(const char* from, const char* to, const char* name, Error* err) {
    char path[4096], piece[1 << 16];
    struct stat info;
    if (!join_path(path, sizeof path, from, name, err)) return false;
    if (stat(path, &info) != 0) return true;
    int in = open_regular(path, &info, err);
    if (in < 0) return false;
    int out = join_path(path, sizeof path, to, name, err) ? open_retry(path, O_WRONLY | O_CREAT | O_TRUNC)
        : -1;
    bool ok = out >= 0;
    for (uint64_t at = 0, n; ok && at < (uint64_t)info.st_size; at += n) {
        n = min_size(sizeof piece, (uint64_t)info.st_size - at);
        errno = 0;
        ok = read_exact(in, piece, n, at) && write_all(out, piece, n);
    }
    int error = errno;
    if (out >= 0 && ok) ok = sync_close(out), error = errno;
    else if (out >= 0) close(out);
    close(in);
    return ok || fail_line(err, "%s: cannot copy %s: %s", to, name, error ? strerror(error) : "it changed");
}

// checkpoint_export: a new directory `out` with the model in a published form. Matrices get the dtype; norms,
// biases, A_log, D and the convolution, less than 1 % of the numbers, stay F32: bfloat16 has too few bits for
// A_log and dt.
//   DIALECT_HF      config.json of transformers, model.safetensors
//   DIALECT_MAMBA   config.json of mamba_ssm, pytorch_model.bin, which holds a tied head a second time by
// name
// from: the directory whose tokenizer files are copied, or NULL. Everything is written to out.tmp, which then
// gets its name.
bool checkpoint_export(const Model* m, const char* from, const char* out, int dialect, int dtype,
                       Error* err) {
    static const char* const torch_names[] = {"float64", "float32", "float16", "bfloat16"};   // ST_F64, ...
    static const char* const copied[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                         "generation_config.json"};
    char dir[4096], path[4352];
    const char* meta[] = {"format", "pt", NULL};
    struct stat info;
    size_t length = strlen(out);
    while (length > 1 && out[length - 1] == '/') length--;
    snprintf(dir, sizeof dir, "%.*s.tmp", length < 4000 ? (int)length : 4000, out);
    if (lstat(out, &info) == 0)
        return fail_line(err, "%s: exists already; remove it or choose another --out", out);
    if (lstat(dir, &info) == 0)
        return fail_line(err, "%s: exists already, left by an interrupted convert? Remove it", dir);
    if (!checkpoint_make_dir(dir, err)) return false;
    SafeTensorOut* tensors = model_file_tensors(m, dialect == DIALECT_MAMBA);
    int n = m->n_tensors;
    for (int i = 0; i < n; i++) tensors[i].dtype = m->tensor[i].spec->flags & DECAY ? dtype : ST_F32;
    bool ok = true;
    for (int i = 0; i < n; i++)
        for (size_t j = 0; j < m->tensor[i].count && ok && tensors[i].dtype == ST_F16; j++)
            if (!(fabs((double)tensors[i].data[j]) < 65520))      // what rounds to at most 65504
                ok = fail(err, "%s has a value of %g, beyond f16; try --dtype bf16", tensors[i].name,
                          (double)tensors[i].data[j]);
    ok = ok && config_write(&m->config, dialect, torch_names[dtype], dir, err);
    for (int i = 0; from && ok && i < (int)(sizeof copied / sizeof *copied); i++)
        ok = copy_file(from, dir, copied[i], err);
    snprintf(path, sizeof path, "%s/%s", dir, weight_files[dialect == DIALECT_MAMBA ? 2 : 0]);
    if (dialect == DIALECT_MAMBA && m->config.tie_embeddings) {
        tensors[n] = tensors[0];
        tensors[n++].name = "lm_head.weight";
    }
    ok = ok && (dialect == DIALECT_MAMBA ? pickle_write(path, tensors, n, err)
                                         : safetensors_write(path, tensors, n, meta, err));
    free(tensors);
    ok = ok && sync_dir(dir, err);
    if (ok && rename(dir, out) < 0) ok =
        fail_line(err, "%s: cannot rename to %s: %s", dir, out, strerror(errno));
    if (!ok) remove_dir(dir);
    snprintf(path, sizeof path, "%s/..", out);
    return ok && sync_dir(path, err);
}
