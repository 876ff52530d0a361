/* FP8 and NVFP4 kernels for CPUs, one thread's share of a contiguous tensor at a time.
 *
 * amax and FP8 are plain C that compilers vectorize well. NVFP4 exists twice: `_portable`, plain C,
 * and `_avx512`, written with intrinsics (AVX-512 F, BW, DQ, VL, VBMI). All of it, and the plain
 * torch code in fp8.py and nvfp4.py, gives the same bits; only the payload of a NaN is left open.
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

INLINE void fp8_quantize(const void *x, uint8_t *out, int64_t count, float scale,
                         enum dtype dtype) {
    for (int64_t i = 0; i < count; i++) out[i] = e4m3_of(fp8_quotient(x, i, scale, dtype));
}

INLINE void fp8_fake_quantize(const void *x, void *out, int64_t count, float scale,
                              enum dtype dtype) {
    for (int64_t i = 0; i < count; i++)
        store(out, i, e4m3_round(fp8_quotient(x, i, scale, dtype)) * scale, dtype);
}

INLINE void fp8_dequantize(const uint8_t *codes, void *out, int64_t count, float scale,
                                    enum dtype dtype) {
    for (int64_t i = 0; i < count; i++) store(out, i, e4m3_value(codes[i]) * scale, dtype);
}

/* ---- AVX-512 ---------------------------------------------------------------------------- */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VBMI__)
#define HAS_AVX512 1
#include <immintrin.h>

INLINE __m512 load16(const void *x, int64_t i, enum dtype dtype) {
    if (dtype == F32) return _mm512_loadu_ps((const float *)x + i);
    __m256i half = _mm256_loadu_si256((const void *)((const uint16_t *)x + i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Round 16 floats that are not NaN to bf16, kept in the upper half of each 32-bit lane; the lower
 * half is rubbish. */
INLINE __m512i round_to_bf16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
}

INLINE void store16(void *out, int64_t i, __m512 value, enum dtype dtype) {
    if (dtype == F32) {
        _mm512_storeu_ps((float *)out + i, value);
    } else {
        __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(value), 16));
        _mm256_storeu_si256((void *)((uint16_t *)out + i), half);
    }
}

/* Whether 16 values hold a NaN: those go to the portable code. */
INLINE int has_nan(__m512 value) { return _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q) != 0; }

/* e4m3_rounder of 16 magnitudes. */
INLINE __m512i e4m3_rounder16(__m512i magnitude) {
    __m512i exponent = _mm512_and_si512(magnitude, _mm512_set1_epi32(INF_BITS));
    return _mm512_max_epu32(_mm512_add_epi32(exponent, _mm512_set1_epi32(E4M3_ROUNDER_SHIFT)),
                            _mm512_set1_epi32(E4M3_ROUNDER_MIN));
}

/* Codes without sign of 16 sums of a rounder and a magnitude, as e4m3_of. */
INLINE __m512i e4m3_codes16(__m512 sum, __m512i rounder) {
    __m512i steps = _mm512_sub_epi32(_mm512_castps_si512(sum), rounder);
    __m512i binades = _mm512_sub_epi32(rounder, _mm512_set1_epi32(E4M3_ROUNDER_MIN));
    return _mm512_add_epi32(steps, _mm512_srli_epi32(binades, 20));
}

/* ---- NVFP4, 16 blocks at a time */

/* The E4M3 scales of 16 blocks, and the steps scale * tensor_scale they stand for. Returns 0, and
 * nothing useful, if one of the blocks holds a NaN. */
INLINE int block_scales16(const void *x, float tensor_scale, __m128i *scales, float *steps,
                          enum dtype dtype) {
    uint32_t bits[16];
    for (int b = 0; b < 16; b++) {
        if (dtype == F32) {
            __m512i v = _mm512_loadu_si512(at(x, b * BLOCK, dtype));
            v = _mm512_and_si512(v, _mm512_set1_epi32(ABS_MASK));
            bits[b] = _mm512_reduce_max_epu32(v);
        } else {
            /* phminposuw finds the least of eight uint16: let it look at 0x7fff - magnitude. */
            __m256i v = _mm256_loadu_si256(at(x, b * BLOCK, dtype));
            v = _mm256_andnot_si256(v, _mm256_set1_epi16(0x7fff));
            __m128i least = _mm_minpos_epu16(
                _mm_min_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
            bits[b] = (0x7fffu - (uint32_t)_mm_extract_epi16(least, 0)) << 16;
        }
    }
    __m512 amax = _mm512_castsi512_ps(_mm512_loadu_si512(bits));
    if (has_nan(amax)) return 0;
    __m512 scale = _mm512_div_ps(amax, _mm512_set1_ps(6.f * tensor_scale));
    __mmask16 zero = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_EQ_OQ);
    scale = _mm512_max_ps(scale, _mm512_set1_ps(0x1p-9f));
    scale = _mm512_mask_mov_ps(scale, zero, _mm512_set1_ps(1.f));
    scale = _mm512_min_ps(scale, _mm512_set1_ps(448.f));
    __m512i rounder = e4m3_rounder16(_mm512_castps_si512(scale));
    __m512 sum = _mm512_add_ps(scale, _mm512_castsi512_ps(rounder));
    *scales = _mm512_cvtepi32_epi8(e4m3_codes16(sum, rounder));
    __m512 rounded = _mm512_sub_ps(sum, _mm512_castsi512_ps(rounder));
    _mm512_storeu_ps(steps, _mm512_mul_ps(rounded, _mm512_set1_ps(tensor_scale)));
    return 1;
}

