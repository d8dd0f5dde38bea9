// Winograd's F(2x2, 3x3) of pictures with their channels last: what its products read, and what
// comes of them. A tile is 4x4 pixels that make 2x2; neighbours share half of theirs.
#include "kernels.h"
#include "vec.h"

namespace SORA_ISA {

void winograd_split(const sora::WinogradArgs& a, int64_t begin, int64_t end) {
  const int64_t n = a.channels, line = a.width * n;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t frame = task / a.rows, row = task % a.rows;
    const int64_t top = 2 * (a.first + row) - 1;
    const float* x = a.x + frame * a.height * line;
    float* v = a.tiles + task * a.across * 16 * n;
    for (int64_t column = 0; column < a.across; ++column, v += 16 * n) {
      const int64_t left = 2 * column - 1;
      for (int64_t i = 0; i < n; i += kLanes) {
        Vec d[4][4];
        for (int64_t r = 0; r < 4; ++r) {
          const bool inside = top + r >= 0 && top + r < a.height;
          for (int64_t c = 0; c < 4; ++c) {
            const bool there = inside && left + c >= 0 && left + c < a.width;
            d[r][c] = there ? load(floats(x + (top + r) * line + (left + c) * n + i), n - i) : Vec{};
          }
        }
        Vec e[4][4];
        for (int c = 0; c < 4; ++c) {
          e[0][c] = d[0][c] - d[2][c];
          e[1][c] = d[1][c] + d[2][c];
          e[2][c] = d[2][c] - d[1][c];
          e[3][c] = d[1][c] - d[3][c];
        }
        for (int r = 0; r < 4; ++r) {
          const auto put_at = [&](int c, Vec value) {
            store((Float*)(v + (4 * r + c) * n + i), value, n - i);
          };
          put_at(0, e[r][0] - e[r][2]);
          put_at(1, e[r][1] + e[r][2]);
          put_at(2, e[r][2] - e[r][1]);
          put_at(3, e[r][1] - e[r][3]);
        }
      }
    }
  }
}

void winograd_join(const sora::WinogradArgs& a, int64_t begin, int64_t end) {
  const int64_t n = a.channels, line = a.width * n;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t frame = task / a.rows, row = task % a.rows;
    const int64_t top = 2 * (a.first + row);
    const int64_t high = a.height - top < 2 ? a.height - top : 2;
    for (int64_t column = 0; column < a.across; ++column) {
      const float* from = a.tiles + (task * a.across + column) * 16 * n;
      const int64_t left = 2 * column;
      const int64_t wide = a.width - left < 2 ? a.width - left : 2;
      const int64_t at = frame * a.height * line + top * line + left * n;
      for (int64_t i = 0; i < n; i += kLanes) {
        Vec e[2][4];
        for (int c = 0; c < 4; ++c) {
          const auto m = [&](int r) { return load(floats(from + (4 * r + c) * n + i), n - i); };
          const Vec second = m(1), third = m(2);
          e[0][c] = m(0) + second + third;
          e[1][c] = second - third - m(3);
        }
        const Vec bias = a.bias ? load(floats(a.bias + i), n - i) : Vec{};
        for (int64_t r = 0; r < high; ++r) {
          const Vec y[2] = {e[r][0] + e[r][1] + e[r][2] + bias, e[r][1] - e[r][2] - e[r][3] + bias};
          for (int64_t c = 0; c < wide; ++c) {
            const int64_t to = at + r * line + c * n + i;
            const Vec beside = a.beside ? load(floats(a.beside + to), n - i) : Vec{};
            store((Float*)(a.y + to), y[c] + beside, n - i);
          }
        }
      }
    }
  }
}

}  // namespace SORA_ISA
