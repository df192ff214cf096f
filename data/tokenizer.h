// Text <-> token ids. Two kinds: bytes, ids 0..255 and one end token `<|endoftext|>`, id 256, which needs no
// file; and byte-level BPE, read from a tokenizer.json (bpe.h). Both are written as the tokenizer.json of
// Hugging Face `tokenizers`: a byte-level BPE without merges means "one id per byte".

// Uses safetensors.h: open_regular, read_exact, join_path, fail_line, checkpoint_write_text.

#include <jansson.h>
// defines: Bpe, what a tokenizer.json says; bpe_encode
#include "bpe.h"

enum { TOKENIZER_NONE, TOKENIZER_BYTES, TOKENIZER_BPE };    // NONE: ids without a text form, shown as numbers
// bytes that one call of tokenizer_decode can write: a token of invalid bytes, and what was pending
enum { TOKENIZER_MAX_TEXT = 3 * BPE_MAX_TOKEN + 8 };

#define END_TEXT "<|endoftext|>"

typedef struct {
    int kind;              // TOKENIZER_NONE, TOKENIZER_BYTES, TOKENIZER_BPE
    int64_t vocab_size;    // ids that have a meaning: 0..vocab_size-1
    int eos;               // the end token, the first token of the document it precedes; -1: none
    Bpe* bpe;              // TOKENIZER_BPE
} Tokenizer;

void tokenizer_bytes(Tokenizer* t) {
    t->kind = TOKENIZER_BYTES;
    t->vocab_size = 257;
    t->eos = 256;
    t->bpe = NULL;
}

void tokenizer_free(Tokenizer* t) {
    if (t->kind == TOKENIZER_BPE) bpe_free(t->bpe);
    t->bpe = NULL;
}

// data_read: exactly n bytes at an offset; a file that ends before has been cut since it was opened.
bool data_read(int fd, void* out, size_t n, int64_t offset, const char* path, Error* err) {
    if (read_exact(fd, out, n, (uint64_t)offset)) return true;
    if (errno) return fail(err, "%s: cannot read: %s", path, strerror(errno));
    return fail(err, "%s: changed while reading: expected %lld bytes or more, found fewer; start again once "
                "it is complete", path, (long long)(offset + (int64_t)n));
}

// ---- tokenizer.json

// tokenizer_same: do both come from the same tokenizer.json?
bool tokenizer_same(const Tokenizer* a, const Tokenizer* b) {
    return a->kind == b->kind && (a->kind != TOKENIZER_BPE || strcmp(a->bpe->file, b->bpe->file) == 0);
}

// tokenizer_write: tokenizer.json: the file it came from, or one for a byte tokenizer; nothing for
// TOKENIZER_NONE. Hugging Face `tokenizers` gives the same ids with it for any UTF-8 text, except that it
// turns the literal text `<|endoftext|>` into 256 with a byte tokenizer too.
bool tokenizer_write(const Tokenizer* t, const char* dir, Error* err) {
    if (t->kind == TOKENIZER_NONE) return true;
    if (t->kind == TOKENIZER_BPE) return checkpoint_write_text(dir, "tokenizer.json", t->bpe->file, err);
    json_t* vocab = json_object();
    for (int i = 0; i < 256; i++) {
        char symbol[3];
        byte_symbol(i, symbol);
        json_object_set_new(vocab, symbol, json_integer(i));
    }
    json_t* root = json_pack(
        "{s:s, s:n, s:n, s:[{s:i, s:s, s:b, s:b, s:b, s:b, s:b}], s:n, s:{s:s, s:b, s:b, s:b}, s:n,"
        " s:{s:s, s:b, s:b, s:b}, s:{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:o, s:[]}}",
        "version", "1.0", "truncation", "padding",
        "added_tokens", "id", t->eos, "content", END_TEXT, "single_word", 0, "lstrip", 0, "rstrip", 0,
        "normalized", 0, "special", 1,
        "normalizer",
        "pre_tokenizer", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1, "use_regex", 0,
        "post_processor",
        "decoder", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1, "use_regex", 0,
        "model", "type", "BPE", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
        "fuse_unk", 0, "byte_fallback", 0, "vocab", vocab, "merges");
    char* text = root ? json_dumps(root, JSON_INDENT(1)) : NULL;
    json_decref(root);
    if (!text) return fail(err, "%s: out of memory while writing tokenizer.json", dir);
    bool ok = checkpoint_write_text(dir, "tokenizer.json", text, err);
    free(text);
    return ok;
}

