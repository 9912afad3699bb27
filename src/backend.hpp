// SPDX-License-Identifier: Apache-2.0
// The private seam: one table of function pointers per kind of device. A public function checks its
// arguments, picks the table by ctx.device() and makes one indirect call.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "octet/ops/accumulate.hpp"
#include "octet/ops/adamw.hpp"
#include "octet/ops/block_mean.hpp"
#include "octet/ops/block_quantize.hpp"
#include "octet/ops/delayed_scaling.hpp"
#include "octet/ops/quantize.hpp"
#include "octet/ops/reduce_mean.hpp"
#include "octet/ops/sum_codes.hpp"
#include "octet/ops/window_mean.hpp"
#include "octet/runtime/context.hpp"

namespace octet {
class GemmBackend;
struct GemmArgs;
struct GemmProblem;
}  // namespace octet

namespace octet::detail {

struct GemmOperand;

struct Backend {
  // runtime
  void* (*allocate)(std::size_t bytes, CUstream_st* stream, void* device_index);
  void (*deallocate)(void* data, std::size_t bytes, CUstream_st* stream, void* device_index);
  void (*copy)(const Context&, void* to, const void* from, std::size_t bytes);
  void (*zero)(const Context&, void* data, std::size_t bytes);
  void (*synchronize)(const Context&);
  void* (*event_create)(const Context&);
  void (*event_destroy)(const Context&, void* event);
  void (*event_record)(const Context&, void* event);
  void (*event_wait)(const Context&, void* event);
  void (*event_synchronize)(const Context&, void* event);
  /// A number of the graph that the context's stream is being captured into, another one for every
  /// capture; 0 when it is not.
  std::uint64_t (*capture)(const Context&);
  /// Page-locked host memory that kernels of every device reach at the same address; the ordinary
  /// memory of a CPU. Throws when there is none.
  void* (*allocate_pinned)(std::size_t bytes, CUstream_st* stream, void* device_index);
  void (*deallocate_pinned)(void* data, std::size_t bytes, CUstream_st* stream, void* device_index);
  /// Host memory that the device's kernels reach too, and where.
  void* (*allocate_mapped)(const Context&, std::size_t bytes, void** on_device);
  void (*deallocate_mapped)(const Context&, void* data);
  /// Whether both addresses lie in memory that was allocated at one time: a copy may then go from
  /// one to the other. Neighbours that were not are refused by some copies.
  bool (*is_one_allocation)(const Context&, const void* a, const void* b);
  // ops
  void (*quantize)(const Context&, const QuantizeArgs&);
  void (*convert)(const Context&, const ScaledView& in, const TensorView& out);
  void (*transpose)(const Context&, const TensorView& in, const TensorView& out);
  void (*sum_columns)(const Context&, const TensorView& sums, const TensorView& out);
  void (*block_quantize)(const Context&, const BlockQuantizeArgs&);
  void (*block_dequantize)(const Context&, const BlockScaledView& in, const TensorView& out);
  void (*broadcast_scale)(const Context&, const TensorScale*, const BlockScaledView& out);
  /// From those of a matrix [rows, columns].
  void (*transpose_tile_scales)(const Context&, const float* scales, std::int64_t rows,
                                std::int64_t columns, float* out);
  void (*make_gemm_ready)(const Context&, const void* compact, std::int64_t rows,
                          std::int64_t columns, void* gemm_ready);
  void (*delayed_update)(const Context&, const DelayedArgs&);
  void (*measure_amax)(const Context&, const TensorView& in, TensorScale* scale);
  void (*accumulate)(const Context&, const AccumulateArgs&);
  void (*adamw_initialise)(const Context&, const AdamwInit&);
  void (*adamw_measure)(const Context&, const AdamwArgs&, float* sums);
  void (*adamw_prepare)(const Context&, const AdamwArgs&);
  void (*adamw_update)(const Context&, const AdamwArgs&);
  void (*mean_scales)(const Context&, const MeanArgs&);
  void (*reduce_mean)(const Context&, const MeanArgs&);
  void (*max_amax)(const Context&, const TensorScale* gathered, int ranks, std::int64_t count,
                   TensorScale* out);
  void (*pack_block_scales)(const Context&, const BlockScalePiece*, std::int64_t count,
                            float* packed);
  void (*unpack_block_scales)(const Context&, const BlockScalePiece*, std::int64_t count,
                              const float* packed);
  void (*block_mean)(const Context&, const BlockMeanArgs&);
  void (*merge_amaxes)(const Context&, const std::uint32_t* gathered, int ranks, std::int64_t count,
                       TensorScale* scales, std::uint32_t* nonfinite);
  void (*sum_scales)(const Context&, const SumArgs&);
  void (*requantise_codes)(const Context&, const SumArgs&);
  void (*add_codes)(const Context&, std::uint8_t* own, std::int64_t count,
                    const std::uint8_t* staging, std::int64_t stride, int ranks, int rank);
  void (*take_sums)(const Context&, const SumArgs&);
  void (*update_auto_scale)(const Context&, AutoScaleState*, int ranks);
  void (*window_mean)(const Context&, const WindowMeanArgs&);
  // gemm
  void (*epilogue)(const Context&, const GemmProblem&, const float* sums, const GemmArgs&);
  void (*operand_to_bf16)(const Context&, const GemmOperand&, void* out);
};

const Backend& cpu_backend();

/// What the CUDA part of a build offers. A build without the toolkit has a stub in its place, whose
/// `backend` is null.
struct CudaPart {
  const Backend* backend = nullptr;
  int (*device_count)() = nullptr;
  /// Throws octet::Error unless the device exists and can run the library's kernels.
  void (*check_device)(int index) = nullptr;
  /// Compute capability as 10 * major + minor.
  int (*compute_capability)(int index) = nullptr;
  /// As the driver calls it: "NVIDIA H100 80GB HBM3".
  std::string (*device_name)(int index) = nullptr;
  /// The vendor GEMM library as a backend of the registry.
  std::unique_ptr<GemmBackend> (*make_cublaslt)(const Context&) = nullptr;
};
const CudaPart& cuda_part();

struct ContextState {
  Device device;
  CUstream_st* stream = nullptr;
  Allocator allocator;
  const Backend* backend = nullptr;
  MemoryUse use;
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  std::size_t workspace_used = 0;
  int open_scopes = 0;
  /// What the library's CUDA kernels were compiled for on this device (90 for sm_90); 0 until the
  /// first launch that must know has asked.
  int kernel_architecture = 0;
  bool shares_device = false;

  ~ContextState();
  void* allocate(std::size_t bytes);
  void deallocate(void* data, std::size_t bytes) noexcept;
};

inline const Backend& backend_of(const Context& ctx) { return *ctx.state()->backend; }

}  // namespace octet::detail
