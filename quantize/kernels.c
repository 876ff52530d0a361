/* FP8 and NVFP4 kernels for CPUs, on contiguous tensors.
 *
 * amax is plain C that compilers vectorize well. All else exists three times: `_portable`, plain C
 * here, and with intrinsics in kernels_avx2.h and kernels_avx512.h. All of it, and the plain torch
 * code in fp8.py and nvfp4.py, gives the same bits; only the payload of a NaN is left open.
 *
 * Compile with -ffp-contract=off and without -ffast-math: a fused multiply-add or a reciprocal in
 * place of a division changes codes at rounding ties.
 *
 * A tensor whose last dimension is a multiple of 16 is, row-major, just a run of blocks of 16, so
 * nothing here knows about rows. bf16 values are uint16_t.
 */

#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define BLOCK 16
#define INLINE static inline __attribute__((always_inline))

enum dtype { BF16, F32 };

/* ---- numbers ---------------------------------------------------------------------------- */

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define ABS_MASK 0x7fffffffu
#define INF_BITS 0x7f800000u
#define E4M3_MAX_BITS 0x43e00000u /* 448.0f */
#define E4M3_NAN 0x7f

/* Round to nearest even at bit 16; a NaN stays a NaN. */
INLINE uint16_t bf16_of(float value) {
    uint32_t bits = bits_of(value);
    uint16_t rounded = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return (bits & ABS_MASK) > INF_BITS ? 0x7fc0 : rounded;
}

INLINE float load(const void *x, int64_t i, enum dtype dtype) {
    if (dtype == BF16) return float_of((uint32_t)((const uint16_t *)x)[i] << 16);
    return ((const float *)x)[i];
}

INLINE void store(void *out, int64_t i, float value, enum dtype dtype) {
    if (dtype == BF16)
        ((uint16_t *)out)[i] = bf16_of(value);
    else
        ((float *)out)[i] = value;
}

/* Adding 2^(e+20) to a float of exponent e rounds it, to nearest even, to E4M3's 3 mantissa bits:
 * the sum's last bit is worth 2^(e-3). From 2^-6 down E4M3's step stays 2^-9, hence the floor. */
#define E4M3_ROUNDER_SHIFT (20u << 23)
#define E4M3_ROUNDER_MIN 0x46800000u /* 2^14 */

INLINE uint32_t e4m3_rounder(uint32_t magnitude) {
    uint32_t rounder = (magnitude & INF_BITS) + E4M3_ROUNDER_SHIFT;
    return rounder > E4M3_ROUNDER_MIN ? rounder : E4M3_ROUNDER_MIN;
}

/* Saturates at 448; a NaN of either sign gives 0x7f. */
INLINE uint8_t e4m3_of(float value) {
    uint32_t bits = bits_of(value), magnitude = bits & ABS_MASK;
    uint32_t clamped = magnitude < E4M3_MAX_BITS ? magnitude : E4M3_MAX_BITS;
    uint32_t rounder = e4m3_rounder(clamped);
    uint32_t sum = bits_of(float_of(clamped) + float_of(rounder));
    /* steps above the rounder, plus 8 codes for each binade above the subnormals */
    uint32_t code = sum - rounder + ((rounder - E4M3_ROUNDER_MIN) >> 20);
    return (uint8_t)(magnitude > INF_BITS ? E4M3_NAN : code | ((bits >> 24) & 0x80));
}

/* The value that e4m3_of's code stands for. */
INLINE float e4m3_round(float value) {
    uint32_t bits = bits_of(value), magnitude = bits & ABS_MASK;
    uint32_t clamped = magnitude < E4M3_MAX_BITS ? magnitude : E4M3_MAX_BITS;
    float rounder = float_of(e4m3_rounder(clamped));
    uint32_t rounded = bits_of(float_of(clamped) + rounder - rounder);
    return float_of(magnitude > INF_BITS ? bits : rounded | (bits & 0x80000000u));
}

INLINE float e4m3_value(uint8_t code) {
    uint32_t magnitude = code & 0x7f;
    float normal = float_of((magnitude << 20) + (120u << 23));
    float value = magnitude < 8 ? (float)(int32_t)magnitude * 0x1p-9f : normal;
    uint32_t bits = magnitude == E4M3_NAN ? 0x7fc00000u : bits_of(value);
    return float_of(bits | (uint32_t)(code & 0x80) << 24);
}

