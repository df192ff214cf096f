// ---------------------------------------------------------------------------------------------------
// test_tokenizer.h: data/bpe.h, data/tokenizer.h and data/tokenize.h. Ids of Hugging Face `tokenizers`
// (fixtures written by dev/reference/check_tokenizer.py), merges against a definition of ten lines, texts
// that come in pieces, decode(encode(x)) = x, tokenizer.json edited in every way that can be wrong, and the
// program: tokenize, training on text with a tokenizer, prompts.

#define TOKENIZER_FIXTURES "dev/reference/fixtures/tokenizers/"

Tokenizer tokenizer_or_die(const char* path) {
    Tokenizer t;
    Error err;
    if (!tokenizer_load(&t, path, &err)) die("%s (run from the repository root)", err.text);
    return t;
}

// encode_pieces: the ids of a text that comes in pieces of 1 .. most bytes
TokenList encode_pieces(const Tokenizer* t, const char* text, size_t n, size_t most, uint64_t seed) {
    Encoder e;
    Error err;
    TokenList list = {NULL, 0, 0};
    encoder_open(&e, t);
    for (size_t i = 0, k; i < n; i += k) {
        k = min_size(n - i, 1 + random_bits(seed, 3, i) % most);
        if (!encoder_add(&e, text + i, k, false, &list, &err)) die("%s", err.text);
    }
    if (!encoder_add(&e, NULL, 0, true, &list, &err)) die("%s", err.text);
    encoder_close(&e);
    return list;
}

bool same_ids(const int* a, size_t n, const int* b, size_t m) {
    return n == m && (n == 0 || memcmp(a, b, n * 4) == 0);
}

// ---- ids of the library, and what they decode to

void test_tokenizer_fixture(const char* name) {
    char path[200], line[1 << 15], claim[120];
    double wrong = 0, decoded = 0, pieces = 0, broken = 0;
    int texts = 0;
    snprintf(path, sizeof path, TOKENIZER_FIXTURES "%s/tokenizer.json", name);
    Tokenizer t = tokenizer_or_die(path);
    snprintf(path, sizeof path, TOKENIZER_FIXTURES "%s/expected.jsonl", name);
    FILE* f = fopen(path, "rb");
    unsigned char* out = (unsigned char*)test_alloc(1 << 16, 1);
    for (; f && fgets(line, sizeof line, f); texts++) {
        json_t* row = json_loads(line, JSON_ALLOW_NUL, NULL);
        const json_t *text = json_object_get(row, "text"), *list = json_object_get(row, "ids"),
                     *back = json_object_get(row, "decoded");
        size_t n = json_string_length(text), m = json_array_size(list), count;
        int* expected = (int*)test_alloc(m + 1, sizeof(int));
        for (size_t i = 0; i < m; i++) expected[i] = (int)json_integer_value(json_array_get(list, i));
        int* ids = tokenizer_encode(&t, json_string_value(text), n, &count);
        if (!same_ids(ids, count, expected, m)) {
            wrong++;
            fprintf(stderr, "  %s, line %d: other ids\n", path, texts + 1);
        }
        size_t k = decode_all(&t, expected, m, false, out, &broken);
        decoded += k != json_string_length(back) || memcmp(out, json_string_value(back), k) != 0;
        for (size_t most = 1; most < 40; most += 12) {
            TokenList piece = encode_pieces(&t, json_string_value(text), n, most, (uint64_t)texts);
            pieces += !same_ids(piece.id, piece.n, expected, m);
            free(piece.id);
        }
        free(ids);
        json_decref(row);
    }
    if (f) fclose(f);
    snprintf(claim, sizeof claim, "%s: texts with other ids than the library's", name);
    report(claim, texts > 0 ? wrong : NAN, 0);
    snprintf(claim, sizeof claim, "%s: ids that decode to another text, or split a character", name);
    report(claim, decoded + broken, 0);
    snprintf(claim, sizeof claim, "%s: texts in pieces with other ids than whole", name);
    report(claim, pieces, 0);
    tokenizer_free(&t);
}

// ---- merges by their definition: again and again the adjacent pair with the lowest rank, the leftmost first

size_t merge_by_definition(const Bpe* b, const char* word, size_t n, int* id) {
    for (size_t i = 0; i < n; i++) id[i] = b->byte_id[(unsigned char)word[i]];
    for (;;) {
        size_t best = n;
        uint32_t rank = UINT32_MAX, made = 0;
        for (size_t i = 0; i + 1 < n; i++)
            for (uint32_t k = 0; k <= b->merge_mask; k++) {
                const Merge* m = &b->merge[k];
                if (m->left == (uint32_t)id[i] && m->right == (uint32_t)id[i + 1] && m->rank < rank)
                    best = i, rank = m->rank, made = m->id;
            }
        if (best == n) return n;
        id[best] = (int)made;
        memmove(id + best + 1, id + best + 2, (--n - best - 1) * sizeof(int));
    }
}

void test_merges(void) {
    Tokenizer t = tokenizer_or_die(TOKENIZER_FIXTURES "neox");
    BpeWork* w = bpe_work(t.bpe);
    TokenList list = {NULL, 0, 0};
    double wrong = 0;
    w->out = &list;
    for (uint64_t trial = 0; trial < 1500; trial++) {
        char word[64];
        int id[64];
        size_t n = 0, room = 1 + random_bits(21, trial, 0) % 60;
        for (uint64_t i = 1; n < room; i++) {    // texts of random tokens: many merges, many that compete
            int token = (int)(random_bits(21, trial, i) % (uint64_t)t.bpe->n_ids);
            size_t k = min_size(t.bpe->length[token], room - n);
            memcpy(word + n, t.bpe->arena + t.bpe->place[token], k);
            n += k;
        }
        size_t m = merge_by_definition(t.bpe, word, n, id);
        for (int again = 0; again < 2; again++) {        // computed, then from the cache
            list.n = 0;
            bpe_word(w, word, n);
            wrong += !same_ids(list.id, list.n, id, m);
        }
    }
    report("merges: words with other ids than by the definition, twice 1,500", wrong, 0);
    const size_t long_word = 1 << 20;
    char* a = (char*)test_alloc(long_word, 1);
    memset(a, 'a', long_word);
    double start = cpu_seconds();
    list.n = 0;
    bpe_word(w, a, long_word);
    report("merges: a word of 1 MiB, seconds", cpu_seconds() - start, SANITIZED ? 20 : 1);
    size_t bytes = 0;
    for (size_t i = 0; i < list.n; i++) bytes += t.bpe->length[list.id[i]];
    report("merges: its bytes, lost or won", bytes == long_word ? 0 : 1, 0);
    free(list.id);
    bpe_work_free(w);
    tokenizer_free(&t);
}

