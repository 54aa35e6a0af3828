/* The few loops whose speed decides how long `plan` and `merge` take, fused: each element is loaded once where torch
 * goes through memory for every operation. native.py says what they compute, and what is used where there is no compiler.
 *
 * Sums go into LANES partial sums in a fixed order, and products are never fused with sums (-ffp-contract=off): so all
 * processors, whatever their vectors, give the same bits. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 32 /* four vectors of AVX2: fewer leave the processor waiting for the sum before */
#define RUN 1024 /* elements of a float32 sum before it goes into a double: off by 1e-7 at most */

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

#define EXPORTED __attribute__((visibility("default")))

/* Of the functions below; native.py calls no others. Raise it with every change of arguments. */
EXPORTED int64_t flexmerge_version(void) { return 7; }

/* sum[j] = Σ (x[row][j] - minus[j]) of k rows, one after another in float64; rows of x are `stride` elements apart.
 * Inlined, so that n is a constant, and the sums stay in registers, wherever it is LANES. */
static inline __attribute__((always_inline)) void add_rows(const float *x, int64_t k, int64_t stride, int n,
                                                           const float *minus, double *sum)
{
    for (int j = 0; j < n; j++) sum[j] = x[j] - minus[j];
    for (int64_t row = 1; row < k; row++)
        for (int j = 0; j < n; j++) sum[j] += x[row * stride + j] - minus[j];
}

/* out[i] = x[0][i] + … + x[k-1][i]. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_sum(const float *x, int64_t k, int64_t n, int64_t stride, double *out)
{
    const float minus[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        double sum[LANES];
        add_rows(x + i, k, stride, LANES, minus, sum);
        memcpy(out + i, sum, sizeof sum);
    }
    add_rows(x + i, k, stride, n - i, minus, out + i);
}

/* Largest magnitude and Σ x² of n elements. */
static FOR_EVERY_PROCESSOR void measure_row(const float *x, int64_t n, float *largest, double *energy)
{
    float top[LANES] = {0}, most = 0;
    double total = 0;
    for (int64_t first = 0; first < n; first += RUN) {
        const int64_t stop = first + RUN < n ? first + RUN : n;
        float sum[LANES] = {0}, rest = 0;
        int64_t i = first;
        for (int64_t at = i; at + LANES <= stop; at += LANES)
            for (int j = 0; j < LANES; j++) top[j] = fabsf(x[at + j]) > top[j] ? fabsf(x[at + j]) : top[j];
        for (; i + LANES <= stop; i += LANES)
            for (int j = 0; j < LANES; j++) sum[j] += x[i + j] * x[i + j];
        for (; i < stop; i++) {
            const float a = fabsf(x[i]);
            most = a > most ? a : most;
            rest += a * a;
        }
        for (int j = 0; j < LANES; j++) total += sum[j];
        total += rest;
    }
    for (int j = 0; j < LANES; j++) most = top[j] > most ? top[j] : most;
    *largest = most;
    *energy = total;
}

/* Σ (v - level of v)² over a row, v = |x|·inverse. LEVEL is an expression of v. */
#define SUM_OF_SQUARES(LEVEL)                                                  \
    for (int64_t first = 0; first < n; first += RUN) {                         \
        const int64_t stop = first + RUN < n ? first + RUN : n;                \
        float sum[LANES] = {0}, rest = 0;                                      \
        int64_t i = first;                                                     \
        for (; i + LANES <= stop; i += LANES)                                  \
            for (int j = 0; j < LANES; j++) {                                  \
                const float v = fabsf(x[i + j]) * inverse, d = v - (LEVEL);    \
                sum[j] += d * d;                                               \
            }                                                                  \
        for (; i < stop; i++) {                                                \
            const float v = fabsf(x[i]) * inverse, d = v - (LEVEL);            \
            rest += d * d;                                                     \
        }                                                                      \
        for (int j = 0; j < LANES; j++) total += sum[j];                       \
        total += rest;                                                         \
    }                                                                          \
    return total;

/* Up to four levels: threshold[i] is where level i + 1 begins; unused ones are infinite. */
static FOR_EVERY_PROCESSOR double of_table(const float *x, int64_t n, float inverse, const float *level,
                                           const float *threshold)
{
    const float l0 = level[0], l1 = level[1], l2 = level[2], l3 = level[3];
    const float t0 = threshold[0], t1 = threshold[1], t2 = threshold[2];
    double total = 0;
    SUM_OF_SQUARES(v >= t1 ? (v >= t2 ? l3 : l2) : (v >= t0 ? l1 : l0))
}

