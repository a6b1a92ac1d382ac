/* shadow <- lerp(shadow, live, weight) of many tensors and several profiles in one pass.
 *
 * Each element of a parameter is read once, each of a shadow is read and written once, and what is
 * not finite is left out and counted on the way. The tensors come as a table of addresses; that
 * these still are those of the tensors is the caller's to know (watch.py). Every result is that of
 * torch.lerp on the same machine, bit for bit: -ffp-contract=off, and a * b + c as written below.
 */

#define _GNU_SOURCE /* RTLD_NOLOAD, syscall */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <dlfcn.h>
#include <fenv.h>
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

/* Live dtypes f32, f64, bf16, f16, first with an f32 shadow, then with an f64 one. */
#define KINDS 8
#define MAX_PROFILES 64
#define MAX_THREADS 256
/* Elements that a thread takes at a time. */
#define CHUNK (1 << 16)
/* Elements that are averaged for one profile after the other: those of the parameter stay in the
 * first-level cache. */
#define BLOCK (1 << 10)
/* Elements that are worth a new thread, and one that is there. */
#define SHARE (1 << 19)
#define TEAM_SHARE (1 << 17)

typedef struct {
    int64_t (*lerp)(const void *live, void *shadow, int64_t n, double weight, int guard);
    int64_t (*count)(const void *live, int64_t n);
} Loops;

static const int64_t LIVE_SIZE[KINDS] = {4, 8, 2, 2, 4, 8, 2, 2};
static const int64_t SHADOW_SIZE[KINDS] = {4, 4, 4, 4, 8, 8, 8, 8};

static inline float from_bfloat16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float from_float16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    /* Subnormal numbers are counted out, which no setting that flushes them can touch. */
    const float small = (float)(int32_t)(h & 0x3ff) * 0x1p-24f;
    uint32_t counted;
    memcpy(&counted, &small, sizeof counted);
    /* Masks, since compilers do not vectorise the choice among three. */
    const uint32_t special = -(uint32_t)(rest >= 0x7c00u << 13), tiny = -(uint32_t)(rest < 1u << 23);
    const uint32_t bits = sign | (special & (rest | 0x7f800000u)) | (tiny & counted) |
                          (~special & ~tiny & (rest + (112u << 23)));
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LEVELS 3
#define MULADD32(a, b, c) ((a) * (b) + (c))
#define MULADD64(a, b, c) ((a) * (b) + (c))
#define LEVEL(name) name##_plain
#define TARGET
#include "fused_cpu_loops.h"
#undef LEVEL
#undef TARGET
#undef MULADD32
#undef MULADD64
#define MULADD32(a, b, c) __builtin_fmaf(a, b, c)
#define MULADD64(a, b, c) __builtin_fma(a, b, c)
#define LEVEL(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "fused_cpu_loops.h"
#undef LEVEL
#undef TARGET
#define LEVEL(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "fused_cpu_loops.h"

static const Loops *loops_of(int level) {
    __builtin_cpu_init();
    int fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (level >= 2 && wide) return loops_avx512;
    if (level >= 1 && fma) return loops_avx2;
    return loops_plain;
}
#else
#define LEVELS 1
#ifdef FP_FAST_FMAF
#define MULADD32(a, b, c) fmaf(a, b, c)
#else
#define MULADD32(a, b, c) ((a) * (b) + (c))
#endif
#ifdef FP_FAST_FMA
#define MULADD64(a, b, c) fma(a, b, c)
#else
#define MULADD64(a, b, c) ((a) * (b) + (c))
#endif
#define LEVEL(name) name##_plain
#define TARGET
#include "fused_cpu_loops.h"

static const Loops *loops_of(int level) {
    (void)level;
    return loops_plain;
}
#endif

/* A row of the table: these columns, then the address of the shadow of each profile. */
enum { ADDRESS, START, NUMEL, KIND, SHADOWS };