// ---- decode(encode(x)) = x

// any_text: random bytes (valid: only whole characters) with much that tokenizers treat apart
size_t any_text(uint64_t trial, bool valid, char* text, size_t room) {
    static const char* const bits[] = {" ",
                                       "  ",
                                       "\n",
                                       "\r\n",
                                       "'s",
                                       "'LL",
                                       "word",
                                       "<n>",
                                       "<nn>",
                                       "<|end_of_text|>",
                                       "12345",
                                       "\xC2\xA0",
                                       "e\xCC\x81",
                                       "\xE6\x97\xA5",
                                       "\xF0\x9F\x98\x80",
                                       "The",
                                       " the",
                                       "\t",
                                       "_"};
    size_t n = 0;
    for (uint64_t i = 0; n + 32 < room; i++) {
        uint64_t r = random_bits(22, trial, i);
        if (r % 4 == 0) {
            unsigned char code[4];
            int k = encode_code_point((uint32_t)((r >> 8) % 0x110000), code);
            memcpy(text + n, code, (size_t)k);
            n += (size_t)k;
        } else if (r % 4 == 1 && !valid) {
            text[n++] = (char)(r >> 16);
        } else if (r % 4 == 2) {
            text[n++] = (char)(32 + (r >> 16) % 95);
        } else {
            const char* bit = bits[(r >> 16) % (sizeof bits / sizeof *bits)];
            memcpy(text + n, bit, strlen(bit));
            n += strlen(bit);
        }
    }
    return n;
}

void test_round_trip(void) {
    enum { ROOM = 200 };
    Tokenizer t = tokenizer_or_die(TOKENIZER_FIXTURES "llama");
    double wrong = 0, broken = 0, pieces = 0, replaced = 0;
    unsigned char *out = (unsigned char*)test_alloc(8 * ROOM, 1),
                  *expected = (unsigned char*)test_alloc(8 * ROOM, 1);
    for (uint64_t trial = 0; trial < 4000; trial++) {
        char text[ROOM];
        size_t n = any_text(trial, trial % 2 == 0, text, ROOM);
        Encoder e;
        Error err;
        TokenList whole = {NULL, 0, 0};
        encoder_open(&e, &t);
        if (!encoder_add(&e, text, n, true, &whole, &err)) die("%s", err.text);
        size_t m = decode_all(&t, whole.id, whole.n, false, out, &broken),
               k = utf8_replace((unsigned char*)text, n, expected);
        wrong += m != k || memcmp(out, expected, k) != 0;
        // where the first byte was replaced: the text before it is whole
        bool same = k == n && memcmp(expected, text, n) == 0;
        replaced += same ? e.utf8.replaced != 0
                         : e.utf8.replaced < 1 || e.first_replaced < 0 || e.first_replaced >= (int64_t)n;
        TokenList piece = encode_pieces(&t, text, n, 1 + trial % 20, trial);
        pieces += !same_ids(piece.id, piece.n, whole.id, whole.n);
        free(piece.id);
        free(whole.id);
        encoder_close(&e);
    }
    report("4,000 random texts: decode(encode(x)) is not x", wrong, 0);
    report("4,000 random texts: pieces that split a character", broken, 0);
    report("4,000 random texts: in pieces with other ids than whole", pieces, 0);
    report("4,000 random texts: invalid bytes counted wrongly", replaced, 0);
    tokenizer_free(&t);
    // a tokenizer that allows no cut waits for the end of the text
    size_t size;
    char* base = file_bytes(TOKENIZER_FIXTURES "llama/tokenizer.json", &size);
    char* edited =
        replace_text(base, "\"special\":true}", "\"special\":true},{\"id\":5000,\"content\":\"to be\"}");
    file_put(scratch("tokenizer.json"), edited, strlen(edited));
    t = tokenizer_or_die(scratch_dir);
    TokenList list = encode_pieces(&t, "not to be or to be", 18, 1, 1);
    double cut = t.bpe->cuts || list.n < 4 || list.id[list.n - 1] != 5000;
    report("an added token with a blank is found across pieces", cut, 0);
    free(list.id);
    free(edited);
    tokenizer_free(&t);
    unlink(scratch("tokenizer.json"));
}

// ---- tokenizer.json: hostile and unusual ones. The base is the fixture `llama` or `neox`.

#define N_ADDED "\"added_tokens\":["
#define N_MODEL "\"model\":{"
#define N_PRE                                                                                           \
    "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_" \
    "regex\":true}"
#define SPLIT(regex)                                                                                \
    "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{" \
    "\"Regex\":\"" regex                                                                            \
    "\"},\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\",\"use_regex\":false}]}"

