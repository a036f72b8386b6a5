/* Runs the functions of csrc/ without Python on odd shapes, between guard pages, and compares them with plain loops in
   double. tests/test_csrc.py compiles it with sanitizers:

     csrc_driver FUNCTION [tiles]      exit status 0 and one line, or the case that failed and why

   SOURCE is the joined source, included here. A level (plain loops, AVX-512 with bf16, AMX or its emulation) has the
   functions that the compiler's macros give it. Tiles are used if asked for.

   Each buffer is mapped alone between two pages that no access may touch. Each case runs three times: with the end of each
   buffer at the page behind it, with its start at the page before it, and with its end one element before the page behind
   it, which changes the alignment. The number of threads is 2, 1 and 3; the results are the same to the bit. Inputs are
   read-only while a function runs. What is in a buffer's pages but not part of it, and the gaps between strided rows, are
   NaN (all bits one), and must stay so.

   What is allowed follows from the roundings: a number rounded to bf16 is off by at most 2^-8 of its size (BF16), each sum in
   fp32 by 2^-24 of the sum of its terms' sizes for each term (FP32). Roundings of terms are independent of each other, so
   their effect on a sum is estimated by the root of the sum of their squares; SPREAD times that is allowed. */

#include SOURCE
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef _OPENMP
void omp_set_num_threads(int threads);
#else
static void omp_set_num_threads(int threads) { (void)threads; }
#endif

#define BF16 (1.01 / 256)
#define FP32 (1.0 / (1 << 24))
#define SPREAD 3
#define LENGTH(list) ((long)(sizeof(list) / sizeof *(list)))
#define UNCHECKED __attribute__((no_sanitize("address", "undefined"), optimize("O2")))  /* references, for speed */

/* -------------------------------------------------------------------------------------------------- cases and failures */

enum { BEHIND, IN_FRONT, SHIFTED, PLACES };
static const char *place_names[] = {"guard page behind", "guard page in front", "shifted by one element"};
static int place;
static long cases, numbers;
static uint64_t digests[1000];  /* of the results of each case, when it ran for the first time */
static double worst;  /* the largest share of what was allowed */
static char description[300];

static void fail(const char *reason) {
    printf("%s (%s): %s\n", description, place_names[place], reason);
    exit(1);
}

/* Printed at once: after a crash the last line says which case it was. */
#define CASE(...) do { snprintf(description, sizeof description, __VA_ARGS__); cases++; \
                       printf("%s (%s)\n", description, place_names[place]); fflush(stdout); } while (0)

static void compare(const char *what, long index, double got, double want, double allowed) {
    double off = fabs(got - want);
    numbers++;
    if (off <= allowed) {
        if (allowed > 0 && off / allowed > worst) worst = off / allowed;
        return;
    }
    char text[200];
    snprintf(text, sizeof text, "%s[%ld] is %.9g instead of %.9g; off by %.3g, allowed %.3g", what, index, got, want, off, allowed);
    fail(text);
}

/* ------------------------------------------------------------------------------------------------------ guarded buffers */

typedef struct { char *map, *at; long mapped, bytes; int writable; } buffer;
static buffer buffers[32];
static int buffer_count;

static void *new_buffer(long bytes, long element, int writable) {
    long page = sysconf(_SC_PAGESIZE), inside = (bytes + element + page - 1) / page * page;
    char *map = mmap(NULL, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || buffer_count == LENGTH(buffers)) fail("the driver has no room for a buffer");
    if (mprotect(map + page, inside, PROT_READ | PROT_WRITE)) fail("mprotect failed");
    memset(map + page, 0xFF, inside);
    long before = place == IN_FRONT ? 0 : inside - bytes - (place == SHIFTED ? element : 0);
    buffers[buffer_count++] = (buffer){map, map + page + before, inside + 2 * page, bytes, writable};
    return map + page + before;
}

static void close_inputs(void) {
    long page = sysconf(_SC_PAGESIZE);
    for (int i = 0; i < buffer_count; i++)
        if (!buffers[i].writable) mprotect(buffers[i].map + page, buffers[i].mapped - 2 * page, PROT_READ);
}

static void free_buffers(void) {
    long page = sysconf(_SC_PAGESIZE);
    for (int i = 0; i < buffer_count; i++) {
        buffer b = buffers[i];
        for (char *at = b.map + page; at < b.map + b.mapped - page; at++)
            if ((at < b.at || at >= b.at + b.bytes) && (uint8_t)*at != 0xFF) fail("memory beside a buffer was written to");
        munmap(b.map, b.mapped);
    }
    buffer_count = 0;
}

