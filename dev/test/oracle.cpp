// oracle.cpp: the CPU layers of train_mamba.c in double, for test_cuda.h. Its functions are in a namespace, so
// that they can be linked with the float ones. System headers must stay outside of it, so they come first.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <glob.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define REAL double
#define SSM_NO_MAIN
namespace oracle {
// defines: everything, in double
#include "../../train_mamba.c"
}