static const EditRow tokenizer_rows[] = {
    {"unchanged", "{", "{", NULL},
    {"cut inside a merge", "\"merges\":[", "\"merges\":[[", "\"merges\""},
    // 16: merges and ids
    {"merge of an unknown piece", "\"merges\":[", "\"merges\":[[\"qqqq\",\"a\"],", "the first is not there"},
    {"merge with an unknown second", "\"merges\":[", "\"merges\":[[\"a\",\"qqqq\"],",
     "the second is not there"},
    {"merge that makes nothing known", "\"merges\":[", "\"merges\":[[\"q\",\"z\"],",
     "what they make is not there"},
    {"merge of an empty piece (a cycle)", "\"merges\":[", "\"merges\":[[\"\",\"a\"],",
     "the first is not there"},
    {"merge as text with two blanks", "\"merges\":[", "\"merges\":[\"a b c\",", "expected two entries"},
    {"merge as text without a blank", "\"merges\":[", "\"merges\":[\"ab\",", "expected two entries"},
    {"merge that is a number", "\"merges\":[", "\"merges\":[7,", "expected two entries"},
    {"merge of three", "\"merges\":[", "\"merges\":[[\"a\",\"b\",\"c\"],", "expected two entries"},
    {"merges of another type", "\"merges\":[", "\"merges\":7,\"x\":[", "expected ["},
    {"merges twice", "\"merges\":[", "\"merges\":[],\"merges\":[", "\"merges\" is there twice"},
    {"merges in front of vocab", "\"vocab\":{", "\"merges\":[],\"vocab\":{", "in front of \"merges\""},
    {"id twice", "\"vocab\":{", "\"vocab\":{\"qqqq\":50,", "two tokens have the id 50"},
    {"text twice", "\"vocab\":{", "\"vocab\":{\"a\":9000,", "have the same text"},
    {"id -1", "\"vocab\":{", "\"vocab\":{\"qqqq\":-1,", "has the id -1"},
    {"id 2^20", "\"vocab\":{", "\"vocab\":{\"qqqq\":1048576,", "expected 0 .. 1048575"},
    {"id 2^31", "\"vocab\":{", "\"vocab\":{\"qqqq\":2147483648,", "expected 0 .. 1048575"},
    {"id 2^64", "\"vocab\":{", "\"vocab\":{\"qqqq\":18446744073709551616,", "expected JSON"},
    {"id 1.5", "\"vocab\":{", "\"vocab\":{\"qqqq\":1.5,", "whole number"},
    {"id that is text", "\"vocab\":{", "\"vocab\":{\"qqqq\":\"9\",", "whole number"},
    {"the highest id", "\"vocab\":{", "\"vocab\":{\"qqqq\":1048575,", NULL},
    {"empty token", "\"vocab\":{", "\"vocab\":{\"\":9000,", "found 0"},
    {"vocab of another type", "\"vocab\":{", "\"vocab\":7,\"x\":{", "expected {"},
    {"vocab twice", "\"vocab\":{", "\"vocab\":{},\"vocab\":{", "expected an entry for every byte"},
    {"no entry for a byte", "\"a\":", "\"aaaaaaa\":", "found none for byte 97"},
    {"a token that is no symbols of bytes", "\"vocab\":{", "\"vocab\":{\"\xE6\x97\xA5\":9000,", NULL},
    // added tokens
    {"added token without id", N_ADDED, N_ADDED "{\"content\":\"x\"},", "in item 0"},
    {"added token without content", N_ADDED, N_ADDED "{\"id\":9000},", "in item 0"},
    {"added token, empty", N_ADDED, N_ADDED "{\"id\":9000,\"content\":\"\"},", "in item 0"},
    {"added token, NUL", N_ADDED, N_ADDED "{\"id\":9000,\"content\":\"\\u0000\"},", "\\u0000"},
    {"added token with the id of another", N_ADDED, N_ADDED "{\"id\":9,\"content\":\"xyzzy\"},",
     "that of another token"},
    {"added token with two ids", N_ADDED, N_ADDED "{\"id\":9000,\"content\":\"a\"},", "but "},
    {"added token twice", N_ADDED,
     N_ADDED "{\"id\":9000,\"content\":\"x y\"},{\"id\":9001,\"content\":\"x y\"},", "have the same content"},
    {"added token with id 2^31", N_ADDED, N_ADDED "{\"id\":2147483648,\"content\":\"x y\"},", "in item 0"},
    {"added tokens no list", N_ADDED, "\"added_tokens\":7,\"x\":[", "expected ["},
    // kinds that are not read
    {"model Unigram", "\"type\":\"BPE\"", "\"type\":\"Unigram\"", "found Unigram"},
    {"model type twice", "\"type\":\"BPE\"", "\"type\":\"BPE\",\"type\":\"BPE\"", "\"type\" is there twice"},
    {"model without type", "\"type\":\"BPE\",", "", NULL},
    {"no model", "\"model\"", "\"modell\"", "expected"},
    {"dropout", "\"dropout\":null", "\"dropout\":0.1", "no \"dropout\""},
    {"prefix of subwords", "\"continuing_subword_prefix\":null", "\"continuing_subword_prefix\":\"##\"",
     "continuing_subword_prefix"},
    {"suffix of words", "\"end_of_word_suffix\":null", "\"end_of_word_suffix\":\"</w>\"",
     "end_of_word_suffix"},
    {"normalizer NFKC", "\"type\":\"NFC\"", "\"type\":\"NFKC\"", "found NFKC"},
    {"normalizers in a sequence", "{\"type\":\"NFC\"}",
     "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"Lowercase\"}]}",
     "found Lowercase"},
    {"normalizer in a sequence", "{\"type\":\"NFC\"}",
     "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"}]}", NULL},
    {"normalizer twice",
     "\"normalizer\":", "\"normalizer\":null,\"normalizer\":", "\"normalizer\" is there twice"},
    {"pre-tokenizer Metaspace", N_PRE, "\"pre_tokenizer\":{\"type\":\"Metaspace\"}",
     "found at the end Metaspace"},
    {"pre-tokenizer Punctuation", N_PRE,
     "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":"
     "\"Punctuation\"},{\"type\":\"ByteLevel\"}]}",
     "found Punctuation"},
    {"pre-tokenizer ByteLevel first", N_PRE,
     "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":"
     "\"ByteLevel\"},{\"type\":\"Digits\"}]}",
     "before the end ByteLevel"},
    {"pre-tokenizer empty sequence", N_PRE, "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[]}",
     "Sequence that ends"},
    {"pre-tokenizer none", N_PRE, "\"pre_tokenizer\":null", "found at the end none"},
    {"no pre-tokenizer", "\"pre_tokenizer\"", "\"pre_tokenizr\"", "expected \"pre_tokenizer\", found none"},
    {"prefix space", "\"add_prefix_space\":false", "\"add_prefix_space\":true", "without prefix space"},
    {"digits", N_PRE,
     "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\",\"individual_digits\":"
     "true},{\"type\":\"ByteLevel\"}]}",
     NULL},
    {"split, behavior MergedWithNext", N_PRE,
     "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\","
     "\"pattern\":{\"String\":\" \"},\"behavior\":\"MergedWithNext\"},{\"type\":\"ByteLevel\"}]}",
     "found MergedWithNext"},
    {"split without a pattern", N_PRE,
     "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\"},"
     "{\"type\":\"ByteLevel\"}]}",
     "as the pattern of Split"},
    {"template processing", "\"post_processor\":null", "\"post_processor\":{\"type\":\"TemplateProcessing\"}",
     NULL},
    {"post-processor of BERT", "\"post_processor\":null", "\"post_processor\":{\"type\":\"BertProcessing\"}",
     "BertProcessing"},
    {"decoder of WordPiece", "\"decoder\":{\"type\":\"ByteLevel\"", "\"decoder\":{\"type\":\"WordPiece\"",
     "found WordPiece"},
    // 16: expressions
    {"expression that is open", N_PRE, SPLIT("(a"), "regular expression, found \"(a\""},
    {"expression with a set that is open", N_PRE, SPLIT("[a"), "regular expression"},
    {"expression with a wrong range", N_PRE, SPLIT("a{9,1}"), "regular expression"},
    {"expression with an unknown property", N_PRE, SPLIT("\\\\p{Nonsense}"), "regular expression"},
    {"expression with a group that repeats a million times", N_PRE,
     SPLIT("((((a{1,999}){1,999}){1,999}){1,999}"), "regular"},
    {"expression with \\w", N_PRE, SPLIT("\\\\w+"), "\"\\w+\""},
    {"expression with \\b", N_PRE, SPLIT("a\\\\b"), "\"\\b\""},
    {"expression with \\h", N_PRE, SPLIT("\\\\h"), "\"\\h\""},
    {"expression with a set minus", N_PRE, SPLIT("[a&&b]"), "\"&&b\""},
    {"expression with a callout", N_PRE, SPLIT("(?C1)a"), "\"(?C\""},
    {"expression with a verb", N_PRE, SPLIT("(*LIMIT_MATCH=9)a"), "\"(*L\""},
    {"expression that ends in a backslash", N_PRE, SPLIT("a\\\\"), "cannot be read here"},
    {"expression with a set in a set", N_PRE, SPLIT("[^(\\\\s|[.,!?])]+"), NULL},
    // JSON
    {"syntax", "{", "[", "expected JSON, found at line 1"},
    {"an empty file but a blank", "{", " ", "expected JSON"},
    {"model of another type", N_MODEL, "\"model\":7,\"x\":{", "expected {"},
    {"invalid UTF-8", "\"version\":\"1.0\"", "\"version\":\"\xFF\"", "expected JSON"},
    {"control character", "\"version\":\"1.0\"", "\"version\":\"\n\"", "expected JSON"},
};

