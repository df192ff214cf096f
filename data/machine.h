// What the program has to do with its user and the system: messages, memory, time, threads, signals.

// print_line: a message as one line; control characters, which may come from arguments and file names,
// become '?'.
static void print_line(const char* kind, const char* format, va_list args) {
    char line[8192];
    vsnprintf(line, sizeof line, format, args);
    for (char* p = line; *p; p++) if ((unsigned char)*p < 32 || *p == 127) *p = '?';
    fflush(stdout);
    fprintf(stderr, "%s: %s\n", kind, line);
}

// die: the end of every user error: one line on stderr (what was expected, what was found, what to do), exit
// code 1.
__attribute__((format(printf, 1, 2), noreturn))
void die(const char* format, ...) {
    va_list args;
    va_start(args, format);
    print_line("error", format, args);
    va_end(args);
    exit(1);
}

__attribute__((format(printf, 1, 2)))
void warn(const char* format, ...) {
    va_list args;
    va_start(args, format);
    print_line("warning", format, args);
    va_end(args);
}

// printed: the exit code of a word whose result is what it printed
static int printed(int code) {
    if (code == 0 && (fflush(stdout) != 0 || ferror(stdout)))
        die("standard output cannot be written: %s", strerror(errno));
    return code;
}

// Error: what a reader of outside data reports. Readers return false and leave one line here; the caller
// decides whether to die, to warn, or (in the tests) to compare the words.
typedef struct { char text[4096]; } Error;

// fail: fills the error and returns false, so that a reader can say `return fail(err, "%s: ...", path, ...)`.
__attribute__((format(printf, 2, 3)))
bool fail(Error* err, const char* format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return false;
}

// checked_size: n dimensions times the size of an element, in bytes (or elements with elem = 1). Every
// product of sizes that comes from a file or an option goes through here. Returns false when a dimension is
// negative or the product does not fit in 63 bits.
bool checked_size(int n, const int64_t* dim, size_t elem, size_t* size) {
    size_t product = elem;
    for (int i = 0; i < n; i++) {
        if (dim[i] < 0 || __builtin_mul_overflow(product, (size_t)dim[i], &product)) return false;
    }
    if (product > (size_t)INT64_MAX) return false;
    *size = product;
    return true;
}

// xcalloc, xrealloc: allocation that cannot return NULL. calloc returns zeroed memory.
void* xcalloc(size_t count, size_t size) {
    void* p = calloc(count ? count : 1, size ? size : 1);
    if (!p) die("out of memory: could not allocate %.1f MiB; lower --batch-size, --seq-len or the model size",
                (double)count * (double)size / 1048576.0);
    return p;
}

void* xrealloc(void* old, size_t count, size_t size) {
    size_t bytes;
    void* p = __builtin_mul_overflow(count, size, &bytes) ? NULL : realloc(old, bytes ? bytes : 1);
    if (!p) die("out of memory: could not allocate %.1f MiB", (double)count * (double)size / 1048576.0);
    return p;
}

double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// limit_spinning: threads that wait for each other first spin, then sleep. GNU OpenMP spins for milliseconds,
// which on a machine with other work makes training up to 20 times slower; a short spin costs an idle machine
// nothing. (4 cores, default model: 46 thousand tokens/s with either; beside 4 busy processes 7 thousand
// with the short spin, 1 thousand with the long one.) Only the environment of a new process can tell, so main
// starts the program once more with it.
void limit_spinning(char** argv) {
#ifdef _OPENMP
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    setenv("GOMP_SPINCOUNT", "4000", 1);
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = 0;
    execv(self, argv);      // where it cannot be started, everything just takes longer
#endif
    (void)argv;
}

static volatile sig_atomic_t stop_signal = 0;

// A second Ctrl-C leaves at once. Other signals may come in company (SIGTERM and SIGHUP at shutdown, SIGPIPE
// at every write to a closed pipe), so they do not.
static void on_signal(int number) {
    if (stop_signal && number == SIGINT) _exit(128 + number);
    if (!stop_signal) stop_signal = number;
}

// catch_signals: pipe: also when nobody reads stdout any more (`| tee` ended by the same Ctrl-C): save, then
// leave.
static void catch_signals(bool pipe) {
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};
    for (int i = 0; i < (pipe ? 4 : 3); i++) {
        struct sigaction action, old;
        memset(&action, 0, sizeof action);
        action.sa_handler = on_signal;
        action.sa_flags = SA_RESTART;
        if (sigaction(numbers[i], NULL, &old) == 0 && old.sa_handler == SIG_IGN) continue;      // nohup
        sigaction(numbers[i], &action, NULL);
    }
}

static void set_threads(int64_t threads) {
    (void)threads;
#ifdef _OPENMP
    if (threads > 0) omp_set_num_threads((int)threads);
#endif
}

static int thread_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// check_memory: compares a plan with the machine before anything is allocated; Linux would promise it and
// kill us later.
static bool check_memory(double bytes, const char* advice, Error* err) {
    double available = INFINITY;
    char line[256];
    FILE* f = fopen("/proc/meminfo", "r");
    while (f && fgets(line, sizeof line, f)) {
        double kib;
        if (sscanf(line, "MemAvailable: %lf kB", &kib) == 1) available = kib * 1024;
    }
    if (f) fclose(f);
    struct rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY &&
        (double)limit.rlim_cur < available)
        available = (double)limit.rlim_cur;
    if (bytes <= available) return true;
    return fail(err, "this needs %.1f GiB of memory, %.1f GiB are available; %s", bytes / 1073741824.0,
                available / 1073741824.0, advice);
}
