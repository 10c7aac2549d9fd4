// The squared distances of a tile of pairs, and those of them that lie in a bracket.
#pragma once

#include "cpu/stein/sq_dist_keys.h"
#include "cpu/stein/tiles.h"

namespace fe::inline FE_ISA {

inline bool by_differences(const Points& points) { return points.d <= kDirectDimensions; }

struct TileOfPairs {
  const Points& rows;
  int64_t row_block;
  const Points& columns;
  int64_t column_block;
  bool diagonal;  // of one block: pairs i < j alone are any

  int row_count() const { return rows.count(row_block); }
  int column_count() const { return columns.count(column_block); }
  const float* row_norms() const { return rows.norms + row_block * kTile; }
  const float* column_norms() const { return columns.norms + column_block * kTile; }
};

// Tiles i <= j of all pairs of some blocks, rows of tiles one after the other: which one has this number.
struct TileNumber {
  int64_t i, j;
};

inline TileNumber tile_number(int64_t blocks, int64_t at) {
  int64_t i = 0;
  for (; at >= blocks - i; ++i) at -= blocks - i;
  return {i, at + i};
}

// All of them; those of padding are meaningless.
template <bool kDifferences>
void distances(const TileOfPairs& pairs, float* tile) {
  block_products<kDifferences>(pairs.rows, pairs.row_block, pairs.columns, pairs.column_block, tile);
  const float *norms_i = pairs.row_norms(), *norms_j = pairs.column_norms();
  for (int i = 0; i < pairs.row_count(); ++i)
    for (int j = 0; j < pairs.column_count(); j += kLanes) {
      float* at = tile + i * kTile + j;
      store(at, sq_dist<kDifferences>(at, norms_i[i], norms_j + j));
    }
}

// The keys from `low` to `low + span`, of which it returns how many; adds to `below` how many are smaller. `keys` has room
// for a tile and a vector more.
template <bool kDifferences>
int sift_tile(const TileOfPairs& pairs, uint32_t low, uint32_t span, int64_t& below, Key* keys) {
  alignas(64) float tile[kTile * kTile];
  const int rows = pairs.row_count(), columns = pairs.column_count();
  int found = 0;
  SignedV under{};
  const auto finish = [&] {
    for (int lane = 0; lane < kLanes; ++lane) below += under[lane];
    return found;
  };
  if (!pairs.diagonal && columns == kTile) {
    block_products<kDifferences>(pairs.rows, pairs.row_block, pairs.columns, pairs.column_block, tile);
    const float *norms_i = pairs.row_norms(), *norms_j = pairs.column_norms();
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < kTile; j += kLanes) {
        const FloatV t = sq_dist<kDifferences>(tile + i * kTile + j, norms_i[i], norms_j + j);
        found += sift(t, low, span, under, keys + found);
      }
    return finish();
  }
  distances<kDifferences>(pairs, tile);
  const int whole = static_cast<int>(round_up(columns, kLanes));
  for (int i = 0; i < rows; ++i) {
    float* row = tile + i * kTile;
    for (int j = 0; pairs.diagonal && j <= i; ++j) row[j] = Lane<float>::from_bits(kPadding);
    for (int j = columns; j < whole; ++j) row[j] = Lane<float>::from_bits(kPadding);
    for (int j = 0; j < whole; j += kLanes) found += sift(load(row + j), low, span, under, keys + found);
  }
  return finish();
}

}  // namespace fe::inline FE_ISA
