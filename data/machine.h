// What the program asks of the machine and of the system: threads, signals, memory.

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
    signal(SIGXFSZ, SIG_IGN);                  // a file size limit becomes an ordinary write error
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
