// Options: one table for the parser, the help, the settings print and the table in README.

// WORD_ALL: those that have a model
enum { WORD_TRAIN = 1, WORD_GENERATE = 2, WORD_EVAL = 4, WORD_INFO = 8, WORD_CONVERT = 16, WORD_ALL = 31,
       WORD_TOKENIZE = 32 };
static const char* const words[] = {"train", "generate", "eval", "info", "convert", "tokenize"};
enum { N_WORDS = sizeof words / sizeof *words };

typedef struct {
    // model
    const char *preset, *pattern;
    int64_t d_model, n_layer, expand, d_state, d_conv, dt_rank, d_intermediate, vocab_size, eos_token;
    int64_t headdim, ngroups, chunk_size;
    int64_t attn_heads, attn_heads_kv, attn_head_dim, attn_conv, rotary_dim;
    double rotary_base;
    bool tie_embeddings;
    // data
    const char *data, *val_data, *tokenizer;
    double val_fraction;
    int64_t seq_len, batch_size, grad_accum;
    bool carry_state, reset_documents, force_data;
    // optimizer
    int64_t steps, warmup, decay_steps;
    const char* schedule;
    double lr, min_lr, weight_decay, dropout, beta1, beta2, eps, clip;
    // run
    uint64_t seed;
    const char *out, *from, *on_nan, *dialect, *dtype, *freeze;
    const char *device, *precision;
    int64_t check, threads, log_every, eval_every, eval_batches, save_every, keep, sample_every;
    int recompute;           // RECOMPUTE_NONE, _CHEAP, _ALL
    bool resume;
    // generation
    const char *prompt, *prompt_file, *prompts, *stop, *save_state, *load_state, *state_dtype;
    int64_t num_samples, max_tokens, top_k, chunk, context;
    double temperature, top_p, min_p, repetition_penalty;
    bool raw, interactive;
    // evaluation
    const char *dump_logits, *task, *results;
    int64_t window, stride;
} Options;

enum { FROM_DEFAULT, FROM_PRESET, FROM_CHECKPOINT, FROM_USER };     // where a value comes from, weakest first

// Option: one row. type: i integer, f number, s text, c one of the choices in `choices`, b switch, m switch
// with the positions in `choices` (stored as their number), l list of texts. A list is stored as its items
// separated by newlines.
typedef struct {
    const char* name;
    char type;
    size_t offset;
    int words;
    const char* value;           // default, as text
    double min, max;
    const char *choices, *help;
} Option;