typedef struct { const char *path, *words; size_t file_size; const char* encode; } TokenizerCase;

// runs in a child. Two thirds of the file, or more, are allocated before anything is known to be wrong.
static void tokenizer_case(void* arg) {
    const TokenizerCase* c = (const TokenizerCase*)arg;
    Tokenizer t;
    Error err;
    limit_memory(c->file_size);
    double start = cpu_seconds();
    bool ok = tokenizer_load(&t, c->path, &err);
    if (ok && c->encode) {
        BpeWork* w = bpe_work(t.bpe);
        TokenList list = {NULL, 0, 0};
        ok = bpe_encode(w, c->encode, strlen(c->encode), &list, &err);
        bpe_work_free(w);
        free(list.id);
    }
    double seconds = cpu_seconds() - start;
    bool right = c->words ? !ok && one_line(err.text, c->words) && strstr(err.text, c->path) : ok;
    if (right && seconds < (SANITIZED ? 20 : 1)) return;
    fprintf(stderr, "%.2f s, expected \"%s\", found \"%s\"\n", seconds, c->words ? c->words : "loads",
            ok ? "loads" : err.text);
    exit(1);
}

static int run_tokenizer_case(const char* name, const char* text, size_t n, const char* words,
                              const char* encode) {
    char said[4096] = "";
    const char* path = scratch("hostile.json");
    file_put(path, text, n);
    TokenizerCase c = {path, words, n, encode};
    int code = in_child(tokenizer_case, &c, said, sizeof said);
    if (code) fprintf(stderr, "  row \"%s\": exit code %d: %s\n", name, code, said);
    return code != 0;
}

