// The probe of an .onnx file of lora-fx: read it, draw its inputs, and judge
// what a runtime computed. docs/probe.md has the format and the rules.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

namespace probe {

/// Keeps the order of names.
using Json = nlohmann::ordered_json;
using Numbers = std::vector<double>;
/// Lists of numbers by name, in order.
using Named = std::vector<std::pair<std::string, Numbers>>;

constexpr size_t kMostBytes = 65536;
constexpr size_t kMostPoints = 64;
constexpr size_t kMostGroups = 16;
constexpr size_t kMostAxes = 64;
/// The fewest points that an adapter has to move for a scale to be told.
constexpr int kFewestMoved = 8;
/// The most elements of all inputs together.
constexpr double kMostElements = 1 << 25;
/// Larger whole numbers are not exact in every language's JSON.
constexpr double kLargestWhole = 9007199254740992.0;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// The modes of files that can be run.
inline const std::set<std::string> kModes = {"merged", "switch", "load",
                                             "batch"};
inline const std::set<std::string> kFloats = {"bfloat16", "float16", "float32",
                                              "float64"};
inline const std::map<std::string, std::pair<double, double>> kRanges = {
    {"bool", {0, 1}},
    {"int8", {-128, 127}},
    {"uint8", {0, 255}},
    {"int16", {-32768, 32767}},
    {"uint16", {0, 65535}},
    {"int32", {-2147483648.0, 2147483647.0}},
    {"uint32", {0, 4294967295.0}},
    {"int64", {-kLargestWhole, kLargestWhole}},
    {"uint64", {0, kLargestWhole}},
};

/// The file has no probe, a damaged one, or cannot be run.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void ensure(bool condition, const std::string &message) {
  if (!condition)
    throw Error("the probe is damaged: " + message);
}

/// JSON in ASCII, so that no name changes a terminal.
inline std::string escaped(const Json &json) {
  return json.dump(-1, ' ', true, Json::error_handler_t::replace);
}

// The object

inline bool is_number(const Json &value) {
  return value.is_number() && std::isfinite(value.get<double>());
}

/// Whether a value is a whole number in a range; 2.0 is one.
inline bool is_whole(const Json &value, double low, double high) {
  if (!is_number(value))
    return false;
  const double number = value.get<double>();
  return low <= number && number <= high && number == std::floor(number);
}

/// A field of an object; null where it is absent.
inline const Json &field(const Json &object, const std::string &name) {
  static const Json absent;
  const auto found = object.find(name);
  return found == object.end() ? absent : *found;
}

/// A field that is a text; empty for another kind.
inline std::string text_of(const Json &object, const std::string &name) {
  const Json &value = field(object, name);
  return value.is_string() ? value.get<std::string>() : "";
}

inline Numbers numbers_of(const Json &list) { return list.get<Numbers>(); }

/// The number of elements of a shape.
inline double checked_size(const Json &shape, const std::string &what) {
  ensure(shape.is_array() && shape.size() <= kMostAxes, "the shape of " + what);
  double count = 1;
  bool is_empty = false;
  for (const Json &size : shape) {
    ensure(is_whole(size, 0, kLargestWhole), "the shape of " + what);
    is_empty = is_empty || size.get<double>() == 0;
    count *= size.get<double>();
  }
  return is_empty ? 0 : count;
}

inline void check_elements(const std::string &what, const Json &described,
                           double count) {
  const std::string dtype = text_of(described, "dtype");
  const bool is_float = kFloats.count(dtype) > 0;
  if (described.contains("drawn")) {
    ensure(is_float, what + " of dtype " + dtype + " is drawn");
    ensure(is_whole(field(described, "drawn"), 0, 4294967295.0),
           "the seed of " + what);
    return;
  }
  const bool is_listed = described.contains("values");
  const Json elements = is_listed ? field(described, "values")
                                  : Json::array({field(described, "fill")});
  ensure(elements.is_array(), "the values of " + what + " are no list");
  ensure(static_cast<double>(elements.size()) == (is_listed ? count : 1),
         what + " has " + std::to_string(elements.size()) + " values");
  for (const Json &element : elements) {
    bool fits = is_number(element);
    if (!is_float) {
      const auto [low, high] = kRanges.at(dtype);
      fits = is_whole(element, low, high);
    }
    ensure(fits, "an element of " + what + " is no " + dtype);
  }
}

