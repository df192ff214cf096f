// safetensors.h: what a model looks like on disk: .safetensors files and checkpoint directories.
//
//   1. Files                open, write and sync with every result checked
//   2. Reading safetensors  everything is validated before the first tensor is read
//   3. Writing safetensors
//   4. Checkpoints          a directory that becomes visible by one rename
//
// A .safetensors file is 8 bytes n (unsigned, little-endian), n bytes of JSON, then the data of all tensors:
//   {"name": {"dtype": "F32", "shape": [3,4], "data_offsets": [begin,end]}, ...,
//    "__metadata__": {"key": "value", ...}}
// Offsets count from byte 8+n; sorted, the ranges tile the rest of the file exactly. Data is little-endian
// and row-major. (huggingface/safetensors, README "Format".) Every file is taken for hostile: readers return
// false with one line in Error, and do not allocate more than twice the file plus 16 MiB, whatever the file
// says.
#include <dirent.h>
#include <jansson.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are little-endian");

// ---------------------------------------------------------------------------------------------------
// 1. Files

// fail_line: fail() for messages that quote a file: control characters become '?', so that it stays one line.
__attribute__((format(printf, 2, 3)))
bool fail_line(Error* err, const char* format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    for (unsigned char* p = (unsigned char*)err->text; *p; p++) if (*p < 32 || *p == 127) *p = '?';
    return false;
}

// can_create: before long work whose result goes to `path`: whether its directory can be written
bool can_create(const char* path, Error* err) {
    const char* slash = strrchr(path, '/');
    char parent[4096];
    snprintf(parent, sizeof parent, "%.*s", slash ? (int)(slash - path + 1) : 1, slash ? path : ".");
    return access(parent, W_OK | X_OK) == 0 ||
           fail_line(err, "%s: cannot create: %s", path, strerror(errno));
}

bool join_path(char* out, size_t size, const char* dir, const char* name, Error* err) {
    int n = snprintf(out, size, "%s/%s", dir, name);
    return (n >= 0 && (size_t)n < size) || fail_line(err, "%.200s/%.200s: the path is too long", dir, name);
}

int open_retry(const char* path, int flags) {
    int fd;
    do fd = open(path, flags | O_CLOEXEC, 0666); while (fd < 0 && errno == EINTR);
    return fd;
}

// open_regular: opens a regular file (links are followed) for reading; -1 with a line for anything else.
// O_NONBLOCK keeps a FIFO without a writer from blocking forever; it has no effect on regular files.
int open_regular(const char* path, struct stat* info, Error* err) {
    int fd = open_retry(path, O_RDONLY | O_NONBLOCK);
    if (fd < 0) { fail_line(err, "%s: cannot open: %s", path, strerror(errno)); return -1; }
    if (fstat(fd, info) == 0 && S_ISREG(info->st_mode)) return fd;
    const char* kind = S_ISDIR(info->st_mode)    ? "directory"
                       : S_ISFIFO(info->st_mode) ? "FIFO"
                                                 : "special file";
    fail_line(err, "%s: expected a regular file, found a %s", path,
              S_ISCHR(info->st_mode) ? "character device" : kind);
    close(fd);
    return -1;
}

// read_exact: n bytes at an offset, or false; a file that ends early gives errno 0.
bool read_exact(int fd, void* buffer, size_t n, uint64_t offset) {
    for (size_t done = 0; done < n;) {
        ssize_t got = pread(fd, (char*)buffer + done, n - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got == 0) errno = 0;
        if (got <= 0) return false;
        done += (size_t)got;
    }
    return true;
}

bool write_all(int fd, const void* data, size_t n) {
    for (size_t done = 0; done < n;) {
        ssize_t put = write(fd, (const char*)data + done, n - done);
        if (put < 0 && errno == EINTR) continue;
        if (put == 0) errno = ENOSPC;
        if (put <= 0) return false;
        done += (size_t)put;
    }
    return true;
}

// sync_close: true only if the data is on the device. After a failed fsync the kernel may have dropped the
// pages and would report success the next time, so an error here is final: the caller gives up this file.
bool sync_close(int fd) {
    int error = 0;
    while (fsync(fd) < 0) if (errno != EINTR) { error = errno; break; }
    if (close(fd) < 0 && errno != EINTR && !error) error = errno;   // EINTR: Linux has closed it
    errno = error;
    return !error;
}

// sync_dir: makes the names in a directory (created, renamed, removed) survive a power loss.
bool sync_dir(const char* dir, Error* err) {
    int fd = open_retry(dir, O_RDONLY | O_DIRECTORY);
    if (fd < 0) return fail_line(err, "%s: cannot open the directory: %s", dir, strerror(errno));
    return sync_close(fd) || errno == EINVAL ||   // EINVAL: a file system that has no such call
           fail_line(err, "%s: cannot sync the directory: %s", dir, strerror(errno));
}

// Text: a string that grows. After a failed allocation it stays empty and `failed` is set.
typedef struct { char* data; size_t n, size; bool failed; } Text;

__attribute__((format(printf, 2, 3)))
void text_add(Text* text, const char* format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (n < 0 || text->failed) return;
    if (text->n + (size_t)n + 1 > text->size) {
        size_t size = 2 * (text->n + (size_t)n + 1);
        char* data = (char*)realloc(text->data, size);
        if (!data) { text->failed = true; return; }
        text->data = data;
        text->size = size;
    }
    va_start(args, format);
    vsnprintf(text->data + text->n, text->size - text->n, format, args);
    va_end(args);
    text->n += (size_t)n;
}

void text_add_json(Text* text, const char* string) {   // quoted and escaped; fails on invalid UTF-8
    json_t* value = json_string(string);
    char* quoted = value ? json_dumps(value, JSON_ENCODE_ANY) : NULL;
    if (quoted) text_add(text, "%s", quoted);
    else text->failed = true;
    free(quoted);
    json_decref(value);
}

// read_text: a small regular file as a string ending in NUL, to be freed; NULL with a line
char* read_text(const char* path, size_t limit, size_t* size, Error* err) {
    struct stat info;
    int fd = open_regular(path, &info, err);
    if (fd < 0) return NULL;
    char* text = (uint64_t)info.st_size <= limit ? (char*)malloc((size_t)info.st_size + 1) : NULL;
    bool ok = text != NULL;
    if (!ok) fail_line(err, "%s: %lld bytes, expected at most %zu", path, (long long)info.st_size, limit);
    else if (!(ok = read_exact(fd, text, (size_t)info.st_size, 0)))
        fail_line(err, "%s: cannot read: %s", path,
                  errno ? strerror(errno) : "the file changed while reading");
    close(fd);
    if (!ok) { free(text); return NULL; }
    *size = (size_t)info.st_size;
    text[*size] = 0;
    return text;
}

