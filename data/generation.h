// Around generation: prompts from a file, and where a text ends. Part of section 10 of train_mamba.c.

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
    json_t* root = json_line(line, n, err);
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
