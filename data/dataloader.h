// What a model reads: text files and token shards seen as one sequence of tokens, and batches cut from it.
//   text file: its bytes, or their ids by a BPE tokenizer, with the end token in front, the first token of
//     the document that it opens; JSON lines (.jsonl) with a BPE tokenizer: each line's "text" is a document
//   token shard `.bin` (llm.c's format): 256 int32 (magic, version, number of tokens, zeros), then tokens:
//     magic 20240520, version 1: 16-bit unsigned        magic 20240801, version 7: 32-bit unsigned
// Batches are a pure function of one number, the sample counter: nothing else needs to be saved to resume.

#include <glob.h>

enum { SHARD_HEADER = 1024 };            // bytes
enum { DATA_IN_MEMORY = 4 << 20 };       // files up to this many bytes are held in memory, larger stay open
enum { DATA_PIECE = 1 << 14 };           // bytes per read of an open file

// DataSource: one file. Token i of it, i in [0, count), is token begin + i of the whole sequence.
typedef struct {
    char* path;
    int fd;                  // open file, or -1 when the bytes are in memory
    unsigned char* bytes;    // the tokens as stored, `width` bytes each, or NULL when the file stays open
    int64_t payload;         // offset of the first stored token in the file
    int64_t size;            // bytes of the file
    int width;    // bytes per stored token: 1 text as bytes, 2 or 4 shards and ids of a BPE tokenizer
    int front;               // tokens put in front: 1 for text as bytes (the end token), otherwise 0
    int64_t begin, count;
} DataSource;

// Dataset: tokens [begin, end) of the sequence that the sources make, n_tokens = end - begin.
typedef struct {
    DataSource* source;
    int n_sources;
    bool owner;              // false for a split: it uses the sources of another Dataset
    int64_t begin, end, n_tokens;
    int64_t vocab_size;
    int eos;
    const Tokenizer* tokenizer;    // while the sources are opened
} Dataset;

void dataset_close(Dataset* d) {
    for (int i = 0; d->owner && i < d->n_sources; i++) {
        if (d->source[i].fd >= 0) close(d->source[i].fd);
        free(d->source[i].bytes);
        free(d->source[i].path);
    }
    if (d->owner) free(d->source);
    memset(d, 0, sizeof *d);
}

// dataset_read: tokens [pos, pos + count) of the dataset. Every id is checked against the vocabulary.
bool dataset_read(const Dataset* d, int64_t pos, int64_t count, int* out, Error* err) {
    assert(pos >= 0 && count >= 0 && count <= d->n_tokens - pos);
    int64_t at = d->begin + pos;
    int low = 0, high = d->n_sources - 1;            // the last source that begins at or before `at`
    while (low < high) {
        int middle = low + (high - low + 1) / 2;
        if (d->source[middle].begin <= at) low = middle; else high = middle - 1;
    }
    unsigned char piece[DATA_PIECE];
    for (const DataSource* s = d->source + low; count > 0; s++) {
        int64_t i = at - s->begin;
        int64_t end = count < s->count - i ? i + count : s->count;
        count -= end - i;
        at += end - i;
        for (; i < end && i < s->front; i++) *out++ = d->eos;
        while (i < end) {
            int64_t n = end - i, first = (i - s->front) * s->width;
            const unsigned char* stored = s->bytes + first;
            if (!s->bytes) {
                if (n > DATA_PIECE / s->width) n = DATA_PIECE / s->width;
                size_t bytes = (size_t)(n * s->width);
                if (!data_read(s->fd, piece, bytes, s->payload + first, s->path, err)) return false;
                stored = piece;
            }
            for (int64_t k = 0; k < n; k++) {
                uint16_t id16;
                uint32_t id = stored[k];
                if (s->width == 2) { memcpy(&id16, stored + 2 * k, 2); id = id16; }
                if (s->width == 4) memcpy(&id, stored + 4 * k, 4);
                if (id >= d->vocab_size)
                    return fail(err, "%s: token %lld is %u, expected an id below the vocabulary of %lld; "
                                "was this file made with another tokenizer?", s->path, (long long)(i + k), id,
                                (long long)d->vocab_size);
                *out++ = (int)id;
            }
            i += n;
        }
    }
    return true;
}

