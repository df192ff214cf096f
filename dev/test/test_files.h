// ---------------------------------------------------------------------------------------------------
// test_files.h: data/safetensors.h. SafeTensors files, config.json and the directories of checkpoints:
// hostile ones, files that change while they are read, round trips to the bit.
//
// Hostile files are rows of a table: a valid base file, one edit, and the words the error line must contain.
// A row fails when the reader accepts the file, when the words are missing, when the message is not one line,
// when the reader crashes, or when it allocates more than twice the file and 16 MiB. A group of rows is one
// line of the printed table: `measured` is the number of rows that failed; their names go to stderr.

#include <sys/resource.h>
#include <sys/types.h>

// limit_memory: from here on this process may allocate twice the file plus 16 MiB (not under a sanitizer,
// whose shadow memory counts too)
static void limit_memory(size_t file_size) {
    size_t pages = 0;
    if (SANITIZED) return;
    FILE* f = fopen("/proc/self/statm", "r");
    if (!f) return;
    if (fscanf(f, "%zu", &pages) != 1) pages = 0;
    fclose(f);
    if (!pages) return;
    struct rlimit limit;
    limit.rlim_cur = limit.rlim_max = pages * (size_t)sysconf(_SC_PAGESIZE) + 2 * file_size + (16 << 20);
    setrlimit(RLIMIT_AS, &limit);
}

// one_line: the words are there, and the message is one printable line
static bool one_line(const char* text, const char* words) {
    size_t n = strlen(text);
    if (n == 0 || n > 3000 || !strstr(text, words)) return false;
    for (size_t i = 0; i < n; i++) if ((unsigned char)text[i] < 32) return false;
    return true;
}

// read_all_tensors: opens a file and reads every tensor that has a numeric type
static bool read_all_tensors(const char* path, Error* err) {
    SafeTensors st;
    err->text[0] = 0;
    if (!shard_open(&st, path, err)) return false;
    bool ok = true;
    for (int i = 0; ok && i < st.n; i++) {
        const SafeTensor* t = st.tensor + i;
        if (t->dtype > ST_BOOL) continue;
        void* out = malloc(t->count * 8 + 1);
        if (!out) {
            safetensors_close(&st);
            return fail(err, "the test has no memory for %zu elements", t->count);
        }
        ok = t->dtype <= ST_BF16 ? safetensors_read_real(&st, t, (real*)out, err)
                                 : safetensors_read_int(&st, t, (int64_t*)out, err);
        free(out);
    }
    safetensors_close(&st);
    return ok;
}

typedef struct { const char* path; const char* words; size_t file_size; } OpenCase;   // words NULL: must load

// runs in a child: exit code 0 when the file behaves as the case says
static void open_case(void* arg) {
    const OpenCase* c = (const OpenCase*)arg;
    Error err;
    limit_memory(c->file_size);
    double start = cpu_seconds();
    bool ok = read_all_tensors(c->path, &err);
    double seconds = cpu_seconds() - start;
    if (c->words ? !ok && one_line(err.text, c->words) : ok) {
        if (seconds < 1) return;
        fprintf(stderr, "took %.2f s\n", seconds);
    } else
        fprintf(stderr, "expected \"%s\", found \"%s\"\n", c->words ? c->words : "loads",
                ok ? "loads" : err.text);
    exit(1);
}

static int run_open_case(const char* name, const char* path, const char* words) {
    char text[4096] = "";
    struct stat info;
    OpenCase c = {path, words, stat(path, &info) == 0 && S_ISREG(info.st_mode) ? (size_t)info.st_size : 0};
    int code = in_child(open_case, &c, text, sizeof text);
    if (code) fprintf(stderr, "  row \"%s\": exit code %d: %s\n", name, code, text);
    return code != 0;
}

// --- the base file: three tensors, 42 bytes of data ---

static const char base_header[] =
    "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
    "\"b\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[24,40]},\"c\":{\"dtype\":\"F16\",\"shape\":[],"
    "\"data_offsets\":[40,42]}}";
enum { BASE_DATA = 42 };

// replace: a copy of text with the first `find` replaced, to be freed
static char* replace_text(const char* text, const char* find, const char* by) {
    const char* at = strstr(text, find);
    if (!at) die("test row: \"%s\" is not in the base text", find);
    char* out = (char*)malloc(strlen(text) + strlen(by) + 1);
    sprintf(out, "%.*s%s%s", (int)(at - text), text, by, at + strlen(find));
    return out;
}

static size_t put_safetensors(const char* path, const char* header, uint64_t length, size_t data) {
    size_t n = strlen(header);
    char* bytes = (char*)calloc(8 + n + data, 1);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, n);
    for (size_t i = 0; i < data; i++) bytes[8 + n + i] = (char)(i * 7);
    file_put(path, bytes, 8 + n + data);
    free(bytes);
    return 8 + n + data;
}

typedef struct { const char *name, *find, *by, *words; } EditRow;   // words NULL: the edited file must load

static const EditRow header_rows[] = {
    {"unchanged", "pt", "pt", NULL},
    // 4: sizes whose product wraps, or that are no sizes
    {"product wraps to 4", "[2,3]", "[4194305,4194305,211106198978564]",
     "tensor a: shape [4194305,4194305,211106198978564]"},
    {"2 x 2^63", "[2,3]", "[2,9223372036854775808]", "tensor a"},
    {"2^60 elements", "[2,3]", "[1152921504606846976]", "tensor a: F32 of shape [1152921504606846976] needs"},
    {"2^61 elements: 2^63 bytes", "[2,3]", "[2305843009213693952]", "does not fit"},
    {"2^62 x 4 bytes = 0 in 64 bits", "[2,3]", "[4611686018427387904]", "does not fit"},
    {"overflow hidden by a zero", "[2,3]", "[9223372036854775807,9223372036854775807,0]", "does not fit"},
    {"9 dimensions", "[2,3]", "[1,1,1,1,1,1,1,2,3]", "tensor a: shape has 9 dimensions"},
    {"dimension -1", "[2,3]", "[-1,-6]", "tensor a: shape[0] is not a non-negative integer"},
    {"dimension 1.5", "[2,3]", "[4,1.5]", "tensor a: shape[1]"},
    {"dimension 1e3", "[2,3]", "[1e3]", "tensor a: shape[0]"},
    {"dimension 1e999", "[2,3]", "[1e999]", "tensor a"},
    {"dimension \"3\"", "[2,3]", "[2,\"3\"]", "tensor a: shape[1]"},
    {"dimension true", "[2,3]", "[6,true]", "tensor a: shape[1]"},
    {"shape null", "[2,3]", "null", "tensor a: expected exactly"},
    {"shape does not match the bytes", "[2,3]", "[2,4]", "needs 32 bytes, data_offsets give 24"},
    {"8 dimensions are fine", "[2,3]", "[1,1,1,1,1,1,2,3]", NULL},
    // 5: offsets
    {"overlap", "[24,40]", "[20,36]", "two tensors overlap"},
    {"two tensors, one range", "\"shape\":[2],\"data_offsets\":[24,40]",
     "\"shape\":[3],\"data_offsets\":[0,24]", "overlap"},
    {"hole", "[40,42]", "[41,43]", "a hole"},
    {"hole at the start", "[2,3],\"data_offsets\":[0,24]", "[5],\"data_offsets\":[4,24]", "a hole"},
    {"past the end", "\"shape\":[],\"data_offsets\":[40,42]", "\"shape\":[2],\"data_offsets\":[40,44]",
     "it is cut off"},
    {"end before begin", "[24,40]", "[40,24]", "0 <= begin <= end"},
    {"negative begin", "[24,40]", "[-24,40]", "0 <= begin <= end"},
    {"begin 2^63", "[24,40]", "[9223372036854775808,9223372036854775824]", "tensor b"},
    {"offsets near 2^63", "[24,40]", "[9223372036854775791,9223372036854775807]", "a hole"},
    {"three offsets", "[24,40]", "[24,40,40]", "data_offsets must be two integers"},
    {"one offset", "[24,40]", "[24]", "data_offsets must be two integers"},
    {"fractional offset", "[24,40]", "[24.0,40]", "data_offsets must be two integers"},
    {"bytes after the last tensor", "\"shape\":[],\"data_offsets\":[40,42]",
     "\"shape\":[0],\"data_offsets\":[40,40]", "follow the last"},
    {"empty tensor inside another",
     "\"c\":", "\"d\":{\"dtype\":\"F16\",\"shape\":[0],\"data_offsets\":[8,8]},\"c\":", "overlap"},
    {"empty tensor at a border",
     "\"c\":", "\"d\":{\"dtype\":\"F16\",\"shape\":[0,5],\"data_offsets\":[24,24]},\"c\":", NULL},
    {"unsorted in the text",
     "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},\"b\":{\"dtype\":\"I64\",\"shape\":["
     "2],"
     "\"data_offsets\":[24,40]}",
     "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[16,40]},\"b\":{\"dtype\":\"I64\","
     "\"shape\":[2],\"data_offsets\":[0,16]}",
     NULL},
    // 6: names
    {"name twice", "\"b\":", "\"a\":", "tensor a appears twice"},
    {"name twice, once escaped", "\"b\":", "\"\\u0061\":", "tensor a appears twice"},
    {"__metadata__ twice", "\"a\":", "\"__metadata__\":{},\"a\":", "__metadata__ appears twice"},
    {"names differ in case only", "\"b\":", "\"A\":", NULL},
    {"name with NUL", "\"b\":", "\"b\\u0000c\":", "\\u0000"},
    {"name with newline, bad dtype", "\"b\":{\"dtype\":\"I64\"", "\"x\\ny\":{\"dtype\":\"Q4\"",
     "tensor x?y: unknown dtype \"Q4\""},
    {"name with newline", "\"b\":", "\"x\\ny\":", NULL},
    {"empty name", "\"b\":", "\"\":", NULL},
    {"lone surrogate", "\"b\":", "\"\\ud800\":", "byte"},
    {"invalid UTF-8", "\"b\":", "\"b\xff\":", "byte"},
    // 7, 9: dtypes, JSON that is not JSON
    {"unknown dtype", "F16", "F4", "tensor c: unknown dtype \"F4\""},
    {"dtype in small letters", "F16", "f16", "unknown dtype \"f16\""},
    {"dtype a number", "\"F16\"", "16", "tensor c: expected exactly dtype"},
    {"fp8 is known, not read", "\"dtype\":\"F16\",\"shape\":[]", "\"dtype\":\"F8_E4M3\",\"shape\":[2]", NULL},
    {"dtype missing", "\"dtype\":\"F16\",", "", "tensor c: expected exactly dtype"},
    {"dtype twice", "\"dtype\":\"F16\"", "\"dtype\":\"F16\",\"dtype\":\"F16\"", "duplicate"},
    {"an extra key in an entry", "\"shape\":[],", "\"shape\":[],\"hidden\":1,", "expected exactly"},
    {"entry a list", "{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[40,42]}", "[]",
     "tensor c: the header entry"},
    {"comma at the end", "[40,42]}}", "[40,42]},}", "expected a string"},
    {"no comma", "},\"b\"", "}\"b\"", "expected , or }"},
    {"no colon", "\"b\":", "\"b\"", "expected a colon"},
    {"leading zero", "[24,40]", "[024,40]", "tensor b"},
    {"text after the object", "[40,42]}}", "[40,42]}} x", "text after the closing brace"},
    {"two objects", "[40,42]}}", "[40,42]}}{}", "text after the closing brace"},
    {"spaces after the object", "[40,42]}}", "[40,42]}}   ", NULL},
    {"a comment", "{\"dtype\":\"I64\"", "/* */{\"dtype\":\"I64\"", "tensor b"},
    {"header is a list", "{\"__metadata__\"", "[{\"__metadata__\"", "starting with {"},
    {"byte order mark", "{\"__metadata__\"", "\xef\xbb\xbf{\"__metadata__\"", "starting with {"},
    {"metadata a number", "\"pt\"", "7", "__metadata__ format: expected a string"},
    {"metadata a tree", "\"pt\"", "{\"a\":{}}", "__metadata__ format: expected a string"},
    {"metadata a list", "{\"format\":\"pt\"}", "[]", "__metadata__: expected {"},
    {"metadata empty", "{\"format\":\"pt\"}", "{}", NULL},
};