/* After each call: whether this case ran before, which must have given the same results. If so, its buffers are freed. */
static int ran_before(void) {
    uint64_t digest = 1469598103934665603u;
    for (int i = 0; i < buffer_count; i++)
        for (long k = 0; k < buffers[i].bytes * buffers[i].writable; k++) digest = (digest ^ (uint8_t)buffers[i].at[k]) * 1099511628211u;
    if (cases == LENGTH(digests)) fail("the driver has no room for so many cases");
    if (place == 0) digests[cases] = digest;
    else if (digests[cases] != digest) fail("the result is another one than with other threads and another alignment");
    if (place > 0) free_buffers();
    return place > 0;
}

static uint32_t seed = 1;

UNCHECKED static uint32_t random_bits(void) {
    seed ^= seed << 13, seed ^= seed >> 17, seed ^= seed << 5;
    return seed;
}

UNCHECKED static double uniform(void) { return random_bits() / 2147483648.0 - 1; }  /* -1 to 1 */

/* A tensor with three strides in elements; its last dimension is contiguous. */
typedef struct { bf16 *at; long size[4], stride[3]; } tensor;

/* `gap` elements between rows, and as many again between blocks of rows and groups of blocks. */
static tensor new_tensor(long a, long b, long c, long d, long gap, int writable) {
    tensor t = {NULL, {a, b, c, d}, {b * (c * (d + gap) + gap) + gap, c * (d + gap) + gap, d + gap}};
    long none = !a || !b || !c || !d;
    long count = none ? 0 : (a - 1) * t.stride[0] + (b - 1) * t.stride[1] + (c - 1) * t.stride[2] + d;
    t.at = new_buffer(count * 2, 2, writable);
    return t;
}

UNCHECKED static bf16 *row_at(tensor t, long a, long b, long c) { return t.at + a * t.stride[0] + b * t.stride[1] + c * t.stride[2]; }

static tensor random_tensor(long a, long b, long c, long d, long gap) {
    tensor t = new_tensor(a, b, c, d, gap, 0);
    for (long i = 0; i < a * b * c; i++)
        for (long k = 0; k < d; k++) row_at(t, i / (b * c), i / c % b, i % c)[k] = to_bf16((float)uniform());
    return t;
}

static bf16 *random_bf16(long count) { return random_tensor(1, 1, 1, count, 0).at; }
static bf16 *new_bf16(long count) { return new_tensor(1, 1, 1, count, 0, 1).at; }
static float *new_floats(long count) { return new_buffer(count * 4, 4, 1); }

static float *random_floats(long count) {
    float *x = new_buffer(count * 4, 4, 0);
    for (long i = 0; i < count; i++) x[i] = (float)uniform();
    return x;
}

/* Masks (count, T, S), or null for kind 0. 1: random ones; 2: causal ones; 3: as 1, and the first row hides all. */
static uint8_t *new_mask(int kind, long count, long T, long S) {
    if (!kind) return NULL;
    uint8_t *mask = new_buffer(count * T * S, 1, 0);
    for (long i = 0; i < count * T * S; i++) {
        long t = i / S % T, s = i % S;
        mask[i] = kind == 2 ? s <= S - T + t : random_bits() % 3 != 0 && !(kind == 3 && t == 0);
    }
    return mask;
}

/* ------------------------------------------------------------------------------------- products, norms, rotary embedding */

UNCHECKED static inline double wide(bf16 x) {  /* as to_float, which is not inlined in unchecked code */
    union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
    return u.value;
}

UNCHECKED static double dot(const bf16 *a, const bf16 *b, long n, double *size) {
    double sum = 0;
    for (long i = 0; i < n; i++) {
        double term = wide(a[i]) * wide(b[i]);
        sum += term, *size += fabs(term);
    }
    return sum;
}

static void linear_case(long R, long N, long M, int wide) {
    CASE("linear_bf16 R %ld N %ld M %ld, %s", R, N, M, wide ? "fp32" : "bf16");
    bf16 *x = random_bf16(R * M), *a = random_bf16(N * M), *y = wide ? NULL : new_bf16(R * N);
    float *sums = wide ? new_floats(R * N) : NULL;
    close_inputs();
    linear_bf16(R, N, M, x, a, y, sums);
    if (ran_before()) return;
    for (long i = 0; i < R * N; i++) {
        double size = 0, want = dot(x + i / N * M, a + i % N * M, M, &size), allowed = (double)M * FP32 * size;
        compare("y", i, y ? to_float(y[i]) : sums[i], want, allowed + (y ? BF16 * fabs(want) : 0));
    }
    free_buffers();
}

