// Which kernel ran: a short ring of (op, kernel) pairs that mk.last_kernels() reads.
#pragma once

namespace mmk {

// Both strings must live as long as the process (literals, or names that trace.cpp keeps).
void trace(const char* op, const char* kernel);

}  // namespace mmk
