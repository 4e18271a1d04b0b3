// Barriers, cp.async, blocks, and how launches are run.
#include <cmath>
#include <thread>

#include "harness.h"

static std::string row_sums(u32 seed, int bug, int rows) {
  int cols = 300;
  Buffer<float> sums(static_cast<size_t>(rows)), x(random_numbers(static_cast<size_t>(rows * cols)));
  std::string error = launch("test_row_sums", (static_cast<unsigned>(rows) + 1) / 2, 256, 0, seed, sums, x, rows, cols, bug);
  if (!error.empty()) return error;
  return near(
      "sums", sums.data.size(), [&](size_t r) { return sums[r]; },
      [&](size_t r) {
        double sum = 0;
        for (int c = 0; c < cols; c++) sum += x[r * static_cast<size_t>(cols) + static_cast<size_t>(c)];
        return sum;
      },
      1e-4);  // f32 sums of 300 numbers of up to 1
}
static const Add sums{{"row sums by barriers",
                       [](u32 seed, int bug) { return row_sums(seed, bug, 5); },
                       {{1, RACE, "without ordering"},
                        {2, RACE, "without ordering"},
                        {3, ASAN, "heap-buffer-overflow"},
                        {4, ASAN, "use-after-poison"},
                        {5, PLAIN, "meet at different places"},
                        {6, PLAIN, "deadlock"}}}};

static std::string copies(u32 seed, int bug, int width) {
  std::string error;
  for (int cols : {64, 128, 99, 1, 66}) {
    const unsigned blocks = (static_cast<unsigned>(cols) + 63) / 64;
    Buffer<float> out(64 * blocks), in(random_numbers(static_cast<size_t>(cols)));
    error = launch("test_copies", blocks, 64, 0, seed, out, in, cols, width, bug);
    if (!error.empty()) return error;
    error = same<float>(
        "out", out.data.size(), [&](size_t i) { return out[i]; },
        [&](size_t i) {
          const size_t from = i / 64 * 64 + 63 - i % 64;
          return from < in.data.size() ? in[from] : 0.0f;
        });
    if (!error.empty()) return error;
  }
  return error;
}
static const Add copies4{{"cp.async of 4 bytes", [](u32 seed, int bug) { return copies(seed, bug, 4); }, {}}};
static const Add copies8{{"cp.async of 8 bytes", [](u32 seed, int bug) { return copies(seed, bug, 8); }, {}}};
static const Add copies16{{"cp.async of 16 bytes",
                           [](u32 seed, int bug) { return copies(seed, bug, 16); },
                           {{1, RACE, "without ordering"},
                            {1, PLAIN, "wrong"},
                            {2, RACE, "without ordering"},
                            {3, PLAIN, "cp.async copies that it has not waited for"},
                            {4, PLAIN, "not 16-byte aligned"}}}};

static const Add named{{"named barriers",
                        [](u32 seed, int bug) {
                          int steps = 5;
                          Buffer<float> out(160);
                          std::string error = launch("test_named_barriers", 1, 64, 0, seed, out, steps, bug);
                          if (!error.empty()) return error;
                          return same<float>(
                              "out", 160, [&](size_t i) { return out[i]; },
                              [](size_t i) { return static_cast<float>(100 * (i / 32) + 31 - i % 32); });
                        },
                        {{1, RACE, "without ordering"}, {2, RACE, "without ordering"}}}};

static const Add readers{{"many readers",
                          [](u32 seed, int bug) -> std::string {
                            Buffer<float> out(1);
                            std::string error;
                            // Whichever it is, in whatever order they come: none is forgotten for another.
                            for (int left_out = bug; left_out <= 4 * bug; left_out++) {
                              error = launch("test_readers", 1, 160, 0, seed, out, left_out);
                              if (bug && error.empty()) return "warp " + std::to_string(left_out) + " is forgotten";
                            }
                            if (!error.empty()) return error;
                            return same<float>("out", 1, [&](size_t i) { return out[i]; }, [](size_t) { return 1.0f; });
                          },
                          {{1, RACE, "without ordering"}}}};

static const Add vectors{{"vectors",
                          [](u32 seed, int bug) {
                            int n = 33;
                            Buffer<float> out(4 * 33), in(random_numbers(4 * 34));
                            std::string error = launch("test_vectors", 2, 32, 0, seed, out, in, n, bug);
                            if (!error.empty()) return error;
                            return same<float>("out", 4 * 33, [&](size_t i) { return out[i]; }, [&](size_t i) { return in[i]; });
                          },
                          {{1, ASAN, "misaligned address"}}}};

static const Add blocks{{"blocks",
                         [](u32 seed, int bug) {
                           Buffer<int> out(4 * 32);
                           std::string error = launch("test_blocks", 4, 32, 0, seed, out, bug);
                           if (!error.empty()) return error;
                           return same<int>(
                               "out", 128, [&](size_t i) { return out[i]; },
                               [](size_t i) { return i % 32 == 28 || i % 32 == 29 ? -1 : static_cast<int>(i); });
                         },
                         {{1, RACE, "blocks"}, {2, RACE, "blocks"}, {3, RACE, "without ordering"}}}};