/* Likewise for E2M1: adding 2^(e+22) leaves one mantissa bit, and from 1 down a step of .5. A NaN
 * saturates to 7, the code ModelOpt gives it. */
#define E2M1_MAX_BITS 0x40c00000u /* 6.0f */
#define E2M1_ROUNDER_SHIFT (22u << 23)
#define E2M1_ROUNDER_MIN 0x4a800000u /* 2^22 */

INLINE uint32_t e2m1_rounder(uint32_t magnitude) {
    uint32_t rounder = (magnitude & INF_BITS) + E2M1_ROUNDER_SHIFT;
    return rounder > E2M1_ROUNDER_MIN ? rounder : E2M1_ROUNDER_MIN;
}

INLINE uint32_t e2m1_of(float value) {
    uint32_t magnitude = bits_of(value) & ABS_MASK;
    uint32_t clamped = magnitude < E2M1_MAX_BITS ? magnitude : E2M1_MAX_BITS;
    uint32_t rounder = e2m1_rounder(clamped);
    uint32_t sum = bits_of(float_of(clamped) + float_of(rounder));
    /* steps above the rounder, plus 2 codes for each binade above 1 */
    uint32_t code = sum - rounder + ((rounder - E2M1_ROUNDER_MIN) >> 22);
    /* by comparison, which drops the sign of a quotient that underflowed to -0 */
    return code | (value < 0 ? 8 : 0);
}

/* The value that e2m1_of's code stands for; +0 for code 8. */
INLINE float e2m1_round(float value) {
    uint32_t bits = bits_of(value), magnitude = bits & ABS_MASK;
    uint32_t clamped = magnitude < E2M1_MAX_BITS ? magnitude : E2M1_MAX_BITS;
    float rounder = float_of(e2m1_rounder(clamped));
    uint32_t rounded = bits_of(float_of(clamped) + rounder - rounder);
    return float_of(rounded | (rounded ? bits & 0x80000000u : 0));
}

static const float E2M1_VALUES[16] = {0, .5f,  1,  1.5f,  2,  3,  4,  6,
                                      0, -.5f, -1, -1.5f, -2, -3, -4, -6};

INLINE const void *at(const void *x, int64_t i, enum dtype dtype) {
    return (const char *)x + i * (dtype == BF16 ? 2 : 4);
}

INLINE void *at_out(void *x, int64_t i, enum dtype dtype) {
    return (char *)x + i * (dtype == BF16 ? 2 : 4);
}

/* ---- portable --------------------------------------------------------------------------- */

/* Bits of max |x|. */
INLINE uint32_t amax_bits(const void *x, int64_t count, enum dtype dtype) {
    /* As integers, magnitudes sort like floats, with the NaNs above infinity. */
    if (dtype == BF16) {
        const uint16_t *x16 = x;
        uint16_t max = 0;
        for (int64_t i = 0; i < count; i++) {
            uint16_t magnitude = x16[i] & 0x7fff;
            max = magnitude > max ? magnitude : max;
        }
        return (uint32_t)max << 16;
    }
    const uint32_t *x32 = x;
    uint32_t max = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t magnitude = x32[i] & ABS_MASK;
        max = magnitude > max ? magnitude : max;
    }
    return max;
}

/* E4M3 scale of a block. Only a quotient of exactly 0 becomes 1; other small ones become 2^-9. */
INLINE uint8_t block_scale_of(float amax, float tensor_scale) {
    float scale = amax / (6.f * tensor_scale);
    scale = scale == 0.f ? 1.f : scale < 0x1p-9f ? 0x1p-9f : scale;
    return e4m3_of(scale);
}