inline void check_inputs(const Json &inputs) {
  double total = 0;
  for (const auto &[name, described] : inputs.items()) {
    const std::string what = "input " + name;
    ensure(described.is_object(), what + " is no object");
    const std::string dtype = text_of(described, "dtype");
    if (!kRanges.count(dtype) && !kFloats.count(dtype))
      throw Error(what + ": this program makes no tensors of dtype " + dtype);
    const double count = checked_size(field(described, "shape"), what);
    total += count;
    ensure(total <= kMostElements,
           "inputs of more than " +
               std::to_string(static_cast<int>(kMostElements)) + " elements");
    const int contents = described.contains("values") +
                         described.contains("fill") +
                         described.contains("drawn");
    ensure(contents == 1, what + " has not one of values, fill and drawn");
    check_elements(what, described, count);
  }
}

inline void check_outputs(const Json &outputs) {
  for (const auto &[name, described] : outputs.items()) {
    const std::string what = "output " + name;
    ensure(described.is_object(), what + " is no object");
    checked_size(field(described, "shape"), what);
    for (const char *key : {"largest", "tolerance"}) {
      const Json &number = field(described, key);
      ensure(is_number(number) && number.get<double>() > 0,
             std::string(key) + " of " + what + " is not above 0");
    }
    const double smallest = described["largest"].get<double>() *
                            described["tolerance"].get<double>();
    ensure(smallest > 0, "the tolerance of " + what + " is too small");
  }
}

inline void check_points(const Json &points, const Json &outputs) {
  ensure(points.is_array() && !points.empty() && points.size() <= kMostPoints,
         "1 to " + std::to_string(kMostPoints) + " points");
  for (const Json &point : points) {
    ensure(point.is_array() && point.size() == 2, "a point is no pair");
    ensure(point[0].is_string() && outputs.contains(point[0]),
           "a point is in no output");
    const std::string name = point[0];
    const double size = checked_size(outputs[name]["shape"], "output " + name);
    ensure(is_whole(point[1], 0, size - 1),
           "a point lies outside of output " + name);
  }
}

inline void check_values(const Json &values, size_t points,
                         const std::string &what) {
  ensure(values.is_array() && values.size() == points,
         what + ": not " + std::to_string(points) + " values");
  ensure(std::all_of(values.begin(), values.end(), is_number),
         what + ": a value is no number");
}

inline void check_file(const std::string &name, const std::string &what) {
  const std::string separators("/\\:\0", 4);
  ensure(!name.empty() && name != "." && name != "..", what);
  ensure(name.find_first_of(separators) == std::string::npos,
         what + " does not lie beside the model");
}

inline void check_adapter(const std::string &name, Json &adapter,
                          const std::string &mode, size_t points) {
  const std::string what = "adapter " + name;
  ensure(adapter.is_object(), what + " is no object");
  check_values(field(adapter, "values"), points, what);
  for (const char *key : {"half", "double"})
    if (adapter.contains(key))
      check_values(adapter[key], points, std::string(key) + " of " + what);
  if (!adapter.contains("groups"))
    adapter["groups"] = Json::object();
  const Json &groups = adapter["groups"];
  ensure(groups.is_object(), "the groups of " + what + " are no object");
  ensure(groups.size() <= kMostGroups,
         what + " has more than " + std::to_string(kMostGroups) + " groups");
  for (const auto &[group, values] : groups.items())
    check_values(values, points, "group " + group + " of " + what);
  if (mode == "batch")
    ensure(is_whole(field(adapter, "id"), 1, kLargestWhole),
           "the id of " + what);
  if (mode == "switch" || mode == "load") {
    check_file(text_of(adapter, "file"), "the file of " + what);
  }
}