// is_byte_tokenizer: what tokenizer_write writes for bytes
static bool is_byte_tokenizer(const Bpe* b) {
    bool ok = b->n_vocab == 256 && b->n_merges == 0 && !b->nfc && b->raw.n == 1 && b->normalized.n == 0 &&
              b->raw.token[0].id == 256 && b->raw.token[0].n == strlen(END_TEXT) &&
              memcmp(b->raw.token[0].text, END_TEXT, strlen(END_TEXT)) == 0;
    for (int i = 0; i < 256 && ok; i++) ok = b->byte_id[i] == i;
    return ok;
}

// tokenizer_load: a tokenizer.json, or the one in a directory. kind becomes TOKENIZER_NONE on failure. The
// file does not say which token ends a text, so it is the first of the usual names, -1 when it has none of
// them.
bool tokenizer_load(Tokenizer* t, const char* path, Error* err) {
    static const char* const ends[] = {END_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"};
    char inside[4096];
    struct stat st;
    t->kind = TOKENIZER_NONE;
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode)) {
        if (!join_path(inside, sizeof inside, path, "tokenizer.json", err)) return false;
        path = inside;
    }
    Bpe* b = bpe_load(path, err);
    if (!b) return false;
    if (is_byte_tokenizer(b)) {
        bpe_free(b);
        tokenizer_bytes(t);
        return true;
    }
    t->kind = TOKENIZER_BPE;
    t->bpe = b;
    t->vocab_size = b->n_ids;
    t->eos = -1;
    for (size_t i = 0; i < sizeof ends / sizeof *ends && t->eos < 0; i++)
        for (int set = 0; set < 2; set++) {
            const AddedSet* added = set ? &b->normalized : &b->raw;
            const AddedToken* found = added_find(added, ends[i], strlen(ends[i]));
            if (found && found->n == strlen(ends[i])) t->eos = found->id;
        }
    return true;
}

// tokenizer_read: dir/tokenizer.json. A missing file is no error: kind becomes TOKENIZER_NONE and vocab_size
// and eos stay as the caller set them (from the model's config).
bool tokenizer_read(Tokenizer* t, const char* dir, Error* err) {
    char path[4096];
    struct stat st;
    t->kind = TOKENIZER_NONE;
    if (!join_path(path, sizeof path, dir, "tokenizer.json", err)) return false;
    if (stat(path, &st) != 0 && errno == ENOENT) return true;
    int fd = open_regular(path, &st, err);               // a directory of this name is refused
    if (fd < 0) return false;
    close(fd);
    return tokenizer_load(t, path, err);
}

// ---- UTF-8, a byte at a time

// Utf8Stream: bytes of a character that is not complete yet. Starts as zeros; raw passes bytes through.
typedef struct {
    unsigned char pending[4];
    int n;
    bool raw;
    int64_t replaced;      // how often invalid bytes became U+FFFD
} Utf8Stream;

// utf8_length: bytes of the character that this byte begins, 0 when none can begin with it (80..C1, F5..FF).
int utf8_length(unsigned char lead) {
    return lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
}

// utf8_continues: may this byte follow the n bytes of an incomplete character? The second byte excludes
// overlong forms (E0, F0), surrogates (ED) and code points above U+10FFFF (F4). Unicode standard, table 3-7.
bool utf8_continues(const unsigned char* pending, int n, unsigned char byte) {
    unsigned char low = 0x80, high = 0xBF;
    if (n == 1) {
        if (pending[0] == 0xE0) low = 0xA0;
        if (pending[0] == 0xED) high = 0x9F;
        if (pending[0] == 0xF0) low = 0x90;
        if (pending[0] == 0xF4) high = 0x8F;
    }
    return byte >= low && byte <= high;
}

