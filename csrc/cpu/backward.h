// With g_t = dy_t C_t + a_{t+1} g_{t+1}, a_t = exp(s_t A), the gradient of the state:
//   dC_t = sum_d dy_t h_t     dB_t = sum_d g_t s_t x_t     dx_t = s_t <g_t, B_t> + D dy_t
//   ds_t = x_t <g_t, B_t> + <A, g_t a_t h_{t-1}>           dA = sum_t s_t g_t a_t h_{t-1}
//
// An item is one (batch, route, chunk of channels), or all routes of it where x is shared. It walks the tiles backwards:
// from the state that the forward pass saved before a tile, the states and decays of its steps are formed once more
// and kept in scratch, for one group of states at a time; then g is carried back over them. Nothing of size (B, L, D, N)
// exists. What is summed over channels (dB, dC, low-rank ddt) is summed over lanes and registers of the chunk and leaves as one
// partial row per step and chunk; what is summed over time leaves as one partial per batch item. Partials are added in
// their order afterwards, so that results do not depend on threads.
#pragma once

#include "forward.h"

namespace VISION_MAMBA_LEVEL {

// The states first .. first + kWidth - 1 of one register of channels, over a whole tile: states again, then gradients.
struct BackwardSweep {
  ChannelTile tile;
  SharedTile shared;
  const float *rate, *start, *dy;  // start: the state before the tile
  float *g, *dA;                   // carried from tile to tile
  float *gB, *gAh;                 // <g, B> and <A log2(e), g a h_{t-1}> of every step, summed over groups
  float* sums;                     // dB and dC of every step and state, summed over registers, group after group
  float *a, *h;                    // history: kTile and kTile + 1 rows of kWidth registers
  int64_t states, padded;
  const Ahead* ahead;  // asked for by the two loops of the first group of states, and by those of the others

  template <int kWidth>
  INLINE void run(int64_t first) const {
    again<kWidth>(first);
    back<kWidth>(first);
  }

  template <int kWidth>
  INLINE void again(int64_t first) const {
    const float *s_rows = tile.s, *su_rows = tile.su, *B = shared.B + first;
    float *a_row = a, *h_row = h;
    const Ahead next = ahead[first ? 2 : 0];
    const int64_t stride = states, steps = padded;
    Vec state[kWidth], r[kWidth];
    for (int i = 0; i < kWidth; ++i) r[i] = load(rate + (first + i) * kLanes);
    for (int i = 0; i < kWidth; ++i) {
      state[i] = load(start + (first + i) * kLanes);
      store(h_row + i * kLanes, state[i]);
    }
    for (int64_t t = 0; t < steps; ++t, B += stride) {
      const Vec s = load(s_rows + t * kLanes), su = load(su_rows + t * kLanes);
      h_row += kWidth * kLanes;
#pragma GCC unroll 8
      for (int i = 0; i < kWidth; ++i) {
        const Vec decay = exp2(s * r[i]);
        state[i] = decay * state[i] + su * B[i];
        store(a_row + i * kLanes, decay);
        store(h_row + i * kLanes, state[i]);
      }
      a_row += kWidth * kLanes;
      next.ask(t);
    }
  }

