// What sm_90a has beyond other NVIDIA architectures: barriers that count copied bytes, copies by
// another unit than the threads, pairs of blocks, and matrix instructions of four waves.
#pragma once

#include "gpu.h"

#define TORCH_Q4_HOPPER 1

namespace TORCH_Q4_NAMESPACE {

// Which of the block's waves this is, in a form that the compiler knows to be the same in all
// lanes: loops over K then count in uniform registers.
TORCH_Q4_DEVICE int wave_of_block() {
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWaveLanes, 0);
}

// A pointer to shared memory as the number that the instructions below take.
TORCH_Q4_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// A barrier in shared memory, 8 bytes: a phase of it ends when as many have arrived as it was
// initialised with and the bytes that were expected have been copied. wait_for, which a whole wave
// calls, returns once the phase of this parity, 0 for the first, has ended; before the first, that
// of parity 1 has.
TORCH_Q4_DEVICE void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
TORCH_Q4_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
TORCH_Q4_DEVICE void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
TORCH_Q4_DEVICE void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
TORCH_Q4_DEVICE void wait_for(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (ended == 0);
  __syncwarp();  // matrix instructions want all lanes of a wave together
}

// Copies a multiple of 16 bytes to shared memory while the thread goes on; the barrier counts them.
TORCH_Q4_DEVICE void copy_async(uint32_t shared, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- pairs of blocks, launched as clusters of two: each can reach the other's shared memory

TORCH_Q4_DEVICE uint32_t rank_in_pair() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of both blocks wait for one another.
TORCH_Q4_DEVICE void sync_pair() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// Arrives at the barrier that lies at the same place in a block of the pair.
TORCH_Q4_DEVICE void arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// copy_async to the same place in both blocks, each of whose barriers counts the bytes.
TORCH_Q4_DEVICE void copy_async_to_pair(uint32_t shared, const void* from, int bytes,
                                        uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// Makes what this thread wrote to shared memory visible to matrix instructions of any thread that
// a barrier holds back until then.
TORCH_Q4_DEVICE void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// __syncthreads of the first kThreads threads of a block.
template <int kThreads>
TORCH_Q4_DEVICE void sync_first_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// How many registers a thread has from here on. Called by four waves, the first of them a multiple
// of four; some give up those of the block's that others take.
template <int kRegisters>
TORCH_Q4_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
TORCH_Q4_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// wgmma.mma_async.m64nNk16: four waves multiply 64 rows of W, 16 each, with kXRows of x. PTX ISA,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate": a wave's operand W and its sums lie in
// registers like those of mma.m16n8k16 (Tile), for every eight rows of x; x lies in shared memory
// in matrices of eight rows and eight elements, 16 bytes a row, first those of elements 0 to 7.
template <class T, int kXRows>
struct GroupTile {
  // Around the instructions whose registers others wrote, and those that are waited for together.
  TORCH_Q4_DEVICE static void begin() { asm volatile("wgmma.fence.sync.aligned;"); }
  TORCH_Q4_DEVICE static void commit() { asm volatile("wgmma.commit_group.sync.aligned;"); }
  TORCH_Q4_DEVICE static void wait(float (&c)[kXRows / 2]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;");
    touch(c);
  }
  // For all but those of the last commit.
  TORCH_Q4_DEVICE static void wait_for_others() {
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  }
  // Sums of which some are still under way must not be what the compiler knows to be zero.
  TORCH_Q4_DEVICE static void clear(float (&c)[kXRows / 2]) {
#pragma unroll
    for (int i = 0; i < kXRows / 2; ++i) c[i] = 0;
    touch(c);
  }
  TORCH_Q4_DEVICE static void touch(float (&c)[kXRows / 2]) {
#pragma unroll
    for (int i = 0; i < kXRows / 2; ++i) asm volatile("" : "+f"(c[i]));
  }
  // x as described, plus a number of 16 bytes.
  TORCH_Q4_DEVICE static void multiply(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                       uint64_t x, float (&c)[kXRows / 2]);

  // The matrix descriptor: where x begins, the distance to the next eight elements, and that to
  // the next eight rows of x, in units of 16 bytes.
  TORCH_Q4_DEVICE static uint64_t describe(const uint8_t* x) {
    return (shared_address(x) >> 4 & 0x3FFF) | static_cast<uint64_t>(kXRows) << 16 |
           uint64_t{8} << 32;
  }
};

// The sums of so many rows of x as operands, which come first, and the names of all operands.
#define TORCH_Q4_SUMS_8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define TORCH_Q4_SUMS_16(i) TORCH_Q4_SUMS_8(i), TORCH_Q4_SUMS_8(i + 4)
#define TORCH_Q4_SUMS_32(i) TORCH_Q4_SUMS_16(i), TORCH_Q4_SUMS_16(i + 8)
#define TORCH_Q4_SUMS_64(i) TORCH_Q4_SUMS_32(i), TORCH_Q4_SUMS_32(i + 16)
#define TORCH_Q4_SUMS_128(i) TORCH_Q4_SUMS_64(i), TORCH_Q4_SUMS_64(i + 32)
#define TORCH_Q4_SUMS_256(i) TORCH_Q4_SUMS_128(i), TORCH_Q4_SUMS_128(i + 64)
#define TORCH_Q4_SUM_NAMES_8 "%0, %1, %2, %3"
#define TORCH_Q4_SUM_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TORCH_Q4_SUM_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TORCH_Q4_SUM_NAMES_64                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TORCH_Q4_SUM_NAMES_128                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TORCH_Q4_SUM_NAMES_256                                                                   \
  TORCH_Q4_SUM_NAMES_128                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
#define TORCH_Q4_INPUT_NAMES_8 "{%4, %5, %6, %7}, %8"
#define TORCH_Q4_INPUT_NAMES_16 "{%8, %9, %10, %11}, %12"
#define TORCH_Q4_INPUT_NAMES_32 "{%16, %17, %18, %19}, %20"
#define TORCH_Q4_INPUT_NAMES_64 "{%32, %33, %34, %35}, %36"
#define TORCH_Q4_INPUT_NAMES_128 "{%64, %65, %66, %67}, %68"
#define TORCH_Q4_INPUT_NAMES_256 "{%128, %129, %130, %131}, %132"
#define TORCH_Q4_WGMMA(T, type, x_rows)                                                         \
  template <>                                                                                   \
  TORCH_Q4_DEVICE void GroupTile<T, x_rows>::multiply(                                          \
      uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t x, float (&c)[x_rows / 2]) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #x_rows "k16.f32." type "." type           \
                 " {" TORCH_Q4_SUM_NAMES_##x_rows "}, " TORCH_Q4_INPUT_NAMES_##x_rows           \
                 ", 1, 1, 1, 0;"                                                                \
                 : TORCH_Q4_SUMS_##x_rows(0)                                                    \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(x));                                 \
  }
#define TORCH_Q4_WGMMA_OF(T, type) \
  TORCH_Q4_WGMMA(T, type, 8)       \
  TORCH_Q4_WGMMA(T, type, 16)      \
  TORCH_Q4_WGMMA(T, type, 32)      \
  TORCH_Q4_WGMMA(T, type, 64)      \
  TORCH_Q4_WGMMA(T, type, 128)     \
  TORCH_Q4_WGMMA(T, type, 256)
TORCH_Q4_WGMMA_OF(Float16, "f16")
TORCH_Q4_WGMMA_OF(BFloat16, "bf16")

}  // namespace TORCH_Q4_NAMESPACE