// ---------------------------------------------------------------------------------------------------
// 2. Reading safetensors

enum { ST_F64, ST_F32, ST_F16, ST_BF16, ST_I64, ST_I32, ST_I16, ST_I8, ST_U64, ST_U32, ST_U16, ST_U8, ST_BOOL,
       ST_F8_E4M3, ST_F8_E5M2, ST_DTYPES };
typedef struct { const char* name; size_t size; } SafeType;
static const SafeType st_dtype[ST_DTYPES] = {{"F64", 8},  {"F32", 4},     {"F16", 2},    {"BF16", 2},
                                             {"I64", 8},  {"I32", 4},     {"I16", 2},    {"I8", 1},
                                             {"U64", 8},  {"U32", 4},     {"U16", 2},    {"U8", 1},
                                             {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};

enum { ST_MAX_DIMS = 8, ST_MAX_HEADER = 8 << 20, ST_MAX_ENTRY = 64 << 10, ST_MAX_VALUE = 1 << 20,
       ST_MAX_METADATA = 1 << 16, ST_PIECE = 1 << 16 };

// SafeTensors: the tensors of one file, or of the several files that one index names (shards.h). A
// pytorch_model.bin is described by the same table (pickle.h), so that everything below reads all of them.
typedef struct SafeTensors SafeTensors;

typedef struct {
    char* name;                      // points into the header
    int dtype, ndim;
    int64_t shape[ST_MAX_DIMS];
    uint64_t begin, end;             // bytes after data_start
    size_t count;                    // elements
    const SafeTensors* part;         // the file that holds it; NULL: the one that lists it
    uint32_t crc;                    // CRC-32 of its bytes; 0: not known
} SafeTensor;

struct SafeTensors {
    int fd;
    char* path;
    uint64_t data_start;             // 8 + length of the header
    int n;
    SafeTensor* tensor;              // sorted by name
    int n_meta;
    char** meta;                     // key, value, key, value, ...: 2 * n_meta strings in the header
    char* header;
    struct stat info;                // as the file was when it was opened
    int n_parts;
    SafeTensors* parts;              // of an index: the files that it names
};

void safetensors_close(SafeTensors* st) {
    for (int i = 0; i < st->n_parts; i++) safetensors_close(st->parts + i);
    free(st->parts);
    if (st->path && st->fd >= 0) close(st->fd);
    free(st->path);
    free(st->tensor);
    free(st->meta);
    free(st->header);
    memset(st, 0, sizeof *st);
    st->fd = -1;
}

// shape_text: "[3,4]"
const char* shape_text(char* out, size_t size, int ndim, const int64_t* shape) {
    size_t n = (size_t)snprintf(out, size, "[");
    for (int i = 0; i < ndim && n < size; i++)
        n += (size_t)snprintf(out + n, size - n, "%s%lld", i ? "," : "", (long long)shape[i]);
    if (n < size) snprintf(out + n, size - n, "]");
    return out;
}

static void skip_space(const char** p, const char* end) {
    while (*p < end && (**p == ' ' || **p == '\t' || **p == '\n' || **p == '\r')) ++*p;
}

// json_piece: parses one JSON value of at most `limit` bytes at *p and steps over it. The header is taken one
// entry at a time: a tree of all of it needs 12 times its text, and up to 70 times when the text is hostile.
static json_t* json_piece(const char** p, const char* end, size_t limit, json_error_t* e) {
    size_t n = (size_t)(end - *p) < limit ? (size_t)(end - *p) : limit;
    json_t* value = json_loadb(*p, n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_DISABLE_EOF_CHECK, e);
    if (value) *p += e->position;
    return value;
}

// json_string_in_place: like json_piece for a string, which is decoded onto its own place in the header (the
// decoded form is never longer than the quoted one). NULL unless a string is there.
static char* json_string_in_place(const char** p, const char* end, size_t limit, char* header,
                                  json_error_t* e) {
    char* place = header + (*p - header);
    snprintf(e->text, sizeof e->text, "expected a string");
    json_t* value = *p < end && **p == '"' ? json_piece(p, end, limit, e) : NULL;
    if (value) memcpy(place, json_string_value(value), json_string_length(value) + 1);
    json_decref(value);
    return value ? place : NULL;
}

// next_key: steps over the `{` or `,` before an entry, its key and the colon. Returns the key; NULL with
// *done at the closing brace, NULL without it when the text is malformed.
static char* next_key(const char** p, const char* end, bool first, char* header, bool* done,
                      json_error_t* e) {
    snprintf(e->text, sizeof e->text, "expected %s", first ? "{" : ", or }");
    *done = false;
    skip_space(p, end);
    if (*p == end || !(**p == (first ? '{' : ',') || (!first && **p == '}'))) return NULL;
    *done = *(*p)++ == '}';
    if (*done) return NULL;
    skip_space(p, end);
    if (first && *p < end && **p == '}') { ++*p; *done = true; return NULL; }
    char* key = json_string_in_place(p, end, ST_MAX_ENTRY, header, e);
    if (!key) return NULL;
    skip_space(p, end);
    snprintf(e->text, sizeof e->text, "expected a colon after \"%.40s\"", key);
    if (*p == end || *(*p)++ != ':') return NULL;
    skip_space(p, end);
    return key;
}

// parse_tensor: {"dtype": ..., "shape": [...], "data_offsets": [begin,end]} into t
static bool parse_tensor(SafeTensor* t, const json_t* entry, const char* path, Error* err) {
    const json_t* dtype = json_object_get(entry, "dtype");
    const json_t* shape = json_object_get(entry, "shape");
    const json_t* offsets = json_object_get(entry, "data_offsets");
    if (!json_is_string(dtype) || !json_is_array(shape) || !json_is_array(offsets) ||
        json_object_size(entry) != 3)
        return fail_line(err, "%s: tensor %.200s: expected exactly dtype, shape (list), data_offsets (list)",
                         path, t->name);
    for (t->dtype = 0; t->dtype < ST_DTYPES; t->dtype++)
        if (strcmp(json_string_value(dtype), st_dtype[t->dtype].name) == 0) break;
    if (t->dtype == ST_DTYPES)
        return fail_line(err, "%s: tensor %.200s: unknown dtype \"%.40s\", expected F32, F16, BF16, I64, ...",
                         path, t->name, json_string_value(dtype));
    if (json_array_size(shape) > ST_MAX_DIMS)
        return fail_line(err, "%s: tensor %.200s: shape has %zu dimensions, at most %d are supported", path,
                         t->name, json_array_size(shape), ST_MAX_DIMS);
    t->ndim = (int)json_array_size(shape);
    for (int i = 0; i < t->ndim; i++) {
        const json_t* dim = json_array_get(shape, (size_t)i);
        t->shape[i] = json_is_integer(dim) ? json_integer_value(dim) : -1;
        if (t->shape[i] < 0)
            return fail_line(err, "%s: tensor %.200s: shape[%d] is not a non-negative integer", path, t->name,
                             i);
    }
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end) ||
        json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin))
        return fail_line(err, "%s: tensor %.200s: data_offsets must be two integers 0 <= begin <= end", path,
                         t->name);
    t->begin = (uint64_t)json_integer_value(begin);
    t->end = (uint64_t)json_integer_value(end);
    size_t bytes = 0;
    char text[200];
    if (!checked_size(t->ndim, t->shape, st_dtype[t->dtype].size, &bytes))
        return fail_line(err, "%s: tensor %.200s: shape %s does not fit in 63 bits", path, t->name,
                         shape_text(text, sizeof text, t->ndim, t->shape));
    if (bytes != t->end - t->begin)
        return fail_line(err, "%s: tensor %.200s: %s of shape %s needs %zu bytes, data_offsets give %llu",
                         path, t->name, st_dtype[t->dtype].name,
                         shape_text(text, sizeof text, t->ndim, t->shape), bytes,
                         (unsigned long long)(t->end - t->begin));
    t->count = bytes / st_dtype[t->dtype].size;
    return true;
}

