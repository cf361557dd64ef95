// y = (q @ Qw.T) * scale * weight_scale.T + h @ lr_b + bias, weights packed in memory throughout.
//
// A task is PANEL outputs for up to SPAN tokens: it expands its weights a CHUNK at a time into
// cache, meets them with every tile of tokens, and finishes its part of y. One token reads the
// packed rows directly.
#include <omp.h>

#include "gemm.h"
#include "lowrank.h"

#define SPAN 256

const isa_t *isa_here(void) {
  static const isa_t *chosen;
  if (!chosen) {
    int vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    chosen = vnni ? &isa_vnni : &isa_avx2;
  }
  return chosen;
}

const char *mq_isa(void) { return isa_here()->name; }

// low[tokens of the span][PANEL] = h @ lr_b; returns 0 when the span holds base tokens alone
static int low_rank(const gemm_t *g, const ready_t *r, const isa_t *isa, int64_t from, int64_t to,
                    int64_t first, int64_t wide, float *low) {
  int any = 0;
  int64_t padded = r->low_blocks * GROUP;
  for (int m = 1; m <= g->count; m++) {
    int converted = 0;
    int16_t *w = scratch(3, (size_t)(padded * PANEL) * 2);
    float *ws = scratch(4, (size_t)(r->low_blocks * PANEL) * 4);
    for (int64_t a = from, b; a < to; a = b) {
      for (b = a + 1; b < to && g->modality[b] == g->modality[a];) b++;
      if (g->modality[a] != m) continue;  // [a, b) is a run of one modality
      if (!any) memset(low, 0, (size_t)((to - from) * PANEL) * 4);
      if (!converted)
        to_panel(g->lr_b + (m - 1) * g->rank * g->out + first, g->out, g->rank, wide, w, ws);
      any = converted = 1;
      isa->panel(r->h + a * padded, r->hs + a * r->low_blocks, padded, (int)(b - a), w, ws,
                 r->low_blocks, low + (a - from) * PANEL, PANEL);
    }
  }
  return any;
}

// [8 outputs][8 tokens] -> [8 tokens][8 outputs]
INLINE void transpose8(f8 *v) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    v[i] = (f8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = (f8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

// The task's part of y for one tile. sums: f32 or int32 [PANEL][TILE], corrected for the offset.
static void finish_tile(const gemm_t *g, int64_t tile, int64_t first, int64_t wide,
                        const void *sums, const float *low) {
  int nt = (int)least(TILE, g->tokens - tile * TILE), integers = !g->group_size;
  for (int64_t n = 0; n < wide; n += LANES) {
    float scale[LANES], bias[LANES];
    f8 v[LANES];
    int some = (int)least(LANES, wide - n);
    for (int i = 0; i < LANES; i++) {
      int64_t o = first + n + i;
      scale[i] = i < some && integers ? g->weight_scale[o] : 1;
      bias[i] = i < some && g->bias ? load1(g->bias, o, g->bias_type) : 0;
      const float *s = (const float *)sums + (n + i) * TILE;
      v[i] = integers ? (f8)_mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)s))
                      : load8(s, 0, F32);
    }
    transpose8(v);
    for (int t = 0; t < nt; t++) {
      int64_t row = tile * TILE + t;
      f8 y = v[t] * g->scale[row];
      if (integers) y = y * load8(scale, 0, F32);
      if (low) y += load8(low, t * PANEL + n, F32);
      if (g->bias) y += load8(bias, 0, F32);
      int64_t at = row * g->out + first + n;
      if (some == LANES) store8(g->y, at, y, g->y_type);
      else
        for (int i = 0; i < some; i++) store1(g->y, at + i, y[i], g->y_type);
    }
  }
}

// sums[i][n][t] += the products of one pass, for every tile i of the task and its outputs n
static void multiply_pass(const gemm_t *g, const ready_t *r, const isa_t *isa, int64_t pass,
                          int64_t from, int64_t tiles, int64_t first, int64_t wide, void *sums) {
  int halves = g->bits > isa->bits;  // 8-bit weights in two passes of 4
  uint8_t *w = scratch(2, PANEL * CHUNK * 2), *high = w + PANEL * CHUNK;
  int64_t k = pass * r->step, end = least(k + r->step, g->padded), size = g->group_size;
  for (int64_t n = 0; n < wide; n++) {
    const int8_t *row = g->packed + (first + n) * g->row_bytes;
    uint8_t *top = halves ? high + n * CHUNK : 0;
    if (g->bits == 4) unpack_biased(row, k, end, w + n * CHUNK);
    else unpack_bytes(row, k, end, g->columns, w + n * CHUNK, top);
  }
  int64_t unit = size, inputs = size ? least(end, g->groups * size) - k : 0;
  while (size && (unit > FLUSH || size % unit)) unit -= isa->lanes;  // size is a multiple of it
  for (int64_t i = 0; i < tiles; i++) {
    int64_t tile = from / TILE + i, at = tile * r->chunks + pass;
    int nt = (int)least(TILE, g->tokens - tile * TILE);
    const int8_t *q = r->q + tile * TILE * g->padded + k * nt;
    const int *ends = r->ends + at * (CHUNK / FLUSH);
    for (int64_t n = 0; n < wide; n++) {
      int64_t place = (i * PANEL + n) * TILE;
      for (int half = 0; half <= halves; half++) {
        const uint8_t *row = (half ? high : w) + n * CHUNK;
        if (size) {
          const float *scale = g->weight_scale + (first + n) * g->groups + k / size;
          isa->dot_groups(row, q, nt, inputs, unit, scale, (int)(size / unit), half ? 16 : 1,
                          (float *)sums + place);
        } else {
          isa->dot(row, q, nt, ends, r->count[at], half ? 16 : 1, (int32_t *)sums + place);
        }
      }
    }
  }
}