// tokenizer_flush: the end of the text: an incomplete character becomes one U+FFFD. Returns the size.
size_t tokenizer_flush(Utf8Stream* s, char out[TOKENIZER_MAX_TEXT]) {
    if (s->n == 0) return 0;
    s->n = 0;
    s->replaced++;
    memcpy(out, "\xEF\xBF\xBD", 3);
    return 3;
}

// utf8_push: one more byte; writes whatever is complete by now. Each longest prefix that no byte can complete
// becomes one U+FFFD, as in Python's bytes.decode("utf-8", errors="replace").
size_t utf8_push(Utf8Stream* s, unsigned char byte, char out[TOKENIZER_MAX_TEXT]) {
    size_t n = 0;
    if (s->raw) {
        out[n++] = (char)byte;
        return n;
    }
    if (s->n > 0 && !utf8_continues(s->pending, s->n, byte)) n += tokenizer_flush(s, out);
    s->pending[s->n++] = byte;
    int length = utf8_length(s->pending[0]);
    if (length == 0) {
        n += tokenizer_flush(s, out + n);
    } else if (s->n == length) {
        memcpy(out + n, s->pending, (size_t)length);
        n += (size_t)length;
        s->n = 0;
    }
    return n;
}

// tokenizer_decode: the text that one more token makes complete, at most TOKENIZER_MAX_TEXT bytes, not
// terminated. Returns their number, 0 while a character is incomplete or when the id has no text.
size_t tokenizer_decode(const Tokenizer* t, Utf8Stream* s, int token, char out[TOKENIZER_MAX_TEXT]) {
    if (t->kind == TOKENIZER_NONE) return (size_t)snprintf(out, TOKENIZER_MAX_TEXT, "%d ", token);
    size_t n = 0;
    if (t->kind == TOKENIZER_BPE) {
        bool known = token >= 0 && token < t->bpe->n_ids && t->bpe->length[token] > 0;
        const char* text = known ? t->bpe->arena + t->bpe->place[token] : "";
        for (int i = 0; known && i < t->bpe->length[token]; i++)
            n += utf8_push(s, (unsigned char)text[i], out + n);
        return known ? n : tokenizer_flush(s, out);
    }
    if (token >= 0 && token < 256) return utf8_push(s, (unsigned char)token, out);
    n = tokenizer_flush(s, out);
    if (token >= 0 && token == t->eos) {
        memcpy(out + n, END_TEXT, strlen(END_TEXT));
        n += strlen(END_TEXT);
    }
    return n;
}

// ---- encoding

// Encoder: makes a text that comes in pieces into ids, the same as those of the whole text. Bytes are ids by
// themselves. For BPE invalid UTF-8 becomes U+FFFD as in Python, and a piece is encoded up to the last place
// where a cut changes nothing (bpe_cut); what is behind it waits. One thread uses an Encoder at a time.
typedef struct {
    const Tokenizer* tokenizer;
    BpeWork* work;
    Utf8Stream utf8;
    Text waiting;
    int64_t bytes, first_replaced;       // bytes seen; where in them the first invalid one was, -1: none
} Encoder;

void encoder_open(Encoder* e, const Tokenizer* t) {
    memset(e, 0, sizeof *e);
    e->tokenizer = t;
    e->first_replaced = -1;
    if (t->kind == TOKENIZER_BPE) e->work = bpe_work(t->bpe);
}

void encoder_close(Encoder* e) {
    bpe_work_free(e->work);
    free(e->waiting.data);
    memset(e, 0, sizeof *e);
}

