// Two vectors side by side. The searches are long chains of dependent additions: two chains in flight hide the latency.
#pragma once

#include "simd.hpp"

namespace {

constexpr int wide = 2 * lanes;

struct wf {
    vf a, b;
};

struct wi {
    vi a, b;
};

#define LQ_WIDE_BINARY(result, type, scalar, op)                                                           \
    LQ_INLINE result operator op(type x, type y) { return {x.a op y.a, x.b op y.b}; }                      \
    LQ_INLINE result operator op(type x, scalar y) { return {x.a op splat(y), x.b op splat(y)}; }          \
    LQ_INLINE result operator op(scalar x, type y) { return {splat(x) op y.a, splat(x) op y.b}; }
LQ_WIDE_BINARY(wf, wf, float, +)
LQ_WIDE_BINARY(wf, wf, float, -)
LQ_WIDE_BINARY(wf, wf, float, *)
LQ_WIDE_BINARY(wf, wf, float, /)
LQ_WIDE_BINARY(wi, wf, float, <)
LQ_WIDE_BINARY(wi, wf, float, >)
LQ_WIDE_BINARY(wi, wf, float, ==)
LQ_WIDE_BINARY(wi, wf, float, !=)
LQ_WIDE_BINARY(wi, wi, int32_t, +)
LQ_WIDE_BINARY(wi, wi, int32_t, &)
LQ_WIDE_BINARY(wi, wi, int32_t, |)
LQ_WIDE_BINARY(wi, wi, int32_t, !=)
#undef LQ_WIDE_BINARY

LQ_INLINE wi operator~(wi x) { return {~x.a, ~x.b}; }

LQ_INLINE wf& operator+=(wf& x, wf y) { return x = x + y; }

LQ_INLINE wi& operator&=(wi& x, wi y) { return x = x & y; }

LQ_INLINE wi& operator|=(wi& x, wi y) { return x = x | y; }

// For code that is the same on one vector (vf) and on two (wf).
template <class V>
struct Vector;

template <>
struct Vector<vf> {
    typedef vi Integers;
};

template <>
struct Vector<wf> {
    typedef wi Integers;
};

template <class V>
using IntegersOf = typename Vector<V>::Integers;

// to = from, vector by vector: a plain assignment of the pair may be compiled as a copy of bytes through memory.
LQ_INLINE void put(vf& to, vf from) { to = from; }

LQ_INLINE void put(wf& to, wf from) {
    to.a = from.a;
    to.b = from.b;
}

LQ_INLINE void opaque(float value, vf& v) { v = opaque(value); }

LQ_INLINE void opaque(float value, wf& v) { v.a = v.b = opaque(value); }

template <class V, class T>
LQ_INLINE V spread(T value) {
    return V{} + value;  // only for values other than -0
}

LQ_INLINE wf select(wi mask, wf x, wf y) { return {select(mask.a, x.a, y.a), select(mask.b, x.b, y.b)}; }

LQ_INLINE wi select(wi mask, wi x, wi y) { return {select(mask.a, x.a, y.a), select(mask.b, x.b, y.b)}; }

LQ_INLINE wf larger(wf x, wf y) { return {larger(x.a, y.a), larger(x.b, y.b)}; }

LQ_INLINE wf smaller(wf x, wf y) { return {smaller(x.a, y.a), smaller(x.b, y.b)}; }

LQ_INLINE wi smaller(wi x, wi y) { return {smaller(x.a, y.a), smaller(x.b, y.b)}; }

LQ_INLINE wi clamp(wi x, int32_t low, int32_t high) { return {clamp(x.a, low, high), clamp(x.b, low, high)}; }

LQ_INLINE wf absolute(wf x) { return {absolute(x.a), absolute(x.b)}; }

LQ_INLINE wf square_root(wf x) { return {square_root(x.a), square_root(x.b)}; }

LQ_INLINE wf round_even(wf x) { return {round_even(x.a), round_even(x.b)}; }

LQ_INLINE wi as_int(wf x) { return {as_int(x.a), as_int(x.b)}; }

LQ_INLINE wf as_float(wi x) { return {as_float(x.a), as_float(x.b)}; }

LQ_INLINE wi nearest(wf x) { return {nearest(x.a), nearest(x.b)}; }

LQ_INLINE wf to_float(wi x) { return {to_float(x.a), to_float(x.b)}; }

LQ_INLINE bool any(wi mask) { return any(mask.a | mask.b); }

LQ_INLINE void store(float* p, wf x) {
    store(p, x.a);
    store(p + lanes, x.b);
}

LQ_INLINE void store(int32_t* p, wi x) {
    __builtin_memcpy(p, &x.a, sizeof x.a);
    __builtin_memcpy(p + lanes, &x.b, sizeof x.b);
}

LQ_INLINE wf load_wide(const float* p) { return {load(p), load(p + lanes)}; }

LQ_INLINE wi load_wide(const int32_t* p) {
    wi v;
    __builtin_memcpy(&v.a, p, sizeof v.a);
    __builtin_memcpy(&v.b, p + lanes, sizeof v.b);
    return v;
}

// out[i] lane k = rows[k][i], for `wide` rows.
LQ_INLINE void load_transposed(const float* const* rows, int columns, wf* out) {
    for (int first = 0; first < columns; first += lanes) {
        const auto half = [&](int from, vf* tile) {
            for (int i = 0; i < lanes; ++i) tile[i] = load(rows[from + i] + first);
            transpose(tile);
        };
        vf tile[lanes];
        half(0, tile);
        for (int i = 0; i < lanes; ++i) out[first + i].a = tile[i];
        half(lanes, tile);
        for (int i = 0; i < lanes; ++i) out[first + i].b = tile[i];
    }
}

}  // namespace
