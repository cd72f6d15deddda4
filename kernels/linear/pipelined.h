// linear on AMD GPUs, with everything loaded before it is needed: packed weights, float16 or
// bfloat16 activations, by matrix instructions or, where there are none, by dot2.
//
//     x         a copy of it that arrange_lanes has put into the order in which lanes read it, so
//               that each load of a wave takes bytes that follow each other
//     rows      a wave multiplies 16 rows of W, or a few times as many, with kXRows of x: each
//               weight is decoded once for all of these rows of x
//     waves     of a block share out k, and rows of W
//     blocks    share out k as well where there are too few rows of W for all multiprocessors
//
// A step takes kKLanes parts of k, one a lane. The packed bytes of the next step's parts are loaded
// at the beginning of a step, and pieces of x some pieces ahead: both stay in registers as they
// come from memory until they are used, since computing with them means waiting for them.
#pragma once

#include "../read/held.h"
#include "rows.h"

namespace TORCH_Q4_NAMESPACE {

// How the waves of a block share out its rows of W, and k.
template <class T, int kXRows>
struct PipelinedShape {
  static constexpr int kAllTiles = kXRows / 16;
  static constexpr int kTiles = kAllTiles < Tile<T>::kMaxTiles ? kAllTiles : Tile<T>::kMaxTiles;
  static constexpr int kBlockGroups = gpu::pipelined_groups(kXRows);  // of 16 rows of W
  static constexpr int kGroups = Tile<T>::kHeld.groups(kXRows);       // a wave
  static constexpr int kRing = Tile<T>::kHeld.pieces(kXRows);         // of x in registers
  static constexpr int kWaves = gpu::kBlockThreads / kWaveLanes;
  static constexpr int kRowWaves = kBlockGroups / kGroups;  // with rows of their own
  static constexpr int kKWaves = kWaves / kRowWaves;        // that share out k
  static_assert(kGroups * kRowWaves == kBlockGroups && kKWaves * kRowWaves == kWaves);
};

template <class Format, class T, int kXRows>
struct PipelinedProduct {
  using Lanes = Tile<T>;
  using Shape = PipelinedShape<T, kXRows>;
  static constexpr int kTiles = Shape::kTiles, kGroups = Shape::kGroups;
  static constexpr int kSegments = kPartSegments<Format>;
  // A piece of x: as many elements as one call of Lanes::multiply takes, of up to four tiles.
  static constexpr int kPieceTiles = kTiles < 4 ? kTiles : 4, kTileParts = kTiles / kPieceTiles;
  static constexpr int kSegmentPieces = 8 / Lanes::kPieceWords * kTileParts;
  static constexpr int kStepPieces = kSegments * kSegmentPieces;  // of x, a step
  static constexpr int kRing = Shape::kRing;
  static constexpr bool kByRows = Lanes::kXRowSlots > 2;
  static_assert(2 * kStepPieces % kRing == 0);
  static constexpr uint32_t kHalfBytes = 16 * Lanes::kKLanes * 16;  // what one load of a wave reads
  static constexpr uint32_t kTileBytes = Lanes::kPieceWords / 4 * kHalfBytes;
  static constexpr uint32_t kRowsBytes = Shape::kAllTiles * kTileBytes;
  static constexpr uint32_t kStepBytes = kSegments * (8 / Lanes::kPieceWords) * kRowsBytes;

  using Piece = uint32_t[kPieceTiles][Lanes::kXRowSlots][Lanes::kPieceWords];
  using Weights = HeldPart[kGroups][Lanes::kRowSlots];

  const uint8_t* x;                // of the first step
  const uint8_t* groups[kGroups];  // the first block of each
  int lane;
  int first, stride, last;  // the whole steps of this wave are first, first + stride, ... to last
  float sums[kGroups][kTiles][Lanes::kXRowSlots][Lanes::kSums];