  template <int kWidth>
  INLINE void back(int64_t first) const {
    // So many steps give whole registers of sums over lanes: dB and dC of kWidth states each.
    constexpr int kSteps = 2 * kWidth < kLanes ? kLanes / (2 * kWidth) : 1, kProducts = 2 * kWidth * kSteps;
    const float *s_rows = tile.s, *su_rows = tile.su, *dy_rows = dy, *a_rows = a, *h_rows = h;
    const float *B_rows = shared.B + first, *C_rows = shared.C + first;
    float *gB_rows = gB, *gAh_rows = gAh, *out = sums + 2 * kTile * first;
    const int64_t stride = states;
    const Ahead next = ahead[first ? 3 : 1];
    Vec gradient[kWidth], total[kWidth] = {}, r[kWidth], after[kWidth];
    for (int i = 0; i < kWidth; ++i) gradient[i] = load(g + (first + i) * kLanes);
    for (int i = 0; i < kWidth; ++i) r[i] = load(rate + (first + i) * kLanes);
    for (int i = 0; i < kWidth; ++i) after[i] = load(h_rows + (padded * kWidth + i) * kLanes);
    for (int64_t group = padded - kSteps; group >= 0; group -= kSteps) {
      Vec products[kProducts];
#pragma GCC unroll 8
      for (int j = kSteps - 1; j >= 0; --j) {
        const int64_t t = group + j;
        const Vec s = load(s_rows + t * kLanes), su = load(su_rows + t * kLanes), dyt = load(dy_rows + t * kLanes);
        const float *B = B_rows + t * stride, *C = C_rows + t * stride;
        Vec with_B = load(gB_rows + t * kLanes), with_h = load(gAh_rows + t * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kWidth; ++i) {
          const Vec gt = gradient[i] + dyt * C[i], before = load(h_rows + (t * kWidth + i) * kLanes);
          products[2 * kWidth * j + i] = gt * su;
          products[2 * kWidth * j + kWidth + i] = dyt * after[i];
          after[i] = before;
          with_B += gt * B[i];
          gradient[i] = gt * load(a_rows + (t * kWidth + i) * kLanes);
          const Vec q = gradient[i] * before;
          with_h += q * r[i];
          total[i] += q * s;
        }
        store(gB_rows + t * kLanes, with_B);
        store(gAh_rows + t * kLanes, with_h);
        next.ask(t);
      }
      float* to = out + 2 * kWidth * group;
      for (int i = 0; i < kProducts; i += kLanes) {
        const Vec sum = VISION_MAMBA_LEVEL::sums(products + i);
        store(to + i, load(to + i) + sum);
      }
    }
    for (int i = 0; i < kWidth; ++i) {
      store(g + (first + i) * kLanes, gradient[i]);
      store(dA + (first + i) * kLanes, load(dA + (first + i) * kLanes) + total[i]);
    }
  }
};

// Lay the sums of all groups out as rows of 2 N + R columns: dB, dC, and then what is there already.
struct UnpackSums {
  const float* sums;
  float* rows;
  int64_t width, states;
  int count;

  template <int kWidth>
  INLINE void run(int64_t first) const {
    const float* from = sums + 2 * kTile * first;
    for (int t = 0; t < count; ++t) {
      for (int i = 0; i < kWidth; ++i) {
        rows[t * width + first + i] = from[2 * kWidth * t + i];
        rows[t * width + states + first + i] = from[2 * kWidth * t + kWidth + i];
      }
    }
  }
};

// Low-rank dt of one register of channels: dlow_t += W^T ddt_t (rows of `padded_rank` floats), dW += ddt_t low_t^T.
struct MixGradient {
  const float *ddt, *low, *rows;  // rows: W by channel, `padded_rank` floats each
  float *dlow, *dmix;
  int rank, padded_rank, padded;

