// `eval`: what a model makes of texts and of test items.
//   --task loss     as training evaluates: rows of --seq-len tokens, each from a state of zero
//   --task text     every token of a text once, with all that stands before it: the state is carried over the
//                   whole file, in passes of constant memory (but attention keeps keys and values of it all);
//                   or with --window W in windows of W tokens that move by --stride S, each scoring its last
//                   S tokens (the first one all of its tokens)
//   --task lambada  JSON lines {"text": ...}: its last word, predicted from what stands before it
//   --task choice   JSON lines {"context": ..., "choices": [..., ...], "gold": number of the right one}:
//                   multiple choice; gold counts from 0
// The definitions are those of lm-evaluation-harness (EleutherAI), so that numbers compare:
//   text      starts after an end token, which is no text and never scored; perplexity = exp(loss per token),
//             bits per byte = loss in bits / bytes of the scored tokens. Windows are its
//             get_rolling_token_windows with context_len = W - S + 1
//   pairs     a blank joins context and choice, white space at the end of a context belongs to the choice,
//             and the tokens of a choice are those of the joint text beyond the number of tokens of the
//             context
//   lambada   the last word is what follows the last blank; acc: no token has a larger logit than any of its
//             tokens; perplexity = exp(-mean log-likelihood of the word)
//   choice    acc: the right choice has the largest log-likelihood, acc_norm: the largest
//             per character, acc_bytes: per byte
// Files of items are read twice: first all of them are checked and the longest row is found, then they are
// scored in groups of similar length. Padding at the end of a row changes nothing, because the model is
// causal.

enum { TASK_LOSS = 1, TASK_TEXT = 2, TASK_LAMBADA = 4, TASK_CHOICE = 8,
       TASK_ITEMS = TASK_LAMBADA | TASK_CHOICE };

static int task_of(const Options* o) { return 1 << choice_of(options[option_find("task")].choices, o->task); }

// eval_check: options that the task does not know, and a results file that exists, before
// anything is computed
static bool eval_check(const Settings* s, Error* err) {
    static const struct { const char* name; int tasks; } uses[] = {
        {"seq-len", TASK_LOSS | TASK_TEXT}, {"reset-documents", TASK_LOSS | TASK_TEXT},
        {"eval-batches", TASK_LOSS | TASK_TEXT}, {"dump-logits", TASK_LOSS}, {"window", TASK_TEXT},
        {"stride", TASK_TEXT} };
    const Options* o = &s->o;
    struct stat st;
    for (size_t i = 0; i < sizeof uses / sizeof *uses; i++)
        if (!(uses[i].tasks & task_of(o)) && settings_origin(s, uses[i].name) == FROM_USER)
            return fail(err, "--%s has no meaning for --task %s; leave it out", uses[i].name, o->task);
    if (o->window && settings_origin(s, "seq-len") == FROM_USER)
        return fail(err,
                    "--seq-len has no meaning with --window, which is the length of the rows; leave it out");
    if (o->stride && !o->window)
        return fail(err, "--stride needs --window, the length of the windows that it moves");
    if (o->stride > o->window)
        return fail(err,
                    "--stride %lld is larger than --window %lld: tokens between windows would not be scored",
                    (long long)o->stride, (long long)o->window);
    if ((task_of(o) & TASK_ITEMS) && !o->data[0])
        return fail(err, "--task %s needs --data, JSON lines files of items", o->task);
    if (o->results[0] && lstat(o->results, &st) == 0)
        return fail(err, "%s: exists already; remove it or choose another --results", o->results);
    if (o->dump_logits[0] && lstat(o->dump_logits, &st) == 0)
        return fail(err, "%s: exists already; remove it or choose another --dump-logits", o->dump_logits);
    return (!o->results[0] || can_create(o->results, err)) &&
           (!o->dump_logits[0] || can_create(o->dump_logits, err));
}

static json_t* json_finite(double x) { return isfinite(x) ? json_real(x) : json_null(); }

static bool results_put(int fd, void* text) { return write_all(fd, text, strlen((const char*)text)); }