static void test_safetensors_rows(void) {
    const char* path = scratch("row.safetensors");
    const size_t n = sizeof header_rows / sizeof *header_rows;
    int failed = 0;
    for (size_t i = 0; i < n; i++) {
        char* header = replace_text(base_header, header_rows[i].find, header_rows[i].by);
        put_safetensors(path, header, strlen(header), BASE_DATA);
        failed += run_open_case(header_rows[i].name, path, header_rows[i].words);
        free(header);
    }
    report("safetensors: edited headers", failed, 0);

    // 1: the header length
    const size_t length = sizeof base_header - 1, size = 8 + length + BASE_DATA;
    const struct { uint64_t length; const char* words;
    } lengths[] = {{0, "expected a header"},
                   {1, "expected a header"},
                   {7, "not valid JSON"},
                   {length - 1, "not valid JSON"},
                   {length + 1, "text after the closing brace"},
                   {size - 8, "text after the closing brace"},
                   {size - 7, "cut off"},
                   {1ull << 31, "the header length is 2147483648"},
                   {1ull << 63, "the header length is 9223372036854775808"},
                   {UINT64_MAX, "cut off"},
                   {UINT64_MAX - 7, "cut off"},
                   {__builtin_bswap64(length), "big-endian"}};
    failed = 0;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        put_safetensors(path, base_header, lengths[i].length, BASE_DATA);
        char name[64];
        snprintf(name, sizeof name, "header length %llu", (unsigned long long)lengths[i].length);
        failed += run_open_case(name, path, lengths[i].words);
    }
    char* big = (char*)malloc((9 << 20) + 1);       // a file that really has 9 MiB of header
    memset(big, ' ', 9 << 20);
    big[0] = '{', big[1] = '}', big[9 << 20] = 0;
    put_safetensors(path, big, 9 << 20, 0);
    failed += run_open_case("header of 9 MiB", path, "expected a header of 2 to 8388608 bytes");
    big[8 << 20] = 0;
    put_safetensors(path, big, 8 << 20, 0);
    failed += run_open_case("header of 8 MiB of spaces", path, NULL);
    report("safetensors: header lengths", failed, 0);

    // memory: 8 MiB that a JSON tree would blow up to half a GiB
    const struct {
        const char *name, *start, *unit, *words;
    } floods[] = {// the words show that a limit held, not the memory
                  {"lists", "{\"a\":[", "[],", "expected {"},
                  {"objects", "{\"a\":{\"dtype\":[", "{},", "near end of file"},
                  {"brackets", "{\"a\":{\"dtype\":", "[", "maximum parsing depth"},
                  {"one name", "{\"", "aaaaaaaa", "premature end"},
                  {"metadata entries", "{\"__metadata__\":{\"\":\"\"", ",\"\":\"\"",
                   "more than 65536 entries"},
                  {"metadata string", "{\"__metadata__\":{\"a\":\"", "aaaaaaaa", "premature end"},
                  {"escapes", "{\"", "\\u0041", "at byte 1"}};
    failed = 0;
    for (size_t i = 0; i < sizeof floods / sizeof *floods; i++) {
        size_t at = strlen(strcpy(big, floods[i].start)), unit = strlen(floods[i].unit);
        for (; at + unit <= 8 << 20; at += unit) memcpy(big + at, floods[i].unit, unit);
        big[at] = 0;
        put_safetensors(path, big, at, 0);
        failed += run_open_case(floods[i].name, path, floods[i].words);
    }
    // 6: very many tensors, and a long name
    size_t at = (size_t)sprintf(big, "{");
    for (int i = 0; i < 100000; i++)
        at += (size_t)sprintf(big + at, "%s\"t%d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}",
                              i ? "," : "", i * 7 % 100000, i, i + 1);
    strcpy(big + at, "}");
    put_safetensors(path, big, at + 1, 100000);
    failed += run_open_case("100,000 tensors", path, NULL);
    at = (size_t)sprintf(big, "{\"");
    memset(big + at, 'n', 10240);
    strcpy(big + at + 10240, "\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,2]}}");
    put_safetensors(path, big, strlen(big), 2);
    failed += run_open_case("name of 10 KB, wrong shape", path, "shape [3] needs 3 bytes");
    free(big);
    report("safetensors: floods", failed, 0);
}

// 2, 3: every prefix, and every byte of the header replaced, in one child; the exit code counts what went
// wrong
static void cut_and_poke(void* arg) {
    const char* path = (const char*)arg;
    const size_t length = sizeof base_header - 1;
    unsigned char bytes[8 + sizeof base_header + BASE_DATA], changed[sizeof bytes];
    size_t size = put_safetensors(path, base_header, length, BASE_DATA);
    FILE* f = fopen(path, "rb");
    if (!f || fread(bytes, 1, size, f) != size || fclose(f) != 0) exit(100);
    int failed = 0;
    Error err;
    for (size_t n = 0; n < size; n++) {
        file_put(path, bytes, n);
        if (read_all_tensors(path, &err) || !one_line(err.text, path)) {
            failed++;
            fprintf(stderr, "prefix of %zu bytes\n", n);
        }
    }
    static const unsigned char values[] = {0x00, 0xff, '"', '}'};
    int letters = 0;
    for (size_t i = 0; i < 8 + length; i++) {
        for (int v = 0; v < 4; v++) {
            memcpy(changed, bytes, size);
            changed[i] = values[v];
            file_put(path, changed, size);
            SafeTensors st;
            bool ok = safetensors_open(&st, path, &err), same = changed[i] == bytes[i];
            bool tiled = true;                       // what loads must still make sense
            for (int j = 0; ok && j < st.n; j++)
                tiled = tiled && st.tensor[j].end <= BASE_DATA && st.tensor[j].name;
            // a change may only be accepted where it is the letter of a name or of the metadata: format, pt,
            // a, b, c
            bool name = i >= 8 && isalpha(bytes[i]) && values[v] == '}';
            letters += ok && !same;
            if (ok ? !tiled || !(same || name) : same || !one_line(err.text, path)) {
                failed++;
                fprintf(stderr, "byte %zu set to 0x%02x: %s\n", i, values[v], ok ? "loads" : err.text);
            }
            if (ok) safetensors_close(&st);
        }
    }
    if (letters != 11) { failed++; fprintf(stderr, "%d changed letters load, expected 11\n", letters); }
    exit(failed > 99 ? 99 : failed);
}

