/* bf16 matrices for a few rows, RMS norm and rotary embedding. A matrix is read once for up to MAX_ROWS rows. */

#include "common.h"

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