static void test_linear(void) {
    static const long rows[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33}, outputs[] = {1, 5, 0, 33};
    static const long inputs[] = {1, 31, 64, 97, 32, 0, 63, 160, 33, 128, 65};
    for (long i = 0; i < LENGTH(rows) * LENGTH(inputs); i++)
        linear_case(rows[i % LENGTH(rows)], outputs[i % LENGTH(outputs)], inputs[i % LENGTH(inputs)], i % 3 == 0);
}

static void norm_case(long R, long M) {
    CASE("rms_norm R %ld M %ld", R, M);
    bf16 *x = random_bf16(R * M), *weight = random_bf16(M), *y = new_bf16(R * M);
    close_inputs();
    rms_norm(R, M, 1e-5f, x, weight, y);
    if (ran_before()) return;
    for (long r = 0; r < R; r++) {
        double squares = 0;
        dot(x + r * M, x + r * M, M, &squares);
        for (long m = 0; m < M; m++) {
            double want = to_float(x[r * M + m]) / sqrt(squares / (double)M + 1e-5) * to_float(weight[m]);
            compare("y", r * M + m, to_float(y[r * M + m]), want, 2.01 * BF16 * fabs(want));  /* rounded twice */
        }
    }
    free_buffers();
}

static void test_norm(void) {
    static const long rows[] = {0, 1, 7, 16, 17, 33}, widths[] = {0, 1, 15, 16, 17, 33, 100};
    for (long i = 0; i < LENGTH(rows) * LENGTH(widths); i++) norm_case(rows[i % LENGTH(rows)], widths[i % LENGTH(widths)]);
}

static void rotary_case(long B, long heads, long T, long D, long gap) {
    CASE("rotary B %ld heads %ld T %ld D %ld gap %ld", B, heads, T, D, gap);
    tensor x = random_tensor(B, heads, T, D, gap);
    float *cosines = random_floats(B * T * (D / 2)), *sines = random_floats(B * T * (D / 2));
    bf16 *out = new_bf16(B * heads * T * D);
    close_inputs();
    rotary(B, heads, T, D, x.at, x.stride, cosines, sines, out);
    if (ran_before()) return;
    for (long i = 0; i < B * heads * T * (D / 2); i++) {
        long row = i / (D / 2), j = i % (D / 2), b = row / (heads * T), t = row % T;
        const bf16 *pair = row_at(x, b, row / T % heads, t) + 2 * j;
        double one = to_float(pair[0]), two = to_float(pair[1]), fp32 = 3 * FP32 * (fabs(one) + fabs(two));
        double c = cosines[(b * T + t) * (D / 2) + j], s = sines[(b * T + t) * (D / 2) + j];
        double first = one * c - two * s, second = two * c + one * s;
        compare("first members", i, to_float(out[row * D + j]), first, BF16 * fabs(first) + fp32);
        compare("second members", i, to_float(out[row * D + D / 2 + j]), second, BF16 * fabs(second) + fp32);
    }
    free_buffers();
}

static void test_rotary(void) {
    static const long batches[] = {1, 2}, heads[] = {1, 3, 0}, tokens[] = {1, 7, 33, 0, 130}, widths[] = {2, 8, 32, 64, 0, 24, 6};
    for (long i = 0; i < LENGTH(tokens) * LENGTH(widths); i++)
        rotary_case(batches[i % 2], heads[i % 3], tokens[i % LENGTH(tokens)], widths[i % LENGTH(widths)], i % 4);
}

/* ------------------------------------------------------------------------------------------------------------ int4 experts */

UNCHECKED static int code_at(const uint32_t *words, long input) { return (int)(words[input / 8] >> 4 * (input % 8) & 15) - 8; }

static uint32_t *random_words(long count) {
    uint32_t *words = new_buffer(count * 4, 4, 0);
    for (long i = 0; i < count; i++) words[i] = random_bits() ^ random_bits() << 16;
    return words;
}

static void unpack_case(long N, long M) {
    CASE("unpack_int4 N %ld M %ld", N, M);
    uint32_t *words = random_words(N * M / 8);
    bf16 *scale = random_bf16(N * M / 32), *out = new_bf16(N * M);
    close_inputs();
    unpack_int4(N, M, words, scale, out);
    if (ran_before()) return;
    for (long i = 0; i < N * M; i++)  /* the product is exact in fp32, so it is rounded once */
        compare("out", i, to_float(out[i]), to_float(to_bf16((float)code_at(words, i) * to_float(scale[i / 32]))), 0);
    free_buffers();
}

