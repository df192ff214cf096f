// From options to data, model and backend: files, tokenizer and configuration, for a new model or that of a
// checkpoint. Part of section 11 of train_mamba.c: it uses what stands there before it.

typedef struct {
    Tokenizer tokenizer;
    Dataset train, val;
    bool has_val;
    char* default_list;        // the file list when --data is not given
} Data;

// The default data: the source files of this project, from the current directory or from beside the
// executable.
static char* default_data(void) {
    static const char* const names[] = {"train_mamba.c", "train_mamba.cu", "test_mamba.c",
                                        "data/safetensors.h", "data/checkpoint.h", "data/tokenizer.h",
                                        "data/dataloader.h", "data/options.h", "data/config.h",
                                        "data/generation.h"};
    char root[4096] = ".", *list = (char*)xcalloc(1, 1);
    if (access("train_mamba.c", R_OK) != 0) {
        ssize_t n = readlink("/proc/self/exe", root, sizeof root - 1);
        root[n > 0 ? n : 0] = 0;
        for (int up = 0; up < 2 && strrchr(root, '/'); up++) *strrchr(root, '/') = 0;
    }
    size_t length = 0;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[4352];
        snprintf(path, sizeof path, "%s%s%s", strcmp(root, ".") ? root : "", strcmp(root, ".") ? "/" : "",
                 names[i]);
        if (access(path, R_OK) != 0) continue;
        list = (char*)xrealloc(list, length + strlen(path) + 2, 1);
        length += (size_t)sprintf(list + length, "%s%s", length ? "\n" : "", path);
    }
    if (!length)
        die("no --data given, and this program's source files (the default data) are not here; give --data "
            "FILE...");
    return list;
}

static bool open_list(Dataset* d, const char* list, const Tokenizer* tok, Error* err) {
    int n;
    char** paths = list_split(list, &n);
    bool ok = dataset_open(d, paths, n, tok, err);
    free(paths);
    return ok;
}

