// linear for many rows of x on Hopper, where matrix instructions and not memory take the time. Like
// hopper_rows.h, but
//
//     x         a copy of it that arrange has put into the order of the instructions comes to
//               shared memory in one piece a stage, without passing through registers
//     rows      of x, up to 256 at a time, so that a weight is decoded once for all
//     pairs     two blocks with neighbouring rows of W, on two multiprocessors, fetch half of x
//               each, for both
//     blocks    stay, and take one pair of tiles after another: while the last sums of one are
//               stored, the next one's stages arrive
//
// A tile is 128 rows of W. A wave has 16 of them, whose next weights it decodes while its own and
// other waves' instructions are under way.
#pragma once

#include "hopper_rows.h"

namespace TORCH_Q4_NAMESPACE {

template <class Format, class T, int kXRows>
struct HopperManyProduct {
  using Tile = GroupTile<T, kXRows>;
  using Half = StageHalf<Format, T>;
  using Block = typename Format::Block;
  static constexpr int kGroups = gpu::kHopperManyRows / kTileRows;
  static constexpr int kUnit = gpu::hopper_many_unit(Format::kBlockElems);
  static constexpr int kUnitBytes =
      kUnit / Format::kBlockElems * kTileRows * static_cast<int>(sizeof(Block));
  static constexpr int kWeightBytes =
      gpu::hopper_many_weight_bytes(Format::kBlockElems, sizeof(Block));
  static constexpr int kXBytes = gpu::hopper_many_x_bytes(kXRows);
  static constexpr int kChunk = 32;  // rows of x that are stored at a time

  const gpu::HopperManyArgs& args;
  const gpu::LinearArgs& a;
  const uint32_t barriers;
  uint8_t* const x_stages;
  uint8_t* const weight_stages;
  const int lane;
  // Of the tile at hand.
  int64_t first_row, first_x_row;
  int x_rows, split, begin, end;

  TORCH_Q4_DEVICE HopperManyProduct(const gpu::HopperManyArgs& args, uint8_t* memory)
      : args(args),
        a(args.linear),
        barriers(shared_address(memory)),
        x_stages(memory + gpu::kHopperManyBarrierBytes),
        weight_stages(x_stages + args.x_stages * kXBytes),
        lane(threadIdx.x % kWaveLanes) {}

