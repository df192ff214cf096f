// Generation: prompts, where a text ends, saved states, and the sequences that are written side by side.
// Section 10 of train_mamba.c.

// PromptList: --prompts: a text file with a prompt in every line, or JSON lines {"prompt": ...}. Empty lines
// are none. They lie in the memory that the file was read into, prompt i from start[i] to the NUL in front of
// start[i + 1]: a file of a million letters must not become a million blocks of memory.
typedef struct { char* text; size_t* start; size_t n; } PromptList;

enum { MAX_PROMPTS = 1 << 20 };

static void prompts_free(PromptList* list) {
    free(list->text);
    free(list->start);
    memset(list, 0, sizeof *list);
}

// prompts_add: the next prompt, moved to its place; what it is made of is never in front of that
static bool prompts_add(PromptList* list, const char* text, size_t n, Error* err) {
    if (list->n == MAX_PROMPTS) return fail(err, "more than %d prompts", MAX_PROMPTS);
    if ((list->n & (list->n - 1)) == 0)                  // twice the room
        list->start = (size_t*)xrealloc(list->start, 2 * list->n + 2, sizeof(size_t));
    if (list->n == 0) list->start[0] = 0;
    char* place = list->text + list->start[list->n];
    memmove(place, text, n);
    place[n] = 0;
    list->start[list->n + 1] = list->start[list->n] + n + 1;
    list->n++;
    return true;
}

static size_t prompts_size(const PromptList* list, size_t i) {
    return list->start[i + 1] - list->start[i] - 1;
}

// prompts_line: the prompt in one line of JSON
static bool prompts_line(PromptList* list, const char* line, size_t n, Error* err) {
    json_t* root = json_line(line, n, MAX_LINE, err);
    const json_t* text = json_object_get(root, "prompt");
    bool ok = json_is_string(text);
    if (ok) ok = prompts_add(list, json_string_value(text), json_string_length(text), err);
    else if (root)
        fail(err, "expected an object with a string \"prompt\", found %s",
             text ? "another type" : "none of that name");
    json_decref(root);
    return ok;
}

static bool prompts_read(PromptList* list, const char* path, Error* err) {
    size_t size = 0;
    Error why;
    memset(list, 0, sizeof *list);
    if (!(list->text = read_text(path, INT64_MAX - 1, &size, err))) return false;
    const char *p = list->text, *end = p + size;
    bool ok = true;
    for (int64_t number = 1; ok && p < end; number++) {
        const char* stop = (const char*)memchr(p, '\n', (size_t)(end - p));
        const char* next = stop ? stop + 1 : end;
        size_t n = (size_t)((stop ? stop : end) - p);
        while (n && p[n - 1] == '\r') n--;
        if (n)
            ok = is_json_lines(path) ? prompts_line(list, p, n, &why) : prompts_add(list, p, n, &why);
        if (!ok) fail_line(err, "%s: line %lld: %s", path, (long long)number, why.text);
        p = next;
    }
    if (ok && list->n == 0) ok = fail_line(err, "%s: expected a prompt in every line, found none", path);
    if (!ok) prompts_free(list);
    return ok;
}

// Written: the text of one sequence on its way out. With a stop text, what may be the beginning of it waits.
typedef struct {
    FILE* stream;                        // where it goes at once; NULL: it is kept
    Text kept, waiting;
} Written;

static void written_out(Written* w, const char* text, size_t n) {
    if (n && w->stream) fwrite(text, 1, n, w->stream);
    else if (n) text_append(&w->kept, text, n);
}

// written_add: more of the text; true when `stop` (if not empty) has come, then it ends in front of it
static bool written_add(Written* w, const char* text, size_t n, const char* stop) {
    size_t length = strlen(stop), keep = 0;
    if (!length) {
        written_out(w, text, n);
        return false;
    }
    text_append(&w->waiting, text, n);
    const Text* t = &w->waiting;
    const char* found = t->n ? (const char*)memmem(t->data, t->n, stop, length) : NULL;
    for (size_t k = 1; !found && k < length && k <= w->waiting.n; k++)
        if (memcmp(w->waiting.data + w->waiting.n - k, stop, k) == 0) keep = k;
    size_t ready = found ? (size_t)(found - w->waiting.data) : w->waiting.n - keep;
    written_out(w, w->waiting.data, ready);
    if (keep) memmove(w->waiting.data, w->waiting.data + ready, keep);
    w->waiting.n = keep;
    return found != NULL;
}

