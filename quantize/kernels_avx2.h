/* FP8 and NVFP4 kernels with AVX2 intrinsics; part of kernels.c.
 *
 * NVFP4 takes 8 blocks at a time. A block is two vectors of 8 floats. The steps are those of kernels_avx512.h, except that codes
 * come from comparisons of bytes: AVX2 has no table of 128 of them.
 */

#include <immintrin.h>

/* Values i to i + 7. */
INLINE __m256 load8(const void *x, int64_t i, enum dtype dtype) {
    if (dtype == F32) return _mm256_loadu_ps((const float *)x + i);
    __m128i half = _mm_loadu_si128((const void *)((const uint16_t *)x + i));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* 8 floats that are not NaN, rounded to bf16 in the lower half of each 32-bit lane. */
INLINE __m256i to_bf16_8(__m256 value) {
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    return _mm256_srli_epi32(bits, 16);
}

/* Store a block. */
INLINE void store_block(void *out, int64_t i, __m256 low, __m256 high, enum dtype dtype) {
    if (dtype == F32) {
        _mm256_storeu_ps((float *)out + i, low);
        _mm256_storeu_ps((float *)out + i + 8, high);
    } else {
        __m256i both = _mm256_packus_epi32(to_bf16_8(low), to_bf16_8(high));
        both = _mm256_permute4x64_epi64(both, 0xd8); /* packing went by 128-bit lanes */
        _mm256_storeu_si256((void *)((uint16_t *)out + i), both);
    }
}

/* Bits of a block's max |x|. */
INLINE uint32_t block_amax_bits(const void *x, enum dtype dtype) {
    if (dtype == F32) {
        __m256i v = _mm256_max_epu32(
            _mm256_and_si256(_mm256_loadu_si256(x), _mm256_set1_epi32(ABS_MASK)),
            _mm256_and_si256(_mm256_loadu_si256(at(x, 8, dtype)), _mm256_set1_epi32(ABS_MASK)));
        __m128i w = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        w = _mm_max_epu32(w, _mm_shuffle_epi32(w, 0x4e));
        w = _mm_max_epu32(w, _mm_shuffle_epi32(w, 0xb1));
        return (uint32_t)_mm_cvtsi128_si32(w);
    }
    /* phminposuw finds the least of eight uint16: let it look at 0x7fff - magnitude. */
    __m256i v = _mm256_andnot_si256(_mm256_loadu_si256(x), _mm256_set1_epi16(0x7fff));
    __m128i least = _mm_minpos_epu16(
        _mm_min_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
    return (0x7fffu - (uint32_t)_mm_extract_epi16(least, 0)) << 16;
}

/* The E4M3 scales of 8 blocks, and the steps scale * tensor_scale they stand for. Returns 0, and
 * nothing useful, if one of the blocks holds a NaN. */
INLINE int block_scales8(const void *x, float tensor_scale, uint8_t *scales, float *steps,
                         enum dtype dtype) {
    uint32_t bits[8];
    for (int b = 0; b < 8; b++) bits[b] = block_amax_bits(at(x, b * BLOCK, dtype), dtype);
    __m256 amax = _mm256_castsi256_ps(_mm256_loadu_si256((const void *)bits));
    if (_mm256_movemask_ps(_mm256_cmp_ps(amax, amax, _CMP_UNORD_Q))) return 0;
    __m256 scale = _mm256_div_ps(amax, _mm256_set1_ps(6.f * tensor_scale));
    __m256 zero = _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_EQ_OQ);
    scale = _mm256_max_ps(scale, _mm256_set1_ps(0x1p-9f));
    scale = _mm256_blendv_ps(scale, _mm256_set1_ps(1.f), zero);
    scale = _mm256_min_ps(scale, _mm256_set1_ps(448.f));
    /* as e4m3_of */
    __m256i least = _mm256_set1_epi32(E4M3_ROUNDER_MIN);
    __m256i exponent = _mm256_and_si256(_mm256_castps_si256(scale), _mm256_set1_epi32(INF_BITS));
    __m256i rounder =
        _mm256_max_epu32(_mm256_add_epi32(exponent, _mm256_set1_epi32(E4M3_ROUNDER_SHIFT)), least);
    __m256 sum = _mm256_add_ps(scale, _mm256_castsi256_ps(rounder));
    __m256i codes = _mm256_add_epi32(_mm256_sub_epi32(_mm256_castps_si256(sum), rounder),
                                     _mm256_srli_epi32(_mm256_sub_epi32(rounder, least), 20));
    __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64((void *)scales, _mm_packus_epi16(words, words));
    __m256 rounded = _mm256_sub_ps(sum, _mm256_castsi256_ps(rounder));
    _mm256_storeu_ps(steps, _mm256_mul_ps(rounded, _mm256_set1_ps(tensor_scale)));
    return 1;
}

/* x / step of 8 values, saturated at +-6. */
INLINE __m256 scaled8(const void *x, int64_t i, __m256 step, enum dtype dtype) {
    __m256 y = _mm256_div_ps(load8(x, i, dtype), step);
    return _mm256_max_ps(_mm256_min_ps(y, _mm256_set1_ps(6.f)), _mm256_set1_ps(-6.f));
}

/* floor(4 y) + ceil(4 y): twice 4 y where that is whole, else odd. It tells a boundary apart from
 * either side of it, is -1 for the smallest negative y and 0 for -0. */
INLINE __m256i index8(__m256 y) {
    __m256 y4 = _mm256_mul_ps(y, _mm256_set1_ps(4.f));
    return _mm256_cvtps_epi32(_mm256_add_ps(_mm256_floor_ps(y4), _mm256_ceil_ps(y4)));
}

/* E2M1 codes of 32 indices in -48..48. Up to 15 a table has them; the three codes above begin where
 * 8 y is above 20 (a tie of 4 and 5 is even), at 28 and above 40. */
INLINE __m256i codes_of(__m256i index) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 4, 4));
    __m256i magnitude = _mm256_abs_epi8(index);
    __m256i code = _mm256_shuffle_epi8(table, _mm256_min_epu8(magnitude, _mm256_set1_epi8(15)));
    code = _mm256_sub_epi8(code, _mm256_cmpgt_epi8(magnitude, _mm256_set1_epi8(20)));
    code = _mm256_sub_epi8(code, _mm256_cmpgt_epi8(magnitude, _mm256_set1_epi8(27)));
    code = _mm256_sub_epi8(code, _mm256_cmpgt_epi8(magnitude, _mm256_set1_epi8(40)));
    __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), index);
    return _mm256_or_si256(code, _mm256_and_si256(negative, _mm256_set1_epi8(8)));
}

