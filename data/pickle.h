// pickle.h: pytorch_model.bin, the file that torch.save writes since PyTorch 1.6.
//
//   1. Zip archives      only stored (uncompressed) entries
//   2. Unpickler         knows what a dictionary of tensors needs, executes nothing, refuses the rest by name
//   3. Reading           the table of tensors that safetensors.h reads from
//   4. Writing
//
// The file is a zip archive of stored entries below one folder:
//   NAME/data.pkl   a pickle (protocol 2) of {"tensor name": tensor, ...}; a tensor is a call of
//                   torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, ...), and a storage a
//                   "persistent id" ("storage", torch.FloatStorage, KEY, "cpu", number of elements)
//   NAME/data/KEY   the elements of a storage, little-endian
// A pickle is a program for a stack machine (Python's pickletools.py lists its instructions). Its danger is
// that it can call any function of any module. This machine has ten values and thirteen globals, and
// "calling"
// one of them only fills in a SafeTensor. Formats: PKWARE APPNOTE 4.3 (zip, zip64), torch/serialization.py.

// ---------------------------------------------------------------------------------------------------
// 1. Zip archives

enum { ZIP_MAX_DIRECTORY = 2 << 20, ZIP_MAX_COMMENT = 65535, ZIP_END = 22, ZIP_END64 = 56, ZIP_LOCATOR = 20,
       ZIP_CENTRAL = 46, ZIP_LOCAL = 30 };

typedef struct {
    const char* name;                // in the directory, not terminated
    size_t length;
    uint64_t header, at, size;       // where its local header and its bytes begin in the file; how many
    uint32_t crc;
} ZipEntry;

typedef struct {
    int fd;
    const char* path;
    uint64_t size;                   // of the file
    int n;
    ZipEntry* entry;                 // sorted by name
    char* directory;
    size_t folder;                   // length of "NAME/", with which every name begins
} Zip;

static void zip_close(Zip* zip) {
    free(zip->entry);
    free(zip->directory);
}

static uint64_t little(const void* at, int bytes) {
    uint64_t value = 0;
    memcpy(&value, at, (size_t)bytes);
    return value;
}

static bool zip_fail(const Zip* zip, const char* what, Error* err) {
    return fail_line(err, "%s: %s; download or copy it again", zip->path, what);
}

static bool zip_read(const Zip* zip, void* out, size_t n, uint64_t at, Error* err) {
    if (at > zip->size || n > zip->size - at)
        return zip_fail(zip, "damaged zip file: an offset past its end", err);
    return read_exact(zip->fd, out, n, at) ||
           fail_line(err, "%s: cannot read: %s", zip->path,
                     errno ? strerror(errno) : "the file changed while reading");
}

static int zip_order_name(const void* a, const void* b) {
    const ZipEntry *s = (const ZipEntry*)a, *t = (const ZipEntry*)b;
    int order = memcmp(s->name, t->name, s->length < t->length ? s->length : t->length);
    return order ? order : s->length < t->length ? -1 : s->length > t->length;
}

static int zip_order_header(const void* a, const void* b) {
    const ZipEntry *s = (const ZipEntry*)a, *t = (const ZipEntry*)b;
    return s->header < t->header ? -1 : s->header > t->header;
}

// zip_end: where the central directory is and how many entries it has
static bool zip_end(const Zip* zip, uint64_t* at, uint64_t* size, uint64_t* n, Error* err) {
    size_t tail = zip->size < ZIP_END + ZIP_MAX_COMMENT ? (size_t)zip->size : ZIP_END + ZIP_MAX_COMMENT;
    unsigned char *text = (unsigned char*)malloc(tail + 1), *end = NULL;
    unsigned char locator[ZIP_LOCATOR] = {0}, end64[ZIP_END64];
    if (!text) return fail_line(err, "%s: out of memory", zip->path);
    bool ok = zip_read(zip, text, tail, zip->size - tail, err);
    for (size_t i = tail < ZIP_END ? 0 : tail - ZIP_END + 1; ok && i-- > 0 && !end;)
        if (memcmp(text + i, "PK\5\6", 4) == 0 && little(text + i + 20, 2) == tail - i - ZIP_END) end =
            text + i;
    if (ok && !end) ok = zip_fail(zip, "a zip file without an end: it is cut off", err);
    uint64_t end_at = end ? zip->size - tail + (uint64_t)(end - text) : 0;
    if (ok && little(end + 4, 4) != 0) ok =
        zip_fail(zip, "a zip file in several pieces, which is not supported", err);
    if (ok) {
        *n = little(end + 10, 2), *size = little(end + 12, 4), *at = little(end + 16, 4);
        if (end_at >= ZIP_LOCATOR) ok = zip_read(zip, locator, ZIP_LOCATOR, end_at - ZIP_LOCATOR, err);
    }
    if (ok && memcmp(locator, "PK\6\7", 4) == 0) {     // zip64: the same fields, wide
        uint64_t at64 = little(locator + 8, 8);
        ok = zip_read(zip, end64, ZIP_END64, at64, err);
        if (ok && memcmp(end64, "PK\6\6", 4) != 0) ok = zip_fail(zip, "damaged zip file: no zip64 end", err);
        bool same = ok && (*n == 0xffff || *n == little(end64 + 32, 8)) &&
                    (*size == 0xffffffff || *size == little(end64 + 40, 8)) &&
                    (*at == 0xffffffff || *at == little(end64 + 48, 8));
        if (ok && !same) ok = zip_fail(zip, "damaged zip file: its two ends contradict each other", err);
        if (ok) *n = little(end64 + 32, 8), *size = little(end64 + 40, 8), *at = little(end64 + 48, 8);
        end_at = at64;
    }
    free(text);
    if (ok && (*size > ZIP_MAX_DIRECTORY || *n > *size / ZIP_CENTRAL))
        ok = fail_line(err,
                       "%s: the zip directory has %llu entries in %llu bytes, expected at most %d bytes and "
                       "46 per entry", zip->path, (unsigned long long)*n, (unsigned long long)*size,
                       ZIP_MAX_DIRECTORY);
    if (ok && (*at > end_at || *size > end_at - *at))
        ok = zip_fail(zip, "damaged zip file: its directory is not before its end", err);
    return ok;
}