// results_write: --results, one JSON object, whole or not at all
static bool results_write(const char* path, const json_t* results, Error* err) {
    char* text = json_dumps(results, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
    bool ok = text ? write_replacing(path, results_put, text, err) : fail(err, "%s: out of memory", path);
    free(text);
    return ok;
}

// ---- rows

typedef struct { double loss; int64_t targets; } Evaluation;

// evaluate: mean loss over the targets of `batches` batches (0: all) in order, each target once, states
// starting from zero.
bool evaluate(Backend* b, const Loader* loader, size_t B, size_t T, int64_t batches, bool documents,
              volatile sig_atomic_t* interrupted, Evaluation* result, Error* err) {
    int *inputs = (int*)xcalloc(B * T, sizeof(int)), *targets = (int*)xcalloc(B * T, sizeof(int)),
        *doc = (int*)xcalloc(B * T, sizeof(int));
    double sum = 0;
    int64_t n = 0, all = (loader_eval_samples(loader) + (int64_t)B - 1) / (int64_t)B;
    bool ok = true;
    if (batches == 0 || batches > all) batches = all;
    if (all == 0)
        ok = fail(err, "the data has %lld tokens, an evaluation needs at least 2",
                  (long long)loader->data->n_tokens);
    for (int64_t i = 0; i < batches && ok && !(interrupted && *interrupted); i++) {
        ok = loader_eval_batch(loader, i * (int64_t)B, (int64_t)B, inputs, targets, doc, err);
        if (!ok) break;
        sum += b->forward(b, -1, inputs, targets, documents ? doc : NULL, B, T, 0);
        for (size_t j = 0; j < B * T; j++) n += targets[j] >= 0;
    }
    result->loss = n ? sum / (double)n : 0;
    result->targets = n;
    free(inputs); free(targets); free(doc);
    return ok;
}

// ---- texts

// token_bytes: bytes of text that a token stands for
static int64_t token_bytes(const Tokenizer* t, int id) {
    if (t->kind == TOKENIZER_BYTES) return id < 256;
    return t->kind == TOKENIZER_BPE && id < t->bpe->n_ids ? t->bpe->length[id] : 0;
}

typedef struct { double loss; int64_t tokens, bytes; } TextScore;      // sums over the scored tokens

// text_rows: the next rows of T tokens from target *at on, which moves: without windows a single one. Returns
// how many.
static int64_t text_rows(const Loader* loader, const Options* o, int64_t* at, int64_t T, int* inputs,
                         int* targets,
                         int* doc, Error* err) {
    int64_t all = loader->data->n_tokens - 1, rows = 0, most = o->window ? o->batch_size : 1;
    for (; rows < most && *at < all; rows++) {
        int64_t n = o->window && *at > 0 && o->stride ? o->stride : T;          // scored in this row
        if (n > all - *at) n = all - *at;
        int64_t end = *at + n, begin = end > T ? end - T : 0;
        if (!o->window) begin = *at;
        if (!loader_row(loader, begin, end - begin, inputs + rows * T, targets + rows * T, doc + rows * T,
                        err))
            return -1;
        for (int64_t i = 0; i < end - begin - n; i++) targets[rows * T + i] = -1;
        *at = end;
    }
    return rows;
}

// evaluate_text: the backend has room for B rows of T tokens
static bool evaluate_text(Backend* b, const Data* data, const Options* o, int64_t B, int64_t T,
                          TextScore* score,
                          Error* err) {
    const Tokenizer* tok = &data->tokenizer;
    Loader loader = {&data->train, T, 0, false, 0, tok->eos, 0, 1};
    size_t n = (size_t)(B * T);
    int *inputs = (int*)xcalloc(n, sizeof(int)), *targets = (int*)xcalloc(n, sizeof(int)),
        *doc = (int*)xcalloc(n, sizeof(int));
    State carry = state_alloc(b->model, 1);
    bool ok = loader.data->n_tokens > 1 ||
              fail(err, "the text has %lld tokens (the end token in front counts), expected at least 2",
                   (long long)loader.data->n_tokens);
    memset(score, 0, sizeof *score);
    int64_t at = 0;
    for (int64_t pass = 0; ok && (!o->eval_batches || pass < o->eval_batches) && !stop_signal; pass++) {
        int64_t rest = loader.data->n_tokens - 1 - at, rows;
        if (rest == 0) break;
        // a short row needs no padding
        if (rest < T && (!o->window || at == 0)) loader.seq_len = T = rest;
        rows = text_rows(&loader, o, &at, T, inputs, targets, doc, err);
        if (!(ok = rows > 0)) break;
        for (int64_t i = 0; i < rows * T; i++) {
            if (targets[i] == tok->eos) targets[i] = -1;
            if (targets[i] < 0) continue;
            score->tokens++;
            score->bytes += token_bytes(tok, targets[i]);
        }
        if (!o->window) b->carry_in = b->carry_out = &carry;
        score->loss += b->forward(b, o->window ? -1 : 0, inputs, targets, o->reset_documents ? doc : NULL,
                                  (size_t)rows, (size_t)T, 0);
    }
    b->carry_in = b->carry_out = NULL;
    if (ok && score->tokens == 0) ok = fail(err, "the text has no token that is scored, only end tokens");
    if (ok && !isfinite(score->loss))
        ok = fail(err, "the loss is not finite: the model has diverged or its file is damaged");
    state_free(&carry);
    free(inputs); free(targets); free(doc);
    return ok;
}

static bool eval_text(Backend* b, const Data* data, const Options* o, int64_t B, int64_t T, json_t* results,
                      Error* err) {
    TextScore s;
    double start = seconds_now();
    if (!evaluate_text(b, data, o, B, T, &s, err)) return false;
    double loss = s.loss / (double)s.tokens, seconds = seconds_now() - start;
    double bits = s.bytes ? s.loss / log(2.0) / (double)s.bytes : INFINITY;
    char shown[32] = "-";
    if (s.bytes) snprintf(shown, sizeof shown, "%.4f", bits);
    printf("tokens %lld | bytes %lld | loss %.6f | perplexity %.4f | bits per byte %s | %.0f tok/s\n",
           (long long)s.tokens, (long long)s.bytes, loss, exp(loss), shown, (double)s.tokens / seconds);
    json_object_set_new(results, "tokens", json_integer(s.tokens));
    json_object_set_new(results, "bytes", json_integer(s.bytes));
    json_object_set_new(results, "loss", json_finite(loss));
    json_object_set_new(results, "perplexity", json_finite(exp(loss)));
    json_object_set_new(results, "byte_perplexity", json_finite(exp(bits * log(2.0))));
    json_object_set_new(results, "bits_per_byte", json_finite(bits));
    return true;
}

// ---- items

enum { MAX_CHOICES = 1000, GROUP_ROWS = 16 };        // a group of items: about GROUP_ROWS batches

// Choice: what may follow the context of an item, one row of a batch
typedef struct {
    TokenList ids;
    const TokenList* context;
    double chars, bytes;
    double score;                        // log-likelihood
    bool best;                           // every token was the most likely one
} Choice;

typedef struct {
    TokenList context;
    Choice* choice;
    int n, gold;
} Item;

typedef struct {
    char** files;
    int n_files, file, task;
    char* data;                          // of the file that is being read, NULL: none is
    size_t size, at;
    int64_t number;                      // of the line
    Encoder encoder;
    Text text;
} Items;

static void item_free(Item* item) {
    for (int i = 0; i < item->n; i++) free(item->choice[i].ids.id);
    free(item->choice);
    free(item->context.id);
    memset(item, 0, sizeof *item);
}

// space_before: bytes of the white space character that ends before text[n], 0: there is none. The characters
// are those that Python's str.rstrip removes.
static size_t space_before(const char* text, size_t n) {
    static const char* const wide[] = {
        "\xC2\x85", "\xC2\xA0", "\xE1\x9A\x80", "\xE2\x80\x80", "\xE2\x80\x81", "\xE2\x80\x82",
        "\xE2\x80\x83",
        "\xE2\x80\x84", "\xE2\x80\x85", "\xE2\x80\x86", "\xE2\x80\x87", "\xE2\x80\x88", "\xE2\x80\x89",
        "\xE2\x80\x8A", "\xE2\x80\xA8", "\xE2\x80\xA9", "\xE2\x80\xAF", "\xE2\x81\x9F", "\xE3\x80\x80" };
    if (n && strchr(" \t\n\v\f\r\x1c\x1d\x1e\x1f", text[n - 1]) && text[n - 1]) return 1;
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++) {
        size_t k = strlen(wide[i]);
        if (n >= k && memcmp(text + n - k, wide[i], k) == 0) return k;
    }
    return 0;
}

