// Check an .onnx file of lora-fx against the probe that it carries:
//
//   apt install g++ libonnxruntime-dev nlohmann-json3-dev
//   g++ -std=c++17 check_probe.cpp -I/usr/include/onnxruntime -lonnxruntime
//   ./a.out model.onnx
//
// This needs neither lora-fx nor the model that the file was made from.
// docs/probe.md has the format and the rules of the verdict. The adapters of a
// file of mode switch or load lie beside it. Printed is one JSON object, such
// as {"base":"right","adapters":{"de":"right","fr":"no effect"}}.
//
// The exit code is 0 if all are right, or too small to tell; 1 if one is not;
// and 2 with one line on stderr if the file has no probe, a damaged one, or
// cannot be run. With --any-precision, "right in bfloat16" is right too.

#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>

#include <onnxruntime_cxx_api.h>

#include "probe.hpp"

using probe::Json;
using probe::Numbers;
using Shape = std::vector<int64_t>;
using Tensors = std::vector<std::pair<std::string, Ort::Value>>;

// Bytes of files

std::string bytes_of(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    throw probe::Error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

/// A number at a place in the bytes of a file.
template <typename T> T number_at(const std::string &bytes, size_t at) {
  if (at > bytes.size() || bytes.size() - at < sizeof(T))
    throw probe::Error("an adapter's file is damaged");
  T number;
  std::memcpy(&number, bytes.data() + at, sizeof(T));
  return number;
}

std::string part_of(const std::string &bytes, size_t at, size_t length) {
  if (at > bytes.size() || bytes.size() - at < length)
    throw probe::Error("an adapter's file is damaged");
  return bytes.substr(at, length);
}

// Tensors

Ort::Value tensor_of(const Shape &shape, ONNXTensorElementDataType dtype) {
  Ort::AllocatorWithDefaultOptions allocator;
  return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), dtype);
}

template <typename T> T element_from(double number) {
  return static_cast<T>(number);
}

template <> Ort::BFloat16_t element_from(double number) {
  return Ort::BFloat16_t(static_cast<float>(number));
}

template <> Ort::Float16_t element_from(double number) {
  return Ort::Float16_t(static_cast<float>(number));
}

/// An input, of elements that are computed in double.
template <typename T> Ort::Value input_of(const Json &described) {
  const Shape shape = described["shape"];
  auto tensor = tensor_of(shape, Ort::TypeToTensorType<T>::type);
  const size_t count = tensor.GetTensorTypeAndShapeInfo().GetElementCount();
  T *elements = tensor.template GetTensorMutableData<T>();
  if (described.contains("values")) {
    const Numbers values = described["values"];
    for (size_t i = 0; i < count; ++i)
      elements[i] = element_from<T>(values[i]);
  } else if (described.contains("fill")) {
    std::fill_n(elements, count, element_from<T>(described["fill"]));
  } else {
    const uint32_t seed = described["drawn"];
    for (size_t i = 0; i < count; ++i)
      elements[i] = element_from<T>(probe::drawn(i, seed));
  }
  return tensor;
}

Ort::Value input_of(const Json &described) {
  using Maker = Ort::Value (*)(const Json &);
  static const std::map<std::string, Maker> makers = {
      {"bool", input_of<bool>},
      {"int8", input_of<int8_t>},
      {"uint8", input_of<uint8_t>},
      {"int16", input_of<int16_t>},
      {"uint16", input_of<uint16_t>},
      {"int32", input_of<int32_t>},
      {"uint32", input_of<uint32_t>},
      {"int64", input_of<int64_t>},
      {"uint64", input_of<uint64_t>},
      {"float16", input_of<Ort::Float16_t>},
      {"bfloat16", input_of<Ort::BFloat16_t>},
      {"float32", input_of<float>},
      {"float64", input_of<double>},
  };
  return makers.at(described["dtype"])(described);
}