// zip_central: one record of the central directory; steps over it
static bool zip_central(const Zip* zip, ZipEntry* e, const unsigned char** p, const unsigned char* end,
                        Error* err) {
    const unsigned char* c = *p;
    if ((size_t)(end - c) < ZIP_CENTRAL || memcmp(c, "PK\1\2", 4) != 0)
        return zip_fail(zip, "damaged zip file: its directory ends too early", err);
    size_t length = little(c + 28, 2), extra = little(c + 30, 2), comment = little(c + 32, 2);
    if ((size_t)(end - c) - ZIP_CENTRAL < length + extra + comment)
        return zip_fail(zip, "damaged zip file: its directory ends too early", err);
    e->name = (const char*)c + ZIP_CENTRAL;
    e->length = length;
    e->crc = (uint32_t)little(c + 16, 4);
    e->size = little(c + 24, 4);
    e->header = little(c + 42, 4);
    uint64_t packed = little(c + 20, 4);
    // zip64: the fields that do not fit, in this order, in extra field 1
    const unsigned char *x = c + ZIP_CENTRAL + length, *x_end = x + extra;
    while (x_end - x >= 4) {
        size_t n = little(x + 2, 2), at = 4;
        if ((size_t)(x_end - x) - 4 < n) break;
        uint64_t* wide[] = {&e->size, &packed, &e->header};
        for (int i = 0; i < 3 && little(x, 2) == 1; i++) {
            if (*wide[i] != 0xffffffff) continue;
            if (at + 8 > 4 + n) return zip_fail(zip, "damaged zip file: a zip64 size is missing", err);
            *wide[i] = little(x + at, 8);
            at += 8;
        }
        x += 4 + n;
    }
    *p = c + ZIP_CENTRAL + length + extra + comment;
    int shown = length < 100 ? (int)length : 100;
    if (little(c + 8, 2) & 1)
        return fail_line(err, "%s: entry %.*s is encrypted; save the model again with torch.save", zip->path,
                         shown, e->name);
    if (little(c + 10, 2) != 0 || packed != e->size)
        return fail_line(err,
                         "%s: entry %.*s is compressed, expected stored entries; save the model again with "
                         "torch.save", zip->path, shown, e->name);
    // names are only compared, never used as paths; a hostile one is still worth a refusal
    const char* slash = (const char*)memchr(e->name, '/', length);
    if (!slash || slash == e->name || memchr(e->name, 0, length) || memchr(e->name, '\\', length) ||
        memmem(e->name, length, "..", 2))
        return fail_line(err, "%s: entry name %.*s, expected FOLDER/name as torch.save writes it", zip->path,
                         shown, e->name);
    return true;
}

// zip_local: the record in front of the entry's bytes must say the same as the directory
static bool zip_local(const Zip* zip, ZipEntry* e, uint64_t limit, Error* err) {
    unsigned char head[ZIP_LOCAL];
    char name[256];
    int shown = e->length < 100 ? (int)e->length : 100;
    if (!zip_read(zip, head, ZIP_LOCAL, e->header, err)) return false;
    size_t length = little(head + 26, 2);
    e->at = e->header + ZIP_LOCAL + length + little(head + 28, 2);
    bool later = little(head + 6, 2) & 8;            // sizes and CRC follow the bytes
    bool same = memcmp(head, "PK\3\4", 4) == 0 && length == e->length && length < sizeof name;
    same = same && little(head + 8, 2) == 0 && !(little(head + 6, 2) & 1);
    for (int i = 0; i < 2 && same; i++) {
        uint64_t size = little(head + 18 + 4 * i, 4);
        same = size == e->size || size == 0xffffffff || (later && size == 0);
    }
    uint32_t crc = (uint32_t)little(head + 14, 4);
    same = same && (crc == e->crc || (later && crc == 0));
    if (same && !zip_read(zip, name, length, e->header + ZIP_LOCAL, err)) return false;
    if (!same || memcmp(name, e->name, length) != 0)
        return fail_line(err, "%s: entry %.*s: its local header differs from the zip directory; download or "
                         "copy it again", zip->path, shown, e->name);
    if (e->at > limit || e->size > limit - e->at)
        return fail_line(err,
                         "%s: entry %.*s: %llu bytes at %llu reach into what follows it (%llu); download or "
                         "copy it again", zip->path, shown, e->name, (unsigned long long)e->size,
                         (unsigned long long)e->at, (unsigned long long)limit);
    return true;
}

// zip_open: the checked directory of an archive; fd, path, size are set by the caller. To be closed in any
// case.
static bool zip_open(Zip* zip, Error* err) {
    uint64_t at = 0, size = 0, n = 0;
    if (!zip_end(zip, &at, &size, &n, err)) return false;
    zip->directory = (char*)malloc(size + 1);
    zip->entry = (ZipEntry*)calloc(n + 1, sizeof(ZipEntry));
    if (!zip->directory || !zip->entry) return fail_line(err, "%s: out of memory", zip->path);
    if (!zip_read(zip, zip->directory, size, at, err)) return false;
    const unsigned char *p = (const unsigned char*)zip->directory, *end = p + size;
    for (zip->n = 0; (uint64_t)zip->n < n; zip->n++)
        if (!zip_central(zip, zip->entry + zip->n, &p, end, err)) return false;
    if (p != end) return zip_fail(zip, "damaged zip file: its directory is longer than its entries", err);
    qsort(zip->entry, n, sizeof(ZipEntry), zip_order_header);
    for (int i = 0; i < zip->n; i++)
        if (!zip_local(zip, zip->entry + i, i + 1 < zip->n ? zip->entry[i + 1].header : at, err)) return
            false;
    qsort(zip->entry, n, sizeof(ZipEntry), zip_order_name);
    const ZipEntry* first = zip->entry;
    if (zip->n) zip->folder =
        (size_t)((const char*)memchr(first->name, '/', first->length) - first->name) + 1;
    for (int i = 1; i < zip->n; i++) {
        const ZipEntry* e = zip->entry + i;
        if (zip_order_name(e - 1, e) == 0)
            return fail_line(err, "%s: entry %.*s appears twice", zip->path,
                             e->length < 100 ? (int)e->length : 100, e->name);
        if (e->length < zip->folder || memcmp(e->name, first->name, zip->folder) != 0)
            return fail_line(err,
                             "%s: entry %.*s is in another folder than the rest; not a file of torch.save",
                             zip->path, e->length < 100 ? (int)e->length : 100, e->name);
    }
    return true;
}

