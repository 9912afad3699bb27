// SPDX-License-Identifier: Apache-2.0
// What optim_bench times: cases, their traffic, and an optimizer with random weights and gradients.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "octet/octet.hpp"

namespace bench {

/// Embedding, and per layer qkv, out, up and down.
std::vector<octet::Shape> gpt_shapes(int layers);
std::int64_t numel_of(const std::vector<octet::Shape>& shapes);

enum class Work : std::uint8_t {
  step,           ///< a step without clipping
  norm,           ///< AdamW::measure() alone
  replay,         ///< a step without clipping as a CUDA graph, over many small tensors
  clipped_replay  ///< measure() and a step with clipping as a CUDA graph, over the same tensors
};

inline bool is_replay(Work work) { return work == Work::replay || work == Work::clipped_replay; }

struct Case {
  std::string name;
  octet::Formats formats;
  Work work = Work::step;
  /// Fraction of the copy's rate; of replays microseconds.
  std::optional<double> target = {};
  bool gradient_is_shard = false;
  octet::AdamWConfig config = {};
  /// Ranks whose contributions, all in this device's memory, the step sums; 0: a stored gradient.
  int contributions = 0;
  int weight_copies = 0;     ///< further places of the weight, in this device's memory
  bool host_states = false;  ///< m, v and master in pinned host memory
};

/// Bytes that the work on tensors of these shapes moves, each once: gradient read (once more for
/// the norm; every contribution), states and block scales read and written, weights written, and
/// the weight that is half of a split master read. Tables, scales of tensors and sums are not
/// counted.
std::size_t bytes_moved(const Case& c, const std::vector<octet::Shape>& shapes);

/// Of these bytes what goes over the link to host memory and back: states and block scales, half of
/// them each way.
std::size_t link_bytes(const Case& c, const std::vector<octet::Shape>& shapes);

class RandomValues;

/// An optimizer with weights and gradients, ready to step.
class Model {
 public:
  Model(const octet::Context& ctx, const Case& c, const std::vector<octet::Shape>& shapes);

  /// Enqueues the case's work once.
  void run();
  /// Throws octet::Error unless all of `expected` runs did what they should.
  void require_runs(std::int64_t expected) const;

 private:
  void add_contributions(RandomValues& random, const Case& c, octet::AdamWParam& param,
                         std::size_t i, std::size_t count);

  octet::Context ctx_;
  std::string name_;
  Work work_;
  bool sums_;
  octet::Buffer flag_, lr_;
  octet::Buffer scales_;  ///< of all contributions, then of their means: [ranks + 1][tensors]
  std::vector<octet::Tensor> weights_, transposed_, copies_;
  std::vector<octet::ScaledTensor> gradients_;
  std::unique_ptr<octet::AdamW> optimizer_;
};

}  // namespace bench
