// The inner loops for every number of tokens, and the table. Included at the end of isa_*.c.

#define EACH_NT(call) \
  switch (nt) {       \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    case 5: call(5); break; \
    case 6: call(6); break; \
    case 7: call(7); break; \
    default: call(8); \
  }

static void dot(const uint8_t *w, const int8_t *q, int nt, const int *ends, int n, int times,
                int32_t *out) {
#define CALL(NT) dot_nt(w, q, NT, ends, n, times, out)
  EACH_NT(CALL)
#undef CALL
}

static void dot_groups(const uint8_t *w, const int8_t *q, int nt, int64_t length,
                       int64_t unit, const float *scale, int repeat, int times, float *out) {
#define CALL(NT) groups_nt(w, q, NT, length, unit, scale, repeat, times, out)
  EACH_NT(CALL)
#undef CALL
}

static void panel(const int16_t *all, const float *scales, int64_t x_stride, int64_t xs_stride,
                  int nt, const int16_t *w, const float *ws, int64_t depth, int64_t wide,
                  float *result) {
  for (int64_t n = 0; n < wide; n += PANEL_COLUMNS, w += 2 * PANEL_COLUMNS, ws += PANEL_COLUMNS) {
    const int16_t *x = all;
    const float *xs = scales;
    float *out = result + n;
    for (int left = nt; left > 0;) {
      int some = left > 4 ? 4 : left;
      switch (some) {
        case 1: PANEL_CALL(1, wide - n); break;
        case 2: PANEL_CALL(2, wide - n); break;
        case 3: PANEL_CALL(3, wide - n); break;
        default: PANEL_CALL(4, wide - n);
      }
      left -= some, x += some * x_stride, xs += some * xs_stride, out += some * PANEL;
    }
  }
}

const isa_t ISA = {.name = ISA_NAME,
                   .lanes = ISA_LANES,
                   .bits = ISA_BITS,
                   .dot = dot,
                   .dot_groups = dot_groups,
                   .row_int4 = row_int4,
                   .row_int8 = row_int8,
                   .panel = panel};