static bool parse_metadata(SafeTensors* st, const char** p, const char* end, Error* err) {
    json_error_t e;
    bool done = false;
    if (st->meta) return fail_line(err, "%s: __metadata__ appears twice", st->path);
    if (!(st->meta = (char**)calloc(2 * ST_MAX_METADATA, sizeof(char*))))
        return fail_line(err, "%s: out of memory", st->path);
    for (char* key; (key = next_key(p, end, st->n_meta == 0, st->header, &done, &e)) != NULL; st->n_meta++) {
        if (st->n_meta == ST_MAX_METADATA)
            return fail_line(err, "%s: __metadata__ has more than %d entries", st->path, ST_MAX_METADATA);
        char* value = json_string_in_place(p, end, ST_MAX_VALUE, st->header, &e);
        if (!value) return fail_line(err, "%s: __metadata__ %.100s: %s", st->path, key, e.text);
        st->meta[2 * st->n_meta] = key;
        st->meta[2 * st->n_meta + 1] = value;
    }
    return done || fail_line(err, "%s: __metadata__: %s", st->path, e.text);
}

static int order_by_offset(const void* a, const void* b) {
    const SafeTensor *s = (const SafeTensor*)a, *t = (const SafeTensor*)b;
    if (s->begin != t->begin) return s->begin < t->begin ? -1 : 1;
    return s->end < t->end ? -1 : s->end > t->end;
}

static int order_by_name(const void* a, const void* b) {
    return strcmp(((const SafeTensor*)a)->name, ((const SafeTensor*)b)->name);
}

static bool parse_header(SafeTensors* st, size_t length, Error* err) {
    const char *p = st->header, *end = p + length;
    const size_t smallest = sizeof "\"\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}" - 1;
    json_error_t e;
    bool done = false;
    if (!(st->tensor = (SafeTensor*)calloc(length / smallest + 1, sizeof(SafeTensor))))
        return fail_line(err, "%s: out of memory", st->path);
    bool first = true;
    for (char* name; (name = next_key(&p, end, first, st->header, &done, &e)) != NULL; first = false) {
        if (strcmp(name, "__metadata__") == 0) {
            if (!parse_metadata(st, &p, end, err)) return false;
            continue;
        }
        SafeTensor* t = st->tensor + st->n++;
        t->name = name;
        json_t* entry = p < end && *p == '{' ? json_piece(&p, end, ST_MAX_ENTRY, &e) : NULL;
        if (!entry)
            return fail_line(err, "%s: tensor %.200s: the header entry is not a valid JSON object: %s",
                             st->path, name, p < end && *p == '{' ? e.text : "expected {");
        bool ok = parse_tensor(t, entry, st->path, err);
        json_decref(entry);
        if (!ok) return false;
    }
    skip_space(&p, end);
    if (!done || p != end)
        return fail_line(err, "%s: the header is not valid JSON at byte %lld: %s", st->path,
                         (long long)(p - st->header), done ? "text after the closing brace" : e.text);
    // the ranges, sorted, must tile the data: no hole, no overlap, nothing after the last one
    uint64_t at = 0, size = (uint64_t)st->info.st_size - st->data_start;
    qsort(st->tensor, (size_t)st->n, sizeof(SafeTensor), order_by_offset);
    for (int i = 0; i < st->n; at = st->tensor[i++].end)
        if (st->tensor[i].begin != at)
            return fail_line(err, "%s: tensor %.200s begins at byte %llu of the data, expected %llu (%s)",
                             st->path, st->tensor[i].name, (unsigned long long)st->tensor[i].begin,
                             (unsigned long long)at,
                             st->tensor[i].begin < at ? "two tensors overlap" : "a hole");
    if (at != size)
        return fail_line(err, "%s: the tensors need %llu bytes of data, the file has %llu; %s", st->path,
                         (unsigned long long)at, (unsigned long long)size,
                         at > size ? "it is cut off: download or copy it again"
                                   : "bytes follow the last tensor");
    qsort(st->tensor, (size_t)st->n, sizeof(SafeTensor), order_by_name);
    for (int i = 1; i < st->n; i++)
        if (strcmp(st->tensor[i - 1].name, st->tensor[i].name) == 0)
            return fail_line(err, "%s: tensor %.200s appears twice", st->path, st->tensor[i].name);
    return true;
}

// what_else: names well-known files that are not safetensors by their first bytes; NULL for all others
static const char* what_else(const char* head) {
    static const char* const kinds[][2] = {
        {"version https://git-lfs", "this is a Git LFS pointer: run git lfs pull"},
        {"<", "this is an HTML or XML page, not the file: download it again, perhaps after logging in"},
        {"PK", "this is a zip file; a model saved by PyTorch is named pytorch_model.bin"},
        {"GGUF", "this is a GGUF file, expected safetensors"},
        {"{", "this is a JSON file; model.safetensors.index.json only lists the files of a model"} };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strncmp(head, kinds[i][0], strlen(kinds[i][0])) == 0) return kinds[i][1];
    return NULL;
}

