// ---------------------------------------------------------------------------------------------------
// test_models.h: published checkpoints (data/pickle.h, data/shards.h, data/checkpoint.h): pytorch_model.bin,
// models in
// several files, hostile ones of each, converting, fine-tuning, freezing.
//
// Rows of hostile files as in test_files.h: a valid base, one edit, the words of the error line; each in a
// child
// that may allocate twice the file and 16 MiB, and must be done within a second.

// --- pickles, in an assembly of one word per instruction
//
//   "text  a string     #5  an integer     @module.name  a global     x80  a byte     anything else: its
// letters

static size_t assemble(const char* words, unsigned char* out) {
    unsigned char* p = out;
    char *copy = strdup(words), *rest = NULL;
    for (char* w = strtok_r(copy, " ", &rest); w; w = strtok_r(NULL, " ", &rest)) {
        size_t n = strlen(w);
        if (w[0] == '"') {
            *p++ = 'X';
            put_little(&p, n - 1, 4);
            memcpy(p, w + 1, n - 1), p += n - 1;
        } else if (w[0] == '#') {
            *p++ = 0x8a, *p++ = 8;
            put_little(&p, (uint64_t)strtoll(w + 1, NULL, 0), 8);
        } else if (w[0] == '@') {
            char* dot = strrchr(w, '.');
            p += sprintf((char*)p, "c%.*s\n%s\n", (int)(dot - w - 1), w + 1, dot + 1);
        } else if (w[0] == 'x' && n == 3) {
            *p++ = (unsigned char)strtol(w + 1, NULL, 16);
        } else {
            memcpy(p, w, n), p += n;
        }
    }
    free(copy);
    return (size_t)(p - out);
}

// put_bin: an archive as torch.save makes it: this pickle, storages 0 (24 bytes) and 1 (6 bytes)
typedef struct { const unsigned char* pickle; size_t n; } BinFile;
static bool put_bin_entries(int fd, void* arg) {
    const BinFile* b = (const BinFile*)arg;
    unsigned char directory[8 * ZIP_RECORD], data[24];
    ZipOut z;
    memset(&z, 0, sizeof z);
    z.fd = fd, z.folder = "m", z.directory = directory;
    crc32_init(&z.table);
    for (int i = 0; i < 24; i++) data[i] = (unsigned char)(i * 3 % 60);
    return zip_put_entry(&z, "data.pkl", (const char*)b->pickle, b->n, NULL) &&
           zip_put_entry(&z, "byteorder", "little", 6, NULL) &&
           zip_put_entry(&z, "data/0", (const char*)data, 24, NULL) &&
           zip_put_entry(&z, "data/1", (const char*)data, 6, NULL) &&
           zip_put_entry(&z, "version", "3\n", 2, NULL) && zip_put_end(&z);
}

static void put_bin(const char* path, const unsigned char* pickle, size_t n) {
    BinFile b = {pickle, n};
    Error err;
    if (!write_replacing(path, put_bin_entries, &b, &err)) die("test: %s", err.text);
}

#define PICKLE_START "x80 x02 @collections.OrderedDict ) R x71 x00 ( "
#define PICKLE_A "\"a @torch._utils._rebuild_tensor_v2 ( ( \"storage @torch.FloatStorage \"0 \"cpu " \
                 "#6 t Q #0 ( #2 #3 t ( #3 #1 t x89 @collections.OrderedDict ) R t R "
#define PICKLE_B "\"b @torch._utils._rebuild_tensor_v2 ( ( \"storage @torch.HalfStorage \"1 \"cpu " \
                 "#3 t Q #1 ( #2 t ( #1 t x88 @collections.OrderedDict ) R t R "
static const char base_pickle[] =
    PICKLE_START PICKLE_A PICKLE_B "u } \"_metadata @collections.OrderedDict ) R "
                                  "\"x } \"version K x01 s s s b .";

