/* Rows of a weight out of what is stored of it: dense elements, a masked second tensor, and up to two arrays of codes.
 * native.py says what they compute, and what is used where there is no compiler.
 *
 * Every element is the same sum of the same float32 products, in the same order, whatever the processor. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#define X86
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#define HAS_AVX512 __builtin_cpu_supports("avx512vbmi")
#else
#define FOR_EVERY_PROCESSOR
#define HAS_AVX512 0
#endif

#define EXPORTED __attribute__((visibility("default")))

#define BLOCK 512 /* elements of a row at a time, a multiple of 16: what is decoded stays in the first-level cache */
#define LANES 32
#define FEW 16 /* rows at a time of a product: each term prepares its look-up once for them */

enum { NONE, F32, BF16 };

typedef struct {
    const uint8_t *codes; /* NULL: none */
    int64_t row_bytes, bits;
    const float *table; /* 2^bits values; of 8 bits the first alone: the others follow in steps of 1 */
    const float *scale;
    int64_t scale_step; /* 1: a scale a row, 0: one for all */
} Codes;

typedef struct {
    int64_t n; /* elements of a row */
    const void *dense, *unified;
    int64_t dense_type, unified_type;
    const uint8_t *mask; /* bit e: element e takes gamma · unified */
    double gamma;
    Codes codes[2];
} Rows;

/* Of native.py, which calls no others. Raise it with every change of arguments. */
EXPORTED int64_t flexmerge_version(void) { return 2; }

static inline float number(const void *from, int64_t type, int64_t at)
{
    if (type == F32) return ((const float *)from)[at];
    const uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static FOR_EVERY_PROCESSOR void dense_block(const void *from, int64_t type, int64_t at, int64_t n, float *out)
{
    if (type == F32) {
        memcpy(out, (const float *)from + at, n * sizeof *out);
        return;
    }
    for (int64_t i = 0; i < n; i++) out[i] = number(from, BF16, at + i);
}

static FOR_EVERY_PROCESSOR void masked_block(const Rows *of, int64_t at, int64_t n, float *out)
{
    const float gamma = (float)of->gamma;
    float shift[BLOCK];
    dense_block(of->unified, of->unified_type, at, n, shift);
    if (at % 8 == 0) {
        const uint8_t *mask = of->mask + at / 8;
        for (int64_t i = 0; i < n; i++) out[i] = mask[i / 8] >> i % 8 & 1 ? out[i] + gamma * shift[i] : out[i];
    } else {
        for (int64_t i = 0; i < n; i++)
            out[i] = of->mask[(at + i) / 8] >> (at + i) % 8 & 1 ? out[i] + gamma * shift[i] : out[i];
    }
}

static inline __attribute__((always_inline)) uint64_t word_of(const uint8_t *from, int64_t bytes)
{
    uint64_t word = 0;
    uint32_t low = 0;
    uint16_t high = 0;
    switch (bytes) {
    case 6: /* not one copy: the processor would wait for its two halves */
        memcpy(&low, from, 4), memcpy(&high, from + 4, 2);
        return (uint64_t)high << 32 | low;
    default:
        memcpy(&word, from, (size_t)bytes);
        return word;
    }
}

/* The value of one code in units of the scale. */
static inline float level(const Codes *of, const uint8_t *row, int64_t at)
{
    const int64_t bit = at * of->bits;
    uint32_t code = row[bit / 8];
    if (bit % 8 + of->bits > 8) code |= (uint32_t)row[bit / 8 + 1] << 8;
    code = code >> bit % 8 & ((1u << of->bits) - 1);
    return of->bits == 8 ? (float)code + of->table[0] : of->table[code];
}

#ifdef X86
#define AHEAD 2048 /* bytes: what is prefetched, behind the end of a row the next rows */
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi")))
#define INLINED static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vbmi")))

/* What looks up 16 codes of `bits` bits at once: up to 4 bits in a table, 8 bits as numbers. */
typedef struct {
    __m512 table;
    __m512i places;
} Decoder;

INLINED Decoder decoder(const float *values, int64_t bits)
{
    float repeated[16];
    uint64_t places[8];
    for (int j = 0; j < 16; j++) repeated[j] = values[bits == 8 ? 0 : j & ((1 << bits) - 1)];
    for (uint64_t j = 0; j < 8; j++) places[j] = 2 * j * (uint64_t)bits | (2 * j + 1) * (uint64_t)bits << 32;
    return (Decoder){_mm512_loadu_ps(repeated), _mm512_loadu_si512(places)};
}

/* Each 32 bits begin with the 8 bits that begin with its code; a look-up heeds the last 4. `whole`: 8 bytes are there. */
INLINED __m512 decoded(const Decoder *by, const uint8_t *codes, int64_t bits, int whole)
{
    if (bits == 8)
        return _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)codes))), by->table);
    const uint64_t word = word_of(codes, whole ? 8 : 2 * bits);
    const __m512i index = _mm512_multishift_epi64_epi8(by->places, _mm512_set1_epi64((long long)word));
    return _mm512_permutexvar_ps(index, by->table);
}