// Two files with helpers of equal names: each kernel runs its own file's, as with nvcc.
static std::string twins(const char* kernel, u32 seed, float (*want)(float)) {
  int n = 33;
  Buffer<float> out(33);
  std::string error = launch(kernel, 2, 32, 0, seed, out, n);
  if (!error.empty()) return error;
  return same<float>("out", 33, [&](size_t i) { return out[i]; }, [&](size_t i) { return want(static_cast<float>(i)); });
}
static const Add twin_files{{"helpers of equal names in two files",
                             [](u32 seed, int) {
                               std::string error = twins("test_twins_one", seed, [](float i) { return 2 * (i + 1); });
                               return error.empty() ? twins("test_twins_two", seed, [](float i) { return i + 98; }) : error;
                             },
                             {}}};

// Many blocks on four threads of the operating system, and several launches at once: the same bits; and the message of
// the first block that fails.
static const Add threads{
    {"operating system threads",
     [](u32 seed, int) -> std::string {
       auto set_threads = function<void(unsigned)>("sim_set_threads");
       set_threads(4);
       int rows = 61, cols = 200, fine = 0, bug = 5;
       Buffer<float> x(random_numbers(61 * 200)), first(61);
       std::string error = launch("test_row_sums", 31, 256, 0, seed, first, x, rows, cols, fine);
       std::vector<Buffer<float>> sums(3, Buffer<float>(61));
       for (auto& s : sums) s.pointer = s.data.data(), watch(s.pointer, 61 * sizeof(float));
       std::string errors[3];
       std::vector<std::thread> at_once;
       for (size_t i = 0; i < 3; i++)
         at_once.emplace_back([&, i] { errors[i] = launch("test_row_sums", 31, 256, 0, seed, sums[i], x, rows, cols, fine); });
       for (auto& t : at_once) t.join();
       for (size_t i = 0; i < 3 && error.empty(); i++) {
         error = errors[i];
         if (error.empty())
           error = same<float>("sums", 61, [&](size_t r) { return sums[i][r]; }, [&](size_t r) { return first[r]; });
       }
       const std::string said = launch("test_row_sums", 31, 256, 0, 0, first, x, rows, cols, bug);
       set_threads(2);
       if (error.empty() && said.find("[block 0,0,0") == std::string::npos) return "not the first block's message: " + said;
       return error;
     },
     {}}};

static const Add limits{
    {"limits of launches and tensor maps",
     [](u32 seed, int) -> std::string {
       Buffer<int> out(32);
       int bug = 0;
       if (launch("test_blocks", 1, 2048, 0, seed, out, bug).find("1024") == std::string::npos) return "2048 threads";
       if (launch("test_blocks", 1, 32, 300000, seed, out, bug).find("227 KB") == std::string::npos) return "300000 bytes";
       if (!launch("test_bounded", 1, 64, 0, seed, out).empty()) return "64 threads of 64";
       if (launch("test_bounded", 1, 96, 0, seed, out).find("__launch_bounds__ are 64") == std::string::npos) return "96 threads of 64";
       if (function<int()>("sim_kernel_count")() < 10) return "kernels are not listed";
       bool listed = false;
       for (int i = 0; i < function<int()>("sim_kernel_count")(); i++)
         listed |= !strcmp(function<const char*(int)>("sim_kernel_name")(i), "test_blocks");
       if (!listed) return "test_blocks is not listed";
       auto encode = function<decltype(sim_tensor_map)>("sim_tensor_map");
       alignas(64) static char base[64];
       Map m;
       struct {
         int want;
         const char* start;
         u32 elem;
         u64 rows, cols, pitch;
         u32 box_rows, box_cols, swizzle;
       } maps[] = {
           {0, base, 2, 100, 64, 128, 64, 64, 128},   {0, base, 4, 1, 1, 16, 256, 32, 128},
           {0, base, 2, 10, 8, 16, 8, 256, 0},        {1, base + 2, 2, 100, 64, 128, 64, 64, 128},  // the start
           {1, base, 2, 100, 65, 130, 64, 64, 128},                                                 // the pitch
           {1, base, 2, 100, 64, 128, 257, 64, 128},  {1, base, 2, 100, 64, 128, 0, 64, 128},
           {1, base, 2, 100, 128, 256, 64, 128, 128},  // a row of the box beyond the swizzle
           {1, base, 2, 100, 64, 128, 64, 4, 0},       // a row of the box of 8 bytes
           {1, base, 2, 0, 64, 128, 64, 64, 128},
       };
       for (auto& t : maps)
         if (encode(m.bytes, t.start, t.elem, t.rows, t.cols, t.pitch, t.box_rows, t.box_cols, t.swizzle) != t.want)
           return "map " + std::to_string(&t - maps);
       auto encode_4d = function<decltype(sim_tensor_map_4d)>("sim_tensor_map_4d");
       const u64 sizes[] = {64, 7, 7, 3}, pitches[] = {128, 896, 6272}, odd_pitches[] = {128, 904, 6272};
       const u32 box[] = {64, 8, 6, 2}, wide[] = {64, 257, 6, 2}, next[] = {1, 1, 1, 1}, other[] = {1, 2, 2, 1}, far[] = {1, 9, 1, 1}, inner[] = {2, 1, 1, 1};
       struct {
         int want;
         const u64* pitch;
         const u32 *box, *apart;
       } maps_4d[] = {{0, pitches, box, next}, {0, pitches, box, other}, {1, odd_pitches, box, next}, {1, pitches, wide, next}, {1, pitches, box, far}, {1, pitches, box, inner}};
       for (auto& t : maps_4d)
         if (encode_4d(m.bytes, base, 2, sizes, t.pitch, t.box, t.apart, 128) != t.want) return "map of four axes " + std::to_string(&t - maps_4d);
       return "";
     },
     {}}};
