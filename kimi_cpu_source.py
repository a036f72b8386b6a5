"""The C that `kimi_cpu.py` compiles. Generated from csrc/ by `python -m scripts.embed_c`: change it there.

csrc/common.h says what the files hold and how they are compiled.
"""

SOURCE = r"""
/* The compiled code for a CPU: products with packed int4 and bf16 matrices, norms, rotation and attention.

     common.h    bf16, threads, memory, the dot products of a few bf16 rows, the pieces of a softmax
     amx.h       the tile unit (AMX): 16 x 16 products of bf16
     linear.c    bf16 matrices for a few rows, RMS norm, rotary embedding
     experts.c   int4 experts: the format, few rows, many rows by tiles, unpacking for PyTorch's product
     prefill.c   attention of many new tokens
     absorb.c    attention of few new tokens on the latent cache, between the two products of kv_b_proj

   It is one translation unit: scripts/embed_c.py joins the files in this order to the string that kimi_cpu.py compiles on
   the user's machine with -march=native. Everything is static but the functions that kimi_cpu.py calls. They do not check
   their arguments: kimi_cpu.py checks shapes, dtypes and strides. Their results do not depend on the number of threads.
   bf16 arrays may begin at any address that holds a bf16, and nothing outside an array is read. tests/test_csrc.py holds
   all of this to account: with sanitizers, and with pages around each array that no access may touch.

   Three levels, chosen by the compiler's macros: AVX-512 with bf16 dot products (__AVX512BF16__), AMX above it (HAS_AMX),
   and plain loops for every other machine, which the compiler turns into the vectors it has.

   Letters: B sequences, h heads, T new tokens, S tokens in the cache, R rows, N outputs, M inputs, H hidden size, I inner
   size of an expert. Matrices are stored row by row; (N, M) has M numbers side by side. Sums are fp32. */

#ifndef KIMI_COMMON_H
#define KIMI_COMMON_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { MAX_ROWS = 8 };             /* rows that share one pass over a matrix */
enum { PREFETCH_BYTES = 4096 };    /* how far ahead weights are prefetched; past the end of a matrix that does nothing */
enum { NO_MEMORY = 1, BAD_ID = 2 };  /* what a function returns that could not do its work; otherwise 0 */

/* ------------------------------------------------------------------------------------------------- threads and memory */

#ifdef _OPENMP  /* declared here, since a compiler may understand the pragmas and have no omp.h */
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#else
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

typedef struct { long first, last; } range;

/* This thread's share of 0..total. */
static inline range thread_share(long total) {
    long threads = omp_get_num_threads(), thread = omp_get_thread_num();
    range r = {total * thread / threads, total * (thread + 1) / threads};
    return r;
}

/* Memory for free(), at an address that is a multiple of 64. Null means that there is none, also for zero bytes. */
static inline void *allocate(long bytes) { return aligned_alloc(64, ((size_t)bytes + 64) / 64 * 64); }

/* The same in one of several threads, which share `failed`: it becomes NO_MEMORY where the result is null. */
static inline void *allocate_in_thread(long bytes, int *failed) {
    void *memory = allocate(bytes);
    if (!memory) {
        #pragma omp atomic write
        *failed = NO_MEMORY;
    }
    return memory;
}

/* --------------------------------------------------------------------------------------------------------------- bf16 */

typedef uint16_t bf16;                                       /* the upper half of a float */
typedef uint32_t bf16_pair __attribute__((may_alias));       /* two of them, the first one in the lower half */

static inline float to_float(bf16 v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }

static inline bf16 to_bf16(float f) {  /* to nearest, ties to even; NaN stays NaN */
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t nearest = u + 0x7FFF + ((u >> 16) & 1);
    return (bf16)((f != f ? u | 0x400000 : nearest) >> 16);  /* no branch, so that loops become vectors */
}

static inline bf16_pair load_pair(const bf16 *from) { uint32_t u; memcpy(&u, from, 4); return u; }  /* any alignment */

#ifdef __AVX512BF16__
static inline __m512 floats_of(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
static inline __m512 load_floats(const bf16 *from) { return floats_of(_mm256_loadu_si256((const __m256i *)from)); }

/* The mask of the first `count` of 16 lanes, or of all 16. */
static inline __mmask16 first_lanes(long count) {
    return count >= 16 ? 0xFFFF : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}
#endif

/* out[r] = the sum over M of a * x[r]: one row of a matrix times each of `rows` vectors. */
#ifdef __AVX512BF16__
INLINE void dot_bf16_rows(const bf16 *a, const bf16 *const *x, long M, int rows, float *out) {
    __m512 even[MAX_ROWS], odd[MAX_ROWS];
    for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_ps();
    long m = 0;
    for (; m + 64 <= M; m += 64) {
        for (int k = 0; k < 2; k++) _mm_prefetch((const char *)(a + m + 32 * k) + PREFETCH_BYTES, _MM_HINT_T1);
        __m512bh a0 = (__m512bh)_mm512_loadu_si512(a + m), a1 = (__m512bh)_mm512_loadu_si512(a + m + 32);
        for (int r = 0; r < rows; r++) {
            even[r] = _mm512_dpbf16_ps(even[r], a0, (__m512bh)_mm512_loadu_si512(x[r] + m));
            odd[r] = _mm512_dpbf16_ps(odd[r], a1, (__m512bh)_mm512_loadu_si512(x[r] + m + 32));
        }
    }
    for (; m < M; m += 32) {
        __mmask32 live = M - m >= 32 ? 0xFFFFFFFFu : (1u << (M - m)) - 1;
        __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(live, a + m);
        for (int r = 0; r < rows; r++)
            even[r] = _mm512_dpbf16_ps(even[r], v, (__m512bh)_mm512_maskz_loadu_epi16(live, x[r] + m));
    }
    for (int r = 0; r < rows; r++) out[r] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
}

static inline void dot_bf16(const bf16 *a, const bf16 *const *x, long M, int rows, float *out) {
    switch (rows) {  /* a constant number of rows keeps the sums in registers */
        case 1: dot_bf16_rows(a, x, M, 1, out); return;
        case 2: dot_bf16_rows(a, x, M, 2, out); return;
        case 3: dot_bf16_rows(a, x, M, 3, out); return;
        case 4: dot_bf16_rows(a, x, M, 4, out); return;
        default:
            dot_bf16_rows(a, x, M, 4, out);
            dot_bf16(a, x + 4, M, rows - 4, out + 4);
    }
}
#else
static inline void dot_bf16(const bf16 *a, const bf16 *const *x, long M, int rows, float *out) {
    for (int r = 0; r < rows; r++) {
        float sum = 0;
        for (long m = 0; m < M; m++) sum += to_float(a[m]) * to_float(x[r][m]);
        out[r] = sum;
    }
}
#endif

/* ------------------------------------------------------------------------------------------------ pieces of a softmax */

#ifdef __AVX512BF16__
#define LOG2_E 1.44269504f

/* 2^x for x <= 0, relative error 2e-7; 0 for -infinity. */
static inline __m512 exp2_ps(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));  /* 2^-200 is 0 in fp32 */
    __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.54035304e-4f);  /* Taylor series of 2^f, |f| <= 1/2 */
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.33335581e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.61812911e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.55041087e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.40226507e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93147181e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

/* 16 scores times `scale`. Lanes from `count` on, and those that the mask (bytes, or null) hides, become `hidden`. */
static inline __m512 masked_scores(const float *scores, long count, const uint8_t *mask, float scale, float hidden) {
    __mmask16 seen = first_lanes(count);
    if (mask && seen) seen &= _mm_test_epi8_mask(_mm_maskz_loadu_epi8(seen, mask), _mm_set1_epi8(-1));
    return _mm512_mask_mul_ps(_mm512_set1_ps(hidden), seen, _mm512_loadu_ps(scores), _mm512_set1_ps(scale));
}

/* Writes 16 weights 2^x as bf16, zeros in lanes that are not live. Returns them as floats, before they are rounded. */
static inline __m512 store_weights(__m512 x, __mmask16 live, bf16 *weights) {
    __m512 y = _mm512_maskz_mov_ps(live, exp2_ps(x));
    _mm256_storeu_si256((__m256i *)weights, (__m256i)_mm512_cvtneps_pbh(y));
    return y;
}
#endif

#endif

/* The tile unit (AMX). A tile is 16 rows of 64 bytes. One instruction multiplies

     C (16, 16) fp32  +=  A (16, 32) bf16  times  B (16 pairs, 16 columns, 2) bf16

   where the two inputs of a pair are side by side in B. The 32 inputs in a row of A are exactly one group of int4, so an
   expert's weights are unpacked row by row into A, and activations are packed in columns into B. The result has a row for
   each output and a column for each row of activations, which is the order that B needs in the next product.

   There are eight tiles: 0..3 hold sums, a square of 32 x 32, and 4..7 hold the factors. */

#ifndef KIMI_AMX_H
#define KIMI_AMX_H


#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

#define TILES(text) __asm__ volatile(text ::: "memory")
#define TILE_LOAD(tile, base, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile :: "r"((const void *)(base)), "r"((long)(stride)) : "memory")
#define TILE_STORE(tile, base, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" :: "r"((void *)(base)), "r"((long)(stride)) : "memory")
#define TILE_DOT(c, a, b) TILES("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c)
#define TILE_ZERO(tile) TILES("tilezero %%tmm" #tile)

static int has_tiles = 0;

/* Turns the use of tiles on, for which the system's permission is needed, or off. Returns whether they are used. */
int use_tiles(long wanted) {
    return has_tiles = wanted && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

typedef struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } tile_config;

/* Configures this thread for eight tiles of 16 rows of 64 bytes. Returns the configuration before, which another library
   may have made, for `close_tiles`. */
static inline tile_config open_tiles(void) {
    static const tile_config eight = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    tile_config before = {0};
    if (has_tiles) __asm__ volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(before) : "m"(eight));
    return before;
}

static inline void close_tiles(tile_config before) {
    if (has_tiles && before.palette) __asm__ volatile("ldtilecfg %0" :: "m"(before));
    else if (has_tiles) __asm__ volatile("tilerelease");
}
#elif defined(__AVX512BF16__) && defined(AMX_EMULATION)  /* tests/amx_emulation.h: the same names in plain C */
#define HAS_AMX 1
#include AMX_EMULATION
#else
typedef int tile_config;
static inline tile_config open_tiles(void) { return 0; }
static inline void close_tiles(tile_config before) { (void)before; }
#endif

#ifdef HAS_AMX
/* Tiles 0..3 += a0 above a1 times b0 beside b1, or times b0 alone if not `both`. Strides are in bytes, from row to row. */
INLINE void tile_step(const void *a0, const void *a1, long a_stride, const void *b0, const void *b1, long b_stride, int both) {
    TILE_LOAD(4, a0, a_stride); TILE_LOAD(6, b0, b_stride); TILE_DOT(0, 4, 6);
    TILE_LOAD(5, a1, a_stride); TILE_DOT(2, 5, 6);
    if (both) { TILE_LOAD(7, b1, b_stride); TILE_DOT(1, 4, 7); TILE_DOT(3, 5, 7); }
}

/* The same summed over `steps` tiles of each, which are a_step and b_step bytes from each other. */
INLINE void multiply_tiles(const void *a0, const void *a1, long a_step, long a_stride, const void *b0, const void *b1,
                           long b_step, long b_stride, long steps, int both) {
    const char *x0 = a0, *x1 = a1, *y0 = b0, *y1 = b1;
    for (long k = 0; k < steps; k++, x0 += a_step, x1 += a_step, y0 += b_step, y1 += b_step)
        tile_step(x0, x1, a_stride, y0, y1, b_stride, both);
}

static inline void clear_tiles(void) { TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3); }

/* Stores tiles 0..3 as a square with `stride` floats from row to row; the lower two begin `below` floats later. */
static inline void store_tiles(float *to, long below, long stride) {
    TILE_STORE(0, to, stride * 4); TILE_STORE(1, to + 16, stride * 4);
    TILE_STORE(2, to + below, stride * 4); TILE_STORE(3, to + below + 16, stride * 4);
}

/* Transposes 16 x 16 numbers of 32 bits. */
static inline void transpose_16x16(__m512i *row) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            row[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            row[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xDD);
    }
    for (int i = 0; i < 8; i++) {
        row[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        row[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    }
}

/* Reads quarter 0..3 (upper left, upper right, lower left, lower right) of sums (32, 32), transposed. */
static inline void transpose_quarter(float (*sums)[32], int quarter, __m512i *tile) {
    for (int r = 0; r < 16; r++) tile[r] = _mm512_loadu_si512(sums[quarter / 2 * 16 + r] + quarter % 2 * 16);
    transpose_16x16(tile);
}

/* Packs the `count` rows of x (., M) whose numbers are in `rows`, at most 16, for B: columns (M / 2 pairs, 16). The other
   columns become zero. M is a multiple of 32. */
static inline void pack_columns(long M, long count, const bf16 *x, const int64_t *rows, uint32_t *columns) {
    for (long m = 0; m < M; m += 32) {
        __m512i row[16];
        for (int r = 0; r < 16; r++)
            row[r] = r < count ? _mm512_loadu_si512(x + rows[r] * M + m) : _mm512_setzero_si512();
        transpose_16x16(row);
        for (int r = 0; r < 16; r++) _mm512_store_si512(columns + (m / 2 + r) * 16, row[r]);
    }
}
#endif

#endif

/* bf16 matrices for a few rows, RMS norm and rotary embedding. A matrix is read once for up to MAX_ROWS rows. */


/* x (R, M) times the transpose of a (N, M), all bf16, to y (R, N) bf16, or, if y is null, to wide (R, N) fp32. */
void linear_bf16(long R, long N, long M, const bf16 *x, const bf16 *a, bf16 *y, float *wide) {
    for (long first = 0; first < R; first += MAX_ROWS) {
        int rows = R - first < MAX_ROWS ? (int)(R - first) : MAX_ROWS;
        const bf16 *inputs[MAX_ROWS];
        for (int r = 0; r < rows; r++) inputs[r] = x + (first + r) * M;
        #pragma omp parallel for schedule(static)
        for (long n = 0; n < N; n++) {
            float out[MAX_ROWS];
            dot_bf16(a + n * M, inputs, M, rows, out);
            for (int r = 0; r < rows; r++)
                if (y) y[(first + r) * N + n] = to_bf16(out[r]);
                else wide[(first + r) * N + n] = out[r];
        }
    }
}

/* y (R, M) = x / rms(x), rounded, times weight (M), rounded again. */
void rms_norm(long R, long M, float eps, const bf16 *restrict x, const bf16 *restrict weight, bf16 *restrict y) {
    #pragma omp parallel for schedule(static) if (R > 16)
    for (long r = 0; r < R; r++) {
        const bf16 *from = x + r * M;
        bf16 *to = y + r * M;
        float sum = 0;
        for (long m = 0; m < M; m++) sum += to_float(from[m]) * to_float(from[m]);
        float inverse = 1 / sqrtf(sum / M + eps);
        long m = 0;
#ifdef __AVX512BF16__
        for (; m + 16 <= M; m += 16) {
            __m256bh unit = _mm512_cvtneps_pbh(_mm512_mul_ps(load_floats(from + m), _mm512_set1_ps(inverse)));
            __m256bh scaled = _mm512_cvtneps_pbh(_mm512_mul_ps(floats_of((__m256i)unit), load_floats(weight + m)));
            _mm256_storeu_si256((__m256i *)(to + m), (__m256i)scaled);
        }
#endif
        for (; m < M; m++) to[m] = to_bf16(to_float(weight[m]) * to_float(to_bf16(to_float(from[m]) * inverse)));
    }
}

/* Rotates the pairs (x[2j], x[2j + 1]) of x (B, h, T, D) by the angles whose cosines and sines are (B, T, D/2). Strides of
   x are in elements, for B, h and T. out (B, h, T, D) has the first members of all pairs, then the second ones. */
void rotary(long B, long heads, long T, long D, const bf16 *restrict x, const long *stride, const float *restrict cosines,
            const float *restrict sines, bf16 *restrict out) {
    #pragma omp parallel for collapse(3) schedule(static) if (B * heads * T > 256)
    for (long b = 0; b < B; b++)
        for (long h = 0; h < heads; h++)
            for (long t = 0; t < T; t++) {
                const bf16 *from = x + b * stride[0] + h * stride[1] + t * stride[2];
                const float *c = cosines + (b * T + t) * (D / 2), *s = sines + (b * T + t) * (D / 2);
                bf16 *to = out + ((b * heads + h) * T + t) * D;
                for (long j = 0; j < D / 2; j++) {
                    float first = to_float(from[2 * j]), second = to_float(from[2 * j + 1]);
                    to[j] = to_bf16(first * c[j] - second * s[j]);
                    to[D / 2 + j] = to_bf16(second * c[j] + first * s[j]);
                }
            }
}

/* Routed experts with int4 weights: few rows with the words as they are, many rows by tiles, and unpacking for PyTorch's
   own product.

   The format. A matrix (N, M) is stored as words (N, M/8) of 32 bits and scales (N, M/32) in bf16. The code of input m is
   nibble m % 8 of word m // 8, the lowest nibble first; the weight is (code - 8) * scale of its group of 32 inputs.

   How a word becomes numbers. For s = 0..3

     ((word >> 4 s) & 0x000F000F) | 0x43004300

   are two bf16 numbers, 128 + code of nibble s and 128 + code of nibble s + 4: 0x4300 is 128 in bf16, and its last bit
   counts one. So no conversion is needed: AVX-512's bf16 dot product takes them as they are, and 136 times the sum of the
   inputs is subtracted, since code - 8 = (128 + code) - 136. Inputs are arranged in that order beforehand. Sums are fp32. */


typedef struct { const uint32_t *words; const bf16 *scale; } int4_matrix;  /* (N, M/8) and (N, M/32) of each expert */

static inline int4_matrix rows_of(int4_matrix matrix, long row, long M) {
    int4_matrix from_row = {matrix.words + row * (M / 8), matrix.scale + row * (M / 32)};
    return from_row;
}

/* --------------------------------------------------------------------------------------------- products of a few rows */

/* Inputs of one row, arranged: pairs[s * M/8 + w] = (x[8w + s], x[8w + s + 4]), offset[w] = 136 * (sum of word w's inputs). */
typedef struct { uint32_t *pairs; float *offset; } arranged;

/* One of several arranged rows of M inputs. */
static inline arranged arranged_row(arranged all, long row, long M) {
    arranged one = {all.pairs + row * (M / 2), all.offset + row * (M / 8)};
    return one;
}

static void arrange(const bf16 *x, long M, arranged to) {
    long W = M / 8;
    for (long w = 0; w < W; w++) {
        float sum = 0;
        for (int k = 0; k < 8; k++) sum += to_float(x[8 * w + k]);
        to.offset[w] = 136.0f * sum;
        for (int s = 0; s < 4; s++)
            to.pairs[s * W + w] = x[8 * w + s] | ((uint32_t)x[8 * w + s + 4] << 16);
    }
}

/* out[r] = one output of a matrix (M inputs) for each of up to MAX_ROWS arranged rows. */
#ifdef __AVX512BF16__
/* Indices that repeat scales a..a+3 four times each: a group of 32 inputs is 4 words. */
#define SCALE_OF_WORD(a) \
    _mm512_set_epi32(a + 3, a + 3, a + 3, a + 3, a + 2, a + 2, a + 2, a + 2, a + 1, a + 1, a + 1, a + 1, a, a, a, a)

/* total += scale * (the product of a word's 8 weights without scale and their inputs), for each of 16 words from w on. Lanes
   that are not live read no inputs; their words and scales are zero. */
INLINE void step_int4(__m512i word, __m512 scale, long w, long W, __mmask16 live, int rows, const arranged *x, __m512 *total) {
    const __m512i mask = _mm512_set1_epi32(0x000F000F), base = _mm512_set1_epi32(0x43004300);
    __m512bh code[4];
    for (int k = 0; k < 4; k++)  /* 0xEA: (a & b) | c */
        code[k] = (__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi32(word, 4 * k), mask, base, 0xEA);
    for (int r = 0; r < rows; r++) {
        const uint32_t *pairs = x[r].pairs + w;
        __m512 odd = _mm512_setzero_ps(), even = _mm512_sub_ps(odd, _mm512_maskz_loadu_ps(live, x[r].offset + w));
        for (int k = 0; k < 4; k += 2) {
            even = _mm512_dpbf16_ps(even, code[k], (__m512bh)_mm512_maskz_loadu_epi32(live, pairs + k * W));
            odd = _mm512_dpbf16_ps(odd, code[k + 1], (__m512bh)_mm512_maskz_loadu_epi32(live, pairs + (k + 1) * W));
        }
        total[r] = _mm512_fmadd_ps(_mm512_add_ps(even, odd), scale, total[r]);
    }
}

INLINE void dot_int4_rows(int4_matrix a, long M, int rows, const arranged *from, float *out) {
    const __m512i scale_of_word[4] = {SCALE_OF_WORD(0), SCALE_OF_WORD(4), SCALE_OF_WORD(8), SCALE_OF_WORD(12)};
    long W = M / 8, w = 0;
    const uint32_t *words = a.words;
    arranged x[MAX_ROWS];  /* copied, so that the pointers stay in registers */
    __m512 total[MAX_ROWS];
    for (int r = 0; r < rows; r++) x[r] = from[r], total[r] = _mm512_setzero_ps();
    for (; w + 64 <= W; w += 64) {
        for (int k = 0; k < 4; k++) _mm_prefetch((const char *)(words + w + 16 * k) + PREFETCH_BYTES, _MM_HINT_T1);
        __m512 s = load_floats(a.scale + w / 4);
        for (int k = 0; k < 4; k++)
            step_int4(_mm512_loadu_si512(words + w + 16 * k), _mm512_permutexvar_ps(scale_of_word[k], s), w + 16 * k, W, 0xFFFF,
                      rows, x, total);
    }
    for (; w < W; w += 16) {
        __mmask16 live = first_lanes(W - w), groups = first_lanes((W - w) / 4) & 0xF;
        __m512 s = _mm512_permutexvar_ps(scale_of_word[0], floats_of(_mm256_maskz_loadu_epi16(groups, a.scale + w / 4)));
        step_int4(_mm512_maskz_loadu_epi32(live, words + w), s, w, W, live, rows, x, total);
    }
    for (int r = 0; r < rows; r++) out[r] = _mm512_reduce_add_ps(total[r]);
}

static inline void dot_int4(int4_matrix a, long M, int rows, const arranged *x, float *out) {
    switch (rows) {  /* a constant number of rows keeps the sums in registers */
        case 1: dot_int4_rows(a, M, 1, x, out); return;
        case 2: dot_int4_rows(a, M, 2, x, out); return;
        case 3: dot_int4_rows(a, M, 3, x, out); return;
        case 4: dot_int4_rows(a, M, 4, x, out); return;
        default:
            dot_int4_rows(a, M, 4, x, out);
            dot_int4(a, M, rows - 4, x + 4, out + 4);
    }
}
#else
static inline void dot_int4(int4_matrix a, long M, int rows, const arranged *x, float *out) {
    long W = M / 8;
    for (int r = 0; r < rows; r++) {
        float total = 0;
        for (long g = 0; g < W / 4; g++) {
            float sum = 0;
            for (long w = 4 * g; w < 4 * g + 4; w++)
                for (int s = 0; s < 4; s++) {
                    uint32_t pair = x[r].pairs[s * W + w];
                    sum += to_float((bf16)pair) * ((int)((a.words[w] >> 4 * s) & 15) - 8);
                    sum += to_float((bf16)(pair >> 16)) * ((int)((a.words[w] >> (4 * s + 16)) & 15) - 8);
                }
            total += sum * to_float(a.scale[g]);
        }
        out[r] = total;
    }
}
#endif

/* --------------------------------------------------------------------------------------------- all experts of few rows */

/* Sorts P pairs by expert and cuts them into jobs of at most MAX_ROWS pairs of one expert; returns how many. */
static long make_jobs(long P, const int64_t *experts, long *order, long *begin) {
    long jobs = 0;
    for (long p = 0; p < P; p++) {  /* insertion: P is small, and equal experts keep their order */
        long q = p;
        for (; q > 0 && experts[order[q - 1]] > experts[p]; q--) order[q] = order[q - 1];
        order[q] = p;
    }
    for (long p = 0; p < P; p++)
        if (p == 0 || experts[order[p]] != experts[order[p - 1]] || p - begin[jobs - 1] == MAX_ROWS) begin[jobs++] = p;
    begin[jobs] = P;
    return jobs;
}

/* out (R, H) fp32 = for each row the sum over its K choices of weights * down(silu(gate(x)) * up(x)). experts (R, K) are
   places in the stacks, which hold E experts. H and I are multiples of 32. */
int experts_int4_few_rows(long R, long K, long H, long I, long E, const bf16 *x, const int64_t *experts, const float *weights,
                          const uint32_t *gate_words, const bf16 *gate_scale, const uint32_t *up_words, const bf16 *up_scale,
                          const uint32_t *down_words, const bf16 *down_scale, float *out) {
    long P = R * K, jobs;
    int4_matrix gate = {gate_words, gate_scale}, up = {up_words, up_scale}, down = {down_words, down_scale};
    for (long p = 0; p < P; p++)
        if (experts[p] < 0 || experts[p] >= E) return BAD_ID;
    char *memory = allocate(P * 16 + 8 + R * H / 8 * 20 + P * (I * 2 + I / 8 * 20 + H * 4));
    if (!memory) return NO_MEMORY;
    long *order = (long *)memory, *begin = order + P;
    uint32_t *x_pairs = (uint32_t *)(begin + P + 1), *hidden_pairs = x_pairs + R * H / 2;
    float *x_offset = (float *)(hidden_pairs + P * I / 2), *hidden_offset = x_offset + R * H / 8;
    float *parts = hidden_offset + P * I / 8;  /* (P, H) */
    bf16 *hidden = (bf16 *)(parts + P * H);    /* (P, I) */
    arranged all_x = {x_pairs, x_offset}, all_hidden = {hidden_pairs, hidden_offset};
    jobs = make_jobs(P, experts, order, begin);
    #pragma omp parallel
    {
        #pragma omp for schedule(static)
        for (long r = 0; r < R; r++) arrange(x + r * H, H, arranged_row(all_x, r, H));
        #pragma omp for collapse(2) schedule(static)
        for (long j = 0; j < jobs; j++)
            for (long i = 0; i < I; i++) {
                arranged inputs[MAX_ROWS];
                float a[MAX_ROWS], b[MAX_ROWS];
                const long *pairs = order + begin[j];
                int rows = (int)(begin[j + 1] - begin[j]);
                long row = experts[pairs[0]] * I + i;
                for (int r = 0; r < rows; r++) inputs[r] = arranged_row(all_x, pairs[r] / K, H);
                dot_int4(rows_of(gate, row, H), H, rows, inputs, a);
                dot_int4(rows_of(up, row, H), H, rows, inputs, b);
                for (int r = 0; r < rows; r++) hidden[pairs[r] * I + i] = to_bf16(a[r] / (1.0f + expf(-a[r])) * b[r]);
            }
        #pragma omp for schedule(static)
        for (long p = 0; p < P; p++) arrange(hidden + p * I, I, arranged_row(all_hidden, p, I));
        #pragma omp for collapse(2) schedule(static)
        for (long j = 0; j < jobs; j++)
            for (long h = 0; h < H; h++) {
                arranged inputs[MAX_ROWS];
                float y[MAX_ROWS];
                const long *pairs = order + begin[j];
                int rows = (int)(begin[j + 1] - begin[j]);
                for (int r = 0; r < rows; r++) inputs[r] = arranged_row(all_hidden, pairs[r], I);
                dot_int4(rows_of(down, experts[pairs[0]] * H + h, I), I, rows, inputs, y);
                for (int r = 0; r < rows; r++) parts[pairs[r] * H + h] = y[r];
            }
        #pragma omp for schedule(static)
        for (long r = 0; r < R; r++)
            for (long h = 0; h < H; h++) {
                float sum = 0;  /* in the order of the choices, whatever the number of threads */
                for (long k = 0; k < K; k++) sum += weights[r * K + k] * parts[(r * K + k) * H + h];
                out[r * H + h] = sum;
            }
    }
    free(memory);
    return 0;
}

/* ----------------------------------------------------------------------------------------------------------- unpacking */

#ifdef __AVX512BF16__
/* The 4 words of a group to 32 bf16, each (code - 8) * scale rounded once: a table of 16 that the codes choose from. */
static inline __m512i unpack_group(const void *words, float scale) {
    const __m512 codes = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    __m256i table = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codes, _mm512_set1_ps(scale)));
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)words));
    wide = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi32(wide, 12)), _mm512_set1_epi32(0x000F000F));
    return _mm512_permutexvar_epi16(wide, _mm512_castsi256_si512(table));
}
#endif

/* (N, M/8) words and (N, M/32) scales to (N, M) bf16, each (code - 8) * scale rounded once. */
void unpack_int4(long N, long M, const uint32_t *words, const bf16 *scale, bf16 *out) {
    #pragma omp parallel for schedule(static)
    for (long n = 0; n < N; n++)
        for (long g = 0; g < M / 32; g++) {
            const uint8_t *octets = (const uint8_t *)(words + n * (M / 8) + 4 * g);
            bf16 *to = out + n * M + 32 * g;
            float s = to_float(scale[n * (M / 32) + g]);
#ifdef __AVX512BF16__
            _mm512_storeu_si512(to, unpack_group(octets, s));
#else
            for (int b = 0; b < 16; b++) {
                to[2 * b] = to_bf16(((int)(octets[b] & 15) - 8) * s);
                to[2 * b + 1] = to_bf16(((int)(octets[b] >> 4) - 8) * s);
            }
#endif
        }
}

/* ------------------------------------------------------------------------------------- one expert of many rows by tiles */

#ifdef HAS_AMX
/* Two blocks of 16 rows of int4 (M inputs) that are unpacked into 2 * M / 32 tiles, each (code - 8) * scale rounded once.
   This is done in parts of a row between the products of other tiles, since the tile unit and the vector units can work at
   the same time. */
enum { PART_GROUPS = 8 };  /* groups of 32 inputs */
typedef struct {
    int4_matrix from[2];
    bf16 *tiles;
    long M, block, row, group;  /* the next part */
    long parts, steps, due;     /* `parts` parts are spread over `steps` products; a part is due when `due` reaches `steps` */
} unpacking;

/* Elements from one unpacked row to the next: not a multiple of 4096 bytes, of which the cache keeps few. */
static inline long row_stride(long M) { return M + 32; }

static inline void unpack_part(unpacking *u) {
    long groups = u->M / 32, last = u->group + PART_GROUPS < groups ? u->group + PART_GROUPS : groups;
    int4_matrix from = rows_of(u->from[u->block], u->row, u->M);
    bf16 *to = u->tiles + (u->block * 16 + u->row) * row_stride(u->M);
    for (long g = u->group; g < last; g++) {
        if (g % 4 == 0) _mm_prefetch((const char *)(from.words + 4 * g) + PREFETCH_BYTES, _MM_HINT_T1);
        _mm512_store_si512(to + g * 32, unpack_group(from.words + 4 * g, to_float(from.scale[g])));
    }
    u->group = last;
    if (last == groups) { u->group = 0; if (++u->row == 16) { u->row = 0; u->block++; } }
}

static unpacking begin_unpacking(long M, long steps, int4_matrix first, int4_matrix second, bf16 *tiles) {
    unpacking u = {{first, second}, tiles, M, 0, 0, 0, 32 * ((M / 32 + PART_GROUPS - 1) / PART_GROUPS), steps, 0};
    return u;
}

static void finish_unpacking(unpacking *u) { while (u->block < 2) unpack_part(u); }

/* sums (32 outputs, 32 rows) = 32 unpacked rows of weights (M inputs) times a block of 16 columns, or `both` it and the
   next one. Meanwhile the next weights are unpacked. */
static inline void multiply_columns(const bf16 *tiles, const uint32_t *columns, long M, int both, float (*sums)[32],
                                    unpacking *next) {
    const bf16 *a0 = tiles, *a1 = tiles + 16 * row_stride(M);
    const uint32_t *b0 = columns, *b1 = both ? columns + M * 8 : columns;
    clear_tiles();
    for (long k = 0; k < M / 32; k++, a0 += 32, a1 += 32, b0 += 256, b1 += 256) {
        tile_step(a0, a1, 2 * row_stride(M), b0, b1, 64, both);
        for (next->due += next->parts; next->due >= next->steps; next->due -= next->steps)
            if (next->block < 2) unpack_part(next);
    }
    store_tiles(sums[0], 512, 32);
}

static inline __m512 silu_ps(__m512 x) {  /* with e = exp(-|x|): x / (1 + e), or x e / (1 + e) where x is negative */
    __m512 e = exp2_ps(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-LOG2_E)));
    __m512 top = _mm512_mask_mul_ps(x, _mm512_movepi32_mask(_mm512_castps_si512(x)), x, e);
    return _mm512_div_ps(top, _mm512_add_ps(e, _mm512_set1_ps(1)));
}

/* silu(gate) * up of two rows of 16 columns each, as one row of pairs. */
static inline __m512i join_pair(const float *gate, const float *up, long stride) {
    __m512i pair[2];
    for (int i = 0; i < 2; i++) {
        __m512 y = _mm512_mul_ps(silu_ps(_mm512_loadu_ps(gate + i * stride)), _mm512_loadu_ps(up + i * stride));
        pair[i] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(y));
    }
    return _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16));
}

/* Outputs n..last of gate and up, joined, for all blocks: x (., H/2, 16) to hidden (., I/2, 16). */
static void gate_and_up(long n, long last, long blocks, long H, long I, int4_matrix gate, int4_matrix up, const uint32_t *x,
                        uint32_t *hidden, bf16 *tiles) {
    float sums[32][32];  /* gate above up */
    /* One turn more than there are blocks of outputs: those from n - 16 on are multiplied while those from n on are unpacked. */
    for (long first = n, turn = 0; n < last + 16; n += 16, turn ^= 1) {
        long row = n < last ? n : first;  /* in the last turn nothing is unpacked */
        unpacking next = begin_unpacking(H, (blocks + 1) / 2 * (H / 32), rows_of(gate, row, H), rows_of(up, row, H),
                                         tiles + turn * 32 * row_stride(H));
        if (n >= last) next.block = 2;
        for (long b = 0; b < blocks && n > first; b += 2) {
            int both = b + 1 < blocks;
            multiply_columns(tiles + (turn ^ 1) * 32 * row_stride(H), x + b * H * 8, H, both, sums, &next);
            for (int j = 0; j <= both; j++)
                for (int i = 0; i < 16; i += 2)
                    _mm512_store_si512(hidden + (b + j) * I * 8 + (n - 16 + i) / 2 * 16,
                                       join_pair(sums[i] + 16 * j, sums[16 + i] + 16 * j, 32));
        }
        finish_unpacking(&next);
    }
}

/* sums (32 outputs, 32 rows) of the rows from `first` on: out (., H), from output n on, += weight * sum. */
static inline void add_weighted(float (*sums)[32], long first, long rows, long H, long n, const int64_t *row,
                                const float *weights, float *out) {
    for (int i = 0; i < 4; i++) {
        __m512i tile[16];
        transpose_quarter(sums, i, tile);
        for (long r = first + i % 2 * 16, k = 0; k < 16 && r < rows; r++, k++) {
            float *to = out + row[r] * H + n + i / 2 * 16;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(weights[r]), _mm512_castsi512_ps(tile[k]), _mm512_loadu_ps(to)));
        }
    }
}

/* Outputs n..last of down for all rows: out (., H) += weight * down(hidden). */
static void add_down(long n, long last, long rows, long H, long I, int4_matrix down, const uint32_t *hidden, const int64_t *row,
                     const float *weights, float *out, bf16 *tiles) {
    long blocks = (rows + 15) / 16;
    float sums[32][32];
    for (long first = n, turn = 0; n < last + 32; n += 32, turn ^= 1) {
        long next_row = n < last ? n : first;
        unpacking next = begin_unpacking(I, (blocks + 1) / 2 * (I / 32), rows_of(down, next_row, I),
                                         rows_of(down, next_row + 16, I), tiles + turn * 32 * row_stride(I));
        if (n >= last) next.block = 2;
        for (long b = 0; b < blocks && n > first; b += 2) {
            multiply_columns(tiles + (turn ^ 1) * 32 * row_stride(I), hidden + b * I * 8, I, b + 1 < blocks, sums, &next);
            add_weighted(sums, b * 16, rows, H, n - 32, row, weights, out);
        }
        finish_unpacking(&next);
    }
}

/* The expert at `place` of the stacks for `R` rows of x (., H), whose numbers and weights begin at `start`:
   out[row] += weight * down(silu(gate(x[row])) * up(x[row])). H and I are multiples of 32. */
int expert_int4_tiles(long place, long start, long R, long H, long I, const bf16 *x, const int64_t *rows, const float *weights,
                      const uint32_t *gate_words, const bf16 *gate_scale, const uint32_t *up_words, const bf16 *up_scale,
                      const uint32_t *down_words, const bf16 *down_scale, float *out) {
    int4_matrix gate = {gate_words, gate_scale}, up = {up_words, up_scale}, down = {down_words, down_scale};
    gate = rows_of(gate, place * I, H), up = rows_of(up, place * I, H), down = rows_of(down, place * H, I);
    rows += start, weights += start;
    long blocks = (R + 15) / 16, most = H > I ? H : I;
    int failed = 0;
    uint32_t *columns = allocate(blocks * 32 * (H + I)), *hidden;
    if (!columns) return NO_MEMORY;
    hidden = columns + blocks * H * 8;
    #pragma omp parallel
    {
        bf16 *tiles = allocate_in_thread(128 * row_stride(most), &failed);  /* two times 32 rows of weights */
        tile_config before = open_tiles();
        #pragma omp for schedule(static)
        for (long b = 0; b < blocks; b++)
            pack_columns(H, R - 16 * b < 16 ? R - 16 * b : 16, x, rows + 16 * b, columns + b * H * 8);
        range mine = thread_share(I / 16);
        if (tiles) gate_and_up(16 * mine.first, 16 * mine.last, blocks, H, I, gate, up, columns, hidden, tiles);
        #pragma omp barrier
        mine = thread_share(H / 32);
        if (tiles) add_down(32 * mine.first, 32 * mine.last, R, H, I, down, hidden, rows, weights, out, tiles);
        close_tiles(before);
        free(tiles);
    }
    free(columns);
    return failed;
}
#endif

/* Attention of many new tokens, for bf16 keys and values made from the latents. For Q_ROWS queries and KEYS keys at a time:

     scores (Q_ROWS, KEYS)   q (Q_ROWS, dn + dr) times packed keys, fp32
     p = 2^(scores - largest so far), bf16; each row keeps its largest score and its sum of p, fp32
     out (Q_ROWS, dv)       out * 2^(largest before - largest so far) + p times packed values, fp32

   Packed means in panels of PANEL columns, with the two inputs of a bf16 dot product side by side: (depth / 2, PANEL, 2).
   For keys a column is a key and the depth is dn + dr; for values a column is one of dv and the depth is the keys. */


#ifdef __AVX512BF16__
enum { PANEL = 64, SUM_ROWS = 6, Q_ROWS = 96, KEYS = 256 };  /* Q_ROWS is a multiple of SUM_ROWS and of 32 */

/* c (SUM_ROWS, PANEL) fp32 = or += a (SUM_ROWS, 2 pairs) times b, a packed panel. The sums stay in 24 registers. */
INLINE void multiply_6x64(const bf16_pair *a, long a_stride, const uint32_t *b, long pairs, float *c, long c_stride, int add) {
    __m512 sum[SUM_ROWS][4];
    for (int r = 0; r < SUM_ROWS; r++)
        for (int v = 0; v < 4; v++) sum[r][v] = add ? _mm512_loadu_ps(c + r * c_stride + 16 * v) : _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512bh column[4];
        for (int v = 0; v < 4; v++) column[v] = (__m512bh)_mm512_loadu_si512(b + k * PANEL + 16 * v);
        for (int r = 0; r < SUM_ROWS; r++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)a[r * a_stride + k]);
            for (int v = 0; v < 4; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, column[v]);
        }
    }
    for (int r = 0; r < SUM_ROWS; r++)
        for (int v = 0; v < 4; v++) _mm512_storeu_ps(c + r * c_stride + 16 * v, sum[r][v]);
}

/* c (rows, PANEL) fp32 = or += a (rows, pairs) times b, a packed panel. `rows` is a multiple of 32; up to Q_ROWS rows may be
   read and written, since SUM_ROWS does not divide 32. */
static void multiply_panel(const bf16_pair *a, long a_stride, const uint32_t *b, long pairs, float *c, long c_stride, long rows,
                           int add) {
#ifdef HAS_AMX
    if (has_tiles && pairs % 16 == 0) {
        for (long r = 0; r < rows; r += 32)
            for (long v = 0; v < PANEL; v += 32) {
                float *to = c + r * c_stride + v;
                if (add) {
                    TILE_LOAD(0, to, c_stride * 4); TILE_LOAD(1, to + 16, c_stride * 4);
                    TILE_LOAD(2, to + 16 * c_stride, c_stride * 4); TILE_LOAD(3, to + 16 * c_stride + 16, c_stride * 4);
                } else clear_tiles();
                multiply_tiles(a + r * a_stride, a + (r + 16) * a_stride, 64, a_stride * 4, b + v, b + v + 16, 16 * PANEL * 4,
                               PANEL * 4, pairs / 16, 1);
                store_tiles(to, 16 * c_stride, c_stride);
            }
        return;
    }
#endif
    for (long r = 0; r < rows; r += SUM_ROWS)
        multiply_6x64(a + r * a_stride, a_stride, b, pairs, c + r * c_stride, c_stride, add);
}

/* Turns one row's scores (KEYS) into weights p. Keys from `seen` on, and those that the mask hides, get zero. Updates the
   row's largest score and its sum of weights, and returns the factor that its output so far is to be multiplied by. */
static inline float online_softmax(const float *scores, long seen, const uint8_t *mask, float scale, float *top, float *sum,
                                   bf16 *p) {
    __m512 most = _mm512_set1_ps(*top), x[KEYS / 16], total = _mm512_setzero_ps();
    for (int i = 0; i < KEYS / 16; i++) {
        x[i] = masked_scores(scores + 16 * i, seen - 16 * i, mask ? mask + 16 * i : NULL, scale, -INFINITY);
        most = _mm512_max_ps(most, x[i]);
    }
    float now = _mm512_reduce_max_ps(most), before = *top;
    for (int i = 0; i < KEYS / 16; i++) {
        __mmask16 live = _mm512_cmp_ps_mask(x[i], _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        total = _mm512_add_ps(total, store_weights(_mm512_sub_ps(x[i], _mm512_set1_ps(now)), live, p + 16 * i));
    }
    float factor = exp2f(before - now);
    *top = now;
    *sum = *sum * factor + _mm512_reduce_add_ps(total);
    return factor;
}

typedef struct { long T, S, D, V, offset; float scale; } attention_shape;  /* D is dn + dr, V is dv */

/* Whether no row of the mask, of `live` keys each, shows a key. */
static inline int hides_all(const uint8_t *mask, long stride, long rows, long live) {
    for (long r = 0; r < rows; r++)
        if (memchr(mask + r * stride, 1, (size_t)live)) return 0;
    return 1;
}

/* The workspace of one thread, in floats: scores, outputs, largest scores, sums, weights p, and q. */
static inline long attention_workspace(long D, long V) { return Q_ROWS * (KEYS + V + 2 + KEYS / 2 + D / 2); }

/* Queries first..last of one head, which are q at the end of the workspace, with zeros up to Q_ROWS. Writes their rows of
   out, `out_stride` elements from each other. */
static void attend_rows(attention_shape n, long first, long last, const uint32_t *keys, const uint32_t *values,
                        const uint8_t *mask, float *workspace, bf16 *out, long out_stride) {
    float *scores = workspace, *sums = scores + Q_ROWS * KEYS, *top = sums + Q_ROWS * n.V, *total = top + Q_ROWS;
    bf16_pair *p = (bf16_pair *)(total + Q_ROWS), *q = p + Q_ROWS * (KEYS / 2);
    long rows = (last - first + 31) / 32 * 32, end = n.offset < 0 ? n.S : n.offset + last;
    if (end > n.S) end = n.S;
    memset(sums, 0, Q_ROWS * n.V * sizeof(float));
    memset(p, 0, Q_ROWS * KEYS * sizeof(bf16));
    for (long r = 0; r < Q_ROWS; r++) { top[r] = -3e38f; total[r] = 0; }
    for (long at = 0; at < end; at += KEYS) {
        long live = end - at < KEYS ? end - at : KEYS, panels = (live + PANEL - 1) / PANEL;
        if (mask && hides_all(mask + first * n.S + at, n.S, last - first, live)) continue;
        for (long j = 0; j < panels; j++)
            multiply_panel(q, n.D / 2, keys + (at / PANEL + j) * (n.D / 2) * PANEL, n.D / 2, scores + j * PANEL, KEYS, rows, 0);
        for (long r = 0; r < last - first; r++) {
            long seen = n.offset < 0 ? live : n.offset + first + r + 1 - at;
            if (seen > live) seen = live;
            float factor = online_softmax(scores + r * KEYS, seen, mask ? mask + (first + r) * n.S + at : NULL, n.scale,
                                          top + r, total + r, (bf16 *)(p + r * (KEYS / 2)));
            if (factor != 1.0f)
                for (float *to = sums + r * n.V; to < sums + (r + 1) * n.V; to += 16)
                    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(factor)));
        }
        for (long v = 0; v < n.V; v += PANEL)
            multiply_panel(p, KEYS / 2, values + ((v / PANEL) * ((n.S + KEYS - 1) / KEYS * KEYS) + at) / 2 * PANEL,
                           (live + 31) / 32 * 16, sums + v, n.V, rows, 1);
    }
    for (long r = 0; r < last - first; r++) {
        float inverse = total[r] > 0 ? 1 / total[r] : 0;
        for (long v = 0; v < n.V; v++) out[r * out_stride + v] = to_bf16(sums[r * n.V + v] * inverse);
    }
}

/* Keys at..at + KEYS of one head, packed: keys from k_nope and k_pe, and values. What is beyond S is zero. */
static void pack_block(long at, long S, long dn, long dr, long dv, const bf16 *kv, long kv_stride, const bf16 *k_pe,
                       long k_pe_stride, uint32_t *keys, uint32_t *values) {
    long pairs = (dn + dr) / 2, rounded = (S + KEYS - 1) / KEYS * KEYS;
    for (long s = at; s < at + KEYS; s++) {
        uint32_t *to = keys + (s / PANEL) * pairs * PANEL + s % PANEL;
        const bf16 *nope = kv + s * kv_stride, *pe = k_pe + s * k_pe_stride;
        for (long d = 0; d < dn / 2; d++) to[d * PANEL] = s < S ? load_pair(nope + 2 * d) : 0;
        for (long d = 0; d < dr / 2; d++) to[(dn / 2 + d) * PANEL] = s < S ? load_pair(pe + 2 * d) : 0;
    }
    for (long s = at; s < at + KEYS; s += 2) {
        const bf16 *one = kv + s * kv_stride + dn, *two = one + kv_stride;
        for (long v = 0; v < dv; v++)
            values[((v / PANEL) * rounded + s) / 2 * PANEL + v % PANEL] =
                (s < S ? one[v] : 0u) | ((s + 1 < S ? two[v] : 0u) << 16);
    }
}

/* Attention of one layer, or of some of its heads. q_nope (B, h, T, dn), q_pe (B, h, T, dr), kv (B, h, S, dn + dv), k_pe
   (B, 1, S, dr) and out (B, h, T, dv) with strides (batch, head, token) in elements; mask (B or 1, T, S) bytes or null,
   mask_batch bytes from sequence to sequence. Query t sees keys up to offset + t, or all if offset is negative; one that
   sees none gets zeros. dn and dr are even, dv is a multiple of 64. */
int prefill_attention(long B, long heads, long T, long S, long dn, long dr, long dv, long offset, float scale,
                      const bf16 *q_nope, const long *nope_strides, const bf16 *q_pe, const long *pe_strides,
                      const bf16 *kv, const long *kv_strides, const bf16 *k_pe, const long *k_pe_strides,
                      const uint8_t *mask, long mask_batch, bf16 *out, const long *out_strides) {
    long blocks = (S + KEYS - 1) / KEYS, rounded = blocks * KEYS, D = dn + dr, parts = (T + Q_ROWS - 1) / Q_ROWS;
    long per_head = rounded * (D + dv) / 2;
    int failed = 0;
    attention_shape n = {T, S, D, dv, offset, scale * LOG2_E};
    uint32_t *packed = allocate(B * heads * per_head * 4);
    if (!packed) return NO_MEMORY;
    #pragma omp parallel
    {
        float *workspace = allocate_in_thread(attention_workspace(D, dv) * 4, &failed);
        tile_config before = open_tiles();
        #pragma omp for collapse(2) schedule(static)
        for (long head = 0; head < B * heads; head++)
            for (long k = 0; k < blocks; k++) {
                long b = head / heads, h = head % heads;
                uint32_t *keys = packed + head * per_head;
                pack_block(k * KEYS, S, dn, dr, dv, kv + b * kv_strides[0] + h * kv_strides[1], kv_strides[2],
                           k_pe + b * k_pe_strides[0], k_pe_strides[2], keys, keys + rounded * D / 2);
            }
        #pragma omp for collapse(2) schedule(dynamic)
        for (long head = 0; head < B * heads; head++)
            for (long part = 0; part < parts; part++) {
                if (!workspace) continue;
                long b = head / heads, h = head % heads, first = (parts - 1 - part) * Q_ROWS;  /* the longest first */
                long last = first + Q_ROWS < T ? first + Q_ROWS : T;
                bf16 *q = (bf16 *)(workspace + attention_workspace(0, dv));
                const bf16 *nope = q_nope + b * nope_strides[0] + h * nope_strides[1];
                const bf16 *pe = q_pe + b * pe_strides[0] + h * pe_strides[1];
                uint32_t *keys = packed + head * per_head;
                for (long t = first; t < last; t++) {
                    memcpy(q + (t - first) * D, nope + t * nope_strides[2], dn * sizeof(bf16));
                    memcpy(q + (t - first) * D + dn, pe + t * pe_strides[2], dr * sizeof(bf16));
                }
                memset(q + (last - first) * D, 0, (first + Q_ROWS - last) * D * sizeof(bf16));
                attend_rows(n, first, last, keys, keys + rounded * D / 2, mask ? mask + b * mask_batch : NULL, workspace,
                            out + b * out_strides[0] + h * out_strides[1] + first * out_strides[2], out_strides[2]);
            }
        close_tiles(before);
        free(workspace);
    }
    free(packed);
    return failed;
}
#endif

/* Absorbed attention of few new tokens. kv_b_proj holds for each head a matrix for keys (UK) above one for values (UV).
   q_nope is multiplied by UK and attends to the latents as they are cached; the weighted sum of latents is multiplied by
   UV. The cache is cut into blocks of keys, which threads share; each block yields its largest score, its sum of weights
   and its weighted sum of latents, and these are merged in order, so the result does not depend on the number of threads. */


enum { MAX_LATENT = 4096 };  /* C at most */
#define HIDDEN_SCORE -3e38f  /* finite, so that a row that sees nothing is not NaN */

/* ------------------------------------------------------------------------------------------- one block with plain vectors */

/* out (C) += p * row (C) */
static inline void add_scaled(float *out, float p, const bf16 *row, long C) {
    #pragma omp simd
    for (long c = 0; c < C; c++) out[c] += p * to_float(row[c]);
}

/* Vectors of the compiler, as wide as the registers, since it takes wider ones apart badly; at any address. */
#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float float_lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t word_lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t bf16_lanes __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* out (n, 2 * LANES of C) = sum over the keys of weight * latent, n <= 4 rows with their sums in registers. */
INLINE void weighted_sum_tile(int n, long keys, const float *weights, const bf16 *latent, long stride, float *out, long C) {
    float_lanes sum[4][2];
    for (int i = 0; i < n; i++) sum[i][0] = sum[i][1] = (float_lanes){0};
    for (long s = 0; s < keys; s++) {
        float_lanes c[2];
        for (int v = 0; v < 2; v++)
            c[v] = (float_lanes)(__builtin_convertvector(*(const bf16_lanes *)(latent + s * stride + LANES * v), word_lanes) << 16);
        for (int i = 0; i < n; i++)
            for (int v = 0; v < 2; v++) sum[i][v] += weights[i * keys + s] * c[v];
    }
    for (int i = 0; i < n; i++)
        for (int v = 0; v < 2; v++) *(float_lanes *)(out + i * C + LANES * v) = sum[i][v];
}

/* out (rows, C) = weights (rows, keys) times latent (keys, C). */
static void weighted_sum(long rows, long keys, const float *weights, const bf16 *latent, long stride, float *out, long C) {
    long c = 0;
    for (; c + 2 * LANES <= C; c += 2 * LANES)
        for (long r = 0; r < rows; r += 4) {
            const float *w = weights + r * keys;
            float *to = out + r * C + c;
            if (rows - r >= 4) weighted_sum_tile(4, keys, w, latent + c, stride, to, C);
            else if (rows - r == 3) weighted_sum_tile(3, keys, w, latent + c, stride, to, C);
            else if (rows - r == 2) weighted_sum_tile(2, keys, w, latent + c, stride, to, C);
            else weighted_sum_tile(1, keys, w, latent + c, stride, to, C);
        }
    for (; c < C; c++)
        for (long r = 0; r < rows; r++) {
            float sum = 0;
            for (long s = 0; s < keys; s++) sum += weights[r * keys + s] * to_float(latent[s * stride + c]);
            out[r * C + c] = sum;
        }
}

typedef struct { long T, C, D; float scale; } absorb_shape;
typedef struct {
    const bf16 *latent, *k_pe;
    long latent_stride, k_pe_stride;
    const uint8_t *mask;  /* or null */
    long mask_stride;
} cache_rows;

/* Keys first..last for the rows (heads and new tokens) of one sequence, q (rows, C) and q_pe (rows, D). Writes each row's
   largest score, its sum of weights e^(score - largest), and out (rows, C), its weighted sum of latents. */
static void attend_block(absorb_shape n, long rows, long first, long last, const bf16 *q, const bf16 *q_pe, cache_rows cache,
                         float *top, float *sum, float *out, float *scores) {
    for (long s = first; s < last; s++)
        for (long r = 0; r < rows; r += MAX_ROWS) {
            int count = rows - r < MAX_ROWS ? (int)(rows - r) : MAX_ROWS;
            const bf16 *at[MAX_ROWS], *at_pe[MAX_ROWS];
            float a[MAX_ROWS], b[MAX_ROWS];
            for (int i = 0; i < count; i++) { at[i] = q + (r + i) * n.C; at_pe[i] = q_pe + (r + i) * n.D; }
            dot_bf16(cache.latent + s * cache.latent_stride, at, n.C, count, a);
            dot_bf16(cache.k_pe + s * cache.k_pe_stride, at_pe, n.D, count, b);
            for (int i = 0; i < count; i++) {
                int seen = !cache.mask || cache.mask[((r + i) % n.T) * cache.mask_stride + s];
                scores[(r + i) * (last - first) + s - first] = seen ? (a[i] + b[i]) * n.scale : HIDDEN_SCORE;
            }
        }
    for (long r = 0; r < rows; r++) {
        float *row = scores + r * (last - first), most = HIDDEN_SCORE, total = 0;
        for (long s = 0; s < last - first; s++) most = row[s] > most ? row[s] : most;
        for (long s = 0; s < last - first; s++) total += row[s] = expf(row[s] - most);
        top[r] = most; sum[r] = total;
    }
    weighted_sum(rows, last - first, scores, cache.latent + first * cache.latent_stride, cache.latent_stride, out, n.C);
}

/* -------------------------------------------------------------------------------------------------- one block with tiles */

#ifdef HAS_AMX
enum { PACKED_KEYS = 128 };  /* keys whose latents are packed at once */

/* Elements from the tiles of 16 columns to those of the next 16: not a multiple of 4096 bytes, of which the cache keeps few. */
static inline long column_stride(long keys) { return keys * 16 + 32; }

/* bf16 elements of one thread's scratch memory for blocks of `block` keys: packed latents, the last keys, weights p. */
static inline long tile_scratch(long C, long D, long groups, long block) {
    return C / 16 * column_stride(PACKED_KEYS) + 32 * (C + D) + groups * 16 * block;
}

/* Packs `live` rows of (., C) with a stride for B, two keys side by side: tiles (C / 16, keys / 32) of 16 pairs of keys and 16
   columns, with zeros for keys from `live` on. */
static void pack_values(const bf16 *rows, long stride, long live, long keys, long C, bf16 *tiles) {
    __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                   39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (long i = 0; i < keys / 2; i++)
        for (long c = 0; c < C; c += 32) {
            const bf16 *from = rows + 2 * i * stride + c;
            __m512i first = 2 * i < live ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
            __m512i second = 2 * i + 1 < live ? _mm512_loadu_si512(from + stride) : _mm512_setzero_si512();
            bf16 *to = tiles + c / 16 * column_stride(keys) + i * 32;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(first, low, second));
            _mm512_store_si512(to + column_stride(keys), _mm512_permutex2var_epi16(first, high, second));
        }
}

/* Turns the scores of one row into weights p = e^(score - largest) in bf16, with zeros from `keys` to `padded`. Hidden keys
   get HIDDEN_SCORE. */
static void softmax_row(long keys, long padded, float *scores, const uint8_t *mask, float scale, float *top, float *sum,
                        bf16 *p) {
    __m512 most = _mm512_set1_ps(HIDDEN_SCORE), total = _mm512_setzero_ps();
    for (long s = 0; s < keys; s += 16) {
        __m512 x = masked_scores(scores + s, keys - s, mask ? mask + s : NULL, scale, HIDDEN_SCORE);
        _mm512_storeu_ps(scores + s, x);
        most = _mm512_max_ps(most, x);
    }
    *top = _mm512_reduce_max_ps(most);
    for (long s = 0; s < padded; s += 16) {
        __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + s), _mm512_set1_ps(*top)), _mm512_set1_ps(LOG2_E));
        total = _mm512_add_ps(total, store_weights(x, first_lanes(keys - s), p + s));
    }
    *sum = _mm512_reduce_add_ps(total);
}

/* scores (rows, padded) of the keys of one block by tiles, `groups` groups of 16 rows. q holds the rows as columns, those for
   the latents first, then those for k_pe. Keys are the rows of A as they are cached, 32 at a time; fewer than 32 last ones
   are copied to `end` first. */
static void score_tiles(absorb_shape n, long groups, long keys, long padded, const uint32_t *q, const bf16 *latent,
                        const bf16 *k_pe, cache_rows cache, float *scores, bf16 *end) {
    float sums[32][32];  /* keys, rows */
    bf16 *end_pe = end + 32 * n.C;
    for (long s = 0; s < keys; s += 32) {
        const bf16 *k = latent + s * cache.latent_stride, *pe = k_pe + s * cache.k_pe_stride;
        long stride = cache.latent_stride, pe_stride = cache.k_pe_stride;
        if (s + 32 > keys) {  /* memory beyond the last key must not be read */
            memset(end, 0, 64 * (n.C + n.D));
            for (long i = 0; s + i < keys; i++) {
                memcpy(end + i * n.C, k + i * stride, 2 * n.C);
                memcpy(end_pe + i * n.D, pe + i * pe_stride, 2 * n.D);
            }
            k = end, stride = n.C, pe = end_pe, pe_stride = n.D;
        }
        for (long g = 0; g < groups; g += 2) {
            int both = g + 1 < groups;
            const uint32_t *q0 = q + g * 8 * (n.C + n.D), *q1 = both ? q0 + 8 * (n.C + n.D) : q0;
            clear_tiles();
            multiply_tiles(k, k + 16 * stride, 64, 2 * stride, q0, q1, 1024, 64, n.C / 32, both);
            multiply_tiles(pe, pe + 16 * pe_stride, 64, 2 * pe_stride, q0 + 8 * n.C, q1 + 8 * n.C, 1024, 64, n.D / 32, both);
            store_tiles(sums[0], 512, 32);
            for (int i = 0; i < 4; i++) {
                if (i % 2 && !both) continue;
                __m512i tile[16];
                transpose_quarter(sums, i, tile);
                for (int r = 0; r < 16; r++)
                    _mm512_storeu_si512(scores + ((g + i % 2) * 16 + r) * padded + s + i / 2 * 16, tile[r]);
            }
        }
    }
}

/* out (16 groups, C) = or += p times packed values. p (16 groups, `now` keys) has `padded` elements from row to row. */
static void add_values(long groups, long C, long now, long padded, const bf16 *p, const bf16 *values, float *out, int add) {
    long stride = column_stride(now);
    for (long g = 0; g < groups; g++)
        for (long c = 0; c < C; c += 64) {
            float *to = out + g * 16 * C + c;
            const bf16 *a = p + g * 16 * padded, *b = values + c / 16 * stride;
            if (add) {
                TILE_LOAD(0, to, 4 * C); TILE_LOAD(1, to + 16, 4 * C); TILE_LOAD(2, to + 32, 4 * C); TILE_LOAD(3, to + 48, 4 * C);
            } else clear_tiles();
            for (long k = 0; k < now / 32; k++, a += 32, b += 512) {
                TILE_LOAD(4, a, 2 * padded);
                TILE_LOAD(6, b, 64); TILE_DOT(0, 4, 6);
                TILE_LOAD(7, b + stride, 64); TILE_DOT(1, 4, 7);
                TILE_LOAD(6, b + 2 * stride, 64); TILE_DOT(2, 4, 6);
                TILE_LOAD(7, b + 3 * stride, 64); TILE_DOT(3, 4, 7);
            }
            TILE_STORE(0, to, 4 * C); TILE_STORE(1, to + 16, 4 * C); TILE_STORE(2, to + 32, 4 * C); TILE_STORE(3, to + 48, 4 * C);
        }
}

/* As attend_block, by tiles. scores (rows, padded) and out (rows, C) have room for a multiple of 16 rows. */
static void attend_block_tiles(absorb_shape n, long rows, long first, long last, const uint32_t *q, cache_rows cache,
                               float *top, float *sum, float *out, float *scores, bf16 *scratch) {
    long keys = last - first, padded = (keys + 31) / 32 * 32, groups = (rows + 15) / 16;
    bf16 *values = scratch, *end = values + n.C / 16 * column_stride(PACKED_KEYS), *p = end + 32 * (n.C + n.D);
    const bf16 *latent = cache.latent + first * cache.latent_stride, *k_pe = cache.k_pe + first * cache.k_pe_stride;
    score_tiles(n, groups, keys, padded, q, latent, k_pe, cache, scores, end);
    for (long r = 0; r < rows; r++)
        softmax_row(keys, padded, scores + r * padded, cache.mask ? cache.mask + (r % n.T) * cache.mask_stride + first : NULL,
                    n.scale, top + r, sum + r, p + r * padded);
    memset(p + rows * padded, 0, 2 * (groups * 16 - rows) * padded);
    for (long s = 0; s < keys; s += PACKED_KEYS) {
        long now = padded - s < PACKED_KEYS ? padded - s : PACKED_KEYS;
        pack_values(latent + s * cache.latent_stride, cache.latent_stride, keys - s < now ? keys - s : now, now, n.C, values);
        add_values(groups, n.C, now, padded, p + s, values, out, s > 0);
    }
}

/* Packs the 16 rows of one group, q (., C) and q_pe (., D), as columns. */
static void pack_queries(absorb_shape n, long group, long rows, const bf16 *q, const bf16 *q_pe, uint32_t *columns) {
    int64_t number[16];
    for (int i = 0; i < 16; i++) number[i] = group * 16 + i;
    long live = rows - group * 16 < 16 ? rows - group * 16 : 16;
    pack_columns(n.C, live, q, number, columns + group * 8 * (n.C + n.D));
    pack_columns(n.D, live, q_pe, number, columns + group * 8 * (n.C + n.D) + 8 * n.C);
}
#endif

/* ------------------------------------------------------------------------------------------------------------- the layer */

/* One row of q_nope (dn) through UK (dn, C), rounded to bf16. */
static void absorb_query(long dn, long C, const bf16 *q_nope, const bf16 *up_k, bf16 *q) {
    float sums[MAX_LATENT];
    memset(sums, 0, C * sizeof(float));
    for (long d = 0; d < dn; d++) add_scaled(sums, to_float(q_nope[d]), up_k + d * C, C);
    for (long c = 0; c < C; c++) q[c] = to_bf16(sums[c]);
}

/* Keys of one block of S: 128, and more of them where there would be more than 64 blocks. A multiple of 32. */
static inline long block_of(long S) { return (S + 63) / 64 > 128 ? ((S + 63) / 64 + 31) / 32 * 32 : 128; }

/* Merges the blocks of one row and multiplies the result by UV (dv, C) to out (dv). The part of a block, `per_block` floats,
   holds the largest score and the sum of each row, then each row's weighted sum of latents (C). */
static void merge_row(long blocks, long per_block, long rows, long r, long C, long dv, const float *parts, const bf16 *up_v,
                      bf16 *out) {
    float sums[MAX_LATENT], most = HIDDEN_SCORE, total = 0;
    bf16 mixed[MAX_LATENT];
    const bf16 *at = mixed;
    for (long k = 0; k < blocks; k++) most = parts[k * per_block + r] > most ? parts[k * per_block + r] : most;
    memset(sums, 0, C * sizeof(float));
    for (long k = 0; k < blocks; k++) {
        const float *part = parts + k * per_block;
        float weight = expf(part[r] - most);
        total += weight * part[rows + r];
        for (long c = 0; c < C; c++) sums[c] += weight * part[2 * rows + r * C + c];
    }
    for (long c = 0; c < C; c++) mixed[c] = to_bf16(sums[c] / total);
    for (long v = 0; v < dv; v++) {
        float y;
        dot_bf16(up_v + v * C, &at, C, 1, &y);
        out[v] = to_bf16(y);
    }
}

/* Absorbed attention of one layer. q_nope (B, h, T, dn), q_pe (B, h, T, D), up (h, dn + dv, C), latent (B, S, C) and k_pe
   (B, S, D) with strides in elements from sequence to sequence and from token to token, mask (B or 1, T, S) bytes or null,
   mask_batch bytes from sequence to sequence; out (B, T, h, dv). C is at most MAX_LATENT, S at least 1. A query whose
   keys are all hidden gets the mean of all values. */
int absorb(long B, long heads, long T, long S, long dn, long dv, long C, long D, float scale,
           const bf16 *q_nope, const bf16 *q_pe, const bf16 *up, const bf16 *latent, long latent_batch, long latent_stride,
           const bf16 *k_pe, long k_pe_batch, long k_pe_stride, const uint8_t *mask, long mask_batch, bf16 *out) {
    long rows = heads * T, block = block_of(S), blocks = (S + block - 1) / block;
    long groups = (rows + 15) / 16, per_block = groups * 16 * (C + 2 + block);
    absorb_shape n = {T, C, D, scale};
    int failed = 0;
    float *memory = allocate(B * blocks * per_block * 4 + B * rows * C * 2);
    if (!memory) return NO_MEMORY;
    bf16 *q = (bf16 *)(memory + B * blocks * per_block);
#ifdef HAS_AMX
    int tiles = has_tiles && C % 64 == 0 && D % 32 == 0;
    uint32_t *columns = tiles ? allocate(B * groups * 32 * (C + D)) : NULL;
    if (tiles && !columns) { free(memory); return NO_MEMORY; }
#endif
    #pragma omp parallel
    {
        #pragma omp for schedule(static)
        for (long row = 0; row < B * rows; row++)
            absorb_query(dn, C, q_nope + row * dn, up + row % rows / T * (dn + dv) * C, q + row * C);
#ifdef HAS_AMX
        bf16 *scratch = tiles ? allocate_in_thread(2 * tile_scratch(C, D, groups, block), &failed) : NULL;
        tile_config before = open_tiles();
        #pragma omp for schedule(static)
        for (long i = 0; i < (tiles ? B * groups : 0); i++)
            pack_queries(n, i % groups, rows, q + i / groups * rows * C, q_pe + i / groups * rows * D,
                         columns + i / groups * groups * 8 * (C + D));
#endif
        #pragma omp for collapse(2) schedule(static)
        for (long b = 0; b < B; b++)
            for (long k = 0; k < blocks; k++) {
                float *part = memory + (b * blocks + k) * per_block, *mixed = part + 2 * rows, *scores = mixed + groups * 16 * C;
                long first = k * block, last = first + block < S ? first + block : S;
                cache_rows cache = {latent + b * latent_batch, k_pe + b * k_pe_batch, latent_stride, k_pe_stride,
                                    mask ? mask + b * mask_batch : NULL, S};
#ifdef HAS_AMX
                if (scratch)
                    attend_block_tiles(n, rows, first, last, columns + b * groups * 8 * (C + D), cache, part, part + rows, mixed,
                                       scores, scratch);
                if (tiles) continue;
#endif
                attend_block(n, rows, first, last, q + b * rows * C, q_pe + b * rows * D, cache, part, part + rows, mixed, scores);
            }
#ifdef HAS_AMX
        close_tiles(before);
        free(scratch);
#endif
        #pragma omp for schedule(static)
        for (long row = 0; row < B * rows; row++) {
            long b = row / rows, h = row % rows / T, t = row % T;
            merge_row(blocks, per_block, rows, row % rows, C, dv, memory + b * blocks * per_block,
                      up + (h * (dn + dv) + dn) * C, out + ((b * T + t) * heads + h) * dv);
        }
    }
    free(memory);
#ifdef HAS_AMX
    free(columns);
#endif
    return failed;
}
"""