/* x / step, saturated at +-6. */
INLINE __m512 scaled_block(const void *x, int64_t block, float step, enum dtype dtype) {
    __m512 y = _mm512_div_ps(load16(x, block * BLOCK, dtype), _mm512_set1_ps(step));
    return _mm512_max_ps(_mm512_min_ps(y, _mm512_set1_ps(6.f)), _mm512_set1_ps(-6.f));
}

/* floor(4 y) + ceil(4 y): twice 4 y where that is whole, else odd. It tells a boundary apart from
 * either side of it, is -1 for the smallest negative y and 0 for -0. */
INLINE __m512i index_of(__m512 y) {
    __m512 y4 = _mm512_mul_ps(y, _mm512_set1_ps(4.f));
    return _mm512_add_epi32(
        _mm512_cvt_roundps_epi32(y4, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC),
        _mm512_cvt_roundps_epi32(y4, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
}

/* Code of each index_of(y), at the index modulo 128. */
static void fill_code_table(uint8_t table[128]) {
    for (int i = 0; i < 128; i++) {
        int index = i < 64 ? i : i - 128;
        /* index / 8 == y where 4 y is whole; elsewhere it lies between the same neighbours */
        table[i] = (uint8_t)e2m1_of((float)index / 8.f);
    }
}

INLINE void nvfp4_quantize_avx512(const void *x, uint8_t *packed, uint8_t *block_scale,
                                  int64_t blocks, float tensor_scale, enum dtype dtype) {
    uint8_t table[128];
    fill_code_table(table);
    __m512i table_low = _mm512_loadu_si512(table), table_high = _mm512_loadu_si512(table + 64);
    /* undoes the interleaving of 128-bit lanes by the two pack instructions */
    __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    int64_t b = 0;
    for (; b + 16 <= blocks; b += 16) {
        const void *in = at(x, b * BLOCK, dtype);
        __m128i scales;
        float steps[16];
        if (!block_scales16(in, tensor_scale, &scales, steps, dtype)) {
            nvfp4_quantize_portable(in, packed + b * 8, block_scale + b, 16, tensor_scale, dtype);
            continue;
        }
        _mm_storeu_si128((void *)(block_scale + b), scales);
        for (int j = 0; j < 16; j += 4) {
            __m512i i0 = index_of(scaled_block(in, j, steps[j], dtype));
            __m512i i1 = index_of(scaled_block(in, j + 1, steps[j + 1], dtype));
            __m512i i2 = index_of(scaled_block(in, j + 2, steps[j + 2], dtype));
            __m512i i3 = index_of(scaled_block(in, j + 3, steps[j + 3], dtype));
            __m512i index = _mm512_packs_epi16(_mm512_packs_epi32(i0, i1),
                                               _mm512_packs_epi32(i2, i3));
            index = _mm512_permutexvar_epi32(order, index);
            __m512i codes = _mm512_permutex2var_epi8(table_low, index, table_high);
            /* even code + 16 * odd code, in 16 bits */
            __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x1001));
            _mm256_storeu_si256((void *)(packed + (b + j) * 8), _mm512_cvtepi16_epi8(pairs));
        }
    }
    nvfp4_quantize_portable(at(x, b * BLOCK, dtype), packed + b * 8, block_scale + b, blocks - b,
                            tensor_scale, dtype);
}

/* 1.5 times e2m1_rounder of 16 values: the half more keeps sums with negative values, which then
 * need no sign bit set apart, within the rounder's binade. */
INLINE __m512 signed_e2m1_rounder16(__m512 y) {
    __m512i half = _mm512_set1_epi32(0x400000);
    __m512i exponent = _mm512_and_si512(_mm512_castps_si512(y), _mm512_set1_epi32(INF_BITS));
    __m512i rounder = _mm512_add_epi32(exponent, _mm512_set1_epi32(E2M1_ROUNDER_SHIFT));
    rounder = _mm512_max_epi32(rounder, _mm512_set1_epi32(E2M1_ROUNDER_MIN));
    return _mm512_castsi512_ps(_mm512_or_si512(rounder, half));
}