static const EditRow pickle_rows[] = {
    {"unchanged", "x80", "x80", NULL},
    // 17: what is not in the list
    {"os.system", "@torch._utils._rebuild_tensor_v2", "@os.system",
     "opcode GLOBAL at byte 38: os.system is refused"},
    {"eval", "@torch._utils._rebuild_tensor_v2", "@builtins.eval", "builtins.eval is refused"},
    {"a global nearly right", "@torch._utils._rebuild_tensor_v2", "@torch._utils._rebuild_tensor",
     "is refused"},
    {"another module", "@torch.FloatStorage", "@torchx.FloatStorage", "torchx.FloatStorage is refused"},
    {"name with control characters", "@torch.FloatStorage", "@torch.a\tb", "torch.a?b is refused"},
    {"INST", "u }", "i u }", "opcode INST at byte"},
    {"OBJ", "u }", "o u }", "opcode OBJ"},
    {"NEWOBJ", "u }", "x81 u }", "opcode NEWOBJ"},
    {"EXT1", "u }", "x82 x01 u }", "opcode EXT1"},
    {"STACK_GLOBAL", "u }", "x93 u }", "opcode STACK_GLOBAL"},
    {"PERSID", "u }", "P u }", "opcode PERSID"},
    {"BINFLOAT", "u }", "G u }", "opcode BINFLOAT"},
    {"EMPTY_LIST", "u }", "] u }", "opcode EMPTY_LIST"},
    {"no opcode at all", "u }", "xff u }", "opcode 0xff"},
    {"POP", "u }", "0 u }", "opcode POP"},
    {"protocol 4", "x80 x02", "x80 x04", "protocol 4, expected 2"},
    // the stack
    {"stack underflow: tuple", "x80 x02", "x80 x02 x87", "expected 3 values, found 0"},
    {"stack underflow: reduce", "x80 x02", "x80 x02 R", "expected a tuple, found an empty stack"},
    {"no mark", "x80 x02", "x80 x02 t", "expected a mark on the stack"},
    {"a mark inside a tuple", "( #2 #3 t", "#2 ( x86", "found a mark"},
    {"items without a dictionary", "x80 x02", "x80 x02 ( \"a \"b u", "expected a dictionary"},
    {"an odd number of items", PICKLE_B "u", "\"b u", "pairs of keys and values"},
    {"ends early", " b .", "", "the pickle ends without it"},
    {"ends inside a string", " b .", " X xff xff xff x7f", "the pickle ends before"},
    {"ends inside a name", " b .", " c", "ends inside a name"},
    {"ends inside an operand", " b .", " J", "cut off"},
    {"bytes after the end", " b .", " b . N", "and the end of the file"},
    {"two results", " b .", " b N .", "expected one dictionary"},
    {"the result is a number", " b .", " b \"x x86 .", "expected one dictionary"},
    // the memo
    {"memo index 2^31", "x71 x00", "r x00 x00 x00 x80", "memo index 2147483648, expected less than"},
    {"memo never stored", "u }", "h x09 u }", "memo index 9 was never stored"},
    {"memo beyond the end", "u }", "j xff xff xff x7f u }", "memo index 2147483647 was never stored"},
    {"memo of a mark", "x71 x00 (", "( x71 x00", "expected a value, found none"},
    // storages and tensors
    {"storage larger than its entry", "\"cpu #6", "\"cpu #7",
     "storage \"0\" has 7 elements of F32, its zip entry 24"},
    {"storage smaller than its entry", "\"cpu #6", "\"cpu #5", "storage \"0\" has 5 elements"},
    {"storage of negative size", "\"cpu #6", "\"cpu #-6", "storage \"0\" has -6"},
    {"storage of 2^61 elements", "\"cpu #6", "\"cpu #0x2000000000000000", "beyond 2^55"},
    {"storage that is not there", "\"0 \"cpu", "\"7 \"cpu", "storage \"7\" is not in the file"},
    {"storage by a path", "\"0 \"cpu", "\"../0 \"cpu", "storage \"../0\" is not in the file"},
    {"storage of another kind of id", "\"storage @torch.Float", "\"module @torch.Float",
     "expected (\"storage\""},
    {"type that is no storage", "@torch.FloatStorage", "@collections.OrderedDict", "expected (\"storage\""},
    {"offset beyond the storage", "Q #0", "Q #1", "reaches beyond its storage of 24"},
    {"negative offset", "Q #0", "Q #-1", "reaches beyond its storage"},
    {"offset 2^54", "Q #0", "Q #0x40000000000000", "reaches beyond its storage"},
    {"shape beyond the storage", "( #2 #3 t ( #3 #1 t", "( #3 #3 t ( #3 #1 t", "reaches beyond its storage"},
    {"product wraps", "( #2 #3 t", "( #0x40000000000000 #0x400 t", "reaches beyond its storage"},
    {"negative size", "( #2 #3 t", "( #2 #-3 t", "non-negative"},
    {"two negative sizes", "( #2 #3 t", "( #-2 #-3 t", "non-negative"},
    {"size None", "( #2 #3 t", "( #2 N t", "non-negative"},
    {"9 dimensions", "( #2 #3 t ( #3 #1 t", "( #1 #1 #1 #1 #1 #1 #1 #2 #3 t ( #1 #1 #1 #1 #1 #1 #1 #3 #1 t",
     "9 dimensions"},
    {"strides of another rank", "( #3 #1 t", "( #1 t", "2 dimensions with 1 strides"},
    {"transposed", "( #3 #1 t", "( #1 #2 t", "not contiguous"},
    {"overlapping strides", "( #3 #1 t", "( #0 #1 t", "stride 0 where 3 is expected"},
    {"negative stride", "( #3 #1 t", "( #-3 #1 t", "stride -3"},
    {"huge stride", "( #3 #1 t", "( #0x7fffffffffffff #1 t", "not contiguous"},
    {"any stride of a size 1", "( #2 #3 t ( #3 #1 t", "( #6 #1 t ( #1 #77 t", NULL},
    {"no elements", "( #2 #3 t ( #3 #1 t", "( #0 #0x7fffffffffffff t ( #3 #1 t", NULL},
    {"a scalar", "( #2 #3 t ( #3 #1 t", "( t ( t", NULL},
    {"a parameter", PICKLE_B, "\"b @torch._utils._rebuild_parameter " "@torch._utils._rebuild_tensor_v2 "
     "( ( \"storage @torch.HalfStorage \"1 \"cpu #3 t Q #1 ( #2 t ( #1 t x88 @collections.OrderedDict ) R t "
     "R "
     "x88 @collections.OrderedDict ) R x87 R ", NULL},
    {"called with too little", "( #3 #1 t x89 @collections.OrderedDict ) R t R", "t R", "expected (storage"},
    {"a storage called", "@torch.FloatStorage \"0", "@torch.FloatStorage ) R \"0", "cannot be called"},
    {"an OrderedDict of something", "@collections.OrderedDict ) R x71",
     "@collections.OrderedDict \"a x85 R x71",
     "with arguments"},
    // the dictionary
    {"a value that is no tensor", PICKLE_B, "\"b #5 ", "\"b\" is an integer, expected a tensor"},
    {"a key that is no string", "\"b @torch._utils", "#5 @torch._utils", "expected a tensor's name"},
    {"a name twice", "\"b @torch._utils", "\"a @torch._utils", "tensor a appears twice"},
    {"a tensor in a dictionary inside", PICKLE_A PICKLE_B "u", "\"model } " PICKLE_A "s u", "inside another"},
    {"tied: the same tensor twice", PICKLE_B "u", PICKLE_B "\"c h x01 u", "never stored"},
    {"two tensors overlap", "@torch.HalfStorage \"1 \"cpu #3 t Q #1",
     "@torch.HalfStorage \"0 \"cpu #12 t Q #3",
     "overlap"},
};

static size_t read_file_bytes(const char* path, unsigned char* bytes, size_t room) {
    FILE* f = fopen(path, "rb");
    size_t n = f ? fread(bytes, 1, room, f) : 0;
    if (f) fclose(f);
    return n;
}

static void test_pickles(void) {
    const char* path = scratch("row.bin");
    static unsigned char bytes[3 << 20];
    int failed = 0;
    for (size_t i = 0; i < sizeof pickle_rows / sizeof *pickle_rows; i++) {
        char* words = replace_text(base_pickle, pickle_rows[i].find, pickle_rows[i].by);
        put_bin(path, bytes, assemble(words, bytes));
        failed += run_open_case(pickle_rows[i].name, path, pickle_rows[i].words);
        free(words);
    }
    for (int over = 0; over < 2; over++) {       // the last index that is possible, and the next
        char* words = replace_text(base_pickle, "x71 x00", "r xee xee xee xee");
        size_t n = assemble(words, bytes), index = n / 2 + (size_t)over;
        memcpy(memmem(bytes, n, "\xee\xee\xee\xee", 4), &index, 4);
        put_bin(path, bytes, n);
        failed += run_open_case("memo index at the limit", path, over ? "expected less than" : NULL);
        free(words);
    }
    report("pickle: edited programs", failed, 0);

    // floods: many values, tuples, names; a stack of marks
    const struct { const char *name, *unit; size_t n; const char* words; } floods[] = {
        {"10^6 nested tuples", "x85", 1000000, "more tuples"},
            {"10^6 empty tuples", ")", 1000000, "16384 values"},
        {"marks", "(", 1000000, "16384 values"}, {"2 MiB", "N", 2 << 20, "data.pkl has 2097"},
        {"dictionaries", "} }", 500000, "16384 values"},
            {"tuples of everything", "N x85 x85 x85", 250000, "16384 values"},
        {"unread strings", "\"aaaa", 100000, "16384 values"},
        {"a tensor under 80,000 names", "\"bbbb h x01 s", 80000, "more tensors or longer names than"},
        {"long names", "h x02 h x01 s", 200000, "more tensors or longer names than"}};
    failed = 0;
    for (size_t i = 0; i < sizeof floods / sizeof *floods; i++) {
        // the dictionary holds tensor a, memo 1, and has it once more under a long name, memo 2
        size_t n = assemble("x80 x02 @collections.OrderedDict ) R " PICKLE_A "x71 x01 s "
                            "\"a-name-of-many-letters-that-is-far-longer-than-the-64-bytes-which-a-tensor-of-"
                            "the-file-is-expected-to-take-at-least x71 x02 h x01 s", bytes);
        size_t unit;
        unsigned char piece[64];
        unit = assemble(floods[i].unit, piece);
        for (size_t k = 0; k < floods[i].n && n + unit < sizeof bytes; k++, n += unit) memcpy(bytes + n,
                                                                                              piece, unit);
        bytes[n++] = '.';
        put_bin(path, bytes, n);
        failed += run_open_case(floods[i].name, path, floods[i].words);
    }
    report("pickle: floods", failed, 0);
}

