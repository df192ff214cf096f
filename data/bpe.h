// Byte-level BPE, the tokenizer of GPT-2, GPT-NeoX (the published Mamba models), Llama 3, Qwen and others,
// read from the tokenizer.json of Hugging Face `tokenizers`. The ids are those of that library with
// add_special_tokens=False. A text becomes ids in these steps:
//   1. added tokens with "normalized": false are found in the text, leftmost and longest first
//   2. what lies between them is brought to Unicode's normal form C, if the file asks for it (utf8proc)
//   3. the other added tokens are found in that
//   4. the rest is split into words by the pre-tokenizer's regular expressions (PCRE2)
//   5. the bytes of a word become one token each; then the adjacent pair with the lowest rank, the leftmost
//      of several, is merged, until no pair of the word is in the list of merges
// Sennrich, Haddow, Birch, Neural Machine Translation of Rare Words with Subword Units, 2016; GPT-2's byte
// form.
//
// Not read, and refused by name: other models and normalizers, pre-tokenizers other than Split, Digits,
// ByteLevel and sequences of them, prefix spaces, dropout, affixes of subwords, expressions that PCRE2 and
// Oniguruma (which the file is written for) understand differently.

// Uses safetensors.h: Text, fail_line, read_text, next_key, json_piece, json_string_in_place.

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <utf8proc.h>

enum { BPE_MAX_FILE = 64 << 20 };        // bytes of tokenizer.json; the largest published have 33 MB
enum { BPE_MAX_IDS = 1 << 20 };          // ids are below; the largest published vocabulary has 262,144
enum { BPE_MAX_TOKEN = 4096 };           // bytes of one token's text
enum { BPE_MAX_ADDED = 1 << 16, BPE_MAX_SPLITS = 16, BPE_MAX_ENTRY = 1 << 16 };
enum { BPE_CACHE = 1 << 15, BPE_CACHE_BYTES = 22, BPE_CACHE_IDS = 8 };

typedef struct {
    char* text;
    size_t n;                            // bytes of the text
    int id;
    bool single_word, lstrip, rstrip, normalized;
} AddedToken;

// AddedSet: added tokens sorted by their bytes, and the bytes that they begin with.
typedef struct {
    AddedToken* token;
    size_t n;
    bool first[256];
} AddedSet;

typedef struct {
    pcre2_code* code;
    bool keep_match, keep_rest;          // a part that is not kept has no tokens ("behavior": "Removed")
} Splitter;

typedef struct { uint32_t left, right, rank, id; } Merge;      // left UINT32_MAX: an empty place

typedef struct {
    char* path;                          // for messages
    char* file;                          // tokenizer.json as it was read; a checkpoint carries it on
    char* arena;                         // its parsed copy: the texts of all tokens lie in it
    int64_t n_ids;                       // highest id + 1
    uint32_t* place;                     // where in the arena the text of an id begins
    uint16_t* length;                    // its bytes; 0: this id has no text
    int byte_id[256];                    // -1: the byte has no token (it cannot occur in UTF-8)
    uint32_t* slot;                      // hash of the texts: id + 1, 0 for an empty place
    uint32_t slot_mask;
    Merge* merge;                        // hash of the merges
    uint32_t merge_mask;
    int64_t n_vocab, n_merges;
    AddedSet raw, normalized;            // steps 1 and 3
    Splitter split[BPE_MAX_SPLITS];      // step 4
    int n_splits;
    bool nfc, ignore_merges;
    bool cuts;                           // a text may be cut between an ASCII letter and a blank: see bpe_cut
} Bpe;

void bpe_free(Bpe* b) {
    if (!b) return;
    for (int i = 0; i < b->n_splits; i++) pcre2_code_free(b->split[i].code);
    free(b->path);
    free(b->file);
    free(b->arena);
    free(b->place);
    free(b->length);
    free(b->slot);
    free(b->merge);
    for (size_t i = 0; i < b->raw.n; i++) free(b->raw.token[i].text);
    for (size_t i = 0; i < b->normalized.n; i++) free(b->normalized.token[i].text);
    free(b->raw.token);
    free(b->normalized.token);
    free(b);
}

// ---- characters

// utf8_code: the code point at p of valid UTF-8; *n: its bytes
static uint32_t utf8_code(const char* p, size_t* n) {
    const unsigned char* c = (const unsigned char*)p;
    *n = c[0] < 0x80 ? 1 : c[0] < 0xE0 ? 2 : c[0] < 0xF0 ? 3 : 4;
    if (*n == 1) return c[0];
    if (*n == 2) return (uint32_t)(c[0] & 0x1F) << 6 | (c[1] & 0x3F);
    if (*n == 3) return (uint32_t)(c[0] & 0x0F) << 12 | (uint32_t)(c[1] & 0x3F) << 6 | (c[2] & 0x3F);
    return (uint32_t)(c[0] & 0x07) << 18 | (uint32_t)(c[1] & 0x3F) << 12 | (uint32_t)(c[2] & 0x3F) << 6 |
           (c[3] & 0x3F);
}

// char_before: where the character that ends at p begins
static const char* char_before(const char* p) {
    do p--; while (((unsigned char)*p & 0xC0) == 0x80);
    return p;
}

// The property White_Space of Unicode, once for PCRE2 (whose own \s holds U+180E too) and once in C.
#define WHITE_SPACE \
    "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
static bool is_white_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
           c == 0x3000;
}

// is_word: \w of Unicode's regular expressions: alphabetic, mark, decimal number, connector, join control
static bool is_word(uint32_t c) {
    switch (utf8proc_category((utf8proc_int32_t)c)) {
        case UTF8PROC_CATEGORY_LU: case UTF8PROC_CATEGORY_LL: case UTF8PROC_CATEGORY_LT:
        case UTF8PROC_CATEGORY_LM: case UTF8PROC_CATEGORY_LO: case UTF8PROC_CATEGORY_MN:
        case UTF8PROC_CATEGORY_MC: case UTF8PROC_CATEGORY_ME: case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL: case UTF8PROC_CATEGORY_PC: return true;
        default: break;
    }
    return c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
           (c >= 0x1F150 && c <= 0x1F169) ||
           (c >= 0x1F170 && c <= 0x1F189);    // circled letters and the like
}

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

// symbol_byte: the byte that a symbol stands for, -1 for any other character
static int symbol_byte(uint32_t code) {
    if ((code >= 33 && code <= 126) || (code >= 161 && code <= 172) || (code >= 174 && code <= 255))
        return (int)code;
    if (code < 256 || code >= 256 + 68) return -1;
    int i = (int)code - 256;
    return i <= 32 ? i : i == 67 ? 173 : 127 + (i - 33);
}

// symbols_to_bytes: writes the bytes that n bytes of symbols stand for onto their place; their number, or
// SIZE_MAX, and nothing changed, when a character is not the symbol of a byte.
static size_t symbols_to_bytes(char* text, size_t n) {
    size_t step, out = 0;
    for (size_t i = 0; i < n; i += step) if (symbol_byte(utf8_code(text + i, &step)) < 0) return SIZE_MAX;
    for (size_t i = 0; i < n; i += step) text[out++] = (char)symbol_byte(utf8_code(text + i, &step));
    return out;
}

