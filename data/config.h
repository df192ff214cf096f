// config.h: what a Config may be, whether it came from options or from a file, and config.json.
//
//   1. Checks
//   2. config.json          in the words of Hugging Face and of mamba_ssm
//
// Uses safetensors.h: Text, fail_line, read_text, read and write of small files.

// ---------------------------------------------------------------------------------------------------
// 1. Checks

// add_count: total += a*b*c, false when that leaves [0, 2^40)
static bool add_count(int64_t* total, int64_t a, int64_t b, int64_t c) {
    int64_t dim[3] = {a, b, c};
    size_t n;
    if (!checked_size(3, dim, 1, &n) || n >= (size_t)1 << 40) return false;
    *total += (int64_t)n;
    return *total < (int64_t)1 << 40;
}

typedef struct { const char* name; int64_t value, low, high; } Range;

static bool check_ranges(const Range* range, size_t n, Error* err) {
    for (size_t i = 0; i < n; i++)
        if (range[i].value < range[i].low || range[i].value > range[i].high)
            return fail(err, "%s is %lld, expected %lld .. %lld", range[i].name, (long long)range[i].value,
                        (long long)range[i].low, (long long)range[i].high);
    return true;
}

// what Mamba-2 layers rely on. Conditions on numbers with fractions are written so that NaN fails.
static bool config_check_mamba2(const Config* c, Error* err) {
    const Range range[] = {
        {"d_ssm", c->d_ssm, 1, c->d_inner},   {"headdim (--headdim)", c->headdim, 1, c->d_ssm},
        {"ngroups", c->ngroups, 1, c->d_ssm}, {"chunk_size", c->chunk_size, 1, 65536} };
    if (!check_ranges(range, sizeof range / sizeof *range, err)) return false;
    if (c->d_ssm % c->headdim != 0)
        return fail(err, "d_ssm is %lld, expected a multiple of headdim (--headdim), %lld",
                    (long long)c->d_ssm, (long long)c->headdim);
    if (c->d_ssm / c->headdim % c->ngroups != 0)
        return fail(err, "%lld heads (d_ssm %lld, headdim %lld) cannot be shared by %lld groups",
                    (long long)(c->d_ssm / c->headdim), (long long)c->d_ssm, (long long)c->headdim,
                    (long long)c->ngroups);
    if (!(c->dt_low >= 0 && c->dt_low <= c->dt_high))
        return fail(err, "dt_limit is %g .. %g, expected 0 <= low <= high", c->dt_low, c->dt_high);
    if (!(c->A_low > 0 && c->A_low <= c->A_high && c->A_high <= 1e6))
        return fail(err, "A_init_range is %g .. %g, expected 0 < low <= high <= 1e6", c->A_low, c->A_high);
    return (c->conv_init >= 0 && c->conv_init <= 1000) ||
           fail(err, "conv_init is %g, expected 0 .. 1000", c->conv_init);
}

static bool config_check_attention(const Config* c, Error* err) {
    const Range range[] = {
        {"attention heads", c->attn_heads, 1, 65536}, {"KV heads", c->attn_heads_kv, 1, c->attn_heads},
        {"attention head_dim", c->attn_head_dim, 1, 256},
        {"attention d_conv", c->attn_conv, 0, 8},     {"attention mlp_dim", c->attn_mlp, 0, INT32_MAX},
        {"rotary_emb_dim", c->rotary_dim, 0, c->attn_head_dim}, {"context", c->context, 0, MAX_CONTEXT} };
    if (!check_ranges(range, sizeof range / sizeof *range, err)) return false;
    if (c->attn_heads % c->attn_heads_kv != 0)
        return fail(err, "%lld attention heads cannot share %lld KV heads", (long long)c->attn_heads,
                    (long long)c->attn_heads_kv);
    if (c->rotary_dim % 2 != 0)
        return fail(err, "rotary_emb_dim (--rotary-dim) is %lld, expected an even number",
                    (long long)c->rotary_dim);
    if (c->attn_mlp % 2 != 0)
        return fail(err, "mlp_dim is %lld, expected an even number", (long long)c->attn_mlp);
    if (!(c->rotary_base > 0 && c->rotary_base <= 1e12))
        return fail(err, "rotary_emb_base is %g, expected above 0, at most 1e12", c->rotary_base);
    return (c->softmax_scale >= 0 && c->softmax_scale <= 1e6) ||
           fail(err, "softmax_scale is %g, expected 0 (1/sqrt(head_dim)) .. 1e6", c->softmax_scale);
}

// pattern_check: mixers, each with at most one m after it
static bool pattern_check(const char* pattern, Error* err) {
    const size_t room = sizeof ((Config*)0)->pattern, letters = strnlen(pattern, room);
    if (letters == 0 || letters == room)
        return fail(err, "the pattern has %zu letters, expected 1 .. %zu", letters, room - 1);
    for (size_t i = 0; i < letters; i++) {
        unsigned char letter = (unsigned char)pattern[i];
        if (!strchr("12am", letter))
            return fail(err, "pattern: letter '%c' at position %zu is not known; known are 1 (Mamba-1), "
                        "2 (Mamba-2), a (attention) and m (gated MLP)",
                        letter > 32 && letter < 127 ? letter : '?', i);
        if (letter == 'm' && (i == 0 || pattern[i - 1] == 'm'))
            return fail(err, "pattern \"%s\": an m must follow a mixer, like 1m", pattern);
    }
    return true;
}