// is_text: can the file that begins with these n bytes be text?
static bool is_text(const unsigned char* start, size_t n, const char* path, Error* err) {
    uint32_t magic = 0;
    memcpy(&magic, start, min_size(n, 4));
    if (magic == 20240520 || magic == 20240801)
        return fail(err, "%s: expected text, found a token shard; its name must end in .bin", path);
    if (n >= 2 && ((start[0] == 0xFF && start[1] == 0xFE) || (start[0] == 0xFE && start[1] == 0xFF)))
        return fail(err, "%s: expected UTF-8 text, found a UTF-16 byte order mark; convert it: "
                    "iconv -f UTF-16 -t UTF-8", path);
    return true;
}

// source_append, source_encode: the ids of a text file by a BPE tokenizer, all of them in memory, stored as a
// shard would store them
static bool source_append(void* to, const int* ids, size_t n, int64_t at, Error* err) {
    DataSource* s = (DataSource*)to;
    (void)at; (void)err;
    if ((s->count + (int64_t)n) * s->width > s->size) {
        s->size = (s->count + (int64_t)n) * s->width;
        s->size += s->size / 2;
        s->bytes = (unsigned char*)xrealloc(s->bytes, (size_t)s->size, 1);
    }
    for (size_t i = 0; i < n; i++) {
        uint16_t id16 = (uint16_t)ids[i];
        memcpy(s->bytes + (s->count + (int64_t)i) * s->width, s->width == 2 ? (void*)&id16 : (void*)&ids[i],
               (size_t)s->width);
    }
    s->count += (int64_t)n;
    return true;
}

static bool source_encode(DataSource* s, const Dataset* d, Error* err) {
    TextFile f = text_file(s->path, s->fd, s->size, d->tokenizer, d->eos);
    s->width = d->tokenizer->vocab_size <= 65536 ? 2 : 4;
    s->size = 0;
    bool ok = text_file_tokens(&f, source_append, s, err);
    if (ok) text_file_warn(&f);
    close(s->fd);
    s->fd = -1;
    s->size = s->count * s->width;
    s->bytes = (unsigned char*)xrealloc(s->bytes, (size_t)s->size, 1);
    return ok;
}

// source_format: decides what the file is and checks its header against its size.
bool source_format(DataSource* s, const Dataset* d, Error* err) {
    uint32_t header[SHARD_HEADER / 4] = { 0 };
    size_t head = s->size < SHARD_HEADER ? (size_t)s->size : (size_t)SHARD_HEADER;
    const unsigned char* start = (const unsigned char*)header;
    size_t length = strlen(s->path);
    bool shard = length >= 4 && strcmp(s->path + length - 4, ".bin") == 0;
    if (!data_read(s->fd, header, head, 0, s->path, err)) return false;
    bool u16 = header[0] == 20240520, u32 = header[0] == 20240801;
    if (!shard) {
        if (!is_text(start, head, s->path, err)) return false;
        if (d->tokenizer->kind == TOKENIZER_NONE)
            return fail(err, "%s: no tokenizer.json that can encode text with this model; use token shards",
                        s->path);
        if (d->tokenizer->kind == TOKENIZER_BPE) return source_encode(s, d, err);
        s->width = 1;
        s->front = d->eos >= 0;
        s->count = s->size + s->front;
        return true;
    }
    if (s->size < SHARD_HEADER)
        return fail(err, "%s: expected a token shard with a header of %d bytes, found %lld bytes", s->path,
                    SHARD_HEADER, (long long)s->size);
    if (!u16 && !u32)
        return fail(err, "%s: expected a token shard with magic 20240520 or 20240801, found %u; a text file "
                    "needs another name than .bin", s->path, header[0]);
    if (header[1] != (u16 ? 1u : 7u))
        return fail(err, "%s: expected version %d of token shard %u, found %u", s->path, u16 ? 1 : 7,
                    header[0], header[1]);
    s->width = u16 ? 2 : 4;
    s->payload = SHARD_HEADER;
    s->count = (int64_t)header[2];               // up to 2^32 - 1 tokens: 8 or 16 GiB
    if (s->size != SHARD_HEADER + s->count * s->width)
        return fail(err, "%s: header says %lld tokens of %d bytes, so expected %lld bytes, found %lld; "
                    "the file is cut or damaged", s->path, (long long)s->count, s->width,
                    (long long)(SHARD_HEADER + s->count * s->width), (long long)s->size);
    return s->count > 0 || fail(err, "%s: token shard is empty (0 tokens)", s->path);
}