// written_end: no stop text came any more
static void written_end(Written* w) {
    written_out(w, w->waiting.data, w->waiting.n);
    w->waiting.n = 0;
}

// Prompt: a source of tokens of any length; text comes from memory or, piece by piece, from an open file.
typedef struct {
    Encoder encoder;
    const char* text;
    size_t left;
    FILE* file;
    TokenList ready;         // made, and given out up to `given`
    size_t given;
    bool ended;
} Prompt;

Prompt prompt_open(const Tokenizer* tok, const char* text, FILE* file) {
    Prompt p;
    memset(&p, 0, sizeof p);
    encoder_open(&p.encoder, tok);
    p.text = text;
    p.left = strlen(text);
    p.file = file;
    return p;
}

void prompt_close(Prompt* p) {
    encoder_close(&p->encoder);
    free(p->ready.id);
    memset(p, 0, sizeof *p);
}

// prompt_fill: tokens to give out: some, or all that follow
static bool prompt_fill(Prompt* p, bool all, Error* err) {
    char piece[4096];
    while ((all || p->given == p->ready.n) && !p->ended) {
        size_t n = p->file ? fread(piece, 1, sizeof piece, p->file) : min_size(sizeof piece, p->left);
        if (p->file && ferror(p->file)) return fail(err, "the prompt cannot be read: %s", strerror(errno));
        p->ended = n == 0;
        if (p->given == p->ready.n) p->ready.n = p->given = 0;
        if (!encoder_add(&p->encoder, p->file ? piece : p->text, n, p->ended, &p->ready, err)) return false;
        if (!p->file) { p->text += n; p->left -= n; }
        if (p->ended && p->encoder.utf8.replaced)
            warn("the prompt has invalid UTF-8, %lld times replaced by U+FFFD, first at byte %lld",
                 (long long)p->encoder.utf8.replaced, (long long)p->encoder.first_replaced);
    }
    return true;
}

// prompt_read: *count: `max` more tokens; fewer, or 0, at the end
static bool prompt_read(Prompt* p, int* tokens, size_t max, size_t* count, Error* err) {
    size_t n = 1;
    for (*count = 0; *count < max && n > 0; *count += n) {
        if (!prompt_fill(p, false, err)) return false;
        n = min_size(max - *count, p->ready.n - p->given);
        if (n) memcpy(tokens + *count, p->ready.id + p->given, n * sizeof(int));
        p->given += n;
    }
    return true;
}

typedef struct {
    int64_t prompt_tokens, new_tokens;
    double prefill_seconds, decode_seconds;
    double state_bytes;      // of one sequence
} GenerateStats;

// state_save, state_load: everything that a context has left behind: the recurrent state of one sequence (of
// a cache the part that is filled), the logits after its last token, and which tokens have occurred. Tied to
// the weights by their hash.
static State state_of_tokens(const Model* m, int64_t tokens) {
    Model filled = *m;
    filled.config.context = tokens;
    return state_alloc(&filled, 1);
}

bool state_save(const Model* m, const State* s, const real* logits, const real* seen, int64_t tokens,
                const char* path, Error* err) {
    char hash[32], count[32];
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)model_hash(m));
    snprintf(count, sizeof count, "%lld", (long long)tokens);
    const char* meta[] = {"format", "pt", "model", hash, "tokens", count, NULL};
    size_t Vp = (size_t)m->config.vocab_padded;
    State one = state_of_tokens(m, tokens);
    state_copy_row(m, &one, 0, s, 0);
    SafeTensorOut out[3] = {flat_tensor("state", one.data, one.n_elements), flat_tensor("logits", logits, Vp),
                            flat_tensor("seen", seen, Vp)};
    bool ok = safetensors_write(path, out, 3, meta, err);
    state_free(&one);
    return ok;
}