static void test_unpack(void) {
    static const long rows[] = {0, 1, 3, 17}, inputs[] = {0, 32, 64, 96, 160, 544, 128};
    for (long i = 0; i < LENGTH(rows) * LENGTH(inputs); i++) unpack_case(rows[i % LENGTH(rows)], inputs[i % LENGTH(inputs)]);
}

typedef struct { long outputs, inputs; uint32_t *words; bf16 *scale; } matrices;  /* a stack, (E, outputs, inputs) */

/* Scales of 5 bits, so that (code - 8) * scale is a bf16 number: unpacked weights are not rounded. */
static matrices random_matrices(long E, long outputs, long inputs) {
    matrices m = {outputs, inputs, random_words(E * outputs * inputs / 8), NULL};
    long count = E * outputs * inputs / 32;
    m.scale = new_buffer(count * 2, 2, 0);
    for (long i = 0; i < count; i++) m.scale[i] = to_bf16((float)(16 + random_bits() % 16) / 512);
    return m;
}

/* One output of an expert for x, of which x_off may be wrong. `off` becomes the expected error of the result: by x_off, and in
   fp32 by sums of up to 144 * input * scale (csrc/experts.c, how a word becomes numbers), of which each vector lane adds
   few one after the other, so 16 times their size. */
UNCHECKED static double int4_product(matrices m, long row, const double *x, const double *x_off, double *off) {
    double sum = 0, size = 0, squares = 0;
    for (long i = 0; i < m.inputs; i++) {
        double scale = wide(m.scale[(row * m.inputs + i) / 32]), weight = code_at(m.words, row * m.inputs + i) * scale;
        sum += weight * x[i], size += 144 * scale * fabs(x[i]), squares += weight * x_off[i] * weight * x_off[i];
    }
    *off = sqrt(squares) + 16 * FP32 * size;
    return sum;
}

/* y (H) = down(silu(gate(x)) * up(x)) of one expert, and the expected errors. */
UNCHECKED static void expert_reference(matrices gate, matrices up, matrices down, long expert, const bf16 *input, double *y, double *off) {
    long H = gate.inputs, I = gate.outputs;
    double x[1024], none[1024] = {0}, hidden[1024], hidden_off[1024];
    if (H > LENGTH(x) || I > LENGTH(hidden)) fail("the driver has no room for so wide an expert");
    for (long h = 0; h < H; h++) x[h] = wide(input[h]);
    for (long i = 0; i < I; i++) {
        double a_off, b_off, a = int4_product(gate, expert * I + i, x, none, &a_off), b = int4_product(up, expert * I + i, x, none, &b_off);
        double silu = a / (1 + exp(-a));
        hidden[i] = silu * b;
        hidden_off[i] = 1.1 * a_off * fabs(b) + fabs(silu) * b_off + BF16 * fabs(hidden[i]);  /* silu's slope is at most 1.1 */
    }
    for (long h = 0; h < H; h++) y[h] = int4_product(down, expert * H + h, hidden, hidden_off, off + h);
}

static void few_rows_case(long R, long K, long H, long I, long E, int same) {
    CASE("experts_int4_few_rows R %ld K %ld H %ld I %ld E %ld%s", R, K, H, I, E, same ? ", all rows to one expert" : "");
    matrices gate = random_matrices(E, I, H), up = random_matrices(E, I, H), down = random_matrices(E, H, I);
    bf16 *x = random_bf16(R * H);
    int64_t *ids = new_buffer(R * K * 8, 8, 0);
    float *weights = random_floats(R * K), *out = new_floats(R * H);
    for (long p = 0; p < R * K; p++) ids[p] = same ? E - 1 : random_bits() % E;
    close_inputs();
    int status = experts_int4_few_rows(R, K, H, I, E, x, ids, weights, gate.words, gate.scale, up.words, up.scale, down.words,
                                       down.scale, out);
    if (status) fail("it returned an error");
    if (ran_before()) return;
    for (long r = 0; r < R; r++) {
        double y[1024], off[1024], want[1024] = {0}, allowed[1024] = {0};
        for (long k = 0; k < K; k++) {
            expert_reference(gate, up, down, ids[r * K + k], x + r * H, y, off);
            for (long h = 0; h < H; h++)
                want[h] += weights[r * K + k] * y[h], allowed[h] += fabs(weights[r * K + k]) * (SPREAD * off[h] + 8 * FP32 * fabs(y[h]));
        }
        for (long h = 0; h < H; h++) compare("out", r * H + h, out[r * H + h], want[h], allowed[h]);
    }
    free_buffers();
}

