// The operations of padinv.ops, each in one pass over memory.
//
// A kernel is a functor over work items that runs as it stands on a GPU (a thread per item) and on the host (a loop):
// tests check every index on machines without a GPU. Arithmetic is in float32, items are 16 bytes wide where the
// layout allows it, indices are 32-bit where the tensors are small enough. There is no torch in here: the library
// does not depend on torch's version, and compiles in seconds.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define HD __host__ __device__ __forceinline__

// --------------------------------------------------------------------------------------------------------------------
// Numbers and vectors of them

HD float to_float(float a) { return a; }
HD float to_float(__half a) { return __half2float(a); }
HD float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }
HD void from_float(float a, float& b) { b = a; }
HD void from_float(float a, __half& b) { b = __float2half_rn(a); }
HD void from_float(float a, __nv_bfloat16& b) { b = __float2bfloat16_rn(a); }

template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
    T items[V];
};

template <int V, class T>
HD void load(const T* from, float (&to)[V]) {
    Vector<T, V> v = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
    for (int k = 0; k < V; k++) to[k] = to_float(v.items[k]);
}

template <int V, class T>
HD void store(const float (&from)[V], T* to) {
    Vector<T, V> v;
#pragma unroll
    for (int k = 0; k < V; k++) from_float(from[k], v.items[k]);
    *reinterpret_cast<Vector<T, V>*>(to) = v;
}

// --------------------------------------------------------------------------------------------------------------------
// Noise, bias, leaky ReLU, gain, clamp

template <class T, int V, class I>
struct BiasAct {
    const T* x;
    const float* bias;   // [C] or null
    const float* noise;  // [H, W] or [N, 1, H, W], or null
    T* y;
    I channels, pixels, noise_step;  // pixels: H·W; noise_step: between the noise of two images, 0 where they share it
    bool last;                       // channels last
    float slope, gain, clamp;

    HD void operator()(I item) const {
        I at = item * V, line = at / (last ? channels : pixels), rest = at % (last ? channels : pixels);
        I c = last ? rest : line % channels;
        I n = last ? line / pixels : line / channels;
        I pixel = last ? line % pixels : rest;
        float a[V];
        load<V>(x + at, a);
#pragma unroll
        for (int k = 0; k < V; k++) {
            if (noise) a[k] += noise[n * noise_step + pixel + (last ? 0 : k)];
            if (bias) a[k] += bias[c + (last ? k : 0)];
            a[k] *= a[k] > 0 ? gain : gain * slope;
            a[k] = a[k] > clamp ? clamp : a[k] < -clamp ? -clamp : a[k];  // NaN stays NaN
        }
        store<V>(a, y + at);
    }
};

// The derivative by x of BiasAct, which follows from its result y.
template <class T, int V, class I>
struct BiasActBackward {
    const T *dy, *y;
    T* dx;
    float slope, gain, clamp;

    HD void operator()(I item) const {
        float a[V], b[V];
        load<V>(dy + item * V, a);
        load<V>(y + item * V, b);
#pragma unroll
        for (int k = 0; k < V; k++) {
            a[k] *= b[k] > 0 ? gain : gain * slope;
            if (b[k] >= clamp || b[k] <= -clamp) a[k] = 0;
        }
        store<V>(a, dx + item * V);
    }
};

// --------------------------------------------------------------------------------------------------------------------
// Up-sampling, padding, FIR filter, down-sampling

constexpr int ROWS = 4;  // output rows of one item: neighbours share most of their input

// An item is V channels of one column of ROWS outputs. UP, DOWN and K (taps of a square filter) are 0 where they are
// known only at run time.
template <class T, int V, class I, int UP, int DOWN, int K>
struct UpFirDn {
    const T* x;
    const float* f;  // [kh, kw]
    T* y;
    I channels, height, width, out_height, out_width;
    int up_, down_, kh_, kw_, left, top;
    bool last, flip;  // flip: a true convolution
    float gain;

