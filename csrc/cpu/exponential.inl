// e^v in fp32, to 1.5 units in the last place where the result is a normal number; 0 for -infinity, NaN for NaN.
//
// v = n ln 2 + r with |r| <= ln 2 / 2, so e^v = 2^n e^r, and e^r = 1 + r + r^2 p(r) with p of degree 4, the polynomial
// of least largest error on that interval: 1.6e-9. ln 2 is two numbers, of which the first has 15 bits, so that n times
// it is exact. Beyond the limits 2^n e^r is 0 or infinity on every ISA.
static inline F32 exponential(F32 v) {
  v = within(v, -108.0F, 89.0F);
  const F32 shift = broadcast(12582912.0F);  // 1.5 * 2^23: adding and taking it away rounds to nearest even
  F32 n = sub(fma(v, broadcast(1.44269504F), shift), shift);
  const F32 r = fma(n, broadcast(-1.42860677e-6F), fma(n, broadcast(-0.693145752F), v));
  F32 p = broadcast(0.00139262131F);
  p = fma(p, r, broadcast(0.00836320315F));
  p = fma(p, r, broadcast(0.0416665561F));
  p = fma(p, r, broadcast(0.166665763F));
  p = fma(p, r, broadcast(0.5F));
  return times_power_of_two(add(fma(p, mul(r, r), r), broadcast(1.0F)), n);
}