// ---- the hashes of texts and of merges

static uint64_t hash_bytes(const char* p, size_t n) {
    uint64_t hash = n * 0x9e3779b97f4a7c15ull, word;
    for (; n >= 8; n -= 8, p += 8) {
        memcpy(&word, p, 8);
        hash = (hash ^ word) * 0xbf58476d1ce4e5b9ull;
        hash ^= hash >> 31;
    }
    word = 0;
    memcpy(&word, p, n);
    hash = (hash ^ word) * 0x94d049bb133111ebull;
    return hash ^ hash >> 29;
}

// table_mask: one less than a power of two that leaves a third of the places empty
static uint32_t table_mask(int64_t entries) {
    uint64_t size = 16;
    while (size * 2 < (uint64_t)entries * 3) size *= 2;
    return (uint32_t)(size - 1);
}

static int bpe_find(const Bpe* b, const char* text, size_t n) {
    for (uint32_t i = (uint32_t)hash_bytes(text, n) & b->slot_mask; b->slot[i]; i = (i + 1) & b->slot_mask) {
        uint32_t id = b->slot[i] - 1;
        if (b->length[id] == n && memcmp(b->arena + b->place[id], text, n) == 0) return (int)id;
    }
    return -1;
}

static Merge* merge_place(const Bpe* b, uint32_t left, uint32_t right) {
    uint64_t hash = ((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15ull;
    uint32_t i = (uint32_t)(hash >> 32) & b->merge_mask;
    while (b->merge[i].left != UINT32_MAX && (b->merge[i].left != left || b->merge[i].right != right))
        i = (i + 1) & b->merge_mask;
    return b->merge + i;
}

// ---- normal form C

// text_room: the place behind the text, with room for n bytes; NULL without memory
static char* text_room(Text* text, size_t n) {
    if (text->n + n + 1 > text->size && !text->failed) {
        size_t size = text->n + text->n / 2 + n + 1;
        char* grown = (char*)realloc(text->data, size);
        text->failed = grown == NULL;
        if (grown) { text->data = grown; text->size = size; }
    }
    return text->failed ? NULL : text->data + text->n;
}

static void text_append(Text* text, const char* data, size_t n) {
    char* to = text_room(text, n);
    if (to && n) memcpy(to, data, n);
    text->n += to ? n : 0;
}

// Characters that stay where they are and combine with nothing: those that Unicode got after version 9, whose
// normal form `tokenizers` uses, and whose order or composition newer versions (16 is considered) define; and
// U+11A7, which utf8proc (2.8) loses behind a Hangul syllable.
static const uint32_t nfc_alone[][2] = {
    {0x7FD, 0x7FD},     {0x897, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},
    {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x11A7, 0x11A7},   {0x1715, 0x1715},   {0x1ABF, 0x1ACE},
    {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},   {0x10D24, 0x10D27}, {0x10D69, 0x10D6D}, {0x10EAB, 0x10EAC},
    {0x10EFC, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B},
    {0x11380, 0x113E2}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x11938, 0x11938},
    {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47},
    {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97}, {0x11F41, 0x11F42},
    {0x1611E, 0x1612F}, {0x16D63, 0x16D6A}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136},
    {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}, {0x1E5EE, 0x1E5EF}};

static bool is_nfc_alone(uint32_t c) {
    size_t low = 0, high = sizeof nfc_alone / sizeof *nfc_alone;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (nfc_alone[middle][1] < c) low = middle + 1; else high = middle;
    }
    return low < sizeof nfc_alone / sizeof *nfc_alone && nfc_alone[low][0] <= c;
}