// 9, 12: other files under this name
static void test_other_files(void) {
    const char* path = scratch("other.safetensors");
    const struct { const char *name, *text, *words;
    } rows[] = {{"Git LFS pointer",
                 "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
                 "run git lfs pull"},
                {"HTML page", "<!DOCTYPE html><html><head><title>404</title></head></html>", "HTML"},
                {"text", "this is some text and not a model at all, sorry", "not a safetensors file"},
                {"zip", "PK\x03\x04\x14 and then something more that is long enough", "zip file"},
                {"GGUF", "GGUF\x03 and then something more that is long enough", "GGUF"},
                {"index", "{\"metadata\": {\"total_size\": 1}, \"weight_map\": {}}", "index.json"},
                {"seven bytes", "1234567", "too short"},
                {"empty file", "", "too short"}};
    int failed = 0;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        file_put(path, rows[i].text, strlen(rows[i].text));
        failed += run_open_case(rows[i].name, path, rows[i].words);
    }
    char* header =
        replace_text(base_header, "pt", "p");   // a length of 0x7b, '{', must not be taken for JSON text
    const size_t lengths[] = {'{', '<', 'P' | 'K' << 8};
    for (int i = 0; i < 3; i++) {
        char* text = (char*)malloc(lengths[i] + 1);
        snprintf(text, lengths[i] + 1, "%-*s", (int)lengths[i],
                 i == 2 ? header : "{\"c\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}");
        put_safetensors(path, text, lengths[i], i == 2 ? BASE_DATA : 1);
        failed += run_open_case("a length that looks like text", path, NULL);
        free(text);
    }
    free(header);
    failed += run_open_case("missing", scratch("none.safetensors"), "No such file");
    failed += run_open_case("directory", scratch_dir, "found a directory");
    failed += run_open_case("device", "/dev/zero", "found a character device");
    if (mkfifo(scratch("fifo"), 0600) == 0)
        failed += run_open_case("FIFO without a writer", scratch("fifo"), "found a FIFO");
    put_safetensors(path, base_header, sizeof base_header - 1, BASE_DATA);
    if (symlink("other.safetensors", scratch("link")) == 0)
        failed += run_open_case("link to a file", scratch("link"), NULL);
    if (symlink("nowhere", scratch("dangling")) == 0)
        failed += run_open_case("dangling link", scratch("dangling"), "No such file");
    report("safetensors: other files", failed, 0);
}

// 13: the file changes between open and read; and the far end of a file beyond 2^32 bytes
static void test_changing_files(void) {
    const char* path = scratch("changing.safetensors");
    SafeTensors st;
    Error err;
    real out[8];
    int64_t ints[8];
    int failed = 0;
    for (int how = 0; how < 3; how++) {
        put_safetensors(path, base_header, sizeof base_header - 1, BASE_DATA);
        if (!safetensors_open(&st, path, &err)) { failed++; continue; }
        struct timespec old[2] = {{1, 0}, {1, 0}};
        if (how == 0 && truncate(path, 100) < 0) failed++;
        if (how == 1 && truncate(path, 5000) < 0) failed++;
        if (how == 2 && utimensat(AT_FDCWD, path, old, 0) < 0) failed++;
        if (safetensors_read_real(&st, safetensors_find(&st, "a"), out, &err) ||
            !one_line(err.text, "changed while reading"))
            failed++;
        if (safetensors_read_int(&st, safetensors_find(&st, "b"), ints, &err) ||
            !one_line(err.text, "changed while reading"))
            failed++;
        safetensors_close(&st);
    }
    report("safetensors: file changed while reading", failed, 0);

    char header[256];      // 5 GiB of zeros, a hole on disk; one tensor of four bytes at its very end
    const uint64_t far_end = 5ull << 30;
    snprintf(header, sizeof header,
             "{\"z\":{\"dtype\":\"U8\",\"shape\":[%llu],\"data_offsets\":[0,%llu]},\"far\":{\"dtype\":"
             "\"F32\","
             "\"shape\":[1],\"data_offsets\":[%llu,%llu]}}",
             (unsigned long long)far_end, (unsigned long long)far_end, (unsigned long long)far_end,
             (unsigned long long)far_end + 4);
    put_safetensors(path, header, strlen(header), 0);
    float value = 2.5f;
    int fd = open(path, O_WRONLY);
    bool ok = fd >= 0 && ftruncate(fd, (off_t)(8 + strlen(header) + far_end + 4)) == 0 &&
              pwrite(fd, &value, 4, (off_t)(8 + strlen(header) + far_end)) == 4;
    if (fd >= 0) close(fd);
    out[0] = 0;
    ok = ok && safetensors_open(&st, path, &err) &&
         safetensors_read_real(&st, safetensors_find(&st, "far"), out, &err);
    if (ok) safetensors_close(&st);
    report("safetensors: far end of 5 GiB", ok ? fabs((double)out[0] - 2.5) : 1, 0);
    unlink(path);
}

// --- round trips ---

// nearest16: what rounding to e exponent and m mantissa bits must give, by a search in the list of all values
static unsigned nearest16(double x, int e, int m) {
    int top = (1 << e) - 1, bias = top >> 1;
    unsigned low = 0, high = (unsigned)top << m;         // codes of 0 and of infinity
    double magnitude = fabs(x), value[2];
    while (high - low > 1) {                             // value(low) <= magnitude < value(high)
        unsigned mid = (low + high) / 2, ex = mid >> m, ma = mid & ((1u << m) - 1);
        double v = ex ? ldexp((double)((1u << m) + ma), (int)ex - bias - m) : ldexp((double)ma, 1 - bias - m);
        if (v <= magnitude) low = mid;
        else high = mid;
    }
    for (unsigned i = 0; i < 2; i++) {                   // infinity counts as the next power of two
        unsigned ex = (low + i) >> m, ma = (low + i) & ((1u << m) - 1);
        value[i] = ex ? ldexp((double)((1u << m) + ma), (int)ex - bias - m) : ldexp((double)ma, 1 - bias - m);
    }
    double below = magnitude - value[0], above = value[1] - magnitude;
    return (signbit(x) ? 1u << (e + m) : 0) | (below < above   ? low
                                               : above < below ? low + 1
                                                               : low + (low & 1));
}