// Unsigned weights are w + 8 or w + 128: what that (and a zero point) adds is taken off again.
static int32_t offset_of(const gemm_t *g, int64_t i) {
  return (g->bits == 4 ? 8 : 128) + (g->zero ? g->zero[i] : 0);
}

static void take_off(const gemm_t *g, const ready_t *r, int64_t from, int64_t to, int64_t first,
                     int64_t wide, void *sums) {
  float *off = scratch(6, (size_t)r->group_stride * 4 + 64);
  for (int64_t n = 0; n < wide; n++) {
    int64_t o = first + n;
    for (int64_t i = 0; g->group_size && i < r->group_stride; i++)
      off[i] = i < g->groups ? g->weight_scale[o * g->groups + i] *
                                   (float)offset_of(g, o * g->groups + i)
                             : 0;
    for (int64_t t = from; t < to; t++) {
      int64_t place = ((t - from) / TILE * PANEL + n) * TILE + (t - from) % TILE;
      if (g->group_size) {
        f8 sum = splat(0);
        for (int64_t i = 0; i < r->group_stride; i += LANES)
          sum += load8(off, i, F32) * load8(r->group_sums, t * r->group_stride + i, F32);
        ((float *)sums)[place] -= sum8(sum);
      } else {
        ((int32_t *)sums)[place] -= offset_of(g, o) * r->sums[t];
      }
    }
  }
}

static void run_task(const gemm_t *g, const ready_t *r, const isa_t *isa, int64_t from, int64_t to,
                     int64_t first, int64_t wide) {
  int64_t tiles = ceil_div(to - from, TILE);
  size_t bytes = (size_t)(tiles * PANEL * TILE) * 4;
  void *sums = scratch(1, bytes);  // f32 with groups, else int32
  memset(sums, 0, bytes);
  for (int64_t pass = 0; pass < r->chunks; pass++)
    multiply_pass(g, r, isa, pass, from, tiles, first, wide, sums);
  take_off(g, r, from, to, first, wide, sums);
  float *low = scratch(5, SPAN * PANEL * 4);
  int compensated = g->h && low_rank(g, r, isa, from, to, first, wide, low);
  for (int64_t i = 0; i < tiles; i++)
    finish_tile(g, from / TILE + i, first, wide, (float *)sums + i * PANEL * TILE,
                compensated ? low + i * TILE * PANEL : 0);
}

static void one_token(const gemm_t *g, const isa_t *isa) {
  int32_t sum = sum_q(g->q, g->padded);
  float scale = *g->scale;
#pragma omp parallel for num_threads(threads_for(g->out * g->columns, g->threads)) schedule(static)
  for (int64_t o = 0; o < g->out; o++) {
    const int8_t *row = g->packed + o * g->row_bytes;
    int32_t v = g->bits == 4 ? isa->row_int4(row, g->q, g->padded)
                             : isa->row_int8(row, g->q, g->columns);
    float y = (float)(v - offset_of(g, o) * sum) * scale * g->weight_scale[o];
    if (g->bias) y += load1(g->bias, o, g->bias_type);
    store1(g->y, o, y, g->y_type);
  }
}

void mq_gemm(const gemm_t *g) {
  const isa_t *isa = isa_here();
  if (g->group_size % isa->lanes) isa = &isa_avx2;
  if (g->tokens == 1 && !g->group_size && !g->h) {
    one_token(g, isa);
    return;
  }
  int64_t tokens = g->tokens, tiles = ceil_div(tokens, TILE), step = CHUNK, stride = 0;
  if (g->group_size) {
    stride = ceil_div(g->groups, LANES) * LANES;
    for (step = BLOCK; step % g->group_size;) step += BLOCK;  // whole blocks, whole groups
    step = CHUNK / step * step;
  }
  ready_t r = {.step = step,
               .chunks = ceil_div(g->padded, step),
               .group_stride = stride,
               .low_blocks = ceil_div(g->rank, GROUP)};
  // The workers share one piece of the calling thread's scratch, cut up.
  int64_t sizes[] = {tokens * g->padded, tokens * 4, tokens * stride * 4,
                     tiles * r.chunks * (CHUNK / FLUSH) * 4, tiles * r.chunks * 4,
                     tokens * r.low_blocks * GROUP * 2, tokens * r.low_blocks * 4};
  void **parts[] = {(void **)&r.q, (void **)&r.sums, (void **)&r.group_sums, (void **)&r.ends,
                    (void **)&r.count, (void **)&r.h, (void **)&r.hs};
  int64_t total = 0;
  for (int i = 0; i < 7; i++) total += (sizes[i] + 63) & ~63LL;
  char *base = scratch(7, (size_t)total);
  for (int i = 0; i < 7; base += (sizes[i++] + 63) & ~63LL) *parts[i] = base;
  int64_t panels = ceil_div(g->out, PANEL), spans = ceil_div(tokens, SPAN);
#pragma omp parallel num_threads(threads_for(tokens * g->out * g->columns, g->threads))
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; i++) ready_tile(g, &r, isa, i);
    if (g->h) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tokens; t++) ready_hidden(g, &r, t);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < panels * spans; task++) {
      int64_t from = task / panels * SPAN, first = task % panels * PANEL;
      int64_t to = least(from + SPAN, tokens), wide = least(PANEL, g->out - first);
      run_task(g, &r, isa, from, to, first, wide);
    }
  }
}
