/* The scan with bfloat16 dot products (AVX512-BF16), which take two values at once.
 *
 * Products take bfloat16 operands and sum in float32. The values that are added to the state are
 * split into a bfloat16 and the bfloat16 of what that leaves, which keeps 16 bits of them.
 *
 * A "word" is two bfloat16 values that a dot product takes together; a product of A (M x 2K) and
 * B (2K x columns) reads A as M rows of K words, and B as K rows of words, the pairs of a column.
 */

#define LANES 16
#define ROWS 4 /* of a product, computed at once */

/* ---- numbers ---------------------------------------------------------------------------- */

INLINE __m512 widen(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

INLINE __m256i narrow(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

INLINE __m512i words_of(__m256i first, __m256i second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

/* ---- products --------------------------------------------------------------------------- */

/* ROWS rows of out = alpha out + beta A B, `vectors` times 16 columns. beta has one value a row,
 * or is NULL for ones; alpha = 0 does not read out. */
INLINE void product_rows_bf16(const uint32_t *a, int64_t a_stride, const uint32_t *b,
                              int64_t b_stride, int64_t words, float *out, int64_t out_stride,
                              float alpha, const float *beta, int vectors) {
    __m512 sums[ROWS][5];
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < vectors; v++) sums[m][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++) {
        __m512i right[5];
        for (int v = 0; v < vectors; v++)
            right[v] = _mm512_loadu_si512(b + k * b_stride + v * LANES);
        for (int m = 0; m < ROWS; m++) {
            __m512i left = _mm512_set1_epi32((int)a[m * a_stride + k]);
            for (int v = 0; v < vectors; v++)
                sums[m][v] = _mm512_dpbf16_ps(sums[m][v], (__m512bh)left, (__m512bh)right[v]);
        }
    }
    for (int m = 0; m < ROWS; m++) {
        __m512 scale = _mm512_set1_ps(beta ? beta[m] : 1.f);
        for (int v = 0; v < vectors; v++) {
            float *to = out + m * out_stride + v * LANES;
            __m512 sum = _mm512_mul_ps(sums[m][v], scale);
            if (alpha != 0.f)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(alpha), sum);
            _mm512_storeu_ps(to, sum);
        }
    }
}

/* out (M x columns) = alpha out + beta A B, M a multiple of ROWS, columns one of 16. Where A is
 * `causal` (lower triangular), row m needs words up to its own alone. */
static void product_bf16(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t columns,
                         int64_t rows, int64_t words, int causal, float *out, float alpha,
                         const float *beta) {
    for (int64_t m = 0; m < rows; m += ROWS) {
        int64_t needed = causal ? (m + ROWS) / 2 : words;
        const uint32_t *left = a + m * a_stride;
        const float *scale = beta ? beta + m : 0;
        int64_t column = 0;
#define COLUMNS(COUNT)                                                                           \
    product_rows_bf16(left, a_stride, b + column, columns, needed, out + m * columns + column,   \
                      columns, alpha, scale, COUNT)
        UP_TO_FIVE(COLUMNS)
#undef COLUMNS
    }
}

/* ---- one chunk -------------------------------------------------------------------------- */

/* What the heads of a group share in a chunk: C's rows, and B in the two orders products want. */
typedef struct {
    uint32_t *c;         /* (Q, N / 2) */
    uint32_t *b_by_n;    /* (N / 2, Q): pairs along N */
    uint32_t *b_by_q;    /* (N, Q / 2): pairs along Q */
    float *products;     /* (Q, Q): C B^T */
} shared_bf16_t;

/* What one head needs in a chunk. */
typedef struct {
    uint32_t *x;         /* (Q / 2, P) */
    uint32_t *weighted;  /* (Q, P): rows 0 to Q / 2 the first parts, then what they leave */
    uint32_t *state;     /* (N / 2, P) */
    uint16_t *scores;    /* (Q, Q) */
    float *y;            /* (Q, P) */
} head_bf16_t;

INLINE void share_chunk_bf16(const shared_bf16_t *s, const uint16_t *b, int64_t b_stride,
                             const uint16_t *c, int64_t c_stride, int64_t length, int64_t n) {
    memset(s->c, 0, Q * n * 2);
    for (int64_t t = 0; t < length; t++) memcpy(s->c + t * n / 2, c + t * c_stride, n * 2);
    for (int64_t t = 0; t < Q; t++)
        for (int64_t k = 0; k < n / 2; k++) {
            uint32_t word = 0;
            if (t < length) memcpy(&word, b + t * b_stride + 2 * k, 4);
            s->b_by_n[k * Q + t] = word;
        }
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28,
                                           30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int64_t k = 0; k < n / 2; k++)
        for (int64_t t = 0; t < Q; t += 2 * LANES) {
            __m512i i0 = _mm512_loadu_si512(s->b_by_n + k * Q + t);
            __m512i i1 = _mm512_loadu_si512(s->b_by_n + k * Q + t + LANES);
            __m512i first = _mm512_permutex2var_epi32(i0, even, i1);
            __m512i second = _mm512_permutex2var_epi32(i0, odd, i1);
            uint32_t *to = s->b_by_q + 2 * k * (Q / 2) + t / 2;
            _mm512_storeu_si512(to, _mm512_or_si512(_mm512_and_si512(first, low),
                                                    _mm512_slli_epi32(second, 16)));
            _mm512_storeu_si512(to + Q / 2, _mm512_or_si512(_mm512_srli_epi32(first, 16),
                                                            _mm512_andnot_si512(low, second)));
        }
    product_bf16(s->c, n / 2, s->b_by_n, Q, Q, n / 2, 0, s->products, 0.f, 0);
}