/* Up to which element whole words of codes can be read, in steps of `step` elements. */
INLINED int64_t whole_words(int64_t n, int64_t bits, int64_t step)
{
    const int64_t bytes = (n * bits + 7) / 8 - 8; /* where the last word begins */
    const int64_t last = bits == 8 ? n - step : bytes * 8 / bits - (step - 16);
    return last < n - step ? last : n - step;
}

INLINED int64_t decode_16(const uint8_t *codes, int64_t bits, const float *values, float scale, int64_t n, int add,
                          float *out)
{
    const Decoder by = decoder(values, bits);
    const __m512 factor = _mm512_set1_ps(scale);
    const int64_t last = whole_words(n, bits, 16);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const uint8_t *from = codes + i * bits / 8;
        const __m512 product = _mm512_mul_ps(i <= last ? decoded(&by, from, bits, 1) : decoded(&by, from, bits, 0), factor);
        _mm512_storeu_ps(out + i, add ? _mm512_add_ps(_mm512_loadu_ps(out + i), product) : product);
    }
    return i;
}

/* out[v, r] += scale · Σ value[r, i] · x[v, i], x in rows of n; four sums at a time, so that none waits. */
INLINED void dot_16(const Codes *of, int64_t bits, int64_t first, int64_t count, const float *x, int64_t n, int vectors,
                    float *out, int64_t stride)
{
    const Decoder by = decoder(of->table, bits);
    const int64_t last = whole_words(n, bits, 64);
    for (int64_t r = 0; r < count; r++) {
        const uint8_t *codes = of->codes + (first + r) * of->row_bytes;
        __m512 sum[4][4];
        for (int v = 0; v < vectors; v++)
            for (int j = 0; j < 4; j++) sum[v][j] = _mm512_setzero_ps();
        int64_t i = 0;
        for (; i <= last; i += 64) {
            _mm_prefetch((const char *)codes + i * bits / 8 + AHEAD, _MM_HINT_T0);
            for (int j = 0; j < 4; j++) {
                const __m512 value = decoded(&by, codes + (i + 16 * j) * bits / 8, bits, 1);
                for (int v = 0; v < vectors; v++)
                    sum[v][j] = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + v * n + i + 16 * j), sum[v][j]);
            }
        }
        for (; i + 16 <= n; i += 16) {
            const __m512 value = decoded(&by, codes + i * bits / 8, bits, 0);
            for (int v = 0; v < vectors; v++) sum[v][0] = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + v * n + i), sum[v][0]);
        }
        const float scale = of->scale[(first + r) * of->scale_step];
        for (int v = 0; v < vectors; v++) {
            float total = _mm512_reduce_add_ps(
                _mm512_add_ps(_mm512_add_ps(sum[v][0], sum[v][1]), _mm512_add_ps(sum[v][2], sum[v][3])));
            for (int64_t j = i; j < n; j++) total += level(of, codes, j) * x[v * n + j];
            out[v * stride + r] += scale * total;
        }
    }
}