// encoder_clean: appends the bytes to the waiting text, whole characters only
static void encoder_clean(Encoder* e, const char* text, size_t n) {
    Text* out = &e->waiting;
    for (size_t i = 0, end; i < n; i = end) {        // a byte may become three: not room for all at once
        end = min_size(i + 4096, n);
        char *to = text_room(out, 3 * (end - i) + 8), *start = to;
        while (to && i < end) {
            uint64_t word;
            for (; e->utf8.n == 0 && i + 8 <= end; i += 8, to += 8) {        // ASCII
                memcpy(&word, text + i, 8);
                if (word & 0x8080808080808080ull) break;
                memcpy(to, &word, 8);
            }
            for (size_t stop = min_size(i + 8, end); i < stop; i++) {
                to += utf8_push(&e->utf8, (unsigned char)text[i], to);
                if (e->utf8.replaced && e->first_replaced < 0) e->first_replaced = e->bytes + (int64_t)i;
            }
        }
        out->n += (size_t)(to - start);
    }
    e->bytes += (int64_t)n;
}

// encoder_add: the next n bytes of a text, whose end is reached with `end`; appends the ids that are certain.
// Any bytes are allowed, NUL too. The literal text of an added token becomes that token, as in `tokenizers`;
// with bytes the end token's text is not interpreted: there a document cannot end itself.
bool encoder_add(Encoder* e, const char* text, size_t n, bool end, TokenList* out, Error* err) {
    const Tokenizer* t = e->tokenizer;
    if (t->kind == TOKENIZER_BYTES) for (size_t i = 0; i < n; i++) token_add(out, (unsigned char)text[i]);
    if (t->kind != TOKENIZER_BPE) return true;
    encoder_clean(e, text, n);
    if (end) {
        char rest[TOKENIZER_MAX_TEXT];
        text_append(&e->waiting, rest, tokenizer_flush(&e->utf8, rest));
        if (e->utf8.replaced && e->first_replaced < 0) e->first_replaced = e->bytes - 1;
    }
    if (e->waiting.failed) return fail(err, "out of memory for a text of %lld bytes", (long long)e->bytes);
    size_t ready = end ? e->waiting.n : bpe_cut(t->bpe, e->waiting.data, e->waiting.n);
    if (!bpe_encode(e->work, e->waiting.data, ready, out, err)) return false;
    if (ready) memmove(e->waiting.data, e->waiting.data + ready, e->waiting.n -= ready);
    return true;
}

// tokenizer_encode: a whole text as ids; caller frees. NULL, count 0: this tokenizer has no text form.
int* tokenizer_encode(const Tokenizer* t, const char* text, size_t n, size_t* count) {
    Encoder e;
    Error err;
    TokenList list = {(int*)xcalloc(n / 4 + 1, sizeof(int)), 0, n / 4 + 1};
    *count = 0;
    if (t->kind == TOKENIZER_NONE) { free(list.id); return NULL; }
    encoder_open(&e, t);
    if (!encoder_add(&e, text, n, true, &list, &err)) die("%s", err.text);
    encoder_close(&e);
    *count = list.n;
    return list.id;
}

// ---- JSON texts, one in a line: documents, items, prompts

enum { MAX_LINE = 1 << 19, MAX_LINE_VALUES = 4096 };

// json_line: the JSON text of one line of at most `most` bytes. Its values are counted first: an array of
// numbers takes 20 times the memory of its text, and no document, item or prompt has many.
static json_t* json_line(const char* line, size_t n, size_t most, Error* err) {
    size_t values = 0;
    bool quoted = false;
    for (size_t i = 0; i < n; i++) {
        if (line[i] == '"') quoted = !quoted;
        else if (quoted) i += line[i] == '\\';
        else values += line[i] == '[' || line[i] == '{' || line[i] == ',' || line[i] == ':';
    }
    if (n > most || values > MAX_LINE_VALUES) {
        fail(err, "expected at most %zu bytes and %d values in a line of JSON, found %zu and %zu or more; "
             "divide it", most, MAX_LINE_VALUES, n, values);
        return NULL;
    }
    json_error_t where;
    json_t* root = json_loadb(line, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL | JSON_DECODE_ANY, &where);
    if (!root) fail_line(err, "expected JSON, found: %s", where.text);
    return root;
}

// ---- encoding files

