// fuzz.c: every reader of files from outside under random changes of valid files (make fuzz).
//
//   fuzz                   the readers' names            fuzz NAME SECONDS     change inputs for that long
//   fuzz NAME FILE...      run the reader on these files, such as the fuzz_NAME.crash that a failure leaves
//   fuzz NAME 0 DIR        write the valid files it begins with into DIR
//
// Built with -fsanitize=address,undefined and -fsanitize-coverage=trace-pc: an input that reaches a place in
// the
// program no input reached before is kept and changed further. With clang's libFuzzer (-DLIBFUZZER
// -fsanitize=fuzzer) the same functions run under its changes: FUZZ=NAME ./fuzz DIR.
// A reader fails when it crashes, takes longer than 2 seconds, allocates more than twice the file and 16 MiB,
// gives an
// error that is not one line, or accepts a file of which one of the properties below does not hold.
#define SSM_NO_MAIN
// defines: the readers
#include "../../train_mamba.c"
#include <sys/mman.h>

// of AddressSanitizer's runtime (sanitizer/allocator_interface.h, which gcc does not install)
int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void*, size_t),
                                              void (*on_free)(const volatile void*));
size_t __sanitizer_get_allocated_size(const volatile void*);

enum { INPUT_MAX = 1 << 16, MAX_KEPT = 1 << 14, MAP = 1 << 16, MEMORY = 16 << 20 };

static const char* target_name = "";
static const unsigned char* input;          // the one that is running
static size_t input_size;

static void write_crash(void) {
    char path[128];
    snprintf(path, sizeof path, "fuzz_%s.crash", target_name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || write(fd, input, input_size) != (ssize_t)input_size) return;
    close(fd);
    dprintf(2, "fuzz: the input of %zu bytes is in %s\n", input_size, path);
}

static void on_abort(int number) {
    if (number == SIGALRM) dprintf(2, "fuzz: %s: more than 2 seconds\n", target_name);
    write_crash();
    _exit(1);
}

// must: a property; what does not hold ends the program
#define must(condition) (condition ? (void)0 : property_broken(#condition, __LINE__))
static void property_broken(const char* condition, int line) {
    fprintf(stderr, "fuzz: %s: line %d: broken: %s\n", target_name, line, condition);
    abort();
}

static void one_line_error(bool ok, const Error* err) {
    if (ok) return;
    size_t n = strlen(err->text);
    must(n > 0 && n < sizeof err->text);
    for (size_t i = 0; i < n; i++) must((unsigned char)err->text[i] >= 32);
}

// --- memory: what is allocated now, and the most since the last reset

static size_t live, peak;
static void on_malloc(const volatile void* p, size_t n) {
    (void)p;
    live += n;
    if (live > peak) peak = live;
}
static void on_free(const volatile void* p) {
    size_t n = p ? __sanitizer_get_allocated_size(p) : 0;
    live = live > n ? live - n : 0;
}

// --- files: in memory where a path is enough, in a directory of /dev/shm where a name is

static int memory_fd = -1;
static char memory_path[64], directory[64];

static const char* put_memory(const unsigned char* data, size_t n) {
    if (ftruncate(memory_fd, 0) != 0 || pwrite(memory_fd, data, n, 0) !=
        (ssize_t)n) die("fuzz: cannot write");
    return memory_path;
}

static const char* put_named(const char* name, const void* data, size_t n) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, data, n) != (ssize_t)n) die("fuzz: cannot write %s", path);
    close(fd);
    return path;
}

// --- what must hold for any table of tensors that a reader accepts, with sizes in 128 bits

typedef unsigned __int128 wide;

static void check_tensors(const SafeTensors* st, uint64_t file_size, bool tiled) {
    wide sum = 0;
    for (int i = 0; i < st->n; i++) {
        const SafeTensor* t = st->tensor + i;
        wide product = st_dtype[t->dtype].size, count = 1;
        must(t->ndim >= 0 && t->ndim <= ST_MAX_DIMS);
        for (int k = 0; k < t->ndim; k++) must(t->shape[k] >= 0);
        for (int k = 0; k < t->ndim; k++) product *= (wide)t->shape[k], count *= (wide)t->shape[k];
        must(count == t->count && product == (wide)t->end - t->begin && t->begin <= t->end);
        must((wide)file_of(st, t)->data_start + t->end <= (wide)file_of(st, t)->info.st_size);
        if (i) must(strcmp(st->tensor[i - 1].name, t->name) < 0);
        must(safetensors_find(st, t->name) == t);
        sum += product;
    }
    if (tiled) must(sum + st->data_start == file_size);
}

