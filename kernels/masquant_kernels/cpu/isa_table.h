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

static void dot(const uint8_t *w, const int8_t *q, int nt, const int *ends, int n, int shift,
                int32_t *out) {
#define CALL(NT) dot_nt(w, q, NT, ends, n, shift, out)
  EACH_NT(CALL)
#undef CALL
}

static void dot_groups(const uint8_t *w, const int8_t *q, int nt, int64_t length,
                       int64_t unit, const float *scale, int repeat, int shift, float *out) {
#define CALL(NT) groups_nt(w, q, NT, length, unit, scale, repeat, shift, out)
  EACH_NT(CALL)
#undef CALL
}

static void panel(const int16_t *x, const float *xs, int64_t x_stride, int64_t xs_stride, int nt,
                  const int16_t *w, const float *ws, int64_t depth, int64_t wide, float *out) {
  int vectors = (int)ceil_div(wide, PANEL_VECTOR);
  for (int some; nt > 0;
       nt -= some, x += some * x_stride, xs += some * xs_stride, out += some * PANEL) {
    some = nt < PANEL_ROWS ? nt : PANEL_ROWS;
#define CASE(NT, VECTORS)               \
  if (some == NT && vectors == VECTORS) \
    panel_part(x, xs, x_stride, xs_stride, NT, VECTORS, w, ws, depth, out);
    PANEL_CASES(CASE)
#undef CASE
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
