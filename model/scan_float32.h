/* The scan in float32, for a vector of LANES floats; included once for each VARIANT.
 *
 * Inputs are widened as they are read. Products keep ROWS x VECTORS sums in registers.
 */

#define JOIN(NAME, SUFFIX) NAME##_##SUFFIX
#define JOINED(NAME, SUFFIX) JOIN(NAME, SUFFIX)
#define FN(NAME) JOINED(NAME, VARIANT)

#define ROWS 4
#if LANES == 16
#define VECTORS 5
#define V __m512
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define ALL _mm512_set1_ps
#define ADD _mm512_add_ps
#define SUB _mm512_sub_ps
#define MUL _mm512_mul_ps
#define FMA _mm512_fmadd_ps
#define MAX _mm512_max_ps
#define ROUND(X) _mm512_roundscale_ps(X, 0)
#define GATHER(FROM, PLACES) _mm512_i32gather_ps(PLACES, FROM, sizeof(float))
#define PLACES_APART(STEP)                                                                        \
    _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),  \
                       _mm512_set1_epi32((int)(STEP)))
#define INTS __m512i
#else
#define VECTORS 2
#define V __m256
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define ALL _mm256_set1_ps
#define ADD _mm256_add_ps
#define SUB _mm256_sub_ps
#define MUL _mm256_mul_ps
#define FMA _mm256_fmadd_ps
#define MAX _mm256_max_ps
#define ROUND(X) _mm256_round_ps(X, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define GATHER(FROM, PLACES) _mm256_i32gather_ps(FROM, PLACES, sizeof(float))
#define PLACES_APART(STEP)                                                                        \
    _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32((int)(STEP)))
#define INTS __m256i
#endif

/* ---- numbers ---------------------------------------------------------------------------- */

/* LANES bfloat16 values. */
INLINE V FN(widen)(const uint16_t *values) {
#if LANES == 16
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#else
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)values));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#endif
}

/* x 2^n for whole n from -150 to 0. */
INLINE V FN(scaled)(V x, V n) {
#if LANES == 16
    return _mm512_scalef_ps(x, n);
#else
    /* in two steps, because 2^-150 is no float */
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    __m256i bias = _mm256_set1_epi32(127);
    __m256i one = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    __m256i other = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(one));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(other));
#endif
}

/* e^x for x <= 0, within 2 units of the last place; 0 where float32 has nothing smaller. */
INLINE V FN(exp_of)(V x) {
    x = MAX(ALL(-104.f), x); /* in this order a NaN stays one */
    V n = ROUND(MUL(x, ALL(0x1.715476p+0f)));
    V r = FMA(n, ALL(-0x1.62e4p-1f), x); /* ln 2 in two parts */
    r = FMA(n, ALL(-0x1.7f7d1cp-20f), r);
    V p = ALL(1.f / 720);
    p = FMA(p, r, ALL(1.f / 120));
    p = FMA(p, r, ALL(1.f / 24));
    p = FMA(p, r, ALL(1.f / 6));
    p = FMA(p, r, ALL(.5f));
    p = FMA(p, r, ALL(1.f));
    p = FMA(p, r, ALL(1.f));
    return FN(scaled)(p, n);
}

/* The first `count` lanes, zeros after them. */
INLINE V FN(first)(V x, int64_t count) {
#if LANES == 16
    return count >= LANES ? x : _mm512_maskz_mov_ps((__mmask16)((1u << count) - 1), x);
#else
    __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i kept = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lanes);
    return _mm256_and_ps(x, _mm256_castsi256_ps(kept));
#endif
}

/* out (columns, rows) = the transpose of x (rows, columns), rows a multiple of LANES. */
INLINE void FN(transpose)(const float *x, int64_t rows, int64_t columns, float *out) {
    const INTS places = PLACES_APART(columns);
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c++)
            STORE(out + c * rows + r, GATHER(x + r * columns + c, places));
}

/* Of a chunk of one head: the time steps, zeros from `length` on; the exponents of the decays from
 * the chunk's start to each token; these decays; and what is left of each step at the chunk's end. */
INLINE void FN(decays)(const float *dt, int64_t dt_stride, float a, int64_t length, float *steps,
                       float *total, float *from_start, float *to_end) {
    float sum = 0;
    for (int64_t t = 0; t < Q; t++) {
        steps[t] = t < length ? dt[t * dt_stride] : 0;
        total[t] = sum += steps[t] * a;
    }
    for (int64_t t = 0; t < Q; t += LANES) {
        V here = LOAD(total + t);
        STORE(from_start + t, FN(exp_of)(here));
        V left = FN(exp_of)(SUB(ALL(sum), here));
        STORE(to_end + t, MUL(left, LOAD(steps + t)));
    }
}

