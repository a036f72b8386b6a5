"""The C that `kimi_cpu.py` compiles, from single products to whole layers.

How a word becomes numbers. The code of input m is nibble m % 8 of word m // 8. For s = 0..3

    ((word >> 4 s) & 0x000F000F) | 0x43004300

are two bf16 numbers, 128 + code of nibble s and 128 + code of nibble s + 4: 0x4300 is 128 in bf16, where the last bit
counts one. So no conversion is needed: AVX-512's bf16 dot product takes them as they are, and 136 times the sum of the
inputs is taken off afterwards, since code - 8 = (128 + code) - 136. Inputs are laid out in that order beforehand. Sums are
fp32, and each group of 32 inputs is scaled as a whole.

Machines without AVX-512 bf16 get the same loops in plain C, for the compiler to vectorise.

Many rows of an expert, and attention, multiply tiles of AMX where the machine has them: C (16, 16) fp32
+= A (16, 32) bf16 times B (16 pairs, 16, 2) bf16. The 32 inputs of one row of A are just one group of int4, so weights are
unpacked row by row into A, and outputs come out transposed, which is the form that B wants of the next product.
"""

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef uint16_t bf16;
enum { TILE = 8 };  /* rows that share one look at a matrix */
enum { AHEAD = 4096 };  /* bytes: where weights are asked for in advance; past the end is harmless */

static inline float widen(bf16 v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }

static inline bf16 narrow(float f) {  /* to nearest, ties to even; NaN stays NaN */
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t nearest = u + 0x7FFF + ((u >> 16) & 1);
    return (bf16)((f != f ? u | 0x400000 : nearest) >> 16);  /* no branch, so that loops become vectors */
}

#ifdef _OPENMP
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

typedef struct { long first, last; } range;

/* What this thread does of `all` pieces of work. */
static inline range share_of(long all) {
    long threads = omp_get_num_threads(), mine = omp_get_thread_num();
    range r = {all * mine / threads, all * (mine + 1) / threads};
    return r;
}

#ifdef __AVX512BF16__
static inline __m512 widen_16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
static inline __m512 widen16(const bf16 *from) { return widen_16(_mm256_loadu_si256((const __m256i *)from)); }
#endif

/* Row x (M) as pairs (x[8w + s], x[8w + s + 4]) at pairs[s * M/8 + w], and 136 * (sum of the 8 inputs of word w). */
static void arrange(const bf16 *x, long M, uint32_t *pairs, float *offset) {
    long W = M / 8;
    for (long w = 0; w < W; w++) {
        float sum = 0;
        for (int k = 0; k < 8; k++) sum += widen(x[8 * w + k]);
        offset[w] = 136.0f * sum;
        for (int s = 0; s < 4; s++)
            pairs[s * W + w] = x[8 * w + s] | ((uint32_t)x[8 * w + s + 4] << 16);
    }
}

/* One output for up to TILE rows: words (M/8), scale (M/32), rows given by their arranged inputs. */
#ifdef __AVX512BF16__
#define FOUR(a) _mm512_set_epi32(a + 3, a + 3, a + 3, a + 3, a + 2, a + 2, a + 2, a + 2, a + 1, a + 1, a + 1, a + 1, a, a, a, a)

/* 16 words, that is 4 groups; `live` and `four` scales tell how much of them there is. Sums unscaled codes, then scales. */
static inline __attribute__((always_inline)) void step_int4(
        __m512i word, __m512 scale, long w, long W, __mmask16 live, int rows,
        uint32_t *const *pairs, float *const *offset, __m512 *total) {
    const __m512i mask = _mm512_set1_epi32(0x000F000F), base = _mm512_set1_epi32(0x43004300);
    __m512bh code[4];
    for (int k = 0; k < 4; k++)  /* 0xEA: (a & b) | c */
        code[k] = (__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi32(word, 4 * k), mask, base, 0xEA);
    for (int r = 0; r < rows; r++) {
        __m512 even = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_maskz_loadu_ps(live, offset[r] + w)), odd = _mm512_setzero_ps();
        for (int k = 0; k < 4; k += 2) {
            even = _mm512_dpbf16_ps(even, code[k], (__m512bh)_mm512_maskz_loadu_epi32(live, pairs[r] + k * W + w));
            odd = _mm512_dpbf16_ps(odd, code[k + 1], (__m512bh)_mm512_maskz_loadu_epi32(live, pairs[r] + (k + 1) * W + w));
        }
        total[r] = _mm512_fmadd_ps(_mm512_add_ps(even, odd), scale, total[r]);
    }
}

static inline __attribute__((always_inline)) void dot_int4_rows(
        const uint32_t *words, const bf16 *scale, long M, int rows,
        uint32_t *const *pairs, float *const *offset, float *out) {
    long W = M / 8, w = 0;
    __m512 total[TILE];
    for (int r = 0; r < rows; r++) total[r] = _mm512_setzero_ps();
    for (; w + 64 <= W; w += 64) {
        for (int k = 0; k < 4; k++) _mm_prefetch((const char *)(words + w + 16 * k) + AHEAD, _MM_HINT_T1);
        __m256i s16 = _mm256_loadu_si256((const __m256i *)(scale + w / 4));
        __m512 s = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(s16), 16));
        step_int4(_mm512_loadu_si512(words + w), _mm512_permutexvar_ps(FOUR(0), s), w, W, 0xFFFF, rows, pairs, offset, total);
        step_int4(_mm512_loadu_si512(words + w + 16), _mm512_permutexvar_ps(FOUR(4), s), w + 16, W, 0xFFFF, rows, pairs, offset, total);
        step_int4(_mm512_loadu_si512(words + w + 32), _mm512_permutexvar_ps(FOUR(8), s), w + 32, W, 0xFFFF, rows, pairs, offset, total);
        step_int4(_mm512_loadu_si512(words + w + 48), _mm512_permutexvar_ps(FOUR(12), s), w + 48, W, 0xFFFF, rows, pairs, offset, total);
    }
    for (; w < W; w += 16) {
        __mmask16 live = W - w >= 16 ? 0xFFFF : (__mmask16)((1u << (W - w)) - 1);
        __mmask16 groups = W - w >= 16 ? 0xF : (__mmask16)((1u << ((W - w) / 4)) - 1);
        __m512i s16 = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(groups, scale + w / 4));
        __m512 s = _mm512_permutexvar_ps(FOUR(0), _mm512_castsi512_ps(_mm512_slli_epi32(s16, 16)));
        step_int4(_mm512_maskz_loadu_epi32(live, words + w), s, w, W, live, rows, pairs, offset, total);
    }
    for (int r = 0; r < rows; r++) out[r] = _mm512_reduce_add_ps(total[r]);
}

