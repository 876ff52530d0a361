/* FP8 and NVFP4 kernels with AVX-512 (F, BW, DQ, VL, VBMI) intrinsics, NVFP4 16 blocks at a time;
 * part of kernels.c, behind kernels_avx2.h. */

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
    for (int b = 0; b < 16; b++) bits[b] = block_amax_bits(at(x, b * BLOCK, dtype), dtype);
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
        read_ahead(in, 16 * BLOCK * (dtype == BF16 ? 2 : 4));
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
        read_ahead(in, 16 * BLOCK * (dtype == BF16 ? 2 : 4));
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
        if (b % 8 == 0) read_ahead(packed + b * 8, 64);
        __m128i pairs = _mm_loadl_epi64((const void *)(packed + b * 8));
        __m128i low = _mm_and_si128(pairs, _mm_set1_epi8(15));
        __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), _mm_set1_epi8(15));
        __m512i codes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
        __m512 step = _mm512_set1_ps(e4m3_value(block_scale[b]) * tensor_scale);
        store16(out, b * BLOCK, _mm512_mul_ps(_mm512_permutexvar_ps(codes, values), step), dtype);
    }
}

/* ---- FP8, 32 bf16 elements at a time. Their quotients are bf16 too, so all that follows the
 * division is done in 16-bit lanes. */

/* The upper halves of 32 lanes of 32 bits. */
INLINE __m512i upper_halves(__m512i low, __m512i high) {
    const __m512i odd = _mm512_set_epi16(
        63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
        31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(low, odd, high);
}

/* bf16 quotients of 32 elements. */
INLINE __m512i fp8_quotients32(const uint16_t *x, __m512 scale) {
    return upper_halves(round_to_bf16(_mm512_div_ps(load16(x, 0, BF16), scale)),
                        round_to_bf16(_mm512_div_ps(load16(x, 16, BF16), scale)));
}

/* Codes of magnitudes from 2^-10 to 2^-6: multiples of 2^-9, rounded to nearest even. The eight
 * bits of a bf16 significand are worth 2^-9 times 2^-shift, shift 5 to 8. */
INLINE __m512i e4m3_subnormals32(__m512i magnitude) {
    __m512i one = _mm512_set1_epi16(1);
    __m512i shift = _mm512_sub_epi16(_mm512_set1_epi16(125), _mm512_srli_epi16(magnitude, 7));
    __m512i significand = _mm512_or_si512(_mm512_and_si512(magnitude, _mm512_set1_epi16(0x7f)),
                                          _mm512_set1_epi16(0x80));
    __m512i half = _mm512_sub_epi16(_mm512_sllv_epi16(one, _mm512_sub_epi16(shift, one)), one);
    __m512i odd = _mm512_and_si512(_mm512_srlv_epi16(significand, shift), one);
    return _mm512_srlv_epi16(_mm512_add_epi16(significand, _mm512_add_epi16(half, odd)), shift);
}

/* Codes without sign of 32 bf16 magnitudes that are not NaN; as e4m3_steps16 of kernels_avx2.h. */
INLINE __m512i e4m3_codes32(__m512i magnitude) {
    __m512i clamped = _mm512_min_epu16(magnitude, _mm512_set1_epi16(E4M3_MAX_BITS >> 16));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi16(clamped, 4), _mm512_set1_epi16(1));
    clamped = _mm512_add_epi16(_mm512_add_epi16(clamped, _mm512_set1_epi16(7)), odd);
    __m512i codes = _mm512_subs_epu16(_mm512_srli_epi16(clamped, 4),
                                      _mm512_set1_epi16(E4M3_STEPS_BIAS));
    __m512i above = _mm512_sub_epi16(magnitude, _mm512_set1_epi16(0x3a81));
    __mmask32 small = _mm512_cmplt_epu16_mask(above, _mm512_set1_epi16(0x3c80 - 0x3a81));
    if (small) codes = _mm512_mask_mov_epi16(codes, small, e4m3_subnormals32(magnitude));
    return codes;
}

