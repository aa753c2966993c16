"""Rules for how programs that apply a PEFT adapter read experts and scales.

RULES is the table, one row a kind of content: read in the programs' sources, in the releases that
SERVERS names, and compared with readers written from those sources in the tests. `seen` says what
an adapter's file has, `verdicts` which rows that means.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lora_fx.adapter.expert_families import Family
from lora_fx.adapter.expert_layouts import GATE_UP
from lora_fx.formats.peft.names import OWN, PREFIX, TAKEN, WRAPPER
from lora_fx.text import JsonView

SERVERS = {"vllm": "vLLM 0.33.0", "sglang": "SGLang 0.5.23", "peft": "PEFT 0.21.2"}
READS = "reads"
MISREADS = "misreads"
DROPS = "drops"
REFUSES = "refuses"
_JOINED = frozenset((
    "mixtral", "minimax", "minimax_m2", "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite",
    "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe",
    "qwen3_next", "qwen3_omni_moe", "sarvam_mla", "solar_open",
))  # fmt: skip
"""model_type of models for which PEFT makes stacks of experts one by one; qwen2_moe is not there:
`_MODEL_TO_CONVERSION_PATTERN` of transformers 5.24 has it as a value only."""


class Rule(NamedTuple):
    """The way in which one program treats one kind of content.

    Attributes:
        server: A key of SERVERS.
        what: Kinds of content that `seen` names.
        models: The models for which it holds, a facet of `verdicts`; empty for all. The first row
            that holds counts.
        outcome: reads, misreads, drops or refuses.
        said: The rest of the sentence, after the program's name and the outcome.
        source: The program's source file that shows it.
    """

    server: str
    what: str
    models: str
    outcome: str
    said: str
    source: str


_MANAGER = "lora/model_manager.py"
_MODEL = "lora/lora_model.py"
_PEFT = "lora/peft_helper.py"
_POOL = "srt/lora/mem_pool.py"
_SGL = "srt/lora/lora.py"
_LAYER = "tuners/lora/layer.py"
_JOIN = "utils/transformers_weight_conversion.py"
RULES = tuple(Rule(*row) for row in (
    ("vllm", "half stacks turned apart", "elsewhere", DROPS,
     "experts of a module that it names differently, without a warning", _MANAGER),
    ("vllm", "half", "", REFUSES, "experts with one of the two stacks", _MANAGER),
    ("vllm", "stacks", "whole", READS, "stacks of this model as they are", _MANAGER),
    ("vllm", "turned", "whole", MISREADS, "stacks of PEFT 0.18: in and out are swapped", _MANAGER),
    ("vllm", "stacks turned", "", REFUSES, "stacks: for this model it reads experts one by one; it "
     "reads stacks with --enable-mixed-moe-lora-format and is_3d_lora_weight in the request",
     _MANAGER),
    ("vllm", "letters", "worded", REFUSES,
     "w1, w2 and w3, which are names of another model", _MODEL),
    ("vllm", "apart", "whole", REFUSES, "single experts: for this model it reads stacks", _MODEL),
    ("vllm", "partial", "", REFUSES, "experts, because some lack gate, up or down", _MANAGER),
    ("vllm", "apart", "", READS, "experts one by one", _MANAGER),
    ("vllm", "fused", "", REFUSES, "gate and up of one expert as one tensor", _MODEL),
    ("vllm", "axes", "", REFUSES, "three axes; it reads w1, w2, w3 with --enable-moe-shared-loras",
     _MODEL),
    ("vllm", "own", "", REFUSES,
     "tensors under lora_fx., which are not names of PEFT", "lora/utils.py"),
    ("vllm", "use_dora", "", REFUSES, "DoRA", _PEFT),
    ("vllm", "lora_bias", "", REFUSES, "a bias of B", _PEFT),
    ("sglang", "half stacks turned", "", REFUSES, "stacks under PEFT's names", "srt/lora/utils.py"),
    ("sglang", "letters", "", REFUSES, "w1, w2 and w3 in target_modules, but not their tensors; "
     "--lora-target-modules gate_up_proj down_proj helps", "srt/lora/utils.py"),
    ("sglang", "apart", "", READS, "experts one by one", _POOL),
    ("sglang", "fused", "woven", MISREADS,
     "gate and up as one tensor: it interleaves their rows again",
     "srt/lora/layers.py"),
    ("sglang", "fused", "", READS, "gate and up of one expert as one tensor", _SGL),
    ("sglang", "axes", "", READS, "experts with three axes", _POOL),
    ("sglang", "own", "", MISREADS,
     "tensors under lora_fx., because their names contain a module's name", _POOL),
    ("sglang", "use_rslora", "", MISREADS, "rsLoRA: its scale is lora_alpha / r", _SGL),
    ("sglang", "alpha_pattern", "", MISREADS, "alpha_pattern: it uses one scale for all", _SGL),
    ("sglang", "rank_pattern", "", REFUSES, "rank_pattern: it uses one r for all", _POOL),
    ("sglang", "use_dora", "", REFUSES, "DoRA", "srt/lora/lora_manager.py"),
    ("peft", "taken", "joined", REFUSES,
     "target_modules that name experts, together with stacks: it doubles the rank of "
     "the stacks", _JOIN),
    ("peft", "dropout", "", REFUSES, "lora_dropout together with target_parameters", _LAYER),
    ("peft", "stacks", "unmarked", REFUSES,
     "this model's stacks in this order of in and out", _LAYER),
    ("peft", "turned", "unmarked", READS,
     "this model's stacks in this order of in and out", _LAYER),
    ("peft", "half", "", READS, "stacks, if release 0.19.1 or later wrote them", _LAYER),
    ("peft", "stacks", "", READS, "stacks", _LAYER),
    ("peft", "turned", "", REFUSES, "stacks of PEFT 0.18: in and out are swapped", _LAYER),
    ("peft", "apart", "joined", READS, "experts one by one, and makes stacks of them", _JOIN),
    ("peft", "apart fused", "", DROPS, "experts one by one: transformers 5 has stacks", _JOIN),
    ("peft", "axes", "", DROPS, "three axes under names of modules", _LAYER),
    ("peft", "own", "", DROPS, "tensors under lora_fx., which PEFT ignores", "peft_model.py"),
))  # fmt: skip
STAYS = ("half", "partial", "own", "use_dora", "lora_bias", "alpha_pattern", "rank_pattern")
"""Kinds of content that `convert --format` cannot convert."""

_FLAGS = ("use_rslora", "alpha_pattern", "rank_pattern", "use_dora", "lora_bias")
"""Fields of the config that are kinds of content by themselves."""
_EXPERTS = re.compile(
    r"(?P<module>(?:.+\.)?experts)(?P<wrapper>(?:\.base_layer)?)"
    r"(?:\.(?P<expert>\d{1,9}))?(?:\.(?P<leaf>[a-z]\w*))?\.lora_A\.weight"
)


def seen(
    shapes: Mapping[str, tuple[int, ...]], config: JsonView, family: Family
) -> dict[str, list[str]]:
    """The kinds of content of RULES that a file has, with names of tensors or of fields.

    Args:
        shapes: Of the file's tensors.
        config: adapter_config.json.
        family: That of its model.
    """
    contents: dict[str, list[str]] = defaultdict(list)
    stacks: dict[str, dict[str, str]] = defaultdict(dict)  # module → wrapper → name
    single_experts: dict[str, set[tuple[int, str]]] = defaultdict(set)  # module → (expert, leaf)
    for name, shape in shapes.items():
        match = _EXPERTS.fullmatch(name.removeprefix(PREFIX))
        if match and f".{family.holder}.experts" not in f".{match['module']}":
            contents["elsewhere"].append(name)
        if name.startswith(OWN):
            contents["own"].append(name)
        elif match is None:
            continue
        elif match["expert"]:
            kind = "fused" if match["leaf"] == GATE_UP else "apart"
            contents[kind].append(name)
            single_experts[match["module"]].add((int(match["expert"]), match["leaf"]))
            if match["leaf"] in ("w1", "w2", "w3"):
                contents["letters"].append(name)
        elif not match["leaf"]:
            stacks[match["module"]][match["wrapper"]] = name
        elif len(shape) == 3:
            contents["axes"].append(name)

    for module, experts in single_experts.items():
        count = 1 + max(expert for expert, _ in experts)
        if "fused" not in contents and len(experts) < 3 * count:
            contents["partial"].append(module)
    for names_by_wrapper in stacks.values():
        contents[_kind_of_stacks(names_by_wrapper, shapes)] += names_by_wrapper.values()
    _add_fields(contents, config)
    return dict(contents)


def _kind_of_stacks(
    names_by_wrapper: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """Whether a module has both stacks, one of them, or stacks with in and out swapped."""
    down_name = names_by_wrapper.get("", "")
    gate_up_name = names_by_wrapper.get(f".{WRAPPER}", "")
    in_of_gate_up = shapes.get(gate_up_name, ())[1:2]
    out_of_down = shapes.get(down_name.replace("_A.", "_B."), ())[:1]
    # In of gate_up_proj and out of down_proj: hidden twice, or 2·inner and inner.
    if in_of_gate_up and in_of_gate_up == (2 * sum(out_of_down),):
        return "turned"
    return "stacks" if down_name and gate_up_name else "half"


def _add_fields(contents: dict[str, list[str]], config: JsonView) -> None:
    """Add the kinds of content that the config has."""
    for field in _FLAGS:
        if config.get(field):
            contents[field] = [field]
    if not config.get("target_parameters"):
        return
    target_modules = config.get("target_modules")
    modules = target_modules if isinstance(target_modules, list) else []
    taken = [str(module) for module in modules if str(module).rpartition(".")[2] in TAKEN]
    if taken:
        contents["taken"] = taken
    if config.get("lora_dropout"):
        contents["dropout"] = ["lora_dropout"]


def verdicts(
    server: str, contents: Mapping[str, list[str]], family: Family, types: frozenset[str]
) -> Iterator[tuple[Rule, list[str]]]:
    """The row of RULES that holds for each kind of content, with the names that it is about.

    Args:
        server: A key of SERVERS.
        contents: The kinds of content that `seen` names.
        family: That of the model.
        types: Its model_type and those of its parts.
    """
    holding_facets = {
        "": True,
        "whole": family.whole,
        "woven": family.interleaved,
        "worded": "w1" not in family.split,
        "elsewhere": "elsewhere" in contents,
        "unmarked": family.transposed and not family.marked,
        "joined": bool(types & _JOINED),
    }
    for content, names in contents.items():
        for rule in RULES:
            is_about = rule.server == server and content in rule.what.split()
            if is_about and holding_facets[rule.models]:
                yield rule, names
                break