// Text and JSON lines files are cut into pieces that are encoded by all threads at once: a text where bpe_cut
// allows it (a tokenizer that allows no cut takes the whole file as one piece), JSON lines at line ends. Of
// JSON lines the memory is at most twice the file plus 16 MiB for each thread: what is made of a line, a
// piece or a word in work takes up to 32 times its bytes, so a line may have 1/32 of its file, or MAX_LINE.
enum { TEXT_PIECE = 1 << 18 };           // bytes, unless there is no cut

typedef struct {
    Text text;
    int64_t at;                          // where in the file it begins
    TokenList ids;
    int64_t lines, replaced, first_replaced;
    bool ok;
    Error err;
} TextPiece;

typedef struct {
    const Tokenizer* tokenizer;
    int eos;                             // in front of every document; -1: nothing
    int fd;
    const char* path;
    int64_t size;
    bool json_lines;                     // each line an object with a string "text", a document
    int64_t border;                      // no piece goes on across it, if there is a cut
    int64_t read;                        // bytes taken from the file so far
    Text carry;                          // of them, those behind the last cut
    int64_t replaced, first_replaced;    // invalid bytes that became U+FFFD, where the first was
} TextFile;

static bool is_json_lines(const char* path) {
    const char* dot = strrchr(path, '.');
    return dot && (strcmp(dot, ".jsonl") == 0 || strcmp(dot, ".ndjson") == 0);
}

static TextFile text_file(const char* path, int fd, int64_t size, const Tokenizer* tok, int eos) {
    TextFile f;
    memset(&f, 0, sizeof f);
    f.path = path;
    f.fd = fd;
    f.size = size;
    f.tokenizer = tok;
    f.eos = eos;
    f.json_lines = is_json_lines(path);
    return f;
}

static size_t text_file_line(const TextFile* f) {        // bytes that a line of JSON may have
    return max_size((size_t)f->size / 32, MAX_LINE);
}

// text_file_cut: how many of the n waiting bytes make a piece, 0: more are needed. A line that is too long
// is cut: json_line refuses its beginning.
static size_t text_file_cut(const TextFile* f, const char* text, size_t n) {
    if (f->json_lines) {
        const char* end = (const char*)memrchr(text, '\n', n);
        return end ? (size_t)(end - text) + 1 : n > text_file_line(f) ? n : 0;
    }
    return f->tokenizer->kind == TOKENIZER_BYTES ? n : bpe_cut(f->tokenizer->bpe, text, n);
}

// text_file_next: the next piece; false with an empty one at the end of the file, or on an error
static bool text_file_next(TextFile* f, TextPiece* p, Error* err) {
    p->at = f->read - (int64_t)f->carry.n;
    p->text.n = p->ids.n = 0;
    int64_t rest = f->border - p->at;
    size_t want = rest > 0 && rest < TEXT_PIECE ? (size_t)rest : (size_t)TEXT_PIECE, cut = 0;
    for (;; want *= 2) {
        if (f->carry.n < want && f->read < f->size) {
            size_t n = want - f->carry.n;
            if ((int64_t)n > f->size - f->read) n = (size_t)(f->size - f->read);
            char* to = text_room(&f->carry, n);
            if (!to) return fail(err, "%s: out of memory for a piece of %zu bytes", f->path, want);
            if (!data_read(f->fd, to, n, f->read, f->path, err)) return false;
            f->carry.n += n;
            f->read += (int64_t)n;
        }
        bool all = f->read == f->size && f->carry.n <= want;
        cut = all ? f->carry.n : text_file_cut(f, f->carry.data, want < f->carry.n ? want : f->carry.n);
        if (cut || all) break;
    }
    if (cut == 0) return false;
    text_append(&p->text, f->carry.data, cut);
    memmove(f->carry.data, f->carry.data + cut, f->carry.n -= cut);
    return !p->text.failed || fail(err, "%s: out of memory for a piece of %zu bytes", f->path, cut);
}