// 18: fields of zip records, found by their signature. Records: local L, central C, ends E (zip64 Z, locator
// Y).
typedef struct { const char* name; char record; int index, at, bytes; uint64_t value; const char* words;
                } ZipRow;
static const ZipRow zip_rows[] = {
    {"unchanged", 'L', 0, 4, 2, 0, NULL},
    {"local size differs", 'L', 2, 18, 4, 23, "its local header differs"},
    {"local size of the other kind differs", 'L', 2, 22, 4, 25, "its local header differs"},
    {"local CRC differs", 'L', 2, 14, 4, 1, "its local header differs"},
    {"local name differs", 'L', 2, 30, 1, 'x', "its local header differs"},
    {"local name longer", 'L', 2, 26, 2, 9, "its local header differs"},
    {"local extra field beyond the file", 'L', 3, 28, 2, 0xffff, "reach into what follows"},
    {"local header is none", 'L', 1, 0, 1, 'Q', "its local header differs"},
    {"local says compressed", 'L', 2, 8, 2, 8, "its local header differs"},
    {"local says encrypted", 'L', 2, 6, 2, 0x0809, "its local header differs"},
    {"compressed", 'C', 2, 10, 2, 8, "is compressed"},
    {"compressed size differs", 'C', 2, 20, 4, 20, "is compressed"},
    {"encrypted", 'C', 2, 8, 2, 0x0809, "is encrypted"},
    {"CRC of data.pkl wrong", 'C', 0, 16, 4, 12345, "data.pkl does not match its checksum"},
    {"CRC of data.pkl left out", 'C', 0, 16, 4, 0, NULL},
    {"CRC of a storage wrong", 'C', 2, 16, 4, 12345, "tensor a: its bytes do not match the checksum"},
    {"CRC of a storage left out", 'C', 2, 16, 4, 0, NULL},
    {"offset past the end", 'C', 2, 42, 4, 0x7fffffff, "an offset past its end"},
    {"offset of another entry", 'C', 2, 42, 4, 0, "reach into what follows"},
    {"zip64 size missing", 'C', 2, 42, 4, 0xffffffff, "an offset past its end"},
    {"name too long", 'C', 4, 28, 2, 0xffff, "directory ends too early"},
    {"name without a folder", 'C', 1, 47, 1, '_', "expected FOLDER/name"},
    {"name ../", 'C', 1, 46, 3, '.' | '.' << 8 | '/' << 16, "expected FOLDER/name"},
    {"name with a backslash", 'C', 1, 48, 1, '\\', "expected FOLDER/name"},
    {"name with NUL", 'C', 1, 48, 1, 0, "expected FOLDER/name"},
    {"another folder", 'C', 1, 46, 1, 'n', "differs from the zip directory"},
    {"extra field longer than the record", 'C', 4, 30, 2, 9, "directory ends too early"},
    {"record is none", 'C', 3, 0, 1, 'Q', "directory ends too early"},
    {"no end", 'E', 0, 0, 1, 'Q', "a zip file without an end"},
    {"a comment that is not there", 'E', 0, 20, 2, 5, "a zip file without an end"},
    {"several disks", 'E', 0, 4, 2, 1, "several pieces"},
    {"10^6 entries", 'Z', 0, 32, 8, 1000000, "contradict"},
    {"65,535 entries", 'E', 0, 10, 2, 0xffff, NULL},
    {"4 entries of 5", 'E', 0, 10, 2, 4, "contradict"},
    {"directory larger than the file", 'Z', 0, 40, 8, 1 << 20, "contradict"},
    {"directory past the end", 'Z', 0, 48, 8, ~0ull, "contradict"},
    {"zip64 end past the end", 'Y', 0, 8, 8, ~0ull - 3, "an offset past its end"},
    {"zip64 end is none", 'Y', 0, 8, 8, 0, "no zip64 end"},
    {"no locator: the plain end counts", 'Y', 0, 0, 1, 'Q', NULL},
};

// both ends of a zip say the same, so the second edit makes rows about sizes reach the checks behind that one
typedef struct { const char* name; int at64, bytes64, at, bytes; uint64_t value; const char* words; } EndRow;
static const EndRow end_rows[] = {
    {"10^6 entries", 32, 8, 10, 2, 1000000, "has 1000000 entries in"},
    {"6 entries of 5", 32, 8, 10, 2, 6, "directory ends too early"},
    {"4 entries of 5", 32, 8, 10, 2, 4, "longer than its entries"},
    {"no entries", 32, 8, 10, 2, 0, "longer than its entries"},
    {"directory of 2^60 bytes", 40, 8, 12, 4, 1ull << 60, "entries in 1152921504606846976 bytes"},
    {"directory cut by one", 40, 8, 12, 4, ~0ull, "directory ends too early"},
    {"directory past the end", 48, 8, 16, 4, 1ull << 62, "not before its end"},
    {"directory begins at 0", 48, 8, 16, 4, 0, "directory ends too early"},
};

static unsigned char* nth_record(unsigned char* bytes, size_t n, char record, int index) {
    const char* sign = record == 'L' ? "PK\3\4" : record == 'C' ? "PK\1\2" : record == 'E' ? "PK\5\6"
                       : record == 'Z' ? "PK\6\6" : "PK\6\7";
    unsigned char* p = bytes;
    for (int i = 0; p && i <= index; i++)
        p = (unsigned char*)memmem(p + (i > 0), n - (size_t)(p + (i > 0) - bytes), sign, 4);
    if (!p) die("test row: no record %c %d", record, index);
    return p;
}

