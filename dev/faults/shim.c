// shim.c: makes the N-th file operation of a program fail, or be its last one. For LD_PRELOAD; run.sh builds
// and uses it.
//
//   FAULT_PATH    operations on paths that begin with this are counted: opens for writing and of directories,
//                 writes, fsync, close, rename, mkdir, rmdir, symlink, unlink
//   FAULT_AT      N, counted from 1
//   FAULT_KIND    kill      SIGKILL before operation N
//                 enospc    operation N fails with ENOSPC, once
//                 eio1      operation N fails with EIO, once
//                 eio       operation N and all later ones fail with EIO
//                 eintr     operation N fails with EINTR, once
//                 short     operation N, if a write, writes half
//                 lost      power loss before operation N: data without fsync is gone, and so are changes of
//                           names (created, renamed, removed) in directories without fsync since
//                 reorder   the same, but the last change of a name is kept: they need not arrive in order
//                 dropped   the same, but all names had reached the disk
//                 torn      the same, and half of the last write, in units of 512 bytes
//                 malloc1   allocation N returns NULL, once
//                 mallocs   allocation N and all later ones return NULL
//   FAULT_TRACE   with FAULT_AT=0, a file for one line per operation; with malloc1, for their number
//   FAULT_BACKUP  an empty directory on the same file system: what `lost` brings back is kept here
//
// For a power loss the shim logs every change of a name until the directory is synced, and takes the changes
// back in reverse order.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_LOG = 4096, MAX_FD = 1024, PATH_LENGTH = 512 };
enum { NAME_CREATE, NAME_MKDIR, NAME_REMOVE, NAME_RMDIR, NAME_RENAME, NAME_EXCHANGE };
typedef struct {
    int what;
    char a[PATH_LENGTH], b[PATH_LENGTH];
    int durable, saved;          // the directory was synced since; what the change destroyed is in the backup
} NameChange;
typedef struct {
    char path[PATH_LENGTH];
    off_t size, synced, last;    // bytes written, of them synced, length of the last write
} FileData;

static NameChange names[MAX_LOG];
static FileData files[MAX_LOG];
static int n_names, n_files, fd_watched[MAX_FD], fd_file[MAX_FD];
static char fd_path[MAX_FD][PATH_LENGTH];
static long at = -1, count;
static const char *kind = "", *prefix, *backup;
static int trace = -1;

#define REAL(name) static __typeof__(&name) real; if (!real) *(void**)&real = dlsym(RTLD_NEXT, #name)

static int real_open(const char* path, int flags, mode_t mode) { REAL(open); return real(path, flags, mode); }
static ssize_t real_write(int fd, const void* data, size_t n) { REAL(write); return real(fd, data, n); }
static int real_close(int fd) { REAL(close); return real(fd); }
static int real_fsync(int fd) { REAL(fsync); return real(fd); }
static int real_rename(const char* a, const char* b) { REAL(rename); return real(a, b); }
static int real_renameat2(int d, const char* a, int e, const char* b, unsigned f) {
    REAL(renameat2);
    return real(d, a, e, b, f);
}
static int real_mkdir(const char* path, mode_t mode) { REAL(mkdir); return real(path, mode); }
static int real_rmdir(const char* path) { REAL(rmdir); return real(path); }
static int real_symlink(const char* a, const char* b) { REAL(symlink); return real(a, b); }
static int real_unlink(const char* path) { REAL(unlink); return real(path); }