static void bad_ids_case(int64_t bad) {
    CASE("experts_int4_few_rows with id %ld of 3 experts", (long)bad);
    matrices m = random_matrices(3, 32, 32);
    bf16 *x = random_bf16(2 * 32);
    int64_t *ids = new_buffer(2 * 8, 8, 0);
    float *weights = random_floats(2), *out = new_floats(2 * 32);
    ids[0] = 1, ids[1] = bad;
    close_inputs();
    int status = experts_int4_few_rows(2, 1, 32, 32, 3, x, ids, weights, m.words, m.scale, m.words, m.scale, m.words, m.scale, out);
    if (status != BAD_ID) fail("it did not return BAD_ID");
    free_buffers();
}

static void test_few_rows(void) {
    static const long rows[] = {1, 0, 2, 7, 9, 17, 4, 8}, choices[] = {1, 3, 2}, experts[] = {1, 4};
    static const long H[] = {32, 96, 544, 64, 512, 160}, I[] = {32, 96, 64, 160, 32};
    for (long i = 0; i < 30; i++)
        few_rows_case(rows[i % LENGTH(rows)], choices[i % 3], H[i % LENGTH(H)], I[i % LENGTH(I)], experts[i / 3 % 2], i % 5 == 0);
    few_rows_case(33, 1, 32, 544, 2, 1);
    few_rows_case(3, 0, 64, 32, 2, 0);
    bad_ids_case(-1);
    bad_ids_case(3);
    bad_ids_case(INT64_MAX);
    bad_ids_case(INT64_MIN);
}

#ifdef HAS_AMX
static void tiles_case(long R, long H, long I, long E, long start) {
    long place_in_stack = E - 1, tokens = R / 2 + 3;
    CASE("expert_int4_tiles R %ld H %ld I %ld E %ld start %ld", R, H, I, E, start);
    matrices gate = random_matrices(E, I, H), up = random_matrices(E, I, H), down = random_matrices(E, H, I);
    bf16 *x = random_bf16(tokens * H);
    int64_t *rows = new_buffer((start + R) * 8, 8, 0);
    float *weights = random_floats(start + R), *out = new_floats(tokens * H), *before = random_floats(tokens * H);
    for (long p = 0; p < start + R; p++) rows[p] = p < start ? -1 : random_bits() % tokens;  /* those before are not its own */
    memcpy(out, before, (size_t)(tokens * H) * 4);
    close_inputs();
    int status = expert_int4_tiles(place_in_stack, start, R, H, I, x, rows, weights, gate.words, gate.scale, up.words, up.scale,
                                   down.words, down.scale, out);
    if (status) fail("it returned an error");
    if (ran_before()) return;
    for (long t = 0; t < tokens; t++) {
        double y[1024], off[1024], weight = 0, size = 0;
        for (long p = start; p < start + R; p++)
            if (rows[p] == t) weight += weights[p], size += fabs(weights[p]);
        expert_reference(gate, up, down, place_in_stack, x + t * H, y, off);
        for (long h = 0; h < H; h++) {
            double had = before[t * H + h];
            compare("out", t * H + h, out[t * H + h], had + weight * y[h],
                    size * (SPREAD * off[h] + 8 * FP32 * fabs(y[h])) + 8 * FP32 * fabs(had));
        }
    }
    free_buffers();
}

static void test_tiles(void) {
    static const long rows[] = {1, 7, 15, 16, 17, 0, 33, 48, 65}, H[] = {32, 96, 64, 288, 160}, I[] = {32, 64, 96, 288}, starts[] = {0, 5};
    for (long i = 0; i < 20; i++)
        tiles_case(rows[i % LENGTH(rows)], H[i % LENGTH(H)], I[i % LENGTH(I)], 1 + i / 2 % 3, starts[i % 2]);
}
#endif

/* -------------------------------------------------------------------------------------------------------------- attention */

typedef struct { double value, off; } estimate;  /* a number and its expected error */

/* Turns n scores to weights that sum to one. All but `seen` ones are -infinity. */
UNCHECKED static void softmax(estimate *scores, long n, double rounding) {
    double most = -INFINITY, sum = 0;
    for (long s = 0; s < n; s++) most = fmax(most, scores[s].value);
    for (long s = 0; s < n; s++) sum += exp(scores[s].value - most);
    for (long s = 0; s < n; s++) {
        double p = most == -INFINITY ? 0 : exp(scores[s].value - most) / sum;
        scores[s] = (estimate){p, p * (2 * scores[s].off + rounding)};
    }
}