/* bf16 values of 32 codes without sign that are not NaN. */
INLINE __m512i e4m3_values32(__m512i codes) {
    /* the multiples of 2^-9 below 8, in bf16 */
    const __m512i subnormals = _mm512_broadcast_i32x4(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i normals = _mm512_slli_epi16(
        _mm512_add_epi16(codes, _mm512_set1_epi16(E4M3_STEPS_BIAS)), 4);
    __mmask32 small = _mm512_cmplt_epu16_mask(codes, _mm512_set1_epi16(8));
    return _mm512_mask_permutexvar_epi16(normals, small, codes, subnormals);
}

/* Store 32 bf16 values times the scale. */
INLINE void fp8_store32(void *out, int64_t i, __m512i values, float scale, enum dtype dtype) {
    __m256i half[2];
    memcpy(half, &values, sizeof half);
    for (int h = 0; h < 2; h++) {
        __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half[h]), 16);
        __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(scale));
        store16(out, i + h * 16, value, dtype);
    }
}

INLINE __mmask32 is_nan32(__m512i magnitude) {
    return _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(0x7f80));
}

INLINE void fp8_quantize_avx512(const void *x, uint8_t *out, int64_t count, float scale,
                                enum dtype dtype) {
    int64_t i = 0;
    for (; dtype == BF16 && is_finite_scale(scale) && i + 32 <= count; i += 32) {
        const uint16_t *in = (const uint16_t *)x + i;
        read_ahead(in, 64);
        __m512i quotients = fp8_quotients32(in, _mm512_set1_ps(scale));
        __m512i magnitude = _mm512_and_si512(quotients, _mm512_set1_epi16(0x7fff));
        if (is_nan32(magnitude)) {
            fp8_quantize_portable(in, out + i, 32, scale, dtype);
            continue;
        }
        __m512i sign = _mm512_srli_epi16(_mm512_andnot_si512(magnitude, quotients), 8);
        __m512i codes = _mm512_or_si512(e4m3_codes32(magnitude), sign);
        _mm256_storeu_si256((void *)(out + i), _mm512_cvtepi16_epi8(codes));
    }
    fp8_quantize_portable(at(x, i, dtype), out + i, count - i, scale, dtype);
}

INLINE void fp8_fake_quantize_avx512(const void *x, void *out, int64_t count, float scale,
                                     enum dtype dtype) {
    int64_t i = 0;
    for (; dtype == BF16 && is_finite_scale(scale) && i + 32 <= count; i += 32) {
        const uint16_t *in = (const uint16_t *)x + i;
        read_ahead(in, 64);
        __m512i quotients = fp8_quotients32(in, _mm512_set1_ps(scale));
        __m512i magnitude = _mm512_and_si512(quotients, _mm512_set1_epi16(0x7fff));
        if (is_nan32(magnitude)) {
            fp8_fake_quantize_portable(in, at_out(out, i, dtype), 32, scale, dtype);
            continue;
        }
        __m512i sign = _mm512_andnot_si512(magnitude, quotients);
        __m512i values = _mm512_or_si512(e4m3_values32(e4m3_codes32(magnitude)), sign);
        fp8_store32(out, i, values, scale, dtype);
    }
    fp8_fake_quantize_portable(at(x, i, dtype), at_out(out, i, dtype), count - i, scale, dtype);
}

INLINE void fp8_dequantize_avx512(const uint8_t *codes, void *out, int64_t count, float scale,
                                  enum dtype dtype) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        read_ahead(codes + i, 32);
        __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)(codes + i)));
        __m512i magnitude = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
        if (_mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(E4M3_NAN))) {
            fp8_dequantize_portable(codes + i, at_out(out, i, dtype), 32, scale, dtype);
            continue;
        }
        __m512i sign = _mm512_slli_epi16(_mm512_xor_si512(wide, magnitude), 8);
        __m512i values = _mm512_or_si512(e4m3_values32(magnitude), sign);
        fp8_store32(out, i, values, scale, dtype);
    }
    fp8_dequantize_portable(codes + i, at_out(out, i, dtype), count - i, scale, dtype);
}