/* With the number of bits a constant. Return how many elements were done. */
#define OF_BITS(CALL)                 \
    switch (bits) {                   \
    case 1: return CALL(1);           \
    case 2: return CALL(2);           \
    case 3: return CALL(3);           \
    case 4: return CALL(4);           \
    case 8: return CALL(8);           \
    default: return 0;                \
    }

static AVX512 int64_t decode_fast(const uint8_t *codes, int64_t bits, const float *values, float scale, int64_t n,
                                  int add, float *out)
{
#define DECODE(BITS) decode_16(codes, BITS, values, scale, n, add, out)
    OF_BITS(DECODE)
}

/* Return whether it could. */
static AVX512 int dot_fast(const Codes *of, int64_t first, int64_t count, const float *x, int64_t n, int vectors,
                           float *out, int64_t stride)
{
    const int64_t bits = of->bits;
#define DOT_ONE(BITS) (dot_16(of, BITS, first, count, x, n, 1, out, stride), 1)
#define DOT_FOUR(BITS) (dot_16(of, BITS, first, count, x, n, 4, out, stride), 1)
    if (vectors == 1) OF_BITS(DOT_ONE)
    OF_BITS(DOT_FOUR)
}
#else
#define decode_fast(...) 0
#define dot_fast(...) 0
#endif

/* n elements of a row, from element `first`, a multiple of 8; added to what is there if `add`. */
static void codes_block(const Codes *of, int64_t row, int64_t first, int64_t n, int add, float *out)
{
    const uint8_t *codes = of->codes + row * of->row_bytes + first * of->bits / 8;
    const float scale = of->scale[row * of->scale_step];
    int64_t i = HAS_AVX512 ? decode_fast(codes, of->bits, of->table, scale, n, add, out) : 0;
    const int64_t bytes = (n * of->bits + 7) / 8;
    const uint64_t last = ((uint64_t)1 << of->bits) - 1;
    for (; i < n; i += 8) {
        const int64_t at = i * of->bits / 8, left = bytes - at, count = n - i < 8 ? n - i : 8;
        uint64_t word = left >= 8 ? word_of(codes + at, 8) : word_of(codes + at, left);
        for (int64_t j = 0; j < count; j++, word >>= of->bits) {
            const float value = of->bits == 8 ? (float)(word & last) + of->table[0] : of->table[word & last];
            out[i + j] = add ? out[i + j] + value * scale : value * scale;
        }
    }
}

static void block(const Rows *of, int64_t row, int64_t first, int64_t n, float *out)
{
    int has = of->dense_type != NONE;
    if (has) dense_block(of->dense, of->dense_type, row * of->n + first, n, out);
    if (of->mask) masked_block(of, row * of->n + first, n, out);
    for (int which = 0; which < 2; which++)
        if (of->codes[which].codes) {
            codes_block(&of->codes[which], row, first, n, has, out);
            has = 1;
        }
}

/* Rounded once, half to even; NaN stays NaN. */
static FOR_EVERY_PROCESSOR void store_bf16(const float *from, int64_t n, uint16_t *out)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        out[i] = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
}

/* `count` rows: those that `which` names, or from `first` on. Elements are rounded to `type`. */
EXPORTED void flexmerge_decode(const Rows *of, const int64_t *which, int64_t first, int64_t count, int64_t type,
                               void *out)
{
    const int64_t n = of->n;
    float values[BLOCK];
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < n; i += BLOCK) {
            const int64_t row = which ? which[r] : first + r, size = n - i < BLOCK ? n - i : BLOCK;
            if (type == F32) {
                block(of, row, i, size, (float *)out + r * n + i);
            } else {
                block(of, row, i, size, values);
                store_bf16(values, size, (uint16_t *)out + r * n + i);
            }
        }
}

