// The verdicts of samples/probe/probe.hpp on many cases: `judge CASES`.
// readers.py says what a case and an answer are.

#include <fstream>
#include <iostream>

#include "probe.hpp"

using probe::Json;
using probe::Numbers;

std::optional<Numbers> outputs(const Json &list) {
  if (list.is_null())
    return std::nullopt;
  Numbers numbers;
  for (const Json &number : list)
    numbers.push_back(number.is_null() ? std::nan("") : double(number));
  return numbers;
}

Json judged(const Json &given) {
  try {
    const Json read = probe::read_probe(given["text"]);
    probe::Runs runs;
    runs.base = outputs(given["runs"]["base"]);
    for (const Json &entry : given["runs"]["adapters"])
      runs.adapters.emplace_back(entry[0], *outputs(entry[1]));
    runs.beyond_ids = outputs(given["runs"]["beyond_ids"]);
    return {{"result", probe::verdicts(read, runs)}};
  } catch (const probe::Error &error) {
    return {{"error", error.what()}};
  }
}

int main(int, char **arguments) {
  std::ifstream file(arguments[1]);
  Json answers = Json::array();
  for (const Json &given : Json::parse(file))
    answers.push_back(judged(given));
  std::cout << answers.dump() << "\n";
}