#define OPT(field) offsetof(Options, field)
#define BIG 9e15
static const Option options[] = {
    {NULL, 0, 0, WORD_ALL, NULL, 0, 0, NULL, "Model"},
    {"preset", 's', OPT(preset), WORD_ALL, "", 0, 0, NULL,
     "a named set of options, listed below; other options override it"},
    {"pattern", 's', OPT(pattern), WORD_ALL, "1", 0, 0, NULL,
     "one letter per sub-layer, repeated over the blocks: 1 Mamba-1, 2 Mamba-2, a attention, m gated MLP "
     "after a mixer"},
    {"n-layer", 'i', OPT(n_layer), WORD_ALL, "4", 1, 10000, NULL, "blocks"},
    {"d-model", 'i', OPT(d_model), WORD_ALL, "192", 1, 1e6, NULL, "width of the residual stream, D"},
    {"expand", 'i', OPT(expand), WORD_ALL, "2", 1, 64, NULL, "inner width E = expand * D"},
    {"d-state", 'i', OPT(d_state), WORD_ALL, "0", 0, 256, NULL,
     "state size per channel, N; 0: 16, for Mamba-2 without Mamba-1 128"},
    {"d-conv", 'i', OPT(d_conv), WORD_ALL, "4", 1, CONV_MAX_TAPS, NULL, "taps of the causal convolution, K"},
    {"dt-rank", 'i', OPT(dt_rank), WORD_ALL, "0", 0, 1e6, NULL,
     "rank of the dt projection, R; 0: D/16 rounded up"},
    {"headdim", 'i', OPT(headdim), WORD_ALL, "64", 1, 1e6, NULL, "Mamba-2: channels per head, P"},
    {"ngroups", 'i', OPT(ngroups), WORD_ALL, "1", 1, 1e6, NULL,
     "Mamba-2: groups of heads that share B and C, G"},
    {"chunk-size", 'i', OPT(chunk_size), WORD_ALL, "256", 1, 65536, NULL,
     "Mamba-2: tokens per chunk, Q; the result depends on it by rounding only"},
    {"attn-heads", 'i', OPT(attn_heads), WORD_ALL, "0", 0, 65536, NULL, "attention heads; 0: D/64"},
    {"attn-heads-kv", 'i', OPT(attn_heads_kv), WORD_ALL, "0", 0, 65536, NULL,
     "heads of keys and values, shared by the others; 0: as many"},
    {"attn-head-dim", 'i', OPT(attn_head_dim), WORD_ALL, "0", 0, 65536, NULL,
     "width of an attention head; 0: D / heads"},
    {"attn-conv", 'i', OPT(attn_conv), WORD_ALL, "0", 0, CONV_MAX_TAPS, NULL,
     "taps of a convolution over queries, keys and values; 0: none"},
    {"rotary-dim", 'i', OPT(rotary_dim), WORD_ALL, "-1", -1, 65536, NULL,
     "numbers of each head that carry the position (rotary embedding); -1: all, 0: none"},
    {"rotary-base", 'f', OPT(rotary_base), WORD_ALL, "10000", 1e-3, 1e12, NULL,
     "base of the wavelengths of the rotary embedding"},
    {"d-intermediate", 'i', OPT(d_intermediate), WORD_ALL, "0", 0, 1e7, NULL,
     "hidden width of the gated MLP, rounded up to 128; 0: 8/3 D"},
    {"vocab-size", 'i', OPT(vocab_size), WORD_ALL, "0", 0, 1e9, NULL,
     "tokens; 0: 257 for text (bytes and the end token), 50257 for token shards"},
    {"eos-token", 'i', OPT(eos_token), WORD_ALL | WORD_TOKENIZE, "-1", -1, 1e9, NULL,
     "id of the end token in token shards; -1: that of the tokenizer, or the last of the vocabulary"},
    {"tie-embeddings", 'b', OPT(tie_embeddings), WORD_ALL, "on", 0, 0, NULL,
     "the head uses the embedding matrix"},
    {NULL, 0, 0, WORD_TRAIN | WORD_GENERATE | WORD_EVAL | WORD_TOKENIZE, NULL, 0, 0, NULL, "Data"},
    {"data", 'l', OPT(data), WORD_TRAIN | WORD_EVAL | WORD_TOKENIZE, "", 0, 0, NULL,
     "text files (read as bytes without a tokenizer) or .bin token shards, patterns allowed; none: this "
     "program's source"},
    {"tokenizer", 's', OPT(tokenizer), WORD_TRAIN | WORD_GENERATE | WORD_EVAL | WORD_TOKENIZE, "", 0, 0, NULL,
     "a tokenizer.json or a directory with one; none: that of the checkpoint; for a new model bytes for "
     "text, the tokenizer.json beside token shards"},
    {"val-data", 'l', OPT(val_data), WORD_TRAIN, "", 0, 0, NULL,
     "validation files; none: the end of the training data"},
    {"val-fraction", 'f', OPT(val_fraction), WORD_TRAIN | WORD_TOKENIZE, "0.1", 0, 0.9, NULL,
     "part of the data, at its end, that is used for validation only"},
    {"seq-len", 'i', OPT(seq_len), WORD_TRAIN | WORD_EVAL, "256", 1, 1e8, NULL, "tokens per row, T"},
    {"batch-size", 'i', OPT(batch_size), WORD_TRAIN | WORD_EVAL, "8", 1, 1e6, NULL,
     "rows per forward and backward pass, B"},
    {"grad-accum", 'i', OPT(grad_accum), WORD_TRAIN, "1", 1, 1e6, NULL, "passes per optimizer step"},
    {"carry-state", 'b', OPT(carry_state), WORD_TRAIN, "off", 0, 0, NULL,
     "rows continue where the previous step ended, with its state (truncated BPTT)"},
    {"reset-documents", 'b', OPT(reset_documents), WORD_TRAIN | WORD_EVAL, "on", 0, 0, NULL,
     "the end token starts a new document: conv and state are reset there"},
    {"force-data", 'b', OPT(force_data), WORD_TRAIN, "off", 0, 0, NULL,
     "resume although the data files changed"},
    {NULL, 0, 0, WORD_TRAIN, NULL, 0, 0, NULL, "Optimizer"},
    {"steps", 'i', OPT(steps), WORD_TRAIN, "1000", 1, BIG, NULL, "optimizer steps"},
    {"lr", 'f', OPT(lr), WORD_TRAIN, "3e-3", 0, 1e9, NULL, "peak learning rate"},
    {"min-lr", 'f', OPT(min_lr), WORD_TRAIN, "1e-4", 0, 1e9, NULL,
     "learning rate at the end of the schedule"},
    {"schedule", 'c', OPT(schedule), WORD_TRAIN, "cosine", 0, 0, "constant linear cosine wsd",
     "after the warmup; wsd is warmup, stable, decay"},
    {"warmup", 'i', OPT(warmup), WORD_TRAIN, "20", 0, BIG, NULL, "steps of linear warmup"},
    {"decay-steps", 'i', OPT(decay_steps), WORD_TRAIN, "0", 0, BIG, NULL,
     "wsd only: steps of decay at the end; 0: a fifth of all"},
    {"weight-decay", 'f', OPT(weight_decay), WORD_TRAIN, "0.1", 0, 1e3, NULL,
     "AdamW, on embedding and projection weights only"},
    {"dropout", 'f', OPT(dropout), WORD_TRAIN, "0", 0, 0.9, NULL,
     "part of the embedding and of what each layer adds that a training step zeroes, against overfitting"},
    {"beta1", 'f', OPT(beta1), WORD_TRAIN, "0.9", 0, 0.999999, NULL, "AdamW"},
    {"beta2", 'f', OPT(beta2), WORD_TRAIN, "0.95", 0, 0.999999999, NULL, "AdamW"},
    {"eps", 'f', OPT(eps), WORD_TRAIN, "1e-8", 0, 1, NULL, "AdamW"},
    {"freeze", 'l', OPT(freeze), WORD_TRAIN, "", 0, 0, NULL,
     "names of tensors that stay as they are, such as '*.mixer.A_log' (`info` lists the names)"},
    {"clip", 'f', OPT(clip), WORD_TRAIN, "1", 0, 1e9, NULL, "largest norm of the gradient; 0: no clipping"},
    {NULL, 0, 0, WORD_ALL | WORD_TOKENIZE, NULL, 0, 0, NULL, "Run"},
    {"out", 's', OPT(out), WORD_TRAIN | WORD_CONVERT | WORD_TOKENIZE, "out", 0, 0, NULL,
     "directory of checkpoints, log and plot; of the converted model; of the shards"},
    {"resume", 'b', OPT(resume), WORD_TRAIN, "off", 0, 0, NULL,
     "continue from out/last, with its settings unless given anew"},
    {"from", 's', OPT(from), WORD_ALL, "", 0, 0, NULL,
     "model directory: published, or a run's for its last checkpoint; none: out, for train a new model"},
    {"dialect", 'c', OPT(dialect), WORD_CONVERT, "hf", 0, 0, "hf mamba_ssm",
     "form of the converted model: that of transformers, or of mamba_ssm"},
    {"dtype", 'c', OPT(dtype), WORD_CONVERT | WORD_GENERATE, "f32", 0, 0, "f32 f16 bf16",
     "of the weight matrices, everything else stays f32: as convert writes them; as generate keeps them on "
     "the CPU (f32 or bf16), which reads all of them for every token"},
    {"seed", 'u', OPT(seed), WORD_ALL, "1337", 0, 0, NULL, "of initialization, data order and sampling"},
#ifdef __CUDACC__
    {"device", 'c', OPT(device), WORD_ALL, "cuda", 0, 0, "cuda cpu", "where the model runs"},
    {"precision", 'c', OPT(precision), WORD_ALL, "bf16", 0, 0, "bf16 fp32",
     "of activations and matmuls on the GPU; parameters, residual stream and sums are fp32, and states, but "
     "see --state-dtype"},
    {"check", 'i', OPT(check), WORD_TRAIN, "0", 0, BIG, NULL,
     "steps between comparisons of the GPU with the CPU, on a few tokens of the batch; 0: none"},
#endif
    {"threads", 'i', OPT(threads), WORD_ALL | WORD_TOKENIZE, "0", 0, 4096, NULL,
     "CPU threads; 0: all. The results do not depend on it"},
    {"recompute", 'm', OPT(recompute), WORD_TRAIN, "off", 0, 0, "off cheap on",
     "save memory in backward: cheap makes norm, conv and dt again, on keeps only the input of each layer "
     "and "
     "runs it again"},
    {"log-every", 'i', OPT(log_every), WORD_TRAIN, "10", 1, BIG, NULL, "steps between progress lines"},
    {"eval-every", 'i', OPT(eval_every), WORD_TRAIN, "100", 0, BIG, NULL,
     "steps between evaluations; 0: at the end only"},
    {"eval-batches", 'i', OPT(eval_batches), WORD_TRAIN | WORD_EVAL, "0", 0, BIG, NULL,
     "batches per evaluation; 0: the whole validation data"},
    {"save-every", 'i', OPT(save_every), WORD_TRAIN, "0", 0, BIG, NULL,
     "steps between checkpoints; 0: at the end, and at each best validation loss"},
    {"keep", 'i', OPT(keep), WORD_TRAIN, "2", 1, 1e6, NULL, "newest checkpoints that stay, besides the best"},
    {"sample-every", 'i', OPT(sample_every), WORD_TRAIN, "0", 0, BIG, NULL,
     "steps between samples; 0: at the end only"},
    {"on-nan", 'c', OPT(on_nan), WORD_TRAIN, "stop", 0, 0, "stop skip",
     "non-finite loss or gradient: stop, or skip at most 3 steps in a row"},
    {NULL, 0, 0, WORD_TRAIN | WORD_GENERATE, NULL, 0, 0, NULL, "Generation"},
    {"prompt", 's', OPT(prompt), WORD_TRAIN | WORD_GENERATE, "", 0, 0, NULL,
     "text to continue, repeated in front of a single sample; none: the start of a document; - reads "
     "standard input (generate only)"},
    {"prompt-file", 's', OPT(prompt_file), WORD_GENERATE, "", 0, 0, NULL, "read the prompt from a file"},
    {"prompts", 's', OPT(prompts), WORD_GENERATE, "", 0, 0, NULL,
     "continue many prompts at once: a file with one in each line, or JSON lines {\"prompt\": ...}"},
    {"interactive", 'b', OPT(interactive), WORD_GENERATE, "off", 0, 0, NULL,
     "after the prompt, read lines from standard input and go on after each, with the state of all before"},
    {"stop", 's', OPT(stop), WORD_GENERATE, "", 0, 0, NULL,
     "a text that ends a sample, which does not contain it"},
    {"num-samples", 'i', OPT(num_samples), WORD_GENERATE, "1", 1, 65536, NULL,
     "independent continuations of each prompt"},
    {"max-tokens", 'i', OPT(max_tokens), WORD_TRAIN | WORD_GENERATE, "400", 0, BIG, NULL,
     "new tokens per sample"},
    {"temperature", 'f', OPT(temperature), WORD_TRAIN | WORD_GENERATE, "0.8", 0, 1e30, NULL,
     "0: always the most likely token"},
    {"top-k", 'i', OPT(top_k), WORD_TRAIN | WORD_GENERATE, "0", 0, BIG, NULL,
     "keep the k most likely tokens; 0: all, 1: always the most likely"},
    {"top-p", 'f', OPT(top_p), WORD_TRAIN | WORD_GENERATE, "1", 0, 1, NULL,
     "keep the best tokens that together reach this probability; 0 or 1: all"},
    {"min-p", 'f', OPT(min_p), WORD_TRAIN | WORD_GENERATE, "0", 0, 1, NULL,
     "keep tokens with this part of the best one's probability; 0: all"},
    {"repetition-penalty", 'f', OPT(repetition_penalty), WORD_TRAIN | WORD_GENERATE, "1", 1e-3, 1e3, NULL,
     "weakens tokens already in the text; 1: off"},
    {"chunk", 'i', OPT(chunk), WORD_GENERATE, "256", 1, 1e6, NULL,
     "tokens of the prompt per pass; the result depends on it by rounding at most (see README)"},
    {"context", 'i', OPT(context), WORD_GENERATE, "4096", 1, MAX_CONTEXT, NULL,
     "with --interactive: tokens of the conversation that attention layers can keep; otherwise counted"},
    {"save-state", 's', OPT(save_state), WORD_GENERATE, "", 0, 0, NULL,
     "write the recurrent state after the prompt to a file"},
    {"load-state", 's', OPT(load_state), WORD_GENERATE, "", 0, 0, NULL,
     "continue from such a file; a prompt is appended"},
    {"state-dtype", 'c', OPT(state_dtype), WORD_GENERATE, "f32", 0, 0, "f32 bf16",
     "of the states of Mamba layers from token to token; bf16 halves what the GPU keeps and moves of them "
     "(the CPU rounds them, too, but keeps them as f32); a state in a file is f32"},
    {"raw", 'b', OPT(raw), WORD_GENERATE, "off", 0, 0, NULL,
     "write bytes as they are instead of replacing invalid UTF-8"},
    {NULL, 0, 0, WORD_EVAL, NULL, 0, 0, NULL, "Evaluation"},
    {"dump-logits", 's', OPT(dump_logits), WORD_EVAL, "", 0, 0, NULL,
     "write inputs and logits of the first batch to a safetensors file"},
    {"task", 'c', OPT(task), WORD_EVAL, "loss", 0, 0, "loss text lambada choice",
     "loss of rows as in training; of a whole text, each token after all before it; last words or multiple "
     "choice "
     "from JSON lines in --data, see data/evaluation.h"},
    {"window", 'i', OPT(window), WORD_EVAL, "0", 0, 1e8, NULL,
     "task text: tokens per window; 0: the state is carried over the whole text"},
    {"stride", 'i', OPT(stride), WORD_EVAL, "0", 0, 1e8, NULL,
     "tokens from window to window, the last ones of each, which it scores; 0: all"},
    {"results", 's', OPT(results), WORD_EVAL, "", 0, 0, NULL, "write what was measured to a new JSON file"},
};
enum { N_OPTIONS = sizeof(options) / sizeof(options[0]) };

