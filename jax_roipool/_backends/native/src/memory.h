// Addresses in arrays of any type, what is written where nothing is pooled, and hints to the system
// and the processor about them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jax_roipool {

inline char* at(void* array, int64_t bytes) { return static_cast<char*>(array) + bytes; }
inline const char* at(const void* array, int64_t bytes) {
  return static_cast<const char*>(array) + bytes;
}

// The result of a RoI without an image, which is a part of `pooled`: 0, or what it is in `onto`.
// That may be null, or `pooled` itself.
inline void zero_or_keep(const void* onto, void* pooled, int64_t first, int64_t bytes) {
  if (onto == nullptr) {
    std::memset(at(pooled, first), 0, bytes);
  } else if (onto != pooled) {
    std::memcpy(at(pooled, first), at(onto, first), bytes);
  }
}

// Fresh memory comes in pages of 4 KiB, and their faults take several times as long as writing to
// them does. NumPy asks for huge pages in the same way, from the same size on.
inline void prefer_huge_pages(void* array, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kEnough = 4 << 20, kPage = 4096;
  if (bytes < kEnough) return;
  const int64_t before_page = -reinterpret_cast<intptr_t>(array) & (kPage - 1);
  madvise(at(array, before_page), bytes - before_page, MADV_HUGEPAGE);
#else
  (void)array, (void)bytes;
#endif
}

constexpr int64_t kCacheLine = 64;

inline void prefetch(const void* array, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(at(array, i));
#else
  (void)array, (void)bytes;
#endif
}

}  // namespace jax_roipool