static void test_round_trips(void) {
    const char* path = scratch("round.safetensors");
    const int64_t n = 65536;
    real* values = (real*)malloc((size_t)n * sizeof(real));
    real* back = (real*)malloc((size_t)n * sizeof(real));
    uint16_t* codes = (uint16_t*)malloc((size_t)n * 2);
    SafeTensors st;
    Error err;
    for (int type = 0; type < 2; type++) {
        // every 16-bit code: read, write, read the file's bytes again. NaN keeps its payload and becomes
        // quiet.
        const int dtype = type ? ST_BF16 : ST_F16, e = type ? 8 : 5, m = type ? 7 : 10;
        char header[128];
        snprintf(header, sizeof header,
                 "{\"w\":{\"dtype\":\"%s\",\"shape\":[256,256],\"data_offsets\":[0,131072]}}",
                 st_dtype[dtype].name);
        size_t at = 8 + strlen(header);
        put_safetensors(path, header, strlen(header), 131072);
        for (int64_t i = 0; i < n; i++) codes[i] = (uint16_t)i;
        int fd = open(path, O_WRONLY), failed = 0;
        if (pwrite(fd, codes, 131072, (off_t)at) != 131072) failed++;
        close(fd);
        failed += !safetensors_open(&st, path, &err) || !safetensors_read_real(&st, st.tensor, values, &err);
        safetensors_close(&st);
        for (int64_t i = 0; i < n; i++) {
            int ex = (int)(i >> m) & ((1 << e) - 1), bias = ((1 << e) - 1) >> 1;
            double ma = (double)(i & ((1 << m) - 1)),
                   v = ex ? ldexp((1 << m) + ma, ex - bias - m) : ldexp(ma, 1 - bias - m);
            if (ex == (1 << e) - 1) v = ma > 0 ? NAN : INFINITY;
            if (i >> (e + m)) v = -v;
            if (!(isnan(v) ? isnan((double)values[i])
                           : (double)values[i] == v && !signbit(v) == !signbit((double)values[i])))
                failed++;
        }
        SafeTensorOut w = {"w", 2, {256, 256}, dtype, values};
        failed += !safetensors_write(path, &w, 1, NULL, &err) || !safetensors_open(&st, path, &err) ||
                  !read_exact(st.fd, codes, 131072, st.data_start);
        failed += st.data_start % 8 != 0;
        safetensors_close(&st);
        for (int64_t i = 0; i < n; i++) {
            unsigned expected = (unsigned)i;
            if ((i >> m & ((1 << e) - 1)) == (1 << e) - 1 && (i & ((1 << m) - 1))) expected |= 1u << (m - 1);
            if (codes[i] != expected) failed++;
        }
        report(type ? "safetensors: all 65,536 BF16 codes" : "safetensors: all 65,536 F16 codes", failed, 0);

        // rounding: random values of every magnitude, and exact ties
        failed = 0;
        for (int64_t i = 0; i < n; i++) {
            int ex = (int)(random_bits(1, 7, (uint64_t)i) % (type ? 280 : 50)) - (type ? 145 : 30);
            double x = ldexp(1 + random_uniform(2, 7, (uint64_t)i), ex);
            if (i % 3 == 0)
                x = ldexp((double)((1 << (m + 2)) + 2 +
                                   4 * (int)(random_bits(3, 7, (uint64_t)i) % (1u << m))),
                          ex - m - 2);
            values[i] = (real)(i % 2 ? x : -x);
        }
        values[0] = 0, values[1] = (real)-0.0, values[2] = (real)INFINITY, values[3] = (real)65519.996,
        values[4] = 65520;
        failed += !safetensors_write(path, &w, 1, NULL, &err) || !safetensors_open(&st, path, &err) ||
                  !read_exact(st.fd, codes, 131072, st.data_start);
        safetensors_close(&st);
        for (int64_t i = 0; i < n; i++) failed += codes[i] != nearest16((double)values[i], e, m);
        report(type ? "safetensors: rounding to BF16" : "safetensors: rounding to F16", failed, 0);
    }

    // `real` as F32 and F64: the same bits, NaN payloads included; metadata; order and alignment; overwriting
    // what was read
    int failed = 0;
    for (int64_t i = 0; i < n; i++) values[i] = (real)random_normal(5, 7, (uint64_t)i);
    if (sizeof(real) == 4) {
        uint32_t bits[4] = {0x7fc01234u, 0xffc00001u, 0x00000001u, 0x80000000u};
        memcpy(values, bits, 16);
    }
    SafeTensorOut out[5] = {{"z", 2, {3, 5}, ST_F32, values},
                            {"half", 1, {3}, ST_F16, values},
                            {"empty", 2, {0, 7}, ST_F32, values},
                            {"wide", 0, {0}, ST_F64, values + 9},
                            {"a \"quoted\"\n", 1, {60000}, sizeof(real) == 4 ? ST_F32 : ST_F64, values}};
    const char* meta[] = {"step", "12", "text", "line\nbreak \"quoted\" \xc3\xa9", NULL};
    failed += !safetensors_write(path, out, 5, meta, &err) || !safetensors_open(&st, path, &err);
    failed += st.n != 5 || st.data_start % 8 != 0 || !safetensors_metadata(&st, "text") ||
              safetensors_metadata(&st, "none") || strcmp(safetensors_metadata(&st, "text"), meta[3]) != 0 ||
              strcmp(safetensors_metadata(&st, "step"), "12") != 0;
    for (int i = 0; i < st.n; i++) failed += st.tensor[i].begin % st_dtype[st.tensor[i].dtype].size != 0;
    const SafeTensor* t = safetensors_find(&st, "a \"quoted\"\n");
    failed += !t || t->count != 60000 || !safetensors_read_real(&st, t, back, &err) ||
              memcmp(values, back, 60000 * sizeof(real)) != 0;
    t = safetensors_find(&st, "wide");
    failed += !t || t->ndim != 0 || t->count != 1 || !safetensors_read_real(&st, t, back, &err) ||
              back[0] != values[9];
    failed += safetensors_find(&st, "half2") != NULL || !safetensors_find(&st, "empty");
    // 7: all differences in one line
    SafeTensorOut want[3] = {{"z", 2, {5, 3}, ST_F32, NULL},
                             {"half", 1, {3}, ST_F32, NULL},
                             {"absent", 1, {4}, ST_F32, NULL}};
    failed += safetensors_expect(&st, want, 3, &err) || !one_line(err.text, "absent [4] is missing") ||
              !strstr(err.text, "z is F32 [3,5], expected floating point [5,3]") ||
              !strstr(err.text, "wide is not part") || strstr(err.text, "half");
    failed += !safetensors_expect(&st, out, 5, &err);
    failed +=
        !safetensors_write(path, out, 2, NULL, &err);   // onto the file that is open, which stays readable
    failed += !safetensors_read_real(&st, safetensors_find(&st, "wide"), back, &err) || back[0] != values[9];
    safetensors_close(&st);
    failed += !safetensors_open(&st, path, &err) || st.n != 2;
    safetensors_close(&st);
    failed += access(scratch("round.safetensors.tmp"), F_OK) == 0;
    SafeTensorOut same[2] = {out[0], out[0]}, wrong = {"w", 1, {-1}, ST_F32, values},
                  integer = {"w", 1, {1}, ST_I64, values};
    failed += safetensors_write(path, same, 2, NULL, &err) || !one_line(err.text, "twice");
    failed +=
        safetensors_write(path, &wrong, 1, NULL, &err) || safetensors_write(path, &integer, 1, NULL, &err);
    failed += safetensors_write(scratch("none/x"), out, 1, NULL, &err) || !one_line(err.text, "No such file");
    failed += !safetensors_open(&st, path, &err) || st.n != 2;   // the failures left it alone
    safetensors_close(&st);
    report("safetensors: write and read", failed, 0);

    // integers of every width, and the boundary where each stops
    failed = 0;
    unsigned char bytes[64] = {0};
    const struct { const char* name; int size; uint64_t bits; int64_t value;
    } ints[] = {{"I64", 8, 0x8000000000000000ull, INT64_MIN},
                {"I64", 8, 5, 5},
                {"I32", 4, 0xfffffffbull, -5},
                {"I16", 2, 0x8000, -32768},
                {"I8", 1, 0xff, -1},
                {"U32", 4, 0xffffffffull, 4294967295},
                {"U16", 2, 0xffff, 65535},
                {"U8", 1, 0xff, 255},
                {"BOOL", 1, 1, 1},
                {"U64", 8, 0x7fffffffffffffffull, INT64_MAX},
                {"U64", 8, 0x8000000000000000ull, -1}};
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++) {
        char header[128];
        int64_t value = 0;
        snprintf(header, sizeof header, "{\"i\":{\"dtype\":\"%s\",\"shape\":[1],\"data_offsets\":[0,%d]}}",
                 ints[i].name, ints[i].size);
        uint64_t length = strlen(header);
        memcpy(bytes, &ints[i].bits, 8);
        FILE* f = fopen(path, "wb");
        fwrite(&length, 8, 1, f), fwrite(header, 1, length, f), fwrite(bytes, 1, (size_t)ints[i].size, f),
            fclose(f);
        if (!safetensors_open(&st, path, &err)) { failed++; continue; }
        bool ok = safetensors_read_int(&st, st.tensor, &value, &err);
        if (ints[i].value == -1 && ints[i].size == 8) failed += ok;         // 2^63 in U64 is refused
        else failed += !ok || value != ints[i].value;
        failed += safetensors_read_real(&st, st.tensor, values, &err) ||
                  !one_line(err.text, "expected F32, F64, F16 or BF16");
        safetensors_close(&st);
    }
    report("safetensors: integers", failed, 0);
    free(values), free(back), free(codes);
}

// --- config.json ---

static bool same_config(const Config* a, const Config* b) {
    bool same = strcmp(a->pattern, b->pattern) == 0 && a->vocab_size == b->vocab_size &&
                a->vocab_padded == b->vocab_padded && a->eos_token == b->eos_token &&
                a->dt_init_constant == b->dt_init_constant;
    for (int i = 0; i < N_CONFIG_FIELDS; i++) {
        const char *p = (const char*)a + config_fields[i].offset,
                   *q = (const char*)b + config_fields[i].offset;
        if (config_has(a, config_fields + i) && memcmp(p, q, config_field_size(config_fields + i)) != 0) {
            fprintf(stderr, "  config field %s differs\n", config_fields[i].name);
            same = false;
        }
    }
    return same;
}

static Config small_config(void) {
    Config c;
    memset(&c, 0, sizeof c);
    strcpy(c.pattern, "1");
    c.n_layer = 2, c.d_model = 12, c.d_inner = 24, c.d_state = 5, c.d_conv = 4, c.dt_rank = 1,
    c.vocab_size = 19, c.vocab_padded = 24;
    c.tie_embeddings = c.conv_bias = c.rescale_prenorm_residual = true;
    c.norm_eps = 1e-5, c.dt_min = 1e-3, c.dt_max = 0.1, c.dt_init_floor = 1e-4, c.dt_scale = 1,
    c.initializer_range = 0.02;
    c.d_ssm = 24, c.headdim = 4, c.ngroups = 2, c.chunk_size = 8, c.rmsnorm = true;
    c.dt_high = INFINITY, c.A_low = 1, c.A_high = 16;
    c.attn_heads = 4, c.attn_heads_kv = 2, c.attn_head_dim = 6, c.rotary_dim = 4, c.rotary_base = 10000;
    c.eos_token = -1;
    return c;
}

static const char hf_config[] =
    "{\"architectures\": [\"MambaForCausalLM\"], \"model_type\": \"mamba\", \"hidden_size\": 768, "
    "\"num_hidden_layers\": 24,"
    " \"state_size\": 16, \"conv_kernel\": 4, \"expand\": 2, \"intermediate_size\": 1536, "
    "\"time_step_rank\": 48, \"time_step_min\": 0.001,"
    " \"layer_norm_epsilon\": 1e-05, \"use_bias\": false, \"use_conv_bias\": true, \"vocab_size\": 50280, "
    "\"eos_token_id\": 0,"
    " \"bos_token_id\": 0, \"hidden_act\": \"silu\", \"time_step_limit\": [0.0, Infinity], \"d_model\": 768, "
    "\"n_layer\": 24,"
    " \"rms_norm\": true, \"pad_vocab_size_multiple\": 8, \"ssm_cfg\": {}}";
static const char mamba_config[] = "{\"d_model\": 768, \"n_layer\": 24, \"vocab_size\": 50277, \"ssm_cfg\": "
                                   "{}, \"rms_norm\": true, \"residual_in_fp32\": true,"
                                   " \"fused_add_norm\": true, \"pad_vocab_size_multiple\": 8}";

// Mamba-2 as transformers writes it, and a hybrid of mamba_ssm as published (mamba2attn-2.7b)
static const char hf2_config[] =
    "{\"architectures\": [\"Mamba2ForCausalLM\"], \"model_type\": \"mamba2\", \"hidden_size\": 768, "
    "\"num_hidden_layers\": 24, \"state_size\": 128, \"conv_kernel\": 4, \"expand\": 2, \"head_dim\": 64, "
    "\"num_heads\": 24, \"n_groups\": 1, \"chunk_size\": 256, \"time_step_rank\": 256, \"rms_norm\": false, "
    "\"norm_before_gate\": true, \"time_step_limit\": [0.0, Infinity], \"layer_norm_epsilon\": 1e-05, "
    "\"use_bias\": false, \"use_conv_bias\": true, \"hidden_act\": \"silu\", \"tie_word_embeddings\": true, "
    "\"vocab_size\": 50288, \"eos_token_id\": 0}";
static const char hybrid_config[] =
    "{\"d_model\": 2560, \"d_intermediate\": 0, \"n_layer\": 64, \"vocab_size\": 50277, "
    "\"ssm_cfg\": {\"layer\": \"Mamba2\"}, \"attn_layer_idx\": [9, 18, 27, 36, 45, 56], "
    "\"attn_cfg\": {\"causal\": true, \"d_conv\": 4, \"head_dim\": 128, \"num_heads\": 30, "
    "\"out_proj_bias\": false, \"qkv_proj_bias\": false, \"rotary_emb_dim\": 64}, \"rms_norm\": true, "
    "\"residual_in_fp32\": true, \"fused_add_norm\": true, \"pad_vocab_size_multiple\": 16, "
    "\"tie_embeddings\": true}";