// A preset is a list of options, read by the same parser.
typedef struct { const char *name, *help, *text; } Preset;
static const Preset presets[] = {
    {"tiny", "1.0M parameters, the default", "--n-layer 4 --d-model 192"},
    {"shakespeare-cpu", "nanoGPT's CPU setting: 0.7M parameters, batch 12, context 64, 2000 steps",
     "--data data/tinyshakespeare.txt --n-layer 6 --d-model 128 --batch-size 12 --seq-len 64 --steps 2000 "
     "--lr 2e-3 --warmup 100 --eval-every 250"},
    {"shakespeare-gpu", "9.7M parameters, context 256, 4 epochs with dropout; seconds on a GPU",
     "--data data/tinyshakespeare.txt --n-layer 10 --d-model 384 --batch-size 8 --seq-len 256 --steps 1900 "
     "--lr 3e-3 --warmup 80 --weight-decay 1 --beta2 0.99 --dropout 0.2 --eval-every 200"},
    {"mamba-130m", "published size", "--n-layer 24 --d-model 768 --vocab-size 50277 --eos-token 0"},
    {"mamba-370m", "published size", "--n-layer 48 --d-model 1024 --vocab-size 50277 --eos-token 0"},
    {"mamba-790m", "published size", "--n-layer 48 --d-model 1536 --vocab-size 50277 --eos-token 0"},
    {"mamba-1.4b", "published size", "--n-layer 48 --d-model 2048 --vocab-size 50277 --eos-token 0"},
    {"mamba-2.8b", "published size", "--n-layer 64 --d-model 2560 --vocab-size 50277 --eos-token 0"},
    {"mamba2-130m", "published size",
     "--pattern 2 --n-layer 24 --d-model 768 --vocab-size 50277 --eos-token 0"},
    {"mamba2-370m", "published size",
     "--pattern 2 --n-layer 48 --d-model 1024 --vocab-size 50277 --eos-token 0"},
    {"mamba2-780m", "published size",
     "--pattern 2 --n-layer 48 --d-model 1536 --vocab-size 50277 --eos-token 0"},
    {"mamba2-1.3b", "published size",
     "--pattern 2 --n-layer 48 --d-model 2048 --vocab-size 50277 --eos-token 0"},
    {"mamba2-2.7b", "published size",
     "--pattern 2 --n-layer 64 --d-model 2560 --vocab-size 50277 --eos-token 0"},
    {"mamba2attn-2.7b", "published size: attention in blocks 9, 18, 27, 36, 45, 56",
     "--pattern 222222222a22222222a22222222a22222222a22222222a2222222222a2222222 --n-layer 64 --d-model 2560 "
     "--attn-heads 30 --attn-head-dim 128 --attn-conv 4 --rotary-dim 64 --vocab-size 50277 --eos-token 0"},
};
enum { N_PRESETS = sizeof(presets) / sizeof(presets[0]) };