  INLINE void run() const {
    constexpr int kRows = 4;
    for (int t = 0; t < padded; t += kRows) {
      for (int r = 0; r < padded_rank; r += kLanes) {
        Vec sum[kRows];
        for (int i = 0; i < kRows; ++i) sum[i] = load(dlow + (t + i) * padded_rank + r);
        for (int lane = 0; lane < kLanes; ++lane) {
          const Vec w = load(rows + lane * padded_rank + r);
          for (int i = 0; i < kRows; ++i) sum[i] += w * ddt[(t + i) * kLanes + lane];
        }
        for (int i = 0; i < kRows; ++i) store(dlow + (t + i) * padded_rank + r, sum[i]);
      }
    }
    for (int r = 0; r < rank; ++r) {
      Vec sum[kRows] = {};
      for (int t = 0; t < padded; t += kRows) {
        for (int i = 0; i < kRows; ++i) sum[i] += load(ddt + (t + i) * kLanes) * low[(t + i) * rank + r];
      }
      store(dmix + r * kLanes, load(dmix + r * kLanes) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
  }
};

struct BackwardPass {
  const Job& job;
  const ScanParams& p;
  Plan plan;
  float* dx;       // (B, chunks, K) results where plan.split sums routes
  float* rows;     // (B, K, chunks, S, 2 N + R): dB, dC, dlow
  float* weights;  // (B, K, chunks, chunk / kLanes, N + 2 + R, kLanes): dA, dD, ddt_bias, ddt_weight

  static int64_t row_width(const ScanParams& p) { return 2 * p.states + p.rank; }
  static int64_t weight_rows(const ScanParams& p) { return p.states + 2 + p.rank; }
  static int64_t padded_rank(const ScanParams& p) { return round_up(p.rank, kLanes); }

  struct Scratch {
    Weights weights;
    SharedTile shared;
    ChannelTile tile;
    float *dy, *gB, *gAh, *start, *a, *h, *g, *sums, *dlow, *mix_rows, *result;
    Scratch(Arena& arena, const ScanParams& p, const Plan& plan)
        : weights(arena, p, plan.chunk),
          shared(arena, p),
          tile(arena),
          dy(arena.take(kTile * kLanes)),
          gB(arena.take(kTile * kLanes)),
          gAh(arena.take(kTile * kLanes)),
          start(arena.take(p.states * kLanes)),
          a(arena.take(kTile * kStates * kLanes)),
          h(arena.take((kTile + 1) * kStates * kLanes)),
          g(arena.take(plan.chunk * p.states)),
          sums(arena.take(kTile * 2 * p.states)),
          dlow(arena.take(kTile * padded_rank(p))),
          mix_rows(arena.take(plan.chunk * padded_rank(p))),
          result(arena.take(plan.summed && !plan.split ? plan.result(p) : 0)) {}
  };

  float* rows_of(int64_t batch, int64_t route, int64_t chunk) const {
    return rows + ((batch * p.routes + route) * plan.chunks + chunk) * p.steps * row_width(p);
  }
  float* weights_of(int64_t batch, int64_t route, int64_t chunk) const {
    return weights + ((batch * p.routes + route) * plan.chunks + chunk) * plan.chunk * weight_rows(p);
  }

  void route(Scratch& scratch, int64_t batch, int64_t route, int64_t chunk, float* result) const {
    const int64_t first = chunk * plan.chunk, columns = plan.columns(p, chunk), states = p.states;
    const int rank = static_cast<int>(p.rank), wide_rank = static_cast<int>(padded_rank(p));
    scratch.weights.fill(p, route, first, columns);
    for (int64_t c = 0; c < plan.chunk; ++c) {
      for (int r = 0; r < wide_rank; ++r) {
        const bool present = r < rank && c < columns;
        scratch.mix_rows[c * wide_rank + r] = present ? p.dt_weight[(route * p.channels + first + c) * rank + r] : 0;
      }
    }
    float* const totals = weights_of(batch, route, chunk);
    __builtin_memset(totals, 0, sizeof(float) * plan.chunk * weight_rows(p));
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int present = static_cast<int>(least(kLanes, columns - c));
      for (int64_t n = 0; n < states; ++n) {
        float* to = scratch.g + c * states + n * kLanes;
        if (p.dlast) {
          load_row(to, state_of(const_cast<float*>(p.dlast), p, batch, route, first + c) + n, present, states);
        } else {
          store(to, Vec{});
        }
      }
    }
    const int32_t* indices = p.indices ? p.indices + route * p.steps : nullptr;
    for (int64_t tile = (p.steps - 1) / kTile; tile >= 0; --tile) {
      const Steps steps(indices, tile * kTile, p.steps);
      const Steps following(indices, most(tile - 1, 0) * kTile, tile * kTile);
      const int padded = static_cast<int>(round_up(steps.count, kGroup));
      scratch.shared.load(p, batch, route, steps, padded);
      __builtin_memset(scratch.sums, 0, sizeof(float) * kTile * 2 * states);
      __builtin_memset(scratch.dlow, 0, sizeof(float) * kTile * wide_rank);
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int present = static_cast<int>(least(kLanes, columns - c));
        float* const total = totals + c * weight_rows(p);
        const bool last = c + kLanes >= columns;
        channels(scratch, batch, route, tile, first, c, present, steps, padded, total, first + (last ? 0 : c + kLanes),
                 last ? following : steps, result);
        if (p.dx.data && result) {
          add_rows(result + c, plan.chunk, scratch.gB, steps);
        } else if (p.dx.data) {
          store_tile(scratch.gB, kLanes, p.dx, batch, p.shared_x ? 0 : route, first + c, steps, present);
        }
        if (rank) {
          MixGradient{scratch.gAh, scratch.shared.low, scratch.mix_rows + c * wide_rank, scratch.dlow,
                      total + (states + 2) * kLanes, rank, wide_rank, padded}
              .run();
        } else {
          store_tile(scratch.gAh, kLanes, p.ddt, batch, route, first + c, steps, present);
        }
      }
      float* to = rows_of(batch, route, chunk) + tile * kTile * row_width(p);
      UnpackSums unpack{scratch.sums, to, row_width(p), states, steps.count};
      each_group<kStates>(states, 0, unpack);
      for (int t = 0; t < steps.count; ++t) {
        for (int r = 0; r < rank; ++r) to[t * row_width(p) + 2 * states + r] = scratch.dlow[t * wide_rank + r];
      }
    }
    if (!result) clear_unvisited(job, p.dx, batch, p.shared_x ? 0 : route, first, columns);
    if (!rank) clear_unvisited(job, p.ddt, batch, route, first, columns);
    for (int64_t c = 0; p.dinitial_state && c < columns; c += kLanes) {
      const int present = static_cast<int>(least(kLanes, columns - c));
      float* to = state_of(p.dinitial_state, p, batch, route, first + c);
      for (int64_t n = 0; n < states; ++n) store_row(to + n, scratch.g + c * states + n * kLanes, present, states);
    }
  }