  // The part that this lane takes of a step, as the row's block that it is in and its number there.
  struct PartPlace {
    PackedRow<Format> row;
    int part;
  };
  TORCH_Q4_DEVICE PartPlace place(int step, int group, int slot) const {
    constexpr uint32_t kBytes = kTileRows * sizeof(typename Format::Block);
    constexpr int kParts = kBlockParts<Format>;
    const int row = line_row(Lanes::place(lane, slot)), k_lane = Lanes::k_lane(lane);
    // What is the same in all lanes is added to the pointer.
    constexpr int kBlocks = Lanes::kKLanes / kParts;  // a step
    if constexpr (kParts == 1) {
      const uint8_t* from = groups[group] + static_cast<int64_t>(step) * (kBlocks * kBytes);
      return {PackedRow<Format>(from, static_cast<uint32_t>(k_lane) * kBytes, row), 0};
    } else if constexpr (kBlocks >= 1) {
      const uint8_t* from = groups[group] + static_cast<int64_t>(step) * (kBlocks * kBytes);
      return {PackedRow<Format>(from, static_cast<uint32_t>(k_lane / kParts) * kBytes, row),
              k_lane % kParts};
    } else {
      constexpr int kSteps = kParts / Lanes::kKLanes;  // a block
      const int block = static_cast<int>(static_cast<uint32_t>(step) / kSteps);
      const int part = step % kSteps * Lanes::kKLanes + k_lane;
      const uint8_t* from = groups[group] + static_cast<int64_t>(block) * kBytes;
      // That the number is not negative shows only when it is written like this.
      return {PackedRow<Format>(from, 0, row), part & (kParts - 1)};
    }
  }

  TORCH_Q4_DEVICE PartPlace rest_place(int parts, int group, int slot) const {
    constexpr uint32_t kBytes = kTileRows * sizeof(typename Format::Block);
    const int wanted = parts / Lanes::kKLanes * Lanes::kKLanes + Lanes::k_lane(lane);
    const int index = wanted < parts ? wanted : parts - 1;
    return {PackedRow<Format>(groups[group], index / kBlockParts<Format> * kBytes,
                              line_row(Lanes::place(lane, slot))),
            index % kBlockParts<Format>};
  }

  TORCH_Q4_DEVICE void load_weights(int step, Weights& weights) const {
    each_below<kGroups * Lanes::kRowSlots>([&](auto number) TORCH_Q4_INLINE_LAMBDA {
      constexpr int kGroup = decltype(number)::value / Lanes::kRowSlots;
      constexpr int kSlot = decltype(number)::value % Lanes::kRowSlots;
      const PartPlace at = place(step, kGroup, kSlot);
      load_part<Format, T>(at.row, at.part, weights[kGroup][kSlot]);
    });
  }

  TORCH_Q4_DEVICE void load_x(int step, int number, int tile, int slot,
                              uint32_t (&words)[Lanes::kPieceWords]) const {
    const uint8_t* from = x + static_cast<int64_t>(step) * kStepBytes;
    const int at = Lanes::k_lane(lane) * 16 + Lanes::x_row(lane, slot);
#pragma unroll
    for (int i = 0; i < Lanes::kPieceWords / 4; ++i) {
      const int place = number % kTileParts * kPieceTiles + tile;  // of the tile
      const uint32_t fixed = number / kTileParts * kRowsBytes + place * kTileBytes + i * kHalfBytes;
      const Words4 four =
          *reinterpret_cast<const Words4*>(from + static_cast<uint32_t>(at * 16) + fixed);
#pragma unroll
      for (int j = 0; j < 4; ++j) words[4 * i + j] = four.w[j];
    }
  }
  TORCH_Q4_DEVICE void load_x(int step, int number, Piece& piece) const {
#pragma unroll
    for (int tile = 0; tile < kPieceTiles; ++tile) {
#pragma unroll
      for (int slot = 0; slot < Lanes::kXRowSlots; ++slot) {
        load_x(step, number, tile, slot, piece[tile][slot]);
      }
    }
  }

  // Every row's and group's part of a step, as it came from memory, to weights.
  struct Decoders {
    HeldDecoder<Format, T> all[kGroups][Lanes::kRowSlots];
    uint32_t pairs[kGroups][Lanes::kRowSlots][8];

    TORCH_Q4_DEVICE void decode(const PipelinedProduct& product, int step, int segment,
                                Weights& weights) {
      each_below<kGroups * Lanes::kRowSlots>([&](auto number) TORCH_Q4_INLINE_LAMBDA {
        constexpr int kGroup = decltype(number)::value / Lanes::kRowSlots;
        constexpr int kSlot = decltype(number)::value % Lanes::kRowSlots;
        const PartPlace at = product.place(step, kGroup, kSlot);
        HeldDecoder<Format, T>& decoder = all[kGroup][kSlot];
        if (segment == 0) decoder.begin(at.row, at.part, weights[kGroup][kSlot]);
        decoder.next(at.row, at.part, weights[kGroup][kSlot], segment, pairs[kGroup][kSlot]);
      });
    }
  };