typedef struct { long B, heads, T, S, dn, dv, C, D, gap; int mask, shared; } absorb_sizes;

/* The output (dv) of one query q_nope (dn), q_pe (D) at sequence b. */
UNCHECKED static void absorb_reference(absorb_sizes n, const bf16 *q_nope, const bf16 *q_pe, const bf16 *up, tensor latent, tensor k_pe,
                                       long b, const uint8_t *mask, float scale, estimate *scores, estimate *out) {
    estimate q[512], mixed[512];
    int any = 0;
    for (long c = 0; c < n.C; c++) {
        q[c] = (estimate){0, 0};
        for (long d = 0; d < n.dn; d++) q[c].value += wide(q_nope[d]) * wide(up[d * n.C + c]);
        q[c].off = BF16 * fabs(q[c].value), mixed[c] = (estimate){0, 0};
    }
    for (long s = 0; s < n.S; s++) any |= !mask || mask[s];
    for (long s = 0; s < n.S; s++) {
        const bf16 *key = row_at(latent, b, 0, s);
        double size = 0, sum = dot(q_pe, row_at(k_pe, b, 0, s), n.D, &size), squares = 0;
        for (long c = 0; c < n.C; c++) {
            double k = wide(key[c]);
            sum += q[c].value * k, size += fabs(q[c].value * k), squares += q[c].off * k * q[c].off * k;
        }
        scores[s] = (estimate){scale * sum, scale * (sqrt(squares) + 32 * FP32 * size)};
        if (!any) scores[s] = (estimate){0, 0};  /* a query that sees nothing gets the mean */
        else if (mask && !mask[s]) scores[s] = (estimate){-INFINITY, 0};
    }
    softmax(scores, n.S, BF16);
    for (long s = 0; s < n.S; s++)
        for (long c = 0; c < n.C; c++) {
            double k = wide(row_at(latent, b, 0, s)[c]);
            mixed[c].value += scores[s].value * k, mixed[c].off += scores[s].off * k * scores[s].off * k;
        }
    for (long v = 0; v < n.dv; v++) {
        double sum = 0, squares = 0, size = 0;
        for (long c = 0; c < n.C; c++) {
            double w = wide(up[(n.dn + v) * n.C + c]), off = sqrt(mixed[c].off) + BF16 * fabs(mixed[c].value);
            sum += w * mixed[c].value, size += fabs(w * mixed[c].value), squares += w * off * w * off;
        }
        out[v] = (estimate){sum, SPREAD * sqrt(squares) + 64 * FP32 * size + BF16 * fabs(sum)};
    }
}

static void absorb_case(absorb_sizes n) {
    CASE("absorb B %ld heads %ld T %ld S %ld dn %ld dv %ld C %ld D %ld gap %ld mask %d%s", n.B, n.heads, n.T, n.S, n.dn, n.dv, n.C,
         n.D, n.gap, n.mask, n.shared ? " for all" : "");
    bf16 *q_nope = random_bf16(n.B * n.heads * n.T * n.dn), *q_pe = random_bf16(n.B * n.heads * n.T * n.D);
    bf16 *up = random_bf16(n.heads * (n.dn + n.dv) * n.C), *out = new_bf16(n.B * n.T * n.heads * n.dv);
    tensor latent = random_tensor(n.B, 1, n.S, n.C, n.gap), k_pe = random_tensor(n.B, 1, n.S, n.D, 3 * n.gap);
    uint8_t *mask = new_mask(n.mask, n.shared ? 1 : n.B, n.T, n.S);
    long mask_batch = n.shared ? 0 : n.T * n.S;
    float scale = 2.0f / sqrtf((float)(n.dn * n.C + n.D));
    close_inputs();
    int status = absorb(n.B, n.heads, n.T, n.S, n.dn, n.dv, n.C, n.D, scale, q_nope, q_pe, up, latent.at, latent.stride[0],
                        latent.stride[2], k_pe.at, k_pe.stride[0], k_pe.stride[2], mask, mask_batch, out);
    if (status) fail("it returned an error");
    if (ran_before()) return;
    estimate *scores = malloc((size_t)n.S * sizeof *scores), want[64];
    for (long row = 0; row < n.B * n.heads * n.T; row++) {
        long b = row / (n.heads * n.T), h = row / n.T % n.heads, t = row % n.T;
        absorb_reference(n, q_nope + row * n.dn, q_pe + row * n.D, up + h * (n.dn + n.dv) * n.C, latent, k_pe, b,
                         mask ? mask + b * mask_batch + t * n.S : NULL, scale, scores, want);
        for (long v = 0; v < n.dv; v++) {
            long at = ((b * n.T + t) * n.heads + h) * n.dv + v;
            compare("out", at, to_float(out[at]), want[v].value, want[v].off);
        }
    }
    free(scores);
    free_buffers();
}

