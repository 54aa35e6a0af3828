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
EXPORTED int64_t flexmerge_version(void) { return 2; }

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

/* out[i] = base[i] + float32(mean of task vectors), the mean in float64. x are task vectors if `subtracted`, else
 * weights. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_average(const float *base, const float *x, int64_t k, int64_t n,
                                                    int64_t stride, int64_t subtracted, float *out)
{
    const float zero[LANES] = {0};
    double sum[LANES];
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        add_rows(x + i, k, stride, LANES, subtracted ? zero : base + i, sum);
        for (int j = 0; j < LANES; j++) out[i + j] = base[i + j] + (float)(sum[j] / (double)k);
    }
    add_rows(x + i, k, stride, n - i, subtracted ? zero : base + i, sum);
    for (int j = 0; j < n - i; j++) out[i + j] = base[i + j] + (float)(sum[j] / (double)k);
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
            add_rows(x + run * RUN + i, k, stride, LANES, b + i, sum);
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

#define MOST_TASKS 32
#define BLOCK 256 /* elements whose task vectors stay in the first-level cache while all pairs are multiplied */
#define WIDTH 8
#define PRODUCT_RUN 4096 /* elements of a float32 sum, a multiple of BLOCK */
typedef float vector __attribute__((vector_size(4 * WIDTH)));
typedef float unaligned __attribute__((vector_size(4 * WIDTH), aligned(4)));

/* Per piece of n elements, a multiple of BLOCK, the k × k products of the rows x - base, k ≤ MOST_TASKS: WIDTH sums in
 * float32 of PRODUCT_RUN elements, added up in float64. Tiles of four rows and two columns: eight sums and what is
 * multiplied fit the sixteen registers of AVX2. base may be NULL: x are differences. */
EXPORTED FOR_EVERY_PROCESSOR void flexmerge_products(const float *base, const float *x, int64_t k, int64_t pieces,
                                                     int64_t n, int64_t stride, double *products)
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
                const float *from = x + row * stride + at;
                for (int i = 0; i < BLOCK / WIDTH; i++)
                    delta[row][i] = *(const unaligned *)(from + WIDTH * i);
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