// item_choice: adds a choice: `blank` and the text, after a context of n bytes
static bool item_choice(Items* f, Item* item, const char* context, size_t n, const char* text, size_t size,
                        Error* err) {
    size_t kept = n, length = item->context.n;
    for (size_t k; (k = space_before(context, kept)) > 0;) kept -= k;
    if (item->n == 0) {
        if (!encoder_add(&f->encoder, context, kept, true, &item->context, err)) return false;
        length = item->context.n;
    }
    f->text.n = 0;
    text_append(&f->text, context, n);
    text_append(&f->text, " ", 1);
    text_append(&f->text, text, size);
    if (f->text.failed) return fail(err, "out of memory");
    Choice* c = &item->choice[item->n++];
    if (!encoder_add(&f->encoder, f->text.data, f->text.n, true, &c->ids, err)) return false;
    bool begun = item->n > 1 && kept == 0;           // the end token of an empty context is there already
    int eos = f->encoder.tokenizer->eos;
    if (kept == 0 && !begun) {
        if (eos < 0)
            return fail(err, "nothing stands before the text that is to be scored, and the model has no end "
                                 "token to begin with");
        token_add(&item->context, eos);
    }
    if (kept == 0) length = 0;
    if (c->ids.n <= length) return fail(err, "choice %d gives no token", item->n - 1);
    memmove(c->ids.id, c->ids.id + length, (c->ids.n -= length) * sizeof(int));
    // not the context's room too
    c->ids.id = (int*)xrealloc(c->ids.id, c->ids.room = c->ids.n, sizeof(int));
    c->bytes = (double)size;
    for (size_t i = 0; i < size; i++) c->chars += (text[i] & 0xC0) != 0x80;
    c->context = &item->context;
    return true;
}