static inline void dot_int4(const uint32_t *words, const bf16 *scale, long M, int rows,
                            uint32_t *const *pairs, float *const *offset, float *out) {
    switch (rows) {  /* a constant count keeps the sums in registers */
        case 1: dot_int4_rows(words, scale, M, 1, pairs, offset, out); return;
        case 2: dot_int4_rows(words, scale, M, 2, pairs, offset, out); return;
        case 3: dot_int4_rows(words, scale, M, 3, pairs, offset, out); return;
        case 4: dot_int4_rows(words, scale, M, 4, pairs, offset, out); return;
        default:
            dot_int4_rows(words, scale, M, 4, pairs, offset, out);
            dot_int4(words, scale, M, rows - 4, pairs + 4, offset + 4, out + 4);
    }
}
#else
static inline void dot_int4(const uint32_t *words, const bf16 *scale, long M, int rows,
                            uint32_t *const *pairs, float *const *offset, float *out) {
    long W = M / 8;
    for (int r = 0; r < rows; r++) {
        const uint32_t *p = pairs[r];
        float total = 0;
        for (long g = 0; g < W / 4; g++) {
            float sum = 0;
            for (long w = 4 * g; w < 4 * g + 4; w++)
                for (int s = 0; s < 4; s++) {
                    uint32_t pair = p[s * W + w], lo = pair << 16, hi = pair & 0xFFFF0000;
                    float a, b; memcpy(&a, &lo, 4); memcpy(&b, &hi, 4);
                    sum += a * ((int)((words[w] >> 4 * s) & 15) - 8);
                    sum += b * ((int)((words[w] >> (4 * s + 16)) & 15) - 8);
                }
            total += sum * widen(scale[g]);
        }
        out[r] = total;
    }
}
#endif

#ifdef __AVX512BF16__
static inline __attribute__((always_inline)) void dot_bf16_rows(
        const bf16 *a, const bf16 *const *x, long M, int rows, float *out) {
    __m512 even[TILE], odd[TILE];
    for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_ps();
    long m = 0;
    for (; m + 64 <= M; m += 64) {
        for (int k = 0; k < 2; k++) _mm_prefetch((const char *)(a + m + 32 * k) + AHEAD, _MM_HINT_T1);
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
    switch (rows) {
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
        float total = 0;
        for (long m = 0; m < M; m++) total += widen(a[m]) * widen(x[r][m]);
        out[r] = total;
    }
}
#endif

/* x (R, M) times the transpose of a (N, M), bf16, to y (R, N) bf16, or, if y is null, to wide (R, N) fp32. */
void linear_bf16(long R, long N, long M, const bf16 *x, const bf16 *a, bf16 *y, float *wide) {
    for (long first = 0; first < R; first += TILE) {
        int rows = R - first < TILE ? (int)(R - first) : TILE;
        const bf16 *at[TILE];
        for (int r = 0; r < rows; r++) at[r] = x + (first + r) * M;
        #pragma omp parallel for schedule(static)
        for (long n = 0; n < N; n++) {
            float out[TILE];
            dot_bf16(a + n * M, at, M, rows, out);
            for (int r = 0; r < rows; r++)
                if (y) y[(first + r) * N + n] = narrow(out[r]);
                else wide[(first + r) * N + n] = out[r];
        }
    }
}

/* y (R, M) = x / rms(x), rounded, times weight (M). */
void rms_norm(long R, long M, float eps, const bf16 *restrict x, const bf16 *restrict weight, bf16 *restrict y) {
    #pragma omp parallel for schedule(static) if (R > 16)
    for (long r = 0; r < R; r++) {
        const bf16 *from = x + r * M;
        bf16 *to = y + r * M;
        float sum = 0;
        for (long m = 0; m < M; m++) sum += widen(from[m]) * widen(from[m]);
        float inverse = 1 / sqrtf(sum / M + eps);
        long m = 0;
#ifdef __AVX512BF16__
        for (; m + 16 <= M; m += 16) {
            __m256bh unit = _mm512_cvtneps_pbh(_mm512_mul_ps(widen16(from + m), _mm512_set1_ps(inverse)));
            __m256bh scaled = _mm512_cvtneps_pbh(_mm512_mul_ps(widen_16((__m256i)unit), widen16(weight + m)));
            _mm256_storeu_si256((__m256i *)(to + m), (__m256i)scaled);
        }
#endif
        for (; m < M; m++) to[m] = narrow(widen(weight[m]) * widen(narrow(widen(from[m]) * inverse)));
    }
}

/* Turns the pairs (x[2j], x[2j + 1]) of x (B, h, T, D), with strides in elements, by angles whose cos and sin are (B, T,
   D/2); out (B, h, T, D) has the first members, then the second ones. */
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
                    float first = widen(from[2 * j]), second = widen(from[2 * j + 1]);
                    to[j] = narrow(first * c[j] - second * s[j]);
                    to[D / 2 + j] = narrow(second * c[j] + first * s[j]);
                }
            }
}

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
            float s = widen(scale[n * (M / 32) + g]);
#ifdef __AVX512BF16__
            _mm512_storeu_si512(to, unpack_group(octets, s));
#else
            for (int b = 0; b < 16; b++) {
                to[2 * b] = narrow(((int)(octets[b] & 15) - 8) * s);
                to[2 * b + 1] = narrow(((int)(octets[b] >> 4) - 8) * s);
            }
#endif
        }
}

/* Sorts P pairs by expert and cuts them in jobs of at most TILE pairs; returns how many. */
static long make_jobs(long P, const int64_t *experts, long *order, long *begin) {
    long jobs = 0;
    for (long p = 0; p < P; p++) {  /* insertion: P is small, and equal experts keep their order */
        long q = p;
        for (; q > 0 && experts[order[q - 1]] > experts[p]; q--) order[q] = order[q - 1];
        order[q] = p;
    }
    for (long p = 0; p < P; p++)
        if (p == 0 || experts[order[p]] != experts[order[p - 1]] || p - begin[jobs - 1] == TILE) begin[jobs++] = p;
    begin[jobs] = P;
    return jobs;
}