// dataset_add: appends one file. Its first tokens are checked here, the rest when they are read.
bool dataset_add(Dataset* d, const char* path, Error* err) {
    struct stat st;
    DataSource s = { NULL, open_regular(path, &st, err), NULL, 0, 0, 0, 0, 0, 0 };
    if (s.fd < 0 && errno == EMFILE)
        return fail(err, "%s: too many open files; raise `ulimit -n` or join the files", path);
    if (s.fd < 0) return false;
    s.size = (int64_t)st.st_size;
    s.path = strdup(path);
    s.begin = d->end;
    d->source = (DataSource*)xrealloc(d->source, (size_t)d->n_sources + 1, sizeof(DataSource));
    DataSource* kept = d->source + d->n_sources++;
    *kept = s;                                   // from here on dataset_close frees it
    if (!kept->path) return fail(err, "%s: out of memory", path);
    if (!source_format(kept, d, err)) return false;
    if (__builtin_add_overflow(d->end, kept->count, &d->end))
        return fail(err, "%s: more than 2^63 tokens", path);
    d->n_tokens = d->end;
    if (kept->fd >= 0 && kept->size <= DATA_IN_MEMORY) {
        size_t bytes = (size_t)(kept->size - kept->payload);
        kept->bytes = (unsigned char*)xcalloc(bytes, 1);
        if (!data_read(kept->fd, kept->bytes, bytes, kept->payload, path, err)) return false;
        close(kept->fd);
        kept->fd = -1;
    }
    int first[1024];
    return dataset_read(d, kept->begin, kept->count < 1024 ? kept->count : 1024, first, err);
}

void files_free(char** files, int n) {
    for (int i = 0; i < n; i++) free(files[i]);
    free(files);
}

// list_split: the names of a list option, which have newlines between them; one block, to be freed
static char** list_split(const char* list, int* n) {
    size_t length = strlen(list), most = 1;
    for (const char* p = list; *p; p++) most += *p == '\n';
    char **names = (char**)xcalloc(most * sizeof(char*) + length + 1, 1), *rest = NULL;
    char* copy = (char*)memcpy(names + most, list, length + 1);
    *n = 0;
    for (char* p = strtok_r(copy, "\n", &rest); p; p = strtok_r(NULL, "\n", &rest)) names[(*n)++] = p;
    return names;
}

// files_of: the names in the order given; a pattern such as 'data/*.txt' stands for the matching files,
// sorted by name. To be freed with files_free, on failure too.
bool files_of(char** paths, int n, char*** files, int* n_files, Error* err) {
    *files = NULL;
    *n_files = 0;
    bool ok = n > 0 || fail(err, "no data: give at least one text file or token shard");
    for (int i = 0; ok && i < n; i++) {
        struct stat st;
        glob_t found;
        bool plain = !strpbrk(paths[i], "*?[") || stat(paths[i], &st) == 0;
        int status = plain ? 0 : glob(paths[i], 0, NULL, &found);
        if (status == GLOB_NOMATCH || (!plain && status == 0 && found.gl_pathc == 0)) {
            ok = fail(err, "%s: no file matches this pattern", paths[i]);
        } else if (status != 0) {
            ok = fail(err, "%s: cannot list the files of this pattern", paths[i]);
        }
        size_t more = plain ? 1 : ok ? found.gl_pathc : 0;
        *files = (char**)xrealloc(*files, (size_t)*n_files + more, sizeof(char*));
        for (size_t k = 0; k < more; k++)
            (*files)[(*n_files)++] = strdup(plain ? paths[i] : found.gl_pathv[k]);
        if (!plain && status == 0) globfree(&found);
    }
    return ok;
}

// dataset_open: all files that the names stand for. On failure nothing stays open.
bool dataset_open(Dataset* d, char** paths, int n, const Tokenizer* tok, Error* err) {
    memset(d, 0, sizeof *d);
    d->owner = true;
    d->vocab_size = tok->vocab_size;
    d->eos = tok->eos;
    d->tokenizer = tok;
    char** files;
    int n_files;
    bool ok = files_of(paths, n, &files, &n_files, err);
    for (int i = 0; ok && i < n_files; i++) ok = dataset_add(d, files[i], err);
    files_free(files, n_files);
    d->tokenizer = NULL;
    if (!ok) dataset_close(d);
    return ok;
}

// dataset_split: the last `fraction` of the tokens becomes *val, *d keeps the rest. *val shares the files of
// *d: close *d last. Returns false, and changes nothing, when one of the two would be empty.
bool dataset_split(Dataset* d, double fraction, Dataset* val) {
    int64_t n = fraction > 0 && fraction < 1 ? (int64_t)((double)d->n_tokens * fraction) : 0;
    memset(val, 0, sizeof *val);
    if (n < 1 || n >= d->n_tokens) return false;
    *val = *d;
    val->owner = false;
    val->n_tokens = n;
    val->begin = d->end - n;
    d->end -= n;
    d->n_tokens -= n;
    return true;
}