// config_check: every size that the rest of the program relies on, whether it came from options or from a
// file.
bool config_check(const Config* c, Error* err) {
    const Range range[] = {
        {"n_layer", c->n_layer, 1, 65536},          {"d_model", c->d_model, 1, INT32_MAX},
        {"d_inner", c->d_inner, 1, INT32_MAX},      {"d_state", c->d_state, 1, 256},
        {"d_conv", c->d_conv, 1, 8},                {"dt_rank", c->dt_rank, 1, INT32_MAX},
        {"d_intermediate", c->d_intermediate, 0, INT32_MAX}, {"vocab_size", c->vocab_size, 1, INT32_MAX},
        {"vocab_padded", c->vocab_padded, c->vocab_size, INT32_MAX},
        {"eos_token", c->eos_token, -1, c->vocab_padded - 1} };
    if (!check_ranges(range, sizeof range / sizeof *range, err)) return false;
    if (!pattern_check(c->pattern, err)) return false;
    if ((strchr(c->pattern, 'm') != NULL) != (c->d_intermediate > 0))
        return fail(err,
                    "pattern \"%s\" and d_intermediate %lld do not agree: d_intermediate is the width of m, "
                    "0 without m",
                    c->pattern, (long long)c->d_intermediate);
    // conditions are written so that NaN fails
    if (!(c->norm_eps > 0 && c->norm_eps <= 1))
        return fail(err, "norm_eps is %g, expected above 0, at most 1", c->norm_eps);
    if (!(c->dt_min > 0 && c->dt_min <= c->dt_max && c->dt_max <= 1000))
        return fail(err, "dt_min %g and dt_max %g: expected 0 < dt_min <= dt_max <= 1000", c->dt_min,
                    c->dt_max);
    if (!(c->dt_init_floor >= 0 && c->dt_init_floor <= 1000))
        return fail(err, "dt_init_floor is %g, expected 0 .. 1000", c->dt_init_floor);
    if (!(c->dt_scale > 0 && c->dt_scale <= 1000))
        return fail(err, "dt_scale is %g, expected above 0, at most 1000", c->dt_scale);
    if (!(c->initializer_range >= 0 && c->initializer_range <= 1000))
        return fail(err, "initializer_range is %g, expected 0 .. 1000", c->initializer_range);
    if ((strchr(c->pattern, '2') && !config_check_mamba2(c, err)) ||
        (strchr(c->pattern, 'a') && !config_check_attention(c, err)))
        return false;
    // parameters of the largest block. Mamba-1: (D,2E) in_proj, (E,D) out_proj, (E,K) conv, (R+2N,E) x_proj,
    // (E,R) dt_proj, (E,N) A_log, vectors; Mamba-2: in_proj and conv grow by 2GN+H; attention; MLP 3DF
    int64_t D = c->d_model, E = c->d_inner, R = c->dt_rank, N = c->d_state, block = 0, total = 0;
    bool fits = !strchr(c->pattern, '2') || (add_count(&block, D + c->d_conv, 2 * c->ngroups, N) &&
                                             add_count(&block, D, c->d_ssm, 1));
    fits = fits && (!strchr(c->pattern, 'a') ||
                    (add_count(&block, 2 * (D + c->attn_conv + 2), c->attn_head_dim,
                               c->attn_heads + 2 * c->attn_heads_kv) &&
                     add_count(&block, 2, D, c->attn_mlp)));
    fits = fits && add_count(&block, 3, D, E) && add_count(&block, E, c->d_conv, 1) &&
                add_count(&block, 2, R, E) && add_count(&block, 3, N, E) && add_count(&block, 5, E, 1) &&
                add_count(&block, 3, D, 1) && add_count(&block, 3, D, c->d_intermediate) &&
                add_count(&total, c->n_layer, block, 1) &&
                add_count(&total, c->tie_embeddings ? 1 : 2, c->vocab_padded, D);
    return fits ||
           fail(err, "n_layer %lld, d_model %lld, d_inner %lld, vocabulary %lld: more than 2^40 parameters",
                (long long)c->n_layer, (long long)D, (long long)E, (long long)c->vocab_padded);
}

// ---------------------------------------------------------------------------------------------------
// 2. config.json
//
// Four dialects: Hugging Face's of Mamba-1 (model_type "mamba") and of Mamba-2 ("mamba2"), and mamba_ssm's
// (d_model, ssm_cfg), whose ssm_cfg.layer says which Mamba all blocks are, except those that attn_layer_idx
// lists as attention. Some published files mix dialects. What a dialect has no word for is in one extra
// object, "ssm_c", so that our own files come back exactly.

enum { CONFIG_INT, CONFIG_REAL, CONFIG_BOOL, CONFIG_PAIR };          // PAIR: two doubles, [low, high]
enum { CONFIG_OR_NULL = 4 };                                         // added: null means the default
enum { DIALECT_MAMBA, DIALECT_MAMBA2, DIALECT_HF, DIALECT_HF2 };     // of mamba_ssm and of Hugging Face
enum { MAX_CONFIG = 128 << 10 };