// Settings: the parsed options with, for each, its text and where it comes from.
typedef struct {
    int word;                          // WORD_TRAIN, ...
    Options o;
    char* text[N_OPTIONS];
    int origin[N_OPTIONS];
    bool validation_changed;           // a resumed run measures its validation loss in another way
} Settings;

// edit_distance: Levenshtein, to name the option that was probably meant
static int edit_distance(const char* a, const char* b) {
    int row[64], n = (int)strlen(b);
    if (n > 62) return 99;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; *a; a++, i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int change = diagonal + (*a != b[j - 1]), other = 1 + (row[j] < row[j - 1] ? row[j] : row[j - 1]);
            diagonal = row[j];
            row[j] = change < other ? change : other;
        }
    }
    return row[n];
}

// choice_of: the position of `value` in a list of words, -1: not there
static int choice_of(const char* choices, const char* value) {
    size_t n = strlen(value);
    int i = 0;
    for (const char* c = choices; *c; c += strcspn(c, " "), c += *c == ' ', i++)
        if (strcspn(c, " ") == n && strncmp(c, value, n) == 0) return i;
    return -1;
}

static int option_find(const char* name) {
    for (int i = 0; i < N_OPTIONS; i++)
        if (options[i].name && strcmp(options[i].name, name) == 0) return i;
    return -1;
}