/* Advance one head by a chunk. x is (Q, P), zeros from `length` on; `state` is (N, P); rows of y
 * are `y_stride` apart. */
INLINE void advance_bf16(const head_bf16_t *h, const shared_bf16_t *s, const uint16_t *x,
                         const float *dt, int64_t dt_stride, float a, float d, float keep,
                         float *state, float *y, int64_t y_stride, int64_t length, int64_t p,
                         int64_t n) {
    float steps[Q], total[Q], from_start[Q], to_end[Q];
    decays_avx512(dt, dt_stride, a, length, steps, total, from_start, to_end);

    /* the values, and the values as far as they reach the chunk's end */
    for (int64_t t = 0; t < Q; t += 2)
        for (int64_t i = 0; i < p; i += LANES) {
            __m256i x0 = _mm256_loadu_si256((const void *)(x + t * p + i));
            __m256i x1 = _mm256_loadu_si256((const void *)(x + (t + 1) * p + i));
            _mm512_storeu_si512(h->x + t / 2 * p + i, words_of(x0, x1));
            __m512 w0 = _mm512_mul_ps(widen(x0), _mm512_set1_ps(to_end[t]));
            __m512 w1 = _mm512_mul_ps(widen(x1), _mm512_set1_ps(to_end[t + 1]));
            __m256i high0 = narrow(w0), high1 = narrow(w1);
            _mm512_storeu_si512(h->weighted + t / 2 * p + i, words_of(high0, high1));
            __m256i low0 = narrow(_mm512_sub_ps(w0, widen(high0)));
            __m256i low1 = narrow(_mm512_sub_ps(w1, widen(high1)));
            _mm512_storeu_si512(h->weighted + (Q / 2 + t / 2) * p + i, words_of(low0, low1));
        }

    /* tokens before the chunk, through the state */
    const __m512 keeping = _mm512_set1_ps(keep);
    for (int64_t k = 0; k < n; k += 2)
        for (int64_t i = 0; i < p; i += LANES) {
            __m512 first = _mm512_mul_ps(_mm512_loadu_ps(state + k * p + i), keeping);
            __m512 second = _mm512_mul_ps(_mm512_loadu_ps(state + (k + 1) * p + i), keeping);
            _mm512_storeu_si512(h->state + k / 2 * p + i, words_of(narrow(first), narrow(second)));
        }
    product_bf16(s->c, n / 2, h->state, p, Q, n / 2, 0, h->y, 0.f, from_start);

    /* tokens of the chunk: token t reads token u <= t, decayed by what lies between */
    for (int64_t t = 0; t < Q; t++)
        for (int64_t u = 0; u <= t; u += LANES) {
            __mmask16 past = (__mmask16)(t - u >= LANES ? 0xffff : (2u << (t - u)) - 1);
            __m512 decay = _mm512_sub_ps(_mm512_set1_ps(total[t]), _mm512_loadu_ps(total + u));
            __m512 score = _mm512_mul_ps(exp_of_avx512(decay), _mm512_loadu_ps(steps + u));
            score = _mm512_mul_ps(score, _mm512_loadu_ps(s->products + t * Q + u));
            __m256i rounded = narrow(_mm512_maskz_mov_ps(past, score));
            _mm256_storeu_si256((void *)(h->scores + t * Q + u), rounded);
        }
    product_bf16((const uint32_t *)h->scores, Q / 2, h->x, p, Q, Q / 2, 1, h->y, 1.f, 0);

    for (int64_t t = 0; t < length; t++)
        for (int64_t i = 0; i < p; i += LANES) {
            __m512 own = widen(_mm256_loadu_si256((const void *)(x + t * p + i)));
            own = _mm512_mul_ps(own, _mm512_set1_ps(d));
            _mm512_storeu_ps(y + t * y_stride + i,
                             _mm512_add_ps(own, _mm512_loadu_ps(h->y + t * p + i)));
        }

    product_bf16(s->b_by_q, Q / 2, h->weighted, p, n, Q / 2, 0, state, keep * from_start[Q - 1], 0);
    product_bf16(s->b_by_q, Q / 2, h->weighted + Q / 2 * p, p, n, Q / 2, 0, state, 1.f, 0);
}