// One row per field of Config that is written as it is. NULL: the dialect has no such key, and the value goes
// to ssm_c. mixers: the letters of the pattern that have this field; in a model without them it is neither
// read nor written. The first three rows are read before the pattern is known.
typedef struct { const char *name, *hf, *mamba, *mixers; int kind; size_t offset; } ConfigField;
#define CONFIG_AT(field) offsetof(Config, field)
static const ConfigField config_fields[] = {
    {"n_layer", "num_hidden_layers", "n_layer", "12a", CONFIG_INT, CONFIG_AT(n_layer)},
    {"d_model", "hidden_size", "d_model", "12a", CONFIG_INT, CONFIG_AT(d_model)},
    {"d_intermediate", NULL, "d_intermediate", "12a", CONFIG_INT, CONFIG_AT(d_intermediate)},
    {"tie_embeddings", "tie_word_embeddings", "tie_embeddings", "12a", CONFIG_BOOL,
     CONFIG_AT(tie_embeddings)},
    {"rescale_prenorm_residual", NULL, NULL, "12a", CONFIG_BOOL, CONFIG_AT(rescale_prenorm_residual)},
    {"norm_eps", "layer_norm_epsilon", NULL, "12a", CONFIG_REAL, CONFIG_AT(norm_eps)},
    {"initializer_range", "initializer_range", NULL, "12a", CONFIG_REAL, CONFIG_AT(initializer_range)},

    {"d_state", "state_size", "ssm_cfg.d_state", "12", CONFIG_INT, CONFIG_AT(d_state)},
    {"d_conv", "conv_kernel", "ssm_cfg.d_conv", "12", CONFIG_INT, CONFIG_AT(d_conv)},
    {"d_inner", "intermediate_size", NULL, "12", CONFIG_INT, CONFIG_AT(d_inner)},
    {"bias", "use_bias", "ssm_cfg.bias", "12", CONFIG_BOOL, CONFIG_AT(bias)},
    {"conv_bias", "use_conv_bias", "ssm_cfg.conv_bias", "12", CONFIG_BOOL, CONFIG_AT(conv_bias)},
    {"dt_min", "time_step_min", "ssm_cfg.dt_min", "12", CONFIG_REAL, CONFIG_AT(dt_min)},
    {"dt_max", "time_step_max", "ssm_cfg.dt_max", "12", CONFIG_REAL, CONFIG_AT(dt_max)},
    {"dt_init_floor", "time_step_floor", "ssm_cfg.dt_init_floor", "12", CONFIG_REAL,
     CONFIG_AT(dt_init_floor)},
    {"dt_rank", "time_step_rank", "ssm_cfg.dt_rank", "1", CONFIG_INT, CONFIG_AT(dt_rank)},
    {"dt_scale", "time_step_scale", "ssm_cfg.dt_scale", "1", CONFIG_REAL, CONFIG_AT(dt_scale)},

    {"headdim", "head_dim", "ssm_cfg.headdim", "2", CONFIG_INT, CONFIG_AT(headdim)},
    {"ngroups", "n_groups", "ssm_cfg.ngroups", "2", CONFIG_INT, CONFIG_AT(ngroups)},
    {"chunk_size", "chunk_size", "ssm_cfg.chunk_size", "2", CONFIG_INT, CONFIG_AT(chunk_size)},
    {"dt_limit", "time_step_limit", "ssm_cfg.dt_limit", "2", CONFIG_PAIR, CONFIG_AT(dt_low)},
    {"d_ssm", NULL, "ssm_cfg.d_ssm", "2", CONFIG_INT + CONFIG_OR_NULL, CONFIG_AT(d_ssm)},
    {"D_has_hdim", NULL, "ssm_cfg.D_has_hdim", "2", CONFIG_BOOL, CONFIG_AT(D_has_hdim)},
    {"rmsnorm", NULL, "ssm_cfg.rmsnorm", "2", CONFIG_BOOL, CONFIG_AT(rmsnorm)},
    {"norm_before_gate", NULL, "ssm_cfg.norm_before_gate", "2", CONFIG_BOOL, CONFIG_AT(norm_before_gate)},
    {"A_init_range", NULL, "ssm_cfg.A_init_range", "2", CONFIG_PAIR, CONFIG_AT(A_low)},
    {"conv_init", NULL, "ssm_cfg.conv_init", "2", CONFIG_REAL + CONFIG_OR_NULL, CONFIG_AT(conv_init)},

    {"attn_heads", NULL, "attn_cfg.num_heads", "a", CONFIG_INT, CONFIG_AT(attn_heads)},
    {"attn_heads_kv", NULL, "attn_cfg.num_heads_kv", "a", CONFIG_INT + CONFIG_OR_NULL,
     CONFIG_AT(attn_heads_kv)},
    {"attn_head_dim", NULL, "attn_cfg.head_dim", "a", CONFIG_INT + CONFIG_OR_NULL,
     CONFIG_AT(attn_head_dim)},
    {"attn_mlp", NULL, "attn_cfg.mlp_dim", "a", CONFIG_INT, CONFIG_AT(attn_mlp)},
    {"attn_conv", NULL, "attn_cfg.d_conv", "a", CONFIG_INT, CONFIG_AT(attn_conv)},
    {"attn_in_bias", NULL, "attn_cfg.qkv_proj_bias", "a", CONFIG_BOOL, CONFIG_AT(attn_in_bias)},
    {"attn_out_bias", NULL, "attn_cfg.out_proj_bias", "a", CONFIG_BOOL, CONFIG_AT(attn_out_bias)},
    {"rotary_dim", NULL, "attn_cfg.rotary_emb_dim", "a", CONFIG_INT, CONFIG_AT(rotary_dim)},
    {"rotary_base", NULL, "attn_cfg.rotary_emb_base", "a", CONFIG_REAL, CONFIG_AT(rotary_base)},
    {"rotary_interleaved", NULL, "attn_cfg.rotary_emb_interleaved", "a", CONFIG_BOOL,
     CONFIG_AT(rotary_interleaved)},
    {"softmax_scale", NULL, "attn_cfg.softmax_scale", "a", CONFIG_REAL + CONFIG_OR_NULL,
     CONFIG_AT(softmax_scale)},
};
enum { N_CONFIG_FIELDS = sizeof config_fields / sizeof *config_fields, N_CONFIG_FIRST = 3 };
static_assert(offsetof(Config, dt_high) == offsetof(Config, dt_low) + sizeof(double) &&
              offsetof(Config, A_high) == offsetof(Config, A_low) + sizeof(double), "a pair is two doubles");

static bool config_has(const Config* c, const ConfigField* f) {
    return strpbrk(c->pattern, f->mixers) != NULL;
}

size_t config_field_size(const ConfigField* f) {
    return f->kind == CONFIG_BOOL ? sizeof(bool) : f->kind == CONFIG_PAIR ? 2 * sizeof(double) : 8;
}

// Published configs contain the bare words Infinity and NaN (time_step_limit), which are not JSON: they
// become strings of the same length, which only config_real takes for numbers.
static void quote_bare_words(char* text) {
    static const char* const words[3][2] = {
        {"-Infinity", "\"-inf\"   "}, {"Infinity", "\"inf\"   "}, {"NaN", "\"?\""}};
    bool quoted = false;
    for (char* p = text; *p; p++) {
        if (*p == '"') quoted = !quoted;
        else if (quoted && *p == '\\' && p[1]) p++;
        for (int i = 0; i < 3 && !quoted; i++) {
            size_t n = strlen(words[i][0]);
            if (strncmp(p, words[i][0], n) != 0) continue;
            memcpy(p, words[i][1], n);
            p += n - 1;
            break;
        }
    }
}