/* Whole numbers up to `last`. */
static FOR_EVERY_PROCESSOR double of_steps(const float *x, int64_t n, float inverse, float last)
{
    double total = 0;
    SUM_OF_SQUARES(rintf(v) < last ? rintf(v) : last)
}

/* A scale as it is stored, in bfloat16: rounded to nearest, ties to even. */
static double rounded(double scale)
{
    const float single = (float)scale;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    bits = single != single ? 0x7FC00000 : (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
    float stored;
    memcpy(&stored, &bits, sizeof stored);
    return stored;
}

/* Code m rows in several ways, and find Σ (x - coded x)² of the best way of each number of bits, out [bits, m]; and the
 * largest magnitude of each row. For each way, `place` is the index of its bits; with last > 0 the levels are 0, 1, …, last, and
 * the scale is factor times the largest magnitude divided by last; else the scale is the root mean square, and tables
 * [ways, 7] hold four levels, and three thresholds at the exact scale. Scales are rounded to bfloat16. */
EXPORTED void flexmerge_row_errors(const float *x, int64_t m, int64_t n, int64_t ways, const int64_t *place,
                                   const double *factor, const float *last, const float *tables, float *largest,
                                   double *out)
{
    for (int64_t row = 0; row < m; row++, x += n) {
        double energy, exact = 0;
        measure_row(x, n, largest + row, &energy);
        const double root = sqrt(energy / (double)n);
        for (int64_t way = 0; way < ways; way++) {
            const double scale = last[way] > 0 ? factor[way] * largest[row] / last[way] : root, unit = rounded(scale);
            const float inverse = (float)(1 / unit), *table = tables + 7 * way;
            double error;
            if (way == 0) exact = (float)(root / unit);
            if (last[way] > 0) {
                error = of_steps(x, n, inverse, last[way]);
            } else {
                const float at = (float)exact, threshold[3] = {table[4] * at, table[5] * at, table[6] * at};
                error = of_table(x, n, inverse, table, threshold);
            }
            error *= unit * unit;
            double *best = out + place[way] * m + row;
            if (way == 0 || place[way] != place[way - 1] || error < *best || error != error) *best = error;
        }
    }
}

/* Σ x² of each of `runs` runs of k rows: LANES sums in float32, which are then added up in float64. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_squares(const float *x, int64_t k, int64_t runs, int64_t stride, double *out,
                                                    int64_t out_stride)
{
    for (int64_t row = 0; row < k; row++)
        for (int64_t run = 0; run < runs; run++) {
            const float *from = x + row * stride + run * RUN;
            float sum[LANES] = {0};
            double total = 0;
            for (int64_t i = 0; i < RUN; i += LANES)
                for (int j = 0; j < LANES; j++) sum[j] += from[i + j] * from[i + j];
            for (int j = 0; j < LANES; j++) total += sum[j];
            out[row * out_stride + run] = total;
        }
}

/* The number that decides between equal magnitudes, as random.py draws it: multiples of 2^-53 in [0, 1). */
static inline double tie_number(uint64_t key, uint64_t index)
{
    uint64_t z = key + (index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

/* Zero what is not among the largest of k rows: magnitudes below `least`, in bits, and those equal to it whose number is
 * above `last`. With `drop`, zero these largest instead. Elements are counted from `start` on in their tensor. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_trim(const int32_t *x, int64_t k, int64_t n, int64_t stride,
                                                 const int32_t *least, const double *last, uint64_t tie_key,
                                                 int64_t start, int64_t drop, int32_t *out)
{
    for (int64_t row = 0; row < k; row++, x += stride, out += n) {
        const int32_t key = least[row], flip = drop != 0;
        for (int64_t first = 0; first < n; first += RUN) {
            const int64_t stop = first + RUN < n ? first + RUN : n;
            int32_t ties = 0;
            for (int64_t i = first; i < stop; i++) {
                const int32_t size = x[i] & INT32_MAX;
                ties += size == key;
                out[i] = (size >= key) != flip ? x[i] : 0;
            }
            if (!ties || last[row] >= 1) continue;
            for (int64_t i = first; i < stop; i++)
                if ((x[i] & INT32_MAX) == key && tie_number(tie_key, (uint64_t)(start + i)) > last[row])
                    out[i] = flip ? x[i] : 0;
        }
    }
}

/* Of n elements of k rows: elect the sign of their sum, + if it is 0; and out = the mean (how = 0), the sum (1) or the
 * largest (2) of the rows that agree, 0 if none does. agrees [k, n], or NULL: whether each does. */
static inline __attribute__((always_inline)) void agree(const float *x, int64_t k, int64_t stride, int n, int64_t how,
                                                        double *out, uint8_t *agrees, int64_t agrees_stride)
{
    const float minus[LANES] = {0};
    double sum[LANES];
    float sign[LANES], most[LANES];
    int32_t count[LANES];
    add_rows(x, k, stride, n, minus, sum);
    for (int j = 0; j < n; j++) sign[j] = sum[j] >= 0 ? 1 : -1, sum[j] = 0, most[j] = 0, count[j] = 0;
    for (int64_t row = 0; row < k; row++) {
        const float *from = x + row * stride;
        if (agrees)
            for (int j = 0; j < n; j++) agrees[row * agrees_stride + j] = from[j] * sign[j] > 0;
        if (how == 2) {
            for (int j = 0; j < n; j++) {
                const float size = from[j] * sign[j];
                most[j] = size > most[j] ? size : most[j];
            }
        } else {
            for (int j = 0; j < n; j++) {
                const int agreeing = from[j] * sign[j] > 0;
                sum[j] += agreeing ? from[j] : 0.0f;
                count[j] += agreeing;
            }
        }
    }
    for (int j = 0; j < n; j++)
        out[j] = how == 2 ? (double)(sign[j] * most[j]) : how == 1 ? sum[j] : sum[j] / (count[j] ? count[j] : 1);
}

EXPORTED FOR_EVERY_PROCESSOR void flexmerge_agree(const float *x, int64_t k, int64_t n, int64_t stride, int64_t how,
                                                  double *out, uint8_t *agrees)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        agree(x + i, k, stride, LANES, how, out + i, agrees ? agrees + i : agrees, n);
    agree(x + i, k, stride, n - i, how, out + i, agrees ? agrees + i : agrees, n);
}

/* Σ of n values as numpy adds up adjacent ones: eight sums of up to 128 values, and halves of more. */
static double pairwise(const double *x, int64_t n)
{
    if (n > 128) {
        const int64_t half = n / 2 - n / 2 % 8;
        return pairwise(x, half) + pairwise(x + half, n - half);
    }
    double sum[8] = {0}, total;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += x[i + j];
    total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    for (; i < n; i++) total += x[i];
    return total;
}

#define F32 1 /* as in native.py */
#define BF16 2

/* n values of a type as float32. */
static inline __attribute__((always_inline)) void widen(const void *from, int64_t type, int64_t at, int64_t n, float *to)
{
    if (type == F32) {
        memcpy(to, (const float *)from + at, n * sizeof(float));
        return;
    }
    const uint16_t *bits = (const uint16_t *)from + at;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t wide = (uint32_t)bits[i] << 16;
        memcpy(to + i, &wide, sizeof wide);
    }
}

/* Round n values to a type, to nearest and ties to even, and -0 to +0 if `zero` is 0 (0x8000 keeps it); they become what
 * is stored. */
static inline __attribute__((always_inline)) void narrow(float *values, int64_t type, int64_t at, int64_t n, void *to,
                                                         uint32_t zero)
{
    if (type == F32) {
        memcpy((float *)to + at, values, n * sizeof(float));
        return;
    }
    uint16_t *bits = (uint16_t *)to + at;
    for (int64_t i = 0; i < n; i++) {
        uint32_t wide;
        memcpy(&wide, values + i, sizeof wide);
        const uint32_t rounded = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
        wide = values[i] != values[i] ? 0x7FC0 : rounded == 0x8000 ? zero : rounded;
        bits[i] = (uint16_t)wide;
        wide <<= 16;
        memcpy(values + i, &wide, sizeof wide);
    }
}

/* Σ x² of up to RUN values: as flexmerge_squares adds up if they are RUN, else in float64 as numpy does. */
static inline __attribute__((always_inline)) double sum_of_squares(const float *x, int64_t n)
{
    float sum[LANES] = {0};
    double total = 0, squares[RUN];
    if (n < RUN) {
        for (int64_t i = 0; i < n; i++) squares[i] = (double)x[i] * x[i];
        return pairwise(squares, n);
    }
    for (int64_t i = 0; i < RUN; i += LANES)
        for (int j = 0; j < LANES; j++) sum[j] += x[i + j] * x[i + j];
    for (int j = 0; j < LANES; j++) total += sum[j];
    return total;
}

/* n values of a type minus float32 ones. */
static inline __attribute__((always_inline)) void minus(const void *x, int64_t type, int64_t at, int64_t n,
                                                        const float *other, float *out)
{
    if (type == F32) {
        const float *own = (const float *)x + at;
        for (int64_t i = 0; i < n; i++) out[i] = own[i] - other[i];
    } else {
        widen(x, type, at, n, out);
        for (int64_t i = 0; i < n; i++) out[i] -= other[i];
    }
}

/* The base's elements [first, first + count) as float32, and the task vectors of k rows: k runs, which end with zeros. */
static inline __attribute__((always_inline)) void subtract(const void *base, const void *x, int64_t type, int64_t k,
                                                           int64_t first, int64_t count, int64_t stride, float *b,
                                                           float *deltas)
{
    widen(base, type, first, count, b);
    for (int64_t row = 0; row < k; row++, deltas += RUN) {
        minus(x, type, row * stride + first, count, b, deltas);
        memset(deltas + count, 0, (RUN - count) * sizeof(float));
    }
}

/* The task vectors x - base of n elements of k rows, float32 [k, n]. `types` are those of base and x. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_deltas(const void *base, const void *x, const int64_t *types, int64_t k,
                                                   int64_t n, int64_t stride, float *out)
{
    float b[RUN];
    for (int64_t first = 0; first < n; first += RUN) {
        const int64_t count = first + RUN < n ? RUN : n - first;
        widen(base, types[0], first, count, b);
        for (int64_t row = 0; row < k; row++)
            minus(x, types[1], row * stride + first, count, b, out + row * n + first);
    }
}

/* Computes the average of some rows of k tasks, base + float32(mean of x - base), [s, n], and for each row the residuals
 * x - average of the tasks in `tasks` [s, t], [s, t, n]. x: addresses of the tasks' first rows; base is float32. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_sample(const float *base, const void *const *x, int64_t type, int64_t k,
                                                   const int64_t *rows, int64_t s, int64_t n, const int64_t *tasks,
                                                   int64_t t, float *average, float *residuals)
{
    double sum[RUN];
    float own[RUN];
    for (int64_t row = 0; row < s; row++, average += n, tasks += t, residuals += t * n)
        for (int64_t first = 0; first < n; first += RUN) {
            const int64_t count = first + RUN < n ? RUN : n - first, at = rows[row] * n + first;
            const float *b = base + at;
            memset(sum, 0, sizeof sum);
            for (int64_t task = 0; task < k; task++) {
                minus(x[task], type, at, count, b, own);
                for (int64_t i = 0; i < count; i++) sum[i] += own[i];
            }
            for (int64_t i = 0; i < count; i++) average[first + i] = b[i] + (float)(sum[i] / (double)k);
            for (int64_t one = 0; one < t; one++)
                minus(x[tasks[one]], type, at, count, average + first, residuals + one * n + first);
        }
}

/* Merge the task vectors τ = x - base of k rows, and measure what the tasks lose: Σ (τ - (stored - base))² of each run.
 * how: 0, 1, 2 as above, of those τ that flexmerge_trim keeps unless `least` is NULL; 3: Σ τ / divisor. All in float64;
 * stored = base + that times scale, rounded once. `types` are those of base and x and of stored. A run stays in the
 * cache meanwhile, in room for 2 k runs. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_merge(const void *base, const void *x, const int64_t *types, int64_t k,
                                                  int64_t n, int64_t stride, int64_t how, double divisor, double scale,
                                                  const int32_t *least, const double *last, uint64_t tie_key,
                                                  int64_t start, float *room, void *stored, double *errors,
                                                  int64_t errors_stride)
{
    const float zero[LANES] = {0};
    float b[RUN], s[RUN], *kept = least ? room + k * RUN : room;
    for (int64_t first = 0; first < n; first += RUN) {
        const int64_t count = first + RUN < n ? RUN : n - first;
        subtract(base, x, types[0], k, first, count, stride, b, room);
        if (least)
            flexmerge_trim((const int32_t *)room, k, RUN, RUN, least, last, tie_key, start + first, 0, (int32_t *)kept);
        for (int64_t i = 0; i < count; i += LANES) {
            double merged[LANES];
            if (how == 3) {
                add_rows(kept + i, k, RUN, LANES, zero, merged);
                for (int j = 0; j < LANES; j++) merged[j] /= divisor;
            } else {
                agree(kept + i, k, RUN, LANES, how, merged, 0, 0);
            }
            /* Adding 0 makes +0 of -0. */
            for (int j = 0; j < LANES; j++) s[i + j] = (float)(scale * merged[j]) + 0.0f;
        }
        for (int64_t i = 0; i < count; i++) s[i] += b[i];
        narrow(s, types[1], first, count, stored, 0);
        for (int64_t i = 0; i < count; i++) s[i] -= b[i];
        for (int64_t row = 0; row < k; row++) {
            float *delta = room + row * RUN;
            for (int64_t i = 0; i < count; i++) delta[i] -= s[i];
            errors[row * errors_stride + first / RUN] = sum_of_squares(delta, count);
        }
    }
}

