// Memory that stays from call to call.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_BUFFER_H_
#define OWL_DEPLOY_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <new>

namespace owl {

// Keeps its memory from call to call; one per calling thread. Gives back what a long prompt took.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { Release(); }

  // At least `bytes` of it, 64-byte aligned; throws std::bad_alloc.
  uint8_t* Get(size_t bytes) {
    if (bytes > size_ || (size_ > kKept && bytes <= kKept)) {
      Release();
      data_ = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{64}));
      size_ = bytes;
    }
    return data_;
  }

 private:
  static constexpr size_t kKept = size_t{64} << 20;

  void Release() {
    ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    size_ = 0;
  }

  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace owl

#endif  // OWL_DEPLOY_BUFFER_H_