static bool item_parse(Items* f, const json_t* root, Item* item, Error* err) {
    bool lambada = f->task == TASK_LAMBADA;
    const char* fields[] = {lambada ? "text" : "context", lambada ? NULL : "choices", "gold"};
    if (!json_is_object(root))
        return fail(err, "expected an object such as {%s}, found something else",
                    lambada ? "\"text\": \"...\""
                            : "\"context\": \"...\", \"choices\": [\"...\", \"...\"], \"gold\": 0");
    for (int i = 0; i < 3 && fields[i]; i++)
        if (!json_object_get(root, fields[i])) return fail(err, "\"%s\" is missing", fields[i]);
    const json_t *text = json_object_get(root, fields[0]), *choices = json_object_get(root, "choices"),
                 *gold = json_object_get(root, "gold");
    if (!json_is_string(text)) return fail(err, "\"%s\": expected a string, found another type", fields[0]);
    const char* context = json_string_value(text);
    size_t n = json_string_length(text), count = lambada ? 1 : json_array_size(choices);
    if (lambada) {
        const char* blank = (const char*)memrchr(context, ' ', n);
        size_t start = blank ? (size_t)(blank - context) + 1 : 0;
        if (start == n)
            return fail(err, "\"text\": expected a word at the end, found %s", n ? "a blank" : "no text");
        item->choice = (Choice*)xcalloc(1, sizeof(Choice));
        return item_choice(f, item, context, start ? start - 1 : 0, context + start, n - start, err);
    }
    if (!json_is_array(choices) || count < 2 || count > MAX_CHOICES)
        return fail(err, "\"choices\": expected a list of 2 to %d strings, found %s", MAX_CHOICES,
                    !json_is_array(choices) ? "another type" : count > MAX_CHOICES ? "more" : "fewer");
    if (!json_is_integer(gold) || json_integer_value(gold) < 0 ||
        json_integer_value(gold) >= (json_int_t)count)
        return fail(err, "\"gold\": expected the number of the right choice, 0 to %zu, found %s", count - 1,
                    json_is_integer(gold) ? "another number" : "another type");
    item->gold = (int)json_integer_value(gold);
    item->choice = (Choice*)xcalloc(count, sizeof(Choice));
    for (size_t i = 0; i < count; i++) {
        const json_t* choice = json_array_get(choices, i);
        if (!json_is_string(choice) || json_string_length(choice) == 0)
            return fail(err, "\"choices\": choice %zu: expected a string, found %s", i,
                        json_is_string(choice) ? "an empty one" : "another type");
        if (!item_choice(f, item, context, n, json_string_value(choice), json_string_length(choice), err))
            return false;
    }
    return true;
}