static bool ends_with(const char* text, const char* end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

// tokenizer_choose: for a new model: --tokenizer; the one beside token shards
// (.bin), which have only ids without it; otherwise bytes.
static bool tokenizer_choose(Tokenizer* tok, const Settings* s, const char* list, Error* err) {
    const Options* o = &s->o;
    bool shards = ends_with(list, ".bin");
    char beside[4096];
    tokenizer_bytes(tok);
    if (o->tokenizer[0] && !tokenizer_load(tok, o->tokenizer, err)) return false;
    if (shards) {
        const char *end = strchr(list, '\n'),
                   *slash = (const char*)memrchr(list, '/', end ? (size_t)(end - list) : strlen(list));
        snprintf(beside, sizeof beside, "%.*s", slash ? (int)(slash - list + 1) : 1, slash ? list : ".");
        Tokenizer own;
        if (!tokenizer_read(&own, beside, err)) return false;
        if (o->tokenizer[0] && own.kind != TOKENIZER_NONE && !tokenizer_same(&own, tok))
            return fail(err,
                        "--tokenizer %s is not the one that made the shards, %s/tokenizer.json; leave it out",
                        o->tokenizer, beside);
        if (!o->tokenizer[0]) {
            *tok = own;
            if (tok->kind != TOKENIZER_NONE) printf("tokenizer: that in %s\n", beside);
        } else {
            tokenizer_free(&own);
        }
    }
    if (tok->kind == TOKENIZER_NONE) {
        tok->vocab_size = o->vocab_size ? o->vocab_size : 50257;
        tok->eos = (int)(o->eos_token >= 0 ? o->eos_token : tok->vocab_size - 1);
    }
    if (tok->kind == TOKENIZER_BYTES && settings_origin(s, "eos-token") == FROM_USER &&
        o->eos_token != tok->eos)
        return fail(err, "--eos-token %lld: text that is read as bytes ends with token %d; leave it out",
                    (long long)o->eos_token, tok->eos);
    if (tok->kind == TOKENIZER_BPE && o->eos_token >= 0) tok->eos = (int)o->eos_token;
    if (tok->kind == TOKENIZER_BPE && tok->eos < 0)
        warn("the tokenizer has none of the usual end tokens, so documents are not told apart; --eos-token "
             "gives one");
    if (tok->eos >= tok->vocab_size)
        return fail(err, "--eos-token %d: the ids of the vocabulary end at %lld", tok->eos,
                    (long long)tok->vocab_size - 1);
    if (o->vocab_size && o->vocab_size < tok->vocab_size && settings_origin(s, "vocab-size") == FROM_USER) {
        if (tok->kind == TOKENIZER_BPE)
            return fail(err, "--vocab-size %lld is too small: the tokenizer has %lld ids",
                        (long long)o->vocab_size, (long long)tok->vocab_size);
        return fail(
            err,
            "--vocab-size %lld is too small: text is read as bytes, which need %lld (256 and the end token)",
            (long long)o->vocab_size, (long long)tok->vocab_size);
    }
    return true;
}

// tokenizer_fit: takes the model's word for its token ids and the end token
static bool tokenizer_fit(Tokenizer* tok, const char* from, const Config* c, Error* err) {
    if (tok->kind != TOKENIZER_NONE && tok->vocab_size > c->vocab_padded)
        return fail(
            err, "%s: tokenizer.json has %lld tokens, the model %lld rows; one of them is of another model",
            from, (long long)tok->vocab_size, (long long)c->vocab_padded);
    if (tok->kind == TOKENIZER_BYTES) return true;
    tok->vocab_size = c->vocab_size;
    if (tok->kind == TOKENIZER_NONE || c->eos_token >= 0) tok->eos = (int)c->eos_token;
    return true;
}

// tokenizer_open: the tokenizer of a model's directory; without one, what the model says of its token ids
static bool tokenizer_open(Tokenizer* tok, const char* dir, const Config* c, Error* err) {
    return tokenizer_read(tok, dir, err) && tokenizer_fit(tok, dir, c, err);
}

// tokenizer_given: --tokenizer for a model of a directory without one (mamba_ssm publishes such)
static bool tokenizer_given(Tokenizer* tok, const char* given, const char* dir, const Config* c, Error* err) {
    if (!given[0]) return true;
    if (tok->kind != TOKENIZER_NONE)
        return fail(err,
                    "--tokenizer %s: %s has a tokenizer.json, and the model goes on with it; leave it out",
                    given, dir);
    return tokenizer_load(tok, given, err) && tokenizer_fit(tok, given, c, err);
}

bool data_open_all(Data* data, const Settings* s, Error* err) {
    const Options* o = &s->o;
    if (o->val_data[0] && o->val_fraction > 0 && settings_origin(s, "val-fraction") == FROM_USER)
        return fail(err, "--val-fraction takes validation data from --data, --val-data names it; give one");
    const char* list = o->data;
    if (!list[0]) list = data->default_list = default_data();
    if (!open_list(&data->train, list, &data->tokenizer, err)) return false;
    if (o->val_data[0]) {
        if (!open_list(&data->val, o->val_data, &data->tokenizer, err)) return false;
        data->has_val = true;
    } else if (o->val_fraction > 0) {
        data->has_val = dataset_split(&data->train, o->val_fraction, &data->val) && data->val.n_tokens > 1;
        if (!data->has_val)
            return fail(
                err,
                "data has %lld tokens, too few to keep a fraction of %g for validation; give more data or "
                "--val-fraction 0",
                (long long)data->train.n_tokens, o->val_fraction);
    }
    return true;
}

void data_close_all(Data* data) {
    tokenizer_free(&data->tokenizer);
    if (data->has_val) dataset_close(&data->val);
    dataset_close(&data->train);
    free(data->default_list);
}

// options_fit_pattern: false for a wrong pattern, or an option of layers that it does not have from the user
static bool options_fit_pattern(const Settings* s, Error* err) {
    static const struct { const char *name, *letters, *layers; } of[] = {
        {"dt-rank", "1", "Mamba-1 (1)"},         {"headdim", "2", "Mamba-2 (2)"},
        {"ngroups", "2", "Mamba-2 (2)"},         {"chunk-size", "2", "Mamba-2 (2)"},
        {"attn-heads", "a", "attention (a)"},    {"attn-heads-kv", "a", "attention (a)"},
        {"attn-head-dim", "a", "attention (a)"}, {"attn-conv", "a", "attention (a)"},
        {"rotary-dim", "a", "attention (a)"},    {"rotary-base", "a", "attention (a)"},
        {"d-intermediate", "m", "MLPs (m)"} };
    if (!pattern_check(s->o.pattern, err)) return false;
    for (size_t i = 0; i < sizeof of / sizeof *of; i++)
        if (settings_origin(s, of[i].name) == FROM_USER && !strpbrk(s->o.pattern, of[i].letters))
            return fail(err,
                        "--%s is of %s, and the pattern %.40s has none; leave it out, or change --pattern",
                        of[i].name, of[i].layers, s->o.pattern);
    return true;
}

// config_from_options: the Config that the model options describe, for a vocabulary of V tokens.
Config config_from_options(const Settings* s, int64_t V, int64_t eos) {
    const Options* o = &s->o;
    Config c;
    memset(&c, 0, sizeof c);
    memcpy(c.pattern, o->pattern,
           min_size(strlen(o->pattern) + 1, sizeof c.pattern));    // too long: no end, refused
    c.n_layer = o->n_layer;
    c.d_model = o->d_model;
    c.d_inner = o->expand * o->d_model;
    c.d_state = o->d_state ? o->d_state : strchr(o->pattern, '2') && !strchr(o->pattern, '1') ? 128 : 16;
    c.d_conv = o->d_conv;
    c.dt_rank = o->dt_rank ? o->dt_rank : (o->d_model + 15) / 16;
    c.d_ssm = c.d_inner;
    c.headdim = o->headdim;
    c.ngroups = o->ngroups;
    c.chunk_size = o->chunk_size;
    c.rmsnorm = true;
    c.dt_high = INFINITY;
    c.A_low = 1;
    c.A_high = 16;
    c.attn_heads = o->attn_heads ? o->attn_heads : (o->d_model + 63) / 64;
    c.attn_heads_kv = o->attn_heads_kv ? o->attn_heads_kv : c.attn_heads;
    c.attn_head_dim = o->attn_head_dim ? o->attn_head_dim : (o->d_model + c.attn_heads - 1) / c.attn_heads;
    c.attn_conv = o->attn_conv;
    c.rotary_dim = o->rotary_dim >= 0 ? o->rotary_dim : c.attn_head_dim / 2 * 2;
    c.rotary_base = o->rotary_base;
    if (strchr(o->pattern, 'm')) {
        c.d_intermediate = o->d_intermediate ? o->d_intermediate : (8 * o->d_model + 2) / 3;
        c.d_intermediate = (c.d_intermediate + 127) / 128 * 128;
    }
    c.vocab_size = V;
    int64_t multiple = strspn(o->pattern, "1m") == strlen(o->pattern) ? 8 : 16;   // as published
    c.vocab_padded = (V + multiple - 1) / multiple * multiple;
    c.tie_embeddings = o->tie_embeddings;
    c.conv_bias = true;
    c.rescale_prenorm_residual = true;
    c.norm_eps = 1e-5;
    c.dt_min = 1e-3;
    c.dt_max = 1e-1;
    c.dt_init_floor = 1e-4;
    c.dt_scale = 1;
    c.initializer_range = 0.02;
    c.eos_token = eos;
    return c;
}

// model_from_checkpoint: the opened model of a directory, its tokenizer, nothing read yet. dir: in --from,
// out its
// checkpoint
static bool model_from_checkpoint(Model* m, SafeTensors* st, Tokenizer* tok, const char* from, char dir[4096],
                                  Error* err) {
    return checkpoint_resolve(from, dir, 4096, err) && checkpoint_open(m, st, dir, err) &&
           tokenizer_open(tok, dir, &m->config, err);
}

// model_option_given: the first option that describes a new model and was given by the user, -1: none
static int model_option_given(const Settings* s) {
    int first = option_find("preset"), last = option_find("tie-embeddings");
    for (int i = first; i <= last; i++) if (s->origin[i] == FROM_USER) return i;
    return -1;
}

// settings_from_config: shows, and saves for a resumed run, what --from says of the model: an option that is
// called like a field of the configuration has its value. E / D is no option when it is not whole.
static void settings_from_config(Settings* s, const Config* c) {
    const struct { const char* name; int64_t value; } number[] = {
        {"vocab-size", c->vocab_size}, {"eos-token", c->eos_token}, {"expand", c->d_inner / c->d_model} };
    Error unused;
    char text[96], name[64];
    for (size_t i = 0; i < sizeof number / sizeof *number; i++) {
        snprintf(text, sizeof text, "%lld", (long long)number[i].value);
        option_set(s, option_find(number[i].name), text, FROM_CHECKPOINT, &unused);
    }
    for (int i = 0; i < N_CONFIG_FIELDS; i++) {
        const ConfigField* f = config_fields + i;
        snprintf(name, sizeof name, "%s", f->name);
        for (char* p = name; *p; p++) if (*p == '_') *p = '-';
        if (option_find(name) < 0 || !config_has(c, f)) continue;
        config_text(text, c, f);
        if (f->kind == CONFIG_BOOL) snprintf(text, sizeof text, *text == 't' ? "on" : "off");
        option_set(s, option_find(name), text, FROM_CHECKPOINT, &unused);
    }
    option_set(s, option_find("pattern"), c->pattern, FROM_CHECKPOINT, &unused);
}

// freeze_tensors: marks the tensors whose names match one of the patterns of --freeze (`*` is any text)
bool freeze_tensors(Model* m, const char* list, Error* err) {
    size_t count = 0;
    int n = 0, n_patterns;
    char** patterns = list_split(list, &n_patterns);
    bool ok = true;
    for (int k = 0; k < n_patterns && ok; k++) {
        int matches = 0;
        for (int i = 0; i < m->n_tensors; i++)
            if (fnmatch(patterns[k], m->tensor[i].name, 0) == 0) m->tensor[i].frozen = true, matches++;
        if (!matches)
            ok = fail(err, "--freeze '%.100s' matches no tensor; names are such as %s, `info` lists them, "
                      "and * stands for any text", patterns[k], m->tensor[m->n_tensors / 2].name);
    }
    free(patterns);
    for (int i = 0; i < m->n_tensors; i++) if (m->tensor[i].frozen) n++, count += m->tensor[i].count;
    if (ok && n == m->n_tensors) ok = fail(err, "--freeze: all tensors are frozen, nothing is left to train");
    if (ok && n) printf("frozen: %d of %d tensors, %zu of %zu parameters\n", n, m->n_tensors, count,
                        m->n_params);
    return ok;
}

// model_to_half: keeps the weight matrices in bfloat16 (rounded to nearest, ties to even) instead of `real`.
// Only the forward of inference works after that; the memory of the matrices goes back to the system.
void model_to_half(Model* m) {
    uint16_t* bits = (uint16_t*)xcalloc(m->n_elements, sizeof(uint16_t));
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor* t = &m->tensor[i];
        if (!(t->spec->flags & DECAY)) continue;
        real* p = m->params + t->offset;
        #pragma omp parallel for
        for (size_t j = 0; j < t->count; j++) {
            size_t I = (size_t)t->shape[1], at = t->offset + j / I * I + half_at(j % I, I);
            bits[at] = narrow_float((double)(float)p[j], 8, 7);
        }
        uintptr_t begin = ((uintptr_t)p + page - 1) / page * page;
        uintptr_t end = (uintptr_t)(p + t->count) / page * page;
        if (begin < end) madvise((void*)begin, end - begin, MADV_DONTNEED);
    }
    m->half.from = m->params;
    m->half.bits = bits;
}