static FOR_EVERY_PROCESSOR float product_sum(const float *w, const float *x, int64_t n)
{
    float sums[LANES] = {0}, total = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) sums[j] += w[i + j] * x[i + j];
    for (; i < n; i++) total += w[i] * x[i];
    for (int j = 0; j < LANES; j++) total += sums[j];
    return total;
}

/* out[v, r] += scale · Σ value[r, i] · x[v, i] for `vectors` rows of x. Codes are decoded once for four of them. */
static void add_codes(const Codes *of, int64_t first, int64_t count, const float *x, int64_t n, int64_t vectors,
                      float *out, int64_t stride)
{
    const Codes plain = {of->codes, of->row_bytes, of->bits, of->table, (const float[]){1}, 0};
    float values[BLOCK];
    for (int64_t v = 0; v < vectors;) {
        const int step = vectors - v < 4 ? 1 : 4;
        if (!HAS_AVX512 || !dot_fast(of, first, count, x + v * n, n, step, out + v * stride, stride))
            for (int64_t r = 0; r < count; r++) {
                float sums[4] = {0};
                for (int64_t i = 0; i < n; i += BLOCK) {
                    const int64_t size = n - i < BLOCK ? n - i : BLOCK;
                    codes_block(&plain, first + r, i, size, 0, values);
                    for (int w = 0; w < step; w++) sums[w] += product_sum(values, x + (v + w) * n + i, size);
                }
                for (int w = 0; w < step; w++)
                    out[(v + w) * stride + r] += of->scale[(first + r) * of->scale_step] * sums[w];
            }
        v += step;
    }
}

static void add_dense(const Rows *of, int64_t first, int64_t count, const float *x, int64_t vectors, float *out,
                      int64_t stride)
{
    const int64_t n = of->n;
    float values[BLOCK];
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < n; i += BLOCK) {
            const int64_t size = n - i < BLOCK ? n - i : BLOCK, at = (first + r) * n + i;
            dense_block(of->dense, of->dense_type, at, size, values);
            if (of->mask) masked_block(of, at, size, values);
            for (int64_t v = 0; v < vectors; v++) out[v * stride + r] += product_sum(values, x + v * n + i, size);
        }
}

/* out[v, r] = Σ W[first + r, i] · x[v, i] for `vectors` rows of n elements of x and `count` rows of the weight. */
EXPORTED void flexmerge_product(const Rows *of, int64_t first, int64_t count, const float *x, int64_t vectors,
                                float *out, int64_t stride)
{
    for (int64_t r = 0; r < count; r += FEW) {
        const int64_t rows = count - r < FEW ? count - r : FEW;
        for (int64_t v = 0; v < vectors; v++) memset(out + v * stride + r, 0, rows * sizeof *out);
        if (of->dense_type != NONE) add_dense(of, first + r, rows, x, vectors, out + r, stride);
        for (int which = 0; which < 2; which++)
            if (of->codes[which].codes)
                add_codes(&of->codes[which], first + r, rows, x, of->n, vectors, out + r, stride);
    }
}

static FOR_EVERY_PROCESSOR void add_times(const float *w, float x, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++) out[i] += x * w[i];
}

/* out[v, i] += Σ x[v, r] · W[r, i] for `vectors` rows of m elements of x, and `count` columns of the weight from `first`, a
 * multiple of 8. */
EXPORTED void flexmerge_product_of_rows(const Rows *of, int64_t m, int64_t first, int64_t count, const float *x,
                                        int64_t vectors, float *out)
{
    float values[BLOCK];
    for (int64_t r = 0; r < m; r++)
        for (int64_t i = first; i < first + count; i += BLOCK) {
            const int64_t size = first + count - i < BLOCK ? first + count - i : BLOCK;
            block(of, r, i, size, values);
            for (int64_t v = 0; v < vectors; v++) add_times(values, x[v * m + r], size, out + v * of->n + i);
        }
}
