// y = (q @ Qw.T) * scale * weight_scale.T + h @ lr_b + bias, weights packed in memory throughout.
//
// A task is PANEL outputs for up to SPAN tokens: it expands its weights a CHUNK at a time into
// cache, meets them with every tile of tokens, and finishes its part of y. One token reads the
// packed rows directly.
#include <omp.h>

#include "gemm.h"

static const isa_t *chosen;

// Take the best instruction set of this processor, or AVX2 whatever it has. Returns its name.
const char *mq_choose(int avx2) {
#ifdef ALWAYS_VNNI  // the tests' model of AVX-512 needs no processor that has it
  int vnni = 1;
#else
  int vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
  chosen = vnni && !avx2 ? &isa_vnni : &isa_avx2;
  return chosen->name;
}

const isa_t *isa_here(void) { return chosen; }

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
      if (i == 0) prefetch(g, pass, r->step, r->chunks, first + n);
      for (int half = 0; half <= halves; half++) {
        const uint8_t *row = (half ? high : w) + n * CHUNK;
        if (size) {
          const float *scale = g->weight_scale + (first + n) * g->groups + k / size;
          isa->dot_groups(row, q, nt, inputs, unit, scale, (int)(size / unit), 4 * half,
                          (float *)sums + place);
        } else {
          isa->dot(row, q, nt, ends, r->count[at], 4 * half, (int32_t *)sums + place);
        }
      }
    }
  }
}

// Ask for the lines of y that a tile will write: a store that misses waits for its line.
static void own_rows(const gemm_t *g, int64_t from, int64_t to, int64_t first, int64_t wide) {
  int64_t size = element_size(g->y_type);
  for (int64_t row = from; row < least(from + TILE, to); row++) {
    const char *y = (const char *)g->y + (row * g->out + first) * size;
    for (int64_t at = 0; at < wide * size; at += 64) __builtin_prefetch(y + at, 1);
  }
}

static void run_task(const gemm_t *g, const ready_t *r, const isa_t *isa, int64_t from, int64_t to,
                     int64_t first, int64_t wide) {
  int64_t tiles = ceil_div(to - from, TILE);
  size_t bytes = (size_t)(tiles * PANEL * TILE) * 4;
  void *sums = scratch(1, bytes);
  memset(sums, 0, bytes);
  for (int64_t pass = 0; pass < r->chunks; pass++) {
    if (g->u) float_pass(g, r, pass, from, tiles, first, wide, sums);
    else multiply_pass(g, r, isa, pass, from, tiles, first, wide, sums);
  }
  float *low = scratch(5, SPAN * PANEL * 4);
  int compensated = g->h && low_rank(g, r, isa, from, to, first, wide, low);
  for (int64_t i = 0; i < tiles; i++) {
    own_rows(g, from + (i + 2) * TILE, to, first, wide);  // in time for the tile after the next
    finish_tile(g, r, from / TILE + i, first, wide, (int32_t *)sums + i * PANEL * TILE,
                compensated ? low + i * TILE * PANEL : 0);
  }
}

static void one_token(const gemm_t *g, const isa_t *isa) {
  int32_t sum = sum_q(g->q, g->padded);
  int m = g->h ? g->modality[0] : 0;
  float *h = scratch(0, (size_t)(g->rank + 1) * 4);
  for (int64_t i = 0; m && i < g->rank; i++) h[i] = load1(g->h, (m - 1) * g->rank + i, g->h_type);
#pragma omp parallel for num_threads(threads_for(g->out * g->columns, g->threads)) schedule(static)
  for (int64_t first = 0; first < g->out; first += PANEL) {
    float low[PANEL] = {0};
    int64_t wide = least(PANEL, g->out - first);
    if (m) {
      const uint16_t *start = g->lr_b + (m - 1) * g->rank * g->out;
      factor_t factor = {start + first, start + g->rank * g->out, g->out};
      few_tokens(h, 0, 1, &factor, g->rank, wide, low);
    }
    for (int64_t o = first; o < first + wide; o++) {
      const int8_t *row = g->packed + o * g->row_bytes;
      int32_t v = g->bits == 4 ? isa->row_int4(row, g->q, g->padded)
                               : isa->row_int8(row, g->q, g->columns);
      float y = (float)(v - offset_of(g, o) * sum) * *g->scale * g->weight_scale[o];
      if (m) y += low[o - first];
      if (g->bias) y += load1(g->bias, o, g->bias_type);
      store1(g->y, o, y, g->y_type);
    }
  }
}