// config_key: a key of the file, "ssm_cfg.x" meaning x inside ssm_cfg; NULL when it is absent
static const json_t* config_key(const json_t* root, const char* key) {
    const char* dot = key ? strchr(key, '.') : NULL;
    char group[16];
    if (dot) {
        snprintf(group, sizeof group, "%.*s", (int)(dot - key), key);
        root = json_object_get(root, group);
        key = dot + 1;
    }
    return key ? json_object_get(root, key) : NULL;
}

static bool config_int(const json_t* value, int64_t* out) {
    if (json_is_integer(value)) *out = json_integer_value(value);
    return json_is_integer(value);
}

// config_real: a number. infinite: Infinity is one too, bare or as newer transformers write it,
// {"__float__": "Infinity"}
static bool config_real(const json_t* value, double* out, bool infinite) {
    const char* word = json_string_value(json_object_get(value, "__float__"));
    bool endless = infinite && ((word && strcmp(word, "Infinity") == 0) ||
                                (json_is_string(value) && strcmp(json_string_value(value), "inf") == 0));
    if (endless) *out = INFINITY;
    else if (json_is_number(value)) *out = json_number_value(value);
    return endless || json_is_number(value);
}

static bool config_value(const ConfigField* f, const json_t* value, const char* key, Config* c,
                         const char* path, Error* err) {
    static const char* const expected[] = {"an integer", "a finite number", "true or false",
                                           "a list of two numbers"};
    void* out = (char*)c + f->offset;
    int kind = f->kind & (CONFIG_OR_NULL - 1);
    if ((f->kind & CONFIG_OR_NULL) && json_is_null(value)) return true;       // stays at its default
    if (kind == CONFIG_INT && config_int(value, (int64_t*)out)) return true;
    if (kind == CONFIG_INT && strcmp(f->name, "dt_rank") == 0 && json_is_string(value) &&
        strcmp(json_string_value(value), "auto") == 0) return true;   // stays -1, resolved when D is known
    if (kind == CONFIG_REAL && config_real(value, (double*)out, false)) return true;
    if (kind == CONFIG_BOOL && json_is_boolean(value)) { *(bool*)out = json_is_true(value); return true; }
    if (kind == CONFIG_PAIR && json_array_size(value) == 2 &&
        config_real(json_array_get(value, 0), (double*)out, false) &&
        config_real(json_array_get(value, 1), (double*)out + 1, true)) return true;
    return fail_line(err, "%s: \"%s\" is not %s", path, key, expected[kind]);
}

// config_dialect: which of the four this is: model_type names those of Hugging Face, ssm_cfg.layer those of
// mamba_ssm (absent: Mamba-1)
static bool config_dialect(const json_t* root, int* dialect, const char* path, Error* err) {
    const json_t* type = json_object_get(root, "model_type");
    const json_t* layer = config_key(root, "ssm_cfg.layer");
    static const char* const objects[] = {"ssm_cfg", "attn_cfg", "ssm_c"};
    if (!type && !json_object_get(root, "d_model"))
        return fail_line(err, "%s: neither \"model_type\" nor \"d_model\": not the config of a Mamba model",
                         path);
    for (int i = 0; i < 3; i++)
        if (json_object_get(root, objects[i]) && !json_is_object(json_object_get(root, objects[i])))
            return fail_line(err, "%s: \"%s\" is not an object", path, objects[i]);
    const char* key = type ? "model_type" : "ssm_cfg.layer";
    const char* word = type ? json_string_value(type) : layer ? json_string_value(layer) : "Mamba1";
    static const struct { const char* word; int dialect; } words[] = {
        {"mamba", DIALECT_HF}, {"mamba2", DIALECT_HF2}, {"Mamba1", DIALECT_MAMBA},
            {"Mamba2", DIALECT_MAMBA2}};
    *dialect = -1;
    for (int i = type ? 0 : 2; i < (type ? 2 : 4) && word; i++)
        if (strcmp(word, words[i].word) == 0) *dialect = words[i].dialect;
    return *dialect >= 0 ||
           fail_line(err, "%s: \"%s\" is \"%.60s\", expected \"%s\" or \"%s\"", path, key,
                     word ? word : "not a string", type ? "mamba" : "Mamba1", type ? "mamba2" : "Mamba2");
}

// config_refuse: keys that mean an architecture which is not this one. transformers' Mamba-2 has the keys
// rms_norm and norm_before_gate and does not look at them: it normalizes always, and after the gate.
static bool config_refuse(const json_t* root, int dialect, const char* path, Error* err) {
    bool hf = dialect == DIALECT_HF || dialect == DIALECT_HF2;
    if (hf && json_array_size(json_object_get(root, "attn_layer_idx")) > 0)
        return fail_line(err, "%s: \"attn_layer_idx\" is not empty: model_type \"%s\" has no attention", path,
                         json_string_value(json_object_get(root, "model_type")));
    if (dialect != DIALECT_HF2 && json_is_false(json_object_get(root, "rms_norm")))
        return fail_line(err, "%s: \"rms_norm\" is false: LayerNorm is not supported, only RMSNorm", path);
    const json_t* act = json_object_get(root, "hidden_act");
    if (act && (!json_is_string(act) || strcmp(json_string_value(act), "silu") != 0))
        return fail_line(err, "%s: \"hidden_act\" is not \"silu\"", path);
    return true;
}

