// linear on Hopper's warpgroup matrix instructions, which take x straight from shared memory. In
// tiles.h each 16 rows of W read all of x, and every wave loads it into registers; here a block
// has up to 128 rows of W, so that as many blocks as the GPU has multiprocessors cover the weight,
// and goes along K once, in stages of kStageUnit elements:
//
//     producers  four waves that bring the weights, which lie side by side in the packed layout,
//                and x, in the order that the instruction wants, to shared memory
//     consumers  waves that decode 16 rows' weights each, half of a stage's elements, straight into
//                the registers that the instruction reads, and multiply them with all rows of x
//
// Barriers in shared memory tell consumers that a stage is full, and producers that it is empty
// again. Two waves share each 16 rows, where there is room for both's sums, which are added up at
// the end. Where the rows are too few for all multiprocessors, `splits` blocks share out K, and
// sum_splits adds up what they leave. Every sum has a fixed order.
#pragma once

#include "../read/decode.h"
#include "../read/values.h"

namespace TORCH_Q4_NAMESPACE {

// One row's block as it lies in shared memory: packed, but for gaps that keep lines which several
// lanes read at once in different banks.
template <class Format>
struct StageRow : SmallChunks<Format, StageRow<Format>> {
  const uint8_t* block;
  int row;

  TORCH_Q4_DEVICE StageRow(const uint8_t* block, int row) : block(block), row(row) {}
  template <int kIndex>
  static constexpr int kSmallAlign = Format::kChunks[kIndex].size;

