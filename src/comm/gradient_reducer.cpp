// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/gradient_reducer.hpp"

#include <exception>

namespace octet {

std::string_view name_of(Schedule schedule) {
  return schedule == Schedule::overlap ? "overlap"
         : schedule == Schedule::fused ? "fused"
                                       : "after_backward";
}

GradientReducer::GradientReducer(const Context& ctx, Communicator& comm, MeanReducer::Path path,
                                 const std::vector<GradientBucket>& buckets,
                                 std::uint32_t* nonfinite, Schedule schedule, const Window* window)
    : ctx_(ctx), streams_(ctx, comm.context()), schedule_(schedule), nonfinite_(nonfinite) {
  require(nonfinite != nullptr, "GradientReducer: nonfinite is null; it must be a device word");
  require(schedule != Schedule::fused || path != MeanReducer::Path::two_shot,
          "GradientReducer: the schedule is fused and the path two_shot; fused needs sharded or "
          "contributions");
  register_params(buckets);
  zero_scale_ = upload_sync<TensorScale>(ctx, std::vector<TensorScale>(1));
  for (const GradientBucket& bucket : buckets) {
    const int size = static_cast<int>(bucket.params.size());
    const int number = static_cast<int>(buckets_.size());
    buckets_.push_back({std::make_unique<MeanReducer>(comm, path, bucket.tensors, bucket.scales,
                                                      bucket.owners, number, window),
                        size, size});
  }
}

void GradientReducer::register_params(const std::vector<GradientBucket>& buckets) {
  std::size_t count = 0;
  for (const GradientBucket& bucket : buckets) count += bucket.params.size();
  gradients_.resize(count);
  for (std::size_t b = 0; b < buckets.size(); ++b) {
    const GradientBucket& bucket = buckets[b];
    require(bucket.params.size() == bucket.tensors.size(), "GradientReducer: bucket ", b, " has ",
            bucket.params.size(), " params but ", bucket.tensors.size(), " tensors");
    for (std::size_t t = 0; t < bucket.params.size(); ++t) {
      const int param = bucket.params[t];
      require(param >= 0 && static_cast<std::size_t>(param) < count, "GradientReducer: bucket ", b,
              " names parameter ", param, "; with ", count, " tensors they are 0 to ",
              static_cast<std::int64_t>(count) - 1);
      Gradient& gradient = gradients_[static_cast<std::size_t>(param)];
      require(gradient.scale == nullptr, "GradientReducer: parameter ", param, " is in bucket ",
              gradient.bucket, " and in bucket ", b, "; each is in one, once");
      require(bucket.scales != nullptr, "GradientReducer: the scales of bucket ", b, " are null");
      gradient = {b, t, bucket.tensors[t].gradient, bucket.scales + t, false};
    }
  }
}

// A backward pass that was given up may have left reductions running.
GradientReducer::~GradientReducer() {
  if (next_ == 0) return;
  try {
    streams_.join();
  } catch (const std::exception&) {  // the device has failed; freeing memory will not wait for it
  }
}

void GradientReducer::ready(int param) {
  require(param >= 0 && static_cast<std::size_t>(param) < gradients_.size(),
          "GradientReducer::ready: there is no parameter ", param, "; they are 0 to ",
          static_cast<std::int64_t>(gradients_.size()) - 1);
  Gradient& gradient = gradients_[static_cast<std::size_t>(param)];
  require(!gradient.ready, "GradientReducer::ready: parameter ", param,
          " is ready already; finish() comes first");
  gradient.ready = true;
  Bucket& bucket = buckets_[gradient.bucket];
  if (--bucket.missing == 0 && schedule_ == Schedule::overlap) launch_ready();
}

void GradientReducer::launch_ready() {
  if (next_ == buckets_.size() || buckets_[next_].missing > 0) return;
  streams_.fork();
  while (next_ < buckets_.size() && buckets_[next_].missing == 0) {
    buckets_[next_++].mean->run(nonfinite_);
  }
}

// Their bucket cannot have been launched, so nobody reads them yet.
void GradientReducer::zero_missing() {
  for (Gradient& gradient : gradients_) {
    if (!gradient.ready) {
      if (!gradient.view.empty()) zero_bytes(ctx_, gradient.view.data, gradient.view.bytes());
      copy_bytes(ctx_, gradient.scale, zero_scale_.data(), sizeof(TensorScale));
      --buckets_[gradient.bucket].missing;
    }
    gradient.ready = false;
  }
}

void GradientReducer::finish() {
  zero_missing();
  launch_ready();
  end_pass();
}

void GradientReducer::collect() {
  require(schedule_ == Schedule::fused, "GradientReducer::collect: the schedule is ",
          name_of(schedule_), "; it must be fused");
  zero_missing();
  if (!buckets_.empty()) streams_.fork();
  while (next_ < buckets_.size()) buckets_[next_++].mean->collect(nonfinite_);
  end_pass();
}

void GradientReducer::end_pass() {
  if (next_ > 0) streams_.join();
  next_ = 0;
  for (Bucket& bucket : buckets_) bucket.missing = bucket.size;
}

std::vector<RankGradients> GradientReducer::contributions() const {
  std::vector<std::vector<RankGradients>> of_bucket;
  for (const Bucket& bucket : buckets_) of_bucket.push_back(bucket.mean->contributions());
  std::vector<RankGradients> result;
  for (const Gradient& g : gradients_) result.push_back(std::move(of_bucket[g.bucket][g.tensor]));
  return result;
}

std::uint64_t GradientReducer::payload_bytes() const {
  std::uint64_t bytes = 0;
  for (const Bucket& bucket : buckets_) bytes += bucket.mean->payload_bytes();
  return bytes;
}

std::size_t GradientReducer::buffer_bytes() const {
  std::size_t bytes = zero_scale_.bytes();
  for (const Bucket& bucket : buckets_) bytes += bucket.mean->buffer_bytes();
  return bytes;
}

}  // namespace octet
