// Between a tensor of any strides and type and a tile of float32: rows are steps, columns are channels, states or ranks.
// Two layouts are worth a fast path: columns side by side in memory (token-major, ours), and tokens side by side (the
// classic (B, G*D, L)), which goes through transposed squares in registers.
#pragma once

#include "../params.h"
#include "simd.h"

namespace VISION_MAMBA_LEVEL {

// The tokens that the steps of a tile visit.
struct Steps {
  int count;          // steps of this tile, at most kTile
  bool consecutive;   // tokens first, first + 1, ..., so that rows can be told without the table
  int64_t first;
  int32_t token[kTile];  // -1: padding

  INLINE Steps(const int32_t* indices, int64_t start, int64_t end) {
    count = static_cast<int>(end - start < kTile ? end - start : kTile);
    first = indices && count ? indices[start] : start;
    consecutive = first >= 0;
    for (int t = 0; t < count; ++t) {
      token[t] = indices ? indices[start + t] : static_cast<int32_t>(start + t);
      consecutive &= token[t] == first + t;
    }
    for (int t = count; t < kTile; ++t) token[t] = 0;
  }
};

template <class T>
INLINE T* at(const Tokens& tensor, int64_t batch, int64_t route, int64_t column) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch + route * tensor.route + column * tensor.column;
}

// The cache lines of the tile that comes next, asked for one by one during the work on this one: processors foresee neither
// routes nor the short rows of the classic layout, and wait for few lines at a time.
struct Ahead {
  const char* base;
  const int32_t* token;  // null: a line of every channel in turn
  int64_t row, column;   // bytes
  static constexpr int64_t kLine = 64;

  Ahead() : base(reinterpret_cast<const char*>(this)), token(nullptr), row(0), column(0) {}  // nothing to ask for
  Ahead(const Tokens& tensor, int64_t batch, int64_t route, int64_t first, const Steps& steps) : Ahead() {
    if (!tensor.data || !steps.count) return;
    const int64_t size = tensor.type == kFloat32 ? 4 : 2;
    base = static_cast<const char*>(tensor.data);
    base += (tensor.batch * batch + tensor.route * route + first * tensor.column) * size;
    if (tensor.column == 1) {
      token = steps.token;
      row = tensor.token * size;
    } else if (tensor.token == 1 && steps.consecutive) {
      base += steps.first * size + kLine - 1;  // what starts within a line: the tile before had that line
      column = tensor.column * size;
    }
  }

  INLINE void ask(uint64_t t) const {
    __builtin_prefetch(base + (token ? token[t] * row : t % kLanes * column + t / kLanes * kLine));
  }
};

// tile[t * width + c] for c < columns <= width; the rest of a row, and rows of padding steps, become 0.
template <class T>
void load_tile(float* tile, int width, const T* source, int64_t row, int64_t column, const Steps& steps, int columns) {
  int t = 0, done = 0;  // rows, and columns of all rows, already loaded
  if (column == 1 && columns >= kLanes) {
    for (t = 0; t < steps.count; ++t) {
      float* to = tile + t * width;
      const T* from = source + steps.token[t] * row;
      for (int c = 0; c < width; c += kLanes) {
        if (steps.token[t] < 0 || c >= columns) {
          for (int i = c; i < width && i < c + kLanes; ++i) to[i] = 0;
        } else if (c + kLanes <= columns) {
          store(to + c, load(from + c));
        } else {
          for (int i = c; i < width && i < c + kLanes; ++i) to[i] = i < columns ? load_one(from + i) : 0;
        }
      }
    }
    return;
  }
  if (row == 1 && steps.consecutive) {
    for (; done + kLanes <= columns; done += kLanes) {
      for (t = 0; t + kLanes <= steps.count; t += kLanes) {
        Vec square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load(source + (done + i) * column + steps.first + t);
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store(tile + (t + i) * width + done, square[i]);
      }
      for (; t < steps.count; ++t) {
        for (int i = done; i < done + kLanes; ++i) tile[t * width + i] = load_one(source + i * column + steps.first + t);
      }
    }
  }
  for (int c = done; c < width; ++c) {
    for (t = 0; t < steps.count; ++t) {
      const bool absent = c >= columns || steps.token[t] < 0;
      tile[t * width + c] = absent ? 0 : load_one(source + steps.token[t] * row + c * column);
    }
  }
}

INLINE void load_tile(float* tile, int width, const Tokens& tensor, int64_t batch, int64_t route, int64_t first,
                      const Steps& steps, int columns) {
  switch (tensor.type) {
    case kFloat32:
      return load_tile(tile, width, at<float>(tensor, batch, route, first), tensor.token, tensor.column, steps, columns);
    case kFloat16:
      return load_tile(tile, width, at<Float16>(tensor, batch, route, first), tensor.token, tensor.column, steps, columns);
    default:
      return load_tile(tile, width, at<BFloat16>(tensor, batch, route, first), tensor.token, tensor.column, steps, columns);
  }
}

// The reverse: columns < width of each row go to the row's token; rows of padding steps go nowhere.
template <class T>
void store_tile(const float* tile, int width, T* target, int64_t row, int64_t column, const Steps& steps, int columns) {
  int t = 0, done = 0;
  if (column == 1) {
    for (t = 0; t < steps.count; ++t) {
      if (steps.token[t] < 0) continue;
      const float* from = tile + t * width;
      T* to = target + steps.token[t] * row;
      int c = 0;
      for (; c + kLanes <= columns; c += kLanes) store(to + c, load(from + c));
      for (; c < columns; ++c) store_one(to + c, from[c]);
    }
    return;
  }
  if (row == 1 && steps.consecutive) {
    for (; done + kLanes <= columns; done += kLanes) {
      for (t = 0; t + kLanes <= steps.count; t += kLanes) {
        Vec square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load(tile + (t + i) * width + done);
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store(target + (done + i) * column + steps.first + t, square[i]);
      }
      for (; t < steps.count; ++t) {
        for (int i = done; i < done + kLanes; ++i) store_one(target + i * column + steps.first + t, tile[t * width + i]);
      }
    }
  }
  for (int c = done; c < columns; ++c) {
    for (t = 0; t < steps.count; ++t) {
      if (steps.token[t] >= 0) store_one(target + steps.token[t] * row + c * column, tile[t * width + c]);
    }
  }
}

INLINE void store_tile(const float* tile, int width, const Tokens& tensor, int64_t batch, int64_t route, int64_t first,
                       const Steps& steps, int columns) {
  switch (tensor.type) {
    case kFloat32:
      return store_tile(tile, width, at<float>(tensor, batch, route, first), tensor.token, tensor.column, steps, columns);
    case kFloat16:
      return store_tile(tile, width, at<Float16>(tensor, batch, route, first), tensor.token, tensor.column, steps, columns);
    default:
      return store_tile(tile, width, at<BFloat16>(tensor, batch, route, first), tensor.token, tensor.column, steps, columns);
  }
}

}  // namespace VISION_MAMBA_LEVEL
