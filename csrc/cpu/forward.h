// h_t = exp(s_t A) h_{t-1} + s_t B_t x_t,  y_t = <C_t, h_t> + D x_t, over tiles of kTile steps.
//
// An item is one (batch, route, chunk of channels), or all routes of it where their results are summed. Lanes are
// channels, the loop is time. Within a tile: B and C of all steps become float32 once for the chunk; then for every
// register of channels, x and dt are loaded and s and s x formed once for all states, and each group of kStates states
// sweeps over the steps with its states in registers. Inputs are read where the index table says; nothing is permuted.
#pragma once

#include "tiles.h"
#include "work.h"

namespace VISION_MAMBA_LEVEL {

using vision_mamba::Buffer;
using vision_mamba::Job;

// Beyond these nothing changes but that products stay finite: exp2 is 0 or infinite long before.
constexpr float kMostRate = 1e18f, kMostStep = 1e20f;
constexpr int kGroup = kLanes / 2 < 4 ? 4 : kLanes / 2;  // tiles are padded to whole groups of steps; see backward.h
static_assert(kTile % kGroup == 0, "a padded tile must fit");

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out parts of a scratch buffer; with none it only counts.
struct Arena {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* part = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return part;
  }
};

// Calls f(first, width) with the states 0 .. N - 1 cut into groups that fit registers.
template <int kWidth, class F>
INLINE void each_group(int64_t states, int64_t first, const F& f) {
  for (; first + kWidth <= states; first += kWidth) f.template run<kWidth>(first);
  if constexpr (kWidth > 1) each_group<kWidth / 2>(states, first, f);
}

// The weights of one route for a chunk of channels, a register of channels at a time.
struct Weights {
  float *rate, *skip, *bias, *mix;  // (registers, N), (registers), (registers), (registers, R), each times kLanes
  int64_t states, rank;

  Weights(Arena& arena, const ScanParams& p, int64_t chunk)
      : rate(arena.take(chunk * p.states)),
        skip(arena.take(chunk)),
        bias(arena.take(chunk)),
        mix(arena.take(chunk * p.rank)),
        states(p.states),
        rank(p.rank) {}

  void fill(const ScanParams& p, int64_t route, int64_t first, int64_t columns) {
    for (int64_t c = 0; c < round_up(columns, kLanes); ++c) {
      const int64_t channel = route * p.channels + first + c, lane = c % kLanes, start = c - lane;
      const bool present = c < columns;
      for (int64_t n = 0; n < states; ++n) {
        float r = present ? p.A[channel * states + n] * kLog2E : 0.0f;
        r = r > kMostRate ? kMostRate : r < -kMostRate ? -kMostRate : r;
        rate[start * states + n * kLanes + lane] = r;
      }
      for (int64_t r = 0; r < rank; ++r) {
        mix[start * rank + r * kLanes + lane] = present ? p.dt_weight[channel * rank + r] : 0.0f;
      }
      skip[c] = present && p.D ? p.D[channel] : 0.0f;
      bias[c] = present && p.dt_bias ? p.dt_bias[channel] : 0.0f;
    }
  }
};

// What all channels of a route share in a tile.
struct SharedTile {
  float *B, *C, *low;  // (kTile, N), (kTile, N), (kTile, R)

  SharedTile(Arena& arena, const ScanParams& p)
      : B(arena.take(kTile * p.states)), C(arena.take(kTile * p.states)), low(arena.take(kTile * p.rank)) {}

  void load(const ScanParams& p, int64_t batch, int64_t route, const Steps& steps, int padded) const {
    const int states = static_cast<int>(p.states), rank = static_cast<int>(p.rank);
    load_tile(B, states, p.B, batch, route, 0, steps, states);
    load_tile(C, states, p.C, batch, route, 0, steps, states);
    if (rank) load_tile(low, rank, p.dt, batch, route, 0, steps, rank);
    for (int i = steps.count * states; i < padded * states; ++i) B[i] = C[i] = 0;
    for (int i = steps.count * rank; i < padded * rank; ++i) low[i] = 0;
  }
};

