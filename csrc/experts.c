/* Routed experts with int4 weights: few rows with the words as they are, many rows by tiles, and unpacking for PyTorch's
   own product.

   The format. A matrix (N, M) is stored as words (N, M/8) of 32 bits and scales (N, M/32) in bf16. The code of input m is
   nibble m % 8 of word m // 8, the lowest nibble first; the weight is (code - 8) * scale of its group of 32 inputs.

   How a word becomes numbers. For s = 0..3

     ((word >> 4 s) & 0x000F000F) | 0x43004300

   are two bf16 numbers, 128 + code of nibble s and 128 + code of nibble s + 4: 0x4300 is 128 in bf16, and its last bit
   counts one. So no conversion is needed: AVX-512's bf16 dot product takes them as they are, and 136 times the sum of the
   inputs is subtracted, since code - 8 = (128 + code) - 136. Inputs are arranged in that order beforehand. Sums are fp32. */

#include "common.h"
#include "amx.h"

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