  TORCH_Q4_DEVICE uint32_t x_full(int slot) const { return barriers + 8 * slot; }
  TORCH_Q4_DEVICE uint32_t x_empty(int slot) const {
    return x_full(gpu::kHopperManyMostStages + slot);
  }
  TORCH_Q4_DEVICE uint32_t weights_full(int slot) const {
    return x_full(2 * gpu::kHopperManyMostStages + slot);
  }
  TORCH_Q4_DEVICE uint32_t weights_empty(int slot) const {
    return x_full(3 * gpu::kHopperManyMostStages + slot);
  }
  TORCH_Q4_DEVICE void init_barriers() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < args.x_stages; ++slot) {
        init_barrier(x_full(slot), 1);
        init_barrier(x_empty(slot), 2 * kGroups);  // of both blocks
      }
      for (int slot = 0; slot < args.weight_stages; ++slot) {
        init_barrier(weights_full(slot), 1);
        init_barrier(weights_empty(slot), kGroups);
      }
      publish_barriers();
    }
    __syncwarp();
    sync_pair();
  }

  // Tiles are numbered by pairs of row tiles first, then by rows of x, then by splits of K.
  TORCH_Q4_DEVICE void take(int pair) {
    const int pairs = static_cast<int>(gpu::hopper_many_row_pairs(a));
    const int x_row_blocks = static_cast<int>((a.m + kXRows - 1) / kXRows);
    const int rest = pair / pairs, tile = (pair - rest * pairs) * 2 + rank_in_pair();
    split = rest / x_row_blocks;
    first_row = a.row_begin + static_cast<int64_t>(tile) * gpu::kHopperManyRows;
    first_x_row = static_cast<int64_t>(rest - split * x_row_blocks) * kXRows;
    x_rows = a.m - first_x_row < kXRows ? static_cast<int>(a.m - first_x_row) : kXRows;
    const int units = static_cast<int>((a.k + kUnit - 1) / kUnit);
    begin = static_cast<int>(static_cast<int64_t>(units) * split / args.splits);
    end = static_cast<int>(static_cast<int64_t>(units) * (split + 1) / args.splits);
  }
  TORCH_Q4_DEVICE int elements_of(int unit) const {
    const int64_t rest = a.k - static_cast<int64_t>(unit) * kUnit;
    return rest < kUnit ? static_cast<int>(rest) : kUnit;
  }

  // The wave that copies.
  TORCH_Q4_DEVICE void produce(RingPlace& weights_at, RingPlace& x_at) const {
    constexpr int kPiece = gpu::stage_piece_bytes(Format::kBlockElems);
    const int64_t group_bytes =
        a.k / Format::kBlockElems * (kTileRows * static_cast<int64_t>(sizeof(Block)));
    const int64_t rest = (a.row_end - first_row) / kTileRows;
    const int groups = rest < 0 ? 0 : rest < kGroups ? static_cast<int>(rest) : kGroups;
    const uint8_t* weights = a.blocks + (first_row / kTileRows + lane) * group_bytes;
    const uint32_t half_at = rank_in_pair() * (kXBytes / 2);
    const int64_t stages = (a.k + gpu::kStageUnit - 1) / gpu::kStageUnit * 4;
    const uint8_t* x = static_cast<const uint8_t*>(args.arranged) + half_at +
                       (first_x_row / kXRows * stages + begin * (kUnit / 64)) * kXBytes;
#pragma unroll 1
    for (int unit = begin; unit < end; ++unit) {
      wait_for(weights_empty(weights_at.slot), weights_at.parity ^ 1);
      const uint32_t full = weights_full(weights_at.slot);
      const int bytes =
          elements_of(unit) / Format::kBlockElems * (kTileRows * static_cast<int>(sizeof(Block)));
      if (lane == 0) expect_bytes(full, groups * bytes);
      __syncwarp();
      if (lane < groups) {
        const uint8_t* from = weights + static_cast<int64_t>(unit) * kUnitBytes;
        const uint32_t to =
            shared_address(weight_stages) + (weights_at.slot * kGroups + lane) * kWeightBytes;
#pragma unroll
        for (int at = 0; at < kUnitBytes; at += kPiece) {
          const int piece = bytes - at < kPiece ? bytes - at : kPiece;
          if (piece > 0) {
            copy_async(to + gpu::stage_offset(Format::kBlockElems, at), from + at, piece, full);
          }
        }
      }
      __syncwarp();
      if (lane == 0) arrive(full);
      weights_at.advance(args.weight_stages);
#pragma unroll 1
      for (int quarter = 0; quarter < kUnit / 64; ++quarter) {
        wait_for(x_empty(x_at.slot), x_at.parity ^ 1);
        if (lane == 0) {
          expect_bytes(x_full(x_at.slot), kXBytes);
          arrive(x_full(x_at.slot));
          copy_async_to_pair(shared_address(x_stages) + x_at.slot * kXBytes + half_at, x,
                             kXBytes / 2, x_full(x_at.slot));
        }
        __syncwarp();
        x += kXBytes;
        x_at.advance(args.x_stages);
      }
    }
  }

  // One quarter's instructions are under way while the next one is decoded; when they have ended,
  // their stage of x, `before`, is free for both blocks' producers.
  template <int kFirst>
  TORCH_Q4_DEVICE void multiply_half(const uint8_t* weights, uint64_t x, int parts, RingPlace& x_at,
                                     int& before, float (&sums)[kXRows / 2]) const {
    const Half half = Half::template read<kFirst>(weights, parts);
    uint32_t decoded[2][2][8];
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter) {
      auto& pairs = decoded[quarter];
      half.template decode<kFirst>(quarter, pairs);
      wait_for(x_full(x_at.slot), x_at.parity);
      Tile::begin();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Tile::multiply(pairs[0][2 * j], pairs[1][2 * j], pairs[0][2 * j + 1], pairs[1][2 * j + 1],
                       x + (x_at.slot * 4 + j) * (kXBytes / 64), sums);
      }
      Tile::commit();
      Tile::wait_for_others();
      if (before >= 0) release_x(before);
      before = x_at.slot;
      x_at.advance(args.x_stages);
    }
  }
  TORCH_Q4_DEVICE void release_x(int slot) const {
    if (lane < 2) arrive_at(x_empty(slot), lane);
  }

  TORCH_Q4_DEVICE void consume(int group, RingPlace& weights_at, RingPlace& x_at,
                               float (&sums)[kXRows / 2]) const {
    const uint64_t x = Tile::describe(x_stages);
    int before = -1;
    Tile::clear(sums);
#pragma unroll 1
    for (int unit = begin; unit < end; ++unit) {
      wait_for(weights_full(weights_at.slot), weights_at.parity);
      const uint8_t* weights = weight_stages + (weights_at.slot * kGroups + group) * kWeightBytes;
      const int parts = elements_of(unit) / kPartElems<Format>;
      multiply_half<0>(weights, x, parts, x_at, before, sums);
      if constexpr (kUnit == 256) multiply_half<2>(weights, x, parts, x_at, before, sums);
      __syncwarp();
      if (lane == 0) arrive(weights_empty(weights_at.slot));
      weights_at.advance(args.weight_stages);
    }
    Tile::wait(sums);
    if (before >= 0) release_x(before);
  }

  // Stores the sums, or this split's part of them, kChunk rows of x at a time. `own` is
  // kHopperManyStoreBytes of shared memory for this wave.
  TORCH_Q4_DEVICE void store(const float (&sums)[kXRows / 2], int group, uint8_t* own) const {
    const int64_t row = first_row + group * kTileRows;
    if (row >= a.row_end) return;
    float bias[2] = {0, 0};
    if (a.bias != nullptr && args.splits == 1) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bias[i] = load_value(a.bias, row + line_row(lane / 4 + 8 * i), a.dtype);
      }
    }