/* Elect one delta of k tasks, the largest of the elected sign, rounded as it is stored, and a mask for each of where it
 * agrees. If `sizes` is not NULL, it gets Σ |τ| of each task and run, and Σ of what its mask takes: [2, k, runs]. If it
 * is NULL, write the unified delta, the masks, a bit for each element, and what each task gets, base + gamma · unified
 * where it agrees; and measure what it loses. `types` are those of base and x, of unified, and of decoded. There is room
 * for 2 k runs. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_elect(const void *base, const void *x, const int64_t *types, int64_t k,
                                                  int64_t n, int64_t stride, float *room, double *sizes,
                                                  const float *gamma, void *unified, uint8_t *masks,
                                                  int64_t masks_stride, void *decoded, int64_t decoded_stride,
                                                  double *errors, int64_t errors_stride)
{
    float b[RUN], u[RUN], value[RUN], lost[RUN];
    double size[RUN];
    uint8_t *agrees = (uint8_t *)(room + k * RUN);
    const int64_t runs = (n + RUN - 1) / RUN;
    for (int64_t first = 0; first < n; first += RUN) {
        const int64_t count = first + RUN < n ? RUN : n - first, run = first / RUN;
        subtract(base, x, types[0], k, first, count, stride, b, room);
        for (int64_t i = 0; i < count; i += LANES) {
            double most[LANES];
            agree(room + i, k, RUN, LANES, 2, most, agrees + i, RUN);
            for (int j = 0; j < LANES; j++) u[i + j] = (float)most[j] + 0.0f;
        }
        if (sizes) {
            float rounded[RUN];
            memcpy(rounded, u, count * sizeof(float));
            uint16_t bits[RUN];
            if (types[1] != F32) narrow(rounded, types[1], 0, count, bits, 0);
            for (int64_t row = 0; row < k; row++) {
                const float *delta = room + row * RUN;
                const uint8_t *takes = agrees + row * RUN;
                for (int64_t i = 0; i < count; i++) size[i] = fabsf(delta[i]);
                sizes[row * runs + run] = pairwise(size, count);
                for (int64_t i = 0; i < count; i++) size[i] = takes[i] ? fabsf(rounded[i]) : 0;
                sizes[(k + row) * runs + run] = pairwise(size, count);
            }
            continue;
        }
        narrow(u, types[1], first, count, unified, 0);
        for (int64_t row = 0; row < k; row++) {
            const uint8_t *takes = agrees + row * RUN;
            const float factor = gamma[row];
            uint8_t *mask = masks + row * masks_stride + first / 8;
            for (int64_t i = 0; i < count; i += 8) {
                uint64_t eight;
                memcpy(&eight, takes + i, 8);
                mask[i / 8] = (uint8_t)(eight * 0x0102040810204080u >> 56);
            }
            for (int64_t i = 0; i < count; i++) {
                const float there = b[i] + factor * u[i];
                value[i] = takes[i] ? there : b[i];
            }
            narrow(value, types[2], row * decoded_stride + first, count, decoded, 0x8000);
            minus(x, types[0], row * stride + first, count, value, lost);
            errors[row * errors_stride + run] = sum_of_squares(lost, count);
        }
    }
}

/* Count the digits, the upper 16 of the lower `shift` bits, of n keys, of which only the bits of `mask` count and which
 * have `bits`: 32 or 64. The top digit is signed; counts [2^16] begin with the smallest. What is counted before stays.
 * positive: how many keys are above 0. */
