// Calls of the CPU decoder read from a file, made, and the memory behind their pointers written to another file:
// replay TRACE RESULTS. other_processors.py writes the one and reads the other.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
void kbvq_decode();
void kbvq_products();
void kbvq_trellis_decode();
void kbvq_trellis_products();
void kbvq_integer_products();
void kbvq_integer_trellis_products();
}

namespace {

void (*const FUNCTIONS[])() = {kbvq_decode,           kbvq_products,         kbvq_trellis_decode,
                               kbvq_trellis_products, kbvq_integer_products, kbvq_integer_trellis_products};
const int MOST = 24;

// In the calling conventions of Linux on x86-64 and aarch64 integers and pointers take one place each, whatever their
// size, and the only float takes the first of its own registers, wherever it stands: one type of function serves all.
typedef long (*Function)(float, long, long, long, long, long, long, long, long, long, long, long, long, long, long, long,
                         long, long, long, long, long, long, long, long, long);

struct File {
    FILE* file;
    File(const char* path, const char* mode) : file(std::fopen(path, mode)) {
        if (!file) std::abort();
    }
    ~File() {
        if (std::fclose(file)) std::abort();
    }
};

}  // namespace

int main(int, char** arguments) {
    File trace(arguments[1], "rb"), results(arguments[2], "wb");
    int64_t head[2];
    while (std::fread(head, sizeof head, 1, trace.file) == 1) {
        long values[MOST] = {};
        float real = 0;
        int count = 0;
        std::vector<std::vector<uint8_t>> buffers;
        for (int64_t i = 0; i < head[1]; i++) {
            int64_t kind, value;
            if (std::fread(&kind, 8, 1, trace.file) != 1 || std::fread(&value, 8, 1, trace.file) != 1) std::abort();
            if (kind == 3) {
                double number;
                std::memcpy(&number, &value, 8);
                real = (float)number;
                continue;
            }
            if (count == MOST) std::abort();
            if (kind == 1) {
                buffers.emplace_back(value);  // of its own size, so that a sanitizer sees what lies beside it
                if (value && std::fread(buffers.back().data(), value, 1, trace.file) != 1) std::abort();
                value = (int64_t)buffers.back().data();
            }
            values[count++] = value;
        }
        const long* v = values;
        ((Function)FUNCTIONS[head[0]])(real, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12],
                                       v[13], v[14], v[15], v[16], v[17], v[18], v[19], v[20], v[21], v[22], v[23]);
        for (const auto& buffer : buffers)
            if (!buffer.empty() && std::fwrite(buffer.data(), buffer.size(), 1, results.file) != 1) std::abort();
    }
    return 0;
}