inline void check_probe(Json &probe) {
  const Json &version = field(probe, "format");
  ensure(is_whole(version, 0, kLargestWhole), "format is no whole number");
  if (version.get<double>() != 1)
    throw Error("the probe has format " + version.dump() +
                "; this program reads format 1");
  const std::string mode = text_of(probe, "mode");
  if (!kModes.count(mode))
    throw Error("the probe has mode " + mode +
                "; this program reads merged, switch, load, batch");
  for (const char *key : {"inputs", "outputs", "adapters"})
    ensure(field(probe, key).is_object(), std::string(key) + " is no object");
  check_inputs(probe["inputs"]);
  check_outputs(probe["outputs"]);
  check_points(field(probe, "points"), probe["outputs"]);

  const size_t points = probe["points"].size();
  Json &adapters = probe["adapters"];
  if (probe.contains("base"))
    check_values(probe["base"], points, "base");
  if (probe.contains("base_file"))
    check_file(text_of(probe, "base_file"), "base_file");
  for (auto &[name, adapter] : adapters.items())
    check_adapter(name, adapter, mode, points);
  ensure(mode != "merged" || adapters.size() <= 1,
         "a merged file has one adapter at most");
  ensure(probe.contains("base") || !adapters.empty(), "it has no values");

  if (!probe.contains("precisions"))
    probe["precisions"] = Json::object();
  ensure(probe["precisions"].is_object(), "precisions is no object");
  for (const auto &[name, level] : probe["precisions"].items())
    ensure(is_number(level) && level.get<double>() > 0,
           "precision " + name + " is not above 0");
}

/// Parse and check the text of a probe.
inline Json read_probe(const std::string &text) {
  if (text.size() > kMostBytes)
    throw Error("the probe has " + std::to_string(text.size()) +
                " bytes; at most " + std::to_string(kMostBytes) + " are read");
  Json probe;
  try {
    probe = Json::parse(text);
  } catch (const Json::exception &) {
    throw Error("the probe is damaged: it is no JSON");
  }
  ensure(probe.is_object(), "it is no object");
  check_probe(probe);
  return probe;
}

/// Element i of a seed.
inline double drawn(uint32_t i, uint32_t seed) {
  uint32_t x = (i + 1) * 0x9E3779B1u + seed * 0x85EBCA6Bu;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  x = x ^ (x >> 16);
  return (static_cast<double>(x >> 20) - 2048) / 1024;
}

// The verdict

/// How lists of numbers at the points are compared.
struct Gauge {
  Numbers largest, tolerance;
  double largest_tolerance = 0;
  /// The smallest number first.
  std::vector<std::pair<double, std::string>> precisions;

  explicit Gauge(const Json &probe) {
    for (const Json &point : probe["points"]) {
      const Json &output = probe["outputs"][point[0].get<std::string>()];
      largest.push_back(output["largest"]);
      tolerance.push_back(output["tolerance"]);
    }
    for (const Json &output : probe["outputs"])
      largest_tolerance =
          std::max(largest_tolerance, output["tolerance"].get<double>());
    for (const auto &[name, level] : probe["precisions"].items())
      precisions.emplace_back(level.get<double>(), name);
    const auto is_less = [](const auto &one, const auto &other) {
      return one.first < other.first;
    };
    std::stable_sort(precisions.begin(), precisions.end(), is_less);
  }

  double distance(const Numbers &one, const Numbers &other) const {
    double most = 0;
    for (size_t i = 0; i < one.size(); ++i) {
      const double ratio = std::abs(one[i] - other[i]) / largest[i];
      if (std::isnan(ratio)) // numbers of a file may be so large
        return kInfinity;
      most = std::max(most, ratio);
    }
    return most;
  }

  /// How many points lie apart by more than their tolerance.
  int moved(const Numbers &one, const Numbers &other) const {
    int count = 0;
    for (size_t i = 0; i < one.size(); ++i)
      count += std::abs(one[i] - other[i]) > largest[i] * tolerance[i];
    return count;
  }

