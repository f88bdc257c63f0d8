// Short texts of host code: errors, and how something is planned. In place of std::string, whose header takes the
// compiler longer than most kernels do; so the files of csrc/cuda and all that they include keep to this one.
#pragma once

#include <cstdint>

namespace rcu_ops {

// Up to 511 bytes; what is beyond them is dropped. Never inlined: texts are made where something is wrong, and in each
// such place they would take the compiler longer than all around it.
class Text {
 public:
  Text() = default;
  [[gnu::noinline]] Text(const char* text) { append(text); }
  [[gnu::noinline]] Text(const Text& other) { append(other.bytes_); }
  [[gnu::noinline]] Text& operator=(const Text& other) {
    if (this != &other) size_ = 0, append(other.bytes_);
    return *this;
  }

  bool empty() const { return size_ == 0; }
  const char* c_str() const { return bytes_; }

  Text& operator+=(const Text& other) { return append(other.bytes_); }
  [[gnu::noinline]] friend Text operator+(const Text& a, const Text& b) {
    Text sum = a;
    return sum += b;
  }

 private:
  [[gnu::noinline]] Text& append(const char* text) {
    while (*text && size_ + 1 < static_cast<int>(sizeof bytes_)) bytes_[size_++] = *text++;
    bytes_[size_] = 0;
    return *this;
  }

  int size_ = 0;
  char bytes_[512] = "";
};

[[gnu::noinline]] inline Text to_text(int64_t number) {
  char digits[21];
  int at = 20;
  digits[at] = 0;
  uint64_t left = number < 0 ? -static_cast<uint64_t>(number) : static_cast<uint64_t>(number);
  do digits[--at] = static_cast<char>('0' + left % 10);
  while (left /= 10);
  if (number < 0) digits[--at] = '-';
  return digits + at;
}

}  // namespace rcu_ops