void test_hostile_tokenizers(void) {
    size_t size;
    char claim[120], *base = file_bytes(TOKENIZER_FIXTURES "neox/tokenizer.json", &size);
    if (!base) die("no fixture (run from the repository root)");
    int bad = 0;
    for (int i = 0; i < COUNT_OF(tokenizer_rows); i++) {
        char* edited = replace_text(base, tokenizer_rows[i].find, tokenizer_rows[i].by);
        bad += run_tokenizer_case(tokenizer_rows[i].name, edited, strlen(edited), tokenizer_rows[i].words,
                                  "a 1 b");
        free(edited);
    }
    snprintf(claim, sizeof claim, "tokenizer.json, %d edits: rows that are not one line, or refused",
             COUNT_OF(tokenizer_rows));
    report(claim, bad, 0);

    // what is big: expressions that explode, tokens, lists, nesting, files
    bad = 0;
    char *edited = replace_text(base, N_PRE, SPLIT("(a|aa|aaa)+$")),
         *many = (char*)test_alloc((32 << 20) + 64, 1);
    memset(many, 'a', 4000);
    strcpy(many + 4000, "b");
    bad += run_tokenizer_case("expression that explodes", edited, strlen(edited), "cannot be matched", many);
    free(edited);
    char* token = (char*)test_alloc(BPE_MAX_TOKEN + 64, 1);
    int head = sprintf(token, "\"vocab\":{\"");
    memset(token + head, 'x', BPE_MAX_TOKEN + 1);
    strcpy(token + head + BPE_MAX_TOKEN + 1, "\":9000,");
    edited = replace_text(base, "\"vocab\":{", token);
    bad += run_tokenizer_case("a token of 4097 bytes", edited, strlen(edited), "found 4097", NULL);
    free(edited);
    size_t n = (size_t)sprintf(many, "{" N_ADDED);
    for (int i = 0; i < 1000000; i++) n += (size_t)sprintf(many + n, "{\"id\":%d,\"content\":\"\"},", i % 10);
    many[n] = 0;
    bad += run_tokenizer_case("a million added tokens, empty", many, n, "in item 0", NULL);
    n = (size_t)sprintf(many, "{" N_ADDED);
    for (int i = 0; i < 1000000; i++)
        n += (size_t)sprintf(many + n, "{\"id\":%d,\"content\":\"t\"},", i % 10);
    bad += run_tokenizer_case("a million added tokens", many, n, "at most 65536", NULL);
    n = (size_t)sprintf(many, "{" N_MODEL "\"vocab\":{");
    for (int i = 0; i < 300000; i++) n += (size_t)sprintf(many + n, "\"t%d\":%d,", i, i);
    bad += run_tokenizer_case("300,000 entries, and the end is missing", many, n, "expected JSON", NULL);
    memset(many, '[', 1 << 20);
    bad += run_tokenizer_case("nesting", many, 1 << 20, "expected JSON", NULL);
    memcpy(many, "{\"normalizer\":", 14);
    bad += run_tokenizer_case("nesting inside", many, 1 << 20, "expected JSON", NULL);
    bad += run_tokenizer_case("an empty file", "", 0, "expected JSON", NULL);
    if (truncate(scratch("hostile.json"), (off_t)BPE_MAX_FILE + 1) != 0) die("truncate: %s", strerror(errno));
    Tokenizer t;
    Error err;
    bad +=
        tokenizer_load(&t, scratch("hostile.json"), &err) || !one_line(err.text, "expected at most 67108864");
    bad += tokenizer_load(&t, "/dev/zero", &err) || !one_line(err.text, "/dev/zero");
    bad += tokenizer_load(&t, "/nonexistent", &err) || !one_line(err.text, "/nonexistent");
    unlink(scratch("tokenizer.json"));
    bad += tokenizer_load(&t, scratch_dir, &err) || !one_line(err.text, "tokenizer.json");
    report("tokenizer.json: explosions, a million of everything, sizes, directories", bad, 0);

    // every prefix, and every byte replaced: a line, or a tokenizer that works
    bad = 0;
    int loaded = 0;
    BpeWork* w;
    TokenList list = {NULL, 0, 0};
    char* copy = (char*)test_alloc(size + 1, 1);
    for (size_t i = 0; i + 2 < size; i += i < 2500 || i + 300 > size ? 1 : 41) {
        file_put(scratch("hostile.json"), base, i);
        bad += tokenizer_load(&t, scratch("hostile.json"), &err) || !one_line(err.text, "hostile.json");
    }
    for (size_t i = 0; i < size; i += i < 2000 ? 3 : 97) {
        for (int k = 0; k < 5; k++) {
            memcpy(copy, base, size);
            copy[i] = "\0\xFF\"}0"[k];
            file_put(scratch("hostile.json"), copy, size);
            if (!tokenizer_load(&t, scratch("hostile.json"), &err)) {
                bad += !one_line(err.text, "hostile.json");
                continue;
            }
            loaded++;
            w = bpe_work(t.bpe);
            list.n = 0;
            bad += !bpe_encode(w, "It's  2 \xC3\xA9 <|endoftext|>", 23, &list, &err);
            bpe_work_free(w);
            tokenizer_free(&t);
        }
    }
    free(list.id);
    report("tokenizer.json: cut anywhere, any byte replaced", bad + (loaded == 0), 0);
}

// ---- bytes, and which token ends a document