// state_replaceable: --save-state writes a new file, or over an older state, but over nothing else
static bool state_replaceable(const char* path, Error* err) {
    SafeTensors st;
    struct stat info;
    Error ignored;
    if (lstat(path, &info) != 0) return can_create(path, err);
    bool state = safetensors_open(&st, path, &ignored);
    if (state) {
        state = safetensors_metadata(&st, "model") && safetensors_find(&st, "state");
        safetensors_close(&st);
    }
    return state || fail_line(err, "%s: exists and is no saved state; choose another --save-state", path);
}

bool state_load(const Model* m, State* s, real* logits, real* seen, int64_t* tokens, const char* path,
                Error* err) {
    SafeTensors st;
    char hash[32];
    if (!safetensors_open(&st, path, err)) return false;
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)model_hash(m));
    const char *found = safetensors_metadata(&st, "model"), *count = safetensors_metadata(&st, "tokens");
    *tokens = count ? atoll(count) : -1;
    const SafeTensor *a = safetensors_find(&st, "state"), *b = safetensors_find(&st, "logits"),
                     *c = safetensors_find(&st, "seen");
    bool known = found && a && b && c && *tokens >= 0 && (!has_cache(m) || *tokens <= s->context);
    State one = state_of_tokens(m, known ? *tokens : 0);
    size_t n = one.n_elements, Vp = (size_t)m->config.vocab_padded;
    bool ok = true;
    if (!known)
        ok = fail(err, "%s: expected a file written by --save-state", path);
    else if (strcmp(found, hash) != 0)
        ok = fail(
            err,
            "%s: this state was made with other weights (%s, these are %s); make it anew with --save-state",
            path, found, hash);
    else if (a->count != n || b->count != Vp || c->count != Vp)
        ok = fail(err, "%s: holds %zu, %zu and %zu numbers, expected %zu, %zu and %zu", path, a->count,
                  b->count, c->count, n, Vp, Vp);
    else
        ok = safetensors_read_real(&st, a, one.data, err) && safetensors_read_real(&st, b, logits, err) &&
             safetensors_read_real(&st, c, seen, err);
    for (int l = 0; ok && l < m->n_layers; l++)          // a larger number would be read beyond the cache
        for (int i = 0; i < m->layer[l].kind->n_state; i++)
            if (m->layer[l].kind->state[i].flags & TOKENS && one.field[l][i][0] != (real)*tokens)
                ok = fail(err, "%s: damaged: %lld tokens, but %g in the cache of a layer", path,
                          (long long)*tokens, (double)one.field[l][i][0]);
    if (ok) state_copy_row(m, s, 0, &one, 0);
    state_free(&one);
    safetensors_close(&st);
    return ok;
}

// context_set: room in the caches for the longest of n sequences: the saved state, the prompt, which is read
// to its end for that, and the new tokens. A conversation has no known end: there --context says it.
static bool context_set(Model* m, const Options* o, Prompt* prompt, size_t n, Error* err) {
    SafeTensors st;
    size_t longest = 1;            // the token that starts a document
    double saved = 0;
    if (!has_cache(m)) return true;
    for (size_t i = 0; i < n && !o->interactive; i++) {
        if (!prompt_fill(&prompt[i], true, err)) return false;
        if (prompt[i].ready.n > longest) longest = prompt[i].ready.n;
    }
    if (o->load_state[0]) {
        if (!safetensors_open(&st, o->load_state, err)) return false;
        const char* count = safetensors_metadata(&st, "tokens");
        if (count) saved = atof(count);
        safetensors_close(&st);
    }
    double tokens = o->interactive ? (double)o->context : saved + (double)longest + (double)o->max_tokens;
    if (!(tokens >= 1 && tokens <= MAX_CONTEXT))
        return fail(err, "%.0f tokens of context, attention takes at most %d; lower --max-tokens", tokens,
                    MAX_CONTEXT);
    m->config.context = (int64_t)tokens;
    return true;
}

// Generation: sequences side by side, each with all that it has read and written.
typedef struct {
    Backend* backend;
    const Tokenizer* tok;
    const Options* o;
    Session s;
    size_t rows;
    real* logits;              // (rows,Vp) after the last token of each
    unsigned char* seen;       // (rows,Vp)
    int64_t* position;         // tokens so far
    int* last;                 // the newest one
    bool *unread, *done;       // the state has not seen `last`; the sequence has ended
    bool ahead;                // the device may begin the next token before it is known whether it is needed
    Utf8Stream* utf8;
    Written* text;
    Candidate* candidates;
    int* piece;                // (chunk)
    GenerateStats stats;
} Generation;