  // With piece `number` of a step.
  TORCH_Q4_DEVICE void multiply(const Decoders& decoders, int number, const Piece& piece) {
    const int half = number % kSegmentPieces / kTileParts;
    const int first_tile = number % kTileParts * kPieceTiles;
#pragma unroll
    for (int tile = 0; tile < kPieceTiles; ++tile) {
#pragma unroll
      for (int slot = 0; slot < Lanes::kXRowSlots; ++slot) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          Lanes::multiply(decoders.pairs[group], half, piece[tile][slot],
                          sums[group][first_tile + tile][slot]);
        }
      }
    }
  }

  // The products of one step, of which the weights and the first pieces of x have been loaded.
  // Meanwhile the next step's weights and further pieces of x are. Pieces go round the ring: those
  // of an odd step begin where an even one's end.
  template <int kOdd>
  TORCH_Q4_DEVICE void multiply_step(int step, Weights& weights, Weights& next,
                                     Piece (&ring)[kRing]) {
    constexpr int kBefore = kOdd * kStepPieces;
    // Past the last step everything is loaded once more, and not used.
    const auto ahead = [&](int steps) {
      const int wanted = step + steps * stride;
      return wanted < last ? wanted : last;
    };
    Decoders decoders;
    each_below<kStepPieces>([&](auto number) TORCH_Q4_INLINE_LAMBDA {
      constexpr int kNumber = decltype(number)::value, kLater = kNumber + kRing - 1;
      if constexpr (kNumber == 0) load_weights(ahead(1), next);
      load_x(ahead(kLater / kStepPieces), kLater % kStepPieces, ring[(kBefore + kLater) % kRing]);
      schedule_fence();
      if constexpr (kNumber % kSegmentPieces == 0) {
        decoders.decode(*this, step, kNumber / kSegmentPieces, weights);
      }
      multiply(decoders, kNumber, ring[(kBefore + kNumber) % kRing]);
      schedule_fence();
    });
  }

  // The same where a lane needs all rows of x: a few of them at a time, when it is their turn.
  TORCH_Q4_DEVICE void multiply_step_by_rows(int step, Weights& weights, Weights& next) {
    Decoders decoders;
    load_weights(step + stride < last ? step + stride : last, next);
    schedule_fence();
#pragma unroll
    for (int number = 0; number < kStepPieces; ++number) {
      if (number % kSegmentPieces == 0) {
        decoders.decode(*this, step, number / kSegmentPieces, weights);
      }
      multiply_by_rows(decoders, step, number);
    }
  }

  TORCH_Q4_DEVICE void multiply_by_rows(const Decoders& decoders, int step, int number) {
    const int half = number % kSegmentPieces / kTileParts;
    const int first_tile = number % kTileParts * kPieceTiles;
#pragma unroll
    for (int tile = 0; tile < kPieceTiles; ++tile) {
#pragma unroll
      for (int slot = 0; slot < Lanes::kXRowSlots; ++slot) {
        uint32_t words[Lanes::kPieceWords];
        load_x(step, number, tile, slot, words);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          Lanes::multiply(decoders.pairs[group], half, words, sums[group][first_tile + tile][slot]);
        }
        if (slot % 4 == 3) schedule_fence();
      }
    }
  }

  TORCH_Q4_DEVICE void multiply_steps() {
    if (first > last) return;
    if constexpr (kByRows) {
      // Twice the code would not fit into the instruction cache.
      Weights weights, next;
      load_weights(first, weights);
#pragma unroll 1
      for (int step = first; step <= last; step += stride) {
        multiply_step_by_rows(step, weights, next);
        __builtin_memcpy(&weights, &next, sizeof(weights));
      }
    } else {
      Weights weights[2];
      Piece ring[kRing];
      load_weights(first, weights[0]);
#pragma unroll
      for (int number = 0; number < kRing - 1; ++number) {
        const int step = first + number / kStepPieces * stride;
        load_x(step < last ? step : last, number % kStepPieces, ring[number]);
      }
      int step = first;
#pragma unroll 1
      for (; step + stride <= last; step += 2 * stride) {
        multiply_step<0>(step, weights[0], weights[1], ring);
        multiply_step<1>(step + stride, weights[1], weights[0], ring);
      }
      if (step <= last) multiply_step<0>(step, weights[0], weights[1], ring);
    }
  }

  // The last step of K where it has fewer parts than lanes for them: those without one take the
  // last part again, and zeros for weights, since matrix instructions take all lanes.
  TORCH_Q4_DEVICE void multiply_rest(int step, int parts) {
    const bool is_part = step * Lanes::kKLanes + Lanes::k_lane(lane) < parts;
    Decoders decoders;
    Weights weights;
#pragma unroll
    for (int number = 0; number < kStepPieces; ++number) {
      if (number % kSegmentPieces == 0) {
        const int segment = number / kSegmentPieces;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
          for (int slot = 0; slot < Lanes::kRowSlots; ++slot) {
            const PartPlace at = rest_place(parts, group, slot);
            const PairDecoder<Format, T> scales(at.row, at.part);
            const Bytes codes =
                Format::packed_codes(at.row, part_segment<Format>(at.part, segment));
            scales.decode(codes, segment, decoders.pairs[group][slot]);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              if (!is_part) decoders.pairs[group][slot][j] = 0;
            }
          }
        }
      }
      multiply_by_rows(decoders, step, number);
    }
  }
};

