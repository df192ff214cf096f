// `tokenize`: text and JSON lines files into token shards for training, with the tokenizer beside them:
//   DIR/train_000000.bin, ...    the documents up to the validation part, at most 10^8 tokens a file
//   DIR/val_000000.bin, ...      the last --val-fraction of the bytes; of JSON lines whole documents
//   DIR/tokenizer.json           as it was given
// The format of shards is in dataloader.h; every document begins with the end token. DIR appears, complete,
// by one rename of DIR.tmp at the end; a DIR that exists is refused.

enum { TOKENS_PER_SHARD = 100000000 };

typedef struct {
    const char* dir;
    int width;
    int fd;                              // open shard, -1: none
    char path[4352];
    uint32_t in_shard;
    int n_shards[2];                     // of training, of validation
    int64_t n_tokens[2];
    bool val;                            // the open shard is one for validation
    int64_t border, begin, total;        // bytes of all files: training part, before the present file, all
    double start, shown;
    unsigned char* piece;
    size_t room;
} ShardWriter;

static bool shard_error(const ShardWriter* w, Error* err) {
    return fail_line(err, "%s: cannot write: %s", w->path, strerror(errno));
}

// shard_finish: the header, which tells the number of tokens, comes last
static bool shard_finish(ShardWriter* w, Error* err) {
    uint32_t header[SHARD_HEADER / 4] = {w->width == 2 ? 20240520u : 20240801u, w->width == 2 ? 1u : 7u,
                                         w->in_shard};
    if (w->fd < 0) return true;
    bool ok = lseek(w->fd, 0, SEEK_SET) == 0 && write_all(w->fd, header, sizeof header);
    int error = errno, fd = w->fd;
    w->fd = -1;
    if (ok) ok = sync_close(fd), error = errno;
    else close(fd);
    errno = error;
    return ok || shard_error(w, err);
}

static bool shard_begin(ShardWriter* w, bool val, Error* err) {
    static const char zeros[SHARD_HEADER] = {0};
    if (!shard_finish(w, err)) return false;
    w->val = val;
    w->in_shard = 0;
    snprintf(w->path, sizeof w->path, "%s/%s_%06d.bin", w->dir, val ? "val" : "train", w->n_shards[val]++);
    w->fd = open_retry(w->path, O_WRONLY | O_CREAT | O_EXCL);
    return (w->fd >= 0 && write_all(w->fd, zeros, sizeof zeros)) || shard_error(w, err);
}

static void tokenize_progress(ShardWriter* w, int64_t done) {
    double now = seconds_now(), seconds = now - w->start;
    if (now - w->shown < 2) return;
    w->shown = now;
    printf("%5.1f%% | %lld tokens | %.1f MB/s | %.0f s left\n", 100.0 * (double)done / (double)w->total,
           (long long)(w->n_tokens[0] + w->n_tokens[1]), (double)done / seconds / 1e6,
           seconds * (double)(w->total - done) / (double)(done ? done : 1));
}

// shard_append: a TokenSink. What begins at or behind the border is for validation.
static bool shard_append(void* to, const int* ids, size_t n, int64_t at, Error* err) {
    ShardWriter* w = (ShardWriter*)to;
    bool val = w->begin + at >= w->border;
    for (size_t i = 0; i < n;) {
        if (w->fd < 0 || val != w->val || w->in_shard == TOKENS_PER_SHARD)
            if (!shard_begin(w, val, err)) return false;
        size_t m = min_size(n - i, (size_t)TOKENS_PER_SHARD - w->in_shard), bytes = m * (size_t)w->width;
        if (bytes > w->room) w->piece = (unsigned char*)xrealloc(w->piece, w->room = bytes, 1);
        for (size_t k = 0; k < m; k++) {
            uint16_t id16 = (uint16_t)ids[i + k];
            memcpy(w->piece + k * (size_t)w->width,
                   w->width == 2 ? (const void*)&id16 : (const void*)&ids[i + k], (size_t)w->width);
        }
        if (!write_all(w->fd, w->piece, bytes)) return shard_error(w, err);
        w->in_shard += (uint32_t)m;
        w->n_tokens[val] += (int64_t)m;
        i += m;
    }
    tokenize_progress(w, w->begin + at);
    return true;
}