// dt = W low, kRows steps at a time so that a row of W is loaded once for all of them.
INLINE void mix_steps(float* dt, const float* mix, const float* low, int count, int rank) {
  constexpr int kRows = 4;
  for (int t = 0; t < count; t += kRows) {
    Vec sum[kRows] = {};
    for (int r = 0; r < rank; ++r) {
      const Vec w = load(mix + r * kLanes);
      for (int i = 0; i < kRows; ++i) sum[i] += w * low[(t + i) * rank + r];
    }
    for (int i = 0; i < kRows; ++i) store(dt + (t + i) * kLanes, sum[i]);
  }
}

// One register of channels in a tile: x, s, s x, and ds/ddt; rows of kLanes.
struct ChannelTile {
  float *u, *s, *su, *slope;

  explicit ChannelTile(Arena& arena)
      : u(arena.take(kTile * kLanes)),
        s(arena.take(kTile * kLanes)),
        su(arena.take(kTile * kLanes)),
        slope(arena.take(kTile * kLanes)) {}

  // From dt in s: s = dt + bias, through softplus if asked, and what follows from it.
  template <bool kSlope>
  INLINE void form_steps(Vec bias, bool through_softplus, int count, const Ahead* ahead) const {
    float *const s_rows = s, *const su_rows = su, *const u_rows = u, *const slope_rows = slope;
    const Ahead next = ahead[0], after_next = ahead[1];
    using VISION_MAMBA_LEVEL::load;
    if (through_softplus) {
      // Two loops, since a processor looks ahead over a hundred instructions: whole chains of them would stand in a row.
      for (int t = 0; t < count; ++t) {
        const Vec x = load(s_rows + t * kLanes) + bias;
        store(s_rows + t * kLanes, x);
        store(su_rows + t * kLanes, exp_minus_abs(x));
        next.ask(t);
      }
      for (int t = 0; t < count; ++t) {
        const Vec x = load(s_rows + t * kLanes), e = load(su_rows + t * kLanes), step = softplus(x, e);
        store(su_rows + t * kLanes, step * load(u_rows + t * kLanes));
        store(s_rows + t * kLanes, smaller(step, splat(kMostStep)));
        if (kSlope) store(slope_rows + t * kLanes, sigmoid(x, e));
        after_next.ask(t);
      }
    } else {
      for (int t = 0; t < count; ++t) {
        const Vec step = load(s_rows + t * kLanes) + bias;
        store(su_rows + t * kLanes, step * load(u_rows + t * kLanes));
        store(s_rows + t * kLanes, larger(smaller(step, splat(kMostStep)), splat(-kMostStep)));
        if (kSlope) store(slope_rows + t * kLanes, splat(1.0f));
        next.ask(t);
      }
    }
  }

  // Rows from steps.count to padded become steps that change nothing: s = 0. Only the backward pass wants slopes.
  template <bool kSlope>
  void load(const ScanParams& p, const Weights& weights, const SharedTile& shared, int64_t batch, int64_t route,
            int64_t chunk_first, int64_t c, int columns, const Steps& steps, int padded, const Ahead* ahead) {
    load_tile(u, kLanes, p.x, batch, route, chunk_first + c, steps, columns);
    if (p.rank) {
      mix_steps(s, weights.mix + c * p.rank, shared.low, padded, static_cast<int>(p.rank));
    } else {
      load_tile(s, kLanes, p.dt, batch, route, chunk_first + c, steps, columns);
    }
    form_steps<kSlope>(VISION_MAMBA_LEVEL::load(weights.bias + c), p.softplus, steps.count, ahead);
    for (int i = steps.count * kLanes; i < padded * kLanes; ++i) u[i] = s[i] = su[i] = slope[i] = 0;
  }
};

// Add the states first .. first + kWidth - 1 to y, over all steps of a tile.
struct ForwardSweep {
  ChannelTile tile;
  SharedTile shared;
  const float* rate;
  float *state, *y;
  int64_t states;
  int count;
  const Ahead* ahead;  // asked for by the first group of states, and by the others