// The products with kTiles tiles of x from first_tile on, of those of the block.
template <class Format, class T, int kXRows>
TORCH_Q4_DEVICE void multiply_pipelined(const gpu::PipelinedArgs& args, int first_tile) {
  using Lanes = Tile<T>;
  using Product = PipelinedProduct<Format, T, kXRows>;
  using Shape = PipelinedShape<T, kXRows>;
  constexpr int kGroups = Shape::kGroups, kKWaves = Shape::kKWaves;
  const gpu::LinearArgs& a = args.linear;
  const int lane = threadIdx.x % kWaveLanes, wave = same_in_wave(threadIdx.x / kWaveLanes);
  const int k_wave = wave % kKWaves;
  const int split = static_cast<int>(blockIdx.x) % args.splits;
  const int64_t block_group = static_cast<int64_t>(blockIdx.x / args.splits) * Shape::kBlockGroups;
  const int64_t rows = a.row_end - a.row_begin, group_count = rows / kTileRows;
  const int parts = static_cast<int>(a.k / kPartElems<Format>);
  const int whole = parts / Lanes::kKLanes, steps = (parts + Lanes::kKLanes - 1) / Lanes::kKLanes;

  Product product;
  product.lane = lane;
  product.x = static_cast<const uint8_t*>(args.arranged) +
              static_cast<int64_t>(blockIdx.y) * steps * Product::kStepBytes +
              first_tile * Product::kTileBytes;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    // Past the last group that one is multiplied again, and not stored.
    const int64_t wanted = block_group + wave / kKWaves * kGroups + group;
    const int64_t index = wanted < group_count ? wanted : group_count - 1;
    product.groups[group] =
        PackedRows<Format>(a.blocks, a.k, a.row_begin + index * kTileRows, 0).group;
#pragma unroll
    for (int tile = 0; tile < Product::kTiles; ++tile) {
#pragma unroll
      for (int slot = 0; slot < Lanes::kXRowSlots; ++slot) {
#pragma unroll
        for (int i = 0; i < Lanes::kSums; ++i) product.sums[group][tile][slot][i] = 0;
      }
    }
  }
  product.stride = args.splits * kKWaves;
  product.first = split * kKWaves + k_wave;
  product.last = whole - 1;
  // The last of this wave's own.
  if (product.last >= product.first) {
    product.last -= (product.last - product.first) % product.stride;
  }
  product.multiply_steps();
  if (whole < steps && whole % product.stride == product.first) {
    product.multiply_rest(whole, parts);
  }

  // A group of each wave and a tile at a time, every wave (and k_lane, where its sums are partial)
  // leaves its 256 sums in a slice of their own, and the threads add up the slices.
  constexpr int kLaneSlices = Lanes::kPartialSums ? Lanes::kKLanes : 1;
  constexpr int kSlices = kKWaves * kLaneSlices;  // of the same rows
  constexpr int kStride = 16 + 1;  // between rows of x: the odd one keeps rows in different banks
  constexpr int kSlice = 16 * kStride;
  constexpr int kThreads = gpu::kBlockThreads / Shape::kRowWaves;  // for the same rows
  __shared__ float shared[Shape::kWaves * kLaneSlices * kSlice];
  const int slice = wave * kLaneSlices + (Lanes::kPartialSums ? Lanes::k_lane(lane) : 0);
  const int thread = threadIdx.x % kThreads, row_wave = threadIdx.x / kThreads;
  float* partial = args.partial + split * a.m * rows;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t at_group = block_group + row_wave * kGroups + group;