#define COUNT(KEY)                                                   \
    for (int64_t i = 0; i < n; i++) {                                \
        const KEY key = ((const KEY *)keys)[i] & (KEY)mask;          \
        counts[((key >> down) & 0xFFFF) ^ flip]++;                   \
        above += key > 0;                                            \
    }

EXPORTED void flexmerge_count(const void *keys, int64_t bits, int64_t n, int64_t mask, int64_t shift, int64_t *counts,
                              int64_t *positive)
{
    const int flip = shift == bits ? 0x8000 : 0, down = (int)shift - 16;
    int64_t above = 0;
    if (bits == 32) {
        COUNT(int32_t)
    } else {
        COUNT(int64_t)
    }
    *positive = above;
}

#define FIND(KEY)                                                                                       \
    for (int64_t first = 0; first < n; first += RUN) {                                                  \
        const int64_t stop = first + RUN < n ? first + RUN : n;                                         \
        const KEY *key = keys;                                                                          \
        KEY some = 0;                                                                                   \
        for (int64_t i = first; i < stop; i++) some |= (key[i] & (KEY)mask) >> shift == (KEY)prefix;    \
        if (some)                                                                                       \
            for (int64_t i = first; i < stop; i++) {                                                    \
                at[count] = i;                                                                          \
                count += (key[i] & (KEY)mask) >> shift == (KEY)prefix;                                  \
            }                                                                                           \
    }

