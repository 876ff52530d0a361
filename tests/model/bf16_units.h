/* Stands for the bfloat16 instructions that scan_bf16.h uses, on processors with AVX-512 that lack
 * them: the same products and roundings in float32, up to the order of two sums. */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__) && !defined(__AVX512BF16__)
#include <immintrin.h>
#define __AVX512BF16__ 1
#define _mm512_dpbf16_ps dot_products
#define _mm512_cvtneps_pbh rounded_to_bf16

static inline __m512 dot_products(__m512 sums, __m512bh a, __m512bh b) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    __m512i x = (__m512i)a, y = (__m512i)b;
    __m512 first = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), sums);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                           _mm512_castsi512_ps(_mm512_and_si512(y, high)), first);
}

static inline __m256bh rounded_to_bf16(__m512 values) {
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    sum = _mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc00000));
    return (__m256bh)_mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}
#endif