// nearest_option: NULL when more than a third of the name would have to change
static const char* nearest_option(const char* name, int word) {
    const char* best = NULL;
    int best_distance = (int)strlen(name) / 3 + 2;
    for (int i = 0; i < N_OPTIONS && strlen(name) < 40; i++) {
        if (!options[i].name || !(options[i].words & word)) continue;
        char plain[40];                         // --learning_rate and the like
        snprintf(plain, sizeof plain, "%.39s", name);
        for (char* p = plain; *p; p++) if (*p == '_') *p = '-';
        int distance = edit_distance(plain, options[i].name);
        if (distance < best_distance) { best_distance = distance; best = options[i].name; }
    }
    return best;
}

// option_set: checks and stores one value. A weaker origin does not replace a stronger one.
bool option_set(Settings* s, int i, const char* value, int origin, Error* err) {
    const Option* opt = &options[i];
    char* field = (char*)&s->o + opt->offset;
    if (s->text[i] && origin < s->origin[i]) return true;
    const char* clean = value;
    bool plain =
        *clean && !isspace((unsigned char)*clean) && !strpbrk(clean, "xXnN");    // no hex, nan, inf, blanks
    char* end = NULL;
    switch (opt->type) {
        case 'i': case 'f': {
            errno = 0;
            double number = plain ? strtod(clean, &end) : 0;
            bool whole = opt->type == 'f' || number == floor(number);
            if (!plain || *end || errno == ERANGE || !isfinite(number) || !whole)
                return fail(err, "--%s expects %s, found '%.40s'", opt->name,
                            opt->type == 'i' ? "a whole number" : "a number such as 0.1 or 3e-4", value);
            if (number < opt->min || number > opt->max)
                return fail(err, "--%s expects a number from %g to %g, found %.40s", opt->name, opt->min,
                            opt->max, value);
            if (opt->type == 'i') *(int64_t*)field = (int64_t)number;
            else *(double*)field = number;
            break;
        }
        case 'u': {
            errno = 0;
            bool digits = *clean && strspn(clean, "0123456789") == strlen(clean);
            unsigned long long number = digits ? strtoull(clean, &end, 10) : 0;
            if (!digits || errno == ERANGE)
                return fail(err, "--%s expects a whole number from 0 to 18446744073709551615, found '%.40s'",
                            opt->name, value);
            *(uint64_t*)field = number;
            break;
        }
        case 'b': {
            bool on = strcmp(value, "on") == 0, off = strcmp(value, "off") == 0;
            if (!on && !off) return fail(err, "--%s is a switch: on or off, found '%.40s'", opt->name, value);
            *(bool*)field = on;
            break;
        }
        case 'c': case 'm': {
            int choice = choice_of(opt->choices, value);
            if (choice < 0)
                return fail(err, "--%s expects one of: %s; found '%.40s'", opt->name, opt->choices, value);
            if (opt->type == 'm') *(int*)field = choice;
            break;
        }
    }
    if (opt->type == 'l' && origin == FROM_USER && (!*value || *value == '\n'))
        return fail(err, "--%s expects at least one file, found an empty name", opt->name);
    char* copy = strdup(value);
    free(s->text[i]);
    s->text[i] = copy;
    s->origin[i] = origin;
    if (opt->type == 's' || opt->type == 'c' || opt->type == 'l') *(const char**)field = copy;
    return true;
}