  // One register of channels of a tile. Leaves dx in scratch.gB and ddt in scratch.gAh. Next come the channels from
  // next_first on, in the steps `next`.
  void channels(Scratch& scratch, int64_t batch, int64_t route, int64_t tile, int64_t first, int64_t c, int present,
                const Steps& steps, int padded, float* total, int64_t next_first, const Steps& next, bool summed) const {
    const Weights& w = scratch.weights;
    const int64_t states = p.states;
    const Tokens none{};
    const Ahead ahead[] = {{p.x, batch, p.shared_x ? 0 : route, next_first, next},
                           {p.rank ? none : p.dt, batch, route, next_first, next},
                           {p.dy, batch, p.merge ? 0 : route, next_first, next},
                           {summed ? none : p.dx, batch, p.shared_x ? 0 : route, next_first, next},
                           {p.rank ? none : p.ddt, batch, route, next_first, next},
                           {},
                           {}};
    const Ahead* const rest = ahead + (states < 2 * kStates ? 2 : 4);  // asked for outside the sweep
    scratch.tile.load<true>(p, w, scratch.shared, batch, route, first, c, present, steps, padded, rest);
    if (p.dy.data) {
      load_tile(scratch.dy, kLanes, p.dy, batch, p.merge ? 0 : route, first + c, steps, present);
      for (int i = steps.count * kLanes; i < padded * kLanes; ++i) scratch.dy[i] = 0;
    } else {
      __builtin_memset(scratch.dy, 0, sizeof(float) * padded * kLanes);
    }
    __builtin_memset(scratch.gB, 0, sizeof(float) * padded * kLanes);
    __builtin_memset(scratch.gAh, 0, sizeof(float) * padded * kLanes);
    for (int64_t n = 0; n < states; ++n) {
      float* to = scratch.start + n * kLanes;
      if (tile) {
        load_row(to, saved_of(p, batch, route, tile - 1, first + c) + n * p.channels, present, 1);
      } else if (p.initial_state) {
        load_row(to, state_of(const_cast<float*>(p.initial_state), p, batch, route, first + c) + n, present, states);
      } else {
        store(to, Vec{});
      }
    }
    const BackwardSweep sweep{scratch.tile, scratch.shared, w.rate + c * states, scratch.start, scratch.dy,
                              scratch.g + c * states, total, scratch.gB, scratch.gAh, scratch.sums, scratch.a,
                              scratch.h, states, padded, ahead};
    each_group<kStates>(states, 0, sweep);
    const Vec skip = load(w.skip + c);
    Vec dskip = {}, dbias = {};
    for (int t = 0; t < padded; ++t) {
      const int row = t * kLanes;
      const Vec u = load(scratch.tile.u + row), s = load(scratch.tile.s + row), dy = load(scratch.dy + row);
      const Vec gB = load(scratch.gB + row), gAh = load(scratch.gAh + row);
      const Vec ddt = (u * gB + gAh * kLn2) * load(scratch.tile.slope + row);
      store(scratch.gB + row, s * gB + skip * dy);
      store(scratch.gAh + row, ddt);
      dskip += dy * u;
      dbias += ddt;
      rest[2].ask(t);
    }
    store(total + states * kLanes, load(total + states * kLanes) + dskip);
    store(total + (states + 1) * kLanes, load(total + (states + 1) * kLanes) + dbias);
  }

