// The schedule of the one-kernel network, without running it: every tile is computed once, no block waits for ever, and
// of any two tiles that touch the same memory, one of them writing, one is known to come first.
#include "schedule.h"

#include <algorithm>
#include <map>

#include "check.h"
#include "product.cuh"

namespace hydravit::cuda::tests {

namespace {

struct Access {
  const void* buffer;
  Range rows, columns;
  bool write;
};

// What a tile reads and writes of the activations, as the kernels do (attention.cuh, product.cuh).
std::vector<Access> accesses(const Step& s, int tile) {
  if (s.is_attention) {
    const Attention& a = s.attention;
    const int image = tile / (a.heads * a.blocks), head = tile / a.blocks % a.heads;
    const int first = (a.first_block + tile % a.blocks) * 16 * a.query_tiles;
    const int end = std::min(first + 16 * a.query_tiles, a.image_rows), start = image * a.image_rows;
    const auto columns = [&](int panel) { return Range{panel * kPanel, (panel + 1) * kPanel}; };
    const int out = image * a.out_image_rows - a.first_query;
    return {{a.qkv, {start + first, start + end}, columns(head), false},
            {a.qkv, {start, start + a.image_rows}, columns(a.heads + head), false},
            {a.qkv, {start, start + a.image_rows}, columns(2 * a.heads + head), false},
            {a.out, {out + std::max(first, a.first_query), out + std::min(end, a.last_query)}, columns(head), true}};
  }
  const Product& p = s.product;
  const ShapeSize size = size_of(s.shape);
  if (!is_wanted(p, tile, size)) return {};
  const Corner corner = corner_of(p, tile, size);
  const bool padded = p.sink == Sink::kPanels || p.sink == Sink::kGelu;
  const Range rows{corner.row, padded ? corner.row + size.rows : std::min(corner.row + size.rows, p.rows)};
  const Range columns{corner.column, std::min(corner.column + size.columns, p.columns)};
  std::vector<Access> result{{p.c, rows, columns, true}};
  if (p.source != Source::kPatches) result.push_back({p.a, rows_read(s, tile), {0, p.depth}, false});
  if (p.sink == Sink::kResidual)
    for (int row = rows.begin; row < rows.end; row++) {
      if (row % p.image_rows >= p.image_tokens) continue;
      const int from = row / p.image_rows * p.residual_image_rows + p.residual_first + row % p.image_rows;
      result.push_back({p.residual, {from, from + 1}, columns, false});
    }
  return result;
}

struct Place {  // of a tile: the block that computes it, as its number `turn`
  int block, turn;
};

// For every block, how many of its tiles are known to be done.
using Clock = std::vector<int>;
bool is_before(const Place& place, const Clock& clock) { return clock[place.block] > place.turn; }

struct Cell {
  std::vector<Place> writers, readers;  // since the last write; at most one writer
};

class Simulation {
 public:
  explicit Simulation(const Schedule& schedule) : schedule_(schedule), arrivals_(schedule.counters) {
    for (int block = 0; block < schedule.blocks; block++) clocks_.emplace_back(schedule.blocks);
    seen_by_.assign(schedule.counters, Clock(schedule.blocks));
  }

  // "" or what is wrong.
  std::string run() {
    std::vector<std::vector<std::pair<int, int>>> work(schedule_.blocks);  // (step, tile)
    for (size_t i = 0; i < schedule_.steps.size(); i++) {
      const Step& step = schedule_.steps[i];
      std::vector<int> times(step.tiles);
      for (int block = 0; block < schedule_.blocks; block++)
        for (int tile = (block - step.first_block + schedule_.blocks) % schedule_.blocks; tile < step.tiles;
             tile += schedule_.blocks) {
          work[block].push_back({static_cast<int>(i), tile});
          times[tile]++;
        }
      if (std::count(times.begin(), times.end(), 1) != step.tiles) return "a tile is not computed once";
    }
    std::vector<size_t> next(schedule_.blocks);
    for (bool any = true; any;) {
      any = false;
      for (int block = 0; block < schedule_.blocks; block++)
        for (; next[block] < work[block].size(); next[block]++) {
          const auto [step, tile] = work[block][next[block]];
          if (!can_begin(schedule_.steps[step], tile)) break;
          if (const std::string wrong = compute(step, tile, {block, static_cast<int>(next[block])}); !wrong.empty())
            return wrong;
          any = true;
        }
    }
    for (int block = 0; block < schedule_.blocks; block++)
      if (next[block] < work[block].size()) return "a block waits for ever";
    for (const Step& step : schedule_.steps)
      for (int group = 0; group < groups_of(step); group++)
        if (arrivals_[step.counter + group] != step.expected) return "a counter is not what is expected";
    return "";
  }

 private:
  bool can_begin(const Step& step, int tile) const {
    if (step.input < 0) return true;
    const Step& input = schedule_.steps[step.input];
    const Range groups = groups_read(step, input, tile);
    for (int group = groups.begin; group < groups.end; group++)
      if (arrivals_[input.counter + group] < input.expected) return false;
    return true;
  }

