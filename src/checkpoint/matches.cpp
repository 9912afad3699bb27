// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/matches.hpp"

#include <algorithm>
#include <set>

#include "checkpoint/shown.hpp"

namespace octet {
namespace {

std::vector<std::int64_t> dims_of(const Shape& shape) {
  std::vector<std::int64_t> dims;
  for (int i = 0; i < shape.rank(); ++i) dims.push_back(shape[i]);
  return dims;
}

template <class T>
void require_hyper(const std::string& subject, const char* field, const T& saved, const T& own) {
  require(saved == own, subject, field, " was ", saved, ", the engine has ", own,
          "; LoadOptions::change_hyper_parameters goes on with the engine's");
}

void require_hypers(const std::string& subject, const AdamwHyper& saved, const AdamwHyper& own) {
  require_hyper(subject, "lr_factor", saved.lr_factor, own.lr_factor);
  require_hyper(subject, "beta1", saved.beta1, own.beta1);
  require_hyper(subject, "beta2", saved.beta2, own.beta2);
  require_hyper(subject, "eps", saved.eps, own.eps);
  require_hyper(subject, "weight_decay", saved.weight_decay, own.weight_decay);
}

void require_modes(const std::string& path, const AdamWConfig& saved, const AdamWConfig& own) {
  const std::string subject = path + ": content.adamw: ";
  require_hyper(subject, "seed", saved.seed, own.seed);
  require_hyper(subject, "decoupled_weight_decay", saved.decoupled_weight_decay,
                own.decoupled_weight_decay);
  require_hyper(subject, "maximize", saved.maximize, own.maximize);
  require_hyper(subject, "stochastic_rounding", saved.stochastic_rounding, own.stochastic_rounding);
}

void require_gradient_format(const std::string& path, const char* field, const std::string& saved,
                             DType own, const char* set) {
  require(saved == name_of(own), path, ": content.gradients: ", field, " was ", shown_text(saved),
          ", the engine has \"", name_of(own), "\"; set EngineConfig::", set,
          ", or LoadOptions::change_hyper_parameters goes on with the engine's");
}

// How many micro-batches there are is the trainer's to choose, as is the number of ranks: it hands
// other gradients over. What they are summed in counts where both runs sum.
void require_gradients(const std::string& path, const IndexGradients& saved,
                       const GradientFormats& own) {
  require_gradient_format(path, "gradient", saved.gradient, own.gradient, "formats");
  require_gradient_format(path, "reduced", saved.reduced, own.reduced, "reduced_gradient");
  if (saved.micro_batches == 1 || own.micro_batches == 1) return;
  require_gradient_format(path, "accumulator", saved.accumulator, own.accumulator, "accumulator");
}

// Order counts: the random bits of an element depend on how many come before it.
void require_names(const std::string& path, const Index& index, const EngineState& state) {
  std::set<std::string> saved, own;
  for (const IndexParam& param : index.params) saved.insert(param.name);
  for (const ParamState& param : state.params) own.insert(param.name);
  for (const ParamState& param : state.params) {
    require(saved.contains(param.name), path, ": content.params: parameter \"", param.name,
            "\" of the engine is missing");
  }
  for (const IndexParam& param : index.params) {
    require(own.contains(param.name), path, ": content.params: parameter ", shown_text(param.name),
            " is none of the engine's");
  }
  require(index.params.size() == state.params.size(), path, ": content.params: has ",
          index.params.size(), " entries, the engine has ", state.params.size(), " parameters");
  for (std::size_t i = 0; i < state.params.size(); ++i) {
    require(index.params[i].name == state.params[i].name, path, ": content.params[", i, "]: is ",
            shown_text(index.params[i].name), ", the engine's is \"", state.params[i].name,
            "\"; parameters must be registered in the same order");
  }
}

void require_array(const std::string& subject, const IndexArray& saved, const StateArray& own) {
  require(saved.name == own.name, subject, "has the array ", shown_text(saved.name),
          " where the engine has \"", own.name, "\"");
  require(saved.format == own.format, subject, own.name, " is stored as ", shown_text(saved.format),
          ", the engine has \"", own.format, "\"; formats must be the same");
  for (const IndexRange& range : saved.ranges) {
    require(range.begin % own.entry_elements == 0, subject, own.name, ": a range begins at ",
            range.begin, ", which is not a multiple of the ", own.entry_elements,
            " elements of an entry");
  }
}

}  // namespace

void require_match(const std::string& path, const Index& index, const EngineState& state,
                   bool change_hyper_parameters) {
  require_names(path, index, state);
  for (std::size_t i = 0; i < state.params.size(); ++i) {
    const ParamState& own = state.params[i];
    const IndexParam& saved = index.params[i];
    const std::string subject = path + ": parameter \"" + own.name + "\": ";
    require(saved.shape == dims_of(own.shape), subject, "shape is ", shown_shape(saved.shape),
            ", the engine has ", own.shape);
    for (std::size_t a = 0; a < std::min(saved.arrays.size(), own.arrays.size()); ++a) {
      require_array(subject, saved.arrays[a], own.arrays[a]);
    }
    require(saved.arrays.size() == own.arrays.size(), subject, "has ", saved.arrays.size(),
            " arrays, the engine has ", own.arrays.size());
    if (!change_hyper_parameters) require_hypers(subject, saved.hyper, own.hyper);
  }
  if (change_hyper_parameters) return;
  require_modes(path, index.adamw, state.adamw);
  require_gradients(path, index.gradients, state.gradients);
}

const IndexExtra* find_extra(const Index& index, const std::string& name) {
  for (const IndexExtra& extra : index.extras) {
    if (extra.name == name) return &extra;
  }
  return nullptr;
}

void require_extras(const std::string& path, const Index& index, const LoadOptions& options) {
  std::set<std::string> asked;
  for (const ExtraState& extra : options.extras) {
    const IndexExtra* saved = find_extra(index, extra.name);
    require(saved != nullptr, path, ": content.extras: there is no \"", extra.name,
            "\", which LoadOptions::extras asks for");
    require(saved->bytes == extra.bytes, path, ": content.extras: \"", extra.name, "\" has ",
            saved->bytes, " bytes, the buffer of LoadOptions::extras ", extra.bytes);
    require(extra.data != nullptr || extra.bytes == 0, "LoadOptions::extras: \"", extra.name,
            "\" has a null pointer");
    asked.insert(extra.name);
  }
  for (const IndexExtra& saved : index.extras) {
    require(options.leave_extras || asked.contains(saved.name), path,
            ": content.extras: ", shown_text(saved.name),
            " was saved, but LoadOptions::extras does not ask for it; leave_extras leaves it");
  }
}

std::string shown_shape(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::int64_t dim : shape) text += (text.size() == 1 ? "" : ", ") + std::to_string(dim);
  return text + "]";
}

}  // namespace octet