    HD void operator()(I item) const {
        const int up = UP ? UP : up_, down = DOWN ? DOWN : down_, kh = K ? K : kh_, kw = K ? K : kw_;
        const I strips = (out_height + ROWS - 1) / ROWS, groups = last ? channels / V : 1;
        I c = item % groups * V, ox = item / groups % out_width;
        I oy = item / groups / out_width % strips * ROWS, plane = item / groups / out_width / strips;  // n or n·C + c
        const I step = last ? channels : 1;
        const T* in = x + plane * height * width * step + c;
        T* out = y + plane * out_height * out_width * step + c;

        float taps[K ? K : 1][K ? K : 1];
#pragma unroll
        for (int a = 0; a < K; a++)
#pragma unroll
            for (int b = 0; b < K; b++) taps[a][b] = f[flip ? K * K - 1 - a * K - b : a * K + b];

        float sums[ROWS][V] = {};
        const I x0 = ox * down - left;                    // the first tap's place on the up-sampled, unpadded grid
        const int kx0 = int((up - x0 % up) % up);         // the first tap that meets a sample rather than a zero
        const I y0 = oy * down - top;
        const int ky0 = int((up - y0 % up) % up);
#pragma unroll
        for (int r = 0; r < (K ? (ROWS - 1) * DOWN + K : (ROWS - 1) * down + kh); r++) {  // rows that the strip sees
            if ((r - ky0) % up) continue;
            const I iy = (y0 + r) / up;
            if (y0 + r < 0 || iy >= height) continue;
#pragma unroll
            for (int kx = 0; kx < (K ? K : kw); kx++) {
                if ((kx - kx0) % up) continue;
                const I ix = (x0 + kx) / up;
                if (x0 + kx < 0 || ix >= width) continue;
                float a[V];
                load<V>(in + (iy * width + ix) * step, a);
#pragma unroll
                for (int o = 0; o < ROWS; o++) {
                    const int ky = r - o * down;
                    if (ky < 0 || ky >= kh) continue;
                    const float tap = K ? taps[K ? ky : 0][K ? kx : 0]
                                        : f[flip ? kh * kw - 1 - ky * kw - kx : ky * kw + kx];
#pragma unroll
                    for (int k = 0; k < V; k++) sums[o][k] += gain * tap * a[k];
                }
            }
        }
#pragma unroll
        for (int o = 0; o < ROWS; o++)
            if (oy + o < out_height) store<V>(sums[o], out + ((oy + o) * out_width + ox) * step);
    }
};

// --------------------------------------------------------------------------------------------------------------------
// Ring padding with style modulation

// Index of a border pixel of the (r + 2)² map in the order of `pad_ring`.
template <class I>
HD I ring_index(I row, I column, I r) {
    if (row == 0) return column;
    if (row == r + 1) return r + 2 + column;
    return 2 * (r + 2) + (column == 0 ? 0 : r) + row - 1;
}

template <class T, int V, class I>
struct PadRing {
    const T* x;
    const T* ring;       // [N, C, 4(r + 1)]
    const float* style;  // [N, C] or null
    T* y;
    I channels, r;
    bool last;

    HD void operator()(I item) const {
        const I side = r + 2, groups = last ? channels / V : 1, step = last ? channels : 1;
        I c = item % groups * V, column = item / groups % side;
        I row = item / groups / side % side, plane = item / groups / side / side;  // n or n·C + c
        I nc = plane * step + c;
        float a[V];
        if (row > 0 && row <= r && column > 0 && column <= r) {
            load<V>(x + (plane * r * r + (row - 1) * r + column - 1) * step + c, a);
#pragma unroll
            for (int k = 0; k < V; k++) a[k] *= style ? style[nc + k] : 1.f;
        } else {
            const I at = ring_index(row, column, r);
#pragma unroll
            for (int k = 0; k < V; k++) a[k] = to_float(ring[(nc + k) * 4 * (r + 1) + at]);
        }
        store<V>(a, y + (plane * side * side + row * side + column) * step + c);
    }
};

// dx, d_ring and d_style in one pass over dy and x. An item is V channels of one map, shared by `threads` threads, of
// which each returns its part of d_style.
template <class T, int V, class I>
struct PadRingBackward {
    const T *dy, *x;
    const float* style;
    T *dx, *d_ring;
    float* d_style;  // null without a style
    I channels, r, items;
    bool last;

    HD I first(I item) const { return last ? item / (channels / V) * channels + item % (channels / V) * V : item; }

    HD void part(I item, int thread, int threads, float (&sums)[V]) const {
        const I side = r + 2, step = last ? channels : 1;
        const I nc = first(item), plane = last ? nc / channels : nc, c = last ? nc % channels : 0;
        for (I pixel = thread; pixel < side * side; pixel += threads) {
            const I row = pixel / side, column = pixel % side;
            float a[V];
            load<V>(dy + (plane * side * side + pixel) * step + c, a);
            if (row > 0 && row <= r && column > 0 && column <= r) {
                const I at = (plane * r * r + (row - 1) * r + column - 1) * step + c;
                if (style) {
                    float b[V];
                    load<V>(x + at, b);
#pragma unroll
                    for (int k = 0; k < V; k++) {
                        sums[k] += a[k] * b[k];
                        a[k] *= style[nc + k];
                    }
                }
                store<V>(a, dx + at);
            } else {
                const I at = ring_index(row, column, r);
#pragma unroll
                for (int k = 0; k < V; k++) from_float(a[k], d_ring[(nc + k) * 4 * (r + 1) + at]);
            }
        }
    }
};