  double excess(const Numbers &one, const Numbers &other) const {
    double most = 0;
    for (size_t i = 0; i < one.size(); ++i) {
      const double allowed = largest[i] * tolerance[i];
      most = std::max(most, std::abs(one[i] - other[i]) / allowed);
    }
    return most;
  }
};

inline bool all_finite(const Numbers &numbers) {
  return std::all_of(numbers.begin(), numbers.end(),
                     [](double number) { return std::isfinite(number); });
}

/// Whether a verdict is `right`, in any precision if that is enough.
inline bool is_right(const std::string &answer, bool any_precision) {
  return answer == "right" ||
         (any_precision && answer.rfind("right in ", 0) == 0);
}

/// The names of the causes whose list matches, joined; empty for none.
inline std::string matching(const Named &causes,
                            const std::function<bool(const Numbers &)> &test) {
  std::string names;
  for (const auto &[name, values] : causes)
    if (test(values))
      names += (names.empty() ? "" : " or ") + name;
  return names;
}

/// The verdict on a scale, which is given in hundredths.
inline std::string scaled_by(int hundredths) {
  std::ostringstream text;
  text << "scaled by " << hundredths / 100.0;
  return text.str();
}

/// The verdict by rules 1 to 5, and `differs` where these have none. A
/// precision is not told unless the effect is above four times its level.
inline std::string verdict(const Numbers &found, const Numbers &expected,
                           const Named &causes, const Gauge &gauge,
                           double effect, int near_one = 0) {
  if (!all_finite(found))
    return "not finite";
  if (gauge.excess(found, expected) <= 1)
    return "right";
  const std::string names = matching(causes, [&](const Numbers &values) {
    return gauge.excess(found, values) <= 1;
  });
  if (!names.empty())
    return names;
  if (near_one)
    return scaled_by(near_one);
  for (const auto &row : gauge.precisions) {
    const double level = row.first;
    const std::string &precision = row.second;
    if (effect <= 4 * level)
      continue;
    if (gauge.distance(found, expected) <= level)
      return "right in " + precision;
    const std::string near = matching(causes, [&](const Numbers &values) {
      return gauge.distance(found, values) <= level;
    });
    if (!near.empty())
      return near + " in " + precision;
  }
  return "differs";
}

/// The scale within 0.1 of 1 that explains the numbers, in hundredths, by rule
/// 4; 0 where none does.
inline int hundredths_near_one(const Numbers &found, const Numbers &base,
                               const Numbers &values, const Gauge &gauge) {
  if (gauge.moved(values, base) < kFewestMoved || !all_finite(found))
    return 0;
  Numbers effect, difference;
  double along = 0, square = 0, most = 0, left = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    effect.push_back((values[i] - base[i]) / gauge.largest[i]);
    difference.push_back((found[i] - values[i]) / gauge.largest[i]);
    along += difference[i] * effect[i];
    square += effect[i] * effect[i];
  }
  const double share = along / square;
  if (!(std::abs(share) <= 0.1))
    return 0;
  for (size_t i = 0; i < found.size(); ++i) {
    most = std::max(most, std::abs(difference[i]));
    left = std::max(left, std::abs(difference[i] - share * effect[i]));
  }
  const int hundredths = static_cast<int>(std::floor(100 * (1 + share) + 0.5));
  return left <= most / 8 && hundredths != 100 ? hundredths : 0;
}

/// The scale of the adapter that explains the numbers, in hundredths, by rule
/// 6; 0 where none does. 0.9 and 1.1 have no exact distance of 0.1 to 1.
inline int fitted_hundredths(const Numbers &found, const Numbers &base,
                             const Json &adapter, const Gauge &gauge) {
  const Numbers half = numbers_of(adapter["half"]);
  const Numbers values = numbers_of(adapter["values"]);
  const Numbers twice = numbers_of(adapter["double"]);
  if (gauge.moved(values, base) < kFewestMoved)
    return 0;
  int nearest = 0;
  double least = kInfinity;
  for (int hundredths = 10; hundredths <= 300; ++hundredths) {
    const double s = hundredths / 100.0;
    Numbers cubic;
    for (size_t i = 0; i < base.size(); ++i)
      cubic.push_back(-(s - 0.5) * (s - 1) * (s - 2) * base[i] +
                      s * (s - 1) * (s - 2) / 0.375 * half[i] -
                      2 * s * (s - 0.5) * (s - 2) * values[i] +
                      s * (s - 0.5) * (s - 1) / 3 * twice[i]);
    const double distance = gauge.distance(found, cubic);
    if (distance < least) {
      nearest = hundredths;
      least = distance;
    }
  }
  const bool explains = least <= 0.02 * gauge.distance(values, base);
  const bool is_better = least <= gauge.distance(found, values) / 8;
  return explains && is_better && std::abs(nearest - 100) > 10 ? nearest : 0;
}