// ... and every tensor can be read, or the reader says why not
static void read_tensors(const SafeTensors* st) {
    Error err;
    for (int i = 0; i < st->n; i++) {
        const SafeTensor* t = st->tensor + i;
        if (t->dtype > ST_BOOL || t->count > INPUT_MAX) continue;
        void* out = malloc(t->count * 8 + 1);
        bool ok = t->dtype <= ST_BF16 ? safetensors_read_real(st, t, (real*)out, &err)
                                      : safetensors_read_int(st, t, (int64_t*)out, &err);
        one_line_error(ok, &err);
        free(out);
    }
}

static void fuzz_safetensors(const unsigned char* data, size_t n) {
    SafeTensors st;
    Error err;
    bool ok = safetensors_open(&st, put_memory(data, n), &err);
    one_line_error(ok, &err);
    if (!ok) return;
    check_tensors(&st, n, true);
    for (int i = 0; i < 2 * st.n_meta; i++) must(strlen(st.meta[i]) <= n);
    read_tensors(&st);
    safetensors_close(&st);
}

// a header alone, so that changes need not match its length: 30 bytes of data follow it
static void fuzz_header(const unsigned char* data, size_t n) {
    static unsigned char file[8 + INPUT_MAX + 30];
    uint64_t length = n;
    memcpy(file, &length, 8);
    memcpy(file + 8, data, n);
    memset(file + 8 + n, 0, 30);
    fuzz_safetensors(file, n + 38);
}

static void fuzz_zip(const unsigned char* data, size_t n) {
    SafeTensors st;
    Error err;
    Zip zip = {memory_fd, put_memory(data, n), n, 0, NULL, NULL, 0};
    bool ok = zip_open(&zip, &err);
    one_line_error(ok, &err);
    for (int i = 0; ok && i < zip.n; i++) {    // header and bytes of an entry: in the file, and nobody else's
        const ZipEntry *e = zip.entry + i, *other = zip.entry;
        must(e->header < e->at && (wide)e->at + e->size <= n);
        for (; other < zip.entry + zip.n; other++)
            must(other == e || e->at + e->size <= other->header || other->at + other->size <= e->header);
    }
    zip_close(&zip);
    ok = pickle_open(&st, memory_path, &err);
    one_line_error(ok, &err);
    if (!ok) return;
    check_tensors(&st, n, false);
    for (int i = 0; i < st.n; i++) {             // at most two names for the same bytes, no other overlap
        int same = 0;
        const SafeTensor *s = st.tensor + i, *t = st.tensor;
        for (; t < st.tensor + st.n && s->begin < s->end; t++) {
            bool apart = t->end <= s->begin || s->end <= t->begin;
            must(apart || (t->begin == s->begin && t->end == s->end));
            same += !apart;
        }
        must(same <= 2);
    }
    read_tensors(&st);
    safetensors_close(&st);
}

// a pickle alone, so that changes need not match a CRC: its storages are those of a fixed archive
static Zip fixed_zip;
static void fuzz_pickle(const unsigned char* data, size_t n) {
    SafeTensors st;
    Error err;
    memset(&st, 0, sizeof st);
    st.fd = -1;
    st.path = strdup(fixed_zip.path);
    st.info.st_size = (off_t)fixed_zip.size;
    unsigned char* text = (unsigned char*)malloc(n);         // of this size, so that a read behind it is seen
    memcpy(text, data, n);
    bool ok = pickle_parse(&st, &fixed_zip, text, n, &err) && pickle_check(&st, &err);
    free(text);
    one_line_error(ok, &err);
    if (ok) check_tensors(&st, 0, false);
    for (int i = 0; ok && i < st.n; i++) {       // inside one storage
        bool inside = st.tensor[i].begin == st.tensor[i].end;
        for (int k = 0; k < fixed_zip.n; k++) {
            const ZipEntry* e = fixed_zip.entry + k;
            inside = inside || (st.tensor[i].begin >= e->at && st.tensor[i].end <= e->at + e->size);
        }
        must(inside);
    }
    safetensors_close(&st);
}

static void fuzz_index(const unsigned char* data, size_t n) {
    SafeTensors st;
    Error err;
    bool ok = index_open(&st, directory, put_memory(data, n), false, &err);
    one_line_error(ok, &err);
    if (!ok) return;
    int sum = 0;
    for (int i = 0; i < st.n_parts; i++) {
        const char* base = strrchr(st.parts[i].path, '/');
        must(strlen(st.parts[i].path) == strlen(directory) + strlen(base));
        // nothing but the directory itself
        sum += st.parts[i].n;
    }
    must(sum == st.n && st.n > 0);
    check_tensors(&st, 0, false);
    read_tensors(&st);
    safetensors_close(&st);
}

