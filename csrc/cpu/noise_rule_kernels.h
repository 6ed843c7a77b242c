// The noise op where every position has a threshold of its own, for one instruction set: the part of noise_kernels.h for Rule::thresholds.
// A chunk's factors (0, or the kept element's scale) are made in a buffer that the first cache holds, and then applied.

// The 16-bit fields of positions [position, position + n) of a row, to memory that has room for 64 more on either side of n.
// Returns where the first one is.
inline const uint16_t* draw_fields(uint16_t* fields, const RowAddress& address, int64_t position, int64_t n) {
  const Keys keys(address.seed);
  const RowShare row(address, keys);
  const int64_t first = position / kGroup;
  for (int64_t group = first, at = 0; group * kGroup < position + n; group += 8, at += 64)
    store_words(draw_8(Groups(static_cast<uint32_t>(group), address.stream, keys), row, keys), fields + at);
  return fields + position % kGroup;
}

// The factors of elements [begin, end) of the inner dimension at outer index o, under noise sample s of example b.
template <class A>
inline void draw_factors(const Noise& call, int64_t o, int64_t s, int64_t b, int64_t begin, int64_t end, A* factors) {
  alignas(64) uint16_t buffer[kChunk + 128];
  const Layout& layout = call.layout;
  const RowAddress row = call.address.of_row(s, b, layout.examples);
  const int32_t* thresholds = call.rule.of_row(s, b, layout.examples, layout.positions);
  const auto scale = static_cast<A>(call.rule.scale);
  const auto factor = [&](uint32_t drawn, int32_t threshold) {
    const bool kept = keep(static_cast<int32_t>(drawn), threshold);
    // The quotient is made for all, and masked as an integer: see NOTE [Instruction sets].
    using U = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
    const A made = scale * keep_scale<A>(threshold);
    return bit_cast<A>(static_cast<U>(bit_cast<U>(made) & (U(0) - static_cast<U>(kept))));
  };
  spread(layout, o, begin, end, factors, [&](int64_t position, int64_t n) {
    const uint16_t* drawn = draw_fields(buffer, row, position, n);
    return [&factor, drawn, of = thresholds + position](int64_t i) { return factor(drawn[i], of[i]); };
  });
}

template <class T>
void noise_rule_chunk(const Noise& call, int64_t o, int64_t b, int64_t begin, int64_t end, const T* x, T* y) {
  using A = acc_t<T>;
  alignas(64) A factors[kChunk];
  for (int64_t s = 0; s < call.samples; ++s) {
    draw_factors(call, o, s, b, begin, end, factors);
    const T* from = x + call.input_at(o, s, b) + begin;
    T* to = y + call.output_at(o, s, b) + begin;
    // 0 times an infinity is not 0: what is dropped is masked
    for (int64_t i = 0; i < end - begin; ++i) to[i] = keep_one<T>(to_acc(from[i]) * factors[i], factors[i] != A(0));
  }
}

template <class T>
void noise_rule_sum_chunk(const Noise& call, int64_t o, int64_t b, int64_t begin, int64_t end, const T* dy, T* dx) {
  using A = acc_t<T>;
  alignas(64) A factors[kChunk], sum[kChunk];
  std::fill(sum, sum + (end - begin), A(0));
  for (int64_t s = 0; s < call.samples; ++s) {
    draw_factors(call, o, s, b, begin, end, factors);
    const T* from = dy + call.output_at(o, s, b) + begin;
    for (int64_t i = 0; i < end - begin; ++i) sum[i] += keep_one<A>(to_acc(from[i]) * factors[i], factors[i] != A(0));
  }
  T* to = dx + call.example_at(o, b) + begin;
  for (int64_t i = 0; i < end - begin; ++i) to[i] = from_acc<T>(sum[i]);
}