/* Places of the keys, as above, whose upper bits equal the prefix: found[0] is their number, and the places follow.
 * There is room for n + 1. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_find(const void *keys, int64_t bits, int64_t n, int64_t mask, int64_t shift,
                                                 int64_t prefix, int64_t *found)
{
    int64_t count = 0, *at = found + 1;
    if (bits == 32) {
        FIND(int32_t)
    } else {
        FIND(int64_t)
    }
    found[0] = count;
}

/* Σ |x| of each run of k rows, whose stride may be 0. takes [k, n], or NULL: which elements count. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_sizes(const float *x, int64_t k, int64_t n, int64_t stride,
                                                  const uint8_t *takes, double *out)
{
    double size[RUN];
    for (int64_t row = 0; row < k; row++)
        for (int64_t first = 0; first < n; first += RUN) {
            const int64_t count = first + RUN < n ? RUN : n - first;
            const float *from = x + row * stride + first;
            for (int64_t i = 0; i < count; i++) size[i] = fabsf(from[i]);
            if (takes)
                for (int64_t i = 0; i < count; i++) size[i] = takes[row * n + first + i] ? size[i] : 0;
            *out++ = pairwise(size, count);
        }
}

/* What k tasks get of a unified delta, base + gamma · unified where they take it, and elsewhere the base or, if it is
 * `is_signed`, base - gamma · unified; and what they lose, Σ (decoded - x)² of each run as flexmerge_squares adds up.
 * takes [k, takes_stride] has a byte per element. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_masked(const float *base, const float *x, int64_t k, int64_t runs,
                                                   int64_t stride, const float *unified, const uint8_t *takes,
                                                   int64_t takes_stride, const float *gamma, int64_t is_signed,
                                                   float *decoded, int64_t decoded_stride, double *errors,
                                                   int64_t errors_stride)
{
    for (int64_t run = 0; run < runs; run++) {
        const float *b = base + run * RUN, *u = unified + run * RUN;
        for (int64_t row = 0; row < k; row++) {
            const float *own = x + row * stride + run * RUN, factor = gamma[row];
            const uint8_t *taken = takes + row * takes_stride + run * RUN;
            float *to = decoded + row * decoded_stride + run * RUN;
            float lost[LANES] = {0};
            double total = 0;
            for (int64_t i = 0; i < RUN; i += LANES)
                for (int j = 0; j < LANES; j++) {
                    const float shift = factor * u[i + j], there = b[i + j] + shift;
                    const float elsewhere = is_signed ? b[i + j] - shift : b[i + j];
                    const float value = taken[i + j] ? there : elsewhere, d = value - own[i + j];
                    to[i + j] = value;
                    lost[j] += d * d;
                }
            for (int j = 0; j < LANES; j++) total += lost[j];
            errors[row * errors_stride + run] = total;
        }
    }
}

#define MOST_TASKS 32
#define BLOCK 256 /* elements whose task vectors stay in the first-level cache while all pairs are multiplied */
#define WIDTH 8
#define PRODUCT_RUN 4096 /* elements of a float32 sum, a multiple of BLOCK */
typedef float vector __attribute__((vector_size(4 * WIDTH)));
typedef float unaligned __attribute__((vector_size(4 * WIDTH), aligned(4)));