  template <int kWidth>
  INLINE void run(int64_t first) const {
    const float *s_rows = tile.s, *su_rows = tile.su, *B = shared.B + first, *C = shared.C + first;
    float* const y_rows = y;
    const int64_t stride = states, steps = count;
    const Ahead next = ahead[first > 0];
    Vec h[kWidth], r[kWidth];
    for (int i = 0; i < kWidth; ++i) h[i] = load(state + (first + i) * kLanes);
    for (int i = 0; i < kWidth; ++i) r[i] = load(rate + (first + i) * kLanes);
    for (int64_t t = 0; t < steps; ++t, B += stride, C += stride) {
      const Vec s = load(s_rows + t * kLanes), su = load(su_rows + t * kLanes);
      Vec sum = load(y_rows + t * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kWidth; ++i) {
        h[i] = exp2(s * r[i]) * h[i] + su * B[i];
        sum += h[i] * C[i];
      }
      store(y_rows + t * kLanes, sum);
      next.ask(t);
    }
    for (int i = 0; i < kWidth; ++i) store(state + (first + i) * kLanes, h[i]);
  }
};

// A row of a (..., D) array: kLanes floats of which only `columns` exist.
INLINE void load_row(float* to, const float* from, int columns, int64_t stride) {
  if (columns == kLanes && stride == 1) return store(to, load(from));
  for (int i = 0; i < kLanes; ++i) to[i] = i < columns ? from[i * stride] : 0;
}
INLINE void store_row(float* to, const float* from, int columns, int64_t stride) {
  if (columns == kLanes && stride == 1) return store(to, load(from));
  for (int i = 0; i < columns; ++i) to[i * stride] = from[i];
}

// states (N, kLanes) <-> channels first .. of (B, K, D, N)
INLINE float* state_of(float* all, const ScanParams& p, int64_t batch, int64_t route, int64_t channel) {
  return all + ((batch * p.routes + route) * p.channels + channel) * p.states;
}
INLINE float* saved_of(const ScanParams& p, int64_t batch, int64_t route, int64_t tile, int64_t channel) {
  const int64_t tiles = (p.steps + kTile - 1) / kTile - 1;
  return p.saved + ((batch * p.routes + route) * tiles + tile) * p.states * p.channels + channel;
}

// Set the tokens that a route never visits to 0 in `columns` columns of a tensor.
INLINE void clear_unvisited(const Job& job, const Tokens& tensor, int64_t batch, int64_t route, int64_t first, int64_t columns) {
  if (!job.unvisited || !tensor.data) return;
  const float zeros[kTile * kLanes] = {};
  for (int64_t i = job.offsets[route]; i < job.offsets[route + 1]; i += kTile) {
    const Steps steps(job.unvisited, i, job.offsets[route + 1]);
    for (int64_t c = 0; c < columns; c += kLanes) {
      store_tile(zeros, kLanes, tensor, batch, route, first + c, steps, static_cast<int>(least(kLanes, columns - c)));
    }
  }
}

// How D is cut into chunks and whether the routes of a chunk are items of their own. Results depend on neither in the
// forward pass; in the backward pass they depend on `chunk` alone, which therefore follows from the shape.
struct Plan {
  int64_t chunk, chunks;
  bool summed, split;  // several routes add up in one result; each route is an item, and the sum is taken afterwards
  int64_t items;

  Plan(const ScanParams& p, int64_t chunks_wanted, bool summed_, int64_t threads) : summed(summed_) {
    chunk = round_up((p.channels + chunks_wanted - 1) / chunks_wanted, kLanes < 16 ? 16 : kLanes);
    chunks = (p.channels + chunk - 1) / chunk;
    items = p.batch * chunks;
    // Partial results cost memory and a pass; they are worth it where threads would stand idle for a quarter of the time.
    split = !summed || 4 * items < 3 * round_up(items, threads);
    if (split) items *= p.routes;
  }
  int64_t columns(const ScanParams& p, int64_t c) const { return least(chunk, p.channels - c * chunk); }
  // floats of one item's float32 result
  int64_t result(const ScanParams& p) const { return round_up(p.tokens * chunk, 16); }
};

