// Matrix tiles (AMX bf16): permission, and the proof that they work before the tier is offered.
#pragma once

namespace mmk::amx {

// True where the processor has AMX tiles for bf16 and int8, the kernel granted them to this process, and one tile product came out
// right. Asked once, when the tier is detected.
bool usable();

// c[16][16] += a[16][32] b[32][16]: one tile product, bf16 in, fp32 out. `b_pairs` holds b as [16][16][2]: rows 2k and
// 2k + 1 side by side, the layout that the instruction reads. Only where usable() holds.
void tile_product(const unsigned short* a, const unsigned short* b_pairs, float* c);

}  // namespace mmk::amx