// zip_find: FOLDER/<prefix><key>; NULL when there is none
static const ZipEntry* zip_find(const Zip* zip, const char* prefix, const char* key, size_t length) {
    char name[256];
    size_t before = zip->folder + strlen(prefix);
    if (zip->n == 0 || before + length > sizeof name) return NULL;
    memcpy(name, zip->entry[0].name, zip->folder);
    memcpy(name + zip->folder, prefix, strlen(prefix));
    memcpy(name + before, key, length);
    ZipEntry wanted = {name, before + length, 0, 0, 0, 0};
    return (const ZipEntry*)bsearch(&wanted, zip->entry, (size_t)zip->n, sizeof(ZipEntry), zip_order_name);
}

// ---------------------------------------------------------------------------------------------------
// 2. Unpickler

enum { PICKLE_MAX = 1 << 20, PICKLE_STACK = 1 << 14 };      // bytes of data.pkl; values on the stack
                                                            // (torch.save needs about 2,010)

// A value is 8 bits of kind and 56 bits of content:
//   INT a signed number   TEXT where in the pickle its length stands   GLOBAL its row in pickle_globals
//   DICT 1 for the first one made, the result   TUPLE where in `cells` its length and values stand
//   STORAGE its zip entry * 256 + dtype   TENSOR where in `cells`: storage, offset, ndim, shape
enum { V_NOTHING, V_MARK, V_NONE, V_BOOL, V_INT, V_TEXT, V_GLOBAL, V_DICT, V_TUPLE, V_STORAGE, V_TENSOR };
static const char* const value_names[] = {"nothing", "a mark", "None", "a bool", "an integer", "a string",
                                          "a global", "a dictionary", "a tuple", "a storage", "a tensor"};

static uint64_t value_of(int kind, int64_t content) {
    return (uint64_t)kind << 56 | ((uint64_t)content & 0xffffffffffffff);
}
static int value_kind(uint64_t v) { return (int)(v >> 56); }
static int64_t value_content(uint64_t v) { return (int64_t)(v << 8) >> 8; }

enum { CALL_DICT = ST_DTYPES, CALL_TENSOR, CALL_PARAMETER };
static const struct { const char *module, *name; int meaning; } pickle_globals[] = {
    {"collections", "OrderedDict", CALL_DICT},
    {"torch._utils", "_rebuild_tensor_v2", CALL_TENSOR},
    {"torch._utils", "_rebuild_parameter", CALL_PARAMETER},
    {"torch", "FloatStorage", ST_F32},       {"torch", "HalfStorage", ST_F16},
    {"torch", "BFloat16Storage", ST_BF16},   {"torch", "DoubleStorage", ST_F64},
    {"torch", "LongStorage", ST_I64},        {"torch", "IntStorage", ST_I32},
    {"torch", "ShortStorage", ST_I16},       {"torch", "CharStorage", ST_I8},
    {"torch", "ByteStorage", ST_U8},         {"torch", "BoolStorage", ST_BOOL},
};
enum { N_PICKLE_GLOBALS = sizeof pickle_globals / sizeof *pickle_globals };

// the names of all instructions, for the refusal
static const struct { unsigned char code; const char* name; } pickle_opcodes[] = {
    {'(', "MARK"}, {'.', "STOP"}, {'0', "POP"}, {'1', "POP_MARK"}, {'2', "DUP"}, {'F', "FLOAT"}, {'I', "INT"},
    {'J', "BININT"}, {'K', "BININT1"}, {'L', "LONG"}, {'M', "BININT2"}, {'N', "NONE"}, {'P', "PERSID"},
    {'Q', "BINPERSID"}, {'R', "REDUCE"}, {'S', "STRING"}, {'T', "BINSTRING"}, {'U', "SHORT_BINSTRING"},
    {'V', "UNICODE"}, {'X', "BINUNICODE"}, {'a', "APPEND"}, {'b', "BUILD"}, {'c', "GLOBAL"}, {'d', "DICT"},
    {'}', "EMPTY_DICT"}, {'e', "APPENDS"}, {'g', "GET"}, {'h', "BINGET"}, {'i', "INST"},
    {'j', "LONG_BINGET"}, {'l', "LIST"}, {']', "EMPTY_LIST"}, {'o', "OBJ"}, {'p', "PUT"}, {'q', "BINPUT"},
    {'r', "LONG_BINPUT"}, {'s', "SETITEM"}, {'t', "TUPLE"}, {')', "EMPTY_TUPLE"}, {'u', "SETITEMS"},
    {'G', "BINFLOAT"}, {'B', "BINBYTES"}, {'C', "SHORT_BINBYTES"}, {0x80, "PROTO"}, {0x81, "NEWOBJ"},
    {0x82, "EXT1"}, {0x83, "EXT2"}, {0x84, "EXT4"}, {0x85, "TUPLE1"}, {0x86, "TUPLE2"}, {0x87, "TUPLE3"},
    {0x88, "NEWTRUE"}, {0x89, "NEWFALSE"}, {0x8a, "LONG1"}, {0x8b, "LONG4"}, {0x8c, "SHORT_BINUNICODE"},
    {0x8d, "BINUNICODE8"}, {0x8e, "BINBYTES8"}, {0x8f, "EMPTY_SET"}, {0x90, "ADDITEMS"}, {0x91, "FROZENSET"},
    {0x92, "NEWOBJ_EX"}, {0x93, "STACK_GLOBAL"}, {0x94, "MEMOIZE"}, {0x95, "FRAME"}, {0x96, "BYTEARRAY8"},
    {0x97, "NEXT_BUFFER"}, {0x98, "READONLY_BUFFER"},
};

typedef struct {
    const unsigned char* text;       // the pickle
    size_t n, at, start;             // its size; where the next and where this instruction stands
    unsigned char op;
    const char* path;
    const Zip* zip;
    SafeTensors* st;                 // what is filled in: tensor, n, and header with the names
    size_t max_tensors, names;       // room in st->tensor; bytes used of st->header, which has n + 1
    uint64_t *stack, *memo, *cells;
    size_t depth, n_memo, used;      // n_memo = n/2 + 1: storing a value takes two bytes; cells has n + 2
    bool made;                       // the result exists
    Error* err;
} Unpickler;