// Threads for a pass that only moves floats: each should have a quarter of a megabyte, or it costs more than it saves.
INLINE int64_t moving_threads(const Job& job, int64_t floats) { return least(job.threads, 1 + floats / 65536); }

// Add up `count` results (L, chunk) in order, round once, and write them as columns of a tensor.
INLINE void emit(const ScanParams& p, const Tokens& target, const float* results, int64_t count, int64_t stride, int64_t batch,
                 int64_t first, int64_t chunk, int64_t columns, float* tile) {
  for (int64_t start = 0; start < p.tokens; start += kTile) {
    const Steps steps(nullptr, start, p.tokens);
    for (int64_t c = 0; c < columns; c += kLanes) {
      for (int t = 0; t < steps.count; ++t) {
        const float* from = results + (start + t) * chunk + c;
        Vec sum = load(from);
        for (int64_t k = 1; k < count; ++k) sum += load(from + k * stride);
        store(tile + t * kLanes, sum);
      }
      store_tile(tile, kLanes, target, batch, 0, first + c, steps, static_cast<int>(least(kLanes, columns - c)));
    }
  }
}

INLINE void add_rows(float* result, int64_t chunk, const float* tile, const Steps& steps) {
  for (int t = 0; t < steps.count; ++t) {
    if (steps.token[t] < 0) continue;
    float* to = result + steps.token[t] * chunk;
    store(to, load(to) + load(tile + t * kLanes));
  }
}

struct ForwardPass {
  const Job& job;
  const ScanParams& p;
  Plan plan;
  float* partials;  // (B, chunks, K) results where plan.split sums routes

  struct Scratch {
    Weights weights;
    SharedTile shared;
    ChannelTile tile;
    float *y, *state, *result;
    Scratch(Arena& arena, const ScanParams& p, const Plan& plan)
        : weights(arena, p, plan.chunk),
          shared(arena, p),
          tile(arena),
          y(arena.take(kTile * kLanes)),
          state(arena.take(plan.chunk * p.states)),
          result(arena.take(plan.summed && !plan.split ? plan.result(p) : 0)) {}
  };