// config_attention: what attn_cfg must say of attention layers, and what the other numbers default to
static bool config_attention(Config* c, const json_t* root, const char* path, Error* err) {
    const json_t* scaled = config_key(root, "attn_cfg.rotary_emb_scale_base");
    if (!json_is_true(config_key(root, "attn_cfg.causal")))      // the default is false
        return fail_line(err, "%s: \"attn_cfg.causal\" is not true: only causal attention is supported",
                         path);
    if (scaled && !json_is_null(scaled))
        return fail_line(err, "%s: \"attn_cfg.rotary_emb_scale_base\" is not supported", path);
    if (c->attn_heads < 1)
        return fail_line(err, "%s: \"attn_cfg.num_heads\" is missing or below 1", path);
    if (c->attn_heads_kv == -1) c->attn_heads_kv = c->attn_heads;
    if (c->attn_head_dim == -1 && c->d_model % c->attn_heads != 0)
        return fail_line(err, "%s: \"attn_cfg.head_dim\" is missing, %lld heads do not share d_model %lld",
                         path, (long long)c->attn_heads, (long long)c->d_model);
    if (c->attn_head_dim == -1) c->attn_head_dim = c->d_model / c->attn_heads;
    // mamba_ssm rounds the width of the MLP beside the heads up to a multiple of 256; ours is exact
    if (!config_key(root, "ssm_c.attn_mlp") && c->attn_mlp > 0 && c->attn_mlp < INT32_MAX)
        c->attn_mlp += -c->attn_mlp & 255;
    return true;
}

// config_pattern: ours, or what attn_layer_idx and d_intermediate describe: the shortest pattern that occurs
// at least twice (layers 3, 7 and 11 of 12 being attention is 222a), or else a letter for every layer
static bool config_pattern(Config* c, const json_t* root, int dialect, const char* path, Error* err) {
    const json_t* ours = config_key(root, "ssm_c.pattern");
    const json_t* list = json_object_get(root, "attn_layer_idx");
    char block[sizeof c->pattern];
    size_t n = 1, mlp = c->d_intermediate > 0;
    if (ours) {
        if (!json_is_string(ours) || json_string_length(ours) >= sizeof c->pattern)
            return fail_line(err, "%s: \"ssm_c.pattern\" is not a string of at most %zu letters", path,
                             sizeof c->pattern - 1);
        snprintf(c->pattern, sizeof c->pattern, "%s", json_string_value(ours));
        return true;
    }
    memset(block, dialect == DIALECT_MAMBA || dialect == DIALECT_HF ? '1' : '2', sizeof block);
    if (list && !json_is_array(list) && !json_is_null(list))
        return fail_line(err, "%s: \"attn_layer_idx\" is not a list", path);
    if (json_array_size(list) > 0 && (c->n_layer < 1 || (size_t)c->n_layer >= sizeof block))
        return fail_line(err, "%s: attention in some of %lld layers: at most %zu layers are supported", path,
                         (long long)c->n_layer, sizeof block - 1);
    for (size_t i = 0; i < json_array_size(list); i++) {
        int64_t at = -1;
        if (!config_int(json_array_get(list, i), &at) || at < 0 || at >= c->n_layer || block[at] == 'a')
            return fail_line(err, "%s: \"attn_layer_idx\"[%zu] is not an integer in 0 .. %lld, each once",
                             path, i, (long long)c->n_layer - 1);
        block[at] = 'a';
    }
    if (json_array_size(list) > 0) {
        size_t layers = (size_t)c->n_layer;
        while (2 * n <= layers && memcmp(block, block + n, layers - n) != 0) n++;
        if (2 * n > layers) n = layers;
    }
    if (n * (1 + mlp) >= sizeof c->pattern)
        return fail_line(err, "%s: \"attn_layer_idx\" and \"d_intermediate\" make a pattern of %zu letters, "
                         "at most %zu are supported", path, n * (1 + mlp), sizeof c->pattern - 1);
    for (size_t i = 0; i < n; i++) {
        c->pattern[i * (1 + mlp)] = block[i];
        if (mlp) c->pattern[2 * i + 1] = 'm';
    }
    c->pattern[n * (1 + mlp)] = 0;
    return true;
}

