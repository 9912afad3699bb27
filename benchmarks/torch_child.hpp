// SPDX-License-Identifier: Apache-2.0
// torch_scaled_mm.py as a child process that times a batch whenever it is its turn.
#pragma once

#include <sys/types.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "octet/gemm/gemm.hpp"

namespace bench {

class TorchChild {
 public:
  /// Starts python3 with the script. Throws octet::Error if that cannot be started or does not
  /// answer. To be made before there is a CUDA context, which a fork must not inherit.
  explicit TorchChild(const std::string& script);
  ~TorchChild();
  TorchChild(const TorchChild&) = delete;
  TorchChild& operator=(const TorchChild&) = delete;

  /// Of PyTorch; empty where there is none or it finds no GPU, and then nothing else may be called.
  const std::string& version() const { return version_; }
  /// Makes operands for the product and runs it once; false with a line on stderr if torch cannot.
  bool prepare(const octet::GemmProblem& problem);
  /// Milliseconds of a product in a batch of so many.
  double batch_ms(int runs);

 private:
  nlohmann::json ask(const nlohmann::json& request);
  std::optional<std::string> read_line();
  int wait();

  int socket_ = -1;
  pid_t child_ = -1;
  std::string unread_, version_;
};

}  // namespace bench