// tokenize_files: all of them through one writer
static bool tokenize_files(ShardWriter* w, char** files, int n, const Tokenizer* tok, Error* err) {
    bool ok = true;
    for (int i = 0; i < n && ok; i++) {
        struct stat st;
        unsigned char start[4] = {0};
        int fd = open_regular(files[i], &st, err);
        if (fd < 0) return false;
        TextFile f = text_file(files[i], fd, (int64_t)st.st_size, tok, tok->eos);
        f.border = w->border - w->begin;
        size_t head = min_size((size_t)f.size, sizeof start);
        ok = data_read(fd, start, head, 0, files[i], err) && is_text(start, head, files[i], err) &&
             text_file_tokens(&f, shard_append, w, err);
        if (ok) text_file_warn(&f);
        close(fd);
        w->begin += f.size;
    }
    return ok && shard_finish(w, err);
}

// tokenize_made: is this a name that tokenize gives a file in DIR.tmp?
static bool tokenize_made(const char* name) {
    const char* digits = strncmp(name, "train_", 6) == 0 ? name + 6
                         : strncmp(name, "val_", 4) == 0 ? name + 4
                                                         : NULL;
    return strcmp(name, "tokenizer.json") == 0 ||
           (digits && strspn(digits, "0123456789") >= 6 &&
            strcmp(digits + strspn(digits, "0123456789"), ".bin") == 0);
}

// tokenize_own: makes sure that DIR.tmp, if it is there, was made by an earlier run: a directory, no link,
// with a lock and nothing else that tokenize would not have put there
static bool tokenize_own(const char* dir, Error* err) {
    struct stat st;
    if (lstat(dir, &st) != 0) return true;
    bool locked = false, foreign = !S_ISDIR(st.st_mode);
    DIR* list = foreign ? NULL : opendir(dir);
    for (struct dirent* entry; list && (entry = readdir(list)) != NULL;) {
        const char* name = entry->d_name;
        if (strcmp(name, ".lock") == 0) locked = true;
        else if (strcmp(name, ".") != 0 && strcmp(name, "..") != 0 && !tokenize_made(name)) foreign = true;
    }
    if (list) closedir(list);
    return (locked && !foreign) ||
           fail_line(
               err,
               "%s is in the way: expected nothing, or what an unfinished tokenize left; move it away or "
               "choose another --out",
               dir);
}

// tokenize_clear: removes what an earlier run left in DIR.tmp, but not the lock on it; returns how many files
static int tokenize_clear(const char* dir) {
    DIR* list = opendir(dir);
    int n = 0;
    for (struct dirent* entry; list && (entry = readdir(list)) != NULL;) {
        char path[4352];
        Error ignored;
        if (tokenize_made(entry->d_name) && join_path(path, sizeof path, dir, entry->d_name, &ignored) &&
            unlink(path) == 0)
            n++;
    }
    if (list) closedir(list);
    return n;
}