static const char* const config_bases[] = {hf_config, mamba_config, hf2_config, hybrid_config};

typedef struct {
    int base;      // 0: Hugging Face, 1: mamba_ssm, 2: Hugging Face's Mamba-2, 3: mamba_ssm's hybrid
    const char *find, *by, *words;
} ConfigRow;
static const ConfigRow config_rows[] = {
    {0, "768", "768", NULL},
    {1, "768", "768", NULL},
    // 14: sizes
    {0, "\"hidden_size\": 768", "\"hidden_size\": 0", "d_model is 0"},
    {0, "\"hidden_size\": 768", "\"hidden_size\": -1", "d_model is -1"},
    {0, "\"hidden_size\": 768", "\"hidden_size\": 2147483648", "d_model is 2147483648"},
    {0, "\"hidden_size\": 768", "\"hidden_size\": 2147483647", "more than 2^40 parameters"},
    {0, "\"hidden_size\": 768", "\"hidden_size\": 1099511627776", "d_model is 1099511627776"},
    {0, "\"hidden_size\": 768", "\"hidden_size\": 9223372036854775808", "too big"},
    {0, "\"hidden_size\": 768", "\"hidden_size\": 768.5", "\"hidden_size\" is not an integer"},
    {0, "\"hidden_size\": 768", "\"hidden_size\": \"768\"", "\"hidden_size\" is not an integer"},
    {0, "\"hidden_size\": 768", "\"hidden_size\": null", "\"hidden_size\" is not an integer"},
    {0, "\"num_hidden_layers\": 24", "\"num_hidden_layers\": 1000000", "n_layer is 1000000"},
    {0, "\"vocab_size\": 50280", "\"vocab_size\": 0", "vocab_size is 0"},
    {0, "\"vocab_size\": 50280", "\"vocab_size\": 4294967296", "vocab_size is 4294967296"},
    {0, "\"vocab_size\": 50280, ", "", "\"vocab_size\" is missing"},
    {0, "\"intermediate_size\": 1536", "\"intermediate_size\": -4", "d_inner is -4"},
    {0, "\"state_size\": 16", "\"state_size\": 257", "d_state is 257"},
    {0, "\"conv_kernel\": 4", "\"conv_kernel\": 9", "d_conv is 9"},
    {0, "\"time_step_rank\": 48", "\"time_step_rank\": \"auto\"", NULL},
    {0, "\"time_step_rank\": 48", "\"time_step_rank\": \"best\"", "\"time_step_rank\" is not an integer"},
    {0, "\"expand\": 2, \"intermediate_size\": 1536", "\"expand\": 1e300",
     "\"expand\" is not a positive number"},
    {0, "\"expand\": 2, \"intermediate_size\": 1536", "\"expand\": NaN",
     "\"expand\" is not a positive number"},
    {0, "\"expand\": 2, \"intermediate_size\": 1536", "\"expand\": 0.0001", "d_inner is 0"},
    {0, "1e-05", "NaN", "\"layer_norm_epsilon\" is not a finite number"},
    {0, "1e-05", "-Infinity", "\"layer_norm_epsilon\" is not a finite number"},
    {0, "1e-05", "0", "norm_eps is 0"},
    {0, "1e-05", "1e999", "not valid JSON"},
    {0, "\"time_step_min\": 0.001", "\"time_step_min\": 5", "dt_min 5 and dt_max 0.1"},
    {0, "\"time_step_min\": 0.001", "\"time_step_min\": 0", "dt_min 0"},
    {0, "\"eos_token_id\": 0", "\"eos_token_id\": 50280", "eos_token is 50280"},
    {0, "\"eos_token_id\": 0", "\"eos_token_id\": \"end\"", "\"eos_token_id\" is not an integer"},
    {0, "\"eos_token_id\": 0", "\"eos_token_id\": [7, 9]", NULL},
    {0, "\"use_bias\": false", "\"use_bias\": 0", "\"use_bias\" is not true or false"},
    // other architectures
    {0, "\"model_type\": \"mamba\"", "\"model_type\": \"mamba2\"", "\"num_heads\""},
    {0, "\"model_type\": \"mamba\"", "\"model_type\": \"llama\"", "\"model_type\" is \"llama\""},
    {0, "\"model_type\": \"mamba\"", "\"model_type\": 1", "\"model_type\""},
    {0, "\"silu\"", "\"gelu\"", "\"hidden_act\" is not \"silu\""},
    {1, "\"ssm_cfg\": {}", "\"ssm_cfg\": {\"layer\": \"Mamba3\"}", "\"ssm_cfg.layer\" is \"Mamba3\""},
    {1, "\"ssm_cfg\": {}", "\"ssm_cfg\": {\"layer\": 2}", "\"ssm_cfg.layer\" is \"not a string\""},
    {1, "\"ssm_cfg\": {}", "\"ssm_cfg\": {\"layer\": \"Mamba2\"}", NULL},
    {1, "\"ssm_cfg\": {}", "\"ssm_cfg\": []", "\"ssm_cfg\" is not an object"},
    {1, "\"ssm_cfg\": {}", "\"ssm_cfg\": {\"d_state\": 0}", "d_state is 0"},
    {1, "\"ssm_cfg\": {}", "\"ssm_cfg\": {\"dt_init\": \"zero\"}", "initialization of dt"},
    {1, "\"ssm_cfg\": {}", "\"ssm_cfg\": {\"dt_init\": \"NaN\"}", "dt is \"NaN\""},
    {1, "\"ssm_cfg\": {}", "\"ssm_cfg\": {\"dt_init\": \"\\\" Infinity\"}", "dt is \"\" Infinity\""},
    {1, "\"ssm_cfg\": {}", "\"ssm_cfg\": {}, \"attn_layer_idx\": [3]", "\"attn_cfg.causal\" is not true"},
    {0, "\"ssm_cfg\": {}", "\"attn_layer_idx\": [3]", "\"attn_layer_idx\" is not empty"},
    // Mamba-2
    {2, "768", "768", NULL},
    {2, "\"num_heads\": 24", "\"num_heads\": 23", "is not the inner width, 1536"},
    {2, "\"num_heads\": 24, ", "", "\"num_heads\" (128 when absent)"},
    {2, "\"num_heads\": 24", "\"num_heads\": 9223372036854775807", "is not the inner width"},
    {2, "\"num_heads\": 24", "\"num_heads\": \"24\"", "is not the inner width"},
    {2, "\"head_dim\": 64", "\"head_dim\": 0", "is not the inner width"},
    {2, "\"head_dim\": 64", "\"head_dim\": -9223372036854775808", "is not the inner width"},
    {2, "\"head_dim\": 64, ", "", NULL},
    {2, "\"n_groups\": 1", "\"n_groups\": 5", "cannot be shared by 5 groups"},
    {2, "\"n_groups\": 1", "\"n_groups\": 0", "ngroups is 0"},
    {2, "\"n_groups\": 1", "\"n_groups\": 2147483648", "ngroups is 2147483648"},
    {2, "\"n_groups\": 1, ", "", NULL},
    {2, "\"chunk_size\": 256", "\"chunk_size\": 0", "chunk_size is 0"},
    {2, "\"chunk_size\": 256", "\"chunk_size\": 1e3", "\"chunk_size\" is not an integer"},
    {2, "\"chunk_size\": 256", "\"chunk_size\": 100000", "chunk_size is 100000"},
    {2, "[0.0, Infinity]", "[0.0, 0.1]", NULL},
    {2, "[0.0, Infinity]", "[0.0, {\"__float__\": \"Infinity\"}]", NULL},
    {2, "[0.0, Infinity]", "[0.0, {\"__float__\": \"NaN\"}]", "\"time_step_limit\" is not a list of two"},
    {2, "[0.0, Infinity]", "[0.0, NaN]", "\"time_step_limit\" is not a list of two numbers"},
    {2, "[0.0, Infinity]", "[0.0, -Infinity]", "\"time_step_limit\" is not a list of two numbers"},
    {2, "[0.0, Infinity]", "[Infinity, Infinity]", "\"time_step_limit\" is not a list of two numbers"},
    {2, "[0.0, Infinity]", "[0.0, null]", "\"time_step_limit\" is not a list of two numbers"},
    {2, "[0.0, Infinity]", "[0.2, 0.1]", "dt_limit is 0.2 .. 0.1"},
    {2, "[0.0, Infinity]", "[0.1]", "\"time_step_limit\" is not a list of two numbers"},
    {2, "[0.0, Infinity]", "[0, 1, 2]", "\"time_step_limit\" is not a list of two numbers"},
    {2, "[0.0, Infinity]", "0.1", "\"time_step_limit\" is not a list of two numbers"},
    {2, "\"time_step_rank\": 256", "\"time_step_rank\": [1]", NULL},       // Mamba-2 has none
    {2, "\"state_size\": 128", "\"state_size\": 512", "d_state is 512"},
    {2, "\"silu\"", "\"relu\"", "\"hidden_act\" is not \"silu\""},
    {2, "\"expand\": 2", "\"expand\": 3", "is not the inner width, 2304"},
    {2, "\"vocab_size\": 50288, ", "", "\"vocab_size\" is missing"},
    {3, "\"Mamba2\"", "\"Mamba2\", \"headdim\": 100", "a multiple of headdim (--headdim), 100"},
    {3, "\"Mamba2\"", "\"Mamba2\", \"d_ssm\": 2560, \"headdim\": 32", NULL},
    {3, "\"Mamba2\"", "\"Mamba2\", \"d_ssm\": null", NULL},
    {3, "\"Mamba2\"", "\"Mamba2\", \"d_ssm\": 10240", "d_ssm is 10240, expected 1 .. 5120"},
    {3, "\"Mamba2\"", "\"Mamba2\", \"d_ssm\": 0", "d_ssm is 0"},
    {3, "\"Mamba2\"", "\"Mamba2\", \"A_init_range\": [0, 16]", "A_init_range is 0 .. 16"},
    {3, "\"Mamba2\"", "\"Mamba2\", \"A_init_range\": [1, Infinity]", "A_init_range is 1 .. inf"},
    {3, "\"Mamba2\"", "\"Mamba2\", \"conv_init\": null", NULL},
    {3, "\"Mamba2\"", "\"Mamba2\", \"conv_init\": -1", "conv_init is -1"},
    {3, "\"Mamba2\"", "\"Mamba2\", \"dt_limit\": [0.0, Infinity]", NULL},
    {3, "\"Mamba2\"", "\"Mamba2\", \"rmsnorm\": 1", "\"ssm_cfg.rmsnorm\" is not true or false"},
    // attention
    {3, "2560", "2560", NULL},
    {3, "\"causal\": true", "\"causal\": false", "\"attn_cfg.causal\" is not true"},
    {3, "\"causal\": true, ", "", "\"attn_cfg.causal\" is not true"},
    {3, "\"num_heads\": 30, ", "", "\"attn_cfg.num_heads\" is missing"},
    {3, "\"num_heads\": 30", "\"num_heads\": 0", "\"attn_cfg.num_heads\" is missing or below 1"},
    {3, "\"num_heads\": 30", "\"num_heads\": 65537", "attention heads is 65537"},
    {3, "\"num_heads\": 30", "\"num_heads\": 30, \"num_heads_kv\": 7", "30 attention heads cannot share 7"},
    {3, "\"num_heads\": 30", "\"num_heads\": 30, \"num_heads_kv\": 60", "KV heads is 60"},
    {3, "\"num_heads\": 30", "\"num_heads\": 30, \"num_heads_kv\": null", NULL},
    {3, "\"head_dim\": 128, ", "", "30 heads do not share d_model 2560"},
    {3, "\"head_dim\": 128", "\"head_dim\": 9223372036854775807", "attention head_dim is 92233"},
    {3, "\"head_dim\": 128", "\"head_dim\": 63", "rotary_emb_dim is 64"},
    {3, "\"rotary_emb_dim\": 64", "\"rotary_emb_dim\": 63", "is 63, expected an even number"},
    {3, "\"rotary_emb_dim\": 64", "\"rotary_emb_base\": 0", "rotary_emb_base is 0"},
    {3, "\"rotary_emb_dim\": 64", "\"rotary_emb_scale_base\": 512", "_scale_base\" is not supported"},
    {3, "\"rotary_emb_dim\": 64", "\"softmax_scale\": -1", "softmax_scale is -1"},
    {3, "\"rotary_emb_dim\": 64", "\"softmax_scale\": null", NULL},
    {3, "\"rotary_emb_dim\": 64", "\"mlp_dim\": -4", "mlp_dim is -4"},
    {3, "\"rotary_emb_dim\": 64", "\"mlp_dim\": 9223372036854775807", "mlp_dim is 92233"},
    {3, "\"d_conv\": 4", "\"d_conv\": 9", "attention d_conv is 9"},
    {3, "45, 56]", "45, 64]", "\"attn_layer_idx\"[5] is not an integer in 0 .. 63"},
    {3, "45, 56]", "45, -1]", "\"attn_layer_idx\"[5]"},
    {3, "45, 56]", "45, 18]", "\"attn_layer_idx\"[5]"},
    {3, "45, 56]", "45, 5.5]", "\"attn_layer_idx\"[5]"},
    {3, "[9, 18, 27, 36, 45, 56]", "{\"9\": 1}", "\"attn_layer_idx\" is not a list"},
    {3, "[9, 18, 27, 36, 45, 56]", "null", NULL},
    {3, "\"n_layer\": 64", "\"n_layer\": 511", NULL},
    {3, "\"n_layer\": 64", "\"n_layer\": 512", "attention in some of 512 layers"},
    {3, "\"n_layer\": 64", "\"n_layer\": -1", "attention in some of -1 layers"},
    {3, "\"d_intermediate\": 0, \"n_layer\": 64", "\"d_intermediate\": 128, \"n_layer\": 500",
     "make a pattern of 1000 letters"},
    {3, "\"attn_cfg\": {", "\"attn_cfg\": [], \"x\": {", "\"attn_cfg\" is not an object"},
    {1, "\"rms_norm\": true", "\"rms_norm\": false", "\"rms_norm\" is false"},
    {1, "\"d_model\": 768, ", "", "neither \"model_type\" nor \"d_model\""},
    {1, "\"n_layer\": 24, ", "", "\"n_layer\" is missing"},
    {1, "size_multiple\": 8", "size_multiple\": 0", "pad_vocab_size_multiple"},
    {1, "size_multiple\": 8", "size_multiple\": 9223372036854775807", "pad_vocab_size_multiple"},
    {1, "\"ssm_cfg\": {}", "\"ssm_c\": {\"pattern\": \"1z\"}", "letter 'z'"},
    {1, "\"ssm_cfg\": {}", "\"ssm_c\": {\"pattern\": \"m1\"}, \"d_intermediate\": 4", "must follow a mixer"},
    {1, "\"ssm_cfg\": {}", "\"ssm_c\": {\"pattern\": \"1mm\"}, \"d_intermediate\": 4", "must follow a mixer"},
    {1, "\"ssm_cfg\": {}", "\"ssm_c\": {\"pattern\": \"\"}", "the pattern has 0 letters"},
    {1, "\"ssm_cfg\": {}", "\"ssm_c\": {\"pattern\": \"1m\"}", "do not agree"},
    {1, "\"ssm_cfg\": {}", "\"ssm_c\": {\"vocab_size\": 60000}", "vocab_padded is 50280, expected 60000"},
    // JSON
    {0, "{", "[", "not valid JSON"},
    {0, "}}", "}} x", "not valid JSON"},
    {0, "}}", "},}", "not valid JSON"},
    {0, "{", "\xef\xbb\xbf{", "not valid JSON"},
    {0, "\"expand\": 2", "\"expand\": 2, \"expand\": 3", "duplicate"},
    {0, "silu", "si\xfflu", "not valid JSON"},
    {0, "silu", "silu\\u0000", "not valid JSON"},
};