static void test_zips(void) {
    const char* path = scratch("row.bin");
    unsigned char base[8192], bytes[8192], pickle[4096];
    put_bin(path, pickle, assemble(base_pickle, pickle));
    size_t n = read_file_bytes(path, base, sizeof base);
    int failed = n == sizeof base;
    for (size_t i = 0; i < sizeof zip_rows / sizeof *zip_rows; i++) {
        const ZipRow* r = zip_rows + i;
        memcpy(bytes, base, n);
        memcpy(nth_record(bytes, n, r->record, r->index) + r->at, &r->value, (size_t)r->bytes);
        file_put(path, bytes, n);
        failed += run_open_case(r->name, path, r->words);
    }
    for (size_t i = 0; i < sizeof end_rows / sizeof *end_rows; i++) {
        const EndRow* r = end_rows + i;
        memcpy(bytes, base, n);
        unsigned char *wide = nth_record(bytes, n, 'Z', 0), *end = nth_record(bytes, n, 'E', 0);
        uint64_t value = r->value == ~0ull ? little(wide + r->at64, 8) - 1 : r->value;
        uint64_t narrow = r->value == ~0ull || value >> 8 * r->bytes == 0 ? value : ~0ull;
        memcpy(wide + r->at64, &value, 8);
        memcpy(end + r->at, &narrow, (size_t)r->bytes);
        file_put(path, bytes, n);
        failed += run_open_case(r->name, path, r->words);
    }
    // two entries of one name: data/1 becomes data/0 in both of its records
    memcpy(bytes, base, n);
    nth_record(bytes, n, 'C', 3)[46 + 7] = '0', nth_record(bytes, n, 'L', 3)[30 + 7] = '0';
    file_put(path, bytes, n);
    failed += run_open_case("two entries of one name", path, "entry m/data/0 appears twice");
    // big-endian numbers; no pickle; other files
    memcpy(bytes, base, n);
    memcpy(memmem(bytes, n, "little", 6), "bigbig", 6);
    file_put(path, bytes, n);
    failed += run_open_case("big-endian", path, "not little-endian");
    memcpy(bytes, base, n);
    nth_record(bytes, n, 'C', 0)[46 + 2] = 'D', nth_record(bytes, n, 'L', 0)[30 + 2] = 'D';
    file_put(path, bytes, n);
    failed += run_open_case("no pickle", path, "without FOLDER/data.pkl");
    const struct { const char *name, *text, *words; } others[] = {
        {"before 1.6", "\x80\x02\x8a\x0al\xfc\x9c\x46\xf9 jP", "before 1.6"},
        {"Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
         "run git lfs pull"},
        {"HTML", "<!DOCTYPE html>", "HTML"}, {"text", "hello", "expected a zip file"},
            {"empty", "", "expected a zip file"},
        {"PK and nothing", "PK\3\4", "without an end"}};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        file_put(path, others[i].text, strlen(others[i].text));
        failed += run_open_case(others[i].name, path, others[i].words);
    }
    report("zip: edited records, other files", failed, 0);

    // 13: cut, longer or written again between open and read
    failed = 0;
    for (int how = 0; how < 3; how++) {
        SafeTensors st;
        Error err;
        real out[6];
        struct timespec old[2] = {{1, 0}, {1, 0}};
        file_put(path, base, n);
        if (!pickle_open(&st, path, &err)) { failed++; continue; }
        failed += how == 0 ? truncate(path, 600) != 0 : how == 1 ? truncate(path, 9000) != 0
                                                               : utimensat(AT_FDCWD, path, old, 0) != 0;
        failed += safetensors_read_real(&st, safetensors_find(&st, "a"), out, &err) ||
                  !one_line(err.text, "changed while reading");
        safetensors_close(&st);
    }
    report("zip: file changed while reading", failed, 0);

    // every prefix is refused; every byte of a record changed is refused or changes nothing that counts
    failed = 0;
    for (size_t cut = 0; cut < n; cut++) {
        Error err;
        file_put(path, base, cut);
        failed += read_all_tensors(path, &err) || !one_line(err.text, path);
    }
    report("zip: every prefix", failed, 0);
    failed = 0;
    for (size_t i = 0; i < n; i++) {
        static const unsigned char values[] = {0, 1, 0xff, 'P'};
        for (int v = 0; v < 4; v++) {
            Error err;
            SafeTensors st;
            memcpy(bytes, base, n);
            bytes[i] = values[v];
            file_put(path, bytes, n);
            if (pickle_open(&st, path, &err)) {
                bool good = st.n == 2;
                for (int k = 0; k < st.n; k++) good = good && st.tensor[k].end <= n;
                failed += !good;
                safetensors_close(&st);
            } else failed += !one_line(err.text, path);
        }
    }
    report("zip: every byte changed", failed, 0);
}

// --- models in several files

static void write_index(const char* dir, const char* text) {
    char path[4200];
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    file_put(path, text, strlen(text));
}

static const char base_index[] =
    "{\"metadata\": {\"total_size\": 24}, \"weight_map\": {\"a\": \"m-1.safetensors\", "
                                 "\"b\": \"m-2.safetensors\", \"c\": \"m-2.safetensors\"}}";
static const EditRow index_rows[] = {
    {"unchanged", "24", "24", NULL},
    {"../", "\"m-1.safetensors\"", "\"../m-1.safetensors\"",
     "file name \"../m-1.safetensors\", expected a name"},
    {"absolute", "\"m-1.safetensors\"", "\"/etc/passwd\"", "file name \"/etc/passwd\""},
    {"below", "\"m-1.safetensors\"", "\"sub/m-1.safetensors\"", "expected a name in the same directory"},
    {"dot", "\"m-1.safetensors\"", "\".\"", "file name \".\""},
    {"two dots", "\"m-1.safetensors\"", "\"..\"", "file name \"..\""},
    {"hidden", "\"m-1.safetensors\"", "\".safetensors\"", "file name \".safetensors\""},
    {"empty name", "\"m-1.safetensors\"", "\"\"", "file name \"\""},
    {"other ending", "\"m-1.safetensors\"", "\"m-1.bin\"", "that ends in .safetensors"},
    {"NUL in the name", "\"m-1.safetensors\"", "\"m\\u0000.safetensors\"", "weight_map, a:"},
    {"newline in the name", "\"m-1.safetensors\"", "\"m\\n.safetensors\"", "m?.safetensors"},
    {"number as name", "\"m-1.safetensors\"", "1", "weight_map, a: expected a string"},
    {"missing file", "m-1.safetensors", "m-9.safetensors",
     "1 of the 2 files it names are missing: m-9.safetensors"},
    {"a FIFO", "m-1.safetensors", "fifo.safetensors", "found a FIFO"},
    {"a directory", "m-1.safetensors", "dir.safetensors", "found a directory"},
    {"a device", "m-1.safetensors", "zero.safetensors", "found a character device"},
    {"not what it says", "m-1.safetensors", "text.safetensors", "not a safetensors file"},
    {"tensor in the other file", "\"b\": \"m-2.safetensors\"", "\"b\": \"m-1.safetensors\"",
     "lists tensor b in m-1.safetensors, which does not hold it"},
    {"tensor that is nowhere", "\"b\":", "\"bb\":", "does not list tensor b"},
    {"one more tensor", "{\"a\":", "{\"z\": \"m-1.safetensors\", \"a\":", "lists tensor z"},
    {"a tensor not listed", ", \"c\": \"m-2.safetensors\"", "", "does not list tensor c"},
    {"the same tensor in two files", "{\"a\":", "{\"x\": \"again.safetensors\", \"a\":",
     "tensor a is in two files"},
    {"listed twice", "{\"a\":", "{\"a\": \"m-1.safetensors\", \"a\":", "lists a twice"},
    {"weight_map twice", "\"metadata\": {\"total_size\": 24}", "\"weight_map\": {}",
     "weight_map appears twice"},
    {"no weight_map", "weight_map", "weights", "expected an object weight_map"},
    {"weight_map a list",
     "{\"a\": \"m-1.safetensors\", \"b\": \"m-2.safetensors\", \"c\": \"m-2.safetensors\"}", "[]",
     "weight_map: expected {"},
    {"weight_map empty",
     "{\"a\": \"m-1.safetensors\", \"b\": \"m-2.safetensors\", \"c\": \"m-2.safetensors\"}", "{}",
     "at least one tensor"},
    {"not JSON", "{\"metadata\"", "[\"metadata\"", "not valid JSON"},
    {"text after it", "\"}}", "\"}} x", "text after the closing brace"},
    {"cut off", "\"}}", "\"}", "not valid JSON"},
    {"Infinity", "24", "Infinity", "metadata: not valid JSON"},
    {"deep metadata", "24", "[[[[[[[[[[[[]]]]]]]]]]]]", NULL},
};

