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