// safetensors_open: checks the whole header and keeps the file open. On failure st is closed; closing again
// is harmless.
bool safetensors_open(SafeTensors* st, const char* path, Error* err) {
    memset(st, 0, sizeof *st);
    st->fd = open_regular(path, &st->info, err);
    if (st->fd < 0) return false;
    uint64_t length = 0, size = (uint64_t)st->info.st_size;
    char head[33] = {0};
    bool ok = (st->path = strdup(path)) || fail_line(err, "%s: out of memory", path);
    if (ok && size < 8)
        ok = fail_line(err, "%s: %llu bytes, too short for safetensors (8 bytes and a header)", path,
                       (unsigned long long)size);
    if (ok && !read_exact(st->fd, head, size < 32 ? size : 32, 0))
        ok = fail_line(err, "%s: cannot read: %s", path,
                       errno ? strerror(errno) : "the file changed while reading");
    memcpy(&length, head, 8);
    if (ok && length > size - 8 && what_else(head)) ok = fail_line(err, "%s: %s", path, what_else(head));
    else if (ok && length > size - 8)
        ok = fail_line(err, "%s: the header length is %llu bytes, the file has %llu; %s", path,
                       (unsigned long long)length, (unsigned long long)size,
                       __builtin_bswap64(length) <= size - 8
                           ? "the length is big-endian"
                           : "not a safetensors file, or cut off: download or copy it again");
    else if (ok && (length < 2 || length > ST_MAX_HEADER || head[8] != '{'))
        ok = fail_line(err,
                       "%s: expected a header of 2 to %d bytes starting with {, found %llu bytes and 0x%02x",
                       path, ST_MAX_HEADER, (unsigned long long)length, (unsigned char)head[8]);
    st->data_start = 8 + length;
    if (ok && !(st->header = (char*)malloc(length + 1))) ok = fail_line(err, "%s: out of memory", path);
    if (ok && !read_exact(st->fd, st->header, length, 8))
        ok = fail_line(err, "%s: cannot read: %s", path,
                       errno ? strerror(errno) : "the file changed while reading");
    ok = ok && parse_header(st, length, err);
    if (!ok) {
        if (!st->path) close(st->fd);
        safetensors_close(st);
    }
    return ok;
}

const SafeTensor* safetensors_find(const SafeTensors* st, const char* name) {   // NULL when there is none
    for (int low = 0, high = st->n; low < high;) {
        int mid = low + (high - low) / 2, order = strcmp(name, st->tensor[mid].name);
        if (order == 0) return st->tensor + mid;
        if (order < 0) high = mid;
        else low = mid + 1;
    }
    return NULL;
}

const char* safetensors_metadata(const SafeTensors* st, const char* key) {   // NULL when there is none
    for (int i = 0; i < st->n_meta; i++) if (strcmp(st->meta[2 * i], key) == 0) return st->meta[2 * i + 1];
    return NULL;
}

// F16 has 5 bits of exponent and 10 of mantissa, BF16 is the upper half of a float. Both ways are exact or
// round to the nearest, ties to even; NaN stays NaN, and widening keeps its payload.
static float widen_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h >> 15) << 31, exponent = (h >> 10) & 31, mantissa = h & 1023;
    uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float value;
    memcpy(&value, &bits, 4);
    if (exponent == 0) value = (float)mantissa * (sign ? -0x1p-24f : 0x1p-24f);
    return value;
}

static inline float widen_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// round_bf16: a number that is not NaN to the nearest bfloat16, ties to even
static inline float round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits += 0x7fff + (bits >> 16 & 1);
    return widen_bf16((uint16_t)(bits >> 16));
}

// narrow_float: rounds to a sign, an exponent of e bits and a mantissa of m bits, m <= 10.
static uint16_t narrow_float(double value, int e, int m) {
    uint64_t bits, sign, top = ((uint64_t)1 << e) - 1;
    memcpy(&bits, &value, 8);
    sign = bits >> 63 << (e + m);
    int64_t exponent = (int64_t)(bits >> 52 & 2047) - 1023 + (int64_t)(top >> 1);   // biased as in the result
    uint64_t mantissa = bits & (((uint64_t)1 << 52) - 1);
    if (isnan(value)) return (uint16_t)(sign | top << m | mantissa >> (52 - m) | (uint64_t)1 << (m - 1));
    if (exponent >= (int64_t)top) return (uint16_t)(sign | top << m);
    int64_t shift = 52 - m + (exponent < 1 ? 1 - exponent : 0);   // fewer bits below the normal range
    if (shift > 54) return (uint16_t)sign;
    mantissa |= (uint64_t)1 << 52;
    uint64_t kept = mantissa >> shift, half = (uint64_t)1 << (shift - 1), rest = mantissa & (2 * half - 1);
    kept += rest > half || (rest == half && (kept & 1));
    // the leading 1 of the mantissa adds 1 to the exponent, and a carry out of it gives the next power of two
    if (exponent > 1) kept += (uint64_t)(exponent - 1) << m;
    return (uint16_t)(sign | kept);
}

// crc32_add: the CRC-32 of zip files (polynomial 0xedb88320, bits reversed) of what came before and n more
// bytes, eight at a time: table[k][b] is the CRC of byte b and k zeros after it.
typedef struct { uint32_t table[8][256]; } Crc32;
static void crc32_init(Crc32* c) {
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t r = b;
        for (int i = 0; i < 8; i++) r = r >> 1 ^ (r & 1 ? 0xedb88320u : 0);
        c->table[0][b] = r;
    }
    for (int k = 1; k < 8; k++)
        for (int b = 0; b < 256; b++)
            c->table[k][b] = c->table[k - 1][b] >> 8 ^ c->table[0][c->table[k - 1][b] & 255];
}

static uint32_t crc32_add(const Crc32* c, uint32_t crc, const void* data, size_t n) {
    const unsigned char* p = (const unsigned char*)data;
    crc = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        word ^= crc;
        crc = 0;
        for (int k = 0; k < 8; k++) crc ^= c->table[7 - k][word >> 8 * k & 255];
    }
    for (; n; n--, p++) crc = crc >> 8 ^ c->table[0][(crc ^ *p) & 255];
    return ~crc;
}

// file_of: the file that a tensor is in
static const SafeTensors* file_of(const SafeTensors* st, const SafeTensor* t) { return t->part ? t->part
                                                                               : st; }

// read_piece: elements [from, from + n) of a tensor as they are in the file
static bool read_piece(const SafeTensors* st, const SafeTensor* t, size_t from, size_t n, void* out,
                       Error* err) {
    size_t size = st_dtype[t->dtype].size;
    st = file_of(st, t);
    return read_exact(st->fd, out, n * size, st->data_start + t->begin + from * size) ||
           fail_line(err, "%s: tensor %.200s: cannot read: %s", st->path, t->name,
                     errno ? strerror(errno) : "the file changed while reading (it became shorter)");
}

// unchanged: false with a line when the file is not the one whose header was checked
static bool unchanged(const SafeTensors* st, Error* err) {
    struct stat now;
    if (fstat(st->fd, &now) == 0 && now.st_size == st->info.st_size &&
        now.st_mtim.tv_sec == st->info.st_mtim.tv_sec && now.st_mtim.tv_nsec == st->info.st_mtim.tv_nsec)
        return true;
    return fail_line(err, "%s: the file changed while reading; try again when nothing writes to it",
                     st->path);
}

