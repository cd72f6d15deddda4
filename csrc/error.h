// How errors are worded: `op: rule, got VALUE`, thrown as std::runtime_error.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace torch_q4 {

// Text of its parts: strings, and integers in decimal.
//
// Not by std::ostringstream: torch's wheels carry parts of an older C++ library and export them. A
// stream of ours that was compiled with a newer one meets those, and the first number that is
// written to it crashes (seen with GCC 13 and torch 2.11).
template <class... Parts>
inline std::string text_of(const Parts&... parts) {
  std::string text;
  const auto append = [&](const auto& part) {
    using Part = std::decay_t<decltype(part)>;
    if constexpr (std::is_integral_v<Part> && !std::is_same_v<Part, char>) {
      text += std::to_string(part);
    } else {
      text += part;
    }
  };
  (append(parts), ...);
  return text;
}

// The parts of the text between separators, empty ones left out.
inline std::vector<std::string> split_text(const std::string& text, const char* separators) {
  std::vector<std::string> parts;
  for (size_t end = 0;;) {
    const size_t begin = text.find_first_not_of(separators, end);
    if (begin == std::string::npos) return parts;
    end = std::min(text.find_first_of(separators, begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
  }
}

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  throw std::runtime_error(text_of(parts...));
}

// Unlike torch's own macro this adds no file and line: users read these messages.
#define TORCH_Q4_CHECK(condition, ...)               \
  do {                                               \
    if (!(condition)) ::torch_q4::fail(__VA_ARGS__); \
  } while (0)

}  // namespace torch_q4