/// Element `index` of an output, in row-major order.
double element_of(const Ort::Value &tensor, size_t index) {
  switch (tensor.GetTensorTypeAndShapeInfo().GetElementType()) {
  case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    return tensor.GetTensorData<float>()[index];
  case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
    return tensor.GetTensorData<double>()[index];
  case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
    return tensor.GetTensorData<Ort::Float16_t>()[index].ToFloat();
  case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
    return tensor.GetTensorData<Ort::BFloat16_t>()[index].ToFloat();
  case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
    return tensor.GetTensorData<int32_t>()[index];
  case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
    return static_cast<double>(tensor.GetTensorData<int64_t>()[index]);
  case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
    return tensor.GetTensorData<bool>()[index];
  default:
    throw probe::Error("an output has a dtype that this program cannot read");
  }
}

// Files of adapters

/// The most bytes of one tensor.
constexpr double kMostBytes = 1u << 31;

/// The bytes of an element.
size_t width_of(ONNXTensorElementDataType dtype) {
  switch (dtype) {
  case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    return 4;
  case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
  case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
    return 2;
  default:
    throw probe::Error("an adapter has a dtype that this program cannot read");
  }
}

/// A tensor as a file has it.
struct Stored {
  std::string name;
  ONNXTensorElementDataType dtype;
  Shape shape;
  std::string bytes;

  /// Throw unless there are as many bytes as the shape says.
  void check() const {
    for (const int64_t size : shape)
      if (size < 0)
        throw probe::Error("tensor " + name + " has a negative size");
    const double expected = product(0, shape.size()) * width_of(dtype);
    if (static_cast<double>(bytes.size()) != expected)
      throw probe::Error("tensor " + name + " has not the bytes of its shape");
  }

  /// The product of the sizes of some axes.
  double product(size_t first, size_t end) const {
    double count = 1;
    for (size_t axis = first; axis < end; ++axis)
      count *= static_cast<double>(shape[axis]);
    return count;
  }

  /// The tensor of a session, which reads these bytes.
  Ort::Value view() {
    return Ort::Value::CreateTensor(
        Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault),
        bytes.data(), bytes.size(), shape.data(), shape.size(), dtype);
  }

  /// Add zeros along an axis, up to a size; those of a rank change no product.
  void pad(size_t axis, int64_t size) {
    if (axis >= shape.size() || shape[axis] > size)
      throw probe::Error("tensor " + name + " has a rank above the file's");
    const double rows = product(0, axis);
    const double width = product(axis + 1, shape.size()) * width_of(dtype);
    if (rows * width * size > kMostBytes)
      throw probe::Error("tensor " + name + " is too large");
    const size_t stored = static_cast<size_t>(width * shape[axis]);
    const size_t total = static_cast<size_t>(width * size);
    std::string padded;
    for (size_t row = 0; row < static_cast<size_t>(rows); ++row)
      padded += bytes.substr(row * stored, stored) +
                std::string(total - stored, '\0');
    bytes = padded;
    shape[axis] = size;
  }
};