// widen_piece: n elements as they are in the file -> real
static void widen_piece(int dtype, const void* piece, size_t n, real* out) {
    for (size_t i = 0; i < n; i++) {
        double f64;
        float f32;
        uint16_t u16;
        if (dtype == ST_F64) {
            memcpy(&f64, (const char*)piece + 8 * i, 8);
            out[i] = (real)f64;
            continue;
        }
        if (dtype == ST_F32) memcpy(&f32, (const char*)piece + 4 * i, 4);
        else {
            memcpy(&u16, (const char*)piece + 2 * i, 2);
            f32 = dtype == ST_F16 ? widen_f16(u16) : widen_bf16(u16);
        }
        out[i] = (real)f32;
    }
}

// read_or_compare: a floating-point tensor as `real`: into out, or, with `differs`, compared with out
static bool read_or_compare(const SafeTensors* st, const SafeTensor* t, real* out, bool* differs,
                            Error* err) {
    if (t->dtype > ST_BF16)
        return fail_line(err, "%s: tensor %.200s is %s, expected F32, F64, F16 or BF16", file_of(st, t)->path,
                         t->name, st_dtype[t->dtype].name);
    uint64_t piece[ST_PIECE / 8];
    real wide[ST_PIECE / 2];         // only when comparing
    size_t size = st_dtype[t->dtype].size;
    uint32_t crc = 0;
    Crc32 table;
    if (t->crc) crc32_init(&table);
    if (differs) *differs = false;
    for (size_t from = 0, n; from < t->count; from += n) {
        n = ST_PIECE / size < t->count - from ? ST_PIECE / size : t->count - from;
        if (!read_piece(st, t, from, n, piece, err)) return false;
        if (t->crc) crc = crc32_add(&table, crc, piece, n * size);
        widen_piece(t->dtype, piece, n, differs ? wide : out + from);
        if (differs && memcmp(wide, out + from, n * sizeof(real)) != 0) *differs = true;
    }
    if (crc != t->crc)
        return fail_line(err, "%s: tensor %.200s: its bytes do not match the checksum (CRC %08x, expected "
                         "%08x): download or copy the file again", file_of(st, t)->path, t->name, crc,
                             t->crc);
    return unchanged(file_of(st, t), err);
}

// safetensors_read_real: a floating-point tensor as `real`; out has t->count elements
bool safetensors_read_real(const SafeTensors* st, const SafeTensor* t, real* out, Error* err) {
    return read_or_compare(st, t, out, NULL, err);
}

// safetensors_read_int: an integer tensor; out has t->count elements
bool safetensors_read_int(const SafeTensors* st, const SafeTensor* t, int64_t* out, Error* err) {
    if (t->dtype < ST_I64 || t->dtype > ST_BOOL)
        return fail_line(err, "%s: tensor %.200s is %s, expected an integer type", st->path, t->name,
                         st_dtype[t->dtype].name);
    uint64_t piece[ST_PIECE / 8];
    size_t size = st_dtype[t->dtype].size;
    for (size_t from = 0, n; from < t->count; from += n) {
        n = ST_PIECE / size < t->count - from ? ST_PIECE / size : t->count - from;
        if (!read_piece(st, t, from, n, piece, err)) return false;
        for (size_t i = 0; i < n; i++) {
            uint64_t bits = 0;
            memcpy(&bits, (char*)piece + size * i, size);
            int unused = 64 - 8 * (int)size;
            if (t->dtype <= ST_I8)
                out[from + i] = (int64_t)(bits << unused) >> unused;   // copies the sign down
            else out[from + i] = (int64_t)bits;
            if (t->dtype == ST_U64 && bits > INT64_MAX)
                return fail_line(err, "%s: tensor %.200s: element %zu is beyond 2^63", st->path, t->name,
                                 from + i);
        }
    }
    return unchanged(file_of(st, t), err);
}

// A tensor to be written, or one that is expected in a file (then data is not used).
typedef struct {
    const char* name;
    int ndim;
    int64_t shape[ST_MAX_DIMS];
    int dtype;                       // that the file gets: ST_F64, ST_F32, ST_F16 or ST_BF16
    const real* data;
} SafeTensorOut;

// safetensors_expect: compares the file with the wanted tensors (any floating dtype) and names every
// difference at once.
bool safetensors_expect(const SafeTensors* st, const SafeTensorOut* want, int n, Error* err) {
    Text text = {NULL, 0, 0, false};
    int differences = 0, known = 0;
    char have[200], need[200];
    for (int i = 0; i < n; i++) {
        const SafeTensor* t = safetensors_find(st, want[i].name);
        bool same = t && t->ndim == want[i].ndim && t->dtype <= ST_BF16;
        for (int d = 0; same && d < t->ndim; d++) same = t->shape[d] == want[i].shape[d];
        known += t != NULL;
        if (same) continue;
        shape_text(need, sizeof need, want[i].ndim, want[i].shape);
        if (differences++ < 12 && !t) text_add(&text, "; %.100s %s is missing", want[i].name, need);
        else if (differences <= 12)
            text_add(&text, "; %.100s is %s %s, expected floating point %s", want[i].name,
                     st_dtype[t->dtype].name, shape_text(have, sizeof have, t->ndim, t->shape), need);
    }
    for (int j = 0; j < st->n && known < st->n; j++) {   // the wanted list is short: compare each
        bool found = false;
        for (int i = 0; i < n && !found; i++) found = strcmp(st->tensor[j].name, want[i].name) == 0;
        if (found) continue;
        if (differences++ < 12) text_add(&text, "; %.100s is not part of this model", st->tensor[j].name);
        if (differences > 12) break;
    }
    if (differences) fail_line(err, "%s: does not fit the model%s%s", st->path, text.data ? text.data : "",
                               differences > 12 ? "; and more" : "");
    free(text.data);
    return !differences;
}

// ---------------------------------------------------------------------------------------------------
// 3. Writing safetensors

// wide types first: then every tensor is aligned
static int order_for_writing(const void* a, const void* b) {
    const SafeTensorOut *s = (const SafeTensorOut*)a, *t = (const SafeTensorOut*)b;
    if (st_dtype[s->dtype].size != st_dtype[t->dtype].size)
        return st_dtype[s->dtype].size > st_dtype[t->dtype].size ? -1 : 1;
    return strcmp(s->name, t->name);
}

