// few_rows.cuh: gradients that are sums over channels, dB, dC and a low rank's, on their way out of few_backward.cuh. Where a
// cluster has several groups of channels (kTogether), each takes a share of every warp's steps: the others leave theirs
// with it, and it adds them up in order of the groups, so that a cluster leaves one partial result, or the gradient itself
// if it has all channels.
#pragma once
#include "few.cuh"

constexpr bool kSumRows = kTogether > 1;
constexpr bool kRows = !kOne || kSumRows;  // dB and dC wait in shared memory
constexpr int kShare = kWarpSteps / kTogether;  // steps of a warp that each group of channels sums up
static_assert(kShare % 2 == 0);

template <bool kFull> struct Sums { typedef SUM_TYPE Type; };
template <> struct Sums<true> { typedef Float Type; };
typedef Sums<kOne || kSumRows>::Type RowType;  // of dB and dC on a shelf
constexpr int kRowSteps = kWarpSteps + 2;      // so that states lie in different banks


struct Rows : Steps {
    alignas(8) RowType dB[kRows ? kStates : 1][kRows ? kRowSteps : 2], dC[kRows ? kStates : 1][kRows ? kRowSteps : 2];
    alignas(8) DDT_TYPE ddt[kSumRows && kRank ? kWarpSteps * kRank : 2];
    Mail mail;  // of what the groups of channels leave here: steps of the first, of the next ...
};
constexpr bool kWholeRows = WHOLE_ROWS;  // a cluster has all channels, and its sums are dB and dC
constexpr int kRowBytes = kWarpSteps * (2 * kStates * (int)sizeof(RowType) + kRank * (int)sizeof(DDT_TYPE));

// Leave two steps' dB and dC of a state with the group that takes them: of_rows are dB, dC, dB, dC.
DEVICE void leave_rows(Rows& shelf, int n, int step, const float* of_rows, int mate, int rank) {
    const float pairs[2][2] = {{of_rows[0] * kUnit, of_rows[2] * kUnit}, {of_rows[1], of_rows[3]}};
    Pack<RowType, 2> of_B, of_C;
    of_B.set(pairs[0]), of_C.set(pairs[1]);
    const int to = step / kShare * kCluster + rank, at = mate * kShare + step % kShare;
    send_two(&shelf.dB[n][at], to, of_B, shelf.mail);
    send_two(&shelf.dC[n][at], to, of_C, shelf.mail);
}
// The same with two columns of a low rank's gradient.
DEVICE void leave_columns(Rows& shelf, int step, int column, const Pack<DDT_TYPE, 2>& two, int mate, int rank) {
    const int to = step / kShare * kCluster + rank, slot = mate * kShare + step % kShare;
    if (column < kRank) send_two(shelf.ddt + slot * kRank + column, to, two, shelf.mail);
}
// Sum the gradients that the warps of the same steps left on this one's shelf for its share of them, in order of their
// groups of channels.
DEVICE void sum_rows(const Params& p, const Rows& shelf, int turn, int lane, int mate, int group, int groups,
                     long long batch, int route, int begin) {
    for (int i = lane; i < kStates * kShare; i += 32) {
        const int n = i % kStates, mine = i / kStates, at_step = mate * kShare + mine;
        float2 sum = {0.f, 0.f};
#pragma unroll
        for (int of = 0; of < kTogether; ++of) {
            sum.x += widen(shelf.dB[n][of * kShare + mine]), sum.y += widen(shelf.dC[n][of * kShare + mine]);
        }
        const int step = begin + at_step, token = shelf.tokens[turn][at_step / kSteps][at_step % kSteps];
        if constexpr (kWholeRows) {
            if (token < 0) continue;
            ((B_TYPE*)p.dB)[batch * p.dB_b + token * p.dB_l + route * p.dB_k + n * p.dB_n] = narrow<B_TYPE>(sum.x);
            ((C_TYPE*)p.dC)[batch * p.dC_b + token * p.dC_l + route * p.dC_k + n * p.dC_n] = narrow<C_TYPE>(sum.y);
        } else if constexpr (kOne) {
            if (step < (int)p.steps) {
                reinterpret_cast<float2*>(p.dBC)[((group * p.batch + batch) * p.routes + route) * p.steps + step] = sum;
            }
        } else if (token >= 0) {
            const long long at = (((batch * p.tokens + token) * p.routes + route) * groups + group) * kStates + n;
            ((SUM_TYPE*)p.dB)[at] = narrow<SUM_TYPE>(sum.x), ((SUM_TYPE*)p.dC)[at] = narrow<SUM_TYPE>(sum.y);
        }
    }
    if constexpr (kRank > 0) {
        constexpr int kPairs = kRank / 2;  // of columns
        for (int i = lane; i < kShare * kPairs; i += 32) {
            const int mine = i / kPairs, column = i % kPairs * 2, step = mate * kShare + mine;
            const int token = shelf.tokens[turn][step / kSteps][step % kSteps];
            float sum[2] = {0.f, 0.f};
#pragma unroll
            for (int of = 0; of < kTogether; ++of) {
                const DDT_TYPE* pair = shelf.ddt + (of * kShare + mine) * kRank + column;
                sum[0] += widen(pair[0]), sum[1] += widen(pair[1]);
            }
            if (token < 0) continue;
            Pack<DDT_TYPE, 2> packed;
            packed.set(sum);
            const long long row = (batch * p.tokens + token) * p.routes + route;
            const long long at = kOne ? group * p.batch * p.tokens * p.routes + row : row * groups + group;
            store<true>(packed, (DDT_TYPE*)p.ddt + at * kRank + column, 1, 2);
        }
    }
}
