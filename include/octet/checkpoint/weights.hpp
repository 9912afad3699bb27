// SPDX-License-Identifier: Apache-2.0
// Ordinary files of weights, as model hubs publish them and inference engines read them.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "octet/checkpoint/safetensors.hpp"
#include "octet/engine/engine.hpp"

namespace octet {

/// Reads "weight_map" of a hub's model.safetensors.index.json: names of tensors to names of files.
/// Throws octet::Error naming `file` and the entry for what is no JSON in UTF-8, a map that is
/// missing, holds a name twice or something else than strings, and names of files that lead out of
/// the index's folder. A pure function.
std::map<std::string, std::string> parse_weight_index(std::string_view file, std::string_view text);

/// The tensors of one safetensors file, or of all files of an index. Opening checks the headers of
/// all files, and that each has the tensors that the index expects there.
class WeightFiles {
 public:
  /// A file of weights; an index, which is a path that ends in .json; or a folder with either
  /// model.safetensors.index.json or model.safetensors. Throws octet::Error naming the file.
  explicit WeightFiles(const std::string& path);
  ~WeightFiles();
  WeightFiles(WeightFiles&& other) noexcept;
  WeightFiles& operator=(WeightFiles&& other) noexcept;

  /// In alphabetical order.
  std::vector<std::string> names() const;
  /// Null when there is none.
  const FileTensor* find(std::string_view name) const;

  /// Reads a tensor in F32, BF16 or F16 into `out`: f32, bf16 or f16, of the same shape, on the
  /// context's device; rounded once as by convert(). The bytes go through host memory, at most
  /// `piece_bytes` of the file at a time and nothing of the device's. Waits for the stream.
  /// Throws octet::Error naming file and tensor, before `out` is touched, for a tensor that is not
  /// there, another dtype or shape; an error of the disk may come when a part has been written.
  void read_sync(const Context& ctx, std::string_view name, const TensorView& out,
                 std::size_t piece_bytes = std::size_t{64} << 20) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// What the factors that decode FP8 weights are called, behind the name of the weight: a weight
/// "a.weight" has "a.weight_scale" or "a.weight_scale_inv". Both decode, value = stored * factor.
enum class ScaleNaming : std::uint8_t {
  /// "_scale", as compressed-tensors has it. F32; of a weight with one scale [1] (vLLM's fp8 has
  /// it, too), of one with tiles [R / 128 rounded up, C / 128 rounded up] (compressed-tensors'
  /// strategy block, 128x128), of one with blocks of rows [R, C / 128 rounded up] (its strategy
  /// group, of 128).
  weight_scale,
  /// "_scale_inv", as DeepSeek has it and vLLM and SGLang read it with weight_block_size
  /// [128, 128]. F32 [R / 128 rounded up, C / 128 rounded up], of matrices: the tiles as they are;
  /// of a weight with one scale that one everywhere. Blocks of rows are refused.
  weight_scale_inv
};

struct WeightExport {
  /// f32, bf16 or f16: every compute weight decoded and rounded once, as Engine::weight_as() has
  /// it: of FP8-managed ones values of FP8 (checkpoints have the master's precision). e4m3: the
  /// codes of FP8-managed weights as they are, with their scales.
  DType dtype = DType::bf16;
  ScaleNaming scales = ScaleNaming::weight_scale;
  /// With e4m3: what all other weights are written in (f32, bf16 or f16).
  DType others = DType::bf16;
  /// Besides {"format": "pt"}, without which some readers refuse a file.
  std::map<std::string, std::string> metadata = {};
  /// Values that are in host memory at a time; 128 rows of a weight with tiles at least.
  std::size_t piece_bytes = std::size_t{64} << 20;
};

/// A weight and the name that it gets in a file.
struct NamedWeight {
  std::string name;
  ParamId id;
};

/// Writes compute weights of a frozen engine to one safetensors file, which appears under its name
/// when it is whole (SafetensorsWriter). Tensors of wide elements come first, so that each begins
/// at a multiple of its element. `ctx` is the engine's; waits for its stream. No memory of the
/// device is used; values are decoded on the host. Deterministic: the same weights give the same
/// bytes, on CPU and CUDA, with every sharding and number of ranks.
/// A rank writes the file that it is given a path of; an empty path writes none. One rank is enough
/// where every rank has whole weights. With Sharding::parameters over several ranks all must call,
/// between two steps and with the same list and options, because units are gathered and released
/// one after the other (no other may be whole): usually rank 0 with a path and the others without,
/// which then keep step with it. Weights of a unit that follow one another in the list share a
/// gather, and there are as many rounds as the file has widths of elements.
/// Throws octet::Error naming file and weight, before a file is made: names that come twice (those
/// of scales included), dtypes that are not allowed, e4m3 where no weight is FP8-managed, scales
/// that the naming does not have. What is wrong with a file (its names, the disk) is an error of
/// the rank that writes it alone, when all units have been gathered: nobody waits for it in vain.
void export_weights_sync(const Context& ctx, Engine& engine, const std::string& path,
                         const std::vector<NamedWeight>& weights, const WeightExport& how = {});

}  // namespace octet