// items_next: the next item; false at the end of the last file, or with a line in err
static bool items_next(Items* f, Item* item, Error* err) {
    err->text[0] = 0;
    memset(item, 0, sizeof *item);
    while (f->file < f->n_files) {
        const char* path = f->files[f->file];
        if (!f->data) {
            if (!(f->data = read_text(path, INT64_MAX - 1, &f->size, err))) return false;
            f->at = 0;
            f->number = 0;
        }
        if (f->at == f->size) {
            free(f->data);
            f->data = NULL;
            f->file++;
            continue;
        }
        const char *line = f->data + f->at, *end = f->data + f->size, *p = line;
        const char* stop = (const char*)memchr(line, '\n', (size_t)(end - line));
        size_t n = (size_t)((stop ? stop + 1 : end) - line);
        f->at += n;
        f->number++;
        skip_space(&p, line + n);
        if (p == line + n) continue;
        Error why;
        json_t* root = json_line(line, n, MAX_LINE, &why);
        bool ok = root && item_parse(f, root, item, &why);
        json_decref(root);
        if (ok) return true;
        item_free(item);
        return fail_line(err, "%s: line %lld: %s", path, (long long)f->number, why.text);
    }
    return false;
}

// items_open: finds and checks all items. *T: tokens of the longest row
static bool items_open(Items* f, const Tokenizer* tok, const Options* o, int64_t* T, Error* err) {
    int n;
    char** names = list_split(o->data, &n);
    memset(f, 0, sizeof *f);
    f->task = task_of(o);
    encoder_open(&f->encoder, tok);
    bool ok = files_of(names, n, &f->files, &f->n_files, err);
    free(names);
    if (ok && tok->kind == TOKENIZER_NONE)
        ok = fail(err, "this checkpoint has no tokenizer.json, so it cannot read the text of items; "
                       "give one with --tokenizer");
    *T = 0;
    for (Item item; ok && items_next(f, &item, err); item_free(&item))
        for (int i = 0; i < item.n; i++) {
            int64_t length = (int64_t)(item.context.n + item.choice[i].ids.n) - 1;
            if (length > *T) *T = length;
        }
    if (ok && err->text[0]) ok = false;
    if (ok && *T == 0) ok = fail_line(err, "%s: expected items as JSON lines, found none", f->files[0]);
    f->file = 0;
    return ok;
}

static void items_close(Items* f) {
    if (f->encoder.tokenizer) encoder_close(&f->encoder);
    files_free(f->files, f->n_files);
    free(f->data);
    free(f->text.data);
    memset(f, 0, sizeof *f);
}

static size_t choice_length(const Choice* c) { return c->context->n + c->ids.n - 1; }

static int compare_choices(const void* a, const void* b) {
    size_t x = choice_length(*(Choice* const*)a), y = choice_length(*(Choice* const*)b);
    return (x < y) - (x > y);
}

// choices_score: log-likelihoods of up to B rows by one call; they are padded to the longest, the first.
// inputs, targets, best: room for B rows of T
static bool choices_score(Backend* b, Choice** row, size_t rows, int* inputs, int* targets, Error* err) {
    size_t T = choice_length(row[0]);
    for (size_t r = 0; r < rows; r++) {
        const TokenList *before = row[r]->context, *ids = &row[r]->ids;
        int *in = inputs + r * T, *out = targets + r * T;
        memset(in, 0, T * sizeof(int));
        memcpy(in, before->id, before->n * sizeof(int));
        memcpy(in + before->n, ids->id, (ids->n - 1) * sizeof(int));
        for (size_t t = 0; t < T; t++) out[t] = -1;
        memcpy(out + before->n - 1, ids->id, ids->n * sizeof(int));
    }
    b->forward(b, -1, inputs, targets, NULL, rows, T, 0);
    for (size_t r = 0; r < rows; r++) {
        size_t at = r * T + row[r]->context->n - 1;
        row[r]->score = 0;
        row[r]->best = true;
        for (size_t i = at; i < at + row[r]->ids.n; i++) {
            row[r]->score -= (double)b->token_loss[i];
            row[r]->best = row[r]->best && b->token_best[i] == 1;
        }
        if (!isfinite(row[r]->score))
            return fail(err, "a log-likelihood is not finite: the model has diverged or its file is damaged");
    }
    return true;
}

// Metrics: sums over the items
typedef struct { int64_t items; double acc, acc_norm, acc_bytes, score; } Metrics;

// is_gold: has the right choice the largest value? Of equal ones the first counts, as in numpy.argmax.
static bool is_gold(const Item* item, int norm) {
    int best = 0;
    double most = -INFINITY;
    for (int i = 0; i < item->n; i++) {
        const Choice* c = &item->choice[i];
        double value = c->score / (norm == 0 ? 1 : norm == 1 ? c->chars : c->bytes);
        if (value > most) most = value, best = i;
    }
    return best == item->gold;
}