  static void item(const void* context, int64_t index, float* memory) {
    const FlushSubnormals flush;
    const BackwardPass& pass = *static_cast<const BackwardPass*>(context);
    const ScanParams& p = pass.p;
    const Plan& plan = pass.plan;
    Arena arena{memory};
    Scratch scratch(arena, p, plan);
    const int64_t first_route = plan.split ? index % p.routes : 0, routes = plan.split ? 1 : p.routes;
    const int64_t place = plan.split ? index / p.routes : index, chunk = place % plan.chunks, batch = place / plan.chunks;
    float* result = !plan.summed ? nullptr : plan.split ? pass.dx + index * plan.result(p) : scratch.result;
    if (result) __builtin_memset(result, 0, sizeof(float) * p.tokens * plan.chunk);
    for (int64_t k = first_route; k < first_route + routes; ++k) pass.route(scratch, batch, k, chunk, result);
    if (plan.summed && !plan.split) {
      emit(p, p.dx, result, 1, 0, batch, chunk * plan.chunk, plan.chunk, plan.columns(p, chunk), scratch.dy);
    }
  }

  static void dx_item(const void* context, int64_t place, float* tile) {
    const FlushSubnormals flush;
    const BackwardPass& pass = *static_cast<const BackwardPass*>(context);
    const Plan& plan = pass.plan;
    const int64_t size = plan.result(pass.p), chunk = place % plan.chunks;
    emit(pass.p, pass.p.dx, pass.dx + place * pass.p.routes * size, pass.p.routes, size, place / plan.chunks,
         chunk * plan.chunk, plan.chunk, plan.columns(pass.p, chunk), tile);
  }

  // dB, dC and dlow of one (batch, route): add the chunks up, onto the first.
  static void rows_item(const void* context, int64_t index, float*) {
    const FlushSubnormals flush;
    const BackwardPass& pass = *static_cast<const BackwardPass*>(context);
    const ScanParams& p = pass.p;
    const int64_t route = index % p.routes, batch = index / p.routes, width = row_width(p), size = p.steps * width;
    float* rows = pass.rows_of(batch, route, 0);
    for (int64_t start = 0; start < p.steps; start += kTile) {
      const Steps steps(p.indices ? p.indices + route * p.steps : nullptr, start, p.steps);
      float* tile = rows + start * width;
      for (int64_t chunk = 1; chunk < pass.plan.chunks; ++chunk) {
        for (int64_t i = 0; i < steps.count * width; ++i) tile[i] += tile[chunk * size + i];
      }
      const int wide = static_cast<int>(width), states = static_cast<int>(p.states), rank = static_cast<int>(p.rank);
      store_tile(tile, wide, p.dB, batch, route, 0, steps, states);
      store_tile(tile + states, wide, p.dC, batch, route, 0, steps, states);
      if (rank) store_tile(tile + 2 * states, wide, p.ddt, batch, route, 0, steps, rank);
    }
    clear_unvisited(pass.job, p.dB, batch, route, 0, p.states);
    clear_unvisited(pass.job, p.dC, batch, route, 0, p.states);
    if (p.rank) clear_unvisited(pass.job, p.ddt, batch, route, 0, p.rank);
  }