__attribute__((format(printf, 2, 3)))
static bool pickle_fail(Unpickler* u, const char* format, ...) {
    char what[512], name[32];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    snprintf(name, sizeof name, "0x%02x", u->op);
    for (size_t i = 0; i < sizeof pickle_opcodes / sizeof *pickle_opcodes; i++)
        if (pickle_opcodes[i].code == u->op) snprintf(name, sizeof name, "%s", pickle_opcodes[i].name);
    return fail_line(u->err, "%s: data.pkl, opcode %s at byte %zu: %s", u->path, name, u->start, what);
}

static bool pickle_push(Unpickler* u, int kind, int64_t what) {
    if (u->depth == PICKLE_STACK) return pickle_fail(u, "more than %d values on the stack", PICKLE_STACK);
    u->stack[u->depth++] = value_of(kind, what);
    return true;
}

// pickle_pop: the top value, which must be of this kind (V_NOTHING: any but a mark)
static bool pickle_pop(Unpickler* u, int kind, uint64_t* value) {
    int found = u->depth ? value_kind(u->stack[u->depth - 1]) : V_NOTHING;
    if (!u->depth || (kind ? found != kind : found == V_MARK))
        return pickle_fail(u, "expected %s, found %s", kind ? value_names[kind] : "a value",
                           u->depth ? value_names[found] : "an empty stack");
    *value = u->stack[--u->depth];
    return true;
}

// pickle_take: the next n bytes of the pickle, NULL at its end
static const unsigned char* pickle_take(Unpickler* u, size_t n) {
    if (u->n - u->at < n) return NULL;
    u->at += n;
    return u->text + u->at - n;
}

static const char* text_of(const Unpickler* u, uint64_t value, size_t* length) {
    const unsigned char* p = u->text + value_content(value);
    *length = (size_t)little(p, 4);
    return (const char*)p + 4;
}

static bool text_is(const Unpickler* u, uint64_t value, const char* word) {
    size_t n;
    if (value_kind(value) != V_TEXT) return false;
    const char* text = text_of(u, value, &n);
    return n == strlen(word) && memcmp(text, word, n) == 0;
}

// cells_take: room for a tuple or a tensor. torch.save needs 22 cells in 120 bytes or more for a tensor.
static bool cells_take(Unpickler* u, size_t n, uint64_t** out) {
    if (n > u->n + 2 - u->used)
        return pickle_fail(u, "more tuples than a dictionary of tensors has");
    *out = u->cells + u->used;
    u->used += n;
    return true;
}

static bool make_tuple(Unpickler* u, size_t n) {
    uint64_t* cell = NULL;
    if (u->depth < n) return pickle_fail(u, "expected %zu values, found %zu", n, u->depth);
    for (size_t i = u->depth - n; i < u->depth; i++)
        if (value_kind(u->stack[i]) == V_MARK) return pickle_fail(u, "expected a value, found a mark");
    if (!cells_take(u, n + 1, &cell)) return false;
    cell[0] = n;
    memcpy(cell + 1, u->stack + u->depth - n, n * sizeof *cell);
    u->depth -= n;
    return pickle_push(u, V_TUPLE, cell - u->cells);
}

// since_mark: how many values lie above the highest mark
static bool since_mark(Unpickler* u, size_t* n) {
    for (*n = 0; *n < u->depth; ++*n)
        if (value_kind(u->stack[u->depth - 1 - *n]) == V_MARK) return true;
    return pickle_fail(u, "expected a mark on the stack, found none");
}

static const uint64_t* tuple_of(const Unpickler* u, uint64_t value, size_t* n) {
    const uint64_t* cell = u->cells + value_content(value);
    *n = (size_t)cell[0];
    return cell + 1;
}

static bool make_storage(Unpickler* u) {
    uint64_t id = 0;
    size_t n = 0, length = 0;
    if (!pickle_pop(u, V_TUPLE, &id)) return false;
    const uint64_t* part = tuple_of(u, id, &n);
    bool shape = n == 5 && text_is(u, part[0], "storage") && value_kind(part[1]) == V_GLOBAL &&
                 value_kind(part[2]) == V_TEXT && value_kind(part[3]) == V_TEXT &&
                 value_kind(part[4]) == V_INT;
    int dtype = shape ? pickle_globals[value_content(part[1])].meaning : ST_DTYPES;
    if (dtype >= ST_DTYPES)
        return pickle_fail(u, "expected (\"storage\", torch.FloatStorage or the like, key, place, size)");
    const char* key = text_of(u, part[2], &length);
    const ZipEntry* e = zip_find(u->zip, "data/", key, length);
    int shown = length < 60 ? (int)length : 60;
    if (!e) return pickle_fail(u, "storage \"%.*s\" is not in the file", shown, key);
    int64_t count = value_content(part[4]);
    if (count < 0 || (uint64_t)count != e->size / st_dtype[dtype].size || e->size % st_dtype[dtype].size)
        return pickle_fail(u, "storage \"%.*s\" has %lld elements of %s, its zip entry %llu bytes", shown,
                           key, (long long)count, st_dtype[dtype].name, (unsigned long long)e->size);
    return pickle_push(u, V_STORAGE, (int64_t)(e - u->zip->entry) << 8 | dtype);
}

