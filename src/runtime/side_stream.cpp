// SPDX-License-Identifier: Apache-2.0
#include "octet/runtime/side_stream.hpp"

namespace octet {

SideStream::SideStream(const Context& main, const Context& side) : main_(main), side_(side) {
  require(main.device() == side.device(), "SideStream: the side is on ", side.device(),
          ", the main stream on ", main.device(), "; both must be on one device");
  const bool is_cpu = main.device().type == DeviceType::cpu;
  if (main.state() == side.state() || (!is_cpu && main.stream() == side.stream())) return;
  forked_.emplace(main);
  joined_.emplace(side);
}

// An event may be recorded again at once: a wait is for the record before it.
void SideStream::fork() {
  if (!is_apart()) return;
  forked_->record();
  forked_->make_wait(side_);
}

void SideStream::join() {
  if (!is_apart()) return;
  joined_->record();
  joined_->make_wait(main_);
}

}  // namespace octet