// write_tensor: the values, converted piece by piece; table, crc: also adds to their CRC-32, unless NULL
static bool write_tensor(int fd, const SafeTensorOut* t, size_t count, const Crc32* table, uint32_t* crc) {
    uint64_t piece[ST_PIECE / 8];
    size_t size = st_dtype[t->dtype].size;
    for (size_t from = 0, n; from < count; from += n) {
        n = ST_PIECE / size < count - from ? ST_PIECE / size : count - from;
        for (size_t i = 0; i < n; i++) {
            real value = t->data[from + i];
            double f64 = (double)value;
            float f32 = (float)value;
            uint16_t u16;
            if (t->dtype == ST_F64) memcpy((char*)piece + 8 * i, &f64, 8);
            else if (t->dtype == ST_F32) memcpy((char*)piece + 4 * i, &f32, 4);
            else {
                u16 = t->dtype == ST_F16 ? narrow_float(f64, 5, 10) : narrow_float(f64, 8, 7);
                memcpy((char*)piece + 2 * i, &u16, 2);
            }
        }
        if (crc) *crc = crc32_add(table, *crc, piece, n * size);
        if (!write_all(fd, piece, n * size)) return false;
    }
    return true;
}

// header_text: the header of sorted tensors, padded with spaces so that the data begins at a multiple of 8
static bool header_text(Text* text, const SafeTensorOut* t, int n, const char** meta, const char* path,
                        Error* err) {
    uint64_t at = 0;
    text_add(text, "{");
    for (int i = 0; meta && meta[i] && meta[i + 1]; i += 2) {
        text_add(text, i ? "," : "\"__metadata__\":{");
        text_add_json(text, meta[i]);
        text_add(text, ":");
        text_add_json(text, meta[i + 1]);
        if (!meta[i + 2]) text_add(text, n ? "}," : "}");
    }
    for (int i = 0; i < n; i++) {
        size_t bytes = 0;
        char shape[200];
        if (t[i].dtype < 0 || t[i].dtype > ST_BF16 || t[i].ndim < 0 || t[i].ndim > ST_MAX_DIMS ||
            !checked_size(t[i].ndim, t[i].shape, st_dtype[t[i].dtype].size, &bytes) || at + bytes > INT64_MAX)
            return fail_line(err, "%s: tensor %.200s cannot be written: dtype or shape out of range", path,
                             t[i].name);
        if (i && strcmp(t[i].name, t[i - 1].name) == 0)
            return fail_line(err, "%s: tensor %.200s would be written twice", path, t[i].name);
        text_add_json(text, t[i].name);
        text_add(text, ":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%llu,%llu]}%s",
                 st_dtype[t[i].dtype].name, shape_text(shape, sizeof shape, t[i].ndim, t[i].shape),
                 (unsigned long long)at, (unsigned long long)(at + bytes), i + 1 < n ? "," : "");
        at += bytes;
    }
    text_add(text, "}");
    text_add(text, "%*s", (int)(-text->n & 7), "");
    return (!text->failed && text->n <= ST_MAX_HEADER) ||
           fail_line(err, "%s: cannot be written: a name is not UTF-8, or the header is beyond %d bytes",
                     path, ST_MAX_HEADER);
}

// write_replacing: path.tmp is written by write_file(fd, arg), synced and renamed to path, so that path is
// never
// half written (and may be the file that the tensors were read from).
static bool write_replacing(const char* path, bool (*write_file)(int, void*), void* arg, Error* err) {
    char temporary[4096];
    if (snprintf(temporary, sizeof temporary, "%s.tmp", path) >= (int)sizeof temporary)
        return fail_line(err, "%.200s: the path is too long", path);
    int fd = open_retry(temporary, O_WRONLY | O_CREAT | O_TRUNC);
    if (fd < 0) return fail_line(err, "%s: cannot create: %s", temporary, strerror(errno));
    bool ok = write_file(fd, arg);
    int error = errno;
    if (ok) ok = sync_close(fd) && rename(temporary, path) == 0, error = errno;
    else close(fd);
    if (ok) return true;
    unlink(temporary);
    return fail_line(err, "%s: cannot write: %s", path, strerror(error));
}

typedef struct { const SafeTensorOut* sorted; int n; Text header; } SafeTensorsOut;
static bool safetensors_put(int fd, void* arg) {
    const SafeTensorsOut* out = (const SafeTensorsOut*)arg;
    uint64_t length = out->header.n;
    bool ok = write_all(fd, &length, 8) && write_all(fd, out->header.data, out->header.n);
    for (int i = 0; ok && i < out->n; i++) {
        size_t count = 0;
        ok = checked_size(out->sorted[i].ndim, out->sorted[i].shape, 1, &count) &&
             write_tensor(fd, out->sorted + i, count, NULL, NULL);
    }
    return ok;
}

// safetensors_write: replaces path when all is written. meta: key, value, ..., NULL; or NULL.
bool safetensors_write(const char* path, const SafeTensorOut* tensor, int n, const char** meta, Error* err) {
    SafeTensorOut* sorted = (SafeTensorOut*)malloc((size_t)(n + 1) * sizeof(SafeTensorOut));
    SafeTensorsOut out = {sorted, n, {NULL, 0, 0, false}};
    bool ok = sorted || fail_line(err, "%.200s: out of memory", path);
    if (ok && n) {
        memcpy(sorted, tensor, (size_t)n * sizeof(SafeTensorOut));
        qsort(sorted, (size_t)n, sizeof(SafeTensorOut), order_for_writing);
    }
    ok = ok && header_text(&out.header, sorted, n, meta, path, err) &&
         write_replacing(path, safetensors_put, &out, err);
    free(sorted);
    free(out.header.data);
    return ok;
}

// ---------------------------------------------------------------------------------------------------
// 4. Checkpoints
//
//   out/step_00001000.tmp/   being written: every file synced, then the directory
//   out/step_00001000/       the same directory after one rename: it exists whole or not at all
//   out/last, out/best       relative links to a step, replaced by renaming a new link over the old one
// A kill or a power loss at any call leaves the old or the new checkpoint; nothing is ever written in place.
// (Files renamed one by one left new weights beside old moments at 61 % of 218 kill points.)

bool checkpoint_write_text(const char* dir, const char* file, const char* text, Error* err) {
    char path[4096];
    if (!join_path(path, sizeof path, dir, file, err)) return false;
    int fd = open_retry(path, O_WRONLY | O_CREAT | O_TRUNC);
    if (fd < 0) return fail_line(err, "%s: cannot create: %s", path, strerror(errno));
    bool ok = write_all(fd, text, strlen(text));
    int error = errno;
    if (ok) ok = sync_close(fd), error = errno;
    else close(fd);
    return ok || fail_line(err, "%s: cannot write: %s", path, strerror(error));
}