/* out (R, H) fp32 = sum over K of weights * down(silu(gate(x)) * up(x)) of the experts chosen, all of them packed. */
int experts_int4(long R, long K, long H, long I, const bf16 *x, const int64_t *experts, const float *weights,
                 const uint32_t *gate, const bf16 *gate_scale, const uint32_t *up, const bf16 *up_scale,
                 const uint32_t *down, const bf16 *down_scale, float *out) {
    long P = R * K, jobs, in = H / 8, mid = I / 8;
    char *memory = malloc(P * 16 + 8 + R * in * 20 + P * (I * 2 + mid * 20 + H * 4));
    if (!memory) return 1;
    long *order = (long *)memory, *begin = order + P;
    uint32_t *x_pairs = (uint32_t *)(begin + P + 1), *h_pairs = x_pairs + R * in * 4;
    float *x_offset = (float *)(h_pairs + P * mid * 4), *h_offset = x_offset + R * in;
    float *parts = h_offset + P * mid;  /* (P, H) */
    bf16 *hidden = (bf16 *)(parts + P * H);  /* (P, I) */
    jobs = make_jobs(P, experts, order, begin);
    #pragma omp parallel
    {
        #pragma omp for schedule(static)
        for (long r = 0; r < R; r++) arrange(x + r * H, H, x_pairs + r * in * 4, x_offset + r * in);
        #pragma omp for collapse(2) schedule(static)
        for (long j = 0; j < jobs; j++)
            for (long i = 0; i < I; i++) {
                uint32_t *pairs[TILE]; float *offset[TILE], a[TILE], b[TILE];
                int rows = (int)(begin[j + 1] - begin[j]);
                long at = experts[order[begin[j]]] * I + i;
                for (int r = 0; r < rows; r++) {
                    long row = order[begin[j] + r] / K;
                    pairs[r] = x_pairs + row * in * 4; offset[r] = x_offset + row * in;
                }
                dot_int4(gate + at * in, gate_scale + at * (H / 32), H, rows, pairs, offset, a);
                dot_int4(up + at * in, up_scale + at * (H / 32), H, rows, pairs, offset, b);
                for (int r = 0; r < rows; r++)
                    hidden[order[begin[j] + r] * I + i] = narrow(a[r] / (1.0f + expf(-a[r])) * b[r]);
            }
        #pragma omp for schedule(static)
        for (long p = 0; p < P; p++) arrange(hidden + p * I, I, h_pairs + p * mid * 4, h_offset + p * mid);
        #pragma omp for collapse(2) schedule(static)
        for (long j = 0; j < jobs; j++)
            for (long h = 0; h < H; h++) {
                uint32_t *pairs[TILE]; float *offset[TILE], y[TILE];
                int rows = (int)(begin[j + 1] - begin[j]);
                long at = experts[order[begin[j]]] * H + h;
                for (int r = 0; r < rows; r++) {
                    long p = order[begin[j] + r];
                    pairs[r] = h_pairs + p * mid * 4; offset[r] = h_offset + p * mid;
                }
                dot_int4(down + at * mid, down_scale + at * (I / 32), I, rows, pairs, offset, y);
                for (int r = 0; r < rows; r++) parts[order[begin[j] + r] * H + h] = y[r];
            }
        #pragma omp for schedule(static)
        for (long r = 0; r < R; r++)
            for (long h = 0; h < H; h++) {
                float sum = 0;  /* in the order of the choices, whatever the threads did */
                for (long k = 0; k < K; k++) sum += weights[r * K + k] * parts[(r * K + k) * H + h];
                out[r * H + h] = sum;
            }
    }
    free(memory);
    return 0;
}

#ifdef __AVX512BF16__
/* Attention of many new tokens, for bf16 keys and values made from the latents. Q rows at a time meet PANEL keys at a time:

     scores (Q_ROWS, KEYS)   q (Q_ROWS, dn + dr) times packed keys, fp32
     p = 2^(scores - largest so far), bf16; sums and largest scores are kept for each row, fp32
     out (Q_ROWS, dv)       out * 2^(largest before - largest so far) + p times packed values, fp32

   Packed means that the two inputs of a bf16 dot product lie side by side: (depth / 2, PANEL, 2), PANEL columns of a
   product. Of keys the depth is dn + dr, of values it is the keys. */
enum { PANEL = 64, ROWS = 6, Q_ROWS = 96, KEYS = 256 };

/* c (6, 64) fp32 = or += a (6, 2 pairs) times b, a packed panel. Sums stay in 24 registers. */
static inline __attribute__((always_inline)) void tile_6x64(
        const uint32_t *a, long a_stride, const uint32_t *b, long pairs, float *c, long c_stride, int add) {
    __m512 sum[ROWS][4];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < 4; v++) sum[r][v] = add ? _mm512_loadu_ps(c + r * c_stride + 16 * v) : _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512bh column[4];
        for (int v = 0; v < 4; v++) column[v] = (__m512bh)_mm512_loadu_si512(b + k * PANEL + 16 * v);
        for (int r = 0; r < ROWS; r++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32(a[r * a_stride + k]);
            for (int v = 0; v < 4; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, column[v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < 4; v++) _mm512_storeu_ps(c + r * c_stride + 16 * v, sum[r][v]);
}

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

static int has_tiles = 0;

/* Turns the use of tiles on, for which the system is asked, or off. Returns whether they are used. */
int use_tiles(long wanted) {
    return has_tiles = wanted && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

typedef struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } tile_shapes;

/* Eight tiles of 16 rows of 64 bytes for this thread; returns the shapes that another library may have left there. */
static tile_shapes open_tiles(void) {
    static const tile_shapes ours = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    tile_shapes theirs = {0};
    if (has_tiles) __asm__ volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(theirs) : "m"(ours));
    return theirs;
}

static void close_tiles(tile_shapes theirs) {
    if (has_tiles && theirs.palette) __asm__ volatile("ldtilecfg %0" :: "m"(theirs));
    else if (has_tiles) __asm__ volatile("tilerelease");
}

#define TILES(text) __asm__ volatile(text ::: "memory")
#define LOAD(tile, base, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile :: "r"((const void *)(base)), "r"((long)(stride)) : "memory")
#define STORE(tile, base, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" :: "r"((void *)(base)), "r"((long)(stride)) : "memory")
#define DOT(c, a, b) TILES("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c)

/* Two blocks of 16 rows of int4 (M inputs) on their way into 2 * M / 32 tiles, each (code - 8) * scale rounded once. It is
   done in parts of a row between the products of other tiles, since the matrix unit and the vector units can work at once. */
enum { PART = 8 };  /* groups of 32 inputs */
typedef struct {
    const uint32_t *words[2];
    const bf16 *scale[2];
    bf16 *tiles;
    long M, block, row, group;  /* the next part */
    long parts, steps, due;  /* so many parts are due in so many steps; due counts in fractions of `steps` */
} unpacking;

/* From one unpacked row to the next: not a multiple of 4096 bytes, of which the cache keeps few. */
static inline long apart(long M) { return M + 32; }

static inline void unpack_part(unpacking *u) {
    long groups = u->M / 32, last = u->group + PART < groups ? u->group + PART : groups;
    const uint32_t *words = u->words[u->block] + u->row * (u->M / 8);
    const bf16 *scale = u->scale[u->block] + u->row * groups;
    bf16 *to = u->tiles + (u->block * 16 + u->row) * apart(u->M);
    for (long g = u->group; g < last; g++) {
        if (g % 4 == 0) _mm_prefetch((const char *)(words + 4 * g) + AHEAD, _MM_HINT_T1);
        _mm512_store_si512(to + g * 32, unpack_group(words + 4 * g, widen(scale[g])));
    }
    u->group = last;
    if (last == groups) { u->group = 0; if (++u->row == 16) { u->row = 0; u->block++; } }
}

static unpacking begin_unpacking(long M, long steps, const uint32_t *words0, const bf16 *scale0, const uint32_t *words1,
                                 const bf16 *scale1, bf16 *tiles) {
    unpacking u = {{words0, words1}, {scale0, scale1}, tiles, M, 0, 0, 0, 32 * ((M / 32 + PART - 1) / PART), steps, 0};
    return u;
}

