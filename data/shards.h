// shards.h: where the tensors of a published model are: one file, or several that an index lists.
//
//   model.safetensors                  one file
//   model.safetensors.index.json       {"metadata": {...}, "weight_map": {"tensor name": "file name", ...}}
//   pytorch_model.bin                  one file of torch.save
//   pytorch_model.bin.index.json       the same index
// The first of these that is in the directory counts, as in transformers. A file name in an index is a name
// in the
// same directory, nothing else; links are followed (the cache of Hugging Face is made of links).

enum { SHARD_MAX_INDEX = 4 << 20, SHARD_MAX = 512 };      // bytes of an index; files it may name

typedef struct { const char *name, *file; } IndexEntry;

static int order_by_file(const void* a, const void* b) {
    return strcmp(((const IndexEntry*)a)->file, ((const IndexEntry*)b)->file);
}

static int order_by_entry(const void* a, const void* b) {
    return strcmp(((const IndexEntry*)a)->name, ((const IndexEntry*)b)->name);
}

// index_map: the object weight_map into entry; the strings stay where they are in the text
static bool index_map(IndexEntry* entry, int* n, const char** p, const char* end, char* text,
                      const char* path,
                      Error* err) {
    json_error_t e;
    bool done = false;
    int first = *n;
    for (char* name; (name = next_key(p, end, *n == first, text, &done, &e)) != NULL; ++*n) {
        entry[*n].name = name;
        if (!(entry[*n].file = json_string_in_place(p, end, ST_MAX_ENTRY, text, &e)))
            return fail_line(err, "%s: weight_map, %.200s: %s", path, name, e.text);
    }
    return done || fail_line(err, "%s: weight_map: %s", path, e.text);
}

// index_parse: one level at a time, like the header of a .safetensors file: a tree of hostile JSON can need
// 70
// times its text
static bool index_parse(IndexEntry* entry, int* n, char* text, size_t size, const char* path, Error* err) {
    const char *p = text, *end = text + size;
    json_error_t e;
    bool done = false, first = true, found = false;
    *n = 0;
    for (char* key; (key = next_key(&p, end, first, text, &done, &e)) != NULL; first = false) {
        if (strcmp(key, "weight_map") == 0) {
            if (found) return fail_line(err, "%s: weight_map appears twice", path);
            found = true;
            if (!index_map(entry, n, &p, end, text, path, err)) return false;
            continue;
        }
        json_t* other = json_piece(&p, end, ST_MAX_ENTRY, &e);
        if (!other) return fail_line(err, "%s: %.200s: not valid JSON of at most %d bytes: %s", path, key,
                                     ST_MAX_ENTRY, e.text);
        json_decref(other);
    }
    skip_space(&p, end);
    if (!done || p != end)
        return fail_line(err, "%s: not valid JSON at byte %lld: %s", path, (long long)(p - text),
                         done ? "text after the closing brace" : e.text);
    return (found && *n > 0) ||
        fail_line(err, "%s: expected an object weight_map with at least one tensor", path);
}

static bool shard_open(SafeTensors* st, const char* path, Error* err) {
    size_t n = strlen(path);
    return n > 4 && strcmp(path + n - 4, ".bin") == 0 ? pickle_open(st, path, err)
        : safetensors_open(st, path, err);
}

// shard_name_check: a plain name with the ending that belongs to this index
static bool shard_name_check(const char* file, bool bin, const char* path, Error* err) {
    const char* ending = bin ? ".bin" : ".safetensors";
    size_t n = strlen(file), m = strlen(ending);
    return (n > m && n < 256 && !strchr(file, '/') && file[0] != '.' && strcmp(file + n - m, ending) == 0) ||
           fail_line(err, "%s: file name \"%.100s\", expected a name in the same directory that ends in %s",
                     path,
                     file, ending);
}

// index_files: the different files of the map, checked; missing ones are listed at once. entry is sorted by
// file.
static bool index_files(const IndexEntry* entry, int n, const char* dir, bool bin, const char* path,
                        const char** file, int* n_files, Error* err) {
    char missing[1024] = "", name[4096];
    int n_missing = 0;
    *n_files = 0;
    for (int i = 0; i < n; i++) {
        struct stat info;
        if (i && strcmp(entry[i].file, entry[i - 1].file) == 0) continue;
        if (!shard_name_check(entry[i].file, bin, path, err)) return false;
        if (*n_files == SHARD_MAX) return fail_line(err, "%s: names more than %d files", path, SHARD_MAX);
        file[(*n_files)++] = entry[i].file;
        if (!join_path(name, sizeof name, dir, entry[i].file, err)) return false;
        if (stat(name, &info) == 0) continue;
        size_t at = strlen(missing);
        if (n_missing++ < 6) snprintf(missing + at, sizeof missing - at, "%s%.120s", at ? ", " : "",
                                      entry[i].file);
    }
    return !n_missing ||
        fail_line(err, "%s: %d of the %d files it names are missing: %s%s; download the rest", path,
                                   n_missing, *n_files, missing, n_missing > 6 ? ", ..." : "");
}