// options_parse: `--name value`, `--name=value`, switches `--name`, `--no-name`, lists `--data A B C`.
bool options_parse(Settings* s, int argc, char** argv, int origin, Error* err) {
    bool given[N_OPTIONS] = {false};
    for (int a = 0; a < argc; a++) {
        char name[64];
        if (strncmp(argv[a], "--", 2) != 0 || !argv[a][2])
            return fail(err, "expected an option such as --steps, found '%.60s'; --help lists the options",
                        argv[a]);
        const char *rest = argv[a] + 2, *equals = strchr(rest, '=');
        size_t n = equals ? (size_t)(equals - rest) : strlen(rest);
        snprintf(name, sizeof name, "%.*s", (int)min_size(n, 63), rest);
        int i = option_find(name);
        const char* value = equals ? equals + 1 : NULL;
        if (i < 0 && strncmp(name, "no-", 3) == 0 && !value) {
            i = option_find(name + 3);
            if (i >= 0 && (options[i].type == 'b' || options[i].type == 'm')) value = "off";
            else i = -1;
        }
#ifndef __CUDACC__
        if (strcmp(name, "device") == 0 || strcmp(name, "precision") == 0 || strcmp(name, "check") == 0)
            return fail(err, "--%s is an option of train_mambacu, the program for GPUs: make cuda", name);
#endif
        if (i < 0) {
            const char* near = nearest_option(name, s->word);
            if (near)
                return fail(err, "unknown option --%.60s; did you mean --%s? --help lists all", name, near);
            return fail(err, "unknown option --%.60s; --help lists all", name);
        }
        const Option* opt = &options[i];
        if (!(opt->words & s->word) && origin == FROM_USER) {
            char of[64] = "";
            for (int w = 0; w < N_WORDS; w++)
                if (opt->words & (1 << w))
                    snprintf(of + strlen(of), sizeof of - strlen(of), "%s'%s'", of[0] ? ", " : "", words[w]);
            return fail(err, "--%s is an option of %s, not of '%s'", opt->name, of,
                        words[__builtin_ctz((unsigned)s->word)]);
        }
        if (given[i]) return fail(err, "--%s is given twice", opt->name);
        given[i] = true;
        if (opt->type == 'l' && !value) {
            char* list = NULL;
            size_t length = 0;
            while (a + 1 < argc && strncmp(argv[a + 1], "--", 2) != 0) {
                size_t m = strlen(argv[++a]);
                list = (char*)xrealloc(list, length + m + 2, 1);
                if (length) list[length++] = '\n';
                memcpy(list + length, argv[a], m + 1);
                length += m;
            }
            if (!list) return fail(err, "--%s expects at least one %s", opt->name,
                                   strcmp(opt->name, "freeze") == 0 ? "name" : "file");
            bool ok = option_set(s, i, list, origin, err);
            free(list);
            if (!ok) return false;
            continue;
        }
        if ((opt->type == 'b' || opt->type == 'm') && !value)
            value = a + 1 < argc && strncmp(argv[a + 1], "--", 2) != 0 ? argv[++a] : "on";
        if (!value) {
            if (a + 1 >= argc || strncmp(argv[a + 1], "--", 2) == 0)
                return fail(err, "--%s expects a value", opt->name);
            value = argv[++a];
        }
        if (!option_set(s, i, value, origin, err)) return false;
    }
    return true;
}