Generation generation_open(Backend* backend, const Tokenizer* tok, const Options* o, size_t rows) {
    size_t V = (size_t)backend->model->config.vocab_size, Vp = (size_t)backend->model->config.vocab_padded;
    Generation g;
    memset(&g, 0, sizeof g);
    g.backend = backend;
    g.tok = tok;
    g.o = o;
    g.rows = rows;
    backend->model->config.state_bf16 = strcmp(o->state_dtype, "bf16") == 0;
    g.s = session_create(backend, rows, (size_t)o->chunk);
    g.logits = (real*)xcalloc(rows * Vp, sizeof(real));
    g.seen = (unsigned char*)xcalloc(rows * Vp, 1);
    g.position = (int64_t*)xcalloc(rows, sizeof(int64_t));
    g.last = (int*)xcalloc(rows, sizeof(int));
    g.unread = (bool*)xcalloc(rows, sizeof(bool));
    g.done = (bool*)xcalloc(rows, sizeof(bool));
    g.utf8 = (Utf8Stream*)xcalloc(rows, sizeof(Utf8Stream));
    g.text = (Written*)xcalloc(rows, sizeof(Written));
    g.candidates = (Candidate*)xcalloc(V, sizeof(Candidate));
    g.piece = (int*)xcalloc((size_t)o->chunk, sizeof(int));
    return g;
}

void generation_close(Generation* g) {
    session_free(g->backend, &g->s);
    for (size_t r = 0; r < g->rows; r++) { free(g->text[r].kept.data); free(g->text[r].waiting.data); }
    free(g->logits); free(g->seen); free(g->position); free(g->last); free(g->unread); free(g->done);
    free(g->utf8); free(g->text); free(g->candidates); free(g->piece);
    memset(g, 0, sizeof *g);
}

// context_left: is there room in the caches for n more tokens of sequence r?
static bool context_left(const Generation* g, size_t r, int64_t n, Error* err) {
    const Model* m = g->backend->model;
    return !has_cache(m) || g->position[r] + n <= m->config.context ||
           fail(err, "the context is full, it has room for %lld tokens; raise --context",
                (long long)m->config.context);
}

// generation_read: sequence r reads a prompt in chunks; one that has read nothing at all starts a document
bool generation_read(Generation* g, size_t r, Prompt* prompt, volatile sig_atomic_t* interrupted,
                     Error* err) {
    const Config* c = &g->backend->model->config;
    size_t Vp = (size_t)c->vocab_padded;
    double start = seconds_now();
    bool ok = true;
    if (g->unread[r] && !context_left(g, r, 0, err)) return false;
    if (g->unread[r]) g->backend->decode(g->backend, &g->s, r, 1, &g->last[r], 1, g->logits + r * Vp);
    g->unread[r] = false;
    for (size_t n; (ok = prompt_read(prompt, g->piece, (size_t)g->o->chunk, &n, err)) && n > 0;) {
        for (size_t i = 0; i < n; i++) {
            if ((size_t)g->piece[i] >= Vp)
                return fail(err, "the prompt has token %d, the model's vocabulary ends at %zu", g->piece[i],
                            Vp - 1);
            g->seen[r * Vp + (size_t)g->piece[i]] = 1;
        }
        if (!context_left(g, r, (int64_t)n, err)) return false;
        g->backend->decode(g->backend, &g->s, r, 1, g->piece, n, g->logits + r * Vp);
        g->stats.prompt_tokens += (int64_t)n;
        g->position[r] += (int64_t)n;
        if (*interrupted) break;
    }
    if (ok && g->position[r] == 0) {
        int begin = c->eos_token >= 0 && c->eos_token < c->vocab_size ? (int)c->eos_token : 0;
        g->backend->decode(g->backend, &g->s, r, 1, &begin, 1, g->logits + r * Vp);
        g->position[r] = 1;
    }
    g->stats.prefill_seconds += seconds_now() - start;
    return ok;
}