static void config_case(void* arg) {
    Config c;
    Error err;
    const char* words = (const char*)arg;
    limit_memory(4096);
    bool ok = config_read(&c, scratch_dir, &err);
    if (words ? !ok && one_line(err.text, words) : ok) return;
    fprintf(stderr, "expected \"%s\", found \"%s\"", words ? words : "loads", ok ? "loads" : err.text);
    exit(1);
}

static int run_config_case(const char* name, const char* words) {
    char text[4096] = "";
    int code = in_child(config_case, (void*)(uintptr_t)words, text, sizeof text);
    if (code) fprintf(stderr, "  config row \"%s\": exit code %d: %s\n", name, code, text);
    return code != 0;
}

static void test_config_files(void) {
    const char* path = scratch("config.json");
    int failed = 0;
    for (size_t i = 0; i < sizeof config_rows / sizeof *config_rows; i++) {
        const ConfigRow* r = config_rows + i;
        char* text = replace_text(config_bases[r->base], r->find, r->by);
        file_put(path, text, strlen(text));
        failed += run_config_case(r->by, r->words);
        free(text);
    }
    char* deep = (char*)malloc(200001);
    memset(deep, '[', 100000);
    file_put(path, deep, 100000);
    failed += run_config_case("100,000 brackets", "not valid JSON");
    memset(deep, ' ', 200000);
    file_put(path, deep, 200000);
    failed += run_config_case("200,000 bytes", "expected at most 131072");
    file_put(path, "{\0}", 3);
    failed += run_config_case("NUL", "NUL byte");
    file_put(path, "", 0);
    failed += run_config_case("empty", "not valid JSON");
    unlink(path);
    failed += run_config_case("missing", "No such file");
    free(deep);
    report("config: hostile files", failed, 0);

    // the published dialects give mamba-130m
    Config c, d;
    Error err;
    failed = 0;
    file_put(path, mamba_config, sizeof mamba_config - 1);
    failed += !config_read(&c, scratch_dir, &err) || c.d_model != 768 || c.n_layer != 24 ||
              c.d_inner != 1536 || c.dt_rank != 48 || c.d_state != 16 || c.d_conv != 4 ||
              c.vocab_size != 50277 || c.vocab_padded != 50280 || !c.tie_embeddings || c.bias ||
              !c.conv_bias || c.norm_eps != 1e-5 || strcmp(c.pattern, "1") != 0 || c.eos_token != -1 ||
              !c.rescale_prenorm_residual;
    file_put(path, hf_config, sizeof hf_config - 1);
    failed += !config_read(&d, scratch_dir, &err) || d.vocab_size != 50280 || d.eos_token != 0 ||
              d.initializer_range != 0.1 || d.rescale_prenorm_residual || d.d_inner != 1536 ||
              d.dt_rank != 48;
    char* text = replace_text(hf_config, "\"intermediate_size\": 1536", "\"x\": NaN");
    file_put(path, text, strlen(text));
    failed += !config_read(&d, scratch_dir, &err) || d.d_inner != 1536;
    free(text);
    text = replace_text(mamba_config, "\"ssm_cfg\": {}",
                        "\"ssm_cfg\": {\"expand\": 1.5, \"dt_rank\": \"auto\", \"bias\": true, "
                        "\"conv_bias\": false, "
                        "\"dt_init\": \"constant\", \"dt_max\": 1}, \"d_intermediate\": 1000, \"note\": "
                        "\"NaN \\\" Infinity\"");
    file_put(path, text, strlen(text));
    failed += !config_read(&d, scratch_dir, &err) || d.d_inner != 1152 || d.dt_rank != 48 || !d.bias ||
              d.conv_bias || !d.dt_init_constant || d.dt_max != 1 || d.d_intermediate != 1024 ||
              strcmp(d.pattern, "1m") != 0;
    free(text);
    file_put(path, "{\"d_model\": 100, \"n_layer\": 1, \"vocab_size\": 8}", 47);
    failed += !config_read(&d, scratch_dir, &err) || d.dt_rank != 7 || d.d_inner != 200 ||
              d.vocab_padded != 8;
    // mamba2-130m and mamba2attn-2.7b, and what the classes say of a missing key
    file_put(path, hf2_config, sizeof hf2_config - 1);
    failed += !config_read(&d, scratch_dir, &err) || strcmp(d.pattern, "2") != 0 || d.d_inner != 1536 ||
              d.d_ssm != 1536 || d.d_state != 128 || d.headdim != 64 || d.ngroups != 1 ||
              d.chunk_size != 256 || !d.rmsnorm || d.norm_before_gate || d.D_has_hdim || d.dt_low != 0 ||
              d.dt_high != INFINITY || !d.tie_embeddings || d.vocab_size != 50288 || d.eos_token != 0 ||
              d.A_low != 1 || d.A_high != 16;
    const char* bare = "{\"model_type\": \"mamba2\", \"hidden_size\": 4096, \"num_hidden_layers\": 1, "
                       "\"vocab_size\": 64, \"time_step_limit\": [0.001, 0.5]}";
    file_put(path, bare, strlen(bare));
    failed += !config_read(&d, scratch_dir, &err) || d.ngroups != 8 || d.headdim != 64 || d.d_state != 128 ||
              d.tie_embeddings || d.eos_token != 2 || d.dt_low != 0.001 || d.dt_high != 0.5 || !d.conv_bias;
    file_put(path, hybrid_config, sizeof hybrid_config - 1);
    failed += !config_read(&d, scratch_dir, &err) || d.d_state != 128 || d.ngroups != 1 || d.headdim != 64 ||
              strcmp(d.pattern, "222222222a22222222a22222222a22222222a22222222a2222222222a2222222") != 0 ||
              d.attn_heads != 30 || d.attn_heads_kv != 30 || d.attn_head_dim != 128 || d.attn_conv != 4 ||
              d.rotary_dim != 64 || d.rotary_base != 10000 || d.rotary_interleaved || d.attn_in_bias ||
              d.attn_out_bias || d.attn_mlp != 0 || d.softmax_scale != 0 || d.vocab_padded != 50288;
    static const struct { const char *layers, *pattern; } repeats[] = {
        {"\"n_layer\": 12, \"attn_layer_idx\": [3, 7, 11]", "222a"},
        {"\"n_layer\": 11, \"attn_layer_idx\": [7, 3]", "222a"},
        {"\"n_layer\": 13, \"attn_layer_idx\": [3, 7, 12]", "222a222a2222a"},
        {"\"n_layer\": 2, \"attn_layer_idx\": [0, 1]", "a"},
        {"\"n_layer\": 4, \"attn_layer_idx\": [0, 2], \"d_intermediate\": 300", "am2m"},
        {"\"n_layer\": 4, \"attn_layer_idx\": [], \"d_intermediate\": 300", "2m"} };
    for (size_t i = 0; i < sizeof repeats / sizeof *repeats; i++) {
        char made[512];
        snprintf(made, sizeof made, "{\"d_model\": 64, \"vocab_size\": 9, %s, "
                 "\"ssm_cfg\": {\"layer\": \"Mamba2\"}, \"attn_cfg\": {\"causal\": true, \"num_heads\": 4, "
                 "\"mlp_dim\": 300, \"num_heads_kv\": 2}}", repeats[i].layers);
        file_put(path, made, strlen(made));
        failed += !config_read(&d, scratch_dir, &err) || strcmp(d.pattern, repeats[i].pattern) != 0;
        if (strchr(d.pattern, 'a'))
            failed += d.attn_head_dim != 16 || d.attn_mlp != 512 || d.attn_heads_kv != 2 || !d.attn_in_bias;
        if (strchr(d.pattern, 'm')) failed += d.d_intermediate != 384;
    }
    report("config: published dialects", failed, 0);

    // round trips of random configs: every field comes back exactly
    static const char* const patterns[] = {"1", "11", "1m", "11m1", "1m1", "2", "2m", "12am", "a", "222a",
                                           "1a"};
    failed = 0;
    for (uint64_t i = 0; i < 500; i++) {
        c = small_config();
        uint64_t bits = random_bits(11, 7, i);
        strcpy(c.pattern, patterns[bits % COUNT_OF(patterns)]);
        c.d_intermediate = strchr(c.pattern, 'm') ? 1 + (int64_t)(bits >> 8 & 255) : 0;
        c.n_layer = 1 + (int64_t)(bits >> 16 & 31);
        c.d_model = 1 + (int64_t)(bits >> 21 & 255);
        c.d_inner = bits & 32 ? 2 * c.d_model : 1 + (int64_t)(bits >> 29 & 511);
        c.d_state = 1 + (int64_t)(bits >> 38 & 127);
        c.d_conv = 1 + (int64_t)(bits >> 45 & 7);
        c.dt_rank = 1 + (int64_t)(bits >> 48 & 31);
        c.vocab_size = 1 + (int64_t)(bits >> 53 & 1023);
        c.vocab_padded =
            c.vocab_size + (int64_t)(random_bits(12, 7, i) % 3 ? random_bits(13, 7, i) % 300 : 0);
        c.eos_token = (int64_t)(random_bits(14, 7, i) % (uint64_t)(c.vocab_size + 1)) - 1;
        c.tie_embeddings = random_bits(15, 7, i) & 1, c.bias = random_bits(16, 7, i) & 1,
        c.conv_bias = random_bits(17, 7, i) & 1;
        c.rescale_prenorm_residual = random_bits(18, 7, i) & 1,
        c.dt_init_constant = random_bits(19, 7, i) & 1;
        c.norm_eps = 1e-9 + 0.1 * random_uniform(20, 7, i), c.dt_min = 1e-6 + random_uniform(21, 7, i);
        c.dt_max = c.dt_min + random_uniform(22, 7, i), c.dt_init_floor = random_uniform(23, 7, i);
        c.dt_scale = 0.1 + random_uniform(24, 7, i),
        c.initializer_range = i % 4 ? random_uniform(25, 7, i) : 0;
        uint64_t more = random_bits(26, 7, i);
        c.headdim = 1 + (int64_t)(more & 15), c.ngroups = 1 + (int64_t)(more >> 4 & 3);
        c.d_ssm = c.headdim * c.ngroups * (1 + (int64_t)(more >> 6 & 3));
        if (c.d_inner < c.d_ssm || more >> 8 & 1) c.d_inner = c.d_ssm + (int64_t)(more >> 9 & 1);
        c.chunk_size = 1 + (int64_t)(more >> 10 & 511);
        c.D_has_hdim = more >> 19 & 1, c.rmsnorm = more >> 20 & 1, c.norm_before_gate = more >> 21 & 1;
        c.dt_low = more >> 22 & 1 ? 0 : random_uniform(27, 7, i);
        c.dt_high = more >> 23 & 1 ? INFINITY : c.dt_low + random_uniform(28, 7, i);
        c.A_low = 0.1 + random_uniform(29, 7, i), c.A_high = c.A_low + random_uniform(30, 7, i);
        c.conv_init = more >> 24 & 1 ? random_uniform(31, 7, i) : 0;
        c.attn_heads_kv = 1 + (int64_t)(more >> 25 & 3);
        c.attn_heads = c.attn_heads_kv * (1 + (int64_t)(more >> 27 & 3));
        c.attn_head_dim = 4 + (int64_t)(more >> 29 & 15), c.attn_conv = (int64_t)(more >> 33 & 7);
        c.attn_mlp = 2 * (int64_t)(more >> 36 & 255), c.rotary_dim = 2 * (int64_t)(more >> 44 & 1);
        c.rotary_base = 1 + 1e5 * random_uniform(32, 7, i);
        c.softmax_scale = more >> 45 & 1 ? random_uniform(33, 7, i) : 0;
        c.rotary_interleaved = more >> 46 & 1;
        c.attn_in_bias = more >> 47 & 1, c.attn_out_bias = more >> 48 & 1;
        memset(&d, 255, sizeof d);
        if (!config_write(&c, -1, "float32", scratch_dir, &err) && !failed++)
            fprintf(stderr, "  config round trip %d: %s\n", (int)i, err.text);
        // other programs compute E = int(expand * D) in double precision; only Python reads Infinity
        json_t* root = json_load_file(path, 0, NULL);
        const json_t* expand =
            config_key(root, json_object_get(root, "expand") ? "expand" : "ssm_cfg.expand");
        if (root ? (int64_t)(json_number_value(expand) * (double)c.d_model) != c.d_inner
                 : !(c.dt_low > 0 && c.dt_high == INFINITY)) failed++;
        json_decref(root);
        if (!strchr(c.pattern, '1')) c.dt_init_constant = false;       // without dt_proj it says nothing
        if (!config_read(&d, scratch_dir, &err) || !same_config(&c, &d)) {
            if (!failed++) fprintf(stderr, "  config round trip %d: %s\n", (int)i, err.text);
        }
    }
    report("config: 500 round trips", failed, 0);
}