int tokenize_main(Settings* s) {
    Tokenizer tok;
    Error err;
    const Options* o = &s->o;
    char dir[4096], parent[4096], **files;
    int n_names, n_files;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!o->tokenizer[0]) die("tokenize needs --tokenizer, a tokenizer.json or the directory that holds one");
    if (!o->data[0]) die("tokenize needs --data, text or .jsonl files");
    if (settings_origin(s, "out") == FROM_DEFAULT || !o->out[0])
        die("tokenize needs --out, a directory to be made for the shards");
    char** names = list_split(o->data, &n_names);
    if (!tokenizer_load(&tok, o->tokenizer, &err) || !files_of(names, n_names, &files, &n_files, &err))
        die("%s", err.text);
    if (o->eos_token >= 0) tok.eos = (int)o->eos_token;
    if (tok.eos < 0)
        die("%s: found none of the usual end tokens (such as %s); give the id of one with --eos-token",
            o->tokenizer, END_TEXT);
    if (tok.eos >= tok.vocab_size)
        die("--eos-token %d: the ids of %s end at %lld", tok.eos, o->tokenizer,
            (long long)tok.vocab_size - 1);

    ShardWriter w;
    memset(&w, 0, sizeof w);
    for (int i = 0; i < n_files; i++) {
        struct stat st;
        int fd = open_regular(files[i], &st, &err);
        if (fd < 0) die("%s", err.text);
        close(fd);
        w.total += (int64_t)st.st_size;
    }
    size_t length = strlen(o->out);
    while (length > 1 && o->out[length - 1] == '/') length--;
    if (length + 5 > sizeof dir)
        die("--out: the path has %zu characters, expected at most %zu", length, sizeof dir - 5);
    snprintf(parent, sizeof parent, "%.*s", (int)length, o->out);
    struct stat st;
    if (lstat(parent, &st) == 0)
        die("%s is already there; tokenize makes a new directory, choose another --out", parent);
    snprintf(dir, sizeof dir, "%.4090s.tmp", parent);
    if (!tokenize_own(dir, &err) || !checkpoint_make_dir(dir, &err)) die("%s", err.text);
    int lock = lock_run(dir), left = tokenize_clear(dir);
    if (left) printf("removed what an unfinished run left in %s (files: %d)\n", dir, left);

    w.dir = dir;
    w.fd = -1;
    w.width = tok.vocab_size <= 65536 ? 2 : 4;
    w.border = o->val_fraction > 0 ? (int64_t)((double)w.total * (1 - o->val_fraction)) : INT64_MAX;
    w.start = w.shown = seconds_now();
    bool ok = tokenize_files(&w, files, n_files, &tok, &err);
    if (ok && w.n_tokens[0] == 0)
        ok = fail(&err,
                  "the files hold no text for training; give more, or a smaller "
                  "--val-fraction");
    if (ok && o->val_fraction > 0 && w.n_tokens[1] == 0)
        ok = fail(&err, "no document begins in the last part of the files, which --val-fraction %g keeps for "
                  "validation; give more files or --val-fraction 0", o->val_fraction);
    ok = ok && tokenizer_write(&tok, dir, &err);
    if (!ok) {                           // what was made is of no use
        if (w.fd >= 0) close(w.fd);
        tokenize_clear(dir);
    }
    char lock_path[4352];
    snprintf(lock_path, sizeof lock_path, "%s/.lock", dir);
    unlink(lock_path);
    if (ok) ok = sync_dir(dir, &err);
    if (ok && rename(dir, parent) != 0)
        ok = fail_line(&err, "%s: cannot become %s: %s", dir, parent, strerror(errno));
    if (!ok) {
        rmdir(dir);
        die("%s", err.text);
    }
    char* slash = strrchr(parent, '/');
    snprintf(dir, sizeof dir, "%s", parent);
    if (slash == parent) parent[1] = 0;
    else if (slash) *slash = 0;
    else snprintf(parent, sizeof parent, ".");
    if (!sync_dir(parent, &err)) die("%s", err.text);
    close(lock);
    double seconds = seconds_now() - w.start;
    printf("%s: %lld tokens in %d shards for training, %lld in %d for validation, %d bytes each\n", dir,
           (long long)w.n_tokens[0], w.n_shards[0], (long long)w.n_tokens[1], w.n_shards[1], w.width);
    printf("%.1f MB in %.1f s, %.1f MB/s, %.3f bytes per token\n", (double)w.total / 1e6, seconds,
           (double)w.total / 1e6 / seconds, (double)w.total / (double)(w.n_tokens[0] + w.n_tokens[1]));
    files_free(files, n_files);
    free(names);
    free(w.piece);
    tokenizer_free(&tok);
    return 0;
}