static void fuzz_config(const unsigned char* data, size_t n) {
    Config c, again;
    Error err;
    put_named("config.json", data, n);
    bool ok = config_read(&c, directory, &err);
    one_line_error(ok, &err);
    if (!ok) return;
    must(config_check(&c, &err));
    must((wide)c.n_layer * (wide)c.d_model * (wide)c.d_inner * 3 < (wide)1 << 40);
    must(config_write(&c, -1, "float32", directory, &err));              // decode(encode(x)) = x
    must(config_read(&again, directory, &err));
    for (int i = 0; i < N_CONFIG_FIELDS; i++) {
        const ConfigField* f = config_fields + i;
        must(!config_has(&c, f) ||
             memcmp((char*)&c + f->offset, (char*)&again + f->offset, config_field_size(f)) == 0);
    }
    must(strcmp(c.pattern, again.pattern) == 0 && c.vocab_size == again.vocab_size &&
         c.vocab_padded == again.vocab_padded && c.eos_token == again.eos_token);
}

static void fuzz_tokenizer(const unsigned char* data, size_t n) {
    static const char* const texts[] = {"", "abc ab  a", "It's 20.\n\n  na\xc3\xafve <|endoftext|> \xcc\x81",
                                        "\xff\xc3 \xe2\x82"};
    Tokenizer t;
    Error err;
    memset(&t, 0, sizeof t);
    put_named("tokenizer.json", data, n);
    bool ok = tokenizer_read(&t, directory, &err);
    one_line_error(ok, &err);
    for (int i = 0; ok && i < 4; i++) {
        char piece[TOKENIZER_MAX_TEXT];
        Utf8Stream stream;
        Encoder e;
        TokenList list = {NULL, 0, 0};
        memset(&stream, 0, sizeof stream);
        encoder_open(&e, &t);
        one_line_error(encoder_add(&e, texts[i], strlen(texts[i]), true, &list, &err), &err);
        for (size_t k = 0; k < list.n; k++) {
            must(list.id[k] >= 0 && list.id[k] < t.vocab_size);
            must(tokenizer_decode(&t, &stream, list.id[k], piece) <= sizeof piece);
        }
        encoder_close(&e);
        free(list.id);
    }
    if (ok) tokenizer_free(&t);
}

static void fuzz_shard(const unsigned char* data, size_t n) {
    static int tokens[INPUT_MAX];
    Tokenizer t;
    Dataset d;
    Error err;
    tokenizer_bytes(&t);
    char* paths[] = {strdup(put_named("tokens.bin", data, n))};
    bool ok = dataset_open(&d, paths, 1, &t, &err);
    one_line_error(ok, &err);
    if (ok) {
        must(1024 + 2 * (wide)d.n_tokens == n || 1024 + 4 * (wide)d.n_tokens == n);
        ok = dataset_read(&d, 0, d.n_tokens, tokens, &err);
        one_line_error(ok, &err);
        for (int64_t i = 0; ok && i < d.n_tokens; i++) must(tokens[i] >= 0 && tokens[i] < t.vocab_size);
        dataset_close(&d);
    }
    free(paths[0]);
}

static void fuzz_items(const unsigned char* data, size_t n) {
    static const char* const tasks[] = {"choice", "lambada"};
    Tokenizer tok;
    Options o;
    memset(&o, 0, sizeof o);
    tokenizer_bytes(&tok);
    o.data = put_named("items.jsonl", data, n);
    for (int task = 0; task < 2; task++) {
        Items f;
        Error err;
        int64_t T, longest = 0;
        o.task = tasks[task];
        bool ok = items_open(&f, &tok, &o, &T, &err);
        one_line_error(ok, &err);
        for (Item item; ok && items_next(&f, &item, &err); item_free(&item)) {
            must(item.n >= 1 + (task == 0) && item.gold >= 0 && item.gold < item.n && item.context.n > 0);
            for (int i = 0; i < item.n; i++) {
                const TokenList* ids = &item.choice[i].ids;
                int64_t length = (int64_t)(item.context.n + ids->n) - 1;
                if (length > longest) longest = length;
                // the ids are bytes: those of the choice, with what the context has given it
                must(ids->n >= 1 && (double)ids->n >= item.choice[i].bytes);
                must(item.choice[i].chars <= item.choice[i].bytes);
                for (size_t k = 0; k < ids->n; k++) must(ids->id[k] >= 0 && ids->id[k] < tok.vocab_size);
            }
        }
        must(!ok || (longest == T && !err.text[0]));            // the second reading finds the same
        items_close(&f);
    }
}

static void fuzz_prompts(const unsigned char* data, size_t n) {
    for (int json = 0; json < 2; json++) {
        PromptList list;
        Error err;
        bool ok = prompts_read(&list, put_named(json ? "p.jsonl" : "p.txt", data, n), &err);
        one_line_error(ok, &err);
        size_t lines = 0, bytes = 0;
        for (size_t i = 0, begin = 0; i <= n; i++) {
            if (i < n && data[i] != '\n') continue;
            size_t end = i;
            while (end > begin && data[end - 1] == '\r') end--;
            if (end > begin && !json && ok)                     // lines are taken as they are
                must(prompts_size(&list, lines) == end - begin &&
                     memcmp(list.text + list.start[lines], data + begin, end - begin) == 0);
            lines += end > begin;
            begin = i + 1;
        }
        must(!ok || list.n == lines);
        for (size_t i = 0; ok && i < list.n; i++) bytes += prompts_size(&list, i) + 1;
        must(!ok || (bytes == list.start[list.n] && bytes <= n + 1));
        prompts_free(&list);
    }
}