// --- checkpoints ---

// save_step: a checkpoint of one file that holds its step
static bool save_step(const char* out, int64_t step, const char* text, Error* err) {
    char dir[4096];
    return checkpoint_begin(out, step, dir, sizeof dir, err) &&
           checkpoint_write_text(dir, "model.safetensors", text, err) && checkpoint_commit(out, step, err);
}

static bool resolves_to(const char* path, const char* expected, const char* content) {
    char dir[4096], text[64] = "";
    Error err;
    if (!checkpoint_resolve(path, dir, sizeof dir, &err))
        return strstr(err.text, expected) != NULL && one_line(err.text, path);
    size_t n = strlen(dir), m = strlen(expected);
    char file[4200];
    snprintf(file, sizeof file, "%s/model.safetensors", dir);
    FILE* f = fopen(file, "r");
    if (!f) return false;
    bool ok = fgets(text, sizeof text, f) != NULL && strcmp(text, content) == 0;
    fclose(f);
    return ok && n >= m && strcmp(dir + n - m, expected) == 0;
}

static void write_beyond_limit(void* arg) {      // a file-size limit stands in for a full disk
    Error err;
    struct rlimit limit = {100, 100};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    real values[100] = {0};
    SafeTensorOut w = {"w", 1, {100}, ST_F32, values};
    char path[4096];
    snprintf(path, sizeof path, "%s/step_00000009/w", (const char*)arg);
    if (save_step((const char*)arg, 10, "short", &err) && !safetensors_write(path, &w, 1, NULL, &err) &&
        one_line(err.text, "File too large") && access(path, F_OK) != 0 &&
        access(strcat(path, ".tmp"), F_OK) != 0)
        return;
    fprintf(stderr, "%s", err.text);
    exit(1);
}