void test_tokenizer_file(void) {
    double wrong = 0;
    Tokenizer t, back = data_ids(77);
    Error err;
    back.eos = 3;
    wrong += !tokenizer_read(&back, scratch_dir, &err) || back.kind != TOKENIZER_NONE ||
             back.vocab_size != 77 || back.eos != 3;
    wrong += !tokenizer_write(&back, scratch_dir, &err) || access(scratch("tokenizer.json"), F_OK) == 0;
    tokenizer_bytes(&t);
    wrong += !tokenizer_write(&t, scratch_dir, &err);
    wrong += !tokenizer_read(&back, scratch_dir, &err) || back.kind != t.kind || back.vocab_size != 257 ||
             back.eos != 256;
    report("tokenizer.json of bytes: written and read, missing file", wrong, 0);

    // GPT-2's symbols: U+0100 for 0, U+010A 10, U+0120 32, '!' 33, '~' 126, U+0121 127, U+0142 160, U+00A1
    // 161, U+00AC 172, U+0143 173, U+00AE 174, U+00FF 255
    const char* const golden[] = {
        "\"\xC4\x80\": 0,", "\"\xC4\x8A\": 10,", "\"\xC4\xA0\": 32,", "\"!\": 33,", "\"~\": 126,",
        "\"\xC4\xA1\": 127,", "\"\xC5\x82\": 160,", "\"\xC2\xA1\": 161,", "\"\xC2\xAC\": 172,",
        "\"\xC5\x83\": 173,", "\"\xC2\xAE\": 174,", "\"\xC3\xBF\": 255"
    };
    size_t size;
    char* base = file_bytes(scratch("tokenizer.json"), &size);
    double missing = 0;
    for (int i = 0; i < 12; i++) missing += !base || !strstr(base, golden[i]);
    report("tokenizer.json of bytes: symbols of bytes as in GPT-2", missing, 0);

    // any change makes it another tokenizer: bytes are ids no more, or the end token is another one
    static const struct { const char *from, *to; int64_t vocab; int eos; } edit[] = {
        {"\"a\": 97", "\"a\": 300", 301, 256}, {"\"id\": 256", "\"id\": 300", 301, 300},
        {"<|endoftext|>", "</s>", 257, 256}, {"<|endoftext|>", "<last>", 257, -1},
        {"\"a\": 97", "\"a\": 97, \"zz\": 400", 401, 256}};
    double other = 0;
    for (int i = 0; i < COUNT_OF(edit); i++) {
        char* edited = replace_text(base, edit[i].from, edit[i].to);
        file_put(scratch("tokenizer.json"), edited, strlen(edited));
        size_t n;
        other += !tokenizer_read(&back, scratch_dir, &err) || back.kind != TOKENIZER_BPE ||
                 back.vocab_size != edit[i].vocab || back.eos != edit[i].eos;
        int* ids =
            tokenizer_encode(&back, "abc\xC3", 4, &n);    // the last is no character: U+FFFD, three bytes
        other += n != 6 || ids[1] != 'b' || ids[3] != 0xEF;
        free(ids);
        tokenizer_free(&back);
        free(edited);
    }
    report("tokenizer.json of bytes: what makes it another one", other, 0);
    unlink(scratch("tokenizer.json"));
    if (mkdir(scratch("tokenizer.json"), 0700) != 0) die("test: scratch");
    report("tokenizer.json that is a directory",
           tokenizer_read(&back, scratch_dir, &err) || !strstr(err.text, "directory"), 0);
    rmdir(scratch("tokenizer.json"));

    // a checkpoint carries the file as it came
    base = file_bytes(TOKENIZER_FIXTURES "llama/tokenizer.json", &size);
    t = tokenizer_or_die(TOKENIZER_FIXTURES "llama");
    wrong = !tokenizer_write(&t, scratch_dir, &err);
    tokenizer_free(&t);
    report("tokenizer.json: what is written is what was read",
           wrong + files_differ(scratch("tokenizer.json"), TOKENIZER_FIXTURES "llama/tokenizer.json"), 0);
}

// ---- the program

// shard_ids: the ids of a shard, to be freed; NULL when its header is wrong
int* shard_ids(const char* name, size_t* n) {
    size_t size;
    char* bytes = file_bytes(scratch(name), &size);
    uint32_t header[3];
    *n = 0;
    if (!bytes || size < 1024) return NULL;
    memcpy(header, bytes, sizeof header);
    size_t width = header[0] == 20240520 ? 2 : 4;
    if (size != 1024 + header[2] * width) return NULL;
    int* ids = (int*)test_alloc(header[2] + 1, sizeof(int));
    *n = header[2];
    for (size_t i = 0; i < *n; i++) memcpy(ids + i, bytes + 1024 + i * width, width);
    return ids;
}