INLINE void nvfp4_quantize_avx2(const void *x, uint8_t *packed, uint8_t *block_scale,
                                int64_t blocks, float tensor_scale, enum dtype dtype) {
    /* undoes the interleaving of 128-bit lanes by the pack instructions */
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    int64_t b = 0;
    for (; b + 8 <= blocks; b += 8) {
        const void *in = at(x, b * BLOCK, dtype);
        read_ahead(in, 8 * BLOCK * (dtype == BF16 ? 2 : 4));
        float steps[8];
        if (!block_scales8(in, tensor_scale, block_scale + b, steps, dtype)) {
            nvfp4_quantize_portable(in, packed + b * 8, block_scale + b, 8, tensor_scale, dtype);
            continue;
        }
        for (int j = 0; j < 8; j += 2) {
            __m256 first = _mm256_set1_ps(steps[j]), second = _mm256_set1_ps(steps[j + 1]);
            int64_t i = j * BLOCK;
            __m256i i0 = index8(scaled8(in, i, first, dtype));
            __m256i i1 = index8(scaled8(in, i + 8, first, dtype));
            __m256i i2 = index8(scaled8(in, i + 16, second, dtype));
            __m256i i3 = index8(scaled8(in, i + 24, second, dtype));
            __m256i index = _mm256_packs_epi16(_mm256_packs_epi32(i0, i1),
                                               _mm256_packs_epi32(i2, i3));
            /* even code + 16 * odd code, in 16 bits */
            __m256i pairs = _mm256_maddubs_epi16(codes_of(index), _mm256_set1_epi16(0x1001));
            pairs = _mm256_permutevar8x32_epi32(pairs, order);
            __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs),
                                             _mm256_extracti128_si256(pairs, 1));
            _mm_storeu_si128((void *)(packed + (b + j) * 8), bytes);
        }
    }
    nvfp4_quantize_portable(at(x, b * BLOCK, dtype), packed + b * 8, block_scale + b, blocks - b,
                            tensor_scale, dtype);
}