static void test_absorb(void) {
    static const long heads[] = {1, 3, 5}, tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, keys[] = {1, 31, 33, 130, 300, 128, 32};
    static const long nope[] = {16, 1, 12, 0}, values[] = {12, 7, 1, 32, 0}, latents[] = {64, 24, 512, 72, 128}, rope[] = {32, 8, 64};
    for (long i = 0; i < 36; i++)
        absorb_case((absorb_sizes){1 + i / 2 % 2, heads[i / 2 % 3], tokens[i % 9], keys[i % 7], nope[i % 4], values[i / 3 % 5], latents[i % 5],
                                   rope[i / 5 % 3], i % 3, (int)(i / 3 % 4), (int)(i / 4 % 2)});
    static const long rows[] = {7, 15, 16, 17, 33};
    for (long i = 0; i < 5; i++) absorb_case((absorb_sizes){1, rows[i], 1, 40, 16, 8, 64, 32, i % 2, 0, 0});
    absorb_case((absorb_sizes){0, 2, 1, 5, 16, 8, 64, 32, 0, 0, 0});
    absorb_case((absorb_sizes){1, 0, 1, 5, 16, 8, 64, 32, 0, 1, 0});
    absorb_case((absorb_sizes){1, 2, 0, 5, 16, 8, 64, 32, 0, 1, 0});
    absorb_case((absorb_sizes){1, 2, 1, 8250, 16, 8, 64, 32, 1, 1, 0});  /* blocks longer than 128 keys, and the last one short */
    absorb_case((absorb_sizes){1, 1, 1, 8250, 16, 8, 24, 8, 1, 0, 0});
}

#ifdef __AVX512BF16__
typedef struct { long B, heads, T, S, dn, dr, dv, offset, gap; int mask, shared; } prefill_sizes;

UNCHECKED static void prefill_reference(prefill_sizes n, const bf16 *q_nope, const bf16 *q_pe, tensor kv, tensor k_pe, long b, long h,
                                        long t, const uint8_t *mask, float scale, estimate *scores, estimate *out) {
    for (long s = 0; s < n.S; s++) {
        double size = 0, sum = dot(q_nope, row_at(kv, b, h, s), n.dn, &size) + dot(q_pe, row_at(k_pe, b, 0, s), n.dr, &size);
        int seen = (!mask || mask[s]) && (n.offset < 0 || s <= n.offset + t);
        scores[s] = seen ? (estimate){scale * sum, 32 * FP32 * scale * size} : (estimate){-INFINITY, 0};
    }
    softmax(scores, n.S, BF16);
    for (long v = 0; v < n.dv; v++) {
        double sum = 0, squares = 0, size = 0;
        for (long s = 0; s < n.S; s++) {
            double value = wide(row_at(kv, b, h, s)[n.dn + v]);
            sum += scores[s].value * value, size += scores[s].value * fabs(value);
            squares += scores[s].off * value * scores[s].off * value;
        }
        out[v] = (estimate){sum, SPREAD * sqrt(squares) + 64 * FP32 * size + BF16 * fabs(sum)};
    }
}