  TORCH_Q4_DEVICE static constexpr int place(int offset) {
    return gpu::stage_offset(Format::kBlockElems, offset);
  }
  TORCH_Q4_DEVICE Fields line(int index) const {
    return {load_line<16>(block + place(256 * index) + 16 * line_row(row))};
  }
  TORCH_Q4_DEVICE Bytes fifth_bits(int index) const {
    const int offset = 256 * kLineCount<Format> + 32 * (index - kLineCount<Format>);
    const uint8_t* from = block + place(offset) + 2 * line_row(row);
    return expand_bits(*reinterpret_cast<const uint16_t*>(from));
  }
  TORCH_Q4_DEVICE Bytes digits(int index) const {
    const int offset = 256 * kLineCount<Format> + 64 * (index - kLineCount<Format>);
    const uint8_t* from = block + place(offset) + 4 * line_row(row);
    return expand_digits(*reinterpret_cast<const uint32_t*>(from));
  }
  template <int kIndex>
  TORCH_Q4_DEVICE const uint8_t* small_chunk() const {
    constexpr int kOffset = place(chunk_start<Format>(kIndex));
    return block + kOffset + Format::kChunks[kIndex].size * row;
  }
  template <int kFirst>
  TORCH_Q4_DEVICE const uint8_t* place_of(int offset) const {
    return block + place(packed_place<Format, kFirst>(offset, row));
  }
};

// Where a stage is in the ring, and the parity of the phase that its barriers are in.
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;
  TORCH_Q4_DEVICE void advance(int stages) {
    if (++slot == stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Whether a unit is one block, so that every unit of K is whole.
template <class Format>
constexpr bool kFillsUnit = Format::kBlockElems == gpu::kStageUnit;

// Of a unit's 16 segments of 16 elements, the one that a k_lane multiplies in a quarter of the
// unit's work.
TORCH_Q4_DEVICE int stage_segment(int block_elems, int k_lane, int quarter) {
  if (block_elems == 32) return quarter / 2 * 8 + k_lane * 2 + quarter % 2;
  return block_elems == 64 ? k_lane << 2 | quarter
                           : (k_lane >> 1) << 3 | (k_lane & 1) | quarter << 1;
}

// What a lane of a wave, which has 16 rows, reads of half a unit: the codes of two quarters, two
// rows each, and their scales. They are read before the first is decoded, so that what two
// quarters have in common is read once.
template <class Format, class T>
struct StageHalf {
  static constexpr int kKLanes = 4;
  static constexpr int kBlockPitch =
      gpu::stage_block_bytes(Format::kBlockElems, sizeof(typename Format::Block));
  using Row = StageRow<Format>;
  using Codes = decltype(Format::packed_codes(std::declval<Row>(), 0));

  PairDecoder<Format, T> scales[2];
  Codes codes[2][2];

  // Quarters [kFirst, kFirst + 2) of a unit of which only the first `parts` parts exist. Weights of
  // those that do not are zero.
  template <int kFirst>
  TORCH_Q4_DEVICE static StageHalf read(const uint8_t* weights, int parts) {
    const int lane = threadIdx.x % kWaveLanes;
    const int wanted = kFirst / kPartSegments<Format> * kKLanes + lane % kKLanes;
    const bool is_part = kFillsUnit<Format> || wanted < parts;
    const int index = is_part ? wanted : 0;
    const uint8_t* block = weights + index / kBlockParts<Format> * kBlockPitch;
    const int part = index % kBlockParts<Format>;
    const Row rows[] = {Row(block, line_row(lane / 4)), Row(block, line_row(lane / 4 + 8))};
    const auto codes_of = [&](int row, int quarter) {
      return Format::packed_codes(rows[row], part_segment<Format>(part, segment(kFirst, quarter)));
    };
    StageHalf half = {{{rows[0], part}, {rows[1], part}},
                      {{codes_of(0, 0), codes_of(1, 0)}, {codes_of(0, 1), codes_of(1, 1)}}};
    if (!is_part) {
#pragma unroll
      for (int i = 0; i < kPartScales<Format>; ++i) {
        half.scales[0].scale[i] = half.scales[0].start[i] = 0;
        half.scales[1].scale[i] = half.scales[1].start[i] = 0;
      }
    }
    return half;
  }
  TORCH_Q4_DEVICE static constexpr int segment(int first, int quarter) {
    return first % kPartSegments<Format> + quarter;
  }

  // Both rows' weights of a quarter, 0 or 1.
  template <int kFirst>
  TORCH_Q4_DEVICE void decode(int quarter, uint32_t (&pairs)[2][8]) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      scales[row].decode_apart(codes[quarter][row], segment(kFirst, quarter), pairs[row]);
    }
  }
};

template <class Format, class T, int kXRows>
struct HopperRowsProduct {
  using Tile = GroupTile<T, kXRows>;
  static constexpr int kUnit = gpu::kStageUnit;
  static constexpr int kKLanes = 4;
  static constexpr int kUnitBlocks = kUnit / Format::kBlockElems;
  static constexpr int kBlockBytes = kTileRows * static_cast<int>(sizeof(typename Format::Block));
  static constexpr int kUnitBytes = kUnitBlocks * kBlockBytes;
  static constexpr int kWeightBytes =
      gpu::hopper_rows_weight_bytes(Format::kBlockElems, sizeof(typename Format::Block));
  static constexpr int kTilePitch = gpu::hopper_rows_tile_bytes(kXRows);
  static constexpr int kXBytes = gpu::hopper_rows_x_bytes(kXRows);
  static constexpr int kShare = gpu::hopper_rows_share(kXRows);
  static constexpr int kConsumers = kWaveLanes * gpu::kHopperRowsMostGroups * kShare;
  static_assert(kUnit / kPartElems<Format> / kKLanes * kPartSegments<Format> == 4);

  const gpu::HopperRowsArgs& args;
  const gpu::LinearArgs& a;
  const uint32_t barriers;  // full ones, then empty ones
  uint8_t* const stages;
  const int stage_bytes;
  const int lane;
  int64_t first_row, first_x_row;  // of this block
  int x_rows;                      // of this block that exist
  int begin, end;                  // units of K