static void finish_unpacking(unpacking *u) { while (u->block < 2) unpack_part(u); }

/* Tiles 0..3 += (a0; a1) times (b0, b1) over `steps` tiles. Strides are in bytes, from tile to tile and inside of one.
   Meanwhile the next weights are unpacked, if any. */
static inline __attribute__((always_inline)) void multiply_tiles(
        const void *a0, const void *a1, long a_step, long a_stride, const void *b0, const void *b1,
        long b_step, long b_stride, long steps, int both, unpacking *next) {
    const char *x0 = a0, *x1 = a1, *y0 = b0, *y1 = b1;
    for (long k = 0; k < steps; k++, x0 += a_step, x1 += a_step, y0 += b_step, y1 += b_step) {
        LOAD(4, x0, a_stride); LOAD(6, y0, b_stride); DOT(0, 4, 6);
        LOAD(5, x1, a_stride); DOT(2, 5, 6);
        if (both) { LOAD(7, y1, b_stride); DOT(1, 4, 7); DOT(3, 5, 7); }
        if (!next) continue;
        for (next->due += next->parts; next->due >= next->steps; next->due -= next->steps)
            if (next->block < 2) unpack_part(next);
    }
}

static inline void clear_tiles(void) { TILES("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3"); }

static inline void store_tiles(float *to, long row, long stride) {  /* `row` from one tile to the one below, in floats */
    STORE(0, to, stride * 4); STORE(1, to + 16, stride * 4); STORE(2, to + row, stride * 4); STORE(3, to + row + 16, stride * 4);
}
#else
typedef int tile_shapes;
static tile_shapes open_tiles(void) { return 0; }
static void close_tiles(tile_shapes theirs) { (void)theirs; }
#endif

/* c (rows, 64) fp32 = or += a (rows, pairs) times b, a packed panel. Rows come by 32, which may be read and written up to a multiple of ROWS. */
static void multiply_panel(const uint32_t *a, long a_stride, const uint32_t *b, long pairs, float *c, long c_stride, long rows, int add) {
#ifdef HAS_AMX
    if (has_tiles && pairs % 16 == 0) {
        for (long r = 0; r < rows; r += 32)
            for (long v = 0; v < PANEL; v += 32) {
                float *to = c + r * c_stride + v;
                if (add) {
                    LOAD(0, to, c_stride * 4); LOAD(1, to + 16, c_stride * 4);
                    LOAD(2, to + 16 * c_stride, c_stride * 4); LOAD(3, to + 16 * c_stride + 16, c_stride * 4);
                } else clear_tiles();
                multiply_tiles(a + r * a_stride, a + (r + 16) * a_stride, 64, a_stride * 4, b + v, b + v + 16, 16 * PANEL * 4,
                               PANEL * 4, pairs / 16, 1, NULL);
                store_tiles(to, 16 * c_stride, c_stride);
            }
        return;
    }
#endif
    for (long r = 0; r < rows; r += ROWS)
        tile_6x64(a + r * a_stride, a_stride, b, pairs, c + r * c_stride, c_stride, add);
}

/* 2^x for x <= 0, relative error 2e-7; 0 for -infinity. */
static inline __m512 exp2_ps(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));  /* 2^-200 is 0 in what follows */
    __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.54035304e-4f);  /* Taylor of 2^f, |f| <= 1/2 */
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.33335581e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.61812911e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.55041087e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.40226507e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93147181e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

/* Of 16 keys, of which `left` are there, those that the mask has, if any. */
static inline __mmask16 lanes(long left, const uint8_t *mask) {
    __mmask16 live = left >= 16 ? 0xFFFF : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    if (mask && live) live &= _mm_test_epi8_mask(_mm_maskz_loadu_epi8(live, mask), _mm_set1_epi8(-1));
    return live;
}

/* One row's scores (KEYS) to p, of which the first `seen` keys, and of them those that the mask has, take part. Updates
   the row's largest score and sum, returns what its output so far is to be multiplied by. */
static inline float soften(const float *scores, long seen, const uint8_t *mask, float scale, float *top, float *sum, bf16 *p) {
    __m512 most = _mm512_set1_ps(*top), x[KEYS / 16], total = _mm512_setzero_ps();
    for (int i = 0; i < KEYS / 16; i++) {
        __mmask16 live = lanes(seen - 16 * i, mask ? mask + 16 * i : NULL);
        x[i] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), live, _mm512_loadu_ps(scores + 16 * i), _mm512_set1_ps(scale));
        most = _mm512_max_ps(most, x[i]);
    }
    float now = _mm512_reduce_max_ps(most), before = *top;
    __m512 base = _mm512_set1_ps(now);
    for (int i = 0; i < KEYS / 16; i++) {
        __m512 y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x[i], _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ), exp2_ps(_mm512_sub_ps(x[i], base)));
        total = _mm512_add_ps(total, y);
        _mm256_storeu_si256((__m256i *)(p + 16 * i), (__m256i)_mm512_cvtneps_pbh(y));
    }
    float factor = exp2f(before - now);
    *top = now;
    *sum = *sum * factor + _mm512_reduce_add_ps(total);
    return factor;
}

#ifdef HAS_AMX
/* 16 x 16 numbers of 32 bits: row[i][j] to row[j][i]. */
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

/* Up to 16 rows (pairs) of x, whose numbers are `rows`, to (pairs, 16) columns, zeros for rows that are not there. */
static void pack_columns(long pairs, long live, const uint32_t *x, const int64_t *rows, uint32_t *columns) {
    for (long k = 0; k < pairs; k += 16) {
        __m512i row[16];
        for (int r = 0; r < 16; r++)
            row[r] = r < live ? _mm512_loadu_si512(x + rows[r] * pairs + k) : _mm512_setzero_si512();
        transpose_16x16(row);
        for (int r = 0; r < 16; r++) _mm512_store_si512(columns + (k + r) * 16, row[r]);
    }
}

static inline __m512 silu_ps(__m512 x) {  /* of e = exp(-|x|): x / (1 + e), or x e / (1 + e) where x is negative */
    __m512 e = exp2_ps(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-1.44269504f)));
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

/* sums (32 outputs, 32 rows) = 32 unpacked rows of weights (M inputs) times a block of 16 columns, or `both` it and the next. */
static inline void multiply_columns(const bf16 *tiles, const uint32_t *columns, long M, int both, float (*sums)[32], unpacking *next) {
    clear_tiles();
    multiply_tiles(tiles, tiles + 16 * apart(M), 64, 2 * apart(M), columns, both ? columns + M * 8 : columns, 1024, 64, M / 32, both, next);
    store_tiles(sums[0], 512, 32);
}

typedef struct { const uint32_t *words; const bf16 *scale; } int4_matrix;

