// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "octet/comm/collectives.hpp"
#include "octet/runtime/side_stream.hpp"

namespace octet {

/// When the buckets of gradients are reduced, and to what. The bits are the same.
enum class Schedule : std::uint8_t {
  after_backward,  ///< all of them when the backward pass is over
  overlap,         ///< each during the backward pass, as soon as its gradients are there
  fused            ///< after it, and an AdamW that is cut over ranks sums the contributions itself
};
std::string_view name_of(Schedule schedule);

/// Gradients that are reduced together.
struct GradientBucket {
  /// Of each tensor the number of its parameter: over all buckets of a reducer each of 0, 1, ...
  /// once.
  std::vector<int> params = {};
  std::vector<ReduceTensor> tensors = {};
  TensorScale* scales = nullptr;  ///< of the tensors, as MeanReducer takes them
  Owners owners = {};             ///< pieces count tensors from 0 in every bucket
  /// Number of an earlier bucket whose gradients lie where this one's do, none of which may be
  /// written before that one is reduced. -1: none.
  int after = -1;
};

/// Reduces the gradients of a backward pass over all ranks, bucket by bucket. With
/// Schedule::overlap a bucket is launched when all of its gradients are ready and all buckets
/// before it have been launched: always in the order of the list, so that ranks whose gradients
/// become ready in different orders, or not at all, still meet in the same collectives. It runs on
/// the communicator's stream, behind the gradients and beside what the backward pass enqueues after
/// them. With Schedule::fused collect() brings contributions() together, and there are no means.
/// Gradients of several buckets may share memory (GradientBucket::after): open() comes before such
/// a gradient is written, and launches the buckets that have to be gone by then, whatever schedule.
/// Between the first open() or ready() and finish() or collect() the communicator belongs to the
/// reducer. One thread at a time. The host never waits for the device, nothing is allocated, and a
/// step can be captured in a CUDA graph, its end included. Bits do not depend on schedule, buckets
/// or order of readiness. Errors of the communicator come out of all that launches: open(),
/// ready(), launch_through(), finish() and collect().
class GradientReducer {
 public:
  /// `ctx` has the stream that gradients are written on and read again after finish(). Give the
  /// communicator a Context of the same device with a stream of its own, or nothing overlaps. What
  /// is allocated for the collectives comes from the communicator's context.
  /// With a window, which holds all gradients and scales, that is where ranks meet, as with
  /// MeanReducer.
  /// `nonfinite` is a device word as for MeanReducer::run(); both streams may raise it.
  /// Throws octet::Error for parameters that are missing or named twice, for Schedule::fused with
  /// the path two_shot or with shared memory, for a bucket that is after a later one, and for what
  /// MeanReducer refuses.
  GradientReducer(const Context& ctx, Communicator& comm, MeanReducer::Path path,
                  const std::vector<GradientBucket>& buckets, std::uint32_t* nonfinite,
                  Schedule schedule, const Window* window = nullptr);
  /// Lets the first stream wait for what was launched, so that memory can be freed in its order.
  ~GradientReducer();
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;

  /// The memory of a parameter's gradient may be written, in the order of the first stream, until
  /// ready(). Launches all buckets up to the one that had the memory before; of these, parameters
  /// that are not ready count as zero gradient. Needed in buckets that share memory only. Throws
  /// octet::Error when the parameter's own bucket has been launched.
  void open(int param);
  /// Whether the parameter's bucket has not been launched since the last finish().
  bool is_open(int param) const;
  /// The gradient of a parameter and its scale are there, in the order of the first stream; nobody
  /// touches them before finish() or an open() that says so. Throws octet::Error for a number that
  /// no bucket has, when called twice for one parameter before finish(), and when its bucket has
  /// been launched.
  void ready(int param);
  /// Launches the buckets up to this one that have not been; of these, parameters that are not
  /// ready count as zero gradient. For callers that say themselves when, whatever the schedule.
  void launch_through(int bucket);
  /// Ends the backward pass: parameters that are not ready count as zero gradient, what is left is
  /// launched, and the first stream waits for all of it. Throws octet::Error for the path
  /// contributions, which has no means.
  void finish();
  /// Ends it likewise, with MeanReducer::collect() of all buckets. Throws octet::Error for
  /// schedules other than fused.
  void collect();
  /// What collect() brings together, by parameter: MeanReducer::contributions() of all buckets. Who
  /// reads it is done, in the order of the first stream, before the next ready().
  std::vector<RankGradients> contributions() const;

  /// Buckets launched since the last finish().
  int launched() const { return static_cast<int>(next_); }
  /// Payload bytes that a backward pass makes this rank send.
  std::uint64_t payload_bytes() const;
  /// Device memory held, of both contexts.
  std::size_t buffer_bytes() const;

 private:
  struct Bucket {
    std::unique_ptr<MeanReducer> mean;
    std::vector<int> params;
    int missing = 0;  ///< gradients that are not ready
    int after = -1;
    bool is_open = false;         ///< the memory is its own, where it shares it
    std::unique_ptr<Event> done;  ///< of one that others are after
  };
  struct Gradient {
    std::size_t bucket = 0, tensor = 0;  ///< tensor: in the bucket
    TensorView view = {};
    TensorScale* scale = nullptr;
    bool ready = false;
  };

  void register_params(const std::vector<GradientBucket>& buckets);
  void add_buckets(Communicator& comm, MeanReducer::Path path,
                   const std::vector<GradientBucket>& buckets, const Window* window);
  const Gradient& gradient(int param, const char* call) const;
  void open_bucket(std::size_t b);
  void launch(std::size_t end);
  void launch_ready();
  void close(std::size_t end);
  void zero_missing(std::size_t b);
  void end_pass();

  Context ctx_;
  SideStream streams_;
  Schedule schedule_;
  std::uint32_t* nonfinite_;
  std::vector<Bucket> buckets_;
  std::vector<Gradient> gradients_;  ///< by parameter
  std::size_t next_ = 0;             ///< the first bucket that has not been launched
  Buffer zero_scale_;                ///< TensorScale{}: that of a missing gradient
  Buffer staging_;                   ///< of all buckets, one after the other
};

}  // namespace octet
