// Codes moved between the layouts of packed matrices, and compared across them. The meaning is
// kernels/reference/repack.py. Three layouts, N outputs (rows), K inputs (columns), b bits, least significant first:
//
//   rows          (N, K b / 32)  codes dense along the inputs of a row      compressed-tensors, MLX
//   inputs        (K b / 32, N)  the same words, turned                     GPTQ
//   interleaved   (K, N / 8)     4 bits; of word w, place p is row 8 w + order[p]   AWQ
//
// Moving is done on vectors; comparing takes every code by its place and shares no step with moving.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace {

typedef uint32_t vu __attribute__((vector_size(4 * LQ_LANES)));
typedef uint32_t v8 __attribute__((vector_size(32)));

#if defined(__clang__)
#define LQ_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LQ_PICK(a, b, ...) __builtin_shuffle(a, b, v8{__VA_ARGS__})
#endif

constexpr int64_t word_tile = 16;  // words of a tile's side: one line of cache
constexpr int awq_order[8] = {0, 2, 4, 6, 1, 3, 5, 7};

LQ_INLINE v8 load8(const uint32_t* p) {
    v8 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

LQ_INLINE void store8(uint32_t* p, v8 v) { __builtin_memcpy(p, &v, sizeof v); }

// 8 rows of 8 words to 8 columns: words, pairs and fours change places.
LQ_INLINE void turn_eight(const uint32_t* source, int64_t source_stride, uint32_t* target, int64_t target_stride) {
    v8 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = load8(source + i * source_stride);
    for (int i = 0; i < 8; i += 2) {
        b[i] = LQ_PICK(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        b[i + 1] = LQ_PICK(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int k = 0; k < 2; ++k) {
            a[i + k] = LQ_PICK(b[i + k], b[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            a[i + k + 2] = LQ_PICK(b[i + k], b[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; ++i) {
        store8(target + i * target_stride, LQ_PICK(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        store8(target + (i + 4) * target_stride, LQ_PICK(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
    }
}

// target[c][r] = source[r][c] of a tile of any size.
LQ_INLINE void turn_tile(const uint32_t* source, int64_t source_stride, int64_t rows, int64_t columns,
                         uint32_t* target, int64_t target_stride) {
    const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
    for (int64_t r = 0; r < whole_rows; r += 8) {
        for (int64_t c = 0; c < whole_columns; c += 8) {
            turn_eight(source + r * source_stride + c, source_stride, target + c * target_stride + r, target_stride);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
            target[c * target_stride + r] = source[r * source_stride + c];
        }
    }
}

// (rows, columns) words to (columns, rows).
void turn_words(const uint32_t* source, int64_t rows, int64_t columns, uint32_t* target) {
    for (int64_t c = 0; c < columns; c += word_tile) {
        const int64_t wide = columns - c < word_tile ? columns - c : word_tile;
        for (int64_t r = 0; r < rows; r += word_tile) {
            const int64_t high = rows - r < word_tile ? rows - r : word_tile;
            if (wide == word_tile && high == word_tile) {
                turn_tile(source + r * columns + c, columns, word_tile, word_tile, target + c * rows + r, rows);
            } else {
                turn_tile(source + r * columns + c, columns, high, wide, target + c * rows + r, rows);
            }
        }
    }
}

// Whether one[r][c] is other[c][r] everywhere.
bool same_turned(const uint32_t* one, int64_t rows, int64_t columns, const uint32_t* other) {
    uint32_t off = 0;
    for (int64_t c = 0; c < columns; c += word_tile) {
        const int64_t c_end = c + word_tile < columns ? c + word_tile : columns;
        for (int64_t r = 0; r < rows; r += word_tile) {
            const int64_t r_end = r + word_tile < rows ? r + word_tile : rows;
            for (int64_t i = r; i < r_end; ++i) {
                for (int64_t k = c; k < c_end; ++k) off |= one[i * columns + k] ^ other[k * rows + i];
            }
        }
        if (off) return false;
    }
    return true;
}

// Eight words by eight codes of 4 bits: code j of word i and code i of word j change places, in every lane.
LQ_INLINE void turn_codes(vu x[8]) {
    const uint32_t masks[3] = {0x0000ffffu, 0x00ff00ffu, 0x0f0f0f0fu};
    for (int stage = 0; stage < 3; ++stage) {
        const int distance = 4 >> stage, shift = 16 >> stage;
        for (int i = 0; i < 8; ++i) {
            if (i & distance) continue;
            const vu moved = ((x[i] >> shift) ^ x[i + distance]) & masks[stage];
            x[i + distance] ^= moved;
            x[i] ^= moved << shift;
        }
    }
}

LQ_INLINE vu load_words(const uint32_t* p, int64_t count) {
    vu v = {};
    if (count == lanes) {
        __builtin_memcpy(&v, p, sizeof v);
    } else {
        for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    }
    return v;
}

LQ_INLINE void store_words(uint32_t* p, vu v, int64_t count) {
    if (count == lanes) {
        __builtin_memcpy(p, &v, sizeof v);
    } else {
        for (int64_t i = 0; i < count; ++i) p[i] = v[i];
    }
}

// Interleaved (8 high, wide) to rows (8 wide, high), or, where `inputs`, to (high, 8 wide).
void from_interleaved(const uint32_t* source, int64_t high, int64_t wide, bool inputs, uint32_t* target) {
    alignas(64) uint32_t tile[word_tile][8][lanes];  // [words of a row][row of a word][word of the source]
    for (int64_t w = 0; w < wide; w += lanes) {
        const int64_t across = wide - w < lanes ? wide - w : lanes;
        for (int64_t h = 0; h < high; h += word_tile) {
            const int64_t along = high - h < word_tile ? high - h : word_tile;
            for (int64_t k = 0; k < along; ++k) {
                vu x[8];
                for (int i = 0; i < 8; ++i) x[i] = load_words(source + (8 * (h + k) + i) * wide + w, across);
                turn_codes(x);
                for (int place = 0; place < 8; ++place) {
                    __builtin_memcpy(tile[k][awq_order[place]], &x[place], sizeof(vu));
                }
            }
            if (inputs) {
                for (int64_t k = 0; k < along; ++k) {
                    turn_tile(tile[k][0], lanes, 8, across, target + (h + k) * 8 * wide + 8 * w, 8);
                }
            } else {
                for (int row = 0; row < 8; ++row) {
                    uint32_t* to = target + (8 * w + row) * high + h;
                    if (along == word_tile && across == lanes) {
                        turn_tile(tile[0][row], 8 * lanes, word_tile, lanes, to, 8 * high);
                    } else {
                        turn_tile(tile[0][row], 8 * lanes, along, across, to, 8 * high);
                    }
                }
            }
        }
    }
}

// The way back.
void to_interleaved(const uint32_t* source, int64_t high, int64_t wide, bool inputs, uint32_t* target) {
    alignas(64) uint32_t tile[word_tile][8][lanes];
    for (int64_t w = 0; w < wide; w += lanes) {
        const int64_t across = wide - w < lanes ? wide - w : lanes;
        for (int64_t h = 0; h < high; h += word_tile) {
            const int64_t along = high - h < word_tile ? high - h : word_tile;
            if (inputs) {
                for (int64_t k = 0; k < along; ++k) {
                    turn_tile(source + (h + k) * 8 * wide + 8 * w, 8, across, 8, tile[k][0], lanes);
                }
            } else {
                for (int row = 0; row < 8; ++row) {
                    const uint32_t* from = source + (8 * w + row) * high + h;
                    if (along == word_tile && across == lanes) {
                        turn_tile(from, 8 * high, lanes, word_tile, tile[0][row], 8 * lanes);
                    } else {
                        turn_tile(from, 8 * high, across, along, tile[0][row], 8 * lanes);
                    }
                }
            }
            for (int64_t k = 0; k < along; ++k) {
                vu x[8];
                for (int place = 0; place < 8; ++place) x[place] = load_words(tile[k][awq_order[place]], across);
                turn_codes(x);
                for (int i = 0; i < 8; ++i) store_words(target + (8 * (h + k) + i) * wide + w, x[i], across);
            }
        }
    }
}

// Of `across` words side by side, over eight inputs: the bits of codes that are not those of `other`, whose words of
// neighbouring rows lie `by_row` apart.
LQ_INLINE vu unlike_codes(const uint32_t* one, int64_t wide, int64_t across, const uint32_t* other, int64_t by_row) {
    vu found[8], off = {};
    for (int i = 0; i < 8; ++i) found[i] = load_words(one + i * wide, across);
    for (int place = 0; place < 8; ++place) {
        alignas(64) uint32_t words[lanes] = {};
        const uint32_t* at = other + awq_order[place] * by_row;
        for (int64_t l = 0; l < across; ++l) words[l] = at[8 * l * by_row];
        const vu wanted = load_words(words, lanes);
        for (int i = 0; i < 8; ++i) off |= ((found[i] >> (4 * place)) ^ (wanted >> (4 * i))) & 15u;
    }
    return off;
}

// Whether the interleaved codes `one` are those of `other`, in rows or, where `inputs`, turned: code by code.
bool same_interleaved(const uint32_t* one, int64_t high, int64_t wide, bool inputs, const uint32_t* other) {
    const int64_t by_row = inputs ? 1 : high, by_word = inputs ? 8 * wide : 1;
    for (int64_t w = 0; w < wide; w += lanes) {
        const int64_t across = wide - w < lanes ? wide - w : lanes;
        vu off = {};
        for (int64_t h = 0; h < high; ++h) {
            const uint32_t *left = one + 8 * h * wide + w, *right = other + 8 * w * by_row + h * by_word;
            off |= across == lanes ? unlike_codes(left, wide, lanes, right, by_row)
                                   : unlike_codes(left, wide, across, right, by_row);
        }
        for (int l = 0; l < lanes; ++l) {
            if (off[l]) return false;
        }
    }
    return true;
}

}  // namespace