/* Outputs n..last of gate and up, joined, for all blocks: x (., H/2, 16) to hidden (., I/2, 16). */
static void gate_and_up(long n, long last, long blocks, long H, long I, int4_matrix gate, int4_matrix up, const uint32_t *x,
                        uint32_t *hidden, bf16 *tiles) {
    float sums[32][32];  /* gate above up */
    for (long first = n, turn = 0; n < last + 16; n += 16, turn ^= 1) {  /* one turn more: n - 16 is multiplied while n is unpacked */
        unpacking next = begin_unpacking(H, (blocks + 1) / 2 * (H / 32), gate.words + n * (H / 8), gate.scale + n * (H / 32),
                                         up.words + n * (H / 8), up.scale + n * (H / 32), tiles + turn * 32 * apart(H));
        if (n >= last) next.block = 2;
        for (long b = 0; b < blocks && n > first; b += 2) {
            int both = b + 1 < blocks;
            multiply_columns(tiles + (turn ^ 1) * 32 * apart(H), x + b * H * 8, H, both, sums, &next);
            for (int j = 0; j <= both; j++)
                for (int i = 0; i < 16; i += 2)
                    _mm512_store_si512(hidden + (b + j) * I * 8 + (n - 16 + i) / 2 * 16, join_pair(sums[i] + 16 * j, sums[16 + i] + 16 * j, 32));
        }
        finish_unpacking(&next);
    }
}

/* One of the four 16 x 16 of sums (32, 32), transposed. */
static inline void turn_quarter(float (*sums)[32], int quarter, __m512i *tile) {
    for (int r = 0; r < 16; r++) tile[r] = _mm512_loadu_si512(sums[quarter / 2 * 16 + r] + quarter % 2 * 16);
    transpose_16x16(tile);
}

/* sums (32 outputs, 32 rows) of the rows from `first` on: out (., H), from output n on, += weight * sum. */
static inline void add_weighted(float (*sums)[32], long first, long rows, long H, long n, const int64_t *row, const float *weights,
                                float *out) {
    for (int i = 0; i < 4; i++) {
        __m512i tile[16];
        turn_quarter(sums, i, tile);
        for (long r = first + i % 2 * 16, k = 0; k < 16 && r < rows; r++, k++) {
            float *to = out + row[r] * H + n + i / 2 * 16;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(weights[r]), _mm512_castsi512_ps(tile[k]), _mm512_loadu_ps(to)));
        }
    }
}

/* Outputs n..last of down for all rows: out (., H) += weight * down(hidden). */
static void add_down(long n, long last, long rows, long H, long I, int4_matrix down, const uint32_t *hidden, const int64_t *row,
                     const float *weights, float *out, bf16 *tiles) {
    long blocks = (rows + 15) / 16, words = I / 8, groups = I / 32;
    float sums[32][32];
    for (long first = n, turn = 0; n < last + 32; n += 32, turn ^= 1) {
        unpacking next = begin_unpacking(I, (blocks + 1) / 2 * groups, down.words + n * words, down.scale + n * groups,
                                         down.words + (n + 16) * words, down.scale + (n + 16) * groups, tiles + turn * 32 * apart(I));
        if (n >= last) next.block = 2;
        for (long b = 0; b < blocks && n > first; b += 2) {
            multiply_columns(tiles + (turn ^ 1) * 32 * apart(I), hidden + b * I * 8, I, b + 1 < blocks, sums, &next);
            add_weighted(sums, b * 16, rows, H, n - 32, row, weights, out);
        }
        finish_unpacking(&next);
    }
}

/* The expert at `place` of the stacks for `R` rows of x (., H), whose numbers and weights begin at `start`:
   out[row] += weight * down(silu(gate(x[row])) * up(x[row])). H and I are multiples of 32. */
int expert_int4(long place, long start, long R, long H, long I, const bf16 *x, const int64_t *rows, const float *weights,
                const uint32_t *gate, const bf16 *gate_scale, const uint32_t *up, const bf16 *up_scale,
                const uint32_t *down, const bf16 *down_scale, float *out) {
    int4_matrix g = {gate + place * I * H / 8, gate_scale + place * I * H / 32};
    int4_matrix u = {up + place * I * H / 8, up_scale + place * I * H / 32};
    int4_matrix d = {down + place * I * H / 8, down_scale + place * I * H / 32};
    rows += start, weights += start;
    long blocks = (R + 15) / 16, most = H > I ? H : I, failed = 0;
    uint32_t *columns = aligned_alloc(64, blocks * 32 * (H + I)), *hidden = columns + blocks * H * 8;
    if (!columns) return 1;
    #pragma omp parallel
    {
        bf16 *tiles = aligned_alloc(64, 128 * apart(most));  /* two times 32 rows of weights */
        if (!tiles) {
            #pragma omp atomic write
            failed = 1;
        }
        tile_shapes theirs = open_tiles();
        #pragma omp for schedule(static)
        for (long b = 0; b < blocks; b++)
            pack_columns(H / 2, R - 16 * b < 16 ? R - 16 * b : 16, (const uint32_t *)x, rows + 16 * b, columns + b * H * 8);
        range mine = share_of(I / 16);
        if (tiles) gate_and_up(16 * mine.first, 16 * mine.last, blocks, H, I, g, u, columns, hidden, tiles);
        #pragma omp barrier
        mine = share_of(H / 32);
        if (tiles) add_down(32 * mine.first, 32 * mine.last, R, H, I, d, hidden, rows, weights, out, tiles);
        close_tiles(theirs);
        free(tiles);
    }
    free(columns);
    return (int)failed;
}
#endif

typedef struct { long T, S, D, V, offset; float scale; } attention_shape;

static inline int hides_all(const uint8_t *mask, long stride, long rows, long live) {
    for (long r = 0; r < rows; r++)
        if (memchr(mask + r * stride, 1, live)) return 0;
    return 1;
}

/* Rows first..last of one head: q is copied in already; writes out with `out_stride` between rows. */
static void attend_rows(attention_shape n, long first, long last, const uint32_t *q, const uint32_t *keys,
                        const uint32_t *values, const uint8_t *mask, float *memory, bf16 *out, long out_stride) {
    float *scores = memory, *sums = scores + Q_ROWS * KEYS, *top = sums + Q_ROWS * n.V, *total = top + Q_ROWS;
    uint32_t *p = (uint32_t *)(total + Q_ROWS);
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
            float factor = soften(scores + r * KEYS, seen, mask ? mask + (first + r) * n.S + at : 0, n.scale,
                                  top + r, total + r, (bf16 *)(p + r * (KEYS / 2)));
            if (factor != 1.0f)
                for (long v = 0; v < n.V; v += 16)
                    _mm512_storeu_ps(sums + r * n.V + v, _mm512_mul_ps(_mm512_loadu_ps(sums + r * n.V + v), _mm512_set1_ps(factor)));
        }
        for (long v = 0; v < n.V; v += PANEL)
            multiply_panel(p, KEYS / 2, values + ((v / PANEL) * ((n.S + KEYS - 1) / KEYS * KEYS) + at) / 2 * PANEL,
                           (live + 31) / 32 * 16, sums + v, n.V, rows, 1);
    }
    for (long r = 0; r < last - first; r++) {
        float inverse = total[r] > 0 ? 1 / total[r] : 0;
        for (long v = 0; v < n.V; v++) out[r * out_stride + v] = narrow(sums[r * n.V + v] * inverse);
    }
}