// make_tensor: (storage, offset, shape, strides, requires_grad, hooks): inside the storage and row-major
static bool make_tensor(Unpickler* u, const uint64_t* arg, size_t n) {
    static const int kinds[] = {V_STORAGE, V_INT, V_TUPLE, V_TUPLE, V_BOOL, V_DICT};
    size_t n_dims, n_strides, count = 0;
    uint64_t* cell = NULL;
    bool fits = n == 6;
    for (size_t i = 0; i < 6 && fits; i++) fits = value_kind(arg[i]) == kinds[i];
    if (!fits) return pickle_fail(u, "expected (storage, offset, shape, strides, requires_grad, hooks)");
    const uint64_t *dim = tuple_of(u, arg[2], &n_dims), *stride = tuple_of(u, arg[3], &n_strides);
    if (n_dims > ST_MAX_DIMS || n_strides != n_dims)
        return pickle_fail(u, "a tensor of %zu dimensions with %zu strides, expected at most %d of both",
                           n_dims, n_strides, ST_MAX_DIMS);
    int64_t shape[ST_MAX_DIMS], offset = value_content(arg[1]);
    for (size_t i = 0; i < n_dims; i++) {
        shape[i] = value_content(dim[i]);
        if (value_kind(dim[i]) != V_INT || shape[i] < 0 || value_kind(stride[i]) != V_INT)
            return pickle_fail(u, "shape or strides are not non-negative integers");
    }
    const ZipEntry* e = u->zip->entry + (value_content(arg[0]) >> 8);
    size_t size = st_dtype[value_content(arg[0]) & 255].size;
    if (!checked_size((int)n_dims, shape, 1, &count) || offset < 0 || count > e->size / size ||
        (uint64_t)offset > e->size / size - count)
        return pickle_fail(u, "a tensor reaches beyond its storage of %llu bytes",
                           (unsigned long long)e->size);
    int64_t expected = 1;
    for (size_t i = n_dims; i-- > 0 && count > 0; expected *= shape[i])      // never above count
        if (shape[i] != 1 && value_content(stride[i]) != expected)
            return pickle_fail(u, "stride %lld where %lld is expected: the tensor is not contiguous; save it "
                               "with .contiguous()", (long long)value_content(stride[i]),
                               (long long)expected);
    if (!cells_take(u, 3 + n_dims, &cell)) return false;
    cell[0] = arg[0];
    cell[1] = (uint64_t)offset;
    cell[2] = n_dims;
    for (size_t i = 0; i < n_dims; i++) cell[3 + i] = (uint64_t)shape[i];
    return pickle_push(u, V_TENSOR, cell - u->cells);
}

static bool make_dict(Unpickler* u) {
    bool first = !u->made;
    u->made = true;
    return pickle_push(u, V_DICT, first);
}

static bool pickle_call(Unpickler* u) {
    uint64_t arguments = 0, function = 0;
    size_t n;
    if (!pickle_pop(u, V_TUPLE, &arguments) || !pickle_pop(u, V_GLOBAL, &function)) return false;
    const uint64_t* arg = tuple_of(u, arguments, &n);
    switch (pickle_globals[value_content(function)].meaning) {
        case CALL_DICT: return n == 0 ? make_dict(u) : pickle_fail(u, "an OrderedDict with arguments");
        case CALL_TENSOR: return make_tensor(u, arg, n);
        case CALL_PARAMETER:         // (tensor, requires_grad, hooks)
            if (n == 3 && value_kind(arg[0]) == V_TENSOR) return
                pickle_push(u, V_TENSOR, value_content(arg[0]));
    }
    return pickle_fail(u, "%s.%s cannot be called like this", pickle_globals[value_content(function)].module,
                       pickle_globals[value_content(function)].name);
}

// set_item: dict[key] = value. The result takes tensors only, other dictionaries (_metadata) anything but
// tensors, and are forgotten.
static bool set_item(Unpickler* u, uint64_t dict, uint64_t key, uint64_t value) {
    size_t length = 0;
    if (value_kind(dict) != V_DICT) return
        pickle_fail(u, "expected a dictionary, found %s", value_names[value_kind(dict)]);
    const char* name = value_kind(key) == V_TEXT ? text_of(u, key, &length) : NULL;
    int shown = length < 100 ? (int)length : 100;
    bool tensor = value_kind(value) == V_TENSOR, result = value_content(dict) == 1;
    if (!result && !tensor) return true;
    if (!result)
        return pickle_fail(u, "tensor \"%.*s\" is in a dictionary inside another; save the inner one alone",
                           shown,
                           name ? name : "");
    if (!name || memchr(name, 0, length)) return
        pickle_fail(u, "expected a tensor's name as key, found another");
    if (!tensor)
        return pickle_fail(u, "\"%.*s\" is %s, expected a tensor; save model.state_dict()", shown, name,
                           value_names[value_kind(value)]);
    if ((size_t)u->st->n == u->max_tensors || length + 1 > u->n + 1 - u->names)
        return pickle_fail(u, "more tensors or longer names than %zu bytes can describe", u->n);
    SafeTensor* t = u->st->tensor + u->st->n++;
    t->name = u->st->header + u->names;
    memcpy(t->name, name, length);
    t->name[length] = 0;
    u->names += length + 1;
    const uint64_t* cell = u->cells + value_content(value);
    const ZipEntry* e = u->zip->entry + (value_content(cell[0]) >> 8);
    t->dtype = (int)(value_content(cell[0]) & 255);
    t->ndim = (int)cell[2];
    t->count = 1;
    for (int i = 0; i < t->ndim; i++) t->shape[i] = (int64_t)cell[3 + i], t->count *= (size_t)t->shape[i];
    t->begin = e->at + cell[1] * st_dtype[t->dtype].size;
    t->end = t->begin + t->count * st_dtype[t->dtype].size;
    t->crc = t->end - t->begin == e->size ? e->crc : 0;
    return true;
}

static bool load_global(Unpickler* u) {
    const char* text = (const char*)u->text + u->at;
    size_t left = u->n - u->at;
    const char* module_end = (const char*)memchr(text, '\n', left);
    const char* name = module_end ? module_end + 1 : NULL;
    const char* end = name ? (const char*)memchr(name, '\n', left - (size_t)(name - text)) : NULL;
    if (!end) return pickle_fail(u, "the pickle ends inside a name");
    size_t module_length = (size_t)(module_end - text), length = (size_t)(end - name);
    u->at += (size_t)(end + 1 - text);
    for (int i = 0; i < N_PICKLE_GLOBALS; i++)
        if (strlen(pickle_globals[i].module) == module_length && strlen(pickle_globals[i].name) == length &&
            memcmp(pickle_globals[i].module, text, module_length) == 0 &&
            memcmp(pickle_globals[i].name, name, length) == 0)
            return pickle_push(u, V_GLOBAL, i);
    return pickle_fail(u, "%.*s.%.*s is refused: only what a dictionary of tensors needs is read",
                       module_length < 100 ? (int)module_length : 100, text, length < 100 ? (int)length
                           : 100, name);
}

static bool memo_put(Unpickler* u, uint64_t index) {
    if (index >= u->n_memo) return pickle_fail(u, "memo index %llu, expected less than %zu",
                                               (unsigned long long)index, u->n_memo);
    if (!u->depth || value_kind(u->stack[u->depth - 1]) == V_MARK)
        return pickle_fail(u, "expected a value, found none");
    u->memo[index] = u->stack[u->depth - 1];
    return true;
}

