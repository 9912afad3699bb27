// SPDX-License-Identifier: Apache-2.0
// The whole step of an optimizer that is cut over the ranks, from gradients to weights everywhere:
// octet's over windows, and what it is measured against.
#pragma once

#include <memory>
#include <vector>

#include "comm_model.hpp"

namespace bench {

/// Tensors and optimizer of a GPT of 1.31 billion parameters, or of its first layers.
class StepModel {
 public:
  StepModel(const CommRank& rank, int layers);
  ~StepModel();
  std::int64_t parameters() const { return parameters_; }
  /// The rival first: BF16 reduce-scatter, FP32 AdamW on a half, BF16 all-gather.
  const std::vector<CommCase>& cases() const { return cases_; }
  const std::string& no_windows() const { return no_windows_; }
  /// Throws octet::Error unless every step was applied and all ranks have the same weights.
  void verify() const;

 private:
  struct Rival;
  struct Sharded;
  void add_rival();
  void add_sharded();

  CommRank rank_;
  std::vector<octet::Shape> shapes_;
  std::int64_t parameters_;
  std::unique_ptr<Rival> rival_;
  std::unique_ptr<Sharded> sharded_;
  std::vector<CommCase> cases_;
  std::string no_windows_;
};

}  // namespace bench