/* Keys at..at + KEYS of one head, packed: keys from k_nope and k_pe, and values. What lies behind S is zero. */
static void pack_block(long at, long S, long dn, long dr, long dv, const bf16 *kv, long kv_stride, const bf16 *k_pe,
                       long k_pe_stride, uint32_t *keys, uint32_t *values) {
    long pairs = (dn + dr) / 2, rounded = (S + KEYS - 1) / KEYS * KEYS;
    for (long s = at; s < at + KEYS; s++) {
        uint32_t *to = keys + (s / PANEL) * pairs * PANEL + s % PANEL;
        const uint32_t *nope = (const uint32_t *)(kv + s * kv_stride), *pe = (const uint32_t *)(k_pe + s * k_pe_stride);
        for (long d = 0; d < dn / 2; d++) to[d * PANEL] = s < S ? nope[d] : 0;
        for (long d = 0; d < dr / 2; d++) to[(dn / 2 + d) * PANEL] = s < S ? pe[d] : 0;
    }
    for (long s = at; s < at + KEYS; s += 2) {
        const bf16 *one = kv + s * kv_stride + dn, *two = one + kv_stride;
        for (long v = 0; v < dv; v++)
            values[((v / PANEL) * rounded + s) / 2 * PANEL + v % PANEL] =
                (s < S ? one[v] : 0) | ((uint32_t)(s + 1 < S ? two[v] : 0) << 16);
    }
}

/* Attention of the heads of one group. q_nope (B, h, T, dn), q_pe (B, h, T, dr), kv (B, S, h, dn + dv) and k_pe (B, S, dr) by
   strides (batch, head, token), in elements; mask (B or 1, T, S) bytes or null; a query t sees keys up to offset + t, or all
   if offset is negative. out (B, T, ., dv) by strides. dn, dr even, dv a multiple of 64. */
int prefill_attention(long B, long heads, long T, long S, long dn, long dr, long dv, long offset, float scale,
                      const bf16 *q_nope, const long *nope_strides, const bf16 *q_pe, const long *pe_strides,
                      const bf16 *kv, const long *kv_strides, const bf16 *k_pe, const long *k_pe_strides,
                      const uint8_t *mask, long mask_batch, bf16 *out, const long *out_strides) {
    long blocks = (S + KEYS - 1) / KEYS, rounded = blocks * KEYS, D = dn + dr, parts = (T + Q_ROWS - 1) / Q_ROWS;
    long per_head = rounded * (D + dv) / 2, failed = 0;
    attention_shape n = {T, S, D, dv, offset, scale * 1.44269504f};
    uint32_t *packed = malloc(B * heads * per_head * sizeof(uint32_t));
    if (!packed) return 1;
    #pragma omp parallel
    {
        float *memory = malloc((Q_ROWS * (KEYS + dv + 2 + KEYS / 2 + D / 2)) * sizeof(float));
        tile_shapes theirs = open_tiles();
        if (!memory) {
            #pragma omp atomic write
            failed = 1;
        }
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
                if (!memory) continue;
                long b = head / heads, h = head % heads, first = (parts - 1 - part) * Q_ROWS;  /* the longest first */
                long last = first + Q_ROWS < T ? first + Q_ROWS : T;
                uint32_t *q = (uint32_t *)(memory + Q_ROWS * (KEYS + dv + 2 + KEYS / 2)), *keys = packed + head * per_head;
                for (long r = 0; r < Q_ROWS; r++) {
                    bf16 *to = (bf16 *)(q + r * (D / 2));
                    if (first + r >= last) { memset(to, 0, D * sizeof(bf16)); continue; }
                    memcpy(to, q_nope + b * nope_strides[0] + h * nope_strides[1] + (first + r) * nope_strides[2], dn * sizeof(bf16));
                    memcpy(to + dn, q_pe + b * pe_strides[0] + h * pe_strides[1] + (first + r) * pe_strides[2], dr * sizeof(bf16));
                }
                attend_rows(n, first, last, q, keys, keys + rounded * D / 2, mask ? mask + b * mask_batch : 0, memory,
                            out + b * out_strides[0] + h * out_strides[1] + first * out_strides[2], out_strides[2]);
            }
        close_tiles(theirs);
        free(memory);
    }
    free(packed);
    return (int)failed;
}
#endif

/* out (C) += p * row (C) */
static inline void add_scaled(float *out, float p, const bf16 *row, long C) {
    #pragma omp simd
    for (long c = 0; c < C; c++) out[c] += p * widen(row[c]);
}

typedef float f32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));

/* out (n, 32 of C) = sum over the keys of weight * latent, n <= 4 rows with their sums in registers. */
static inline __attribute__((always_inline)) void mix_tile(
        int n, long keys, const float *weights, const bf16 *latent, long stride, float *out, long C) {
    f32x16 sum[4][2];
    for (int i = 0; i < n; i++) sum[i][0] = sum[i][1] = (f32x16){0};
    for (long s = 0; s < keys; s++) {
        f32x16 c[2];
        for (int v = 0; v < 2; v++)
            c[v] = (f32x16)(__builtin_convertvector(*(const u16x16 *)(latent + s * stride + 16 * v), u32x16) << 16);
        for (int i = 0; i < n; i++)
            for (int v = 0; v < 2; v++) sum[i][v] += weights[i * keys + s] * c[v];
    }
    for (int i = 0; i < n; i++)
        for (int v = 0; v < 2; v++) *(f32x16 *)(out + i * C + 16 * v) = sum[i][v];
}

static void mix(long rows, long keys, const float *weights, const bf16 *latent, long stride, float *out, long C) {
    long c = 0;
    for (; c + 32 <= C; c += 32)
        for (long r = 0; r < rows; r += 4) {
            const float *w = weights + r * keys;
            float *to = out + r * C + c;
            if (rows - r >= 4) mix_tile(4, keys, w, latent + c, stride, to, C);
            else if (rows - r == 3) mix_tile(3, keys, w, latent + c, stride, to, C);
            else if (rows - r == 2) mix_tile(2, keys, w, latent + c, stride, to, C);
            else mix_tile(1, keys, w, latent + c, stride, to, C);
        }
    for (; c < C; c++)
        for (long r = 0; r < rows; r++) {
            float sum = 0;
            for (long s = 0; s < keys; s++) sum += weights[r * keys + s] * widen(latent[s * stride + c]);
            out[r * C + c] = sum;
        }
}

