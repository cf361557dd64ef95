// Low-rank products in 16-bit integers with one scale for every 32 inputs ("block floats"): as
// exact as the factors' own f16 (a relative error near 1e-4), at twice the speed of f32.
#pragma once
#include "isa.h"

#define GROUP (2 * PAIRS)  // inputs that share a scale

// GROUP floats -> 14-bit integers and their scale
INLINE float to_block(const float *v, int16_t *out) {
  f8 a[4], most = splat(0);
  for (int j = 0; j < 4; j++) {
    a[j] = load8(v, 8 * j, F32);
    most = (f8)_mm256_max_ps((__m256)most, (__m256)abs8(a[j]));
  }
  float absmax = max8(most);
  f8 by = splat(absmax > 1e-30f ? 8191.0f / absmax : 0.0f);
  for (int j = 0; j < 4; j += 2) {
    __m256i low = _mm256_cvtps_epi32((__m256)(a[j] * by));
    __m256i high = _mm256_cvtps_epi32((__m256)(a[j + 1] * by));
    __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm256_storeu_si256((__m256i *)(out + 8 * j), both);
  }
  return absmax / 8191.0f;
}

// An f16 panel [depth, columns <= PANEL] of rows `stride` apart -> what isa->panel reads:
// w [blocks][PAIRS][PANEL][2], ws [blocks][PANEL]; zeros fill both up.
void to_panel(const uint16_t *factor, int64_t stride, int64_t depth, int64_t columns, int16_t *w,
              float *ws);
