// The layers of RWKV-4 in a step of the recurrence on the CPU. rwkv_step.h has everything that versions share.
//
// A layer has four phases, in which threads share the rows of matrices:
//
//   1. key, value and receptance, then, channel by channel, the step of WKV     2. the output
//   3. the feed-forward's key and receptance                                    4. its value

#include "rwkv_step.h"
#include "wkv4_math.h"

namespace {

// wkv::decay with exp_negative, which a compiler can vectorise.
WKV_INLINE float decay(float time_decay) {
  const float e = wkv::exp_negative(-std::fabs(time_decay));
  const float power = time_decay > 0.0f ? 1.0f / e : e;
  return time_decay > 69.0f ? -1e30f : -power;
}

// For channels begin to end of one row: key, value, receptance and state -> the gated output and the new state.
void step_wkv(const float* time_decay, const float* time_first, int64_t begin, int64_t end, int64_t channels,
              const float* key, const float* value, const float* receptance, const float* state, float* output,
              float* new_state) {
  WKV_SIMD
  for (int64_t c = begin; c < end; ++c) {
    const float w = decay(time_decay[c]);
    const wkv::State<float> before = {state[c], state[channels + c], state[2 * channels + c], 0.0f};
    output[c] = sigmoid(receptance[c]) * wkv::output(before, w, time_first[c], key[c], value[c]).value;
    const wkv::State<float> after = wkv::update(before, w, key[c], value[c]).state;
    const wkv::Folded<float> folded = wkv::fold(after, w);
    new_state[c] = folded.scale * after.num;
    new_state[channels + c] = folded.scale * after.den;
    new_state[2 * channels + c] = folded.max_exp;
  }
}

struct Layer {
  static constexpr const char *NAME = "rwkv4_step", *VERSION = "RWKV-4";
  static constexpr int64_t PARAMETERS = 18, FEWER_IN_FIRST = 0;

  int64_t channels;
  Norm ln1, ln2;
  struct {
    const float *time_decay, *time_first, *mix_k, *mix_v, *mix_r;
    Matrix key, value, receptance, output;
  } att;
  struct {
    const float *mix_k, *mix_r;
    Matrix key, receptance, value;
  } ffn;

  Layer(Reader& reader, int64_t C, const Layer*) : channels(C), ln1(reader.norm(C)), ln2(reader.norm(C)) {
    for (const float** p : {&att.time_decay, &att.time_first, &att.mix_k, &att.mix_v, &att.mix_r}) {
      *p = reader.vector(C);
    }
    for (Matrix* m : {&att.key, &att.value, &att.receptance, &att.output}) *m = reader.matrix(C, C);
    ffn.mix_k = reader.vector(C);
    ffn.mix_r = reader.vector(C);
    ffn.key = reader.matrix(-1, C);
    ffn.receptance = reader.matrix(C, C);
    ffn.value = reader.matrix(C, ffn.key.rows);
  }

  std::vector<int64_t> wkv_shape() const { return {3, channels}; }

  void fill_empty(float* wkv) const {
    const wkv::State<float> nothing = wkv::empty_state<float>();
    std::fill(wkv, wkv + channels, nothing.num);
    std::fill(wkv + channels, wkv + 2 * channels, nothing.den);
    std::fill(wkv + 2 * channels, wkv + 3 * channels, nothing.key);
  }

  // (B, C) each, except inner (B, F).
  struct Scratch {
    float *mixed_k, *mixed_v, *mixed_r, *key, *value, *receptance, *gated, *product, *inner;

    Scratch(Arrays& array, const Batch& batch, const std::vector<Layer>& layers) {
      for (float** p : {&mixed_k, &mixed_v, &mixed_r, &key, &value, &receptance, &gated, &product}) {
        *p = array(batch.rows * batch.channels);
      }
      int64_t width = 0;
      for (const Layer& layer : layers) width = std::max(width, layer.ffn.key.rows);
      inner = array(batch.rows * width);
    }
  };

  void step(const Batch& batch, const State& state, const Scratch& s, float* x) const {
    const int64_t B = batch.rows, C = channels, F = ffn.key.rows;
    batch.each_row([&](int64_t at) {
      float* normal = state.new_att_shift + at;
      const float* shift = state.att_shift + at;
      normalise(ln1, EPSILON, x + at, C, normal);
      mix(att.mix_k, shift, normal, C, s.mixed_k + at);
      mix(att.mix_v, shift, normal, C, s.mixed_v + at);
      mix(att.mix_r, shift, normal, C, s.mixed_r + at);
    });
    parallel(C, 3 * C * B, [&](int64_t begin, int64_t end) {
      multiply(att.key, begin, end, s.mixed_k, B, s.key);
      multiply(att.value, begin, end, s.mixed_v, B, s.value);
      multiply(att.receptance, begin, end, s.mixed_r, B, s.receptance);
      for (int64_t at = 0; at < B * C; at += C) {
        step_wkv(att.time_decay, att.time_first, begin, end, C, s.key + at, s.value + at, s.receptance + at,
                 state.wkv + 3 * at, s.gated + at, state.new_wkv + 3 * at);
      }
    });
    batch.add_product(att.output, s.gated, s.product, x);

    batch.each_row([&](int64_t at) {
      float* normal = state.new_ffn_shift + at;
      const float* shift = state.ffn_shift + at;
      normalise(ln2, EPSILON, x + at, C, normal);
      mix(ffn.mix_k, shift, normal, C, s.mixed_k + at);
      mix(ffn.mix_r, shift, normal, C, s.mixed_r + at);
    });
    parallel(C, (C + F) * B, [&](int64_t begin, int64_t end) {
      // The key's rows are divided among the C channels, so that both matrices are split at the same points.
      batch.multiply_and_square(ffn.key, begin * F / C, end * F / C, s.mixed_k, s.inner);
      multiply(ffn.receptance, begin, end, s.mixed_r, B, s.receptance);
    });
    parallel(C, F * B, [&](int64_t begin, int64_t end) {
      multiply(ffn.value, begin, end, s.inner, B, s.product);
      for (int64_t b = 0; b < B; ++b) {
        WKV_SIMD
        for (int64_t c = b * C + begin; c < b * C + end; ++c) {
          x[c] = multiply_add(sigmoid(s.receptance[c]), s.product[c], x[c]);
        }
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv_pl, m) {
  m.def("rwkv4_step(Tensor[] parameters, Tensor tokens, Tensor[] state)"
        " -> (Tensor logits, Tensor shifts, Tensor wkv)");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl, CPU, m) { m.impl("rwkv4_step", WKV_BOX(step<Layer>)); }