/* ---- a sequence ------------------------------------------------------------------------- */

/* Floats of scratch of one thread that scans `heads` heads at a time. */
INLINE int64_t scratch_size_bf16(int64_t heads, int64_t p, int64_t n) {
    return 3 * Q * n / 2 + Q * Q + heads * Q * p / 2 + Q / 2 * p + Q * p + n / 2 * p + Q * Q / 2 +
           Q * p + heads * n * p;
}

/* Scan heads of one group of one sequence: first_head to first_head + heads. */
static void scan_heads_bf16(const sequence_t *q, float *scratch, int64_t length, int64_t num_heads,
                            int64_t p, int64_t groups, int64_t n, int64_t first_head,
                            int64_t heads) {
    float *at = scratch;
#define TAKE(TYPE, FLOATS) (TYPE *)at; at += (FLOATS)
    shared_bf16_t s;
    s.c = TAKE(uint32_t, Q * n / 2);
    s.b_by_n = TAKE(uint32_t, Q * n / 2);
    s.b_by_q = TAKE(uint32_t, Q * n / 2);
    s.products = TAKE(float, Q * Q);
    uint16_t *x = TAKE(uint16_t, heads * Q * p / 2); /* (heads, Q, P) */
    head_bf16_t h;
    h.x = TAKE(uint32_t, Q / 2 * p);
    h.weighted = TAKE(uint32_t, Q * p);
    h.state = TAKE(uint32_t, n / 2 * p);
    h.scores = TAKE(uint16_t, Q * Q / 2);
    h.y = TAKE(float, Q * p);
    float *states = TAKE(float, heads * n * p); /* (heads, N, P) */
#undef TAKE
    int64_t group = first_head / (num_heads / groups);
    const uint16_t *b = q->b + group * n, *c = q->c + group * n;
    for (int64_t j = 0; j < heads; j++)
        transpose_avx512(q->state + (first_head + j) * p * n, p, n, states + j * n * p);
    for (int64_t start = 0, chunk = 0; start < length; start += Q, chunk++) {
        int64_t left = length - start < Q ? length - start : Q;
        share_chunk_bf16(&s, b + start * q->b_stride, q->b_stride, c + start * q->c_stride,
                         q->c_stride, left, n);
        memset(x, 0, heads * Q * p * 2);
        for (int64_t t = 0; t < left; t++)
            for (int64_t j = 0; j < heads; j++)
                memcpy(x + (j * Q + t) * p,
                       q->x + (start + t) * q->x_stride + (first_head + j) * p, p * 2);
        for (int64_t j = 0; j < heads; j++) {
            int64_t head = first_head + j, place = start * num_heads + head;
            advance_bf16(&h, &s, x + j * Q * p, q->dt + place, num_heads, q->a[head], q->d[head],
                         q->keep ? q->keep[chunk] : 1.f, states + j * n * p, q->y + place * p,
                         num_heads * p, left, p, n);
        }
    }
    for (int64_t j = 0; j < heads; j++)
        transpose_avx512(states + j * n * p, n, p, q->state + (first_head + j) * p * n);
}

#undef LANES
#undef ROWS