// dataset_fingerprint: changes when the token sequence does: its range, the sizes of the files, their content
// (of files that stay open the first and last 64 KiB and 64 pieces of 16 KiB in between). Names do not count.
uint64_t dataset_fingerprint(const Dataset* d) {
    uint64_t hash = mix64((uint64_t)d->begin) ^ mix64((uint64_t)d->end + 1);
    unsigned char piece[DATA_PIECE];
    Error ignored;
    for (const DataSource* s = d->source; s < d->source + d->n_sources; s++) {
        int64_t bytes = s->size - s->payload, head = 65536 / DATA_PIECE, samples = s->bytes ? 0 : 64;
        int64_t pieces = s->bytes ? (bytes + DATA_PIECE - 1) / DATA_PIECE : 2 * head + samples;
        hash = mix64(hash ^ (uint64_t)bytes * 8 ^ (uint64_t)s->width);
        for (int64_t i = 0; i < pieces; i++) {
            int64_t at = i * DATA_PIECE;
            if (!s->bytes && i >= head) at = bytes - (pieces - i) * DATA_PIECE;           // tail
            if (!s->bytes && i >= head && i < head + samples)
                at = (int64_t)((double)(bytes - DATA_PIECE) * (double)(i - head + 1) / (double)(samples + 1));
            int64_t n = bytes - at < DATA_PIECE ? bytes - at : (int64_t)DATA_PIECE;
            memset(piece, 0, sizeof piece);
            if (s->bytes) memcpy(piece, s->bytes + at, (size_t)n);
            else if (!data_read(s->fd, piece, (size_t)n, s->payload + at, s->path, &ignored)) piece[0] ^= 1;
            for (int k = 0; k < DATA_PIECE; k += 8) {
                uint64_t word;
                memcpy(&word, piece + k, 8);
                hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
                hash ^= hash >> 32;
            }
        }
        hash = mix64(hash);
    }
    return hash;
}

// ---- batches

// Loader: how rows are cut from a dataset. A row is seq_len inputs and, as targets, the token after each.
//   shuffled: sample `counter` is window permutation(counter mod W) of epoch counter / W. An epoch has W
//     windows of seq_len + 1 tokens, each beginning seq_len after the other, all shifted by the epoch's
//     random offset.
//   sequential: `streams` rows walk side by side, each through its own contiguous part, for training with
//     carried state; counter = step * streams + stream.
// Of the global batch, rank r of `world` takes rows r, r + world, ...: row i of a call is sample
// counter + i * world + r, and the next call begins at counter + rows * world.
typedef struct {
    const Dataset* data;
    int64_t seq_len;
    uint64_t seed;
    bool sequential;
    int64_t streams;         // sequential only: rows of the whole batch, over all accumulation steps
    int eos;                 // token that opens a document; -1: none
    int rank, world;         // 0, 1 when alone; world 0 counts as 1
} Loader;