// generation_copy: the `count` - 1 sequences behind r continue what r has read
static void generation_copy(Generation* g, size_t r, size_t count) {
    const Model* m = g->backend->model;
    size_t Vp = (size_t)m->config.vocab_padded;
    for (size_t to = r + 1; to < r + count; to++) {
        state_copy_row(m, &g->s.state, to, &g->s.state, r);
        memcpy(g->logits + to * Vp, g->logits + r * Vp, Vp * sizeof(real));
        memcpy(g->seen + to * Vp, g->seen + r * Vp, Vp);
        g->position[to] = g->position[r];
    }
}

// generation_write: every sequence goes on, one token at a time in the memory there is, until its end token,
// --stop or --max-tokens. The random numbers of a sequence are those of its sample number and position alone.
bool generation_write(Generation* g, volatile sig_atomic_t* interrupted, Error* err) {
    const Options* o = g->o;
    Backend* backend = g->backend;
    const Config* c = &backend->model->config;
    size_t V = (size_t)c->vocab_size, Vp = (size_t)c->vocab_padded, active = g->rows;
    Sampler sampler = {o->temperature, o->top_k, o->top_p, o->min_p, o->repetition_penalty, o->seed};
    bool greedy =
        backend->greedy_begin && o->repetition_penalty == 1 && (o->top_k == 1 || o->temperature == 0);
    bool begun = false;        // the next token is being computed
    double start = seconds_now();
    for (size_t r = 0; r < g->rows; r++) g->done[r] = false;
    for (int64_t i = 0; i < o->max_tokens && active > 0 && !*interrupted; i++) {
        if (i && !context_left(g, 0, 0, err)) return false;
        if (i && greedy) {
            if (!begun) backend->greedy_begin(backend, &g->s, i == 1 ? g->last : NULL);
            backend->greedy_end(backend, &g->s, g->last);
            begun = g->ahead && i + 1 < o->max_tokens && context_left(g, 0, 1, err);
            if (begun) backend->greedy_begin(backend, &g->s, NULL);
        } else if (i) {
            backend->decode(backend, &g->s, 0, g->rows, g->last, 1, g->logits);
        }
        for (size_t r = 0; r < g->rows; r++) {
            if (g->done[r]) continue;
            if (!greedy || i == 0) {
                if (!sample_token(&sampler, g->logits + r * Vp, g->seen + r * Vp, V,
                                  r % (size_t)o->num_samples, (uint64_t)g->position[r], g->candidates,
                                  &g->last[r], err))
                    return false;
            } else if (g->last[r] < 0) {
                return fail(err, "a logit is not finite: the model has diverged or its file is damaged");
            }
            g->stats.new_tokens++;
            g->position[r]++;
            g->unread[r] = true;
            g->done[r] = g->last[r] == c->eos_token;
            if (!g->done[r]) {
                g->seen[r * Vp + (size_t)g->last[r]] = 1;
                char bytes[TOKENIZER_MAX_TEXT];
                size_t n = tokenizer_decode(g->tok, &g->utf8[r], g->last[r], bytes);
                g->done[r] = written_add(&g->text[r], bytes, n, o->stop);
                if (g->done[r]) g->utf8[r].n = 0;            // a character begun after it
                if (g->text[r].stream && (ferror(g->text[r].stream) || fflush(g->text[r].stream) != 0))
                    return fail(err, "could not write the text: %s", strerror(errno));
            }
            active -= g->done[r];
        }
    }
    if (begun) backend->greedy_end(backend, &g->s, g->last);
    g->stats.decode_seconds += seconds_now() - start;
    for (size_t r = 0; r < g->rows; r++) {
        char bytes[TOKENIZER_MAX_TEXT];
        written_add(&g->text[r], bytes, tokenizer_flush(&g->utf8[r], bytes), o->stop);
        written_end(&g->text[r]);
    }
    return true;
}

