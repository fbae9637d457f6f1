// C functions that Python calls through ctypes: what is not an operator on tensors.
#pragma once
#define MMK_EXPORT extern "C" __attribute__((visibility("default")))