// permute: a bijection of [0, n), another one for every key, without a table: eight rounds of a Feistel
// network on the smallest even number of bits that holds n, repeated until the value falls below n (cycle
// walking, on average < 4 times).
//   one round: (left, right) -> (right, left ^ f(right)), invertible whatever f is
//   Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002
uint64_t permute(uint64_t i, uint64_t n, uint64_t key) {
    int half = 1;                                // bits of each half
    while (half < 32 && (uint64_t)1 << (2 * half) < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 0; round < 8; round++) {
            uint64_t next = left ^ (random_bits(key, round, right) & mask);
            left = right;
            right = next;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

// loader_samples: samples of one epoch, 0 when the data is too short. One window fewer than would fit is used
// (when there are two), which leaves room for the offset that shifts the windows from epoch to epoch.
int64_t loader_samples(const Loader* l) {
    int64_t targets = l->data->n_tokens - 1, T = l->seq_len;
    if (targets < T || T < 1) return 0;
    if (l->sequential) return l->streams < 1 ? 0 : targets / l->streams / T * l->streams;
    return targets / T > 1 ? targets / T - 1 : 1;
}

// loader_check: is there enough data for one batch?
bool loader_check(const Loader* l, Error* err) {
    if (loader_samples(l) > 0) return true;
    if (l->sequential && l->streams > 1)
        return fail(err, "data has %lld tokens, %lld streams (--carry-state) of --seq-len %lld need at least "
                    "%.0f", (long long)l->data->n_tokens, (long long)l->streams, (long long)l->seq_len,
                    (double)l->streams * (double)l->seq_len + 1);
    return fail(err, "data has %lld tokens, --seq-len %lld needs at least %lld", (long long)l->data->n_tokens,
                (long long)l->seq_len, (long long)l->seq_len + 1);
}

// loader_position: the first token of a sample, and whether a carried state starts from zero there.
int64_t loader_position(const Loader* l, int64_t counter, bool* fresh) {
    int64_t T = l->seq_len, samples = loader_samples(l), targets = l->data->n_tokens - 1;
    int64_t epoch = counter / samples, index = counter % samples;
    uint64_t random = random_bits(l->seed, STREAM_OFFSET, (uint64_t)epoch);
    if (l->sequential) {
        int64_t part = targets / l->streams, step = index / l->streams, stream = index % l->streams;
        int64_t room = part - samples / l->streams * T;      // tokens of a part beyond its last window
        *fresh = step == 0;
        return stream * part + (int64_t)(random % (uint64_t)(room + 1)) + step * T;
    }
    int64_t room = targets - samples * T;
    uint64_t key = random_bits(l->seed, STREAM_SHUFFLE, (uint64_t)epoch);
    *fresh = true;
    int64_t offset = (int64_t)(random % (uint64_t)(room + 1));
    return offset + (int64_t)permute((uint64_t)index, (uint64_t)samples, key) * T;
}

// loader_row: n <= seq_len inputs from `pos` on and their targets; the rest of the row is input 0, target -1
// (ignored). doc counts the end tokens of the row up to and including each input. A row that continues a
// document begins with doc 0; one that begins with an end token begins with doc 1, which resets the state.
bool loader_row(const Loader* l, int64_t pos, int64_t n, int* inputs, int* targets, int* doc, Error* err) {
    if (n > 0) {
        if (!dataset_read(l->data, pos, n, inputs, err)) return false;
        memcpy(targets, inputs + 1, (size_t)(n - 1) * sizeof(int));
        if (!dataset_read(l->data, pos + n, 1, targets + n - 1, err)) return false;
    }
    for (int64_t t = n; t < l->seq_len; t++) {
        inputs[t] = 0;
        targets[t] = -1;
    }
    int id = 0;
    for (int64_t t = 0; doc && t < l->seq_len; t++) {
        if (t < n && l->eos >= 0 && inputs[t] == l->eos) id++;
        doc[t] = id;
    }
    return true;
}

// loader_batch: inputs, targets (rows,T), doc (rows,T) or NULL, fresh (rows) or NULL: the
// row starts with a zero state.
bool loader_batch(const Loader* l, int64_t counter, int64_t rows, int* inputs, int* targets, int* doc,
                  bool* fresh, Error* err) {
    if (!loader_check(l, err)) return false;
    int64_t T = l->seq_len, world = l->world > 1 ? l->world : 1;
    for (int64_t i = 0; i < rows; i++) {
        bool starts;
        int64_t pos = loader_position(l, counter + i * world + l->rank, &starts);
        int* row_doc = doc ? doc + i * T : NULL;
        if (!loader_row(l, pos, T, inputs + i * T, targets + i * T, row_doc, err)) return false;
        if (fresh) fresh[i] = starts;
    }
    return true;
}

// loader_eval_samples, loader_eval_batch: the whole dataset in order, for validation. Sample i holds the
// inputs [i T, i T + T); each token but the first is a target exactly once; the last row is short, rows
// beyond it are empty.
int64_t loader_eval_samples(const Loader* l) {
    return l->data->n_tokens < 2 ? 0 : (l->data->n_tokens - 2) / l->seq_len + 1;
}

bool loader_eval_batch(const Loader* l, int64_t counter, int64_t rows, int* inputs, int* targets, int* doc,
                       Error* err) {
    if (loader_eval_samples(l) == 0)
        return fail(err, "validation data has %lld tokens, expected at least 2",
                    (long long)l->data->n_tokens);
    int64_t T = l->seq_len, world = l->world > 1 ? l->world : 1, n_targets = l->data->n_tokens - 1;
    for (int64_t i = 0; i < rows; i++) {
        int64_t sample = counter + i * world + l->rank;
        int64_t pos = sample < loader_eval_samples(l) ? sample * T : n_targets;
        int64_t n = n_targets - pos < T ? n_targets - pos : T;
        int* row_doc = doc ? doc + i * T : NULL;
        if (!loader_row(l, pos, n, inputs + i * T, targets + i * T, row_doc, err)) return false;
    }
    return true;
}