// generate: for each of n prompts o->num_samples continuations, all in one batch. A single one is streamed to
// `out`, several are written one after the other.
bool generate(Backend* backend, const Tokenizer* tok, const Options* o, Prompt* prompt, size_t n, FILE* out,
              GenerateStats* stats, volatile sig_atomic_t* interrupted, Error* err) {
    const Model* m = backend->model;
    size_t samples = (size_t)o->num_samples, rows = n * samples, Vp = (size_t)m->config.vocab_padded;
    if (!context_set(backend->model, o, prompt, n, err)) return false;
    Generation g = generation_open(backend, tok, o, rows);
    real* seen = (real*)xcalloc(Vp, sizeof(real));               // as the state file has it
    bool ok = true;
    g.ahead = true;                              // nothing reads the states after the end
    for (size_t r = 0; r < rows; r++) g.utf8[r].raw = o->raw;
    if (rows == 1) g.text[0].stream = out;
    if (o->load_state[0]) {
        ok = state_load(m, &g.s.state, g.logits, seen, &g.position[0], o->load_state, err);
        for (size_t v = 0; v < Vp; v++) g.seen[v] = seen[v] != 0;
        backend->session_sync(backend, &g.s, false);
    }
    for (size_t i = 0; ok && i < n && !*interrupted; i++)
        ok = generation_read(&g, i * samples, &prompt[i], interrupted, err);
    if (samples > 1 || o->save_state[0]) backend->session_sync(backend, &g.s, true);
    if (ok && o->save_state[0] && *interrupted) {
        warn("stopped while the prompt was read; %s was not written", o->save_state);
    } else if (ok && o->save_state[0]) {
        for (size_t v = 0; v < Vp; v++) seen[v] = g.seen[v];
        ok = state_save(m, &g.s.state, g.logits, seen, g.position[0], o->save_state, err);
    }
    for (size_t i = 0; i < n; i++) generation_copy(&g, i * samples, samples);
    if (samples > 1) backend->session_sync(backend, &g.s, false);
    const bool begun = ok;                       // of an error before this, nothing is on standard output
    ok = ok && generation_write(&g, interrupted, err);
    for (size_t r = 0; begun && r < rows; r++) {
        if (rows > 1 && n > 1) fprintf(out, "--- prompt %zu", r / samples + 1);
        if (rows > 1 && samples > 1) fprintf(out, "%ssample %zu", n > 1 ? ", " : "--- ", r % samples + 1);
        if (rows > 1) fputc('\n', out);
        if (g.text[r].kept.n) fwrite(g.text[r].kept.data, 1, g.text[r].kept.n, out);
        if (!o->raw || rows > 1) fputc('\n', out);
        if (g.text[r].kept.failed || g.text[r].waiting.failed) ok = fail(err, "out of memory for the text");
    }
    if (ok && (fflush(out) != 0 || ferror(out)))
        ok = fail(err, "could not write the text: %s", strerror(errno));
    *stats = g.stats;
    stats->state_bytes = (double)g.s.state_bytes / (double)g.s.rows;
    free(seen);
    generation_close(&g);
    return ok;
}

// generate_turns: --interactive: reads the prompt, then line by line from `in`, and goes on after each line,
// with the state of all that came before
bool generate_turns(Backend* backend, const Tokenizer* tok, const Options* o, Prompt* prompt, FILE* in,
                    FILE* out, GenerateStats* stats, volatile sig_atomic_t* interrupted, Error* err) {
    if (!context_set(backend->model, o, prompt, 1, err)) return false;
    Generation g = generation_open(backend, tok, o, 1);
    char* line = NULL;
    size_t room = 0;
    g.utf8[0].raw = o->raw;
    g.text[0].stream = out;
    bool ok = (!o->prompt[0] && !prompt->file) || generation_read(&g, 0, prompt, interrupted, err);
    while (ok) {
        if (isatty(fileno(in))) fprintf(stderr, "> ");
        ssize_t n = getline(&line, &room, in);
        if (n < 0 && ferror(in)) ok = fail(err, "standard input cannot be read: %s", strerror(errno));
        if (n < 0) break;
        while (n && (line[n - 1] == '\n' || line[n - 1] == '\r')) n--;
        Prompt turn = prompt_open(tok, line, NULL);
        turn.left = (size_t)n;
        ok = generation_read(&g, 0, &turn, interrupted, err) && generation_write(&g, interrupted, err);
        prompt_close(&turn);
        if (ok && (fputc('\n', out) == EOF || fflush(out) != 0))
            ok = fail(err, "could not write the text: %s", strerror(errno));
    }
    *stats = g.stats;
    stats->state_bytes = (double)g.s.state_bytes / (double)g.s.rows;
    free(line);
    generation_close(&g);
    return ok;
}
