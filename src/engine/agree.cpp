// SPDX-License-Identifier: Apache-2.0
// Before anything is allocated: all ranks must have registered the same.
#include <algorithm>
#include <cmath>
#include <sstream>

#include "engine/engine_impl.hpp"
#include "octet/ops/quantize.hpp"

namespace octet {
namespace {

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

std::string describe_hyper(const AdamwHyper& g) {
  std::ostringstream out;
  out.precision(9);  // every float apart from every other
  out << "lr_factor " << g.lr_factor << ", beta1 " << g.beta1 << ", beta2 " << g.beta2 << ", eps "
      << g.eps << ", weight_decay " << g.weight_decay;
  return out.str();
}

std::vector<float> read_amax_sync(const Context& ctx, const TensorScale* scales,
                                  std::size_t count) {
  std::vector<float> values;
  for (const TensorScale& s : read_sync<TensorScale>(ctx, scales, count)) values.push_back(s.amax);
  return values;
}

// One field a line, so that what differs is named alone.
void list_configuration(std::ostream& out, const Plan& plan, const EngineConfig& config,
                        Schedule schedule, int ranks) {
  const StateFormats& f = plan.formats.state;
  out << "level " << name_of(plan.level) << "\nsharding " << name_of(plan.sharding)
      << "\nweight format " << name_of(f.weight) << "\ngradient format "
      << name_of(plan.formats.gradient) << "\nreduced_gradient " << name_of(plan.reduced_gradient)
      << "\nmaster format " << name_of(f.master) << "\nformat of m " << name_of(f.m)
      << "\nformat of v " << name_of(f.v) << "\nbucket_elements " << config.bucket_elements
      << "\nschedule " << name_of(schedule) << "\nwindows "
      << (!config.windows.has_value() ? "by default"
          : *config.windows           ? "true"
                                      : "false")
      << "\nclipping " << config.clipping << "\nmicro_batches " << config.micro_batches
      << "\naccumulator " << name_of(config.accumulator.value_or(DType::f32)) << "\noffload_states "
      << config.offload_states << "\nranks " << ranks << "\nseed " << config.adamw.seed
      << "\ndecoupled_weight_decay " << config.adamw.decoupled_weight_decay << "\nmaximize "
      << config.adamw.maximize << "\nstochastic_rounding " << config.adamw.stochastic_rounding
      << "\n";
}

// Where one list is longer, the other has "no further parameter".
std::string line_at(const std::vector<std::string>& lines, std::size_t i) {
  return i < lines.size() ? lines[i] : "no further parameter";
}

void require_equal(const std::vector<std::string>& texts) {
  const std::vector<std::string> first = lines_of(texts[0]);
  for (std::size_t r = 1; r < texts.size(); ++r) {
    if (texts[r] == texts[0]) continue;
    const std::vector<std::string> other = lines_of(texts[r]);
    for (std::size_t i = 0; i < std::max(first.size(), other.size()); ++i) {
      const std::string mine = line_at(first, i), theirs = line_at(other, i);
      require(mine == theirs, "Engine::freeze: the ranks differ: rank 0 has ", mine, "; rank ", r,
              " has ", theirs);
    }
  }
}

}  // namespace

std::vector<float> Engine::Impl::visit_initial_values_sync(
    const std::function<void(std::size_t, const TensorView&)>& visit) const {
  std::int64_t largest = 0;
  for (const Param& p : params) {
    if (p.spec.fill) largest = std::max(largest, p.spec.shape.numel());
  }
  const Buffer scratch(ctx, static_cast<std::size_t>(largest) * sizeof(float));
  const Buffer scales(ctx, params.size() * sizeof(TensorScale));
  for (std::size_t i = 0; i < params.size(); ++i) {
    const ParamSpec& spec = params[i].spec;
    TensorView values = spec.init;
    if (spec.fill) {
      values = {scratch.data(), DType::f32, spec.shape, ctx.device()};
      if (spec.shape.numel() > 0) spec.fill(ctx, values);
    }
    measure_amax(ctx, values, scales.as<TensorScale>() + i);
    visit(i, values);
  }
  return read_amax_sync(ctx, scales.as<const TensorScale>(), params.size());
}

void Engine::Impl::check_lists_agree() {
  std::vector<float> amax;
  set_up_together_sync(
      comm, [&] { amax = visit_initial_values_sync([](std::size_t, const TensorView&) {}); });
  for (std::size_t i = 0; i < params.size(); ++i) params[i].initial_amax = amax[i];
  std::ostringstream list;
  list.precision(9);  // every float apart from every other
  list_configuration(list, plan, config, schedule(), comm.size());
  for (std::size_t i = 0; i < params.size(); ++i) {
    const ParamSpec& spec = params[i].spec;
    std::ostringstream subject;
    subject << "parameter " << i << " \"" << spec.name << "\"";
    list << subject.str() << "\n"
         << subject.str() << ": shape " << to_string(spec.shape) << "\n"
         << subject.str() << ": unit " << spec.unit << "\n"
         << subject.str() << ": " << (params[i].managed ? "FP8-managed" : "f32") << "\n"
         << subject.str() << ": " << describe_hyper(config.adamw.of(spec.group)) << "\n"
         << subject.str() << ": largest initial value " << amax[i] << "\n";
  }
  require_equal(all_gather_text_sync(comm, list.str()));
  for (std::size_t i = 0; i < params.size(); ++i) {
    require(std::isfinite(amax[i]), "parameter \"", params[i].spec.name,
            "\": its initial values hold a NaN or an infinity");
  }
}

}  // namespace octet
