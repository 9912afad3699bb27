// SPDX-License-Identifier: Apache-2.0
// What an engine can be configured to be, value by value; which combinations its documentation
// refuses; and lists that hold every three values of different axes together.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "octet/engine/engine.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

namespace octet::test {

enum class Link {
  single,
  threads,
  windows,
  apart,
  windows_apart,
  mpi,
  mpi_windows,
  mpi_apart,
  nccl,
  nccl_windows
};
/// Rows that are multiples of 16, others, a parameter of three dimensions.
enum class Shapes { even, odd, cube };

struct Combination {
  Level level = Level::O2;
  std::string format = {};  ///< "level" or what differs from it
  std::optional<DType> reduced = {};
  std::optional<Sharding> sharding = {};
  Link link = Link::threads;
  int ranks = 1;
  std::optional<Schedule> schedule = {};
  bool offload = false;
  Shapes shapes = Shapes::even;

  bool has_windows() const {
    return link == Link::windows || link == Link::windows_apart || link == Link::mpi_windows ||
           link == Link::nccl_windows;
  }
  /// Whether engine and communicator have a context each.
  bool is_apart() const {
    return link == Link::apart || link == Link::windows_apart || link == Link::mpi_apart;
  }
  Sharding cut() const { return sharding.value_or(sharding_of(level)); }
  bool is_cut() const { return ranks > 1 && cut() != Sharding::none; }
  bool cuts_weights() const { return is_cut() && cut() == Sharding::parameters; }
  Formats formats() const;
  DType reduced_gradient() const {
    return reduced.value_or(cut() == Sharding::none ? formats().gradient : DType::f32);
  }
  EngineConfig config() const;
};

inline const std::vector<std::string> kFormats = {
    "level",      "small",     "bf16 moments",       "f32 with e4m3 gradient",
    "transposed", "e4m3_tile", "tile and transpose", "e4m3_row_block"};

inline Formats Combination::formats() const {
  Formats f = format == "small" ? small_formats() : formats_of(level);
  if (format == "bf16 moments") f.state.m = f.state.v = StateFormat::bf16;
  if (format == "f32 with e4m3 gradient") f = {.gradient = DType::e4m3, .state = {}};
  if (format == "transposed") f.state.weight = WeightFormat::e4m3_and_transpose;
  if (format == "e4m3_tile") f.state.weight = WeightFormat::e4m3_tile;
  if (format == "tile and transpose") f.state.weight = WeightFormat::e4m3_tile_and_transpose;
  if (format == "e4m3_row_block") f.state.weight = WeightFormat::e4m3_row_block;
  return f;
}

inline EngineConfig Combination::config() const {
  EngineConfig c{.level = level,
                 .sharding = sharding,
                 .adamw = {.weight_decay = 0.1f, .seed = 5},
                 .reduced_gradient = reduced,
                 .fp8_min_elements = 1024,
                 .bucket_elements = 20000,
                 .schedule = schedule,
                 .windows = has_windows(),
                 .offload_states = offload};
  if (format != "level") c.formats = formats();
  return c;
}

inline std::string name_of(Link link) {
  constexpr const char* kNames[] = {"single",
                                    "threads",
                                    "threads with windows",
                                    "threads, two contexts",
                                    "threads with windows, two contexts",
                                    "mpi",
                                    "mpi with windows",
                                    "mpi, two contexts",
                                    "nccl",
                                    "nccl with windows"};
  return kNames[static_cast<int>(link)];
}

inline std::string describe(const Combination& c) {
  constexpr const char* kShapes[] = {"even", "odd", "cube"};
  const auto or_default = [](const auto& value) {
    return value.has_value() ? std::string(name_of(*value)) : "default";
  };
  return std::string(name_of(c.level)) + ", formats " + c.format + ", reduced gradient " +
         or_default(c.reduced) + ", sharding " + or_default(c.sharding) + ", " + name_of(c.link) +
         ", ranks " + std::to_string(c.ranks) + ", schedule " + or_default(c.schedule) +
         (c.offload ? ", states in host memory" : "") + ", shapes " +
         kShapes[static_cast<int>(c.shapes)];
}

/// What the documentation of EngineConfig and ParamSpec refuses, for each reason the words that the
/// error must have: fields, values and what is allowed. Empty: the combination runs.
inline std::vector<std::vector<std::string>> refusals(const Combination& c) {
  std::vector<std::vector<std::string>> list;
  const std::string gradient(name_of(c.formats().gradient)), sharding(name_of(c.cut()));
  const std::string reduced(name_of(c.reduced_gradient())), ranks = std::to_string(c.ranks);
  const WeightFormat weight = c.formats().state.weight;
  const std::string weight_is = "weight is " + std::string(name_of(weight));
  if (c.schedule == Schedule::overlap && !c.is_apart()) {
    list.push_back({"schedule is overlap", "stream of its own"});
  }
  if (c.schedule == Schedule::fused && !(c.is_cut() && c.cut() == Sharding::optimizer)) {
    list.push_back({"schedule is fused", "sharding is " + sharding, "over " + ranks,
                    "sharding = optimizer over more than one rank"});
  }
  if (reduced != "f32" && reduced != gradient) {
    list.push_back({"reduced_gradient is " + reduced, "formats.gradient is " + gradient,
                    "it may be f32 or " + gradient});
  }
  if (c.cut() == Sharding::none && reduced != gradient) {
    list.push_back({"reduced_gradient is " + reduced, "sharding is none",
                    "must be formats.gradient, " + gradient});
  }
  if (c.schedule == Schedule::fused && c.is_cut() && reduced != "f32") {
    list.push_back({"reduced_gradient is " + reduced, "schedule is fused", "must be f32"});
  }
  if (c.is_cut() && weight == WeightFormat::e4m3_row_block) {
    list.push_back({weight_is, "sharding is " + sharding + " over " + ranks,
                    "may be f32, bf16, e4m3 or e4m3_tile"});
  }
  if (c.shapes == Shapes::cube && needs_matrix(weight)) {
    list.push_back({"\"cube\"", weight_is, "[3, 16, 40]", "matrix", "fp8 = false"});
  }
  if (c.shapes == Shapes::odd && is_transposed(weight) && c.is_cut()) {
    list.push_back({"\"up\"", weight_is, "sharding is " + sharding + " over " + ranks,
                    "multiple of 16", "[150, 272]"});
  }
  if (c.link == Link::mpi_windows && c.ranks > 1) {
    list.push_back({"EngineConfig::windows is true", "mpi"});
  }
  return list;
}

/// Empty when the error tells of one of the reasons.
inline std::string unexplained(const std::string& error,
                               const std::vector<std::vector<std::string>>& reasons) {
  const bool is_one = std::any_of(reasons.begin(), reasons.end(), [&](const auto& words) {
    return std::all_of(words.begin(), words.end(), [&](const std::string& word) {
      return error.find(word) != std::string::npos;
    });
  });
  return is_one ? "" : error;
}

/// The values of the axes that are walked.
struct Axes {
  std::vector<Link> links;
  std::vector<int> ranks;
};

/// Numbers of the values of a combination, axis by axis.
using Choice = std::array<std::size_t, 9>;

inline constexpr Level kAllLevels[] = {Level::O0, Level::O1, Level::O2, Level::O3};
inline constexpr std::optional<DType> kAllReduced[] = {std::nullopt, DType::f32, DType::bf16,
                                                       DType::e4m3};
inline constexpr std::optional<Sharding> kAllShardings[] = {
    std::nullopt, Sharding::none, Sharding::optimizer, Sharding::gradients, Sharding::parameters};
inline constexpr std::optional<Schedule> kAllSchedules[] = {std::nullopt, Schedule::after_backward,
                                                            Schedule::overlap, Schedule::fused};

inline Choice sizes_of(const Axes& axes) {
  return {std::size(kAllLevels),
          kFormats.size(),
          std::size(kAllReduced),
          std::size(kAllShardings),
          axes.links.size(),
          axes.ranks.size(),
          std::size(kAllSchedules),
          2,
          3};
}

inline Combination combination_of(const Axes& axes, const Choice& at) {
  return {.level = kAllLevels[at[0]],
          .format = kFormats[at[1]],
          .reduced = kAllReduced[at[2]],
          .sharding = kAllShardings[at[3]],
          .link = axes.links[at[4]],
          .ranks = axes.ranks[at[5]],
          .schedule = kAllSchedules[at[6]],
          .offload = at[7] == 1,
          .shapes = static_cast<Shapes>(at[8])};
}

/// Whether a trainer can make it at all, and the engine runs it or not, as `runs` asks for.
inline bool belongs(const Combination& c, bool runs) {
  if (c.link == Link::single && c.ranks > 1) return false;
  return refusals(c).empty() == runs;
}

/// Three values of different axes.
struct Triple {
  std::array<std::size_t, 3> axes, values;
};

/// Numbers for all triples of values.
class TripleSet {
 public:
  TripleSet() : has_(kAxes * kAxes * kAxes * kMost * kMost * kMost, false) {}
  bool has(const Triple& t) const { return has_[number(t)]; }
  void insert(const Triple& t) { has_[number(t)] = true; }