/* ---- products --------------------------------------------------------------------------- */

/* ROWS rows of out = alpha out + beta A B, `vectors` times LANES columns. beta has one value a row,
 * or is NULL for ones; alpha = 0 does not read out. */
INLINE void FN(product_rows)(const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                             int64_t depth, float *out, int64_t out_stride, float alpha,
                             const float *beta, int vectors) {
    V sums[ROWS][VECTORS];
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < vectors; v++) sums[m][v] = ALL(0.f);
    for (int64_t k = 0; k < depth; k++) {
        V right[VECTORS];
        for (int v = 0; v < vectors; v++) right[v] = LOAD(b + k * b_stride + v * LANES);
        for (int m = 0; m < ROWS; m++) {
            V left = ALL(a[m * a_stride + k]);
            for (int v = 0; v < vectors; v++) sums[m][v] = FMA(left, right[v], sums[m][v]);
        }
    }
    for (int m = 0; m < ROWS; m++) {
        V scale = ALL(beta ? beta[m] : 1.f);
        for (int v = 0; v < vectors; v++) {
            float *to = out + m * out_stride + v * LANES;
            V sum = MUL(sums[m][v], scale);
            STORE(to, alpha != 0.f ? FMA(LOAD(to), ALL(alpha), sum) : sum);
        }
    }
}

/* out (M x columns) = alpha out + beta A B, M a multiple of ROWS, columns one of 16. Where A is
 * `causal` (lower triangular), row m needs columns of A up to its own alone. */
static void FN(product)(const float *a, int64_t a_stride, const float *b, int64_t columns,
                        int64_t rows, int64_t depth, int causal, float *out, float alpha,
                        const float *beta) {
    for (int64_t m = 0; m < rows; m += ROWS) {
        int64_t needed = causal ? m + ROWS : depth;
        const float *left = a + m * a_stride;
        const float *scale = beta ? beta + m : 0;
        int64_t column = 0;
#define COLUMNS(COUNT)                                                                           \
    FN(product_rows)(left, a_stride, b + column, columns, needed, out + m * columns + column,    \
                     columns, alpha, scale, COUNT)
#if LANES == 16
        UP_TO_FIVE(COLUMNS)
#else
        for (; column < columns; column += 2 * LANES) COLUMNS(2);
#endif
#undef COLUMNS
    }
}

/* ---- one chunk -------------------------------------------------------------------------- */

/* What the heads of a group share in a chunk. */
typedef struct {
    float *c;        /* (Q, N) */
    float *b_by_n;   /* (N, Q) */
    float *products; /* (Q, Q): C B^T */
} FN(shared);

/* What one head needs in a chunk. */
typedef struct {
    float *x;        /* (Q, P) */
    float *weighted; /* (Q, P): the values as far as they reach the chunk's end */
    float *scores;   /* (Q, Q) */
    float *y;        /* (Q, P) */
} FN(head);

INLINE void FN(share_chunk)(const FN(shared) * s, const uint16_t *b, int64_t b_stride,
                            const uint16_t *c, int64_t c_stride, int64_t length, int64_t n) {
    memset(s->c + length * n, 0, (Q - length) * n * sizeof(float));
    for (int64_t t = 0; t < length; t++)
        for (int64_t k = 0; k < n; k += LANES)
            STORE(s->c + t * n + k, FN(widen)(c + t * c_stride + k));
    memset(s->b_by_n, 0, Q * n * sizeof(float));
    for (int64_t t = 0; t < length; t++)
        for (int64_t k = 0; k < n; k += LANES) {
            float row[LANES];
            STORE(row, FN(widen)(b + t * b_stride + k));
            for (int64_t i = 0; i < LANES; i++) s->b_by_n[(k + i) * Q + t] = row[i];
        }
    FN(product)(s->c, n, s->b_by_n, Q, Q, n, 0, s->products, 0.f, 0);
}

/* Advance one head by a chunk. Rows of x and y are `x_stride` and `y_stride` apart, dt's values
 * `dt_stride`; `state` is (N, P). */