// --------------------------------------------------------------------------------------------------------------------
// Launching: stream null and device −1 mean the host

struct Target {
    int64_t host;
    cudaStream_t stream;
};

template <class F, class I>
__global__ void __launch_bounds__(256) each(F f, I items) {
    const I item = I(blockIdx.x) * 256 + threadIdx.x;
    if (item < items) f(item);
}

template <class F, class I>
int run(Target target, const F& f, I items) {
    if (target.host) {
        for (I item = 0; item < items; item++) f(item);
        return 0;
    }
    if (items) each<<<unsigned((items + 255) / 256), 256, 0, target.stream>>>(f, items);
    return int(cudaGetLastError());
}

// A block is WIDTH neighbouring items × 256/WIDTH threads for each: wide where channels lie side by side in memory.
template <int WIDTH, class T, int V, class I>
__global__ void __launch_bounds__(256) maps(PadRingBackward<T, V, I> f) {
    constexpr int THREADS = 256 / WIDTH;
    __shared__ float shared[THREADS][WIDTH][V];
    const int column = threadIdx.x % WIDTH, thread = threadIdx.x / WIDTH;
    const I item = I(blockIdx.x) * WIDTH + column;
    float sums[V] = {};
    if (item < f.items) f.part(item, thread, THREADS, sums);
    if (!f.d_style) return;
    for (int k = 0; k < V; k++) shared[thread][column][k] = sums[k];
    for (int half = THREADS / 2; half; half /= 2) {  // a tree: the same sum on every run
        __syncthreads();
        if (thread < half)
            for (int k = 0; k < V; k++) shared[thread][column][k] += shared[thread + half][column][k];
    }
    if (!thread && item < f.items)
        for (int k = 0; k < V; k++) f.d_style[f.first(item) + k] = shared[0][column][k];
}

template <class T, int V, class I>
int run_maps(Target target, const PadRingBackward<T, V, I>& f) {
    if (target.host) {
        for (I item = 0; item < f.items; item++) {
            float sums[V] = {};
            f.part(item, 0, 1, sums);
            for (int k = 0; f.d_style && k < V; k++) f.d_style[f.first(item) + k] = sums[k];
        }
        return 0;
    }
    constexpr int WIDTH = V > 1 ? 8 : 1;
    if (f.items) maps<WIDTH><<<unsigned((f.items + WIDTH - 1) / WIDTH), 256, 0, target.stream>>>(f);
    return int(cudaGetLastError());
}

bool aligned(const void* p) { return !p || reinterpret_cast<uintptr_t>(p) % 16 == 0; }
constexpr int64_t SMALL = int64_t(1) << 30;  // elements; twice that still fits into 32 bits

// Calls `body` with the types of: elements (0 float32, 1 float16, 2 bfloat16), width of vectors, indices.
template <class T, class Body>
int with_width(bool wide, bool small, Body body) {
    constexpr int V = 16 / sizeof(T);
    using One = Vector<T, 1>;
    using Wide = Vector<T, V>;
    if (small) return wide ? body(Wide{}, int32_t{}) : body(One{}, int32_t{});
    return wide ? body(Wide{}, int64_t{}) : body(One{}, int64_t{});
}

template <class Body>
int with_types(int64_t dtype, bool wide, bool small, Body body) {
    if (dtype == 0) return with_width<float>(wide, small, body);
    if (dtype == 1) return with_width<__half>(wide, small, body);
    return with_width<__nv_bfloat16>(wide, small, body);
}

template <class T, int V>
T element_of(Vector<T, V>);

#define TYPES(vector, index)                    \
    using T = decltype(element_of(vector));     \
    constexpr int V = sizeof(vector) / sizeof(T); \
    using I = decltype(index)