static void test_checkpoints(void) {
    const char* out = scratch("deep/er/out");
    Error err;
    int failed = 0;
    char keep[4096];
    snprintf(keep, sizeof keep, "%s", out);
    out = keep;
#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            failed++;                                                                                        \
            fprintf(stderr, "  checkpoint line %d: %s: %s\n", __LINE__, #condition, err.text);               \
        }                                                                                                    \
    } while (0)
    err.text[0] = 0;
    CHECK(checkpoint_probe(out, 1000, &err));
    CHECK(checkpoint_probe(out, 1000, &err));
    CHECK(!checkpoint_probe(out, 1ull << 62, &err) &&
          one_line(err.text, "two checkpoints need 8796093022208.0 MiB"));
    CHECK(resolves_to(out, "holds neither", ""));
    CHECK(save_step(out, 100, "100", &err) && resolves_to(out, "/step_00000100", "100"));
    CHECK(save_step(out, 200, "200", &err) && resolves_to(out, "/step_00000200", "200"));
    CHECK(save_step(out, 200, "200b", &err) &&
          resolves_to(out, "/step_00000200", "200b"));   // the same step again
    char path[4200];
    snprintf(path, sizeof path, "%s/step_00000200.tmp", out);     // the one it replaced
    CHECK(access(path, F_OK) != 0);
    snprintf(path, sizeof path, "%s/last", out);
    CHECK(resolves_to(path, "/last", "200b"));
    snprintf(path, sizeof path, "%s/step_00000100", out);
    CHECK(resolves_to(path, "/step_00000100", "100"));
    CHECK(checkpoint_mark_best(out, 100, &err));
    for (int64_t step = 300; step <= 600; step += 100) CHECK(save_step(out, step, "x", &err));
    const char* others[] = {"notes", "step_1", "step_00000100x", "step_best"};
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s/%s", out, others[i]);
        CHECK(mkdir(path, 0777) == 0);
    }
    CHECK(save_step(out, 250, "250", &err));      // a run that went back: last is not the newest
    checkpoint_prune(out, 2);
    const struct {
        const char* name;
        bool kept;
    } after[] = {{"step_00000100", true},  {"step_00000200", false}, {"step_00000250", true},
                 {"step_00000300", false}, {"step_00000400", false}, {"step_00000500", true},
                 {"step_00000600", true},  {"notes", true},          {"step_1", true},
                 {"step_00000100x", true}, {"step_best", true},      {"step_00000400.tmp", false},
                 {"probe", false},         {"probe_link", false}};
    for (size_t i = 0; i < sizeof after / sizeof *after; i++) {
        snprintf(path, sizeof path, "%s/%s", out, after[i].name);
        CHECK((access(path, F_OK) == 0) == after[i].kept);
    }
    CHECK(resolves_to(out, "/step_00000250", "250"));
    checkpoint_prune(out, 0);                     // at least one is kept, always best and last
    snprintf(path, sizeof path, "%s/step_00000600", out);
    CHECK(access(path, F_OK) == 0 && resolves_to(out, "/step_00000250", "250"));
    CHECK(save_step(out, 123456789012, "long", &err) && resolves_to(out, "/step_123456789012", "long"));
    report("checkpoints: save, replace, prune", failed, 0);

    failed = 0;
    // 28: what a crash left
    char dir[4096];
    CHECK(checkpoint_begin(out, 700, dir, sizeof dir, &err) &&
          checkpoint_write_text(dir, "model.safetensors", "half", &err));
    CHECK(resolves_to(out, "/step_123456789012", "long"));
    fflush(stdout);
    int saved = dup(1), null = open("/dev/null", O_WRONLY);   // the line about it is not part of this table
    dup2(null, 1);
    CHECK(checkpoint_probe(out, 0, &err));
    fflush(stdout);
    dup2(saved, 1), close(saved), close(null);
    CHECK(access(dir, F_OK) != 0);
    CHECK(!checkpoint_commit(out, 700, &err) && resolves_to(out, "/step_123456789012", "long"));
    CHECK(checkpoint_begin(out, 700, dir, sizeof dir, &err) &&
          checkpoint_begin(out, 700, dir, sizeof dir, &err));   // a second try
    CHECK(checkpoint_commit(out, 700, &err) && resolves_to(out, "which has no model.safetensors", ""));
    // 27: out/last in every wrong form
    const char* targets[] = {"step_00009999", "../elsewhere", "/tmp", "step_1", "step_00000600.tmp"};
    for (int i = 0; i < 5; i++) {
        snprintf(path, sizeof path, "%s/last", out);
        CHECK(unlink(path) == 0 && symlink(targets[i], path) == 0);
        CHECK(resolves_to(out, i == 0 ? "does not exist" : "expected step_<number>", ""));
    }
    CHECK(save_step(out, 800, "800", &err) &&
          resolves_to(out, "/step_00000800", "800"));   // a save repairs it
    CHECK(unlink(path) == 0 && mkdir(path, 0777) == 0 && resolves_to(out, "expected a link", ""));
    CHECK(!save_step(out, 900, "900", &err) &&
          one_line(err.text, "expected a symbolic link, found a directory"));
    CHECK(rmdir(path) == 0 && save_step(out, 900, "900b", &err) &&
          resolves_to(out, "/step_00000900", "900b"));
    file_put(scratch("file"), "x", 1);
    CHECK(resolves_to(scratch("file"), "found a file", "") &&
          resolves_to(scratch("nothing"), "No such file", ""));
    CHECK(!checkpoint_probe(scratch("file"), 0, &err) && one_line(err.text, "a file has this name"));
    CHECK(!checkpoint_probe(scratch("file/below"), 0, &err) && one_line(err.text, "cannot create"));
    CHECK(!checkpoint_probe("", 0, &err) && !checkpoint_probe("/proc/none", 0, &err) &&
          one_line(err.text, "/proc/none"));
    CHECK(!checkpoint_begin(scratch("absent"), 1, dir, sizeof dir, &err) &&
          one_line(err.text, "cannot create"));
    char text[4096] = "";
    CHECK(save_step(out, 9, "9", &err) &&
          in_child(write_beyond_limit, (void*)(uintptr_t)out, text, sizeof text) == 0);
    CHECK(resolves_to(out, "/step_00000010", "short"));
    report("checkpoints: wrong links, leftovers, full disk", failed, 0);

    // 29: weights of one save with moments of another
    failed = 0;
    real value = 1;
    SafeTensorOut w = {"w", 1, {1}, ST_F32, &value};
    SafeTensors a, b;
    const char* metas[4][5] = {{"step", "200", "save_id", "x1", NULL}, {"step", "100", "save_id", "x1", NULL},
                               {"step", "200", "save_id", "x2", NULL}, {"step", "200", NULL, NULL, NULL}};
    const char* words[4] = {NULL, "of step 200 but", "different saves (x1, x2)", "not resumed"};
    for (int i = 0; i < 4; i++) {
        CHECK(safetensors_write(scratch("m.safetensors"), &w, 1, metas[0], &err) &&
              safetensors_write(scratch("o.safetensors"), &w, 1, metas[i], &err));
        CHECK(safetensors_open(&a, scratch("m.safetensors"), &err) &&
              safetensors_open(&b, scratch("o.safetensors"), &err));
        CHECK(words[i] ? !checkpoint_same_save(&a, &b, &err) && one_line(err.text, words[i])
                       : checkpoint_same_save(&a, &b, &err));
        CHECK(i != 1 || strstr(err.text, "of step 100"));
        safetensors_close(&a), safetensors_close(&b);
    }
    report("checkpoints: files of different saves", failed, 0);
    #undef CHECK
}

void test_files(void) {
    test_safetensors_rows();
    char text[4096] = "";
    int code = in_child(cut_and_poke, (void*)(uintptr_t)scratch("poke.safetensors"), text, sizeof text);
    if (code) fprintf(stderr, "%s\n", text);
    report("safetensors: every prefix, every header byte", code, 0);
    test_other_files();
    test_changing_files();
    test_round_trips();
    test_config_files();
    test_checkpoints();
}