typedef struct {
    const int64_t *table; /* rows in the order of their START, which begins with 0 */
    int64_t rows, profiles, total;
    const double *weights; /* NULL to count only */
    int guard;
    const Loops *loops;
    fenv_t rounding; /* how the caller computes, subnormal numbers included */
    atomic_llong next, skipped;
} Job;

static int64_t run_row(const Job *job, const int64_t *row, int64_t start, int64_t n) {
    const int64_t kind = row[KIND];
    const char *live = (const char *)(intptr_t)row[ADDRESS] + start * LIVE_SIZE[kind];
    const Loops *loops = job->loops + kind;
    if (!job->weights) return loops->count(live, n);
    const int64_t step = job->profiles > 1 ? BLOCK : CHUNK;
    int64_t skipped = 0;
    for (int64_t at = 0; at < n; at += step) {
        const int64_t length = n - at < step ? n - at : step;
        for (int64_t k = 0; k < job->profiles; k++) {
            char *shadow = (char *)(intptr_t)row[SHADOWS + k] + (start + at) * SHADOW_SIZE[kind];
            const int64_t found = loops->lerp(live + at * LIVE_SIZE[kind], shadow, length,
                                              job->weights[k], job->guard);
            if (k == 0) skipped += found;
        }
    }
    return skipped;
}

/* Take chunk after chunk until none is left. */
static void *work(void *argument) {
    Job *job = argument;
    const int64_t width = SHADOWS + job->profiles;
    int64_t skipped = 0;
    for (;;) {
        int64_t at = (int64_t)atomic_fetch_add(&job->next, 1) * CHUNK;
        if (at >= job->total) break;
        const int64_t stop = job->total - at < CHUNK ? job->total : at + CHUNK;
        int64_t low = 0, high = job->rows; /* the last row that starts at or before `at` */
        while (high - low > 1) {
            const int64_t middle = low + (high - low) / 2;
            if (job->table[middle * width + START] <= at)
                low = middle;
            else
                high = middle;
        }
        for (; at < stop; low++) {
            const int64_t *row = job->table + low * width;
            const int64_t end = row[START] + row[NUMEL];
            const int64_t until = end < stop ? end : stop;
            skipped += run_row(job, row, at - row[START], until - at);
            at = until;
        }
    }
    atomic_fetch_add(&job->skipped, skipped);
    return NULL;
}

/* Runs a function on so many threads of OpenMP, the caller's included. */
typedef void (*Team)(void (*)(void *), void *, unsigned, unsigned);

/* The team that PyTorch computes with. Its threads keep a core busy for a while after each piece of
 * work, which other threads would have to wait for. It belongs to the first thread of this process:
 * it is gone after a fork, and another thread would get a team of its own.
 *
 * It is of the OpenMP library that PyTorch itself was bound to: one that was loaded before all else
 * (LD_PRELOAD), or that which it brings. */
static Team find_team(void) {
#ifdef __linux__
    void *torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    if (!torch) return NULL;
    void *found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return (Team)(found ? found : dlsym(torch, "GOMP_parallel"));
#else
    return NULL;
#endif
}

static Team team;
static pid_t process;

static int has_team(void) {
#ifdef __linux__
    return team && getpid() == process && syscall(SYS_gettid) == process;
#else
    return 0;
#endif
}

static void work_in_team(void *argument) {
    Job *job = argument;
    fenv_t before;
    fegetenv(&before);
    fesetenv(&job->rounding);
    work(job);
    fesetenv(&before);
}

/* Where there is no team, threads live for one call. They cost some ten microseconds, leave no core
 * busy in between, and inherit how the caller treats subnormal numbers. */
static void work_on_threads(Job *job, int64_t wanted) {
    pthread_t started[MAX_THREADS];
    if (wanted > MAX_THREADS) wanted = MAX_THREADS;
    int64_t others = 0;
    /* Signals are for the threads that Python knows. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    /* Where the system has no thread to give, those that are there do the work. */
    while (others < wanted - 1 && !pthread_create(&started[others], NULL, work, job)) others++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    work(job);
    for (int64_t i = 0; i < others; i++) pthread_join(started[i], NULL);
}