// the tokenizer.json of bytes, with two merges and GPT-2's expression; to be freed
static char* merges_json(void) {
    Tokenizer bytes;
    Error err;
    char path[128];
    memset(&bytes, 0, sizeof bytes);
    tokenizer_bytes(&bytes);
    if (!tokenizer_write(&bytes, directory, &err)) die("fuzz: %s", err.text);
    snprintf(path, sizeof path, "%s/tokenizer.json", directory);
    size_t size;
    char* text = read_text(path, INPUT_MAX, &size, &err);
    if (!text) die("fuzz: %s", err.text);
    static const char* const edits[][2] = {
        {"\"vocab\": {", "\"vocab\": {\"ab\": 257, \"abc\": 258, "},
        {"\"merges\": []", "\"merges\": [\"a b\", \"ab c\"]"},
        {"\"use_regex\": false", "\"use_regex\": true"}};
    for (int i = 0; i < 3; i++) {
        char *at = strstr(text, edits[i][0]), *more = NULL;
        if (!at || asprintf(&more, "%.*s%s%s", (int)(at - text), text, edits[i][1],
                            at + strlen(edits[i][0])) < 0)
            die("fuzz: tokenizer.json is written otherwise");
        free(text);
        text = more;
    }
    return text;
}

static bool add_ids(void* to, const int* ids, size_t n, int64_t at, Error* err) {
    (void)at, (void)err;
    for (size_t i = 0; i < n; i++) token_add((TokenList*)to, ids[i]);
    return true;
}

// valid_text: appends what UTF-8 becomes when it is read
static void valid_text(Text* out, const char* text, size_t n) {
    Utf8Stream stream;
    char piece[TOKENIZER_MAX_TEXT];
    memset(&stream, 0, sizeof stream);
    for (size_t i = 0; i < n; i++) text_append(out, piece, utf8_push(&stream, (unsigned char)text[i], piece));
    text_append(out, piece, tokenizer_flush(&stream, piece));
}

// documents_expected: the texts of a file, by another way, each after the end token's; false: one of JSON
// lines is none
static bool documents_expected(Text* out, const char* text, size_t n, bool json) {
    if (!json) {
        text_append(out, END_TEXT, strlen(END_TEXT));
        valid_text(out, text, n);
    }
    for (size_t at = 0, end; json && at < n; at = end + 1) {
        for (end = at; end < n && text[end] != '\n';) end++;
        if (strspn(text + at, " \t\r") >= end - at) continue;
        json_t* root = json_loadb(text + at, end - at, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, NULL);
        const json_t* value = json_object_get(root, "text");
        bool found = json_is_string(value);
        if (found) {
            text_append(out, END_TEXT, strlen(END_TEXT));
            valid_text(out, json_string_value(value), json_string_length(value));
        }
        json_decref(root);
        if (!found) return false;
    }
    return true;
}

// texts and JSON lines of documents: their ids are those of the same text, wherever it is cut
static void fuzz_documents(const unsigned char* data, size_t n) {
    static Tokenizer tok;
    Error err;
    if (!tok.bpe) {                      // is kept
        char* json = merges_json();
        put_named("tokenizer.json", json, strlen(json));
        if (!tokenizer_read(&tok, directory, &err) || tok.kind != TOKENIZER_BPE) die("fuzz: %s", err.text);
        free(json);
    }
    char* text = (char*)malloc(n + 1);
    memcpy(text, data, n);
    text[n] = 0;
    for (int i = 0; i < 4; i++) {
        bool json = i & 1;
        Text expected = {NULL, 0, 0, false}, found = {NULL, 0, 0, false};
        TokenList ids = {NULL, 0, 0};
        TextFile f = text_file(put_memory(data, n), memory_fd, (int64_t)n, &tok, tok.eos);
        f.json_lines = json;
        f.border = i < 2 ? 0 : (int64_t)(n / 2);
        bool ok = text_file_tokens(&f, add_ids, &ids, &err);
        one_line_error(ok, &err);
        bool valid = documents_expected(&expected, text, n, json);
        must(!ok || valid);
        must(ok || json);
        for (size_t k = 0; ok && k < ids.n; k++) {
            Utf8Stream raw = {{0}, 0, true, 0};
            char piece[TOKENIZER_MAX_TEXT];
            must(ids.id[k] >= 0 && ids.id[k] < tok.vocab_size);
            text_append(&found, piece, tokenizer_decode(&tok, &raw, ids.id[k], piece));
        }
        must(!ok || found.n == expected.n);
        must(!ok || found.n == 0 || memcmp(found.data, expected.data, found.n) == 0);
        free(expected.data);
        free(found.data);
        free(ids.id);
    }
    free(text);
}

