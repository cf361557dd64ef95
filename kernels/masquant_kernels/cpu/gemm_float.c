// gemm_w4a16: weights are expanded to floats in cache and meet floats.
#include "gemm.h"

// (w - zero) * scale of inputs from..to of one output, f32
static void dequantize(const gemm_t *g, int64_t o, int64_t from, int64_t to, float *out) {
  uint8_t biased[FLOAT_CHUNK] __attribute__((aligned(32)));
  unpack_biased(g->packed + o * g->row_bytes, from, to, biased);
  int64_t size = g->group_size ? g->group_size : g->padded;
  for (int64_t k = from; k < to;) {
    int64_t at = o * g->groups + least(k / size, g->groups - 1);
    int64_t end = k / size < g->groups - 1 ? least(to, (k / size + 1) * size) : to;
    float scale = g->weight_scale[at], off = (float)offset_of(g, at);
    for (; k < end; k++) out[k - from] = ((float)biased[k - from] - off) * scale;
  }
}

INLINE void float_dot(const float *w, const float *u, const int nt, int64_t length, float *out) {
  f8 sum[TILE];
#pragma GCC unroll 8
  for (int t = 0; t < TILE; t++) sum[t] = splat(0);
  for (int64_t k = 0; k < length; k += LANES) {
    f8 v = load8(w, k, F32);
#pragma GCC unroll 8
    for (int t = 0; t < nt; t++) sum[t] += v * load8(u, k * nt + LANES * t, F32);
  }
#pragma GCC unroll 8
  for (int t = 0; t < nt; t++) out[t] += sum8(sum[t]);
}

void float_pass(const gemm_t *g, const ready_t *r, int64_t pass, int64_t from, int64_t tiles,
                       int64_t first, int64_t wide, float *sums) {
  float *w = scratch(2, PANEL * FLOAT_CHUNK * 4);
  int64_t k = pass * r->step, length = least(r->step, g->padded - k);
  for (int64_t n = 0; n < wide; n++) dequantize(g, first + n, k, k + length, w + n * FLOAT_CHUNK);
  for (int64_t i = 0; i < tiles; i++) {
    int64_t tile = from / TILE + i;
    int nt = (int)least(TILE, g->tokens - tile * TILE);
    const float *u = r->u + tile * TILE * g->padded + k * nt;
    for (int64_t n = 0; n < wide; n++) {
      const float *row = w + n * FLOAT_CHUNK;
      float *out = sums + (i * PANEL + n) * TILE;
      if (i == 0) prefetch(g, pass, r->step, r->chunks, first + n);
      if (nt == TILE) float_dot(row, u, TILE, length, out);
      else if (nt == 1) float_dot(row, u, 1, length, out);
      else float_dot(row, u, nt, length, out);
    }
  }
}
