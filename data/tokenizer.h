// Text <-> token ids. Today: bytes, ids 0..255, and one end token `<|endoftext|>`, id 256. The file is the
// tokenizer.json of Hugging Face `tokenizers`: a byte-level BPE without merges means "one id per byte".

// Uses safetensors.h: open_regular, read_exact, join_path, fail_line, checkpoint_write_text.

#include <jansson.h>

enum { TOKENIZER_NONE, TOKENIZER_BYTES };     // NONE: token shards without a text form; decoding prints ids
enum { TOKENIZER_MAX_TEXT = 64 };             // bytes that one call of tokenizer_decode can write
enum { TOKENIZER_MAX_FILE = 1 << 20 };        // bytes of tokenizer.json; a byte tokenizer needs 6 KB

#define END_TEXT "<|endoftext|>"

typedef struct {
    int kind;              // TOKENIZER_NONE, TOKENIZER_BYTES
    int64_t vocab_size;    // ids that have a meaning: 0..vocab_size-1
    int eos;               // the end token, the first token of the document it precedes; -1: none
} Tokenizer;

void tokenizer_bytes(Tokenizer* t) {
    t->kind = TOKENIZER_BYTES;
    t->vocab_size = 257;
    t->eos = 256;
}

// data_read: exactly n bytes at an offset; a file that ends before has been cut since it was opened.
bool data_read(int fd, void* out, size_t n, int64_t offset, const char* path, Error* err) {
    if (read_exact(fd, out, n, (uint64_t)offset)) return true;
    if (errno) return fail(err, "%s: cannot read: %s", path, strerror(errno));
    return fail(err, "%s: changed while reading: expected %lld bytes or more, found fewer; start again once "
                "it is complete", path, (long long)(offset + (int64_t)n));
}

// ---- tokenizer.json