/* One block of keys for the rows of one sequence: scores, their maximum and sum, and the weighted sum of the latents. */
static void attend_block(long rows, long T, long C, long D, long first, long last, float scale,
                         const bf16 *q, const bf16 *q_pe, const bf16 *latent, long latent_stride,
                         const bf16 *k_pe, long k_pe_stride, const uint8_t *mask, long mask_stride,
                         float *top, float *sum, float *out, float *scores) {
    for (long s = first; s < last; s++)
        for (long r = 0; r < rows; r += TILE) {
            int n = rows - r < TILE ? (int)(rows - r) : TILE;
            const bf16 *at[TILE], *at_pe[TILE];
            float a[TILE], b[TILE];
            for (int i = 0; i < n; i++) { at[i] = q + (r + i) * C; at_pe[i] = q_pe + (r + i) * D; }
            dot_bf16(latent + s * latent_stride, at, C, n, a);
            dot_bf16(k_pe + s * k_pe_stride, at_pe, D, n, b);
            for (int i = 0; i < n; i++) {
                int seen = !mask || mask[((r + i) % T) * mask_stride + s];
                scores[(r + i) * (last - first) + s - first] = seen ? (a[i] + b[i]) * scale : -3e38f;
            }
        }
    for (long r = 0; r < rows; r++) {
        float *row = scores + r * (last - first), most = -3e38f, total = 0;
        for (long s = 0; s < last - first; s++) most = row[s] > most ? row[s] : most;
        for (long s = 0; s < last - first; s++) total += row[s] = expf(row[s] - most);
        top[r] = most; sum[r] = total;
    }
    mix(rows, last - first, scores, latent + first * latent_stride, latent_stride, out, C);
}

#ifdef HAS_AMX
enum { MIXED = 128 };  /* keys whose latents are packed at once */

/* From the tiles of 16 columns to those of the next: not a multiple of 4096 bytes. */
static inline long columns_apart(long keys) { return keys * 16 + 32; }

/* `live` rows of (., C) with a stride, as pairs of rows side by side: tiles (C / 16, keys / 32) of 16 pairs of keys and 16
   columns; zeros for keys that are not there. */
static void pack_values(const bf16 *rows, long stride, long live, long keys, long C, bf16 *tiles) {
    __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (long i = 0; i < keys / 2; i++)
        for (long c = 0; c < C; c += 32) {
            const bf16 *from = rows + 2 * i * stride + c;
            __m512i first = 2 * i < live ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
            __m512i second = 2 * i + 1 < live ? _mm512_loadu_si512(from + stride) : _mm512_setzero_si512();
            bf16 *to = tiles + c / 16 * columns_apart(keys) + i * 32;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(first, low, second));
            _mm512_store_si512(to + columns_apart(keys), _mm512_permutex2var_epi16(first, high, second));
        }
}

/* Scores of one row and its keys, hidden ones very low, to p = e^(score - largest) in bf16, zeros up to `padded`. */
static void weigh(long keys, long padded, float *scores, const uint8_t *mask, float scale, float *top, float *sum, bf16 *p) {
    __m512 most = _mm512_set1_ps(-3e38f), total = _mm512_setzero_ps(), low = most;
    for (long s = 0; s < keys; s += 16) {
        __mmask16 seen = lanes(keys - s, mask ? mask + s : NULL);
        __m512 x = _mm512_mask_mul_ps(low, seen, _mm512_loadu_ps(scores + s), _mm512_set1_ps(scale));
        _mm512_storeu_ps(scores + s, x);
        most = _mm512_max_ps(most, x);
    }
    *top = _mm512_reduce_max_ps(most);
    for (long s = 0; s < padded; s += 16) {
        __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + s), _mm512_set1_ps(*top)), _mm512_set1_ps(1.44269504f));
        __m512 y = _mm512_maskz_mov_ps(lanes(keys - s, NULL), exp2_ps(x));
        total = _mm512_add_ps(total, y);
        _mm256_storeu_si256((__m256i *)(p + s), (__m256i)_mm512_cvtneps_pbh(y));
    }
    *sum = _mm512_reduce_add_ps(total);
}

/* As attend_block by tiles, 16 rows together; q holds them as columns, latents above the rotated part. The cache is read as it
   lies: keys are the rows of one product, and the next one's depth. scores (rows, padded), out (rows, C), rows up to a multiple of 16. */
static void attend_block_tiles(long rows, long T, long C, long D, long first, long last, float scale, const uint32_t *q,
                               const bf16 *latent, long latent_stride, const bf16 *k_pe, long k_pe_stride, const uint8_t *mask,
                               long mask_stride, float *top, float *sum, float *out, float *scores, bf16 *scratch) {
    long keys = last - first, padded = (keys + 31) / 32 * 32, groups = (rows + 15) / 16;
    bf16 *values = scratch, *end = values + C / 16 * columns_apart(MIXED), *end_pe = end + 32 * C, *p = end_pe + 32 * D;
    float sums[32][32];  /* keys, rows */
    latent += first * latent_stride, k_pe += first * k_pe_stride;
    for (long s = 0; s < keys; s += 32) {
        const bf16 *k = latent + s * latent_stride, *pe = k_pe + s * k_pe_stride;
        long stride = latent_stride, pe_stride = k_pe_stride;
        if (s + 32 > keys) {  /* what lies behind the last key is not ours */
            memset(end, 0, 64 * (C + D));
            for (long i = 0; s + i < keys; i++) {
                memcpy(end + i * C, k + i * stride, 2 * C);
                memcpy(end_pe + i * D, pe + i * pe_stride, 2 * D);
            }
            k = end, stride = C, pe = end_pe, pe_stride = D;
        }
        for (long g = 0; g < groups; g += 2) {
            int both = g + 1 < groups;
            const uint32_t *q0 = q + g * 8 * (C + D), *q1 = both ? q0 + 8 * (C + D) : q0;
            clear_tiles();
            multiply_tiles(k, k + 16 * stride, 64, 2 * stride, q0, q1, 1024, 64, C / 32, both, NULL);
            multiply_tiles(pe, pe + 16 * pe_stride, 64, 2 * pe_stride, q0 + 8 * C, q1 + 8 * C, 1024, 64, D / 32, both, NULL);
            store_tiles(sums[0], 512, 32);
            for (int i = 0; i < 4; i++) {
                if (i % 2 && !both) continue;
                __m512i tile[16];
                turn_quarter(sums, i, tile);
                for (int r = 0; r < 16; r++)
                    _mm512_storeu_si512(scores + ((g + i % 2) * 16 + r) * padded + s + i / 2 * 16, tile[r]);
            }
        }
    }
    for (long r = 0; r < rows; r++)
        weigh(keys, padded, scores + r * padded, mask ? mask + (r % T) * mask_stride + first : NULL, scale, top + r, sum + r, p + r * padded);
    memset(p + rows * padded, 0, 2 * (groups * 16 - rows) * padded);
    for (long s = 0; s < keys; s += MIXED) {
        long now = padded - s < MIXED ? padded - s : MIXED, steps = now / 32;
        pack_values(latent + s * latent_stride, latent_stride, keys - s < now ? keys - s : now, now, C, values);
        long apart = columns_apart(now);
        for (long g = 0; g < groups; g++)
            for (long c = 0; c < C; c += 64) {
                float *to = out + g * 16 * C + c;
                const bf16 *a = p + g * 16 * padded + s, *b = values + c / 16 * apart;
                if (s) { LOAD(0, to, 4 * C); LOAD(1, to + 16, 4 * C); LOAD(2, to + 32, 4 * C); LOAD(3, to + 48, 4 * C); }
                else clear_tiles();
                for (long k = 0; k < steps; k++, a += 32, b += 512) {
                    LOAD(4, a, 2 * padded);
                    LOAD(6, b, 64); DOT(0, 4, 6);
                    LOAD(7, b + apart, 64); DOT(1, 4, 7);
                    LOAD(6, b + 2 * apart, 64); DOT(2, 4, 6);
                    LOAD(7, b + 3 * apart, 64); DOT(3, 4, 7);
                }
                STORE(0, to, 4 * C); STORE(1, to + 16, 4 * C); STORE(2, to + 32, 4 * C); STORE(3, to + 48, 4 * C);
            }
    }
}