// preset_apply: the options of a preset, as if they stood before the user's.
bool preset_apply(Settings* s, const char* name, Error* err) {
    char list[512] = "";
    for (int i = 0; i < N_PRESETS; i++) {
        if (strcmp(presets[i].name, name) == 0) {
            char text[512], *argv[64];
            int argc = 0;
            snprintf(text, sizeof text, "%s", presets[i].text);
            for (char* token = strtok(text, " "); token && argc < 64; token = strtok(NULL, " "))
                argv[argc++] = token;
            return options_parse(s, argc, argv, FROM_PRESET, err);
        }
        snprintf(list + strlen(list), sizeof list - strlen(list), " %s", presets[i].name);
    }
    return fail(err, "--preset: there is no '%.40s'; known are%s", name, list);
}

// settings_parse: defaults, then the user's options, then the preset below them.
bool settings_parse(Settings* s, int word, int argc, char** argv, Error* err) {
    memset(s, 0, sizeof *s);
    s->word = word;
    for (int i = 0; i < N_OPTIONS; i++)
        if (options[i].name && !option_set(s, i, options[i].value, FROM_DEFAULT, err)) return false;
    if (!options_parse(s, argc, argv, FROM_USER, err)) return false;
    return !s->o.preset[0] || preset_apply(s, s->o.preset, err);
}