  // dA, dD, ddt_bias, ddt_weight of one (route, chunk): add the batch up.
  static void weights_item(const void* context, int64_t index, float*) {
    const FlushSubnormals flush;
    const BackwardPass& pass = *static_cast<const BackwardPass*>(context);
    const ScanParams& p = pass.p;
    const int64_t chunk = index % pass.plan.chunks, route = index / pass.plan.chunks, count = weight_rows(p);
    const int64_t first = route * p.channels + chunk * pass.plan.chunk, columns = pass.plan.columns(p, chunk);
    const int64_t stride = pass.weights_of(1, 0, 0) - pass.weights_of(0, 0, 0);
    const float* partial = pass.weights_of(0, route, chunk);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int present = static_cast<int>(least(kLanes, columns - c));
      const int64_t channel = first + c;
      for (int64_t i = 0; i < count; ++i) {
        Vec sum = {};
        for (int64_t b = 0; b < p.batch; ++b) sum += load(partial + b * stride + (c * count + i * kLanes));
        float row[kLanes];
        store(row, sum);
        if (i < p.states) {
          store_row(p.dA + channel * p.states + i, row, present, p.states);
        } else if (i == p.states) {
          if (p.dD) store_row(p.dD + channel, row, present, 1);
        } else if (i == p.states + 1) {
          if (p.ddt_bias) store_row(p.ddt_bias + channel, row, present, 1);
        } else {
          store_row(p.ddt_weight + channel * p.rank + (i - p.states - 2), row, present, p.rank);
        }
      }
    }
  }
};

inline void backward(const Job& job) {
  const ScanParams& p = *job.params;
  const bool summed = p.shared_x && p.routes > 1;
  // More states make more partial rows, so chunks grow with them; two chunks at least give two threads work at batch 1.
  const int64_t most_channels = 64 * most(1, p.states / 16);
  const int64_t chunks = most((p.channels + most_channels - 1) / most_channels, least(2, (p.channels + 31) / 32));
  const Plan plan(p, chunks, summed, job.threads);
  const int64_t dx_floats = summed && plan.split ? plan.items * plan.result(p) : 0;
  const int64_t row_floats = p.batch * p.routes * plan.chunks * p.steps * BackwardPass::row_width(p);
  const int64_t weight_floats = p.batch * p.routes * plan.chunks * plan.chunk * BackwardPass::weight_rows(p);
  const Buffer dx(dx_floats), rows(row_floats), weights(weight_floats);
  BackwardPass pass{job, p, plan, dx.data, rows.data, weights.data};
  Arena count{nullptr};
  BackwardPass::Scratch(count, p, plan);
  using vision_mamba::parallel;
  parallel(plan.items, job.threads, count.used, BackwardPass::item, &pass);
  if (dx_floats) {
    const int64_t threads = moving_threads(job, dx_floats);
    parallel(p.batch * plan.chunks, threads, kTile * kLanes, BackwardPass::dx_item, &pass);
  }
  parallel(p.batch * p.routes, moving_threads(job, row_floats), 0, BackwardPass::rows_item, &pass);
  parallel(p.routes * plan.chunks, moving_threads(job, weight_floats), 0, BackwardPass::weights_item, &pass);
}

}  // namespace VISION_MAMBA_LEVEL