 private:
  static constexpr std::size_t kAxes = std::tuple_size_v<Choice>, kMost = 8;
  static std::size_t number(const Triple& t) {
    std::size_t n = 0;
    for (std::size_t axis : t.axes) n = n * kAxes + axis;
    for (std::size_t value : t.values) n = n * kMost + value;
    return n;
  }
  std::vector<bool> has_;
};

template <class Visit>
void for_triples(const Choice& c, const Visit& visit) {
  for (std::size_t i = 0; i < c.size(); ++i) {
    for (std::size_t j = i + 1; j < c.size(); ++j) {
      for (std::size_t k = j + 1; k < c.size(); ++k) visit(Triple{{i, j, k}, {c[i], c[j], c[k]}});
    }
  }
}

template <class Visit>
void for_product(const Choice& sizes, const Visit& visit) {
  Choice at = {};
  for (std::size_t axis = 0; axis < sizes.size();) {
    visit(at);
    for (axis = 0; axis < sizes.size() && ++at[axis] == sizes[axis]; ++axis) at[axis] = 0;
  }
}

/// A list of the combinations that run (or those that do not) in which any values of three axes
/// that are together in one of them are together in one of the list: for every triple that is not
/// yet, of some that have it the one that has most such triples. The same list every time.
inline std::vector<Combination> covering(const Axes& axes, bool runs) {
  constexpr int kTries = 8;
  const Choice sizes = sizes_of(axes);
  TripleSet done, known;
  std::vector<std::pair<Triple, Choice>> wanted;  // with one that has it
  for_product(sizes, [&](const Choice& c) {
    if (!belongs(combination_of(axes, c), runs)) return;
    for_triples(c, [&](const Triple& t) {
      if (known.has(t)) return;
      known.insert(t);
      wanted.emplace_back(t, c);
    });
  });
  const auto gain = [&](const Choice& c) {
    int count = 0;
    for_triples(c, [&](const Triple& t) { count += done.has(t) ? 0 : 1; });
    return count;
  };
  Draws draws(1);
  std::shuffle(wanted.begin(), wanted.end(), draws);
  std::vector<Combination> list;
  for (const auto& [triple, example] : wanted) {
    if (done.has(triple)) continue;
    Choice best = example;
    for (int tries = 0, found = 0; tries < 20 * kTries && found < kTries; ++tries) {
      Choice c;
      for (std::size_t i = 0; i < c.size(); ++i) c[i] = draws() % sizes[i];
      for (std::size_t i = 0; i < 3; ++i) c[triple.axes[i]] = triple.values[i];
      if (!belongs(combination_of(axes, c), runs)) continue;
      ++found;
      if (gain(c) > gain(best)) best = c;
    }
    for_triples(best, [&](const Triple& t) { done.insert(t); });
    list.push_back(combination_of(axes, best));
  }
  return list;
}

}  // namespace octet::test