void settings_free(Settings* s) {
    for (int i = 0; i < N_OPTIONS; i++) free(s->text[i]);
    memset(s, 0, sizeof *s);
}

static int settings_origin(const Settings* s, const char* name) { return s->origin[option_find(name)]; }

void settings_print(const Settings* s) {
    for (int i = 0; i < N_OPTIONS; i++) {
        if (!options[i].name || !(options[i].words & s->word)) continue;
        char shown[64];
        snprintf(shown, sizeof shown, "%.60s", s->text[i][0] ? s->text[i] : "-");
        for (char* p = shown; *p; p++) if (*p == '\n') *p = ' ';
        printf("  %-20s %s", options[i].name, shown);
        if (s->origin[i] != FROM_DEFAULT && strcmp(s->text[i], options[i].value) != 0)
            printf("   (default %s)", options[i].value[0] ? options[i].value : "-");
        printf("\n");
    }
}

static const char* option_argument(const Option* opt) {
    switch (opt->type) {
        case 'b': return " [on/off]";
        case 'l': return strcmp(opt->name, "freeze") == 0 ? " NAME..." : " FILE...";
        case 'i': case 'f': case 'u': return " N";
    }
    return " TEXT";
}

// help_print: all options, or with `word` those of one word. markdown: the table in README (make readme).
void help_print(int word, bool markdown) {
    if (!markdown)
        printf("train_mamba: Mamba language models in plain C.\n\n"
               "usage: train_mamba [train|generate|eval|info|convert|tokenize] [options]\n"
               "  train      train a model (the default word; without options on this program's own source)\n"
               "  generate   write text with a trained model\n"
               "  eval       loss, perplexity and accuracy of a model on texts and test items\n"
               "  info       what a checkpoint or a set of options describes\n"
               "  convert    write a model in a form that other programs load\n"
               "  tokenize   text into token shards\n");
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option* opt = &options[i];
        if (word && !(opt->words & word)) continue;
        if (!opt->name) {
            printf(markdown ? "\n**%s**\n\n| option | default | meaning |\n|---|---|---|\n" : "\n%s\n",
                   opt->help);
            continue;
        }
        char left[64];
        const char *value = opt->value[0] ? opt->value : "-", *colon = opt->choices ? ": " : "";
        const char* choices = opt->choices ? opt->choices : "";
        snprintf(left, sizeof left, "--%s%s", opt->name, option_argument(opt));
        if (markdown) printf("| `%s` | %s | %s%s%s |\n", left, value, opt->help, colon, choices);
        else printf("  %-28s %s%s%s [%s]\n", left, opt->help, colon, choices, value);
    }
    printf(markdown ? "\n**Presets**\n\n| preset | | options |\n|---|---|---|\n" : "\nPresets\n");
    for (int i = 0; i < N_PRESETS; i++)
        printf(markdown ? "| `%s` | %s | `%s` |\n" : "  %-18s %s: %s\n", presets[i].name, presets[i].help,
               presets[i].text);
}

// word_parse: what the program is to do, and how many arguments are in front of the options; 0: help was
// asked for, and given
int word_parse(int argc, char** argv, int* skip) {
    int word = WORD_TRAIN;
    *skip = 1;
    if (argc > 1 && argv[1][0] != '-') {
        word = 0;
        for (int i = 0; i < N_WORDS; i++) if (strcmp(argv[1], words[i]) == 0) word = 1 << i;
        if (!word)
            die("unknown word '%.40s'; expected train, generate, eval, info, convert or tokenize, then "
                "options; --help "
                "lists them",
                argv[1]);
        *skip = 2;
    }
    for (int i = 1; i < argc; i++) {
        bool markdown = strcmp(argv[i], "--help=markdown") == 0;
        if (markdown || strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            help_print(*skip == 2 ? word : 0, markdown);
            return 0;
        }
    }
    return word;
}
