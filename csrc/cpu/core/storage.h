// Element types as they lie in memory. Plain structs, shared by every translation unit.
#pragma once
#include <stdint.h>

namespace mmk {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

}  // namespace mmk