// workspace_fits: whether the plan can be counted at all. The bound, 64 fields of every width per token and
// layer, is generous; what exceeds it would wrap around in size_t.
static bool workspace_fits(const Model* m, int64_t B, int64_t T) {
    const Config* c = &m->config;
    int64_t width = c->d_model + c->d_inner * (1 + c->d_state) + c->dt_rank + c->d_intermediate +
                    c->vocab_padded + c->ngroups * (8 * SSD_CHUNK + 2 * c->d_state) + c->attn_mlp +
                    c->attn_head_dim * (c->attn_heads + 2 * c->attn_heads_kv);
    int64_t dims[] = {B, T, m->n_layers + 1, 64, width};
    size_t bytes;
    return checked_size(5, dims, sizeof(real), &bytes);
}

// other_backend: makes the backend of --device cuda; set by the main of train_mamba.cu
Backend (*other_backend)(const Options*, Model*, size_t B, size_t T, bool training, int recompute) = NULL;

static bool on_cpu(const Options* o) { return !other_backend || strcmp(o->device, "cpu") == 0; }

Backend backend_create(const Options* o, Model* m, size_t B, size_t T, bool training, int recompute) {
    Backend b = on_cpu(o) ? backend_cpu(m, B, T, training, recompute)
                          : other_backend(o, m, B, T, training, recompute);
    if (!training || !o->carry_state) return b;
    size_t accum = (size_t)o->grad_accum;
    b.carry_in = (State*)xcalloc(accum, sizeof(State));
    b.carry_out = (State*)xcalloc(accum, sizeof(State));
    for (size_t i = 0; i < accum; i++) {
        b.carry_in[i] = state_alloc(m, B);
        b.carry_out[i] = state_alloc(m, B);
    }
    return b;
}