// config_special: what needs more than a row of the table: the vocabulary, expand, dt_rank, the heads, the
// end token
static bool config_special(Config* c, const json_t* root, int dialect, const char* path, Error* err) {
    const json_t* ours = json_object_get(root, "ssm_c");
    const json_t* value = json_object_get(root, "expand");
    bool hf = dialect == DIALECT_HF || dialect == DIALECT_HF2;
    double expand = 2;
    if (!value || !hf)
        value = config_key(root, "ssm_cfg.expand") ? config_key(root, "ssm_cfg.expand") : value;
    if (value) expand = json_is_number(value) ? json_number_value(value) : -1;
    if (c->d_inner == -1) {   // not given: int(expand * D), as both references compute it
        if (!(expand > 0 && expand <= 1e6 && expand * (double)c->d_model < 0x1p53))
            return fail_line(err, "%s: \"expand\" is not a positive number (times d_model below 2^53)", path);
        c->d_inner = (int64_t)(expand * (double)c->d_model);
    }
    if (c->dt_rank == -1) c->dt_rank = c->d_model / 16 + (c->d_model % 16 > 0);
    if (c->d_ssm == -1) c->d_ssm = c->d_inner;
    if (dialect == DIALECT_HF2 && strchr(c->pattern, '2')) {
        int64_t heads = 128;   // the class default
        value = json_object_get(root, "num_heads");
        if ((value && !config_int(value, &heads)) || heads < 1 || heads > INT32_MAX || c->headdim < 1 ||
            c->headdim > INT32_MAX || heads * c->headdim != c->d_ssm)
            return fail_line(err, "%s: \"num_heads\" (128 when absent) times \"head_dim\" (64) is not the "
                             "inner width, %lld", path, (long long)c->d_ssm);
    }
    if (!strchr(c->pattern, 'a')) c->attn_heads = c->attn_heads_kv = c->attn_head_dim = 0;
    else if (!config_attention(c, root, path, err)) return false;
    if (!config_int(json_object_get(root, "vocab_size"), &c->vocab_size))
        return fail_line(err, "%s: \"vocab_size\" is missing or not an integer", path);
    c->vocab_padded = c->vocab_size;
    int64_t multiple = 8;
    value = json_object_get(root, "pad_vocab_size_multiple");
    if (!hf) {   // the number of tokens; Hugging Face's is the number of rows, already padded
        if ((value && !config_int(value, &multiple)) || multiple < 1 || multiple > INT32_MAX ||
            c->vocab_size > INT32_MAX)
            return fail_line(err, "%s: \"vocab_size\" or \"pad_vocab_size_multiple\" is not in 1 .. 2^31-1",
                             path);
        c->vocab_padded = (c->vocab_size + multiple - 1) / multiple * multiple;
    }
    if ((value = json_object_get(ours, "vocab_size")) && !config_int(value, &c->vocab_size))
        return fail_line(err, "%s: \"ssm_c.vocab_size\" is not an integer", path);
    // the class defaults of Hugging Face; mamba_ssm leaves it to the tokenizer
    c->eos_token = dialect == DIALECT_HF ? 0 : dialect == DIALECT_HF2 ? 2 : -1;
    value = json_object_get(json_object_get(ours, "eos_token_id") ? ours : root, "eos_token_id");
    if (json_is_array(value)) value = json_array_get(value, 0);
    if (json_is_null(value)) c->eos_token = -1;
    else if (value && !config_int(value, &c->eos_token))
        return fail_line(err, "%s: \"eos_token_id\" is not an integer", path);
    const json_t* scheme = hf ? json_object_get(root, "time_step_init_scheme")
                              : config_key(root, "ssm_cfg.dt_init");
    const char* init = strchr(c->pattern, '1') ? json_string_value(scheme) : NULL;     // Mamba-2 has none
    c->dt_init_constant = init && strcmp(init, "constant") == 0;
    if (init && !c->dt_init_constant && strcmp(init, "random") != 0)
        return fail_line(err, "%s: the initialization of dt is \"%.60s\", expected random or constant", path,
                         init);
    // mamba_ssm rounds the width of the MLP up to a multiple of 128; ours is exact
    bool round_up = !hf && !json_object_get(ours, "d_intermediate");
    if (round_up && c->d_intermediate > 0 && c->d_intermediate < INT32_MAX)
        c->d_intermediate += -c->d_intermediate & 127;
    return true;
}

// config_defaults: those of the classes that write the dialect. -1: follows from others, see config_special
static void config_defaults(Config* c, int dialect) {
    bool hf = dialect == DIALECT_HF || dialect == DIALECT_HF2;
    memset(c, 0, sizeof *c);
    c->n_layer = c->d_model = c->d_inner = c->dt_rank = c->d_ssm = -1;
    c->d_state = dialect == DIALECT_MAMBA2 || dialect == DIALECT_HF2 ? 128 : 16;
    c->d_conv = 4;
    c->tie_embeddings = dialect != DIALECT_HF2;
    c->conv_bias = true;
    c->rescale_prenorm_residual = !hf;
    c->norm_eps = 1e-5;
    c->dt_min = 1e-3, c->dt_max = 1e-1, c->dt_init_floor = 1e-4, c->dt_scale = 1;
    c->initializer_range = hf ? 0.1 : 0.02;
    c->headdim = 64, c->ngroups = hf ? 8 : 1, c->chunk_size = 256;
    c->rmsnorm = true;
    c->dt_high = INFINITY;
    c->A_low = 1, c->A_high = 16;
    c->attn_heads = c->attn_heads_kv = c->attn_head_dim = -1;
    c->attn_in_bias = c->attn_out_bias = true;
    c->rotary_base = 10000;
}

// config_parse: the parsed file into c
static bool config_parse(Config* c, const json_t* root, const char* path, Error* err) {
    if (!json_is_object(root)) return fail_line(err, "%s: expected a JSON object", path);
    int dialect = 0;
    if (!config_dialect(root, &dialect, path, err) || !config_refuse(root, dialect, path, err)) return false;
    bool hf = dialect == DIALECT_HF || dialect == DIALECT_HF2;
    config_defaults(c, dialect);
    for (int i = 0; i < N_CONFIG_FIELDS; i++) {
        const ConfigField* f = config_fields + i;
        if (i == N_CONFIG_FIRST && !config_pattern(c, root, dialect, path, err)) return false;
        if (i >= N_CONFIG_FIRST && !config_has(c, f)) continue;
        const char* keys[3] = {hf ? f->hf : f->mamba, hf ? f->mamba : f->hf, f->name};
        const json_t* value = NULL;
        int k = 0;
        for (; k < 3 && !value; k++)
            value = config_key(k == 2 ? json_object_get(root, "ssm_c") : root, keys[k]);
        if (value && !config_value(f, value, keys[k - 1], c, path, err)) return false;
        if (!value && i < 2) return fail_line(err, "%s: \"%s\" is missing", path, keys[0]);
    }
    if (!config_special(c, root, dialect, path, err)) return false;
    Error why;
    return config_check(c, &why) || fail_line(err, "%s: %s", path, why.text);
}

// config_read: dir/config.json, checked by config_check; one line names the key that is wrong or not
// supported
bool config_read(Config* c, const char* dir, Error* err) {
    char path[4096];
    size_t size = 0;
    if (!join_path(path, sizeof path, dir, "config.json", err)) return false;
    char* text = read_text(path, MAX_CONFIG, &size, err);
    if (!text) return false;
    bool binary = memchr(text, 0, size) != NULL;
    if (!binary) quote_bare_words(text);
    json_error_t e;
    json_t* root = binary ? NULL : json_loadb(text, strlen(text), JSON_REJECT_DUPLICATES, &e);
    free(text);
    bool ok = root     ? config_parse(c, root, path, err)
              : binary ? fail_line(err, "%s: not a text file (NUL byte)", path)
                       : fail_line(err, "%s: not valid JSON at line %d: %s", path, e.line, e.text);
    json_decref(root);
    return ok;
}