static bool memo_get(Unpickler* u, uint64_t index) {
    if (index >= u->n_memo || !u->memo[index])
        return pickle_fail(u, "memo index %llu was never stored", (unsigned long long)index);
    return pickle_push(u, value_kind(u->memo[index]), value_content(u->memo[index]));
}

static bool set_items(Unpickler* u) {
    size_t n;
    if (!since_mark(u, &n)) return false;
    if (n % 2 || u->depth < n + 2) return
        pickle_fail(u, "expected a dictionary and pairs of keys and values");
    const uint64_t* pair = u->stack + u->depth - n;
    for (size_t i = 0; i < n; i += 2) if (!set_item(u, pair[-2], pair[i], pair[i + 1])) return false;
    u->depth -= n + 1;
    return true;
}

// pickle_step: one instruction. false: an error, or the end (`.`), where the result lies alone on the stack.
static bool pickle_step(Unpickler* u) {
    static const struct { unsigned char op; int bytes; } operand[] = {
        {0x80, 1}, {'K', 1}, {'M', 2}, {'J', 4}, {'X', 4}, {'h', 1}, {'j', 4}, {'q', 1}, {'r', 4}, {0x8a, 1}};
    uint64_t value = 0, key = 0, dict = 0, number = 0;
    size_t n = 0;
    for (size_t i = 0; i < sizeof operand / sizeof *operand; i++) {
        if (operand[i].op != u->op) continue;
        const unsigned char* p = pickle_take(u, (size_t)operand[i].bytes);
        if (!p) return pickle_fail(u, "the pickle is cut off");
        number = little(p, operand[i].bytes);
    }
    switch (u->op) {
        case 0x80: return number == 2 || pickle_fail(u, "protocol %d, expected 2", (int)number);
        case '(': return pickle_push(u, V_MARK, 0);
        case 'N': return pickle_push(u, V_NONE, 0);
        case 0x88: case 0x89: return pickle_push(u, V_BOOL, u->op == 0x88);
        case 'K': case 'M': return pickle_push(u, V_INT, (int64_t)number);
        case 'J': return pickle_push(u, V_INT, (int32_t)number);
        case 0x8a: {                 // a number of at most 8 bytes, signed; 56 bits are enough for any size
            const unsigned char* p = pickle_take(u, (size_t)number);
            if (!p || number > 8) return pickle_fail(u, "an integer of %d bytes", (int)number);
            int64_t wide = number
                ? (int64_t)(little(p, (int)number) << (64 - 8 * number)) >> (64 - 8 * number) : 0;
            if (wide < -((int64_t)1 << 55) || wide >= (int64_t)1 << 55)
                return pickle_fail(u, "an integer beyond 2^55");
            return pickle_push(u, V_INT, wide);
        }
        case 'X':
            if (!pickle_take(u, (size_t)number)) return
                pickle_fail(u, "a string of %llu bytes, but the pickle ends before",
                                                             (unsigned long long)number);
            return pickle_push(u, V_TEXT, (int64_t)(u->at - number - 4));
        case 'c': return load_global(u);
        case 'q': case 'r': return memo_put(u, number);
        case 'h': case 'j': return memo_get(u, number);
        case ')': return make_tuple(u, 0);
        case 0x85: case 0x86: case 0x87: return make_tuple(u, u->op - 0x84u);
        case 't':
            if (!since_mark(u, &n) || !make_tuple(u, n)) return false;
            value = u->stack[u->depth - 1];
            u->stack[--u->depth - 1] = value;        // over the mark
            return true;
        case 'Q': return make_storage(u);
        case 'R': return pickle_call(u);
        case '}': return make_dict(u);
        case 's':
            return pickle_pop(u, V_NOTHING, &value) && pickle_pop(u, V_NOTHING, &key) &&
                pickle_pop(u, V_DICT, &dict) &&
                   set_item(u, dict, key, value) && pickle_push(u, V_DICT, value_content(dict));
        case 'u': return set_items(u);
        case 'b':                    // attributes of the dictionary: {"_metadata": ...}, of no use here
            return pickle_pop(u, V_DICT, &value) && pickle_pop(u, V_DICT, &dict) &&
                pickle_push(u, V_DICT, value_content(dict));
        case '.':
            if (u->depth != 1 || u->stack[0] != value_of(V_DICT, 1) || u->at != u->n)
                return pickle_fail(u, "expected one dictionary and the end of the file");
            return false;
    }
    return pickle_fail(u, "refused: only what a dictionary of tensors needs is read");
}

// pickle_parse: the tensors of a pickle of n bytes, whose storages are in the zip, into st (n, tensor,
// header)
bool pickle_parse(SafeTensors* st, const Zip* zip, const unsigned char* text, size_t n, Error* err) {
    Unpickler u;
    memset(&u, 0, sizeof u);
    u.text = text, u.n = n, u.path = zip->path, u.zip = zip, u.st = st, u.err = err;
    u.n_memo = n / 2 + 1;
    u.max_tensors = n / 64 + 64;
    u.stack = (uint64_t*)malloc(PICKLE_STACK * sizeof(uint64_t));
    u.memo = (uint64_t*)calloc(u.n_memo, sizeof(uint64_t));
    u.cells = (uint64_t*)malloc((n + 2) * sizeof(uint64_t));
    st->tensor = (SafeTensor*)calloc(u.max_tensors, sizeof(SafeTensor));
    st->header = (char*)malloc(n + 1);
    bool ok = (u.stack && u.memo && u.cells && st->tensor && st->header) ||
              fail_line(err, "%s: out of memory", zip->path);
    err->text[0] = 0;
    if (ok) {
        do {
            u.start = u.at;
            u.op = u.at < n ? text[u.at] : '.';
            if (u.at == n) { ok = pickle_fail(&u, "the pickle ends without it"); break; }
            u.at++;
        } while (pickle_step(&u));
        ok = !err->text[0];
    }
    free(u.stack), free(u.memo), free(u.cells);
    return ok;
}

// ---------------------------------------------------------------------------------------------------
// 3. Reading