INLINE void nvfp4_quantize_portable(const void *x, uint8_t *packed, uint8_t *block_scale,
                                    int64_t blocks, float tensor_scale, enum dtype dtype) {
    for (int64_t b = 0; b < blocks; b++) {
        const void *in = at(x, b * BLOCK, dtype);
        uint8_t scale = block_scale_of(float_of(amax_bits(in, BLOCK, dtype)), tensor_scale);
        float step = e4m3_value(scale) * tensor_scale;
        uint32_t codes[BLOCK];
        for (int i = 0; i < BLOCK; i++) codes[i] = e2m1_of(load(in, i, dtype) / step);
        for (int i = 0; i < BLOCK / 2; i++)
            packed[b * BLOCK / 2 + i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
        block_scale[b] = scale;
    }
}

INLINE void nvfp4_fake_quantize_portable(const void *x, void *out, int64_t blocks,
                                         float tensor_scale, enum dtype dtype) {
    for (int64_t b = 0; b < blocks; b++) {
        const void *in = at(x, b * BLOCK, dtype);
        uint8_t scale = block_scale_of(float_of(amax_bits(in, BLOCK, dtype)), tensor_scale);
        float step = e4m3_value(scale) * tensor_scale;
        for (int i = 0; i < BLOCK; i++)
            store(out, b * BLOCK + i, e2m1_round(load(in, i, dtype) / step) * step, dtype);
    }
}

INLINE void nvfp4_dequantize_portable(const uint8_t *packed, const uint8_t *block_scale, void *out,
                                      int64_t blocks, float tensor_scale, enum dtype dtype) {
    for (int64_t b = 0; b < blocks; b++) {
        float step = e4m3_value(block_scale[b]) * tensor_scale;
        for (int i = 0; i < BLOCK; i++) {
            uint8_t pair = packed[(b * BLOCK + i) / 2];
            store(out, b * BLOCK + i, E2M1_VALUES[i % 2 ? pair >> 4 : pair & 15] * step, dtype);
        }
    }
}

/* The quotient is rounded to x's dtype before E4M3, as torch rounds bf16 / FP32 scalar. */
INLINE float fp8_quotient(const void *x, int64_t i, float scale, enum dtype dtype) {
    float quotient = load(x, i, dtype) / scale;
    return dtype == BF16 ? float_of((uint32_t)bf16_of(quotient) << 16) : quotient;
}

INLINE void fp8_quantize_portable(const void *x, uint8_t *out, int64_t count, float scale,
                                  enum dtype dtype) {
    for (int64_t i = 0; i < count; i++) out[i] = e4m3_of(fp8_quotient(x, i, scale, dtype));
}

INLINE void fp8_fake_quantize_portable(const void *x, void *out, int64_t count, float scale,
                                       enum dtype dtype) {
    for (int64_t i = 0; i < count; i++)
        store(out, i, e4m3_round(fp8_quotient(x, i, scale, dtype)) * scale, dtype);
}

INLINE void fp8_dequantize_portable(const uint8_t *codes, void *out, int64_t count, float scale,
                                    enum dtype dtype) {
    for (int64_t i = 0; i < count; i++) store(out, i, e4m3_value(codes[i]) * scale, dtype);
}

/* Ask for `bytes` of input that loops with intrinsics reach some hundred elements later; past the
 * end it does nothing. Virtual Intel machines were found to fetch too little by themselves: FP8
 * went from 1.4 to 7 GB/s. */
#define BYTES_AHEAD 2048
INLINE void read_ahead(const void *x, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)x + BYTES_AHEAD + i);
}

/* ---- with intrinsics --------------------------------------------------------------------- */

#if defined(__AVX2__)
#define HAS_AVX2 1
#include "kernels_avx2.h"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VBMI__)
#define HAS_AVX512 1
#include "kernels_avx512.h"
#endif

/* ---- exports: nvvl_<operation>_<dtype>, and but for amax _<variant> ---------------------- */

/* Ask for 2 MiB pages in memory that was just allocated. Taking page faults in 4 KiB pages costs
 * more than the kernels themselves. Only advice, so a refusal is no error. */
void nvvl_use_huge_pages(void *memory, int64_t size) {
#ifdef __linux__
    const uintptr_t page = 2 << 20;
    uintptr_t start = ((uintptr_t)memory + page - 1) & ~(page - 1);
    uintptr_t stop = ((uintptr_t)memory + (uintptr_t)size) & ~(page - 1);
    if (start < stop) (void)madvise((void *)start, stop - start, MADV_HUGEPAGE);
#else
    (void)memory, (void)size;
#endif
}

/* Units of each thread's range: whole groups of 16, which the kernels with intrinsics take at once. */
INLINE int64_t share(int64_t units, int64_t threads) {
    int64_t step = (units + threads - 1) / threads;
    return (step + 15) / 16 * 16;
}