/* x, rounded to E2M1 steps and multiplied by step again; as signed_e2m1_rounder16. */
INLINE __m256 fake_quantize8(const void *x, int64_t i, __m256 step, enum dtype dtype) {
    __m256 y = scaled8(x, i, step, dtype);
    __m256i exponent = _mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32(INF_BITS));
    __m256i bits = _mm256_add_epi32(exponent, _mm256_set1_epi32(E2M1_ROUNDER_SHIFT));
    bits = _mm256_max_epi32(bits, _mm256_set1_epi32(E2M1_ROUNDER_MIN));
    __m256 rounder = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)));
    return _mm256_mul_ps(_mm256_sub_ps(_mm256_add_ps(y, rounder), rounder), step);
}

INLINE void nvfp4_fake_quantize_avx2(const void *x, void *out, int64_t blocks, float tensor_scale,
                                     enum dtype dtype) {
    int64_t b = 0;
    for (; b + 8 <= blocks; b += 8) {
        const void *in = at(x, b * BLOCK, dtype);
        read_ahead(in, 8 * BLOCK * (dtype == BF16 ? 2 : 4));
        void *to = at_out(out, b * BLOCK, dtype);
        uint8_t scales[8];
        float steps[8];
        if (!block_scales8(in, tensor_scale, scales, steps, dtype)) {
            nvfp4_fake_quantize_portable(in, to, 8, tensor_scale, dtype);
            continue;
        }
        for (int j = 0; j < 8; j++) {
            __m256 step = _mm256_set1_ps(steps[j]);
            int64_t i = j * BLOCK;
            store_block(to, i, fake_quantize8(in, i, step, dtype),
                        fake_quantize8(in, i + 8, step, dtype), dtype);
        }
    }
    nvfp4_fake_quantize_portable(at(x, b * BLOCK, dtype), at_out(out, b * BLOCK, dtype),
                                 blocks - b, tensor_scale, dtype);
}

INLINE void nvfp4_dequantize_avx2(const uint8_t *packed, const uint8_t *block_scale, void *out,
                                  int64_t blocks, float tensor_scale, enum dtype dtype) {
    /* twice the values, which are whole */
    const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    const __m128i nibble = _mm_set1_epi8(15);
    for (int64_t b = 0; b < blocks; b++) {
        if ((block_scale[b] & 0x7f) == E4M3_NAN) {
            nvfp4_dequantize_portable(packed + b * 8, block_scale + b,
                                      at_out(out, b * BLOCK, dtype), 1, tensor_scale, dtype);
            continue;
        }
        if (b % 8 == 0) read_ahead(packed + b * 8, 64);
        __m128i pairs = _mm_loadl_epi64((const void *)(packed + b * 8));
        __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(pairs, nibble),
                                          _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble));
        __m128i doubled = _mm_shuffle_epi8(table, codes);
        __m256 step = _mm256_set1_ps(e4m3_value(block_scale[b]) * tensor_scale);
        __m256 half = _mm256_set1_ps(.5f);
        __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(doubled));
        __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(doubled, 8)));
        store_block(out, b * BLOCK, _mm256_mul_ps(_mm256_mul_ps(low, half), step),
                    _mm256_mul_ps(_mm256_mul_ps(high, half), step), dtype);
    }
}

/* ---- FP8, 32 bf16 elements at a time. Their quotients are bf16 too, so all that follows the
 * division is done in 16-bit lanes, with a block's middle quarters swapped as packing left them. */

/* bf16 quotients of 16 elements. */
INLINE __m256i fp8_quotients16(const uint16_t *x, __m256 scale) {
    __m256 low = _mm256_div_ps(load8(x, 0, BF16), scale);
    __m256 high = _mm256_div_ps(load8(x, 8, BF16), scale);
    return _mm256_packus_epi32(to_bf16_8(low), to_bf16_8(high));
}

INLINE __m256i magnitudes16(__m256i quotients) {
    return _mm256_and_si256(quotients, _mm256_set1_epi16(0x7fff));
}

/* Where a magnitude is NaN, or between 2^-10 and 2^-6 and so becomes a subnormal of E4M3. */
INLINE __m256i is_unusual16(__m256i magnitude) {
    __m256i above = _mm256_sub_epi16(magnitude, _mm256_set1_epi16(0x3a81));
    __m256i small = _mm256_cmpeq_epi16(_mm256_min_epu16(above, _mm256_set1_epi16(0x1fe)), above);
    return _mm256_or_si256(small, _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(0x7f80)));
}

