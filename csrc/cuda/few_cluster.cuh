// few_cluster.cuh: how blocks that share out a sequence tell each other what they found: in a cluster through shared memory,
// along a chain of blocks through memory.
#pragma once
#include "single.cuh"

constexpr int kCluster = CLUSTER;    // blocks of a group of channels
constexpr int kTogether = TOGETHER;  // groups of channels of a cluster
#define JOINED (CLUSTER * TOGETHER)
#if JOINED > 1
#define IN_CLUSTERS __cluster_dims__(JOINED, 1, 1)
#else
#define IN_CLUSTERS
#endif

DEVICE int cluster_rank() {
    int rank = 0;
#if JOINED > 1
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}
DEVICE void cluster_begin() {  // nothing that was written has to be seen by others
#if JOINED > 1
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
}
DEVICE void cluster_wait() {
#if JOINED > 1
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Mail: blocks of a cluster write into each other's shared memory, and each counts the bytes that came. That takes no
// fence, which would wait for all that a block has written anywhere. One thread says once a phase how many will come.
typedef unsigned long long Mail;
constexpr int kMostTurns = 1 << 20;  // of a wait; on an H200 one lasts 5 us
DEVICE unsigned shared_place(const void* at) { return (unsigned)__cvta_generic_to_shared(at); }
DEVICE unsigned place_at(const void* at, int rank) {
    unsigned to = 0;
#if JOINED > 1
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_place(at)), "r"(rank));
#endif
    return to;
}
DEVICE void expect_mail(Mail& mail, int bytes) {
#if JOINED > 1
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(shared_place(&mail)), "r"(bytes) : "memory");
#endif
}
DEVICE void open_mail(Mail& mail, int bytes) {
#if JOINED > 1
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_place(&mail)) : "memory");
    expect_mail(mail, bytes);
#endif
}
DEVICE void show_mail() {  // to the cluster, when all are open
#if JOINED > 1
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// `limited`: where the values of the call decide how many will come, and a wrong table of routes could keep all waiting.
template <bool kLimited = false> DEVICE void await_mail(Mail& mail, int phase) {
#if JOINED > 1
    if constexpr (kLimited) {
        unsigned came = 0;
        for (int turns = 0; !came; ++turns) {
            asm volatile("{\n\t.reg .pred done;\n\t"
                         "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n\t"
                         "selp.u32 %0, 1, 0, done;\n\t}"
                         : "=r"(came) : "r"(shared_place(&mail)), "r"(phase & 1) : "memory");
            if (!came && turns >= kMostTurns && threadIdx.x == 0) {
                __assertfail("each route names a token once; this table was changed since it was read: pass a new one",
                             "few_cluster.cuh", __LINE__, "cross_selective_scan", 1ull);
            }
        }
        return;
    }
    asm volatile("{\n\t.reg .pred done;\n\tagain:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}"
                 ::"r"(shared_place(&mail)), "r"(phase & 1) : "memory");
#endif
}
// Write to where a block of the cluster has what is `at` here, and to its mail.
DEVICE void send(const void* at, int rank, float a, float b, Mail& mail, bool wanted = true) {
#if JOINED > 1
    asm volatile("{\n\t.reg .pred w;\n\tsetp.ne.s32 w, %4, 0;\n\t"
                 "@w st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];\n\t}"
                 ::"r"(place_at(at, rank)), "r"(__float_as_uint(a)), "r"(__float_as_uint(b)), "r"(place_at(&mail, rank)),
                 "r"((int)wanted) : "memory");
#else
    if (wanted) *(float2*)at = make_float2(a, b);
#endif
}
DEVICE void send_word(const void* at, int rank, unsigned word, Mail& mail) {
#if JOINED > 1
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 ::"r"(place_at(at, rank)), "r"(word), "r"(place_at(&mail, rank)) : "memory");
#endif
}
template <class T> DEVICE void send_two(const T* at, int rank, const Pack<T, 2>& two, Mail& mail) {
    if constexpr (sizeof(T) == 4) send(at, rank, two.get(0), two.get(1), mail);
    else send_word(at, rank, two.words[0], mail);
}

// The chain: a number that a block leaves for the next one of its route, its bits turned over. 0 says that it isn't there
// yet, so that nothing else has to be awaited: as a number it would be a NaN that no sum and no product has.
DEVICE float await_number(const unsigned* from) {
    unsigned word;
    do {
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    } while (!word);
    return __uint_as_float(~word);
}
DEVICE void leave_number(unsigned* to, float number) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(~__float_as_uint(number)) : "memory");
}
// How many clusters have begun before this one: those that it will wait for have.
DEVICE int take_turn(int* begun, float2& place, Mail& mail) {
    const bool first = threadIdx.x == 0 && cluster_rank() == 0;
    float number = 0.f;
    if (first) number = __uint_as_float((unsigned)atomicAdd(begun, 1));
    if constexpr (kTogether > 1) {
        cluster_wait();
        if (first) {
#pragma unroll
            for (int i = 0; i < kTogether; ++i) send(&place.x, i, number, 0.f, mail);
        }
        await_mail(mail, 0);
    } else {
        if (first) place.x = number;
        __syncthreads();
    }
    return (int)__float_as_uint(place.x);
}