INLINE void nvfp4_fake_quantize_avx512(const void *x, void *out, int64_t blocks,
                                       float tensor_scale, enum dtype dtype) {
    int64_t b = 0;
    for (; b + 16 <= blocks; b += 16) {
        const void *in = at(x, b * BLOCK, dtype);
        void *to = at_out(out, b * BLOCK, dtype);
        __m128i scales;
        float steps[16];
        if (!block_scales16(in, tensor_scale, &scales, steps, dtype)) {
            nvfp4_fake_quantize_portable(in, to, 16, tensor_scale, dtype);
            continue;
        }
        for (int j = 0; j < 16; j++) {
            __m512 y = scaled_block(in, j, steps[j], dtype);
            __m512 rounder = signed_e2m1_rounder16(y);
            y = _mm512_sub_ps(_mm512_add_ps(y, rounder), rounder);
            store16(to, j * BLOCK, _mm512_mul_ps(y, _mm512_set1_ps(steps[j])), dtype);
        }
    }
    nvfp4_fake_quantize_portable(at(x, b * BLOCK, dtype), at_out(out, b * BLOCK, dtype),
                                 blocks - b, tensor_scale, dtype);
}

INLINE void nvfp4_dequantize_avx512(const uint8_t *packed, const uint8_t *block_scale, void *out,
                                    int64_t blocks, float tensor_scale, enum dtype dtype) {
    __m512 values = _mm512_loadu_ps(E2M1_VALUES);
    for (int64_t b = 0; b < blocks; b++) {
        if ((block_scale[b] & 0x7f) == E4M3_NAN) {
            nvfp4_dequantize_portable(packed + b * 8, block_scale + b,
                                      at_out(out, b * BLOCK, dtype), 1, tensor_scale, dtype);
            continue;
        }
        __m128i pairs = _mm_loadl_epi64((const void *)(packed + b * 8));
        __m128i low = _mm_and_si128(pairs, _mm_set1_epi8(15));
        __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), _mm_set1_epi8(15));
        __m512i codes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
        __m512 step = _mm512_set1_ps(e4m3_value(block_scale[b]) * tensor_scale);
        store16(out, b * BLOCK, _mm512_mul_ps(_mm512_permutexvar_ps(codes, values), step), dtype);
    }
}
#endif

/* ---- exports: nvvl_<operation>_<dtype>, and for NVFP4 _<variant> ------------------------- */

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

#define EXPORT(NAME, DTYPE)                                                                      \
    uint32_t nvvl_amax_##NAME(const void *x, int64_t count) {                                    \
        return amax_bits(x, count, DTYPE);                                                       \
    }                                                                                            \
    void nvvl_fp8_quantize_##NAME(const void *x, void *out, int64_t count, float scale) {        \
        fp8_quantize(x, out, count, scale, DTYPE);                                               \
    }                                                                                            \
    void nvvl_fp8_fake_quantize_##NAME(const void *x, void *out, int64_t count, float scale) {   \
        fp8_fake_quantize(x, out, count, scale, DTYPE);                                          \
    }                                                                                            \
    void nvvl_fp8_dequantize_##NAME(const void *codes, void *out, int64_t count, float scale) {  \
        fp8_dequantize(codes, out, count, scale, DTYPE);                                         \
    }

#define EXPORT_NVFP4(NAME, DTYPE, VARIANT)                                                       \
    void nvvl_nvfp4_quantize_##NAME##_##VARIANT(const void *x, void *packed, void *block_scale,  \
                                                int64_t blocks, float tensor_scale) {            \
        nvfp4_quantize_##VARIANT(x, packed, block_scale, blocks, tensor_scale, DTYPE);           \
    }                                                                                            \
    void nvvl_nvfp4_fake_quantize_##NAME##_##VARIANT(const void *x, void *out, int64_t blocks,   \
                                                     float tensor_scale) {                       \
        nvfp4_fake_quantize_##VARIANT(x, out, blocks, tensor_scale, DTYPE);                      \
    }                                                                                            \
    void nvvl_nvfp4_dequantize_##NAME##_##VARIANT(const void *packed, const void *block_scale,   \
                                                  void *out, int64_t blocks,                     \
                                                  float tensor_scale) {                          \
        nvfp4_dequantize_##VARIANT(packed, block_scale, out, blocks, tensor_scale, DTYPE);       \
    }

EXPORT(bf16, BF16)
EXPORT(f32, F32)
EXPORT_NVFP4(bf16, BF16, portable)
EXPORT_NVFP4(f32, F32, portable)
#ifdef HAS_AVX512
EXPORT_NVFP4(bf16, BF16, avx512)
EXPORT_NVFP4(f32, F32, avx512)
#endif