#pragma unroll
    for (int first = 0; first < kXRows; first += kChunk) {
      if (first >= x_rows) break;
      float chunk[kChunk / 2];
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i) chunk[i] = sums[first / 2 + i];
      if (args.splits > 1) {
        store_partial(chunk, row, first);
      } else {
        store_chunk(chunk, bias, row, first, own);
      }
    }
  }

  TORCH_Q4_DEVICE void store_partial(const float (&sums)[kChunk / 2], int64_t row,
                                     int x_row) const {
    const int64_t rows = a.row_end - a.row_begin;
    float* to = args.partial + (split * a.m + first_x_row + x_row) * rows + row - a.row_begin;
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const int further = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (x_row + further < x_rows) {
        to[further * rows + line_row(lane / 4 + i / 2 % 2 * 8)] = sums[i];
      }
    }
  }

  // Through shared memory, for 16 neighbouring rows of W and one of x at a time.
  TORCH_Q4_DEVICE void store_chunk(const float (&sums)[kChunk / 2], const float (&bias)[2],
                                   int64_t row, int x_row, uint8_t* own) const {
    // The neighbouring row of a lane's is lane ^ 16's: one keeps the first row of x, one the
    // second.
    const bool low = lane < 16;
#pragma unroll
    for (int eight = 0; eight < kChunk / 8; ++eight) {
      Words2 rows;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float first = sums[eight * 4 + 2 * i] + bias[i];
        const float second = sums[eight * 4 + 2 * i + 1] + bias[i];
        const float received = __shfl_xor_sync(0xFFFFFFFFu, low ? second : first, 16);
        rows.w[i] = low ? round_pair<T>(first, received) : round_pair<T>(received, second);
      }
      const int at = eight * 8 + lane % 4 * 2 + (low ? 0 : 1);
      *reinterpret_cast<Words2*>(own + at * 32 + lane / 4 % 4 * 8) = rows;
    }
    __syncwarp();
    uint16_t* out = static_cast<uint16_t*>(a.out) + (first_x_row + x_row) * a.n + row;
    if (a.n % 8 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int further = i * 16 + lane / 2;
        const Words4 words = *reinterpret_cast<const Words4*>(own + i * 512 + lane * 16);
        if (x_row + further < x_rows) {
          *reinterpret_cast<Words4*>(out + further * a.n + lane % 2 * 8) = words;
        }
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kChunk / 2; ++i) {
        const int further = i * 2 + lane / 16;
        if (x_row + further < x_rows) {
          out[further * a.n + lane % 16] = reinterpret_cast<const uint16_t*>(own)[i * 32 + lane];
        }
      }
    }
    __syncwarp();
  }
};

