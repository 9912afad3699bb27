// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "backend.hpp"
#include "gemm/problem.hpp"
#include "gemm/ranking.hpp"
#include "gemm/timing.hpp"
#include "octet/gemm/dequant_bf16.hpp"
#include "octet/gemm/epilogue.hpp"
#include "octet/gemm/gemm.hpp"

namespace octet {

struct GemmRegistry::Ranking : detail::RankingFile {};

/// A backend that may be asked, and its answer.
struct GemmRegistry::Candidate {
  GemmBackend* backend = nullptr;
  GemmSupport support;
};

namespace {

std::string key_of(const GemmDevice& device, const GemmBackend& backend,
                   const GemmProblem& problem) {
  return detail::ranking_key(device.name, backend.name(), backend.version(), to_string(problem));
}

/// The first with a verdict.
template <class List>
auto first_of(const List& list, GemmVerdict verdict) {
  return &*std::find_if(list.begin(), list.end(),
                        [&](const auto& c) { return c.support.verdict == verdict; });
}

std::string_view name_of(GemmVerdict verdict) {
  constexpr std::string_view kNames[] = {"native", "with conversion", "no"};
  return kNames[static_cast<int>(verdict)];
}

}  // namespace

GemmDevice gemm_device(const Context& ctx) {
  const Device device = ctx.device();
  if (device.type == DeviceType::cpu) return {};
  const detail::CudaPart& cuda = detail::cuda_part();
  return {DeviceType::cuda, cuda.compute_capability(device.index), cuda.device_name(device.index)};
}

GemmRegistry::GemmRegistry(const Context& ctx)
    : ctx_(ctx), device_(gemm_device(ctx)), ranking_(std::make_unique<Ranking>()) {
  auto main = device_.type == DeviceType::cpu ? make_reference_gemm()
                                              : detail::cuda_part().make_cublaslt(ctx);
  add(make_dequant_bf16_gemm(*main));
  add(std::move(main));
  if (const char* name = std::getenv("OCTET_GEMM")) force(name);
  if (const char* file = std::getenv("OCTET_GEMM_RANKING")) keep_ranking(file);
}

GemmRegistry::~GemmRegistry() = default;

void GemmRegistry::add(std::unique_ptr<GemmBackend> backend) {
  require(backend != nullptr, "a GEMM backend that is to be added is null");
  backends_.push_back(std::move(backend));
  ready_.clear();
}

void GemmRegistry::force(std::string name) {
  forced_ = std::move(name);
  ready_.clear();
}

void GemmRegistry::keep_ranking(std::string file) {
  ranking_->open(file);
  ready_.clear();
}

/// The backends that may be asked, the last added first.
std::vector<GemmRegistry::Candidate> GemmRegistry::candidates(const GemmProblem& problem) const {
  std::vector<Candidate> list;
  for (auto backend = backends_.rbegin(); backend != backends_.rend(); ++backend) {
    if (!forced_.empty() && (*backend)->name() != forced_) continue;
    list.push_back({backend->get(), (*backend)->query(problem, device_)});
  }
  return list;
}

GemmRegistry::Choice GemmRegistry::choose(const GemmProblem& problem) const {
  detail::check_problem(problem);
  Choice choice;
  std::ostringstream report;
  const std::vector<Candidate> list = candidates(problem);
  const auto time_of = [&](const Candidate& c) {
    return ranking_->find(key_of(device_, *c.backend, problem));
  };
  GemmVerdict tier = GemmVerdict::no;
  for (const Candidate& c : list) {
    report << c.backend->name() << ": " << name_of(c.support.verdict) << ", " << c.support.reason;
    if (const detail::Measured* measured = time_of(c)) {
      report << ", measured " << measured->microseconds << " us";
    }
    report << "\n";
    tier = std::min(tier, c.support.verdict);
  }
  // A time says something only beside those of all others.
  const Candidate* best = nullptr;
  bool all_measured = true;
  for (const Candidate& c : list) {
    if (tier == GemmVerdict::no || c.support.verdict != tier) continue;
    all_measured = all_measured && time_of(c) != nullptr;
    if (best == nullptr ||
        (all_measured && time_of(c)->microseconds < time_of(*best)->microseconds)) {
      best = &c;
    }
  }
  if (!all_measured) best = first_of(list, tier);
  if (!forced_.empty()) {
    for (const auto& backend : backends_) {
      if (backend->name() == forced_) continue;
      report << backend->name() << ": not asked, " << forced_ << " is forced\n";
    }
    if (list.empty()) report << forced_ << ": forced, but there is no backend of that name\n";
  }
  choice.report = report.str();
  if (best != nullptr) {
    choice.backend = best->backend;
    choice.support = best->support;
  }
  return choice;
}

void GemmRegistry::prepare(const GemmProblem& problem) {
  const Choice choice = choose(problem);
  require(choice.backend != nullptr, problem, ": no backend can run it\n", choice.report);
  if (problem.m == 0 || problem.n == 0 || problem.k == 0) return;
  std::vector<Candidate> rivals = candidates(problem);
  GemmVerdict tier = GemmVerdict::no;
  for (const Candidate& c : rivals) tier = std::min(tier, c.support.verdict);
  std::erase_if(rivals, [&](const Candidate& c) { return c.support.verdict != tier; });
  measure(problem, rivals);
  ready_.erase(problem);
  ctx_.reserve_workspace(choose(problem).support.workspace_bytes);
  ready(problem);
}

void GemmRegistry::measure(const GemmProblem& problem, const std::vector<Candidate>& rivals) {
  std::unique_ptr<detail::MadeUpOperands> operands;
  for (const Candidate& rival : rivals) {
    GemmBackend& backend = *rival.backend;
    const std::string key = key_of(device_, backend, problem);
    if (const detail::Measured* known = ranking_->find(key)) {
      if (known->candidate.empty() || backend.select(ctx_, problem, known->candidate)) continue;
    }
    const std::vector<std::string> ways = backend.candidates(ctx_, problem);
    if (rivals.size() == 1 && ways.size() < 2) continue;
    if (operands == nullptr) operands = std::make_unique<detail::MadeUpOperands>(ctx_, problem);
    ctx_.reserve_workspace(rival.support.workspace_bytes);
    std::size_t selected = ways.size();
    const auto take = [&](std::size_t way) {
      if (ways.empty() || way == selected) return;
      require(backend.select(ctx_, problem, ways[way]), problem, ": ", backend.name(),
              " does not take back the way \"", ways[way], "\" that it offered");
      selected = way;
    };
    const detail::Fastest fastest =
        detail::find_fastest(ctx_, std::max<std::size_t>(ways.size(), 1), [&](std::size_t way) {
          take(way);
          backend.run(ctx_, problem, operands->args());
        });
    take(fastest.index);
    ranking_->add(key, {ways.empty() ? "" : ways[fastest.index], fastest.microseconds});
  }
}

/// What was made ready for the problem, by prepare() or by its first run().
GemmRegistry::Ready& GemmRegistry::ready(const GemmProblem& problem) {
  const auto found = ready_.find(problem);
  if (found != ready_.end()) return found->second;
  const Choice choice = choose(problem);
  Ready ready;
  if (problem.m != 0 && problem.n != 0 && problem.k != 0) {
    require(choice.backend != nullptr, problem, ": no backend can run it\n", choice.report);
    ready.plan = choice.backend->plan(ctx_, problem);
    ready.converts = choice.support.verdict == GemmVerdict::with_conversion;
  }
  const bool fp8 = is_fp8(problem.a) || is_fp8(problem.b);
  const bool bf16 = problem.a == DType::bf16 || problem.b == DType::bf16;
  ready.count = fp8 ? &counts_.fp8 : bf16 ? &counts_.bf16 : &counts_.f32;
  return ready_.emplace(problem, std::move(ready)).first->second;
}

void GemmRegistry::run(const GemmProblem& problem, const GemmArgs& args) {
  const Ready& how = ready(problem);
  if (problem.m == 0 || problem.n == 0) return;
  detail::check_args(problem, args);
  if (problem.k == 0) return apply_epilogue(ctx_, problem, nullptr, args);
  how.plan(ctx_, args);
  ++*how.count;
  counts_.with_conversion += how.converts ? 1 : 0;
}

}  // namespace octet