// real_text: the shortest decimal that reads back as the same double
static const char* real_text(char out[40], double value) {
    bool whole = value == floor(value) && fabs(value) < 1e15;
    if (whole) snprintf(out, 40, "%.1f", value);
    else snprintf(out, 40, "Infinity");               // not JSON, but what Python reads and writes
    for (int precision = 1; precision <= 17 && isfinite(value) && !whole; precision++) {
        snprintf(out, 40, "%.*g", precision, value);
        if (strtod(out, NULL) == value) break;
    }
    return out;
}

// config_text: the value of a field, as JSON
const char* config_text(char out[96], const Config* c, const ConfigField* f) {
    const void* value = (const char*)c + f->offset;
    const double* number = (const double*)value;
    char low[40], high[40];
    switch (f->kind & (CONFIG_OR_NULL - 1)) {
        case CONFIG_INT:  snprintf(out, 96, "%lld", (long long)*(const int64_t*)value); break;
        case CONFIG_REAL: snprintf(out, 96, "%s", real_text(low, *number)); break;
        case CONFIG_BOOL: snprintf(out, 96, "%s", *(const bool*)value ? "true" : "false"); break;
        case CONFIG_PAIR:
            snprintf(out, 96, "[%s, %s]", real_text(low, number[0]), real_text(high, number[1]));
    }
    return out;
}

// config_implied: an absent key says the same in every dialect, and some programs do not know it (mamba_ssm
// before 2.2) or JSON has no word for the value (infinity, None)
static bool config_implied(const Config* c, const ConfigField* f, bool strict) {
    switch (f->offset) {
        case CONFIG_AT(d_intermediate): return strict && !c->d_intermediate;
        case CONFIG_AT(tie_embeddings): return strict && c->tie_embeddings;
        case CONFIG_AT(d_ssm):          return c->d_ssm == c->d_inner;
        case CONFIG_AT(conv_init):      return c->conv_init == 0;
        case CONFIG_AT(softmax_scale):  return c->softmax_scale == 0;
        case CONFIG_AT(dt_low):         return c->dt_low == 0 && c->dt_high == INFINITY;
    }
    return false;
}

// add_fields: one group of rows: the top of a dialect (""), its "ssm_cfg." and "attn_cfg.", or "ssm_c."
static void add_fields(Text* text, const Config* c, bool hf, bool strict, const char* group) {
    bool ours = strcmp(group, "ssm_c.") == 0;
    for (int i = 0; i < N_CONFIG_FIELDS; i++) {
        const ConfigField* f = config_fields + i;
        const char* key = hf ? f->hf : f->mamba;
        const char* dot = key ? strchr(key, '.') : NULL;
        size_t prefix = dot ? (size_t)(dot + 1 - key) : 0;
        // the two widths that mamba_ssm rounds up
        bool exact = ours && (f->offset == CONFIG_AT(d_intermediate) || f->offset == CONFIG_AT(attn_mlp));
        bool here = ours ? !key || exact
                         : key && prefix == strlen(group) && strncmp(key, group, prefix) == 0;
        if (!here || !config_has(c, f) || config_implied(c, f, strict)) continue;
        char value[96];
        text_add(text, "%s\"%s\": %s", *group ? ", " : ",\n  ", ours ? f->name : key + prefix,
                 config_text(value, c, f));
    }
}

static bool pattern_is_all(const Config* c, const char* letters) {
    return strspn(c->pattern, letters) == strlen(c->pattern);
}

// config_fits: can this dialect (transformers', or mamba_ssm's) say all of the configuration that the result
// of the model depends on?
static bool config_fits(const Config* c, bool hf, Error* err) {
    size_t mlps = 0;
    for (const char* p = c->pattern; *p; p++) mlps += *p == 'm';
    if (hf) {
        Error unused;
        const char* advice = config_fits(c, false, &unused) ? "; try --dialect mamba_ssm" : "";
        if (mlps)
            return fail(err, "pattern %s: transformers has no Mamba with MLPs%s", c->pattern, advice);
        if (!pattern_is_all(c, "1") && !pattern_is_all(c, "2"))
            return fail(err, "pattern %s: transformers has models of Mamba-1 alone and of Mamba-2 alone%s",
                        c->pattern, advice);
        const char* what = *c->pattern == '1'            ? NULL
                           : c->d_ssm != c->d_inner      ? "d_ssm below the inner width"
                           : c->D_has_hdim               ? "one D per channel (D_has_hdim)"
                           : !c->rmsnorm                 ? "no norm after the gate (rmsnorm false)"
                           : c->norm_before_gate         ? "the norm before the gate"
                           : c->d_inner % c->d_model     ? "an expand that is not whole" : NULL;
        return !what || fail(err, "transformers' Mamba-2 does not have %s%s", what, advice);
    }
    if (strchr(c->pattern, '1') && strchr(c->pattern, '2'))
        return fail(err, "pattern %s: mamba_ssm has no models with both Mamba-1 and Mamba-2", c->pattern);
    if (mlps && 2 * mlps != strlen(c->pattern))
        return fail(err, "pattern %s: mamba_ssm has an MLP in every block or in none", c->pattern);
    if (strchr(c->pattern, 'a') && c->n_layer >= (int64_t)sizeof c->pattern)
        return fail(err, "pattern %s: attention in some of %lld layers, expected at most %zu", c->pattern,
                    (long long)c->n_layer, sizeof c->pattern - 1);
    if (c->d_intermediate % 128 != 0)
        return fail(err, "d_intermediate is %lld, mamba_ssm only has multiples of 128",
                    (long long)c->d_intermediate);
    if (strchr(c->pattern, 'a') && c->attn_mlp % 256 != 0)
        return fail(err, "the attention's mlp_dim is %lld, mamba_ssm only has multiples of 256",
                    (long long)c->attn_mlp);
    return c->norm_eps == 1e-5 ||
        fail(err, "norm_eps is %g, mamba_ssm only has 1e-5%s", c->norm_eps,
             pattern_is_all(c, "1") || pattern_is_all(c, "2") ? "; try --dialect hf" : "");
}