template <class Format, class T, int kXRows>
TORCH_Q4_DEVICE void hopper_many(const gpu::HopperManyArgs& args) {
  extern __shared__ Words4 hopper_rows_memory[];
  using Product = HopperManyProduct<Format, T, kXRows>;
  constexpr int kGroups = Product::kGroups;
  Product product(args, reinterpret_cast<uint8_t*>(hopper_rows_memory));
  product.init_barriers();
  let_next_begin();  // sum_splits, where K is shared out
  const int wave = wave_of_block();
  const int first = static_cast<int>(blockIdx.x) / 2, step = static_cast<int>(gridDim.x) / 2;
  const int count = static_cast<int>(gpu::hopper_many_count(args, kXRows));
  RingPlace weights_at, x_at;
  if (wave >= kGroups) {
    give_registers<gpu::kHopperManyProducerRegisters>();
    if (wave == kGroups) {
      // For arrange. The others read and write nothing that it has to do with, and it begins only
      // when all work before it has ended.
      wait_for_previous();
#pragma unroll 1
      for (int pair = first; pair < count; pair += step) {
        product.take(pair);
        product.produce(weights_at, x_at);
      }
    }
  } else {
    take_registers<gpu::kHopperManyConsumerRegisters>();
    uint8_t* own = product.weight_stages + args.weight_stages * kGroups * Product::kWeightBytes +
                   wave * gpu::kHopperManyStoreBytes;
    float sums[kXRows / 2];
#pragma unroll 1
    for (int pair = first; pair < count; pair += step) {
      product.take(pair);
      product.consume(wave, weights_at, x_at, sums);
      product.store(sums, wave, own);
    }
  }
  sync_pair();  // neither block ends while the other may still reach its memory
}

// x's rows to where HopperManyProduct's stages expect them: (m / C, K / 64, C * 64) elements of two
// bytes, m rounded up to a multiple of C and K to one of 256. In each stage of 64 elements, for
// each of the four instructions that multiply them, the first 8 elements of all its rows of x come
// first, then the others. Elements past K are zero; rows of x past m are left as they are.
TORCH_Q4_DEVICE void arrange(const gpu::ArrangeArgs& a) {
  constexpr int kRows = gpu::kArrangeRows, kWords = gpu::kStageUnit / 4;
  __shared__ Words2 rows[kRows][kWords + 1];  // one more for other banks
  let_next_begin();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t unit = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * kRows;
  {
    const int row = thread / 16;
    const uint8_t* from =
        static_cast<const uint8_t*>(a.x) + 2 * ((first + row) * a.k + unit * gpu::kStageUnit);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = (thread % 16 + 16 * i) * 8;
      Words4 eight = {{0, 0, 0, 0}};
      if (first + row < a.m && unit * gpu::kStageUnit + at < a.k) {
        eight = *reinterpret_cast<const Words4*>(from + 2 * at);
      }
      rows[row][at / 4] = {{eight.w[0], eight.w[1]}};
      rows[row][at / 4 + 1] = {{eight.w[2], eight.w[3]}};
    }
  }
  __syncthreads();
  const int row = thread % 16, step = thread / 16 % 4, quarter = thread / 64;
  Words4 even, odd;
#pragma unroll
  for (int k_lane = 0; k_lane < 4; ++k_lane) {
    const int segment = stage_segment(a.block_elems, k_lane, quarter);
    const Words2 four = rows[row][segment * 4 + step];
    even.w[k_lane] = select_bytes<0, 1, 4, 5>(four.w[0], four.w[1]);
    odd.w[k_lane] = select_bytes<2, 3, 6, 7>(four.w[0], four.w[1]);
  }
  if (first + row >= a.m) return;
  const int64_t block = (first + row) / a.x_rows, x_row = (first + row) % a.x_rows;
  const int64_t tile = (block * gridDim.x + unit) * 16 + quarter * 4 + step;
  uint8_t* to = static_cast<uint8_t*>(a.out) + tile * (a.x_rows * 32) + x_row * 16;
  *reinterpret_cast<Words4*>(to) = even;
  *reinterpret_cast<Words4*>(to + a.x_rows * 16) = odd;
}

}  // namespace TORCH_Q4_NAMESPACE