static void index_case(void* arg) {
    const OpenCase* c = (const OpenCase*)arg;
    Error err;
    SafeTensors st;
    limit_memory(c->file_size);
    double start = cpu_seconds();
    bool ok = weights_open(&st, c->path, &err);
    if (ok) {
        real out[64];
        for (int i = 0; i < st.n; i++) ok = ok && safetensors_read_real(&st, st.tensor + i, out, &err);
        ok = ok && st.n == 3 && safetensors_find(&st, "c");
        safetensors_close(&st);
    }
    if ((c->words ? !ok && one_line(err.text, c->words) : ok) && cpu_seconds() - start < 1) return;
    fprintf(stderr, "expected \"%s\", found \"%s\"\n", c->words ? c->words : "loads", ok ? "loads"
            : err.text);
    exit(1);
}

static int run_index_case(const char* name, const char* dir, size_t size, const char* words) {
    char text[4096] = "";
    OpenCase c = {dir, words, size};
    int code = in_child(index_case, &c, text, sizeof text);
    if (code) fprintf(stderr, "  row \"%s\": exit code %d: %s\n", name, code, text);
    return code != 0;
}

static void test_indices(void) {
    char dir[2048], path[4200];
    Error err;
    real value[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    snprintf(dir, sizeof dir, "%s", scratch("shards"));
    int failed = mkdir(dir, 0777) != 0;
    SafeTensorOut t[4] =
        {{"a", 1, {2}, ST_F32, value}, {"b", 1, {3}, ST_BF16, value}, {"c", 1, {1}, ST_F16, value},
                          {"x", 1, {1}, ST_F16, value}};
    const char* names[] = {"m-1", "m-2", "again", "far"};
    for (int i = 0; i < 3; i++) {                // again: a and x
        SafeTensorOut again[2] = {t[0], t[3]};
        snprintf(path, sizeof path, "%s/%s.safetensors", dir, names[i]);
        failed += !safetensors_write(path, i == 2 ? again : t + i, i == 0 ? 1 : 2, NULL, &err);
    }
    snprintf(path, sizeof path, "%s/fifo.safetensors", dir), failed += mkfifo(path, 0600) != 0;
    snprintf(path, sizeof path, "%s/dir.safetensors", dir), failed += mkdir(path, 0700) != 0;
    snprintf(path, sizeof path, "%s/zero.safetensors", dir), failed += symlink("/dev/zero", path) != 0;
    snprintf(path, sizeof path, "%s/text.safetensors", dir), file_put(path, "no model at all, sorry", 22);
    for (size_t i = 0; i < sizeof index_rows / sizeof *index_rows; i++) {
        char* text = replace_text(base_index, index_rows[i].find, index_rows[i].by);
        write_index(dir, text);
        failed += run_index_case(index_rows[i].name, dir, strlen(text), index_rows[i].words);
        free(text);
    }
    // many files, many tensors, a large file
    const size_t room = 6 << 20;
    char* big = (char*)test_alloc(room, 1);
    size_t n = (size_t)sprintf(big, "{\"weight_map\": {");
    for (int i = 0; i < 100000; i++) n +=
        (size_t)sprintf(big + n, "%s\"t%d\": \"%d.safetensors\"", i ? "," : "", i, i);
    strcpy(big + n, "}}");
    write_index(dir, big);
    failed += run_index_case("100,000 files", dir, n, "names more than 512 files");
    n = (size_t)sprintf(big, "{\"weight_map\": {");
    for (int i = 0; i < 130000; i++) n +=
        (size_t)sprintf(big + n, "%s\"t%d\": \"m-1.safetensors\"", i ? "," : "", i);
    strcpy(big + n, "}}");
    write_index(dir, big);
    failed += run_index_case("130,000 tensors of a file with one", dir, n, "does not list tensor a");
    n = (size_t)sprintf(big, "{\"weight_map\": {");
    while (n < 3u << 20) n += (size_t)sprintf(big + n, "\"\":\"\",");
    write_index(dir, big);
    failed += run_index_case("empty names", dir, n, "weight_map: expected a string");
    memset(big, ' ', 5 << 20), big[5 << 20] = 0;
    write_index(dir, big);
    failed += run_index_case("5 MiB", dir, 5 << 20, "expected at most 4194304");
    memset(big, '[', 1 << 20), memcpy(big, "{\"x\":", 5), big[1 << 20] = 0;
    write_index(dir, big);
    failed += run_index_case("2^20 brackets", dir, 1 << 20, "not valid JSON");
    report("index: edited, floods", failed, 0);

    // 11: as in the cache of Hugging Face, where every file is a link to ../../blobs
    failed = 0;
    char cache[2000];
    snprintf(cache, sizeof cache, "%s", scratch("cache"));
    const char* parts[] = {"", "/blobs", "/snapshots", "/snapshots/1"};
    for (int i = 0; i < 4; i++) snprintf(path, sizeof path, "%s%s", cache, parts[i]), failed +=
        mkdir(path, 0777) != 0;
    write_index(dir, base_index);
    const char* files[] = {"m-1.safetensors", "m-2.safetensors", "model.safetensors.index.json"};
    for (int i = 0; i < 3; i++) {
        char from[4200], to[64];
        snprintf(from, sizeof from, "%s/%s", dir, files[i]);
        snprintf(path, sizeof path, "%s/blobs/%d", cache, i);
        failed += rename(from, path) != 0;
        snprintf(to, sizeof to, "../../blobs/%d", i);
        snprintf(path, sizeof path, "%s/snapshots/1/%s", cache, files[i]);
        failed += symlink(to, path) != 0;
    }
    snprintf(path, sizeof path, "%s/snapshots/1", cache);
    failed += run_index_case("links to blobs", path, 4096, NULL);
    failed += run_index_case("no weights", cache, 4096, "holds no weights");
    snprintf(dir, sizeof dir, "%s/blobs/1", cache);
    failed += unlink(dir) != 0 ||
        run_index_case("a dangling link", path, 4096, "are missing: m-2.safetensors");
    report("index: links", failed, 0);
}

// --- converting and loading again

static bool same_bits(const Model* a, const Model* b) {
    if (a->n_elements != b->n_elements) return false;
    return memcmp(a->params, b->params, a->n_elements * sizeof(real)) == 0;
}

static void export_config(Config* c, int i) {
    static const char* const patterns[] = {"1", "1m", "2", "2mam", "2", "1a"};
    *c = small_config();
    strcpy(c->pattern, patterns[i % 6]);
    c->n_layer = 4;
    c->d_intermediate = strchr(c->pattern, 'm') ? 128 : 0;
    c->attn_conv = i % 12 < 6 ? 3 : 0, c->attn_mlp = i % 12 < 6 ? 256 : 0;
    c->attn_in_bias = i % 12 < 6, c->attn_out_bias = i % 12 >= 6, c->rotary_interleaved = i % 12 < 6;
    c->tie_embeddings = i % 3 != 1;
    c->bias = i % 4 == 2;
    c->conv_bias = i % 5 != 3;
    c->vocab_size = i % 2 ? 19 : 21;
    c->vocab_padded = i % 2 ? 19 : 24;
}

static void test_export(void) {
    Error err;
    Model m, back;
    char name[64];
    int failed = 0, rows = 0;
    for (int i = 0; i < 12; i++) {
        Config c;
        export_config(&c, i);
        model_describe(&m, &c);
        model_alloc(&m, false);
        model_init(&m, (uint64_t)i);
        for (int dialect = 0; dialect < 2; dialect++)
            for (int dtype = ST_F32; dtype <= ST_BF16; dtype++) {
                snprintf(name, sizeof name, "export_%d_%d_%d", i, dialect, dtype);
                int form = dialect ? DIALECT_HF : DIALECT_MAMBA;
                bool ok = checkpoint_export(&m, NULL, scratch(name), form, dtype, &err);
                if (dialect && i % 2) {          // transformers has no MLP, no attention
                    const char* words = c.d_intermediate ? "has no Mamba with MLPs" : "has models of Mamba-1";
                    failed += ok || !one_line(err.text, words) || access(scratch(name), F_OK) == 0;
                    continue;
                }
                rows++;
                if (!ok || !model_load(&back, scratch(name), false, &err)) {
                    if (!failed++) fprintf(stderr, "  %s: %s\n", name, err.text);
                    continue;
                }
                bool same = true;
                for (int k = 0; k < m.n_tensors; k++) {
                    const Tensor* t = m.tensor + k;
                    bool narrow = (t->spec->flags & DECAY) && dtype != ST_F32;
                    for (size_t j = t->offset; j < t->offset + t->count; j++) {
                        float f = (float)m.params[j];
                        uint32_t upper = (uint32_t)narrow_float(f, 8, 7) << 16;
                        if (narrow && dtype == ST_F16) f = widen_f16(narrow_float(m.params[j], 5, 10));
                        if (narrow && dtype == ST_BF16)
                            upper = (uint32_t)narrow_float(m.params[j], 8, 7) << 16, memcpy(&f, &upper, 4);
                        same = same && back.params[j] == (real)f;
                    }
                }
                failed += !same || back.config.vocab_padded != c.vocab_padded ||
                          strcmp(back.config.pattern, c.pattern) != 0 || back.config.d_inner != c.d_inner ||
                          back.config.tie_embeddings != c.tie_embeddings;
                for (int k = 0; k < N_CONFIG_FIELDS; k++) {
                    const ConfigField* f = config_fields + k;
                    bool said = (dialect ? f->hf : f->mamba) && config_has(&c, f);
                    failed += said && memcmp((char*)&c + f->offset, (char*)&back.config + f->offset,
                                             config_field_size(f)) != 0;
                }
                model_free(&back);
            }
        model_free(&m);
    }
    failed += rows != 54;
    report("export: two dialects, three dtypes, read again", failed, 0);

    // what a dialect cannot say
    static const struct { const char *pattern, *words; int dialect, edit; } refusals[] = {
        {"12", "models of Mamba-1 alone and of Mamba-2 alone", DIALECT_HF, 0},
        {"12", "no models with both Mamba-1 and Mamba-2", DIALECT_MAMBA, 0},
        {"2m2", "an MLP in every block or in none", DIALECT_MAMBA, 0},
        {"2", "d_ssm below the inner width; try --dialect mamba_ssm", DIALECT_HF, 1},
        {"2", "D_has_hdim", DIALECT_HF, 2}, {"2", "rmsnorm false", DIALECT_HF, 3},
        {"2", "the norm before the gate", DIALECT_HF, 4}, {"2", "an expand that is not whole", DIALECT_HF, 5},
        {"2a", "mlp_dim is 254, mamba_ssm only has multiples of 256", DIALECT_MAMBA, 6},
        {"2a", "attention in some of 512 layers", DIALECT_MAMBA, 7},
        {"2a", "mamba_ssm only has 1e-5", DIALECT_MAMBA, 8} };
    failed = 0;
    Config c;
    for (int i = 0; i < COUNT_OF(refusals); i++) {
        c = small_config();
        strcpy(c.pattern, refusals[i].pattern);
        switch (refusals[i].edit) {
            case 1: c.d_ssm = 16; break;
            case 2: c.D_has_hdim = true; break;
            case 3: c.rmsnorm = false; break;
            case 4: c.norm_before_gate = true; break;
            case 5: c.d_inner = c.d_ssm = 32; break;
            case 6: c.attn_mlp = 254; break;
            case 7: c.n_layer = 512; break;
            case 8: c.norm_eps = 1e-6;
        }
        if (strchr(c.pattern, 'm')) c.d_intermediate = 128;
        Error first;
        bool checked = config_check(&c, &first);
        bool fits = config_fits(&c, refusals[i].dialect == DIALECT_HF, &err);
        if (!checked || fits || !one_line(err.text, refusals[i].words)) {
            failed++;
            fprintf(stderr, "  refusal %d: %s\n", i, checked ? fits ? "it fits" : err.text : first.text);
        }
    }
    report("export: what a dialect cannot say", failed, 0);

    // what cannot be written; a directory that exists is left alone
    failed = 0;
    export_config(&c, 0);
    c.norm_eps = 1e-3;
    model_describe(&m, &c);
    model_alloc(&m, false);
    model_init(&m, 1);
    failed += checkpoint_export(&m, NULL, scratch("no"), DIALECT_MAMBA, ST_F32, &err) ||
              !one_line(err.text, "norm_eps is 0.001");
    failed += access(scratch("no"), F_OK) == 0 || access(scratch("no.tmp"), F_OK) == 0;
    failed += checkpoint_export(&m, NULL, scratch_dir, DIALECT_HF, ST_F32, &err) ||
        !one_line(err.text, "exists already");
    m.params[m.tensor[0].offset + 5] = 70000;
    failed += checkpoint_export(&m, NULL, scratch("no"), DIALECT_HF, ST_F16, &err) ||
        !one_line(err.text, "beyond f16");
    failed += !checkpoint_export(&m, NULL, scratch("deep/er/yes/"), DIALECT_HF, ST_BF16, &err);
    failed += !model_load(&back, scratch("deep/er/yes"), false, &err);
    if (!failed) model_free(&back);

    // a head beside a tied embedding: the same is fine, another is not, whatever container; one storage of
    // both
    // in an untied model is refused
    SafeTensorOut* t = model_file_tensors(&m, true);
    real* head = (real*)test_alloc(m.tensor[0].count, sizeof(real));
    memcpy(head, m.embedding, m.tensor[0].count * sizeof(real));
    t[m.n_tensors] = t[0];
    t[m.n_tensors].name = "lm_head.weight", t[m.n_tensors].data = head;
    failed += mkdir(scratch("tied"), 0777) != 0 || !config_write(&c, -1, "float32", scratch("tied"), &err);
    for (int bin = 0; bin < 2; bin++)
        for (int other = 0; other < 2; other++) {
            head[7] = m.embedding[7] + (real)other;
            const char* file = scratch(bin ? "tied/pytorch_model.bin" : "tied/model.safetensors");
            failed += !(bin ? pickle_write(file, t, m.n_tensors + 1, &err)
                            : safetensors_write(file, t, m.n_tensors + 1, NULL, &err));
            bool ok = model_load(&back, scratch("tied"), false, &err);
            failed += other ? ok || !one_line(err.text, "lm_head.weight differs") : !ok ||
                !same_bits(&m, &back);
            if (ok) model_free(&back);
            if (other) unlink(file);
        }
    c.tie_embeddings = false;
    failed += !config_write(&c, -1, "float32", scratch("tied"), &err);
    t[m.n_tensors].data = t[0].data;
    failed += !pickle_write(scratch("tied/pytorch_model.bin"), t, m.n_tensors + 1, &err);
    failed += model_load(&back, scratch("tied"), false, &err) || !one_line(err.text, "are the same bytes");
    // all mismatches at once
    c.tie_embeddings = true, c.d_state++;
    failed += !config_write(&c, -1, "float32", scratch("tied"), &err);
    failed += model_load(&back, scratch("tied"), false, &err) ||
        !one_line(err.text, "layers.0.mixer.A_log is F") ||
              !strstr(err.text, "layers.1.mixer.x_proj.weight is F");
    c.n_layer = 60000;
    failed += !config_write(&c, -1, "float32", scratch("tied"), &err);
    failed += model_load(&back, scratch("tied"), false, &err) || !one_line(err.text, "says 60000 layers");
    free(t);
    model_free(&m);
    report("export: refusals, tied heads, mismatches", failed, 0);

    // an entry beyond 4 GiB: zip64 (the gap is a hole on disk)
    failed = 0;
    BinFile b;
    unsigned char pickle[4096], directory[8 * ZIP_RECORD];
    b.n = assemble(PICKLE_START PICKLE_A "u .", pickle);
    ZipOut z;
    memset(&z, 0, sizeof z);
    z.folder = "m", z.directory = directory;
    crc32_init(&z.table);
    const char* path = scratch("far.bin");
    float far_values[6] = {1, 2, 3, 4, 5, 6.5f};
    z.fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    failed += !zip_put_entry(&z, "data.pkl", (const char*)pickle, b.n, NULL);
    z.at += 5ull << 30;
    failed += lseek(z.fd, (off_t)z.at, SEEK_SET) < 0 ||
        !zip_put_entry(&z, "data/0", (const char*)far_values, 24, NULL) ||
              !zip_put_end(&z);
    close(z.fd);
    SafeTensors st;
    real out[6] = {0};
    failed += !pickle_open(&st, path, &err) || !safetensors_read_real(&st, st.tensor, out, &err) || out[5] !=
        (real)6.5;
    if (failed) fprintf(stderr, "  %s\n", err.text);
    else safetensors_close(&st);
    unlink(path);
    report("zip64: far end of 5 GiB", failed, 0);
}

// --- fine-tuning, at the command line

static double number_after(const char* text, const char* words) {
    const char* at = strstr(text, words);
    return at ? atof(at + strlen(words)) : NAN;
}

static const CliRow model_lines[] = {
    {"info --from hf", NULL, 0, ""},
    {"info --from ms", NULL, 0, ""},
    {"--from run --freeze nope --out fresh --data a.txt", NULL, 1, "matches no tensor"},
    {"--from run --freeze * --out fresh --data a.txt", NULL, 1, "all tensors are frozen"},
    {"--from run --freeze", NULL, 1, "--freeze expects"},
    {"--from run --d-model 4 --out fresh --data a.txt", NULL, 1, "--d-model describes a new model"},
    {"--from run --preset tiny --out fresh --data a.txt", NULL, 1, "--preset describes a new model"},
    {"--from run --resume --out run2", NULL, 1, "give one"},
    {"--from nowhere --out fresh --data a.txt", NULL, 1, "nowhere: cannot open the checkpoint"},
    {"--from ms --out fresh --data a.txt", NULL, 1, "has no tokenizer.json"},
    {"convert --from run", NULL, 1, "--out DIR is missing"},
    {"convert --from run --out hf", NULL, 1, "exists already"},
    {"convert --from run --out fresh --dialect x", NULL, 1, "expects one of: hf mamba_ssm"},
    {"convert --from run --out fresh --dtype f8", NULL, 1, "expects one of: f32 f16 bf16"},
    {"convert --from run --out a.txt/x", NULL, 1, "cannot create"},
    {"convert --from hf --steps 5 --out fresh", NULL, 1, "not of 'convert'"},
    {"info --from d_mamba2", NULL, 1, "backbone.layers.0.mixer.dt_bias"},
    {"generate --from d_half", NULL, 1, "2 of the 2 files it names are missing"},
    {"info --from d_config", NULL, 1, "holds neither a model"},
};

static void test_fine_tuning(void) {
    char args[1024], path[4200];
    Error err;
    cli_prepare();
    // the loss of the first step, before any update, is eval's on the same batch
    char* text = (char*)test_alloc(65, 1);
    for (int i = 0; i < 64; i++) text[i] = (char)('a' + i * i % 23);
    cli_write("one.txt", text, 64, "wb");
    cli_shell("cp -rL run/last plain && rm plain/optimizer.safetensors", "", "");
    const char* froms[] = {"run", "plain", "hf", "bf"};
    Finished f = cli_run("convert --from run --out hf");
    cli_check(f.code == 0, "convert to hf", &f);
    f = cli_run("convert --from run --out bf --dtype bf16");
    cli_check(f.code == 0, "convert to bf16", &f);
    f = cli_run("convert --from run --out ms --dialect mamba_ssm --dtype f16");
    cli_check(f.code == 0, "convert to mamba_ssm", &f);
    cli_shell("rm -f ms/tokenizer.json", "", "");
    for (int i = 0; i < 4; i++) {
        snprintf(args, sizeof args, "eval --from %s --data one.txt --seq-len 64 --batch-size 1", froms[i]);
        f = cli_run(args);
        double evaluated = number_after(f.out, "| loss ");
        snprintf(args, sizeof args,
                 "--from %s --data one.txt --val-fraction 0 --seq-len 64 --batch-size 1 --steps 1 "
                 "--max-tokens 0 --log-every 1 --out tuned%d", froms[i], i);
        f = cli_run(args);
        snprintf(path, sizeof path, "tuned%d/log.csv", i);
        size_t size;
        double trained = number_after(cli_read(path, &size), "val_bpb\n1,");
        cli_check(f.code == 0 && fabs(trained - evaluated) <= 1e-6 && evaluated > 1, froms[i], &f);
    }
    cli_group("fine-tuning: loss of the first step = eval", 8);

    // frozen tensors keep their bits, the others do not; also after a resume; the source is untouched
    uint64_t source = cli_hash(scratch("run"));
    f = cli_run("--from run --data a.txt --seq-len 16 --batch-size 2 --steps 3 --max-tokens 0 --out frozen "
                "--freeze *.A_log backbone.embeddings.* *.0.mixer.in_proj.weight");
    cli_check(f.code == 0 && strstr(f.out, "frozen: 3 of"), "freeze", &f);
    f = cli_run("--out frozen --resume --steps 6 --max-tokens 0");
    cli_check(f.code == 0 && strstr(f.out, "frozen: 3 of"), "freeze, resumed", &f);
    Model a, b;
    bool ok = model_load(&a, scratch("plain"), false, &err) &&
        model_load(&b, scratch("frozen/last"), false, &err);
    cli_check(ok, "load", NULL);
    for (int i = 0; ok && i < a.n_tensors; i++) {
        const Tensor* t = a.tensor + i;
        bool frozen = strstr(t->name, "A_log") || strstr(t->name, "embeddings") || strstr(t->name, "in_proj");
        bool same = memcmp(a.params + t->offset, b.params + t->offset, t->count * sizeof(real)) == 0;
        cli_check(same == frozen, t->name, NULL);
    }
    if (ok) model_free(&a), model_free(&b);
    // onto the directory that is the source: it stays what it was, `last` counts from then on
    cli_shell("cp -r plain self", "", "");
    f = cli_run("--from self --data a.txt --seq-len 16 --batch-size 2 --steps 2 --max-tokens 0 --out self");
    cli_check(f.code == 0 && cli_exists("self/last"), "onto itself", &f);
    cli_shell("cmp plain/model.safetensors self/model.safetensors || rm -rf self/last", "", "");
    cli_check(cli_exists("self/last"), "onto itself: the source", NULL);
    f = cli_run("--out self --resume --steps 3 --max-tokens 0");
    cli_check(f.code == 0, "onto itself, resumed", &f);
    cli_check(cli_hash(scratch("run")) == source, "the source", NULL);
    cli_group("fine-tuning: frozen tensors, resume, onto itself", 8);

    cli_shell("mkdir d_mamba2 d_half d_config && cp hf/model.safetensors d_mamba2 && "
              "cp hf/config.json d_config && cp hf/config.json d_half", "", "");
    snprintf(path, sizeof path, "%s",
             "{\"d_model\": 8, \"n_layer\": 1, \"vocab_size\": 9, \"ssm_cfg\": {\"layer\": \"Mamba2\", "
             "\"headdim\": 4}}");
    cli_write("d_mamba2/config.json", path, strlen(path), "wb");
    write_index(scratch("d_half"), "{\"weight_map\": {\"a\": \"1.safetensors\", \"b\": \"2.safetensors\"}}");
    cli_rows("published models: lines", model_lines, COUNT_OF(model_lines));
}

// --- a hybrid from the command line to mamba_ssm's form and back

static void test_hybrid_program(void) {
    const char* small = "--data a.txt --seq-len 16 --batch-size 2 --max-tokens 0 --eval-every 0 ";
    char args[1024];
    snprintf(args, sizeof args, "%s --out mix --steps 3 --pattern 2mam --n-layer 2 --d-model 16 --headdim 8 "
             "--ngroups 2 --d-state 9 --chunk-size 5 --attn-heads 2 --attn-heads-kv 1 --attn-conv 3 "
             "--rotary-dim 4 --rotary-base 100", small);
    Finished f = cli_run(args);
    cli_check(f.code == 0, "train", &f);
    f = cli_run("convert --from mix --out mix_ms --dialect mamba_ssm");
    cli_check(f.code == 0, "convert", &f);
    f = cli_run("convert --from mix --out mix_hf --dialect hf");
    cli_check(f.code == 1 && strstr(f.err, "transformers has no Mamba with MLPs"), "convert to hf", &f);
    double loss[2];
    for (int i = 0; i < 2; i++) {
        snprintf(args, sizeof args, "eval --from %s --data one.txt --seq-len 32", i ? "mix_ms" : "mix");
        f = cli_run(args);
        loss[i] = number_after(f.out, "| loss ");
        cli_check(f.code == 0 && loss[i] > 1, "eval", &f);
    }
    cli_check(loss[0] == loss[1], "the same loss in both forms", &f);
    f = cli_run("info --from mix_ms");
    cli_check(f.code == 0 && strstr(f.out, "model: pattern 2mam, 2 blocks, D 16, E 32, N 9, K 4, H 4, P 8, "
                                           "G 2, Hq 2, Hkv 1, dh 8, F 128") &&
              strstr(f.out, "rotary_base 100.0"), "info", &f);
    // what the model is stands among the settings of the run that goes on from it
    snprintf(args, sizeof args, "%s --from mix_ms --out mix2 --steps 2", small);
    f = cli_run(args);
    cli_check(f.code == 0 && strstr(f.out, "  rotary-base          100.0") &&
              strstr(f.out, "  attn-heads-kv        1") && strstr(f.out, "  chunk-size           5"),
              "train --from", &f);
    f = cli_run("--out mix2 --resume --steps 4 --max-tokens 0");
    cli_check(f.code == 0, "resume", &f);
    f = cli_run("generate --from mix2 --prompt ab --max-tokens 9");
    cli_check(f.code == 0 && f.out_size > 0, "generate", &f);
    cli_group("a hybrid: train, convert, info, from, resume, generate", 10);
}

void test_models(void) {
    test_pickles();
    test_zips();
    test_indices();
    test_export();
    test_fine_tuning();
    test_hybrid_program();
}
