// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/gradient_reducer.hpp"

#include <algorithm>
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
  add_buckets(comm, path, buckets, window);
}

void GradientReducer::add_buckets(Communicator& comm, MeanReducer::Path path,
                                  const std::vector<GradientBucket>& buckets,
                                  const Window* window) {
  // One bucket is reduced after the other, so they can share staging; contributions are to stay.
  if (schedule_ != Schedule::fused && window == nullptr) {
    std::size_t largest = 0;
    for (const GradientBucket& bucket : buckets) {
      largest = std::max(largest, MeanReducer::staging_bytes(comm, bucket.tensors, bucket.owners));
    }
    staging_ = Buffer(comm.context(), largest);
  }
  for (const GradientBucket& bucket : buckets) {
    const int number = static_cast<int>(buckets_.size());
    require(bucket.after < number, "GradientReducer: bucket ", number, " is after bucket ",
            bucket.after, "; that must be an earlier one");
    require(bucket.after < 0 || schedule_ != Schedule::fused, "GradientReducer: bucket ", number,
            " is after bucket ", bucket.after,
            " and the schedule is fused, for which all gradients stay");
    Bucket b;
    b.mean = std::make_unique<MeanReducer>(comm, path, bucket.tensors, bucket.scales, bucket.owners,
                                           number, window, staging_.data());
    b.params = bucket.params;
    b.missing = static_cast<int>(bucket.params.size());
    b.after = bucket.after;
    buckets_.push_back(std::move(b));
    if (bucket.after < 0) continue;
    std::unique_ptr<Event>& done = buckets_[static_cast<std::size_t>(bucket.after)].done;
    if (done == nullptr) done = std::make_unique<Event>(comm.context());
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

// A backward pass that was given up may have left reductions running, of a bucket too that failed
// half-way and does not count as launched.
GradientReducer::~GradientReducer() {
  try {
    streams_.join();
  } catch (const std::exception&) {  // the device has failed; freeing memory will not wait for it
  }
}

const GradientReducer::Gradient& GradientReducer::gradient(int param, const char* call) const {
  require(param >= 0 && static_cast<std::size_t>(param) < gradients_.size(),
          "GradientReducer::", call, ": there is no parameter ", param, "; they are 0 to ",
          static_cast<std::int64_t>(gradients_.size()) - 1);
  return gradients_[static_cast<std::size_t>(param)];
}

bool GradientReducer::is_open(int param) const {
  return gradient(param, "is_open").bucket >= next_;
}

void GradientReducer::open(int param) {
  const std::size_t b = gradient(param, "open").bucket;
  require(b >= next_, "GradientReducer::open: bucket ", b, " of parameter ", param,
          " has been launched already; finish() comes first");
  close(static_cast<std::size_t>(buckets_[b].after + 1));
  open_bucket(b);
}

// Who had the memory before has been launched.
void GradientReducer::open_bucket(std::size_t b) {
  Bucket& bucket = buckets_[b];
  if (bucket.after < 0 || bucket.is_open) return;
  buckets_[static_cast<std::size_t>(bucket.after)].done->make_wait(ctx_);
  bucket.is_open = true;
}

void GradientReducer::ready(int param) {
  const std::size_t b = gradient(param, "ready").bucket;
  Gradient& gradient = gradients_[static_cast<std::size_t>(param)];
  require(!gradient.ready, "GradientReducer::ready: parameter ", param,
          " is ready already; finish() comes first");
  require(b >= next_, "GradientReducer::ready: bucket ", b, " of parameter ", param,
          " has been launched already; finish() comes first");
  gradient.ready = true;
  if (--buckets_[b].missing == 0 && schedule_ == Schedule::overlap) launch_ready();
}

void GradientReducer::launch(std::size_t end) {
  if (next_ >= end) return;
  streams_.fork();
  for (; next_ < end; ++next_) {
    const Bucket& bucket = buckets_[next_];
    bucket.mean->run(nonfinite_);
    if (bucket.done != nullptr) bucket.done->record();
  }
}

void GradientReducer::launch_ready() {
  std::size_t end = next_;
  while (end < buckets_.size() && buckets_[end].missing == 0) ++end;
  launch(end);
}

void GradientReducer::launch_through(int bucket) {
  require(bucket >= 0 && static_cast<std::size_t>(bucket) < buckets_.size(),
          "GradientReducer::launch_through: there is no bucket ", bucket, "; they are 0 to ",
          static_cast<std::int64_t>(buckets_.size()) - 1);
  close(static_cast<std::size_t>(bucket) + 1);
}

// Zeros may have to go where a bucket before them was.
void GradientReducer::close(std::size_t end) {
  while (next_ < end) {
    std::size_t stop = next_;
    while (stop < end && buckets_[stop].after < static_cast<int>(next_)) zero_missing(stop++);
    launch(stop);
  }
}

// The bucket has not been launched, so nobody reads them yet.
void GradientReducer::zero_missing(std::size_t b) {
  Bucket& bucket = buckets_[b];
  if (bucket.missing == 0) return;
  open_bucket(b);
  for (int param : bucket.params) {
    const Gradient& gradient = gradients_[static_cast<std::size_t>(param)];
    if (gradient.ready) continue;
    if (!gradient.view.empty()) zero_bytes(ctx_, gradient.view.data, gradient.view.bytes());
    copy_bytes(ctx_, gradient.scale, zero_scale_.data(), sizeof(TensorScale));
  }
}

void GradientReducer::finish() {
  close(buckets_.size());
  end_pass();
}

void GradientReducer::collect() {
  require(schedule_ == Schedule::fused, "GradientReducer::collect: the schedule is ",
          name_of(schedule_), "; it must be fused");
  for (std::size_t b = 0; b < buckets_.size(); ++b) zero_missing(b);
  if (!buckets_.empty()) streams_.fork();
  while (next_ < buckets_.size()) buckets_[next_++].mean->collect(nonfinite_);
  end_pass();
}

void GradientReducer::end_pass() {
  if (next_ > 0) streams_.join();
  next_ = 0;
  for (Gradient& gradient : gradients_) gradient.ready = false;
  for (Bucket& bucket : buckets_) {
    bucket.missing = static_cast<int>(bucket.params.size());
    bucket.is_open = false;
  }
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
  std::size_t bytes = zero_scale_.bytes() + staging_.bytes();
  for (const Bucket& bucket : buckets_) bytes += bucket.mean->buffer_bytes();
  return bytes;
}

}  // namespace octet