// --- the readers, with words that their changes insert

typedef struct {
    const char* name;
    void (*run)(const unsigned char*, size_t);
    const char* words;               // separated by blanks
} Target;
static const Target targets[] = {
    {"safetensors", fuzz_safetensors,
     "\"dtype\":\"BF16\" \"shape\":[2,3] \"data_offsets\":[0,24] \"__metadata__\":{} "
     "9223372036854775807 -1 0 [ ] { } , : \" \\u0000 4294967296 F64 U8 I64 1e3"},
    {"header", fuzz_header, "\"dtype\":\"BF16\" \"shape\":[2,3] \"data_offsets\":[0,24] \"__metadata__\":{} "
     "9223372036854775807 -1 0 [ ] { } , : \" \\u0000 4294967296 F64 U8 I64 1e3"},
    {"zip", fuzz_zip, "PK\1\2 PK\3\4 PK\5\6 PK\6\6 PK\6\7 \377\377\377\377 ../ m/data/0 data.pkl"},
    {"pickle", fuzz_pickle,
     "ctorch\nFloatStorage\n ctorch\nHalfStorage\n ccollections\nOrderedDict\n)R \205 \206 \207 t ( "
     "ctorch._utils\n_rebuild_tensor_v2\n ctorch._utils\n_rebuild_parameter\n q\1 h\1 r\1\1\1\1 "
     "} s u b N \210 \211 Q R . "
     "X\7\1\1\1storage \212\10\377\377\377\377\377\377\377\377 J\377\377\377\377 K\2 M\1\1"},
    {"index", fuzz_index,
     "\"weight_map\": m-1.safetensors m-2.safetensors ../ d/ / \" { } , : \"a\": \"c\": null \\u0000"},
    {"config", fuzz_config,
     "\"d_model\": \"hidden_size\": \"model_type\": \"mamba\" \"ssm_cfg\":{ \"expand\": \"dt_rank\": "
     "Infinity NaN -1 0 1e999 9223372036854775807 \"ssm_c\":{ \"pattern\":\"1m\" \"d_intermediate\": null "
     "true \"auto\" \"vocab_size\": \"pad_vocab_size_multiple\": \"eos_token_id\": \"norm_eps\": "
     "\"tie_word_embeddings\": [ ] \"mamba2\" \"layer\":\"Mamba2\" \"attn_layer_idx\":[1] \"attn_cfg\":{ "
     "\"causal\":true \"num_heads\": \"num_heads_kv\": \"head_dim\": \"headdim\": \"n_groups\": \"d_ssm\": "
     "\"time_step_limit\": \"dt_limit\": \"A_init_range\": \"mlp_dim\": {\"__float__\":\"Infinity\"} "
     "\"12am\""},
    {"tokenizer", fuzz_tokenizer, "\"merges\": \"vocab\": \"a\" \"ab\" \"type\": \"Split\" \"Regex\": "
     "\"Sequence\" \"NFC\" "
     "\"added_tokens\": \"id\": \"content\": { } [ ] , : 0 256 257 -1 1e9 true null \"(a+)+b\" "
     "\"\\\\p{L}+\" \\u0120"},
    {"shard", fuzz_shard, "\1 \2 \377\377 \7 20240520"},
    {"items", fuzz_items, "\"context\": \"choices\": \"gold\": \"text\": [ ] { } , : \" \\u0000 \\u2003 "
     "\\ud83d \n 0 1 -1 1e9 true null \"a\", \"\", \342\200\203 \302\240"},
    {"documents", fuzz_documents, "{\"text\":\"a\"} \n abc <|endoftext|> \" \\u0000 \\ud83d\\ude00 { } [ ] : "
     ", \303\251 \314\201 \377 \r\n"},
    {"prompts", fuzz_prompts, "{\"prompt\":\"a\"} \n \r\n \" \\u0000 { } [ ] : , null"},
};
enum { N_TARGETS = sizeof targets / sizeof *targets };

static void run_one(const Target* t, const unsigned char* data, size_t n) {
    input = data, input_size = n;
    size_t before = live;
    peak = live;
    alarm(2);
    t->run(data, n);
    alarm(0);
    must(peak - before <= 2 * n + MEMORY);
}

// --- valid files to begin with

