/* The loops of fused_cpu.c for one instruction set, included once for each.
 *
 * Before it is included, LEVEL(name) is the name of a function of this level, TARGET its
 * attributes, and MULADD32 and MULADD64 are a * b + c as PyTorch computes it there: rounded once
 * where it has fused multiply-add, twice where it has not.
 */

/* lerp as PyTorch computes it: from the nearer end. At a weight of 1 nothing of the shadow is
 * left, whatever it holds; the difference might be NaN or overflow. What is not finite is left out by a
 * mask: of a choice compilers make a branch around the store, unless there are masked stores. */
#define EACH(RESULT)                                                                              \
    for (int64_t i = 0; i < n; i++) {                                                             \
        SHADOW v = LOAD(p[i]), x = s[i], r = RESULT;                                              \
        const BITS keep = -(BITS)!FINITE(v) & guarded;                                            \
        BITS moved, kept;                                                                         \
        memcpy(&moved, &r, sizeof r);                                                             \
        memcpy(&kept, &x, sizeof x);                                                              \
        moved = (moved & ~keep) | (kept & keep);                                                  \
        memcpy(&s[i], &moved, sizeof r);                                                          \
        skipped -= (COUNT)keep;                                                                   \
    }

#define DEFINE(KIND)                                                                              \
    TARGET static int64_t LEVEL(lerp_##KIND)(const void *live, void *shadow, int64_t n,           \
                                             double weight, int guard) {                          \
        const LIVE *restrict p = live;                                                            \
        SHADOW *restrict s = shadow;                                                              \
        const SHADOW w = (SHADOW)weight, c = w - 1;                                               \
        const BITS guarded = guard ? ~(BITS)0 : 0;                                                \
        COUNT skipped = 0;                                                                        \
        if (w == 1) {                                                                             \
            EACH(v)                                                                               \
        } else if (w < (SHADOW)0.5 && w > (SHADOW)-0.5) {                                         \
            EACH(MULADD(w, v - x, x))                                                             \
        } else {                                                                                  \
            EACH(MULADD(c, v - x, v))                                                             \
        }                                                                                         \
        return skipped;                                                                           \
    }                                                                                             \
    TARGET static int64_t LEVEL(count_##KIND)(const void *live, int64_t n) {                      \
        const LIVE *restrict p = live;                                                            \
        COUNT found = 0;                                                                          \
        for (int64_t i = 0; i < n; i++) {                                                         \
            SHADOW v = LOAD(p[i]);                                                                \
            found += !FINITE(v);                                                                  \
        }                                                                                         \
        return found;                                                                             \
    }

/* Counters are as wide as the elements, so that both fit into as many lanes. A block has less
 * elements than the narrower one can count. */
#define SHADOW float
#define BITS uint32_t
#define COUNT int32_t
#define FINITE(v) (fabsf(v) <= FLT_MAX)
#define MULADD MULADD32

#define LIVE float
#define LOAD(e) (e)
DEFINE(f32_f32)
#undef LIVE
#undef LOAD
#define LIVE double
#define LOAD(e) ((float)(e))
DEFINE(f64_f32)
#undef LIVE
#undef LOAD
#define LIVE uint16_t
#define LOAD(e) from_bfloat16(e)
DEFINE(bf16_f32)
#undef LOAD
#define LOAD(e) from_float16(e)
DEFINE(f16_f32)
#undef LIVE
#undef LOAD

#undef SHADOW
#undef BITS
#undef COUNT
#undef FINITE
#undef MULADD
#define SHADOW double
#define BITS uint64_t
#define COUNT int64_t
#define FINITE(v) (fabs(v) <= DBL_MAX)
#define MULADD MULADD64

#define LIVE float
#define LOAD(e) ((double)(e))
DEFINE(f32_f64)
#undef LIVE
#undef LOAD
#define LIVE double
#define LOAD(e) (e)
DEFINE(f64_f64)
#undef LIVE
#undef LOAD
#define LIVE uint16_t
#define LOAD(e) ((double)from_bfloat16(e))
DEFINE(bf16_f64)
#undef LOAD
#define LOAD(e) ((double)from_float16(e))
DEFINE(f16_f64)
#undef LIVE
#undef LOAD

#undef SHADOW
#undef BITS
#undef COUNT
#undef FINITE
#undef MULADD
#undef DEFINE
#undef EACH

/* In the order of the kinds. */
static const Loops LEVEL(loops)[KINDS] = {
    {LEVEL(lerp_f32_f32), LEVEL(count_f32_f32)},   {LEVEL(lerp_f64_f32), LEVEL(count_f64_f32)},
    {LEVEL(lerp_bf16_f32), LEVEL(count_bf16_f32)}, {LEVEL(lerp_f16_f32), LEVEL(count_f16_f32)},
    {LEVEL(lerp_f32_f64), LEVEL(count_f32_f64)},   {LEVEL(lerp_f64_f64), LEVEL(count_f64_f64)},
    {LEVEL(lerp_bf16_f64), LEVEL(count_bf16_f64)}, {LEVEL(lerp_f16_f64), LEVEL(count_f16_f64)},
};