static void run_slab(const gemm_t *g, const isa_t *isa) {
  int64_t tokens = g->tokens, tiles = ceil_div(tokens, TILE), step = CHUNK;
  if (g->u) {
    step = FLOAT_CHUNK;
  } else if (g->group_size) {
    for (step = BLOCK; step % g->group_size;) step += BLOCK;  // whole blocks, whole groups
    step = CHUNK / step * step;
  }
  ready_t r = {.step = step,
               .chunks = ceil_div(g->padded, step),
               .low_blocks = ceil_div(g->rank, GROUP)};
  // The workers share one piece of the calling thread's scratch, cut up.
  int64_t sizes[] = {g->u ? 0 : tokens * g->padded,
                     g->u ? tokens * g->padded * 4 : 0,
                     tiles * TILE * 4,
                     g->group_size ? tiles * TILE * g->groups * 4 : 0,
                     tiles * r.chunks * (CHUNK / FLUSH) * 4,
                     tiles * r.chunks * 4,
                     tokens * r.low_blocks * GROUP * 4,
                     tokens * r.low_blocks * GROUP * 2,
                     tokens * r.low_blocks * 4};
  void **parts[] = {(void **)&r.q, (void **)&r.u, (void **)&r.sums, (void **)&r.group_sums,
                    (void **)&r.ends, (void **)&r.count, (void **)&r.hf, (void **)&r.h,
                    (void **)&r.hs};
  int64_t total = 0;
  for (int i = 0; i < 9; i++) total += (sizes[i] + 63) & ~63LL;
  char *base = scratch(7, (size_t)total);
  for (int i = 0; i < 9; base += (sizes[i++] + 63) & ~63LL) *parts[i] = base;
  int64_t panels = ceil_div(g->out, PANEL), spans = ceil_div(tokens, SPAN);
  int64_t neighbours = panels * spans / (8 * g->threads);  // panels that one thread takes in a row
  neighbours = neighbours < 1 ? 1 : least(neighbours, 4);
#pragma omp parallel num_threads(threads_for(tokens * g->out * g->columns, g->threads))
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; i++) ready_tile(g, &r, isa, i);
    if (g->h) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tokens; t++) ready_hidden(g, &r, t);
    }
#pragma omp for schedule(dynamic, neighbours)
    for (int64_t task = 0; task < panels * spans; task++) {
      int64_t from = task / panels * SPAN, first = task % panels * PANEL;
      run_task(g, &r, isa, from, least(from + SPAN, tokens), first, least(PANEL, g->out - first));
    }
  }
}

void mq_gemm(const gemm_t *given) {
  const isa_t *isa = isa_here();
  if (given->group_size % isa->lanes) isa = &isa_avx2;
  if (given->tokens == 1 && given->q && !given->group_size) {
    one_token(given, isa);
    return;
  }
  gemm_t g = *given;
  for (int64_t from = 0; from < given->tokens; from += SLAB) {
    g.tokens = least(SLAB, given->tokens - from);
    if (g.q) g.q = given->q + from * g.padded, g.scale = given->scale + from;
    if (g.u) g.u = (const char *)given->u + from * g.u_stride * element_size(g.u_type);
    if (g.h) {
      g.h = (const char *)given->h + from * g.count * g.rank * element_size(g.h_type);
      g.modality = given->modality + from;
    }
    g.y = (char *)given->y + from * g.out * element_size(g.y_type);
    run_slab(&g, isa);
  }
}