// evaluate_items: scores all items; the log-likelihoods of each go into `scores`
static bool evaluate_items(Backend* b, Items* f, size_t B, size_t T, Metrics* sum, json_t* scores,
                           Error* err) {
    int *inputs = (int*)xcalloc(B * T, sizeof(int)), *targets = (int*)xcalloc(B * T, sizeof(int));
    size_t most = GROUP_ROWS * B + MAX_CHOICES, n_rows = 0, n_items = 0;
    Choice** row = (Choice**)xcalloc(most, sizeof(Choice*));
    Item* item = (Item*)xcalloc(GROUP_ROWS * B, sizeof(Item));
    b->token_loss = (real*)xcalloc(B * T, sizeof(real));
    b->token_best = (int*)xcalloc(B * T, sizeof(int));
    memset(sum, 0, sizeof *sum);
    bool ok = true, more = true;
    while (ok && more && !stop_signal) {
        n_rows = n_items = 0;
        while (more && n_rows < GROUP_ROWS * B) {
            more = items_next(f, &item[n_items], err);
            if (!more && err->text[0]) ok = false;
            if (!more) break;
            Item* it = &item[n_items++];
            for (int i = 0; i < it->n; i++) {
                it->choice[i].context = &it->context;           // the item has moved
                row[n_rows++] = &it->choice[i];
                if (choice_length(&it->choice[i]) > T)
                    ok = fail_line(err, "%s: line %lld: longer than before; the file has changed",
                                   f->files[f->file],
                                   (long long)f->number);
            }
        }
        qsort(row, n_rows, sizeof *row, compare_choices);
        for (size_t at = 0; ok && at < n_rows && !stop_signal; at += B)
            ok = choices_score(b, row + at, min_size(B, n_rows - at), inputs, targets, err);
        for (size_t i = 0; i < n_items; i++) {
            json_t* list = json_array();
            for (int k = 0; k < item[i].n; k++)
                json_array_append_new(list, json_real(item[i].choice[k].score));
            json_array_append_new(scores, list);
            sum->items++;
            sum->score += item[i].choice[0].score;
            sum->acc += f->task == TASK_LAMBADA ? item[i].choice[0].best : is_gold(&item[i], 0);
            sum->acc_norm += is_gold(&item[i], 1);
            sum->acc_bytes += is_gold(&item[i], 2);
            item_free(&item[i]);
        }
    }
    free(b->token_loss); free(b->token_best);
    b->token_loss = NULL;
    b->token_best = NULL;
    free(inputs); free(targets); free(row); free(item);
    return ok;
}

// set_accuracy: a share of n items and the standard error of a mean
static double set_accuracy(json_t* results, const char* name, double sum, int64_t items) {
    char error[32];
    double n = (double)items, share = sum / n;
    snprintf(error, sizeof error, "%s_stderr", name);
    json_object_set_new(results, name, json_real(share));
    json_object_set_new(results, error, json_finite(sqrt(share * (1 - share) / (n - 1))));
    return share;
}

static bool eval_items(Backend* b, Items* f, int64_t B, int64_t T, json_t* results, Error* err) {
    Metrics m;
    json_t* scores = json_array();
    double start = seconds_now();
    bool ok = evaluate_items(b, f, (size_t)B, (size_t)T, &m, scores, err);
    if (ok && m.items) {
        double rate = (double)m.items / (seconds_now() - start);
        double acc = set_accuracy(results, "acc", m.acc, m.items);
        json_object_set_new(results, "items", json_integer(m.items));
        printf("items %lld | acc %.4f", (long long)m.items, acc);
        if (f->task == TASK_LAMBADA) {
            double perplexity = exp(-m.score / (double)m.items);
            json_object_set_new(results, "perplexity", json_finite(perplexity));
            printf(" | perplexity %.4f", perplexity);
        } else {
            double norm = set_accuracy(results, "acc_norm", m.acc_norm, m.items);
            printf(" | acc_norm %.4f | acc_bytes %.4f", norm,
                   set_accuracy(results, "acc_bytes", m.acc_bytes, m.items));
        }
        printf(" | %.1f items/s\n", rate);
        json_object_set(results, "loglikelihoods", scores);
    }
    json_decref(scores);
    return ok;
}
