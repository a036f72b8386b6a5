/* The names of csrc/amx.h in plain C, so that code with tiles runs, and is checked, where there is no tile unit:
   gcc -DAMX_EMULATION='"tests/amx_emulation.h"'. Tiles of 16 rows of 64 bytes; each row is one access to memory, which
   sanitizers and guard pages see. Like the unit itself it stops a program that uses tiles without configuring them. */

#ifndef KIMI_AMX_EMULATION_H
#define KIMI_AMX_EMULATION_H

#include <stdio.h>

typedef int tile_config;

static int has_tiles = 0;
static __thread tile_config tiles_are_open = 0;
static __thread uint8_t tile_bytes[8][16][64];

int use_tiles(long wanted) { return has_tiles = wanted != 0; }

static inline tile_config open_tiles(void) {
    tile_config before = tiles_are_open;
    if (has_tiles) tiles_are_open = 1;
    return before;
}

static inline void close_tiles(tile_config before) { tiles_are_open = before; }

static inline void need_open_tiles(void) {
    if (tiles_are_open) return;
    fprintf(stderr, "a tile is used before open_tiles or after close_tiles\n");
    abort();
}

static inline void load_tile(int tile, const char *from, long stride) {
    need_open_tiles();
    for (int i = 0; i < 16; i++) memcpy(tile_bytes[tile][i], from + i * stride, 64);
}

static inline void store_tile(int tile, char *to, long stride) {
    need_open_tiles();
    for (int i = 0; i < 16; i++) memcpy(to + i * stride, tile_bytes[tile][i], 64);
}

/* c (16, 16) fp32 += a (16, 32) bf16 times b (16 pairs, 16, 2) bf16. Only tiles are touched, so nothing is to be checked. */
__attribute__((no_sanitize("address", "undefined"), optimize("O3")))
static void multiply_one_tile(int c, int a, int b) {
    float sums[16][16];
    bf16 left[16][32], right[16][32];
    need_open_tiles();
    memcpy(sums, tile_bytes[c], sizeof sums);
    memcpy(left, tile_bytes[a], sizeof left);
    memcpy(right, tile_bytes[b], sizeof right);
    for (int k = 0; k < 32; k++)
        for (int i = 0; i < 16; i++) {
            float x = to_float(left[i][k]);
            for (int j = 0; j < 16; j++) sums[i][j] += x * to_float(right[k / 2][2 * j + k % 2]);
        }
    memcpy(tile_bytes[c], sums, sizeof sums);
}

#define TILE_LOAD(tile, base, stride) load_tile(tile, (const char *)(base), stride)
#define TILE_STORE(tile, base, stride) store_tile(tile, (char *)(base), stride)
#define TILE_DOT(c, a, b) multiply_one_tile(c, a, b)
#define TILE_ZERO(tile) (need_open_tiles(), (void)memset(tile_bytes[tile], 0, sizeof tile_bytes[tile]))

#endif