// pickle_check: two names may share all their bytes (a tied head), nothing else may overlap; names are unique
static bool pickle_check(SafeTensors* st, Error* err) {
    qsort(st->tensor, (size_t)st->n, sizeof(SafeTensor), order_by_offset);
    const SafeTensor *last = NULL, *before = NULL;     // of those that have bytes
    for (int i = 0; i < st->n; i++) {
        const SafeTensor* t = st->tensor + i;
        if (t->begin == t->end) continue;
        bool tied = last && t->begin == last->begin && t->end == last->end &&
            !(before && before->begin == t->begin);
        if (last && t->begin < last->end && !tied)
            return fail_line(err, "%s: tensors %.200s and %.200s overlap; save copies of them", st->path,
                             last->name, t->name);
        before = last, last = t;
    }
    qsort(st->tensor, (size_t)st->n, sizeof(SafeTensor), order_by_name);
    for (int i = 1; i < st->n; i++)
        if (strcmp(st->tensor[i - 1].name, st->tensor[i].name) == 0)
            return fail_line(err, "%s: tensor %.200s appears twice", st->path, st->tensor[i].name);
    return true;
}

// pickle_load: the archive's data.pkl, checked against its CRC, and what it describes
static bool pickle_load(SafeTensors* st, const Zip* zip, Error* err) {
    const ZipEntry *e = zip_find(zip, "data.pkl", "", 0), *order = zip_find(zip, "byteorder", "", 0);
    char endian[7] = "little";
    if (!e)
        return fail_line(err, "%s: a zip file without FOLDER/data.pkl: not a file of torch.save", st->path);
    if (order && (order->size > 6 || !zip_read(zip, endian, (size_t)order->size, order->at, err) ||
                  strcmp(endian, "little") != 0))
        return fail_line(err, "%s: its numbers are not little-endian", st->path);
    if (e->size > PICKLE_MAX)
        return fail_line(err, "%s: data.pkl has %llu bytes, expected at most %d", st->path,
                         (unsigned long long)e->size, PICKLE_MAX);
    unsigned char* text = (unsigned char*)malloc(e->size + 1);
    Crc32 table;
    crc32_init(&table);
    bool ok = (text || fail_line(err, "%s: out of memory", st->path)) &&
        zip_read(zip, text, e->size, e->at, err);
    if (ok && e->crc && crc32_add(&table, 0, text, e->size) !=
        e->crc)     // 0: torch.save was told to leave it out
        ok = zip_fail(zip, "data.pkl does not match its checksum (CRC)", err);
    ok = ok && pickle_parse(st, zip, text, e->size, err) && pickle_check(st, err);
    free(text);
    return ok;
}

// pickle_open: like safetensors_open, for pytorch_model.bin
bool pickle_open(SafeTensors* st, const char* path, Error* err) {
    memset(st, 0, sizeof *st);
    st->fd = open_regular(path, &st->info, err);
    if (st->fd < 0) return false;
    Zip zip = {st->fd, path, (uint64_t)st->info.st_size, 0, NULL, NULL, 0};
    char head[33] = {0};
    bool ok = (st->path = strdup(path)) || fail_line(err, "%s: out of memory", path);
    ok = ok && zip_read(&zip, head, zip.size < 32 ? zip.size : 32, 0, err);
    if (ok && memcmp(head, "PK\3\4", 4) != 0) {
        const char* what = memcmp(head, "\x80\2\x8a\x0a", 4) == 0
                               ? "written by PyTorch before 1.6: load it there and save it again"
                               : what_else(head);
        ok = fail_line(err, "%s: %s", path, what ? what : "expected a zip file as torch.save writes it");
    }
    ok = ok && zip_open(&zip, err) && pickle_load(st, &zip, err);
    zip_close(&zip);
    if (!ok) {
        if (!st->path) close(st->fd);
        safetensors_close(st);
    }
    return ok;
}

// ---------------------------------------------------------------------------------------------------
// 4. Writing

typedef struct {
    int fd;
    uint64_t at;                     // bytes written
    const char* folder;
    unsigned char* directory;
    size_t used, n;                  // bytes and entries of the directory
    const SafeTensorOut* tensor;
    int n_tensors;
    Crc32 table;
} ZipOut;

static void put_little(unsigned char** p, uint64_t value, int bytes) {
    memcpy(*p, &value, (size_t)bytes);
    *p += bytes;
}

static bool zip_put(ZipOut* z, const void* data, size_t n) {
    z->at += n;
    return write_all(z->fd, data, n);
}

enum { ZIP_ALIGN = 64, ZIP_NAME = 96, ZIP_RECORD = ZIP_CENTRAL + ZIP_NAME + 28 };

// zip_put_entry: one stored entry: the bytes of a text or of a tensor. As in torch.save its CRC and size
// follow the bytes, which begin at a multiple of 64.
static bool zip_put_entry(ZipOut* z, const char* name, const char* text, size_t size,
                          const SafeTensorOut* t) {
    unsigned char head[ZIP_LOCAL + ZIP_NAME + 4 + ZIP_ALIGN] = {0}, tail[24], *p = head;
    char path[ZIP_NAME];
    uint64_t header = z->at;
    uint32_t crc = 0;
    size_t length = (size_t)snprintf(path, sizeof path, "%s/%s", z->folder, name);
    size_t fill = (size_t)-(int64_t)(header + ZIP_LOCAL + length + 4) & (ZIP_ALIGN - 1);
    put_little(&p, 0x04034b50, 4), put_little(&p, 0, 2), put_little(&p, 0x0808, 2);   // 8: CRC, sizes follow
    p += 18;                                                                          // stored, no date
    put_little(&p, length, 2), put_little(&p, fill + 4, 2);
    memcpy(p, path, length), p += length;
    put_little(&p, 'F' | 'B' << 8, 2), put_little(&p, fill, 2), p += fill;
    if (!zip_put(z, head, (size_t)(p - head))) return false;
    bool written = t ? write_tensor(z->fd, t, size / st_dtype[t->dtype].size, &z->table, &crc)
                     : write_all(z->fd, text, size);
    if (!written) return false;
    if (!t) crc = crc32_add(&z->table, 0, text, size);
    z->at += size;
    bool wide = size >= 0xffffffff || header >= 0xffffffff;
    p = tail;
    put_little(&p, 0x08074b50, 4), put_little(&p, crc, 4);
    put_little(&p, size, size >= 0xffffffff ? 8 : 4), put_little(&p, size, size >= 0xffffffff ? 8 : 4);
    if (!zip_put(z, tail, (size_t)(p - tail))) return false;
    p = z->directory + z->used;
    put_little(&p, 0x02014b50, 4), put_little(&p, 0, 4), put_little(&p, 0x0808, 2), put_little(&p, 0, 6);
    put_little(&p, crc, 4), put_little(&p, wide ? 0xffffffff : size, 4),
        put_little(&p, wide ? 0xffffffff : size, 4);
    put_little(&p, length, 2), put_little(&p, wide ? 28 : 0, 2), put_little(&p, 0, 8), put_little(&p, 0, 2);
    put_little(&p, wide ? 0xffffffff : header, 4);
    memcpy(p, path, length), p += length;
    if (wide) {
        put_little(&p, 1, 2), put_little(&p, 24, 2);
        put_little(&p, size, 8), put_little(&p, size, 8), put_little(&p, header, 8);
    }
    z->used = (size_t)(p - z->directory);
    z->n++;
    return true;
}