  void route(Scratch& scratch, int64_t batch, int64_t route, int64_t first, int64_t columns, float* result) const {
    const Weights& weights = scratch.weights;
    scratch.weights.fill(p, route, first, columns);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int present = static_cast<int>(least(kLanes, columns - c));
      for (int64_t n = 0; n < p.states; ++n) {
        float* to = scratch.state + c * p.states + n * kLanes;
        if (p.initial_state) {
          load_row(to, state_of(const_cast<float*>(p.initial_state), p, batch, route, first + c) + n, present, p.states);
        } else {
          store(to, Vec{});
        }
      }
    }
    const int32_t* indices = p.indices ? p.indices + route * p.steps : nullptr;
    const Tokens none{};
    for (int64_t start = 0, tile = 0; start < p.steps; start += kTile, ++tile) {
      const Steps steps(indices, start, p.steps), following(indices, least(start + kTile, p.steps), p.steps);
      const int padded = static_cast<int>(round_up(steps.count, kGroup));
      scratch.shared.load(p, batch, route, steps, padded);
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int present = static_cast<int>(least(kLanes, columns - c));
        float* state = scratch.state + c * p.states;
        if (p.saved && tile) {
          float* to = saved_of(p, batch, route, tile - 1, first + c);
          for (int64_t n = 0; n < p.states; ++n) store_row(to + n * p.channels, state + n * kLanes, present, 1);
        }
        const bool last = c + kLanes >= columns;
        const Steps& next = last ? following : steps;
        const int64_t next_first = first + (last ? 0 : c + kLanes);
        const Ahead ahead[] = {{p.x, batch, p.shared_x ? 0 : route, next_first, next},
                               {p.rank ? none : p.dt, batch, route, next_first, next},
                               {result ? none : p.y, batch, p.merge ? 0 : route, next_first, next},
                               {}};
        const Ahead* const rest = ahead + (p.states < 2 * kStates ? 1 : 2);  // asked for while the steps are formed
        scratch.tile.load<false>(p, weights, scratch.shared, batch, route, first, c, present, steps, padded, rest);
        const Vec skip = load(weights.skip + c);
        for (int t = 0; t < steps.count; ++t) store(scratch.y + t * kLanes, skip * load(scratch.tile.u + t * kLanes));
        const ForwardSweep sweep{scratch.tile, scratch.shared, weights.rate + c * p.states, state, scratch.y, p.states,
                                 steps.count, ahead};
        each_group<kStates>(p.states, 0, sweep);
        if (result) {
          add_rows(result + c, plan.chunk, scratch.y, steps);
        } else {
          store_tile(scratch.y, kLanes, p.y, batch, p.merge ? 0 : route, first + c, steps, present);
        }
      }
    }
    if (!result) clear_unvisited(job, p.y, batch, p.merge ? 0 : route, first, columns);
    if (!p.last_state) return;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int present = static_cast<int>(least(kLanes, columns - c));
      float* to = state_of(p.last_state, p, batch, route, first + c);
      for (int64_t n = 0; n < p.states; ++n) {
        store_row(to + n, scratch.state + c * p.states + n * kLanes, present, p.states);
      }
    }
  }

  static void item(const void* context, int64_t index, float* memory) {
    const FlushSubnormals flush;
    const ForwardPass& pass = *static_cast<const ForwardPass*>(context);
    const ScanParams& p = pass.p;
    const Plan& plan = pass.plan;
    Arena arena{memory};
    Scratch scratch(arena, p, plan);
    const int64_t first_route = plan.split ? index % p.routes : 0, routes = plan.split ? 1 : p.routes;
    const int64_t place = plan.split ? index / p.routes : index, chunk = place % plan.chunks, batch = place / plan.chunks;
    const int64_t first = chunk * plan.chunk, columns = plan.columns(p, chunk);
    float* result = !plan.summed ? nullptr : plan.split ? pass.partials + index * plan.result(p) : scratch.result;
    if (result) __builtin_memset(result, 0, sizeof(float) * p.tokens * plan.chunk);
    for (int64_t k = first_route; k < first_route + routes; ++k) pass.route(scratch, batch, k, first, columns, result);
    if (plan.summed && !plan.split) emit(p, p.y, result, 1, 0, batch, first, plan.chunk, columns, scratch.y);
  }

  static void sum_item(const void* context, int64_t place, float* tile) {
    const FlushSubnormals flush;
    const ForwardPass& pass = *static_cast<const ForwardPass*>(context);
    const Plan& plan = pass.plan;
    const int64_t size = plan.result(pass.p), chunk = place % plan.chunks;
    emit(pass.p, pass.p.y, pass.partials + place * pass.p.routes * size, pass.p.routes, size, place / plan.chunks,
         chunk * plan.chunk, plan.chunk, plan.columns(pass.p, chunk), tile);
  }
};

inline void forward(const Job& job) {
  const ScanParams& p = *job.params;
  const bool summed = p.merge && p.routes > 1;
  const Plan plan(p, (p.channels + 63) / 64, summed, job.threads);
  const Buffer partials(summed && plan.split ? plan.items * plan.result(p) : 0);
  ForwardPass pass{job, p, plan, partials.data};
  Arena count{nullptr};
  ForwardPass::Scratch(count, p, plan);
  vision_mamba::parallel(plan.items, job.threads, count.used, ForwardPass::item, &pass);
  if (summed && plan.split) {
    const int64_t threads = moving_threads(job, plan.items * plan.result(p));
    vision_mamba::parallel(p.batch * plan.chunks, threads, kTile * kLanes, ForwardPass::sum_item, &pass);
  }
}

}  // namespace VISION_MAMBA_LEVEL