static void prepare(void) {
    static real values[32] = {1, 2, 3, 4, 5, 6};
    SafeTensorOut t[4] =
        {{"a", 2, {2, 3}, ST_F32, values}, {"b", 1, {2}, ST_BF16, values}, {"c", 0, {0}, ST_F16, values},
                          {"lm_head", 2, {2, 3}, ST_F32, values}};
    const char* meta[] = {"format", "pt", NULL};
    char path[128];
    Error err;
    memory_fd = memfd_create("fuzz", 0);
    snprintf(memory_path, sizeof memory_path, "/proc/self/fd/%d", memory_fd);
    snprintf(directory, sizeof directory, "/dev/shm/fuzz_XXXXXX");
    if (memory_fd < 0 || !mkdtemp(directory)) die("fuzz: no place for files");
    bool ok = true;
    const char* names[] = {"m-1.safetensors", "m-2.safetensors", "all.safetensors", "all.bin"};
    for (int i = 0; i < 3 && ok; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        ok = safetensors_write(path, i == 1 ? t + 1 : t, i == 2 ? 3 : i + 1, meta, &err);
    }
    snprintf(path, sizeof path, "%s/d", directory);          // its file is not to be reached
    ok = ok && mkdir(path, 0700) == 0;
    snprintf(path, sizeof path, "%s/d/%s", directory, names[0]);
    ok = ok && safetensors_write(path, t, 1, meta, &err);
    snprintf(path, sizeof path, "%s/%s", directory, names[3]);
    ok = ok && pickle_write(path, t, 4, &err);
    static char zip_path[128];
    struct stat info;
    snprintf(zip_path, sizeof zip_path, "%s", path);
    Zip zip = {open(path, O_RDONLY), zip_path, 0, 0, NULL, NULL, 0};
    if (ok && fstat(zip.fd, &info) == 0) zip.size = (uint64_t)info.st_size;
    ok = ok && zip_open(&zip, &err);
    if (!ok) die("fuzz: %s", err.text);
    fixed_zip = zip;
}

#ifdef __clang__                     // PLAIN: runs before the sanitizer does
#define PLAIN __attribute__((no_sanitize("coverage", "address", "undefined")))
#else
#define PLAIN __attribute__((no_sanitize_coverage, no_sanitize_address, no_sanitize_undefined))
#endif

static const Target* target_find(const char* name) {
    for (int i = 0; i < N_TARGETS; i++) if (strcmp(targets[i].name, name) == 0) return targets + i;
    die("fuzz: there is no reader '%s'", name);
}

static void start(const char* name) {
    target_name = target_find(name)->name;
    signal(SIGABRT, on_abort);
    signal(SIGALRM, on_abort);
    prepare();
    __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
}

PLAIN const char* __asan_default_options(void);
PLAIN const char* __asan_default_options(void) {
    return "abort_on_error=1:handle_abort=0:detect_leaks=0:allocator_may_return_null=1";
}
PLAIN const char* __ubsan_default_options(void);
PLAIN const char* __ubsan_default_options(void) { return "abort_on_error=1:halt_on_error=1"; }

// --- coverage and inputs

#ifndef LIBFUZZER
static unsigned char map[MAP], seen[MAP];
PLAIN void __sanitizer_cov_trace_pc(void);
PLAIN void __sanitizer_cov_trace_pc(void) {
    uintptr_t at = (uintptr_t)__builtin_return_address(0);
    map[(at ^ at >> 16) % MAP] = 1;
}

typedef struct { unsigned char* data; size_t n; } Input;
static Input kept[MAX_KEPT];
static int n_kept;
static uint64_t random_at;
static uint64_t random_below(uint64_t n) { return random_bits(1, 77, random_at++) % n; }

static void keep(const unsigned char* data, size_t n) {
    if (n_kept == MAX_KEPT) return;
    kept[n_kept].data = (unsigned char*)malloc(n + 1);
    memcpy(kept[n_kept].data, data, n);
    kept[n_kept++].n = n;
}

