/* Absorbed attention of few new tokens. kv_b_proj holds for each head a matrix for keys (UK) above one for values (UV).
   q_nope is multiplied by UK and attends to the latents as they are cached; the weighted sum of latents is multiplied by
   UV. The cache is cut into blocks of keys, which threads share; each block yields its largest score, its sum of weights
   and its weighted sum of latents, and these are merged in order, so the result does not depend on the number of threads. */

#include "common.h"
#include "amx.h"

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