static void prefill_case(prefill_sizes n) {
    CASE("prefill_attention B %ld heads %ld T %ld S %ld dn %ld dr %ld dv %ld offset %ld gap %ld mask %d%s", n.B, n.heads, n.T, n.S, n.dn,
         n.dr, n.dv, n.offset, n.gap, n.mask, n.shared ? " for all" : "");
    tensor q_nope = random_tensor(n.B, n.heads, n.T, n.dn, n.gap), q_pe = random_tensor(n.B, n.heads, n.T, n.dr, 3 * n.gap);
    tensor kv = random_tensor(n.B, n.heads, n.S, n.dn + n.dv, n.gap), k_pe = random_tensor(n.B, 1, n.S, n.dr, n.gap);
    tensor out = new_tensor(n.B, n.heads, n.T, n.dv, n.gap, 1);
    uint8_t *mask = new_mask(n.mask, n.shared ? 1 : n.B, n.T, n.S);
    long mask_batch = n.shared ? 0 : n.T * n.S;
    float scale = 3.0f / sqrtf((float)(n.dn + n.dr));
    close_inputs();
    int status = prefill_attention(n.B, n.heads, n.T, n.S, n.dn, n.dr, n.dv, n.offset, scale, q_nope.at, q_nope.stride, q_pe.at,
                                   q_pe.stride, kv.at, kv.stride, k_pe.at, k_pe.stride, mask, mask_batch, out.at, out.stride);
    if (status) fail("it returned an error");
    if (ran_before()) return;
    estimate *scores = malloc((size_t)(n.S + 1) * sizeof *scores), want[192];
    for (long row = 0; row < n.B * n.heads * n.T; row++) {
        long b = row / (n.heads * n.T), h = row / n.T % n.heads, t = row % n.T;
        prefill_reference(n, row_at(q_nope, b, h, t), row_at(q_pe, b, h, t), kv, k_pe, b, h, t,
                          mask ? mask + b * mask_batch + t * n.S : NULL, scale, scores, want);
        for (long v = 0; v < n.dv; v++) compare("out", row * n.dv + v, to_float(row_at(out, b, h, t)[v]), want[v].value, want[v].off);
        memset(row_at(out, b, h, t), 0xFF, (size_t)n.dv * 2);
    }
    for (long i = 0; i < buffers[4].bytes; i++)
        if ((uint8_t)buffers[4].at[i] != 0xFF) fail("a gap between rows was written to");
    free(scores);
    free_buffers();
}

static void test_prefill(void) {
    static const long heads[] = {1, 3}, tokens[] = {1, 7, 15, 16, 17, 33, 97}, keys[] = {33, 1, 130, 31, 300, 64};
    static const long widths[][3] = {{16, 16, 64}, {2, 2, 192}, {128, 64, 64}, {16, 8, 128}, {24, 8, 64}};
    for (long i = 0; i < 28; i++) {
        long T = tokens[i % 7], S = keys[i % 6];
        const long *width = widths[i % 5];
        long offset = i % 3 == 0 ? -1 : i % 3 == 1 && S >= T ? S - T : 0;
        prefill_case((prefill_sizes){1 + i / 3 % 2, heads[i / 2 % 2], T, S, width[0], width[1], width[2], offset, i / 2 % 3, (int)(i / 2 % 4), (int)(i / 4 % 2)});
    }
    prefill_case((prefill_sizes){1, 1, 200, 200, 16, 16, 64, 0, 1, 0, 0});
    prefill_case((prefill_sizes){1, 2, 5, 0, 16, 16, 64, -1, 0, 0, 0});
    prefill_case((prefill_sizes){1, 2, 0, 9, 16, 16, 64, 9, 0, 0, 0});
    prefill_case((prefill_sizes){0, 2, 3, 9, 16, 16, 64, 6, 0, 1, 0});
    prefill_case((prefill_sizes){1, 2, 3, 9, 0, 2, 64, 6, 0, 2, 0});
}
#endif

/* ------------------------------------------------------------------------------------------------------------------ main */

static const struct { const char *name; void (*run)(void); } tests[] = {
    {"linear_bf16", test_linear}, {"rms_norm", test_norm}, {"rotary", test_rotary}, {"unpack_int4", test_unpack},
    {"experts_int4_few_rows", test_few_rows}, {"absorb", test_absorb},
#ifdef __AVX512BF16__
    {"prefill_attention", test_prefill},
#endif
#ifdef HAS_AMX
    {"expert_int4_tiles", test_tiles},
#endif
};

int main(int argc, char **argv) {
    static const int threads[PLACES] = {2, 1, 3};
#ifdef HAS_AMX
    int tiles = argc == 3 && !strcmp(argv[2], "tiles");
    if (use_tiles(tiles) != tiles) fail("the system does not allow tiles");
#endif
    for (long i = 0; argc > 1 && i < LENGTH(tests); i++) {
        if (strcmp(argv[1], tests[i].name)) continue;
        for (place = 0; place < PLACES; place++) {
            seed = 1, cases = 0;
            omp_set_num_threads(threads[place]);
            tests[i].run();
        }
        printf("%s: %ld cases, %ld numbers, the worst is off by %.2f of what is allowed\n", argv[1], cases, numbers, worst);
        return 0;
    }
    printf("usage: csrc_driver FUNCTION [tiles]; this level has:");
    for (long i = 0; i < LENGTH(tests); i++) printf(" %s", tests[i].name);
    printf("\n");
    return 2;
}
