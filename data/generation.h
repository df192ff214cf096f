// Around generation: prompts from a file, and where a text ends. Part of section 10 of train_mamba.c.

// PromptList: --prompts: a text file with a prompt in every line, or JSON lines {"prompt": ...}. Empty lines
// are none.
typedef struct {
    char** text;
    size_t* size;
    size_t n;
} PromptList;

static void prompts_free(PromptList* list) {
    for (size_t i = 0; i < list->n; i++) free(list->text[i]);
    free(list->text);
    free(list->size);
    memset(list, 0, sizeof *list);
}

static void prompts_add(PromptList* list, const char* text, size_t n) {
    list->text = (char**)xrealloc(list->text, list->n + 1, sizeof(char*));
    list->size = (size_t*)xrealloc(list->size, list->n + 1, sizeof(size_t));
    char* copy = (char*)xcalloc(n + 1, 1);
    memcpy(copy, text, n);
    list->text[list->n] = copy;
    list->size[list->n++] = n;
}

static bool prompts_read(PromptList* list, const char* path, Error* err) {
    struct stat st;
    char* line = NULL;
    size_t room = 0;
    ssize_t n = 0;
    memset(list, 0, sizeof *list);
    int fd = open_regular(path, &st, err);
    if (fd < 0) return false;
    FILE* f = fdopen(fd, "rb");
    bool ok = true;
    for (int64_t number = 1; ok && (n = getline(&line, &room, f)) > 0; number++) {
        while (n && (line[n - 1] == '\n' || line[n - 1] == '\r')) n--;
        if (n && !is_json_lines(path)) prompts_add(list, line, (size_t)n);
        if (!n || !is_json_lines(path)) continue;
        json_error_t where;
        json_t* root = json_loadb(line, (size_t)n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &where);
        const json_t* text = json_object_get(root, "prompt");
        if (!root)
            ok = fail_line(err, "%s: line %lld: expected JSON, found: %s", path, (long long)number,
                           where.text);
        else if (!json_is_string(text))
            ok = fail_line(err, "%s: line %lld: expected an object with a string \"prompt\", found %s", path,
                           (long long)number, text ? "another type" : "none of that name");
        else prompts_add(list, json_string_value(text), json_string_length(text));
        json_decref(root);
    }
    if (ok && ferror(f)) ok = fail_line(err, "%s: cannot read: %s", path, strerror(errno));
    if (ok && list->n == 0) ok = fail_line(err, "%s: expected a prompt in every line, found none", path);
    fclose(f);
    free(line);
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