/// A .safetensors file: 8 bytes of length, a JSON header, and the data.
std::vector<Stored> read_safetensors(const std::string &path) {
  static const std::map<std::string, ONNXTensorElementDataType> dtypes = {
      {"F16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
      {"BF16", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
      {"F32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
  };
  const std::string file = bytes_of(path);
  const size_t length = number_at<uint64_t>(file, 0);
  const Json header = Json::parse(part_of(file, 8, length));
  std::vector<Stored> tensors;
  for (const auto &[name, entry] : header.items()) {
    if (name == "__metadata__")
      continue;
    const size_t begin = entry.at("data_offsets").at(0);
    const size_t end = entry.at("data_offsets").at(1);
    tensors.push_back({name, dtypes.at(entry.at("dtype")), entry.at("shape"),
                       part_of(file, 8 + length + begin, end - begin)});
    tensors.back().check();
  }
  return tensors;
}

/// The tensors of a session by name; they read the bytes of `stored`.
Tensors views(std::vector<Stored> &stored) {
  Tensors tensors;
  for (Stored &tensor : stored)
    tensors.emplace_back(tensor.name, tensor.view());
  return tensors;
}

/// An .onnx_adapter file: a flatbuffer, which the C++ API does not show.
///
///   Adapter    format_version, adapter_version, model_version, [Parameter]
///   Parameter  name: string; dims: [int64]; data_type: int32; data: [uint8]
///
/// Source: onnxruntime/lora/adapter_format/adapter_schema.fbs. An offset counts
/// from its own position, and a table begins with the distance back to the list
/// of its fields' positions.
class AdapterFile {
public:
  explicit AdapterFile(const std::string &path) : bytes_(bytes_of(path)) {
    if (part_of(bytes_, 4, 4) != "TORT")
      throw probe::Error(path + ": not an adapter of ONNX Runtime");
  }

  std::vector<Stored> tensors() const {
    std::vector<Stored> result;
    const auto [first, count] = list(follow(0), 3);
    for (size_t i = 0; i < count; ++i) {
      const size_t table = follow(first + 4 * i);
      const auto [name, name_length] = list(table, 0);
      const auto [dims, axes] = list(table, 1);
      const auto dtype = number_at<int32_t>(bytes_, field(table, 2));
      const auto [data, length] = list(table, 3);
      Shape shape;
      for (size_t axis = 0; axis < axes; ++axis)
        shape.push_back(number_at<int64_t>(bytes_, dims + 8 * axis));
      result.push_back({part_of(bytes_, name, name_length),
                        static_cast<ONNXTensorElementDataType>(dtype), shape,
                        part_of(bytes_, data, length)});
      result.back().check();
    }
    return result;
  }

private:
  size_t follow(size_t at) const {
    return at + number_at<uint32_t>(bytes_, at);
  }

  size_t field(size_t table, size_t index) const {
    const size_t fields = table - number_at<int32_t>(bytes_, table);
    return table + number_at<uint16_t>(bytes_, fields + 4 + 2 * index);
  }

  /// Where the elements of a list begin, and how many there are.
  std::pair<size_t, size_t> list(size_t table, size_t index) const {
    const size_t at = follow(field(table, index));
    return {at + 4, number_at<uint32_t>(bytes_, at)};
  }

  std::string bytes_;
};

// The runs

class Model {
public:
  explicit Model(const std::string &path) : path_(path) {
    session_ = opened({});
    Ort::AllocatorWithDefaultOptions allocator;
    const Ort::ModelMetadata metadata = session_.GetModelMetadata();
    const auto text =
        metadata.LookupCustomMetadataMapAllocated("lora_fx.probe", allocator);
    if (!text)
      throw probe::Error(path + ": the file has no probe");
    const auto manifest = metadata.LookupCustomMetadataMapAllocated(
        "lora_fx.manifest", allocator);
    manifest_ = manifest ? manifest.get() : "";
    probe_ = probe::read_probe(text.get());
    mode_ = probe_["mode"];
    for (const auto &[name, described] : probe_["inputs"].items())
      inputs_.emplace_back(name, input_of(described));
  }

  Json check() {
    probe::Runs runs;
    const Json &adapters = probe_["adapters"];
    if (probe_.contains("base") && (mode_ != "merged" || adapters.empty()))
      runs.base = base();
    for (const auto &[name, fields] : adapters.items())
      runs.adapters.emplace_back(name, adapter(fields));
    if (mode_ == "batch")
      runs.beyond_ids = beyond_ids();
    return probe::verdicts(probe_, runs);
  }

private:
  Numbers base() {
    if (mode_ == "batch")
      return with_id(0);
    if (probe_.contains("base_file"))
      return run_with(beside(probe_["base_file"]));
    return run(session_, {});
  }

  Numbers adapter(const Json &fields) {
    if (mode_ == "batch")
      return with_id(fields["id"]);
    if (mode_ == "merged")
      return run(session_, {});

    const std::string file = beside(fields["file"]);
    if (mode_ == "load") {
      std::vector<Stored> initializers = padded(file);
      Ort::Session session = opened(views(initializers));
      return run(session, {});
    }
    if (probe_.contains("base_file"))
      return run_with(file);
    const std::string bytes = bytes_of(file);
    const auto active = Ort::LoraAdapter::CreateLoraAdapterFromArray(
        bytes.data(), bytes.size(), nullptr);
    Ort::RunOptions options;
    options.AddActiveLoraAdapter(active);
    return run(session_, {}, options);
  }

  /// Run a portable file with A and B of a .safetensors file.
  Numbers run_with(const std::string &file) {
    std::vector<Stored> factors = read_safetensors(file);
    return run(session_, views(factors));
  }

  std::optional<Numbers> beyond_ids() {
    double last = 0;
    for (const Json &adapter : probe_["adapters"])
      last = std::max(last, adapter["id"].get<double>());
    try {
      return with_id(static_cast<int64_t>(last) + 1);
    } catch (const Ort::Exception &) {
      return std::nullopt;
    }
  }

  /// Run a file of mode batch with one id for every row, and with the scale 1.
  Numbers with_id(int64_t id) {
    const auto symbols = first_sizes();
    const std::string batch = symbols.at("adapter_ids");
    for (const auto &[name, described] : probe_["inputs"].items()) {
      const auto found = symbols.find(name);
      if (found == symbols.end() || found->second != batch)
        continue;
      const Json rows = Json::array({described["shape"][0]});
      Tensors tensors;
      tensors.emplace_back("adapter_ids",
                           input_of<int64_t>({{"shape", rows}, {"fill", id}}));
      if (symbols.count("adapter_scales"))
        tensors.emplace_back("adapter_scales",
                             input_of<float>({{"shape", rows}, {"fill", 1}}));
      return run(session_, tensors);
    }
    throw probe::Error("no input of the probe has the rows of adapter_ids");
  }

  /// The first size of every input that has one: its name, or the number.
  std::map<std::string, std::string> first_sizes() const {
    Ort::AllocatorWithDefaultOptions allocator;
    std::map<std::string, std::string> sizes;
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {
      const Ort::TypeInfo type = session_.GetInputTypeInfo(i);
      const auto info = type.GetTensorTypeAndShapeInfo();
      std::vector<const char *> symbols(info.GetDimensionsCount(), "");
      if (symbols.empty())
        continue;
      info.GetSymbolicDimensions(symbols.data(), symbols.size());
      const std::string symbol = symbols[0];
      sizes[session_.GetInputNameAllocated(i, allocator).get()] =
          symbol.empty() ? std::to_string(info.GetShape()[0]) : symbol;
    }
    return sizes;
  }

  /// Open the file, with other tensors for some of its initializers.
  Ort::Session opened(const Tensors &initializers) {
    Ort::SessionOptions options;
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
    std::vector<const char *> names;
    std::vector<const OrtValue *> values;
    for (const auto &[name, tensor] : initializers) {
      names.push_back(name.c_str());
      values.push_back(tensor);
    }
    if (!initializers.empty())
      Ort::ThrowOnError(Ort::GetApi().AddExternalInitializers(
          options, names.data(), values.data(), names.size()));
    return Ort::Session(env_, path_.c_str(), options);
  }

  /// Run, with tensors beside the probe's inputs, and return the outputs at the
  /// points.
  Numbers run(Ort::Session &session, const Tensors &tensors,
              const Ort::RunOptions &options = Ort::RunOptions()) {
    std::map<std::string, const OrtValue *> inputs;
    for (const auto &[name, tensor] : inputs_)
      inputs[name] = tensor;
    for (const auto &[name, tensor] : tensors)
      inputs[name] = tensor;
    std::vector<const char *> input_names;
    std::vector<const OrtValue *> values;
    for (const auto &[name, value] : inputs) {
      input_names.push_back(name.c_str());
      values.push_back(value);
    }

    std::set<std::string> outputs;
    for (const Json &point : probe_["points"])
      outputs.insert(point[0]);
    std::vector<const char *> output_names;
    for (const std::string &name : outputs)
      output_names.push_back(name.c_str());
    std::vector<OrtValue *> results(outputs.size(), nullptr);
    Ort::ThrowOnError(Ort::GetApi().Run(
        session, options, input_names.data(), values.data(), values.size(),
        output_names.data(), output_names.size(), results.data()));

    std::map<std::string, Ort::Value> found;
    for (size_t i = 0; i < results.size(); ++i)
      found.emplace(output_names[i], Ort::Value(results[i]));
    return at_points(found);
  }

  Numbers at_points(const std::map<std::string, Ort::Value> &outputs) const {
    for (const auto &[name, tensor] : outputs) {
      const Shape shape = tensor.GetTensorTypeAndShapeInfo().GetShape();
      const Json &expected = probe_["outputs"][name]["shape"];
      if (Json(shape) != expected)
        throw probe::Error("output " + name + " is " + Json(shape).dump() +
                           ", in the probe " + expected.dump());
    }
    Numbers numbers;
    for (const Json &point : probe_["points"])
      numbers.push_back(element_of(outputs.at(point[0]), point[1]));
    return numbers;
  }

  /// The tensors of an .onnx_adapter in the rank that the file of mode load
  /// has: A is [*batch, in, rank], and B [*batch, rank, out].
  std::vector<Stored> padded(const std::string &path) const {
    std::map<std::string, std::pair<int, int64_t>> ranks;
    const Json manifest = Json::parse(manifest_);
    for (const Json &slot : manifest.at("slots")) {
      ranks[slot.at("a")] = {1, slot.at("rank")};
      ranks[slot.at("b")] = {2, slot.at("rank")};
    }
    std::vector<Stored> tensors = AdapterFile(path).tensors();
    for (Stored &tensor : tensors) {
      const auto [from_end, rank] = ranks.at(tensor.name);
      tensor.pad(tensor.shape.size() - from_end, rank);
    }
    return tensors;
  }

  /// The path of a file in the folder of the model.
  std::string beside(const std::string &name) const {
    const size_t folder = path_.find_last_of("/\\") + 1; // 0 for none
    return path_.substr(0, folder) + name;
  }

  Ort::Env env_{ORT_LOGGING_LEVEL_FATAL};
  std::string path_;
  Ort::Session session_{nullptr};
  std::string manifest_;
  Json probe_;
  std::string mode_;
  Tensors inputs_;
};

bool all_right(const Json &result, bool any_precision) {
  std::vector<std::string> answers;
  for (const auto &[key, answer] : result.items())
    if (answer.is_string())
      answers.push_back(answer);
  for (const auto &[name, answer] : result["adapters"].items())
    answers.push_back(answer);
  for (const std::string &answer : answers)
    if (answer != "too small to tell" &&
        !probe::is_right(answer, any_precision))
      return false;
  return true;
}

int main(int count, char **arguments) {
  const std::vector<std::string> options(arguments + 1, arguments + count);
  std::vector<std::string> paths;
  for (const std::string &option : options)
    if (option != "--any-precision")
      paths.push_back(option);
  if (paths.size() != 1) {
    std::cerr << "Error: check_probe [--any-precision] MODEL.onnx\n";
    return 2;
  }
  // Debian's build writes to std::cerr that every operator is there twice
  std::cerr.setstate(std::ios::failbit);
  try {
    const Json result = Model(paths[0]).check();
    std::cout << probe::escaped(result) << "\n";
    return all_right(result, options.size() > 1) ? 0 : 1;
  } catch (const std::exception &error) {
    const std::string message = probe::escaped(error.what());
    std::cerr.clear();
    std::cerr << "Error: " << message.substr(1, message.size() - 2) << "\n";
    return 2;
  }
}