/* Other magnitudes saturated and rounded to E4M3's 3 mantissa bits: bf16's bits, shifted right by
 * 4. What does not exceed E4M3_STEPS_BIAS, E4M3's zero, is 0. */
INLINE __m256i e4m3_steps16(__m256i magnitude) {
    __m256i clamped = _mm256_min_epu16(magnitude, _mm256_set1_epi16(E4M3_MAX_BITS >> 16));
    __m256i odd = _mm256_and_si256(_mm256_srli_epi16(clamped, 4), _mm256_set1_epi16(1));
    clamped = _mm256_add_epi16(_mm256_add_epi16(clamped, _mm256_set1_epi16(7)), odd);
    return _mm256_srli_epi16(clamped, 4);
}

#define E4M3_STEPS_BIAS ((127 - 7) << 3)

/* Whether the kernels below can divide by it. */
INLINE int is_finite_scale(float scale) { return scale >= 0 && bits_of(scale) < INF_BITS; }

INLINE void fp8_quantize_avx2(const void *x, uint8_t *out, int64_t count, float scale,
                              enum dtype dtype) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* undoes the packing */
    const __m256i bias = _mm256_set1_epi16(E4M3_STEPS_BIAS);
    int64_t i = 0;
    for (; dtype == BF16 && is_finite_scale(scale) && i + 32 <= count; i += 32) {
        const uint16_t *in = (const uint16_t *)x + i;
        read_ahead(in, 64);
        __m256i q0 = fp8_quotients16(in, _mm256_set1_ps(scale));
        __m256i q1 = fp8_quotients16(in + 16, _mm256_set1_ps(scale));
        __m256i m0 = magnitudes16(q0), m1 = magnitudes16(q1);
        __m256i unusual = _mm256_or_si256(is_unusual16(m0), is_unusual16(m1));
        if (!_mm256_testz_si256(unusual, unusual)) {
            fp8_quantize_portable(in, out + i, 32, scale, dtype);
            continue;
        }
        __m256i codes = _mm256_packus_epi16(_mm256_subs_epu16(e4m3_steps16(m0), bias),
                                            _mm256_subs_epu16(e4m3_steps16(m1), bias));
        __m256i signs = _mm256_and_si256(_mm256_packs_epi16(q0, q1), _mm256_set1_epi8(-128));
        codes = _mm256_permutevar8x32_epi32(_mm256_or_si256(codes, signs), order);
        _mm256_storeu_si256((void *)(out + i), codes);
    }
    fp8_quantize_portable(at(x, i, dtype), out + i, count - i, scale, dtype);
}

/* The quotients of 16 elements at E4M3's precision times the scale, stored. */
INLINE void fp8_store16(void *out, int64_t i, __m256i quotients, __m256i magnitude, float scale) {
    __m256i steps = e4m3_steps16(magnitude), zero = _mm256_setzero_si256();
    __m256i shown = _mm256_cmpgt_epi16(steps, _mm256_set1_epi16(E4M3_STEPS_BIAS));
    __m256i bits = _mm256_slli_epi16(_mm256_and_si256(steps, shown), 4);
    bits = _mm256_or_si256(bits, _mm256_and_si256(quotients, _mm256_set1_epi16(-0x8000)));
    __m256 low = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, bits));
    __m256 high = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, bits));
    __m256 factor = _mm256_set1_ps(scale);
    store_block(out, i, _mm256_mul_ps(low, factor), _mm256_mul_ps(high, factor), BF16);
}

INLINE void fp8_fake_quantize_avx2(const void *x, void *out, int64_t count, float scale,
                                   enum dtype dtype) {
    int64_t i = 0;
    for (; dtype == BF16 && is_finite_scale(scale) && i + 16 <= count; i += 16) {
        const uint16_t *in = (const uint16_t *)x + i;
        if (i % 32 == 0) read_ahead(in, 64);
        __m256i quotients = fp8_quotients16(in, _mm256_set1_ps(scale));
        __m256i magnitude = magnitudes16(quotients), unusual = is_unusual16(magnitude);
        if (_mm256_testz_si256(unusual, unusual))
            fp8_store16(out, i, quotients, magnitude, scale);
        else
            fp8_fake_quantize_portable(in, at_out(out, i, dtype), 16, scale, dtype);
    }
    fp8_fake_quantize_portable(at(x, i, dtype), at_out(out, i, dtype), count - i, scale, dtype);
}

#define fp8_dequantize_avx2 fp8_dequantize_portable