__attribute__((constructor)) static void start(void) {
    const char* file = getenv("FAULT_TRACE");
    prefix = getenv("FAULT_PATH");
    backup = getenv("FAULT_BACKUP");
    if (getenv("FAULT_KIND")) kind = getenv("FAULT_KIND");
    if (file) trace = real_open(file, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (getenv("FAULT_AT")) at = atol(getenv("FAULT_AT"));
}

static int is(const char* name) { return strcmp(kind, name) == 0; }
static int names_are_lost(void) { return is("lost") || is("reorder"); }
static int under(const char* path) { return prefix && path && strncmp(path, prefix, strlen(prefix)) == 0; }

// in_directory: whether path is an entry of dir
static int in_directory(const char* path, const char* dir) {
    size_t n = strlen(dir);
    return strncmp(path, dir, n) == 0 && path[n] == '/' && !strchr(path + n + 1, '/');
}

// move_path: a path below (or equal to) `from` is now below `to`
static void move_path(char* path, const char* from, const char* to) {
    size_t n = strlen(from);
    char moved[2 * PATH_LENGTH];
    if (strncmp(path, from, n) != 0 || (path[n] && path[n] != '/')) return;
    snprintf(moved, sizeof moved, "%s%s", to, path + n);
    snprintf(path, PATH_LENGTH, "%.*s", PATH_LENGTH - 1, moved);
}

static const char* backup_path(int i) {
    static char path[PATH_LENGTH];
    snprintf(path, sizeof path, "%s/%d", backup ? backup : "/nonexistent", i);
    return path;
}

// log_name: called before the operation, so that what it destroys can be kept
static void log_name(int what, const char* a, const char* b) {
    if (n_names == MAX_LOG || !names_are_lost()) return;
    NameChange* c = names + n_names;
    c->what = what;
    c->durable = c->saved = 0;
    snprintf(c->a, sizeof c->a, "%s", a);
    snprintf(c->b, sizeof c->b, "%s", b);
    const char* victim = what == NAME_REMOVE ? a : what == NAME_RENAME ? b : NULL;
    char target[PATH_LENGTH];
    real_unlink(backup_path(n_names));
    ssize_t n = victim ? readlink(victim, target, sizeof target - 1) : -1;
    if (n >= 0) { target[n] = 0; c->saved = real_symlink(target, backup_path(n_names)) == 0; }
    else if (victim) c->saved = link(victim, backup_path(n_names)) == 0;
    n_names++;
}

// power_loss: leaves the disk as it may look after the power went, then dies
static void power_loss(void) {
    for (int i = 0; i < n_files; i++) {
        off_t size = files[i].synced;
        if (is("torn") && files[i].size > size)
            size = files[i].size - files[i].last + files[i].last / 2 / 512 * 512;
        if (size < files[i].size && truncate(files[i].path, size) < 0 && errno != ENOENT) abort();
    }
    for (int i = (is("reorder") ? n_names - 1 : n_names) - 1; i >= 0; i--) {
        NameChange* c = names + i;
        if (c->durable) {   // it stays: what happened before, happened under the new name
            for (int j = 0; c->what == NAME_RENAME && j < i; j++) {
                move_path(names[j].a, c->a, c->b);
                move_path(names[j].b, c->a, c->b);
            }
            continue;
        }
        if (c->what == NAME_CREATE) real_unlink(c->a);
        if (c->what == NAME_MKDIR) real_rmdir(c->a);
        if (c->what == NAME_RMDIR) real_mkdir(c->a, 0777);
        if (c->what == NAME_RENAME) real_rename(c->b, c->a);
        if (c->what == NAME_EXCHANGE) real_renameat2(AT_FDCWD, c->a, AT_FDCWD, c->b, RENAME_EXCHANGE);
        if (c->saved) real_rename(backup_path(i), c->what == NAME_RENAME ? c->b : c->a);
    }
    kill(getpid(), SIGKILL);
}

// point: counts one operation. Returns an errno for the operation to fail with, -1 for a short write, 0 to go
// on.
static int point(const char* operation, const char* path) {
    char line[PATH_LENGTH + 32];
    if (kind[0] == 'm') return 0;
    count++;
    if (trace >= 0)
        real_write(trace, line, (size_t)snprintf(line, sizeof line, "%s %.400s\n", operation, path));
    if (count < at || at <= 0) return 0;
    if (is("eio")) return EIO;
    if (count > at) return 0;
    if (is("kill")) kill(getpid(), SIGKILL);
    if (names_are_lost() || is("dropped") || is("torn")) power_loss();
    return is("enospc") ? ENOSPC : is("eio1") ? EIO : is("eintr") ? EINTR : is("short") ? -1 : 0;
}

#define FAIL_AT_POINT(operation, path) \
    do { int error = point(operation, path); if (error > 0) { errno = error; return -1; } } while (0)

// forget: the file that had this name is gone
static void forget(const char* path) {
    for (int i = 0; i < n_files; i++) if (strcmp(files[i].path, path) == 0) files[i].path[0] = 0;
}

static int open_point(const char* path, int flags, mode_t mode) {
    int writes = (flags & O_ACCMODE) != O_RDONLY, watch = under(path) && (writes || (flags & O_DIRECTORY));
    struct stat info;
    if (watch) FAIL_AT_POINT("open", path);
    if (watch && (flags & O_CREAT) && lstat(path, &info) < 0) log_name(NAME_CREATE, path, "");
    int fd = real_open(path, flags, mode);
    if (!watch || fd < 0 || fd >= MAX_FD) return fd;
    fd_watched[fd] = 1;
    fd_file[fd] = -1;
    snprintf(fd_path[fd], PATH_LENGTH, "%s", path);
    if (writes && n_files < MAX_LOG) {
        FileData* f = files + n_files;
        memset(f, 0, sizeof *f);
        snprintf(f->path, PATH_LENGTH, "%s", path);
        if (!(flags & O_TRUNC) && fstat(fd, &info) == 0) f->size = f->synced = info.st_size;
        fd_file[fd] = n_files++;
    }
    return fd;
}

int open(const char* path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    return open_point(path, flags, mode);
}

int open64(const char* path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    return open_point(path, flags, mode);
}

ssize_t write(int fd, const void* data, size_t n) {
    if (fd < 0 || fd >= MAX_FD || !fd_watched[fd]) return real_write(fd, data, n);
    int error = point("write", fd_path[fd]);
    if (error > 0) { errno = error; return -1; }
    ssize_t put = real_write(fd, data, error < 0 && n > 1 ? n / 2 : n);
    if (put > 0 && fd_file[fd] >= 0) {
        files[fd_file[fd]].size += put;
        files[fd_file[fd]].last = put;
    }
    return put;
}

int fsync(int fd) {
    if (fd < 0 || fd >= MAX_FD || !fd_watched[fd]) return real_fsync(fd);
    FAIL_AT_POINT("fsync", fd_path[fd]);
    int result = real_fsync(fd);
    if (result < 0) return result;
    if (fd_file[fd] >= 0) files[fd_file[fd]].synced = files[fd_file[fd]].size;
    else for (int i = 0; i < n_names; i++)   // a directory: its names are durable now
            if (in_directory(names[i].what == NAME_RENAME ? names[i].b : names[i].a, fd_path[fd]))
                names[i].durable = 1;
    return result;
}

int fdatasync(int fd) { return fsync(fd); }

int close(int fd) {
    if (fd < 0 || fd >= MAX_FD || !fd_watched[fd]) return real_close(fd);
    int error = point("close", fd_path[fd]),
        result = real_close(fd);   // Linux closes even when it reports an error
    fd_watched[fd] = 0;
    if (error <= 0) return result;
    errno = error;
    return -1;
}

static void moved(const char* from, const char* to) {
    for (int i = 0; i < n_files; i++) move_path(files[i].path, from, to);
}

int rename(const char* from, const char* to) {
    if (!under(to)) return real_rename(from, to);
    FAIL_AT_POINT("rename", to);
    log_name(NAME_RENAME, from, to);
    int result = real_rename(from, to);
    if (result < 0 && names_are_lost()) n_names--;
    if (result == 0) forget(to), moved(from, to);
    return result;
}

int renameat2(int from_dir, const char* from, int to_dir, const char* to, unsigned flags) {
    if (!under(to)) return real_renameat2(from_dir, from, to_dir, to, flags);
    FAIL_AT_POINT("exchange", to);
    log_name(flags & RENAME_EXCHANGE ? NAME_EXCHANGE : NAME_RENAME, from, to);
    int result = real_renameat2(from_dir, from, to_dir, to, flags);
    if (result < 0 && names_are_lost()) n_names--;
    if (result < 0) return result;
    moved(to, "\1");
    moved(from, to);
    moved("\1", from);
    return result;
}

int mkdir(const char* path, mode_t mode) {
    if (!under(path)) return real_mkdir(path, mode);
    FAIL_AT_POINT("mkdir", path);
    int result = real_mkdir(path, mode);
    if (result == 0) log_name(NAME_MKDIR, path, "");
    return result;
}

int rmdir(const char* path) {
    if (!under(path)) return real_rmdir(path);
    FAIL_AT_POINT("rmdir", path);
    int result = real_rmdir(path);
    if (result == 0) log_name(NAME_RMDIR, path, "");
    return result;
}

int symlink(const char* target, const char* path) {
    if (!under(path)) return real_symlink(target, path);
    FAIL_AT_POINT("symlink", path);
    int result = real_symlink(target, path);
    if (result == 0) log_name(NAME_CREATE, path, "");
    return result;
}

int unlink(const char* path) {
    struct stat info;
    if (!under(path)) return real_unlink(path);
    FAIL_AT_POINT("unlink", path);
    if (lstat(path, &info) == 0) log_name(NAME_REMOVE, path, "");
    forget(path);
    return real_unlink(path);
}

// Allocations: glibc's own names for the real functions, because dlsym itself allocates
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void*, size_t);

static int no_memory(void) {
    if (kind[0] != 'm') return 0;
    count++;
    return at <= 0 ? 0 : is("mallocs") ? count >= at : is("malloc1") && count == at;
}

void* malloc(size_t n) { if (!no_memory()) return __libc_malloc(n); errno = ENOMEM; return NULL; }
void* calloc(size_t n, size_t size) {
    if (!no_memory()) return __libc_calloc(n, size);
    errno = ENOMEM;
    return NULL;
}
void* realloc(void* p, size_t n) {
    if (!no_memory()) return __libc_realloc(p, n);
    errno = ENOMEM;
    return NULL;
}

__attribute__((destructor)) static void finish(void) {
    char line[64];
    if (kind[0] == 'm' && trace >= 0)
        real_write(trace, line, (size_t)snprintf(line, sizeof line, "%ld\n", count));
}