// step_of: the step of a directory named step_<8 or more digits><suffix>, -1 for any other name
static int64_t step_of(const char* name, const char* suffix) {
    size_t digits = strncmp(name, "step_", 5) == 0 ? strspn(name + 5, "0123456789") : 0;
    if (digits < 8 || digits > 18 || strcmp(name + 5 + digits, suffix) != 0) return -1;
    return strtoll(name + 5, NULL, 10);
}

static bool step_path(char* path, size_t size, const char* out, int64_t step, const char* suffix,
                      Error* err) {
    char name[64];
    snprintf(name, sizeof name, "step_%08lld%s", (long long)step, suffix);
    return join_path(path, size, out, name, err);
}

// remove_dir: a checkpoint directory and the files in it; directories inside it are left, and then it stays
static bool remove_dir(const char* path) {
    DIR* dir = opendir(path);
    Error unused;
    char file[4096];
    for (struct dirent* d; dir && (d = readdir(dir));)
        if (strcmp(d->d_name, ".") != 0 && strcmp(d->d_name, "..") != 0 &&
            join_path(file, sizeof file, path, d->d_name, &unused))
            unlink(file);
    if (dir) closedir(dir);
    return rmdir(path) == 0;
}

// checkpoint_remove_stale: removes what interrupted saves left behind (step_*.tmp); says so if `print`
void checkpoint_remove_stale(const char* out, bool print) {
    DIR* dir = opendir(out);
    Error unused;
    char path[4096];
    for (struct dirent* d; dir && (d = readdir(dir));)
        if (step_of(d->d_name, ".tmp") >= 0 && join_path(path, sizeof path, out, d->d_name, &unused) &&
            remove_dir(path) && print)
            printf("removed %s, left by an interrupted save\n", path);
    if (dir) closedir(dir);
}

// replace_link: out/name becomes a link to target, in one step for any observer
static bool replace_link(const char* out, const char* name, const char* target, Error* err) {
    char path[4096], temporary[4096];
    if (!join_path(path, sizeof path, out, name, err)) return false;
    if (snprintf(temporary, sizeof temporary, "%s/%s.tmp", out, name) >= (int)sizeof temporary)
        return fail_line(err, "%.200s: the path is too long", out);
    struct stat info;
    if (lstat(path, &info) == 0 && !S_ISLNK(info.st_mode))
        return fail_line(err, "%s: expected a symbolic link, found %s; move it away", path,
                         S_ISDIR(info.st_mode) ? "a directory" : "a file");
    unlink(temporary);
    if (symlink(target, temporary) < 0)
        return fail_line(err, "%s: cannot make a symbolic link: %s", temporary, strerror(errno));
    if (rename(temporary, path) < 0) {
        fail_line(err, "%s: cannot rename a link to this name: %s", path, strerror(errno));
        unlink(temporary);
        return false;
    }
    return sync_dir(out, err);
}

// checkpoint_make_dir: the directory of a run, and those above it
bool checkpoint_make_dir(const char* out, Error* err) {
    char path[4096], moved[4100];
    if (!out[0] || strlen(out) > 3800)
        return fail_line(err, "--out: the name of the directory is empty or too long");
    snprintf(path, sizeof path, "%s", out);
    for (char* p = path + 1;; p++) {
        char c = *p;
        if (c != '/' && c) continue;
        *p = 0;
        struct stat info;
        if (mkdir(path, 0777) < 0) {
            int error = errno;
            if (stat(path, &info) < 0 || !S_ISDIR(info.st_mode))
                return fail_line(err, "%s: cannot create the directory: %s; choose another with --out", path,
                                 error == EEXIST ? "a file has this name" : strerror(error));
        } else {   // a new name lasts when the directory above is synced
            snprintf(moved, sizeof moved, "%s/..", path);
            if (!sync_dir(moved, err)) return false;
        }
        *p = c;
        if (!c) break;
    }
    return true;
}

// checkpoint_any: whether a directory holds checkpoints of any step
bool checkpoint_any(const char* out) {
    DIR* dir = opendir(out);
    bool found = false;
    for (struct dirent* d; dir && (d = readdir(dir));) found = found || step_of(d->d_name, "") >= 0;
    if (dir) closedir(dir);
    return found;
}

// checkpoint_probe: before the first step: can checkpoints be saved in `out`? Makes the directory, tries
// every operation a save needs, and compares the free space with two checkpoints of bytes_needed each (the
// new one and the one kept).
bool checkpoint_probe(const char* out, uint64_t bytes_needed, Error* err) {
    char path[4096], moved[4100];
    if (!checkpoint_make_dir(out, err)) return false;
    checkpoint_remove_stale(out, true);
    // a trial run: a directory with a file in it, renamed; a link, replaced by rename; all of it removed
    snprintf(path, sizeof path, "%s/probe.tmp", out);
    snprintf(moved, sizeof moved, "%s/probe", out);
    char file[4096];
    snprintf(file, sizeof file, "%s/probe/file", out);
    unlink(file), rmdir(moved);
    bool ok = (mkdir(path, 0777) == 0 || errno == EEXIST) ||
              fail_line(err, "%s: cannot create: %s", path, strerror(errno));
    ok = ok && checkpoint_write_text(path, "file", "probe\n", err) && sync_dir(path, err);
    if (ok && rename(path, moved) < 0)
        ok = fail_line(err, "%s: cannot rename a directory: %s", path, strerror(errno));
    ok = ok && replace_link(out, "probe_link", "probe", err) && replace_link(out, "probe_link", "probe", err);
    if (ok && (unlink(file) < 0 || rmdir(moved) < 0))
        ok = fail_line(err, "%s: cannot remove: %s", moved, strerror(errno));
    if (!ok) remove_dir(path), remove_dir(moved);
    snprintf(path, sizeof path, "%s/probe_link", out);
    unlink(path);
    if (!ok) return false;
    struct statvfs fs;
    if (statvfs(out, &fs) == 0) {
        double free_bytes = (double)fs.f_bavail * (double)fs.f_frsize;
        if (free_bytes < 2.0 * (double)bytes_needed)
            return fail_line(err, "%s: two checkpoints need %.1f MiB, %.1f MiB free; choose another --out",
                             out, 2.0 * (double)bytes_needed / 0x1p20, free_bytes / 0x1p20);
    }
    return true;
}

// checkpoint_begin: a fresh directory for the files of one save. What failed saves left is removed first: it
// may be what fills the disk.
bool checkpoint_begin(const char* out, int64_t step, char* dir, size_t size, Error* err) {
    checkpoint_remove_stale(out, false);
    if (!step_path(dir, size, out, step, ".tmp", err)) return false;
    return mkdir(dir, 0777) == 0 ||
           fail_line(err, "%s: cannot create the directory: %s", dir, strerror(errno));
}