// json_line_encode: the document of one line; an empty line holds none
static bool json_line_encode(const TextFile* f, Encoder* e, const char* line, size_t n, TokenList* ids,
                             Error* err) {
    const char* p = line;
    skip_space(&p, line + n);
    if (p == line + n && n <= text_file_line(f)) return true;
    json_t* root = json_line(line, n, text_file_line(f), err);
    const json_t* text = json_object_get(root, "text");
    bool ok = json_is_string(text);
    if (ok) {
        if (f->eos >= 0) token_add(ids, f->eos);
        ok = encoder_add(e, json_string_value(text), json_string_length(text), true, ids, err);
    } else if (root) {
        fail(err, "expected an object with a string \"text\", found %s",
             !json_is_object(root) ? "something else" : text ? "another type" : "none of that name");
    }
    json_decref(root);
    return ok;
}

static void text_piece_encode(const TextFile* f, TextPiece* p, Encoder* e) {
    e->bytes = e->utf8.replaced = 0;
    e->first_replaced = -1;
    p->lines = 0;
    p->ok = true;
    if (!f->json_lines) {
        if (p->at == 0 && f->eos >= 0) token_add(&p->ids, f->eos);
        p->ok = encoder_add(e, p->text.data, p->text.n, true, &p->ids, &p->err);
    }
    for (size_t i = 0; f->json_lines && p->ok && i < p->text.n; p->lines++) {
        const char *line = p->text.data + i, *stop = (const char*)memchr(line, '\n', p->text.n - i);
        size_t n = stop ? (size_t)(stop - line) : p->text.n - i;
        p->ok = json_line_encode(f, e, line, n, &p->ids, &p->err);
        i += n + 1;
    }
    p->replaced = e->utf8.replaced;
    p->first_replaced = e->first_replaced;
}

// text_file_tokens: gives the ids of a file, in order, to `emit`, with the place in the file where the piece
// that they are from begins.
typedef bool TokenSink(void* to, const int* ids, size_t n, int64_t at, Error* err);
static bool text_file_tokens(TextFile* f, TokenSink* emit, void* to, Error* err) {
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    int room = 2 * threads, n = 0;
    int64_t lines = 0;
    TextPiece* piece = (TextPiece*)xcalloc((size_t)room, sizeof(TextPiece));
    Encoder* encoder = (Encoder*)xcalloc((size_t)threads, sizeof(Encoder));
    for (int i = 0; i < threads; i++) encoder_open(&encoder[i], f->tokenizer);
    bool ok = true, more = true;
    if (f->size == 0 && !f->json_lines && f->eos >= 0)
        ok = emit(to, &f->eos, 1, 0, err);    // an empty document
    while (ok && more) {
        err->text[0] = 0;
        for (n = 0; n < room && more; n += more) more = text_file_next(f, &piece[n], err);
        ok = !err->text[0];
        #pragma omp parallel for schedule(dynamic, 1)
        for (int i = 0; i < n; i++) {
            int thread = 0;
#ifdef _OPENMP
            thread = omp_get_thread_num();
#endif
            text_piece_encode(f, &piece[i], &encoder[thread]);
        }
        for (int i = 0; i < n && ok; i++) {
            TextPiece* p = &piece[i];
            ok = p->ok && emit(to, p->ids.id, p->ids.n, p->at, p->ok ? err : &p->err);
            if (p->ok && p->replaced && !f->replaced) f->first_replaced = p->at + p->first_replaced;
            f->replaced += p->replaced;
            if (!p->ok && f->json_lines)
                fail(err, "%s: line %lld: %s", f->path, (long long)(lines + p->lines), p->err.text);
            else if (!p->ok) *err = p->err;
            lines += p->lines;
        }
    }
    for (int i = 0; i < room; i++) { free(piece[i].text.data); free(piece[i].ids.id); }
    for (int i = 0; i < threads; i++) encoder_close(&encoder[i]);
    free(piece);
    free(encoder);
    free(f->carry.data);
    memset(&f->carry, 0, sizeof f->carry);
    return ok;
}

static void text_file_warn(const TextFile* f) {
    if (f->replaced)
        warn("%s: %lld times invalid UTF-8 was replaced by U+FFFD, first at byte %lld", f->path,
             (long long)f->replaced, (long long)f->first_replaced);
}
