// How errors are worded: `op: rule, got VALUE`, thrown as std::runtime_error.
#pragma once

#include <sstream>
#include <stdexcept>

namespace torch_q4 {

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Unlike torch's own macro this adds no file and line: users read these messages.
#define TORCH_Q4_CHECK(condition, ...)               \
  do {                                               \
    if (!(condition)) ::torch_q4::fail(__VA_ARGS__); \
  } while (0)

}  // namespace torch_q4
