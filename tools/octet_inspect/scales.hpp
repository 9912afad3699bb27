// SPDX-License-Identifier: Apache-2.0
// The factors that decode an FP8 tensor of a file, which are another tensor of it.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "octet/checkpoint/safetensors.hpp"

namespace inspect {

/// Factors of blocks of a matrix; of other tensors, everything is one row.
struct Scales {
  std::string name = {};           ///< of the tensor that they are; empty of a checkpoint's factor
  std::vector<float> values = {};  ///< empty where dtype or shape say nothing
  std::int64_t columns = 1;        ///< of the matrix
  std::int64_t block_rows = 1, block_columns = 1;
  std::int64_t row_stride = 0, column_stride = 0;  ///< from block to block, in `values`

  /// The factor of element `i`, and how many elements from it on have the same.
  struct Run {
    double factor;
    std::uint64_t elements;
  };
  Run run(std::uint64_t i) const;
};

/// Reads the factors of a tensor in F8_E4M3 or F8_E5M2, where the file has any:
/// NAME_scale_inv or NAME_scale, with one factor, or one of every row, tile of 128 x 128 or 128 of
/// a row; or those of an octet checkpoint's array, PARAMETER.ARRAY_blocks, with one of 128
/// consecutive elements, and of weights one of tiles or of 128 of a row. Else the factor that
/// `factors` (of checkpoint_factors()) has for it, which F16 may have too.
/// They may be in F32, BF16, F16 or F8_E8M0. Nothing where there are none.
std::optional<Scales> read_scales(const octet::SafetensorsReader& file,
                                  const octet::FileTensor& tensor,
                                  const std::map<std::string, float>& factors);

}  // namespace inspect