// byte_symbol: GPT-2's printable stand-in for a byte, as UTF-8. Bytes 33..126, 161..172 and 174..255 stand
// for themselves; the other 68 (controls, space, 127..160, 173) become U+0100, U+0101, ... in order.
void byte_symbol(int byte, char out[3]) {
    int code = byte;
    if (!((byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174)) {
        code = byte <= 32 ? 256 + byte : byte <= 160 ? 256 + 33 + (byte - 127) : 256 + 67;
    }
    int n = 0;
    if (code >= 0x80) {
        out[n++] = (char)(0xC0 | (code >> 6));
        out[n++] = (char)(0x80 | (code & 0x3F));
    } else {
        out[n++] = (char)code;
    }
    out[n] = '\0';
}

// tokenizer_write: tokenizer.json for a byte tokenizer; nothing for TOKENIZER_NONE. Hugging Face `tokenizers`
// loads it and gives the same ids for any UTF-8 text, except that it also turns the literal text
// `<|endoftext|>` into 256.
bool tokenizer_write(const Tokenizer* t, const char* dir, Error* err) {
    if (t->kind == TOKENIZER_NONE) return true;
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

// json_is_type: the object's "type" is this word.
bool json_is_type(const json_t* object, const char* type) {
    const char* found = json_string_value(json_object_get(object, "type"));
    return found && strcmp(found, type) == 0;
}

// tokenizer_parse: accepts what means "one id per byte and at most one added token, 256"; all else is refused
// with the key that differs, because guessing would train or generate with wrong ids.
bool tokenizer_parse(Tokenizer* t, const json_t* root, const char* path, Error* err) {
    const json_t* model = json_object_get(root, "model");
    const json_t* vocab = json_object_get(model, "vocab");
    const json_t* merges = json_object_get(model, "merges");
    const json_t* added = json_object_get(root, "added_tokens");
    const json_t* pre = json_object_get(root, "pre_tokenizer");
    const json_t* normalizer = json_object_get(root, "normalizer");
    const json_t* post = json_object_get(root, "post_processor");
    const char* const affix[] = { "continuing_subword_prefix", "end_of_word_suffix" };
    const char* const advice = "; only byte tokenizers (byte-level BPE without merges) can be read";
    if (!json_is_type(model, "BPE") || !json_is_object(vocab))
        return fail(err, "%s: expected \"model\" of type \"BPE\" with a \"vocab\"%s", path, advice);
    if (merges && !(json_is_array(merges) && json_array_size(merges) == 0))
        return fail(err, "%s: expected no \"merges\", found %zu%s", path, json_array_size(merges), advice);
    if (!json_is_type(pre, "ByteLevel") || json_is_true(json_object_get(pre, "add_prefix_space")))
        return fail(err, "%s: expected \"pre_tokenizer\" of type \"ByteLevel\" without prefix space%s", path,
                    advice);
    if ((normalizer && !json_is_null(normalizer)) ||
        (post && !json_is_null(post) && !json_is_type(post, "ByteLevel")))
        return fail(err, "%s: expected no \"normalizer\" and no \"post_processor\"%s", path, advice);
    for (int i = 0; i < 2; i++) {
        const char* word = json_string_value(json_object_get(model, affix[i]));
        if (word && *word) return fail(err, "%s: expected no \"%s\", found one%s", path, affix[i], advice);
    }
    if (json_object_size(vocab) != 256)
        return fail(err, "%s: expected 256 entries in \"vocab\", found %zu%s", path, json_object_size(vocab),
                    advice);
    for (int i = 0; i < 256; i++) {
        char symbol[3];
        byte_symbol(i, symbol);
        const json_t* id = json_object_get(vocab, symbol);
        if (!json_is_integer(id) || json_integer_value(id) != i)
            return fail(err, "%s: \"vocab\": expected id %d for byte %d, found %s%s", path, i, i,
                        id ? "another" : "none", advice);
    }
    if (added && !json_is_array(added)) return fail(err, "%s: expected a list in \"added_tokens\"", path);
    if (json_array_size(added) > 1)
        return fail(err, "%s: expected at most one of \"added_tokens\", found %zu%s", path,
                    json_array_size(added), advice);
    tokenizer_bytes(t);
    if (json_array_size(added) == 0) {
        t->vocab_size = 256;
        t->eos = -1;
        return true;
    }
    const json_t* end = json_array_get(added, 0);
    const json_t* id = json_object_get(end, "id");
    const char* content = json_string_value(json_object_get(end, "content"));
    if (!json_is_integer(id) || json_integer_value(id) != 256 || !content || strcmp(content, END_TEXT) != 0)
        return fail(err, "%s: expected the one added token \"%s\" with id 256%s", path, END_TEXT, advice);
    return true;
}

// tokenizer_read: dir/tokenizer.json. A missing file is no error: kind becomes TOKENIZER_NONE and vocab_size
// and eos stay as the caller set them (from the model's config); kind is the same after a failure.
bool tokenizer_read(Tokenizer* t, const char* dir, Error* err) {
    char path[4096];
    struct stat st;
    t->kind = TOKENIZER_NONE;
    if (!join_path(path, sizeof path, dir, "tokenizer.json", err)) return false;
    if (stat(path, &st) != 0 && errno == ENOENT) return true;
    int fd = open_regular(path, &st, err);
    if (fd < 0) return false;
    if (st.st_size > TOKENIZER_MAX_FILE) {
        close(fd);
        return fail(err, "%s: expected a byte tokenizer of at most %d bytes, found %lld; tokenizers with "
                    "merges cannot be read yet", path, TOKENIZER_MAX_FILE, (long long)st.st_size);
    }
    char* text = (char*)xcalloc((size_t)st.st_size + 1, 1);
    bool ok = data_read(fd, text, (size_t)st.st_size, 0, path, err);
    close(fd);
    if (ok) {
        Tokenizer found = *t;
        json_error_t where;
        json_t* root = json_loadb(text, (size_t)st.st_size, JSON_REJECT_DUPLICATES, &where);
        ok = root ? tokenizer_parse(&found, root, path, err)
                  : fail_line(err, "%s: expected JSON, found at line %d: %s", path, where.line, where.text);
        json_decref(root);
        if (ok) *t = found;
    }
    free(text);
    return ok;
}

// ---- encoding

// tokenizer_encode: the bytes of the text as ids; caller frees. Any bytes are allowed, NUL too. The end
// token's literal text is not interpreted: a document cannot end itself. NULL, count 0: this tokenizer has no
// text form.
int* tokenizer_encode(const Tokenizer* t, const char* text, size_t n, size_t* count) {
    *count = 0;
    if (t->kind != TOKENIZER_BYTES) return NULL;
    int* ids = (int*)xrealloc(NULL, n, sizeof(int));
    for (size_t i = 0; i < n; i++) ids[i] = (unsigned char)text[i];
    *count = n;
    return ids;
}

// ---- streaming decode

// Utf8Stream: bytes of a character that is not complete yet. Starts as zeros; raw passes bytes through.
typedef struct {
    unsigned char pending[4];
    int n;
    bool raw;
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
    if (token >= 0 && token < 256) return utf8_push(s, (unsigned char)token, out);
    size_t n = tokenizer_flush(s, out);
    if (token >= 0 && token == t->eos) {
        memcpy(out + n, END_TEXT, strlen(END_TEXT));
        n += strlen(END_TEXT);
    }
    return n;
}
