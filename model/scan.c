/* The Mamba2 scan of bfloat16 inputs on CPUs.
 *
 * The same chunked form as scan_chunks in mamba2.py, one group of heads at a time and without
 * tensors in between: a chunk's scores, its contribution to the state and the state stay in cache.
 * It exists in float32, with AVX-512 and AVX2 (scan_float32.h), and with the bfloat16 dot products
 * that some processors multiply faster by (scan_bf16.h).
 *
 * Shapes: T tokens, H heads, P head dim, G groups, N state, Q tokens of a chunk.
 */

#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define Q 64

typedef struct {
    const uint16_t *x, *b, *c;           /* x (T, H, P), b and c (T, G, N) */
    int64_t x_stride, b_stride, c_stride; /* from token to token */
    const float *dt, *a, *d, *keep;      /* (T, H), (H), (H), (chunks) or NULL */
    float *state, *y;                    /* (H, P, N), read and written; (T, H, P) */
} sequence_t;

/* A product's COLUMNS(number of vectors) for all of its columns, with at most five at once. */
#define UP_TO_FIVE(COLUMNS)                                                                       \
    for (; columns - column > 5 * LANES; column += 4 * LANES) COLUMNS(4);                         \
    switch ((columns - column) / LANES) {                                                         \
    case 5: COLUMNS(5); break;                                                                    \
    case 4: COLUMNS(4); break;                                                                    \
    case 3: COLUMNS(3); break;                                                                    \
    case 2: COLUMNS(2); break;                                                                    \
    default: COLUMNS(1); break;                                                                   \
    }

/* ---- with intrinsics --------------------------------------------------------------------- */

#if defined(__AVX2__) && defined(__FMA__)
#define HAS_AVX2 1
#include <immintrin.h>
#define VARIANT avx2
#define LANES 8
#include "scan_float32.h"
#undef VARIANT
#undef LANES
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)
#define HAS_AVX512 1
#define VARIANT avx512
#define LANES 16
#include "scan_float32.h"
#undef VARIANT
#undef LANES
#ifdef __AVX512BF16__
#define HAS_BF16 1
#include "scan_bf16.h"
#endif
#endif

/* ---- exports: nvvl_scan_<variant> and nvvl_scan_scratch_<variant> ------------------------- */

#ifdef HAS_AVX2

#define FLUSH_TO_ZERO 0x8000u
#define DENORMALS_ARE_ZEROS 0x0040u

typedef void scan_heads_t(const sequence_t *q, float *scratch, int64_t length, int64_t num_heads,
                          int64_t p, int64_t groups, int64_t n, int64_t first_head, int64_t heads);

INLINE void scan_batch(scan_heads_t *scan_heads, const uint16_t *x, const uint16_t *b,
                       const uint16_t *c, const int64_t *strides, const float *dt, const float *a,
                       const float *d, const float *keep, float *state, float *y, float *scratch,
                       int64_t scratch_size, int64_t batch, int64_t length, int64_t num_heads,
                       int64_t p, int64_t groups, int64_t n, int64_t heads, int64_t threads) {
    int64_t calls = num_heads / heads;
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
    for (int64_t unit = 0; unit < batch * calls; unit++) {
        int64_t row = unit / calls;
        sequence_t q = {
            x + row * strides[3],           b + row * strides[4],
            c + row * strides[5],           strides[0],
            strides[1],                     strides[2],
            dt + row * length * num_heads,  a,
            d,                              keep,
            state + row * num_heads * p * n, y + row * length * num_heads * p,
        };
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        /* What has decayed below the normal floats is multiplied slowly, and made the whole scan
         * take up to 13 times as long: let it be zeros. */
        unsigned int mode = _mm_getcsr();
        _mm_setcsr(mode | FLUSH_TO_ZERO | DENORMALS_ARE_ZEROS);
        scan_heads(&q, scratch + thread * scratch_size, length, num_heads, p, groups, n,
                   unit % calls * heads, heads);
        _mm_setcsr(mode);
    }
}

/* nvvl_scan_scratch: floats of scratch that nvvl_scan needs.
 *
 * nvvl_scan: scan a batch of sequences of `length` tokens, `heads` of the heads of a group at a
 * time on each of the threads. The pointers are those of sequence_t for the first of them; bfloat16
 * rows are strides[3..5] from sequence to sequence and strides[0..2] from token to token.
 * length >= 1, P and N multiples of 16. */
#define EXPORT(VARIANT)                                                                           \
    int64_t nvvl_scan_scratch_##VARIANT(int64_t heads, int64_t p, int64_t n, int64_t threads) {   \
        return threads * scratch_size_##VARIANT(heads, p, n);                                     \
    }                                                                                             \
    void nvvl_scan_##VARIANT(const uint16_t *x, const uint16_t *b, const uint16_t *c,             \
                             const int64_t *strides, const float *dt, const float *a,             \
                             const float *d, const float *keep, float *state, float *y,           \
                             float *scratch, int64_t batch, int64_t length, int64_t num_heads,    \
                             int64_t p, int64_t groups, int64_t n, int64_t heads,                 \
                             int64_t threads) {                                                   \
        scan_batch(scan_heads_##VARIANT, x, b, c, strides, dt, a, d, keep, state, y, scratch,     \
                   scratch_size_##VARIANT(heads, p, n), batch, length, num_heads, p, groups, n,   \
                   heads, threads);                                                               \
    }

EXPORT(avx2)
#ifdef HAS_AVX512
EXPORT(avx512)
#endif
#ifdef HAS_BF16
EXPORT(bf16)
#endif
#endif
