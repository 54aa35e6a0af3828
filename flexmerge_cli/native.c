/* The few loops whose speed decides how long `plan` and `merge` take, fused: each element is loaded once where torch
 * goes through memory for every operation. native.py says what they compute, and what is used where there is no compiler.
 *
 * Sums go into LANES partial sums in a fixed order, and products are never fused with sums (-ffp-contract=off): so all
 * processors, whatever their vectors, give the same bits. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>

#define LANES 32 /* four vectors of AVX2: fewer leave the processor waiting for the sum before */
#define RUN 1024 /* elements of a float32 sum before it goes into a double: off by 1e-7 at most */

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

/* out[i] = x[0][i] + … + x[k-1][i], one after another in float64; rows of x are `stride` elements apart. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_sum(const float *x, int64_t k, int64_t n, int64_t stride, double *out)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        double sum[LANES];
        for (int j = 0; j < LANES; j++) sum[j] = x[i + j];
        for (int64_t row = 1; row < k; row++) {
            const float *from = x + row * stride + i;
            for (int j = 0; j < LANES; j++) sum[j] += from[j];
        }
        for (int j = 0; j < LANES; j++) out[i + j] = sum[j];
    }
    for (; i < n; i++) {
        double sum = x[i];
        for (int64_t row = 1; row < k; row++) sum += x[row * stride + i];
        out[i] = sum;
    }
}

/* out[i] = base[i] + float32(mean of x[·][i]), the mean in float64 as above. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_average(const float *base, const float *x, int64_t k, int64_t n,
                                                    int64_t stride, float *out)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        double sum[LANES];
        for (int j = 0; j < LANES; j++) sum[j] = x[i + j];
        for (int64_t row = 1; row < k; row++) {
            const float *from = x + row * stride + i;
            for (int j = 0; j < LANES; j++) sum[j] += from[j];
        }
        for (int j = 0; j < LANES; j++) out[i + j] = base[i + j] + (float)(sum[j] / (double)k);
    }
    for (; i < n; i++) {
        double sum = x[i];
        for (int64_t row = 1; row < k; row++) sum += x[row * stride + i];
        out[i] = base[i] + (float)(sum / (double)k);
    }
}

/* Largest magnitude and Σ x² of each of m rows of n elements. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_measure_rows(const float *x, int64_t m, int64_t n, float *largest,
                                                         double *energy)
{
    for (int64_t row = 0; row < m; row++, x += n) {
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
        largest[row] = most;
        energy[row] = total;
    }
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

/* Of T ways to code m rows: Σ of each way and row, [T, m]. inverse [T, m]: reciprocals of the scales.
 * last [T] > 0: levels 0, 1, …, last. Else tables [T, 7]: four levels, and three thresholds that are taken times
 * exact [m]. */
EXPORTED void flexmerge_row_errors(const float *x, int64_t m, int64_t n, int64_t ways, const float *inverse,
                                   const float *last, const float *tables, const float *exact, double *out)
{
    for (int64_t row = 0; row < m; row++, x += n)
        for (int64_t way = 0; way < ways; way++) {
            const int64_t at = way * m + row;
            if (last[way] > 0) {
                out[at] = of_steps(x, n, inverse[at], last[way]);
            } else {
                const float *table = tables + 7 * way;
                const float threshold[3] = {table[4] * exact[row], table[5] * exact[row], table[6] * exact[row]};
                out[at] = of_table(x, n, inverse[at], table, threshold);
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

/* scale · Σ (x[·] - base) / divisor in float64, rounded once; stored = base + that. And what k tasks lose: Σ of
 * ((x - base) - (stored - base))² of each run, as flexmerge_squares adds up. A run stays in the cache meanwhile. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_merge(const float *base, const float *x, int64_t k, int64_t runs,
                                                  int64_t stride, double divisor, double scale, float *stored,
                                                  double *errors, int64_t errors_stride)
{
    for (int64_t run = 0; run < runs; run++) {
        const float *b = base + run * RUN;
        float *s = stored + run * RUN;
        for (int64_t i = 0; i < RUN; i += LANES) {
            double sum[LANES];
            for (int j = 0; j < LANES; j++) sum[j] = x[run * RUN + i + j] - b[i + j];
            for (int64_t row = 1; row < k; row++) {
                const float *from = x + row * stride + run * RUN + i;
                for (int j = 0; j < LANES; j++) sum[j] += from[j] - b[i + j];
            }
            /* Adding 0 makes +0 of -0. */
            for (int j = 0; j < LANES; j++) s[i + j] = b[i + j] + ((float)(scale * (sum[j] / divisor)) + 0.0f);
        }
        for (int64_t row = 0; row < k; row++) {
            const float *from = x + row * stride + run * RUN;
            float lost[LANES] = {0};
            double total = 0;
            for (int64_t i = 0; i < RUN; i += LANES)
                for (int j = 0; j < LANES; j++) {
                    const float d = (from[i + j] - b[i + j]) - (s[i + j] - b[i + j]);
                    lost[j] += d * d;
                }
            for (int j = 0; j < LANES; j++) total += lost[j];
            errors[row * errors_stride + run] = total;
        }
    }
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