static void share(Job *job, int64_t threads) {
    if (threads > 1 && job->total / TEAM_SHARE > 1 && has_team()) {
        fegetenv(&job->rounding);
        /* All of them, as PyTorch does: a smaller team would end the others. */
        team(work_in_team, job, (unsigned)threads, 0);
    } else if (threads > 1 && job->total / SHARE > 1) {
        work_on_threads(job, job->total / SHARE < threads ? job->total / SHARE : threads);
    } else {
        work(job);
    }
}

static int check_table(const Job *job, Py_ssize_t bytes) {
    const int64_t width = SHADOWS + job->profiles;
    if (bytes % (width * 8)) {
        PyErr_Format(PyExc_ValueError, "a table of %zd bytes has no rows of %lld columns", bytes,
                     (long long)width);
        return -1;
    }
    int64_t start = 0;
    for (int64_t i = 0; i < job->rows; i++) {
        const int64_t *row = job->table + i * width;
        if (row[START] != start || row[NUMEL] < 1 || row[KIND] < 0 || row[KIND] >= KINDS) {
            PyErr_Format(PyExc_ValueError, "row %lld of the table is none", (long long)i);
            return -1;
        }
        start += row[NUMEL];
    }
    return 0;
}

static PyObject *run_job(Job *job, const Py_buffer *table, int threads, int level) {
    job->table = table->buf;
    job->rows = table->len / ((SHADOWS + job->profiles) * 8);
    if (check_table(job, table->len) < 0) return NULL;
    if (job->rows) {
        const int64_t *last = job->table + (job->rows - 1) * (SHADOWS + job->profiles);
        job->total = last[START] + last[NUMEL];
    }
    job->loops = loops_of(level);
    Py_BEGIN_ALLOW_THREADS
    share(job, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong((long long)atomic_load(&job->skipped));
}

PyDoc_STRVAR(lerp_doc, "lerp(table, weights, guard, threads, level)\n\n"
                       "Move every shadow of the table; returns the number of skipped elements.");

static PyObject *lerp(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer table, weights;
    int guard, threads, level;
    if (!PyArg_ParseTuple(args, "y*y*pii", &table, &weights, &guard, &threads, &level)) return NULL;
    PyObject *result = NULL;
    const int64_t profiles = weights.len / 8;
    if (weights.len % 8 || profiles < 1 || profiles > MAX_PROFILES) {
        PyErr_SetString(PyExc_ValueError, "weights are float64, one for each profile");
    } else {
        Job job = {.profiles = profiles, .weights = weights.buf, .guard = guard};
        result = run_job(&job, &table, threads, level);
    }
    PyBuffer_Release(&weights);
    PyBuffer_Release(&table);
    return result;
}

PyDoc_STRVAR(count_doc, "count_nonfinite(table, profiles, threads, level)\n\n"
                        "Elements of the table's parameters that are NaN or Inf in their shadow.");

static PyObject *count_nonfinite(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer table;
    int profiles, threads, level;
    if (!PyArg_ParseTuple(args, "y*iii", &table, &profiles, &threads, &level)) return NULL;
    PyObject *result = NULL;
    if (profiles < 1 || profiles > MAX_PROFILES) {
        PyErr_SetString(PyExc_ValueError, "a table has a column for each profile");
    } else {
        Job job = {.profiles = profiles};
        result = run_job(&job, &table, threads, level);
    }
    PyBuffer_Release(&table);
    return result;
}

static PyMethodDef methods[] = {
    {"lerp", lerp, METH_VARARGS, lerp_doc},
    {"count_nonfinite", count_nonfinite, METH_VARARGS, count_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fused_cpu", "The update of an average in one pass over memory.", 0,
    methods,               NULL,        NULL,                                               NULL,
    NULL,
};

PyMODINIT_FUNC PyInit_fused_cpu(void) {
    team = find_team();
    process = getpid();
    return PyModule_Create(&module);
}