/* Run WORK on ranges that cover `units`, each `part` units from `start` on, one range a thread;
 * CLAUSE is one of OpenMP's or empty. */
#define PRAGMA(TEXT) _Pragma(#TEXT)
#define ON_THREADS(CLAUSE, WORK)                                                                 \
    int64_t step = share(units, threads);                                                        \
    PRAGMA(omp parallel for num_threads((int)threads) CLAUSE)                                    \
    for (int64_t start = 0; start < units; start += step) {                                      \
        int64_t part = units - start < step ? units - start : step;                              \
        WORK;                                                                                    \
    }

#define EXPORT_AMAX(NAME, DTYPE)                                                                 \
    uint32_t nvvl_amax_##NAME(const void *x, int64_t units, int64_t threads) {                   \
        uint32_t bits = 0;                                                                       \
        ON_THREADS(reduction(max : bits),                                                        \
                   uint32_t found = amax_bits(at(x, start, DTYPE), part, DTYPE);                 \
                   bits = found > bits ? found : bits)                                           \
        return bits;                                                                             \
    }

#define EXPORT(NAME, DTYPE, VARIANT)                                                             \
    void nvvl_fp8_quantize_##NAME##_##VARIANT(const void *x, uint8_t *out, int64_t units,        \
                                              float scale, int64_t threads) {                    \
        ON_THREADS(, fp8_quantize_##VARIANT(at(x, start, DTYPE), out + start, part, scale,       \
                                            DTYPE))                                              \
    }                                                                                            \
    void nvvl_fp8_fake_quantize_##NAME##_##VARIANT(const void *x, void *out, int64_t units,      \
                                                   float scale, int64_t threads) {               \
        ON_THREADS(, fp8_fake_quantize_##VARIANT(at(x, start, DTYPE), at_out(out, start, DTYPE), \
                                                 part, scale, DTYPE))                            \
    }                                                                                            \
    void nvvl_fp8_dequantize_##NAME##_##VARIANT(const uint8_t *codes, void *out, int64_t units,  \
                                                float scale, int64_t threads) {                  \
        ON_THREADS(, fp8_dequantize_##VARIANT(codes + start, at_out(out, start, DTYPE), part,    \
                                              scale, DTYPE))                                     \
    }                                                                                            \
    void nvvl_nvfp4_quantize_##NAME##_##VARIANT(const void *x, uint8_t *packed,                  \
                                                uint8_t *block_scale, int64_t units,             \
                                                float tensor_scale, int64_t threads) {           \
        ON_THREADS(, nvfp4_quantize_##VARIANT(at(x, start * BLOCK, DTYPE),                       \
                                              packed + start * BLOCK / 2, block_scale + start,   \
                                              part, tensor_scale, DTYPE))                        \
    }                                                                                            \
    void nvvl_nvfp4_fake_quantize_##NAME##_##VARIANT(const void *x, void *out, int64_t units,    \
                                                     float tensor_scale, int64_t threads) {      \
        ON_THREADS(, nvfp4_fake_quantize_##VARIANT(at(x, start * BLOCK, DTYPE),                  \
                                                   at_out(out, start * BLOCK, DTYPE), part,      \
                                                   tensor_scale, DTYPE))                         \
    }                                                                                            \
    void nvvl_nvfp4_dequantize_##NAME##_##VARIANT(const uint8_t *packed,                         \
                                                  const uint8_t *block_scale, void *out,         \
                                                  int64_t units, float tensor_scale,             \
                                                  int64_t threads) {                             \
        ON_THREADS(, nvfp4_dequantize_##VARIANT(packed + start * BLOCK / 2, block_scale + start, \
                                                at_out(out, start * BLOCK, DTYPE), part,         \
                                                tensor_scale, DTYPE))                            \
    }

EXPORT_AMAX(bf16, BF16)
EXPORT_AMAX(f32, F32)
EXPORT(bf16, BF16, portable)
EXPORT(f32, F32, portable)
#ifdef HAS_AVX2
EXPORT(bf16, BF16, avx2)
EXPORT(f32, F32, avx2)
#endif
#ifdef HAS_AVX512
EXPORT(bf16, BF16, avx512)
EXPORT(f32, F32, avx512)
#endif
