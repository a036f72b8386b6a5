/* The tile unit (AMX). A tile is 16 rows of 64 bytes. One instruction multiplies

     C (16, 16) fp32  +=  A (16, 32) bf16  times  B (16 pairs, 16 columns, 2) bf16

   where the two inputs of a pair are side by side in B. The 32 inputs in a row of A are exactly one group of int4, so an
   expert's weights are unpacked row by row into A, and activations are packed in columns into B. The result has a row for
   each output and a column for each row of activations, which is the order that B needs in the next product.

   There are eight tiles: 0..3 hold sums, a square of 32 x 32, and 4..7 hold the factors. */

#ifndef KIMI_AMX_H
#define KIMI_AMX_H

#include "common.h"

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