// change: a few random edits of an input; returns its new size
static size_t change(unsigned char* data, size_t n, const Target* t) {
    static const uint64_t values[] =
        {0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0xffffffff, 1ull << 32, 1ull << 61,
                                      1ull << 62, INT64_MAX, 1ull << 63, UINT64_MAX};
    for (uint64_t edits = 1 + random_below(4); edits; edits--) {
        size_t at = n ? random_below(n) : 0, from = n ? random_below(n) : 0, length = 1 + random_below(16);
        if (random_below(8) == 0) length = 1 + random_below(n + 1);
        switch (random_below(10)) {
            case 0: if (n) data[at] ^= (unsigned char)(1 << random_below(8)); break;
            case 1: if (n) data[at] = (unsigned char)random_below(256); break;
            case 2: case 3: {        // a number: a special one, or the old one and a little
                size_t bytes = (size_t)1 << random_below(4);
                uint64_t value = 0;
                if (at + bytes > n) break;
                memcpy(&value, data + at, bytes);
                bool twice = at + 2 * bytes <= n && memcmp(data + at, data + at + bytes, bytes) == 0;
                value = random_below(2) ? values[random_below(14)] : value + random_below(17) - 8;
                memcpy(data + at, &value, bytes);
                if (twice && random_below(2)) memcpy(data + at + bytes, &value, bytes);      // stay equal
                break;
            }
            case 4:                  // remove
                if (length > n - at) length = n - at;
                memmove(data + at, data + at + length, n - at - length);
                n -= length;
                break;
            case 5: case 6: {        // insert a word, a digit, or a piece of this or another input
                static unsigned char piece[INPUT_MAX];
                const char* words = t->words;
                size_t count = 1;
                for (const char* w = words; *w; w++) count += *w == ' ';
                size_t which = random_below(count + 4);
                if (which < count) {
                    while (which--) words = strchr(words, ' ') + 1;
                    length = strcspn(words, " ");
                    memcpy(piece, words, length);
                } else if (which == count) {
                    piece[0] = (unsigned char)('0' + random_below(10)), length = 1;
                } else {
                    const Input* other = &kept[random_below((uint64_t)n_kept)];
                    if (other->n == 0) break;
                    from = random_below(other->n);
                    if (length > other->n - from) length = other->n - from;
                    memcpy(piece, other->data + from, length);
                }
                if (n + length > INPUT_MAX) break;
                memmove(data + at + length, data + at, n - at);
                memcpy(data + at, piece, length);
                n += length;
                break;
            }
            case 8: case 9: {        // from a byte to the next that is the same: an item of a list
                const unsigned char* next = n ? (unsigned char*)memchr(data + at + 1, data[at], n - at - 1)
                    : NULL;
                if (!next) break;
                length = (size_t)(next - data) - at;
                if (random_below(2)) {
                    memmove(data + at, next, n - at - length);
                    n -= length;
                } else if (n + length <= INPUT_MAX) {
                    memmove(data + at + length, data + at, n - at);
                    n += length;
                }
                break;
            }
            case 7:                  // copy inside
                if (length > n - at) length = n - at;
                if (length > n - from) length = n - from;
                memmove(data + at, data + from, length);
                break;
        }
    }
    return n;
}

static void keep_file(const char* name) {
    static unsigned char data[INPUT_MAX];
    char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE* f = fopen(path, "rb");
    if (f) keep(data, fread(data, 1, sizeof data, f)), fclose(f);
}

static void keep_text(const char* text) { keep((const unsigned char*)text, strlen(text)); }

static void seeds(const Target* t) {
    if (t->run == fuzz_safetensors) keep_file("all.safetensors"), keep_file("m-2.safetensors");
    if (t->run == fuzz_zip) keep_file("all.bin");
    if (t->run == fuzz_header)
        keep_text("{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],"
                  "\"data_offsets\":[0,24]},\"b\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[24,28]"
                  "},\"c\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[28,30]}}");
    if (t->run == fuzz_pickle) {
        const ZipEntry* e = zip_find(&fixed_zip, "data.pkl", "", 0);
        unsigned char* text = (unsigned char*)malloc(e->size);
        if (!read_exact(fixed_zip.fd, text, e->size, e->at)) die("fuzz: no pickle");
        keep(text, e->size);
        keep_text("\x80\2ccollections\nOrderedDict\n)Rq\1.");
        free(text);
    }
    if (t->run == fuzz_tokenizer) {      // bytes, and bytes with two merges
        char* merges = merges_json();
        keep_file("tokenizer.json");     // the one of bytes, which it was made from
        keep_text(merges);
        free(merges);
    }
    if (t->run == fuzz_shard) {
        int32_t shard[256 + 8] = {20240801, 7, 8};
        keep((unsigned char*)shard, sizeof shard);
        shard[0] = 20240520, shard[1] = 1;
        keep((unsigned char*)shard, sizeof shard - 16);
    }
    if (t->run == fuzz_items)
        keep_text("{\"context\": \"The sky is \", \"choices\": [\"blue\", \"a long way\"], \"gold\": 0}\n\n"
                  "{\"gold\": 1, \"context\": \"\", \"choices\": [\"x\", \"\\u00e9\"], \"id\": [1, {}]}\n"),
        keep_text("{\"text\": \"one two three\"}\r\n{\"text\": \"word\"}");
    if (t->run == fuzz_documents)
        keep_text("{\"text\": \"one abc\\u00e9 two\", \"x\": [1, {}]}\n\n"
                  "{\"id\": 3, \"text\": \"\"}\r\n"),
        keep_text("It's 20 abc.\n\n  na\xc3\xafve <|endoftext|> \xff\n");
    if (t->run == fuzz_prompts)
        keep_text("{\"prompt\": \"one\\ntwo\"}\r\n\n{\"id\": 3, \"prompt\": \"\"}"),
        keep_text("a b\n\nc\r\n\rd");
    if (t->run == fuzz_index)
        keep_text("{\"weight_map\":{\"\":\"\",\"\":\"\",\"\":\"\",\"\":\"\",\"\":\"\","
                  "\"\":\"\",\"\":\"\",\"\":\"\"}}");
    if (t->run == fuzz_index)
        keep_text("{\"metadata\": {\"total_size\": 24}, \"weight_map\": {\"a\": \"m-1.safetensors\", \"b\": "
                  "\"m-2.safetensors\", \"c\": \"m-2.safetensors\"}}");
    if (t->run == fuzz_config) {
        keep_text("{\"d_model\": 64, \"n_layer\": 2, \"vocab_size\": 101, \"ssm_cfg\": {\"d_state\": 8}, "
                  "\"rms_norm\": true, \"pad_vocab_size_multiple\": 8}");
        keep_text("{\"model_type\": \"mamba\", \"hidden_size\": 64, \"num_hidden_layers\": 2, "
                  "\"state_size\": 16, "
                  "\"conv_kernel\": 4, \"expand\": 2, \"time_step_rank\": \"auto\", \"vocab_size\": 104, "
                  "\"eos_token_id\": 0, "
                  "\"layer_norm_epsilon\": 1e-05, \"time_step_limit\": [0.0, Infinity], "
                  "\"tie_word_embeddings\": true}");
        keep_text("{\"model_type\": \"mamba2\", \"hidden_size\": 32, \"num_hidden_layers\": 2, "
                  "\"n_groups\": 2, \"num_heads\": 8, \"head_dim\": 8, \"chunk_size\": 16, "
                  "\"vocab_size\": 104, \"time_step_limit\": [0.0, Infinity]}");
        keep_text("{\"d_model\": 48, \"n_layer\": 6, \"vocab_size\": 101, \"d_intermediate\": 100, "
                  "\"ssm_cfg\": {\"layer\": \"Mamba2\", \"headdim\": 8, \"dt_limit\": [0.0, 0.1]}, "
                  "\"attn_layer_idx\": [2, 5], \"attn_cfg\": {\"causal\": true, \"num_heads\": 4, "
                  "\"num_heads_kv\": 2, \"mlp_dim\": 100, \"rotary_emb_dim\": 8, \"softmax_scale\": null}}");
    }
}