// nfc_append: a text in normal form C. ASCII characters do not combine with what is before them, and a
// character below U+0300 changes only through what follows it, so most text is copied.
static bool nfc_append(Text* out, const char* text, size_t n) {
    size_t i = 0, step;
    while (i < n && !out->failed) {
        size_t start = i;
        bool plain = true;
        if ((unsigned char)text[i] < 0x80 && (i + 1 == n || (unsigned char)text[i + 1] < 0x80)) {
            while (i < n && (unsigned char)text[i] < 0x80) i++;
            i -= i < n;                                  // the last one may combine with what follows
        } else {                                         // one character of ASCII or none, then others
            for (i += (unsigned char)text[i] < 0x80; i < n && (unsigned char)text[i] >= 0x80; i += step) {
                uint32_t c = utf8_code(text + i, &step);
                if (c >= 0x300 && is_nfc_alone(c)) {
                    if (i == start) i += step;
                    break;
                }
                plain = plain && c < 0x300;
            }
        }
        if (plain) {
            text_append(out, text + start, i - start);
            continue;
        }
        utf8proc_uint8_t* form = NULL;
        utf8proc_ssize_t m =
            utf8proc_map((const utf8proc_uint8_t*)text + start, (utf8proc_ssize_t)(i - start), &form,
                         (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
        if (m < 0) return false;
        text_append(out, (const char*)form, (size_t)m);
        free(form);
    }
    return !out->failed;
}

// ---- reading tokenizer.json

// type_word: the word under "type" of an object, for messages too
static const char* type_word(const json_t* object) {
    const char* type = json_string_value(json_object_get(object, "type"));
    return type ? type : "none";
}

static bool json_is_type(const json_t* object, const char* type) {
    return strcmp(type_word(object), type) == 0;
}

// What versions 15 and 16 of Unicode added to the general categories. PCRE2 knows the version that was
// current when it was built (10.42: 14), `tokenizers` knows 16; without these a text with a new emoji would
// get other ids.
static const struct { const char *category, *added; } unicode_16[] = {
    {"Lu", "\\x{1c89}\\x{a7cb}-\\x{a7cc}\\x{a7da}\\x{a7dc}\\x{10d50}-\\x{10d65}"},
    {"Ll", "\\x{1c8a}\\x{a7cd}\\x{a7db}\\x{10d70}-\\x{10d85}\\x{1df25}-\\x{1df2a}"},
    {"Lm", "\\x{10d4e}\\x{10d6f}\\x{16d40}-\\x{16d42}\\x{16d6b}-\\x{16d6c}\\x{1e030}-\\x{1e06d}\\x{1e4eb}"},
    {"Lo", "\\x{105c0}-\\x{105f3}\\x{10d4a}-\\x{10d4d}\\x{10d4f}\\x{10ec2}-\\x{10ec4}"
           "\\x{1123f}-\\x{11240}\\x{11380}-\\x{11389}\\x{1138b}\\x{1138e}\\x{11390}-\\x{113b5}\\x{113b7}"
           "\\x{113d1}\\x{113d3}\\x{11bc0}-\\x{11be0}\\x{11f02}\\x{11f04}-\\x{11f10}\\x{11f12}-\\x{11f33}"
           "\\x{1342f}\\x{13441}-\\x{13446}\\x{13460}-\\x{143fa}\\x{16100}-\\x{1611d}"
           "\\x{16d43}-\\x{16d6a}\\x{18cff}\\x{1b132}\\x{1b155}\\x{1e4d0}-\\x{1e4ea}\\x{1e5d0}-\\x{1e5ed}"
           "\\x{1e5f0}\\x{2b739}\\x{2ebf0}-\\x{2ee5d}\\x{31350}-\\x{323af}"},
    {"M", "\\x{897}\\x{cf3}\\x{ece}\\x{10d69}-\\x{10d6d}\\x{10efc}-\\x{10eff}\\x{11241}"
           "\\x{113b8}-\\x{113c0}\\x{113c2}\\x{113c5}\\x{113c7}-\\x{113ca}\\x{113cc}-\\x{113d0}\\x{113d2}"
           "\\x{113e1}-\\x{113e2}\\x{11f00}-\\x{11f01}\\x{11f03}\\x{11f34}-\\x{11f3a}"
           "\\x{11f3e}-\\x{11f42}\\x{11f5a}\\x{13440}\\x{13447}-\\x{13455}\\x{1611e}-\\x{1612f}\\x{1e08f}"
           "\\x{1e4ec}-\\x{1e4ef}\\x{1e5ee}-\\x{1e5ef}"},
    {"Nd", "\\x{10d40}-\\x{10d49}\\x{116d0}-\\x{116e3}\\x{11bf0}-\\x{11bf9}\\x{11f50}-\\x{11f59}"
           "\\x{16130}-\\x{16139}\\x{16d70}-\\x{16d79}\\x{1ccf0}-\\x{1ccf9}\\x{1e4f0}-\\x{1e4f9}"
           "\\x{1e5f1}-\\x{1e5fa}"},
    {"No", "\\x{1d2c0}-\\x{1d2d3}"},
    {"P", "\\x{1b4e}-\\x{1b4f}\\x{1b7f}\\x{10d6e}\\x{113d4}-\\x{113d5}\\x{113d7}-\\x{113d8}"
           "\\x{11b00}-\\x{11b09}\\x{11be1}\\x{11f43}-\\x{11f4f}\\x{16d6d}-\\x{16d6f}\\x{1e5ff}"},
    {"S", "\\x{2427}-\\x{2429}\\x{2ffc}-\\x{2fff}\\x{31e4}-\\x{31e5}\\x{31ef}\\x{10d8e}-\\x{10d8f}"
           "\\x{1cc00}-\\x{1ccef}\\x{1cd00}-\\x{1ceb3}\\x{1f6dc}\\x{1f774}-\\x{1f776}"
           "\\x{1f77b}-\\x{1f77f}\\x{1f7d9}\\x{1f8b2}-\\x{1f8bb}\\x{1f8c0}-\\x{1f8c1}"
           "\\x{1fa75}-\\x{1fa77}\\x{1fa87}-\\x{1fa89}\\x{1fa8f}\\x{1faad}-\\x{1faaf}"
           "\\x{1fabb}-\\x{1fabf}\\x{1fac6}\\x{1face}-\\x{1facf}\\x{1fada}-\\x{1fadc}\\x{1fadf}"
           "\\x{1fae8}-\\x{1fae9}\\x{1faf7}-\\x{1faf8}\\x{1fbcb}-\\x{1fbef}"},
};

// add_category: \p{name}, whole with what PCRE2 may not know yet
static void add_category(Text* out, const char* name, bool inside) {
    text_add(out, "%s\\p{%s}", inside ? "" : "[", name);
    for (size_t i = 0; i < sizeof unicode_16 / sizeof *unicode_16; i++)
        if (strncmp(unicode_16[i].category, name, strlen(name)) == 0)
            text_add(out, "%s", unicode_16[i].added);
    text_add(out, "%s", inside ? "" : "]");
}

// pattern_translate: an expression for Oniguruma as one for PCRE2. What both read alike is copied; \s, \d and
// \p{...} are spelled out, sets inside of sets are joined, and all else is refused.
static bool pattern_translate(Text* out, const char* pattern, const char* path, Error* err) {
    int depth = 0;                       // of sets
    for (const char* p = pattern; *p; p++) {
        bool known = true;
        if (*p == '\\') {
            char name[32];
            int n = 0;
            p++;
            if (sscanf(p, "p{%31[A-Za-z_]}%n", name, &n) == 1 && n > 0) {
                add_category(out, name, depth > 0);
                p += n - 1;
            } else if (*p == 'd') add_category(out, "Nd", depth > 0);
            else if (*p == 's') text_add(out, depth ? "%s" : "[%s]", WHITE_SPACE);
            else if (*p == 'S' && !depth) text_add(out, "[^%s]", WHITE_SPACE);
            else if (*p && (strchr("rnt", *p) || ispunct((unsigned char)*p))) text_add(out, "\\%c", *p);
            else known = false;
            if (!known) p--;
        } else if (depth && *p == '[') {
            known = p[1] != '^' && p[1] != ':';
            depth++;
        } else if (depth && *p == ']') {
            if (--depth == 0) text_add(out, "]");
        } else if (*p == '[') {
            depth = 1;
            text_add(out, p[1] == '^' ? "[^" : "[");
            p += p[1] == '^';
            known = p[1] != ']';
        } else {
            known = !(depth && p[0] == '&' && p[1] == '&') && !(!depth && p[0] == '}' && p[1] == '+') &&
                    !(!depth && p[0] == '(' && p[1] == '*') &&
                    !(!depth && p[0] == '(' && p[1] == '?' && (!p[2] || !strchr(":=!>i", p[2])));
            text_add(out, "%c", *p);
        }
        if (!known) return fail_line(err, "%s: the expression has \"%.3s\", which cannot be read here; found "
                                     "in: %.200s", path, p, pattern);
    }
    return !out->failed || fail(err, "%s: out of memory", path);
}

#define GPT2_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

// known_pattern: expressions of published tokenizers. No match of theirs holds an ASCII letter with a space
// or a newline after it, and none looks behind: so a text cut there has the same words.
static bool known_pattern(const char* pattern) {
    static const char* const known[] = {
        GPT2_PATTERN,
        "\\p{N}",
        "\\p{N}+",
        "\\p{N}{1,3}",
        "[0-9][0-9][0-9]",
        // Llama 3, Qwen 2, GPT-4, GPT-4o
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
        "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
        "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
        "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|"
        "\\s*[\\r\\n]|\\s+(?!\\S)|\\s+",
        "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+"
        "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}| "
        "?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|"
        "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) if (strcmp(pattern, known[i]) == 0) return true;
    return false;
}

// split_add: one more expression of the pre-tokenizer
static bool split_add(Bpe* b, const char* pattern, bool literal, bool keep_match, bool keep_rest,
                      Error* err) {
    if (b->n_splits == BPE_MAX_SPLITS)
        return fail(err, "%s: expected at most %d expressions in \"pre_tokenizer\"", b->path, BPE_MAX_SPLITS);
    Text text = {NULL, 0, 0, false};
    if (literal) text_add(&text, "%s", pattern);
    else if (!pattern_translate(&text, pattern, b->path, err)) { free(text.data); return false; }
    int code;
    PCRE2_SIZE at;
    // Oniguruma's ^ and $ are those of lines
    uint32_t options =
        PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C);
    pcre2_code* compiled =
        pcre2_compile((PCRE2_SPTR)(text.data ? text.data : ""), text.n, options, &code, &at, NULL);
    free(text.data);
    if (!compiled) {
        PCRE2_UCHAR words[120] = "";
        pcre2_get_error_message(code, words, sizeof words);
        return fail_line(err, "%s: expected a regular expression, found \"%.200s\": %s", b->path, pattern,
                         (const char*)words);
    }
    pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);     // without a JIT the matching takes longer
    Splitter s = {compiled, keep_match, keep_rest};
    b->split[b->n_splits++] = s;
    b->cuts = b->cuts && keep_rest && !literal && known_pattern(pattern);
    return true;
}

// pre_tokenizer_read: Split, Digits and Sequence, then ByteLevel. `last`: nothing follows.
static bool pre_tokenizer_read(Bpe* b, const json_t* pre, bool last, int depth, Error* err) {
    const char* type = type_word(pre);
    if (strcmp(type, "Sequence") == 0) {
        const json_t* list = json_object_get(pre, "pretokenizers");
        size_t n = json_array_size(list);
        if (n == 0 || depth > 4)
            return fail(err, "%s: \"pre_tokenizer\": expected a Sequence that ends in ByteLevel", b->path);
        for (size_t i = 0; i < n; i++)
            if (!pre_tokenizer_read(b, json_array_get(list, i), last && i + 1 == n, depth + 1, err))
                return false;
        return true;
    }
    if (last != (strcmp(type, "ByteLevel") == 0))
        return fail_line(err,
                         "%s: expected \"pre_tokenizer\" ByteLevel as the last and only as the last, found "
                         "%s%.60s",
                         b->path, last ? "at the end " : "before the end ", type);
    if (last) {
        const json_t* regex = json_object_get(pre, "use_regex");
        if (json_is_true(json_object_get(pre, "add_prefix_space")))
            return fail(err,
                        "%s: \"pre_tokenizer\": expected ByteLevel without prefix space (add_prefix_space "
                        "false), found one that adds it",
                        b->path);
        return json_is_false(regex) || split_add(b, GPT2_PATTERN, false, true, true, err);
    }
    if (strcmp(type, "Digits") == 0)
        return split_add(b, json_is_true(json_object_get(pre, "individual_digits")) ? "\\p{N}" : "\\p{N}+",
                         false, true, true, err);
    if (strcmp(type, "Split") != 0)
        return fail_line(err,
                         "%s: \"pre_tokenizer\": expected Split, Digits, ByteLevel or a Sequence of them, "
                         "found %.60s",
                         b->path, type);
    const json_t* pattern = json_object_get(pre, "pattern");
    const char *regex = json_string_value(json_object_get(pattern, "Regex")),
               *string = json_string_value(json_object_get(pattern, "String")),
               *behavior = json_string_value(json_object_get(pre, "behavior"));
    if (!regex && !string)
        return fail(err, "%s: \"pre_tokenizer\": expected \"Regex\" or \"String\" as the pattern of Split",
                    b->path);
    bool removed = behavior && strcmp(behavior, "Removed") == 0,
         invert = json_is_true(json_object_get(pre, "invert"));
    if (!removed && !(behavior && strcmp(behavior, "Isolated") == 0))
        return fail_line(
            err, "%s: \"pre_tokenizer\": expected Split with behavior Isolated or Removed, found %.60s",
            b->path, behavior ? behavior : "none");
    return split_add(b, regex ? regex : string, !regex, !removed || invert, !removed || !invert, err);
}

// normalizer_read: NFC, or none
static bool normalizer_read(Bpe* b, const json_t* normalizer, int depth, Error* err) {
    if (!normalizer || json_is_null(normalizer)) return true;
    if (json_is_type(normalizer, "Sequence") && depth < 4) {
        const json_t* list = json_object_get(normalizer, "normalizers");
        for (size_t i = 0; i < json_array_size(list); i++)
            if (!normalizer_read(b, json_array_get(list, i), depth + 1, err)) return false;
        return true;
    }
    if (!json_is_type(normalizer, "NFC"))
        return fail_line(err, "%s: expected \"normalizer\" NFC or none, found %.60s", b->path,
                         type_word(normalizer));
    b->nfc = true;
    return true;
}

// processor_read: what only adds tokens around the ids, or changes offsets, is left out
static bool processor_read(const Bpe* b, const json_t* post, int depth, Error* err) {
    if (!post || json_is_null(post) || json_is_type(post, "ByteLevel") ||
        json_is_type(post, "TemplateProcessing"))
        return true;
    if (!json_is_type(post, "Sequence") || depth >= 4)
        return fail_line(err,
                         "%s: expected \"post_processor\" ByteLevel, TemplateProcessing or none, found %.60s",
                         b->path, type_word(post));
    const json_t* list = json_object_get(post, "processors");
    for (size_t i = 0; i < json_array_size(list); i++)
        if (!processor_read(b, json_array_get(list, i), depth + 1, err)) return false;
    return true;
}

// next_item: steps over the `[` or `,` before an item of a list. False at its end (*done) and when malformed.
static bool next_item(const char** p, const char* end, bool first, bool* done, json_error_t* e) {
    snprintf(e->text, sizeof e->text, "expected %s", first ? "[" : ", or ]");
    skip_space(p, end);
    *done = *p < end && !first && **p == ']';
    if (*p < end && **p == (first ? '[' : ',')) {
        ++*p;
        skip_space(p, end);
        *done = first && *p < end && **p == ']';
        if (!*done) return true;
    }
    if (*done) ++*p;
    return false;
}

// not_json: the place of a syntax error as line and words
static bool not_json(const Bpe* b, const char* p, const json_error_t* e, Error* err) {
    int line = 1;
    for (const char *c = b->file, *stop = c + (p - b->arena); c < stop; c++) line += *c == '\n';
    return fail_line(err, "%s: expected JSON, found at line %d: %s", b->path, line, e->text);
}

// id_take: false when an id is outside of the range or taken
static bool id_take(Bpe* b, json_int_t id, const char* text, Error* err) {
    if (id < 0 || id >= BPE_MAX_IDS)
        return fail_line(err, "%s: the token \"%.60s\" has the id %lld, expected 0 .. %d", b->path, text,
                         (long long)id, BPE_MAX_IDS - 1);
    if (b->length[id])
        return fail_line(err, "%s: two tokens have the id %lld: \"%.60s\" and \"%.60s\"", b->path,
                         (long long)id, b->arena + b->place[id], text);
    if (id >= b->n_ids) b->n_ids = id + 1;
    return true;
}

// vocab_read: {"symbols": id, ...}. The symbols become bytes on their place in the arena. An entry with other
// characters is never the result of a merge: its text is what it says, and the hash leaves it out.
static bool vocab_read(Bpe* b, const char** p, const char* end, Error* err) {
    json_error_t e;
    bool done = false, ok = true;
    char* key;
    bool* literal = (bool*)xcalloc(BPE_MAX_IDS, sizeof(bool));
    for (bool first = true; ok && (key = next_key(p, end, first, b->arena, &done, &e)) != NULL;
         first = false) {
        size_t n = strlen(key);
        json_t* value = json_piece(p, end, 32, &e);
        json_int_t id = json_integer_value(value);
        bool whole = json_is_integer(value);
        json_decref(value);
        if (!value) break;
        ok = whole ? id_take(b, id, key, err)
                   : fail_line(err, "%s: \"vocab\": expected a whole number as the id of \"%.60s\"", b->path,
                               key);
        if (!ok) break;
        size_t bytes = symbols_to_bytes(key, n);
        literal[id] = bytes == SIZE_MAX;
        if (literal[id]) bytes = n;
        if (bytes == 0 || bytes > BPE_MAX_TOKEN)
            ok = fail(err, "%s: \"vocab\": expected 1 .. %d bytes of text for id %lld, found %zu", b->path,
                      BPE_MAX_TOKEN, (long long)id, bytes);
        b->place[id] = (uint32_t)(key - b->arena);
        b->length[id] = (uint16_t)bytes;
        b->n_vocab++;
    }
    if (ok && !done) ok = not_json(b, *p, &e, err);
    if (!ok) {
        free(literal);
        return false;
    }
    b->slot_mask = table_mask(b->n_vocab);
    b->slot = (uint32_t*)xcalloc((size_t)b->slot_mask + 1, sizeof *b->slot);
    for (int64_t id = 0; ok && id < b->n_ids; id++) {
        if (!b->length[id] || literal[id]) continue;
        const char* text = b->arena + b->place[id];
        int other = bpe_find(b, text, b->length[id]);
        if (other >= 0)
            ok = fail(err, "%s: \"vocab\": the ids %d and %lld have the same text", b->path, other,
                      (long long)id);
        uint32_t i = (uint32_t)hash_bytes(text, b->length[id]) & b->slot_mask;
        while (b->slot[i]) i = (i + 1) & b->slot_mask;
        b->slot[i] = (uint32_t)id + 1;
    }
    free(literal);
    for (int byte = 0; byte < 256 && ok; byte++) {
        char one = (char)byte;
        b->byte_id[byte] = bpe_find(b, &one, 1);
        bool possible = byte < 0xC0 || (byte > 0xC1 && byte < 0xF5);      // in UTF-8
        if (b->byte_id[byte] < 0 && possible)
            ok = fail(
                err,
                "%s: \"vocab\": expected an entry for every byte, found none for byte %d; only byte-level "
                "BPE can be read",
                b->path, byte);
    }
    return ok;
}

// merges_read: ["left right", ...] or [["left", "right"], ...] in the order of their ranks. Both parts and
// what they make together must be entries of the vocabulary, so a merge always makes a longer text.
static bool merges_read(Bpe* b, const char** p, const char* end, Error* err) {
    json_error_t e;
    bool done;
    size_t room = 0;
    Merge* list = NULL;
    char joined[2 * BPE_MAX_TOKEN];
    if (!b->slot) return fail(err, "%s: expected \"vocab\" in front of \"merges\"", b->path);
    for (bool first = true; next_item(p, end, first, &done, &e); first = false) {
        char *left = NULL, *right = NULL;
        if (**p == '[') {
            ++*p;
            skip_space(p, end);
            left = json_string_in_place(p, end, BPE_MAX_ENTRY, b->arena, &e);
            skip_space(p, end);
            if (left && *p < end && *(*p)++ == ',') {
                skip_space(p, end);
                right = json_string_in_place(p, end, BPE_MAX_ENTRY, b->arena, &e);
                skip_space(p, end);
                if (*p == end || *(*p)++ != ']') right = NULL;
            }
        } else {
            left = json_string_in_place(p, end, BPE_MAX_ENTRY, b->arena, &e);
            if (left && strncmp(left, "#version", 8) == 0) continue;
            right = left ? strchr(left, ' ') : NULL;
            if (right) *right++ = '\0';
        }
        if (!left || !right || strchr(right, ' ')) {
            free(list);
            return fail(
                err,
                "%s: \"merges\": expected two entries of the vocabulary as merge %lld, found something "
                "else",
                b->path, (long long)b->n_merges);
        }
        size_t n = strlen(left), m = strlen(right);
        char said[2][64];
        snprintf(said[0], sizeof said[0], "%s", left);
        snprintf(said[1], sizeof said[1], "%s", right);
        n = symbols_to_bytes(left, n);
        m = symbols_to_bytes(right, m);
        int id[3] = {-1, -1, -1};
        if (n <= BPE_MAX_TOKEN && m <= BPE_MAX_TOKEN) {
            memcpy(joined, left, n);
            memcpy(joined + n, right, m);
            id[0] = bpe_find(b, left, n);
            id[1] = bpe_find(b, right, m);
            id[2] = bpe_find(b, joined, n + m);
        }
        for (int i = 0; i < 3; i++) {
            if (id[i] >= 0) continue;
            free(list);
            return fail_line(
                err,
                "%s: \"merges\": merge %lld is of \"%s\" and \"%s\"; expected both and what they "
                "make in \"vocab\", %s is not there",
                b->path, (long long)b->n_merges, said[0], said[1],
                i == 0   ? "the first"
                : i == 1 ? "the second"
                         : "what they make");
        }
        if ((size_t)b->n_merges == room) {
            room = room ? room + room / 2 : 4096;
            list = (Merge*)xrealloc(list, room, sizeof *list);
        }
        Merge merge = {(uint32_t)id[0], (uint32_t)id[1], (uint32_t)b->n_merges++, (uint32_t)id[2]};
        list[merge.rank] = merge;
    }
    if (done) {
        b->merge_mask = table_mask(b->n_merges);
        b->merge = (Merge*)xrealloc(NULL, (size_t)b->merge_mask + 1, sizeof *b->merge);
        memset(b->merge, 0xFF, ((size_t)b->merge_mask + 1) * sizeof *b->merge);
        for (int64_t i = 0; i < b->n_merges; i++) *merge_place(b, list[i].left, list[i].right) = list[i];
    }
    free(list);
    return done || not_json(b, *p, &e, err);
}

// model_read: the object "model"
static bool model_read(Bpe* b, const char** p, const char* end, Error* err) {
    enum { VOCAB, MERGES, TYPE, DROPOUT, IGNORE_MERGES, PREFIX, SUFFIX, N_KEYS };
    static const char* const keys[N_KEYS] = {"vocab", "merges", "type", "dropout", "ignore_merges",
                                             "continuing_subword_prefix", "end_of_word_suffix"};
    json_error_t e;
    bool done = false, seen[N_KEYS + 1] = {false};
    const char* key;
    for (bool first = true; (key = next_key(p, end, first, b->arena, &done, &e)) != NULL; first = false) {
        int k = 0;
        while (k < N_KEYS && strcmp(key, keys[k]) != 0) k++;
        if (seen[k] && k < N_KEYS) return fail(err, "%s: \"%s\" is there twice", b->path, keys[k]);
        seen[k] = true;
        if (k == VOCAB || k == MERGES) {
            if (!(k == VOCAB ? vocab_read(b, p, end, err) : merges_read(b, p, end, err))) return false;
            continue;
        }
        json_t* value = json_piece(p, end, BPE_MAX_ENTRY, &e);
        if (!value) break;
        const char* word = json_string_value(value);
        bool ok = true;
        if (k == TYPE && !(word && strcmp(word, "BPE") == 0))
            ok = fail_line(err, "%s: expected \"model\" of type \"BPE\", found %.60s", b->path,
                           word ? word : "another");
        if ((k == PREFIX || k == SUFFIX) && word && *word)
            ok = fail(err, "%s: expected no \"%s\", found one; only byte-level BPE can be read", b->path,
                      keys[k]);
        if (k == DROPOUT && json_number_value(value) != 0)
            ok = fail(err, "%s: expected no \"dropout\", found %g; set it to null", b->path,
                      json_number_value(value));
        if (k == IGNORE_MERGES) b->ignore_merges = json_is_true(value);
        json_decref(value);
        if (!ok) return false;
    }
    if (!done) return not_json(b, *p, &e, err);
    if (b->slot && !b->merge) {                           // bytes alone: a list may be missing
        b->merge = (Merge*)xrealloc(NULL, 16, sizeof *b->merge);
        memset(b->merge, 0xFF, 16 * sizeof *b->merge);
        b->merge_mask = 15;
    }
    return b->slot || fail(err, "%s: expected \"vocab\" in \"model\", found none", b->path);
}

// added_list_read: "added_tokens". Their contents stay in the arena; ids are given once the vocabulary is
// known.
static bool added_list_read(Bpe* b, const char** p, const char* end, AddedToken** list, size_t* n,
                            Error* err) {
    json_error_t e;
    bool done;
    size_t room = 0;
    for (bool first = true; next_item(p, end, first, &done, &e); first = false) {
        char* place = b->arena + (*p - b->arena);
        json_t* item = json_piece(p, end, BPE_MAX_ENTRY, &e);
        if (!item) return not_json(b, *p, &e, err);
        const json_t* id = json_object_get(item, "id");
        const char* content = json_string_value(json_object_get(item, "content"));
        if (*n == BPE_MAX_ADDED || !json_is_integer(id) || !content || !*content ||
            json_integer_value(id) < 0 || json_integer_value(id) >= BPE_MAX_IDS ||
            strlen(content) > BPE_MAX_TOKEN) {
            json_decref(item);
            if (*n == BPE_MAX_ADDED)
                return fail(err, "%s: expected at most %d of \"added_tokens\", found more", b->path,
                            BPE_MAX_ADDED);
            return fail(
                err,
                "%s: \"added_tokens\": expected an \"id\" 0 .. %d and a \"content\" of 1 .. %d bytes in "
                "item %zu",
                b->path, BPE_MAX_IDS - 1, BPE_MAX_TOKEN, *n);
        }
        const json_t* normalized = json_object_get(item, "normalized");
        AddedToken t = {
            place,
            strlen(content),
            (int)json_integer_value(id),
            json_is_true(json_object_get(item, "single_word")),
            json_is_true(json_object_get(item, "lstrip")),
            json_is_true(json_object_get(item, "rstrip")),
            normalized ? json_is_true(normalized) : !json_is_true(json_object_get(item, "special"))};
        memcpy(place, content, t.n + 1);                 // the item is longer than its content
        json_decref(item);
        if (*n == room) {
            room = room ? 2 * room : 64;
            *list = (AddedToken*)xrealloc(*list, room, sizeof **list);
        }
        (*list)[(*n)++] = t;
    }
    return done || not_json(b, *p, &e, err);
}

static int added_order(const void* a, const void* b) {
    const AddedToken *x = (const AddedToken*)a, *y = (const AddedToken*)b;
    int order = memcmp(x->text, y->text, x->n < y->n ? x->n : y->n);
    return order ? order : (x->n > y->n) - (x->n < y->n);
}

// added_place: gives the added tokens their ids and sorts them into both sets
static bool added_place(Bpe* b, const AddedToken* list, size_t n, Error* err) {
    char bytes[BPE_MAX_TOKEN + 1];
    AddedSet* const sets[2] = {&b->raw, &b->normalized};
    for (int i = 0; i < 2; i++) sets[i]->token = (AddedToken*)xcalloc(n, sizeof(AddedToken));
    for (size_t i = 0; i < n; i++) {
        AddedToken t = list[i];
        memcpy(bytes, t.text, t.n + 1);
        size_t m = symbols_to_bytes(bytes, t.n);
        int other = m == SIZE_MAX ? -1 : bpe_find(b, bytes, m);
        if ((int64_t)t.id < b->n_ids && b->length[t.id]) {            // an entry of the vocabulary, too
            if (b->length[t.id] != t.n || memcmp(b->arena + b->place[t.id], t.text, t.n) != 0)
                return fail_line(
                    err,
                    "%s: \"added_tokens\": \"%.60s\" has the id %d, which is that of another token, "
                    "\"%.*s\"",
                    b->path, t.text, t.id, b->length[t.id] < 60 ? b->length[t.id] : 60,
                    b->arena + b->place[t.id]);
        } else {
            if (other >= 0)
                return fail_line(err, "%s: \"added_tokens\": \"%.60s\" has the id %d, but %d in \"vocab\"",
                                 b->path, t.text, t.id, other);
            if (!id_take(b, t.id, t.text, err)) return false;
            b->place[t.id] = (uint32_t)(t.text - b->arena);
            b->length[t.id] = (uint16_t)t.n;
        }
        // where a text must not be cut: inside of a token, or where a token looks across the cut
        bool letter = isalpha((unsigned char)t.text[t.n - 1]);
        b->cuts =
            b->cuts && !(t.rstrip && letter) && !(t.single_word && (t.text[0] == ' ' || t.text[0] == '\n'));
        for (size_t k = 1; k < t.n; k++)
            if (isalpha((unsigned char)t.text[k - 1]) && (t.text[k] == ' ' || t.text[k] == '\n'))
                b->cuts = false;
        Text text = {NULL, 0, 0, false};
        if (t.normalized && b->nfc) nfc_append(&text, t.text, t.n);
        else text_append(&text, t.text, t.n);
        if (text.failed || !text.n) return fail(err, "%s: out of memory", b->path);
        t.text = text.data;
        t.n = text.n;
        AddedSet* set = sets[t.normalized];
        set->first[(unsigned char)t.text[0]] = true;
        set->token[set->n++] = t;
    }
    for (int i = 0; i < 2; i++) {
        qsort(sets[i]->token, sets[i]->n, sizeof(AddedToken), added_order);
        for (size_t k = 1; k < sets[i]->n; k++)
            if (added_order(&sets[i]->token[k - 1], &sets[i]->token[k]) == 0)
                return fail_line(err, "%s: \"added_tokens\": the ids %d and %d have the same content",
                                 b->path, sets[i]->token[k - 1].id, sets[i]->token[k].id);
    }
    return true;
}

// bpe_parse: all of the file, one entry at a time
static bool bpe_parse(Bpe* b, size_t size, Error* err) {
    enum { MODEL, ADDED, NORMALIZER, PRE, POST, DECODER, N_KEYS };
    static const char* const keys[N_KEYS] = {"model", "added_tokens", "normalizer", "pre_tokenizer",
                                             "post_processor", "decoder"};
    const char *p = b->arena, *end = b->arena + size, *key;
    json_error_t e;
    bool done = false, ok = true, seen[N_KEYS + 1] = {false};
    AddedToken* added = NULL;
    size_t n_added = 0;
    for (bool first = true; ok && (key = next_key(&p, end, first, b->arena, &done, &e)) != NULL;
         first = false) {
        int k = 0;
        while (k < N_KEYS && strcmp(key, keys[k]) != 0) k++;
        if (seen[k] && k < N_KEYS) ok = fail(err, "%s: \"%s\" is there twice", b->path, keys[k]);
        seen[k] = true;
        if (!ok) break;
        if (k == MODEL) ok = model_read(b, &p, end, err);
        else if (k == ADDED) ok = added_list_read(b, &p, end, &added, &n_added, err);
        else {
            json_t* value = json_piece(&p, end, 4 * BPE_MAX_ENTRY, &e);
            if (!value) break;
            if (k == NORMALIZER) ok = normalizer_read(b, value, 0, err);
            if (k == PRE) ok = pre_tokenizer_read(b, value, true, 0, err);
            if (k == POST) ok = processor_read(b, value, 0, err);
            if (k == DECODER && !json_is_type(value, "ByteLevel"))
                ok = fail_line(err, "%s: expected \"decoder\" ByteLevel, found %.60s", b->path,
                               type_word(value));
            json_decref(value);
        }
    }
    if (ok && !done) ok = not_json(b, p, &e, err);
    skip_space(&p, end);
    if (ok && p != end)
        ok = fail(err, "%s: expected the end of the file, found text after the JSON", b->path);
    for (int k = MODEL; k <= PRE && ok; k += PRE - MODEL)
        if (!seen[k]) ok = fail(err, "%s: expected \"%s\", found none", b->path, keys[k]);
    if (ok) ok = added_place(b, added, n_added, err);
    free(added);
    return ok;
}

// bpe_load: a tokenizer.json. NULL with a line when it is damaged or asks for something else than is read
// here.
Bpe* bpe_load(const char* path, Error* err) {
    size_t size;
    char* file = read_text(path, BPE_MAX_FILE, &size, err);
    if (!file) return NULL;
    Bpe* b = (Bpe*)xcalloc(1, sizeof *b);
    b->file = file;
    b->path = strdup(path);
    b->arena = (char*)xrealloc(NULL, size + 1, 1);
    memcpy(b->arena, file, size + 1);
    b->place = (uint32_t*)xcalloc(BPE_MAX_IDS, sizeof *b->place);
    b->length = (uint16_t*)xcalloc(BPE_MAX_IDS, sizeof *b->length);
    b->cuts = true;
    if (bpe_parse(b, size, err)) {
        b->place = (uint32_t*)xrealloc(b->place, (size_t)b->n_ids, sizeof *b->place);
        b->length = (uint16_t*)xrealloc(b->length, (size_t)b->n_ids, sizeof *b->length);
        return b;
    }
    bpe_free(b);
    return NULL;
}

// ---- encoding

typedef struct { int* id; size_t n, room; } TokenList;

static void token_add(TokenList* list, int id) {
    if (list->n == list->room) {
        list->room += list->room / 2 + 256;
        list->id = (int*)xrealloc(list->id, list->room, sizeof(int));
    }
    list->id[list->n++] = id;
}

// CachedWord: words are few and repeat. A place of the cache holds the last word whose hash fell there.
typedef struct {
    uint8_t n_bytes, n_ids;
    char bytes[BPE_CACHE_BYTES];
    int id[BPE_CACHE_IDS];
} CachedWord;

// Symbol: a part of a word during its merges, at the place of its first byte. The number of its bytes stands
// there and at its last byte, so that both neighbours are found. id -1: merged into the one before.
typedef struct { int id, bytes; } Symbol;

// BpeWork: what one thread needs for encoding
typedef struct {
    const Bpe* bpe;
    TokenList* out;
    Error* err;
    CachedWord* cache;
    Symbol* symbol;
    uint64_t* heap;                      // rank << 32 | position of the left symbol
    size_t room, n_heap;
    Text form;                           // step 2
    pcre2_match_data* match[BPE_MAX_SPLITS];
    pcre2_match_context* limits;
} BpeWork;

BpeWork* bpe_work(const Bpe* b) {
    BpeWork* w = (BpeWork*)xcalloc(1, sizeof *w);
    w->bpe = b;
    w->cache = (CachedWord*)xcalloc(BPE_CACHE, sizeof(CachedWord));
    w->limits = pcre2_match_context_create(NULL);
    for (int i = 0; i < b->n_splits; i++) w->match[i] = pcre2_match_data_create(1, NULL);
    bool ok = w->limits != NULL;
    for (int i = 0; i < b->n_splits; i++) ok = ok && w->match[i];
    if (!ok) die("out of memory: could not prepare the regular expressions of the tokenizer");
    pcre2_set_match_limit(w->limits, 4000000);            // an expression that explodes ends with a line
    pcre2_set_heap_limit(w->limits, 16384);               // KiB
    return w;
}

void bpe_work_free(BpeWork* w) {
    if (!w) return;
    for (int i = 0; i < w->bpe->n_splits; i++) pcre2_match_data_free(w->match[i]);
    pcre2_match_context_free(w->limits);
    free(w->cache);
    free(w->symbol);
    free(w->heap);
    free(w->form.data);
    free(w);
}

static void heap_push(BpeWork* w, uint64_t value) {
    size_t i = w->n_heap++;
    for (; i > 0 && w->heap[(i - 1) / 2] > value; i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = value;
}

static uint64_t heap_pop(BpeWork* w) {
    uint64_t top = w->heap[0], last = w->heap[--w->n_heap];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < w->n_heap; i = child) {
        if (child + 1 < w->n_heap && w->heap[child + 1] < w->heap[child]) child++;
        if (w->heap[child] >= last) break;
        w->heap[i] = w->heap[child];
    }
    if (w->n_heap) w->heap[i] = last;
    return top;
}

// pair_push: remembers that the symbols at `left` and after it, in a word of n bytes, can be merged
static void pair_push(BpeWork* w, size_t left, size_t n) {
    size_t right = left + (size_t)w->symbol[left].bytes;
    if (right == n) return;
    const Merge* m = merge_place(w->bpe, (uint32_t)w->symbol[left].id, (uint32_t)w->symbol[right].id);
    if (m->left != UINT32_MAX) heap_push(w, (uint64_t)m->rank << 32 | (uint32_t)left);
}

// bpe_merge: step 5 for one word, in O(n log n). A pair in the heap is out of date when one of its symbols
// has been merged since: then the pair at its place has another rank, or there is none.
static void bpe_merge(BpeWork* w, const char* word, size_t n) {
    const Bpe* b = w->bpe;
    if (n > w->room) {
        w->room = n + n / 8 + 64;
        w->symbol = (Symbol*)xrealloc(w->symbol, w->room, sizeof *w->symbol);
        w->heap = (uint64_t*)xrealloc(w->heap, 2 * w->room, sizeof *w->heap);  // a merge: a pair out, two in
    }
    w->n_heap = 0;
    for (size_t i = 0; i < n; i++) {
        Symbol s = {b->byte_id[(unsigned char)word[i]], 1};
        w->symbol[i] = s;
    }
    for (size_t i = 0; i < n; i++) pair_push(w, i, n);
    while (w->n_heap) {
        uint64_t top = heap_pop(w);
        size_t at = (uint32_t)top;
        Symbol* s = w->symbol + at;
        if (s->id < 0 || at + (size_t)s->bytes == n) continue;
        Symbol* t = s + s->bytes;
        const Merge* m = merge_place(b, (uint32_t)s->id, (uint32_t)t->id);
        if (m->left == UINT32_MAX || m->rank != (uint32_t)(top >> 32)) continue;
        s->id = (int)m->id;
        s->bytes += t->bytes;
        t->id = -1;
        s[s->bytes - 1].bytes = s->bytes;
        pair_push(w, at, n);
        if (at > 0) pair_push(w, at - (size_t)s[-1].bytes, n);
    }
    for (size_t i = 0; i < n; i += (size_t)w->symbol[i].bytes) token_add(w->out, w->symbol[i].id);
}

static void bpe_word(BpeWork* w, const char* word, size_t n) {
    const Bpe* b = w->bpe;
    CachedWord* c = NULL;
    if (n <= BPE_CACHE_BYTES) {
        c = w->cache + (hash_bytes(word, n) & (BPE_CACHE - 1));
        if (c->n_bytes == n && memcmp(c->bytes, word, n) == 0) {
            for (int i = 0; i < c->n_ids; i++) token_add(w->out, c->id[i]);
            return;
        }
    }
    size_t begin = w->out->n;
    int whole = b->ignore_merges ? bpe_find(b, word, n) : -1;
    if (whole >= 0) token_add(w->out, whole);
    else bpe_merge(w, word, n);
    size_t ids = w->out->n - begin;
    if (!c || ids > BPE_CACHE_IDS) return;
    c->n_bytes = (uint8_t)n;
    c->n_ids = (uint8_t)ids;
    memcpy(c->bytes, word, n);
    memcpy(c->id, w->out->id + begin, ids * sizeof(int));
}

// bpe_split: step 4 from the expression `level` on: what it matches and what is between, each a text of its
// own
static bool bpe_split(BpeWork* w, int level, const char* text, size_t n) {
    if (n == 0) return true;
    if (level == w->bpe->n_splits) {
        bpe_word(w, text, n);
        return true;
    }
    const Splitter* s = &w->bpe->split[level];
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(w->match[level]);
    size_t rest = 0, at = 0, step;       // before `rest` all is done, the next match begins at `at` or later
    while (at < n) {
        int code =
            pcre2_match(s->code, (PCRE2_SPTR)text, n, at, PCRE2_NO_UTF_CHECK, w->match[level], w->limits);
        if (code == PCRE2_ERROR_NOMATCH) break;
        if (code < 0) {
            PCRE2_UCHAR words[120] = "";
            pcre2_get_error_message(code, words, sizeof words);
            return fail(w->err, "%s: an expression of \"pre_tokenizer\" cannot be matched with this text: %s",
                        w->bpe->path, (const char*)words);
        }
        size_t begin = range[0], end = range[1];
        if (end <= begin) {              // an empty match ends the text before it
            utf8_code(text + at, &step);
            if (begin > at) at = begin;
            else at += step;
            if (s->keep_rest && begin > rest && !bpe_split(w, level + 1, text + rest, begin - rest))
                return false;
            if (begin > rest) rest = begin;
            continue;
        }
        if (s->keep_rest && !bpe_split(w, level + 1, text + rest, begin - rest)) return false;
        if (s->keep_match && !bpe_split(w, level + 1, text + begin, end - begin)) return false;
        rest = at = end;
    }
    return !s->keep_rest || bpe_split(w, level + 1, text + rest, n - rest);
}

// added_find: the longest added token that the text begins with, NULL when there is none. Bytes narrow the
// range of the sorted tokens that begin like the text.
static const AddedToken* added_find(const AddedSet* set, const char* text, size_t n) {
    const AddedToken *low = set->token, *high = low + set->n, *found = NULL;
    for (size_t k = 0; low < high; k++) {
        if (low->n == k) found = low++;
        if (k == n) break;
        const AddedToken *a = low, *b = high;            // low: the first with this byte at k or above
        while (a < b) {
            const AddedToken* middle = a + (b - a) / 2;
            if ((unsigned char)middle->text[k] < (unsigned char)text[k]) a = middle + 1; else b = middle;
        }
        low = a;
        for (b = high; a < b;) {                         // high: the first above it
            const AddedToken* middle = a + (b - a) / 2;
            if ((unsigned char)middle->text[k] <= (unsigned char)text[k]) a = middle + 1; else b = middle;
        }
        high = a;
    }
    return found;
}

static bool bpe_added(BpeWork* w, bool normalized, const char* text, size_t n);

static bool bpe_normalize(BpeWork* w, const char* text, size_t n) {
    if (!w->bpe->nfc) return bpe_added(w, true, text, n);
    w->form.n = 0;
    if (!nfc_append(&w->form, text, n))
        return fail(w->err, "%s: out of memory for the normal form", w->bpe->path);
    return bpe_added(w, true, w->form.data, w->form.n);
}

// bpe_added: steps 1 (normalized false) to 3. A token that a word character touches is no single_word; lstrip
// and rstrip take the white space beside the token, as far as no token before took it.
static bool bpe_added(BpeWork* w, bool normalized, const char* text, size_t n) {
    const AddedSet* set = normalized ? &w->bpe->normalized : &w->bpe->raw;
    size_t done = 0, step;
    for (size_t i = 0; set->n && i < n;) {
        const AddedToken* t = set->first[(unsigned char)text[i]] ? added_find(set, text + i, n - i) : NULL;
        if (!t) { i++; continue; }
        size_t begin = i, end = i + t->n;
        i = end;
        if (t->single_word && ((begin > 0 && is_word(utf8_code(char_before(text + begin), &step))) ||
                               (end < n && is_word(utf8_code(text + end, &step)))))
            continue;
        while (t->lstrip && begin > done) {
            const char* c = char_before(text + begin);
            if (!is_white_space(utf8_code(c, &step))) break;
            begin = (size_t)(c - text);
        }
        while (t->rstrip && end < n && is_white_space(utf8_code(text + end, &step))) end += step;
        if (begin > done && !(normalized ? bpe_split(w, 0, text + done, begin - done)
                                         : bpe_normalize(w, text + done, begin - done))) return false;
        token_add(w->out, t->id);
        done = end;
    }
    return done >= n || (normalized ? bpe_split(w, 0, text + done, n - done)
                                    : bpe_normalize(w, text + done, n - done));
}

// bpe_encode: appends the ids of a text of valid UTF-8, at most 1 GiB
bool bpe_encode(BpeWork* w, const char* text, size_t n, TokenList* out, Error* err) {
    if (n > (size_t)1 << 30)
        return fail(
            err,
            "%s: a text of %zu bytes is too long for this tokenizer, expected at most 1 GiB; give it in "
            "several documents",
            w->bpe->path, n);
    w->out = out;
    w->err = err;
    return bpe_added(w, false, text, n);
}

// bpe_cut: the last place in a text where it can be cut and both parts encoded by themselves with the same
// result, 0: none. Between an ASCII letter and a space or a newline no word of the known expressions, no
// composition of characters and no added token goes on.
size_t bpe_cut(const Bpe* b, const char* text, size_t n) {
    for (size_t i = n; b->cuts && i-- > 1;)
        if ((text[i] == ' ' || text[i] == '\n') && isalpha((unsigned char)text[i - 1])) return i;
    return 0;
}
