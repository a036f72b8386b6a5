/* Attention of many new tokens, for bf16 keys and values made from the latents. For Q_ROWS queries and KEYS keys at a time:

     scores (Q_ROWS, KEYS)   q (Q_ROWS, dn + dr) times packed keys, fp32
     p = 2^(scores - largest so far), bf16; each row keeps its largest score and its sum of p, fp32
     out (Q_ROWS, dv)       out * 2^(largest before - largest so far) + p times packed values, fp32

   Packed means in panels of PANEL columns, with the two inputs of a bf16 dot product side by side: (depth / 2, PANEL, 2).
   For keys a column is a key and the depth is dn + dr; for values a column is one of dv and the depth is the keys. */

#include "common.h"
#include "amx.h"

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