int main(int argc, char** argv) {
    static unsigned char data[2 * INPUT_MAX];
    if (argc < 2) {
        for (int i = 0; i < N_TARGETS; i++) printf("%s\n", targets[i].name);
        return 0;
    }
    const Target* t = target_find(argv[1]);
    double seconds = argc > 2 ? atof(argv[2]) : 10;
    start(argv[1]);
    seeds(t);
    if (argc == 4 && strcmp(argv[2], "0") == 0) {
        for (int i = 0; i < n_kept; i++) {
            snprintf(directory, sizeof directory, "%s", argv[3]);
            char name[32];
            snprintf(name, sizeof name, "seed%d", i);
            put_named(name, kept[i].data, kept[i].n);
        }
        return 0;
    }
    if (argc > 2 && seconds <= 0) {
        for (int i = 2; i < argc; i++) {
            FILE* f = fopen(argv[i], "rb");
            if (!f) die("%s: %s", argv[i], strerror(errno));
            run_one(t, data, fread(data, 1, INPUT_MAX, f));
            fclose(f);
        }
        return 0;
    }
    double begin = seconds_now(), newest = begin;
    int64_t runs = 0;
    int edges = 0;
    for (int next = 0; seconds_now() - begin < seconds; runs++) {
        const Input* from = &kept[next < n_kept ? next : (int)random_below((uint64_t)n_kept)];
        size_t n = from->n;
        memcpy(data, from->data, n);
        if (next++ >= 2) n = change(data, n, t);      // the seeds as they are
        memset(map, 0, sizeof map);
        run_one(t, data, n);
        int fresh = 0;
        for (int i = 0; i < MAP; i++) if (map[i] && !seen[i]) seen[i] = 1, fresh++;
        if (fresh) edges += fresh, newest = seconds_now(), keep(data, n);
    }
    printf("%-12s %9lld inputs, %6.0f per second, %5d places, %4d kept, the last after %.0f of %.0f s\n",
           t->name,
           (long long)runs, (double)runs / seconds, edges, n_kept, newest - begin, seconds);
    zip_close(&fixed_zip);
    char inner[128];
    snprintf(inner, sizeof inner, "%s/d", directory);
    remove_dir(inner), remove_dir(directory);
    return 0;
}
#else
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    static const Target* t = NULL;
    if (!t) {
        start(getenv("FUZZ") ? getenv("FUZZ") : "safetensors");
        t = target_find(target_name);
    }
    if (n <= INPUT_MAX) run_one(t, data, n);
    return 0;
}
#endif