/* Per piece of n elements, a multiple of BLOCK, the k × k products of the rows x - base, k ≤ MOST_TASKS: WIDTH sums in
 * float32 of PRODUCT_RUN elements, added up in float64. Tiles of four rows and two columns: eight sums and what is
 * multiplied fit the sixteen registers of AVX2. base may be NULL: x are differences.
 * x is of a type, base float32. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_products(const float *base, const void *x, int64_t type, int64_t k,
                                                     int64_t pieces, int64_t n, int64_t stride, double *products)
{
    vector delta[MOST_TASKS][BLOCK / WIDTH], sums[MOST_TASKS / 4][MOST_TASKS / 2][4][2];
    const int64_t rows = (k + 3) / 4 * 4;
    for (int64_t row = k; row < rows; row++) memset(delta[row], 0, sizeof delta[row]);
    for (int64_t piece = 0; piece < pieces; piece++, products += k * k) {
        memset(products, 0, sizeof(double) * k * k);
        memset(sums, 0, sizeof sums);
        for (int64_t first = 0; first < n; first += BLOCK) {
            const int64_t at = piece * n + first;
            for (int64_t row = 0; row < k; row++) {
                widen(x, type, row * stride + at, BLOCK, (float *)delta[row]);
                if (base)
                    for (int i = 0; i < BLOCK / WIDTH; i++)
                        delta[row][i] -= *(const unaligned *)(base + at + WIDTH * i);
            }
            for (int64_t r = 0; r < rows; r += 4)
                for (int64_t c = r; c < rows; c += 2) {
                    vector(*sum)[2] = sums[r / 4][c / 2];
                    vector s00 = sum[0][0], s01 = sum[0][1], s10 = sum[1][0], s11 = sum[1][1];
                    vector s20 = sum[2][0], s21 = sum[2][1], s30 = sum[3][0], s31 = sum[3][1];
                    for (int i = 0; i < BLOCK / WIDTH; i++) {
                        const vector a = delta[c][i], b = delta[c + 1][i];
                        const vector d0 = delta[r][i], d1 = delta[r + 1][i], d2 = delta[r + 2][i], d3 = delta[r + 3][i];
                        s00 += d0 * a, s01 += d0 * b, s10 += d1 * a, s11 += d1 * b;
                        s20 += d2 * a, s21 += d2 * b, s30 += d3 * a, s31 += d3 * b;
                    }
                    sum[0][0] = s00, sum[0][1] = s01, sum[1][0] = s10, sum[1][1] = s11;
                    sum[2][0] = s20, sum[2][1] = s21, sum[3][0] = s30, sum[3][1] = s31;
                }
            if ((first + BLOCK) % PRODUCT_RUN != 0 && first + BLOCK < n) continue;
            for (int64_t r = 0; r < k; r++)
                for (int64_t c = r; c < k; c++) {
                    vector *sum = &sums[r / 4][c / 2][r % 4][c % 2];
                    for (int j = 0; j < WIDTH; j++) products[r * k + c] += (*sum)[j];
                }
            memset(sums, 0, sizeof sums);
        }
        for (int64_t r = 0; r < k; r++)
            for (int64_t c = 0; c < r; c++) products[r * k + c] = products[c * k + r];
    }
}
