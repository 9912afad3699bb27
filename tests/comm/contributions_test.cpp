// SPDX-License-Identifier: Apache-2.0
// MeanReducer without the mean: every contribution is with the owner of its elements.
#include "octet/comm/collectives.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/mean_ranks.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

using Path = MeanReducer::Path;

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// What is wrong with one tensor after collect().
std::string wrong_part(const Context& ctx, const MeanCase& bucket, std::size_t rank, std::size_t t,
                       const RankGradients& parts) {
  if (parts.dtype != bucket.dtype || parts.ranks.size() != bucket.gradients.size()) return "shape";
  for (std::size_t r = 0; r < parts.ranks.size(); ++r) {
    const Contribution& from = bucket.gradients[r][t];
    std::vector<std::uint16_t> whole(from.bytes.size() / 2);
    std::copy_n(from.bytes.data(), from.bytes.size(),
                reinterpret_cast<std::uint8_t*>(whole.data()));
    const auto owned = pieces_of(bucket.owners[rank], t, whole);
    if (owned.empty()) continue;
    const auto& expected = r == rank ? whole : owned;
    const auto codes = download<std::uint16_t>(ctx, parts.ranks[r].data, expected.size());
    const std::string difference = first_difference(codes, expected);
    if (parts.ranks[r].is_shard != (r != rank) || !difference.empty()) {
      return "rank " + std::to_string(r) + ": " + difference;
    }
    const auto scale = download_one<TensorScale>(
        ctx, parts.scales + static_cast<std::int64_t>(r) * parts.scale_stride);
    if (scale.scale_inv != from.scale.scale_inv) return "scale of rank " + std::to_string(r);
  }
  return {};
}

// What is wrong with what collect() leaves on this rank.
std::string wrong_on_rank(Communicator& comm, const MeanCase& bucket, Path path) {
  const Context& ctx = comm.context();
  const auto rank = at(comm.rank());
  std::vector<Buffer> gradients;
  std::vector<Tensor> shards;
  std::vector<ReduceTensor> tensors;
  std::vector<TensorScale> own_scales;
  for (std::size_t t = 0; t < bucket.tensors(); ++t) {
    const Contribution& own = bucket.gradients[rank][t];
    gradients.push_back(upload(ctx, own.bytes));
    shards.emplace_back(ctx, DType::f32, Shape{owned_by(bucket.owners[rank], t)});
    tensors.push_back({view_of(ctx, gradients[t], bucket.dtype, {bucket.numel(t)}),
                       path == Path::sharded ? shards[t].view() : TensorView{}});
    own_scales.push_back(own.scale);
  }
  const Buffer scales = upload(ctx, own_scales), flag = upload(ctx, std::vector<std::uint32_t>{0});
  MeanReducer reducer(comm, path, tensors, scales.as<TensorScale>(), bucket.owners);
  const std::uint64_t before = comm.wire_bytes().payload;
  reducer.collect(flag.as<std::uint32_t>());
  if (comm.wire_bytes().payload - before != reducer.payload_bytes()) return "the payload";
  const auto means = download<TensorScale>(ctx, scales.data(), bucket.tensors());
  for (std::size_t t = 0; t < bucket.tensors(); ++t) {
    const std::string where = "tensor " + std::to_string(t) + ": ";
    const float bound = reference_bound(bucket.dtype, bucket.of_tensor(t));
    if (means[t].amax != bound || means[t].scale_inv != 1.0f) return where + "the mean's scale";
    const std::string wrong = wrong_part(ctx, bucket, rank, t, reducer.contributions()[t]);
    if (!wrong.empty()) return where + wrong;
  }
  return {};
}

}  // namespace

TEST_CASE("collect brings every contribution to its owner, with the scales of the means") {
  for (DeviceType device : rank_devices()) {
    for (Path path : {Path::contributions, Path::sharded}) {
      for (int n : {1, 2, 5}) {
        MeanCase bucket = random_case(DType::bf16, n, kOddSizes);
        bucket.owners = deal(bucket, 37, [n](int k) { return (k * 7 + 1) % n; });
        std::vector<std::string> wrong(at(n));
        const auto collect = [&](Communicator& comm) {
          wrong[at(comm.rank())] = wrong_on_rank(comm, bucket, path);
        };
        run_ranks(n, collect, device);
        for (int r = 0; r < n; ++r) {
          CAPTURE(n, r);
          CHECK(wrong[at(r)] == "");
        }
      }
    }
  }
}

TEST_CASE("two_shot collects nothing, and contributions makes no means") {
  const auto comm = make_single(Context::cpu());
  const Tensor fp8(Context::cpu(), DType::e4m3, {10}), f32(Context::cpu(), DType::f32, {10});
  TensorScale scales[1];
  std::uint32_t flag = 0;
  MeanReducer two_shot(*comm, Path::two_shot, {{fp8, {}}}, scales, {{{0, 0, 10}}});
  CHECK(missing(error_of([&] { two_shot.collect(&flag); }), {"collect", "two_shot"}) == "");
  CHECK(missing(error_of([&] { two_shot.contributions(); }), {"contributions", "two_shot"}) == "");
  MeanReducer parts(*comm, Path::contributions, {{fp8, {}}}, scales, {{{0, 0, 10}}});
  CHECK(missing(error_of([&] { parts.run(&flag); }), {"run", "contributions"}) == "");
  CHECK(missing(error_of([&] { parts.collect(nullptr); }), {"collect", "nonfinite"}) == "");
  CHECK(missing(error_of([&] {
                  MeanReducer(*comm, Path::contributions, {{fp8, f32}}, scales, {{{0, 0, 10}}});
                }),
                {"shard", "contributions"}) == "");
}

}  // namespace octet::test