  std::string compute(int index, int tile, const Place& place) {
    const Step& step = schedule_.steps[index];
    Clock& clock = clocks_[place.block];
    const auto join = [&](Clock& clock, const Clock& other) {
      for (size_t i = 0; i < clock.size(); i++) clock[i] = std::max(clock[i], other[i]);
    };
    if (step.input >= 0) {
      const Step& input = schedule_.steps[step.input];
      const Range groups = groups_read(step, input, tile);
      for (int group = groups.begin; group < groups.end; group++) join(clock, seen_by_[input.counter + group]);
    }
    for (const Access& access : accesses(step, tile))
      if (!touch(access, place, clock))
        return "step " + std::to_string(index) + ", tile " + std::to_string(tile) + " races";
    clock[place.block] = place.turn + 1;
    const int counter = step.counter + group_of_tile(step, tile);
    join(seen_by_[counter], clock);
    arrivals_[counter]++;
    return "";
  }

  bool touch(const Access& access, const Place& place, const Clock& clock) {
    constexpr int kUnit = 32;  // columns: every tile's begin and end are multiples
    const auto all_before = [&](const std::vector<Place>& places) {
      return std::all_of(places.begin(), places.end(),
                         [&](const Place& p) { return p.block == place.block || is_before(p, clock); });
    };
    auto& rows = cells_[access.buffer];
    if (static_cast<int>(rows.size()) < access.rows.end) rows.resize(access.rows.end);
    for (int row = access.rows.begin; row < access.rows.end; row++) {
      if (static_cast<int>(rows[row].size()) * kUnit < access.columns.end) rows[row].resize(access.columns.end / kUnit);
      for (int column = access.columns.begin / kUnit; column < access.columns.end / kUnit; column++) {
        Cell& cell = rows[row][column];
        if (!all_before(cell.writers)) return false;
        if (access.write) {
          if (!all_before(cell.readers)) return false;
          cell.writers = {place};
          cell.readers.clear();
        } else {
          std::erase_if(cell.readers, [&](const Place& p) { return p.block == place.block; });
          cell.readers.push_back(place);
        }
      }
    }
    return true;
  }

  const Schedule& schedule_;
  std::vector<int> arrivals_;
  std::vector<Clock> clocks_, seen_by_;
  std::map<const void*, std::vector<std::vector<Cell>>> cells_;
};

Width prefix(const Model& m, int heads) {
  Width w{0, heads * kHeadDim, {}, {}, 0, m.classes, 1e-6f};
  w.attention.assign(m.depth, {0, m.embed, 2 * m.embed, 0, heads, 0.125f});
  w.mlp.assign(m.depth, {0, 4 * heads * kHeadDim});
  return w;
}

Schedule schedule_of(const Model& model, const Width& width, int images, int processors, Dtype weights = Dtype::kBf16) {
  const Layout layout(model, weights);
  const Workspace workspace(model, images);
  const Device device{processors, 232448, Loader::kBulk, 0, true};
  uint8_t* const nowhere = nullptr;
  const Call call{nowhere + (int64_t{1} << 40), nowhere + (int64_t{1} << 41), images, true, true};
  std::vector<Phase> phases = plan(model, layout, width, workspace, device, call);
  Ends{nowhere + 16, Dtype::kFp32, reinterpret_cast<float*>(nowhere + (int64_t{1} << 42))}.set(phases);
  return schedule(phases, device);
}

}  // namespace

void test_schedules() {
  // ViT-B/16 but for its depth: from the third block on everything repeats.
  const Model base{4, 768, 3072, 1000, 3, 14, 14, 16, 16, 1, 0, true, 0, 1};
  Model average = base;
  average.first_pooled = 1, average.last_pooled = 197;
  for (int heads = 1; heads <= 12; heads++)
    for (const int processors : {1, 7, 108, 114, 132}) {
      begin("schedule of " + std::to_string(heads) + " heads on " + std::to_string(processors) + " processors");
      const int images = heads % 3 + 1;
      for (const auto& [model, weights] :
           {std::pair{base, Dtype::kBf16}, {average, Dtype::kBf16}, {base, Dtype::kE4m3}}) {
        const Schedule schedule = schedule_of(model, prefix(model, heads), images, processors, weights);
        expect(schedule.shared_bytes <= 232448, "it fits");
        const std::string wrong = Simulation(schedule).run();
        expect(wrong.empty(), wrong);
      }
    }

  begin("schedule with skipped branches");
  Width skipping = prefix(base, 3);
  skipping.attention[0].heads = skipping.attention[3].heads = 0;
  skipping.mlp[1].hidden = 0;
  expect(Simulation(schedule_of(base, skipping, 2, 132)).run().empty(), "no race");

  // What the simulation is worth: it finds each of these.
  const Schedule right = schedule_of(base, prefix(base, 3), 2, 132);
  for (size_t i = 1; i < right.steps.size(); i++) {
    begin("schedule whose step " + std::to_string(i) + " waits for nothing");
    Schedule wrong = right;
    wrong.steps[i].input = -1;
    expect(!Simulation(wrong).run().empty(), "found");
  }
  begin("schedule with one buffer for queries, keys and values");
  Schedule wrong = right;
  const void* qkv = nullptr;
  for (size_t i = 0; i < wrong.steps.size(); i++) {
    if (!wrong.steps[i].is_attention) continue;
    if (qkv == nullptr) qkv = wrong.steps[i].attention.qkv;
    wrong.steps[i].attention.qkv = qkv;
    wrong.steps[i - 1].product.c = const_cast<void*>(qkv);
  }
  expect(!Simulation(wrong).run().empty(), "found");
  begin("schedule that expects more than comes");
  wrong = right;
  wrong.steps[3].expected++;
  expect(Simulation(wrong).run() == "a block waits for ever", "found");
}

}  // namespace hydravit::cuda::tests
