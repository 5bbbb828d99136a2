// One layer's experts as llama.cpp computes them: gate, up and down by ggml_mul_mat_id, SwiGLU between.
// Compiled by llama_cpp.py against a built ggml; see there.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Experts {
    ggml_context* weights;
    ggml_tensor *gate, *up, *down;
    long hidden;
};

// Some rows of Gaussian weights, quantized, and repeated over all rows: the time does not depend on values.
ggml_tensor* random_weights(ggml_context* context, ggml_type type, long columns, long rows, long experts) {
    ggml_tensor* weights = ggml_new_tensor_3d(context, type, columns, rows, experts);
    const long some = 16;
    std::mt19937 generator(0);
    std::normal_distribution<float> normal(0, 1 / std::sqrt((float)columns));
    std::vector<float> values(some * columns), importance(columns, 1.0f);
    for (float& value : values) value = normal(generator);
    const size_t row_bytes = ggml_row_size(type, columns);
    std::vector<uint8_t> quantized(some * row_bytes);
    ggml_quantize_chunk(type, values.data(), quantized.data(), 0, some, columns, importance.data());
    for (long row = 0; row < rows * experts; row++)
        std::memcpy((uint8_t*)weights->data + row * row_bytes, quantized.data() + row % some * row_bytes, row_bytes);
    return weights;
}

}  // namespace

// Bits of a weight in a type, all stored.
extern "C" double bits(const char* name) {
    for (int type = 0; type < GGML_TYPE_COUNT; type++)
        if (!std::strcmp(ggml_type_name((ggml_type)type), name))
            return 8.0 * ggml_type_size((ggml_type)type) / ggml_blck_size((ggml_type)type);
    return 0;
}

extern "C" void* make_experts(const char* name, long experts, long hidden, long intermediate) {
    int type = 0;
    while (type < GGML_TYPE_COUNT && std::strcmp(ggml_type_name((ggml_type)type), name)) type++;
    const size_t size = experts * (2 * intermediate * ggml_row_size((ggml_type)type, hidden) +
                                   hidden * ggml_row_size((ggml_type)type, intermediate));
    ggml_context* context = ggml_init({size + (1 << 20), nullptr, false});
    return new Experts{context, random_weights(context, (ggml_type)type, hidden, intermediate, experts),
                       random_weights(context, (ggml_type)type, hidden, intermediate, experts),
                       random_weights(context, (ggml_type)type, intermediate, hidden, experts), hidden};
}

extern "C" void free_experts(void* handle) {
    ggml_free(((Experts*)handle)->weights);
    delete (Experts*)handle;
}

struct Layer {
    ggml_context* context;
    ggml_cgraph* graph;
    ggml_cplan plan;
    std::vector<uint8_t> work;
};

// The computation for inputs x [tokens, hidden] and index [tokens, top_k].
extern "C" void* make_layer(void* handle, const float* x, const int32_t* index, long tokens, long top_k, long threads) {
    const Experts& e = *(Experts*)handle;
    const size_t rows = tokens * top_k * (3 * e.gate->ne[1] + e.hidden) * sizeof(float);
    ggml_context* context = ggml_init({2 * rows + tokens * e.hidden * 8 + (1 << 24), nullptr, false});
    ggml_tensor* inputs = ggml_new_tensor_3d(context, GGML_TYPE_F32, e.hidden, 1, tokens);
    std::memcpy(inputs->data, x, ggml_nbytes(inputs));
    ggml_tensor* ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, top_k, tokens);
    std::memcpy(ids->data, index, ggml_nbytes(ids));
    ggml_tensor* gate = ggml_mul_mat_id(context, e.gate, inputs, ids);
    ggml_tensor* up = ggml_mul_mat_id(context, e.up, inputs, ids);
    ggml_tensor* out = ggml_mul_mat_id(context, e.down, ggml_swiglu_split(context, gate, up), ids);
    Layer* layer = new Layer{context, ggml_new_graph(context), {}, {}};
    ggml_build_forward_expand(layer->graph, out);
    layer->plan = ggml_graph_plan(layer->graph, (int)threads, nullptr);
    layer->work.resize(layer->plan.work_size + 64);
    layer->plan.work_data = layer->work.data();
    return layer;
}

extern "C" int run_layer(void* layer) { return ggml_graph_compute(((Layer*)layer)->graph, &((Layer*)layer)->plan); }

extern "C" void free_layer(void* layer) {
    ggml_free(((Layer*)layer)->context);
    delete (Layer*)layer;
}