static bool zip_put_end(ZipOut* z) {
    unsigned char end[ZIP_END64 + ZIP_LOCATOR + ZIP_END], *p = end;
    uint64_t at = z->at;
    bool wide = at + z->used >= 0xffffffff || z->n >= 0xffff;
    if (!zip_put(z, z->directory, z->used)) return false;
    put_little(&p, 0x06064b50, 4), put_little(&p, ZIP_END64 - 12, 8), put_little(&p, 0, 4),
        put_little(&p, 0, 8);
    put_little(&p, z->n, 8), put_little(&p, z->n, 8), put_little(&p, z->used, 8), put_little(&p, at, 8);
    put_little(&p, 0x07064b50, 4), put_little(&p, 0, 4), put_little(&p, at + z->used, 8),
        put_little(&p, 1, 4);
    put_little(&p, 0x06054b50, 4), put_little(&p, 0, 4);
    put_little(&p, wide ? 0xffff : z->n, 2), put_little(&p, wide ? 0xffff : z->n, 2);
    put_little(&p, wide ? 0xffffffff : z->used, 4), put_little(&p, wide ? 0xffffffff : at, 4),
        put_little(&p, 0, 2);
    return zip_put(z, end, (size_t)(p - end));
}

// The instructions that the pickle of a tensor dictionary needs; Text ends at NUL, so they are bytes.
typedef struct { unsigned char* data; size_t n; } Bytes;
static void add_bytes(Bytes* b, const void* data, size_t n) { memcpy(b->data + b->n, data, n), b->n += n; }
static void add_op(Bytes* b, const char* op) { add_bytes(b, op, strlen(op)); }
static void add_number(Bytes* b, const char* op, uint64_t value, int bytes) {
    add_op(b, op);
    add_bytes(b, &value, (size_t)bytes);
}
static void add_text(Bytes* b, const char* text) {
    add_number(b, "X", strlen(text), 4);
    add_op(b, text);
}
static void add_tuple(Bytes* b, int n, const int64_t* value) {
    add_op(b, "(");
    for (int i = 0; i < n; i++) add_number(b, "\x8a\x08", (uint64_t)value[i], 8);
    add_op(b, "t");
}

// pickle_text: tensors whose data is that of an earlier one share its storage (a tied head). storage: what
// each got, -1 for shared ones
enum { PICKLE_ENTRY = 512 };         // bytes of one tensor, its name aside
static Bytes pickle_text(const SafeTensorOut* t, int n, int* storage) {
    size_t room = 256;
    for (int i = 0; i < n; i++) room += PICKLE_ENTRY + strlen(t[i].name);
    Bytes b = {(unsigned char*)xcalloc(room, 1), 0};
    add_op(&b, "\x80\x02" "ccollections\nOrderedDict\n)R(");
    for (int i = 0; i < n; i++) {
        int64_t stride[ST_MAX_DIMS], count = 1;
        int owner = 0, dtype = CALL_PARAMETER + 1;
        char key[32];
        for (int k = t[i].ndim; k-- > 0; count *= t[i].shape[k]) stride[k] = count;
        while (t[owner].data != t[i].data) owner++;
        storage[i] = owner == i ? i : -1;
        for (int g = 0; g < N_PICKLE_GLOBALS; g++) if (pickle_globals[g].meaning == t[i].dtype) dtype = g;
        add_text(&b, t[i].name);
        add_op(&b, "ctorch._utils\n_rebuild_tensor_v2\n((");
        add_text(&b, "storage");
        add_op(&b, "ctorch\n"), add_op(&b, pickle_globals[dtype].name), add_op(&b, "\n");
        snprintf(key, sizeof key, "%d", owner);
        add_text(&b, key), add_text(&b, "cpu");
        add_number(&b, "\x8a\x08", (uint64_t)count, 8);
        add_number(&b, "tQK", 0, 1);
        add_tuple(&b, t[i].ndim, t[i].shape), add_tuple(&b, t[i].ndim, stride);
        add_op(&b, "\x89" "ccollections\nOrderedDict\n)RtR");
    }
    add_op(&b, "u.");
    return b;
}

static bool pickle_put(int fd, void* arg) {
    ZipOut* z = (ZipOut*)arg;
    int* storage = (int*)xcalloc((size_t)z->n_tensors + 1, sizeof(int));
    Bytes text = pickle_text(z->tensor, z->n_tensors, storage);
    z->fd = fd;
    bool ok = zip_put_entry(z, "data.pkl", (const char*)text.data, text.n, NULL) &&
              zip_put_entry(z, "byteorder", "little", 6, NULL);
    for (int i = 0; i < z->n_tensors && ok; i++) {
        char name[32];
        size_t size = 0;
        if (storage[i] < 0) continue;
        snprintf(name, sizeof name, "data/%d", i);
        ok = checked_size(z->tensor[i].ndim, z->tensor[i].shape, st_dtype[z->tensor[i].dtype].size, &size) &&
             zip_put_entry(z, name, NULL, size, z->tensor + i);
    }
    ok = ok && zip_put_entry(z, "version", "3\n", 2, NULL) && zip_put_end(z);
    int error = errno;
    free(text.data);
    free(storage);
    errno = error;
    return ok;
}

// pickle_write: like safetensors_write, in the form of torch.save
bool pickle_write(const char* path, const SafeTensorOut* tensor, int n, Error* err) {
    ZipOut z;
    memset(&z, 0, sizeof z);
    z.folder = "pytorch_model", z.tensor = tensor, z.n_tensors = n;
    z.directory = (unsigned char*)xcalloc((size_t)n + 3, ZIP_RECORD);
    crc32_init(&z.table);
    bool ok = write_replacing(path, pickle_put, &z, err);
    free(z.directory);
    return ok;
}