#pragma unroll
    for (int tile = 0; tile < Product::kTiles; ++tile) {
      if (group + tile > 0) __syncthreads();
#pragma unroll
      for (int slot = 0; slot < Lanes::kXRowSlots; ++slot) {
#pragma unroll
        for (int i = 0; i < Lanes::kSums; ++i) {
          const int at = Lanes::sum_x_row(lane, slot, i) * kStride + Lanes::sum_place(lane, i);
          shared[slice * kSlice + at] = product.sums[group][tile][slot][i];
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = thread; i < 256; i += kThreads) {
        const int place = i % 16, x_row = i / 16;
        const int64_t m =
            static_cast<int64_t>(blockIdx.y) * kXRows + 16 * (first_tile + tile) + x_row;
        if (m >= a.m || at_group >= group_count) continue;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kSlices; ++j) {
          sum += shared[(row_wave * kSlices + j) * kSlice + x_row * kStride + place];
        }
        const int64_t row = at_group * kTileRows + line_row(place);
        if (args.splits > 1) {
          partial[m * rows + row] = sum;
        } else {
          if (a.bias != nullptr) sum += load_value(a.bias, a.row_begin + row, a.dtype);
          store_value(a.out, m * a.n + a.row_begin + row, sum, a.dtype);
        }
      }
    }
  }
}

template <class Format, class T, int kXRows>
TORCH_Q4_DEVICE void linear_pipelined(const gpu::PipelinedArgs& args) {
  constexpr int kTiles = PipelinedShape<T, kXRows>::kTiles;
#pragma unroll 1
  for (int first_tile = 0; first_tile < kXRows / 16; first_tile += kTiles) {
    if (static_cast<int64_t>(blockIdx.y) * kXRows + 16 * first_tile >= args.linear.m) return;
    if (first_tile > 0) __syncthreads();
    multiply_pipelined<Format, T, kXRows>(args, first_tile);
  }
}

// x in the order in which linear_pipelined reads it, 16 bytes at a time:
//
//     [block of rows][step][elements of one multiply][tile of 16 rows][8 of them][k_lane][row]
//
// with zeros for rows and elements that are not there. A thread moves 8 elements.
TORCH_Q4_DEVICE void arrange_lanes(const gpu::ArrangeArgs& a) {
  using Lanes = Tile<Float16>;  // its lanes are those of every T
  const int part_elems = gpu::part_elems(a.block_elems);
  const int segments = part_elems / 16, block_parts = a.block_elems / part_elems;
  const auto parts = static_cast<int>(a.k / part_elems);
  const int steps = (parts + Lanes::kKLanes - 1) / Lanes::kKLanes;
  const int tiles = a.x_rows / 16;
  constexpr int kHalves = Lanes::kPieceWords / 4;
  const int64_t blocks = (a.m + a.x_rows - 1) / a.x_rows;
  int64_t rest = static_cast<int64_t>(blockIdx.x) * gpu::kBlockThreads + threadIdx.x;
  const int64_t to = rest;
  const auto take = [&](int count) {
    const auto digit = static_cast<int>(rest % count);
    rest /= count;
    return digit;
  };
  const int row = take(16), k_lane = take(Lanes::kKLanes), half = take(kHalves), tile = take(tiles);
  const int piece = take(2 / kHalves), segment = take(segments), step = take(steps);
  if (rest >= blocks) return;
  const int64_t m = rest * a.x_rows + 16 * tile + row;
  const int index = step * Lanes::kKLanes + k_lane;
  Words4 words = {{0, 0, 0, 0}};
  if (m < a.m && index < parts) {
    const int part = index % block_parts;
    const int at = block_parts == 1 ? segment : (part >> 1) << 3 | (part & 1) | segment << 1;
    const int64_t element = index / block_parts * a.block_elems + 16 * at + 8 * (half + piece);
    words = *reinterpret_cast<const Words4*>(static_cast<const uint8_t*>(a.x) +
                                             2 * (m * a.k + element));
  }
  reinterpret_cast<Words4*>(a.out)[to] = words;
}

}  // namespace TORCH_Q4_NAMESPACE
