// Philox4x32 with 7 rounds (Salmon et al., SC 2011): key (seed lo, seed hi), counter (call, stream, token lo,
// token hi) -> 4 words. numerics.md section 4a; the definition is src/numerics/philox.rs.
#pragma once

#include "portable.cuh"

struct Words4 {
  uint32_t x[4];
};

TEMPER_DEVICE Words4 philox4x32_7(uint32_t key_lo, uint32_t key_hi, Words4 counter) {
  uint32_t a = counter.x[0], b = counter.x[1], c = counter.x[2], d = counter.x[3];
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint32_t p_low = 0xD2511F53u * a, p_high = high_product(0xD2511F53u, a);
    const uint32_t q_low = 0xCD9E8D57u * c, q_high = high_product(0xCD9E8D57u, c);
    a = q_high ^ b ^ key_lo;
    b = q_low;
    c = p_high ^ d ^ key_hi;
    d = p_low;
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
  return Words4{{a, b, c, d}};
}
