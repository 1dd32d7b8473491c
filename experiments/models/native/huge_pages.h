// Asks the system for large pages of memory.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Asks the system for huge pages around a large result. XLA gets the memory of a program's features
// from the system at each call; clearing it in pages of 4 KB takes a fifth of a step of a ResNet20.
// The first and the last page are included: most results have only a few pages.
inline void AskForHugePages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  if (bytes < kHugePage) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = start & -kHugePage, last = (start + bytes + kHugePage - 1) & -kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // may fail: only advice
#endif
}
