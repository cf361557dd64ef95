// Low-rank products in 16-bit integers with one scale for every 64 inputs ("block floats"): nearly
// as exact as the factors' own f16 (a relative error of 2e-4), at twice the speed of f32.
#pragma once
#include "isa.h"

#define TINY 1e-30f  // a block this small is zero

// GROUP floats -> integers of at most LIMIT, and their scale
INLINE float to_block(const float *v, int16_t *out) {
  f8 most = splat(0);
  for (int j = 0; j < GROUP; j += LANES)
    most = (f8)_mm256_max_ps((__m256)most, (__m256)abs8(load8(v, j, F32)));
  float absmax = max8(most);
  f8 by = splat(absmax > TINY ? LIMIT / absmax : 0.0f);
  for (int j = 0; j < GROUP; j += 2 * LANES) {
    __m256i low = _mm256_cvtps_epi32((__m256)(load8(v, j, F32) * by));
    __m256i high = _mm256_cvtps_epi32((__m256)(load8(v, j + LANES, F32) * by));
    __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm256_storeu_si256((__m256i *)(out + j), both);
  }
  return absmax / LIMIT;
}

// Columns of an f16 matrix: its rows are `stride` apart, and its memory ends at `end`.
typedef struct {
  const uint16_t *first, *end;
  int64_t stride;
} factor_t;

// depth rows of columns <= PANEL -> what isa->panel reads: w [depth / 2][PANEL][2] and
// ws [blocks][PANEL], zeros up to a whole block.
void to_panel(const factor_t *f, int64_t depth, int64_t columns, int16_t *w, float *ws);

// out[t][0..columns) = x[t] @ f in floats: for so few tokens that a panel would cost more to make.
// Columns up to the next vector are written too.
#define FEW 8
void few_tokens(const float *x, int64_t x_stride, int64_t tokens, const factor_t *f, int64_t depth,
                int64_t columns, float *out);