void test_tokenize_program(void) {
    char fixture[4096], args[9000];
    size_t n, m, count;
    if (!realpath(TOKENIZER_FIXTURES, fixture)) die("no fixtures (run from the repository root)");
    Tokenizer t = tokenizer_or_die(TOKENIZER_FIXTURES "neox");
    ssize_t length = readlink("/proc/self/exe", cli_program, sizeof cli_program - 20);
    cli_program[length > 0 ? length : 0] = 0;
    *(strrchr(cli_program, '/') + 1) = 0;
    if (strstr(cli_program, "sanitize/") == NULL || access(cli_program, X_OK) == 0)
        strcat(cli_program, "train_mamba");
    scratch("x");                                        // makes the directory

    // texts: two documents of JSON lines and one file, the last part for validation
    enum { SIZE = 200000 };
    char* text = (char*)test_alloc(SIZE + 1, 1);
    for (size_t at = 0, i = 0; at < SIZE; at += n, i++) {
        n = min_size(SIZE - at, 40);
        char piece[64];
        snprintf(piece, sizeof piece, "Word%zu of   a <|endoftext|> \xC3\xA9\n%-30zu", i, i * i);
        memcpy(text + at, piece, n);
    }
    text[SIZE - 1] = '\n';
    cli_write("a.txt", text, SIZE, "wb");
    cli_write("b.jsonl", "{\"id\": 1, \"text\": \"one\\ntwo\"}\n\n{\"text\": \"\\u00e9\"}\r\n", 49, "wb");
    cli_write("c.txt", "ab\xC3(", 4, "wb");
    cli_write("bad.jsonl", "{\"text\": \"x\"}\n{\"text\": \"x\"}\n{\"text\": 7}\n", 40, "wb");
    cli_write("open.jsonl", "{\"text\": \"x\"}\n\n{\"text\": \"x\n", 27, "wb");
    cli_write("list.jsonl", "[1]\n", 4, "wb");
    cli_write("utf16.txt", "\xFF\xFEh\0i\0", 6, "wb");
    uint32_t shard[256] = {20240520, 1, 0};
    cli_write("shard.txt", shard, sizeof shard, "wb");
    cli_shell("mkdir there && ln -s nowhere dangling", "", "");

    snprintf(args, sizeof args, "tokenize --tokenizer %s/neox --data a.txt --out made --threads 3", fixture);
    Finished f = cli_run(args);
    int *train = shard_ids("made/train_000000.bin", &n), *val = shard_ids("made/val_000000.bin", &m);
    int* whole = tokenizer_encode(&t, text, SIZE, &count);
    bool ok = f.code == 0 && train && val && n + m == count + 1 && train[0] == t.eos &&
              memcmp(train + 1, whole, (n - 1) * 4) == 0 && memcmp(val, whole + n - 1, m * 4) == 0;
    cli_check(ok && m > count / 12 && m < count / 8, "a text file: its ids, the last tenth apart", &f);
    cli_check(files_differ(scratch("made/tokenizer.json"), TOKENIZER_FIXTURES "neox/tokenizer.json") == 0 &&
                  !cli_exists("made.tmp") && !cli_exists("made/.lock"),
              "the tokenizer beside, nothing else left", &f);
    snprintf(args, sizeof args,
             "tokenize --tokenizer %s/neox/tokenizer.json --data b.jsonl c.txt --out lines/ --val-fraction 0 "
             "--eos-token 1",
             fixture);
    f = cli_run(args);
    train = shard_ids("lines/train_000000.bin", &n);
    int expected[64], k = 0;
    const char* const parts[] = {"one\ntwo", "\xC3\xA9", "ab\xEF\xBF\xBD("};
    for (int i = 0; i < 3; i++) {
        int* ids = tokenizer_encode(&t, parts[i], strlen(parts[i]), &count);
        expected[k++] = 1;
        for (size_t j = 0; j < count; j++) expected[k++] = ids[j];
        free(ids);
    }
    cli_check(f.code == 0 && train && same_ids(train, n, expected, (size_t)k) &&
                  !cli_exists("lines/val_000000.bin") &&
                  strstr(f.err, "c.txt: 1 times invalid UTF-8 was replaced by U+FFFD, first at byte 3"),
              "JSON lines, an end token of one's own, invalid UTF-8", &f);
    const struct { const char *args, *words;
    } refused[] = {
        {"--data a.txt --out x", "needs --tokenizer"},
        {"--tokenizer %s/neox --out x", "needs --data"},
        {"--tokenizer %s/neox --data a.txt", "needs --out"},
        {"--tokenizer %s/neox --data a.txt --out there", "there is already there"},
        {"--tokenizer %s/neox --data a.txt --out dangling", "dangling is already there"},
        {"--tokenizer %s/neox --data a.txt --out made", "made is already there"},
        {"--tokenizer %s/none --data a.txt --out x", "/none"},
        {"--tokenizer a.txt --data a.txt --out x", "a.txt: expected JSON"},
        {"--tokenizer %s/neox --data none.txt --out x", "none.txt"},
        {"--tokenizer %s/neox --data there --out x", "directory"},
        {"--tokenizer %s/neox --data z*.txt --out x", "no file matches"},
        {"--tokenizer %s/neox --data bad.jsonl --out x",
         "bad.jsonl: line 3: expected an object with a string \"text\""},
        {"--tokenizer %s/neox --data open.jsonl --out x", "open.jsonl: line 3: expected JSON"},
        {"--tokenizer %s/neox --data list.jsonl --out x", "line 1"},
        {"--tokenizer %s/neox --data utf16.txt --out x", "UTF-16"},
        {"--tokenizer %s/neox --data shard.txt --out x", "token shard"},
        {"--tokenizer %s/neox --data b.jsonl --out x", "no document begins in the last part"},
        {"--tokenizer %s/neox --data a.txt --out x --eos-token 99999", "--eos-token 99999"},
        {"--tokenizer %s/neox --data a.txt --out a.txt/x", "a.txt"},
        {"--tokenizer %s/neox --data a.txt --out x --steps 3", "not of 'tokenize'"},
    };
    for (int i = 0; i < COUNT_OF(refused); i++) {
        char rest[5000];
        snprintf(rest, sizeof rest, refused[i].args, fixture);
        snprintf(args, sizeof args, "tokenize %s", rest);
        f = cli_run(args);
        cli_check(f.code == 1 && cli_one_line(&f) && strstr(f.err, refused[i].words) && !cli_exists("x") &&
                      !cli_exists("x.tmp"),
                  refused[i].args, &f);
    }
    cli_group("tokenize: shards, and what it refuses", 3 + COUNT_OF(refused));

    // trained on text, on shards, resumed, prompted
    snprintf(args, sizeof args, TOY "--data a.txt --tokenizer %s/neox --out bpe --steps 4 --save-every 2",
             fixture);
    f = cli_run(args);
    cli_check(f.code == 0 && files_differ(scratch("bpe/last/tokenizer.json"),
                                          TOKENIZER_FIXTURES "neox/tokenizer.json") == 0,
              "trained on text, the checkpoint has the tokenizer", &f);
    f = cli_run(TOY "--data made/train_000000.bin --val-data made/val_000000.bin --out beside --steps 2");
    cli_check(f.code == 0 &&
                  files_differ(scratch("beside/last/tokenizer.json"), scratch("made/tokenizer.json")) == 0,
              "trained on shards, the tokenizer beside them is found", &f);
    f = cli_run("--out bpe --resume --steps 6");
    cli_check(f.code == 0 && strstr(f.out, "step_00000004, step 4"),
              "resumed with the checkpoint's tokenizer", &f);
    snprintf(args, sizeof args, "--out bpe --resume --steps 7 --tokenizer %s/llama", fixture);
    f = cli_run(args);
    cli_check(f.code == 1 && cli_one_line(&f) && strstr(f.err, "leave it out"),
              "resumed with another tokenizer", &f);
    f = cli_run("info --from bpe");
    cli_check(f.code == 0 && strstr(f.out, "byte-level BPE, 723 ids"), "info names it", &f);
    f = cli_run("eval --from bpe --data a.txt --seq-len 64");
    cli_check(f.code == 0 && strstr(f.out, "loss"), "eval of text", &f);
    f = cli_run("generate --from bpe --max-tokens 300 --temperature 1 --prompt It's\t2\xC3");
    cli_check(
        f.code == 0 && cli_utf8(f.out, f.out_size) && strstr(f.err, "replaced by U+FFFD, first at byte 6"),
        "text that is valid, a prompt that is not", &f);
    Launch l;
    memset(&l, 0, sizeof l);
    l.args = "generate --from bpe --max-tokens 2 --chunk 7 --prompt-file a.txt";
    f = cli_wait(cli_start(&l), 30);
    char words[64];
    free(whole);
    whole = tokenizer_encode(&t, text, SIZE, &count);
    snprintf(words, sizeof words, "prompt: %zu tokens", count);
    cli_check(f.code == 0 && strstr(f.err, words), "a prompt of 200 kB in pieces has the tokens of the whole",
              &f);
    snprintf(args, sizeof args, TOY "--data a.txt --tokenizer %s/neox --out small --vocab-size 300", fixture);
    f = cli_run(args);
    cli_check(f.code == 1 && cli_one_line(&f) && strstr(f.err, "the tokenizer has 723 ids"),
              "a vocabulary too small", &f);
    cli_shell("cp -rL bpe/last bare && rm bare/tokenizer.json", "", "");
    f = cli_run("generate --from bare --max-tokens 5 --prompt a");
    cli_check(f.code == 1 && cli_one_line(&f) && strstr(f.err, "give one with --tokenizer"),
              "a model without one", &f);
    snprintf(args, sizeof args,
             "generate --from bare --max-tokens 5 --temperature 0 --prompt a --tokenizer %s/neox", fixture);
    f = cli_run(args);
    Finished own = cli_run("generate --from bpe --max-tokens 5 --temperature 0 --prompt a");
    cli_check(f.code == 0 && own.code == 0 && strcmp(f.out, own.out) == 0,
              "a model without one, given --tokenizer", &f);
    snprintf(args, sizeof args, "eval --from bpe --data a.txt --tokenizer %s/neox", fixture);
    f = cli_run(args);
    cli_check(f.code == 1 && cli_one_line(&f) && strstr(f.err, "leave it out"),
              "a model with one, given another", &f);
    snprintf(args, sizeof args,
             "tokenize --tokenizer %s/neox --data a.txt --val-fraction 0 --out two", fixture);
    cli_run(args);
    snprintf(args, sizeof args, TOY "--data two/train_000000.bin --tokenizer %s/llama --out other", fixture);
    f = cli_run(args);
    cli_check(f.code == 1 && cli_one_line(&f) && strstr(f.err, "is not the one that made the shards"),
              "shards of another tokenizer", &f);
    cli_group("training and generating with a tokenizer", 13);

    // ended at any moment: no DIR, or a whole one; the next run says what it removes
    snprintf(args, sizeof args, "tokenize --tokenizer %s/neox --data a.txt --out killed", fixture);
    l.args = args;
    int whole_ones = 0;
    for (int i = 0; i < 20; i++) {
        pid_t pid = cli_start(&l);
        usleep((useconds_t)(1000 * i));
        kill(pid, SIGKILL);
        cli_wait(pid, 5);
        if (!cli_exists("killed")) continue;
        whole_ones++;
        cli_check(files_differ(scratch("killed/train_000000.bin"), scratch("made/train_000000.bin")) == 0 &&
                  files_differ(scratch("killed/val_000000.bin"), scratch("made/val_000000.bin")) == 0 &&
                  cli_exists("killed/tokenizer.json"), "killed: DIR is there and whole", NULL);
        cli_shell("rm -rf killed", "", "");
    }
    f = cli_run(args);
    cli_check(f.code == 0 && cli_exists("killed/val_000000.bin"), "after all that it runs", &f);
    cli_shell("mkdir held.tmp && touch held.tmp/.lock held.tmp/train_000000.bin", "", "");
    int lock = open(scratch("held.tmp/.lock"), O_RDWR);
    if (lock < 0 || flock(lock, LOCK_EX) != 0) die("test: lock");
    snprintf(args, sizeof args, "tokenize --tokenizer %s/neox --data a.txt --out held", fixture);
    f = cli_run(args);
    cli_check(
        f.code == 1 && cli_one_line(&f) && strstr(f.err, "in use") && cli_exists("held.tmp/train_000000.bin"),
        "a second run at the same time", &f);
    close(lock);
    // what tokenize did not make it leaves alone: a file of somebody's, a directory without a lock, a link
    const char* foreign[] = {"touch held.tmp/mine", "rm held.tmp/mine held.tmp/.lock",
                             "mv held.tmp theirs && touch theirs/.lock && ln -s theirs held.tmp"};
    for (int i = 0; i < 3; i++) {
        cli_shell(foreign[i], "", "");
        f = cli_run(args);
        cli_check(f.code == 1 && cli_one_line(&f) && strstr(f.err, "is in the way") && !cli_exists("held") &&
                  cli_exists("held.tmp/train_000000.bin"), foreign[i], &f);
    }
    cli_shell("rm held.tmp && mv theirs held.tmp", "", "");
    f = cli_run(args);
    cli_check(f.code == 0 && strstr(f.out, "removed what an unfinished run left") &&
                  cli_exists("held/tokenizer.json"),
              "what a killed run left is removed", &f);
    char command[14000];                                 // a full disk: one line, nothing left
    snprintf(command, sizeof command,
             "cd %s && (ulimit -f 50; %s tokenize --tokenizer %s/neox --data a.txt --out full "
             "> out.txt 2> err.txt; test $? = 1) && test ! -e full && test ! -e full.tmp",
             scratch_dir, cli_program, fixture);
    ok = system(command) == 0;
    f.err = cli_read("err.txt", &f.err_size);
    cli_check(ok && cli_one_line(&f) && strstr(f.err, "cannot write: File too large"), "a full disk", &f);
    cli_group("tokenize: killed, twice at once, a full disk", 27);
    free(whole);
    tokenizer_free(&t);
}

void test_tokenizer(void) {
    test_tokenizer_fixture("neox-20b-part");
    test_tokenizer_fixture("neox");
    test_tokenizer_fixture("llama");
    test_merges();
    test_round_trip();
    test_tokenizer_file();
    test_hostile_tokenizers();
    test_tokenize_program();
}