// points_at: whether the link out/name leads to that step
static bool points_at(const char* out, const char* name, int64_t step) {
    char path[4096], target[256];
    Error unused;
    if (!join_path(path, sizeof path, out, name, &unused)) return false;
    ssize_t n = readlink(path, target, sizeof target - 1);
    if (n < 0) return false;
    target[n] = 0;
    return step_of(target, "") == step;
}

// checkpoint_commit: makes the save visible and `last` point to it. False: this save does not count; what was
// there is intact. A checkpoint of the same step (saved by an earlier run) changes places with the new one in
// one call.
bool checkpoint_commit(const char* out, int64_t step, Error* err) {
    char from[4096], to[4096];
    if (!step_path(from, sizeof from, out, step, ".tmp", err) ||
        !step_path(to, sizeof to, out, step, "", err))
        return false;
    if (!sync_dir(from, err)) return false;
    struct stat info;
    bool exists = lstat(to, &info) == 0;
    bool pointed_at = points_at(out, "last", step) || points_at(out, "best", step);
    int result = exists ? renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_EXCHANGE) : rename(from, to);
    if (result < 0 && exists && (errno == EINVAL || errno == ENOSYS) &&
        !pointed_at) {   // no exchange in this file system
        char old[4096];
        if (snprintf(old, sizeof old, "%s/step_%018lld.tmp", out, (long long)step) >= (int)sizeof old)
            return fail_line(err, "%.200s: the path is too long", out);
        result = rename(to, old) == 0 ? rename(from, to) : -1;
    }
    if (result < 0) return fail_line(err, "%s: cannot rename to %s: %s", from, to, strerror(errno));
    if (!sync_dir(out, err) || !replace_link(out, "last", to + strlen(out) + 1, err)) return false;
    if (exists) checkpoint_remove_stale(out, false);
    return true;
}

bool checkpoint_mark_best(const char* out, int64_t step, Error* err) {
    char path[4096];
    return step_path(path, sizeof path, out, step, "", err) &&
           replace_link(out, "best", path + strlen(out) + 1, err);
}

static int newest_first(const void* a, const void* b) {
    int64_t s = *(const int64_t*)a, t = *(const int64_t*)b;
    return s > t ? -1 : s < t;
}

// checkpoint_prune: keeps the newest `keep` (at least 1) and what best and last point to. A directory loses
// its name, for good after the sync, before its first file: no half checkpoint is ever visible.
void checkpoint_prune(const char* out, int keep) {
    int64_t* steps = NULL;
    size_t n = 0;
    DIR* dir = opendir(out);
    for (struct dirent* d; dir && (d = readdir(dir));) {
        int64_t step = step_of(d->d_name, "");
        if (step < 0) continue;
        if (n % 64 == 0) steps = (int64_t*)xrealloc(steps, n + 64, sizeof(int64_t));
        steps[n++] = step;
    }
    if (dir) closedir(dir);
    if (n) qsort(steps, n, sizeof(int64_t), newest_first);
    for (size_t i = keep < 1 ? 1 : (size_t)keep; i < n; i++) {
        char path[4096], away[4096];
        Error unused;
        if (points_at(out, "last", steps[i]) || points_at(out, "best", steps[i])) continue;
        if (step_path(path, sizeof path, out, steps[i], "", &unused) &&
            step_path(away, sizeof away, out, steps[i], ".tmp", &unused) && rename(path, away) == 0 &&
            sync_dir(out, &unused))
            remove_dir(away);
    }
    free(steps);
}

// weights_form: which of these a directory has, in this order (shards.h says what they are); -1: none
static const char* const weight_files[4] = {"model.safetensors", "model.safetensors.index.json",
                                            "pytorch_model.bin", "pytorch_model.bin.index.json"};
int weights_form(const char* dir) {
    char path[4096];
    struct stat info;
    Error unused;
    for (int i = 0; i < 4; i++)
        if (join_path(path, sizeof path, dir, weight_files[i], &unused) && stat(path, &info) == 0) return i;
    return -1;
}

// checkpoint_resolve: the directory that holds the model: the step that path/last leads to, or else path
// itself
bool checkpoint_resolve(const char* path, char* dir, size_t size, Error* err) {
    char file[4096], target[256];
    struct stat info;
    if (stat(path, &info) < 0)
        return fail_line(err, "%s: cannot open the checkpoint: %s", path, strerror(errno));
    if (!S_ISDIR(info.st_mode))
        return fail_line(err, "%s: expected a checkpoint directory, found a file", path);
    if (!join_path(file, sizeof file, path, "last", err)) return false;
    if (lstat(file, &info) < 0) {
        int n = snprintf(dir, size, "%s", path);
        if (n < 0 || (size_t)n >= size) return fail_line(err, "%.200s: the path is too long", path);
        return weights_form(path) >= 0 ||
               fail_line(err,
                         "%s: holds neither a model (%s, %s, or an index of either) nor a link `last` to a "
                         "checkpoint", path, weight_files[0], weight_files[2]);
    }
    ssize_t n = S_ISLNK(info.st_mode) ? readlink(file, target, sizeof target - 1) : -1;
    if (n < 0)
        return fail_line(err, "%s: expected a link to a checkpoint, found %s; name the checkpoint itself",
                         file, S_ISDIR(info.st_mode) ? "a directory" : "a file");
    target[n] = 0;
    if (step_of(target, "") < 0)
        return fail_line(err, "%s: points to %s, expected step_<number>; name the checkpoint itself", file,
                         target);
    if (!join_path(dir, size, path, target, err)) return false;
    return weights_form(dir) >= 0 ||
           fail_line(err, "%s/last: points to %s, which %s; name another step_* of that directory", path,
                     target, stat(dir, &info) < 0 ? "does not exist" : "has no model.safetensors");
}

// checkpoint_same_save: weights and moments must come from one save: both files carry its step and a save id.
bool checkpoint_same_save(const SafeTensors* a, const SafeTensors* b, Error* err) {
    const char *step_a = safetensors_metadata(a, "step"), *step_b = safetensors_metadata(b, "step");
    const char *id_a = safetensors_metadata(a, "save_id"), *id_b = safetensors_metadata(b, "save_id");
    if (!step_a || !step_b || !id_a || !id_b)
        return fail_line(err,
                         "%s: no step and save_id in __metadata__: this can be used with --from, not resumed",
                         !step_a || !id_a ? a->path : b->path);
    if (strcmp(step_a, step_b) != 0)
        return fail_line(err, "%s is of step %.40s but %s is of step %.40s: not one checkpoint", a->path,
                         step_a, b->path, step_b);
    return strcmp(id_a, id_b) == 0 ||
           fail_line(err, "%s and %s are both of step %.40s but of different saves (%.40s, %.40s)", a->path,
                     b->path, step_a, id_a, id_b);
}