inline std::string verdict_on_adapter(const Numbers &found,
                                      const std::string &name,
                                      const Json &probe) {
  const Json &adapter = probe["adapters"][name];
  const bool has_base = probe.contains("base");
  const Numbers base = has_base ? numbers_of(probe["base"]) : Numbers();
  Named causes;
  if (has_base)
    causes.emplace_back("no effect", base);
  for (const auto &[other, fields] : probe["adapters"].items())
    if (other != name)
      causes.emplace_back("adapter " + other, numbers_of(fields["values"]));
  for (const auto &[group, values] : adapter["groups"].items())
    causes.emplace_back("without " + group, numbers_of(values));
  if (adapter.contains("half"))
    causes.emplace_back("scaled by 0.5", numbers_of(adapter["half"]));
  if (adapter.contains("double"))
    causes.emplace_back("scaled by 2", numbers_of(adapter["double"]));

  const Gauge gauge(probe);
  const Numbers expected = numbers_of(adapter["values"]);
  const double effect = has_base ? gauge.distance(expected, base) : kInfinity;
  const int near_one =
      has_base ? hundredths_near_one(found, base, expected, gauge) : 0;
  const std::string answer =
      verdict(found, expected, causes, gauge, effect, near_one);
  if (answer == "right" && effect <= 2 * gauge.largest_tolerance)
    return "too small to tell";
  const bool has_scales =
      has_base && adapter.contains("half") && adapter.contains("double");
  if (answer != "differs" || !has_scales)
    return answer;
  const int hundredths = fitted_hundredths(found, base, adapter, gauge);
  if (!hundredths)
    return answer;
  return scaled_by(hundredths);
}

/// The numbers at the points.
struct Runs {
  /// Nothing where the base was not run.
  std::optional<Numbers> base;
  Named adapters;
  /// In mode batch, for an id that no adapter has; nothing where the runtime
  /// refuses it.
  std::optional<Numbers> beyond_ids;
};

/// The verdicts on the base, on each adapter, and in mode batch on the ids.
inline Json verdicts(const Json &probe, const Runs &runs) {
  Json result = Json::object();
  bool base_is_right = true;
  if (runs.base && probe.contains("base")) {
    Named causes;
    for (const auto &[name, adapter] : probe["adapters"].items())
      causes.emplace_back("adapter " + name, numbers_of(adapter["values"]));
    const std::string answer = verdict(*runs.base, numbers_of(probe["base"]),
                                       causes, Gauge(probe), kInfinity);
    result["base"] = answer;
    base_is_right = is_right(answer, true);
  }
  if (probe["mode"] == "batch") {
    const auto is_nan = [](double number) { return std::isnan(number); };
    const bool is_checked =
        !runs.beyond_ids ||
        std::all_of(runs.beyond_ids->begin(), runs.beyond_ids->end(), is_nan);
    result["ids"] = is_checked ? "right" : "ids are not checked";
  }

  result["adapters"] = Json::object();
  for (const auto &[name, found] : runs.adapters) {
    std::string answer = verdict_on_adapter(found, name, probe);
    const bool names_no_cause = is_right(answer, true) ||
                                answer == "too small to tell" ||
                                answer == "not finite";
    if (!base_is_right && !names_no_cause)
      answer = "differs";
    result["adapters"][name] = answer;
  }
  return result;
}

} // namespace probe