INLINE void FN(advance)(const FN(head) * h, const FN(shared) * s, const uint16_t *x,
                        int64_t x_stride, const float *dt, int64_t dt_stride, float a, float d,
                        float keep, float *state, float *y, int64_t y_stride, int64_t length,
                        int64_t p, int64_t n) {
    float steps[Q], total[Q], from_start[Q], to_end[Q];
    FN(decays)(dt, dt_stride, a, length, steps, total, from_start, to_end);
    for (int64_t t = 0; t < Q; t++) from_start[t] *= keep;

    memset(h->x + length * p, 0, (Q - length) * p * sizeof(float));
    memset(h->weighted + length * p, 0, (Q - length) * p * sizeof(float));
    for (int64_t t = 0; t < length; t++)
        for (int64_t i = 0; i < p; i += LANES) {
            V value = FN(widen)(x + t * x_stride + i);
            STORE(h->x + t * p + i, value);
            STORE(h->weighted + t * p + i, MUL(value, ALL(to_end[t])));
        }

    /* tokens before the chunk, through the state */
    FN(product)(s->c, n, state, p, Q, n, 0, h->y, 0.f, from_start);

    /* tokens of the chunk: token t reads token u <= t, decayed by what lies between */
    for (int64_t t = 0; t < Q; t++)
        for (int64_t u = 0; u <= t; u += LANES) {
            V decay = SUB(ALL(total[t]), LOAD(total + u));
            V score = MUL(FN(exp_of)(decay), LOAD(steps + u));
            score = MUL(score, LOAD(s->products + t * Q + u));
            STORE(h->scores + t * Q + u, FN(first)(score, t - u + 1));
        }
    FN(product)(h->scores, Q, h->x, p, Q, Q, 1, h->y, 1.f, 0);

    for (int64_t t = 0; t < length; t++)
        for (int64_t i = 0; i < p; i += LANES)
            STORE(y + t * y_stride + i,
                  FMA(LOAD(h->x + t * p + i), ALL(d), LOAD(h->y + t * p + i)));

    FN(product)(s->b_by_n, Q, h->weighted, p, n, Q, 0, state, from_start[Q - 1], 0);
}

/* ---- a sequence ------------------------------------------------------------------------- */

/* Floats of scratch of one thread that scans `heads` heads at a time. */
INLINE int64_t FN(scratch_size)(int64_t heads, int64_t p, int64_t n) {
    return 2 * Q * n + 2 * Q * Q + 3 * Q * p + heads * n * p;
}

/* Scan heads of one group of one sequence: first_head to first_head + heads. */
static void FN(scan_heads)(const sequence_t *q, float *scratch, int64_t length, int64_t num_heads,
                           int64_t p, int64_t groups, int64_t n, int64_t first_head,
                           int64_t heads) {
    FN(shared) s = {scratch, scratch + Q * n, scratch + 2 * Q * n};
    float *own = s.products + Q * Q;
    FN(head) h = {own, own + Q * p, own + 2 * Q * p, own + 2 * Q * p + Q * Q};
    float *states = h.y + Q * p; /* (heads, N, P) */
    int64_t group = first_head / (num_heads / groups);
    const uint16_t *b = q->b + group * n, *c = q->c + group * n;
    for (int64_t j = 0; j < heads; j++)
        FN(transpose)(q->state + (first_head + j) * p * n, p, n, states + j * n * p);
    for (int64_t start = 0, chunk = 0; start < length; start += Q, chunk++) {
        int64_t left = length - start < Q ? length - start : Q;
        FN(share_chunk)(&s, b + start * q->b_stride, q->b_stride, c + start * q->c_stride,
                        q->c_stride, left, n);
        for (int64_t j = 0; j < heads; j++) {
            int64_t head = first_head + j, place = start * num_heads + head;
            FN(advance)(&h, &s, q->x + start * q->x_stride + head * p, q->x_stride,
                        q->dt + place, num_heads, q->a[head], q->d[head],
                        q->keep ? q->keep[chunk] : 1.f, states + j * n * p, q->y + place * p,
                        num_heads * p, left, p, n);
        }
    }
    for (int64_t j = 0; j < heads; j++)
        FN(transpose)(states + j * n * p, n, p, q->state + (first_head + j) * p * n);
}

#undef JOIN
#undef JOINED
#undef FN
#undef ROWS
#undef VECTORS
#undef V
#undef LOAD
#undef STORE
#undef ALL
#undef ADD
#undef SUB
#undef MUL
#undef FMA
#undef MAX
#undef ROUND
#undef GATHER
#undef PLACES_APART
#undef INTS