extern "C" {

int padinv_bias_act(int64_t host, void* stream, int64_t dtype, const void* x, const float* bias, const float* noise,
                    void* y, int64_t n, int64_t channels, int64_t pixels, int64_t noise_step, int64_t last,
                    double slope, double gain, double clamp) {
    const int64_t total = n * channels * pixels, width = dtype ? 8 : 4;
    const bool wide = (last ? channels : pixels) % width == 0 && aligned(x) && aligned(y);
    return with_types(dtype, wide, total < SMALL, [&](auto vector, auto index) {
        TYPES(vector, index);
        BiasAct<T, V, I> f{(const T*)x, bias, noise, (T*)y, I(channels), I(pixels), I(noise_step),
                           bool(last), float(slope), float(gain), float(clamp)};
        return run({host, cudaStream_t(stream)}, f, I(total / V));
    });
}

int padinv_bias_act_backward(int64_t host, void* stream, int64_t dtype, const void* dy, const void* y, void* dx,
                             int64_t total, double slope, double gain, double clamp) {
    const bool wide = total % (dtype ? 8 : 4) == 0 && aligned(dy) && aligned(y) && aligned(dx);
    return with_types(dtype, wide, total < SMALL, [&](auto vector, auto index) {
        TYPES(vector, index);
        BiasActBackward<T, V, I> f{(const T*)dy, (const T*)y, (T*)dx, float(slope), float(gain), float(clamp)};
        return run({host, cudaStream_t(stream)}, f, I(total / V));
    });
}

int padinv_upfirdn2d(int64_t host, void* stream, int64_t dtype, const void* x, const float* f, void* y,
                     int64_t n, int64_t channels, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                     int64_t up, int64_t down, int64_t kh, int64_t kw, int64_t left, int64_t top, int64_t last,
                     int64_t flip, double gain) {
    const int64_t largest = n * channels * (height * width > out_height * out_width ? height * width
                                                                                     : out_height * out_width);
    const bool wide = last && channels % (dtype ? 8 : 4) == 0 && aligned(x) && aligned(y);
    const bool small = largest < SMALL && up * (height + width) + down * (out_height + out_width) < SMALL;
    return with_types(dtype, wide, small, [&](auto vector, auto index) {
        TYPES(vector, index);
        const int64_t strips = (out_height + ROWS - 1) / ROWS;
        auto launch = [&](auto op) {
            op.x = (const T*)x, op.f = f, op.y = (T*)y, op.channels = I(channels), op.height = I(height);
            op.width = I(width), op.out_height = I(out_height), op.out_width = I(out_width), op.up_ = int(up);
            op.down_ = int(down), op.kh_ = int(kh), op.kw_ = int(kw), op.left = int(left), op.top = int(top);
            op.last = last, op.flip = flip, op.gain = float(gain);
            return run({host, cudaStream_t(stream)}, op, I(n * channels / V * strips * out_width));
        };
        const bool four = kh == 4 && kw == 4;
        if (four && up == 1 && down == 1) return launch(UpFirDn<T, V, I, 1, 1, 4>{});
        if (four && up == 2 && down == 1) return launch(UpFirDn<T, V, I, 2, 1, 4>{});
        if (four && up == 1 && down == 2) return launch(UpFirDn<T, V, I, 1, 2, 4>{});
        return launch(UpFirDn<T, V, I, 0, 0, 0>{});
    });
}

int padinv_pad_ring(int64_t host, void* stream, int64_t dtype, const void* x, const void* ring, const float* style,
                    void* y, int64_t n, int64_t channels, int64_t r, int64_t last) {
    const int64_t total = n * channels * (r + 2) * (r + 2);
    const bool wide = last && channels % (dtype ? 8 : 4) == 0 && aligned(x) && aligned(y);
    return with_types(dtype, wide, total < SMALL, [&](auto vector, auto index) {
        TYPES(vector, index);
        PadRing<T, V, I> f{(const T*)x, (const T*)ring, style, (T*)y, I(channels), I(r), bool(last)};
        return run({host, cudaStream_t(stream)}, f, I(total / V));
    });
}

int padinv_pad_ring_backward(int64_t host, void* stream, int64_t dtype, const void* dy, const void* x,
                             const float* style, void* dx, void* d_ring, float* d_style, int64_t n, int64_t channels,
                             int64_t r, int64_t last) {
    const int64_t total = n * channels * (r + 2) * (r + 2);
    const bool wide = last && channels % (dtype ? 8 : 4) == 0 && aligned(x) && aligned(dy) && aligned(dx);
    return with_types(dtype, wide, total < SMALL, [&](auto vector, auto index) {
        TYPES(vector, index);
        PadRingBackward<T, V, I> f{(const T*)dy, (const T*)x, style, (T*)dx, (T*)d_ring, d_style, I(channels), I(r),
                                   I(n * channels / V), bool(last)};
        return run_maps({host, cudaStream_t(stream)}, f);
    });
}

const char* padinv_error(int code) { return cudaGetErrorString(cudaError_t(code)); }
}