// index_merge: the tensors of all parts as one sorted table, which must be what the index says. entry is
// sorted
// by name.
static bool index_merge(SafeTensors* st, const IndexEntry* entry, int n, Error* err) {
    for (int i = 0; i < st->n_parts; i++) {
        SafeTensors* part = st->parts + i;
        for (int j = 0; j < part->n; j++) {
            st->tensor[st->n] = part->tensor[j];
            st->tensor[st->n++].part = part;
        }
    }
    qsort(st->tensor, (size_t)st->n, sizeof(SafeTensor), order_by_name);
    for (int i = 1; i < st->n; i++)
        if (strcmp(st->tensor[i - 1].name, st->tensor[i].name) == 0)
            return fail_line(err, "%s: tensor %.200s is in two files, %.200s and %.200s", st->path,
                             st->tensor[i].name, st->tensor[i - 1].part->path, st->tensor[i].part->path);
    for (int i = 1; i < n; i++)
        if (strcmp(entry[i - 1].name, entry[i].name) == 0)
            return fail_line(err, "%s: weight_map lists %.200s twice", st->path, entry[i].name);
    for (int i = 0, j = 0; i < n || j < st->n;) {
        int order = i == n ? 1 : j == st->n ? -1 : strcmp(entry[i].name, st->tensor[j].name);
        const char* has = j < st->n ? st->tensor[j].part->path : "";
        if (order > 0)
            return fail_line(err, "%s: does not list tensor %.200s, which is in %s", st->path,
                             st->tensor[j].name, has);
        const char* base = strrchr(has, '/');
        if (order < 0 || strcmp(base + 1, entry[i].file) != 0)
            return fail_line(err, "%s: lists tensor %.200s in %.200s, which does not hold it", st->path,
                             entry[i].name,
                             entry[i].file);
        i++, j++;
    }
    return true;
}

// index_open: all files of an index as one table of tensors. On failure st is closed.
static bool index_open(SafeTensors* st, const char* dir, const char* path, bool bin, Error* err) {
    static const size_t smallest = sizeof "\"\":\"\"" - 1;
    memset(st, 0, sizeof *st);
    st->fd = -1;
    size_t size = 0, total = 0;
    char name[4096];
    const char* file[SHARD_MAX];
    int n = 0, n_files = 0;
    char* text = read_text(path, SHARD_MAX_INDEX, &size, err);
    if (!text) return false;
    IndexEntry* entry = (IndexEntry*)calloc(size / smallest + 1, sizeof(IndexEntry));
    bool ok = (entry && (st->path = strdup(path))) || fail_line(err, "%s: out of memory", path);
    ok = ok && index_parse(entry, &n, text, size, path, err);
    if (ok) qsort(entry, (size_t)n, sizeof(IndexEntry), order_by_file);
    ok = ok && index_files(entry, n, dir, bin, path, file, &n_files, err);
    if (ok && !(st->parts = (SafeTensors*)calloc((size_t)n_files, sizeof(SafeTensors))))
        ok = fail_line(err, "%s: out of memory", path);
    for (int i = 0; i < n_files && ok; i++) {
        ok = join_path(name, sizeof name, dir, file[i], err) && shard_open(st->parts + i, name, err);
        st->n_parts += ok;
        if (ok) total += (size_t)st->parts[i].n;
    }
    if (ok && !(st->tensor = (SafeTensor*)calloc(total + 1, sizeof(SafeTensor))))
        ok = fail_line(err, "%s: out of memory", path);
    if (ok) qsort(entry, (size_t)n, sizeof(IndexEntry), order_by_entry);
    ok = ok && index_merge(st, entry, n, err);
    free(entry);
    free(text);
    if (!ok) safetensors_close(st);
    return ok;
}

// weights_open: the tensors of a model directory, in whichever form it has them
bool weights_open(SafeTensors* st, const char* dir, Error* err) {
    char path[4096];
    int form = weights_form(dir);
    memset(st, 0, sizeof *st);
    st->fd = -1;
    if (form < 0)
        return fail_line(err, "%s: holds no weights: expected %s, %s, or an index of such files", dir,
                         weight_files[0], weight_files[2]);
    if (!join_path(path, sizeof path, dir, weight_files[form], err)) return false;
    return form % 2 ? index_open(st, dir, path, form == 3, err) : shard_open(st, path, err);
}