// config_is_hf: the dialect of our own checkpoints: transformers' where it fits, else mamba_ssm's
static bool config_is_hf(const Config* c) {
    Error unused;
    return config_fits(c, true, &unused);
}

// add_attention_layers: which blocks are attention, and what all of them look like
static void add_attention_layers(Text* text, const Config* c) {
    const char *p = c->pattern, *comma = "";
    text_add(text, ",\n  \"attn_layer_idx\": [");
    for (int64_t i = 0; i < c->n_layer; i++) {
        if (*p == 'a') text_add(text, "%s%lld", comma, (long long)i), comma = ", ";
        do p = p[1] ? p + 1 : c->pattern; while (*p == 'm');
    }
    text_add(text, "]");
}

static void add_expand(Text* text, const Config* c) {
    double expand = (double)c->d_inner / (double)c->d_model;   // chosen so that int(expand * D) is E again
    while ((int64_t)(expand * (double)c->d_model) < c->d_inner) expand = nextafter(expand, INFINITY);
    char digits[40];
    if (c->d_inner % c->d_model == 0) text_add(text, "%lld", (long long)(c->d_inner / c->d_model));
    else text_add(text, "%s", real_text(digits, expand));
}

// config_to_json: DIALECT_HF: transformers' of this pattern; DIALECT_MAMBA: the keys of mamba_ssm alone,
// because it refuses all others; -1: for our own checkpoints, whichever fits, and ssm_c with what it has no
// word for. dtype: of the weights, as PyTorch calls it. The text is to be freed; NULL when memory is out.
char* config_to_json(const Config* c, int dialect, const char* dtype) {
    bool hf = dialect == DIALECT_HF || (dialect < 0 && config_is_hf(c)), strict = dialect == DIALECT_MAMBA;
    bool mamba1 = strchr(c->pattern, '1') != NULL;
    Text text = {NULL, 0, 0, false};
    char eos[32] = "null";
    if (c->eos_token >= 0) snprintf(eos, sizeof eos, "%lld", (long long)c->eos_token);
    int64_t multiple = 1;   // the smallest usual one that gives Vp, or Vp itself
    while (multiple <= 256 && (c->vocab_size + multiple - 1) / multiple * multiple != c->vocab_padded)
        multiple *= 2;
    if (multiple > 256) multiple = c->vocab_padded;
    if (hf) {
        text_add(&text, "{\n  \"architectures\": [\"%sForCausalLM\"],\n  \"model_type\": \"%s\"",
                 mamba1 ? "Mamba" : "Mamba2", mamba1 ? "mamba" : "mamba2");
        text_add(&text, ",\n  \"torch_dtype\": \"%s\",\n  \"vocab_size\": %lld", dtype,
                 (long long)c->vocab_padded);
    } else {
        text_add(&text, "{\n  \"vocab_size\": %lld", (long long)c->vocab_size);
        text_add(&text, ",\n  \"pad_vocab_size_multiple\": %lld", (long long)multiple);
    }
    add_fields(&text, c, hf, strict, "");
    const char* init = c->dt_init_constant ? "constant" : "random";
    if (hf) {
        text_add(&text, ",\n  \"expand\": ");
        add_expand(&text, c);
        if (mamba1) text_add(&text, ",\n  \"time_step_init_scheme\": \"%s\"", init);
        else text_add(&text, ",\n  \"num_heads\": %lld", (long long)(c->d_ssm / c->headdim));
        text_add(&text, ",\n  \"hidden_act\": \"silu\"");
        // transformers draws out_proj anew after loading when this is true: it must be false beside trained
        // weights
        text_add(&text, ",\n  \"rescale_prenorm_residual\": false");
        text_add(&text, ",\n  \"residual_in_fp32\": true,\n  \"use_cache\": true");
    } else {
        text_add(&text, ",\n  \"ssm_cfg\": {");
        if (!mamba1) text_add(&text, "\"layer\": \"Mamba2\", ");       // absent: Mamba-1
        else text_add(&text, "\"dt_init\": \"%s\", ", init);
        text_add(&text, "\"expand\": ");
        add_expand(&text, c);
        add_fields(&text, c, hf, strict, "ssm_cfg.");
        text_add(&text, "}");
        if (strchr(c->pattern, 'a')) {
            if (strict) add_attention_layers(&text, c);        // ours has the pattern
            text_add(&text, ",\n  \"attn_cfg\": {\"causal\": true");
            add_fields(&text, c, hf, strict, "attn_cfg.");
            text_add(&text, "}");
        }
        text_add(&text,
                 ",\n  \"rms_norm\": true,\n  \"residual_in_fp32\": true,\n  \"fused_add_norm\": true");
    }
    if (!strict) {
        text_add(&text, ",\n  \"bos_token_id\": %s,\n  \"eos_token_id\": %s,\n  \"pad_token_id\": %s", eos,
                 eos,
                 eos);
        text_add(&text, ",\n  \"ssm_c\": {\"pattern\": \"%s\", \"vocab_size\": %lld, \"eos_token_id\": %s",
                 c->pattern, (long long)c->vocab_size, eos);
        add_fields(&text, c, hf, strict, "ssm_c.");
        text_add(&text, "}");
    }
    text_add(&text, "\n}\n");
    if (text.failed) { free(text.data); return NULL; }
    return text.data;
}

bool config_write(const Config* c, int dialect, const char* dtype, const char* dir, Error* err) {
    Error why;
    if (!config_check(c, &why) || (dialect >= 0 && !config_fits(c, dialect == DIALECT_HF, &why)))
        return fail_line(err, "%s/config.json: not written: %s", dir, why.text);
    char* text = config_to_json(c, dialect, dtype);
    bool ok = text ? checkpoint_write_text(dir, "config.json", text, err)
                   : fail_line(err, "%s: out of memory", dir);
    free(text);
    return ok;
}