static double mib(double bytes) { return bytes / 1048576.0; }

// Flop: floating-point operations per token of a training step (forward and twice as much backward)
//   matmul   6 x the elements of every weight matrix that a token is multiplied with: all projections and the
//            head (of a tied embedding the head alone; looking up a row computes nothing). Attention: scores
//            and weighted sums of the T/2 tokens that a token of a row of T sees on average, 6 T Hq dh
//   scan     25 per state of every channel: 7 forward (dt A, exp, dt x B, multiply and add h, multiply and
//   add C h), 18 backward (the forward's again, and 11 for the gradients). Mamba-2: 12 per state (x B and
//   C H, three times) and, within chunks of Q tokens of which half are seen, 3 Q per channel and number of B.
// The utilization of a device (MFU) is matmul flop / time / the device's rate in matmuls, as is usual. The
// figure 6 N per token that others quote counts every parameter N, the embedding too.
typedef struct { double matmul, scan; } Flop;

Flop flop_per_token(const Model* m, int64_t T) {
    Flop f = {0, 0};
    const Config* c = &m->config;
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor* t = &m->tensor[i];
        bool lookup = t->spec->init == INIT_EMBEDDING && !c->tie_embeddings;
        if (t->ndim == 2 && (t->spec->flags & DECAY) && !lookup) f.matmul += 6.0 * (double)t->count;
        if (t->spec->init == INIT_A_LOG) f.scan += 25.0 * (double)t->count;
        if (t->spec->init == INIT_A_UNIFORM)
            f.scan += 12.0 * (double)(c->d_ssm * c->d_state) +
                      3.0 * (double)c->chunk_size * (double)(c->d_ssm + c->ngroups * c->d_state);
    }
    for (int l = 0; l < m->n_layers; l++)
        if (m->layer[l].kind->letter == 'a')
            f.matmul += 6.0 * (double)T * (double)(c->attn_heads * c->attn_head_dim);
    return f;
}