  TORCH_Q4_DEVICE HopperRowsProduct(const gpu::HopperRowsArgs& args, uint8_t* memory)
      : args(args),
        a(args.linear),
        barriers(shared_address(memory)),
        stages(memory + gpu::kHopperRowsBarrierBytes),
        stage_bytes(kXBytes + args.groups * kWeightBytes),
        lane(threadIdx.x % kWaveLanes) {
    const int tile = static_cast<int>(blockIdx.x) / args.splits;
    const int split = static_cast<int>(blockIdx.x) % args.splits;
    const int units = static_cast<int>((a.k + kUnit - 1) / kUnit);
    begin = static_cast<int>(static_cast<int64_t>(units) * split / args.splits);
    end = static_cast<int>(static_cast<int64_t>(units) * (split + 1) / args.splits);
    first_row = a.row_begin + static_cast<int64_t>(tile) * args.groups * kTileRows;
    first_x_row = static_cast<int64_t>(blockIdx.y) * kXRows;
    const int64_t rest = a.m - first_x_row;
    x_rows = rest < kXRows ? static_cast<int>(rest) : kXRows;
  }

  TORCH_Q4_DEVICE uint32_t full(int slot) const { return barriers + 8 * slot; }
  TORCH_Q4_DEVICE uint32_t empty(int slot) const {
    return barriers + 8 * (gpu::kHopperRowsMostStages + slot);
  }
  TORCH_Q4_DEVICE void init_barriers() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < args.stages; ++slot) {
        init_barrier(full(slot), gpu::kHopperRowsProducers / kWaveLanes);
        init_barrier(empty(slot), kConsumers / kWaveLanes);
      }
      publish_barriers();
    }
    __syncthreads();
  }

  TORCH_Q4_DEVICE int elements_of(int unit) const {
    // K fills the last unit, too, where blocks are as large.
    const bool is_whole = kFillsUnit<Format> || (unit + 1) * kUnit <= static_cast<int>(a.k);
    return is_whole ? kUnit : static_cast<int>(a.k) - unit * kUnit;
  }
  TORCH_Q4_DEVICE bool has_rows(int group) const {
    return group < args.groups && first_row + group * kTileRows < a.row_end;
  }

  // ---- producers

  // x goes to shared memory through registers, to change its order: each instruction takes four
  // elements of every k_lane's segment, the first and third of all of them side by side, then the
  // others. A task is 16 elements of a row of x for one instruction. 16 neighbouring threads have a
  // row's tasks, so that they read whole lines, and write to all banks.
  static constexpr int kTasks = kXRows * 16 / gpu::kHopperRowsProducers;
  using LoadedX = Words2[kTasks][kKLanes];

  struct Task {
    int x_row, quarter, step;
    TORCH_Q4_DEVICE explicit Task(int index) {
      const int thread = static_cast<int>(threadIdx.x) % gpu::kHopperRowsProducers;
      step = thread & 3;
      quarter = thread >> 2 & 3;
      x_row = thread / 16 + index * (gpu::kHopperRowsProducers / 16);
    }
    // The first k_lane's; the others' are further(k_lane) elements on.
    TORCH_Q4_DEVICE int element() const {
      return 16 * stage_segment(Format::kBlockElems, 0, quarter) + 4 * step;
    }
    TORCH_Q4_DEVICE static int further(int k_lane) {
      return 16 * stage_segment(Format::kBlockElems, k_lane, 0);
    }
  };

  TORCH_Q4_DEVICE void load_x(int unit, LoadedX& loaded) const {
    const int elems = elements_of(unit);
    // There is no room for all tasks' addresses to stay in registers.
    const int64_t row_bytes = recomputed(2 * a.k);
    const uint8_t* x = row_of<T>(a.x, first_x_row, a.k) + static_cast<int64_t>(unit) * (2 * kUnit);
#pragma unroll
    for (int index = 0; index < kTasks; ++index) {
      const Task task(index);
      const uint8_t* from = x + task.x_row * row_bytes + 2 * task.element();
#pragma unroll
      for (int k_lane = 0; k_lane < kKLanes; ++k_lane) {
        loaded[index][k_lane] = {{0, 0}};
        const int further = Task::further(k_lane);
        if (task.x_row < x_rows && (kFillsUnit<Format> || task.element() + further < elems)) {
          loaded[index][k_lane] = *reinterpret_cast<const Words2*>(from + 2 * further);
        }
      }
    }
  }

  TORCH_Q4_DEVICE void store_x(const LoadedX& loaded, uint8_t* x) const {
#pragma unroll
    for (int index = 0; index < kTasks; ++index) {
      const Task task(index);
      Words4 even, odd;
#pragma unroll
      for (int i = 0; i < kKLanes; ++i) {
        const Words2& pairs = loaded[index][i];
        even.w[i] = select_bytes<0, 1, 4, 5>(pairs.w[0], pairs.w[1]);
        odd.w[i] = select_bytes<2, 3, 6, 7>(pairs.w[0], pairs.w[1]);
      }
      if (task.x_row < x_rows) {
        uint8_t* to = x + (task.quarter * 4 + task.step) * kTilePitch + task.x_row * 16;
        *reinterpret_cast<Words4*>(to) = even;
        *reinterpret_cast<Words4*>(to + kXRows * 16) = odd;
      }
    }
  }

  // The weights of a unit come in pieces, between which stage_offset leaves gaps.
  static constexpr int kPiece = gpu::stage_piece_bytes(Format::kBlockElems);

  TORCH_Q4_DEVICE void produce(int wave) const {
    constexpr int kWaves = gpu::kHopperRowsProducers / kWaveLanes;
    const int64_t group_bytes = (a.k / Format::kBlockElems) * kBlockBytes;
    const uint8_t* weights = a.blocks + first_row / kTileRows * group_bytes;
    int groups = 0;  // of this wave
    while (has_rows(wave + groups * kWaves)) ++groups;
    LoadedX loaded;
    load_x(begin, loaded);
    RingPlace place;
#pragma unroll 1
    for (int unit = begin; unit < end; ++unit) {
      wait_for(empty(place.slot), place.parity ^ 1);
      if (lane == 0) {
        const int bytes = elements_of(unit) / Format::kBlockElems * kBlockBytes;
        expect_bytes(full(place.slot), groups * bytes);
        for (int i = 0; i < groups; ++i) {
          const int group = wave + i * kWaves;
          const uint8_t* from =
              weights + group * group_bytes + static_cast<int64_t>(unit) * kUnitBytes;
          const uint32_t to =
              shared_address(stages) + place.slot * stage_bytes + kXBytes + group * kWeightBytes;
#pragma unroll
          for (int at = 0; at < kUnitBytes; at += kPiece) {
            const int piece = bytes - at < kPiece ? bytes - at : kPiece;
            if (piece > 0) {
              copy_async(to + gpu::stage_offset(Format::kBlockElems, at), from + at, piece,
                         full(place.slot));
            }
          }
        }
      }
      __syncwarp();
      store_x(loaded, stages + place.slot * stage_bytes);
      publish_shared();
      __syncwarp();
      if (lane == 0) arrive(full(place.slot));
      if (unit + 1 < end) load_x(unit + 1, loaded);  // while this stage is awaited
      place.advance(args.stages);
    }
  }

  // ---- consumers

  // Half of a unit, quarters [kFirst, kFirst + 2).
  template <int kFirst>
  TORCH_Q4_DEVICE void multiply_quarters(const uint8_t* weights, uint64_t x, int parts,
                                         float (&sums)[kXRows / 2]) const {
    const auto half = StageHalf<Format, T>::template read<kFirst>(weights, parts);
    uint32_t decoded[2][2][8];
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter) {
      auto& pairs = decoded[quarter];
      half.template decode<kFirst>(quarter, pairs);
      Tile::begin();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Tile::multiply(pairs[0][2 * j], pairs[1][2 * j], pairs[0][2 * j + 1], pairs[1][2 * j + 1],
                       x + ((kFirst + quarter) * 4 + j) * (kTilePitch / 16), sums);
      }
      Tile::commit();
    }
    Tile::wait(sums);
  }

  // This wave's part of a unit.
  template <int kPart>
  TORCH_Q4_DEVICE void multiply_unit(const uint8_t* weights, uint64_t x, int parts,
                                     float (&sums)[kXRows / 2]) const {
    multiply_quarters<2 * kPart>(weights, x, parts, sums);
    if constexpr (kShare == 1) multiply_quarters<2>(weights, x, parts, sums);
  }

  template <int kPart>
  TORCH_Q4_DEVICE void consume(int group, float (&sums)[kXRows / 2]) const {
    // A wave without rows takes part in the instructions of its four waves with some that are
    // there.
    const int place_of_group = group < args.groups ? group : args.groups - 1;
    const uint8_t* weights = stages + kXBytes + place_of_group * kWeightBytes;
    const uint64_t x = Tile::describe(stages);
    RingPlace place;
#pragma unroll 1
    for (int unit = begin; unit < end; ++unit) {
      const int at = place.slot * stage_bytes;
      wait_for(full(place.slot), place.parity);
      multiply_unit<kPart>(weights + at, x + at / 16, elements_of(unit) / kPartElems<Format>, sums);
      __syncwarp();
      if (lane == 0) arrive(empty(place.slot));
      place.advance(args.stages);
    }
  }

  // Adds up the waves of a group and stores the result, or this split's part of it.
  TORCH_Q4_DEVICE void store(const float (&sums)[kXRows / 2], int group, int share) const {
    constexpr int kStride = gpu::kHopperRowsSumStride;
    auto* all = reinterpret_cast<float*>(stages);
    const auto sums_of = [&](int which) {
      return all + (which * gpu::kHopperRowsMostGroups + group) * (kXRows * kStride);
    };
    sync_first_threads<kConsumers>();  // everyone is done with the stages
    float* own = sums_of(share);
#pragma unroll
    for (int i = 0; i < kXRows / 2; ++i) {
      const int x_row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      own[x_row * kStride + lane / 4 + i / 2 % 2 * 8] = sums[i];
    }
    sync_first_threads<kConsumers>();
    if (!has_rows(group)) return;
    const int place = lane % 16;
    const int64_t row = first_row + group * kTileRows + line_row(place);
    const int split = static_cast<int>(blockIdx.x) % args.splits;
    for (int x_row = share * 2 + lane / 16; x_row < x_rows; x_row += 2 * kShare) {
      const int at = x_row * kStride + place;
      float sum = sums_of(0)[at];
      if constexpr (kShare == 2) sum += sums_of(1)[at];
      const int64_t m = first_x_row + x_row;
      if (args.splits > 1) {
        const int64_t rows = a.row_end - a.row_begin;
        args.partial[(split * a.m + m) * rows + row - a.row_begin] = sum;
        continue;
      }
      if (a.bias != nullptr) sum += load_value(a.bias, row, a.dtype);
      store_value(a.out, m * a.n + row, sum, a.dtype);
    }
  }
};

template <class Format, class T, int kXRows>
TORCH_Q4_DEVICE void hopper_rows(const gpu::HopperRowsArgs& a) {
  extern __shared__ Words4 hopper_rows_memory[];
  const HopperRowsProduct<Format, T, kXRows> product(
      a, reinterpret_cast<uint8_t*>(hopper_rows_memory));
  product.init_barriers();
  let_next_begin();  // sum_splits, where K is shared out
  const int wave = wave_of_block();
  constexpr int kMost = gpu::kHopperRowsMostGroups, kShare = gpu::hopper_rows_share(kXRows);
  if (wave >= kMost * kShare) {
    product.produce(wave - kMost * kShare);
    return;
  }
  const int group = wave % kMost, share = wave / kMost;
  float sums[kXRows / 2] = {};
  if (kShare == 1 || share == 0) {
    product.template consume<0>(group, sums);
  } else {
    product.template consume<1>(group, sums);
  }
  product.store(sums, group, share);
}

}  // namespace TORCH_Q4_NAMESPACE