/* Rows of q (., C) and q_pe (., D) as columns, 16 of them. */
static void pack_queries(long group, long rows, long C, long D, const bf16 *q, const bf16 *q_pe, uint32_t *columns) {
    int64_t number[16];
    for (int i = 0; i < 16; i++) number[i] = group * 16 + i;
    long live = rows - group * 16 < 16 ? rows - group * 16 : 16;
    pack_columns(C / 2, live, (const uint32_t *)q, number, columns + group * 8 * (C + D));
    pack_columns(D / 2, live, (const uint32_t *)q_pe, number, columns + group * 8 * (C + D) + 8 * C);
}
#endif

/* Absorbed attention of one layer. q_nope (B, h, T, dn), q_pe (B, h, T, D), up (h, dn + dv, C), latent (B, S, C) and k_pe
   (B, S, D) with strides, mask (B or 1, T, S) bytes or null; out (B, T, h, dv). Blocks are merged in order, so the result
   does not depend on the threads. */
int absorb(long B, long heads, long T, long S, long dn, long dv, long C, long D, float scale,
           const bf16 *q_nope, const bf16 *q_pe, const bf16 *up, const bf16 *latent, long latent_batch, long latent_stride,
           const bf16 *k_pe, long k_pe_batch, long k_pe_stride, const uint8_t *mask, long mask_batch, bf16 *out) {
    long rows = heads * T, block = (S + 63) / 64 > 128 ? ((S + 63) / 64 + 31) / 32 * 32 : 128, blocks = (S + block - 1) / block;
    long groups = (rows + 15) / 16, per_block = groups * 16 * (C + 2 + block), failed = 0;
    float *memory = malloc((B * blocks * per_block) * sizeof(float) + B * rows * C * sizeof(bf16));
    if (!memory) return 1;
    bf16 *q = (bf16 *)(memory + B * blocks * per_block);
#ifdef HAS_AMX
    int tiles = has_tiles && C % 64 == 0 && D % 32 == 0;
    uint32_t *columns = tiles ? aligned_alloc(64, B * groups * 32 * (C + D)) : NULL;
    if (tiles && !columns) { free(memory); return 1; }
#endif
    #pragma omp parallel
    {
        #pragma omp for collapse(2) schedule(static)
        for (long b = 0; b < B; b++)
            for (long h = 0; h < heads; h++)
                for (long t = 0; t < T; t++) {
                    float sums[4096];  /* C is checked by the caller */
                    long row = (b * heads + h) * T + t;
                    memset(sums, 0, C * sizeof(float));
                    for (long d = 0; d < dn; d++) add_scaled(sums, widen(q_nope[row * dn + d]), up + (h * (dn + dv) + d) * C, C);
                    for (long c = 0; c < C; c++) q[row * C + c] = narrow(sums[c]);
                }
#ifdef HAS_AMX
        bf16 *scratch = tiles ? aligned_alloc(64, 2 * (C / 16 * columns_apart(MIXED) + 32 * (C + D) + groups * 16 * block)) : NULL;
        if (tiles && !scratch) {
            #pragma omp atomic write
            failed = 1;
        }
        tile_shapes theirs = open_tiles();
        #pragma omp for collapse(2) schedule(static)
        for (long b = 0; b < B; b++)
            for (long g = 0; g < groups; g++)
                if (tiles) pack_queries(g, rows, C, D, q + b * rows * C, q_pe + b * rows * D, columns + b * groups * 8 * (C + D));
#endif
        #pragma omp for collapse(2) schedule(static)
        for (long b = 0; b < B; b++)
            for (long k = 0; k < blocks; k++) {
                float *part = memory + (b * blocks + k) * per_block;
                long last = (k + 1) * block < S ? (k + 1) * block : S;
                float *sum = part + rows, *mixed = part + 2 * rows, *scores = mixed + groups * 16 * C;
                const bf16 *latents = latent + b * latent_batch, *pe = k_pe + b * k_pe_batch;
                const uint8_t *seen = mask ? mask + b * mask_batch : NULL;
#ifdef HAS_AMX
                if (tiles) {
                    if (scratch) attend_block_tiles(rows, T, C, D, k * block, last, scale, columns + b * groups * 8 * (C + D), latents,
                                                    latent_stride, pe, k_pe_stride, seen, S, part, sum, mixed, scores, scratch);
                    continue;
                }
#endif
                attend_block(rows, T, C, D, k * block, last, scale, q + b * rows * C, q_pe + b * rows * D, latents, latent_stride,
                             pe, k_pe_stride, seen, S, part, sum, mixed, scores);
            }
#ifdef HAS_AMX
        close_tiles(theirs);
        free(scratch);
#endif
        #pragma omp for collapse(2) schedule(static)
        for (long b = 0; b < B; b++)
            for (long r = 0; r < rows; r++) {
                float sums[4096], most = -3e38f, total = 0;
                bf16 mixed[4096];
                const bf16 *at = mixed;
                float *parts = memory + b * blocks * per_block;
                for (long k = 0; k < blocks; k++) most = parts[k * per_block + r] > most ? parts[k * per_block + r] : most;
                memset(sums, 0, C * sizeof(float));
                for (long k = 0; k < blocks; k++) {
                    float *part = parts + k * per_block, weight = expf(part[r] - most);
                    total += weight * part[rows + r];
                    for (long c = 0; c < C; c++) sums[c] += weight * part[2 * rows + r * C + c];
                }
                for (long c = 0; c < C; c++) mixed[c] = narrow(sums[c] / total);
                for (long v = 0; v < dv; v++) {
                    float y;
                    dot_bf16(up + ((r / T) * (dn + dv) + dn + v) * C, &at, C, 1, &y);
                    out[((b * T + r % T) * heads + r / T) * dv + v] = narrow(y);
                }
            }
    }
    free(memory);
#ifdef HAS_AMX
    free(columns);
#endif
    return (int)failed;
}
"""
